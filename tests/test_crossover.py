# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""From which length on requests run sparse, by device."""

import crossover as benchmark
import pytest

from sparsed_vllm.crossover import MEASURED, UNMEASURED, crossover_on


def test_the_lengths_are_what_the_results_say():
    measured = benchmark.by_device()
    assert {crossover_on(device)[0] for device in measured} == set(measured.values())
    for part in MEASURED:
        assert [device for device in measured if part in device], f"{part} was never measured"


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe"])
def test_a_measured_device_has_its_own_length(device):
    length, reason = crossover_on(device)
    assert length == MEASURED["H100"]
    assert "measured on an H100" in reason


def test_any_other_device_has_the_default_and_the_reason_names_it():
    length, reason = crossover_on("NVIDIA B200")
    assert length == UNMEASURED
    assert "B200" in reason


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({1024: 1.0, 4096: 1.2}, 2048),
        ({1024: 1.3, 4096: 1.4}, 1024),
        ({1024: 0.5, 4096: 1.05}, float("inf")),
        ({1024: 1.0, 2048: 1.1, 4096: 1.5}, 2048),
    ],
    ids=str,
)
def test_a_crossover_lies_where_sparse_steps_become_a_tenth_faster(ratios, expected):
    steps = {tokens: {"dense": ratio, "sparse": 1.0} for tokens, ratio in ratios.items()}
    assert benchmark.crossover(steps) == pytest.approx(expected)
