#!/usr/bin/env bash
# What one node of a job runs: torchrun, which starts a process for each GPU. Its environment comes from job.sh.
# Each rank's output goes to $LOGS/<node>/<rank>/, and to the job's log.
set -euo pipefail
# `scancel --signal=USR1`, unlike Slurm's own warning, reaches every process of a node and not the job's script: this script notes it for
# the trainers, which stop and save, and for the job's script; torchrun, which would end, ignores it.
trap 'echo "told to stop: the run saves and stops"; touch "$MEGATRON_EXT_STOP_FILE"' USR1
(
    trap '' USR1
    # Said, not guessed: torch would look for its host by comparing names with addresses.
    address=$(sed -n "s/^$SLURMD_NODENAME=//p" <<<"$NODE_ADDRESSES")
    exec "$PYTHON" -m torch.distributed.run --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$GPUS" --max-restarts 0 \
        --rdzv-backend c10d --rdzv-id "$RENDEZVOUS_ID" --rdzv-endpoint "$RENDEZVOUS" \
        --rdzv-conf "is_host=$((SLURM_NODEID == 0))" --local-addr "$address" --log-dir "$LOGS/$SLURMD_NODENAME" --tee 3 "$ROOT/recipes/$RECIPE.py" "$@"
) &
run=$!
while kill -0 "$run" 2>/dev/null; do wait "$run" || true; done # a trap interrupts the wait
wait "$run"
