# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Compiles the kernels for Hopper on a machine without a GPU, prints their PTX. Run by a test."""

import torch
from kernel_cases import Table, make_batch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sparsed_vllm.kernels import hopper, hopper_scores


class AbsentGpu:
    """What Triton asks a driver for before it launches."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def main():
    driver.set_active(AbsentGpu())
    launch = JITFunction.run
    kernels = []

    def compile_only(self, *args, grid, warmup, **options):
        kernels.append(launch(self, *args, grid=grid, warmup=True, **options))

    JITFunction.run = compile_only
    hopper._num_multiprocessors = lambda device: 132
    for head_dim, dtype in ((64, torch.float16), (128, torch.bfloat16)):
        batch = make_batch([(300, 200)], 128, head_dim=head_dim, dtype=dtype)
        table = Table.scattered(batch, batch.blocks.most_kept).to("cpu")
        hopper.block_sparse_attention(
            *(batch.q, batch.k, batch.v, batch.blocks, *table), scale=1.0, return_lse=True
        )
        lse = torch.zeros(batch.q.shape[1], batch.q.shape[0])
        hopper_scores.block_scores(batch.q, batch.k, lse, batch.blocks, scale=1.0)
    for kernel in kernels:
        assert kernel.asm["cubin"]
        print(kernel.asm["ptx"])


if __name__ == "__main__":
    main()
