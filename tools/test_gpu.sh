#!/usr/bin/env bash
# What runs on a GPU: the kernels, and every engine test in float32; minutes, on one GPU or more.
# With two, tests of ranks and of data parallel run too. WORKERS processes share the first GPU.
#   tools/test_gpu.sh                      all of them
#   tools/test_gpu.sh -k sleep             those that pytest selects so
set -euo pipefail
cd "$(dirname "$0")/.."

failed=0
run() {  # 5: no test was selected
    pytest --quiet --numprocesses "${WORKERS:-8}" "$@" || [ $? -eq 5 ] || failed=1
}
run -m "gpu and not sanitizer and not engine" tests "$@"
# An engine serves all tests of a file; files that start servers are the longest.
run --dist loadfile -m "engine and not sanitizer" tests/engine "$@"
exit $failed
