# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The models this plugin serves, one entry each, and those that it refuses by name."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from sparsed_vllm.families import DREAM, LLADA, Family


@dataclass(frozen=True)
class ModelSpec:
    """Where to find a model's parts.

    architecture: the name in a checkpoint's `architectures`
    config: class that reads its config.json, with the authors' keys and their defaults
    network: class of the network, which knows the checkpoint's tensor names
    family: how its authors decode, and whether logits are shifted by a place
    mask_token_id: the mask where config.json names none
    tokenizer: class under the name that tokenizer_config.json asks for, if transformers lacks it
    """

    architecture: str
    config: str
    network: str
    family: Family
    mask_token_id: int
    tokenizer: str | None = None


_HERE = "sparsed_vllm.models"

SPECS = (
    ModelSpec(
        "LLaDAModelLM",  # GSAI-ML/LLaDA-8B-*, LLaDA-1.5, UltraLLaDA, d3LLM-LLaDA
        config=f"{_HERE}.llada_config:LLaDAConfig",
        network=f"{_HERE}.llada:LLaDAModelLM",
        family=LLADA,
        mask_token_id=126336,
    ),
    ModelSpec(
        "ILLaDAForCausalLM",  # GSAI-ML/iLLaDA-8B-*
        config=f"{_HERE}.illada_config:ILLaDAConfig",
        network=f"{_HERE}.qwen_names:QwenNamed",
        family=LLADA,
        mask_token_id=5,  # in no file: the authors' README
    ),
    ModelSpec(
        "LLaDAMoEModelLM",  # inclusionAI/LLaDA-MoE-7B-A1B-*
        config=f"{_HERE}.llada_moe_config:LLaDAMoEConfig",
        network=f"{_HERE}.llada_moe:LLaDAMoEModelLM",
        family=LLADA,
        mask_token_id=156895,  # in no file: the model card
    ),
    ModelSpec(
        "DreamModel",  # Dream-org/Dream-v0-*, Dream-Coder, DiffuCoder, d3LLM-Dream
        config=f"{_HERE}.dream_config:DreamConfig",
        network=f"{_HERE}.qwen_names:QwenNamed",
        family=DREAM,
        mask_token_id=151666,
        tokenizer=f"{_HERE}.tokenizer:DreamTokenizer",
    ),
)

MODELS = {spec.architecture: spec for spec in SPECS}
"""Entry by architecture."""


@dataclass(frozen=True)
class Foreign:
    """A diffusion language model that is not served here.

    architecture, model_type: the names in its config.json
    what: what it is, and why that is not what this plugin computes
    instead: who serves it
    """

    architecture: str
    model_type: str
    what: str
    instead: str

    def refusal(self) -> str:
        return f"{self.architecture} is not served by sparsed-vllm: {self.what}. {self.instead}"


_BLOCKS = "it denoises block after block over cached keys, and no place sees a later block"
_IMAGES = "it reads or draws images, and only text is served here"

FOREIGN = {
    foreign.architecture: foreign
    for foreign in (
        Foreign(
            "DreamForCausalLM",
            "Dream",
            f"Dream-Reasoner's logits are not shifted and {_BLOCKS}",
            "Use its authors' code, or for this plugin Dream-v0-Instruct-7B (DreamModel).",
        ),
        Foreign(
            "LLaDA2MoeModelLM",
            "llada2_moe",
            f"LLaDA 2 is another network than LLaDA's, and {_BLOCKS}",
            "Use SGLang or its authors' dInfer.",
        ),
        Foreign("SDARForCausalLM", "sdar", _BLOCKS, "Use SGLang or LMDeploy."),
        Foreign("SDARMoeForCausalLM", "sdar_moe", _BLOCKS, "Use SGLang or LMDeploy."),
        Foreign(
            "Fast_dLLM_QwenForCausalLM",
            "Fast_dLLM_Qwen",
            _BLOCKS,
            "Use SGLang or its authors' code.",
        ),
        Foreign("LlavaLLaDAModelLM", "llava_llada", _IMAGES, "Use its authors' code."),
        Foreign("MMadaModelLM", "mmada", _IMAGES, "Use its authors' code."),
    )
}
"""What calls itself LLaDA, Dream or a diffusion model and is refused by name, by architecture."""


def find_class(path: str) -> Any:
    """The class at "module:name"."""
    module, name = path.split(":")
    return getattr(import_module(module), name)
