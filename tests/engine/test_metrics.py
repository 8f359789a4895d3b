# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What the engine says of its requests: Prometheus metrics and a line in the log."""

import logging

import oracle
import pytest
from checkpoints import LLADA_MASK_ID
from engines import scheduler_of, start_engine
from sparse_oracle import Sparsity, sparse_llada_generate
from vllm import SamplingParams

pytestmark = pytest.mark.engine

SPARSE = {"steps": 10, "use_sparsed": 1, "sparsed_block_size": 16}


def params(extra, max_tokens=16, **sampling):
    return SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        detokenize=False,
        extra_args=extra,
        **{"ignore_eos": True, **sampling},
    )


def own_labels(labels):
    return [value for name, value in labels.items() if name not in ("model_name", "engine")]


def metrics(llm):
    """{name and the values of its own labels: value}"""
    return {
        (metric.name.removeprefix("vllm:"), *own_labels(metric.labels)): metric.value
        for metric in llm.get_metrics()
        if metric.name.startswith(("vllm:diffusion", "vllm:sparsed"))
    }


@pytest.fixture
def rise(llada):
    """A function that returns by how much the metrics rose since the test began."""
    before = metrics(llada)

    def since():
        after = metrics(llada)
        return {key: after[key] - before[key] for key in after if after[key] != before[key]}

    return since


def add(llm, request_id, prompt, request):
    llm.llm_engine.add_request(request_id, {"prompt_token_ids": prompt}, request)


def run_to_the_end(llm):
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()


def test_steps_and_requests_are_counted_by_kind(llada, rise):
    requests = [params(SPARSE), params({"steps": 4}), params({**SPARSE, "steps": 1})]
    requests.append(params({"use_sparsed": 0, "block_length": 4, "steps": 8}))
    prompts = [{"prompt_token_ids": [7] * 50}] * len(requests)
    llada.generate(prompts, requests, use_tqdm=False)
    counted = rise()
    assert counted.pop(("sparsed_kept_blocks",)) < counted.pop(("sparsed_possible_blocks",))
    rows = counted.pop(("sparsed_computed_rows",))
    assert rows == counted.pop(("sparsed_possible_rows",)) == (10 + 4 + 1 + 8) * 66
    assert counted == {
        ("diffusion_num_denoising_steps",): 10 + 4 + 1 + 8,
        ("diffusion_num_canvas_positions",): (10 + 4 + 1) * 16 + 8 * 4,
        ("diffusion_num_committed_tokens",): 4 * 16,
        ("sparsed_steps", "dense"): 3 + 4 + 1 + 8,
        ("sparsed_steps", "recording"): 1,
        ("sparsed_steps", "sparse"): 6,
        ("sparsed_steps_by_source", "fresh"): 10 + 4 + 1 + 8,
        ("sparsed_passes",): 10 + 4 + 1 + 8,
        ("sparsed_requests_by_reuse", "off"): 4,
        ("sparsed_requests", "sparse", "request"): 1,
        ("sparsed_requests", "dense", "length"): 1,
        ("sparsed_requests", "dense", "steps"): 1,
        ("sparsed_requests", "dense", "request"): 1,
        ("sparsed_tables",): 1,
    }


@pytest.mark.parametrize("own", [{}, {"mass": 0.6}], ids=str)
def test_kept_blocks_are_those_of_the_pattern(llada, llada_path, rise, own):
    prompts = [[i * 7 % 256 for i in range(length)] for length in (33, 200)]
    runs = [
        sparse_llada_generate(
            oracle.load_llada(llada_path),
            prompt,
            sparsity=Sparsity(block_size=16, **own),
            steps=10,
            gen_length=16,
            block_length=16,
            mask_id=LLADA_MASK_ID,
        )
        for prompt in prompts
    ]
    assert not any(run.met_a_tie() for run in runs), "choose other prompts"
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    asked = {f"sparsed_{name}": value for name, value in own.items()}
    llada.generate(requests, params({**SPARSE, **asked}), use_tqdm=False)
    assert rise()["sparsed_kept_blocks",] == sum(int(run.masks.sum()) for run in runs)
    assert rise()["sparsed_possible_blocks",] == sum(run.masks.numel() for run in runs)


