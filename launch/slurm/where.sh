#!/usr/bin/env bash
# What job.sh and job_with_reward_server.sh have in common: the interpreter, and srun's options for the container.
export PYTHON=${PYTHON:-$([ -n "${CONTAINER:-}" ] && echo python || echo "$ROOT/.venv/bin/python")}
in_container=()
if [ -n "${CONTAINER:-}" ]; then
    shared=$(dirname "$RUN_DIR")
    # shellcheck disable=SC2034 # used by the scripts that source this one
    in_container=(--container-image "$CONTAINER" --container-mounts "$ROOT:$ROOT,$shared:$shared${MOUNTS:+,$MOUNTS}")
fi
