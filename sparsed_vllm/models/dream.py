# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Dream (arXiv 2508.15487) and DiffuCoder: Qwen2's network and tensor names, both ways."""

from vllm.model_executor.models.utils import WeightsMapper

from sparsed_vllm.models.network import STACKED, MaskPredictor


class DreamModel(MaskPredictor):
    """A place's hidden state predicts the token of the next place (Family.shifts_logits)."""

    hf_to_vllm_mapper = WeightsMapper(orig_to_new_stacked=STACKED)
