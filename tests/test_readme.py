# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What the README says of the code is what the code does."""

from pathlib import Path

from sparsed_vllm.patches.inventory import as_table

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_patches_in_force_are_in_the_readme():
    assert as_table() in README
