# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""An engine's settings for reuse, what requests make of them, and the rows that steps compute."""

import math

import pytest

from sparsed_vllm.config import Sparsity
from sparsed_vllm.params import BadRequest, DenoisingParams
from sparsed_vllm.reuse import REQUEST_FIELDS, Reuse, ReuseConfig, choose_reuse
from sparsed_vllm.steps import Cursor, Phase, Plan, Source

DEFAULTS = ReuseConfig()
MAY_REUSE = ReuseConfig(by_default=False)


@pytest.mark.parametrize("additional", [{}, None, {"other": 1}, {"sparsed": {}}], ids=str)
def test_without_the_section_there_is_no_reuse(additional):
    assert ReuseConfig.of(additional) is None


def test_one_word_switches_reuse_on_for_all():
    assert ReuseConfig.of({"reuse": "selective"}) == DEFAULTS == ReuseConfig.of({"reuse": {}})
    assert choose_reuse(DEFAULTS, {}, 16) == Reuse(0.02, every=2)


def test_with_a_threshold_every_step_computes_prompt_tokens_unless_it_is_told():
    assert choose_reuse(DEFAULTS, {}, 16, by_threshold=True) == Reuse(0.02, every=1)
    assert choose_reuse(DEFAULTS, {"kv_every": 3}, 16, by_threshold=True).every == 3
    assert choose_reuse(ReuseConfig(every=4), {}, 16, by_threshold=True).every == 4


def test_an_engine_sets_its_own_defaults():
    given = {"share": 0.1, "every": 2, "refresh": 8, "choice": "match", "by_default": 0}
    config = ReuseConfig.of({"reuse": given})
    assert config == ReuseConfig(0.1, 2, 8, "match", by_default=False)
    assert choose_reuse(config, {}, 16) is None
    assert choose_reuse(config, {"kv_reuse": 1}, 16) == Reuse(0.1, 2, 8, "match")


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("share", -0.01, "a number in [0, 1]"),
        ("share", 1.01, "a number in [0, 1]"),
        ("share", math.nan, "a number in [0, 1]"),
        ("share", "0.02", "a number in [0, 1]"),
        ("share", True, "a number in [0, 1]"),
        ("every", 0, "an integer of at least 1"),
        ("every", 1.5, "an integer of at least 1"),
        ("refresh", 0, "an integer of at least 1"),
        ("refresh", -4, "an integer of at least 1"),
        ("by_default", 2, "0 or 1"),
        ("choice", "mass", "one of attention, match, both"),
        ("keep", 0.3, "absent; the keys are share, every, refresh, choice, layers, by_default"),
    ],
)
def test_bad_settings_are_refused_by_name(key, value, allowed):
    with pytest.raises(BadRequest) as refused:
        ReuseConfig.of({"reuse": {key: value}})
    assert refused.value.field == f"reuse.{key}"
    assert allowed in str(refused.value)
    assert repr(value) in str(refused.value)


@pytest.mark.parametrize("given", ["Selective", "", True, 0, None, 0.02, ["share"]], ids=repr)
def test_settings_are_the_word_or_a_mapping(given):
    with pytest.raises(BadRequest, match='reuse must be "selective" or a mapping') as refused:
        ReuseConfig.of({"reuse": given})
    assert "share, every, refresh, choice, layers, by_default" in str(refused.value)


def test_a_request_has_its_own_settings():
    given = {"kv_share": 0, "kv_every": 3, "kv_refresh": 4, "kv_choice": "both"}
    for config in (DEFAULTS, MAY_REUSE):
        assert choose_reuse(config, given, 16) == Reuse(0, 3, 4, "both")
        assert choose_reuse(config, {**given, "kv_reuse": 0}, 16) is None


def test_a_request_that_sets_one_takes_the_others_from_the_engine():
    config = ReuseConfig(0.1, 2, 8, by_default=False)
    assert choose_reuse(config, {"kv_refresh": 4}, 16) == Reuse(0.1, 2, 4)
    assert choose_reuse(config, {"kv_share": 0.5}, 16) == Reuse(0.5, 2, 8)


