# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""The compiler half of the backend: it refuses, since the interpreter compiles nothing."""

from types import ModuleType

from triton.backends import compiler


class InterpretedOnly(compiler.BaseBackend):
    @staticmethod
    def supports_target(target: compiler.GPUTarget) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "interpreted"

    def parse_options(self, options: dict) -> object:
        raise NotImplementedError("The cpu stub compiles nothing: leave TRITON_INTERPRET at 1.")

    def add_stages(self, stages: dict, options: object, language: object = None) -> None:
        """Older versions of Triton, 3.7 among them, pass no `language`."""

    def load_dialects(self, context: object) -> None:
        pass

    def get_module_map(self) -> dict[str, ModuleType]:
        return {}
