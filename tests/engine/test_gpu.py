# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What runs on a GPU only: FlashAttention, the kernels for Hopper, streams and NCCL.

The other tests of this folder run on a GPU too, and compare every token in float32. In bf16 no two
kernels agree on every token, so here logits are compared, for the canvases that the engine met.
"""

import math
from collections import Counter
from dataclasses import fields, is_dataclass, replace
from typing import NamedTuple

import oracle
import pytest
import torch
from checkpoints import LLADA_MASK_ID, write_llada
from engines import MAY_REUSE, masks_of, scheduler_of, start_engine
from kernel_cases import assert_within_rounding, exact_attention, make_batch, run_attention
from ranks import SIZES, answers_of, answers_of_ranks
from sparse_oracle import SparseNetwork, Sparsity, sparse_llada_generate
from torch import Tensor
from vllm import SamplingParams

from sparsed_vllm.attention import SparsedImpl
from sparsed_vllm.flash import FlashAttention, PackedSequences, flash_attention
from sparsed_vllm.graphs import LightGraph
from sparsed_vllm.kernels import api, reference
from sparsed_vllm.model_state import DenoisingModelState
from sparsed_vllm.sampler import DenoisingSampler
from sparsed_vllm.steps import Phase

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
CANVAS = 32
SPARSE = {"steps": 8, "use_sparsed": 1, "sparsed_block_size": 128}


@pytest.fixture(scope="module")
def wide_path(tmp_path_factory):
    """A LLaDA checkpoint whose heads are of a size that the kernels for Hopper take: 64."""
    return write_llada(tmp_path_factory.mktemp("wide"), d_model=256, n_kv_heads=2)


@pytest.fixture(scope="module")
def wide(wide_path):
    return start_engine(wide_path, dtype="bfloat16", max_model_len=1024)


@pytest.fixture(scope="module")
def networks(wide_path):
    """The checkpoint in float32, and its twin in bf16, on the CPU."""
    network = oracle.load_llada(wide_path)
    return network, twin_of(network)


class Bf16Network(oracle.Network):
    """The oracle where each tensor between two operations is bf16."""

    def heads(self, layer, x):
        return tuple(part.bfloat16() for part in super().heads(layer, x))


def twin_of(network):
    return Bf16Network(**{f.name: to_bf16(getattr(network, f.name)) for f in fields(network)})


def to_bf16(weights):
    """All tensors within."""
    if isinstance(weights, Tensor):
        return weights.bfloat16()
    if isinstance(weights, (list, tuple)):
        return type(weights)(map(to_bf16, weights))
    if is_dataclass(weights):
        given = {f.name: to_bf16(getattr(weights, f.name)) for f in fields(weights)}
        return replace(weights, **given)
    return weights


class Seen(NamedTuple):
    """What a step of a request met, on the CPU.

    ids int64 [length]: what the model was given;  places int64 [n]: of the rows that were read
    logits bf16 [n, vocab]: of those rows
    """

    phase: Phase
    ids: Tensor
    places: Tensor
    logits: Tensor


@pytest.fixture
def seen(monkeypatch):
    """{length of a request: [steps]} of what the engine computes in this test."""
    notes = {}
    sample = DenoisingSampler.__call__

    def noting(self, hidden_states, input_batch):
        batch = self.state.batch_of(input_batch)
        logits = self.state.model.score(hidden_states).cpu()
        ids, places = input_batch.input_ids.cpu().long(), batch.canvas.places.cpu()
        for i, first, end in batch.rows_of_requests():
            own = slice(int(batch.starts[i]), int(batch.starts[i + 1]))
            read = places[first:end] + batch.requests[i].plan.prompt_len
            step = Seen(batch.steps[i].phase, ids[own], read, logits[first:end])
            notes.setdefault(own.stop - own.start, []).append(step)
        return sample(self, hidden_states, input_batch)

    monkeypatch.setattr(DenoisingSampler, "__call__", noting)
    return notes


@pytest.fixture
def flash_calls(monkeypatch):
    """The sequences of each call of FlashAttention in this test."""
    calls, attend = [], FlashAttention.__call__

    def noting(self, q, k, v, sequences, **options):
        calls.append(sequences)
        return attend(self, q, k, v, sequences, **options)

    monkeypatch.setattr(FlashAttention, "__call__", noting)
    return calls


@pytest.fixture
def kernels(monkeypatch):
    """The modules of the kernels for tables that are called in this test."""
    modules = set()
    for name in ("_sparse_kernel", "_scores_kernel"):
        choose = getattr(api, name)

        def noting(*tensors, choose=choose):
            modules.add(choose(*tensors).__module__.rpartition(".")[2])
            return choose(*tensors)

        monkeypatch.setattr(api, name, noting)
    return modules


def request_of(length, extra, max_tokens=CANVAS, **sampling):
    params = SamplingParams(
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args=extra,
        **{"temperature": 0, **sampling},
    )
    return {"prompt_token_ids": [i * 7 % 256 for i in range(length)]}, params


def generate(llm, requests):
    """The outputs, none of which may have failed."""
    prompts, params = (list(part) for part in zip(*requests, strict=True))
    outputs = [out.outputs[0] for out in llm.generate(prompts, params, use_tqdm=False)]
    assert "error" not in {out.finish_reason for out in outputs}
    return outputs


def error_of(logits, step, network):
    """(largest, root mean square) of how far off logits [n, vocab] of a step's rows are."""
    exact = network(step.ids[None])[0, step.places].double()
    error = (logits.double() - exact).abs()
    return float(error.max()), float(error.square().mean().sqrt())


