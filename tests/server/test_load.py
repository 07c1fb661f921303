"""A server under load, while its system forgets and grows: no answer fails, and none comes from what was erased."""

import contextlib
import threading
import time

import pytest
from serving_story import Asked, Clients, Erased, Eraser, History, Naive, Watcher, judge
from support.served import listening, served_trainer, tiny_system
from support.tiny import ids_of, lm_rows, plant_stages, s3t_config, tiny_llama, tokenizer_of_words

from hf_s3t import S3TModel
from hf_s3t.errors import FolderError
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.deletion import apply
from hf_s3t.plan import StageKey
from hf_s3t.records.request import DeletionRequest
from hf_s3t.server.app import create_app
from hf_s3t.server.service import Service


IDS = ids_of(60)
CONFIG = s3t_config(num_shards=2, num_slices=3, partition="balanced")
PROMPTS = ["w7 w8", "w30 w9 w12", "w11 w40", "w5 w6 w17"]


def grow_on(path, end: threading.Event) -> None:
    """A trainer beside the server: what is missing is made again, other than it was."""
    seed = 1
    while not end.wait(0.3):
        # An erasure may take what it is reading: then it begins again.
        with contextlib.suppress(FolderError):
            plant_stages(served_trainer(path, lm_rows(len(IDS)), config=CONFIG), limit=2, seed=seed)
        seed += 1


@contextlib.contextmanager
def serving(path):
    """A server with every stage in memory: which of them answer follows from what is in the folder alone."""
    model = S3TModel.from_pretrained(path, base_model=str(path / "base"), preload="all")
    service = Service(model, tokenizer_of_words())
    with listening(create_app(service)) as url:
        yield url, service


def wait_until(condition, seconds=30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


@pytest.mark.parametrize("erasures", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_under_load_each_answer_is_that_of_stages_that_were_not_erased_before(tmp_path, erasures):
    path = tiny_system(tmp_path / "system", rows=lm_rows(len(IDS)), config=CONFIG)
    end = threading.Event()
    trainer = threading.Thread(target=grow_on, args=(path, end))
    watcher = Watcher(path, tmp_path / "archive")

    with serving(path) as (url, service), watcher.watching():
        clients = Clients(url, service.name, PROMPTS, max_tokens=6, count=4)
        eraser = Eraser(url, IDS, lambda one: apply(SystemFolder(path), DeletionRequest([one])))
        trainer.start()
        with clients.asking():
            for _ in range(erasures):
                answered = len(clients.asked)
                wait_until(lambda seen=answered: len(clients.asked) > seen + 8)
                wait_until(eraser.erase)
            answered = len(clients.asked)
            wait_until(lambda: len(clients.asked) > answered + 8)
        end.set()
        trainer.join()
        assert not service.model.is_exhausted

    history = History(path, watcher.kept, eraser.erased)
    verdict = judge(history, Naive(tiny_llama, tokenizer_of_words(), 6), clients.asked, eraser.erased)
    assert verdict.failed == [] and verdict.wrong == []
    assert verdict.answers > 8 * erasures and verdict.too_close <= verdict.answers / 10
    assert len(eraser.erased) == erasures and len(history.acknowledged) >= erasures


@pytest.mark.slow
def test_an_answer_of_a_stage_that_was_erased_before_would_be_told(tmp_path):
    """The check itself: what is asked after the erasure, and answered as before, is wrong."""
    path = tiny_system(tmp_path / "system", rows=lm_rows(len(IDS)), config=CONFIG)
    watcher = Watcher(path, tmp_path / "archive")
    with serving(path) as (url, service), watcher.watching():
        clients = Clients(url, service.name, PROMPTS, max_tokens=6, count=2)
        with clients.asking():
            wait_until(lambda: len(clients.asked) > 8)
        eraser = Eraser(url, IDS, lambda one: None)
        erased = eraser.erase()
    history, naive = History(path, watcher.kept, eraser.erased), Naive(tiny_llama, tokenizer_of_words(), 6)
    assert judge(history, naive, clients.asked, eraser.erased).wrong == []
    for asked in clients.asked:
        asked.start = asked.end = erased.end + 5
    assert judge(history, naive, clients.asked, eraser.erased).wrong


def test_what_may_have_answered_is_known_while_stages_come_and_go(tmp_path):
    """What goes may be switched off before its folder is gone, and what came a moment ago not be loaded yet."""
    path = tiny_system(tmp_path / "system", rows=lm_rows(len(IDS)), config=CONFIG)
    watcher, folder = Watcher(path, tmp_path / "archive"), SystemFolder(path)
    going, coming = folder.table.ids_in(0, 0)[0], StageKey.from_path("stages/shard-1/0")
    apply(folder, DeletionRequest([going]))
    erased = Erased("wait", start=101.0, end=105.0, ids=[going])
    history = History(path, watcher.kept, [erased])
    for kept in watcher.kept:
        kept.came = 100.0 if coming in kept.stage[0].lineage else 0.0
        kept.went = 104.0 if kept.stage in history.acknowledged else kept.went
    found = history.candidates(Asked("", start=102.0, end=103.0))
    digests = {kept.stage[0]: kept.stage for kept in watcher.kept}

    def serving(is_there):
        return history._serving(frozenset(stage for key, stage in digests.items() if is_there(key)))

    for has_come in (True, False):
        for has_gone in (True, False):
            gone = set(history.acknowledged) if has_gone else set()
            kept = [key for key in digests if has_come or coming not in key.lineage]
            assert serving(lambda key, kept=kept, gone=gone: key in kept and digests[key] not in gone) in found
