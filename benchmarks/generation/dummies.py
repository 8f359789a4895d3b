# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Engines with the shapes of the real checkpoints and vLLM's dummy weights.

What attention keeps is then close to random; how much it keeps is `select`.
"""

import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the steps are timed one by one
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # what is printed are results
sys.path.append(str(Path(__file__).parents[2] / "examples"))

import torch
import triton
import vllm
from checkpoints import Shape, dream_config, llada_config
from vllm import LLM, SamplingParams

# isort: split
from generation.machine import device_name, peak_bytes

MODELS = {
    "llada": (llada_config, Shape(126464, 32, 32, 32, 4096, 12288)),
    "dream": (dream_config, Shape(152064, 28, 28, 4, 3584, 18944)),
}
SKIP, SELECT = 0.2, 0.3


def start(
    model: str,
    num_layers: int | None,
    longest: int,
    tokens: int,
    batch: int,
    *,
    num_heads: int | None = None,
    **kwargs: Any,
) -> LLM:
    """An engine in this process.

    longest: tokens of a request;  tokens, batch: those, and requests, that run at once
    num_layers, num_heads: fewer than the model has; with fewer heads its layers are as narrow
    Its pages hold `tokens` and no more, so that its peak is what these requests need.
    """
    write, shape = MODELS[model]
    shape = replace(shape, max_length=longest, n_layers=num_layers or shape.n_layers)
    if num_heads is not None:
        shape = narrowed(shape, num_heads)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(write(shape, False)))
        defaults = {
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "max_model_len": longest,
            "max_num_batched_tokens": tokens,
            "max_num_seqs": max(4, batch),
            "kv_cache_memory_bytes": cache_bytes(shape, tokens, batch),
            "gpu_memory_utilization": 0.92 if torch.cuda.is_available() else 0.5,
            "async_scheduling": False,
            "enforce_eager": True,
        }
        return LLM(folder, **{**defaults, **kwargs})


def narrowed(shape: Shape, num_heads: int) -> Shape:
    """The same with fewer heads of the same size, and layers as narrow."""
    size, mlp_ratio = shape.d_model // shape.n_heads, shape.mlp_hidden_size / shape.d_model
    return replace(
        shape,
        n_heads=num_heads,
        n_kv_heads=min(shape.n_kv_heads, num_heads),
        d_model=num_heads * size,
        mlp_hidden_size=int(num_heads * size * mlp_ratio),
    )


def cache_bytes(shape: Shape, tokens: int, batch: int) -> int:
    """Pages for `tokens` of `batch` requests, none of whose last pages is full.

    With room for keys and values, which engines that reuse none leave to more requests.
    """
    numbers = 2 * shape.kv_size + 8 * shape.n_heads  # keys, values, ids of block tables
    a_token = 2 * numbers * shape.n_layers
    return a_token * (tokens + 256 * (batch + 2))


@dataclass(frozen=True)
class Tables:
    """SparseD's settings; the paper's, with the blocks that this engine has by default.

    query_block_size: tokens of the query blocks;  block_size: of the key blocks
    """

    query_block_size: int = 128
    block_size: int = 128
    select: float = SELECT
    skip: float = SKIP

    @classmethod
    def of(cls, text: str) -> "Tables":
        """From QUERIESxKEYS:SELECT:SKIP, such as 128x32:0.1:0.2. Raises ValueError."""
        sizes, select, skip = text.split(":")
        queries, keys = map(int, sizes.split("x"))
        return cls(queries, keys, float(select), float(skip))

    @property
    def extra_args(self) -> dict[str, Any]:
        """As a request has them."""
        return {f"sparsed_{name}": value for name, value in asdict(self).items()}


PUBLISHED = Tables()


def request(
    length: int, new_tokens: int, steps: int, tables: Tables | None
) -> tuple[dict[str, list[int]], SamplingParams]:
    """A prompt that fills `length` together with its canvas, and how it is denoised.

    tables: how it runs sparse; None: dense
    """
    extra: dict[str, Any] = {"steps": steps, "use_sparsed": int(tables is not None)}
    if tables is not None:
        extra |= tables.extra_args
    params = SamplingParams(
        temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, extra_args=extra
    )
    return {"prompt_token_ids": [i % 250 for i in range(length - new_tokens)]}, params


def print_line(bench: str, model: str, num_layers: int | None, **rest: Any) -> None:
    """What was measured where, what is `rest`, and the most memory that it took."""
    line = {"bench": bench, "model": model, **versions(), "layers": num_layers, **rest}
    print(json.dumps({**line, "peak_bytes": peak_bytes()}), flush=True)


def versions() -> dict[str, str]:
    """What every line says of where it was measured."""
    return {
        "device": device_name(),
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
