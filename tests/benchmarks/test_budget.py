# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""A sweep stops in good order."""

from budget import Budget


def test_a_budget_leaves_out_what_would_not_end_in_time(capsys):
    clock, ran = [0.0], []
    budget = Budget(10, lambda: clock[0])

    def take(name, work, seconds):
        def call():
            clock[0] += seconds
            ran.append(name)

        budget.run(name, work, call)

    take("first", 1, 2)  # nothing is known yet
    take("too large", 5, 10)
    take("larger", 4, 7)
    take("small", 1, 1)  # it may take as long as the one before
    assert ran == ["first", "larger"]
    told = capsys.readouterr().err
    assert "too large" in told and "small" in told


def test_without_a_budget_everything_runs():
    ran = []
    for name in "ab":
        Budget(None).run(name, 1e9, lambda name=name: ran.append(name))
    assert ran == ["a", "b"]
