#!/usr/bin/env bash
# GRPO with servers on nodes of their own: a heterogeneous job. The first part trains (job.sh), the next serves the reward, the last
# vLLM; either of these may be missing. By hand, with both:
#   sbatch --nodes 2 --gpus-per-node 8 --export ALL,REWARD=exact_answer,VLLM=yes \
#       : --nodes 1 --ntasks-per-node 1 --job-name reward : --nodes 1 --ntasks-per-node 1 --gpus-per-node 8 --job-name vllm \
#       launch/slurm/job_with_servers.sh -- data.train_path=/shared/my.jsonl trainer.grpo.rollout.source=vllm trainer.grpo.rollout.start=1
# The other parts need names of their own: a job would wait for its own second part (singleton).
#
# Variables are those of job.sh, and
# REWARD         the reward to serve, as the YAML would have it; SERVER_PYTHON runs the server (default: PYTHON), in the same CONTAINER
# VLLM           not empty: the last part serves vLLM, on each of its nodes as trainer.grpo.rollout says
# VLLM_CONTAINER image for these nodes, with VLLM_MOUNTS (default: CONTAINER and MOUNTS); inside, VLLM_PYTHON needs no package (default:
#                python3), and trainer.grpo.rollout.python names the interpreter with vLLM in it
#SBATCH --job-name=megatron-ext
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --dependency=singleton
set -euo pipefail
[ "${1:-}" = -- ] && shift
: "${RUN_DIR:?name a folder that all nodes share}"
[ -n "${REWARD:-}${VLLM:-}" ] || { echo "error: neither REWARD nor VLLM is set: launch/slurm/job.sh trains alone" >&2 && exit 1; }
# sbatch copies this script to the node; the repository is where it was submitted from, unless ROOT names it.
export ROOT=${ROOT:-$SLURM_SUBMIT_DIR}
# shellcheck source=launch/slurm/where.sh
source "$ROOT/launch/slurm/where.sh"
this_start=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
mkdir -p "$RUN_DIR.slurm"
group=0
servers=()
trap 'kill "${servers[@]}" 2>/dev/null || true' EXIT
next_part() { # sets group, and nodes to its list
    group=$((group + 1))
    local name=SLURM_JOB_NODELIST_HET_GROUP_$group
    nodes=${!name:?the job has no part $group: give sbatch one for each kind of server}
}

if [ -n "${REWARD:-}" ]; then
    next_part
    # Requests must show it; made anew for each start, and never written down.
    MEGATRON_EXT_REWARD_TOKEN=$(head -c 24 /dev/urandom | base64 | tr -d '+/=')
    export MEGATRON_EXT_REWARD_TOKEN
    url_file=$RUN_DIR.slurm/reward-$this_start.url
    node=$(scontrol show hostnames "$nodes" | head -n 1)
    address=$(addresses_of "$node")
    srun --het-group="$group" --ntasks=1 "${in_container[@]}" "${SERVER_PYTHON:-$PYTHON}" "$ROOT/launch/serve_reward.py" \
        --reward "$REWARD" --name "${address#*=}" --url-file "$url_file" &
    servers+=($!)
    for ((i = 0; i < 600; i++)); do
        [ -e "$url_file" ] && break
        kill -0 "${servers[-1]}" 2>/dev/null || { echo "error: the reward server has ended, see above" >&2 && exit 1; }
        sleep 0.5
    done
    [ -e "$url_file" ] || { echo "error: the reward server on $node has not come up in five minutes, see above" >&2 && exit 1; }
    MEGATRON_EXT_REWARD_URL=$(cat "$url_file")
    export MEGATRON_EXT_REWARD_URL
    set -- "$@" trainer.grpo.reward=http
fi

if [ -n "${VLLM:-}" ]; then
    next_part
    meeting=$RUN_DIR.slurm/vllm-$this_start
    mkdir -m 700 "$meeting"
    scontrol show hostnames "$nodes" >"$meeting/machines"
    options=("${in_container[@]}")
    python=${VLLM_PYTHON:-$([ -n "${CONTAINER:-}${VLLM_CONTAINER:-}" ] && echo python3 || echo "$PYTHON")}
    [ -z "${VLLM_CONTAINER:-}" ] || mapfile -t options < <(container_options "$VLLM_CONTAINER" "${VLLM_MOUNTS:-}")
    count=$(wc -l <"$meeting/machines")
    srun --het-group="$group" --nodes="$count" --ntasks="$count" --ntasks-per-node=1 "${options[@]}" \
        "$python" "$ROOT/launch/serve_vllm.py" --rendezvous "$meeting" --addresses "$(addresses_of "$nodes")" &
    servers+=($!)
    set -- "$@" "trainer.grpo.rollout.rendezvous='${meeting//\'/\\\'}'"
fi
# shellcheck source=launch/slurm/job.sh
source "$ROOT/launch/slurm/job.sh"
