#!/usr/bin/env bash
# Trains with N processes on the CPU of this machine, as on N machines:
#   bash launch/local_hosts.sh 2 --config configs/shapes.py:debug --workdir runs/two
# Each line begins with the number of the process that wrote it. Ctrl-C and SIGTERM are
# passed on, so that the run is saved; a second one kills. When one fails the others end
# (see hosts.heartbeat_timeout); those that do not within GRACE seconds (60) are killed.
# The exit code is 0, or that of the first process to fail. DEVICES=4 simulates that
# many devices in each process.
set -uo pipefail
if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: bash $0 N ARGS...   (N processes of python -m mljax.main ARGS...)" >&2
    exit 2
fi
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then
    echo "error: needs bash 5.1 or newer, this is $BASH_VERSION" >&2
    exit 1
fi
count=$1
shift
unset CDPATH # or cd may go elsewhere
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
if [ ! -x "$python" ] && ! command -v "$python" >/dev/null; then
    echo "error: there is no $python: run launch/quickstart.sh once, or name one (PYTHON=python3)" >&2
    exit 1
fi
port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')} || {
    echo "error: $python does not run" >&2
    exit 1
}
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=${DEVICES:-1} PYTHONUNBUFFERED=1
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

# Jobs get process groups of their own: Ctrl-C reaches this script alone, which
# decides what to do with it.
set -m
pids=()
signals=0
# shellcheck disable=SC2329 # called by the trap
pass_on() {
    signals=$((signals + 1))
    if [ "$signals" -eq 1 ]; then
        echo "local_hosts: stopping; the run is saved first (again: kill)" >&2
        kill -TERM "${pids[@]}" 2>/dev/null
    else
        kill -KILL "${pids[@]}" 2>/dev/null
    fi
}
trap pass_on INT TERM HUP

for ((i = 0; i < count; i++)); do
    # The reader of a process's lines is not in its way: it ends with the output.
    "$python" -m mljax.main "$@" --coordinator "127.0.0.1:$port" \
        --num-processes "$count" --process-id "$i" \
        > >(trap '' INT TERM HUP; exec sed -u "s/^/[$i] /") \
        2> >(trap '' INT TERM HUP; exec sed -u "s/^/[$i] /" >&2) &
    pids+=($!)
done

# Without it, a process that died before all were connected would be waited for until
# hosts.start_timeout.
end_the_rest() {
    trap '' INT TERM HUP
    sleep "${GRACE:-60}"
    echo "local_hosts: still running ${GRACE:-60} s after one failed: killed" >&2
    kill -KILL "$@" 2>/dev/null
}

code=0
failed=0
reaper=
left=("${pids[@]}")
while [ "${#left[@]}" -gt 0 ]; do
    # Not `wait -n`: of one that was killed early bash may have told already, and then
    # waits for the others only.
    ended=
    for pid in "${left[@]}"; do
        kill -0 "$pid" 2>/dev/null || { ended=$pid && break; }
    done
    if [ -z "$ended" ]; then
        sleep 0.2 &
        wait $! # in which signals are taken at once
        continue
    fi
    while true; do
        seen=$signals
        wait "$ended" 2>/dev/null
        ended_with=$?
        [ "$seen" -eq "$signals" ] && break # else it was a signal of ours
    done
    for i in "${!pids[@]}"; do
        [ "${pids[$i]}" = "$ended" ] || continue
        if [ "$ended_with" -ne 0 ]; then
            [ "$code" -eq 0 ] && code=$ended_with
            echo "local_hosts: process $i ended with exit code $ended_with" >&2
            failed=$ended_with
        fi
    done
    rest=()
    for pid in "${left[@]}"; do
        [ "$pid" = "$ended" ] || rest+=("$pid")
    done
    left=("${rest[@]}")
    # 75: saved upon a signal, as the others are about to.
    if [ -z "$reaper" ] && [ "$failed" -ne 0 ] && [ "$failed" -ne 75 ]; then
        end_the_rest "${left[@]}" &
        reaper=$!
    fi
done
[ -n "$reaper" ] && kill -KILL -- "-$reaper" 2>/dev/null
exit "$code"
