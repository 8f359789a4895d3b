# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The kernels: Triton on a GPU, their torch twins elsewhere.

reference.py says what each function computes.
"""

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sparsed_vllm.kernels import reference
from sparsed_vllm.kernels.canvas import (
    NUM_COLUMNS,
    CanvasState,
    OpenRows,
    SequenceEnds,
    SequenceRows,
    StepColumns,
    Taken,
)
from sparsed_vllm.kernels.choice import Choice, Forbidden, Noise
from sparsed_vllm.kernels.layout import (
    FIRST_ROW,
    PAGE,
    BatchLayout,
    BlockTables,
    LightTensors,
    Selection,
    host_layout,
    id_dtype,
    most_kept,
    num_blocks,
    send_layouts,
)

__all__ = [
    "BLOCK_SIZES",
    "HEAD_DIMS",
    "PAGE",
    "BatchLayout",
    "BlockTables",
    "Choice",
    "Forbidden",
    "Noise",
    "Selection",
    "block_scores",
    "block_sparse_attention",
    "choose_tokens",
    "compile_selection",
    "dense_attention",
    "draw_uniform",
    "fill_canvases",
    "host_layout",
    "id_dtype",
    "most_kept",
    "num_blocks",
    "open_canvases",
    "paged_attention",
    "paged_block_sparse_attention",
    "select_blocks",
    "send_layouts",
    "take_canvases",
    "token_mass",
    "write_ids",
    "write_light_inputs",
    "write_pages",
]

logger = logging.getLogger("vllm.sparsed.kernels")

BLOCK_SIZES = (16, 32, 64, 128)
HEAD_DIMS = (32, 64, 96, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The oldest and the newest that the kernel for Hopper compiles on.
HOPPER_TRITONS = ((3, 6), (3, 9))


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BatchLayout,
    *,
    scale: float,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention over all keys of a row's sequence; a tensor, or with return_lse a pair."""
    _check_batch(layout, q, k, v, out)
    attend = _for(q, "dense_attention")
    return attend(q, k, v, layout, scale=scale, out=out, return_lse=return_lse)


def block_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    layout: BatchLayout,
    selection: Selection,
    *,
    scale: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean softmax mass per key block: among all keys, and among the generation's."""
    _check_batch(layout, q, k)
    _check_recording(layout, selection)
    if lse is not None:
        assert lse.shape == (q.shape[1], q.shape[0]) and lse.dtype == torch.float32
        assert lse.stride(1) == 1, "a head's numbers lie side by side"
    shape = (q.shape[1], layout.num_tiles, layout.max_key_blocks)
    assert out is None or out[0].shape == out[1].shape == shape
    score = _scores_kernel(q.device, q.dtype, layout.tile, q.shape[2], _are_aligned(q, k))
    return score(q, k, lse, layout, selection, scale=scale, out=out)


def select_blocks(
    scores: Tensor,
    gen_scores: Tensor,
    layout: BatchLayout,
    selection: Selection,
    tables: BlockTables,
) -> None:
    """Isolated selection, by number or by mass, written to the tables as ascending lists."""
    _check_recording(layout, selection)
    shape = (scores.shape[0], layout.num_tiles, layout.max_key_blocks)
    assert scores.shape == gen_scores.shape == shape
    _check_tables(layout, scores.shape[0], tables)
    assert tables.kept.shape[3] >= selection.most_kept, "the tables are narrower than their rows"
    _for(scores, "select_blocks")(scores, gen_scores, layout, selection, tables)


def compile_selection(
    max_key_blocks: int, ids: torch.dtype, device: torch.device, *, by_mass: bool = False
) -> None:
    """Compile select_blocks for sequences of up to `max_key_blocks`; ids: the tables' type."""
    if device.type == "cuda":
        compile_up_to = _triton("compile_up_to", "select_blocks")
        compile_up_to(max_key_blocks, ids, device, by_mass=by_mass)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BatchLayout,
    tables: BlockTables,
    *,
    scale: float,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention over the listed key blocks; a tensor, or with return_lse a pair."""
    _check_batch(layout, q, k, v, out)
    _check_tables(layout, q.shape[1], tables)
    aligned = _are_aligned(q, k, v, q if out is None else out)
    attend = _sparse_kernel(q.device, q.dtype, layout.tile, q.shape[2], aligned)
    return attend(q, k, v, layout, tables, scale=scale, out=out, return_lse=return_lse)


def write_pages(
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    offsets: Tensor,
    rows: Tensor | None = None,
) -> None:
    """Writes keys and values of rows to their places in pages, with 0 for a value that is NaN."""
    assert k.shape == v.shape and k.dtype == v.dtype == keys.dtype == values.dtype
    assert keys.shape == values.shape == (keys.shape[0], PAGE, *k.shape[1:])
    assert keys.stride() == values.stride(), "keys and values lie alike"
    assert k.stride(2) == v.stride(2) == keys.stride(3) == 1, "a head's numbers lie side by side"
    indices = (pages, offsets) if rows is None else (pages, offsets, rows)
    for x in indices:
        assert x.shape == pages.shape and x.is_contiguous() and not x.is_floating_point()
    assert rows is not None or len(pages) <= len(k)
    _for(k, "write_pages")(k, v, keys, values, pages, offsets, rows)


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: BatchLayout,
    pages: Tensor,
    *,
    scale: float,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of a few rows over all keys of their sequence, in pages; returns as dense does."""
    _check_paged(layout, q, keys, pages, values, out)
    assert not layout.host[FIRST_ROW].any(), "rows of any tokens have no first one"
    attend = _for(q, "paged_attention")
    return attend(q, keys, values, layout, pages, scale=scale, out=out, return_lse=return_lse)


