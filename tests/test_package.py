"""The package as a whole: how its modules depend on each other, what importing it costs, and that its examples run."""

import ast
import doctest
import importlib
import importlib.util
import inspect
import json
import pydoc
import re
import socket
import subprocess
import sys
from functools import cache
from operator import attrgetter
from pathlib import Path

import pytest

import hf_s3t
from hf_s3t import errors
from hf_s3t.errors import S3TError


ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hf_s3t"
HEAVY = {"accelerate", "bitsandbytes", "datasets", "peft", "torch", "transformers", "trl"}
# These two are optional or slow to import: only the function, or the one module, that needs them may bring them in.
WITH_TRL = {f"hf_s3t.training.{name}_trainer" for name in ("dpo", "kto", "reward", "sft")}
ONLY_WHERE_USED = {"trl": WITH_TRL, "bitsandbytes": set(), "matplotlib": set()}


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _imports(node: ast.AST, inside_functions: bool):
    """The import statements below a node that run, in functions or not."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif _is_type_checking(child):
            for statement in child.orelse:
                yield from _imports(ast.Module([statement], []), inside_functions)
        elif inside_functions or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _imports(child, inside_functions)


def _absolute(module: str, node: ast.ImportFrom) -> str:
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    return importlib.util.resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module


def _targets(module: str, inside_functions: bool = True) -> set[tuple[str, str | None]]:
    """What a module imports: (module, None), or (module, name) where `name` is no module of this package."""
    found = set()
    for node in _imports(_tree(module), inside_functions):
        if isinstance(node, ast.Import):
            found |= {(alias.name, None) for alias in node.names}
            continue
        source = _absolute(module, node)
        for alias in node.names:
            whole = f"{source}.{alias.name}"
            found.add((whole, None) if whole in FILES else (source, alias.name))
    return found


def _run(code: str):
    """Run Python in a fresh process; what it prints last is JSON."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _loaded_by(statement: str) -> set[str]:
    """The top-level modules that a fresh process has loaded after a statement."""
    show = "import json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    return set(_run(f"{statement}\n{show}"))


def test_modules_do_not_import_through_the_front_door():
    through = [
        f"{module}: {name or target}"
        for module in FILES
        for target, name in _targets(module)
        if target == "hf_s3t" and name != "__version__"
    ]
    assert not through


def test_modules_import_no_private_names_of_each_other():
    private = [
        f"{module}: {name}"
        for module in FILES
        for target, name in _targets(module)
        if target.startswith("hf_s3t") and (name or "").startswith("_") and name != "__version__"
    ]
    assert not private


def test_import_is_lazy():
    loaded = _loaded_by("import hf_s3t, hf_s3t.errors")
    assert not loaded & HEAVY
    assert loaded - {"hf_s3t"} <= _loaded_by("import transformers")


def test_config_comes_without_torch():
    assert not _loaded_by("from hf_s3t import S3TConfig, S3TError; S3TConfig()") & HEAVY


@pytest.mark.slow
def test_only_the_sft_trainer_loads_trl():
    # peft brings bitsandbytes with it wherever that is installed.
    assert "trl" not in _loaded_by("from hf_s3t import S3TModel, S3TTrainer")


def test_who_serves_or_trains_does_not_load_the_inspector():
    importers = {
        module for module in FILES for target, _ in _targets(module, False) if target.endswith("operations.inspection")
    }
    assert {module.split(".")[1] for module in importers} <= {"operations", "cli"}


@pytest.mark.parametrize("library", ONLY_WHERE_USED)
def test_optional_libraries_are_imported_where_used(library):
    importers = {
        module
        for module in FILES
        for target, _ in _targets(module, inside_functions=False)
        if target.split(".")[0] == library
    }
    assert importers <= ONLY_WHERE_USED[library]


def test_the_tree_of_errors_is_drawn_as_it_is():
    def drawn(error, depth=0):
        others = [base.__name__ for base in error.__bases__ if base.__module__ == "builtins" and error is not S3TError]
        yield "    " * depth + f"- {error.__name__}" + (f" ({', '.join(others)})" if others else "")
        for below in error.__subclasses__():
            if below.__module__ == errors.__name__:
                yield from drawn(below, depth + 1)

    assert "\n".join(drawn(S3TError)) in errors.__doc__


@pytest.mark.parametrize("name", hf_s3t.__all__)
def test_public_names_resolve(name):
    assert getattr(hf_s3t, name) is not None
    assert name in dir(hf_s3t)


