# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The benches of whole generations: what they add up, tell apart and leave out."""

import time

import bench_decoding
import bench_generate
import bench_throughput
import pytest
from generation.dummies import MODELS, cache_bytes
from generation.gemms import seconds_of_gemms
from generation.shares import micros_of, outside_model, shares, trace_step
from generation.steps import Load, project
from needle.batches import EOS_ID
from vllm import SamplingParams

STEPS = {"dense": 4.0, "recording": 7.0, "sparse": 2.0}


def test_a_generation_is_the_sum_of_its_steps():
    assert project(STEPS, 128, None) == 128 * 4
    assert project(STEPS, 128, 0.2) == 26 * 4 + 7 + 101 * 2  # int(128 * 0.2) + 1 and one


def event(cat, name, ts, dur, correlation=None):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur} | {
        "args": {} if correlation is None else {"correlation": correlation}
    }


EVENTS = [
    {"ph": "M", "name": "process_name"},
    event("user_annotation", "scheduler", 0, 10),
    event("user_annotation", "model", 20, 30),
    event("user_annotation", "head", 60, 5),
    event("user_annotation", "sampler", 70, 20),
    event("cuda_runtime", "cudaLaunchKernel", 12, 1, 1),
    event("cuda_driver", "cuLaunchKernelEx", 21, 1, 2),
    event("cuda_runtime", "cudaLaunchKernel", 30, 1, 3),
    event("cuda_runtime", "cudaLaunchKernel", 49, 1, 4),
    event("cuda_runtime", "cudaLaunchKernel", 61, 1, 5),
    event("cuda_runtime", "cudaMemcpyAsync", 75, 1, 6),
    event("gpu_user_annotation", "model", 100, 500),
    event("kernel", "fill_tables", 90, 1, 1),
    event("kernel", "_block_sparse_attention_kernel", 100, 300, 2),
    event("kernel", "nvjet_tst_128x256_64x4", 400, 200, 3),
    event("kernel", "triton_red_fused_rms", 600, 50, 4),
    event("kernel", "nvjet_tst_64x8_64x16", 700, 25, 5),
    event("gpu_memcpy", "Memcpy DtoH", 800, 4, 6),
]


def test_kernels_are_told_apart_by_what_launched_them_and_by_name():
    assert micros_of(EVENTS) == {
        "scheduler": 10,
        "inputs": 1,
        "attention": 300,
        "linears": 200,
        "norm, rotary, activation": 50,
        "head": 25,
        "sampler": 4,
    }


def test_shares_add_up_and_overhead_is_all_but_the_model():
    found = shares(EVENTS, 1000e-6)
    overhead = found.pop("overhead")
    assert sum(found.values()) == pytest.approx(1)
    assert found["attention"] == 0.3 and found["idle"] == pytest.approx(0.41)
    assert overhead == pytest.approx(1 - 0.575)


def test_short_loads_have_more_steps():
    assert Load(1024, 128, 16).short == 12 and Load(65536, 128).short == 7


def test_tables_of_loads_are_as_asked():
    args = ["--lengths", "1024", "--tables", "128x32:0.1:0.25", "64x64:0.3:0.2"]
    first, second = bench_generate.loads(bench_generate.parse(args))
    assert first.tables.extra_args == {
        "sparsed_query_block_size": 128,
        "sparsed_block_size": 32,
        "sparsed_select": 0.1,
        "sparsed_skip": 0.25,
    }
    assert second.sizes["block_size"] == second.sizes["query_block_size"] == 64
    with pytest.raises(SystemExit):
        bench_generate.parse(["--tables", "128:0.3"])


def test_what_does_not_fit_is_left_out_by_name(capsys):
    args = bench_generate.parse(
        ["--lengths", "4096", "1024", "--new-tokens", "128", "1024", "--batch", "1", "4"]
    )
    found = [(load.length, load.new_tokens, load.batch) for load in bench_generate.loads(args)]
    assert found == [(1024, 128, 1), (1024, 128, 4), (4096, 128, 1), (4096, 1024, 1)]
    told = capsys.readouterr().err
    assert "1024 new tokens leave no prompt in 1024" in told
    assert "4 requests of 4096 tokens are over --tokens 4096" in told


def test_tokens_at_once_hold_the_longest_request(capsys):
    with pytest.raises(SystemExit):
        bench_generate.parse(["--lengths", "4096", "--tokens", "1024"])
    assert "--tokens must be at least 4096, got 1024." in capsys.readouterr().err


def test_pages_of_a_token_are_those_of_docs_capacity():
    for model, kibibytes in (("llada", 528), ("dream", 68.25)):
        shape = MODELS[model][1]
        more = cache_bytes(shape, 2048, 1) - cache_bytes(shape, 1024, 1)
        assert more == 1024 * kibibytes * 1024


def test_a_step_has_half_of_the_places_open_on_average():
    assert bench_throughput.open_rows(64, 128, 128) == round(64 * 129 / 2)
    assert bench_throughput.open_rows(64, 128, 1) == 64 * 128


def test_light_steps_compute_the_canvas_and_a_share_of_what_stands_before_it():
    one = bench_throughput.parse([])
    assert bench_throughput.light_rows(one) == 64 * (128 + 11)
    four = bench_throughput.parse(["--block-length", "32"])
    assert bench_throughput.light_rows(four) == 16 * (128 + 11 + 96 + 11 + 64 + 12 + 32 + 13)


def test_throughput_asks_for_steps_that_fill_blocks(capsys):
    with pytest.raises(SystemExit):
        bench_throughput.parse(["--block-length", "32", "--steps", "6"])
    assert "--steps a multiple of them" in capsys.readouterr().err


def test_a_text_ends_before_its_end_token():
    assert bench_decoding.until_end([7, 8, EOS_ID, 9]) == [7, 8]
    assert bench_decoding.until_end([7, 8]) == [7, 8]


@pytest.mark.engine
def test_the_parts_of_a_step_are_in_its_trace(llada):
    params = SamplingParams(temperature=0, max_tokens=4, detokenize=False)
    llada.llm_engine.add_request("traced", {"prompt_token_ids": [1, 2, 3]}, params)
    names = set()
    while llada.llm_engine.has_unfinished_requests():
        names |= {
            each["name"] for each in trace_step(llada)[0] if each.get("cat") == "user_annotation"
        }
    assert {"model", "head", "sampler", "scheduler"} <= names


class HostEvent:
    """A CUDA event by the host's clock."""

    def __init__(self, timed):
        self.seconds = None

    def record(self):
        self.seconds = time.perf_counter()

    def elapsed_time(self, later):
        return 1e3 * (later.seconds - self.seconds)


@pytest.mark.engine
def test_what_lies_between_the_models_of_two_steps_is_told_by_phase(llada, monkeypatch):
    monkeypatch.setattr("generation.shares.Mark", HostEvent)
    found = outside_model(llada, Load(64, 16, batch=2))
    assert set(found) == {"dense", "recording", "sparse"}
    assert all(seconds > 0 and 0 < share < 1 for seconds, share in found.values())


@pytest.mark.engine
def test_the_products_of_the_model_run_by_themselves(llada):
    assert seconds_of_gemms(llada, tokens=64, rows=8, rounds=1) > 0
