# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""`vllm bench serve` on a masked diffusion model and on a native Llama of the same size.

    python benchmarks/bench_serve.py >> benchmarks/results/serve.jsonl
    python benchmarks/bench_serve.py --shape needle --output-len 32 --steps 8 32 --prompts 256

Dummy weights, the tokenizer of the small model that ships here, random prompts. One server a model;
the diffusion model's requests say how many steps they take, and whether they reuse keys and values.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "examples"))

from checkpoints import Shape, llada_config
from generation.dummies import MODELS, versions
from needle.checkpoint import SHIPPED

SHAPES = {
    "llada": MODELS["llada"][1],
    "needle": Shape(1024, 8, 4, 4, 256, 768),
    "tiny": Shape(1024, 1, 2, 2, 64, 96),
}
KEPT = {  # of what vLLM's benchmark saves, under the names of results/serve.jsonl
    "duration": "seconds",
    "failed": "failed",
    "request_throughput": "requests_per_second",
    "output_throughput": "output_tokens_per_second",
    "mean_ttft_ms": "mean_first_ms",
    "p99_ttft_ms": "p99_first_ms",
    "mean_itl_ms": "mean_between_ms",
}
PATIENCE = 900  # seconds that a server may take to start
VLLM = str(Path(sys.executable).parent / "vllm")


def llama_config(shape: Shape) -> dict[str, Any]:
    """A native model with as many weights in each layer."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.d_model,
        "intermediate_size": shape.mlp_hidden_size,
        "max_position_embeddings": shape.max_length,
        "num_attention_heads": shape.n_heads,
        "num_hidden_layers": shape.n_layers,
        "num_key_value_heads": shape.n_kv_heads,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "vocab_size": shape.vocab_size,
    }


def write(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint without weights, whose special tokens are the tokenizer's."""
    special = json.loads((SHIPPED / "config.json").read_text())
    names = [name for name in special if name.endswith("_token_id")]
    folder.mkdir()
    own = {**config, "torch_dtype": "bfloat16", **{name: special[name] for name in names}}
    (folder / "config.json").write_text(json.dumps(own))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / name, folder)
    return folder


@contextmanager
def serving(folder: Path, args: argparse.Namespace, *options: str) -> Iterator[int]:
    """The port of a server, once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [VLLM, "serve", str(folder), "--load-format", "dummy", "--dtype", "bfloat16"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "served"]
    command += ["--max-model-len", str(args.input_len + args.output_len)]
    command += ["--max-num-seqs", str(args.concurrency), *options]
    command += ["--enforce-eager"] * args.eager
    # The benchmarks of this folder run engines in their own process; a server does not.
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    server = subprocess.Popen(command, stdout=sys.stderr, env=environment, start_new_session=True)
    try:
        wait_until_ready(server, port)
        yield port
    finally:
        stop(server)


def stop(server: "subprocess.Popen[bytes]") -> None:
    """With its workers, which a server that is not ready yet would leave behind."""
    server.terminate()
    try:
        server.wait(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_until_ready(server: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError("vllm serve ended early; see its log above")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
        except (urllib.error.URLError, TimeoutError):
            time.sleep(1)
        else:
            return
    raise TimeoutError(f"vllm serve did not come up in {PATIENCE} s")


def ask(port: int, folder: Path, args: argparse.Namespace, extra: dict[str, Any]) -> dict[str, Any]:
    """What vLLM's benchmark measures.  extra: parameters of every request"""
    command = [VLLM, "bench", "serve", "--model", "served", "--tokenizer", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dataset-name", "random"]
    command += ["--random-input-len", str(args.input_len), "--ignore-eos", "--seed", "1"]
    command += ["--random-output-len", str(args.output_len), "--disable-tqdm"]
    command += ["--num-prompts", str(args.prompts), "--max-concurrency", str(args.concurrency)]
    command += ["--num-warmups", str(args.concurrency)]
    if extra:
        command += ["--extra-body", json.dumps({"vllm_xargs": extra})]
    command += ["--save-result", "--result-dir", str(folder), "--result-filename", "result.json"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    found = json.loads((folder / "result.json").read_text())
    return {name: round(found[key], 2) for key, name in KEPT.items()}


def contenders(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Of the diffusion model, the parameters of their requests by name."""
    ways = {"exact": {"kv_reuse": 0}, "reuse": {"kv_share": args.share}}
    return {
        f"{way}, {steps} steps": {**extra, "steps": steps}
        for steps in args.steps
        for way, extra in ways.items()
    }


def measure(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    shape = SHAPES[args.shape]
    llama = write(folder / "llama", llama_config(shape))
    with serving(llama, args) as port:
        yield {"model": f"Llama of {args.shape}'s size", **ask(port, llama, args, {})}
    diffusion = write(folder / "diffusion", llada_config(shape, False))
    tokens = args.concurrency * (args.input_len + args.output_len)
    options = ["--max-num-batched-tokens", str(tokens)]
    options += ["--additional-config", json.dumps({"reuse": {"by_default": 0}})]
    with serving(diffusion, args, *options) as port:
        for name, extra in contenders(args).items():
            yield {"model": f"{args.shape}, {name}", **ask(port, diffusion, args, extra)}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="llada")
    add("--prompts", type=int, default=128)
    add("--concurrency", type=int, default=64)
    add("--input-len", type=int, default=512, help="tokens")
    add("--output-len", type=int, default=128, help="tokens, one block of the diffusion model")
    add("--steps", type=int, nargs="+", default=[32], help="T, one server for all")
    add("--share", type=float, default=0.02, help="kv_share of requests that reuse")
    add("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    shared = {
        "bench": "serve",
        **versions(),
        "engine": "eager" if args.eager else "compiled",
        "prompts": args.prompts,
        "input_tokens": args.input_len,
        "output_tokens": args.output_len,
        "concurrency": args.concurrency,
    }
    with tempfile.TemporaryDirectory() as folder:
        for line in measure(args, Path(folder)):
            print(json.dumps({**shared, **line}), flush=True)


if __name__ == "__main__":
    main()
