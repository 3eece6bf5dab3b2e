#!/usr/bin/env bash
# A small Slurm cluster on this machine, to try scripts on: real daemons, several nodes, all of its state in
# one folder. Needs Debian's slurm-wlm and munge (apt-get install slurm-wlm munge), no root, and leaves /etc
# alone.
#
#     bash launch/local_slurm.sh up [FOLDER] [NODES]      up within seconds; says what to export
#     bash launch/local_slurm.sh down [FOLDER]            ends its jobs and daemons and removes the folder
#
# FOLDER is /tmp/vitds-slurm-UID, NODES is 2. The nodes share this machine's cores and name; SLURMD_NODENAME
# tells them apart.
set -euo pipefail
export LC_ALL=C

folder=$(realpath -m -- "${2:-${TMPDIR:-/tmp}/vitds-slurm-$UID}")
nodes=${3:-2}
export SLURM_CONF=$folder/slurm.conf
PATH=$PATH:/usr/sbin

fail() { # WHAT
    printf 'local_slurm: %s\n' "$1" >&2
    exit 1
}

free_ports() { # COUNT: that many, on one line
    python3 -c 'import socket, sys
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*(each.getsockname()[1] for each in held))' "$1"
}

write_configuration() {
    local host user port node
    host=$(hostname -s) user=$(id -un)
    read -r -a ports < <(free_ports $((nodes + 1)))
    : >"$folder/plugstack.conf"
    echo CgroupAutomount=no >"$folder/cgroup.conf"
    # FirstJobId: a job takes its port from its number, and another cluster may be up. cred_expire: a requeued
    # job waits so long. config_overrides: more CPUs than there are.
    cat >"$SLURM_CONF" <<-CONF
	ClusterName=vitds
	FirstJobId=$((RANDOM % 20000 + 1))
	SlurmctldHost=$host(127.0.0.1)
	SlurmctldPort=${ports[0]}
	SlurmUser=$user
	SlurmdUser=$user
	AuthType=auth/munge
	CredType=cred/munge
	AuthInfo=socket=$folder/munge.sock,cred_expire=5
	StateSaveLocation=$folder/state
	SlurmdSpoolDir=$folder/spool.%n
	SlurmctldPidFile=$folder/slurmctld.pid
	SlurmdPidFile=$folder/slurmd.%n.pid
	SlurmctldLogFile=$folder/slurmctld.log
	SlurmdLogFile=$folder/slurmd.%n.log
	PlugStackConfig=$folder/plugstack.conf
	ProctrackType=proctrack/linuxproc
	TaskPlugin=task/none
	JobAcctGatherType=jobacct_gather/none
	AccountingStorageType=accounting_storage/none
	MpiDefault=none
	SwitchType=switch/none
	JobCompType=jobcomp/none
	SelectType=select/cons_tres
	SelectTypeParameters=CR_Core
	SchedulerType=sched/backfill
	SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000
	SlurmdParameters=config_overrides
	ReturnToService=2
	KillWait=3
	SlurmdDebug=verbose
	SlurmctldTimeout=10
	SlurmdTimeout=30
	JobRequeue=1
	PartitionName=all Nodes=ALL Default=YES MaxTime=60 State=UP
	CONF
    # To listen on the host name's address alone is possible where that is the loopback; elsewhere the daemons
    # hear every address, and munge keeps out who lacks the key.
    [[ $(timeout 5 getent ahostsv4 "$host") != 127.0.0.1\ * ]] ||
        echo CommunicationParameters=NoInAddrAny,NoCtldInAddrAny >>"$SLURM_CONF"
    for ((node = 0; node < nodes; node++)); do
        port=${ports[node + 1]}
        mkdir "$folder/spool.n$node"
        echo "NodeName=n$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$port" \
            "CPUs=4 RealMemory=1024 State=UNKNOWN" >>"$SLURM_CONF"
    done
}

start() { # COMMAND...: a daemon in a session of its own
    setsid "$@" >>"$folder/start.log" 2>&1 </dev/null &
}

up() {
    local tool node
    for tool in munged slurmctld slurmd sbatch; do
        command -v "$tool" >/dev/null ||
            fail "$tool is missing; as root: apt-get install --no-install-recommends slurm-wlm munge"
    done
    [[ $folder != *[[:space:]]* ]] || fail "Slurm takes no spaces in its folder's name: $folder"
    mkdir -p -- "$(dirname -- "$folder")"
    mkdir -m 755 -- "$folder" ||
        fail "$folder is there; is a cluster up? Take it down, or name another folder."
    mkdir "$folder/state"
    (umask 077 && head -c 128 /dev/urandom >"$folder/munge.key")
    write_configuration
    start munged --force --foreground --key-file="$folder/munge.key" --socket="$folder/munge.sock" \
        --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" \
        --seed-file="$folder/munged.seed" --num-threads=2
    start slurmctld -D -f "$SLURM_CONF"
    for ((node = 0; node < nodes; node++)); do
        start slurmd -D -N "n$node" -f "$SLURM_CONF"
    done
    local until=$((SECONDS + 30))
    while ((SECONDS < until)); do
        if [[ $(timeout 5 sinfo -h -o '%D %T' 2>/dev/null) == "$nodes idle" ]]; then
            echo "export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.1
    done
    tail -n 5 "$folder"/*.log >&2
    down
    fail "the cluster did not come up in 30 s; the ends of its logs are above"
}

# The daemons and what runs jobs for them (slurmstepd, which outlives its slurmd), by the logs they hold open.
of_cluster() {
    local file pid
    for file in $(find /proc/[0-9]*/fd -lname "$folder/*.log" 2>/dev/null | sort -u); do
        pid=${file#/proc/} pid=${pid%%/*}
        if grep -qE 'munged|slurm' "/proc/$pid/comm" 2>/dev/null; then echo "$pid"; fi
    done
}

with_children() { # PID...: these and all processes below them
    local pid
    for pid; do
        echo "$pid"
        with_children $(pgrep -P "$pid")
    done
}

down() {
    local pids pid
    [[ -d $folder ]] || fail "$folder is not there; no cluster is up"
    # Jobs first: daemons that end leave slurmstepd and its tasks running.
    timeout 5 scancel --user="$(id -un)" 2>/dev/null || true
    local until=$((SECONDS + 10))
    while ((SECONDS < until)) && [[ -n $(timeout 5 squeue -h 2>/dev/null) ]]; do
        sleep 0.1
    done
    pids=$(with_children $(of_cluster))
    for pid in $pids; do kill -TERM "$pid" 2>/dev/null || true; done
    for _ in {1..30}; do
        kill -0 $pids 2>/dev/null || break
        sleep 0.1
    done
    for pid in $pids; do kill -KILL "$pid" 2>/dev/null || true; done # slurmstepd of a dead node ignores TERM
    rm -rf -- "$folder"
}

(($# <= 3)) && [[ ${1:-} != down || $# -le 2 ]] ||
    fail "unexpected word ${!#}; say up [FOLDER] [NODES] or down [FOLDER]"
case ${1:-} in
    up) up ;;
    down) down ;;
    *) fail "say up or down: bash launch/local_slurm.sh up [FOLDER] [NODES]" ;;
esac
