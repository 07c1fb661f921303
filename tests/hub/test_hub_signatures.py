"""Signatures on the Hub: they go where the ledger goes, from both sides, and no key goes with them."""

import pytest
from support.folders import apply
from support.hub_systems import files_on, member, send
from support.receipts import OTHER_KEY, OUR_KEY, public

from hf_s3t.folder.layout import SIGNATURES_FILE
from hf_s3t.folder.secret import KEY_VARIABLE
from hf_s3t.folder.signatures_file import Signatures
from hf_s3t.folder.signed_ledger import sign_unsigned
from hf_s3t.folder.system import SystemFolder
from hf_s3t.hub.folder import HubFolder
from hf_s3t.operations.inspection import inspect
from hf_s3t.signing.keys import SIGNING_VARIABLE


pytestmark = pytest.mark.usefixtures("one_thread")


def signed_by_us(signatures: Signatures, ledger) -> list[bool]:
    found = [signatures.signed(one) for one in ledger.hashes]
    return [one is not None and public().holds(one[0].signatures[0].value, one[0].signed_bytes) for one in found]


def test_a_push_publishes_signatures_and_no_key(system, repo, hub, monkeypatch):
    send(system, repo)
    assert SIGNATURES_FILE not in files_on(repo), "nothing was signed"
    monkeypatch.setenv(SIGNING_VARIABLE, OUR_KEY)
    apply(system, [member(system)])
    send(system, repo)
    assert (system.path / SIGNATURES_FILE).read_text() == repo.download(SIGNATURES_FILE, "main").read_text()
    assert not hub.disk_contains(OUR_KEY.splitlines()[1].encode())
    report = send(system, repo)
    assert report.added == (), "a repeated push uploads nothing"


@pytest.fixture
def secret(system, monkeypatch):
    """The secret of the system, without which nobody deletes from what the Hub serves."""
    monkeypatch.setenv(KEY_VARIABLE, (system.path / "ledger.key").read_text())


def test_what_was_signed_there_and_here_comes_together(system, repo, secret, monkeypatch, tmp_path):
    send(system, repo)
    served = HubFolder(repo.repo_id)
    monkeypatch.setenv(SIGNING_VARIABLE, OUR_KEY)
    apply(served, [member(served)])
    send(served, repo)
    apply(system, [member(system, 1, 0)])
    send(system, repo, merge=True)
    for folder in (system, HubFolder(repo.repo_id)):
        assert signed_by_us(folder.signatures, folder.ledger) == [True] * 3
        assert folder.ledger.entries[2].kind == "merge"
    HubFolder(repo.repo_id).copy_to(tmp_path / "pulled")
    assert inspect(tmp_path / "pulled", public_key=public()).problems == ()
    pulled = SystemFolder(tmp_path / "pulled")
    assert signed_by_us(pulled.signatures, pulled.ledger) == [True] * 3


def test_what_is_signed_later_is_brought_by_the_next_push(system, repo, monkeypatch):
    apply(system, [member(system)])
    send(system, repo)
    monkeypatch.setenv(SIGNING_VARIABLE, OUR_KEY)
    assert sign_unsigned(system) == [1]
    assert send(system, repo).added == (SIGNATURES_FILE,)
    monkeypatch.setenv(SIGNING_VARIABLE, OTHER_KEY)
    assert sign_unsigned(system) == [], "whoever signed it, it is signed"


def test_a_dry_run_takes_nothing_in(system, repo, secret, monkeypatch):
    send(system, repo)
    monkeypatch.setenv(SIGNING_VARIABLE, OUR_KEY)
    served = HubFolder(repo.repo_id)
    apply(served, [member(served)])
    send(served, repo)
    send(system, repo, merge=True, dry_run=True)
    assert not (system.path / SIGNATURES_FILE).exists()
