"""The house: a room of `hf_s3t` imports only rooms below it, and modules never import each other in a circle."""

import ast
import graphlib
import os
import re
import shutil
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
# From the ground up. Rooms of one floor do not know each other.
FLOORS = (
    {"errors", "launch"},
    {"checks", "signing"},
    {"config"},
    {"sequences"},
    {"plan"},
    {"analysis", "records", "metrics"},
    {"folder"},
    {"hub", "operations"},
    {"model"},
    {"training", "server"},
    {"baselines", "cluster"},
    {"cli"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# The front door, which opens every room when it is asked for a name of it, and what runs the command line.
OUTSIDE = {"", "__main__"}
# Rooms that work where nothing heavy is installed, and start at once.
PURE = (
    "errors",
    "launch",
    "checks",
    "signing",
    "config",
    "sequences",
    "plan",
    "analysis",
    "records",
    "folder",
    "hub",
    "operations",
    "cli",
)
HEAVY = {"accelerate", "bitsandbytes", "datasets", "matplotlib", "peft", "torch", "transformers", "trl"}
LARGEST = 600
NEEDS_LINTER = "needs import-linter, which the extra `test` does not bring: the plain test has passed"


def modules(root: Path) -> dict[str, Path]:
    """All modules below a folder that holds the package, by their dotted names."""
    found = {}
    for path in sorted((root / "hf_s3t").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path) -> dict[str, set[str]]:
    """Which module imports which, anywhere in it: at its top, in a function, for type checkers only."""
    files = modules(root)
    graph = {}
    for module, path in files.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                source = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
                # A name of a package may be a module of it.
                names |= {f"{source}.{a.name}" if f"{source}.{a.name}" in files else source for a in node.names}
        graph[module] = (names & set(files)) - {module}
    return graph


def room_of(module: str) -> str:
    return (module.split(".") + [""])[1]


def upward(graph: dict[str, set[str]]) -> list[str]:
    """The imports that lead to a room that is not below."""
    return [
        f"{module} imports {target}"
        for module, targets in graph.items()
        for target in sorted(targets)
        if not OUTSIDE & {room_of(module), room_of(target)}
        and room_of(module) != room_of(target)
        and FLOOR[room_of(target)] >= FLOOR[room_of(module)]
    ]


def linted(root: Path) -> subprocess.CompletedProcess:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)


@pytest.fixture
def house(tmp_path):
    """A copy of the package, to build into."""
    shutil.copytree(ROOT / "hf_s3t", tmp_path / "hf_s3t", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_every_room_has_its_floor():
    assert {room_of(module) for module in modules(ROOT)} - OUTSIDE == set(FLOOR)


def test_a_room_imports_only_rooms_below_it():
    assert upward(imports(ROOT)) == []


def test_no_modules_import_each_other_in_a_circle():
    graph = imports(ROOT)
    # The front door names what lies behind it for type checkers, and the version is read there.
    del graph["hf_s3t"]
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize(
    "line",
    [
        "from ..model.route import Route",
        "def lower():\n    from ..training import trainer\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..operations.purge import Purge",
        "import hf_s3t.cli.rendering",
    ],
    ids=["at the top", "in a function", "for type checkers", "by its whole name"],
)
def test_an_import_of_a_higher_room_is_found(house, line):
    with open(house / "hf_s3t" / "folder" / "files.py", "a") as file:
        file.write(f"\n{line}\n")
    assert [found for found in upward(imports(house)) if found.startswith("hf_s3t.folder.files imports ")]
    pytest.importorskip("importlinter", reason=NEEDS_LINTER)
    done = linted(house)
    assert done.returncode == 1 and "a room imports only rooms below it BROKEN" in done.stdout, done.stderr


def test_a_circle_inside_a_room_is_found(house):
    with open(house / "hf_s3t" / "folder" / "files.py", "a") as file:
        file.write("\ndef later():\n    from . import system\n")
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter(imports(house)).static_order())
    pytest.importorskip("importlinter", reason=NEEDS_LINTER)
    done = linted(house)
    assert done.returncode == 1 and "no circles BROKEN" in done.stdout, done.stderr


@pytest.mark.parametrize("room", PURE)
def test_a_pure_room_loads_no_library_of_tensors(room):
    names = [module for module in modules(ROOT) if room_of(module) == room]
    code = f"import importlib, sys\n[importlib.import_module(n) for n in {names}]\nprint(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not HEAVY & {name.split(".")[0] for name in done.stdout.split()}, done.stderr
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("room", sorted(path.parent.name for path in (ROOT / "hf_s3t").glob("*/__init__.py")))
def test_a_room_says_what_each_of_its_modules_holds(room):
    docstring = ast.get_docstring(ast.parse((ROOT / "hf_s3t" / room / "__init__.py").read_text(encoding="utf-8")))
    named = re.findall(r"^- `(\w+)`: \S", docstring, re.MULTILINE)
    assert sorted(named) == sorted(
        {module.split(".")[2] for module in modules(ROOT) if module.startswith(f"hf_s3t.{room}.")}
    )


@pytest.mark.parametrize("module", modules(ROOT))
def test_no_module_is_a_house_of_its_own(module):
    lines = len(modules(ROOT)[module].read_text(encoding="utf-8").splitlines())
    assert lines <= LARGEST, f"{module} has {lines} lines. Say what its parts are about, and give each a module."
