# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Dream's tokenizer, which its checkpoints keep as vocab.json and merges.txt."""

from transformers import Qwen2Tokenizer


class DreamTokenizer(Qwen2Tokenizer):
    """Qwen2's, under the name that tokenizer_config.json asks for."""
