#!/usr/bin/env bash
# A real Slurm cluster on this machine, for tests: munged, slurmctld and one slurmd for each "node", in a folder of their own.
#   launch/test_cluster.sh start FOLDER [NODES]     # then: export SLURM_CONF=FOLDER/slurm.conf
#   launch/test_cluster.sh stop FOLDER
# Beside them, the partition "gpus" has 17 nodes of 8 GPUs which are never started: for sbatch --test-only.
# Installs Debian's slurm-wlm and munge where they are missing, as root. Exit code 77: Slurm cannot be had here.
set -euo pipefail
command=${1:?usage: launch/test_cluster.sh start|stop FOLDER [NODES]}
folder=$(realpath -m "${2:?usage: launch/test_cluster.sh start|stop FOLDER [NODES]}")
nodes=${3:-2}

skip() {
    echo "no Slurm here: $1" >&2
    exit 77
}

install() {
    command -v slurmctld slurmd sbatch munged >/dev/null && return
    [ "$(id -u)" = 0 ] || skip "slurm-wlm and munge are not installed, and only root can install them"
    command -v apt-get >/dev/null || skip "slurm-wlm and munge are not installed, and there is no apt-get"
    {
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge
    } >"$folder/install.log" 2>&1 || skip "apt-get could not install slurm-wlm and munge, see $folder/install.log"
}

free_ports() { # $1 of them
    PYTHONPATH=$(dirname "$0")/.. python3 - "$1" <<'PYTHON'
import sys
from megatron_ext.ports import free_port

ports = []
for _ in range(int(sys.argv[1])):
    ports.append(free_port(besides=ports))
print(*ports)
PYTHON
}

start() {
    [ "$(id -u)" = 0 ] || skip "its daemons run as root"
    mkdir -p "$folder"/{state,spool,log}
    chmod 755 "$folder"
    install
    dd if=/dev/urandom of="$folder/munge.key" bs=1024 count=1 status=none
    chmod 400 "$folder/munge.key"
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/log/munged.log" --seed-file="$folder/munge.seed"
    read -ra ports <<<"$(free_ports $((nodes + 1)))"
    {
        cat <<CONF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
# A requeued job waits for the old credential to expire.
AuthInfo=socket=$folder/munge.socket,cred_expire=3
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
# No cgroups, no accounting: they need more of the machine than tests should.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# Nodes may claim more CPUs than the machine has.
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=1
ReturnToService=2
KillWait=5
# Nodes of state CLOUD count as there, and are started when a job comes; none does.
GresTypes=gpu
ResumeProgram=/bin/false
SuspendProgram=/bin/false
SuspendTime=INFINITE
NodeName=gpu[1-17] CPUs=64 Gres=gpu:8 State=CLOUD
PartitionName=gpus Nodes=gpu[1-17] MaxTime=INFINITE State=UP
CONF
        for ((i = 1; i <= nodes; i++)); do
            echo "NodeName=node$i NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=${ports[i]} CPUs=1 State=UNKNOWN"
        done
        echo "PartitionName=test Nodes=node[1-$nodes] Default=YES MaxTime=INFINITE State=UP"
    } >"$folder/slurm.conf"
    export SLURM_CONF=$folder/slurm.conf
    slurmctld
    for ((i = 1; i <= nodes; i++)); do
        mkdir -p "$folder/spool/node$i"
        slurmd -N "node$i"
    done
    for ((i = 0; i < 100; i++)); do
        [ "$(sinfo -h -p test -o '%D %t' 2>/dev/null)" = "$nodes idle" ] && return
        sleep 0.2
    done
    sinfo >&2 || true
    tail -n 5 "$folder"/log/*.log >&2
    stop
    exit 1
}

# Ends what a pid file names, and waits until it has ended.
end() {
    local pid
    for file in "$@"; do
        [ -f "$file" ] || continue
        pid=$(cat "$file")
        kill "$pid" 2>/dev/null || continue
        for ((i = 0; i < 100; i++)); do
            # A zombie is one whose parent does not look.
            grep -qs '^State:[[:space:]]*[^Z[:space:]]' "/proc/$pid/status" || break
            sleep 0.1
        done
    done
}

stop() {
    export SLURM_CONF=$folder/slurm.conf
    scancel --user="$(id -un)" 2>/dev/null || true
    # Steps end, and say so to slurmctld, before it goes.
    for ((i = 0; i < 150; i++)); do
        [ -n "$(squeue -h 2>/dev/null)" ] || break
        sleep 0.1
    done
    end "$folder"/slurmd-*.pid
    end "$folder/slurmctld.pid" "$folder/munged.pid"
}

case $command in
start) start ;;
stop) stop ;;
*) echo "error: $command is neither start nor stop" >&2 && exit 2 ;;
esac
