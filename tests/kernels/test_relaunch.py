# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Launching again: the first time Triton finds the code, later the code itself is launched."""

import pytest

relaunch = pytest.importorskip("sparsed_vllm.kernels.relaunch")


class Kernel:
    """Launched as Triton's are, by `kernel[grid](...)`; notes what it is given."""

    def __init__(self, compiled=None):
        self.compiled = compiled
        self.launches = []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.launches.append((grid, args, options))
            return self.compiled

        return launch


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(relaunch, "_compiled", {})


def test_a_variant_is_looked_up_once_and_gets_every_argument_each_time():
    compiled = Kernel()
    kernel = Kernel(compiled)
    for grid in (3, 1, 1), (5, 1, 1):
        relaunch.relaunch(kernel, grid, "bfloat16", grid[0], None)
    assert kernel.launches == [((3, 1, 1), (3, None), {"num_warps": 4})]
    assert compiled.launches == [((5, 1, 1), (5, None), {})]


def test_another_variant_is_looked_up_anew():
    kernel = Kernel(Kernel())
    for variant in ("bfloat16", "float16"):
        relaunch.relaunch(kernel, (1, 1, 1), variant)
    assert len(kernel.launches) == 2 and kernel.compiled.launches == []


def test_a_kernel_has_the_warps_it_asks_for():
    kernel = Kernel()
    relaunch.relaunch(kernel, (1, 1, 1), "bfloat16", num_warps=8)
    assert kernel.launches == [((1, 1, 1), (), {"num_warps": 8})]
