#!/usr/bin/env bash
# What runs on a GPU: the kernels, and every engine test in float32; minutes, on one GPU or more.
# WORKERS processes share the first GPU. With two, tests of ranks run besides, one after another:
# a rank waits for the others with its GPU busy, so engines beside it would have it wait long.
#   tools/test_gpu.sh                      all of them
#   tools/test_gpu.sh -k sleep             those that pytest selects so
set -euo pipefail
cd "$(dirname "$0")/.."

failed=0
run() {  # 5: no test was selected
    pytest --quiet "$@" || [ $? -eq 5 ] || failed=1
}
share() { run --numprocesses "${WORKERS:-8}" "$@"; }
share -m "gpu and not sanitizer and not engine" tests "$@"
# An engine serves all tests of a file; files that start servers are the longest.
share --dist loadfile -m "engine and not sanitizer and not ranks" tests/engine "$@"
run -m ranks tests/engine "$@"
exit $failed
