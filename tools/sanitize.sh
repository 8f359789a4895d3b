#!/usr/bin/env bash
# The kernels at small shapes under NVIDIA's compute-sanitizer; minutes, on a GPU.
#   tools/sanitize.sh                          memory errors and races in shared memory
#   tools/sanitize.sh initcheck synccheck      other tools
set -euo pipefail
cd "$(dirname "$0")/.."

# Every tensor in an allocation of its own, so that what is next to it is out of bounds.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
tools=("$@")
[ $# -gt 0 ] || tools=(memcheck racecheck)
for tool in "${tools[@]}"; do
  echo "== $tool"
  compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 1 \
    pytest -q -m sanitizer tests/kernels/test_sanitized.py
done
