"""Reports for the file: what they say of a request or a period, that they name nobody, and that they can be read."""

import html.parser
import re
import shutil
from pathlib import Path

import pytest
from support.folders import NAMES, USERS, apply, forge_stage, grow, new_system
from support.receipts import OTHER_KEY, OUR_KEY, public
from typer.testing import CliRunner

from hf_s3t.cli import app as cli
from hf_s3t.errors import ConfigError, UnknownExampleError
from hf_s3t.folder.layout import LEDGER_FILE
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.reports import make_report, render
from hf_s3t.signing.keys import SIGNING_VARIABLE


pytestmark = pytest.mark.usefixtures("surroundings")
FORMS = pytest.mark.parametrize("form", ["html", "md"])


@pytest.fixture(scope="module")
def after(tmp_path_factory):
    """A system after three deletions and an export, of which the last two lines are signed; not to be changed."""
    path = tmp_path_factory.mktemp("reports") / "system"
    folder = grow(new_system(path, NAMES))
    apply(folder, NAMES[:1])
    apply(folder, groups=["user-2"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SIGNING_VARIABLE, OUR_KEY)
        with folder.lock():
            folder.record_export(next(iter(folder.valid_stages)), {"python": "3.11.7"})
        apply(folder, NAMES[7:8])
    return path


@pytest.fixture
def system(after, tmp_path):
    return Path(shutil.copytree(after, tmp_path / "system"))


class Page(html.parser.HTMLParser):
    """A page, checked to close what it opens, and to fetch nothing."""

    VOID = {"meta", "br", "link", "img"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.text = [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert not {name for name, _ in attributes} & {"src", "href", "onload"} and tag != "script"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def words(text: str) -> str:
    """What a report says, whatever it is marked up with."""
    text = Page(text).text if text.startswith("<!") else text
    return " ".join(re.sub(r"[|`*\\]", " ", text).split())


@FORMS
def test_a_report_says_of_each_request_what_went_and_what_stayed(after, form):
    said = words(render(make_report(after, public_key=public()), form))
    ledger = SystemFolder(after).ledger
    for number, entry in enumerate(ledger.entries, start=1):
        assert f"Line {number}: {entry.kind}" in said and ledger.hashes[number - 1] in said
        for stage, adapter in entry.removed.items():
            assert stage in said and adapter in said
    assert "1 example was deleted." in said and "2 examples were deleted, of 1 group." in said
    assert "chain verified" in said or "chain verified" in said.replace("the ledger's ", "")
    assert "must be revoked by hand" in said and "Shard 0" in said.title()


@FORMS
def test_a_report_names_nobody_and_no_place(system, form, tmp_path):
    forge_stage(system, str(sorted(SystemFolder(system).valid_stages)[0]), seed=99)
    (system / "notes about someone-a@example.org.txt").write_text("x")
    (system / "stages" / "shard-0" / f"{NAMES[1]}.txt").write_text("x")
    text = render(make_report(system), form)
    assert "(a file) is no part of a system" in words(text)
    assert not [name for name in {*NAMES, *USERS, str(tmp_path), str(Path.home())} if name in text]


@FORMS
def test_a_report_says_what_is_signed_and_by_whom(after, form):
    said = words(render(make_report(after, public_key=public()), form))
    assert public().keyid in said and ("with the line 2" in said or "2 with the line" in said)
    assert make_report(after, public_key=public()).totals["unsigned"] == 2
    said = words(render(make_report(after, public_key=public(OTHER_KEY)), form))
    assert "2 do not hold" in said and "DOES NOT HOLD" in said.upper()
    assert "no key was given" in words(render(make_report(after), form))


def test_a_report_is_of_a_line_a_period_or_everything(after):
    lines = [one.receipt.line for one in make_report(after).lines]
    assert lines == [1, 2, 3, 4]
    assert [one.receipt.line for one in make_report(after, line=2).lines] == [2]
    entries = SystemFolder(after).ledger.entries
    day = entries[0].time[:10]
    assert len(make_report(after, since=day, until=entries[-1].time[:10]).lines) == 4, "a date is meant to its end"
    assert next(one.receipt.line for one in make_report(after, since=entries[1].time).lines) == 2
    assert make_report(after, until="2020-01-01").lines == make_report(after, since="2100-01-01").lines == ()
    assert make_report(after, since=day).scope == f"what the ledger has from {day}"
    assert make_report(after, since=day, until=day).scope == f"what the ledger has from {day} until {day}"
    nothing = render(make_report(after, until="2020-01-01"), "md")
    assert "Nothing was deleted or handed out.\n\n## What this shows" in nothing, "a heading stands after a blank line"


@FORMS
def test_a_report_of_nothing_says_so(after, form):
    assert "Nothing was deleted or handed out." in words(render(make_report(after, until="2020-01-01"), form))


@pytest.mark.parametrize("wrong", ["yesterday", "2026-13-01", "", "2026-11", "99999-01-01"])
def test_a_date_that_is_none_is_refused(after, wrong):
    with pytest.raises(ConfigError, match="expected a date such as 2026-11-29"):
        make_report(after, since=wrong)


def test_a_line_and_a_period_are_refused_and_a_line_that_is_not_there(after):
    with pytest.raises(ConfigError, match="Got a line and a period"):
        make_report(after, line=1, since="2026-01-01")
    for last in ("2026-01-01", "2026-01-02T00:00"):
        with pytest.raises(ConfigError, match=f"from 2026-01-02 to {last}, expected one that ends after it begins"):
            make_report(after, since="2026-01-02", until=last)
    with pytest.raises(UnknownExampleError, match="Got line 9"):
        make_report(after, line=9)


@FORMS
def test_damage_stands_in_the_report(system, form):
    lines = (system / LEDGER_FILE).read_text().splitlines()
    (system / LEDGER_FILE).write_text("\n".join(lines[:-1]) + "\n")
    said = words(render(make_report(system), form))
    assert "not verified" in said.lower() and "lines were cut off" in said and "no problems" not in said


@FORMS
def test_what_a_foreign_ledger_says_is_shown_as_text(system, form):
    lines = (system / LEDGER_FILE).read_text().splitlines()
    lines[0] = lines[0].replace('"time":"', '"time":"<script>alert(1)</script>|[x](http://e)')
    (system / LEDGER_FILE).write_text("\n".join(lines) + "\n")
    text = render(make_report(system), form)
    assert "<script>" not in text.replace("\\<", "&lt;")
    if form == "html":
        Page(text)


def test_the_command_writes_a_new_file_and_changes_nothing(system, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in system.rglob("*") if path.is_file()}

    def run(*args, code=0):
        result = CliRunner(env={"COLUMNS": "1000"}).invoke(cli.app, ["report", "system", *args], prog_name="hf-s3t")
        assert result.exit_code == code, result.output
        return result

    assert run("--format", "html", "--output", "report.html").stdout == "the report is in report.html\n"
    Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert run("--line", "2").stdout.startswith("# Deletions of system ")
    assert "is not written over" in run("--output", "report.html", code=1).stderr
    assert {path: path.read_bytes() for path in system.rglob("*") if path.is_file()} == before


def test_the_pages_come_with_the_package():
    setup = (Path(__file__).resolve().parents[2] / "setup.py").read_text(encoding="utf-8")
    assert "operations/report_pages/*" in setup
