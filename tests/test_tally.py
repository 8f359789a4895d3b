# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What the scheduler counts of its requests."""

import pytest

from sparsed_vllm.config import SparseConfig, Sparsity, reason_for
from sparsed_vllm.params import DenoisingParams
from sparsed_vllm.reuse import Reuse
from sparsed_vllm.steps import Plan
from sparsed_vllm.tally import Progress, TableCount, Tally

SPARSE = Sparsity(skip=0.2, select=0.3, block_size=16)
TABLE = TableCount(kept=30, possible=100, num_bytes=500)


def progress_of(sparsity=SPARSE, steps=10, num_tokens=20, reason="request", reuse=None, **params):
    block_length = params.pop("block_length", num_tokens)
    request = DenoisingParams(num_tokens, steps, block_length, "low_confidence", **params)
    return Progress.of(Plan(request, sparsity, prompt_len=9, reuse=reuse), reason)


def take_all(progress, tally):
    while progress.steps_left:
        tally.take_step(progress)


def test_steps_are_counted_by_phase():
    tally = Tally()
    take_all(progress_of(), tally)
    take_all(progress_of(sparsity=None, block_length=10), tally)
    assert tally.take() == {
        "denoising_steps": 20,
        "canvas_positions": 10 * 20 + 10 * 10,
        "steps/dense": 3 + 10,
        "steps/recording": 1,
        "steps/sparse": 6,
        "steps_by_source/fresh": 20,
        "computed_rows": 20 * 29,
        "possible_rows": 20 * 29,
        "chosen_tokens": 0,
        "passes": 20,
    }


def test_tables_that_are_recorded_again_are_counted_again_and_the_last_is_the_request_s():
    progress, tally = progress_of(Sparsity(0.2, 0.3, 16, refresh=3)), Tally()
    take_all(progress, tally)
    for kept in (30, 20):
        table = TABLE._replace(kept=kept)
        tally.record(table)
        progress.note_table(table)
    counts = tally.take()
    assert (counts["steps/dense"], counts["steps/recording"], counts["steps/sparse"]) == (3, 3, 4)
    assert (counts["tables"], counts["kept_blocks"], counts["possible_blocks"]) == (2, 50, 200)
    assert progress.summary()["density"] == "0.2000"


def test_light_steps_count_the_rows_that_they_compute():
    tally = Tally()
    progress = progress_of(None, reuse=Reuse(share=0.3, every=2, refresh=5))
    tally.admit(progress)
    take_all(progress, tally)
    counts = tally.take()
    assert counts["requests_by_reuse/on"] == 1
    assert (counts["steps_by_source/fresh"], counts["steps_by_source/pages"]) == (2, 8)
    # Whole at steps 0 and 5; 3 of 9 prompt tokens at steps 2, 4, 6 and 8.
    rows = 2 * 29 + 8 * 20 + 4 * 3
    assert (counts["computed_rows"], counts["possible_rows"]) == (rows, 10 * 29)
    assert counts["chosen_tokens"] == 4 * 3
    assert counts["passes"] == pytest.approx(rows / 29)
    summary = progress.summary()
    assert (summary["steps_light"], summary["rows"], summary["chosen"]) == (8, rows, 12)
    assert (summary["passes"], summary["reuse"]) == (f"{rows / 29:.2f}", "on")


def test_what_was_taken_counts_from_zero_again():
    tally = Tally()
    tally.take_step(progress_of())
    tally.take()
    assert tally.take() == {}


def test_steps_taken_again_after_a_preemption_are_counted_again():
    progress, tally = progress_of(), Tally()
    for _ in range(7):
        tally.take_step(progress)
    progress.note_table(TABLE)
    progress.start()
    assert progress.table is None
    take_all(progress, tally)
    assert tally.take()["denoising_steps"] == 7 + 10
    assert progress.steps == {"dense": 6, "recording": 2, "sparse": 3 + 6}


def test_a_dense_request_goes_on_where_it_handed_out_a_block():
    progress, tally = progress_of(sparsity=None, block_length=10), Tally()
    for _ in range(6):
        tally.take_step(progress)
    tally.hand_out(progress, 10)
    progress.start()
    assert progress.cursor.step == 5


def test_a_table_from_before_a_preemption_is_not_the_request_s():
    progress, tally = progress_of(), Tally()
    progress.start()
    tally.take_step(progress)
    progress.note_table(TABLE)
    assert progress.table is None


@pytest.mark.parametrize(
    ("config", "extra", "sparsity", "steps", "expected"),
    [
        (SparseConfig(), {}, None, 10, "dense/length"),
        (SparseConfig(), {}, SPARSE, 10, "sparse/length"),
        (SparseConfig(), {"use_sparsed": 1}, SPARSE, 10, "sparse/request"),
        (SparseConfig(), {"use_sparsed": 0}, None, 10, "dense/request"),
        (SparseConfig(), {"use_sparsed": 1}, SPARSE, 1, "dense/steps"),
        (None, {}, None, 10, "dense/backend"),
    ],
)
def test_every_request_has_a_reason(config, extra, sparsity, steps, expected):
    tally = Tally()
    tally.admit(progress_of(sparsity, steps, reason=reason_for(config, extra)))
    assert tally.take() == {f"requests/{expected}": 1, "requests_by_reuse/off": 1}


@pytest.mark.parametrize(("handed_out", "is_early"), [(10, 1), (20, 0)])
def test_a_stop_is_early_if_it_spares_a_block(handed_out, is_early):
    progress, tally = progress_of(block_length=10), Tally()
    tally.hand_out(progress, handed_out)
    tally.stop(progress)
    assert tally.take()["early_stops"] == is_early


def test_a_summary_names_the_density_of_a_recorded_table_only():
    progress, tally = progress_of(), Tally()
    assert "density" not in progress.summary()
    take_all(progress, tally)
    progress.note_table(TABLE)
    summary = progress.summary()
    assert (summary["density"], summary["table_bytes"]) == ("0.3000", 500)
    assert (summary["steps_dense"], summary["steps_sparse"]) == (3, 6)
