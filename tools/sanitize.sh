#!/usr/bin/env bash
# On a machine with a GPU: compute-sanitizer's four tools over small cases of the CUDA kernels, forward and backward.
#
#   tools/sanitize.sh [PYTHON [SECONDS]]      SECONDS: the most that one tool may take (default: 600)
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
cases="cuda and (test_every_option and bicubic or test_info_nce_against and 500 or test_nt_xent_against and 300-128 and 0.1)"
status=0
for tool in memcheck racecheck initcheck synccheck; do
  echo "== $tool"
  timeout "${2:-600}" compute-sanitizer --tool $tool --error-exitcode 9 \
    "$python" -m pytest tests -m gpu -q -p no:cacheprovider -k "$cases" 2>&1 | tail -20 || status=1
done
exit $status
