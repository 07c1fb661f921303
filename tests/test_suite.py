"""What the suite itself promises: it says the same on every machine, and which file proves which clause."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_s3t.folder.secret import KEY_VARIABLE
from hf_s3t.signing.keys import PUBLIC_VARIABLE, SIGNING_VARIABLE


TESTS = Path(__file__).parent

# The secret itself; systems that are trained, and pushed to a Hub and read with the secret of their folder.
CHOSEN = {
    "secrets": ["folder/test_secret.py::test_a_short_key_is_refused"],
    "models": [
        "records/test_kept_ids.py::test_what_is_trained_does_not_depend_on_it",
        "hub/test_hub_refusals.py::test_a_ledger_that_is_no_text_is_told_with_a_remedy",
        "hub/test_hub_erasure.py::test_a_deletion_is_pushed_before_it_is_erased",
        "operations/test_pending.py",
    ],
}


def test_every_file_of_the_guarantee_names_its_clauses_and_has_its_place_in_the_table():
    table = (TESTS / "guarantee" / "README.md").read_text(encoding="utf-8")
    for file in sorted((TESTS / "guarantee").glob("test_*.py")):
        assert f"`{file.name}`" in table
        assert re.search(r"\b(E[1-6])\b", ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))), file.name
    for path in re.findall(r"`(\w+/test_\w+\.py)`", table):
        assert (TESTS / path).exists(), path


@pytest.mark.parametrize("chosen", ["secrets", pytest.param("models", marks=pytest.mark.slow)])
def test_what_somebody_set_for_systems_of_their_own_changes_no_test(chosen, tmp_path):
    theirs = {KEY_VARIABLE: "a secret of somebody's own system", "HF_S3T_HOME": str(tmp_path / "home")}
    theirs |= {SIGNING_VARIABLE: "no key at all", PUBLIC_VARIABLE: "no key either"}
    files = [str(TESTS / name) for name in CHOSEN[chosen]]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        env={**os.environ, **theirs},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert not (tmp_path / "home").exists()