def paged_block_sparse_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: BatchLayout,
    tables: BlockTables,
    *,
    scale: float,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention over the listed key blocks, in pages; returns as block_sparse_attention does."""
    _check_paged(layout, q, keys, tables.pages, values, out)
    _check_tables(layout, q.shape[1], tables)
    attend = _for(q, "paged_block_sparse_attention")
    return attend(q, keys, values, layout, tables, scale=scale, out=out, return_lse=return_lse)


def token_mass(
    q: Tensor,
    keys: Tensor,
    lse: Tensor,
    layout: BatchLayout,
    pages: Tensor,
    weights: Tensor,
    slots: Tensor,
    mass: Tensor,
    *,
    scale: float,
) -> None:
    """Adds the softmax mass that a few rows put on each token of their sequence, keys in pages."""
    _check_paged(layout, q, keys, pages)
    assert not layout.host[FIRST_ROW].any(), "rows of any tokens have no first one"
    assert lse.shape == (q.shape[1], q.shape[0]) and weights.shape == q.shape[:1]
    assert lse.dtype == weights.dtype == mass.dtype == torch.float32
    assert weights.is_contiguous() and mass.stride(1) == 1
    assert slots.shape == (layout.num_seqs,) and slots.dtype == torch.int64
    assert slots.is_contiguous() and mass.shape[1] >= layout.max_key_len
    _for(q, "token_mass")(q, keys, lse, layout, pages, weights, slots, mass, scale=scale)


def drop_nans(rows: Tensor) -> None:
    """NaN to 0 in rows [n, heads, size], in place; infinities stay."""
    assert rows.dtype in DTYPES and rows.stride()[1:] == (rows.shape[2], 1)
    _for(rows, "drop_nans")(rows)


def choose_tokens(
    logits: Tensor, choice: Choice, forbidden: Forbidden, noise: Noise | None
) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of logits a token, how sure it is, and the largest logit."""
    assert logits.dtype in DTYPES, f"no kernel for {logits.dtype}"
    assert 0 <= forbidden.mask_token_id < logits.shape[1]
    if forbidden.early is not None:
        assert forbidden.early.shape == logits.shape[:1] and forbidden.early.dtype == torch.bool
        assert forbidden.stop_tokens is not None and forbidden.stop_tokens.dtype == torch.int64
    assert (noise is None) == (choice.temperature == 0), "what is drawn needs noise, else nothing"
    if noise is not None:
        _check_noise(noise, logits.shape[0])
    return _for(logits, "choose_tokens")(logits, choice, forbidden, noise)


def draw_uniform(noise: Noise) -> Tensor:
    """A random number in (0, 1) for each row, float64."""
    _check_noise(noise, noise.seeds.shape[0])
    return _for(noise.seeds, "draw_uniform", "noise")(noise)


def open_canvases(state: CanvasState, columns: StepColumns) -> OpenRows:
    """The rows that a step reads: open places of each request's first unfinished block."""
    _check_canvases(state, columns)
    return _for(state.tokens, "open_canvases")(state, columns)


def fill_canvases(
    state: CanvasState,
    columns: StepColumns,
    rows: OpenRows,
    tokens: Tensor,
    confidence: Tensor,
    largest: Tensor,
    uniform: Tensor | None,
) -> Tensor:
    """Fills places of a step, and notes whose logits were no numbers; bool, which it filled."""
    _check_canvases(state, columns)
    given = (rows.places, tokens, confidence, largest)
    types = (torch.int64, torch.int64, torch.float32, torch.float32)
    for x, dtype in zip(given, types, strict=True):
        assert x.shape == (columns.num_rows,) and x.dtype == dtype and x.is_contiguous()
    if uniform is not None:
        assert uniform.shape == confidence.shape and uniform.dtype == torch.float64
    fill = _for(state.tokens, "fill_canvases")
    return fill(state, columns, rows, tokens, confidence, largest, uniform)


