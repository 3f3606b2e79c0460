#!/usr/bin/env bash
# What job.sh and job_with_servers.sh have in common: the interpreter, srun's options for the container, what is heard early.
# shellcheck disable=SC2034 # used by job.sh
told=${told:-}
trap 'told=yes' USR1 # a request to stop that comes before there is a run
export PYTHON=${PYTHON:-$([ -n "${CONTAINER:-}" ] && echo python || echo "$ROOT/.venv/bin/python")}
# srun's options for an image and its mounts, one a line.
container_options() {
    local shared
    shared=$(dirname "$RUN_DIR")
    printf '%s\n' --container-image "$1" --container-mounts "$ROOT:$ROOT,$shared:$shared${2:+,$2}"
}
# shellcheck disable=SC2034 # used by the scripts that source this one
in_container=()
[ -z "${CONTAINER:-}" ] || mapfile -t in_container < <(container_options "$CONTAINER" "${MOUNTS:-}")

# node=address of each of a list of nodes, as Slurm itself reaches it: a name need not resolve everywhere, nor to the same interface.
addresses_of() { scontrol -o show node "$1" | sed -n 's/^NodeName=\([^ ]*\) .* NodeAddr=\([^ ]*\) .*/\1=\2/p'; }
