# shellcheck shell=bash
# Sourced by the other scripts: makes .venv in the root of the clone if it is missing,
# installs mljax with the extras named in $1 (like "[test]") and sets $python.
unset CDPATH # or cd may go elsewhere
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

fits() { # TensorFlow has no packages for 3.14
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
}
if ! .venv/bin/python -c 'import sys' 2>/dev/null; then
    base=${PYTHON:-python3}
    if ! fits "$base"; then
        echo "error: mljax needs Python 3.11, 3.12 or 3.13 as $base; name one: PYTHON=python3.12 bash $0" >&2
        exit 1
    fi
    "$base" -m venv .venv || {
        rm -rf .venv
        echo "error: $base cannot make a virtual environment; install its venv module (on Debian: apt install python3-venv)" >&2
        exit 1
    }
fi
python=$PWD/.venv/bin/python
if ! fits "$python"; then
    echo "error: .venv has $("$python" --version), and mljax needs 3.11, 3.12 or 3.13; remove .venv and start again: PYTHON=python3.12 bash $0" >&2
    exit 1
fi
# A first start that was cut short leaves a Python without pip; so does uv.
if ! "$python" -m pip --version >/dev/null 2>&1 && ! "$python" -m ensurepip --default-pip >/dev/null 2>&1; then
    echo "error: .venv has no pip; remove .venv and start again" >&2
    exit 1
fi
# Installing again is only needed when what is asked for has changed.
wanted=$(cat pyproject.toml <(echo "${1:-}") | cksum)
if [ "$(cat ".venv/installed${1:-}" 2>/dev/null)" != "$wanted" ]; then
    echo "installing mljax${1:-} into .venv (a few minutes the first time) ..."
    "$python" -m pip install --quiet --disable-pip-version-check --editable ".${1:-}" || {
        echo "error: the installation failed; the lines above say why" >&2
        exit 1
    }
    echo "$wanted" >".venv/installed${1:-}"
fi