def is_as_exact_as_bf16(step, network, twin):
    """Whether the engine errs at most twice what the twin errs."""
    twin_error = error_of(twin(step.ids[None])[0, step.places], step, network)
    pairs = zip(error_of(step.logits, step, network), twin_error, strict=True)
    return all(error <= 2 * allowed for error, allowed in pairs)


def test_dense_logits_in_bf16_are_as_exact_as_bf16_allows(wide, networks, seen, flash_calls):
    # A sparse request lies between the dense ones, which then are not adjacent.
    requests = [(1, {"steps": 8}), (128, SPARSE), (300, {"steps": 8, "block_length": 8})]
    generate(wide, [request_of(*request) for request in requests])
    assert seen.keys() == {length + CANVAS for length, _ in requests}
    steps = [step for own in seen.values() for step in own if step.phase is not Phase.SPARSE]
    assert len(steps) == 8 + 3 + 8
    for step in steps:
        assert is_as_exact_as_bf16(step, *networks)
    assert any(call.max_queries < call.max_keys for call in flash_calls), "the last layer's rows"
    assert {type(call.queries) for call in flash_calls} == {slice, Tensor}


TALL = {"sparsed_block_size": 32, "sparsed_query_block_size": 128}


@pytest.mark.parametrize("blocks", [{}, TALL], ids=["square", "tall"])
@pytest.mark.parametrize("prompt_len", [600, 737])
def test_sparse_logits_in_bf16_are_as_exact_as_bf16_allows(
    wide, networks, seen, kernels, prompt_len, blocks
):
    length = prompt_len + CANVAS
    block_size = blocks.get("sparsed_block_size", 128)
    wide.llm_engine.add_request("0", *request_of(prompt_len, {**SPARSE, **blocks}))
    while wide.llm_engine.has_unfinished_requests():
        wide.llm_engine.step()
        if seen[length][-1].phase is Phase.RECORDING:
            masks = masks_of(wide, length, block_size, 128)
    assert not masks.all()
    steps = [step for step in seen[length] if step.phase is Phase.SPARSE]
    assert len(steps) == 5
    exact, twin = (with_table(net, masks, prompt_len, block_size) for net in networks)
    for step in steps:
        assert is_as_exact_as_bf16(step, exact, twin)
        assert not is_as_exact_as_bf16(step, *networks), "a dense step would pass for it"
    expected = {"hopper", "hopper_scores"}
    assert kernels == (expected if IS_HOPPER else {"block_sparse_attention", "block_scores"})


def with_table(network, masks, prompt_len, block_size):
    """The network in its sparse steps, with the table that the engine recorded."""
    sizes = {"block_size": block_size, "query_block_size": 128}
    sparsity = Sparsity(**sizes, total_steps=SPARSE["steps"])
    sparse = SparseNetwork(network, sparsity, prompt_len, CANVAS)
    sparse.masks, sparse.step = masks, math.inf
    return sparse


ATTENDED = [(300, 250), (1, 0), (129, 100), (640, 0)]


def flash(q, k, v, layout, *, scale, out, return_lse):
    """FlashAttention as the attention kernels are called."""
    attend = flash_attention("cuda", q.dtype)
    sequences = PackedSequences.of(layout)
    return out, attend(q, k, v, sequences, scale=scale, out=out, return_lse=return_lse)


