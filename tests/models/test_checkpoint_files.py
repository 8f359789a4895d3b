# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""A folder whose files cannot be read is refused by the file's name, before vLLM stumbles."""

import pytest
from checkpoints import write_dream, write_llada
from vllm.engine.arg_utils import EngineArgs

import sparsed_vllm

INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00002.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 123\n"


@pytest.fixture(autouse=True, scope="module")
def registered():
    sparsed_vllm.register()


@pytest.fixture
def folder(tmp_path):
    return write_llada(tmp_path, shards=2)


def start(path, **args):
    return EngineArgs(str(path), dtype="float32", **args).create_engine_config()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (INDEX, b"", "index.json cannot be read: Expecting value"),
        (INDEX, b"{}", "index.json cannot be read: it must be a mapping with weight_map"),
        (INDEX, b"[]", "index.json cannot be read: it must be a mapping with weight_map"),
        (INDEX, b'{"weight_map": null}', "its weight_map must name each tensor's file"),
        (INDEX, b'{"weight_map": {"a": 1}}', "its weight_map must name each tensor's file"),
        (INDEX, b'{"weight_map": {"a": "b"}}', "index.json .* names b, .* or remove the index"),
        (SECOND, b"", "00002-of-00002.safetensors cannot be read: .* Download it again"),
        (SECOND, POINTER, "00002-of-00002.safetensors .* Git LFS: run git lfs pull"),
        ("pytorch_model.bin", POINTER, "pytorch_model.bin .* Git LFS: run git lfs pull"),
        ("generation_config.json", b"[]", "generation_config.json cannot be read"),
        ("generation_config.json", b"{", "generation_config.json cannot be read"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json cannot be read"),
        ("tokenizer.json", b"{}", "tokenizer.json .* mapping with added_tokens, model"),
        ("hf_quant_config.json", b"[]", "hf_quant_config.json cannot be read"),
    ],
    ids=str,
)
def test_a_file_that_holds_something_else_is_refused_by_name(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        start(folder)


@pytest.mark.parametrize("length", [4, 100, -1])
def test_a_shard_that_is_cut_off_is_refused_by_name(folder, length):
    shard = folder / SECOND
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(ValueError, match=f"{SECOND} cannot be read"):
        start(folder)


def test_a_shard_that_is_absent_is_refused_by_name(folder):
    (folder / SECOND).unlink()
    with pytest.raises(ValueError, match=f"index.json .* names {SECOND}, which is not there"):
        start(folder)


def test_a_folder_may_lack_all_tensors_for_dummy_weights(folder):
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    start(folder, load_format="dummy")


@pytest.mark.parametrize("write", [write_llada, write_dream])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, write):
    tokenizer = write(tmp_path / "tokenizer")
    path = write(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    with pytest.raises(ValueError, match=r"model has no tokenizer .* with --tokenizer"):
        start(path)
    start(path, tokenizer=str(tokenizer))
    start(path, skip_tokenizer_init=True)
