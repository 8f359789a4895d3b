# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The kernels for Hopper on the installed Triton: its Gluon may have changed, and its interpreter
takes what its compiler does not.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sparsed_vllm.kernels.hopper", reason="this Triton has no Gluon")

SCRIPT = Path(__file__).parents[1] / "support/compile_for_hopper.py"


# A batch a kernel, and the variants of each; the plain scores also follow Hopper's.
COMPILED = {
    "_block_sparse_attention_kernel": 2 + 2 + 2,
    "_prompt_scores_kernel": 2 + 2,
    "_dense_attention_kernel": 2,
    "_block_scores_kernel": 2 + 2 + 2 + 2,
    "_select_blocks_kernel": 2 * 2,
    "_draw_uniform_kernel": 1,
    "_least_keys_kernel": 1,
    "_note_tiles_kernel": 2,
    "_add_up_kernel": 2,
    "_paged_attention_kernel": 3,
    "_paged_block_sparse_attention_kernel": 3,
    "_merge_kernel": 2 * 3,
    "_write_pages_kernel": 2 * 3,
    "_mass_parts_kernel": 3,
    "_add_parts_kernel": 3,
    # Of batches of three sizes, each with and without what a step may lack.
    "_open_canvases_kernel": 3,
    "_fill_canvases_kernel": 6,
    "_take_canvases_kernel": 6,
    "_write_ids_kernel": 6,
    "_write_light_inputs_kernel": 6,
}


def test_every_kernel_compiles_without_a_gpu(pytestconfig):
    """In a process of its own: here Triton interprets. What changed since the last run is compiled:
    Triton's cache knows kernels by their source, their options and the versions of its tools.
    """
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(pytestconfig.cache.mkdir("triton")),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = {name: done.stdout.count(f".entry {name}(") for name in COMPILED}
    assert found == COMPILED
    assert "wgmma.mma_async" in done.stdout and "cp.async.bulk.tensor.4d" in done.stdout
