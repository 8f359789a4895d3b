# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The driver half of the backend: one device, the CPU, always active."""

import time
from collections.abc import Callable, Sequence

from triton.backends import compiler, driver


class CPUDriver(driver.DriverBase):
    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("The cpu stub compiles nothing: leave TRITON_INTERPRET at 1.")

    def get_current_target(self) -> compiler.GPUTarget:
        return compiler.GPUTarget("cpu", "interpreted", 1)

    def get_active_torch_device(self) -> object:
        import torch

        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., Sequence[float]]:
        return _milliseconds


def _milliseconds(kernel_call: Callable, *, quantiles: Sequence[float], **kwargs: object) -> list:
    """One run stands for every quantile: a kernel's time in the interpreter means nothing."""
    start = time.perf_counter()
    kernel_call()
    return [1e3 * (time.perf_counter() - start)] * len(quantiles)
