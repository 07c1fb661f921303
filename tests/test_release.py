"""A release: sdist and wheel as the tree makes them, the wheel at work away from the checkout, and what is claimed."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest
import setuptools
import yaml
from huggingface_hub import ModelCard
from packaging.requirements import Requirement
from packaging.version import Version

import hf_s3t


ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(hf_s3t.__file__).resolve().parent
VERSION = f"hf_s3t-{hf_s3t.__version__}"
SLOW = pytest.mark.slow

TRAINING = """
    import json

    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

    import hf_s3t
    from hf_s3t import S3TConfig, S3TModel, S3TTrainer

    torch.manual_seed(0)
    sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("base")
    rows = [{"id": row, "input_ids": [row, row + 1, 2, 3], "labels": [row, row + 1, 2, 3]} for row in range(12)]
    trainer = S3TTrainer(
        model=LlamaForCausalLM.from_pretrained("base"),
        args=TrainingArguments("system", max_steps=2, report_to="none", save_strategy="no", use_cpu=True),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
        s3t_config=S3TConfig(num_shards=2, num_slices=2, budget=2, id_column="id"),
    )
    trainer.train()
    model = S3TModel.from_pretrained("system")
    report = model.unlearn([3])
    answer = model(input_ids=torch.tensor([[3, 4]])).logits
    print(json.dumps({
        "package": hf_s3t.__file__, "removed": report.stages_removed, "depths": report.depths_after,
        "answer": list(answer.shape),
    }))
"""
METRICS = """
    import json

    import evaluate

    from hf_s3t import metrics

    rows = {"predictions": [1, 0, 1, 0], "references": [1, 0, 1, 0]}
    found = {}
    for name in metrics.METRICS:
        asked = {**rows, "questions": ["a", "a", "b", "b"]} if name in ("copa", "multirc") else rows
        found[name] = metrics.load(name).compute(**asked)
        assert evaluate.load(str(metrics.path(name))).compute(**asked) == found[name], name
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The tree without what a checkout has beside it: environments, builds, trained systems."""
    source = tmp_path_factory.mktemp("source")
    for folder in ("benchmarks", "docs", "hf_s3t", "model_cards", "recipes", "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy(file, source)
    return source


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """A folder with the sdist and the wheel made from it, as `make dist` makes them."""
    folder = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (wheel,) = built.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """
    Python of a new environment that has the wheel. What the package needs it takes from the environment of the tests,
    by a path that comes last: an editable install of the checkout there is out of reach.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "others.pth").write_text("\n".join(others))
    options = ("--no-deps", "--no-index", "--no-compile", "--force-reinstall", "--quiet")
    _run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=folder)
    return python


@pytest.fixture(scope="module")
def trained(installed, tmp_path_factory):
    """A system that the installed wheel trained and forgot an example of, and what it said of that."""
    folder = tmp_path_factory.mktemp("elsewhere")
    return folder / "system", _said(installed, TRAINING, folder)


def _run(*command, cwd, **variables):
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=kept | variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _said(python, code, folder):
    """Run code away from the checkout; what it prints last is JSON."""
    return json.loads(_run(python, "-c", textwrap.dedent(code), cwd=folder, HF_HOME=str(folder)).splitlines()[-1])


def _files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


# What is built


@SLOW
def test_a_wheel_holds_the_package_and_the_templates_of_cards(wheel):
    """Templates lie beside the package, metrics are folders that nothing imports: neither goes by itself."""
    package = {file for file in PACKAGE.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    templates = {f"hf_s3t/model_cards/{file.name}" for file in (ROOT / "model_cards").glob("*.md")}
    held = {name for name in _files(wheel) if not name.startswith(f"{VERSION}.dist-info/")}
    # By it type checkers know that the package has types.
    assert "hf_s3t/py.typed" in held
    assert templates
    assert held == templates | {f"hf_s3t/{file.relative_to(PACKAGE).as_posix()}" for file in package}


@SLOW
def test_an_sdist_holds_what_the_wheel_is_made_of_and_no_more(built):
    with tarfile.open(built / f"{VERSION}.tar.gz") as archive:
        held = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert held == {
        *("CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md"),
        *("hf_s3t", "hf_s3t.egg-info", "model_cards", "pyproject.toml", "setup.cfg", "setup.py"),
    }


@SLOW
def test_the_tree_makes_the_same_wheel_as_the_sdist(source, wheel, tmp_path):
    _run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, source, cwd=tmp_path)
    assert _files(tmp_path / wheel.name) == _files(wheel)


@SLOW
def test_twine_finds_no_fault(built):
    said = _run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *built.iterdir(), cwd=built)
    assert said.count("PASSED") == 2


# What is installed


