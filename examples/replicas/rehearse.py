# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Drain one of two replicas behind a load balancer while streams run, and count what is lost.

    python examples/replicas/rehearse.py nginx|vllm-router [CHECKPOINT]

Both replicas run here, with vLLM's CPU build; nginx or vllm-router has to be on the PATH.
"""

import asyncio
import json
import operator
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import openai

HERE = Path(__file__).parent
REQUESTS, CONCURRENT, DRAIN_AFTER = 48, 8, 16  # SIGTERM once so many streams have begun
LIMITS = {"early_errors": 1, "max_tokens": 32, "max_steps": 32}
CANVAS, BLOCK = 32, 8
START_TIMEOUT = 600  # seconds


@contextmanager
def process(
    command: list[str], log: Path, **environment: str
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that ends with the context."""
    with log.open("wb") as out:
        env = {**os.environ, **environment}
        started = subprocess.Popen(command, stdout=out, stderr=out, env=env, start_new_session=True)
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def replica(checkpoint: str, port: int) -> list[str]:
    """The command of docs/replicas.md, with sizes for the small model."""
    command = ["vllm", "serve", checkpoint, "--served-model-name", "model", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--max-model-len", "1024", "--dtype", "float32"]
    command += ["--enforce-eager", "--shutdown-timeout", "120", "--max-num-queued-reqs", "64"]
    return [*command, "--additional-config", json.dumps({"denoising": LIMITS})]


def balancer(name: str, port: int, replicas: list[str], folder: Path) -> list[str]:
    """nginx with nginx.conf, its addresses replaced; or vLLM's router."""
    if name == "vllm-router":
        command = ["vllm-router", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--policy", "power_of_two", "--health-check-interval-secs", "5"]
        command += ["--prometheus-port", str(free_port()), "--worker-urls"]
        return [*command, *(f"http://{address}" for address in replicas)]
    text = (HERE / "nginx.conf").read_text().replace("listen 8080", f"listen 127.0.0.1:{port}")
    for i, address in enumerate(replicas):
        text = text.replace(f"replica-{i}:8000", address)
    (folder / "nginx.conf").write_text(text)
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    foreground = f"daemon off; pid {folder}/nginx.pid;"
    return [program, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", foreground]


def wait_for(address: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"http://{address}/v1/models").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    raise TimeoutError(f"{address} did not come up")


def metric(address: str, name: str) -> int:
    """A metric of a replica, over all its labels."""
    text = httpx.get(f"http://{address}/metrics").text
    values = re.findall(rf"^vllm:{name}\{{.*\}} (\S+)$", text, re.MULTILINE)
    return round(sum(map(float, values)))


async def stream(client: openai.AsyncOpenAI, number: int) -> AsyncIterator[list[int]]:
    """The blocks of request `number` as they come."""
    xargs = {"block_length": BLOCK, "steps": CANVAS}
    body = {"ignore_eos": True, "return_token_ids": True, "vllm_xargs": xargs}
    prompt = [7 + (number * 13 + i) % 200 for i in range(20 + 10 * (number % 7))]
    options = {"model": "model", "max_tokens": CANVAS, "stream": True, "extra_body": body}
    async for chunk in await client.completions.create(prompt=prompt, **options):
        yield getattr(chunk.choices[0], "token_ids", None) or []


class Round:
    """All requests once, CONCURRENT at a time."""

    def __init__(self, client: openai.AsyncOpenAI) -> None:
        self.client = client
        self.seats = asyncio.Semaphore(CONCURRENT)
        self.begun = 0
        self.may_drain = asyncio.Event()

    async def answers(self) -> list[list[int] | str]:
        """The tokens of each request, or what became of it."""
        return await asyncio.gather(*(self.answer(number) for number in range(REQUESTS)))

    async def answer(self, number: int) -> list[int] | str:
        tokens: list[int] = []
        async with self.seats:
            try:
                async for block in stream(self.client, number):
                    self.begun += not tokens
                    tokens += block
                    if self.begun >= DRAIN_AFTER:
                        self.may_drain.set()
            except openai.OpenAIError as error:
                return f"after {len(tokens)} tokens: {error!r}"
        return tokens


async def drain(server: "subprocess.Popen[bytes]", address: str, turn: Round) -> None:
    """SIGTERM to a replica in the middle of a round; returns when its process has ended."""
    await turn.may_drain.wait()
    print(f"SIGTERM to {address}, which runs {metric(address, 'num_requests_running')} requests")
    start = time.monotonic()
    server.terminate()
    while server.poll() is None:
        await asyncio.sleep(0.1)
    print(f"It ended after {time.monotonic() - start:.1f} s with exit status {server.returncode}")


async def rehearse(url: str, server: "subprocess.Popen[bytes]", replicas: list[str]) -> bool:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        expected = await Round(client).answers()
        shares = [metric(address, "request_success_total") for address in replicas]
        print(f"{REQUESTS} streams, both replicas up; answered by each: {shares}")
        turn = Round(client)
        answers, _ = await asyncio.gather(turn.answers(), drain(server, replicas[0], turn))
    lost = [answer for answer in answers if isinstance(answer, str)]
    same = sum(map(operator.eq, answers, expected))
    print(
        f"{REQUESTS} streams, one replica drained: {same} as before, {len(lost)} lost",
        *lost,
        sep="\n",
    )
    left = metric(replicas[1], "request_success_total") - shares[1]
    print(f"The other replica answered {left} of them")
    return same == REQUESTS


def main(name: str, checkpoint: str = str(HERE.parent / "needle/model")) -> int:
    ports = [free_port() for _ in range(3)]
    addresses = [f"127.0.0.1:{port}" for port in ports]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = []
        for i, port in enumerate(ports[:2]):
            command, core = replica(checkpoint, port), {"VLLM_CPU_OMP_THREADS_BIND": str(i)}
            servers.append(stack.enter_context(process(command, folder / f"{i}.log", **core)))
        for address in addresses[:2]:
            wait_for(address)
        command = balancer(name, ports[2], addresses[:2], folder)
        stack.enter_context(process(command, folder / "balancer.log"))
        wait_for(addresses[2])
        done = asyncio.run(rehearse(f"http://{addresses[2]}", servers[0], addresses[:2]))
        if not done:
            for log in sorted(folder.glob("*.log")):
                print(log.name, log.read_text()[-3000:], sep="\n")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
