"""The documentation as it is read: links lead somewhere; what its pages tell to run runs, and prints what they say."""

import contextlib
import difflib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path

import pytest
from support.stand_ins import write_adapter, write_classifiers, write_configs, write_language_models


ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("benchmarks", "docs", "recipes", "tests")
PAGES = [*sorted(ROOT.glob("*.md")), *(page for folder in FOLDERS for page in sorted((ROOT / folder).rglob("*.md")))]
FENCE = re.compile(r"^```(?P<kind>[a-z]*)(?P<marks>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    line: int
    kind: str
    marks: str
    text: str


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(text[: m.start()].count("\n") + 1, m["kind"], m["marks"], m["text"]) for m in FENCE.finditer(text)]


# Links


def test_every_link_leads_to_a_file_and_a_heading():
    assert not [f"{page}: {link}" for page in PAGES for link in links_of(page) if not leads(page, link)]
    assert sum(len(list(links_of(page))) for page in PAGES) > 50


def links_of(page: Path) -> Iterator[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^()\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        if not re.match(r"[a-z]+:", link):
            yield link


def leads(page: Path, link: str) -> bool:
    name, _, anchor = link.partition("#")
    target = page.parent / name if name else page
    return target.exists() and (not anchor or anchor in anchors_of(target))


def anchors_of(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them and the site does too."""
    headings = re.findall(r"^#+ +(.*?) *$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("link", ["no-such-file.md", "guarantee.md#no-such-heading", "#no-such-heading"])
def test_a_broken_link_is_found(link):
    assert not leads(ROOT / "docs" / "cli.md", link)
    assert leads(ROOT / "docs" / "cli.md", "guarantee.md#5-what-it-does-not-say")


def test_every_file_that_a_page_names_is_there():
    named = re.compile(r"\b(?:benchmarks|docs|hf_s3t|model_cards|recipes|tests)/[\w/.-]*\.(?:py|md|yaml)\b")
    # What the changelog says was so when it was written.
    pages = [page for page in PAGES if page.name != "CHANGELOG.md"]
    found = {(page.name, name) for page in pages for name in named.findall(page.read_text(encoding="utf-8"))}
    assert len(found) > 30
    assert not [(page, name) for page, name in sorted(found) if not (ROOT / name).exists()]


# The site


def build_site(root: Path, site: Path) -> subprocess.CompletedProcess:
    """As `make docs` does. (Under --quiet no warning would be counted, and none would fail.)"""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(build, cwd=root, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    path = tmp_path_factory.mktemp("site")
    done = build_site(ROOT, path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.slow
def test_a_link_that_leads_nowhere_fails_the_site(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("docs", "site"):
            (root / entry.name).symlink_to(entry)
    shutil.copytree(ROOT / "docs", root / "docs")
    with open(root / "docs" / "hub.md", "a") as page:
        page.write("[here](guarantee.md#no-such-heading), [there](no-such-page.md) and [`X`][hf_s3t.no_such_name]")
    done = build_site(root, tmp_path / "site")
    assert done.returncode != 0
    assert all(name in done.stderr for name in ("#no-such-heading", "no-such-page.md", "hf_s3t.no_such_name"))
    assert done.stderr.count("WARNING") == 3


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_asks_nobody_for_anything(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    # For mermaid the theme loads a script from elsewhere.
    asked = re.compile(
        r"""<(script|img|iframe)\b[^>]*\bsrc="?(https?:)?//|<link\b[^>]*\brel="?(stylesheet|preconnect)[^>]*//"""
        r'''|class="mermaid"'''
    )
    assert not [page.name for page in pages if asked.search(page.read_text(encoding="utf-8"))]


@pytest.mark.slow
def test_the_reference_has_every_member_that_its_pages_name(site):
    for page in (ROOT / "docs" / "api").glob("*.md"):
        shown = (site / "api" / page.with_suffix(".html").name).read_text(encoding="utf-8")
        text = page.read_text(encoding="utf-8")
        for section in re.split(r"^::: ", text, flags=re.MULTILINE)[1:]:
            name = section.split()[0]
            listed = re.search(r"members:(?: \[(.*?)\]|((?:\n +- \w+)+))", section)
            for member in re.findall(r"\w+", (listed[1] or listed[2] or "") if listed else ""):
                assert f'id="{name}.{member}"' in shown, f"{name}.{member}"


# What the pages tell to run


def marked_lines(block: Block) -> set[int]:
    spans = re.search(r'hl_lines="([^"]*)"', block.marks)[1].split()
    return {n for span in spans for n in range(int(span.split("-")[0]), int(span.split("-")[-1]) + 1)}


def test_the_marked_lines_of_the_tutorial_are_those_that_change():
    blocks = [block for block in blocks_of("docs/tutorial.md") if block.kind == "python"]
    converted = [n for n, block in enumerate(blocks) if "hl_lines" in block.marks]
    assert len(converted) == 3
    for n in converted:
        before, after = blocks[n - 1].text.splitlines(), blocks[n].text.splitlines()
        matches = difflib.SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks()
        kept = {line + 1 for match in matches for line in range(match.b, match.b + match.size)}
        assert marked_lines(blocks[n]) == set(range(1, len(after) + 1)) - kept


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Folders under the names of models and data sets, as they are where the pages' code runs; not to be changed."""
    weights, configs = tmp_path_factory.mktemp("weights"), tmp_path_factory.mktemp("configs")
    write_language_models(weights)
    write_classifiers(weights)
    write_configs(configs)
    for name in ("receipt.json", "signing.key.pub"):
        shutil.copy(ROOT / "tests" / "fixtures" / "receipts" / name, configs)
    return weights, configs


@pytest.fixture
def reader(stand_ins, tmp_path, monkeypatch, one_thread, shared_key):
    """Somebody who runs a page from its top to its end, in a folder where the stand-ins lie under their names."""
    weights, configs = stand_ins
    for folder in weights.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    # TRL trains in bfloat16 unless told otherwise, and Transformers takes a CPU for a machine that cannot.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    return Reader(configs)


class Reader:
    def __init__(self, configs: Path):
        self.names = {"__name__": "__main__"}
        self.configs = configs

    def read(self, page: str) -> None:
        """Run what a page tells to run, from its top to its end, and compare what is printed with what it shows."""
        blocks = blocks_of(page)
        for block, following in zip(blocks, [*blocks[1:], None]):
            where = f"{page}, line {block.line}"
            if block.kind == "python":
                printed = self.run(block.text, where)
                if following is not None and following.kind == "text":
                    assert printed == following.text, where
            elif block.kind == "bash":
                for line in block.text.splitlines():
                    check_command(line.partition("#")[0].strip(), where)
            elif block.kind == "":
                for command, expected in typed_in(block.text):
                    assert printed_by(shlex.split(command), self.configs).rstrip() == expected.rstrip(), where

    def run(self, code: str, where: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, where, "exec"), self.names)
        return printed.getvalue()