@SLOW
def test_an_installed_wheel_trains_and_forgets(installed, trained):
    _, told = trained
    assert Path(told["package"]).is_relative_to(installed.parent.parent)
    assert told["removed"] and min(told["depths"]) < 2 == max(told["depths"])
    assert told["answer"] == [1, 2, 40]


@SLOW
def test_the_command_of_an_installed_wheel(installed, trained):
    system, told = trained

    def run(*arguments):
        return _run(installed.with_name("hf-s3t"), *arguments, cwd=system.parent)

    assert "unlearn" in run("--help")
    planned = run("plan", *"--num-layers 4 --examples 400 --deletions-per-month 1 --hours-per-epoch 1 --json".split())
    assert json.loads(planned)["chosen"]["num_slices"] == 2
    status = json.loads(run("status", "system", "--json"))
    assert (status["depths"], status["examples"], status["deletions"]) == (told["depths"], 11, 1)
    assert json.loads(run("check", "system", "--json"))["problems"] == []
    assert "deleted" in run("locate", "system", "3")


@SLOW
def test_an_installed_wheel_has_the_templates_of_cards(installed, trained, hub):
    system, _ = trained
    repo_id = f"{hub.user}/system"
    _run(
        *(installed.with_name("hf-s3t"), "push", system, repo_id),
        cwd=system.parent,
        HF_HUB_OFFLINE="0",
        HF_HOME=str(system.parent),
        HF_TOKEN=hub.token,
    )
    card = ModelCard.load(repo_id)
    assert card.data.library_name == "hf_s3t" and "| LoRA | r = 2" in card.text


@SLOW
def test_an_installed_wheel_has_the_metrics(installed, tmp_path):
    found = _said(installed, METRICS, tmp_path)
    assert found.keys() == {file.stem for file in (PACKAGE / "metrics").glob("*/*.py")}
    assert all(value == pytest.approx(1) for values in found.values() for value in values.values())


# What is claimed


@pytest.fixture(scope="module")
def claims():
    """What setup.py tells setuptools."""
    told = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(setuptools, "setup", lambda **claims: told.update(claims))
        runpy.run_path("setup.py")
    return told


def _pins(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pins = (line.partition("#")[0].strip() for line in lines)
    return {_canonical(name): Version(version) for name, _, version in (pin.partition("==") for pin in pins if pin)}


def _canonical(name):
    return re.sub("[-_.]+", "-", name).lower()


def _needed(claims, *extras):
    listed = [*claims["install_requires"], *(line for extra in extras for line in claims["extras_require"][extra])]
    return {_canonical(needed.name): needed.specifier for needed in map(Requirement, listed)}


def test_each_lower_bound_is_one_that_the_unit_suite_passed_with(claims):
    tried = _pins("constraints-lowest.txt")
    claimed = _needed(claims, "8bit", "figures", "lm_eval", "serve", "vision")
    bounds = {name: Version(bound.version) for name, bounds in claimed.items() for bound in bounds}
    assert bounds == {name: tried[name] for name in bounds}


def test_the_newest_versions_that_the_tests_pass_with_are_within_the_bounds(claims):
    tried = _pins("constraints.txt")
    everything = _needed(claims, *claims["extras_require"])
    unpinned = [name for name in everything if name not in tried]
    assert not unpinned
    assert not [name for name, bounds in everything.items() if not bounds.contains(tried[name], prereleases=True)]


def test_the_pythons_claimed_are_those_of_the_workflow(claims):
    listed = [line.rpartition(" :: ")[2] for line in claims["classifiers"] if re.search(r":: 3\.\d+$", line)]
    (matrix,) = (job["strategy"]["matrix"] for job in _workflow().values() if "strategy" in job)
    assert matrix["python-version"] == listed
    assert claims["python_requires"].startswith(f">={listed[0]}")


def test_what_the_workflow_and_the_hooks_call_is_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    called = [step["run"] for job in _workflow().values() for step in job["steps"] if "run" in step]
    called += [hook["entry"] for repo in hooks if repo["repo"] == "local" for hook in repo["hooks"]]
    assert ".ci/run" in called and "make test-lowest" in called and "make lint" in called
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    targets = [command.removeprefix("make ") for command in called if command.startswith("make ")]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_a_release_has_its_section_in_the_changelog_and_is_the_one_to_cite():
    version, changelog = Version(hf_s3t.__version__), (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", changelog, re.MULTILINE)
    released = dict(sections[1:])
    assert sections[0] == ("Unreleased", "") and all(released.values())
    # What is under way is of the version after the last one.
    assert version.base_version == next(iter(released)) or version.is_devrelease
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert released[cited["version"]] == str(cited["date-released"])


def test_the_hooks_lint_with_the_pinned_version():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    (version,) = (repo["rev"] for repo in hooks if repo["repo"].endswith("ruff-pre-commit"))
    assert Version(version) == _pins("constraints.txt")["ruff"]


def _workflow():
    return yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
