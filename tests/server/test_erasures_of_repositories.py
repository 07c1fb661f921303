"""A system that is served from the Hub: its book of erasures lies on this machine, and is never pushed."""

import shutil

import httpx2
from huggingface_hub import constants
from support.hub_systems import files_on, load, member, on_disk, send
from support.served import listening
from support.tiny import tokenizer_of_words

from hf_s3t.folder.layout import ERASURES_FILE
from hf_s3t.folder.system import SystemFolder
from hf_s3t.server.app import create_app
from hf_s3t.server.service import Service


def erase(repo, one, key):
    service = Service(load(repo), tokenizer_of_words())
    with listening(create_app(service)) as url:
        asked = httpx2.post(f"{url}/v1/erasures", json={"ids": [one]}, headers={"Idempotency-Key": key}, timeout=60)
    return asked, service


def test_a_repeated_request_is_the_same_after_the_hubs_cache_is_gone_and_the_book_is_never_pushed(pushed, repo):
    one = member(SystemFolder(pushed.path))
    asked, service = erase(repo, one, "7f3")
    assert asked.status_code == 200 and asked.json()["deleted"] == 1
    book = service.model.folder.path / ERASURES_FILE
    assert book.exists() and not any(one.encode() in data for data in on_disk(book.parent))
    shutil.rmtree(constants.HF_HUB_CACHE)
    again, service = erase(repo, one, "7f3")
    assert again.json() == {**asked.json(), "duplicates": None}
    service.model.push_to_hub(repo.repo_id)
    assert not [name for name in files_on(repo) if "erasures" in name]


def test_a_push_of_a_folder_leaves_its_book_here(system, repo):
    (system.path / ERASURES_FILE).touch(0o600)
    send(SystemFolder(system.path), repo)
    assert "ledger.jsonl" in files_on(repo) and not [name for name in files_on(repo) if "erasures" in name]
