"""The command line: what each command prints and how it ends, for people, for scripts, and for wrong input."""

import contextlib
import functools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import typer.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from support.folders import (
    CONFIG,
    NAMES,
    NUMBERS,
    USERS,
    add,
    add_checkpoint,
    apply,
    delete_and_die,
    files_of,
    grow,
    new_system,
    plant,
    stages_on_disk,
)
from typer.testing import CliRunner

import hf_s3t
from hf_s3t.cli import app as cli
from hf_s3t.errors import S3TError
from hf_s3t.folder.secret import KEY_VARIABLE
from hf_s3t.folder.system import SystemFolder
from hf_s3t.plan import StageKey


pytestmark = pytest.mark.usefixtures("surroundings")

ROOT = Path(__file__).resolve().parents[2]
# With `plan` and those of the Hub there are more; these take the folder of a system.
COMMANDS = ("status", "locate", "unlearn", "apply-pending", "check", "receipt", "purge", "export")
FINE, REFUSED, USAGE, EXHAUSTED = 0, 1, 2, 3


@pytest.fixture(autouse=True, scope="module")
def one_command():
    """The command is put together once, not for every line that is typed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.testing, "_get_command", functools.cache(typer.testing._get_command))
        yield


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A system with every stage, whose ids are numbers; not to be changed."""
    path = tmp_path_factory.mktemp("cli") / "system"
    grow(new_system(path))
    return path


