#!/bin/sh
# Proves the kernels and compiled steps right on this GPU, then times them against their floors and the incumbents.
# One command, under ten minutes:  sh benchmarks/gpu.sh --json result.json   (--dry: tiny sizes on a CPU, interpreted)
# Needs torch and triton; what else is missing (transformers, bitsandbytes) is left out with the reason.
root=$(cd "$(dirname "$0")/.." && pwd)
PYTHONPATH="$root:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m gpu "$@"
