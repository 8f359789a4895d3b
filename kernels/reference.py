# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Plain-torch twins of the kernels: what they compute, and what runs on the CPU.

All arithmetic is in float32. A twin works on one query block and a few heads at a time, one
sequence after another, so that a sequence's results cannot depend on its batch mates.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsed_vllm.kernels.layout import QueryBlocks, Span

_TILE_ELEMENTS = 1 << 18  # logits worked on at once: 1 MiB, which stays in a core's cache


def block_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    blocks: QueryBlocks,
    *,
    scale: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """How much softmax mass the rows of each query block put on each key block.

    q [tokens, num_heads, head_dim]; k [tokens, num_kv_heads, head_dim]
    lse float32 [num_heads, tokens]: log-sum-exp of the dense attention of the same `scale`;
    None: it is computed here
    Returns scores and gen_scores, float32 [num_heads, num_blocks, max_key_blocks], in [0, 1]:
    the mean over block_size x block_size places, where those past the sequence's end count as 0,
    of softmax(scale * q k^T). gen_scores has the softmax over the keys of generation blocks.
    -inf for key blocks past the end and, in gen_scores, before the generation.
    """
    scores, gen_scores = out or empty_scores(q, blocks)
    scores.fill_(float("-inf"))
    gen_scores.fill_(float("-inf"))
    for span, places in blocks.by_span():
        first_gen = int(blocks.first_gens[places.start])
        for place, tokens, heads, logits in _logits(q, k, span, places, blocks.block_size, scale):
            mass = logits[:, :, first_gen * blocks.block_size :].softmax(-1)
            means = _block_means(mass, blocks.block_size)
            gen_scores[heads, place, first_gen : first_gen + means.shape[1]] = means
            mass = _softmax(logits, None if lse is None else lse[heads, tokens])
            means = _block_means(mass, blocks.block_size)
            scores[heads, place, : means.shape[1]] = means
    return scores, gen_scores


