# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""An engine's settings for sparse attention and what requests make of them."""

import math

import pytest

from sparsed_vllm.config import SparseConfig, Sparsity, choose_sparsity
from sparsed_vllm.params import BadRequest
from sparsed_vllm.steps import Phase, phase_of, recording_step

DEFAULTS = SparseConfig()


@pytest.mark.parametrize("additional", [{}, None, {"other": 1}, {"sparsed": {}}], ids=str)
def test_the_defaults_are_the_authors(additional):
    config = SparseConfig.of(additional)
    assert (config.skip, config.select, config.block_size) == (0.2, 0.3, 128)


def test_an_engine_sets_its_own_defaults():
    config = SparseConfig.of({"sparsed": {"skip": 0.1, "block_size": 32, "min_length": 0}})
    assert config == SparseConfig(skip=0.1, block_size=32, min_length=0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("skip", -0.1),
        ("skip", 1.01),
        ("skip", math.nan),
        ("select", 0),
        ("select", 1.5),
        ("select", "0.3"),
        ("block_size", 48),
        ("block_size", 128.0),
        ("block_size", 256),
        ("mass", 0),
        ("mass", 1),
        ("mass", math.nan),
        ("mass", "0.9"),
        ("refresh", 0),
        ("refresh", 1.5),
        ("refresh", math.nan),
        ("min_length", -1),
        ("table_ids", 0),
        ("keep", 0.3),
    ],
)
def test_bad_settings_are_refused_by_name(key, value):
    with pytest.raises(BadRequest, match=rf"sparsed\.{key} must be"):
        SparseConfig.of({"sparsed": {key: value}})


def test_settings_must_be_a_mapping():
    with pytest.raises(BadRequest, match="a mapping"):
        SparseConfig.of({"sparsed": 0.3})


def test_the_length_decides_unless_the_request_does():
    assert choose_sparsity(DEFAULTS, {}, DEFAULTS.min_length - 1) is None
    assert choose_sparsity(DEFAULTS, {}, DEFAULTS.min_length) == Sparsity(0.2, 0.3, 128)
    assert choose_sparsity(DEFAULTS, {"use_sparsed": 1}, 1) == Sparsity(0.2, 0.3, 128)
    assert choose_sparsity(DEFAULTS, {"use_sparsed": 0}, 10**6) is None


def test_a_request_has_its_own_settings():
    given = {"sparsed_skip": 0, "sparsed_select": 1, "sparsed_block_size": 16, "use_sparsed": 1}
    assert choose_sparsity(DEFAULTS, given, 1) == Sparsity(0, 1, 16)


def test_a_mass_alone_may_keep_all_blocks_and_a_number_beside_it_bounds_them():
    sparse, number = {"use_sparsed": 1, "sparsed_mass": 0.9}, {"sparsed_select": 0.4}
    by_mass = SparseConfig.of({"sparsed": {"mass": 0.95}})
    both = SparseConfig.of({"sparsed": {"mass": 0.95, "select": 0.5}})
    assert choose_sparsity(DEFAULTS, sparse, 1) == Sparsity(0.2, 1.0, 128, 0.9)
    assert choose_sparsity(DEFAULTS, sparse | number, 1) == Sparsity(0.2, 0.4, 128, 0.9)
    for config, select in ((by_mass, 1.0), (both, 0.5)):
        assert choose_sparsity(config, {"use_sparsed": 1}, 1) == Sparsity(0.2, select, 128, 0.95)
        assert choose_sparsity(config, sparse, 1) == Sparsity(0.2, 1.0, 128, 0.9)
        given = {"use_sparsed": 1, **number}
        assert choose_sparsity(config, given, 1) == Sparsity(0.2, 0.4, 128, 0.95)


def test_a_table_is_recorded_again_where_the_request_or_else_the_engine_says_so():
    again = SparseConfig.of({"sparsed": {"refresh": 8}})
    sparse = {"use_sparsed": 1}
    assert choose_sparsity(again, sparse, 1) == Sparsity(0.2, 0.3, 128, refresh=8)
    for config in (DEFAULTS, again):
        given = {**sparse, "sparsed_refresh": 5}
        assert choose_sparsity(config, given, 1) == Sparsity(0.2, 0.3, 128, refresh=5)


