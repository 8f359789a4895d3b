# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""All patches in force. `python -m sparsed_vllm.patches.inventory` prints them for the README."""

from sparsed_vllm.patches import (
    default_length,
    denoising_metrics,
    draining,
    early_refusal,
    early_response,
    request_check,
)

PATCHES = (
    request_check.PATCH,
    early_refusal.PATCH,
    early_response.PATCH,
    draining.PATCH,
    denoising_metrics.PATCH,
    default_length.PATCH,
)


def as_table() -> str:
    """The patches as a Markdown table."""
    rows = ["| target | because | drop when |", "|---|---|---|"]
    rows += [f"| `{patch.target}` | {patch.because} | {patch.drop_when} |" for patch in PATCHES]
    return "\n".join(rows)


if __name__ == "__main__":
    print(as_table())