@pytest.mark.parametrize("given", [{"kv_share": 1}, {"kv_refresh": 1}, {"kv_share": 1.0}], ids=str)
def test_what_computes_every_token_in_every_step_is_exact(given):
    assert choose_reuse(DEFAULTS, given, 16) is None
    assert choose_reuse(DEFAULTS, {**given, "kv_reuse": 1}, 16) is None


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("kv_share", -0.01, "a number in [0, 1]"),
        ("kv_share", 1.01, "a number in [0, 1]"),
        ("kv_share", math.nan, "a number in [0, 1]"),
        ("kv_share", math.inf, "a number in [0, 1]"),
        ("kv_share", "x", "a number in [0, 1]"),
        ("kv_share", None, "a number in [0, 1]"),
        ("kv_every", 0, "an integer of at least 1"),
        ("kv_every", 17, "an integer in [1, 16]"),
        ("kv_every", 1.5, "an integer of at least 1"),
        ("kv_refresh", 0, "an integer of at least 1"),
        ("kv_refresh", 17, "an integer in [1, 16]"),
        ("kv_refresh", 10**400, "an integer"),
        ("kv_choice", "mass", "one of attention, match, both"),
        ("kv_choice", 1, "one of attention, match, both"),
        ("kv_reuse", 2, "0 or 1"),
        ("kv_reuse", "on", "0 or 1"),
    ],
)
@pytest.mark.parametrize("rest", [{}, {"kv_reuse": 0}], ids=str)
def test_a_request_s_bad_settings_are_refused_by_name(name, value, allowed, rest):
    with pytest.raises(BadRequest) as refused:
        choose_reuse(DEFAULTS, {**rest, name: value}, 16)
    assert refused.value.field == name
    assert allowed in str(refused.value)
    assert len(str(refused.value)) < 2000


@pytest.mark.parametrize("name", REQUEST_FIELDS)
def test_an_engine_without_reuse_refuses_it_and_says_how_to_start_one(name):
    with pytest.raises(BadRequest) as refused:
        choose_reuse(None, {name: "match" if name == "kv_choice" else 1}, 16)
    assert refused.value.field == name
    assert '--additional-config \'{"reuse": "selective"}\'' in str(refused.value)


def test_an_engine_without_reuse_serves_those_who_do_not_want_it():
    assert choose_reuse(None, {}, 16) is None
    assert choose_reuse(None, {"kv_reuse": 0}, 16) is None
    assert choose_reuse(None, {"kv_reuse": 0, "kv_share": 0.1}, 16) is None


def plan_of(reuse, num_tokens=32, steps=16, block_length=32, prompt_len=100, **rest):
    sparsity, shift = rest.pop("sparsity", None), rest.pop("shift", 0)
    policy = rest.pop("policy", "low_confidence")
    params = DenoisingParams(num_tokens, steps, block_length, policy, **rest)
    return Plan(params, sparsity, prompt_len, reuse, shift)


def rows_of(plan):
    """[num_steps] (first_row, num_chosen, num_rows) of light steps, None of whole ones."""
    steps = [plan.rows_at(step) for step in range(plan.num_steps)]
    assert all(
        rows == (Source.FRESH, 0, 0, plan.length) or rows[0] is Source.PAGES for rows in steps
    )
    return [rows[1:] if rows[0] is Source.PAGES else None for rows in steps]


def test_without_reuse_every_step_computes_all_tokens():
    assert rows_of(plan_of(None)) == [None] * 16


def test_the_first_step_computes_all_tokens_and_others_the_canvas_and_a_share_of_the_context():
    assert rows_of(plan_of(Reuse(0.02))) == [None] + [(100, 2, 34)] * 15
    assert rows_of(plan_of(Reuse(0))) == [None] + [(100, 0, 32)] * 15


@pytest.mark.parametrize(
    ("share", "chosen"), [(0.001, 1), (0.02, 2), (0.021, 3), (0.5, 50), (0.9999, 100)]
)
def test_a_share_is_rounded_up(share, chosen):
    assert plan_of(Reuse(share)).rows_at(1)[2] == chosen


def test_dream_computes_the_row_before_its_canvas_too():
    assert rows_of(plan_of(Reuse(0.1), shift=1))[1] == (99, 10, 43)


def test_a_prompt_of_one_token_leaves_dream_no_context():
    assert rows_of(plan_of(Reuse(0.9), prompt_len=1, shift=1))[1] == (0, 0, 33)


def test_chosen_tokens_are_computed_in_every_nth_step_only():
    chosen = [rows and rows[1] for rows in rows_of(plan_of(Reuse(0.1, every=3), steps=8))]
    assert chosen == [None, 0, 0, 10, 0, 0, 10, 0]


def test_all_tokens_are_computed_every_so_many_steps():
    rows = rows_of(plan_of(Reuse(0.1, refresh=4), steps=10))
    assert [step for step, light in enumerate(rows) if light is None] == [0, 4, 8]


def test_a_block_that_the_step_before_finished_is_computed_once_more():
    rows = rows_of(plan_of(Reuse(0.1), steps=8, block_length=8))
    assert [light and light[0] for light in rows] == [None, 100, 100, 108, 108, 116, 116, 124]
    # What is behind the prompt counts as context once it is before the current block.
    assert [light and light[1] for light in rows] == [None, 10, 10, 11, 11, 12, 12, 13]
    assert [light and light[2] for light in rows] == [None, 42, 42, 35, 35, 28, 28, 21]


