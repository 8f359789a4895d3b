# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""A scaling of the rotary embedding is one that vLLM computes, key by key, or refused."""

import pytest

from sparsed_vllm.models.rotary import one_rotary, standard_rotary

YARN = {"type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {"rope_type": "default"}),
        ({}, {"rope_type": "default"}),
        ({"type": "default", "factor": 1.0}, {"rope_type": "default"}),
        ({"type": "linear", "factor": 2}, {"rope_type": "linear", "factor": 2}),
        ({"rope_type": "dynamic", "alpha": 8.0}, {"rope_type": "dynamic", "alpha": 8.0}),
        ({**YARN, "beta_fast": None}, {"rope_type": "yarn", "factor": 4.0}),
        ({"full_attention": {"rope_theta": 5e5}}, {"rope_type": "default", "rope_theta": 5e5}),
    ],
    ids=str,
)
def test_a_scaling_is_known_by_any_of_its_names(given, expected):
    assert standard_rotary(given, 1e4) == {"rope_theta": 1e4, **expected}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"factor": 4.0}, "has factor, which a rope_type default does not use"),
        ({"type": None, "factor": 4.0}, "has factor, which a rope_type default does not use"),
        ({**YARN, "extrapolation": 3}, "has extrapolation, which a rope_type yarn does not use"),
        ({**YARN, "mrope_section": [4, 6, 6]}, "has mrope_section"),
        ({"type": "dynamic", "factor": 2.0, "alpha": 8.0}, "has factor, which"),
        (
            {"type": "linear", "rope_type": "yarn", "factor": 2.0},
            "rope_type: 'yarn' and type: 'lin",
        ),
        ({"rope_type": ["linear"], "factor": 2.0}, "rope_type must be one of default"),
        ({"rope_type": "llama3", "factor": 8.0}, "needs low_freq_factor, high_freq_factor"),
        ({**LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor must be below high_freq_factor"),
        ({**YARN, "beta_fast": "32"}, "beta_fast must be a number over 0, got '32'"),
        ({**YARN, "factor": float("nan")}, "factor must be a number over 0, got nan"),
        ({**YARN, "truncate": 0}, "truncate must be true or false"),
        ({"partial_rotary_factor": -1}, "partial_rotary_factor must be a number over 0"),
        (
            {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}},
            "has full_attention, sliding_attention: these models have layers of one kind",
        ),
    ],
    ids=str,
)
def test_what_vllm_would_leave_out_or_stumble_over_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        standard_rotary(given, 1e4)


def test_only_silence_means_the_default_base():
    assert one_rotary({}, 1e4)["rope_theta"] == 1e4
    assert one_rotary({"rope_theta": None}, 1e4)["rope_theta"] is None
    nested = {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5}}
    assert one_rotary(nested, 1e4)["rope_theta"] == 5e5
