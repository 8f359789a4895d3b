# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""`vllm serve` in processes of its own, asked by the OpenAI client."""

import asyncio
import json
import re
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import httpx
import load
import openai
import oracle
import pytest
from checkpoints import LLADA_MASK_ID
from engines import MAY_REUSE
from prometheus_client.parser import text_string_to_metric_families
from reuse_oracle import Reuse, reusing_llada_generate
from servers import serving
from sparse_oracle import Sparsity, sparse_llada_generate

from sparsed_vllm.reuse import REQUEST_FIELDS

pytestmark = pytest.mark.engine

LIMITS = {
    "early_errors": 1,
    "default_max_tokens": 20,
    "max_tokens": 450,
    "max_steps": 420,
    "request_fields": [
        "steps",
        "block_length",
        "threshold",
        "remasking",
        "early_stop",
        "use_sparsed",
        "sparsed_block_size",
        "sparsed_query_block_size",
        *REQUEST_FIELDS,
    ],
}


@pytest.fixture(scope="module")
def server(llada_path):
    """A running server's process and an OpenAI client of it."""
    args = ("--attention-backend", "sparsed", "--shutdown-timeout", "60")
    settings = json.dumps({"denoising": LIMITS, **MAY_REUSE})
    development = {"VLLM_SERVER_DEV_MODE": "1"}  # lets the load preempt
    with serving(llada_path, *args, "--additional-config", settings, **development) as running:
        yield running


@pytest.fixture
def client(server):
    return server[1]


def complete(client, prompt, max_tokens=16, **extra):
    return client.completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=max_tokens,
        extra_body={"ignore_eos": True, "return_token_ids": True, "vllm_xargs": extra},
    )


def test_completions_give_the_oracle_s_tokens_whoever_else_is_served(client, llada_path):
    network = oracle.load_llada(llada_path)
    prompts = [[7 * i % 256 for i in range(length)] for length in (1, 20, 90, 200)]
    with ThreadPoolExecutor() as threads:
        answers = list(threads.map(lambda p: complete(client, p, steps=8, block_length=8), prompts))
    expected = [
        oracle.llada_generate(
            network, prompt, steps=8, gen_length=16, block_length=8, mask_id=LLADA_MASK_ID
        )
        for prompt in prompts
    ]
    oracle.assert_same_tokens([answer.choices[0].token_ids for answer in answers], expected)
    assert [answer.usage.completion_tokens for answer in answers] == [16] * len(prompts)


def test_requests_may_ask_for_sparse_attention(client, llada_path):
    network = oracle.load_llada(llada_path)
    prompt = [5 * i % 256 for i in range(150)]
    answer = complete(client, prompt, steps=8, use_sparsed=1, sparsed_block_size=16)
    expected = sparse_llada_generate(
        network,
        prompt,
        sparsity=Sparsity(block_size=16),
        steps=8,
        gen_length=16,
        block_length=16,
        mask_id=LLADA_MASK_ID,
    )
    oracle.assert_same_tokens([answer.choices[0].token_ids], [expected])


def test_requests_may_ask_for_reuse(client, llada_path):
    prompt = [5 * i % 256 for i in range(150)]
    answer = complete(client, prompt, steps=8, kv_share=0.1, kv_every=2)
    expected = reusing_llada_generate(
        oracle.load_llada(llada_path),
        prompt,
        reuse=Reuse(share=0.1, every=2),
        steps=8,
        gen_length=16,
        block_length=16,
        mask_id=LLADA_MASK_ID,
    )
    oracle.assert_same_tokens([answer.choices[0].token_ids], [expected])


def test_chat_streams_blocks_as_they_become_final(client):
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "vllm_xargs": {"block_length": 8}},
    )
    chunks = list(stream)
    assert chunks[-1].usage.completion_tokens == 24
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"


BLOCKS = {"return_token_ids": True, "vllm_xargs": {"block_length": 8}}
REUSED = {"return_token_ids": True, "vllm_xargs": {"block_length": 8, "kv_share": 0.1}}
HI = [{"role": "user", "content": "hi"}]
MESSAGES = {"messages": HI}


def whole_answer(create, **body):
    """(text, token ids, finish reason, usage) of a request that does not stream."""
    answer = create(model="tiny", **body)
    (choice,) = answer.choices
    text = choice.message.content if hasattr(choice, "message") else choice.text
    return text, choice.token_ids, choice.finish_reason, answer.usage.model_dump()


