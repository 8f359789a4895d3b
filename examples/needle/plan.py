# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""How a training runs: which lengths come when, how fast it learns, and where it stands."""

from dataclasses import dataclass

from needle import batches

LENGTHS = (96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2176, 3072, 4352)  # a stage each
LONG_LENGTHS = (6144, 8704, 12288, 17408, 24576, 33024)  # those that a continuation may add
ROOM = 256  # tokens that a network's longest text may be longer than those it was trained on
GATES = ("single", "multikey")  # tasks that must be mastered before texts grow longer
LONG_TOKENS = 73728  # of a batch of few long texts: two of 33k


def batch_size(length: int, tokens: int) -> int:
    """Examples of a batch of so many tokens, more where texts are so long that few would fit."""
    return max(tokens // length, min(8, LONG_TOKENS // length))


@dataclass(frozen=True)
class Standing:
    """Where a training is: the time that it has run, and its stage, an index of Plan.lengths."""

    seconds: float
    stage: int


@dataclass(frozen=True)
class Plan:
    """How long to train and how fast to learn. Progress is the share of the time that is spent."""

    minutes: float
    adam_rate: float = 1e-3
    muon_rate: float = 3e-3
    warm_up: int = 300  # steps, or a tenth of the time where steps are slow
    batch_tokens: int = 8192
    decay: float = 0.55  # the last share of the time, over which rates fall to zero
    lengths: tuple[int, ...] = LENGTHS
    first: int = 0  # the stage that it begins with
    leave: float = 0.0  # progress at which the first stage may end though it is not mastered
    latest: float = 0.6  # progress at which the last stage begins at the latest
    gates: tuple[str, ...] = GATES
    shortest: int = 800  # steps of a stage
    check: int = 200  # steps from one look at the scores to the next
    chunk: int = 8  # batches that a worker hands over at once
    recall: float | None = None  # share of recalled facts; None: of each stage less than before
    recall_apart: bool = False  # in batches of their own: one such text asks as much as 50 others
    long_answers: bool = False
    mantissa: int = 7  # bits that a trained weight keeps: bfloat16's, or fewer, which pack smaller

    @property
    def canvases(self) -> batches.Canvases:
        return batches.LONG if self.long_answers else batches.SHORT

    def progress(self, seconds: float) -> float:
        return seconds / 60 / self.minutes

    def rate(self, step: int, progress: float, begun: float = 0.0) -> float:
        """Share of the full learning rates.  step, begun: of this run, and where it began"""
        warm = max((step + 1) / self.warm_up, (progress - begun) / 0.1)
        return max(0.0, min(1.0, warm, (1 - progress) / self.decay))

    def latest_stage(self, progress: float) -> int:
        """The stage in which this progress must be, mastered or not."""
        last, spent = len(self.lengths) - 1, (progress - self.leave) / (self.latest - self.leave)
        return min(last, self.first + int(max(0.0, spent) * (last - self.first)))

    def recall_share(self, stage: int) -> float:
        return 0.05 + 0.5 * 0.8**stage if self.recall is None else self.recall


def continued(minutes: float, longest: int, trained: int, batch_tokens: int) -> Plan:
    """The plan that takes a trained network to texts of `longest` tokens, and to all tasks.

    longest: of LONG_LENGTHS.  trained: the longest texts that the network knows

    It begins with texts short enough that steps are quick, for the new tasks' sake.
    """
    lengths = tuple(n for n in (*LENGTHS, *LONG_LENGTHS) if n <= longest)
    is_new = trained < LONG_LENGTHS[0]
    return Plan(
        minutes,
        adam_rate=5e-4,
        muon_rate=1.5e-3,
        warm_up=100,
        batch_tokens=batch_tokens,
        decay=0.5,
        lengths=lengths,
        first=lengths.index(1024) if is_new else len([n for n in lengths if n <= trained]) - 1,
        leave=0.08 if is_new else 0.0,
        latest=0.4,
        gates=(*GATES, "twohop"),  # of a long answer that is all masks no model is sure at once
        shortest=200,
        check=50,
        chunk=1,
        recall=0.15,
        recall_apart=True,
        long_answers=True,
        mantissa=4,
    )
