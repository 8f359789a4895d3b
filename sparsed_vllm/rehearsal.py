# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Our kernels, compiled and run at the engine's start rather than in a request's steps."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsed_vllm.attention import LayerStep, SparsedImpl
from sparsed_vllm.batch import DenoisingBatch, DenoisingRequest
from sparsed_vllm.canvases import Canvases, CanvasPlaces, NewCanvas
from sparsed_vllm.config import BLOCK_SIZES, SparseConfig, Sparsity
from sparsed_vllm.flash import flash_attention
from sparsed_vllm.kernels import api
from sparsed_vllm.kernels.canvas import OpenRows, SequenceEnds, SequenceRows
from sparsed_vllm.kernels.choice import Choice, Forbidden, Noise
from sparsed_vllm.kernels.layout import LEAST_KEYS, PAGE, BatchLayout, LightTensors, num_blocks
from sparsed_vllm.metadata import DENSE_ROWS, plan_launches
from sparsed_vllm.pages import PageWrites
from sparsed_vllm.params import DenoisingParams
from sparsed_vllm.steps import Phase, Plan

_STEPS = 4  # of the request that is rehearsed: dense, recording, sparse


def rehearse(
    impl: SparsedImpl, config: SparseConfig, *, dtype: torch.dtype, device: torch.device
) -> None:
    """Record and follow a small table, and select for every length that a request may have.

    Requests with blocks of another size than the engine's, or with a mass where it has none, still
    compile the kernels of their own once. Raises what a kernel raises.
    """
    length = 2 * PAGE
    sparsity = Sparsity(
        0.0,
        config.select,
        config.block_size,
        config.mass,
        query_block_size=config.query_block_size,
    )
    params = DenoisingParams(PAGE, _STEPS, PAGE, "low_confidence")
    request = DenoisingRequest(0, Plan(params, sparsity, length - PAGE), 0)
    heads = (impl.num_heads, impl.num_kv_heads, impl.num_kv_heads)
    # Side by side, as the projection leaves them.
    qkv = torch.zeros(length, sum(heads), impl.head_size, dtype=dtype, device=device)
    q, k, v = qkv.split(heads, dim=1)
    api.drop_nans(v)
    cache = impl.pages.empty(2, device)
    pages = torch.arange(2, dtype=torch.int32, device=device)[None]
    starts = np.array([0, length], np.int32)
    canvases = Canvases(1, PAGE, device)
    with_flash = flash_attention(device.type, dtype) is not None
    for _ in range(_STEPS):
        step = request.cursor.advance()
        canvas = canvases.open([0], [params], [step], [0], CanvasPlaces.alone())
        batch = DenoisingBatch(["rehearsal"], [request], [step], starts, canvas)
        metadata = plan_launches(starts, pages, batch, with_flash=with_flash)
        impl.attend(LayerStep(q, k, v, cache, metadata, torch.empty_like(q)))
    assert step.phase is Phase.SPARSE
    if impl.pages.holds_kv:
        _step_lightly(impl, q, k, v, cache, sparsity)
    most = num_blocks(impl.max_model_len, min(BLOCK_SIZES))
    api.compile_selection(most, impl.pages.tables.dtype, device)
    if config.mass is not None:
        api.compile_selection(most, impl.pages.tables.dtype, device, by_mass=True)


def _step_lightly(
    impl: SparsedImpl, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, sparsity: Sparsity
) -> None:
    """What light steps run, for one row of a sequence that is long enough to be split."""
    halves = impl.pages.halves(cache)
    pages = torch.zeros(1, 2 * LEAST_KEYS // PAGE, dtype=torch.int32, device=q.device)
    zeros = torch.zeros(1, dtype=torch.int64, device=q.device)
    lse = q.new_zeros(q.shape[1], 1).float()
    mass = q.new_zeros(1, 2 * LEAST_KEYS).float()
    PageWrites(slice(1), zeros, zeros).write(k, v, *halves)
    PageWrites(zeros, zeros, zeros).write(k, v, *halves)
    inputs = LightTensors.empty(16, q.device)
    for reads in (None, OpenRows(*[zeros] * len(OpenRows._fields))):
        api.write_light_inputs(inputs, zeros, zeros, zeros, pages, reads)
    layout, listed = (
        BatchLayout.of(
            tile,
            q.device,
            key_block=key_block,
            query_starts=[0],
            num_rows=[1],
            first_rows=[0],
            key_starts=[0],
            key_lens=[mass.shape[1]],
            page_rows=[0],
        )
        for tile, key_block in ((DENSE_ROWS, None), (sparsity.tile, sparsity.block_size))
    )
    tables = impl.tables_of(cache, pages, sparsity.tile)
    for return_lse in (False, True):
        options: dict[str, Any] = {"scale": impl.scale, "return_lse": return_lse}
        api.paged_attention(q[:1], *halves, layout, pages, **options)
        api.paged_block_sparse_attention(q[:1], *halves, listed, tables, **options)
    of = (layout, pages, mass[0, :1] + 1, zeros, mass)
    api.token_mass(q[:1], halves[0], lse, *of, scale=impl.scale)


def rehearse_choices(
    mask_token_id: int, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Choose a token with and without temperature, and draw a place."""
    logits = torch.zeros(1, vocab_size, dtype=dtype, device=device)
    noise = Noise(*torch.zeros(3, 1, dtype=torch.int64, device=device))
    for choice, drawn in ((Choice(), None), (Choice(temperature=1.0), noise)):
        api.choose_tokens(logits, choice, Forbidden(mask_token_id), drawn)
    api.draw_uniform(noise)


def rehearse_canvases(canvases: Canvases) -> None:
    """Open, fill, write and hand out a canvas of one place, which nobody has yet.

    In the tensors that requests will have: kernels are compiled for how these are aligned.
    """
    params = DenoisingParams(1, 1, 1, "low_confidence")
    step = Plan(params, None, 1).at(0)
    numbers = torch.zeros(1, dtype=torch.int64, device=canvases.device)
    tokens, chance, sure = numbers.int(), numbers.double() + 0.5, numbers.float()
    light = SequenceRows(numbers, numbers, numbers, tokens[:, None] + 1, tokens + 1, numbers + 0)
    for uniform, of_light, ends in (
        (None, None, None),
        (chance, light, SequenceEnds(tokens, tokens + 0)),
    ):
        canvases.add([NewCanvas(0, num_tokens=1, seed=0)])
        canvas = canvases.open([0], [params], [step], [0], CanvasPlaces.alone())
        canvases.write_ids(canvas, tokens + 0, 0, of_light)
        canvases.fill(canvas, numbers, sure, sure, uniform)
        canvases.take(canvas, ends)
