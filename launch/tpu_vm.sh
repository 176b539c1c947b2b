#!/usr/bin/env bash
# Trains on a TPU VM or pod slice of Google Cloud; launch/README.md explains.
set -euo pipefail

usage() {
    cat >&2 <<USAGE
usage: bash $0 [--dry-run] COMMAND NAME [OPTIONS] [-- ARGS...]
  create NAME --type v5litepod-16 [--version RUNTIME] [--spot]
  run    NAME -- ARGS...      copies this clone to all hosts, installs it, starts
                              python -m mljax.main ARGS... on each, restarts it when that of a host died
  logs   NAME [--worker 0]    shows the output of a host as it comes
  stop   NAME                 all hosts save and end; returns when they have
  delete NAME
ZONE, PROJECT: of Google Cloud, in the environment (default: those of gcloud).
--dry-run prints the commands of gcloud instead of running them.
USAGE
    exit 2
}

dry=
if [ "${1:-}" = --dry-run ]; then
    dry=1
    shift
fi
[ $# -ge 2 ] || usage
command=$1 name=$2
shift 2
case "$name" in -*) usage ;; esac

type='' version='' spot='' worker=0
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case "$1" in
        --type) type=${2:?--type needs a value} && shift 2 ;;
        --version) version=${2:?--version needs a value} && shift 2 ;;
        --worker) worker=${2:?--worker needs a value} && shift 2 ;;
        --spot) spot=1 && shift ;;
        --dry-run) dry=1 && shift ;;
        *) echo "error: unknown option $1" >&2 && usage ;;
    esac
done
[ "${1:-}" != -- ] || shift

place=()
[ -z "${ZONE:-}" ] || place+=("--zone=$ZONE")
[ -z "${PROJECT:-}" ] || place+=("--project=$PROJECT")

tpu() { # VERB ARGS...: gcloud's command for this TPU VM
    local verb=$1
    shift
    set -- gcloud compute tpus tpu-vm "$verb" "$@" "${place[@]+"${place[@]}"}"
    if [ -n "$dry" ]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

tracked() { # the files of the clone that git knows and that are there
    local file
    git ls-files -z | while IFS= read -r -d '' file; do
        [ ! -e "$file" ] || printf '%s\0' "$file"
    done
}

# The runtime that Google names for a generation of TPUs.
runtime() {
    case "$1" in
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v6e-*) echo v2-alpha-tpuv6e ;;
        *) echo tpu-ubuntu2204-base ;;
    esac
}

case "$command" in
    create)
        [ -n "$type" ] || { echo "error: create needs --type, like v5litepod-16" >&2 && usage; }
        tpu create "$name" "--accelerator-type=$type" \
            "--version=${version:-$(runtime "$type")}" ${spot:+--spot}
        ;;
    run)
        [ $# -gt 0 ] || { echo "error: run needs the arguments of mljax.main after --" >&2 && usage; }
        unset CDPATH # or cd may go elsewhere
        cd "$(dirname "${BASH_SOURCE[0]}")/.."
        archive=${TMPDIR:-/tmp}/mljax-$name.tar.gz
        # Tracked files as they are now, changes that are not committed included.
        [ -n "$dry" ] || tracked | tar --null --files-from=- -czf "$archive"
        # shellcheck disable=SC2088 # the ~ is that of the TPU VM
        tpu scp "$archive" "$name:~/mljax.tar.gz" --worker=all
        # shellcheck disable=SC2016 # $(...) is for the TPU VM
        install='if grep -qs restarting.sh "/proc/$(cat mljax.pid 2>/dev/null)/cmdline"; then'
        install+=" echo 'error: a run goes on here; stop it first' >&2; exit 1; fi"
        # Of the last copy goes what was in it, and nothing else: a run may have its work
        # directory there.
        install+=' && mkdir -p mljax && touch mljax.files'
        install+=' && (cd mljax && xargs -r -d "\n" rm -f < ../mljax.files)'
        install+=' && tar -tzf mljax.tar.gz > mljax.files && tar -xzf mljax.tar.gz -C mljax'
        install+=' && bash mljax/launch/tpu_host.sh install'
        tpu ssh "$name" --worker=all "--command=$install"
        start='bash mljax/launch/tpu_host.sh start'
        start+=$(printf ' %q' "$@")
        tpu ssh "$name" --worker=all "--command=$start"
        ;;
    logs) tpu ssh "$name" "--worker=$worker" "--command=tail -n 100 -F mljax.log" ;;
    stop) tpu ssh "$name" --worker=all '--command=bash mljax/launch/tpu_host.sh stop' ;;
    delete) tpu delete "$name" --quiet ;;
    *) echo "error: unknown command $command" >&2 && usage ;;
esac
