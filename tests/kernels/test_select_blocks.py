# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Scores -> lists of kept blocks: the kernel and its twin, which must agree to the bit."""

import math
from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    DEVICE,
    RAGGED,
    existing,
    listed,
    make_batch,
    scattered_tables,
    tables_on,
)

from sparsed_vllm.kernels import reference
from sparsed_vllm.kernels import select_blocks as module
from sparsed_vllm.kernels.layout import (
    FIRST_GEN,
    BatchLayout,
    BlockTables,
    Selection,
    keep_counts,
    most_kept,
)
from sparsed_vllm.kernels.select_blocks import select_blocks

IMPLEMENTATIONS = [(select_blocks, DEVICE), (reference.select_blocks, "cpu")]
both = pytest.mark.parametrize(("select", "device"), IMPLEMENTATIONS, ids=["kernel", "twin"])


def random_scores(batch, levels=None):
    """Like block_scores': with `levels`, few different ones, so that many tie."""
    layout = batch.layout
    shape = (2, batch.q.shape[1], layout.num_tiles, layout.max_key_blocks)
    scores = torch.rand(shape) if levels is None else torch.randint(levels, shape) / levels
    scores[:, :, ~existing(batch)] = float("-inf")
    for place, sequence in layout.sequences():
        tiles = slice(
            sequence.tile_start, sequence.tile_start - (-sequence.num_rows // layout.tile)
        )
        scores[1, :, tiles, : batch.selection.host[FIRST_GEN, place]] = float("-inf")
    return scores[0], scores[1]


def run(batch, scores, select, device, width=None, **options):
    """Into tables full of what names no block; returns those and where they were written."""
    tables = scattered_tables(batch, width or batch.selection.most_kept, **options)
    written, there = tables_on(device, tables), batch.to(device)
    select(*(s.to(device) for s in scores), there.layout, there.selection, written)
    return BlockTables(written.kept.cpu(), written.num_kept.cpu(), tables.pages)


def expected_ids(scores, gen_scores, length, first_gen, share, block_size, mass=None):
    """Of one row, by sorting (score, id) pairs."""
    count = -(-length // block_size)
    keep_all, keep_gen = keep_counts(count, first_gen, share)
    best = sorted(range(count), key=lambda i: (-scores[i], i))
    generated = sorted(range(first_gen, count), key=lambda i: (-gen_scores[i], i))
    kept = {i for i in best[:keep_all] if i < first_gen} | set(generated[:keep_gen])
    if mass is not None:
        kept &= holding(best, scores, mass) | holding(generated, gen_scores, mass)
    return sorted(kept)


def holding(ids, scores, mass):
    """The first ids that hold the share of all ids' scores."""
    total, held = math.fsum(scores[i] for i in ids), []
    while math.fsum(scores[i] for i in held) < mass * total:
        held.append(ids[len(held)])
    return set(held)


def check(batch, scores, select, device, share=0.3, mass=None, **options):
    tables = run(batch, scores, select, device, **options)
    for place, sequence in batch.layout.sequences():
        first_gen = int(batch.selection.host[FIRST_GEN, place])
        for tile, (page, row) in enumerate(
            zip(*tables.rows(sequence), strict=True), sequence.tile_start
        ):
            for head in range(batch.q.shape[1]):
                pair = (s[head, tile].tolist() for s in scores)
                size = batch.layout.block_size
                ids = expected_ids(*pair, sequence.key_len, first_gen, share, size, mass)
                assert tables.num_kept[page, row, head] == len(ids)
                assert tables.kept[page, row, head, : len(ids)].tolist() == ids


@both
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 1.0])
def test_the_best_of_all_and_of_the_generation_are_listed_in_order(share, select, device):
    batch = make_batch([*RAGGED, (200, 145)], 16, select=share)
    check(batch, random_scores(batch), select, device, share)


@both
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_a_page_has_a_row_for_each_of_its_blocks(block_size, select, device):
    batch = make_batch([(700, 300), (1, 0), (257, 255)], block_size)
    check(batch, random_scores(batch), select, device)


