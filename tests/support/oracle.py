# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What a request must return: LLaDA and Dream in plain float32 PyTorch, one sequence at a time.

Networks and loops are written after the authors' published code, for temperature 0:
  LLaDA      modeling_llada.py, generate.py (github.com/ML-GSAI/LLaDA; arXiv 2502.09992)
  iLLaDA     modeling_illada.py (arXiv 2606.25331); LLaDA's loop, the mask being token 5
  LLaDA-MoE  modeling_lladamoe.py (inclusionAI/LLaDA-MoE-7B-A1B-Base); LLaDA's loop
  Dream      modeling_dream.py, generation_utils.py (github.com/DreamLM/Dream; arXiv 2508.15487)
  threshold  llada/generate.py (github.com/NVlabs/Fast-dLLM; arXiv 2505.22618)
  entropy_threshold  d3llm_llada_generate_util.py (github.com/hao-ai-lab/d3LLM; arXiv 2601.07568),
             one block at a time
  variable_length  var_generate() of ML-GSAI/LLaDA's generate.py as of iLLaDA's evaluation, without
             its push towards </think>
  YaRN       arXiv 2309.00071, sections 3.2 to 3.4;  Llama 3.1's scaling: arXiv 2407.21783
The differences, all of them the server's rules:
  the mask token is never predicted and the prompt never changed (forbid_mask=False: as theirs);
  lengths need not divide evenly (split_steps); Dream may run in blocks, each as a run of its own.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, silu

LogitsFn = Callable[[Tensor], Tensor]  # ids [1, L] -> logits [1, L, vocab]
Affine = tuple[Tensor, Tensor | None]  # weight [out, in], bias [out]


@dataclass(frozen=True)
class FeedForward:
    """SwiGLU."""

    gate: Affine
    up: Affine
    down: Affine

    def __call__(self, x: Tensor) -> Tensor:
        return linear(silu(linear(x, *self.gate)) * linear(x, *self.up), *self.down)


@dataclass(frozen=True)
class Mixture:
    """Each token takes the top_k likeliest experts, each weighed by its probability of all."""

    router: Tensor  # [experts, hidden]
    experts: list[FeedForward]
    top_k: int

    def __call__(self, x: Tensor) -> Tensor:
        """x [L, hidden] -> [L, hidden]"""
        weights, chosen = linear(x, self.router).softmax(dim=-1).topk(self.top_k)
        outputs = torch.stack([expert(x) for expert in self.experts])  # [experts, L, hidden]
        taken = outputs[chosen, torch.arange(len(x))[:, None]]  # [L, top_k, hidden]
        return (weights[:, :, None] * taken).sum(dim=1)


@dataclass(frozen=True)
class Layer:
    attn_norm: Tensor
    q: Affine
    k: Affine
    v: Affine
    o: Affine
    mlp_norm: Tensor
    mlp: FeedForward | Mixture
    q_norm: Tensor | None = None  # [head_dim]
    k_norm: Tensor | None = None


