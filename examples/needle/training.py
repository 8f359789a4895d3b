# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Training: short texts first, longer ones once these are mastered."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from needle.batches import EOS_ID, KINDS, MASK_ID, Batch, make
from needle.network import Network
from needle.optimizer import Muon

LENGTHS = (96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2176, 3072, 4352)  # a stage each
GATES = ("single", "multikey")  # tasks that must be mastered before texts grow longer
MASTERY = 0.95  # share of their masked tokens told right
SHORTEST = 800  # steps of a stage
CHUNK = 8  # batches that a worker hands over at once
REPORT = 200  # steps


def batch_size(length: int) -> int:
    """Examples of a batch: 8k tokens, more where the texts are so long that few would fit."""
    return max(8192 // length, 8)


@dataclass(frozen=True)
class Plan:
    """How long to train and how fast to learn. Progress is the share of the time that is spent."""

    minutes: float
    adam_rate: float = 1e-3
    muon_rate: float = 3e-3
    warm_up: int = 300  # steps
    decay: float = 0.55  # the last share of the time, over which rates fall to zero
    latest: float = 0.6  # progress at which the last stage begins at the latest

    def rate(self, step: int, progress: float) -> float:
        """Share of the full learning rates."""
        return max(0.0, min(1.0, (step + 1) / self.warm_up, (1 - progress) / self.decay))

    def latest_stage(self, progress: float) -> int:
        """The stage in which this progress must be, mastered or not."""
        last = len(LENGTHS) - 1
        return min(last, int(progress / self.latest * last))


class Feed(IterableDataset[list[Batch]]):
    """Batches for the current stage, drawn in worker processes; a chunk has one length."""

    def __init__(self, seed: int, stage: Any) -> None:
        """stage: an integer that all processes share"""
        self.seed, self.stage = seed, stage

    def __iter__(self) -> Iterator[list[Batch]]:
        info = get_worker_info()
        rng = random.Random(f"{self.seed} {info.id if info else 0}")
        while True:
            stage = self.stage.value
            length = LENGTHS[stage if rng.random() < 0.6 else rng.randint(0, stage)]
            recall_share = 0.05 + 0.5 * 0.8**stage
            yield [make(rng, length, batch_size(length), recall_share) for _ in range(CHUNK)]

    def batches(self, workers: int) -> Iterator[Batch]:
        for chunk in DataLoader(self, batch_size=None, num_workers=workers):
            yield from chunk


@dataclass
class Slot:
    """Where batches of one size lie on the device, and the captured step that reads them."""

    ids: Tensor
    masked: Tensor
    kinds: Tensor
    graph: "torch.cuda.CUDAGraph | None" = None
    uses: int = 0


class Trainer:
    """A network, its optimizers, and a step that runs as one CUDA graph where it can."""

    def __init__(self, network: Network, plan: Plan) -> None:
        self.network, self.plan = network, plan
        self.device = next(network.parameters()).device
        self.cuda = self.device.type == "cuda"
        self.stream = torch.cuda.Stream() if self.cuda else None
        self.pool = torch.cuda.graph_pool_handle() if self.cuda else None
        self.slots: dict[tuple[int, ...], Slot] = {}
        self.loss = torch.zeros((), device=self.device)  # a running mean
        self.tally = torch.zeros(2, len(KINDS), len(LENGTHS), device=self.device)  # right, told
        self._make_optimizers()

    def _make_optimizers(self) -> None:
        matrices, rest = [], []
        for name, weight in self.network.named_parameters():
            (matrices if ".blocks." in name and weight.dim() == 2 else rest).append(weight)
        zero = torch.zeros((), device=self.device)
        self.muon = Muon(matrices, zero.clone())
        self.adam = torch.optim.AdamW(
            rest, zero.clone(), betas=(0.9, 0.98), weight_decay=0.0, capturable=self.cuda
        )

    def step(self, batch: Batch, rate: float) -> None:
        """One update of the weights.  rate: share of the full learning rates"""
        with self._own_stream():
            self.muon.rate.fill_(rate * self.plan.muon_rate)
            self.adam.param_groups[0]["lr"].fill_(rate * self.plan.adam_rate)
            slot = self._fill(batch)
            if slot.graph is None and self.cuda and slot.uses > 2:
                slot.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(slot.graph, pool=self.pool, stream=self.stream):
                    self._update(slot)
            slot.graph.replay() if slot.graph else self._update(slot)

    def _own_stream(self) -> AbstractContextManager[Any]:
        """Gradients remember their stream: it must be the one that graphs are captured on."""
        return torch.cuda.stream(self.stream) if self.cuda else nullcontext()

    def _fill(self, batch: Batch) -> Slot:
        data = [torch.from_numpy(x) for x in (batch.ids, batch.masked, batch.kinds)]
        size = batch.ids.shape
        if size not in self.slots:
            self.slots[size] = Slot(*(x.to(self.device) for x in data))
        slot = self.slots[size]
        for place, x in zip((slot.ids, slot.masked, slot.kinds), data, strict=True):
            place.copy_(x)
        slot.uses += 1
        return slot

    def _update(self, slot: Slot) -> None:
        """Forward, backward and both optimizers, without a look from the host."""
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            logits = self.network(slot.ids.masked_fill(slot.masked, MASK_ID))
        flat, targets = logits.float().flatten(0, 1), slot.ids.flatten()
        losses = F.cross_entropy(flat, targets, reduction="none").view_as(slot.ids)
        # An end-of-text is easy, and most of a canvas.
        weights = slot.masked * (1 - 0.9 * (slot.ids == EOS_ID))
        loss = (losses * weights).sum() / weights.sum().clamp(min=1)
        self.network.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.muon.step()
        self.adam.step()
        self._count(slot, logits, loss)

    @torch.no_grad()
    def _count(self, slot: Slot, logits: Tensor, loss: Tensor) -> None:
        self.loss.lerp_(loss, 0.02)
        told = slot.masked & (slot.ids != EOS_ID)
        right = told & (logits.argmax(-1) == slot.ids)
        level = LENGTHS.index(slot.ids.shape[1])
        counts = torch.stack((right.sum(1), told.sum(1))).float()
        self.tally[:, :, level].index_add_(1, slot.kinds, counts)

    def scores(self, stage: int) -> dict[str, float]:
        """Per kind, the share of masked tokens told right since the last call, at one length."""
        right, told = self.tally[:, :, stage].tolist()
        self.tally.zero_()
        return {kind: r / t for kind, r, t in zip(KINDS, right, told, strict=True) if t}


def train(
    network: Network, plan: Plan, *, seed: int, workers: int, save: Callable[[], None]
) -> None:
    """Run the plan, with a line of progress now and then.

    workers: processes that draw batches.  save(): called with each line, and at the end
    Raises FloatingPointError if the loss is no number, before such weights are saved.
    """
    stage, started, since, progress = mp.Value("i", 0), time.time(), 0, 0.0
    trainer = Trainer(network, plan)
    for step, batch in enumerate(Feed(seed, stage).batches(workers)):
        if progress >= 1:
            break
        progress = (time.time() - started) / 60 / plan.minutes
        trainer.step(batch, plan.rate(step, progress))
        if (step + 1) % REPORT:
            continue
        scores = trainer.scores(stage.value)
        if (step + 1) % (5 * REPORT) == 0:
            _report(time.time() - started, step + 1, progress, stage.value, trainer, scores)
            save()
        mastered = step - since >= SHORTEST and all(scores.get(g, 0) > MASTERY for g in GATES)
        late = plan.latest_stage(progress) > stage.value
        if late or (mastered and stage.value + 1 < len(LENGTHS)):
            stage.value, since = stage.value + 1, step
    save()


def _report(
    seconds: float,
    step: int,
    progress: float,
    stage: int,
    trainer: Trainer,
    scores: dict[str, float],
) -> None:
    loss = trainer.loss.item()
    if loss != loss:
        raise FloatingPointError(f"the loss is not a number after {step} steps")
    told = " ".join(f"{kind} {score:.2f}" for kind, score in scores.items())
    print(
        f"{seconds:6.1f} s {progress:4.0%}  step {step}  loss {loss:.3f}  "
        f"{LENGTHS[stage]} tokens: {told}",
        flush=True,
    )
