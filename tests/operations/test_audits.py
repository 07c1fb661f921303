"""Proof by repetition for a third party: the pack, the audit in a process of theirs, and their result taken back."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.folders import NAMES, add, add_checkpoint, apply, grow, new_system
from support.receipts import OTHER_KEY, OUR_KEY, public, signer
from typer.testing import CliRunner

from hf_s3t.cli import app as cli
from hf_s3t.errors import ConfigError, FolderError, ReceiptError
from hf_s3t.folder.audits_file import read_audits
from hf_s3t.folder.layout import AUDITS_FILE, KEY_FILE
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.audits import add_audit, signed_result, write_audit_pack
from hf_s3t.operations.inspection import inspect
from hf_s3t.operations.reports import make_report, render
from hf_s3t.operations.signed_receipts import signed_receipt
from hf_s3t.plan import StageKey
from hf_s3t.signing.verification import verify


pytestmark = pytest.mark.usefixtures("surroundings")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    path = tmp_path_factory.mktemp("audits") / "system"
    folder = grow(new_system(path, NAMES))
    apply(folder, NAMES[:1])
    return path


@pytest.fixture
def system(grown, tmp_path):
    return SystemFolder(shutil.copytree(grown, tmp_path / "system"))


def tip_of(folder) -> str:
    return str(max(folder.valid_stages, key=lambda key: (key.depth, key)))


def found(stages, differing=(), **more):
    """What `trainer.verify()` would return."""
    values = {"mismatches": {key: ["a"] for key in differing}, "circumstances": {}, "trained_here": (), **more}
    return SimpleNamespace(stages=tuple(stages), **values)


def audited(folder, tmp_path, differing=(), **more) -> bytes:
    stages = write_audit_pack(folder, tmp_path / "pack", [tip_of(folder)])
    return signed_result(tmp_path / "pack", found(stages, differing, **more), signer(OTHER_KEY))


def test_a_pack_has_what_it_takes_and_no_secret(system, tmp_path):
    add_checkpoint(system, sorted(system.valid_stages)[0])
    tip = tip_of(system)
    stages = write_audit_pack(system, tmp_path / "pack", [tip])
    assert {path.name for path in (tmp_path / "pack").iterdir()} == {"README.md", "audit.json", "audit.py", "system"}
    inside = tmp_path / "pack" / "system"
    packed = {str(file.parent.relative_to(inside / "stages")) for file in inside.rglob("stage.json")}
    assert packed == set(stages) and tip in stages
    assert not list(inside.rglob(KEY_FILE)) and not (inside / "checkpoints").exists()
    manifest = json.loads((tmp_path / "pack" / "audit.json").read_text())
    for name in stages:
        told = manifest["stages"][name]
        assert told["adapter_sha256"] == system.adapter_digest(next(k for k in system.valid_stages if str(k) == name))
        assert {"seed", "slices", "recipe", "circumstances", "layers"} <= told.keys()
    assert manifest["system"] == system.identity and manifest["layout"]["num_shards"] == 2
    entry = system.ledger.entries[-1]
    assert entry.kind == "export" and set(entry.removed) == set(stages), "handed out, and noted"


def test_a_pack_of_what_is_not_there_is_refused_and_nothing_noted(system, tmp_path):
    lines = len(system.ledger.lines)
    for stages in ([], ["shard-9/0"], ["shard-0/0-1-2-0"]):
        with pytest.raises(ConfigError):
            write_audit_pack(system, tmp_path / "pack", stages)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(FolderError, match="no empty folder"):
        write_audit_pack(system, tmp_path / "full", [tip_of(system)])
    assert len(system.ledger.lines) == lines and not (tmp_path / "pack").exists()


@pytest.mark.parametrize("differing", [False, True])
def test_their_result_is_in_the_receipt_and_in_the_report(system, tmp_path, differing):
    tip = tip_of(system)
    result = audited(system, tmp_path, [tip] if differing else [])
    add_audit(system, result, public(OTHER_KEY))
    (told,) = verify(signed_receipt(system.path, 1, signer()).envelope, public()).audits
    depth = StageKey.from_path(f"stages/{tip}").depth
    assert told["by"] == public(OTHER_KEY).keyid and told["differing"] == int(differing)
    assert told["equal"] == depth - int(differing)
    assert "bit for bit the same" in render(make_report(system.path), "md")
    assert "bit for bit the same" in render(make_report(system.path), "html")
    assert inspect(system.path).problems == ()
    add_audit(system, result, public(OTHER_KEY))
    assert len(read_audits(system.path)) == 1, "the same result is one"


@pytest.mark.parametrize("swapped", ["a stage", "the system", "the manifest"])
def test_a_pack_whose_stages_are_not_those_that_it_names_is_not_signed_for(swapped, system, tmp_path):
    """Else an owner could have honest stages trained again, and the others, by the manifest, signed for."""
    pack = tmp_path / "pack"
    stages = write_audit_pack(system, pack, [tip_of(system)])
    if swapped == "a stage":
        adapter = pack / "system" / "stages" / stages[0] / "adapter_model.safetensors"
        adapter.write_bytes(adapter.read_bytes() + b"\0")
    else:
        manifest = json.loads((pack / "audit.json").read_text())
        change = {"system": "0" * 32} if swapped == "the system" else {"pack_version": 2}
        (pack / "audit.json").write_text(json.dumps({**manifest, **change}))
    expected = {"a stage": f"{stages[0]} in system is not", "the system": "the system in system is not"}
    with pytest.raises(FolderError, match=expected.get(swapped, "no manifest of version 1")):
        signed_result(pack, found(stages), signer(OTHER_KEY))


def test_the_script_of_a_pack_refuses_in_a_sentence_and_before_it_trains(system, tmp_path, monkeypatch):
    write_audit_pack(system, tmp_path / "pack", [tip_of(system)])
    script = runpy.run_path(str(tmp_path / "pack" / "audit.py"))["main"]
    monkeypatch.chdir(tmp_path)
    Path("auditor.key").write_text(OTHER_KEY)
    Path("theirs.py").write_text("def make_trainer(output_dir): raise AssertionError('it trained')\nother = 3\n")
    Path("there.json").write_text("{}")

    def refused(trainer, key="auditor.key", output="result.json") -> str:
        words = ["audit.py", "--trainer", trainer, "--output", output, *(["--signing-key", key] if key else [])]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as refusal:
            script()
        return str(refusal.value)

    ours = "theirs.py:make_trainer"
    for trainer in ("no.py:make_trainer", "theirs.py", "make_trainer", "auditor.key:make_trainer"):
        assert "expected a Python file that is there and a function in it" in refused(trainer)
    for trainer in ("theirs.py:absent", "theirs.py:other"):
        assert "theirs.py has no function" in refused(trainer)
    assert "there.json is there" in refused(ours, output="there.json")
    assert "the folder of none/there.json is not there" in refused(ours, output="none/there.json")
    assert "There is no key to sign with" in refused(ours, key="")
    (tmp_path / "pack" / "audit.json").write_text("{")
    assert "no manifest of version 1" in refused(ours)


def rows_of(folder, shard: int) -> list[str]:
    """The ids of a shard's examples that are in."""
    rows = zip(NAMES[1:], folder.table.examples(NAMES[1:]), strict=True)
    return [name for name, row in rows if row is not None and row.shard == shard]


