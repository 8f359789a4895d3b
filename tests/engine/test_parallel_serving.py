# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""`vllm serve` on two engines (data parallel) of two ranks each (tensor parallel).

Two GPUs have room for engines of one rank.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import openai
import psutil
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from ranks import needs_two_devices
from servers import serving
from vllm import SamplingParams

pytestmark = [pytest.mark.engine, pytest.mark.ranks, needs_two_devices]

NUM_RANKS = 1 if torch.cuda.device_count() in (2, 3) else 2  # of each engine

PROMPTS = [[(3 * i + n) % 256 for i in range(n)] for n in (1, 30, 90, 150, 200, 300)]
STYLES = ({"steps": 8, "block_length": 4}, {"steps": 8, "use_sparsed": 1, "sparsed_block_size": 16})


@pytest.fixture(scope="module")
def server(llada_path):
    """A running server's process and an OpenAI client of it."""
    sizes = ("--tensor-parallel-size", str(NUM_RANKS), "--data-parallel-size", "2")
    # vLLM binds each process to cores; it cannot share out one NUMA node itself.
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "0|1|0|1"}
    with serving(llada_path, *sizes, "--api-server-count", "1", **cores) as running:
        yield running


@pytest.fixture
def client(server):
    return server[1]


@pytest.fixture(scope="module")
def expected(llada):
    """Tokens of each prompt in each style, of one engine of one rank."""
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    tokens = []
    for extra in STYLES:
        params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, extra_args=extra)
        outputs = llada.generate(prompts, params, use_tqdm=False)
        tokens.append([list(output.outputs[0].token_ids) for output in outputs])
    return tokens


def complete(client, prompt, extra, **body):
    extra_body = {"ignore_eos": True, "return_token_ids": True, "vllm_xargs": extra}
    return client.completions.create(
        model="tiny", prompt=prompt, max_tokens=16, extra_body=extra_body, **body
    )


def counts(client):
    """Each counter of ours on /metrics, by engine and name; phases and kinds are added up."""
    found = {}
    text = httpx.get(str(client.base_url.join("/metrics"))).text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if family.type == "counter" and family.name.startswith(
                ("vllm:diffusion", "vllm:sparsed")
            ):
                key = sample.labels["engine"], sample.name
                found[key] = found.get(key, 0) + sample.value
    return found


def test_engines_of_two_ranks_give_the_tokens_of_one_rank_and_share_the_requests(client, expected):
    before = counts(client)
    for extra, tokens in zip(STYLES, expected, strict=True):
        with ThreadPoolExecutor() as threads:
            answers = threads.map(lambda prompt, x=extra: complete(client, prompt, x), PROMPTS)
        assert [answer.choices[0].token_ids for answer in answers] == tokens
    rise = {key: value - before[key] for key, value in counts(client).items()}
    requests = [rise[engine, "vllm:sparsed_requests_total"] for engine in "01"]
    assert sum(requests) == 2 * len(PROMPTS)
    assert min(requests) > 0
    for engine, count in zip("01", requests, strict=True):
        assert rise[engine, "vllm:sparsed_steps_total"] == 8 * count
        assert rise[engine, "vllm:diffusion_num_committed_tokens_total"] == 16 * count
    assert sum(rise[engine, "vllm:sparsed_tables_total"] for engine in "01") == len(PROMPTS)


def test_blocks_stream(client, expected):
    chunks = list(complete(client, PROMPTS[-1], STYLES[0], stream=True))
    ids = [chunk.choices[0].token_ids for chunk in chunks]
    assert [len(part) for part in ids] == [4, 4, 4, 4]
    assert [token for part in ids for token in part] == expected[0][-1]


def test_a_bad_request_is_refused_and_the_next_one_served(client, expected):
    with pytest.raises(openai.BadRequestError, match="stepz"):
        complete(client, "hello", {"stepz": 1})
    assert complete(client, PROMPTS[0], STYLES[1]).choices[0].token_ids == expected[1][0]


@pytest.mark.skipif(NUM_RANKS == 1, reason="an engine of one rank has no worker of its own")
def test_a_killed_worker_ends_every_request_and_the_server(server):
    """The last test of this file: the server is gone afterwards."""
    process, client = server
    of_server = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in of_server if "Worker" in " ".join(child.cmdline())]
    assert len(workers) == 4
    streams = [  # long ones: none shall end before the workers are stopped
        client.completions.create(
            model="tiny",
            prompt=[token],
            max_tokens=500,
            n=8,
            temperature=1,
            stream=True,
            extra_body={"ignore_eos": True, "vllm_xargs": {"block_length": 4}},
        )
        for token in (1, 2)
    ]
    for stream in streams:
        next(iter(stream))
    for worker in workers:
        worker.suspend()  # no stream shall end before the server notices
    workers[0].kill()
    for stream in streams:  # those of the other engine too
        with pytest.raises(openai.APIError, match="EngineCore encountered an issue"):
            list(stream)
    assert httpx.get(str(client.base_url.join("/health"))).status_code == 503
    for worker in workers[1:]:
        with suppress(psutil.NoSuchProcess):
            worker.resume()
    assert process.wait(timeout=60) == 0