@dataclass(frozen=True)
class Network:
    """A Llama-like encoder: every place sees every place."""

    embedding: Tensor  # [vocab, hidden]
    layers: list[Layer]
    norm: Tensor  # [hidden]
    head: Tensor  # [vocab, hidden]
    num_heads: int
    num_kv_heads: int
    rope_theta: float
    eps: float
    rope_scaling: dict = field(default_factory=dict)  # of config.json, with its original length
    logit_scale: float = 1.0

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """ids [1, L] -> logits [1, L, vocab], row i from the hidden state of place i."""
        x = self.embedding[ids[0]]
        for layer in self.layers:
            x = x + self.attention(layer, rms_norm(x, layer.attn_norm, self.eps))
            x = x + layer.mlp(rms_norm(x, layer.mlp_norm, self.eps))
        return linear(rms_norm(x, self.norm, self.eps), self.head)[None] * self.logit_scale

    def attention(self, layer: Layer, x: Tensor) -> Tensor:
        """x [L, hidden] -> [L, hidden], softmax(q k / sqrt(head_dim)) v without a mask."""
        q, k, v = self.heads(layer, x)
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)  # [num_heads, L, L]
        return linear((weights @ v).transpose(0, 1).flatten(1), *layer.o)

    def heads(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [L, hidden] -> rotated q, rotated k, v, each [num_heads, L, head_dim]."""
        head_dim = layer.q[0].shape[0] // self.num_heads
        q, k, v = (
            linear(x, *part).unflatten(-1, (-1, head_dim)).transpose(0, 1)
            for part in (layer.q, layer.k, layer.v)
        )
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = rms_norm(q, layer.q_norm, self.eps), rms_norm(k, layer.k_norm, self.eps)
        k, v = (t.repeat_interleave(self.num_heads // self.num_kv_heads, dim=0) for t in (k, v))
        turns, scale = frequencies(head_dim, self.rope_theta, self.rope_scaling)
        return rotate(q, turns, scale), rotate(k, turns, scale), v


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps)


def rotate(x: Tensor, turns: Tensor, scale: float = 1.0) -> Tensor:
    """Rotary embedding of x [heads, L, head_dim]; dimension d turns with d + head_dim / 2."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * turns  # [L, half]
    a, b = x[..., :half], x[..., half:]
    sin, cos = scale * angle.sin(), scale * angle.cos()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def frequencies(head_dim: int, theta: float, scaling: dict) -> tuple[Tensor, float]:
    """Turns a token of each pair of dimensions [head_dim / 2], and the length of what is turned."""
    half = head_dim // 2
    turns = 1.0 / theta ** (torch.arange(half, dtype=torch.float32) / half)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return turns, 1.0
    factor = scaling["factor"]
    if kind == "linear":
        return turns / factor, 1.0
    length = scaling["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        rotations = length * turns / (2 * math.pi)  # within the original length
        kept = ((rotations - low) / (high - low)).clamp(0, 1)
        return turns * kept + turns / factor * (1 - kept), 1.0
    assert kind == "yarn", kind

    def dimension(rotations: float) -> float:
        """The pair that turns so often within the original length."""
        return half * math.log(length / (rotations * 2 * math.pi)) / math.log(theta)

    low = max(math.floor(dimension(32)), 0)
    high = min(math.ceil(dimension(1)), head_dim - 1)
    ramp = ((torch.arange(half) - low) / (high - low)).clamp(0, 1)
    return turns * (1 - ramp) + turns / factor * ramp, 0.1 * math.log(factor) + 1.0


def load_llada(path: str | Path) -> Network:
    """Load a folder in LLaDA's layout (GSAI-ML/LLaDA-8B-Instruct, GSAI-ML/LLaDA-1.5)."""
    config, weights = _read_config(path), _read_weights(path)
    top = "model.transformer."
    names = ("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm")
    mlp = ("ff_proj", "up_proj", "ff_out")
    head = "wte" if config["weight_tying"] else "ff_out"
    return Network(
        embedding=weights[top + "wte.weight"],
        layers=[
            _layer(weights, block, names, _feed_forward(weights, block, mlp))
            for block in (f"{top}blocks.{i}." for i in range(config["n_layers"]))
        ],
        norm=weights[top + "ln_f.weight"],
        head=weights[f"{top}{head}.weight"],
        num_heads=config["n_heads"],
        num_kv_heads=config["n_kv_heads"] or config["n_heads"],
        rope_theta=config["rope_theta"],
        eps=config["rms_norm_eps"],
        rope_scaling=_scaling(config, config["max_sequence_length"]),
        logit_scale=config["d_model"] ** -0.5 if config["scale_logits"] else 1.0,
    )


def load_dream(path: str | Path) -> Network:
    """Load a folder in Dream's layout (Dream-org/Dream-v0-Instruct-7B, apple/DiffuCoder-7B).

    iLLaDA's is the same (GSAI-ML/iLLaDA-8B-Instruct), and LLaDA-MoE's but for the feed-forward.
    """
    config, weights = _read_config(path), _read_weights(path)
    attn = "self_attn."
    names = ("input_layernorm", attn + "q_proj", attn + "k_proj", attn + "v_proj", attn + "o_proj")
    names += ("post_attention_layernorm",)
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return Network(
        embedding=weights["model.embed_tokens.weight"],
        layers=[
            _layer(weights, f"model.layers.{i}.", names, _qwen_mlp(config, weights, i))
            for i in range(config["num_hidden_layers"])
        ],
        norm=weights["model.norm.weight"],
        head=weights[f"{head}.weight"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        rope_theta=config["rope_theta"],
        eps=config["rms_norm_eps"],
        rope_scaling=_scaling(config, config["max_position_embeddings"]),
    )


load_illada = load_llada_moe = load_dream


def _scaling(config: dict, length: int) -> dict:
    """The file's rope_scaling; YaRN's original length is the model's where it does not say."""
    scaling = config.get("rope_scaling") or {}
    return {"original_max_position_embeddings": length, **scaling}


def _affine(weights: dict[str, Tensor], name: str) -> Affine:
    return weights[f"{name}.weight"], weights.get(f"{name}.bias")


def _layer(
    weights: dict[str, Tensor], prefix: str, names: Sequence[str], mlp: FeedForward | Mixture
) -> Layer:
    """Pick one layer's tensors; names are in the order of Layer's fields."""
    attn_norm, q, k, v, o, mlp_norm = (_affine(weights, prefix + name) for name in names)
    norms = (weights.get(f"{prefix}self_attn.{part}_norm.weight") for part in "qk")
    return Layer(attn_norm[0], q, k, v, o, mlp_norm[0], mlp, *norms)


def _feed_forward(weights: dict[str, Tensor], prefix: str, names: Sequence[str]) -> FeedForward:
    return FeedForward(*(_affine(weights, prefix + name) for name in names))


def _qwen_mlp(config: dict, weights: dict[str, Tensor], layer: int) -> FeedForward | Mixture:
    prefix, names = f"model.layers.{layer}.mlp.", ("gate_proj", "up_proj", "down_proj")
    if "num_experts" not in config:
        return _feed_forward(weights, prefix, names)
    experts = [
        _feed_forward(weights, f"{prefix}experts.{i}.", names) for i in range(config["num_experts"])
    ]
    return Mixture(weights[f"{prefix}gate.weight"], experts, config["num_experts_per_tok"])


def _read_config(path: str | Path) -> dict:
    return json.loads((Path(path) / "config.json").read_text())


def _read_weights(path: str | Path) -> dict[str, Tensor]:
    """All tensors in float32, from one safetensors file or from the shards of the index."""
    index = Path(path) / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.exists():
        files = set(json.loads(index.read_text())["weight_map"].values())
    shards = [load_file(Path(path) / file) for file in files]
    return {name: tensor.float() for shard in shards for name, tensor in shard.items()}


@dataclass(frozen=True)
class Run:
    """What a loop generated, and by how little its closest decision was taken."""

    ids: list[int]  # [gen_length]
    forwards: int  # forward passes of the network
    closest: float  # smallest lead of a decision, in units of logits or of confidence
    logprobs: list[float]  # [gen_length] of each id, in the step that placed it

    def met_a_tie(self, below: float = 1e-5) -> bool:
        """Whether rounding could have tipped a decision, so that no other run must equal this."""
        return self.closest < below


def assert_same_tokens(actual: Sequence[Sequence[int]], expected: Sequence[Run]) -> None:
    """Each request's ids are its run's; runs that rounding could have tipped are left out.

    At least three in four must be left to compare: with fewer, choose other prompts.
    """
    decided = [
        (list(ids), run.ids)
        for ids, run in zip(actual, expected, strict=True)
        if not run.met_a_tie()
    ]
    assert decided and 4 * len(decided) >= 3 * len(expected), (
        f"only {len(decided)} of {len(expected)} runs met no tie"
    )
    for ids, wanted in decided:
        assert ids == wanted


def llada_generate(
    logits_fn: LogitsFn,
    prompt: Sequence[int],
    *,
    steps: int,
    gen_length: int,
    block_length: int,
    mask_id: int,
    threshold: float | None = None,
    entropy_threshold: float | None = None,
    forbid_mask: bool = True,
    min_tokens: int = 0,
    stop_ids: Sequence[int] = (),
) -> Run:
    """LLaDA's generate() with remasking="low_confidence" and temperature 0.

    With a threshold, Fast-dLLM's generate(): the steps of a block end when it is full. With an
    entropy_threshold, d3LLM's.
    The first min_tokens places take none of stop_ids.
    """
    canvas = Canvas(prompt, gen_length, mask_id, forbid_mask, min_tokens, stop_ids)
    for start, end, block_steps in plan_blocks(len(prompt), gen_length, block_length, steps):
        if threshold is not None:
            fill_over_threshold(canvas, logits_fn, start, end, threshold)
            continue
        if entropy_threshold is not None:
            fill_over_threshold(canvas, logits_fn, start, end, -entropy_threshold, "entropy")
            continue
        for count in split_evenly(canvas.count_masked(start, end), block_steps):
            guess = canvas.guess(logits_fn(canvas.ids)[0], end)
            canvas.place_best(guess, count)
    return canvas.run()


def var_generate(
    generate: Callable[..., Run],
    prompt: Sequence[int],
    *,
    gen_length: int,
    block_length: int,
    steps: int,
    stop_ids: Sequence[int] = (),
) -> Run:
    """iLLaDA's var_generate(): block after block, each behind what came before, up to a stop.

    generate(prompt, gen_length, steps): denoises one block;  steps: of each block
    """
    runs: list[Run] = []
    ids: list[int] = []
    while len(ids) < gen_length and not set(stop_ids) & set(ids):
        length = min(block_length, gen_length - len(ids))
        runs.append(generate([*prompt, *ids], length, steps))
        ids += runs[-1].ids
    logprobs = [value for run in runs for value in run.logprobs]
    forwards, closest = sum(run.forwards for run in runs), min(run.closest for run in runs)
    return Run(ids, forwards, closest, logprobs)


def dream_generate(
    logits_fn: LogitsFn,
    prompt: Sequence[int],
    *,
    steps: int,
    max_new_tokens: int,
    alg: str,
    mask_id: int,
    eps: float = 1e-3,
    block_length: int | None = None,
    threshold: float | None = None,
    entropy_threshold: float | None = None,
    forbid_mask: bool = True,
) -> Run:
    """Dream's diffusion_generate() with alg maskgit_plus, topk_margin or entropy, temperature 0.

    With a threshold the confidence is the token's probability, whatever alg says.
    """
    canvas = Canvas(prompt, max_new_tokens, mask_id, forbid_mask)
    block_length = block_length or max_new_tokens
    for start, end, block_steps in plan_blocks(len(prompt), max_new_tokens, block_length, steps):
        if threshold is not None:
            fill_over_threshold(canvas, shifted(logits_fn), start, end, threshold)
            continue
        if entropy_threshold is not None:
            rows = shifted(logits_fn)
            fill_over_threshold(canvas, rows, start, end, -entropy_threshold, "entropy")
            continue
        for step in range(block_steps):
            guess = canvas.guess(shifted(logits_fn)(canvas.ids)[0], end, alg)
            canvas.place_best(guess, dream_count(len(guess.places), step, block_steps, eps))
    return canvas.run()


def fill_over_threshold(
    canvas: "Canvas",
    logits_fn: LogitsFn,
    start: int,
    end: int,
    threshold: float,
    alg: str = "maskgit_plus",
) -> None:
    """Fast-dLLM: place all that is as sure as the threshold, at least the surest, until full."""
    while left := canvas.count_masked(start, end):
        canvas.place_sure(canvas.guess(logits_fn(canvas.ids)[0], end, alg), threshold)
        assert canvas.count_masked(start, end) < left, "only mask tokens predicted: never ends"


def shifted(logits_fn: LogitsFn) -> LogitsFn:
    """Dream's rows: place i is predicted by the hidden state of place i - 1."""

    def rows(ids: Tensor) -> Tensor:
        logits = logits_fn(ids)
        return torch.cat((logits[:, :1], logits[:, :-1]), dim=1)

    return rows


def plan_blocks(
    prompt_length: int, gen_length: int, block_length: int, steps: int
) -> list[tuple[int, int, int]]:
    """(start, end, steps) of each block; the last one may be shorter than block_length."""
    end = prompt_length + gen_length
    starts = range(prompt_length, end, block_length)
    ends = [min(start + block_length, end) for start in starts]
    sizes = [e - s for s, e in zip(starts, ends, strict=True)]
    return list(zip(starts, ends, split_steps(steps, sizes), strict=True))


def split_steps(steps: int, sizes: Sequence[int]) -> list[int]:
    """Steps of each block: one, and of the rest a share in proportion to its size less one.

    Rounded up along the way, so that early blocks get the odd steps. It is steps / blocks, as
    the authors demand it, where that is whole; fewer steps than blocks count as one a block.
    """
    extra = max(0, steps - len(sizes))
    weights = [size - 1 for size in sizes] if max(sizes) > 1 else [1] * len(sizes)
    through = [-(-extra * sum(weights[: b + 1]) // sum(weights)) for b in range(len(sizes))]
    return [1 + now - before for before, now in pairwise([0, *through])]


def split_evenly(masks: int, steps: int) -> list[int]:
    """LLaDA's get_num_transfer_tokens(): the first masks % steps steps place one more."""
    return [masks // steps + (step < masks % steps) for step in range(steps)]


def dream_count(masks: int, step: int, steps: int, eps: float) -> int:
    """Places Dream fills in a step; its float32 times decide where the product is whole."""
    if step == steps - 1:
        return masks
    times = torch.linspace(1, eps, steps + 1)
    return int(masks * (1 - times[step + 1] / times[step]))


@dataclass(frozen=True)
class Guess:
    """For each of n masked places the token it would take."""

    places: Tensor  # [n] indices into the sequence
    tokens: Tensor  # [n]
    confidence: Tensor  # [n]
    lead: Tensor  # [n] logit of the token less that of the runner-up
    logprobs: Tensor  # [n]


class Canvas:
    """Prompt and generation, with a record of what is still masked."""

    def __init__(
        self,
        prompt: Sequence[int],
        gen_length: int,
        mask_id: int,
        forbid_mask: bool,
        min_tokens: int = 0,
        stop_ids: Sequence[int] = (),
    ):
        self.ids = torch.tensor([[*prompt, *[mask_id] * gen_length]])  # [1, L]
        self.masked = torch.arange(self.ids.shape[1]) >= len(prompt)  # [L]
        self.logprobs = torch.zeros(self.ids.shape[1])  # [L]
        self.num_prompt, self.mask_id, self.forbid_mask = len(prompt), mask_id, forbid_mask
        self.forwards, self.closest = 0, math.inf
        self.first_end, self.stop_ids = len(prompt) + min_tokens, list(stop_ids)
        if not forbid_mask:
            self.masked = self.ids[0] == mask_id

    def count_masked(self, start: int, end: int) -> int:
        return int(self.masked[start:end].sum())

    def guess(self, logits: Tensor, end: int, alg: str = "maskgit_plus") -> Guess:
        """Choose a token for every masked place before end; logits [L, vocab] of one forward."""
        self.forwards += 1
        places = self.masked[:end].nonzero()[:, 0]
        allowed = logits[places]  # [n, vocab], a copy
        probs = allowed.softmax(dim=-1)  # over all tokens, the mask token included
        if self.forbid_mask:
            allowed[:, self.mask_id] = -math.inf
        for place in (places < self.first_end).nonzero()[:, 0]:
            allowed[place, self.stop_ids] = -math.inf
        best, runner_up = allowed.topk(2).values.unbind(dim=-1)
        tokens = allowed.argmax(dim=-1)
        logprobs = logits[places].log_softmax(dim=-1)[range(len(places)), tokens]
        confidence = confidence_of(probs, tokens, alg)
        return Guess(places, tokens, confidence, best - runner_up, logprobs)

    def place_best(self, guess: Guess, count: int) -> None:
        """Place the count most confident."""
        order = guess.confidence.argsort(descending=True, stable=True)
        if 0 < count < len(order):
            kept, left = guess.confidence[order[count - 1 : count + 1]].tolist()
            self.closest = min(self.closest, kept - left)
        self._place(guess, order[:count])

    def place_sure(self, guess: Guess, threshold: float) -> None:
        """Place all of a confidence of at least threshold, or else the best one."""
        margin = (guess.confidence - threshold).abs().min()
        self.closest = min(self.closest, float(margin))
        sure = guess.confidence >= threshold
        self.place_best(guess, max(1, int(sure.sum())))

    def _place(self, guess: Guess, chosen: Tensor) -> None:
        places, tokens = guess.places[chosen], guess.tokens[chosen]
        self.ids[0, places] = tokens
        self.logprobs[places] = guess.logprobs[chosen]
        self.masked[places] = tokens == self.mask_id  # a predicted mask leaves the place masked
        self.closest = min([self.closest, *guess.lead[chosen].tolist()])

    def run(self) -> Run:
        ids, logprobs = self.ids[0, self.num_prompt :], self.logprobs[self.num_prompt :]
        return Run(ids.tolist(), self.forwards, self.closest, logprobs.tolist())


def confidence_of(probs: Tensor, tokens: Tensor, alg: str) -> Tensor:
    """probs [n, vocab], tokens [n] -> confidence [n], as Dream's sample_tokens() ranks places."""
    if alg == "maskgit_plus":
        return probs.gather(-1, tokens[:, None])[:, 0]
    if alg == "topk_margin":
        best, runner_up = probs.topk(2).values.unbind(dim=-1)
        return best - runner_up
    assert alg == "entropy", alg
    return (probs * (probs + 1e-10).log()).sum(dim=-1)
