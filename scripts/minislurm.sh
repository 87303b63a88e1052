#!/usr/bin/env bash
# A real Slurm on this one machine, for tests: munge, a controller and several node daemons on loopback addresses.
#
#     minislurm.sh install         its Debian packages (root; no service is started)
#     minislurm.sh start DIR [NODES] [CPUS]      everything below DIR, nothing in /etc; as root or a plain user
#     minislurm.sh env DIR         prints what its clients need: eval "$(minislurm.sh env DIR)"
#     minislurm.sh status DIR      nodes and jobs
#     minislurm.sh stop DIR        ends the daemons that `start` started, by pid
#
# Each node has 2 GPUs that are links to /dev/null: Slurm sets
# CUDA_VISIBLE_DEVICES for them, nothing more. Without cgroups: memory and CPUs are booked, not enforced.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
GPUS=2

install_packages() {
    if command -v slurmctld slurmd sbatch munged >/dev/null; then return; fi
    local policy=/usr/sbin/policy-rc.d made=
    if [ ! -e $policy ]; then # Debian would start the services
        printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy && made=1
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        slurmctld slurmd slurm-client munge >/dev/null
    if [ -n "$made" ]; then rm -f $policy; fi
}

configure() { # DIR NODES CPUS PORT
    local dir=$1 nodes=$2 cpus=$3 port=$4 host user k g
    host=$(hostname -s) user=$(id -un)
    mkdir -p "$dir"/{munge,state,spool,log,run,gpu}
    chmod 755 "$dir" "$dir/munge"
    (umask 077 && head -c 1024 /dev/urandom >"$dir/munge/key")
    cat >"$dir/slurm.conf" <<CONF
ClusterName=mini
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
CryptoType=crypto/munge
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=256
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_interval=2
MinJobAge=600
KillWait=5
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
CONF
    : >"$dir/gres.conf"
    for ((k = 0; k < nodes; k++)); do
        for ((g = 0; g < GPUS; g++)); do ln -s /dev/null "$dir/gpu/n$k-$g"; done
        echo "NodeName=n$k Name=gpu File=$dir/gpu/n$k-[0-$((GPUS - 1))]" >>"$dir/gres.conf"
        echo "NodeName=n$k NodeHostname=$host NodeAddr=127.0.0.$((k + 2)) Port=$((port + 1 + k)) CPUs=$cpus" \
            "Boards=1 SocketsPerBoard=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=8192 Gres=gpu:$GPUS" \
            "State=UNKNOWN" >>"$dir/slurm.conf"
    done
    {
        echo "PartitionName=main Nodes=n[0-$((nodes - 1))] Default=YES MaxTime=INFINITE DefaultTime=60 State=UP" \
            "PriorityTier=1 PreemptMode=REQUEUE GraceTime=60"
        echo "PartitionName=urgent Nodes=n[0-$((nodes - 1))] MaxTime=INFINITE DefaultTime=60 State=UP" \
            "PriorityTier=10 PreemptMode=OFF"
    } >>"$dir/slurm.conf"
    # From 23.11 on cgroup.conf is read whatever ProctrackType says.
    if ! slurmd -V | grep -qE ' (1[0-9]|2[0-2])\.'; then echo 'CgroupPlugin=disabled' >"$dir/cgroup.conf"; fi
}

start() { # DIR NODES CPUS
    local dir=$1 nodes=${2:-2} cpus=${3:-4} port k t
    port=$((21000 + RANDOM % 8000))
    configure "$dir" "$nodes" "$cpus" "$port"
    export SLURM_CONF=$dir/slurm.conf
    munged --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" \
        --log-file="$dir/munge/log" --seed-file="$dir/munge/seed" --num-threads=2
    slurmctld -c -f "$SLURM_CONF"
    for ((k = 0; k < nodes; k++)); do
        mkdir -p "$dir/spool/n$k"
        slurmd -c -N "n$k" -f "$SLURM_CONF"
    done
    for ((t = 0; t < 150; t++)); do
        if [ "$(sinfo -h -N -p main -t idle -o %N 2>/dev/null | sort -u | wc -l)" -ge "$nodes" ]; then return; fi
        sleep 0.2
    done
    echo "Slurm did not come up, see $dir/log" >&2
    exit 1
}

stop() { # DIR
    local dir=$1 file pids=() t
    export SLURM_CONF=$dir/slurm.conf
    timeout 10 scancel --user="$(id -un)" --full 2>/dev/null || true
    for ((t = 0; t < 60; t++)); do
        if [ -z "$(timeout 5 squeue -h -t R,CG,S 2>/dev/null)" ]; then break; fi
        sleep 0.2
    done
    for file in "$dir"/run/*.pid "$dir/munge/pid"; do
        if [ -s "$file" ]; then pids+=("$(cat "$file")"); fi
    done
    if [ ${#pids[@]} -gt 0 ]; then
        kill "${pids[@]}" 2>/dev/null || true
        for ((t = 0; t < 30; t++)); do
            if ! kill -0 "${pids[@]}" 2>/dev/null; then return; fi
            sleep 0.1
        done
        kill -9 "${pids[@]}" 2>/dev/null || true
    fi
}

case ${1:-} in
    install) install_packages ;;
    start) start "${@:2}" ;;
    env) echo "export SLURM_CONF=$(cd "$2" && pwd)/slurm.conf" ;;
    status) SLURM_CONF=$2/slurm.conf sinfo --Node --long && SLURM_CONF=$2/slurm.conf squeue ;;
    stop) stop "$2" ;;
    *)
        sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
esac
