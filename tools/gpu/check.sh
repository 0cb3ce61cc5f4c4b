#!/usr/bin/env bash
# On a machine with one NVIDIA GPU: whether it gives the right numbers, and how fast, in ten minutes.
#     tools/gpu/check.sh [--toy] [--only NAME ...] [--budget SECONDS] [--out DIR]
# `PYTHON` is the interpreter to use, the one with torch for this GPU (python3; with --toy that of .venv, if
# there is one). A folder .gpu beside README.md, where Transformer Engine and Megatron-Core may be unpacked,
# goes before all else. Exit codes: 0 no check failed, 1 one did or none ran, 2 usage.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=python3
if [[ " $* " = *" --toy "* && -x $root/.venv/bin/python ]]; then python=$root/.venv/bin/python; fi
python=${PYTHON:-$python}
command -v "$python" > /dev/null || {
    echo "check.sh: there is no $python here: set PYTHON to a Python that has torch" >&2
    exit 2
}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "check.sh: $python does not run, or is older than 3.11: set PYTHON to another" >&2
    exit 2
}
paths=$root
[ ! -d "$root/.gpu" ] || paths=$root/.gpu:$root
export PYTHONPATH=$paths${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -P -m tools.gpu.run "$@" # -P: nothing of the folder this was started in is imported
