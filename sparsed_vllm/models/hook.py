# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Settings of vLLM that our models need, made when vLLM resolves a model's configuration."""

from vllm import envs
from vllm.config import ModelConfig, SchedulerConfig, VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.config.quantization import QuantizationConfigArgs
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from sparsed_vllm.admission import reuse_config_of, sparse_config_of
from sparsed_vllm.config import CROSSOVER, SparseConfig
from sparsed_vllm.kernels.layout import PAGE
from sparsed_vllm.limits import wants_early_errors
from sparsed_vllm.models.config_check import check_config, check_sharing
from sparsed_vllm.models.defaults import settle_defaults
from sparsed_vllm.patches.apply import apply_all
from sparsed_vllm.patches.inventory import SERVER_PATCHES
from sparsed_vllm.reuse import ReuseConfig

logger = init_logger("vllm.sparsed.config")

_SCHEDULER = "sparsed_vllm.scheduler.DenoisingScheduler"


class DenoisingModelConfig(VerifyAndUpdateConfig):
    """Found by vLLM under our architectures in MODELS_CONFIG_MAP."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Turn off what splits or shares a sequence, and put our scheduler in.

        Raises ValueError for settings that cannot work with these models.
        """
        check_config(vllm_config.model_config)
        ranks = vllm_config.parallel_config.tensor_parallel_size
        check_sharing(vllm_config.model_config.hf_config, ranks)
        _refuse_unsupported(vllm_config)
        if wants_early_errors(vllm_config):
            apply_all(SERVER_PATCHES)
        logger.info("Prefix caching and chunked prefill are off: a step never splits a sequence.")
        if reuse := reuse_config_of(vllm_config):
            logger.info("Requests may reuse keys and values between steps: %s.", reuse)
        vllm_config.attention_config.use_non_causal = True  # rules out backends that cannot
        vllm_config.cache_config.enable_prefix_caching = False
        if vllm_config.compilation_config.cudagraph_mode is None:
            # Full graphs are for decodes of a few tokens; no step here is one.
            vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
        _schedule_whole_sequences(vllm_config.scheduler_config, vllm_config.model_config)
        settle_defaults(vllm_config)
        _log_sparsity(sparse_config_of(vllm_config))


def _log_sparsity(config: SparseConfig | None) -> None:
    """Say which requests run sparse, and why."""
    if config is None:
        logger.info("Sparse attention is off: it needs --attention-backend sparsed.")
        return
    reason = "where sparse steps become a tenth faster on an H100"
    if config.min_length != CROSSOVER:
        reason = "as sparsed.min_length says"
    elif "H100" not in (device := current_platform.get_device_name()):
        reason = f"the length measured on an H100; {device} was not measured"
    logger.info(
        "Requests of %d tokens or more run sparse unless they set use_sparsed: %s.",
        config.min_length,
        reason,
    )


def _refuse_unsupported(vllm_config: VllmConfig) -> None:
    model = vllm_config.model_config
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    is_sparse = sparse_config_of(vllm_config) is not None
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
        f"reuse of keys and values on {vllm_config.attention_config.backend}": (
            not is_sparse and ReuseConfig.of(vllm_config.additional_config) is not None,
            "serve with --attention-backend sparsed, or leave reuse out of --additional-config",
        ),
        f"--kv-cache-dtype {cache.cache_dtype}": (
            is_sparse and cache.cache_dtype not in ("auto", str(model.dtype).split(".")[-1]),
            "pages hold keys and values as the model computes them, or none; leave it out",
        ),
        f"--block-size {cache.block_size}": (
            is_sparse and cache.user_specified_block_size and cache.block_size % PAGE != 0,
            f"a page owns the block tables of {PAGE} tokens; leave it out",
        ),
        "--enable-expert-parallel": (
            parallel.enable_expert_parallel,
            "use --tensor-parallel-size, which shares out every layer's experts",
        ),
        "VLLM_USE_LAYERNAME=0 and experts": (
            not getattr(envs, "VLLM_USE_LAYERNAME", True) and bool(model.hf_config.experts),
            "vLLM then counts calls to find a layer's experts, and CUDA graphs make none; unset it",
        ),
        "--data-parallel-size > 1 and experts": (
            parallel.data_parallel_size > 1 and bool(model.hf_config.experts),
            "ranks would exchange tokens in a last layer that each runs for rows of its own; "
            "start servers of their own",
        ),
        f"--quantization {model.quantization} on a CPU": (
            _lacks_kernel(model),
            "vLLM's CPU build cannot scale by tensor; use fp8_per_channel",
        ),
        f"--quantization {model.quantization}": (
            _quantizes_experts_only(model) and not model.hf_config.experts,
            "it quantizes experts, which this model has none of; use fp8_per_channel",
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
