# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The attention bench: its lists, its judgement of others' results, its lines and its budget."""

import json

import bench_attention
import pytest
import torch
from attention import cases, check, contenders, timing
from attention.cases import BLOCK, Case

CASE = Case("dream", 768, 0.4, "random")


FINER = Case("dream", 768, 0.4, "random", 32)


@pytest.fixture(params=[(lists, size) for lists in cases.LISTS for size in (BLOCK, 32)])
def case(request):
    lists, block_size = request.param
    return Case("dream", 768, 0.4, lists, block_size)


def test_lists_are_ascending_and_told_alike_in_every_form(case):
    for head, block in check.tiles(case):
        ids = case.ids[head, block, : case.counts[head, block]].tolist()
        assert ids == sorted(set(ids)) and ids[0] >= 0 and ids[-1] < case.num_key_blocks
        assert case.mask[head, block].nonzero().flatten().tolist() == ids
    assert case.share == pytest.approx(case.mask.double().mean().item())


def test_pages_hold_the_keys_of_the_lists():
    inputs = contenders.paged_inputs(CASE)
    head, block = 27, 3
    row = head * CASE.num_blocks + block
    used = inputs["seqused_k"][row] // BLOCK
    for name, x in zip("kv", CASE.qkv[1:], strict=True):
        pages = inputs[name][inputs["block_table"][row, :used].long()]
        expected = x[check.places(CASE, head, block), head // 7]
        assert torch.equal(pages.reshape(expected.shape), expected)
    begin = inputs["cu_seqlens_q"][row]
    expected = CASE.qkv[0][block * BLOCK : (block + 1) * BLOCK, head]
    assert torch.equal(inputs["q"][begin : begin + BLOCK, 0], expected)


def test_the_mask_of_flex_attention_lists_full_blocks_only():
    mask = contenders.flex_mask(CASE)
    assert not mask.kv_num_blocks.any()
    assert torch.equal(mask.full_kv_num_blocks[0], CASE.counts)


def test_what_takes_square_blocks_only_says_so():
    for prepare in (contenders.paged_inputs, contenders.flex_mask):
        with pytest.raises(ValueError, match="its key blocks have 128 tokens, not 32"):
            prepare(FINER)


def test_our_own_kernels_pass_the_check(case):
    made = {each.name: each for each in contenders.ours(case) if each.name != "ours_triton"}
    assert bench_attention.problem_of(made["ours_dense"], case) is None
    assert bench_attention.problem_of(made["block_scores"], case) is None


def sparse(case):
    from sparsed_vllm.kernels import api

    return api.block_sparse_attention(*case.qkv, case.layout, case.tables, scale=case.scale)


def test_attention_over_the_lists_is_told_from_dense_attention(case):
    out = sparse(case)
    assert check.fault(out, case, lists=True) is None
    assert "off by" in check.fault(out, case, lists=False)


@pytest.mark.parametrize("spoil", [1.02, float("nan")])
def test_a_wrong_result_is_named(spoil):
    assert "off by" in check.fault(sparse(CASE) * spoil, CASE, lists=True)
    assert "shape" in check.fault(sparse(CASE)[None], CASE, lists=True)


def test_what_cannot_run_is_named_in_a_line_and_the_rest_goes_on(capsys):
    def missing(case):
        import no_such_kernels  # noqa: F401

        yield

    def broken(case):
        yield contenders.Contender("wrong", lambda: case.qkv[0], "all")
        raise RuntimeError("no\nroom")

    assert list(bench_attention.runnable(CASE, "theirs", missing, {"x"})) == []
    assert list(bench_attention.runnable(CASE, "other", broken, {"wrong"})) == []
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "theirs is not installed: No module named 'no_such_kernels'"
    assert told[1].startswith("wrong is not timed: it is off by")
    assert "other does not run" in told[2] and len(told) == 3


def test_a_line_counts_kept_blocks_only():
    contender = contenders.Contender("some", lambda: None, "lists")
    line = bench_attention.line_of(CASE, contender, [2.0, 1.0, 4.0], [4.0])
    operations = 4 * 768**2 * 28 * 128 * CASE.share
    assert line["ms"] == 2 and line["spread"] == 3 and line["rounds"] == 3
    assert line["tflops"] == pytest.approx(operations / 2e-3 / 1e12, abs=0.05)
    assert line["ratio_to_fa3"] == 0.5
    assert line["ratio_to_floor"] == pytest.approx(2e-3 / (operations / 989e12), rel=0.01)
    assert json.loads(json.dumps(line)) == line


def test_kernels_take_turns():
    order = []

    def clock(call, repeat):
        order.append((call(), repeat))
        return 1.0 if call() == "quick" else 100.0

    times = timing.measure({name: lambda n=name: n for name in ("quick", "slow")}, 2, clock)
    assert times == {"quick": [1.0, 1.0], "slow": [100.0, 100.0]}
    assert order[2:] == [("quick", 5), ("slow", 1), ("slow", 1), ("quick", 5)]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--lengths", "1000"], "--lengths must be multiples of 128 over 256, got 1000."),
        (["--lengths", "256"], "got 256"),
        (["--density", "1.5"], "--density must be over 0, up to 1, got 1.5."),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--budget", "0"], "--budget must be over 0 seconds"),
        (["--kernels", "flex", "--without", "flex"], "leaves no kernel"),
    ],
)
def test_bad_arguments_are_named(options, told, capsys):
    with pytest.raises(SystemExit):
        bench_attention.parse(options)
    assert told in capsys.readouterr().err


def test_the_quick_set_leaves_out_what_is_slow_to_compile():
    args = bench_attention.parse(["--quick"])
    assert "flex_autotuned" not in args.kernels and "fa4_lists" in args.kernels
    assert args.density == [0.3] and args.lengths[0] == 65536
