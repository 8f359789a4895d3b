# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""register() registers everything or nothing, and never ends vLLM."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parent / "support" / "registrations.py"


@pytest.fixture(scope="module")
def reports():
    """What came of registering in each situation of tests/support/registrations.py."""
    run = subprocess.run([sys.executable, SUPPORT], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line for line in run.stdout.splitlines() if line.startswith("{")]
    return {report["situation"]: report for report in map(json.loads, lines)}


def everything(report):
    return report["ours"] and report["patched"] and not report["errors"]


def nothing(report):
    """Neither models nor patches, one ERROR, and everybody else's models."""
    assert report["theirs"], "vLLM's own models go on"
    assert len(report["errors"]) == 1, report["errors"]
    return not report["ours"] and not report["patched"]


def test_on_a_vllm_as_it_comes_everything_is_registered_once(reports):
    assert everything(reports["untouched"])


def test_vllm_s_server_is_left_alone_until_an_operator_asks(reports):
    assert not any(report["server patched"] for report in reports.values())


def test_a_wrapper_that_keeps_the_signature_is_patched_on_top_of(reports):
    report = reports["wrapped by functools.wraps"]
    assert everything(report)
    assert report["calls"] == ["theirs"], "their wrapper is still called"


def test_a_wrapper_that_hides_the_signature_is_named_with_the_remedy(reports):
    report = reports["wrapped without functools.wraps"]
    assert nothing(report)
    (error,) = report["errors"]
    for part in ("StatLoggerManager.__init__", "another_package", "VLLM_PLUGINS"):
        assert part in error


@pytest.mark.parametrize(
    ("situation", "named"),
    [
        ("a function to patch is gone", "ModelConfig.get_diff_sampling_param"),
        ("a function to patch is no function", "ModelConfig.get_diff_sampling_param"),
        ("a seam is gone", "Scheduler._free_request"),
        ("a seam takes other parameters", "Scheduler.schedule takes (self)"),
    ],
)
def test_what_vllm_lacks_is_named_with_the_remedy(reports, situation, named):
    assert nothing(reports[situation])
    (error,) = reports[situation]["errors"]
    assert named in error
    assert "vllm>=0.32,<0.34" in error


@pytest.mark.parametrize(
    "situation",
    ["a patch raises", "a function cannot be replaced", "transformers refuses a configuration"],
)
def test_an_exception_on_the_way_takes_back_what_was_patched(reports, situation):
    assert nothing(reports[situation])
    (error,) = reports[situation]["errors"]
    assert "RuntimeError: thrown by the test" in error