def empty_scores(q: Tensor, blocks: QueryBlocks) -> tuple[Tensor, Tensor]:
    """Room for what block_scores returns."""
    shape = (q.shape[1], blocks.num_blocks, blocks.max_key_blocks)
    return q.new_empty(shape, dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


def _softmax(logits: Tensor, lse: Tensor | None) -> Tensor:
    """logits [heads, rows, keys] -> softmax over the keys whose log-sum-exp is lse [heads, rows]"""
    return logits.softmax(-1) if lse is None else (logits - lse[:, :, None]).exp_()


def _block_means(mass: Tensor, block_size: int) -> Tensor:
    """mass [heads, rows, keys] -> [heads, key blocks]"""
    mass = torch.nn.functional.pad(mass.sum(1), (0, -mass.shape[2] % block_size))
    return mass.unflatten(1, (-1, block_size)).sum(-1) / block_size**2


def select_blocks(
    scores: Tensor,
    gen_scores: Tensor,
    blocks: QueryBlocks,
    kept: Tensor,
    num_kept: Tensor,
    rows: Tensor,
) -> None:
    """Isolated selection: which key blocks each head of each query block keeps.

    Of the keep_all best of all blocks those before the generation, and the keep_gen best of the
    generation; of equal scores the lower block wins.

    scores, gen_scores: from block_scores
    kept int16 or int32 [num_rows, num_heads, width], num_kept int32 [num_rows, num_heads]:
    written where `rows` int64 [num_blocks] says for each query block; block ids of the sequence
    in ascending order, then -1.  width: at least blocks.most_kept
    """
    ids = torch.arange(scores.shape[2], device=scores.device)
    for head in range(scores.shape[0]):
        chosen = _best(scores[head], blocks.keep_all) & (ids < blocks.first_gens[:, None])
        chosen |= _best(gen_scores[head], blocks.keep_gen)
        count = chosen.sum(-1, dtype=torch.int32)
        ascending = (~chosen).to(torch.int8).argsort(dim=-1, stable=True)
        listed = ascending.masked_fill(ids >= count[:, None], -1)[:, : kept.shape[2]]
        kept[rows, head] = -1
        kept[rows, head, : listed.shape[1]] = listed.to(kept.dtype)
        num_kept[rows, head] = count


def _best(scores: Tensor, count: Tensor) -> Tensor:
    """Where scores [rows, ids] has the `count` [rows] highest of a row."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks) < count[:, None]


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: QueryBlocks,
    kept: Tensor,
    num_kept: Tensor,
    rows: Tensor,
    *,
    scale: float,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention where each head of a query block sees only the key blocks kept for it.

    q [rows, num_heads, head_dim]; k, v [tokens, num_kv_heads, head_dim]: as many rows as tokens
    unless the spans have windows
    kept, num_kept, rows: as select_blocks wrote them, of the query blocks that q holds
    Returns q's shape and dtype and, with return_lse, the log-sum-exp of the logits, float32
    [num_heads, rows]. An empty list gives zeros and -inf. Rows of no sequence: not written.
    """
    out, lse = empty_attention(q, out, return_lse)
    for span, places in blocks.by_span():
        tokens = slice(span.first, span.first + span.length)
        k_blocks, v_blocks = (_in_blocks(x[tokens], blocks.block_size) for x in (k, v))
        for queries, row in zip(_rows_of(span, blocks.block_size), rows[places], strict=True):
            count = num_kept[row]
            ids = kept[row, :, : max(1, int(count.max()))].long()
            seen = torch.arange(ids.shape[1], device=ids.device) < count[:, None]
            ids = ids.where(seen, 0)
            seen = seen[:, :, None] & _inside(ids, span.length, blocks.block_size)
            logits = (_heads_first(q[queries]) * scale) @ _gather(k_blocks, ids).mT
            logits += seen.flatten(1)[:, None].log()  # 0 or -inf
            weights = logits.softmax(-1).masked_fill_((count == 0)[:, None, None], 0)
            out[queries] = (weights @ _gather(v_blocks, ids)).transpose(0, 1).to(out.dtype)
            if lse is not None:
                lse[:, queries] = logits.logsumexp(-1)
    return out if lse is None else (out, lse)


def _inside(ids: Tensor, length: int, block_size: int) -> Tensor:
    """ids [heads, slots] -> bool [heads, slots, block_size], which places the sequence has"""
    return ids[:, :, None] * block_size + torch.arange(block_size, device=ids.device) < length


def _in_blocks(x: Tensor, block_size: int) -> Tensor:
    """[tokens, kv_heads, head_dim] -> float32 [kv_heads, blocks, block_size, head_dim], 0 padded"""
    x = torch.nn.functional.pad(_heads_first(x), (0, 0, 0, -x.shape[0] % block_size))
    return x.unflatten(1, (-1, block_size))


def _gather(x: Tensor, ids: Tensor) -> Tensor:
    """The blocks [kv_heads, blocks, block_size, head_dim] that each head lists.

    ids [heads, slots].  Returns [heads, slots * block_size, head_dim].
    """
    kv_heads, num_blocks, block_size, head_dim = x.shape
    kv_head = torch.arange(ids.shape[0], device=ids.device) // (ids.shape[0] // kv_heads)
    places = (kv_head[:, None] * num_blocks + ids).flatten()
    gathered = x.reshape(-1, block_size * head_dim).index_select(0, places)
    return gathered.view(ids.shape[0], -1, head_dim)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: QueryBlocks,
    *,
    scale: float,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention where every token of a sequence sees all of it.

    Shapes and returns as in block_sparse_attention. The block size is the number of query rows
    worked on at once: it changes the speed, and the result only by rounding.
    """
    out, lse = empty_attention(q, out, return_lse)
    group = q.shape[1] // v.shape[1]
    for span, places in blocks.by_span():
        values = _heads_first(v[span.first : span.first + span.length])
        for _, rows, heads, logits in _logits(q, k, span, places, blocks.block_size, scale):
            # The heads of a group read the same values: as one matrix.
            weights = logits.softmax(-1).view(-1, group * logits.shape[1], span.length)
            part = weights @ values[heads.start // group : heads.stop // group]
            part = part.view(-1, logits.shape[1], v.shape[2])
            out[rows, heads] = part.transpose(0, 1).to(out.dtype)
            if lse is not None:
                lse[heads, rows] = logits.logsumexp(-1)
    return out if lse is None else (out, lse)


def empty_attention(
    q: Tensor, out: Tensor | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Room for what an attention over q [rows, num_heads, head_dim] returns."""
    out = torch.empty_like(q) if out is None else out
    shape = (q.shape[1], q.shape[0])
    return out, q.new_empty(shape, dtype=torch.float32) if return_lse else None


def _heads_first(x: Tensor) -> Tensor:
    """[tokens, heads, head_dim] -> float32 [heads, tokens, head_dim]"""
    return x.transpose(0, 1).float().contiguous()


def _rows_of(span: Span, block_size: int) -> Iterator[slice]:
    """The rows of q of each query block of `span` that it holds."""
    rows = span.query_rows
    for first in range(rows.start, rows.stop, block_size):
        yield slice(first, min(first + block_size, rows.stop))


def _logits(
    q: Tensor, k: Tensor, span: Span, places: slice, block_size: int, scale: float
) -> Iterator[tuple[int, slice, slice, Tensor]]:
    """scale * q k^T of one sequence, a query block and some heads at a time.

    Yields the query block, its rows of q, the heads, and float32 [heads, rows, length].
    """
    keys = _heads_first(k[span.first : span.first + span.length])
    group = q.shape[1] // k.shape[1]
    step = max(1, _TILE_ELEMENTS // (group * block_size * span.length))
    for place, rows in enumerate(_rows_of(span, block_size), start=places.start):
        queries = (_heads_first(q[rows]) * scale).view(k.shape[1], -1, q.shape[2])
        for first in range(0, k.shape[1], step):
            logits = queries[first : first + step] @ keys[first : first + step].mT
            heads = slice(first * group, (first + logits.shape[0]) * group)
            yield place, rows, heads, logits.view(-1, rows.stop - rows.start, span.length)
