# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""All patches. `python -m sparsed_vllm.patches.inventory` prints the tables of docs/patches.md."""

from collections.abc import Iterable

from sparsed_vllm.patches import (
    default_length,
    denoising_metrics,
    draining,
    early_refusal,
    early_response,
    request_check,
)
from sparsed_vllm.patches.apply import Patch

PATCHES = (request_check.PATCH, denoising_metrics.PATCH, default_length.PATCH)
"""What denoising needs; register() applies them."""

SERVER_PATCHES = (early_refusal.PATCH, early_response.PATCH, draining.PATCH)
"""What vLLM's server lacks for any model; applied where `denoising.early_errors` is set."""


def as_table(patches: Iterable[Patch]) -> str:
    """Patches as a Markdown table."""
    rows = ["| target | because | drop when |", "|---|---|---|"]
    rows += [f"| `{patch.target}` | {patch.because} | {patch.drop_when} |" for patch in patches]
    return "\n".join(rows)


if __name__ == "__main__":
    print(as_table(PATCHES), as_table(SERVER_PATCHES), sep="\n\n")
