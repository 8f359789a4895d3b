# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The bench of light steps: its cases run, and its lines count what is read and computed."""

import bench_light
import pytest
from bench_light import Case

CASE = Case("dream", 400, 150, 0.5)


@pytest.mark.parametrize("prepare", [bench_light.ours, bench_light.lists, bench_light.mass])
def test_our_kernels_take_its_cases(prepare):
    prepare(CASE)()


def test_rows_are_written_to_its_pages():
    before = CASE.halves[0].clone()
    bench_light.write(CASE)()
    assert (CASE.halves[0] != before).any(3).any(2).sum() == CASE.rows


@pytest.mark.parametrize(
    ("kernel", "num_bytes", "operations", "rows"),
    [
        ("ours/128.128.8.3.264", 400 * 4 * 128 * 4, 4 * 150 * 400 * 28 * 128, 150),
        ("mass", 400 * 4 * 128 * 2, 2 * 128 * 400 * 28 * 128, 128),
        ("write", 150 * 4 * 128 * 8, 0, 150),
        ("lists", 2 * 28 * 2 * 128 * 128 * 4, 4 * 150 * 400 * 28 * 128 * 2 // 4, 150),
    ],
)
def test_a_line_counts_what_its_kernel_reads_and_computes(kernel, num_bytes, operations, rows):
    line = bench_light.line_of(CASE, kernel, [1e3, 1e3, 5e3])
    assert line["seconds"] == 1 and line["rows"] == rows
    assert line["gb_per_s"] == round(num_bytes / 1e9, 1)
    assert line["tflops"] == round(operations / 1e12, 1)


@pytest.mark.parametrize("wrong", ["--rows 0", "--tokens -1", "--density 0", "--rounds 0"])
def test_sizes_that_make_no_sense_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        bench_light.parse(wrong.split())
    assert wrong.split()[0] in capsys.readouterr().err
