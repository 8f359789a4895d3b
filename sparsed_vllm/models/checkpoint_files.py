# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""A local checkpoint's files, looked at before vLLM and transformers read them."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

_INDEX = "model.safetensors.index.json"
_NEEDED: dict[str, tuple[str, ...]] = {
    _INDEX: ("weight_map",),
    "generation_config.json": (),
    "hf_quant_config.json": (),
    "special_tokens_map.json": (),
    "tokenizer.json": ("added_tokens", "model"),
    "tokenizer_config.json": (),
}
"""Files of JSON that a checkpoint may have -> the keys that they cannot be read without."""

_VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")
_POINTER = b"version https://git-lfs"


def check_files(path: str | Path | None) -> None:
    """Raise ValueError that names a file which is absent, cut off, or holds something else.

    path: the checkpoint's folder; what is none, such as a name on a hub, passes
    """
    if not path or not (folder := Path(path)).is_dir():
        return
    for name, keys in _NEEDED.items():
        if (file := folder / name).is_file():
            content = _mapping(file, keys)
            if name == _INDEX:
                _check_index(file, content["weight_map"])
    for file in sorted(folder.glob("*.bin")):
        if _is_pointer(file):
            raise _unreadable(file, "it holds no tensors")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):  # it compares the header with the file's length
                pass
        except (SafetensorError, OSError) as error:
            raise _unreadable(file, error) from error


def check_tokenizer(path: str | Path) -> None:
    """Raise ValueError for a folder without a vocabulary: transformers may make an empty one."""
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in _VOCABULARIES):
        raise ValueError(
            f"{folder} has no tokenizer ({', '.join(_VOCABULARIES)}): copy the model's there, or "
            "name a folder that has it with --tokenizer."
        )


def _mapping(file: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        content: Any = json.loads(file.read_bytes())
    except ValueError as error:
        raise _unreadable(file, error) from error
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing or not isinstance(content, dict):
        raise _unreadable(file, f"it must be a mapping with {', '.join(keys) or 'names as keys'}")
    return content


def _check_index(index: Path, weight_map: Any) -> None:
    files = weight_map.values() if isinstance(weight_map, dict) else ()
    if not files or not all(isinstance(name, str) for name in files):
        raise _unreadable(index, "its weight_map must name each tensor's file")
    if not any(index.parent.glob("*.safetensors")):
        return  # Nobody means to read any: --load-format dummy needs none.
    for name in sorted(set(files)):
        if not (index.parent / name).is_file():
            raise _unreadable(index, f"it names {name}, which is not there")


def _unreadable(file: Path, reason: object) -> ValueError:
    remedy = "Download it again."
    if file.name == _INDEX:
        remedy = "Download the checkpoint again, or remove the index if one file holds all tensors."
    if _is_pointer(file):
        remedy = "It is a pointer of Git LFS: run git lfs pull."
    return ValueError(f"{file} cannot be read: {reason}. {remedy}")


def _is_pointer(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(_POINTER)) == _POINTER