@pytest.fixture
def system(grown, tmp_path, monkeypatch):
    """A copy of it, as `system` in the working folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(grown, tmp_path / "system")).relative_to(tmp_path)


def run(*args, code=FINE, stdin=None):
    """Run a command that must end with an exit code and without a traceback."""
    # Wide, so that no sentence is broken where a path happens to end.
    result = CliRunner(env={"COLUMNS": "1000"}).invoke(
        cli.app, [str(arg) for arg in args], input=stdin, prog_name="hf-s3t"
    )
    assert isinstance(result.exception, (SystemExit, type(None))), result.exc_info
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def json_of(*args, **kwargs):
    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    return json.loads(run(*args, "--json", **kwargs).stdout, parse_constant=refuse)


def refusal(*args, code=REFUSED, **kwargs) -> str:
    """The one line on standard error that a refused command leaves."""
    result = run(*args, code=code, **kwargs)
    assert result.stdout == "" and result.stderr.count("\n") == 1 and result.stderr.startswith("Error: ")
    return result.stderr


def unboxed(text: str) -> str:
    """What a box around a message says, on one line."""
    return " ".join(text.replace("│", " ").split())


# The command itself


SIGNING = ("sign", "keygen", "verify-receipt", "report", "audit-pack", "audit-add")


@pytest.mark.parametrize("command", [(), ("plan",), *((command,) for command in (*COMMANDS, *SIGNING))])
def test_every_help_says_the_exit_codes(command):
    text = " ".join(run(*command, "--help").stdout.split())
    for meaning in ("0 fine", "1 problems were found", "2 wrong usage", "3 exhausted"):
        assert meaning in text


def test_the_version_is_the_package_s():
    assert run("--version").stdout == f"hf-s3t {hf_s3t.__version__}\n"


def test_setup_declares_the_command():
    assert '"hf-s3t = hf_s3t.cli:main"' in (ROOT / "setup.py").read_text(encoding="utf-8")
    assert callable(cli.main)


@pytest.mark.parametrize("args", [(), ("no-such-command",), ("status",), ("--no-such-option",)])
def test_wrong_usage_is_told_on_standard_error(args):
    result = run(*args, code=USAGE)
    assert "Usage: hf-s3t" in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_takes_a_folder_that_is_not_there(command, tmp_path):
    rest = ["0", tmp_path / "target"] if command == "export" else []
    refused = run(command, tmp_path / "nowhere", *rest, code=USAGE).stderr
    assert "does not exist" in refused and "output_dir" in refused
    assert "is a file" in run(command, __file__, *rest, code=USAGE).stderr


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "check"])
def test_every_command_refuses_a_folder_without_a_system(command, tmp_path):
    rest = {"locate": ["1"], "unlearn": ["1"], "export": ["0", tmp_path / "target"]}.get(command, [])
    assert re.search("holds no S3T system|is missing", refusal(command, tmp_path, *rest))


@pytest.mark.parametrize("command", ["status", "locate", "unlearn", "purge", "export"])
def test_every_command_refuses_a_damaged_system(command, system):
    rest = {"locate": ["1"], "unlearn": ["1"], "export": ["0", "target"]}.get(command, [])
    (system / "ledger.jsonl").unlink()
    before = files_of(system)
    assert "ledger.jsonl is missing" in refusal(command, system, *rest)
    assert files_of(system) == before


def test_errors_of_the_system_are_one_line(system, monkeypatch):
    def fail(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "system/ledger\n.jsonl")

    monkeypatch.setattr("hf_s3t.cli.folder.open_folder", fail)
    assert refusal("status", system) == (
        "Error: system/ledger\\n.jsonl: Permission denied. Check the path and its permissions.\n"
    )


def test_commands_load_no_model_library(system):
    """One process runs them one after the other, and tells after each what is loaded by then."""
    commands = [[name, str(system)] for name in ("status", "check", "purge", "receipt")]
    commands += [[name, str(system), "3"] for name in ("locate", "unlearn")]
    code = (
        "import sys\n"
        "from hf_s3t.cli.app import main\n"
        f"for args in {commands!r}:\n"
        "    sys.argv = ['hf-s3t', *args]\n"
        "    try:\n        main()\n"
        "    except SystemExit as end:\n        ended = end.code\n"
        "    print(args[0], ended, sorted({m.split('.')[0] for m in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    told = [line for line in done.stderr.splitlines() if line.split()[0] in COMMANDS]
    assert [line.split()[:2] for line in told] == [[command[0], str(FINE)] for command in commands], done.stderr
    for line in told:
        loaded = set(re.findall(r"'([^']+)'", line))
        assert "hf_s3t" in loaded
        assert not loaded & {"accelerate", "bitsandbytes", "datasets", "peft", "scipy", "torch", "transformers", "trl"}


def test_the_package_can_be_run_as_a_module(system):
    done = subprocess.run(
        [sys.executable, "-m", "hf_s3t", "locate", str(system), "99"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == REFUSED and done.stdout == ""
    assert done.stderr.startswith("Error: Unknown ids: 99.") and "Traceback" not in done.stderr


# status


def test_status_shows_depths_and_what_is_left(system):
    text = run("status", system).stdout
    assert "12 examples, 0 deletions, 18 of 18 stages" in text
    assert "0-1-2: 3  1-2-0: 3  2-0-1: 3" in text
    assert "expected further deletions: 7.3 until a shard is dead, 14.7 until all are" in text
    assert "left to train" not in text and "one more" not in text


@pytest.fixture
def lattice(tmp_path):
    """A system with one stage for each set of slices, of which a deletion in the first shard took four."""
    folder = grow(new_system(tmp_path / "lattice", config=replace(CONFIG, keep_idle=None)))
    apply(folder, [folder.table.members(0, 0)[0]])
    return folder


def test_status_of_a_plan_of_sets_counts_them_and_says_what_one_more_stage_brings(lattice):
    lines = run("status", lattice.path).stdout.splitlines()
    assert lines[0] == "11 examples, 1 deletion, 10 of 14 stages"
    assert lines[1].split() == "shard depth sets of 1 slice 2 slices 3 slices".split()
    assert [line.split() for line in lines[3:5]] == [
        "0 2 2 of 3 1 of 3 0 of 1".split(),
        "1 3 3 of 3 3 of 3 1 of 1".split(),
    ]
    # One stage has all: it stands on the two slices that were not hit.
    assert lines[6:] == [
        "left to train: 4 stages, the work of 1.2 full fine-tunings",
        "one more (shard-0/1-2-0, work 0.5): mean depth 2.50 -> 3.00, over the next requests 1.17 -> 1.17",
    ]


def test_status_keeps_its_promise_stage_by_stage(lattice):
    while (step := (before := json_of("status", lattice.path))["next_stage"]) is not None:
        plant(lattice, StageKey.from_path(f"stages/{step['stage']}"))
        after = json_of("status", lattice.path)
        assert fmean(after["depths"]) == pytest.approx(fmean(before["depths"]) + step["depth"])
        assert after["expected_depth"] == pytest.approx(before["expected_depth"] + step["expected_depth"])
        assert after["work_left"] == pytest.approx(before["work_left"] - step["work"])
        assert after["stages_left"] == before["stages_left"] - 1
    assert after["depths"] == [3, 3] and after["work_left"] == after["stages_left"] == 0
    assert after["sets"] == [[[3, 3], [3, 3], [1, 1]]] * 2
    assert "left to train" not in run("status", lattice.path).stdout


def test_by_metric_the_loss_of_the_next_stage_will_say_whether_it_serves(tmp_path):
    folder = grow(new_system(tmp_path / "system", config=replace(CONFIG, keep_idle=None, select="metric")), 1)
    assert json_of("status", folder.path)["next_stage"]["depth"] is None
    assert "): its loss decides whether it serves, over the next requests" in run("status", folder.path).stdout


def test_status_for_machines(system):
    apply(SystemFolder(system), [3])
    status = json_of("status", system)
    assert list(status) == [
        "examples",
        "deletions",
        "depths",
        "sequence_depths",
        "sets",
        "stages",
        "expected_depth",
        "stages_left",
        "work_left",
        "next_stage",
        "deletions_until_first_dead_shard",
        "deletions_until_exhausted",
        "gate",
        "stages_behind",
        "additions",
        "pending",
        "is_exhausted",
    ]
    assert status["examples"] == 11 and status["deletions"] == 1 and status["is_exhausted"] is False
    assert list(status["next_stage"]) == ["stage", "work", "depth", "expected_depth"]


def test_status_watch_tells_who_trains_what_until_nothing_is_missing(tmp_path, monkeypatch):
    folder = new_system(tmp_path / "system", config=hf_s3t.S3TConfig(num_slices=1, seed=1), groups=None)
    first = folder.plan.stages()[0]
    with folder.lock():
        claim = folder.claims.take(first, {"slices": folder.slice_digests(first)}, lease=1e-9)
    told = folder.claims.look()[0].said
    turns = []

    def sleep(seconds):
        turns.append(seconds)
        if len(turns) == 3:
            plant(folder, first)
            claim.end()

    monkeypatch.setattr("hf_s3t.cli.watching.time.sleep", sleep)
    lines = run("status", tmp_path / "system", "--watch").stdout.splitlines()
    who = f"  shard-0/0: process {told['process']} on {told['host']}, since {told['since']}, "
    working, silent = ["0 of 1 stage, 1 worker", f"{who}at work"], ["0 of 1 stage, 1 worker", f"{who}silent for 0 s"]
    # Nothing is said where nothing has changed.
    assert lines == [*working, *silent, "1 of 1 stage, 0 workers"] and len(turns) == 3
    line = json.loads(run("status", tmp_path / "system", "--watch", "--json").stdout)
    assert line == {"stages": [1, 1], "workers": []}


@pytest.mark.parametrize(("lease", "changes", "state"), [(60, {}, "at work"), (60, {"started": 0}, "gone")])
def test_status_watch_for_machines(lease, changes, state, tmp_path, monkeypatch):
    folder = new_system(tmp_path / "system", config=hf_s3t.S3TConfig(num_slices=1, seed=1), groups=None)
    first = folder.plan.stages()[0]
    with folder.lock():
        claim = folder.claims.take(first, {}, lease)
    head, _, beat = claim.path.read_bytes().partition(b"\n")
    claim.path.write_bytes(json.dumps({**json.loads(head), **changes}).encode() + b"\n" + beat)
    monkeypatch.setattr("hf_s3t.cli.watching.time.sleep", lambda seconds: plant(folder, first))
    found = [json.loads(line) for line in run("status", folder.path, "--watch", "--json").stdout.splitlines()]
    assert [one["stages"] for one in found] == [[0, 1], [1, 1]]
    (worker,) = found[0]["workers"]
    assert list(worker) == ["stage", "host", "process", "since", "state", "silent"]
    assert (worker["stage"], worker["state"]) == ("shard-0/0", state)


def test_status_watch_goes_on_until_what_rows_came_to_is_grown_again(tmp_path, monkeypatch):
    folder = new_system(tmp_path / "system", config=hf_s3t.S3TConfig(num_slices=1, seed=1), groups=None)
    add(grow(folder), {100: (0, 0)})
    monkeypatch.setattr("hf_s3t.cli.watching.time.sleep", lambda seconds: grow(folder))
    lines = run("status", folder.path, "--watch").stdout.splitlines()
    assert lines == ["0 of 1 stage, 0 workers", "1 of 1 stage, 0 workers"]


def test_an_endless_life_is_null_in_json(tmp_path):
    prior = [1.0, 0.0]
    config = hf_s3t.S3TConfig(num_slices=2, deletion_prior=prior, seed=1)
    grow(new_system(tmp_path / "system", config=config, groups=None))
    assert json_of("status", tmp_path / "system")["deletions_until_exhausted"] is None
    assert "no end" in run("status", tmp_path / "system").stdout


def test_status_of_a_system_that_answers_nobody(tmp_path, system):
    apply(SystemFolder(system), NUMBERS)
    assert json_of("status", system, code=EXHAUSTED)["is_exhausted"] is True
    assert "0 of 0 stages" in run("status", system, code=EXHAUSTED).stdout
    new_system(tmp_path / "untrained")
    run("status", tmp_path / "untrained", code=EXHAUSTED)


@pytest.mark.parametrize("args", [("status",), ("check",), ("receipt",), ("purge", "--dry-run"), ("locate", "3")])
def test_commands_that_look_change_nothing_even_when_a_removal_was_interrupted(system, args):
    delete_and_die(SystemFolder(system), [5])
    before = files_of(system)
    command, *rest = args
    run(command, system, *rest, code=REFUSED if command == "check" else FINE)
    assert files_of(system) == before


# locate


def test_locate_shows_where_examples_lie_and_which_were_deleted(system):
    folder = SystemFolder(system)
    apply(folder, [3])
    records = json_of("locate", system, "3", "4", "--group", "user-4")["examples"]
    assert [record["id"] for record in records] == [3, 4, 8, 9]
    assert records[0] == {"id": 3, "deleted": True, "shard": None, "slice": None, "group": None}
    for record in records[1:]:
        row = folder.table.rows[record["id"]]
        assert (record["shard"], record["slice"], record["group"]) == (row.shard, row.slice, row.group)
    text = run("locate", system, "3", "4").stdout
    assert re.search(r"^3 +deleted", text, re.MULTILINE) and re.search(r"^4 +\d +\d +user-2", text, re.MULTILINE)


def test_names_are_shown_as_they_are_and_not_as_markup(tmp_path):
    names = ["[red]x[/red]", ":smile:", "\x1b[31mx", "a\nb", *NAMES[:8]]
    grow(new_system(tmp_path / "system", names, groups=None, config=CONFIG))
    text = run("locate", tmp_path / "system", *names[:4]).stdout
    assert "[red]x[/red]" in text and ":smile:" in text and "\\x1b[31mx" in text and "a\\nb" in text


# Ids: as arguments, from a file, from standard input


@pytest.mark.parametrize(
    ("args", "stdin", "expected"),
    [
        (["3", "4"], None, [3, 4]),
        (["3", "3", " 4 "], None, [3, 4]),
        (["-"], "3\n4\n", [3, 4]),
        (["-"], "3\r\n\r\n4", [3, 4]),
        (["-"], "\ufeff3\n4\n", [3, 4]),
        (["-"], "\ufeff3\r\n4\r\n".encode("utf-16-le"), [3, 4]),
        (["-"], "\ufeff3\n4".encode("utf-16-be"), [3, 4]),
        (["5", "-"], "3\n", [5, 3]),
        (["--from-file", "ids.txt"], None, [7, 8]),
        (["1", "--from-file", "ids.txt", "-"], "2", [1, 2, 7, 8]),
        (["--group", "user-0", "--group", "user-1"], None, [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_ids_come_from_arguments_files_and_standard_input(system, args, stdin, expected):
    Path("ids.txt").write_text("\ufeff7\n8\n", encoding="utf-8")
    records = json_of("locate", system, *args, stdin=stdin)["examples"]
    assert [record["id"] for record in records] == expected


def test_an_id_that_starts_with_a_dash_comes_after_two(tmp_path):
    ids = [-5, *range(11)]
    grow(new_system(tmp_path / "system", ids))
    assert "-5" in run("locate", tmp_path / "system", "--", "-5").stdout
    run("locate", tmp_path / "system", "-5", code=USAGE)


def test_ids_that_are_texts_are_taken_as_they_are(tmp_path):
    names = ["17", "017", " 17", *NAMES[:9]]
    grow(new_system(tmp_path / "system", names))
    (tmp_path / "ids.txt").write_bytes(b"17\n017\n 17\n")
    found = json_of("locate", tmp_path / "system", "--from-file", tmp_path / "ids.txt")["examples"]
    assert [record["id"] for record in found] == ["17", "017", " 17"]


@pytest.mark.parametrize("command", ["locate", "unlearn"])
@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["x"], REFUSED, "Got 'x', but the ids of this system are integers such as 0"),
        (["3", "99"], REFUSED, "Unknown ids: 99"),
        (["--group", "nobody"], REFUSED, "Unknown groups: 'nobody'"),
        (["-"], REFUSED, "standard input is no UTF-8 text"),
        (["--from-file", "no.txt"], USAGE, "does not exist"),
        (["--from-file", "system"], USAGE, "is a directory"),
        ([], USAGE, "Got no ids"),
        (["--from-file", "empty.txt"], USAGE, "Got no ids"),
        (["-3"], USAGE, "No such option"),
    ],
    ids=str,
)
def test_wrong_ids_are_refused_and_nothing_changes(system, command, args, code, message):
    before = files_of(system)
    Path("empty.txt").write_text("\n\n")
    result = run(command, system, *args, code=code, stdin=b"\xff" if args == ["-"] else None)
    assert message in unboxed(result.stderr) and result.stdout == ""
    assert ("Nothing was deleted" in result.stderr) <= (command == "unlearn")
    assert files_of(system) == before


def test_an_empty_standard_input_names_nobody(system):
    assert "Got no ids" in unboxed(run("unlearn", system, "-", stdin="\n", code=USAGE).stderr)
    # A group is enough.
    assert json_of("unlearn", system, "-", "--group", "user-0", stdin="")["report"]["deleted"] == 2


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "check"])
def test_every_command_refuses_a_system_that_leads_elsewhere(command, system, tmp_path):
    rest = {"locate": ["1"], "unlearn": ["1"], "export": ["0", "target"]}.get(command, [])
    (system / "ledger.jsonl").rename(tmp_path / "elsewhere")
    (system / "ledger.jsonl").symlink_to(tmp_path / "elsewhere")
    assert "ledger.jsonl is a symbolic link" in refusal(command, system, *rest)
    assert (tmp_path / "elsewhere").read_bytes() == b""


# unlearn


def test_unlearn_says_what_went_and_where_it_is_recorded(system):
    result = json_of("unlearn", system, "3", "--group", "user-4")
    assert result["dry_run"] is False
    report, receipt = result["report"], result["receipt"]
    assert report["deleted"] == 3 and set(report["stages_removed"]) == {s["stage"] for s in receipt["stages_removed"]}
    assert receipt["line"] == 1 and receipt["chain_verified"] is True and len(receipt["ids"]) == 3
    assert json_of("receipt", system, "--id", "3")["receipts"] == [receipt]
    text = run("unlearn", system, "5").stdout
    assert "unlearned 1 example in" in text and "line 2 of the ledger, " in text and "stages removed: shard-" in text
    run("check", system)


def test_unlearn_twice_is_fine_and_leaves_no_second_line(system):
    run("unlearn", system, "3")
    again = json_of("unlearn", system, "3")
    assert again["receipt"] is None and again["report"]["already_deleted"] == 1
    assert "unlearned 0 examples" in run("unlearn", system, "3").stdout
    assert len((system / "ledger.jsonl").read_text().splitlines()) == 1


def test_a_deleted_group_is_told_from_one_that_never_was(system):
    run("unlearn", system, "3")
    run("unlearn", system, "--group", "user-4")
    text = run("unlearn", system, "--group", "user-4").stdout
    assert "group 'user-4' was deleted before" in text
    assert json_of("unlearn", system, "--group", "user-4", "--dry-run")["preview"]["deleted_groups"] == ["user-4"]
    assert "was deleted before" in run("unlearn", system, "--group", "user-4", "--dry-run").stdout
    assert "was deleted before" in run("unlearn", system, "--group", "user-4", "--later").stdout
    assert run("locate", system, "--group", "user-4").stdout == "group 'user-4' was deleted in line 2 of the ledger\n"
    text = run("locate", system, "5", "--group", "user-4").stdout
    assert "in line 2 of the ledger" in text and re.search(r"^5 +\d", text, re.MULTILINE)
    found = json_of("locate", system, "--group", "user-4", "--group", "user-3")
    assert found["deleted_groups"] == [{"group": "user-4", "line": 2}] and len(found["examples"]) == 2


def test_requests_are_recorded_for_later_and_applied_in_one_go(system):
    before = stages_on_disk(system)
    said = run("unlearn", system, 3, "--later").stdout
    assert "1 example to be forgotten" in said and "when `hf-s3t apply-pending` is run: 1 example" in said
    found = json_of("unlearn", system, "--group", "user-2", "--later", "--max-delay", 60)["pending"]
    assert (found["requested"], found["pending"]) == (2, 3) and found["apply_by"] is not None
    said = run("unlearn", system, 3, "--later").stdout
    assert f"or by the first load of the model after {found['apply_by']}: 3 examples" in said
    assert stages_on_disk(system) == before
    assert json_of("status", system)["pending"] == 3
    assert "in until then: 3 examples" in run("status", system).stdout
    preview = json_of("apply-pending", system, "--dry-run")["preview"]
    assert stages_on_disk(system) == before
    report = json_of("apply-pending", system)["report"]
    assert report["deleted"] == 3 and report["stages_removed"] == preview["stages_removed"]
    assert stages_on_disk(system) == before - set(report["stages_removed"])
    assert json_of("apply-pending", system)["report"]["deleted"] == 0
    assert json_of("status", system)["pending"] == 0


@pytest.mark.parametrize(
    "options",
    [
        ("--max-delay", "5"),
        ("--later", "--max-delay", "-1"),
        ("--later", "--dry-run"),
        ("--later", "--include-duplicates"),
    ],
)
def test_options_that_do_not_go_together_are_refused(system, options):
    run("unlearn", system, 3, *options, code=USAGE)
    assert json_of("status", system)["pending"] == 0


def test_unlearn_passes_over_unknown_ids_when_told_to(system):
    report = json_of("unlearn", system, "3", "99", "--missing", "ignore")["report"]
    assert (report["deleted"], report["unknown"], report["unknown_groups"]) == (1, 1, 0)
    text = run("unlearn", system, "99", "98", "--group", "nobody", "--missing", "ignore").stdout
    assert "2 ids were never trained on, and passed over" in text
    assert "1 group was never trained on, and passed over" in text
    assert "1 id was never" in run("unlearn", system, "99", "--missing", "ignore", "--dry-run").stdout
    assert "1 id was never" in run("unlearn", system, "99", "--missing", "ignore", "--later").stdout
    assert "never trained on" not in run("unlearn", system, "5", "--missing", "ignore").stdout
    run("unlearn", system, "4", "--missing", "skip", code=USAGE)


def test_unlearn_to_exhaustion_does_its_work_and_says_so(system):
    result = run("unlearn", system, *NUMBERS, code=EXHAUSTED)
    assert "no shard is left to answer, and no example to train on: train a new system" in result.stdout
    assert len(SystemFolder(system).table) == 0
    assert "no example to train on" in run("status", system, code=EXHAUSTED).stdout


def test_unlearn_to_exhaustion_says_how_many_examples_can_be_trained_on(system):
    folder = SystemFolder(system)
    firsts = [folder.table.members(shard, slice_)[0] for shard in range(2) for slice_ in range(3)]
    result = run("unlearn", system, *firsts, code=EXHAUSTED)
    line = "no shard is left to answer: `train()` grows stages on the 6 examples left\n"
    assert line in result.stdout and line in run("status", system, code=EXHAUSTED).stdout


def test_a_dry_run_shows_what_would_go_and_its_cost_and_changes_nothing(system):
    before = files_of(system)
    seen = json_of("unlearn", system, "3", "--group", "user-4", "--dry-run")
    text = run("unlearn", system, "3", "--group", "user-4", "--dry-run").stdout
    assert json_of("unlearn", system, *NUMBERS, "--dry-run", code=EXHAUSTED)["preview"]["would_exhaust"] is True
    assert "no shard would be left" in run("unlearn", system, *NUMBERS, "--dry-run", code=EXHAUSTED).stdout
    assert files_of(system) == before
    assert seen["dry_run"] is True
    assert list(seen["preview"]) == [
        "requested",
        "present",
        "already_deleted",
        "duplicates",
        "stages_removed",
        "depths_before",
        "depths_after",
        "would_exhaust",
        "deletions_left_before",
        "deletions_left_after",
        "deleted_groups",
        "unknown",
        "unknown_groups",
    ]
    assert "would unlearn 3 examples" in text and "stages that would go: shard-0/" in text
    assert re.search(r"until all shards are dead: 14\.7 -> \d+\.\d", text)
    done = json_of("unlearn", system, "3", "--group", "user-4")["report"]
    assert done["depths_after"] == seen["preview"]["depths_after"]


# check


def test_check_is_quiet_about_an_intact_folder(system):
    assert run("check", system).stdout == "no problems\n"
    assert json_of("check", system) == {"ok": True, "problems": [], "notes": []}


def test_check_says_what_is_wrong(system):
    (system / "ledger.key").chmod(0o640)
    (system / "runs").mkdir()
    (system / "notes.txt").touch()
    result = run("check", system, code=REFUSED)
    lines = result.stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["note", "problem", "problem"]
    found = json_of("check", system, code=REFUSED)
    assert found["ok"] is False and len(found["problems"]) == 2 and len(found["notes"]) == 1


def test_check_of_no_system_is_a_problem(tmp_path):
    assert "holds no S3T system" in run("check", tmp_path, code=REFUSED).stdout


# receipt


def test_receipts_for_people(system):
    assert run("receipt", system).stdout.startswith("line")
    run("unlearn", system, "3")
    run("unlearn", system, "--group", "user-4")
    assert len(re.findall(r"^\d +20\d\d-.* deletion ", run("receipt", system).stdout, re.MULTILINE)) == 2
    text = run("receipt", system, "--line", "2").stdout
    for label in ("line", "hash", "previous", "chain", "id (keyed digest)", "group (keyed digest)", "stages removed"):
        assert label in text
    assert "verified" in text and "(slices " in text and "user-4" not in text
    assert run("receipt", system, "--id", "8").stdout == text


def test_receipts_for_machines(system):
    run("unlearn", system, "3")
    found = json_of("receipt", system)
    assert (
        list(found) == ["problem", "receipts", "signatures"] and found["problem"] is None and not found["signatures"]
    )
    assert found == json_of("receipt", system, "--line", "1") == json_of("receipt", system, "--id", "3")


def test_an_id_that_was_not_deleted_has_no_receipt(system):
    result = run("receipt", system, "--id", "3", code=REFUSED)
    assert result.stdout == "" and "knows of no deletion of '3'" in result.stderr
    assert json_of("receipt", system, "--id", "3", code=REFUSED)["receipts"] == []


def test_a_broken_chain_is_told_and_the_receipts_still_shown(system):
    run("unlearn", system, "3")
    run("unlearn", system, "4")
    lines = (system / "ledger.jsonl").read_text().splitlines(keepends=True)
    (system / "ledger.jsonl").write_text(lines[0].replace("2", "3", 1) + lines[1])
    found = json_of("receipt", system, code=REFUSED)
    assert "does not continue" in found["problem"] or "version" in found["problem"]
    result = run("receipt", system, "--line", "2", code=REFUSED)
    assert "NOT VERIFIED" in result.stdout and "Not verified: " in result.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--line", "9"], REFUSED, "Got line 9; the ledger holds no line"),
        (["--line", "0"], USAGE, "greater than or equal to 1"),
        (["--line", "x"], USAGE, "unable to parse string as an integer"),
        (["--line", "1", "--id", "3"], USAGE, "both --line and --id"),
    ],
)
def test_receipts_that_are_not_there_are_refused(system, args, code, message):
    assert message in unboxed(run("receipt", system, *args, code=code).stderr)


def test_without_the_secret_no_id_is_looked_up(system, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "x" * 40)
    assert "is not the one" in refusal("receipt", system, "--id", "3")


# purge


def test_purge_lists_and_removes(system):
    folder = SystemFolder(system)
    add_checkpoint(folder, sorted(folder.valid_stages)[0])
    for name in ("system/runs/x", "data/cache-1.arrow", "data/cache-2.arrow"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"x" * 2500)
    planned = json_of("purge", system, "--dry-run")
    assert planned["dry_run"] is True and {r["action"] for r in planned["remnants"]} == {"remove", "keep"}
    assert list(planned["remnants"][0]) == ["path", "kind", "bytes", "action", "advice", "folder"]
    text = run("purge", system, "--dry-run").stdout
    assert re.search(r"^keep +dataset cache +5\.0 kB +data \(2 files\)$", text, re.MULTILINE)
    assert "tracker logs: " in text and "to remove" in text
    text = run("purge", system, "--yes-remove", "data", "--yes-remove", "system/runs").stdout
    assert re.search(r"^removed +checkpoint +\d+ bytes +system/checkpoints/", text, re.MULTILINE)
    assert not (system / "runs").exists() and list(Path("data").iterdir()) == []
    assert run("purge", system).stdout == "removed 0 bytes, kept 0 bytes\n"
    assert run("purge", system, "--dry-run").stdout == "to remove 0 bytes, kept 0 bytes\n"


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--yes-remove", "system"], REFUSED, "none of the places found"),
        (["--yes-remove", "/"], REFUSED, "none of the places found"),
        (["--dataset-cache", "nowhere"], USAGE, "does not exist"),
        (["3"], USAGE, "unexpected extra argument"),
    ],
)
def test_purge_refuses_what_it_may_not_remove(system, args, code, message):
    before = files_of(system)
    assert message in unboxed(run("purge", system, *args, code=code).stderr)
    assert files_of(system) == before


def test_purge_tells_of_links(system):
    (system / "runs").symlink_to("/")
    result = run("purge", system, code=REFUSED)
    assert "Problem: system/runs is a symbolic link" in result.stderr
    (system / "runs").unlink()
    (system / "checkpoints").symlink_to("/")
    assert "checkpoints is a symbolic link" in refusal("purge", system)


# export


class _Model:
    """Stands in for the one thing that needs torch."""

    def __init__(self, exported):
        self.exported = exported

    def export_adapter(self, shard, target):
        self.exported.append((shard, target))


@pytest.fixture
def exported(monkeypatch):
    exported = []
    monkeypatch.setattr("hf_s3t.cli.folder.load_model", lambda folder, base_model: _Model(exported))
    return exported


def test_export_writes_the_stack_of_a_shard(system, exported):
    assert "no deletion reaches this copy" in run("export", system, "1", "target").stdout
    assert exported == [(1, Path("target"))]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["2", "target"], REFUSED, "Got shard 2, expected 0 to 1"),
        (["-1", "target"], USAGE, "No such option"),
        (["x", "target"], USAGE, "unable to parse string as an integer"),
        (["0"], USAGE, "Missing argument"),
        (["0", "system"], REFUSED, "is no empty folder"),
        (["0", "system/exported"], REFUSED, "inside the system's folder"),
        (["0", "file"], REFUSED, "is no empty folder"),
    ],
)
def test_export_refuses_before_it_loads_a_model(system, exported, args, code, message):
    Path("file").touch()
    before = files_of(system)
    assert message in unboxed(run("export", system, *args, code=code).stderr)
    assert exported == [] and files_of(system) == before


def test_a_dead_shard_cannot_be_exported(system, exported):
    folder = SystemFolder(system)
    apply(folder, [i for i, row in folder.table.rows.items() if row.shard == 0])
    assert "Shard 0 has no stage left" in refusal("export", system, "0", "target", code=EXHAUSTED)
    run("export", system, "1", "target")


def test_export_is_the_model_s(tmp_path):
    from support.tiny import make_trainer, plant_stages, tiny_llama

    tiny_llama().save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plant_stages(make_trainer(tmp_path / "system", base))
    run("export", tmp_path / "system", "0", tmp_path / "target", "--base-model", tmp_path / "base")
    assert (tmp_path / "target" / "adapter_model.safetensors").is_file()
    assert json_of("receipt", tmp_path / "system", "--line", "1")["receipts"][0]["kind"] == "export"
    message = refusal("export", tmp_path / "system", "0", tmp_path / "other", "--base-model", tmp_path / "nowhere")
    assert "The base model cannot be loaded" in message and "--base-model" in message
    assert "\\n" not in message and "`base_model`" not in message and "`token`" not in message
    assert "the module" not in message
    # A base that was made in memory has no name to load it by.
    plant_stages(make_trainer(tmp_path / "nameless", tiny_llama()))
    message = refusal("export", tmp_path / "nameless", "0", tmp_path / "other")
    assert "--base-model" in message and "`base_model`" not in message


# pull


def test_without_the_hub_pull_does_not_advise_itself(tmp_path):
    message = refusal("pull", "nobody/nothing", tmp_path / "pulled")
    assert "Go online, then call again" in message and "hf-s3t pull" not in message
    assert not (tmp_path / "pulled").exists()


# Whatever is typed


WORDS = st.one_of(
    st.sampled_from(
        [
            *COMMANDS, "FOLDER", "FOLDER", "FOLDER", "FOLDER/stages", "nowhere", "0", "3", "11", "99", "-", "--", "-5",
            "user-4", *USERS[:2], "--json", "--dry-run", "--group", "--from-file", "--id", "--line", "--missing",
            "ignore", "--yes-remove", "--dataset-cache", "--repo-id", "--help", "--version", "--include-duplicates",
        ]
    ),
    st.text(st.characters(exclude_characters="\0"), max_size=6),
)  # fmt: skip
LINES = st.lists(st.sampled_from(COMMANDS), min_size=1, max_size=1).flatmap(
    lambda head: st.lists(WORDS, max_size=5).map(lambda tail: [*head, "FOLDER", *tail])
) | st.lists(WORDS, max_size=6)


@pytest.fixture(scope="module")
def playground(grown, tmp_path_factory):
    """A working folder with a copy of the system; it tells whether a command changed the copy, and puts it back."""
    place = tmp_path_factory.mktemp("typed")
    whole = files_of(grown)
    with contextlib.chdir(place), pytest.MonkeyPatch.context() as patch:

        def load(folder, base_model):
            raise S3TError("There is no model here.")

        patch.setattr("hf_s3t.cli.folder.load_model", load)

        shutil.copytree(grown, "FOLDER")

        def changed() -> bool:
            if files_of("FOLDER") == whole:
                return False
            shutil.rmtree("FOLDER", ignore_errors=True)
            shutil.copytree(grown, "FOLDER")
            return True

        yield changed


def _typed(playground, words, stdin):
    result = CliRunner().invoke(cli.app, words, input=stdin, prog_name="hf-s3t")
    assert isinstance(result.exception, (SystemExit, type(None))), result.exc_info
    assert result.exit_code in (FINE, REFUSED, USAGE, EXHAUSTED)
    assert "Traceback" not in result.output
    changed = playground()
    assert not changed or (words[0] == "unlearn" and result.exit_code in (FINE, EXHAUSTED))
    assert not (changed and "--dry-run" in words[: words.index("--") if "--" in words else None])
    assert {entry.name for entry in Path().iterdir()} == {"FOLDER"}


@settings(max_examples=300)
@given(words=LINES, stdin=st.sampled_from(["", "3\n", "x\n", "\ud7ff\n"]))
def test_whatever_is_typed_ends_in_a_code_and_changes_only_what_it_says(playground, words, stdin):
    _typed(playground, words, stdin)


@pytest.mark.slow
@settings(max_examples=2000)
@given(words=LINES, stdin=st.binary(max_size=8))
def test_whatever_is_typed_and_read_ends_in_a_code(playground, words, stdin):
    _typed(playground, words, stdin)


# plan: before there is a system

PLAN = ("plan", "--examples", 52_000, "--deletions-per-month", 4, "--hours-per-epoch", 3)


@pytest.fixture
def llama(tmp_path):
    """A folder with the config of a language model; of few layers, among whose plans the best is soon found."""
    config = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 4096}
    config |= {"intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 8}
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config))
    return tmp_path / "llama"


def test_plan_recommends_a_system(llama):
    from hf_s3t.analysis.backbone import Backbone
    from hf_s3t.analysis.planning import Workload, recommend

    text = run(*PLAN, "--model", llama, "--rank", 32).stdout
    expected = recommend(
        Workload(52_000, 4.0, 3.0), Backbone.from_config(json.loads((llama / "config.json").read_text()))
    )
    best = expected.chosen
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert lines["shards (m)"].endswith(f" {best.num_shards}")
    assert f"{best.num_slices} of {best.layers_per_slice} layers each" in text
    assert lines["stages per shard"].endswith(f" {len(best.family)}: {best.plan}")
    assert lines["rows of earlier slices"].endswith(" replay=0.25, by 3466 rows a slice (600 or more)")
    assert lines["after each request"].endswith(f" grow {best.after_each_request}")
    assert f"{best.mean_depth:.1f} of {best.num_slices} slices serve" in lines["in 12 months"]
    assert f"expected after {best.months_until_first_dead_shard:.1f} months" in lines["first dead shard"]
    assert f"expected after {best.months_until_exhausted:.1f} months" in lines["exhausted"]
    first_slices = best.targeted_deletions_until_first_dead_shard
    assert f"{first_slices} kill a shard, {first_slices * best.num_shards} exhaust the system" in text
    assert text.count("→") == 1 and re.search(r"\d [MG]B\b", text)
    after_a_year = [best.depths[-1], best.depths_without[-1], expected.published_depths[-1]]
    assert re.search(r"^12 +" + " +".join(f"{depth:.1f}" for depth in after_a_year) + "$", text, re.MULTILINE)


def test_plan_as_json(llama):
    found = json_of(*PLAN, "--model", llama / "config.json", "--months", 3, "--depth", 0.5, "--until", "exhausted")
    assert set(found) == {
        "workload", "backbone", "measured", "chosen", "options", "meets_goal", "goal_months", "goal_depth", "until",
        "months", "published_depths", "published_hours", "learns", "gate", "answered_by", "notes", "workers",
    }  # fmt: skip
    assert found["workload"] == {
        "num_examples": 52_000, "deletions_per_month": 4.0, "hours_per_epoch": 3.0, "epochs": 3, "batch_size": 8,
    }  # fmt: skip
    assert found["backbone"]["num_layers"] == 8 and found["meets_goal"] and found["until"] == "exhausted"
    assert found["chosen"] in found["options"] and found["measured"] is None
    assert found["chosen"]["mean_depth"] >= 0.5 * found["chosen"]["num_slices"]
    assert found["chosen"]["storage_bytes"] > 0 and len(found["months"]) == len(found["chosen"]["depths"])


def test_plan_without_a_model_needs_only_its_layers():
    assert "not known without" in run(*PLAN, "--num-layers", 8).stdout
    assert json_of(*PLAN, "--num-layers", 8, "--hidden-size", 64)["backbone"]["adapter_weights_per_layer"] == 4096


def test_plan_says_what_decided(llama):
    few = ("plan", "--examples", 300, "--deletions-per-month", 9, "--hours-per-epoch", 0.1, "--model", llama)
    text = run(*few, "--depth", 1, "--max-hours-per-month", 0.01).stdout
    assert "note: Nothing considered is expected to last 12 months until a shard is dead" in text
    assert "a stage of fewer than about 50 steps does not converge" in text


def test_plan_says_one_of_a_thing_as_one():
    text = run(
        *PLAN, "--num-layers", 4, "--months", 1, "--max-shards", 3, "--until", "exhausted", "--replay", 1
    ).stdout
    assert "in 1 month  " in text and "hours in 1 month  " in text and "1 kills a shard, 3 exhaust the system" in text


def test_plan_says_who_answers_what_a_system_is_to_learn():
    facts, skills = (run(*PLAN, "--num-layers", 8, "--learns", learns).stdout for learns in ("facts", "skills"))
    gate = "gate='terms', gate_top_k=1, gate_temperature=1.0"
    assert f"answered by                {gate}: the shard that was taught it" in facts
    assert "note: A gate asks the shard that was taught a subject: set group_column" in facts
    assert "answered by                the mean of all shards\n" in skills and "group_column" not in skills
    told = json.loads(run(*PLAN, "--num-layers", 8, "--learns", "facts", "--json").stdout)
    assert told["learns"] == "facts" and told["gate"] == {"gate": "terms", "gate_top_k": 1, "gate_temperature": 1.0}
    assert "answered by" not in run(*PLAN, "--num-layers", 8).stdout


def test_plan_takes_replay_as_given():
    assert "replay=1, as given\n" in run(*PLAN, "--num-layers", 8, "--replay", 1).stdout


@pytest.fixture
def tiny(tmp_path):
    """A folder with a language model of six layers and its tokenizer, and a file of rows."""
    from support.stand_ins import tokenizer_of_words
    from support.tiny import tiny_llama

    tiny_llama(6).save_pretrained(tmp_path / "tiny")
    tokenizer_of_words().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_plan_measures_stages_of_a_model(tiny, tmp_path):
    rows = [{"prompt": f"what is {n}", "completion": " it is"} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ("--deletions-per-month", 4, "--model", tiny, "--measure", tmp_path / "rows.jsonl", "--rank", 2)
    found = json_of("plan", *given, "--batch-size", 1, "--max-length", 16)
    measured, load = found["measured"], found["workload"]
    # What is left out is as measured.
    assert load["num_examples"] == measured["rows"] == 60
    assert load["hours_per_epoch"] == measured["hours_per_epoch"] > 0
    assert measured["hours_per_epoch"] == pytest.approx(measured["seconds_per_step_of_all_layers"] * 60 / 3600)
    # Four stages of one layer of the six: below them two have no adapter.
    assert measured["depths"] == [1, 4] and measured["peak_bytes"] > 10**7
    for seconds, examples in zip(measured["seconds_per_step"], measured["examples_per_second"], strict=True):
        assert seconds > 0 and examples == pytest.approx(1 / seconds)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "tiny"]


def test_plan_measures_a_classifier(tiny, tmp_path):
    rows = [{"text": f"row {n}", "label": "abc"[n % 3]} for n in range(80)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ("--deletions-per-month", 4, "--model", tiny, "--measure", tmp_path / "rows.jsonl", "--rank", 2)
    text = run("plan", *given, "--batch-size", 2, "--examples", 4000, "--hours-per-epoch", 2).stdout
    assert text.startswith("measured on ") and "80 rows:" in text
    assert re.search("first stage .* examples a second, 1 layer trained", text)
    assert re.search("last stage .* examples a second, 4 layers trained", text)
    # What is given is taken as it is.
    assert "shards (m)" in text and "most memory" in text


def test_plan_says_how_long_more_workers_take():
    text = run(*PLAN, "--num-layers", 8, "--workers", "1,2, 4").stdout
    rows = [line.split() for line in text[text.index("first training over workers") :].splitlines()[3:6]]
    assert [row[0] for row in rows] == ["1", "2", "4"] and rows[0][-2:] == ["1.0", "100%"]
    found = json_of(*PLAN, "--num-layers", 8, "--workers", "1,2")
    assert found["workers"][0]["hours"] == pytest.approx(found["chosen"]["training_hours"])


@pytest.mark.parametrize("workers", ["0", "1,,2", "two", "1,1"])
def test_plan_refuses_numbers_of_workers_that_are_none(workers):
    assert "expected different numbers above 0" in run(*PLAN, "--num-layers", 8, "--workers", workers, code=2).stderr


def test_plan_draws(tmp_path):
    run(*PLAN, "--num-layers", 8, "--workers", "1,2,4,8,16,32,64,128,256,512", "--figure", tmp_path / "plan.svg")
    text = (tmp_path / "plan.svg").read_text()
    assert "training (hours in 12 months)" in text and "months, at 4 requests each" in text


@pytest.mark.parametrize(
    "options, says",
    [
        (("--num-layers", 4, "--max-hours", 0.001), "Error: --max-hours=0.001, but .* Allow more hours"),
        (
            ("--num-layers", 4, "--batch-size", 52_000),
            "Error: --examples=52000 with --batch-size=52000: .* Lower the batch size",
        ),
        (("--num-layers", 4, "--figure", "plan.pdf"), "drawn as .png or .svg, got 'plan.pdf'"),
        (("--model", "./nowhere"), "nowhere is not there. Give the folder of a model"),
        (("--model", "no/such-model"), "cannot be had from the Hub: .* Give the model's folder, or --num-layers"),
        (("--model", __file__), "is no JSON: .* Give another model, or --num-layers"),
    ],
)
def test_plan_refuses(options, says):
    assert re.search(says, refusal(*PLAN, *options))


@pytest.mark.parametrize(
    "option, value",
    [
        ("--examples", 0), ("--num-layers", 0), ("--hidden-size", -1), ("--rank", 0), ("--num-labels", -1),
        ("--epochs", 0), ("--batch-size", 0), ("--max-shards", 0), ("--months", -1), ("--months", "nan"),
        ("--max-hours", 0), ("--deletions-per-month", 0), ("--hours-per-epoch", "inf"), ("--depth", 1.5),
        ("--replay", -0.1), ("--max-hours-per-month", "nan"), ("--max-length", 0),
    ],
)  # fmt: skip
def test_a_number_that_plan_cannot_mean_is_wrong_usage_of_its_option(option, value):
    given = {"--num-layers": 4, **dict(zip(PLAN[1::2], PLAN[2::2])), option: value}
    said = unboxed(run("plan", *(f"{name}={number}" for name, number in given.items()), code=USAGE).stderr)
    assert f"Invalid value for '{option}'" in said or f"Invalid value for {option}" in said, said


@pytest.mark.parametrize(
    "options", [(), ("--model", "a/b", "--num-layers", 3), ("--model", "a/b", "--hidden-size", 3)]
)
def test_plan_takes_a_model_or_its_sizes(options):
    assert "expected --model, or --num-layers" in unboxed(run(*PLAN, *options, code=USAGE).stderr)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--hours-per-epoch", 1), "Got neither --examples nor --measure. Give --examples"),
        (("--examples", 10), "Got neither --hours-per-epoch nor --measure. Give --hours-per-epoch"),
        (("--measure", "rows.csv"), "Got --measure without --model"),
    ],
)
def test_plan_needs_numbers_or_rows_to_measure_with(options, says):
    given = ("plan", "--deletions-per-month", 1, "--num-layers", 4)
    assert says in unboxed(run(*given, *options, code=USAGE).stderr)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rows.txt", "a row", "rows.txt: expected a file of .json, .jsonl, .csv, .parquet"),
        ("rows.csv", "question,answer\nwhat,this\n", "columns question, answer; expected 'text' or 'sentence' with"),
        ("nowhere", None, "nowhere: no rows to be had: .* Give a file of rows"),
        ("empty.jsonl", "", "empty.jsonl: no rows to be had: it holds none. Give a file of rows"),
    ],
)
def test_plan_refuses_rows_that_it_cannot_measure_with(llama, tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_text(content)
    assert re.search(says, refusal("plan", "--deletions-per-month", 1, "--model", llama, "--measure", tmp_path / name))


def test_plan_refuses_a_model_that_cannot_be_loaded(llama, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\nwhat,1\nthis,0\n")
    given = ("plan", "--deletions-per-month", 1, "--model", llama, "--measure", tmp_path / "rows.csv")
    assert re.search("llama cannot be loaded: .* Give a model with its tokenizer", refusal(*given))
