#!/usr/bin/env bash
# GRPO with its reward on a node of its own: a heterogeneous job, the first part trains (job.sh), the second serves the reward.
#   sbatch --nodes 2 --gpus-per-node 8 : --nodes 1 --gpus-per-node 1 \
#       launch/slurm/job_with_reward_server.sh -- data.train_path=/shared/my.jsonl
# Variables are those of job.sh; REWARD is the reward to serve, as the YAML would have it; SERVER_PYTHON runs the server (default: PYTHON),
# in the same CONTAINER.
#SBATCH --job-name=megatron-ext
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
# Of one name only the first parts: a job would wait for its own second part.
#SBATCH --dependency=singleton
#SBATCH hetjob
#SBATCH --job-name=megatron-ext-reward
#SBATCH --ntasks-per-node=1
set -euo pipefail
[ "${1:-}" = -- ] && shift
: "${REWARD:?name a reward, e.g. exact_answer}" "${RUN_DIR:?name a folder that all nodes share}"
export ROOT=${ROOT:-$SLURM_SUBMIT_DIR}
# shellcheck source=launch/slurm/where.sh
source "$ROOT/launch/slurm/where.sh"
url_file=$RUN_DIR.slurm/reward-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}.url
mkdir -p "$(dirname "$url_file")"
node=$(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_1" | head -n 1)
address=$(addresses_of "$node")
srun --het-group=1 --ntasks=1 "${in_container[@]}" "${SERVER_PYTHON:-$PYTHON}" "$ROOT/launch/serve_reward.py" \
    --reward "$REWARD" --name "${address#*=}" --url-file "$url_file" &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
for ((i = 0; i < 600; i++)); do
    [ -e "$url_file" ] && break
    kill -0 "$server" 2>/dev/null || { echo "error: the reward server has ended, see above" >&2 && exit 1; }
    sleep 0.5
done
[ -e "$url_file" ] || { echo "error: the reward server on $node has not come up in five minutes, see above" >&2 && exit 1; }
MEGATRON_EXT_REWARD_URL=$(cat "$url_file")
export MEGATRON_EXT_REWARD_URL
set -- "$@" trainer.grpo.reward=http
# shellcheck source=launch/slurm/job.sh
source "$ROOT/launch/slurm/job.sh"
