# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Turns Triton's interpreter on. Triton imports its backends before it defines its first
`@triton.jit` function, so neither the user nor a spawned engine process need set the variable."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
