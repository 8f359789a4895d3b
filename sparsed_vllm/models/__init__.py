# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The models this plugin serves, by the name in a checkpoint's `architectures`."""

ARCHITECTURES = {
    "LLaDAModelLM": "sparsed_vllm.models.llada:LLaDAModelLM",
    "DreamModel": "sparsed_vllm.models.dream:DreamModel",
}