def test_an_audit_of_what_a_deletion_took_is_told_by_no_later_receipt(system, tmp_path):
    shard = StageKey.from_path(f"stages/{tip_of(system)}").shard
    add_audit(system, audited(system, tmp_path), public(OTHER_KEY))
    lines = len(system.ledger.lines)
    apply(system, rows_of(system, shard))
    before, after = (verify(signed_receipt(system.path, n, signer()).envelope, public()) for n in (lines, lines + 1))
    assert len(before.audits) == 1 and after.audits == ()


def test_a_result_that_another_signed_or_that_was_altered_is_refused(system, tmp_path):
    result = audited(system, tmp_path)
    with pytest.raises(ReceiptError, match="not signed by the key"):
        add_audit(system, result, public(OUR_KEY))
    with pytest.raises(ReceiptError):
        add_audit(system, result[:-20], public(OTHER_KEY))
    receipt = signed_receipt(system.path, 1, signer(OTHER_KEY)).envelope
    with pytest.raises(ReceiptError, match="no audit of a version"):
        add_audit(system, receipt, public(OTHER_KEY))
    with pytest.raises(ReceiptError, match="something else"):
        verify(result, public(OTHER_KEY))
    assert not (system.path / AUDITS_FILE).exists()


def test_a_result_of_another_system_or_of_stages_that_are_gone_is_refused(system, tmp_path):
    result = audited(system, tmp_path)
    other = grow(new_system(tmp_path / "other", NAMES))
    with pytest.raises(ReceiptError, match="of another system"):
        add_audit(other, result, public(OTHER_KEY))
    apply(system, rows_of(system, StageKey.from_path(f"stages/{tip_of(system)}").shard))
    with pytest.raises(ReceiptError, match="not any more: a deletion took what was audited"):
        add_audit(system, result, public(OTHER_KEY))


