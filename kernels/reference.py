# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Plain-torch twins of the kernels: what they compute, and what runs on the CPU.

All arithmetic is in float32. Attention works on one query block and a few heads at a time, one
sequence after another, so that a sequence's results cannot depend on its batch mates.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsed_vllm.kernels.choice import STREAM, Choice, Forbidden
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


def choose_tokens(
    logits: Tensor, choice: Choice, forbidden: Forbidden
) -> tuple[Tensor, Tensor, Tensor]:
    """The token that each row chooses, how sure that is, and the row's largest logit.

    logits [rows, vocab], only read
    forbidden: tokens that are not chosen; `choice` says whether they count in the confidence
    Returns tokens int64 [rows], of equal ones the first; confidence float32 [rows], higher is
    surer; and logits.amax(-1), float32 [rows]: a number unless a logit is none, or infinite.
    Where it is not, the token is any of the vocabulary and the confidence means nothing.
    """
    num_rows = max(1, _TILE_ELEMENTS // logits.shape[1])
    parts = [
        _choose(part, choice, barred, place * num_rows)
        for place, (part, barred) in enumerate(
            zip(logits.split(num_rows), forbidden.of_rows(num_rows), strict=False)
        )
    ]
    tokens, confidences, largest = (torch.cat(column) for column in zip(*parts, strict=True))
    return tokens, confidences, largest


def _choose(
    logits: Tensor, choice: Choice, forbidden: Forbidden, first_row: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for rows of which the first is `first_row` of all."""
    largest = logits.amax(-1).float()
    allowed = forbidden.bar_from(logits.to(torch.float32, copy=True))
    if choice.truncates:
        allowed = _truncate(allowed, choice)
    scores = allowed
    if choice.temperature > 0:
        rows = range(first_row, first_row + logits.shape[0])
        noise = -exponential(choice.seed, rows, logits.shape[1], logits.device).log()
        # In float64: a low temperature leaves little of the noise beside the logits.
        scores = allowed.double() + choice.temperature * noise
    tokens = scores.argmax(-1)
    probs = (allowed / choice.temperature if choice.tempered else logits.float()).softmax(-1)
    return tokens, _confidence(probs, tokens, choice), largest


def _confidence(probs: Tensor, tokens: Tensor, choice: Choice) -> Tensor:
    """probs [rows, vocab], the chosen tokens [rows] -> [rows]"""
    if choice.confidence == "margin":
        best, second = probs.topk(2, dim=-1).values.unbind(-1)
        return best - second
    if choice.confidence == "entropy":
        return -torch.special.entr(probs).sum(-1)
    return probs.gather(-1, tokens[:, None]).squeeze(-1)


def _truncate(logits: Tensor, choice: Choice) -> Tensor:
    """Logits [rows, vocab] with -inf for those that are neither in the top p nor in the top k."""
    ordered = logits.sort(dim=-1, descending=True).values
    probs = (ordered / choice.temperature).softmax(-1)
    kept = probs.cumsum(-1) - probs <= choice.top_p
    if choice.top_k:
        kept[:, choice.top_k :] = False
    last = kept.sum(-1, keepdim=True) - 1
    least = ordered.gather(-1, last.clamp(min=0))  # none, where logits are no numbers
    return logits.masked_fill(logits < least, float("-inf"))


def exponential(seed: int, rows: range, vocab: int, device: torch.device) -> Tensor:
    """Noise E of the exponential distribution; the argmax of logits - log(E) is a draw.

    Token t of row r has two words of Philox 4x32-10, key `seed`, counter (t // 2, r, 0, STREAM):
    the first two if t is even, else the last two; they are 64 bits of a number v in (0, 1], and
    E = -log(1 - v). Draws are made by small E, so small v must be fine: in 24 or 32 bits, or in
    float32 near 1, noise is cut off where rare tokens win (arXiv 2409.02908). Here v has a float's
    24 bits down to 2^-40, and reaches 2^-65. As log(E) is a float32 of at most 45, odds between
    two tokens are off by a factor of 4e-6 at most.

    Returns float32 [len(rows), vocab], over 0.
    """
    pairs = torch.arange((vocab + 1) // 2, device=device).expand(len(rows), -1)
    row = torch.arange(rows.start, rows.stop, device=device)[:, None].expand_as(pairs)
    zeros = torch.zeros_like(pairs)
    words = _philox((pairs, row, zeros, zeros + STREAM), (seed & _WORD, seed >> 32))
    shares = [share(*words[:2]), share(*words[2:])]
    v = torch.stack(shares, dim=-1).flatten(1)[:, :vocab]
    return -(-v.clamp(max=1 - 2**-24)).log1p()


def share(high: Tensor, low: Tensor) -> Tensor:
    """64 random bits as a float32 in (0, 1].  high, low int64, of 32 bits"""
    return (high.float() + (low.float() + 0.5) * 2**-32) * 2**-32


_WORD = 0xFFFFFFFF


def _philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four random words for each counter of four; int64, of 32 bits.

    Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011): 10 rounds.
    """
    a, b, c, d = counter
    for i in range(10):
        keys = ((key[0] + i * 0x9E3779B9) & _WORD, (key[1] + i * 0xBB67AE85) & _WORD)
        first, second = a * 0xD2511F53, c * 0xCD9E8D57  # of 64 bits: the sign is one of them
        a, b = (second >> 32) & _WORD ^ b ^ keys[0], second & _WORD
        c, d = (first >> 32) & _WORD ^ d ^ keys[1], first & _WORD
    return a, b, c, d
