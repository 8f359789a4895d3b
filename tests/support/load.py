# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Many clients at once against a running server: random requests, aborts and bad requests.

Every answer must equal the one that its request got alone, before the load. By hand, against a
server of a small LLaDA with 512 places (examples/checkpoints.py) whose requests may reuse keys and
values. There --reset needs VLLM_SERVER_DEV_MODE=1, and MALLOC_MMAP_THRESHOLD_=262144 leaves memory
that is free out of what is printed:

    python tests/support/load.py http://127.0.0.1:8000 --clients 200 --minutes 10 --pid PID
"""

import argparse
import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

Body = dict[str, Any]

STYLES = (
    {},
    {"steps": 5},
    {"block_length": 4},
    {"block_length": 5, "steps": 16},
    {"threshold": 0.05, "block_length": 8},
    {"remasking": "random"},
    {"early_stop": 0, "block_length": 3},
    {"use_sparsed": 1, "sparsed_block_size": 16},
    {"use_sparsed": 1, "sparsed_block_size": 16, "sparsed_query_block_size": 64},
    {"kv_share": 0.05},
    {"kv_share": 0.1, "kv_every": 2, "block_length": 8},
    {"kv_share": 0.1, "kv_refresh": 4, "kv_choice": "both"},
    {"kv_share": 0.1, "threshold": 0.05, "block_length": 8},
    {"kv_share": 0.1, "remasking": "random"},
    {"kv_share": 0, "use_sparsed": 1, "sparsed_block_size": 16},
)
BAD = (
    {"vllm_xargs": {"steps": -1}},
    {"vllm_xargs": {"stepz": 1}},
    {"vllm_xargs": {"threshold": "NaN"}},
    {"vllm_xargs": {"kv_share": 2}},
    {"max_tokens": 10**9},
    {"logit_bias": {"1": 5}},
    {"prompt": [10**6]},
)


@dataclass(frozen=True)
class Answer:
    """What a request got: tokens and how they end, choice by choice."""

    token_ids: tuple[tuple[int, ...], ...]
    finish_reasons: tuple[str, ...]
    num_logprobs: int
    num_counted: int  # completion tokens by the server's own count


@dataclass
class Report:
    """What happened under load."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def draw_body(draw: random.Random) -> Body:
    """A random request that a small LLaDA can answer, the same each time it is asked."""
    max_tokens = draw.choice((8, 16, 33, 48))
    body: Body = {
        "model": "tiny",
        "prompt": [draw.randrange(256) for _ in range(draw.choice((1, 7, 30, 129, 300)))],
        "max_tokens": max_tokens,
        "temperature": draw.choice((0.0, 0.0, 0.9)),
        "seed": draw.randrange(100),
        "ignore_eos": draw.random() < 0.5,
        "min_tokens": draw.choice((0, 0, 5)),
        "logprobs": draw.choice((None, None, 0, 2)),
        "vllm_xargs": draw.choice(STYLES),
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    if body["ignore_eos"] and "early_stop" not in body["vllm_xargs"]:
        body["stop_token_ids"] = draw.sample(range(256), 8)
    if body["temperature"] and draw.random() < 0.3:
        body["n"] = 2
    return body


async def ask(http: httpx.AsyncClient, body: Body) -> Answer:
    """The whole answer, in one piece."""
    response = await http.post("/v1/completions", json=body)
    response.raise_for_status()
    answer = response.json()
    choices = answer["choices"]
    return Answer(
        tuple(tuple(choice["token_ids"]) for choice in choices),
        tuple(choice["finish_reason"] for choice in choices),
        sum(len((choice["logprobs"] or {}).get("token_logprobs", ())) for choice in choices),
        answer["usage"]["completion_tokens"],
    )


async def ask_streaming(http: httpx.AsyncClient, body: Body, chunks: int | None = None) -> Answer:
    """The same answer from a stream; hangs up after `chunks` chunks if that is a number."""
    count = body.get("n", 1)
    ids: list[tuple[int, ...]] = [()] * count
    reasons = [""] * count
    num_logprobs = num_counted = seen = 0
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with http.stream("POST", "/v1/completions", json=asked) as response:
        response.raise_for_status()
        async for chunk in events(response):
            if seen == chunks:
                break
            seen += 1
            num_counted = (chunk.get("usage") or {}).get("completion_tokens", num_counted)
            for choice in chunk["choices"]:
                i = choice["index"]
                ids[i] += tuple(choice["token_ids"])
                reasons[i] = choice["finish_reason"] or reasons[i]
                num_logprobs += len((choice.get("logprobs") or {}).get("token_logprobs", ()))
    return Answer(tuple(ids), tuple(reasons), num_logprobs, num_counted)


async def events(response: httpx.Response) -> AsyncIterator[Any]:
    """What a stream sends, piece by piece.

    Only line feeds end its lines: text may hold other characters that httpx splits lines at.
    """
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                yield json.loads(line.removeprefix(b"data: "))


async def run_client(
    http: httpx.AsyncClient,
    known: list[tuple[Body, Answer]],
    report: Report,
    until: float,
    seed: int,
) -> None:
    """One client: asks, asks badly, and hangs up, in random order, until it is time."""
    draw = random.Random(seed)
    while time.monotonic() < until:
        body, expected = draw.choice(known)
        act = draw.choices(("whole", "stream", "hang up", "bad"), (4, 4, 2, 1))[0]
        report.counts[act] += 1
        if act == "bad":
            response = await http.post("/v1/completions", json={**body, **draw.choice(BAD)})
            if response.status_code != 400:
                report.wrong.append(f"bad request answered with {response.status_code}")
        elif act == "hang up":
            await ask_streaming(http, body, chunks=draw.randrange(2))
        else:
            got = await (ask if act == "whole" else ask_streaming)(http, body)
            if got != expected:
                report.wrong.append(f"{body}: {got}, alone {expected}")


async def preempt(http: httpx.AsyncClient, every_s: float, report: Report, until: float) -> None:
    """Take the pages of whoever runs, again and again, until it is time."""
    while time.monotonic() + every_s < until:
        await asyncio.sleep(every_s)
        asked = await http.post("/reset_prefix_cache", params={"reset_running_requests": "true"})
        asked.raise_for_status()
        report.counts["preempt"] += 1


async def ask_alone(http: httpx.AsyncClient, count: int, seed: int) -> list[tuple[Body, Answer]]:
    """Random requests and what each gets while nobody else is served."""
    draw = random.Random(seed)
    bodies = [draw_body(draw) for _ in range(count)]
    return [(body, await ask(http, body)) for body in bodies]


async def wait_until_idle(http: httpx.AsyncClient, seconds: float = 60) -> None:
    """Until nothing runs or waits and no page is taken. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while any((await gauges(http)).values()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"something is left behind: {await gauges(http)}")
        await asyncio.sleep(0.2)


async def gauges(http: httpx.AsyncClient) -> dict[str, float]:
    """Requests that run, requests that wait and the share of pages in use."""
    text = (await http.get("/metrics")).text
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return {
        name: sum(map(float, re.findall(rf"^vllm:{name}{{[^}}]*}} (\S+)", text, re.MULTILINE)))
        for name in names
    }


def memory(pid: int) -> int:
    """Bytes that a process and its children hold."""
    process = psutil.Process(pid)
    return sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))


async def put_under_load(
    url: str,
    *,
    clients: int,
    seconds: float,
    kinds: int = 40,
    seed: int = 0,
    reset_s: float | None = None,
) -> Report:
    """Load the server for a while; it is idle before and afterwards.

    reset_s: every so many seconds all running requests are preempted
    """
    # The server closes what is idle for 5 s, and a request sent at that moment is lost.
    limits = httpx.Limits(max_connections=None, keepalive_expiry=1)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        known = await ask_alone(http, kinds, seed)
        report = Report()
        until = time.monotonic() + seconds
        tasks = [run_client(http, known, report, until, seed=i) for i in range(clients)]
        if reset_s is not None:
            tasks.append(preempt(http, reset_s, report, until))
        await asyncio.gather(*tasks)
        await wait_until_idle(http)
        return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--pid", type=int, required=True, help="the server's")
    parser.add_argument("--reset", type=float, metavar="S", help="preempt all so often")
    args = parser.parse_args()
    for minute in range(round(args.minutes)):
        options = {"clients": args.clients, "seconds": 60, "seed": minute, "reset_s": args.reset}
        report = asyncio.run(put_under_load(args.url, **options))
        print(f"minute {minute}: {dict(report.counts)}, {memory(args.pid) / 2**20:.0f} MiB")
        print(*report.wrong, sep="\n", end="", flush=True)


if __name__ == "__main__":
    main()