def test_a_stage_that_lacks_rows_which_came_is_in_no_pack(system, tmp_path):
    """Whoever audits it would train it on them, and find it another."""
    tip = tip_of(system)
    shard, slices = int(tip[6]), tip.partition("/")[2]
    add(system, {"new@example.org": (shard, int(slices[0]))})
    with pytest.raises(ConfigError, match=f"{tip}.* lacks rows that came .*Call `train\\(\\)`"):
        write_audit_pack(system, tmp_path / "pack", [tip])
    assert not (tmp_path / "pack").exists() and system.ledger.entries[-1].kind == "addition"


def test_an_altered_line_of_audits_is_found(system, tmp_path):
    add_audit(system, audited(system, tmp_path), public(OTHER_KEY))
    file = system.path / AUDITS_FILE
    file.write_text(file.read_text().replace(public(OTHER_KEY).pem.splitlines()[1], public().pem.splitlines()[1]))
    assert "audits.jsonl line 1 is no audit as it was taken in" in " ".join(inspect(system.path).problems)


SCRIPT = """
from support.tiny import lm_rows, make_trainer, s3t_config, tiny_llama

def make_trainer_of(output_dir):
    rows = [row for row in lm_rows(24) if row["id"] != GONE]
    config = s3t_config(num_shards=1, num_slices=2, id_column="id")
    return make_trainer(output_dir, model=tiny_llama(), rows=rows, config=config)
"""


@pytest.mark.slow
def test_somebody_else_trains_the_stages_again_in_a_process_of_theirs(tmp_path):
    """From the training to the receipt: the auditor has the pack, the data that is left, the secret and a key."""
    from support.tiny import lm_rows, make_trainer, s3t_config, tiny_llama

    config = s3t_config(num_shards=1, num_slices=2, id_column="id")
    trainer = make_trainer(tmp_path / "system", model=tiny_llama(), rows=lm_rows(24), config=config)
    trainer.train()
    folder = SystemFolder(tmp_path / "system")
    gone = lm_rows(24)[0]["id"]
    apply(folder, [gone])
    write_audit_pack(folder, tmp_path / "pack", [tip_of(folder)])
    (tmp_path / "theirs.py").write_text(SCRIPT.replace("GONE", repr(gone)))
    (tmp_path / "auditor.key").write_text(OTHER_KEY)
    secret = (folder.path / KEY_FILE).read_text()
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "HF_S3T_KEY": secret}
    words = ["pack/audit.py", "--trainer", "theirs.py:make_trainer_of", "--signing-key", "auditor.key"]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bit for bit the same" in done.stdout
    (tmp_path / "auditor.pub").write_text(public(OTHER_KEY).pem)
    words = ["audit-add", folder.path, tmp_path / "audit-result.json", "--public-key", tmp_path / "auditor.pub"]
    result = CliRunner().invoke(cli.app, list(map(str, words)))
    assert result.exit_code == 0 and "1 stage bit for bit the same, 0 otherwise" in result.output, result.output
    statement = verify(signed_receipt(folder.path, 1, signer()).envelope, public())
    assert [(one["equal"], one["differing"]) for one in statement.audits] == [(1, 0)]
    assert read_audits(folder.path)[0].statement.fresh