def take_canvases(state: CanvasState, columns: StepColumns, ends: SequenceEnds | None) -> Taken:
    """Hands out the tokens that became final and were not handed out yet."""
    _check_canvases(state, columns)
    return _for(state.tokens, "take_canvases")(state, columns, ends)


def write_ids(
    state: CanvasState,
    columns: StepColumns,
    input_ids: Tensor,
    mask_token_id: int,
    light: SequenceRows | None,
) -> None:
    """Writes the tokens that the model sees: of each canvas, and of the rows `light`."""
    _check_canvases(state, columns)
    assert input_ids.dtype == torch.int32 and input_ids.is_contiguous()
    if light is not None:
        assert light.prompts.dtype == light.prompt_lens.dtype == torch.int32
        assert light.rows.is_contiguous() and light.positions.dtype == torch.int64
        assert light.prompts.stride(1) == 1
    write = _for(state.tokens, "write_ids")
    write(state, columns, input_ids, mask_token_id, light)


def write_light_inputs(
    inputs: LightTensors,
    rows: Tensor,
    places: Tensor,
    seqs: Tensor,
    pages: Tensor,
    reads: OpenRows | None,
) -> None:
    """Writes where a captured step's rows keep keys and values, and which of them are read."""
    assert len(rows) <= len(inputs.pages), "the step is larger than its graph"
    assert reads is None or len(reads.places) <= len(inputs.pages)
    assert rows.is_contiguous() and places.is_contiguous() and seqs.is_contiguous()
    assert pages.dtype == torch.int32 and pages.stride(1) == 1
    write = _for(pages, "write_light_inputs")
    write(inputs, rows, places, seqs, pages, reads)


def _for(tensor: Tensor, name: str, module: str | None = None) -> Callable[..., Any]:
    """The implementation of `name` for the tensor's device; Triton is imported at need only."""
    return _triton(name, module) if tensor.is_cuda else getattr(reference, name)


def _triton(name: str, module: str | None = None) -> Callable[..., Any]:
    return getattr(import_module(f"sparsed_vllm.kernels.{module or name}"), name)


@cache
def _sparse_kernel(
    device: torch.device, dtype: torch.dtype, tile: int, head_dim: int, aligned: bool
) -> Callable[..., Any]:
    """What attends over lists; chosen, and logged, once for each kind of tensors."""
    if device.type != "cuda":
        return reference.block_sparse_attention
    obstacle = _hopper_obstacle(device, dtype, tile, head_dim, aligned)
    if obstacle is None:
        logger.info("Sparse attention runs our Gluon kernel for Hopper.")
        return _triton("block_sparse_attention", "hopper")
    logger.info("Sparse attention runs our plain Triton kernel, not Hopper's: %s.", obstacle)
    return _triton("block_sparse_attention")


@cache
def _scores_kernel(
    device: torch.device, dtype: torch.dtype, tile: int, head_dim: int, aligned: bool
) -> Callable[..., Any]:
    """What scores blocks, under the same conditions; _sparse_kernel logs them."""
    if device.type != "cuda":
        return reference.block_scores
    obstacle = _hopper_obstacle(device, dtype, tile, head_dim, aligned)
    return _triton("block_scores", None if obstacle else "hopper_scores")


def _hopper_obstacle(
    device: torch.device, dtype: torch.dtype, tile: int, head_dim: int, aligned: bool
) -> str | None:
    """Why the kernel for Hopper cannot run, if so."""
    capability = torch.cuda.get_device_capability(device)
    version = import_module("triton").__version__
    oldest, newest = (".".join(map(str, known)) for known in HOPPER_TRITONS)
    obstacles = {
        f"this GPU has compute capability {capability}, not (9, 0)": capability != (9, 0),
        f"Triton {version} is not one of {oldest} to {newest}": not _is_known_triton(version),
        f"it does not compute in {dtype}": dtype == torch.float32,
        f"query blocks have {tile} tokens, not 128": tile != 128,
        f"heads have {head_dim} numbers, not 64 or 128": head_dim not in (64, 128),
        "a tensor or its strides are not aligned to 16 bytes": not aligned,
    }
    return next((text for text, stands in obstacles.items() if stands), None)


def _is_known_triton(version: str) -> bool:
    major, minor = version.split(".")[:2]
    return HOPPER_TRITONS[0] <= (int(major), int(minor)) <= HOPPER_TRITONS[1]