def test_with_a_threshold_a_block_counts_as_current_while_it_may_be():
    plan = plan_of(Reuse(0), num_tokens=8, block_length=4, threshold=0.9)
    assert [light and light[0] for light in rows_of(plan)] == [None, *[100] * 4, *[104] * 3]


@pytest.mark.parametrize(("size", "first"), [(16, 96), (32, 96), (64, 64), (128, 0)])
def test_rows_that_follow_lists_begin_with_a_block(size, first):
    plan = plan_of(Reuse(0.1), sparsity=Sparsity(0.2, 0.3, size))
    chosen = math.ceil(0.1 * first)
    assert rows_of(plan)[1] == (first, chosen, 132 - first + chosen)


def test_rows_that_follow_lists_begin_with_a_query_block():
    sparsity = Sparsity(0.2, 0.3, 16, query_block_size=64)
    assert rows_of(plan_of(Reuse(0.1), sparsity=sparsity))[1][0] == 64


def test_with_reuse_the_first_step_records_the_table():
    plan = plan_of(Reuse(0.1, refresh=4), sparsity=Sparsity(0.2, 0.3, 16))
    phases = [plan.phase_of(step) for step in range(16)]
    assert phases == [Phase.RECORDING, *[Phase.SPARSE] * 15]
    assert plan_of(Reuse(0.1), steps=1, sparsity=Sparsity(0, 0.3, 16)).recording_step is None


@pytest.mark.parametrize(
    ("again", "refresh", "recording", "whole"),
    [
        (None, 4, [0], [0, 4, 8]),
        (4, 4, [0, 4, 8], [0, 4, 8]),
        (8, 4, [0, 8], [0, 4, 8]),
        (3, None, [0, 3, 6, 9], [0, 3, 6, 9]),
        (6, 4, [0, 6], [0, 4, 6, 8]),
    ],
)
def test_a_step_that_records_again_computes_all_tokens(again, refresh, recording, whole):
    sparsity = Sparsity(0.2, 0.3, 16, refresh=again)
    plan = plan_of(Reuse(0.1, refresh=refresh), steps=10, sparsity=sparsity)
    steps = [plan.at(step) for step in range(10)]
    assert [i for i, step in enumerate(steps) if step.phase is Phase.RECORDING] == recording
    assert [i for i, step in enumerate(steps) if step.source is Source.FRESH] == whole
    assert all(step.phase is not Phase.DENSE for step in steps)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("sparsity", [None, Sparsity(0.2, 0.3, 32)], ids=str)
@pytest.mark.parametrize("reuse", [Reuse(0), Reuse(0.1, 2), Reuse(0.9999), Reuse(0.02, 1, 3)])
@pytest.mark.parametrize("style", [{}, {"block_length": 5}, {"threshold": 0.9, "block_length": 5}])
def test_a_step_computes_every_place_filled_since_it_was_last_computed(
    style, reuse, sparsity, shift
):
    """Also each place that it reads, and the row that predicts it."""
    plan = plan_of(reuse, **{"block_length": 32, **style}, sparsity=sparsity, shift=shift)
    before = None
    for step in map(plan.at, range(plan.num_steps)):
        assert step.num_rows == plan.length - step.first_row + step.num_chosen
        assert step.num_chosen <= step.first_row
        assert step.first_row <= max(0, 100 + step.block.start - shift)
        if before is not None:
            assert step.first_row <= 100 + before.block.start - shift
        before = step


def test_a_request_that_reuses_starts_over_and_no_other():
    assert plan_of(Reuse(0.1), block_length=8).resume_step(8) == 0
    assert plan_of(None, block_length=8).resume_step(8) == 4


def test_a_cursor_knows_the_rows_of_its_next_step_and_whether_it_chooses():
    cursor, rows, chooses = Cursor(plan_of(Reuse(0.1, every=2), steps=4)), [], []
    while cursor.steps_left:
        rows.append(cursor.upcoming.num_rows)
        chooses.append(cursor.chooses_next)
        assert cursor.advance().num_rows == rows[-1]
    assert rows == [132, 32, 42, 32]
    assert chooses == [False, False, True, False]
    assert not cursor.chooses_next


def test_a_step_before_one_that_chooses_by_match_alone_notes_nothing():
    for choice, notes in [("attention", True), ("both", True), ("match", False)]:
        cursor = Cursor(plan_of(Reuse(0.1, choice=choice)))
        cursor.advance()
        assert cursor.chooses_next == notes
