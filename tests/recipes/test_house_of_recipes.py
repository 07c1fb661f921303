"""The rooms of recipes/: which may import which, that a script is a command and no library, and that examples run."""

import ast
import doctest
import graphlib
import importlib
import re
from pathlib import Path

import pytest
from common import options


ROOT = Path(__file__).resolve().parents[2]
RECIPES = Path(options.__file__).parents[1]
# From the ground up; the last are the scripts, and the tasks that the harness loads by their path.
ROOMS = ("common", "demo", "studies", "scripts")


def modules_of(folder: Path) -> dict[str, Path]:
    """Name of a module of the recipes -> its file."""
    files = sorted(folder.rglob("*.py"))
    return {".".join(file.relative_to(folder).with_suffix("").parts): file for file in files}


def room_of(module: str) -> int:
    first, _, more = module.partition(".")
    return ROOMS.index(first if more and first in ROOMS else "scripts")


def imports_of(file: Path, modules) -> set[str]:
    """The modules of the recipes that a file imports, in functions too, or by their names."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {argument.value if isinstance(argument, ast.Constant) else "*" for argument in node.args}
    return found & {*modules, "*"}


def wrong_imports(folder: Path) -> list[str]:
    """Imports of what is in a higher room, of a script, or of whatever a variable says."""
    modules = modules_of(folder)
    return [
        f"{module}: {target}"
        for module, file in modules.items()
        for target in sorted(imports_of(file, modules))
        if target == "*" or room_of(target) > room_of(module) or ROOMS[room_of(target)] == "scripts"
    ]


def edits_of_the_path(file: Path) -> list[str]:
    """The statements of a file that change where modules are found."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        targets = {
            ast.Assign: lambda n: n.targets,
            ast.AugAssign: lambda n: [n.target],
            ast.Delete: lambda n: n.targets,
        }.get(type(node), lambda n: [])(node)
        changed = [ast.unparse(target) for target in targets]
        if isinstance(node, ast.Call):
            changed.append(ast.unparse(node.func))
        change = re.compile(r"sys\.path(\[.*\]|\.(append|insert|extend|remove))?|site\.addsitedir")
        found += [f"{file.name}, line {node.lineno}" for name in changed if change.fullmatch(name)]
    return found


def test_a_recipe_imports_from_its_room_and_those_below_and_never_a_script():
    assert wrong_imports(RECIPES) == []


def test_no_module_of_the_recipes_imports_itself_by_another():
    modules = modules_of(RECIPES)
    graph = {module: imports_of(file, modules) - {module} for module, file in modules.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize(
    ("room", "line", "wrong"),
    [
        ("common", "from demo.people import name", "common.house: demo.people"),
        ("common", "def f():\n    from demo import people", "common.house: demo.people"),
        ("demo", "import studies.depth", "demo.house: studies.depth"),
        ("studies", "import train", "studies.house: train"),
        ("studies", "import importlib\nimportlib.import_module('train').main()", "studies.house: train"),
        ("studies", "from importlib import import_module\nimport_module(name)", "studies.house: *"),
        ("", "import train", "house: train"),
        ("studies", "from demo.people import name", None),
        ("", "from studies.depth import drop", None),
    ],
)
def test_an_import_from_above_would_be_seen(room, line, wrong, tmp_path):
    for name in ("common/options.py", "demo/people.py", "studies/depth.py", "train.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / room / "house.py").write_text(line)
    assert wrong_imports(tmp_path) == ([wrong] if wrong else [])


@pytest.mark.parametrize("folder", ["recipes", "benchmarks", "tests"])
def test_nothing_changes_where_modules_are_found(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files and [edit for file in files for edit in edits_of_the_path(file)] == []


@pytest.mark.parametrize(
    "line", ["sys.path.append('a')", "sys.path[:0] = ['a']", "sys.path += ['a']", "site.addsitedir('a')"]
)
def test_an_edit_of_the_path_would_be_seen(line, tmp_path):
    (tmp_path / "house.py").write_text(f"import sys\n{line}\nprint(sys.path)\n")
    assert edits_of_the_path(tmp_path / "house.py") == ["house.py, line 2"]


def test_no_benchmark_imports_another():
    benchmarks = modules_of(ROOT / "benchmarks")
    scripts = {name for name in benchmarks if name.startswith("bench_")}
    assert scripts and not {name for file in benchmarks.values() for name in imports_of(file, benchmarks)} & scripts


WITH_EXAMPLES = [name for name, file in modules_of(RECIPES).items() if ">>>" in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_docstring_examples_run(module, monkeypatch):
    if module == "common.lm_evaluation":
        pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: the extra `lm_eval`")
    monkeypatch.chdir(ROOT)
    runner, said = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE), []
    loaded = importlib.import_module(module)
    for test in doctest.DocTestFinder().find(loaded):
        # The fence of Markdown after an example is none of its output.
        for example in test.examples:
            example.want = re.sub(r"^```\n", "", example.want, flags=re.MULTILINE)
        runner.run(test, out=said.append)
    assert runner.tries and not runner.failures, "".join(said)
