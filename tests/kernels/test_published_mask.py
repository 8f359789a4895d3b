# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Which blocks are kept, against SparseD's description (arXiv 2509.24014) in L x L float64, and by
the mass that they hold.
"""

import math

import pytest
import torch
from kernel_cases import listed, logits_of, make_batch, scattered_tables

from sparsed_vllm.kernels import reference


def published_mask(batch, prompt_length, share):
    """bool [num_heads, query blocks, key blocks] of a batch of one sequence."""
    (sequence,) = batch.sequences
    size = batch.layout.tile
    count = math.ceil(sequence.key_len / size)
    begins = [size * block for block in range(count)]
    generated = [block for block in range(count) if begins[block] >= prompt_length]
    first = generated[0] if generated else count - 1
    logits = logits_of(batch, sequence)
    everywhere = logits.softmax(-1)
    within = logits[:, :, begins[first] :].softmax(-1)
    mask = torch.zeros(logits.shape[0], count, count, dtype=torch.bool)
    for head in range(logits.shape[0]):
        for row, begin in enumerate(begins):
            mass = everywhere[head, begin : begin + size]
            mask[head, row, best_blocks(mass, size, share)] = True
            mask[head, row, first:] = False
            mass = within[head, begin : begin + size]
            mask[head, row, [first + block for block in best_blocks(mass, size, share)]] = True
    return mask


def best_blocks(mass, size, share):
    """mass [rows, keys]: the key blocks of the highest mean; a partial one divides by as much."""
    means = [float(part.sum()) / size**2 for part in mass.split(size, dim=1)]
    most = min(int(len(means) * share) + 1, len(means))
    return sorted(range(len(means)), key=lambda block: -means[block])[:most]


def kept_mask(batch):
    tables = scattered_tables(batch, batch.selection.most_kept)
    of = (batch.layout, batch.selection)
    scores = reference.block_scores(batch.q, batch.k, None, *of, scale=batch.scale)
    reference.select_blocks(*scores, *of, tables)
    return listed(batch, tables)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_the_kept_blocks_are_the_published_ones(block_size, share):
    for _ in range(100 // block_size + 2):
        length = int(torch.randint(1, 10 * block_size, ()))
        prompt_length = int(torch.randint(0, length, ()))
        batch = make_batch([(length, prompt_length)], block_size, select=share, spread=1.5)
        expected = published_mask(batch, prompt_length, share)
        assert torch.equal(kept_mask(batch), expected), (length, prompt_length)


def holding_mask(batch, prompt_length, mass):
    """As published_mask, by mass alone."""
    (sequence,) = batch.sequences
    size = batch.layout.tile
    count = math.ceil(sequence.key_len / size)
    first = min(math.ceil(prompt_length / size), count - 1)
    logits = logits_of(batch, sequence)
    everywhere = logits.softmax(-1)
    within = logits[:, :, first * size :].softmax(-1)
    mask = torch.zeros(logits.shape[0], count, count, dtype=torch.bool)
    for head in range(logits.shape[0]):
        for row in range(count):
            rows = slice(size * row, size * row + size)
            mask[head, row, fewest_blocks(everywhere[head, rows], size, mass)] = True
            kept = fewest_blocks(within[head, rows], size, mass)
            mask[head, row, [first + block for block in kept]] = True
    return mask


def fewest_blocks(mass, size, share):
    """mass [rows, keys]: the best key blocks that hold the share of it."""
    parts = [float(part.sum()) for part in mass.split(size, dim=1)]
    order = sorted(range(len(parts)), key=lambda block: -parts[block])
    counts = range(1, len(order) + 1)
    return next(order[:n] for n in counts if sum(parts[b] for b in order[:n]) >= share * len(mass))


@pytest.mark.parametrize("mass", [0.3, 0.6, 0.9])
@pytest.mark.parametrize(("block_size", "heads"), [(16, (4, 2)), (32, (2, 1)), (128, (2, 2))])
def test_by_mass_the_fewest_blocks_hold_it_of_all_keys_and_of_the_generation_s(
    block_size, heads, mass
):
    sizes = {"heads": heads, "select": 1.0, "mass": mass, "spread": 4.0}
    for _ in range(100 // block_size + 2):
        length = int(torch.randint(1, 10 * block_size, ()))
        prompt_length = int(torch.randint(0, length, ()))
        batch = make_batch([(length, prompt_length)], block_size, **sizes)
        expected = holding_mask(batch, prompt_length, mass)
        assert torch.equal(kept_mask(batch), expected), (length, prompt_length)
