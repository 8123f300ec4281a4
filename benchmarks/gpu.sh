#!/usr/bin/env bash
# Tests and benchmarks on this machine's GPU, in at most 8 minutes, without a network:
#
#     benchmarks/gpu.sh
#
# Needs torch >= 2.10 with CUDA, nvcc, ninja, g++, pytest, hypothesis and the other packages of requirements/run.txt; what
# of them is missing can come as wheels in benchmarks/wheels (the script says how). PYTHON names another python3.
# Every part saves what it finds at once in benchmarks/results/gpu-NAME.json; the tables are printed at the end.
# Nothing is installed. Arguments are those of `python -m gpu.run --help`, for trying the script itself.
set -u
began=$(date +%s)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-python3}

"$python" -c 'import torch' || {
    echo "gpu.sh: $python cannot import torch; PYTHON=... names another python3" >&2
    exit 2
}
site=$(mktemp -d) || exit 2
trap 'rm -rf "$site"' EXIT
export PYTHONPATH="$PWD:$PWD/benchmarks:$site${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

libraries=$("$python" -m gpu.prepare "$site" "$@") || exit 2
"$python" -m gpu.run --began "$began" --libraries "$libraries" "$@"
