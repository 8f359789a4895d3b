# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Plain-torch twins of the kernels: what they compute, and what runs on the CPU.

All arithmetic is in float32. Attention works on one tile of query rows and a few heads at a time,
one sequence after another, so that a sequence's results cannot depend on its batch mates.
"""

from collections.abc import Iterator
from itertools import repeat

import torch
from torch import Tensor

from sparsed_vllm.kernels.canvas import (
    ALG_TEMP,
    BLOCK_LENGTH,
    BLOCK_STEP,
    BY_CHANCE,
    CANVAS_ROW,
    EARLY_STOP,
    END,
    FIRST_PLACE,
    IS_LAST,
    MAY_HAND_OUT,
    NUM_FILLED,
    NUM_OPEN,
    NUM_SEEN,
    NUM_TOKENS,
    READ_ROW,
    ROW_START,
    SHARE,
    SLOT,
    THRESHOLD,
    WINDOW_ROW,
    CanvasState,
    OpenRows,
    SequenceEnds,
    SequenceRows,
    StepColumns,
    Taken,
)
from sparsed_vllm.kernels.choice import STREAM, Choice, Forbidden, Noise
from sparsed_vllm.kernels.layout import (
    FIRST_GEN,
    PAGE,
    BatchLayout,
    BlockTables,
    LightTensors,
    Placement,
    Selection,
)

_TILE_ELEMENTS = 1 << 18  # logits worked on at once: 1 MiB, which stays in a core's cache
# Logits of tokens worked on at once. torch shares out a sum over one row between its threads only
# where the row has as many numbers: then it would come in another order than beside other rows.
_ROW_ELEMENTS = 1 << 15


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BatchLayout,
    *,
    scale: float,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention where every query row of a sequence sees all of its keys.

    q [rows, num_heads, head_dim]; k, v [tokens, num_kv_heads, head_dim]
    Returns q's shape and dtype and, with return_lse, the log-sum-exp of the logits, float32
    [num_heads, rows]. Rows of no sequence: not written. The layout's tile is the number of query
    rows worked on at once: it changes the speed, and the result only by rounding.
    """
    out, lse = empty_attention(q, out, return_lse)
    for _, sequence in layout.sequences():
        _attend_densely(q, k, v, sequence, layout.tile, scale, out, lse)
    return out if lse is None else (out, lse)


