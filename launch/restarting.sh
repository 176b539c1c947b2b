#!/usr/bin/env bash
# Runs a command until it succeeds or fails by a mistake of its own:
#   bash launch/restarting.sh python -m mljax.main ARGS...
# Exit code 0 is success, 1 and 2 an error of the settings or the data, 126 and 127 a
# command that cannot be run, 130 Ctrl-C: these end it. All else is a machine that went
# away (75: it was asked to go and has saved; 134, 137, 143: it or another host died):
# the command starts again, at most RESTARTS (100) times. SIGTERM to this script is
# passed on, and nothing starts again; so it is for Ctrl-C, which a command does not
# hear before it trains (bash has it ignored).
set -uo pipefail
if [ $# -eq 0 ]; then
    echo "usage: bash $0 COMMAND ARGS..." >&2
    exit 2
fi
asked=
running=
# shellcheck disable=SC2329 # called by the trap
pass_on() {
    asked=1
    [ -z "$running" ] || kill -TERM "$running" 2>/dev/null
}
trap pass_on INT TERM

for ((restart = 0; ; restart++)); do
    "$@" &
    running=$!
    [ -z "$asked" ] || pass_on # asked before it had a number
    while wait "$running"; code=$?; kill -0 "$running" 2>/dev/null; do :; done
    running=
    case "$code" in 0 | 1 | 2 | 126 | 127 | 130) exit "$code" ;; esac
    if [ -n "$asked" ] || [ "$restart" -ge "${RESTARTS:-100}" ]; then
        exit "$code"
    fi
    echo "restarting: exit code $code, start $((restart + 2))" >&2
    sleep "${PAUSE:-5}" &
    running=$!
    [ -z "$asked" ] || pass_on
    wait "$running"
    [ -z "$asked" ] || exit "$code"
done
