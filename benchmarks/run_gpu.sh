#!/usr/bin/env bash
# On a machine with a GPU, in under 9 minutes: build, correctness at real sizes, compute-sanitizer, the suite.
#
#   benchmarks/run_gpu.sh [RESULTS [WHEELS]]
#
# RESULTS: a folder for the logs, the JSON and the table (default: benchmarks/results). WHEELS: a folder of peers' wheels
# (memeff, cut-cross-entropy, liger-kernel, ...). Uses the python3 that is there if its torch finds the GPU; downloads
# nothing then.
set -uo pipefail
cd "$(dirname "$0")/.."
results=$(mkdir -p "${1:-benchmarks/results}" && cd "${1:-benchmarks/results}" && pwd)
wheels=${2:-}
if python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
  python3 -m venv --system-site-packages .venv-gpu && python=.venv-gpu/bin/python
else
  make install && python=.venv/bin/python
fi || exit 1
# Kernels for this GPU alone: those for others take minutes to build.
SER_FAST_REQUIRE_NATIVE=1 TORCH_CUDA_ARCH_LIST=$($python -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') \
  $python -m pip install --quiet --no-index --no-deps --no-build-isolation -e . || exit 1
if [ -n "$wheels" ]; then
  $python -m pip install --quiet --no-index --no-deps "$wheels"/*.whl
fi
name=$($python -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
status=0
# Interrupted rather than killed, pytest still tells what it found, and the suite writes its table.
timeout --signal=INT 150 $python -m pytest tests -m gpu -q 2>&1 | tee "$results/$name-tests.log" || status=1
if command -v compute-sanitizer >/dev/null; then
  tools/sanitize.sh $python 30 2>&1 | tee "$results/$name-sanitizer.log" || status=1
fi
timeout --signal=INT 170 $python -m pytest benchmarks --benchmark-only --continue-on-collection-errors --seconds 1 --results "$name" \
  -q 2>&1 | tail -30 | tee "$results/$name-suite.log" || status=1
for kind in json md; do
  [ "$results" -ef benchmarks/results ] || cp "benchmarks/results/$name.$kind" "$results/"
done
exit $status
