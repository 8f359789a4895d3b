# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Patches are all applied or none, once, and only to what they were written for."""

import sys
import types

import pytest

from sparsed_vllm.compat import Unfit
from sparsed_vllm.patches.apply import Patch, apply_all


@pytest.fixture
def target():
    module = types.ModuleType("patched_module")

    class Owner:
        def greet(self, name):
            return f"hello {name}"

    module.Owner = Owner
    sys.modules["patched_module"] = module
    yield Owner
    del sys.modules["patched_module"]


def shout(original):
    return lambda self, name: original(self, name).upper()


def patch(target="patched_module:Owner.greet", parameters=("self", "name")):
    return Patch(target, parameters, shout, because="", drop_when="")


def test_a_patch_replaces_its_target_and_keeps_the_original(target):
    original = target.greet
    apply_all([patch()])
    assert target().greet("you") == "HELLO YOU"
    assert target.greet.__unpatched__ is original


def test_a_patch_is_applied_once(target):
    apply_all([patch()])
    once = target.greet
    apply_all([patch(parameters=("self", "name"))])
    assert target.greet is once


@pytest.mark.parametrize(
    "bad", [patch("patched_module:Owner.gone"), patch(parameters=("self", "other"))]
)
def test_a_target_that_changed_leaves_everything_as_it_was(target, bad):
    with pytest.raises(Unfit, match="patched_module:Owner"):
        apply_all([patch(), bad])
    assert target().greet("you") == "hello you"


def test_a_patch_that_raises_leaves_everything_as_it_was(target):
    def fail(original):
        raise KeyError(original.__name__)

    target.leave = lambda self: "bye"
    failing = Patch("patched_module:Owner.leave", ("self",), fail, because="", drop_when="")
    with pytest.raises(KeyError, match="lambda"):
        apply_all([patch(), failing])
    assert target().greet("you") == "hello you"


def test_patches_can_be_taken_back(target):
    apply_all([patch()])()
    assert target().greet("you") == "hello you"
