# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Changes to vLLM itself, each where it offers no seam: one file each, listed in inventory."""
