# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""LLaDA-MoE-7B-A1B: the checkpoints' tensor names."""

from vllm.model_executor.models.utils import WeightsMapper

from sparsed_vllm.models.network import QKV, MaskPredictor


class LLaDAMoEModelLM(MaskPredictor):
    """Experts keep their names: vLLM's layer knows gate_proj, up_proj and down_proj itself."""

    hf_to_vllm_mapper = WeightsMapper(orig_to_new_stacked=QKV)
