#!/usr/bin/env bash
# Format and warnings of the C++ sources: nothing is written, nothing is linked. The CUDA kernels are read as the host
# build reads them (tests/host_cuda), so no nvcc is needed.
#
#   tools/lint_cpp.sh [CLANG_FORMAT]      default: clang-format
set -uo pipefail
cd "$(dirname "$0")/.."
mapfile -t files < <(find csrc tests/host_cuda tests/native -regextype posix-extended -regex '.*\.(h|cuh|inc|cpp|cu)')
status=0
"${1:-clang-format}" --dry-run -Werror "${files[@]}" || status=1
if grep -nE '.{121}' "${files[@]}"; then
  echo "lines longer than 120 columns" >&2
  status=1
fi
sources=(csrc/cpu/*.cpp csrc/cuda/*.cu tests/host_cuda/drive*.cpp tests/native/*.cpp)
printf '%s\0' "${sources[@]}" | xargs -0 -n 1 -P "$(nproc)" "${CXX:-g++}" -std=c++20 -fsyntax-only -x c++ \
  -Wall -Wextra -Wshadow=compatible-local -Werror -Wno-unknown-pragmas -I csrc -I tests/host_cuda || status=1
exit $status
