# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Compiles every kernel for Hopper on a machine without a GPU, prints their PTX. Run by a test."""

from dataclasses import replace

import canvas_cases
import torch
from kernel_cases import make_batch, scattered_tables
from paged_cases import make_case
from pools import Pool
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sparsed_vllm.kernels import (
    block_scores,
    block_sparse_attention,
    choose_tokens,
    dense_attention,
    fill_canvases,
    hopper,
    hopper_scores,
    noise,
    open_canvases,
    paged_attention,
    paged_block_sparse_attention,
    select_blocks,
    take_canvases,
    token_mass,
    write_ids,
    write_light_inputs,
    write_pages,
)
from sparsed_vllm.kernels.canvas import SequenceEnds, SequenceRows
from sparsed_vllm.kernels.choice import Choice, Forbidden, Noise
from sparsed_vllm.kernels.layout import LightTensors

SHARED_MEMORY = 227 << 10  # of an H100's program


class AbsentGpu:
    """What Triton asks a driver for before it launches."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def call_gluon():
    for head_dim, dtype in ((64, torch.float16), (128, torch.bfloat16)):
        batch = make_batch([(300, 200)], 128, head_dim=head_dim, dtype=dtype)
        attend(batch, hopper.block_sparse_attention, tables_for(batch))
        score(batch, hopper_scores.block_scores, lse_for(batch))
    for block_size, head_dim, dtype in ((16, 64, torch.float16), (32, 128, torch.bfloat16)):
        options = {"query_block_size": 128, "head_dim": head_dim, "dtype": dtype}
        batch = make_batch([(300, 200)], block_size, **options)
        attend(batch, hopper.block_sparse_attention, tables_for(batch))
        score(batch, hopper_scores.block_scores, lse_for(batch))


def call_triton():
    for block_size, head_dim, dtype in ((128, 128, torch.bfloat16), (16, 96, torch.float16)):
        batch = make_batch([(300, 200)], block_size, head_dim=head_dim, dtype=dtype)
        attend(batch, dense_attention.dense_attention)
        attend(batch, block_sparse_attention.block_sparse_attention, tables_for(batch))
        score(batch, block_scores.block_scores, lse_for(batch))
        scores = score(batch, block_scores.block_scores, None)
        mass = torch.ones(1, dtype=torch.float64)
        for selection in (batch.selection, replace(batch.selection, mass=mass)):
            select_blocks.select_blocks(*scores, batch.layout, selection, tables_for(batch))


def call_choice():
    logits, forbidden = torch.zeros(3, 9001), Forbidden(7)
    drawn = Noise(*torch.arange(9).split(3))
    noise.draw_uniform(drawn)
    choose_tokens.choose_tokens(logits, Choice(confidence="margin"), forbidden, None)
    early = Forbidden(7, torch.tensor([9000]), torch.tensor([True, False, True]))
    choice = Choice(1.0, tempered=True, top_p=0.9, confidence="entropy")
    choose_tokens.choose_tokens(logits.bfloat16(), choice, early, drawn)


def call_light():
    """The kernels of light steps: LLaDA's heads, Dream's, and what has no tensor cores."""
    for heads, head_dim, dtype, tile in (
        ((2, 2), 128, torch.bfloat16, 128),
        ((7, 1), 64, torch.float16, 64),
        ((2, 1), 32, torch.float32, 16),
    ):
        batch = make_batch([(1100, 0)], tile, heads=heads, head_dim=head_dim, dtype=dtype)
        pool, of = Pool.of(batch), (batch.layout, tables_for(batch))
        options = {"scale": 1.0, "return_lse": True}
        paged_attention.paged_attention(batch.q, *pool.halves, batch.layout, pool.pages, **options)
        paged_block_sparse_attention.paged_block_sparse_attention(
            batch.q, *pool.halves, *of, **options
        )
        numbers = torch.arange(20)
        for rows in (None, numbers):
            write_pages.write_pages(batch.k, batch.v, *pool.halves, numbers, numbers, rows)
        case = make_case([(300, 40)], heads=heads, head_dim=head_dim, dtype=dtype, tile=tile)
        token_mass.token_mass(**case.on("cpu"))


def call_canvases():
    for num_reqs in (1, 3, 16):
        case = canvas_cases.make_case(0, num_reqs, NUM_OPEN=num_reqs)
        state, columns = case.on("cpu")
        rows = open_canvases.open_canvases(state, columns)
        for uniform in (None, case.uniform):
            of_rows = (*case.results("cpu"), uniform)
            fill_canvases.fill_canvases(state, columns, rows, *of_rows)
        lens = torch.zeros(2, 20, dtype=torch.int32)
        for ends in (None, SequenceEnds(*lens)):
            take_canvases.take_canvases(state, columns, ends)
        prompts = torch.zeros(20, 90, dtype=torch.int32)
        for light in (None, SequenceRows(*rows[:3], prompts, lens[0], rows[0])):
            write_ids.write_ids(state, columns, lens[0], 5, light)
        inputs = LightTensors.empty(16, torch.device("cpu"))
        for reads in (None, rows):
            write = write_light_inputs.write_light_inputs
            write(inputs, *rows[:3], torch.zeros(2, num_reqs, dtype=torch.int32), reads)


def attend(batch, attention, *tables):
    options = {"scale": 1.0, "return_lse": True}
    attention(batch.q, batch.k, batch.v, batch.layout, *tables, **options)


def score(batch, scores, lse):
    return scores(batch.q, batch.k, lse, batch.layout, batch.selection, scale=1.0)


def tables_for(batch):
    return scattered_tables(batch, batch.selection.most_kept)


def lse_for(batch):
    return torch.zeros(batch.q.shape[1], batch.q.shape[0])


def main():
    driver.set_active(AbsentGpu())
    launch = JITFunction.run
    kernels = []

    def compile_only(self, *args, grid, warmup, **options):
        kernels.append(launch(self, *args, grid=grid, warmup=True, **options))

    JITFunction.run = compile_only
    hopper._num_multiprocessors = lambda device: 132
    call_gluon()
    call_triton()
    call_choice()
    call_light()
    call_canvases()
    for kernel in kernels:
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= SHARED_MEMORY, kernel.name
        print(kernel.asm["ptx"])


if __name__ == "__main__":
    main()
