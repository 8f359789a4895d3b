# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""What is installed, what it imports, and that kernels/ and patches/ ship inside our package."""

import ast
import importlib.util
import shutil
import subprocess
import sys
from email.message import Message
from email.parser import Parser
from importlib.metadata import entry_points
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import sparsed_vllm
from sparsed_vllm.compat import SUPPORTED

ROOT = Path(__file__).parents[1]
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

PURE = {
    f"sparsed_vllm.{name}"
    for name in ("params", "phases", "families", "config", "crossover", "tally")
}
FREE_OF_VLLM = {
    f"sparsed_vllm.{name}"
    for name in ("unmasking", "canvas", "denoising", "pattern", "recorded_tables")
}


def imports_of(module: str) -> set[str]:
    """Dotted names of all that a module of ours imports, wherever in the file it does so."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(module.split(".")[: -node.level]) if node.level else ""
            origin = ".".join(filter(None, [package, node.module]))
            found |= {f"{origin}.{alias.name}" for alias in node.names}
    return found


def outside(imports: set[str], allowed: set[str]) -> set[str]:
    """The imports that are neither of the standard library nor of an allowed module."""
    return {
        name
        for name in imports
        if name.split(".")[0] not in sys.stdlib_module_names
        and not any(f"{name}.".startswith(f"{module}.") for module in allowed)
    }


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


def test_our_kernels_folder_does_not_pose_as_the_package_of_that_name() -> None:
    """transformers probes for Hugging Face's `kernels` and would take ours for it."""
    spec = importlib.util.find_spec("kernels")
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
    assert not [place for place in places if place and Path(place).is_relative_to(ROOT)]


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_imports_kernels_and_patches_by_their_installed_names(module: str) -> None:
    assert not {"kernels", "patches"} & {name.split(".")[0] for name in imports_of(module)}


@pytest.mark.parametrize("module", sorted(PURE))
def test_a_pure_module_imports_the_standard_library_and_pure_modules_only(module: str) -> None:
    assert not outside(imports_of(module), PURE)


@pytest.mark.parametrize("module", sorted(FREE_OF_VLLM))
def test_the_denoising_of_one_request_imports_no_vllm(module: str) -> None:
    assert "vllm" not in {name.split(".")[0] for name in imports_of(module)}


@pytest.mark.parametrize("module", [m for m in SOURCES if m.startswith("sparsed_vllm.kernels.")])
def test_a_kernel_imports_torch_and_triton_only(module: str) -> None:
    assert not outside(imports_of(module), {"torch", "triton", "sparsed_vllm.kernels"})


def test_a_checkout_on_the_path_is_whole(tmp_path):
    """It hides an installed package from whoever starts Python in it, vLLM's processes too."""
    for folder in PACKAGE_OF:
        (tmp_path / folder).symlink_to(ROOT / folder)
    program = "import sparsed_vllm.kernels, sparsed_vllm.patches as p; print(p.__file__)"
    command = [sys.executable, "-S", "-c", program]  # without what is installed
    printed = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert Path(printed.stdout.strip()).is_relative_to(tmp_path)
