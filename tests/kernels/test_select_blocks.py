# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Scores -> lists of kept blocks: the kernel and its twin, which must agree to the bit."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import DEVICE, RAGGED, Table, make_batch

from sparsed_vllm.kernels import reference
from sparsed_vllm.kernels import select_blocks as module
from sparsed_vllm.kernels.layout import QueryBlocks, Span, keep_counts, most_kept
from sparsed_vllm.kernels.select_blocks import select_blocks

IMPLEMENTATIONS = [(select_blocks, DEVICE), (reference.select_blocks, "cpu")]
both = pytest.mark.parametrize(("select", "device"), IMPLEMENTATIONS, ids=["kernel", "twin"])


def random_scores(batch, levels=None):
    """Like block_scores': with `levels`, few different ones, so that many tie."""
    blocks = batch.blocks
    shape = (2, batch.q.shape[1], blocks.num_blocks, blocks.max_key_blocks)
    scores = torch.rand(shape) if levels is None else torch.randint(levels, shape) / levels
    ids = torch.arange(blocks.max_key_blocks)
    scores[:, :, ids >= -(-blocks.lengths[:, None] // blocks.block_size)] = float("-inf")
    scores[1, :, ids < blocks.first_gens[:, None]] = float("-inf")
    return scores[0], scores[1]


def run(batch, scores, select, device, width=None, **options):
    table = Table.scattered(batch, width or batch.blocks.most_kept, **options)
    written = table.to(device)
    select(*(s.to(device) for s in scores), batch.to(device).blocks, *written)
    return Table(*(x.cpu() for x in written))


def expected_ids(scores, gen_scores, length, first_gen, share, block_size):
    """Of one row, by sorting (score, id) pairs."""
    count = -(-length // block_size)
    keep_all, keep_gen = keep_counts(count, first_gen, share)
    best = sorted(range(count), key=lambda i: (-scores[i], i))[:keep_all]
    generated = sorted(range(first_gen, count), key=lambda i: (-gen_scores[i], i))[:keep_gen]
    return sorted({i for i in best if i < first_gen} | set(generated))


def check(batch, scores, select, device, **options):
    table, blocks = run(batch, scores, select, device, **options), batch.blocks
    for head in range(batch.q.shape[1]):
        for span, places in blocks.by_span():
            for place in range(places.start, places.stop):
                ids = expected_ids(
                    *(s[head, place].tolist() for s in scores),
                    *(span.length, int(blocks.first_gens[place]), span.select, blocks.block_size),
                )
                row = table.rows[place]
                unused = [-1] * (table.kept.shape[2] - len(ids))
                assert table.kept[row, head].tolist() == ids + unused
                assert table.num_kept[row, head] == len(ids)


@both
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 1.0])
def test_the_best_of_all_and_of_the_generation_are_listed_in_order(share, select, device):
    batch = make_batch([*RAGGED, (100, 45)], 16, select=share)
    check(batch, random_scores(batch), select, device)


@both
@pytest.mark.parametrize("levels", [1, 3])
def test_of_equal_scores_the_lower_block_wins(levels, select, device):
    batch = make_batch([(120, 60), (70, 10)], 16)
    check(batch, random_scores(batch, levels), select, device)


@both
def test_scores_from_the_smallest_to_infinity_are_ordered(select, device):
    batch = make_batch([(160, 80)], 16)
    scores = random_scores(batch)
    odd = torch.tensor([0.0, 1e-45, 1e-38, 2e-38, 1.0, 1.0000001, 3e38, float("inf"), 0.5, 0.0])
    for s in scores:
        s[s >= 0] = odd.expand_as(s)[s >= 0]
    check(batch, scores, select, device)


@both
@pytest.mark.parametrize("nan", [float("nan"), -float("nan")])
def test_scores_that_are_not_numbers_still_list_blocks_that_exist(nan, select, device):
    batch = make_batch([(160, 80), (50, 20)], 16)
    scores = random_scores(batch)
    for s in scores:
        s[:, ::2] = torch.where(s[:, ::2] >= 0, nan, s[:, ::2])
    table = run(batch, scores, select, device)
    for place in range(batch.blocks.num_blocks):
        row, count = table.rows[place], -(-int(batch.blocks.lengths[place]) // 16)
        for kept, num_kept in zip(table.kept[row], table.num_kept[row].tolist(), strict=True):
            ids = kept[:num_kept].tolist()
            assert ids == sorted(set(ids)) and set(ids) <= set(range(count))


@both
def test_a_wide_table_ends_in_minus_one(select, device):
    batch = make_batch([(40, 20)], 16)
    check(batch, random_scores(batch), select, device, width=50)


@both
def test_ids_may_be_int32(select, device):
    batch = make_batch([(100, 45)], 16)
    check(batch, random_scores(batch), select, device, dtype=torch.int32)


@both
def test_rows_of_others_stay_as_they_are(select, device):
    batch = make_batch([(100, 45)], 16)
    table = run(batch, random_scores(batch), select, device, poison=77)
    others = torch.ones(len(table.kept), dtype=torch.bool)
    others[table.rows] = False
    assert (table.kept[others] == 77).all() and (table.num_kept[others] == 77).all()


@both
def test_everything_is_kept_where_select_is_one(select, device):
    batch = make_batch(RAGGED, 16, select=1.0)
    table = run(batch, random_scores(batch), select, device)
    num_key_blocks = -(-batch.blocks.lengths // 16)
    assert (table.num_kept[table.rows] == num_key_blocks[:, None]).all()


@both
def test_4096_key_blocks_are_selected_from(select, device):
    length = 4096 * 16 - 3
    blocks = QueryBlocks.of([Span(0, length, 50000, 0.3)], 16, device)
    names = ("starts", "lengths", "indices", "first_gens", "keep_all", "keep_gen")
    last_two = replace(blocks, **{name: getattr(blocks, name)[-2:] for name in names})
    first_gen = int(last_two.first_gens[0])
    scores = torch.rand(1, 2, 4096)
    gen_scores = scores.masked_fill(torch.arange(4096) < first_gen, float("-inf"))
    kept = torch.zeros(2, 1, blocks.most_kept, dtype=torch.int16, device=device)
    count = torch.zeros(2, 1, dtype=torch.int32, device=device)
    rows = torch.arange(2, device=device)
    select(scores.to(device), gen_scores.to(device), last_two, kept, count, rows)
    for row in range(2):
        row_scores = (scores[0, row].tolist(), gen_scores[0, row].tolist())
        ids = expected_ids(*row_scores, length, first_gen, 0.3, 16)
        assert kept[row, 0, : count[row, 0]].tolist() == ids


@pytest.mark.parametrize(("most", "widths"), [(1, [256]), (257, [256, 1024]), (1024, [256, 1024])])
def test_every_width_up_to_the_longest_sequence_is_compiled_beforehand(most, widths, monkeypatch):
    tried = []
    width_for = module.width_for
    monkeypatch.setattr(module, "width_for", lambda n: tried.append(width_for(n)) or tried[-1])
    module.compile_up_to(most, 2, torch.int16, DEVICE)
    assert tried[1:] == widths  # after the longest one's own
    assert set(map(width_for, range(1, most + 1))) == set(widths)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 10, 33])
def test_a_table_of_the_widest_row_holds_every_prompt(num_blocks, share):
    widths = []
    for prompt_length in range(16 * num_blocks):
        batch = make_batch([(16 * num_blocks, prompt_length)], 16, head_dim=1, select=share)
        widths.append(batch.blocks.most_kept)
    assert max(widths) == most_kept(num_blocks, share)