def bf16_batch(heads, head_dim, sizes=ATTENDED):
    return make_batch(sizes, 128, heads=heads, head_dim=head_dim, dtype=torch.bfloat16)


def parts_of(batch, results):
    """Output and log-sum-exp of each of the batch's sequences."""
    out, lse = results
    sizes = [sequence.num_rows for sequence in batch.sequences]
    return list(zip(out.split(sizes), lse.split(sizes, dim=1), strict=True))


HEADS = [((4, 4), 64), ((4, 2), 128), ((7, 1), 128)]


@pytest.mark.parametrize(("heads", "head_dim"), HEADS)
def test_flash_attention_over_sequences_with_gaps_equals_float64(heads, head_dim):
    batch = bf16_batch(heads, head_dim)
    for part in (batch, batch.windows([(256, 300), (0, 1), (128, 129), (128, 512)])):
        for actual, exact, twin in zip(
            run_attention(part, flash),
            exact_attention_of_rows(batch, part),
            run_attention(part, reference.dense_attention, device="cpu"),
            strict=True,
        ):
            assert_within_rounding(actual, exact, twin)


def exact_attention_of_rows(batch, part):
    """exact_attention for windows, too: it knows whole sequences only."""
    out, lse = exact_attention(batch)
    place = {int(row): i for i, row in enumerate(batch.rows)}
    rows = [place[int(row)] for row in part.rows]
    return out[rows], lse[:, rows]


@pytest.mark.parametrize(("heads", "head_dim"), HEADS)
def test_flash_attention_gives_a_sequence_alone_the_bits_that_it_gets_among_others(heads, head_dim):
    batch = bf16_batch(heads, head_dim)
    together = parts_of(batch, run_attention(batch, flash))
    for place, (out, lse) in enumerate(together):
        out_alone, lse_alone = run_attention(batch.only([place]), flash)
        assert torch.equal(out, out_alone)
        assert torch.equal(lse, lse_alone)


def test_flash_attention_keeps_a_sequence_of_nan_from_its_neighbours():
    batch = bf16_batch((4, 2), 128)
    before = parts_of(batch, run_attention(batch, flash))
    victim = batch.sequences[2]
    batch.q[victim.queries] = batch.k[victim.keys] = batch.v[victim.keys] = math.nan
    after = parts_of(batch, run_attention(batch, flash))
    assert after[2][0].isnan().all()
    for place in (0, 1, 3):
        assert torch.equal(before[place][0], after[place][0])


WITHIN_A_STEP = [
    (DenoisingModelState, "apply_staged_writes"),
    (DenoisingModelState, "preprocess_state"),
    (DenoisingModelState, "prepare_inputs"),
    (DenoisingModelState, "prepare_attn"),
    (SparsedImpl, "forward"),
    (DenoisingSampler, "__call__"),
]


def requests_of_all_kinds():
    styles = [
        {"steps": 8},
        {"steps": 8, "block_length": 8},
        {"threshold": 0.05, "block_length": 8},
        {"steps": 8, "remasking": "random"},
        SPARSE,
        {**SPARSE, "sparsed_block_size": 32, "sparsed_skip": 0},
        {**SPARSE, **TALL},
        {**SPARSE, "sparsed_skip": 0.5, "threshold": 0.05},
    ]
    samplings = [
        {},
        {"temperature": 0.8, "seed": 3},
        {"logprobs": 2},
        {"min_tokens": 5, "stop_token_ids": [3, 4]},
    ]
    return [
        request_of((1, 130, 400)[i % 3], style, **samplings[i % len(samplings)])
        for i, style in enumerate(styles)
    ]


def test_no_operation_of_a_step_waits_for_the_device(wide, monkeypatch):
    requests = requests_of_all_kinds()
    expected = [out.token_ids for out in generate(wide, requests)]  # compiles what it needs
    calls = Counter()
    for owner, name in WITHIN_A_STEP:
        monkeypatch.setattr(owner, name, forbidden_to_wait(getattr(owner, name), name, calls))
    outputs = generate(wide, requests)
    assert calls.keys() == {name for _, name in WITHIN_A_STEP}
    assert [out.token_ids for out in outputs] == expected