def _are_aligned(*tensors: Tensor) -> bool:
    """Whether each head of each token begins at a multiple of 16 bytes, as TMA requires."""
    return all(_is_aligned(x) for x in tensors)


def _is_aligned(x: Tensor) -> bool:
    token, head, _ = x.stride()
    return (x.data_ptr() | token * x.itemsize | head * x.itemsize) % 16 == 0


def _check_sizes(layout: BatchLayout) -> None:
    assert layout.tile in BLOCK_SIZES, f"no kernel for tiles of {layout.tile} rows"
    assert layout.block_size in BLOCK_SIZES, f"no kernel for key blocks of {layout.block_size}"
    assert layout.tile % layout.block_size == 0, "a query block is whole key blocks"


def _check_batch(
    layout: BatchLayout, q: Tensor, k: Tensor, v: Tensor | None = None, out: Tensor | None = None
) -> None:
    _check_sizes(layout)
    assert q.shape[2] in HEAD_DIMS, f"no kernel for heads of {q.shape[2]}"
    assert q.dtype in DTYPES, f"no kernel for {q.dtype}"
    assert q.shape[1] % k.shape[1] == 0, "each key head serves the same number of query heads"
    assert q.shape[0] >= layout.num_query_rows and k.shape[0] >= layout.num_key_rows
    for keys in (k, k if v is None else v):
        assert keys.shape == (k.shape[0], k.shape[1], q.shape[2]) and keys.dtype == q.dtype
        assert keys.stride(2) == q.stride(2) == 1, "a head's numbers lie side by side"
    if out is not None:
        assert out.shape == q.shape and out.dtype == q.dtype and out.stride(2) == 1


def _check_paged(
    layout: BatchLayout,
    q: Tensor,
    keys: Tensor,
    pages: Tensor,
    values: Tensor | None = None,
    out: Tensor | None = None,
) -> None:
    _check_sizes(layout)
    assert q.shape[2] in HEAD_DIMS, f"no kernel for heads of {q.shape[2]}"
    assert q.dtype in DTYPES, f"no kernel for {q.dtype}"
    assert keys.shape[1:] == (PAGE, keys.shape[2], q.shape[2]) and keys.dtype == q.dtype
    assert q.shape[1] % keys.shape[2] == 0, "each key head serves the same number of query heads"
    assert keys.stride(3) == q.stride(2) == 1, "a head's numbers lie side by side"
    if values is not None:
        assert values.shape == keys.shape and values.dtype == q.dtype
        assert values.stride() == keys.stride(), "keys and values lie alike"
    if out is not None:
        assert out.shape == q.shape and out.dtype == q.dtype and out.stride(2) == 1
    assert q.shape[0] >= layout.num_query_rows
    assert pages.dtype == torch.int32 and pages.stride(1) == 1
    assert pages.shape[0] >= layout.num_page_rows
    assert pages.shape[1] >= num_blocks(layout.max_key_len, PAGE)


def _check_recording(layout: BatchLayout, selection: Selection) -> None:
    assert layout.is_whole, "a recording has every query block of a sequence"
    assert selection.host.shape[1] == layout.num_seqs
    if (mass := selection.mass) is not None:
        assert mass.shape == (layout.num_seqs,) and mass.dtype == torch.float64
        assert mass.is_contiguous()


def _check_tables(layout: BatchLayout, num_heads: int, tables: BlockTables) -> None:
    """`kept` may be wider than the batch needs, and its rows far apart."""
    kept, num_kept = tables.kept, tables.num_kept
    assert tables.query_block_size == layout.tile, "a tile is a query block"
    assert kept.shape[:3] == num_kept.shape and kept.shape[2] == num_heads
    assert kept.stride(3) == 1 and num_kept.dtype == kept.dtype
    assert layout.max_key_blocks <= torch.iinfo(kept.dtype).max, f"ids outgrow {kept.dtype}"
    assert tables.pages.shape[0] >= layout.num_page_rows and tables.pages.dtype == torch.int32
    assert tables.pages.stride(1) == 1


def _check_noise(noise: Noise, num_rows: int) -> None:
    for x in (noise.seeds, noise.places, noise.steps):
        assert x.shape == (num_rows,) and x.dtype == torch.int64 and x.is_contiguous()


def _check_canvases(state: CanvasState, columns: StepColumns) -> None:
    assert state.tokens.dtype == torch.int32 and state.masked.dtype == torch.bool
    assert state.tokens.is_contiguous() and state.masked.is_contiguous()
    assert columns.device.shape == columns.host.shape == (NUM_COLUMNS, columns.num_reqs)
    assert columns.device.dtype == torch.float64 and columns.device.is_contiguous()