def test_aborted_and_repeated_steps_are_steps_and_tables_are_held_while_they_run(llada, rise):
    for i in range(2):
        add(llada, str(i), [i] * 100, params(SPARSE))
    for _ in range(6):
        llada.llm_engine.step()
    # Of each request a page a layer, of 8 ids of 2 bytes a token and head.
    assert rise()["sparsed_table_bytes",] == 2 * 2 * 128 * 4 * 8 * 2
    llada.llm_engine.abort_request(["0"])
    scheduler = llada.llm_engine.engine_core.engine_core.scheduler
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    llada.llm_engine.step()
    assert ("sparsed_table_bytes",) not in rise()
    run_to_the_end(llada)
    counted = rise()
    assert counted["diffusion_num_denoising_steps",] == 2 * 6 + 10
    assert counted["diffusion_num_committed_tokens",] == 16
    assert counted["sparsed_steps", "recording"] == counted["sparsed_tables",] == 3
    assert counted["sparsed_requests", "sparse", "request"] == 2
    assert ("sparsed_table_bytes",) not in counted


def test_an_early_stop_is_counted_with_the_steps_it_took(llada, rise):
    request = {"block_length": 4, "steps": 8}
    prompt = [{"prompt_token_ids": [9] * 20}]
    (whole,) = llada.generate(prompt, params(request), use_tqdm=False)
    stop = whole.outputs[0].token_ids[1]
    llada.generate(prompt, params(request, stop_token_ids=[stop]), use_tqdm=False)
    assert rise()["sparsed_early_stops",] == 1
    assert rise()["diffusion_num_denoising_steps",] == 8 + 2
    assert rise()["diffusion_num_committed_tokens",] == 16 + 4


@pytest.fixture
def finished():
    """[requests that ended] what the debug log says of each, by name."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(facts_in(record.getMessage()))
    logger = logging.getLogger("vllm.sparsed.requests")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def facts_in(line):
    return dict(pair.split("=") for pair in line.removeprefix("Request finished: ").split())


def test_a_finished_request_says_in_the_debug_log_what_it_cost(llada, rise, finished):
    prompts = [{"prompt_token_ids": [7] * 50}] * 2
    llada.generate(prompts, [params(SPARSE), params({"steps": 4})], use_tqdm=False)
    dense, sparse = finished
    facts = {"finish": "length", "prompt_tokens": "50", "tokens": "16", "max_tokens": "16"}
    assert facts.items() <= dense.items() and facts.items() <= sparse.items()
    assert (dense["attention"], dense["reason"], dense["steps_dense"]) == ("dense", "length", "4")
    steps = [sparse[f"steps_{phase}"] for phase in ("dense", "recording", "sparse")]
    assert steps == ["3", "1", "6"]
    density = int(sparse["kept_blocks"]) / int(sparse["possible_blocks"])
    assert float(sparse["density"]) == pytest.approx(density, abs=1e-4)
    counted = rise()
    for phase in ("dense", "recording", "sparse"):
        told = int(dense[f"steps_{phase}"]) + int(sparse[f"steps_{phase}"])
        assert told == counted["sparsed_steps", phase]
    for blocks in ("kept_blocks", "possible_blocks"):
        assert int(sparse[blocks]) == counted[f"sparsed_{blocks}",]


def test_an_engine_counts_the_rows_of_light_steps_and_says_them_in_the_log(llada_path, finished):
    llm = start_engine(llada_path, additional_config={"reuse": "selective"})
    requests = [params({"steps": 8, "kv_share": 0.1}), params({"steps": 8, "kv_reuse": 0})]
    llm.generate([{"prompt_token_ids": [7] * 50}] * 2, requests, use_tqdm=False)
    counts = scheduler_of(llm).tally.take()
    rows = 66 + 7 * 16 + 3 * 5  # every second step computes tokens of the prompt
    assert counts["requests_by_reuse/on"] == counts["requests_by_reuse/off"] == 1
    assert (counts["steps_by_source/fresh"], counts["steps_by_source/pages"]) == (1 + 8, 7)
    assert (counts["computed_rows"], counts["possible_rows"]) == (rows + 8 * 66, 16 * 66)
    assert counts["chosen_tokens"] == 3 * 5
    light, exact = sorted(finished, key=lambda facts: int(facts["rows"]))
    named = ("reuse", "steps_light", "rows", "chosen", "passes")
    assert [light[name] for name in named] == ["on", "7", str(rows), "15", f"{rows / 66:.2f}"]
    assert [exact[name] for name in named] == ["off", "0", str(8 * 66), "0", "8.00"]