def typed_in(text: str) -> list[tuple[str, str]]:
    """Commands behind a dollar, each with what follows it: what it prints."""
    return [part.partition("\n")[::2] for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]]


def check_command(line: str, where: str) -> None:
    """Run a command of `hf-s3t`; of others, see that what they name is there."""
    if not line:
        return
    words = shlex.split(line)
    if words[0] == "hf-s3t":
        printed_by(words, Path.cwd())
    elif words[0] == "make":
        done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{where}: {done.stderr}"
    elif words[:2] == ["accelerate", "launch"] or words[0] == "python":
        script, *options = words[2:] if words[0] == "accelerate" else words[1:]
        assert (ROOT / script).is_file(), where
        assert all((ROOT / option).exists() for option in options if option.startswith("recipes/")), where
    else:
        assert words[:3] == ["pip", "install", "-e"], f"{where}: {line}"
        assert set(words[3].strip(".[]").split(",")) <= set(metadata("hf_s3t").get_all("Provides-Extra")), where


def printed_by(words: list[str], folder: Path) -> str:
    environment = {**os.environ, "COLUMNS": "1000", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "hf_s3t", *words[1:]]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", ["README.md", "docs/tutorial.md", "docs/planning.md", "docs/existing_lora.md", "docs/trainers.md"]
)
def test_what_a_page_tells_to_run_runs_and_prints_what_it_says(page, reader):
    reader.read(page)


@pytest.mark.slow
def test_the_command_line_plans_as_its_page_says(stand_ins):
    commands = [one for block in blocks_of("docs/cli.md") if block.kind == "" for one in typed_in(block.text)]
    plans = [(command, expected) for command, expected in commands if command.startswith("hf-s3t plan ")]
    assert len(plans) == 3
    for command, expected in plans:
        assert printed_by(shlex.split(command), stand_ins[1]).rstrip() == expected.rstrip()
