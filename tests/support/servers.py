# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""`vllm serve` for tests, in processes of its own."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import openai
from engines import KV_CACHE_BYTES

START_TIMEOUT = 600  # seconds: on two cores seven processes may import torch beside other tests


@contextmanager
def serving(
    path: str | Path, *args: str, **environment: str
) -> Iterator[tuple["subprocess.Popen[bytes]", openai.OpenAI]]:
    """A server of the model at `path`, small and exact, under the name "tiny".

    Its process and a client of it. It ends with the context, and its log is printed.
    """
    port = _free_port()
    # Not the `vllm` command, which an environment on PYTHONPATH lacks; -P leaves out this folder.
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", str(path)]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    command += ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES), "--gpu-memory-utilization", "0.1"]
    command += args
    inherited = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    # A connection that the server closes while a request travels on it would fail a test.
    inherited |= {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600"}
    environment = {**inherited, **environment}
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0)
        try:
            _wait_until_ready(server, client)
            yield server, client
        finally:
            try:
                _end(server)
            finally:
                log.seek(0)
                print(log.read()[-5000:])


def _end(server: "subprocess.Popen[bytes]") -> None:
    """A server that does not end is an error, and leaves no process of its own behind either."""
    server.terminate()
    try:
        server.wait(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(server: "subprocess.Popen[bytes]", client: openai.OpenAI) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        assert server.poll() is None, "vllm serve ended early; see its log"
        try:
            client.models.list()
        except openai.APIConnectionError:
            time.sleep(1)
        else:
            return
    raise TimeoutError("vllm serve did not come up")