def test_type_checkers_see_the_same_names():
    (block,) = [node for node in _tree("hf_s3t").body if _is_type_checking(node)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {name: getattr(hf_s3t, name).__module__.removeprefix("hf_s3t.") for name in seen}
    assert set(hf_s3t.__all__) == {"__version__", *seen}


def test_submodules_resolve_and_other_names_do_not():
    for name in ("analysis", "baselines", "errors", "metrics", "plan", "sequences"):
        assert name in dir(hf_s3t) and getattr(hf_s3t, name) is importlib.import_module(f"hf_s3t.{name}")
    with pytest.raises(AttributeError, match="no_such_name"):
        hf_s3t.no_such_name  # noqa: B018


def test_every_error_is_an_s3t_error_and_one_python_knows():
    children = [value for value in vars(errors).values() if isinstance(value, type) and value is not errors.S3TError]
    assert children
    for error in children:
        assert issubclass(error, errors.S3TError)
        expected = [base for base in error.__mro__ if base.__module__ == "builtins"]
        assert set(expected) - {Exception, BaseException, object}, f"{error.__name__} is no error that Python knows"


@pytest.mark.parametrize("module", FILES)
def test_no_assert_no_pickle(module):
    assert not [f"line {node.lineno}" for node in ast.walk(_tree(module)) if isinstance(node, ast.Assert)]
    assert not {target.split(".")[0] for target, _ in _targets(module)} & {"pickle", "dill", "cloudpickle", "marshal"}


@pytest.mark.parametrize("module", FILES)
def test_nothing_is_marked_unfinished(module):
    marks = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "X" * 3)))
    assert not marks.findall(FILES[module].read_text(encoding="utf-8"))


class _FencedParser(doctest.DocTestParser):
    """Reads examples in Markdown fences, whose closing line would otherwise count as expected output."""

    def parse(self, string, name="<string>"):
        return super().parse(re.sub(r"^\s*```.*$", "", string, flags=re.MULTILINE), name)


def _has_examples(module: str) -> bool:
    return ">>>" in FILES[module].read_text(encoding="utf-8")


@pytest.mark.parametrize("module", [module for module in FILES if _has_examples(module)])
def test_docstring_examples_run(module):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(optionflags=flags)
    report = []
    for test in doctest.DocTestFinder(parser=_FencedParser()).find(importlib.import_module(module)):
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)
    assert runner.tries


def _references(module: str) -> set[str]:
    """What the docstrings of a module refer to in this package, such as [`~hf_s3t.S3TModel`] and [`preview`]."""
    documented = [n for n in ast.walk(_tree(module)) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    found = {name for node in documented for name in re.findall(r"\[`~?([\w.]+)`\]", ast.get_docstring(node) or "")}
    # What other libraries have is for the site of the documentation to look up.
    libraries = HEAVY | {"evaluate"}
    return {name for name in found if name.split(".")[0] not in libraries}


def _is_there(name: str, module: str) -> bool:
    """Whether there is something of a name: from the module that says it, from the package, or by its whole name."""
    try:
        return attrgetter(name)(importlib.import_module(module)) is not None
    except AttributeError:
        return any(pydoc.locate(start + name) is not None for start in ("", "hf_s3t."))


@pytest.mark.parametrize("module", [module for module in FILES if _references(module)])
def test_what_docstrings_refer_to_is_there(module):
    assert not [name for name in _references(module) if not _is_there(name, module)]


def _documented(module: str):
    """The classes, functions and methods that a module defines, by their names."""
    for name, value in vars(importlib.import_module(module)).items():
        if getattr(value, "__module__", None) != module or not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        if name.startswith("__"):
            # What compiling left there, in a test before this one.
            continue
        yield name, value
        for method, function in vars(value).items() if inspect.isclass(value) else ():
            function = getattr(function, "__func__", function)
            if inspect.isfunction(function) and function.__module__ == module:
                yield f"{name}.{method}", function


def _arguments_in(docstring: str) -> set[str]:
    """What the section `Args:` of a docstring describes."""
    section = re.search(r"^Args:\n((?:(?: +.*)?\n?)*)", inspect.cleandoc(docstring), re.MULTILINE)
    lines = re.findall(r"^ {4}([\w*]+(?:, [\w*]+)*)(?: \(|:)", section[1] if section else "", re.MULTILINE)
    return {name.strip("*") for line in lines for name in line.split(", ")}


def _parameters(value) -> set[str]:
    """What a function takes, or a class where it is called: some make their objects by `__new__` as well."""
    makers = (value.__new__, value.__init__) if inspect.isclass(value) else ()
    return {name for function in (value, *makers) for name in inspect.signature(function).parameters}


def test_docstrings_describe_arguments_that_are_there():
    described = [
        (f"{module}.{name}", value, arguments)
        for module in FILES
        if module != "hf_s3t.__main__"
        for name, value in _documented(module)
        if (arguments := _arguments_in(vars(value).get("__doc__", value.__doc__) or ""))
    ]
    assert len(described) > 200
    gone = {name: arguments - _parameters(value) for name, value, arguments in described}
    assert {name: arguments for name, arguments in gone.items() if arguments} == {}


def _python_blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "docs/guarantee.md", "docs/cli.md", "docs/format.md"]
)
def test_code_in_the_documentation_is_python_and_imports_what_exists(page):
    for block in _python_blocks(ROOT / page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "hf_s3t":
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize("room", sorted(f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")))
def test_the_map_of_the_code_names_every_room(room):
    assert f"`{room}`" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_tests_have_no_network():
    with pytest.raises(RuntimeError, match="offline"):
        socket.create_connection(("192.0.2.1", 9), timeout=1)
    with pytest.raises(RuntimeError, match="offline"):
        socket.getaddrinfo("example.org", 443)
