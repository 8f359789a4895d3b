# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What a training that has not ended leaves beside its checkpoint, so that it can go on."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from needle.plan import Plan, Standing

FILE = "training.json"


@dataclass(frozen=True)
class Record:
    """What it is to do, and where it stands. The weights are the checkpoint's."""

    plan: Plan
    seed: int
    standing: Standing


def save(record: Record, folder: Path) -> None:
    """Takes its place whole, as the weights do."""
    part = folder / f"{FILE}.part"
    part.write_text(json.dumps(asdict(record), indent=2) + "\n")
    os.replace(part, folder / FILE)


def load(folder: Path) -> Record | None:
    """None: there is no training to go on with."""
    if not (folder / FILE).exists():
        return None
    keys = json.loads((folder / FILE).read_text())
    plan = {k: tuple(v) if isinstance(v, list) else v for k, v in keys["plan"].items()}
    return Record(Plan(**plan), keys["seed"], Standing(**keys["standing"]))


def remove(folder: Path) -> None:
    """The training is done."""
    (folder / FILE).unlink(missing_ok=True)
