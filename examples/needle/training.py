# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Training: short texts first, longer ones once these are mastered."""

import math
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
from needle.plan import Plan, Standing, batch_size

MASTERY = 0.95  # share of a gate's masked tokens told right
LINE = 10.0  # seconds from one line of progress to the next


class Feed(IterableDataset[list[Batch]]):
    """Batches for the current stage, drawn in worker processes; a chunk has one length."""

    def __init__(self, seed: str, stage: Any, plan: Plan) -> None:
        """stage: an integer that all processes share"""
        self.seed, self.stage, self.plan = seed, stage, plan

    def __iter__(self) -> Iterator[list[Batch]]:
        info = get_worker_info()
        rng = random.Random(f"{self.seed} {info.id if info else 0}")
        while True:
            stage = self.stage.value
            level = stage if rng.random() < 0.6 else rng.randint(0, stage)
            yield [self._draw(rng, stage, self.plan.lengths[level]) for _ in range(self.plan.chunk)]

    def _draw(self, rng: random.Random, stage: int, length: int) -> Batch:
        share, size = self.plan.recall_share(stage), batch_size(length, self.plan.batch_tokens)
        if self.plan.recall_apart:
            share = float(rng.random() < share)
        return make(rng, length, size, share, self.plan.canvases)

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


@dataclass(frozen=True)
class Count:
    """What a trainer has counted since it began.

    loss: the sum of all steps'.  told: float64 [right or asked, kind, length], masked tokens
    """

    steps: int
    loss: float
    told: Tensor

    def loss_since(self, before: "Count") -> float:
        """The mean of the steps in between."""
        return (self.loss - before.loss) / max(1, self.steps - before.steps)

    def scores_since(self, before: "Count", stage: int) -> dict[str, float]:
        """Per kind, the share of masked tokens told right in between, at one length."""
        right, asked = (self.told - before.told)[:, :, stage].tolist()
        return {kind: r / n for kind, r, n in zip(KINDS, right, asked, strict=True) if n}


class Trainer:
    """A network, its optimizers, and a step that runs as one CUDA graph where it can."""

    def __init__(self, network: Network, plan: Plan) -> None:
        self.network, self.plan = network, plan
        self.device = next(network.parameters()).device
        self.cuda = self.device.type == "cuda"
        self.stream = torch.cuda.Stream() if self.cuda else None
        self.pool = torch.cuda.graph_pool_handle() if self.cuda else None
        self.slots: dict[tuple[int, ...], Slot] = {}
        sums = {"dtype": torch.float64, "device": self.device}
        self.steps, self.loss = 0, torch.zeros((), **sums)
        self.told = torch.zeros(2, len(KINDS), len(plan.lengths), **sums)
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
        self.steps += 1

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
        self.loss.add_(loss)
        told = slot.masked & (slot.ids != EOS_ID)
        right = told & (logits.argmax(-1) == slot.ids)
        level = self.plan.lengths.index(slot.ids.shape[1])
        counts = torch.stack((right.sum(1), told.sum(1))).double()
        self.told[:, :, level].index_add_(1, slot.kinds, counts)

    def count(self) -> Count:
        """Waits for the device, so that the weights are whole as well."""
        if self.stream:
            self.stream.synchronize()
        return Count(self.steps, self.loss.item(), self.told.cpu().clone())


class Log:
    """Lines of progress: at the first step, and then every LINE seconds."""

    def __init__(self, trainer: Trainer, started: float) -> None:
        """started: the clock when the plan began, less the time that it lay still"""
        self.trainer, self.started = trainer, started
        self.last, self.written = trainer.count(), time.time()

    def due(self) -> bool:
        """Asks the clock alone, and not the device."""
        return self.last.steps == 0 or time.time() - self.written >= LINE

    def write(self, stage: int) -> None:
        """Raises FloatingPointError if the loss is no number."""
        now, clock = self.trainer.count(), time.time()
        loss = now.loss_since(self.last)
        if loss != loss:
            raise FloatingPointError(f"the loss is not a number after {now.steps} steps")
        pace = (now.steps - self.last.steps) / max(1e-9, clock - self.written)
        spent, whole = clock - self.started, 60 * self.trainer.plan.minutes
        scores = now.scores_since(self.last, stage)
        told = " ".join(f"{kind} {score:.2f}" for kind, score in scores.items())
        print(
            f"{spent:6.1f} s, {max(0, whole - spent):.0f} s left  step {now.steps}, "
            f"{pace:.1f} a second  loss {loss:.3f}  "
            f"{self.trainer.plan.lengths[stage]} tokens: {told}",
            flush=True,
        )
        self.last, self.written = now, clock


def train(
    network: Network,
    plan: Plan,
    *,
    seed: int,
    workers: int,
    save: Callable[[Standing], None],
    standing: Standing | None = None,
    seconds: float = math.inf,
) -> Standing:
    """Run the plan, with a line of progress now and then; returns where it stands at the end.

    workers: processes that draw batches.  save(standing): called with each line but the first, and
    at the end.  standing: where an earlier run left off; rates warm up anew, for the optimizers
    remember nothing.  seconds: of this run, if the plan is not done before.  Raises
    FloatingPointError if the loss is no number, before such weights are saved.
    """
    standing = standing or Standing(0.0, plan.first)
    began = time.time()
    started, begun = began - standing.seconds, plan.progress(standing.seconds)
    stage, since, progress = mp.Value("i", standing.stage), 0, begun
    trainer = Trainer(network, plan)
    log, last = Log(trainer, started), trainer.count()
    # A run that goes on sees other texts than those before it.
    feed = Feed(f"{seed} {standing.seconds}" if standing.seconds else str(seed), stage, plan)
    for step, batch in enumerate(feed.batches(workers)):
        if progress >= 1 or time.time() - began >= seconds:
            break
        progress = plan.progress(time.time() - started)
        trainer.step(batch, plan.rate(step, progress, begun))
        if log.due():
            log.write(stage.value)
            if step:
                save(Standing(time.time() - started, stage.value))
        if (step + 1) % plan.check:
            continue
        before, last = last, trainer.count()
        scores = last.scores_since(before, stage.value)
        mastered = step - since >= plan.shortest and all(
            scores.get(gate, 0) > MASTERY for gate in plan.gates
        )
        late = plan.latest_stage(progress) > stage.value
        if late or (mastered and stage.value + 1 < len(plan.lengths)):
            stage.value, since = stage.value + 1, step
    if trainer.steps > log.last.steps:
        log.write(stage.value)
    standing = Standing(time.time() - started, stage.value)
    save(standing)
    return standing
