# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Settings of vLLM that our models need, made when vLLM resolves a model's configuration."""

from vllm.config import ModelConfig, SchedulerConfig, VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.config.quantization import QuantizationConfigArgs
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from sparsed_vllm.admission import sparse_config_of
from sparsed_vllm.compat import missing_seams
from sparsed_vllm.crossover import crossover_on
from sparsed_vllm.limits import Limits

logger = init_logger("vllm.sparsed.config")

_SCHEDULER = "sparsed_vllm.scheduler.DenoisingScheduler"


class DenoisingModelConfig(VerifyAndUpdateConfig):
    """Found by vLLM under our architectures in MODELS_CONFIG_MAP."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Turn off what splits or shares a sequence, and put our scheduler in.

        Raises ValueError for settings that cannot work with these models.
        """
        if missing := missing_seams():
            raise ValueError(f"this vLLM lacks what sparsed-vllm builds on: {', '.join(missing)}")
        _refuse_unsupported(vllm_config)
        logger.info(
            "Prefix caching and chunked prefill are off: every denoising step computes a request's "
            "whole sequence anew."
        )
        vllm_config.attention_config.use_non_causal = True  # rules out backends that cannot
        vllm_config.cache_config.enable_prefix_caching = False
        if vllm_config.compilation_config.cudagraph_mode is None:
            # Full graphs are for decodes of a few tokens; no step here is one.
            vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
        _schedule_whole_sequences(vllm_config.scheduler_config, vllm_config.model_config)
        _default_to_temperature_zero(vllm_config.model_config)
        _set_default_length(vllm_config)
        if sparse_config_of(vllm_config) is None:
            logger.info("Sparse attention is off: it needs --attention-backend sparsed.")
        else:
            _settle_min_length(vllm_config)


def _settle_min_length(vllm_config: VllmConfig) -> None:
    """Write the length from which requests run sparse into the settings, unless it is there.

    Once, here: all processes of the engine read it, and some may see another device or none.
    """
    given = vllm_config.additional_config
    settings = given.get("sparsed", {}) if isinstance(given, dict) else {}
    length, reason = crossover_on(current_platform.get_device_name())
    if "min_length" in settings:
        length, reason = settings["min_length"], "as sparsed.min_length says"
    elif isinstance(given, dict):
        vllm_config.additional_config = {**given, "sparsed": {**settings, "min_length": length}}
    logger.info("Requests of %d tokens or more run sparse, if they do not say: %s.", length, reason)


def _refuse_unsupported(vllm_config: VllmConfig) -> None:
    model = vllm_config.model_config
    parallel = vllm_config.parallel_config
    refused = {
        "the V1 model runner": (
            not vllm_config.use_v2_model_runner,
            "unset VLLM_USE_V2_MODEL_RUNNER and install Triton",
        ),
        "--pipeline-parallel-size > 1": (
            parallel.pipeline_parallel_size > 1,
            "use --tensor-parallel-size",
        ),
        "--speculative-config": (
            vllm_config.speculative_config is not None,
            "a step already fills many places; leave it out",
        ),
        "--kv-transfer-config": (
            vllm_config.kv_transfer_config is not None,
            "keys and values change at every step; leave it out",
        ),
        "--kv-offloading-size": (
            vllm_config.cache_config.kv_offloading_size is not None,
            "keys and values change at every step; leave it out",
        ),
        "--decode-context-parallel-size > 1": (
            parallel.decode_context_parallel_size > 1,
            "use --tensor-parallel-size",
        ),
        "--prefill-context-parallel-size > 1": (
            parallel.prefill_context_parallel_size > 1,
            "use --tensor-parallel-size",
        ),
        "--enable-lora": (
            vllm_config.lora_config is not None,
            "merge the adapter into the checkpoint",
        ),
        "--runner pooling": (
            model.runner_type != "generate",
            "they generate text only; leave it out, and --convert too",
        ),
        "--diffusion-config": (
            vllm_config.diffusion_config is not None,
            "each request names its max_tokens and steps; leave it out",
        ),
        "--logits-processors": (
            bool(model.logits_processors),
            "a place is filled from the model's own logits; leave it out",
        ),
        "--watermark-config": (
            vllm_config.watermark_config is not None,
            "a watermark is written left to right, places are not filled so; leave it out",
        ),
        f"--logprobs-mode {model.logprobs_mode}": (
            model.logprobs_mode != "raw_logprobs",
            "probabilities are the model's own; leave it out",
        ),
        "--enable-dbo": (parallel.enable_dbo, "leave it out"),
        f"--quantization {model.quantization} on a CPU": (
            _lacks_kernel(model),
            "vLLM's CPU build cannot scale by tensor; use fp8_per_channel",
        ),
        f"--quantization {model.quantization}": (
            _quantizes_experts_only(model),
            "it quantizes experts, which they have none of; use fp8_per_channel",
        ),
        "--return-sampling-mask": (
            model.return_sampling_mask,
            "a place is filled from all tokens; leave it out",
        ),
    }
    for setting, (is_set, remedy) in refused.items():
        if is_set:
            raise ValueError(f"Diffusion language models do not run with {setting}: {remedy}.")


def _lacks_kernel(model: ModelConfig) -> bool:
    """Whether vLLM would fail to quantize the weights, late and by a kernel's name."""
    is_online = getattr(model.hf_config, "quantization_config", None) is None
    scales_by_tensor = model.quantization in ("fp8", "fp8_per_tensor")
    return current_platform.is_cpu() and is_online and scales_by_tensor


def _quantizes_experts_only(model: ModelConfig) -> bool:
    """Whether a scheme for a mixture of experts would leave all weights as they are."""
    asked = model.quantization_config
    if not isinstance(asked, QuantizationConfigArgs):
        return False
    return asked.moe is not None and asked.linear is None and not asked.targets


def _schedule_whole_sequences(scheduler: SchedulerConfig, model: ModelConfig) -> None:
    scheduler.enable_chunked_prefill = False
    scheduler.long_prefill_token_threshold = 0
    if scheduler.scheduler_cls not in (None, _SCHEDULER):
        logger.warning("%s replaces the scheduler %s.", _SCHEDULER, scheduler.scheduler_cls)
    scheduler.scheduler_cls = _SCHEDULER
    for budget in ("max_num_batched_tokens", "max_num_scheduled_tokens"):
        tokens = getattr(scheduler, budget)
        if tokens is not None and tokens < model.max_model_len:
            logger.info(
                "Raising %s from %d to max_model_len %d: a denoising step runs a request's "
                "whole sequence.",
                budget,
                tokens,
                model.max_model_len,
            )
            setattr(scheduler, budget, model.max_model_len)


def _default_to_temperature_zero(model: ModelConfig) -> None:
    """What a request that names no temperature gets; OpenAI's 1.0 is wrong for these models."""
    if model.generation_config == "vllm":
        return  # The user asked for vLLM's own defaults.
    if "temperature" not in model.try_get_generation_config():
        model.override_generation_config.setdefault("temperature", 0.0)


def _set_default_length(vllm_config: VllmConfig) -> None:
    """What a request that names no length gets; patches/default_length.py hands it out."""
    model = vllm_config.model_config
    limits = Limits.of(vllm_config.additional_config)
    checkpoint_s = model.get_diff_sampling_param().get("max_tokens")
    model.hf_config.default_max_tokens = limits.default_length(checkpoint_s)
