# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Registers the plugin, as vLLM does, in one process for each situation; prints what came of it."""

import functools
import json
import logging
import os
import sys
import traceback
from types import SimpleNamespace

import vllm.plugins
from vllm.config import ModelConfig
from vllm.model_executor.models import ModelRegistry
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.loggers import StatLoggerManager

from sparsed_vllm.patches import inventory

CALLS: list[str] = []


def fail(*args, **kwargs):
    raise RuntimeError("thrown by the test")


def wrapped_by_functools_wraps():
    original = ModelConfig.get_diff_sampling_param

    @functools.wraps(original)
    def theirs(self):
        CALLS.append("theirs")
        return {}

    ModelConfig.get_diff_sampling_param = theirs


def wrapped_without_functools_wraps():
    original = StatLoggerManager.__init__

    def theirs(*args, **kwargs):
        return original(*args, **kwargs)

    theirs.__module__ = "another_package"
    StatLoggerManager.__init__ = theirs


def a_seam_takes_other_parameters():
    def schedule(self):
        raise NotImplementedError

    schedule.__module__ = Scheduler.__module__  # as if vLLM had changed it
    Scheduler.schedule = schedule


def a_patch_raises():
    """The last one, when the others are in place."""
    object.__setattr__(inventory.PATCHES[-1], "wrap", fail)


def a_function_cannot_be_replaced():
    frozen = type("Frozen", (type(ModelConfig),), {"__setattr__": fail})
    sys.modules["vllm.config.model"].ModelConfig = frozen("ModelConfig", (ModelConfig,), {})


def transformers_refuses_a_configuration():
    import transformers

    transformers.AutoConfig.register = fail


SITUATIONS = {
    "untouched": lambda: None,
    "wrapped by functools.wraps": wrapped_by_functools_wraps,
    "wrapped without functools.wraps": wrapped_without_functools_wraps,
    "a function to patch is gone": lambda: delattr(ModelConfig, "get_diff_sampling_param"),
    "a function to patch is no function": lambda: setattr(
        ModelConfig, "get_diff_sampling_param", 7
    ),
    "a seam is gone": lambda: delattr(Scheduler, "_free_request"),
    "a seam takes other parameters": a_seam_takes_other_parameters,
    "a patch raises": a_patch_raises,
    "a function cannot be replaced": a_function_cannot_be_replaced,
    "transformers refuses a configuration": transformers_refuses_a_configuration,
}


def is_patched(target: str) -> bool:
    module, _, path = target.partition(":")
    found = sys.modules.get(module)
    for name in path.split("."):
        found = getattr(found, name, None)
    return hasattr(found, "__unpatched__")


def report(situation: str) -> dict[str, object]:
    """What holds after vLLM loaded its plugins twice."""
    errors: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: errors.append(record.getMessage())
    logging.getLogger("vllm.sparsed.plugin").addHandler(handler)
    SITUATIONS[situation]()
    for _ in range(2):
        vllm.plugins.plugins_loaded = False
        vllm.plugins.load_general_plugins()
    patched = {is_patched(patch.target) for patch in inventory.PATCHES}
    servers_patched = any(is_patched(patch.target) for patch in inventory.SERVER_PATCHES)
    if situation.startswith("wrapped by"):
        model = SimpleNamespace(hf_config=None, generation_config="auto")
        ModelConfig.get_diff_sampling_param(model)
    architectures = ModelRegistry.get_supported_archs()
    return {
        "situation": situation,
        "ours": "LLaDAModelLM" in architectures and "DreamModel" in architectures,
        "theirs": "LlamaForCausalLM" in architectures,
        "patched": patched == {True} if len(patched) == 1 else "some",
        "server patched": servers_patched,
        "errors": errors,
        "calls": CALLS,
    }


def main() -> None:
    for situation in SITUATIONS:
        if (child := os.fork()) == 0:
            try:
                print(json.dumps(report(situation)), flush=True)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status != 0:
            sys.exit(f"{situation!r} ended vLLM")


if __name__ == "__main__":
    main()
