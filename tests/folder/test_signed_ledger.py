"""Ledgers of earlier formats are signed later, and stay as they are."""

import json

import pytest
from support.format_1 import copy_of, format_of
from support.receipts import OUR_KEY, public, signer

from hf_s3t.folder.identity import identity_of
from hf_s3t.folder.layout import CONFIG_FILE, LEDGER_FILE
from hf_s3t.folder.signed_ledger import sign_unsigned
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.inspection import inspect
from hf_s3t.operations.signed_receipts import signed_receipt
from hf_s3t.signing.keys import SIGNING_VARIABLE
from hf_s3t.signing.verification import verify


pytestmark = pytest.mark.usefixtures("shared_key")


@pytest.mark.parametrize("name", ["trained", "digests", "regrown"])
def test_lines_of_version_1_are_signed_as_they_stand(name, tmp_path, monkeypatch):
    path = copy_of(name, tmp_path)
    text, identity = (path / LEDGER_FILE).read_bytes(), identity_of(json.loads((path / CONFIG_FILE).read_bytes()))
    folder = SystemFolder(path)
    problems = inspect(path).problems
    monkeypatch.setenv(SIGNING_VARIABLE, OUR_KEY)
    assert sign_unsigned(folder) == list(range(1, len(folder.ledger.lines) + 1)) != []
    assert (path / LEDGER_FILE).read_bytes() == text and format_of(path) == 2, "the first write migrates"
    assert inspect(path, public_key=public()).problems == problems
    for number, entry in enumerate(folder.ledger.entries, start=1):
        found = verify(signed_receipt(path, number, signer()).envelope, public(), identity)
        assert found.line_signed == "later" and found.removed == entry.removed and found.left == entry.left
