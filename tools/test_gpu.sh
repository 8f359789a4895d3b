#!/usr/bin/env bash
# What runs on a GPU: the kernels, and every engine test in float32; minutes, on one GPU or more.
# With two, tests of ranks and of data parallel run too. WORKERS processes share the first GPU.
#   tools/test_gpu.sh                      all of them
#   tools/test_gpu.sh -k sleep             those that pytest selects so
set -euo pipefail
cd "$(dirname "$0")/.."

share=(--quiet --numprocesses "${WORKERS:-8}")
failed=0
pytest "${share[@]}" -m "gpu and not sanitizer and not engine" tests "$@" || failed=$?
# An engine serves all tests of a file; files that start servers are the longest.
pytest "${share[@]}" --dist loadfile -m "engine and not sanitizer" tests/engine "$@" || failed=$?
exit $failed
