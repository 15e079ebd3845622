#!/usr/bin/env bash
# Fine-tune with several processes: every one holds the model (or a part of it) and takes its share of the rows.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: scripts/msrun_finetune.sh N [options of finetune]

Starts N processes on this machine with MindSpore's msrun, each running
    python -m research.qwen.cli finetune [options]
One process a device; on a CPU any number. On several machines run it on each, with the same arguments and
    NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1    (NODE_RANK=1 on the other one)
All machines need the same files at the same paths. Also from the environment:
    MASTER_PORT (8118)   LOG_DIR (msrun_log)   TIMEOUT (600: seconds to wait for the others)   PYTHON (python)
The output of the first process is shown; all of it is in LOG_DIR. SIGTERM and Ctrl-C finish the step, save and end.

example: scripts/msrun_finetune.sh 2 --model Qwen-1_8B-Chat --train-data chats.json --output out
TEXT
}

fail() {
    echo "error: $1" >&2
    exit 2
}

number() { # name value least most
    [[ "$2" =~ ^[0-9]+$ ]] && (("$2" >= $3 && "$2" <= $4)) || fail "$1 must be a whole number from $3 to $4, not '$2'"
}

[[ $# -ge 1 && "$1" != -h && "$1" != --help ]] || { usage; [[ $# -ge 1 ]] && exit 0 || exit 2; }
here=$1
shift
nodes=${NODES:-1} rank=${NODE_RANK:-0} port=${MASTER_PORT:-8118} address=${MASTER_ADDR:-127.0.0.1}
logs=${LOG_DIR:-msrun_log} timeout=${TIMEOUT:-600} python=${PYTHON:-python}
number "the number of processes" "$here" 1 1024
number NODES "$nodes" 1 1024
number NODE_RANK "$rank" 0 $((nodes - 1))
number MASTER_PORT "$port" 1024 65535
number TIMEOUT "$timeout" 1 86400
[[ $nodes -eq 1 || -n "${MASTER_ADDR:-}" ]] || fail "MASTER_ADDR, the address of the machine with NODE_RANK=0, is not set"

found=$(command -v "$python") || fail "no $python; set PYTHON, or activate the environment"
PATH=$(dirname "$found"):$PATH # msrun starts "python"
command -v msrun >/dev/null || fail "no msrun beside $found: MindSpore is not installed there"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# On a CPU the processes share the cores.
cores=$(nproc) share=1
((cores > here)) && share=$((cores / here))
export GLOG_v=${GLOG_v:-3}
export QWEN_THREADS=${QWEN_THREADS:-$share} OMP_NUM_THREADS=${OMP_NUM_THREADS:-$share}

msrun --worker_num=$((here * nodes)) --local_worker_num="$here" --node_rank="$rank" \
    --master_addr="$address" --master_port="$port" --log_dir="$logs" --cluster_time_out="$timeout" \
    --join=True --tail_worker_log=0 python -m research.qwen.cli finetune "$@" &
launcher=$!

# msrun itself would die of a signal and leave its processes behind: those that train get it instead.
forward() {
    local child
    for child in $(pgrep -P "$launcher"); do
        if tr '\0' '\n' <"/proc/$child/environ" 2>/dev/null | grep -qx MS_ROLE=MS_WORKER; then
            kill -TERM "$child" 2>/dev/null || true
        fi
    done
}
trap forward TERM INT
code=0
while true; do
    wait "$launcher" && code=0 || code=$?
    kill -0 "$launcher" 2>/dev/null || break # not only interrupted by a signal
done
((code == 0)) || echo "error: the processes ended with code $code; the reason is in $logs/worker_*.log" >&2
exit "$code"
