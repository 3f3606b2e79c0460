#!/usr/bin/env bash
# What job.sh and job_with_reward_server.sh have in common: the interpreter, srun's options for the container, what is heard early.
# shellcheck disable=SC2034 # used by job.sh
told=${told:-}
trap 'told=yes' USR1 # a request to stop that comes before there is a run
export PYTHON=${PYTHON:-$([ -n "${CONTAINER:-}" ] && echo python || echo "$ROOT/.venv/bin/python")}
in_container=()
if [ -n "${CONTAINER:-}" ]; then
    shared=$(dirname "$RUN_DIR")
    # shellcheck disable=SC2034 # used by the scripts that source this one
    in_container=(--container-image "$CONTAINER" --container-mounts "$ROOT:$ROOT,$shared:$shared${MOUNTS:+,$MOUNTS}")
fi

# node=address of each of a list of nodes, as Slurm itself reaches it: a name need not resolve everywhere, nor to the same interface.
addresses_of() { scontrol -o show node "$1" | sed -n 's/^NodeName=\([^ ]*\) .* NodeAddr=\([^ ]*\) .*/\1=\2/p'; }
