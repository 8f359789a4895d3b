# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The kernels for Hopper on the installed Triton, whose Gluon may have changed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sparsed_vllm.kernels.hopper", reason="this Triton has no Gluon")

SCRIPT = Path(__file__).parents[1] / "support/compile_for_hopper.py"


def test_it_compiles_without_a_gpu(tmp_path):
    """In a process of its own: here Triton interprets."""
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count(".entry _block_sparse_attention_kernel") == 2
    assert done.stdout.count(".entry _prompt_scores_kernel") == 2
    assert "wgmma.mma_async" in done.stdout and "cp.async.bulk.tensor" in done.stdout
