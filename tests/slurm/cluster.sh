#!/usr/bin/env bash
# A real Slurm on one host: munge, one controller and two nodes, for the tests of this folder.
#
#   cluster.sh install         Debian packages, where they are missing (needs root)
#   cluster.sh start FOLDER    everything under FOLDER; then: export SLURM_CONF=FOLDER/slurm.conf
#   cluster.sh stop FOLDER     ends the processes that `start` recorded, and no other
#
# The nodes are named 127.0.0.1 and 127.0.0.2, so that the node list of a job holds addresses that
# really lead to the "other host". Each claims 32 CPUs, whatever the host has.
set -euo pipefail

NODES=(127.0.0.1 127.0.0.2)
CPUS=32
DEADLINE=60

fail() { echo "cluster.sh: $*" >&2; exit 1; }

install_packages() {
    command -v sbatch munged slurmctld slurmd >/dev/null && return
    [[ $(id -u) == 0 ]] || fail "Slurm is missing, and only root can install it"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    # The packages' own services would listen on every interface; policy-rc.d keeps them down.
    local policy=/usr/sbin/policy-rc.d made=
    [[ -e $policy ]] || { printf '#!/bin/sh\nexit 101\n' >"$policy"; chmod +x "$policy"; made=1; }
    apt-get install -q -y --no-install-recommends slurm-wlm munge || { status=$?; }
    [[ -z $made ]] || rm -f "$policy"
    return "${status:-0}"
}

free_ports() {
    python3 - "$1" <<'PYTHON'
import socket, sys
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*(one.getsockname()[1] for one in held))
PYTHON
}

write_configuration() {
    local folder=$1 ports host i
    read -r -a ports < <(free_ports $((${#NODES[@]} + 1)))
    host=$(hostname -s)
    {
        cat <<CONF
ClusterName=one-host
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmctldLogFile=$folder/slurmctld.log
SlurmctldPidFile=$folder/slurmctld.own.pid
SlurmdLogFile=$folder/slurmd.%n.log
SlurmdPidFile=$folder/slurmd.%n.own.pid
SlurmdSpoolDir=$folder/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_min_interval=200000,batch_sched_delay=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
ReturnToService=2
KillWait=10
MinJobAge=3600
CONF
        for i in "${!NODES[@]}"; do
            echo "NodeName=${NODES[i]} NodeAddr=127.0.0.1 NodeHostname=$host" \
                "Port=${ports[i + 1]} CPUs=$CPUS State=UNKNOWN"
        done
        echo "PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
    } >"$folder/slurm.conf"
}

# background FOLDER NAME COMMAND…: start a daemon in the foreground of its own session.
background() {
    local folder=$1 name=$2
    shift 2
    setsid "$@" >"$folder/$name.out" 2>&1 </dev/null &
    echo $! >"$folder/$name.pid"
}

await() { # await WHAT FOLDER COMMAND…: poll until the command succeeds
    local what=$1 folder=$2 end=$((SECONDS + DEADLINE))
    shift 2
    until "$@" >/dev/null 2>&1; do
        if ((SECONDS >= end)); then
            tail -n 20 "$folder"/*.log "$folder"/*.out >&2 || true
            stop "$folder"
            fail "$what within ${DEADLINE}s did not happen; the logs are above"
        fi
        sleep 0.2
    done
}

all_idle() {
    [[ $(sinfo --noheader --Node --format=%t | sort | uniq -c | xargs) == "${#NODES[@]} idle" ]]
}

start() {
    local folder node
    mkdir -p "$1"
    folder=$(cd "$1" && pwd)
    [[ ! -e $folder/slurm.conf ]] || fail "$folder holds a cluster already: stop it first"
    command -v sbatch munged slurmctld slurmd >/dev/null || fail "no Slurm here: cluster.sh install"
    chmod 755 "$folder"
    (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
    mkdir -p "$folder/state"
    write_configuration "$folder"
    export SLURM_CONF=$folder/slurm.conf
    background "$folder" munged munged --foreground --force --key-file="$folder/munge.key" \
        --socket="$folder/munge.socket" --pid-file="$folder/munged.own.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
    await "munge's start" "$folder" munge --no-input --socket="$folder/munge.socket"
    background "$folder" slurmctld slurmctld -D -f "$SLURM_CONF"
    await "the controller's start" "$folder" scontrol ping
    for node in "${NODES[@]}"; do
        mkdir -p "$folder/spool.$node"
        background "$folder" "slurmd.$node" slurmd -D -N "$node" -f "$SLURM_CONF"
    done
    await "the nodes' start" "$folder" all_idle
    echo "export SLURM_CONF=$SLURM_CONF"
}

stop() {
    local folder pid file pids=() end
    folder=$(cd "$1" && pwd)
    # Jobs first, so that no step outlives its node's daemon.
    if [[ -e $folder/slurmctld.pid ]] && kill -0 "$(<"$folder/slurmctld.pid")" 2>/dev/null; then
        export SLURM_CONF=$folder/slurm.conf
        timeout 10 scancel --state=PENDING --user="$(id -un)" || true
        timeout 10 scancel --signal=KILL --full --user="$(id -un)" || true
        timeout 10 scancel --user="$(id -un)" || true
        end=$((SECONDS + 20))
        while ((SECONDS < end)) && [[ -n $(timeout 10 squeue --noheader || true) ]]; do
            sleep 0.2
        done
    fi
    for file in "$folder"/slurmd.*.pid "$folder/slurmctld.pid" "$folder/munged.pid"; do
        [[ -e $file && $file != *.own.pid ]] || continue
        pid=$(<"$file")
        rm -f "$file"
        kill "$pid" 2>/dev/null && pids+=("$pid")
    done
    end=$((SECONDS + 15))
    for pid in "${pids[@]}"; do
        while kill -0 "$pid" 2>/dev/null && ((SECONDS < end)); do sleep 0.1; done
        kill -9 "$pid" 2>/dev/null || true
    done
    rm -f "$folder/slurm.conf"
}

case "${1:-}" in
    install) install_packages ;;
    start | stop) [[ -n ${2:-} ]] || fail "$1 FOLDER"; "$1" "$2" ;;
    *) fail "install | start FOLDER | stop FOLDER" ;;
esac
