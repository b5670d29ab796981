#!/usr/bin/env bash
# One visit to a machine with a GPU, from a checkout that is not installed: bash bench/gpu/visit.sh
# Nothing is fetched from a network. OUT: the folder for the results. BUDGET: seconds for all steps (480). DEV=cpu: a
# dry run. PYTHON: the interpreter. WORK: a folder for the package and Triton's cache, kept if it is named.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work=${WORK:-$(mktemp -d)}
export OUT=${OUT:-$root/build/gpu-visit} PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$work/triton}
OUT=$(mkdir -p "$OUT" && cd "$OUT" && pwd)
# The package as it is imported: kernels/ and bench/ lie beside it in a checkout.
mkdir -p "$work/site/lightning_lip"
ln -sfn "$root"/lightning_lip/* "$work/site/lightning_lip/"
ln -sfn "$root/kernels" "$root/bench" "$work/site/lightning_lip/"
export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
rm -f "$OUT/results.jsonl"
# Not in the checkout, whose lightning_lip/ would be found first, without kernels and bench.
cd "$work"
"${PYTHON:-python3}" -m lightning_lip.bench.gpu.visit 2>&1 | tee "$OUT/log.txt"
