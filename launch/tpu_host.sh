#!/usr/bin/env bash
# What tpu_vm.sh has done on each host of a TPU, in the clone that it has copied there:
#   bash launch/tpu_host.sh install | start ARGS of mljax.main... | stop
set -euo pipefail
unset CDPATH # or cd may go elsewhere
cd "$(dirname "${BASH_SOURCE[0]}")/.."
log=../mljax.log pid_file=../mljax.pid

make_venv() {
    rm -rf .venv # of an installation that was cut short
    local python
    for python in python3.13 python3.12 python3.11 python3; do
        if "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            "$python" -m venv .venv && return
            rm -rf .venv
        fi
    done
    # The images of TPUs come with an older Python; uv brings one of its own.
    python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --seed --python 3.12 .venv && return
    rm -rf .venv
    echo "error: $(hostname) has no Python 3.11 or newer, and uv could not install one" >&2
    exit 1
}

running() { # the number of the loop around the run, if it is there
    local pid
    pid=$(cat "$pid_file" 2>/dev/null) || return 1
    grep -qs restarting.sh "/proc/$pid/cmdline" && echo "$pid"
}

case "${1:-}" in
    install)
        [ -x .venv/bin/pip ] || make_venv
        .venv/bin/pip install --quiet --editable ".[tpu,hub]"
        ;;
    start)
        shift
        setsid nohup bash launch/restarting.sh .venv/bin/python -m mljax.main "$@" \
            </dev/null >>"$log" 2>&1 &
        echo $! >"$pid_file"
        ;;
    stop)
        # The loop gets it, passes it on, and ends when the run has saved.
        if pid=$(running); then
            kill -TERM "$pid"
            tail --pid="$pid" -f /dev/null
        fi
        ;;
    *)
        echo "usage: bash $0 install | start ARGS... | stop" >&2
        exit 2
        ;;
esac
