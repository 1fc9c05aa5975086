#!/usr/bin/env bash
# Proves in a few minutes that hra works on this machine's GPU (--dry-run: on its CPU); tools/gpu_check/__init__.py says how.
#
#   bash tools/gpu_check.sh [--dry-run] [--out DIR] [--bundle DIR] [--parts a,b] [--python PYTHON]
set -euo pipefail
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHONPATH="$tools${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m gpu_check "$@"