@both
@pytest.mark.parametrize(("rows", "block_size"), [(64, 16), (128, 32)])
def test_a_row_may_stand_for_more_rows_than_its_blocks_have_tokens(
    rows, block_size, select, device
):
    batch = make_batch([(700, 300), (1, 0), (257, 255)], block_size, query_block_size=rows)
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
    tables = run(batch, scores, select, device)
    for sequence in batch.sequences:
        count = -(-sequence.key_len // 16)
        for page, row in zip(*tables.rows(sequence), strict=True):
            for kept, num_kept in zip(
                tables.kept[page, row], tables.num_kept[page, row].tolist(), strict=True
            ):
                ids = kept[:num_kept].tolist()
                assert ids == sorted(set(ids)) and set(ids) <= set(range(count))


@both
def test_a_table_may_be_wider_than_its_lists(select, device):
    batch = make_batch([(40, 20)], 16)
    check(batch, random_scores(batch), select, device, width=50)


@both
def test_ids_may_be_int32(select, device):
    batch = make_batch([(100, 45)], 16)
    check(batch, random_scores(batch), select, device, dtype=torch.int32)


@both
def test_rows_of_others_stay_as_they_are(select, device):
    batch = make_batch([(100, 45), (300, 7)], 16)
    tables = run(batch, random_scores(batch), select, device, poison=77)
    others = torch.ones(tables.num_kept.shape[:2], dtype=torch.bool)
    for sequence in batch.sequences:
        others[tables.rows(sequence)] = False
    assert (tables.kept[others] == 77).all() and (tables.num_kept[others] == 77).all()


@both
def test_heads_of_others_stay_as_they_are(select, device):
    batch = make_batch([(100, 45)], 16, heads=(3, 1))
    tables, there = tables_on(device, scattered_tables(batch, 9, poison=77)), batch.to(device)
    scores = [s[1:2].to(device) for s in random_scores(batch)]
    some = BlockTables(tables.kept[:, :, 1:2], tables.num_kept[:, :, 1:2], tables.pages)
    select(*scores, there.layout, there.selection, some)
    assert (tables.kept[:, :, ::2] == 77).all() and (tables.num_kept[:, :, ::2] == 77).all()
    assert (tables.num_kept[:, :, 1] != 77).sum() == batch.layout.num_tiles


@both
def test_everything_is_kept_where_select_is_one(select, device):
    batch = make_batch(RAGGED, 16, select=1.0)
    tables = run(batch, random_scores(batch), select, device)
    assert (listed(batch, tables) == existing(batch)).all()


@both
def test_an_empty_batch_is_no_work(select, device):
    batch = make_batch([(0, 0)], 16)
    tables = run(batch, random_scores(batch), select, device, width=3, poison=77)
    assert (tables.num_kept == 77).all()


@both
def test_4096_key_blocks_are_selected_from(select, device):
    """Beside a longer sequence, of which this launch computes nothing."""
    length = 300
    layout = BatchLayout.of(
        16,
        device,
        query_starts=[0, 0],
        num_rows=[length, 0],
        first_rows=[0, 0],
        key_starts=[0, 0],
        key_lens=[4096 * 16 - 3, 5],
        page_rows=[0, 0],
    )
    selection = Selection.of(layout, [50000, 0], [0.3, 0.3])
    first_gen = int(selection.host[FIRST_GEN, 0])
    scores = torch.rand(1, layout.num_tiles, 4096)
    gen_scores = scores.masked_fill(torch.arange(4096) < first_gen, float("-inf"))
    kept = torch.zeros(3, 8, 1, selection.most_kept, dtype=torch.int16, device=device)
    pages = torch.tensor([[2, 0, 1]], dtype=torch.int32, device=device)
    tables = BlockTables(kept, torch.zeros_like(kept[..., 0]), pages)
    select(scores.to(device), gen_scores.to(device), layout, selection, tables)
    for block in (0, 1, 9, 18):
        row_scores = (scores[0, block].tolist(), gen_scores[0, block].tolist())
        ids = expected_ids(*row_scores, 4096 * 16 - 3, first_gen, 0.3, 16)
        row = (int(pages[0, block // 8]), block % 8, 0)
        assert kept[row][: tables.num_kept[row]].tolist() == ids


@both
@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("mass", [0.01, 0.5, 0.9, 0.99])
def test_by_mass_the_best_are_listed_until_they_hold_it(mass, share, select, device):
    # Of one head: each is a program of its own.
    batch = make_batch([*RAGGED, (200, 145)], 16, heads=(1, 1), select=share, mass=mass)
    scores = peaked_scores(batch) if share == 1 else random_scores(batch)
    check(batch, scores, select, device, share, mass)


def peaked_scores(batch):
    """Of which the best few hold most."""
    return [torch.where(s >= 0, s.pow(9), s) for s in random_scores(batch)]


@both
@pytest.mark.parametrize("levels", [1, 3])
def test_by_mass_the_lower_of_equal_blocks_wins(levels, select, device):
    batch = make_batch([(120, 60), (70, 10)], 16, select=1.0, mass=0.5)
    scores = [1 + s for s in random_scores(batch, levels)]
    check(batch, scores, select, device, share=1.0, mass=0.5)


@both
def test_where_one_block_has_all_mass_it_is_listed_and_one_of_the_generation(select, device):
    batch = make_batch([(160, 80)], 16, select=1.0, mass=0.99)
    scores, gen_scores = (torch.zeros_like(s) for s in random_scores(batch))
    scores[..., 3] = 0.06
    gen_scores[..., :5], gen_scores[..., 7] = float("-inf"), 0.06
    tables = run(batch, (scores, gen_scores), select, device)
    assert listed(batch, tables).nonzero()[:, 2].tolist() == [3, 7] * 2 * 10


@both
@pytest.mark.parametrize(("mass", "is_bounded"), [(0.2, False), (0.999, True)])
def test_the_number_bounds_what_holds_a_mass(mass, is_bounded, select, device):
    batch = make_batch([(300, 200), (97, 30)], 16, mass=mass)
    scores = random_scores(batch)
    by_number = replace(batch, selection=replace(batch.selection, mass=None))
    number = listed(batch, run(by_number, scores, select, device))
    mine = listed(batch, run(batch, scores, select, device))
    assert (mine <= number).all() and mine.any(-1).all()
    assert torch.equal(mine, number) == is_bounded


@both
def test_a_batch_mate_that_selects_by_mass_changes_no_list(select, device):
    batch = make_batch([(160, 80), (300, 200)], 16)
    scores = random_scores(batch)
    alone = listed(batch, run(batch, scores, select, device))
    mass = torch.tensor([math.inf, 0.5], dtype=torch.float64)
    mixed = replace(batch, selection=replace(batch.selection, mass=mass))
    together = listed(batch, run(mixed, scores, select, device))
    assert torch.equal(together[:, :10], alone[:, :10])
    assert not torch.equal(together[:, 10:], alone[:, 10:])


@both
@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_where_scores_hold_no_mass_all_of_the_number_is_kept(value, select, device):
    batch = make_batch([(160, 80), (50, 20)], 16)
    scores = random_scores(batch)
    for s in scores:
        s[:, ::2] = torch.where(s[:, ::2] >= 0, value, s[:, ::2])
    by_number = listed(batch, run(batch, scores, select, device))
    mass = torch.tensor([0.5, 0.5], dtype=torch.float64)
    by_mass = replace(batch, selection=replace(batch.selection, mass=mass))
    assert torch.equal(
        listed(batch, run(by_mass, scores, select, device))[:, ::2], by_number[:, ::2]
    )


@pytest.mark.parametrize("by_mass", [False, True])
@pytest.mark.parametrize(("most", "widths"), [(1, [256]), (257, [256, 1024]), (1024, [256, 1024])])
def test_every_width_up_to_the_longest_sequence_is_compiled_beforehand(
    most, widths, by_mass, monkeypatch
):
    tried = []
    width_for = module.width_for
    monkeypatch.setattr(module, "width_for", lambda n: tried.append(width_for(n)) or tried[-1])
    module.compile_up_to(most, torch.int16, DEVICE, by_mass=by_mass)
    assert tried[1:] == widths  # after the longest one's own
    assert set(map(width_for, range(1, most + 1))) == set(widths)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 10, 33])
def test_a_table_of_the_widest_row_holds_every_prompt(num_blocks, share):
    widths = []
    for prompt_length in range(16 * num_blocks):
        batch = make_batch([(16 * num_blocks, prompt_length)], 16, head_dim=1, select=share)
        widths.append(batch.selection.most_kept)
    assert max(widths) == most_kept(num_blocks, share)