def test_query_blocks_may_be_larger_than_key_blocks():
    tall = SparseConfig.of({"sparsed": {"block_size": 32, "query_block_size": 128}})
    sparse = {"use_sparsed": 1}
    assert choose_sparsity(tall, sparse, 1) == Sparsity(0.2, 0.3, 32, query_block_size=128)
    own = {**sparse, "sparsed_block_size": 16}
    assert choose_sparsity(tall, own, 1) == Sparsity(0.2, 0.3, 16)
    own["sparsed_query_block_size"] = 64
    for config in (DEFAULTS, tall):
        assert choose_sparsity(config, own, 1) == Sparsity(0.2, 0.3, 16, query_block_size=64)
    assert Sparsity(0.2, 0.3, 32).tile == 32 and choose_sparsity(tall, sparse, 1).tile == 128


def test_query_blocks_of_an_engine_are_whole_key_blocks():
    allowed = r"sparsed\.query_block_size must be a multiple of sparsed\.block_size, which is 128"
    with pytest.raises(BadRequest, match=allowed):
        SparseConfig.of({"sparsed": {"query_block_size": 32}})


@pytest.mark.parametrize("config", [DEFAULTS, None], ids=["sparse", "dense"])
@pytest.mark.parametrize("own", [{"sparsed_mass": 0.9}, {"sparsed_refresh": 4}], ids=str)
def test_what_a_request_that_chooses_dense_attention_says_of_tables_is_refused(config, own):
    (name,) = own
    with pytest.raises(BadRequest, match=f"{name} must be absent when use_sparsed is 0"):
        choose_sparsity(config, {"use_sparsed": 0, **own}, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sparsed_skip", 2),
        ("sparsed_select", 0),
        ("sparsed_block_size", 8),
        ("sparsed_query_block_size", 256),
        ("sparsed_query_block_size", 64),  # of blocks of 128
        ("use_sparsed", "x"),
        ("sparsed_mass", 1),
        ("sparsed_mass", math.nan),
        ("sparsed_refresh", 0),
        ("sparsed_refresh", 2.0),
    ],
)
def test_a_request_s_bad_settings_are_refused_at_any_length(field, value):
    with pytest.raises(BadRequest, match=f"{field} must be"):
        choose_sparsity(DEFAULTS, {field: value}, 1)


def test_a_dense_backend_refuses_what_asks_for_sparsity():
    assert choose_sparsity(None, {}, 10**6) is None
    assert choose_sparsity(None, {"use_sparsed": 0}, 10**6) is None
    own = ({"sparsed_select": 0.3}, {"sparsed_mass": 0.9}, {"sparsed_refresh": 4})
    for given in ({"use_sparsed": 1}, *own):
        with pytest.raises(BadRequest, match="--attention-backend sparsed"):
            choose_sparsity(None, given, 10**6)


def test_27_of_128_steps_are_dense_and_the_last_of_them_records():
    phases = [phase_of(step, 128, 0.2) for step in range(128)]
    assert phases == [Phase.DENSE] * 26 + [Phase.RECORDING] + [Phase.SPARSE] * 101


def test_a_table_may_be_recorded_again_every_so_many_steps():
    phases = [phase_of(step, 16, 0.2, refresh=5) for step in range(16)]
    dense, recording, sparse = Phase.DENSE, Phase.RECORDING, Phase.SPARSE
    again = [recording, *[sparse] * 4]
    assert phases == [dense] * 4 + again * 2 + [recording, sparse]
    assert [phase_of(step, 16, 0.2, refresh=1) for step in range(16)] == [
        *[dense] * 4,
        *[recording] * 12,
    ]


def test_a_short_request_may_never_record():
    assert recording_step(1, 0.2) == 1
    assert phase_of(0, 1, 0.2) is Phase.DENSE
    assert recording_step(10, 1.0) > 10