def _attend_densely(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequence: Placement,
    tile: int,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Attention of one sequence's rows to its keys."""
    group = q.shape[1] // v.shape[1]
    values = _heads_first(v[sequence.keys])
    for _, rows, heads, logits in _logits(q, k, sequence, tile, scale):
        # The heads of a group read the same values: as one matrix.
        weights = logits.softmax(-1).view(-1, group * logits.shape[1], sequence.key_len)
        part = weights @ values[heads.start // group : heads.stop // group]
        part = part.view(-1, logits.shape[1], v.shape[2])
        out[rows, heads] = part.transpose(0, 1).to(out.dtype)
        if lse is not None:
            lse[heads, rows] = logits.logsumexp(-1)


def empty_attention(
    q: Tensor, out: Tensor | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Room for what an attention over q [rows, num_heads, head_dim] returns."""
    out = torch.empty_like(q) if out is None else out
    shape = (q.shape[1], q.shape[0])
    return out, q.new_empty(shape, dtype=torch.float32) if return_lse else None


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
    """How much softmax mass the rows of each query block put on each key block.

    q [rows, num_heads, head_dim]; k [tokens, num_kv_heads, head_dim], of whole sequences
    lse float32 [num_heads, rows]: log-sum-exp of the dense attention of the same `scale`;
    None: it is computed here
    Returns scores and gen_scores, float32 [num_heads, num_tiles, max_key_blocks], in [0, 1]:
    the mean over tile x block_size places, where those past the sequence's end count as 0, of
    softmax(scale * q k^T). gen_scores has the softmax over the keys of generation blocks.
    -inf for key blocks past the end and, in gen_scores, before the generation.
    """
    tile_rows, size = layout.tile, layout.block_size
    scores, gen_scores = out or empty_scores(q, layout)
    scores.fill_(float("-inf"))
    gen_scores.fill_(float("-inf"))
    for place, sequence in layout.sequences():
        first_gen = int(selection.host[FIRST_GEN, place])
        for tile, rows, heads, logits in _logits(q, k, sequence, tile_rows, scale):
            mass = logits[:, :, first_gen * size :].softmax(-1)
            means = _block_means(mass, tile_rows, size)
            gen_scores[heads, tile, first_gen : first_gen + means.shape[1]] = means
            mass = _softmax(logits, None if lse is None else lse[heads, rows])
            means = _block_means(mass, tile_rows, size)
            scores[heads, tile, : means.shape[1]] = means
    return scores, gen_scores


def empty_scores(q: Tensor, layout: BatchLayout) -> tuple[Tensor, Tensor]:
    """Room for what block_scores returns."""
    shape = (q.shape[1], layout.num_tiles, layout.max_key_blocks)
    return q.new_empty(shape, dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


def _softmax(logits: Tensor, lse: Tensor | None) -> Tensor:
    """logits [heads, rows, keys] -> softmax over the keys whose log-sum-exp is lse [heads, rows]"""
    return logits.softmax(-1) if lse is None else (logits - lse[:, :, None]).exp_()


def _block_means(mass: Tensor, tile: int, block_size: int) -> Tensor:
    """mass [heads, rows, keys] -> [heads, key blocks]"""
    mass = torch.nn.functional.pad(mass.sum(1), (0, -mass.shape[2] % block_size))
    return mass.unflatten(1, (-1, block_size)).sum(-1) / (tile * block_size)


def select_blocks(
    scores: Tensor,
    gen_scores: Tensor,
    layout: BatchLayout,
    selection: Selection,
    tables: BlockTables,
) -> None:
    """Isolated selection: which key blocks each head of each query block keeps.

    Of the KEEP_ALL best of all blocks those before the generation, and the KEEP_GEN best of the
    generation; of equal scores the lower block wins.

    By mass, a row keeps of these only the blocks of two smallest sets of best ones: the set of all
    blocks that holds this share of the softmax mass over all keys, and the set of generation blocks
    that holds it of the softmax over their keys. Where scores are no numbers all stay.

    scores, gen_scores: from block_scores
    tables: written, in the rows of the layout's query blocks, with ids in ascending order and
    their number; wide enough for selection.most_kept
    """
    counts = selection.host.T.tolist()
    shares = None if selection.mass is None else selection.mass.tolist()
    for place, sequence in layout.sequences():
        pages, rows = tables.rows(sequence)
        tiles = slice(sequence.tile_start, sequence.tile_start + len(rows))
        num_key_blocks = -(-sequence.key_len // layout.block_size)
        for head in range(scores.shape[0]):
            own, own_gen = (x[head, tiles, :num_key_blocks] for x in (scores, gen_scores))
            chosen = _chosen(own, own_gen, *counts[place])
            if shares is not None:
                chosen &= _needed(own, own_gen, counts[place][FIRST_GEN], shares[place])
            count = chosen.sum(-1)
            ids = (~chosen).to(torch.int8).argsort(dim=-1, stable=True)[:, : int(count.max())]
            tables.kept[pages, rows, head, : ids.shape[1]] = ids.to(tables.kept.dtype)
            tables.num_kept[pages, rows, head] = count.to(tables.num_kept.dtype)


def _chosen(
    scores: Tensor, gen_scores: Tensor, first_gen: int, keep_all: int, keep_gen: int
) -> Tensor:
    """scores, gen_scores [rows, key blocks] -> bool of the same shape"""
    best = _best(scores, keep_all)
    best[:, first_gen:] = _best(gen_scores[:, first_gen:], keep_gen)
    return best


def _best(scores: Tensor, count: int) -> Tensor:
    """Where scores [rows, ids] has the `count` highest of a row."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def _needed(scores: Tensor, gen_scores: Tensor, first_gen: int, share: float) -> Tensor:
    """As in _chosen, the blocks that hold `share` of the mass"""
    needed = _holding(scores, share)
    needed[:, first_gen:] |= _holding(gen_scores[:, first_gen:], share)
    return needed


def _holding(scores: Tensor, share: float) -> Tensor:
    """Where scores [rows, ids] has the highest of a row that hold `share` of its sum, and no more.

    A row's scores sum to the number of its query rows by tile * block_size, so that a share of
    their sum is one of its softmax mass. Sums are in float64: in float32 their order would decide.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    held = scores.double().gather(1, order).cumsum(-1)
    before = torch.nn.functional.pad(held[:, :-1], (1, 0))
    # Of NaN and of nothing there is never enough.
    is_enough = (before >= share * held[:, -1:]) & (before > 0)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, ~is_enough)


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
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention where each head of a query block sees only the key blocks kept for it.

    tables: as select_blocks wrote them
    Shapes and returns as in dense_attention. An empty list gives zeros and -inf.
    """
    out, lse = empty_attention(q, out, return_lse)
    for _, sequence in layout.sequences():
        _attend_to_lists(q, k, v, sequence, layout, tables, scale, out, lse)
    return out if lse is None else (out, lse)


def _attend_to_lists(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequence: Placement,
    layout: BatchLayout,
    tables: BlockTables,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Attention of one sequence's query blocks to the key blocks of their lists."""
    block_size = layout.block_size
    k_blocks, v_blocks = (_in_blocks(x[sequence.keys], block_size) for x in (k, v))
    tiles = zip(sequence.tiles(layout.tile), *tables.rows(sequence), strict=True)
    for (_, queries), page, row in tiles:
        count = tables.num_kept[page, row]
        ids = tables.kept[page, row, :, : max(1, int(count.max()))].long()
        seen = torch.arange(ids.shape[1], device=ids.device) < count[:, None]
        ids = ids.where(seen, 0)
        seen = (seen[:, :, None] & _inside(ids, sequence.key_len, block_size)).flatten(1)
        logits = (_heads_first(q[queries]) * scale) @ _gather(k_blocks, ids).mT
        logits.masked_fill_(~seen[:, None], float("-inf"))
        weights = logits.softmax(-1).masked_fill_((count == 0)[:, None, None], 0)
        # Block 0 stands for what is not listed: its values may be infinite, and 0 * inf is NaN.
        values = _gather(v_blocks, ids).masked_fill_(~seen[:, :, None], 0)
        out[queries] = (weights @ values).transpose(0, 1).to(out.dtype)
        if lse is not None:
            lse[:, queries] = logits.logsumexp(-1)


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


def _heads_first(x: Tensor) -> Tensor:
    """[tokens, heads, head_dim] -> float32 [heads, tokens, head_dim]"""
    return x.transpose(0, 1).float().contiguous()


def _logits(
    q: Tensor, k: Tensor, sequence: Placement, tile: int, scale: float
) -> Iterator[tuple[int, slice, slice, Tensor]]:
    """scale * q k^T of one sequence, a tile of query rows and some heads at a time.

    Yields the tile's number among all, its rows of q, the heads, and float32 [heads, rows, keys].
    """
    keys = _heads_first(k[sequence.keys])
    group = q.shape[1] // k.shape[1]
    step = max(1, _TILE_ELEMENTS // (group * tile * sequence.key_len))
    for number, rows in sequence.tiles(tile):
        queries = (_heads_first(q[rows]) * scale).view(k.shape[1], -1, q.shape[2])
        for first in range(0, k.shape[1], step):
            logits = queries[first : first + step] @ keys[first : first + step].mT
            heads = slice(first * group, (first + logits.shape[0]) * group)
            yield number, rows, heads, logits.view(-1, rows.stop - rows.start, sequence.key_len)


def choose_tokens(
    logits: Tensor, choice: Choice, forbidden: Forbidden, noise: Noise | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The token that each row chooses, how sure that is, and the row's largest logit.

    A row's results depend on its own logits and noise alone.

    logits [rows, vocab], only read
    forbidden: tokens that are not chosen; `choice` says whether they count in the confidence
    noise: of the rows' draws; None with temperature 0
    Returns tokens int64 [rows], of equal ones the first; confidence float32 [rows], higher is
    surer; and logits.amax(-1), float32 [rows]: a number unless a logit is none, or infinite.
    Where it is not, the token is any of the vocabulary and the confidence means nothing.
    """
    num_rows = max(1, _ROW_ELEMENTS // logits.shape[1])
    draws = repeat(None) if noise is None else noise.of_rows(num_rows)
    parts = [
        _choose(part, choice, barred, drawn)
        for part, barred, drawn in zip(
            logits.split(num_rows), forbidden.of_rows(num_rows), draws, strict=False
        )
    ]
    tokens, confidences, largest = (torch.cat(column) for column in zip(*parts, strict=True))
    return tokens, confidences, largest


def _choose(
    logits: Tensor, choice: Choice, forbidden: Forbidden, noise: Noise | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for a few rows."""
    largest = logits.amax(-1).float()
    allowed = forbidden.bar_from(logits.to(torch.float32, copy=True))
    if choice.truncates:
        allowed = _truncate(allowed, choice)
    scores = allowed
    if noise is not None:
        gumbel = -exponential(noise, logits.shape[1]).log()
        # In float64: a low temperature leaves little of the noise beside the logits.
        scores = allowed.double() + choice.temperature * gumbel
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


def exponential(noise: Noise, vocab: int) -> Tensor:
    """Noise E of the exponential distribution; the argmax of logits - log(E) is a draw.

    Token t of a row has two words of Philox 4x32-10, key `seed`, counter (t // 2, place, step,
    STREAM): the first two if t is even, else the last two; they are 64 bits of a number v in
    (0, 1], and E = -log(1 - v). Draws are made by small E, so small v must be fine: in 24 or 32
    bits, or in float32 near 1, noise is cut off where rare tokens win (arXiv 2409.02908). Here v
    has a float's 24 bits down to 2^-40, and reaches 2^-65. As log(E) is a float32 of at most 45,
    odds between two tokens are off by a factor of 4e-6 at most.

    Returns float32 [rows, vocab], over 0.
    """
    pairs = torch.arange((vocab + 1) // 2, device=noise.seeds.device)
    words = _random_words(noise, pairs, STREAM)
    v = torch.stack([share(*words[:2]), share(*words[2:])], dim=-1).flatten(1)[:, :vocab]
    return -(-v.clamp(max=1 - 2**-24)).log1p()


def drop_nans(rows: Tensor) -> None:
    """NaN to 0, in place; rows [n, heads, size], each row's numbers side by side."""
    rows.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


def draw_uniform(noise: Noise) -> Tensor:
    """A random number in (0, 1) for each row; float64 [rows].

    The first two words of counter (0, place, step, STREAM + 1) are its 64 bits: it has a double's
    53 bits down to 2^-12, and reaches 2^-65, so that a logarithm of it is fine where it is small.
    """
    high, low, *_ = _random_words(noise, noise.places.new_zeros(1), STREAM + 1)
    return uniform(high, low).squeeze(1)


def uniform(high: Tensor, low: Tensor) -> Tensor:
    """64 random bits as a float64 in (0, 1).  high, low int64, of 32 bits"""
    bits = high.double() * 2**32 + (low.double() + 0.5)
    return (bits * 2**-64).clamp(max=1 - 2**-53)


def share(high: Tensor, low: Tensor) -> Tensor:
    """64 random bits as a float32 in (0, 1].  high, low int64, of 32 bits"""
    return (high.float() + (low.float() + 0.5) * 2**-32) * 2**-32


_WORD = 0xFFFFFFFF


def _random_words(noise: Noise, numbers: Tensor, stream: int) -> tuple[Tensor, ...]:
    """Four words for each row and each of `numbers` [n]; int64 [rows, n], of 32 bits."""
    seeds, places, steps = (x[:, None] for x in (noise.seeds, noise.places, noise.steps))
    counter = (numbers[None, :], places & _WORD, steps & _WORD, torch.full_like(steps, stream))
    return _philox(counter, (seeds & _WORD, seeds >> 32 & _WORD))


def _philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random words for each counter of four; int64, of 32 bits. All are broadcast.

    Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011): 10 rounds.
    """
    a, b, c, d = counter
    for i in range(10):
        keys = ((key[0] + i * 0x9E3779B9) & _WORD, (key[1] + i * 0xBB67AE85) & _WORD)
        first, second = a * 0xD2511F53, c * 0xCD9E8D57  # of 64 bits: the sign is one of them
        a, b = (second >> 32) & _WORD ^ b ^ keys[0], second & _WORD
        c, d = (first >> 32) & _WORD ^ d ^ keys[1], first & _WORD
    return a, b, c, d


def write_pages(
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    offsets: Tensor,
    rows: Tensor | None = None,
) -> None:
    """Writes keys and values of rows to their places in pages, with 0 for a value that is NaN.

    What stays in a page behind its last sequence's end, an attention may weigh with 0, and 0 * NaN
    is NaN. The NaN of a sequence's own is in its keys as well, and stays.

    k, v [tokens, num_kv_heads, head_dim]: only read
    keys, values [num_pages, PAGE, num_kv_heads, head_dim]: of the same strides, otherwise arbitrary
    pages int [n]: of each row; a row whose page is negative is not written
    offsets int [n]: their places in the pages; no two rows have the same
    rows int [n]: of k and v; None: the first n
    """
    kept = (pages >= 0).nonzero().flatten()
    places = pages[kept].long(), offsets[kept].long()
    rows = kept if rows is None else rows[kept]
    keys[places], values[places] = k[rows], v[rows].masked_fill(v[rows].isnan(), 0)


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
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention where every query row of a sequence sees all of its keys, which are in pages.

    The rows of a sequence may belong to any of its tokens: FIRST_ROW is 0 and means nothing, nor
    does KEY_START.

    q [rows, num_heads, head_dim]
    keys, values [num_pages, PAGE, num_kv_heads, head_dim]: of the same strides, otherwise
        arbitrary, but a head's numbers lie side by side; what is behind a sequence's end may be NaN
    pages int32 [page rows, most pages]
    Returns as dense_attention does.
    """
    out, lse = empty_attention(q, out, return_lse)
    for _, sequence in layout.sequences():
        own = sequence._replace(key_start=0)
        k, v = (_own_pages(half, sequence, pages) for half in (keys, values))
        _attend_densely(q, k, v, own, layout.tile, scale, out, lse)
    return out if lse is None else (out, lse)


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
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention where each head of a query block sees only the key blocks kept for it, in pages.

    KEY_START means nothing.  keys, values: as in paged_attention; their pages are those of tables
    Returns as block_sparse_attention does.
    """
    out, lse = empty_attention(q, out, return_lse)
    for _, sequence in layout.sequences():
        own = sequence._replace(key_start=0)
        k, v = (_own_pages(half, sequence, tables.pages) for half in (keys, values))
        _attend_to_lists(q, k, v, own, layout, tables, scale, out, lse)
    return out if lse is None else (out, lse)


def _own_pages(half: Tensor, sequence: Placement, pages: Tensor) -> Tensor:
    """A sequence's pages of keys or of values, laid end to end; [tokens, num_kv_heads, head_dim]"""
    own = pages[sequence.page_row, : -(-sequence.key_len // half.shape[1])].long()
    return half[own].flatten(0, 1)


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
    """Adds to mass[slots[i], t] the weighted softmax mass that sequence i's rows put on token t.

    The rows of a sequence may belong to any of its tokens: FIRST_ROW is 0 and means nothing, nor
    does KEY_START. A sequence without rows adds nothing.

    q [rows, num_heads, head_dim]
    keys [num_pages, PAGE, num_kv_heads, head_dim]: strides arbitrary, but a head's numbers lie
        side by side; a sequence's are in the pages of its row of `pages`
    lse float32 [num_heads, rows]: log-sum-exp of each row's attention of the same `scale`, over
        whatever keys it saw; may be strided
    pages int32 [page rows, most pages]
    weights float32 [rows]: how much a row counts; a row of weight 0 is not read, it may be NaN
    slots int64 [num_seqs]: a row of `mass` for each sequence of the layout, no two the same
    mass float32 [num_slots, longest]: places past a sequence's end are not written
    """
    for place, sequence in layout.sequences():
        own_keys = _own_pages(keys, sequence, pages)
        total = mass.new_zeros(sequence.key_len)
        own = sequence._replace(key_start=0)
        for _, rows, heads, logits in _logits(q, own_keys, own, layout.tile, scale):
            weight = weights[rows, None]
            by_row = weight * _softmax(logits, lse[heads, rows])
            total += by_row.masked_fill_(weight == 0, 0).sum((0, 1))
        mass[slots[place], : sequence.key_len] += total


def open_canvases(state: CanvasState, columns: StepColumns) -> OpenRows:
    """The rows that a step reads: open places of each request's first unfinished block.

    Open are the masked places before END, of which the first NUM_OPEN are read. Where there are
    fewer, padding reads a row of the request's window.
    """
    slots = columns.count(SLOT)
    masked = _masked(state, columns)
    places = torch.arange(masked.shape[1], device=masked.device)
    lengths = columns.count(BLOCK_LENGTH)
    is_open = masked & (places // lengths[:, None] == (_first(masked) // lengths)[:, None])
    is_open &= places < columns.count(END)[:, None]
    rank = is_open.cumsum(1) - 1
    is_read = is_open & (rank < columns.count(NUM_OPEN)[:, None])
    num_rows = columns.num_rows
    index = torch.where(is_read, columns.count(ROW_START)[:, None] + rank, num_rows)
    found = places.new_full((num_rows + 1,), -1)
    found = found.scatter_(0, index.flatten(), places.expand_as(index).flatten())[:num_rows]
    counts, batch = columns.count(NUM_OPEN), torch.arange(columns.num_reqs, device=slots.device)
    order = columns.count(ROW_START).argsort(stable=True)  # a request without rows may be anywhere
    reqs = batch[order].repeat_interleave(counts[order], output_size=num_rows)
    rows = torch.maximum(columns.count(READ_ROW)[reqs] + found, columns.count(WINDOW_ROW)[reqs])
    known = columns.count(BLOCK_STEP)
    block_steps = torch.where(known >= 0, known, state.block_steps[slots])
    return OpenRows(found, reqs, rows, state.seeds[slots][reqs], block_steps[reqs])


def fill_canvases(
    state: CanvasState,
    columns: StepColumns,
    rows: OpenRows,
    tokens: Tensor,
    confidence: Tensor,
    largest: Tensor,
    uniform: Tensor | None,
) -> Tensor:
    """Fill places of a step with `tokens`, and note whose logits were no numbers.

    A place that was handed out before takes its own token again.

    tokens int64, confidence float32, largest float32 [num_rows]: see choose_tokens
    uniform float64 [num_rows], in (0, 1): what places are drawn with; None: none are
    Returns bool [num_rows], which rows were chosen.
    """
    slots = columns.count(SLOT)
    bad = torch.zeros_like(slots).index_add_(0, rows.reqs, (~largest.isfinite()).long())
    state.has_failed[slots] |= bad > 0
    chosen = _choose_places(columns, rows, confidence, uniform)
    own = slots[rows.reqs]
    handed_out = rows.places < state.num_taken[own]
    undefined = state.tokens.numel() - 1
    index = torch.where(chosen, own * state.longest + rows.places, undefined)
    flat = state.tokens.view(-1)
    flat[index] = torch.where(handed_out, flat[index], tokens.to(flat.dtype))
    before = _current_block(state, columns)
    state.masked.view(-1).index_fill_(0, index, False)
    ran_on = _current_block(state, columns) == before
    state.block_steps[slots] = torch.where(ran_on, state.block_steps[slots] + 1, 0)
    return chosen


def _choose_places(
    columns: StepColumns, rows: OpenRows, confidence: Tensor, uniform: Tensor | None
) -> Tensor:
    """Which rows of a step are filled: each request's surest, and those that its policy adds.

    A request fills its NUM_FILLED surest places (with a threshold: one), where chance may stand in
    for confidence (LLaDA's `random`); every place at least THRESHOLD sure (get_transfer_index in
    NVlabs/Fast-dLLM llada/generate.py; by entropy, get_transfer_index_entropy in hao-ai-lab/d3LLM
    d3llm_llada_generate_util.py); and each place with probability SHARE (Dream's `origin`).
    """
    is_open = rows.places >= 0
    scores = confidence.double()
    if uniform is not None:
        scores = torch.where(columns.device[BY_CHANCE][rows.reqs] > 0, uniform, scores)
        scores = _with_gumbel(scores, columns.device[ALG_TEMP][rows.reqs], uniform)
    ranks = _ranks(columns, rows, scores.masked_fill(~is_open, float("-inf")))
    chosen = ranks < columns.device[NUM_FILLED][rows.reqs]
    chosen |= confidence >= columns.device[THRESHOLD].float()[rows.reqs]
    if uniform is not None:
        chosen |= uniform < columns.device[SHARE][rows.reqs]
    return chosen & is_open


def _ranks(columns: StepColumns, rows: OpenRows, scores: Tensor) -> Tensor:
    """Each row's rank among its request's, the highest score first; int64 [num_rows]."""
    numbers = torch.arange(len(scores), device=scores.device)
    numbers -= columns.count(ROW_START)[rows.reqs]
    table = scores.new_full((columns.num_reqs, columns.most(NUM_OPEN)), float("-inf"))
    table[rows.reqs, numbers] = scores
    order = table.argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks)[rows.reqs, numbers]


def _with_gumbel(scores: Tensor, alg_temp: Tensor, uniform: Tensor) -> Tensor:
    """Where alg_temp is over 0: scores whose largest are drawn from softmax(scores / alg_temp).

    All float64 [num_rows]. In fewer bits Gumbel noise distorts the draw (arXiv 2409.02908).
    Source: _sample in DreamLM/Dream generation_utils.py.
    """
    drawn = scores / alg_temp - (-uniform.log()).log()
    return torch.where(alg_temp > 0, drawn, scores)


def take_canvases(state: CanvasState, columns: StepColumns, ends: SequenceEnds | None) -> Taken:
    """Hand out the tokens that became final and were not handed out yet.

    ends: of sequences that are appended to; written: where what was handed out before ends
    """
    slots = columns.count(SLOT)
    taken = state.num_taken[slots]
    # A request that starts over does not hand out twice what it handed out before.
    final = torch.maximum(_num_final(state, columns), taken)
    final = torch.where(columns.device[MAY_HAND_OUT] > 0, final, taken)
    state.num_taken[slots] = final
    if ends is not None:
        ends.ends[slots] = ends.prompt_lens[slots] + taken.to(ends.ends.dtype)
    last = columns.count(NUM_TOKENS)[:, None] - 1
    width = torch.arange(columns.width, device=slots.device)
    places = torch.minimum(taken[:, None] + width, last)
    tokens = state.tokens[slots[:, None], places].long()
    return Taken(tokens, places, (final - taken).int(), state.has_failed[slots].int())


def _num_final(state: CanvasState, columns: StepColumns) -> Tensor:
    """How many places may have been handed out after the step; int64 [num_reqs]."""
    masked = _masked(state, columns)
    num_tokens, lengths = columns.count(NUM_TOKENS), columns.count(BLOCK_LENGTH)
    final = torch.where(masked.any(1), _first(masked) // lengths * lengths, num_tokens)
    is_whole = columns.device[EARLY_STOP] == 0
    final = torch.where(is_whole, final // num_tokens * num_tokens, final)
    # Logits that are not numbers can leave a place unfilled; the request ends all the same.
    return torch.where(columns.device[IS_LAST] > 0, num_tokens, final)


def write_ids(
    state: CanvasState,
    columns: StepColumns,
    input_ids: Tensor,
    mask_token_id: int,
    light: SequenceRows | None,
) -> None:
    """Write the tokens that the model sees: of each canvas from FIRST_PLACE on, and of `light`.

    input_ids int32 [rows of the batch]: written;  light: whose positions are written, too
    """
    slots, last = columns.count(SLOT), columns.count(NUM_SEEN)[:, None] - 1
    if light is not None:
        own = slots[light.seqs]
        prompt_lens = light.prompt_lens[own].long()
        is_prompt = light.places < prompt_lens
        prompt = light.prompts[own, light.places]
        seen = _seen(state, own, (light.places - prompt_lens).clamp(min=0), mask_token_id)
        input_ids[light.rows] = torch.where(is_prompt, prompt, seen)
        light.positions[light.rows] = light.places
    # Other places write the first or the last one again.
    places = torch.arange(columns.most(NUM_SEEN), device=slots.device)
    places = torch.maximum(torch.minimum(places, last), columns.count(FIRST_PLACE)[:, None])
    rows = columns.count(CANVAS_ROW)[:, None] + places
    input_ids[rows] = _seen(state, slots[:, None], places, mask_token_id)


def _seen(state: CanvasState, slots: Tensor, places: Tensor, mask_token_id: int) -> Tensor:
    """The tokens that the model sees of places of canvases; int32."""
    return state.tokens[slots, places].masked_fill(state.masked[slots, places], mask_token_id)


def _masked(state: CanvasState, columns: StepColumns) -> Tensor:
    """What is masked of the canvases of a step; bool [num_reqs, places of the longest]."""
    return state.masked[columns.count(SLOT), : columns.most(NUM_TOKENS)]


def _current_block(state: CanvasState, columns: StepColumns) -> Tensor:
    """The first block with a masked place; block 0 of a canvas that has none."""
    return _first(_masked(state, columns)) // columns.count(BLOCK_LENGTH)


def _first(masked: Tensor) -> Tensor:
    """The first masked place of each row, or 0 if none is; int64 [rows]."""
    return masked.int().argmax(1)


def write_light_inputs(
    inputs: LightTensors,
    rows: Tensor,
    places: Tensor,
    seqs: Tensor,
    pages: Tensor,
    reads: OpenRows | None,
) -> None:
    """Write where the rows of light steps keep keys and values, and which of them are read.

    Rows of no sequence keep theirs in page 0, which vLLM gives to nobody; nor do they count.

    rows int64 [n]: 0 to n - 1 in any order;  places, seqs int64 [n]: theirs in their sequences, and
        whose they are
    pages int32 [num_seqs, most pages]: vLLM's page table
    reads: the rows that are read, no more than `inputs` has; None: nothing is noted, nor written
    """
    inputs.pages.zero_().index_put_((rows,), pages[seqs, places // PAGE].long())
    inputs.offsets.zero_().index_put_((rows,), places % PAGE)
    if reads is not None:
        num_reads = len(reads.places)
        inputs.read_rows.zero_()[:num_reads] = reads.batch_rows
        inputs.weights.zero_()[:num_reads] = (reads.places >= 0).float()
