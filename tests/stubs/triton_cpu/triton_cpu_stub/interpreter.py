# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Makes Triton's interpreter two to three times as fast: less work beside each operation.

What kernels compute stays as it is. For the Triton that requirements/cpu.txt pins.
"""

import atexit
import dataclasses
import functools
import gc
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np


def quicken() -> None:
    """A general plugin of vLLM, which calls it in each of its processes."""
    from triton.language import core
    from triton.runtime import interpreter

    from triton_cpu_stub.twins import launch_twins

    gc.freeze()  # vLLM collects garbage as an engine starts: not among all that it imported
    atexit.register(gc.unfreeze)
    if isinstance(interpreter._patch_lang, Patcher):
        return
    interpreter._patch_lang = Patcher(interpreter)
    _skip_overflow_checks(interpreter)
    interpreter._get_np_dtype = _np_dtypes(core, interpreter._get_np_dtype)
    interpreter._patch_attr = functools.partial(_patch_attr, interpreter.interpreter_semantic)
    _compare_types_by_identity_first(core)
    _share_shapes(core, interpreter.InterpreterBuilder)
    _leave_equal_shapes(type(interpreter.interpreter_semantic))
    _leave_equal_types(core, type(interpreter.interpreter_semantic))
    launch_twins(interpreter)


class Patcher:
    """Patches Triton's language once a launch, where each call of a helper did so again.

    What there is to patch is searched for in a module's first launch and then remembered.
    """

    def __init__(self, interpreter: ModuleType) -> None:
        self._patch, self._scope = interpreter._patch_lang, interpreter._LangPatchScope
        self._found: dict[str, list[tuple[Any, str, Any]]] = {}  # by the outermost kernel's module
        self._patched: set[str] = set()  # modules, in this launch

    def __call__(self, function: Callable[..., Any]) -> Any:
        module = function.__globals__["__name__"]
        if module in self._patched:
            return None
        is_outermost = not self._patched
        self._patched.add(module)
        if not is_outermost:
            return self._patch(function)
        scope = self._patch_all(module, function)
        restore = scope.restore
        scope.restore = lambda: (self._patched.clear(), restore())
        return scope

    def _patch_all(self, module: str, function: Callable[..., Any]) -> Any:
        if module not in self._found:
            scope = self._patch(function)
            self._found[module] = [(x, name, vars(x)[name]) for x, name, _ in scope._changes]
            return scope
        scope = self._scope()
        for owner, name, value in self._found[module]:
            scope.set_attr(owner, name, value)
        return scope


def _skip_overflow_checks(interpreter: ModuleType) -> None:
    """Those of sums and products of integers: computed, but without debug nobody looks at them."""
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _np_dtypes(core: ModuleType, find: Callable[[Any], np.dtype]) -> Callable[[Any], np.dtype]:
    """The same by a type's name, instead of from a table built for each call."""
    known: dict[str, np.dtype] = {}

    def find_once(dtype: Any) -> np.dtype:
        if isinstance(dtype, core.block_type):
            dtype = dtype.element_ty
        found = known.get(dtype.name)
        if found is None:
            found = known[dtype.name] = find(dtype)
        return found

    return find_once


def _patch_attr(semantic: Any, owner: Any, name: str, member: Any, _: Any, scope: Any) -> None:
    """As the interpreter does, but past the wrapper that only checks that it was done."""
    function = getattr(member, "__wrapped__", member)

    def patched(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = semantic
        return function(*args, **kwargs)

    scope.set_attr(owner, name, patched)


def _compare_types_by_identity_first(core: ModuleType) -> None:
    for kind in (core.dtype, core.pointer_type, core.block_type):
        kind.__eq__ = _identity_or(kind.__eq__)


def _identity_or(equal: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    return lambda self, other: self is other or equal(self, other)


def _share_shapes(core: ModuleType, builder: type) -> None:
    """Blocks of one shape share it and their type, which nothing changes."""
    create, types = core.tensor.__init__, {}

    def block_of(element_ty: Any, shape: Any) -> Any:
        key = element_ty.name, getattr(element_ty, "address_space", None), *shape
        found = types.get(key)
        if found is None:
            found = types[key] = core.block_type(element_ty, list(shape))
        return found

    @functools.cache
    def shape_of(*shape: int) -> tuple[Any, Any]:
        example = core.tensor.__new__(core.tensor)
        create(example, None, core.block_type(core.int32, list(shape)) if shape else core.int32)
        return example.shape, example.numel

    def init(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape_of(*(type.shape if type.is_block() else ()))

    core.tensor.__init__ = init
    core.block_type.with_element_ty = lambda self, scalar_ty: block_of(scalar_ty, self.shape)
    builder.get_block_ty = lambda self, dtype, shape: block_of(dtype, shape)


def _leave_equal_shapes(semantic: Any) -> None:
    """Blocks of one shape need no broadcast to it."""
    broadcast = semantic.broadcast_impl_value

    def broadcast_others(self: Any, lhs: Any, rhs: Any) -> Any:
        are_blocks = lhs.type.is_block() and rhs.type.is_block()
        if are_blocks and lhs.type.shape.values == rhs.type.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    semantic.broadcast_impl_value = broadcast_others


def _leave_equal_types(core: ModuleType, semantic: Any) -> None:
    """Operands of one type compute in it: only a quotient of halves is taken in another."""
    check = semantic.binary_op_type_checking_impl

    def check_others(
        self: Any,
        lhs: Any,
        rhs: Any,
        allow_lhs_ptr: bool = False,
        allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True,
        div_or_mod: bool = False,
    ) -> Any:
        are_tensors = type(lhs) is core.tensor and type(rhs) is core.tensor
        if are_tensors and lhs.dtype is rhs.dtype and not (div_or_mod or lhs.dtype.is_ptr()):
            return self.broadcast_impl_value(lhs, rhs)
        return check(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    semantic.binary_op_type_checking_impl = check_others