def streamed_answer(create, **body):
    """The same of a request that streams."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = create(model="tiny", **options, **body)
    text, token_ids, finish_reason = "", [], None
    for chunk in chunks:
        (choice,) = chunk.choices
        assert finish_reason is None, "nothing comes after the last chunk"
        text += (choice.delta.content or "") if hasattr(choice, "delta") else choice.text
        token_ids += getattr(choice, "token_ids", None) or []
        finish_reason = choice.finish_reason
    return text, token_ids, finish_reason, last.usage.model_dump()


def asked_twice(create, **body):
    """An answer, the same whether it streams or not."""
    whole = whole_answer(create, **body)
    assert streamed_answer(create, **body) == whole
    text, token_ids, finish_reason, usage = whole
    assert usage["completion_tokens"] == len(token_ids)
    assert usage["total_tokens"] == usage["prompt_tokens"] + len(token_ids)
    return text, token_ids, finish_reason


@pytest.mark.parametrize(
    ("endpoint", "extra"),
    [("completions", BLOCKS), ("chat", BLOCKS), ("completions", REUSED)],
    ids=["completions", "chat", "completions, reused"],
)
def test_streamed_and_whole_answers_agree_however_they_end(client, endpoint, extra):
    create, prompt = client.completions.create, {"prompt": "hello"}
    if endpoint == "chat":
        create, prompt = client.chat.completions.create, MESSAGES
    body = {**prompt, "max_tokens": 24}
    endless = {**extra, "ignore_eos": True}
    text, token_ids, reason = asked_twice(create, **body, extra_body=endless)
    assert (len(token_ids), reason) == (24, "length")
    stop = next(char for char in text[3:] if char.isascii() and char.isprintable())
    cut, kept, reason = asked_twice(create, **body, stop=[stop], extra_body=endless)
    assert (cut, reason) == (text.split(stop)[0], "stop")
    assert kept == token_ids[: len(kept)]
    shown, _, _ = asked_twice(
        create, **body, stop=[stop], extra_body={**endless, "include_stop_str_in_output": True}
    )
    assert shown == cut + stop
    ended = {**extra, "stop_token_ids": [token_ids[11]]}
    _, kept, reason = asked_twice(create, **body, extra_body=ended)
    assert (kept, reason) == (token_ids[: token_ids.index(token_ids[11]) + 1], "stop")
    longer = {**ended, "min_tokens": 20}
    _, kept, _ = asked_twice(create, **body, extra_body=longer)
    assert len(kept) >= 20
    assert token_ids[11] not in kept[:20]


@pytest.mark.parametrize("asked", [BLOCKS, REUSED], ids=["exact", "reused"])
def test_the_responses_api_gives_the_answer_of_a_chat(client, asked):
    extra = {**asked, "ignore_eos": True}
    chat = client.chat.completions.create(
        model="tiny", messages=HI, max_completion_tokens=24, extra_body=extra
    )
    body = {"model": "tiny", "input": HI, "max_output_tokens": 24, "extra_body": extra}
    answer = client.responses.create(**body)
    assert answer.output_text == chat.choices[0].message.content
    assert (answer.usage.output_tokens, answer.incomplete_details.reason) == (
        24,
        "max_output_tokens",
    )
    events = list(client.responses.create(**body, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 1
    assert "".join(deltas) == answer.output_text
    assert events[-1].response.incomplete_details.reason == "max_output_tokens"
    assert client.responses.create(model="tiny", input="hi").usage.output_tokens <= 20


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"extra_body": {"vllm_xargs": {"steps": 0}}}, "steps"),
        ({"temperature": 1.0, "top_p": 0.5}, "top_p"),
        ({"max_output_tokens": 451}, "at most 450 on this server"),
    ],
    ids=["steps", "top_p", "max_output_tokens"],
)
def test_the_responses_api_refuses_with_400_and_the_field(client, bad, field, stream):
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="tiny", input="hi", stream=stream, **bad)
    assert field in refused.value.body["message"]


def test_a_seed_repeats_an_answer_and_samples_have_seeds_of_their_own(client):
    def sample(**rest):
        body = {"prompt": "hello", "max_tokens": 12, "temperature": 1.0, **rest}
        answer = client.completions.create(model="tiny", **body, extra_body=BLOCKS)
        ids = [choice.token_ids for choice in answer.choices]
        assert answer.usage.completion_tokens == sum(map(len, ids))
        return ids

    three = sample(n=3, seed=5)
    assert len({*map(tuple, three)}) == 3
    assert sample(n=3, seed=5) == three
    assert sample(seed=5) == three[:1]


def test_samples_stream_side_by_side(client):
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 16, "temperature": 1.0}
    body |= {"n": 2, "seed": 3, "extra_body": {**BLOCKS, "ignore_eos": True}}
    expected = [choice.token_ids for choice in client.completions.create(**body).choices]
    got = [[], []]
    for chunk in client.completions.create(**body, stream=True):
        got[chunk.choices[0].index] += chunk.choices[0].token_ids
    assert got == expected


def test_logprobs_come_with_each_block(client):
    # By their ids: several tokens of the tiny tokenizer have no text of their own.
    extra = {**BLOCKS, "ignore_eos": True, "return_tokens_as_token_ids": True}
    body = {"model": "tiny", "max_tokens": 20, "extra_body": extra}
    asked = {**body, "prompt": "hello", "logprobs": 2}
    whole = client.completions.create(**asked).choices[0].logprobs
    assert len(whole.token_logprobs) == 20
    assert all(2 <= len(top) <= 3 for top in whole.top_logprobs)
    chunks = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
    parts = [part for chunk in chunks for part in chunk.logprobs.token_logprobs]
    assert parts == pytest.approx(whole.token_logprobs, abs=1e-4)
    assert [len(chunk.token_ids) for chunk in chunks] == [8, 8, 4]
    chat = {**body, "messages": HI, "logprobs": True, "top_logprobs": 3}
    content = client.chat.completions.create(**chat).choices[0].logprobs.content
    assert [len(at.top_logprobs) for at in content] == [3] * 20
    streamed = client.chat.completions.create(**chat, stream=True)
    parts = [at for chunk in streamed for at in getattr(chunk.choices[0].logprobs, "content", [])]
    assert [at.logprob for at in parts] == pytest.approx([at.logprob for at in content], abs=1e-4)


def test_a_request_that_names_no_length_gets_the_server_s_default(client):
    def length(create, **body):
        return create(model="tiny", **body, extra_body=extra).usage.completion_tokens

    extra = {"ignore_eos": True}
    assert length(client.chat.completions.create, messages=HI) == 20
    assert length(client.chat.completions.create, messages=HI, max_completion_tokens=33) == 33
    assert length(client.completions.create, prompt="hello") == 16
    assert length(client.completions.create, prompt="hello", max_tokens=33) == 33


def test_the_prompt_is_echoed_in_front_of_the_answer(client):
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 8}
    extra = {"ignore_eos": True}
    plain = client.completions.create(**body, extra_body=extra).choices[0].text
    echoed = client.completions.create(**body, echo=True, extra_body=extra)
    assert echoed.choices[0].text == "hello" + plain
    assert echoed.usage.completion_tokens == 8
    chunks = client.completions.create(**body, echo=True, stream=True, extra_body=extra)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "hello" + plain


@pytest.mark.parametrize(
    ("request_body", "field"),
    [
        ({"extra_body": {"vllm_xargs": {"steps": 0}}}, "steps"),
        ({"extra_body": {"vllm_xargs": {"steps": "many"}}}, "steps"),
        ({"extra_body": {"vllm_xargs": {"block_length": [1]}}}, "block_length"),
        ({"extra_body": {"vllm_xargs": {"stepz": 3}}}, "stepz"),
        ({"extra_body": {"vllm_xargs": {"kv_share": 1.5}}}, "kv_share"),
        ({"extra_body": {"vllm_xargs": {"kv_refresh": 9}}}, "kv_refresh"),
        ({"logprobs": 1, "echo": True}, "prompt_logprobs"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"temperature": 1.0, "top_p": 0.5}, "top_p"),
        ({"max_tokens": 600}, "max_tokens"),
        ({"max_tokens": 451}, "at most 450 on this server"),
        ({"max_tokens": 430, "extra_body": {"vllm_xargs": {"steps": 421}}}, "steps"),
        ({"extra_body": {"vllm_xargs": {"sparsed_select": 0.5}}}, "sparsed_select"),
        ({"extra_body": {"response_format": {"type": "json_object"}}}, "structured_outputs"),
        ({"extra_body": {"use_beam_search": True}, "n": 2}, "beam search"),
        ({"prompt": [1, LLADA_MASK_ID]}, "prompt"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_requests_are_answered_with_400_and_the_field(client, request_body, field):
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 8, **request_body}
    streams = [{}] if "use_beam_search" in str(request_body) else [{}, {"stream": True}]
    for stream in streams:
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(**body, **stream)
        assert refused.value.status_code == 400
        assert field in refused.value.body["message"]
    assert complete(client, "hello").choices[0].finish_reason == "length"


FUZZ = """
NaN
Infinity
-Infinity
1e999
1e308
-1
1.5
null
"8"
""
"\\u0000"
"\\ud800"
"\U0001f600"
[]
[1]
[[1]]
{}
{"a": 1}
[1, "a", null]
999999999999999999999999999999
18446744073709551615
-9223372036854775809
""".strip().splitlines()
FUZZ += ["9" * 5000, "[" * 100_000 + "]" * 100_000, f'"{"x" * 1_000_000}"']


@pytest.mark.parametrize("field", ["steps", "threshold", "remasking", "use_sparsed", "stepz", ""])
def test_no_value_in_vllm_xargs_is_the_server_s_fault(client, field):
    def post(xargs):
        body = f'{{"model": "tiny", "prompt": "hi", "max_tokens": 4, "vllm_xargs": {xargs}}}'
        url, headers = f"{client.base_url}completions", {"content-type": "application/json"}
        return httpx.post(url, content=body.encode(), headers=headers, timeout=60)

    for value in FUZZ:
        answer = post(f'{{"{field}": {value}}}')
        assert answer.status_code == 400, value[:80]
        assert len(answer.text) < 10_000
    for whole in ("[]", "3", "NaN", f'{{"{field}": 1, "\\ud800": 2}}'):
        assert post(whole).status_code == 400
    assert complete(client, "hello").usage.completion_tokens == 16


def test_a_client_that_hangs_up_leaves_the_server_serving(client):
    stream = client.completions.create(
        model="tiny",
        prompt="hello",
        max_tokens=400,
        stream=True,
        extra_body={"ignore_eos": True, "vllm_xargs": {"block_length": 4}},
    )
    next(iter(stream))
    stream.close()
    assert complete(client, "hello").usage.completion_tokens == 16


def own_labels(labels):
    return [value for name, value in labels.items() if name not in ("model_name", "engine")]


def rise_of(client, ask):
    """By how much our metrics rise while `ask` runs: those that do."""

    def scrape():
        text = urllib.request.urlopen(str(client.base_url.join("/metrics"))).read().decode()
        return {
            (sample.name.removeprefix("vllm:"), *own_labels(sample.labels)): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith(("vllm:diffusion", "vllm:sparsed"))
        }

    before = scrape()
    ask()
    after = scrape()
    return {key: after[key] - before[key] for key in after if after[key] != before[key]}


def test_prometheus_reads_what_requests_cost(client):
    sparse = {"steps": 8, "use_sparsed": 1, "sparsed_block_size": 16}
    rise = rise_of(client, lambda: complete(client, [3] * 150, **sparse))
    kept = rise.pop(("sparsed_kept_blocks_total",))
    assert 0 < kept < rise.pop(("sparsed_possible_blocks_total",))
    assert rise == {
        ("diffusion_num_denoising_steps_total",): 8,
        ("diffusion_num_canvas_positions_total",): 8 * 16,
        ("diffusion_num_committed_tokens_total",): 16,
        ("sparsed_steps_total", "dense"): 2,
        ("sparsed_steps_total", "recording"): 1,
        ("sparsed_steps_total", "sparse"): 5,
        ("sparsed_requests_total", "sparse", "request"): 1,
        ("sparsed_tables_total",): 1,
        ("sparsed_requests_by_reuse_total", "off"): 1,
        ("sparsed_steps_by_source_total", "fresh"): 8,
        ("sparsed_computed_rows_total",): 8 * (150 + 16),
        ("sparsed_possible_rows_total",): 8 * (150 + 16),
        ("sparsed_passes_total",): 8,
    }


def test_prometheus_reads_what_reuse_saves(client):
    rise = rise_of(client, lambda: complete(client, [3] * 150, steps=8, kv_share=0.1))
    rows = 166 + 7 * (16 + 15)  # the first step is whole; of the prompt a tenth is computed anew
    assert rise.pop(("sparsed_passes_total",)) == pytest.approx(rows / 166)
    assert rise == {
        ("diffusion_num_denoising_steps_total",): 8,
        ("diffusion_num_canvas_positions_total",): 8 * 16,
        ("diffusion_num_committed_tokens_total",): 16,
        ("sparsed_steps_total", "dense"): 8,
        ("sparsed_requests_total", "dense", "length"): 1,
        ("sparsed_requests_by_reuse_total", "on"): 1,
        ("sparsed_steps_by_source_total", "fresh"): 1,
        ("sparsed_steps_by_source_total", "pages"): 7,
        ("sparsed_computed_rows_total",): rows,
        ("sparsed_possible_rows_total",): 8 * 166,
        ("sparsed_chosen_tokens_total",): 7 * 15,
    }


def test_blocks_are_what_vllm_s_metrics_time(client):
    def counts():
        text = httpx.get(str(client.base_url.join("/metrics"))).text
        names = ("time_to_first_token_seconds", "inter_token_latency_seconds", "generation_tokens")
        return [
            float(re.search(rf"^vllm:{name}_(?:count|total){{.*}} (.*)$", text, re.MULTILINE)[1])
            for name in names
        ]

    before = counts()
    body = {"prompt": "hello", "max_tokens": 24, "stream": True}
    chunks = [
        *client.completions.create(model="tiny", **body, extra_body={**BLOCKS, "ignore_eos": True})
    ]
    assert len(chunks) == 3
    # The first block, the gaps between blocks, and tokens all the same.
    assert [b - a for a, b in zip(before, counts(), strict=True)] == [1, 2, 24]


def test_under_load_every_answer_is_the_one_it_is_alone(client):
    url = str(client.base_url.join("/"))
    report = asyncio.run(load.put_under_load(url, clients=12, seconds=8, kinds=12, reset_s=3))
    assert report.wrong == []
    assert report.counts.keys() == {"whole", "stream", "hang up", "bad", "preempt"}


def test_without_early_errors_the_answers_are_vllm_s_own(llada_path):
    """What docs/patches.md says of them; where this fails, vLLM has mended it."""
    bad = {"model": "tiny", "max_tokens": 8, "vllm_xargs": {"steps": 0}}
    args = ("--attention-backend", "sparsed", "--shutdown-timeout", "60")
    with serving(llada_path, *args) as (process, client):

        def post(endpoint, **body):
            return httpx.post(f"{client.base_url}{endpoint}", json=body, timeout=60)

        for endpoint, prompt in (("completions", {"prompt": "hi"}), ("chat/completions", MESSAGES)):
            assert post(endpoint, **bad, **prompt).status_code == 400
            begun = post(endpoint, **bad, **prompt, stream=True)
            assert begun.status_code == 200
            error = json.loads(begun.text.splitlines()[0].removeprefix("data: "))["error"]
            assert (error["code"], error["param"]) == (400, "steps")
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
            post("responses", model="tiny", input="hi", stream=True, vllm_xargs={"steps": 0})
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 200, "stream": True}
        stream = iter(client.completions.create(**body, extra_body={**BLOCKS, "ignore_eos": True}))
        next(stream)
        process.terminate()
        time.sleep(0.2)
        assert post("completions", model="tiny", prompt="hi", max_tokens=8).status_code == 500
        assert list(stream)[-1].choices[0].finish_reason == "length"


def test_sigterm_lets_requests_end_that_have_begun(server):
    """The last test of this file: the server is gone afterwards."""
    process, client = server
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 200, "stream": True}
    streams = [
        iter(client.completions.create(**body, extra_body={**BLOCKS, "ignore_eos": True}))
        for _ in range(3)
    ]
    firsts = [next(stream) for stream in streams]
    process.terminate()
    time.sleep(0.2)
    with pytest.raises(openai.InternalServerError, match="shutting down") as late:
        client.completions.create(model="tiny", prompt="hello", max_tokens=8)
    assert late.value.status_code == 503
    for first, stream in zip(firsts, streams, strict=True):
        chunks = [first, *stream]
        assert sum(len(chunk.choices[0].token_ids) for chunk in chunks) == 200
        assert chunks[-1].choices[0].finish_reason == "length"
    process.wait(timeout=60)
