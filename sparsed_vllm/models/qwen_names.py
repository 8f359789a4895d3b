# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Checkpoints with Qwen2's tensor names: Dream, DiffuCoder, iLLaDA."""

from vllm.model_executor.models.utils import WeightsMapper

from sparsed_vllm.models.network import STACKED, MaskPredictor


class QwenNamed(MaskPredictor):
    """The transformer under the names that vLLM's own models have."""

    hf_to_vllm_mapper = WeightsMapper(orig_to_new_stacked=STACKED)
