#!/usr/bin/env bash
# Installs into .venv and runs the tests; arguments go to pytest:
#   bash launch/test.sh -m slow        many kills, all layouts: two hours on two cores
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "[test]"
exec "$python" -m pytest "$@"
