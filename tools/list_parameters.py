# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""Writes docs/parameters.md from the code that parses the parameters.

python tools/list_parameters.py > docs/parameters.md
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

from sparsed_vllm import config, limits, reuse
from sparsed_vllm.families import FAMILIES, Family
from sparsed_vllm.params import Field, parse_params, request_fields

LENGTH = 128  # max_tokens of the examples

HEAD = f"""\
# Parameters

Written by `tools/list_parameters.py` from the code that parses them; ranges and defaults that
depend on the request are those for `max_tokens` {LENGTH}. docs/requests.md says what they do.

## Of a request

In `SamplingParams(extra_args=...)` or, over HTTP, in `vllm_xargs`.
"""
ENGINE = """
## Of an engine

In `--additional-config '{"sparsed": {...}, "reuse": {...}, "denoising": {...}}'` or
`LLM(additional_config=...)`. Unknown keys are refused.
"""


def page() -> str:
    """The whole file."""
    parts = [HEAD.rstrip(), *(_of_family(family) for family in FAMILIES)]
    sparse = asdict(config.SparseConfig())
    sparse["select"] = f"{sparse['select']}, or 1 with a mass"
    request = {name: sparse.get(name.removeprefix("sparsed_")) for name in config.REQUEST_FIELDS}
    parts += ["", "### Sparse attention, all models", ""]
    parts += _table(config.REQUEST_FIELDS, request)
    defaults = asdict(reuse.ReuseConfig()) | {"every": f"{reuse.EVERY}, or 1 with a threshold"}
    own = {name: defaults.get(name.removeprefix("kv_")) for name in reuse.REQUEST_FIELDS}
    parts += ["", "### Reuse of keys and values, all models", ""]
    parts += _table(reuse.REQUEST_FIELDS, own)
    parts += [ENGINE, "### `sparsed`", "", *_table(config.SECTION_FIELDS, sparse)]
    parts += ["", "### `reuse`, or the word `selective` for these defaults", ""]
    parts += _table(reuse.SECTION_FIELDS, defaults)
    parts += ["", "### `denoising`", "", *_table(limits.SECTION_FIELDS, asdict(limits.Limits()))]
    return "\n".join(parts) + "\n"


def _of_family(family: Family) -> str:
    defaults = parse_params(
        family,
        max_tokens=LENGTH,
        temperature=0,
        top_p=1,
        top_k=0,
        ignore_eos=False,
        extra_args={},
    )
    given = {field.name: getattr(defaults, field.name) for field in fields(defaults)}
    given |= {family.policy_field: defaults.policy, "cfg_scale": 0, "entropy_threshold": None}
    rows = _table(request_fields(family, LENGTH), given)
    return "\n".join(["", f"### {family.name}", "", *rows])


def _table(known: Mapping[str, Field], defaults: Mapping[str, Any]) -> Iterable[str]:
    yield "| parameter | default | allowed | |"
    yield "|---|---|---|---|"
    for name, field in known.items():
        yield f"| `{name}` | {_shown(defaults[name])} | {field.allowed} | {field.remedy} |"


def _shown(default: Any) -> str:
    if default is None:
        return "none"
    return str(int(default)) if isinstance(default, bool) else str(default)


if __name__ == "__main__":
    print(page(), end="")