def forbidden_to_wait(run, name, calls):
    """Raises where it waits: on torch's operations, that is, as nothing else here does."""

    def guarded(*args, **kwargs):
        calls[name] += 1
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    return guarded


def test_table_counts_arrive_beside_the_tokens_while_the_next_step_runs(async_llada, llada_path):
    lengths, extra = (33, 200), {"steps": 10, "use_sparsed": 1, "sparsed_block_size": 16}
    network = oracle.load_llada(llada_path)
    requests = [request_of(length, extra, max_tokens=16) for length in lengths]
    runs = [
        sparse_llada_generate(
            network,
            prompt["prompt_token_ids"],
            sparsity=Sparsity(block_size=16),
            steps=10,
            gen_length=16,
            block_length=16,
            mask_id=LLADA_MASK_ID,
        )
        for prompt, _ in requests
    ]
    assert not any(run.met_a_tie() for run in runs), "choose other prompts"
    tally = scheduler_of(async_llada).tally
    before = Counter(tally.counts)
    outputs = generate(async_llada, requests)
    assert [list(out.token_ids) for out in outputs] == [run.ids for run in runs]
    rise = {key: count - before[key] for key, count in tally.counts.items()}
    assert rise["tables"] == len(runs)
    assert rise["kept_blocks"] == sum(int(run.masks.sum()) for run in runs)
    assert rise["possible_blocks"] == sum(run.masks.numel() for run in runs)


@pytest.fixture(scope="module")
def capturing(wide_path):
    """An engine with captured light steps, each of which is run as it was captured as well."""
    pairs, replay, init = [], LightGraph.replay, LightGraph.__init__

    def keeping(self, inputs, run, out, config):
        self.run = run
        init(self, inputs, run, out, config)

    def comparing(self):
        replayed = replay(self).clone()
        num_rows = int(self.inputs.cu_queries[-1])
        pairs.append((replayed[:num_rows], self.run()[:num_rows]))
        return replayed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LightGraph, "__init__", keeping)
        patch.setattr(LightGraph, "replay", comparing)
        options = {"additional_config": {"reuse": {"by_default": 0}}, "enforce_eager": False}
        yield start_engine(wide_path, dtype="bfloat16", max_model_len=1024, **options), pairs


REUSING = [
    {"steps": 8, "kv_share": 0.05},
    {"steps": 8, "kv_share": 0.05, "kv_every": 2, "block_length": 8},
    {"threshold": 0.05, "block_length": 8, "kv_share": 0},
]


@pytest.mark.parametrize("lengths", [(300,), (1, 130, 400)], ids=str)
def test_a_captured_step_leaves_what_its_kernels_leave_one_by_one(capturing, lengths):
    llm, pairs = capturing
    pairs.clear()
    generate(llm, [request_of(n, REUSING[i]) for i, n in enumerate(lengths)])
    assert len(pairs) >= 6
    for replayed, run in pairs:
        assert replayed.isfinite().all()
        assert torch.equal(replayed, run)


@pytest.fixture(scope="module")
def sleeper(llada_path):
    """An engine that gives its memory back while it sleeps."""
    return start_engine(llada_path, enable_sleep_mode=True, additional_config=MAY_REUSE)


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize(
    "extra",
    [{}, {"use_sparsed": 1, "sparsed_block_size": 16}, {"kv_share": 0.1}],
    ids=["dense", "sparse", "light"],
)
def test_requests_before_through_and_after_a_sleep_get_their_tokens(sleeper, extra, level):
    request = request_of(200, {"steps": 10, **extra}, max_tokens=16)
    undisturbed = [list(out.token_ids) for out in generate(sleeper, [request])]
    engine = sleeper.llm_engine
    engine.add_request("kept", *request)
    for _ in range(6):
        engine.step()
    sleeper.sleep(level=level, mode="keep")
    sleeper.wake_up()
    if level == 2:
        sleeper.collective_rpc("reload_weights")
    kept = []
    while engine.has_unfinished_requests():
        kept += [list(out.outputs[0].token_ids) for out in engine.step() if out.finished]
    assert kept == undisturbed
    assert [list(out.token_ids) for out in generate(sleeper, [request])] == undisturbed


@pytest.mark.ranks
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_over_nccl_give_the_tokens_of_one(llada_path):
    tokens, counts = answers_of_ranks(llada_path, 2)
    assert tokens == answers_of(start_engine(llada_path, **SIZES))[0]
    assert counts["vllm:sparsed_steps sparse"] > 0
