#!/usr/bin/env bash
# Installs into .venv and runs the tests; arguments go to pytest:
#   bash launch/test.sh -m slow        many kills, under half an hour
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "[test]"
exec "$python" -m pytest "$@"
