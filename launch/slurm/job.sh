#!/usr/bin/env bash
# One job script for every recipe. `launch/submit.py` fills in nodes, GPUs and the like, checks them and submits it; by hand:
#   sbatch --nodes 2 --gpus-per-node 8 --export ALL,RECIPE=train_grpo,CONFIG=grpo,RUN_DIR=/shared/runs/mine \
#       launch/slurm/job.sh -- model=qwen3_8b cluster=2x8 pretrained_checkpoint.restore_from_path=/shared/Qwen3-8B \
#       data.train_path=/shared/my.jsonl trainer.grpo.reward=exact_answer
#
# RECIPE     file of recipes/ without .py                 RUN_DIR    folder of the run, on a filesystem that all nodes share
# CONFIG     file of nemo_configs/ without .yaml          GPUS       processes on each node (default: the GPUs of the job)
# PYTHON     the interpreter (default: .venv/bin/python of this repository; in a container: python)
# CONTAINER  image for pyxis, with MOUNTS=/host:/container,...; without it the virtual environment is used
# CANARY_GPUS     GPUs that each node must have (default: GPUS; 0 for nodes without)
# CANARY_SECONDS  for looking at the nodes; one that has not answered by then is named (default: 120, with a container, which may have
#                 to be fetched first, 1200)
# RENDEZVOUS_PORT of the first node (default: from the job's number)
# Arguments after -- go to the recipe byte for byte.
#
# Set account, partition and time for your cluster, here or on sbatch's command line:
#SBATCH --job-name=megatron-ext
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
# Preempted or failed nodes put the job back into the queue; it goes on from its last checkpoint.
#SBATCH --requeue
#SBATCH --open-mode=append
# Three minutes before the time is up this script is told (B: only this script): the run saves, and queues itself again.
#SBATCH --signal=B:USR1@180
# Jobs of one name run one after the other: submit several to have more time.
#SBATCH --dependency=singleton
set -euo pipefail
[ "${1:-}" = -- ] && shift
: "${RECIPE:?name a file of recipes/}" "${CONFIG:?name a file of nemo_configs/}" "${RUN_DIR:?name a folder that all nodes share}"
# sbatch copies this script to the node; the repository is where it was submitted from, unless ROOT names it.
export ROOT=${ROOT:-$SLURM_SUBMIT_DIR}
# shellcheck source=launch/slurm/where.sh
source "$ROOT/launch/slurm/where.sh"
resumes=$(python3 "$ROOT/recipes/registry.py" resumes "$RECIPE")
GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-1}}
start=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
LOGS=$RUN_DIR.slurm/$start
STOP_FILE=$LOGS/stop
mkdir -p "$LOGS"
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
NODE_ADDRESSES=$(addresses_of "$SLURM_JOB_NODELIST")
head=$(addresses_of "${hosts[0]}")
export GPUS RECIPE CONFIG LOGS NODE_ADDRESSES
export RENDEZVOUS_ID=$start RENDEZVOUS=${head#*=}:${RENDEZVOUS_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
# Trainers look for this file after every step: a signal would have to find its way through srun, containers and torchrun.
export MEGATRON_EXT_STOP_FILE=$STOP_FILE

# NCCL: an error or a lost peer ends the ranks instead of leaving them waiting; these are also torch's defaults, said here so that a
# cluster's own environment does not undo them. Name the network's interfaces where nodes have several: NCCL_SOCKET_IFNAME for
# the first contact, NCCL_IB_HCA for InfiniBand. NCCL_DEBUG=INFO tells which it took.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Megatron overlaps tensor-parallel communication with products only when launches keep their order.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Threads: each process takes its share of the node's cores; more only make them wait for each other.
cores=${SLURM_CPUS_ON_NODE:-$(nproc)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > GPUS ? cores / GPUS : 1))}

# One task on each node; if one ends badly all are ended (--kill-on-bad-exit).
on_all_nodes=(srun --kill-on-bad-exit=1 --ntasks-per-node=1 --ntasks "$SLURM_JOB_NUM_NODES" "${in_container[@]}")

trap 'echo "time is nearly up: the run saves and stops"; touch "$STOP_FILE"' USR1
[ -z "$told" ] || touch "$STOP_FILE"
echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $RECIPE on ${#hosts[@]} x $GPUS, logs in $LOGS"
canary=$ROOT/launch/canary.py
canary_args=(--folder "$LOGS/canary" --gpus "${CANARY_GPUS:-$GPUS}")
mkdir -p "$LOGS/canary"
# A node that fails, or hangs, is named by what follows.
timeout --kill-after 10 "${CANARY_SECONDS:-$([ -n "${CONTAINER:-}" ] && echo 1200 || echo 120)}" \
    "${on_all_nodes[@]}" "$PYTHON" "$canary" look "${canary_args[@]}" || true
python3 "$canary" judge "${canary_args[@]}" --nodes "${hosts[@]}"

# Training goes on from where it was; evaluations start anew.
resume=()
[ "$resumes" = no ] || resume=(exp_manager.resume_if_exists=true)
"${on_all_nodes[@]}" bash "$ROOT/launch/slurm/node.sh" --config-name "$CONFIG" "$@" "exp_manager.explicit_log_dir='${RUN_DIR//\'/\\\'}'" \
    "trainer.num_nodes=$SLURM_JOB_NUM_NODES" "trainer.devices=$GPUS" "${resume[@]}" &
step=$!
while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done # a trap interrupts the wait
code=0
wait "$step" || code=$?
# The file is also there when nodes were told (node.sh).
if [ "$code" = 0 ] && [ "${#resume[@]}" -gt 0 ] && [ -e "$STOP_FILE" ] && [ ! -e "$RUN_DIR/checkpoints/final" ]; then
    echo "the run has saved and is queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
