# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Fast-dLLM's caches against the whole network in which stale keys and values are put."""

import pytest
import torch
import torch.nn.functional as F
from needle.batches import MASK_ID
from needle.decoding import denoise, paces
from needle.network import Network, Shape
from quality import answers
from quality.caches import denoise_in_blocks
from quality.questions import Question
from quality.reuse_methods import method_of

SHAPE = Shape(vocab_size=64, n_layers=3, d_model=64, mlp_hidden_size=64)
CANVAS, BLOCK = 16, 4


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = Network(SHAPE)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.dim() == 2:
                weight.mul_(4)  # so that answers depend on what is attended to
    return network.double()


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 64, (5, 40), generator=generator)


class Stale:
    """What a step attends to: new keys of places [first, end), old ones of the others."""

    def __init__(self):
        self.kept = {}
        self.reach = (0, 0)

    def __call__(self, layer, q, k, v):
        if layer in self.kept:
            is_new = torch.zeros(k.shape[2], 1, dtype=torch.bool)
            is_new[slice(*self.reach)] = True
            pairs = zip((k, v), self.kept[layer], strict=True)
            k, v = (torch.where(is_new, new, old) for new, old in pairs)
        self.kept[layer] = k, v
        return F.scaled_dot_product_attention(q, k, v)


def expected(network, prompt, steps, cache, block=BLOCK, threshold=None):
    """[canvas] of one prompt, int64 [1, prompt]"""
    tokens = torch.cat((prompt, torch.full((1, CANVAS), MASK_ID)), 1)
    start, length = prompt.shape[1], tokens.shape[1]
    stale = Stale()
    for first in range(start, length, block):
        for step, pace in enumerate(paces(block, steps * block // CANVAS)):
            end = first + block if cache == "dual" else length
            stale.reach = (0, length) if step == 0 or cache == "none" else (first, end)
            logits = network(tokens, slice(first, first + block), stale)[0]
            logits[:, MASK_ID] = -torch.inf
            sure, choice = logits.softmax(-1).max(-1)
            own = tokens[0, first : first + block]
            sure[own != MASK_ID] = -1
            places = sure.topk(pace).indices
            if threshold is not None:
                places = (sure >= min(threshold, sure.max())).nonzero()[:, 0]
            own[places] = choice[places]
            if not (own == MASK_ID).any():
                break
    return tokens[0, start:].tolist()


@pytest.mark.parametrize("cache", ["dual", "prefix", "none"])
@pytest.mark.parametrize(("steps", "threshold"), [(16, None), (8, None), (16, 0.06)])
@torch.no_grad()
def test_a_step_sees_stale_keys_and_values_of_what_its_cache_keeps(
    network, prompts, cache, steps, threshold
):
    given = {"cache": cache, "block": BLOCK, "threshold": threshold}
    done = denoise_in_blocks(network, prompts, CANVAS, steps, **given)
    alone = [expected(network, one, steps, cache, threshold=threshold) for one in prompts.split(1)]
    assert done.answers.tolist() == alone
    if threshold is None:
        assert done.steps == 5 * steps
        assert done.whole == 5 * (steps if cache == "none" else CANVAS // BLOCK)
    else:
        assert 5 * CANVAS // BLOCK <= done.steps < 5 * CANVAS


def test_without_caches_and_blocks_it_is_the_plain_loop(network, prompts):
    done = denoise_in_blocks(network, prompts, CANVAS, 8, cache="none")
    assert torch.equal(done.answers, denoise(network, prompts, CANVAS, 8))


def test_caches_change_answers(network, prompts):
    answers = [
        denoise_in_blocks(network, prompts, CANVAS, 16, cache=cache, block=BLOCK).answers
        for cache in ("none", "prefix", "dual")
    ]
    assert not any(torch.equal(answers[i], answers[i - 1]) for i in range(3))


def test_a_batch_keeps_no_more_than_it_has_room_for(network, prompts, monkeypatch):
    questions = [Question("single", prompt, [5]) for prompt in prompts.tolist()]
    harness = answers.CachedHarness(network, CANVAS, 8, batch=256, threshold=None)
    together = harness.answer(method_of("dual-8"), questions)
    sizes, denoised = [], answers.denoise_in_blocks

    def noting(network, part, *rest, **more):
        sizes.append(len(part))
        return denoised(network, part, *rest, **more)

    monkeypatch.setattr(answers, "denoise_in_blocks", noting)
    monkeypatch.setattr(answers, "KEPT_TOKENS", 130)
    assert harness.answer(method_of("dual-8"), questions) == together
    assert sizes == [2, 2, 1]
