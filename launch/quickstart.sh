#!/usr/bin/env bash
# From a fresh clone to a trained classifier: installs into .venv, trains on pictures
# drawn on the fly, prints the table of results and writes a picture of predictions.
# Further arguments are passed on: bash launch/quickstart.sh --config.epochs=2
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""
exec "$python" -m mljax.main --config configs/shapes.py --workdir runs/quickstart "$@"
