# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Captured light steps: which are, and that their inputs say all that a pass needs.

A CPU has no CUDA graphs. Here a graph runs its pass again, which like a captured one knows of a
step only what its inputs hold. test_gpu.py replays real ones.
"""

import contextlib
import random
from itertools import pairwise

import pytest
import torch
from engines import MAY_REUSE, start_engine, state_of
from vllm import SamplingParams

from sparsed_vllm import attention, graphs, model_state
from sparsed_vllm.flash import FlashAttention
from sparsed_vllm.graphs import GraphSize, LightGraph

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py replays real graphs"),
]


def attend(q, k, v, *, cu_seqlens_q, softmax_scale, out, cu_seqlens_k=None, seqused_k=None, **rest):
    """FlashAttention's varlen function, keys in pages or side by side."""
    pages = rest.get("block_table")
    starts, lse = cu_seqlens_q.tolist(), q.new_full((q.shape[1], len(q)), torch.inf)
    for seq, (start, end) in enumerate(pairwise(starts)):
        if pages is None:
            first, last = cu_seqlens_k[seq : seq + 2].tolist()
            keys, values = k[first:last], v[first:last]
        else:
            count = int(seqused_k[seq])
            keys, values = (x[pages[seq].long()].flatten(0, 1)[:count] for x in (k, v))
        group = q.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (keys, values))
        logits = q[start:end].transpose(0, 1) @ keys.transpose(1, 2) * softmax_scale
        lse[:, start:end] = logits.logsumexp(-1)
        out[start:end] = (logits.softmax(-1) @ values).transpose(0, 1)
    return out, lse


class Rerun(LightGraph):
    """Runs its pass again; plain torch reads layouts on the host."""

    replays = 0

    def __init__(self, inputs, run, out, config):
        self.inputs, self.run, self.out = inputs, run, out

    def replay(self):
        type(self).replays += 1
        for layout in (self.inputs.layout, self.inputs.mass_layout):
            layout.host[:] = layout.columns
        self.out.copy_(self.run())
        return self.out


@pytest.fixture(scope="module")
def capturing(llada_path, reusing_llada):
    """A LLaDA engine whose light steps are captured; the shared one starts before the patches."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (attention, model_state):
            patch.setattr(module, "flash_attention", lambda *_: FlashAttention(attend, None))
        patch.setattr(graphs, "LightGraph", Rerun)
        patch.setattr(graphs, "graph_capture", lambda _: contextlib.nullcontext())
        patch.setattr(torch.accelerator, "get_memory_info", lambda: (0, 0))
        patch.setattr(graphs, "ROW_COUNTS", (32, 64, 128))
        llm = start_engine(llada_path, additional_config=MAY_REUSE)
        executor = llm.llm_engine.engine_core.engine_core.model_executor
        runner = executor.driver_worker.worker.model_runner
        runner.model_state.capture_inner_cudagraphs(
            runner.input_buffers, runner.block_tables, runner.attn_groups, runner.kv_cache_config
        )
        yield llm


def prompts(lengths, seed=3):
    draw = random.Random(seed)
    return [{"prompt_token_ids": [draw.randrange(256) for _ in range(n)]} for n in lengths]


def tokens_of(llm, lengths, extras):
    extras = extras if isinstance(extras, list) else [extras] * len(lengths)
    params = [
        SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, extra_args=extra)
        for extra in extras
    ]
    outputs = llm.generate(prompts(lengths), params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_sizes_are_for_one_and_for_several_sequences(capturing):
    assert state_of(capturing).graphs.sizes() == [
        GraphSize(32, 1),
        GraphSize(64, 1),
        GraphSize(64, 2),
        GraphSize(128, 1),
        GraphSize(128, 4),
    ]


ALONE = [
    {"steps": 8, "kv_share": 0.1},
    {"steps": 8, "kv_share": 0},
    {"steps": 8, "kv_share": 0.1, "kv_every": 2},
    {"steps": 8, "block_length": 4, "kv_share": 0.05},
    {"threshold": 0.2, "block_length": 8, "kv_share": 0.05},
]


@pytest.mark.parametrize("extra", ALONE, ids=str)
def test_captured_steps_give_the_tokens_of_others(capturing, reusing_llada, extra):
    before = Rerun.replays
    for length in (1, 100, 301):
        assert tokens_of(capturing, [length], extra) == tokens_of(reusing_llada, [length], extra)
    assert Rerun.replays - before > 3 * 3


def test_captured_steps_of_a_batch_give_the_tokens_of_others(capturing, reusing_llada):
    lengths = [1, 100, 17, 301]
    extras = [ALONE[i] for i in (0, 1, 2, 3)]
    before = Rerun.replays
    expected = tokens_of(reusing_llada, lengths, extras)
    assert tokens_of(capturing, lengths, extras) == expected
    assert Rerun.replays > before


def test_a_step_that_is_not_light_throughout_is_not_captured(capturing, reusing_llada):
    lengths, extras = [40, 100], [{"steps": 8, "kv_share": 0.1}, {"steps": 8}]
    before = Rerun.replays
    assert tokens_of(capturing, lengths, extras) == tokens_of(reusing_llada, lengths, extras)
    assert Rerun.replays == before
