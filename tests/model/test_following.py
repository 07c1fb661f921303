"""A model that is live while others delete from its folder and grow stages in it, or while it may only read."""

import contextlib
import errno
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from support.folders import apply, preview, record
from support.insides import routing_of, wait_until_rows_are_let_go
from support.tiny import batch_of, lm_rows, make_trainer, plant_stages, s3t_config, tiny_llama
from transformers import LogitsProcessor, TrainerCallback

from hf_s3t import S3TModel
from hf_s3t.errors import ExhaustedError, FolderError, S3TError
from hf_s3t.folder.system import SystemFolder
from hf_s3t.model.retrying import Retrying
from hf_s3t.model.tensor_files import differing_tensors, read_tensors
from hf_s3t.plan import StageKey


pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = lm_rows(24)
BATCH = {"input_ids": batch_of(ROWS[:2])["input_ids"]}
PATIENCE = 20.0


def trainer_on(path, callbacks=(), **config):
    config = s3t_config(**{"num_shards": 2, **config})
    return make_trainer(path, tiny_llama(2), ROWS, config=config, callbacks=list(callbacks))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two shards of two slices, both orders of each; not to be changed."""
    path = tmp_path_factory.mktemp("made") / "system"
    plant_stages(trainer_on(path))
    return path


@pytest.fixture
def path(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "system"))


def load(path, **more) -> S3TModel:
    return S3TModel.from_pretrained(path, base_model=tiny_llama(2), **more)


def of_slice(path, shard, slice_) -> str:
    """An example of a slice."""
    return SystemFolder(path).table.members(shard, slice_)[0]


def delete_elsewhere(path, *ids) -> None:
    """As the command line does it, which is another process on the same folder."""
    apply(SystemFolder(path), list(ids))


def regrow(path) -> None:
    """As a trainer does it in another process: other weights under the old names."""
    plant_stages(trainer_on(path), seed=1)


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


def stages_of(path) -> set[str]:
    return {f"{stage.parent.name}/{stage.name}" for stage in Path(path).glob("stages/shard-*/*")}


def test_a_row_that_another_process_deleted_leaves_the_memory_of_this_one(path):
    model, deleted = load(path), of_slice(path, 0, 0)
    delete_elsewhere(path, deleted)
    logits(model)
    wait_until_rows_are_let_go(model)
    table = model.folder.table
    assert deleted not in table.rows and len(table.columns) == len(table)
    assert not model.folder.holds_deleted_rows


# What was grown again under a condemned name


def test_a_live_model_that_was_idle_meanwhile_leaves_what_was_grown_again(path):
    live = load(path)
    delete_elsewhere(path, of_slice(path, 0, 0))
    regrow(path)
    whole, files = stages_of(path), {f: f.read_bytes() for f in path.glob("stages/shard-0/*/*")}
    report = live.unlearn([of_slice(path, 1, 0)])
    assert all(stage.startswith("shard-1/") for stage in report.stages_removed)
    assert stages_of(path) == whole - set(report.stages_removed)
    assert {f: f.read_bytes() for f in path.glob("stages/shard-0/*/*")} == files
    # The line of this deletion says what this deletion removed, and of what stays what is there now.
    now = SystemFolder(path)
    (_, line) = now.ledger.entries
    assert set(line.removed) == set(report.stages_removed)
    assert line.left == {str(key): now.adapter_digest(key) for key in now.valid_stages}
    assert report.depths_after == live.status()["depths"] == [2, 1]
    assert torch.equal(logits(live), logits(load(path)))


@pytest.mark.parametrize("read", [SystemFolder.refresh, SystemFolder.refresh_stages])
def test_a_stage_that_was_grown_again_is_read_again(path, read):
    folder = SystemFolder(path)
    before = {key: folder.adapter_digest(key) for key in folder.stages}
    delete_elsewhere(path, of_slice(path, 0, 0))
    regrow(path)
    folder.refresh_ledger()
    read(folder)
    again = SystemFolder(path)
    assert {k: folder.adapter_digest(k) for k in folder.stages} == {k: again.adapter_digest(k) for k in again.stages}
    assert folder.valid_stages == again.valid_stages and folder.condemned_stages() == []
    assert any(folder.adapter_digest(key) != before[key] for key in before)


def test_a_removal_compares_what_lies_there_with_what_was_condemned(path):
    folder, key = SystemFolder(path), StageKey(0, (0,))
    with folder.lock():
        condemned = record(folder, [of_slice(path, 0, 0)], None).condemned
    assert key in condemned
    # The process stands still between line and removal; others finish it, and grow the stages again.
    regrow(path)
    with folder.lock():
        folder.remove_stages(condemned)
    assert {str(stage) for stage in condemned} <= stages_of(path)
    assert folder.valid_stages == SystemFolder(path).valid_stages


def test_a_deletion_of_what_was_grown_again_is_booked_under_its_own_line(path):
    live, first = load(path), of_slice(path, 0, 0)
    with live.folder.lock():
        # Recorded by this object, and removed by another: it remembers what it condemned.
        record(live.folder, [first], None)
    SystemFolder(path)
    regrow(path)
    second = of_slice(path, 0, 0)
    expected = preview(SystemFolder(path), [second]).stages_removed
    assert preview(live.folder, [second]).stages_removed == expected
    report = live.unlearn([second])
    assert set(report.stages_removed) == set(expected)
    assert set(SystemFolder(path).ledger.entries[-1].removed) == set(expected)
    assert stages_of(path).isdisjoint(expected)


def test_checkpoints_of_a_stage_that_trains_again_are_no_business_of_who_read_the_folder_before(path):
    late = SystemFolder(path)
    victim = of_slice(path, 0, 0)
    delete_elsewhere(path, victim)
    late.refresh_ledger()
    stale_table = late.table
    delete_elsewhere(path, of_slice(path, 0, 0))
    writer, key = SystemFolder(path), StageKey(0, (0,))
    with writer.scratch(key, writer.slice_digests(key)) as scratch:
        checkpoint = scratch / "checkpoint-1"
        checkpoint.mkdir()
        writer.write_checkpoint_record(checkpoint, {"slices": writer.slice_digests(key)})
    late.table = stale_table
    late._finish_removal()
    assert checkpoint.is_dir()


def test_a_stage_whose_parent_was_grown_again_meanwhile_is_discarded(path):
    folder, key = SystemFolder(path), StageKey(0, (0, 1))
    made = {**folder.stage_record(key), "below": "an older parent"}
    assert not folder.write_stage(
        key, made, lambda target: shutil.copytree(path / key.path, target, dirs_exist_ok=True)
    )
    assert SystemFolder(path).valid_stages == set(folder.plan.stages())


def test_a_deletion_takes_place_where_there_is_no_room_for_the_head(path, monkeypatch):
    from hf_s3t.folder import system as storage

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage, "write_head", full)
    victim = of_slice(path, 0, 0)
    report = apply(SystemFolder(path), [victim])
    assert report.deleted == 1 and stages_of(path).isdisjoint(report.stages_removed)
    monkeypatch.undo()
    assert SystemFolder(path).is_deleted(victim)


def test_a_stage_that_another_process_made_first_stays(path):
    """Two trainers on one folder: others may stand on what was there first already."""
    folder, key = SystemFolder(path), StageKey(0, (0,))
    held = folder.adapter_digest(key)
    made = {**folder.stage_record(key), "seed": "another"}

    def fill(target):
        shutil.copyfile(path / "stages/shard-1/0/adapter_model.safetensors", target / "adapter_model.safetensors")
        shutil.copyfile(path / "stages/shard-1/0/adapter_config.json", target / "adapter_config.json")

    assert folder.write_stage(key, made, fill)
    assert folder.adapter_digest(key) == held and SystemFolder(path).adapter_digest(key) == held
    assert folder.valid_stages == set(folder.plan.stages())
    # One that is damaged is none.
    (path / key.path / "adapter_model.safetensors").write_bytes(b"cut short")
    assert folder.write_stage(key, made, fill)
    assert SystemFolder(path).adapter_digest(key) == folder.adapter_digest(key) != held


class IsOvertaken(TrainerCallback):
    """Another trainer writes the first stage while this one trains it."""

    def __init__(self, path):
        self.path, self.overtaken = path, False

    def on_train_end(self, args, state, control, **kwargs):
        if not self.overtaken:
            self.overtaken = True
            plant_stages(trainer_on(self.path), limit=1, seed=1)


def test_a_trainer_goes_on_with_what_another_wrote_first(tmp_path):
    path = tmp_path / "system"
    trainer = trainer_on(path, callbacks=[IsOvertaken(path)])
    live = trainer.s3t_model
    trainer.train()
    folder = SystemFolder(path)
    assert folder.valid_stages == set(folder.plan.stages())
    for key in live.stack.loaded:
        assert not differing_tensors(live.stack.tensors(key), read_tensors(folder.read_adapter(key), str(key)))
    assert torch.equal(logits(live), logits(load(path)))


# Regrowth is followed


def test_a_live_model_follows_regrowth_before_its_next_call(path):
    live = load(path)
    delete_elsewhere(path, of_slice(path, 0, 0), of_slice(path, 0, 1))
    logits(live)
    assert routing_of(live).depths == [0, 2]
    regrow(path)
    assert torch.equal(logits(live), logits(load(path))) and routing_of(live).depths == [2, 2]


def test_an_exhausted_server_comes_back_by_itself(path):
    live = load(path)
    every = [of_slice(path, shard, slice_) for shard in range(2) for slice_ in range(2)]
    live.unlearn(every)
    assert live.is_exhausted
    with pytest.raises(ExhaustedError):
        logits(live)
    regrow(path)
    assert not live.is_exhausted and live.status()["depths"] == [2, 2]
    assert torch.equal(logits(live), logits(load(path)))


def test_two_changes_that_bear_one_time_are_both_followed(path, monkeypatch):
    """File systems stamp folders by a coarse clock: what comes right after a look may leave the time as it was."""
    monkeypatch.setattr("hf_s3t.model.following._GRAIN", 0.1)
    live = load(path)
    shard = path / "stages/shard-0"
    away = path.parent / "away"
    os.rename(shard / "0-1", away)
    logits(live)
    assert StageKey(0, (0, 1)) not in live.folder.stages
    times = shard.stat()
    os.rename(away, shard / "0-1")
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    time.sleep(0.15)
    logits(live)
    assert StageKey(0, (0, 1)) in live.folder.stages


def test_a_look_at_a_folder_in_which_nothing_changed_reads_no_stage(path, monkeypatch):
    monkeypatch.setattr("hf_s3t.model.following._GRAIN", 0.1)
    live = load(path)
    time.sleep(0.15)
    logits(live)
    monkeypatch.setattr(SystemFolder, "look_at_stages", lambda folder: pytest.fail("read again"))
    monkeypatch.setattr(SystemFolder, "refresh", lambda folder: pytest.fail("read again"))
    for _ in range(3):
        logits(live)


# A system of which a stack is left is not exhausted


def slow_down(monkeypatch, live):
    """Loading a stage waits until it is told to go on."""
    begun, go_on = threading.Event(), threading.Event()
    load_stage = live.stack.load

    def slowly(*args):
        begun.set()
        assert go_on.wait(PATIENCE)
        return load_stage(*args)

    monkeypatch.setattr(live.stack, "load", slowly)
    return begun, go_on


@pytest.mark.parametrize("when_exhausted", ["error", "base"])
def test_calls_wait_for_the_only_stack_that_is_left(tmp_path, monkeypatch, when_exhausted):
    path = tmp_path / "system"
    plant_stages(trainer_on(path, num_shards=1))
    live = load(path, when_exhausted=when_exhausted)
    (tip,) = routing_of(live).served[0]
    begun, go_on = slow_down(monkeypatch, live)
    outcome = []

    def call():
        try:
            outcome.append(logits(live))
        except S3TError as error:
            outcome.append(error)

    unlearning = threading.Thread(target=live.unlearn, args=[[of_slice(path, 0, tip.prefix[0])]])
    unlearning.start()
    assert begun.wait(PATIENCE)
    calling = threading.Thread(target=call)
    calling.start()
    calling.join(0.2)
    assert calling.is_alive() and not outcome
    go_on.set()
    calling.join(PATIENCE), unlearning.join(PATIENCE)
    assert torch.equal(outcome[0], logits(load(path)))


def test_where_the_only_stack_cannot_be_loaded_calls_say_why_and_go_on_when_it_can(tmp_path):
    path = tmp_path / "system"
    plant_stages(trainer_on(path, num_shards=1))
    live = load(path)
    (tip,) = routing_of(live).served[0]
    other = next(key for key in live.folder.valid_stages if key.depth == 1 and key.prefix[0] != tip.prefix[0])
    file = path / other.path / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(FolderError, match="was altered or cut short"):
        live.unlearn([of_slice(path, 0, tip.prefix[0])])
    with pytest.raises(FolderError, match="was altered or cut short"):
        logits(live)
    file.write_bytes(whole)
    assert torch.equal(logits(live), logits(load(path)))


def test_a_call_that_waited_for_what_could_not_be_loaded_is_told_why(tmp_path, monkeypatch):
    path = tmp_path / "system"
    plant_stages(trainer_on(path, num_shards=1))
    live = load(path, when_exhausted="base")
    (tip,) = routing_of(live).served[0]
    begun, go_on, outcome = threading.Event(), threading.Event(), []

    def failing_load(*args):
        begun.set()
        assert go_on.wait(PATIENCE)
        raise MemoryError("no room")

    monkeypatch.setattr(live.stack, "load", failing_load)

    def call(what):
        try:
            outcome.append(what())
        except (S3TError, MemoryError) as error:
            outcome.append(error)

    victim = of_slice(path, 0, tip.prefix[0])
    whats = (lambda: live.unlearn([victim]), lambda: logits(live))
    threads = [threading.Thread(target=call, args=[what]) for what in whats]
    threads[0].start()
    assert begun.wait(PATIENCE)
    threads[1].start()
    threads[1].join(0.1)
    assert not live.is_exhausted
    go_on.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert [type(one) for one in outcome] == [MemoryError, MemoryError]


def test_neither_status_nor_other_calls_wait_for_a_call_that_a_deletion_waits_for(tmp_path):
    path = tmp_path / "system"
    plant_stages(trainer_on(path, num_shards=1))
    live, victim = load(path), None
    (tip,) = routing_of(live).served[0]
    victim = of_slice(path, 0, tip.prefix[0])
    with held_up(live):
        unlearning = threading.Thread(target=live.unlearn, args=[[victim]])
        unlearning.start()
        wait_for(
            lambda: routing_of(live).route is not None and routing_of(live).served[0][0].prefix[0] != tip.prefix[0]
        )
        answer = logits(live)
        assert live.status()["deletions"] == 1 and not live.is_exhausted and unlearning.is_alive()
    unlearning.join(PATIENCE)
    assert torch.equal(answer, logits(load(path)))


# What others leave among the stages


FOREIGN = {
    "a folder of another name": lambda path: (path / "stages/shard-0/old").mkdir(),
    "a file": lambda path: (path / "stages/shard-0/notes.txt").write_text("mine"),
    "a damaged record": lambda path: (path / "stages/shard-0/1-0/stage.json").write_text("{"),
    "a stage without its record": lambda path: (path / "stages/shard-0/1-0/stage.json").unlink(),
    "no stages": lambda path: os.rename(path / "stages", path / "away"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_healthy_server_goes_on_whatever_others_leave_among_the_stages_and_says_what(path, what, monkeypatch):
    live = load(path)
    answer = logits(live)
    FOREIGN[what](path)
    monkeypatch.setattr(live, "_look_again", 0)
    for _ in range(2):
        assert torch.equal(logits(live), answer)
    assert len(live.status()["failures"]) == 1
    with pytest.raises(FolderError):
        live.refresh()
    with pytest.raises(FolderError):
        load(path)


def test_a_grown_stage_that_is_damaged_is_not_taken_up_until_it_is_mended(path):
    live = load(path)
    delete_elsewhere(path, of_slice(path, 0, 0))
    answer = logits(live)
    regrow(path)
    file = path / "stages/shard-0/0-1/adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    for _ in range(2):
        assert torch.equal(logits(live), answer)
    assert "was altered or cut short" in live.status()["failures"][0]
    file.write_bytes(whole)
    live.refresh()
    assert torch.equal(logits(live), logits(load(path))) and live.status()["failures"] == []
    assert live.status()["depths"] == [2, 2]


def test_what_cannot_be_loaded_while_others_delete_ends_in_an_error_and_not_in_a_loop(path, monkeypatch):
    live, reads = load(path), []
    monkeypatch.setattr(live.folder, "refresh", lambda: reads.append(1))
    monkeypatch.setattr(live.folder, "has_news", lambda: True)
    monkeypatch.setattr(live, "_serve", failing(10**6, None))
    with pytest.raises((OSError, MemoryError)):
        live.refresh()
    assert len(reads) < 100


# Who may only read


def read_only(monkeypatch, path) -> None:
    """As on a mount that is read-only: below a folder nothing can be opened to be written, made, or removed."""
    opened, root = os.open, os.path.realpath(path)

    def refuse(name):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(name))

    def open_to_read(name, flags, *args, **kwargs):
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if writes and isinstance(name, (str, os.PathLike)) and os.path.realpath(name).startswith(root):
            refuse(name)
        return opened(name, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", open_to_read)
    for name in ("rename", "replace", "unlink", "mkdir", "rmdir"):
        monkeypatch.setattr(os, name, lambda first, *args, **kwargs: refuse(first))


def test_a_reader_follows_deletions_and_leaves_the_removal_to_who_may_write(path, monkeypatch):
    live = load(path)
    writer = SystemFolder(path)
    with writer.lock():
        record(writer, [of_slice(path, 0, 0)], None)
    died = stages_of(path)
    with monkeypatch.context() as patch:
        read_only(patch, path)
        answer = logits(live)
        assert live.status()["depths"] == load(path).status()["depths"] == [1, 2]
        live.refresh()
        for refused in (live.unlearn, live.unlearn_later):
            with pytest.raises(FolderError, match=r"cannot be changed .*Read-only.* Nothing was. Make it writable"):
                refused([of_slice(path, 1, 0)])
        assert torch.equal(logits(live), answer)
    assert stages_of(path) == died and any("saw an example that was deleted" in problem for problem in live.check())
    assert torch.equal(logits(load(path)), answer) and stages_of(path) < died


MOUNTED = """
import os
from support.folders import apply, record
from support.tiny import batch_of, lm_rows, tiny_llama
from hf_s3t import S3TModel
from hf_s3t.folder.system import SystemFolder
from hf_s3t.model.tensor_files import differing_tensors, read_tensors

path, mounted = {path!r}, {mounted!r}
assert not os.access(mounted, os.W_OK)
model = S3TModel.from_pretrained(mounted, base_model=tiny_llama(2))
call = lambda: model(input_ids=batch_of(lm_rows(2))["input_ids"])
call()
folder = SystemFolder(path)
apply(folder, folder.table.members(0, 0)[:1])
call()
print(model.status()["depths"])
with folder.lock():
    record(folder, folder.table.members(1, 0)[:1], None)
call()
print(model.status()["depths"], len(folder.condemned_stages()), SystemFolder(mounted).table.__len__())
"""


@pytest.mark.slow
def test_a_server_on_a_read_only_mount_serves_while_others_delete_and_die(path, tmp_path):
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    script = MOUNTED.format(path=str(path), mounted=str(mounted))
    mount = f"mount --bind {path} {mounted} && mount -o remount,ro,bind {mounted}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("needs the right to mount, in a namespace of its own")
    command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, script]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    rows = len(SystemFolder(path).table)
    assert done.stdout.splitlines()[-2:] == ["[1, 2]", f"[1, 1] 3 {rows}"]


# What is done beside the calls


def failing(times, then):
    """Work that fails a number of times, each in another way."""
    errors = itertools.cycle([OSError(errno.ESTALE, "Stale handle"), FolderError("It is locked."), MemoryError()])
    left = itertools.islice(errors, times)

    def work(*args, **kwargs):
        for error in left:
            raise error
        return then(*args, **kwargs)

    return work


@pytest.fixture
def quickly(monkeypatch):
    monkeypatch.setattr("hf_s3t.model.retrying._SOON", 0.02)


def wait_for(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def test_requests_that_are_due_are_applied_whatever_fails_before(path, monkeypatch, quickly):
    live = load(path)
    monkeypatch.setattr(live, "apply_pending", failing(4, live.apply_pending))
    live.unlearn_later([of_slice(path, 0, 0)], max_delay=0.01)
    told: list[str] = []
    wait_for(lambda: told.extend(live.status()["failures"]) or told)
    (failure,) = told
    assert failure.startswith("Deletion requests are due and could not be applied: ") and "tried again" in failure
    wait_for(lambda: SystemFolder(path).ledger.num_deletions == 1)
    wait_for(lambda: live.status()["failures"] == [])
    assert live.status()["pending"] == 0


def test_the_table_is_written_without_the_deleted_rows_whatever_fails_before(path, monkeypatch, quickly):
    live, victim = load(path), of_slice(path, 0, 0)
    monkeypatch.setattr(live.folder, "compact", failing(3, live.folder.compact))
    live.unlearn([victim])
    told: list[str] = []
    wait_for(lambda: told.extend(live.status()["failures"]) or told)
    assert told[0].startswith("The table of examples still holds deleted rows: ")
    # Neither calls nor deletions wait for it meanwhile.
    live.unlearn([of_slice(path, 1, 0)])
    logits(live)
    wait_for(lambda: not live.folder.is_table_behind)
    wait_for(lambda: live.status()["failures"] == [])
    assert victim.encode() not in (path / "examples.parquet").read_bytes()


def test_requests_wait_for_a_stage_in_training_in_silence(path, monkeypatch, caplog):
    monkeypatch.setattr("hf_s3t.model.unlearning._WHILE_TRAINING", 0.02)
    live = load(path)
    live.stack.in_training = StageKey(0, (0,))
    live.unlearn_later([of_slice(path, 0, 0)], max_delay=0.01)
    time.sleep(0.1)
    assert live.status()["failures"] == [] and caplog.records == []
    live.stack.in_training = None
    wait_for(lambda: SystemFolder(path).ledger.num_deletions == 1)


def test_requests_that_cannot_be_read_for_a_moment_keep_their_timer(path, monkeypatch):
    live = load(path)
    live.unlearn_later([of_slice(path, 0, 0)], max_delay=0.3)
    with monkeypatch.context() as patch:
        patch.setattr("hf_s3t.operations.pending.PendingRequests.apply_by", failing(1, None))
        with pytest.raises(OSError, match="Stale handle"):
            live._apply_in_time()
    wait_for(lambda: SystemFolder(path).ledger.num_deletions == 1)


def test_pauses_grow_and_the_same_failure_is_told_once(caplog, monkeypatch):
    pauses = []
    task = Retrying(failing(9, lambda: None), "It was not done")
    monkeypatch.setattr(task, "start_in", pauses.append)
    for _ in range(9):
        task._try()
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60] and task.problem is not None
    task._try()
    assert task.problem is None
    caplog.clear()
    task = Retrying(lambda: 1 / 0, "It was not done")
    monkeypatch.setattr(task, "start_in", pauses.append)
    for _ in range(3):
        task._try()
    assert [r.message for r in caplog.records] == [task.problem] and "ZeroDivisionError" in task.problem


# Copies


@contextlib.contextmanager
def held_up(live):
    """A call on what serves that goes on until the block ends."""
    begun, go_on = threading.Event(), threading.Event()

    class Slow(LogitsProcessor):
        def __call__(self, ids, scores):
            begun.set()
            assert go_on.wait(PATIENCE)
            return scores

    ids = BATCH["input_ids"][:1]
    thread = threading.Thread(
        target=lambda: live.generate(ids, max_new_tokens=1, logits_processor=[Slow()], pad_token_id=0)
    )
    thread.start()
    assert begun.wait(PATIENCE)
    try:
        yield
    finally:
        go_on.set()
        thread.join(PATIENCE)


def test_a_copy_during_an_unlearn_that_waits_is_of_what_is_valid(path, tmp_path):
    live, victim = load(path), of_slice(path, 0, 0)
    done = []
    with held_up(live):
        unlearning = threading.Thread(target=live.unlearn, args=[[victim]])
        unlearning.start()
        wait_for(lambda: live.folder.ledger.num_deletions == 1)
        copying = threading.Thread(target=lambda: done.append(live.save_pretrained(tmp_path / "copy")))
        copying.start()
        copying.join(0.1)
        assert not done, "the deletion is waited for"
    unlearning.join(PATIENCE), copying.join(PATIENCE)
    assert done
    assert_is_clean_copy(tmp_path / "copy", path, victim)


def assert_is_clean_copy(copy, path, victim) -> None:
    condemned = SystemFolder(path).plan.removed_by(
        {SystemFolder(path).plan and (0, 0)}, SystemFolder(path).plan.stages()
    )
    assert stages_of(copy).isdisjoint(map(str, condemned)) and stages_of(copy)
    assert all(victim.encode() not in file.read_bytes() for file in copy.rglob("*") if file.is_file())
    assert SystemFolder(copy).is_deleted(victim)


def test_a_copy_of_a_folder_whose_deletion_is_half_done_holds_nothing_condemned(path, tmp_path):
    folder, victim = SystemFolder(path), of_slice(path, 0, 0)
    with folder.lock():
        record(folder, [victim], None)
    folder.copy_to(tmp_path / "copy")
    # The source still has them: nobody finished the removal yet.
    assert len(stages_of(path)) > len(stages_of(tmp_path / "copy"))
    assert_is_clean_copy(tmp_path / "copy", path, victim)


def test_a_copy_holds_what_belongs_to_a_system_and_nothing_else(path, tmp_path):
    folder = SystemFolder(path)
    for foreign in ("runs/events.out.tfevents.1", ".git/objects/ab", "checkpoint-5/optimizer.pt", "notes.txt"):
        (path / foreign).parent.mkdir(parents=True, exist_ok=True)
        (path / foreign).write_text("of a deleted example")
    for kept in ("README.md", "tokenizer.json", "cost.json", "prototypes.safetensors"):
        (path / kept).write_text("{}")
    os.chmod(path / "examples.parquet", 0o600)
    folder.copy_to(tmp_path / "copy")
    copied = {entry.name for entry in (tmp_path / "copy").iterdir()}
    system = {"s3t_config.json", "examples.parquet", "ledger.jsonl", "ledger.head", "ledger.key", "stages"}
    assert copied == system | {"README.md", "tokenizer.json", "cost.json", "prototypes.safetensors"}
    assert (tmp_path / "copy/examples.parquet").stat().st_mode & 0o777 == 0o600
    # Prototypes may have been made of what a deletion that is half done removes.
    with folder.lock():
        record(folder, [of_slice(path, 0, 0)], None)
    folder.copy_to(tmp_path / "later")
    assert not (tmp_path / "later/prototypes.safetensors").exists()


def test_the_ledger_notes_a_copy_and_the_live_model_answers_as_before(path, tmp_path):
    live = load(path)
    answer = logits(live)
    live.save_pretrained(tmp_path / "copy")
    (line,) = SystemFolder(path).ledger.entries
    assert line.kind == "export" and line.ids == ()
    assert line.removed == {str(k): live.folder.adapter_digest(k) for k in live.folder.valid_stages}
    assert torch.equal(logits(live), answer) and torch.equal(logits(load(tmp_path / "copy")), answer)
    # Into its own folder nothing is copied, and nothing noted.
    live.save_pretrained(path)
    assert len(SystemFolder(path).ledger.lines) == 1


# A ledger that lost a line


def test_a_ledger_cut_before_the_table_was_written_is_refused(path):
    folder = SystemFolder(path)
    with folder.lock():
        deletion = record(folder, [of_slice(path, 0, 0)], None)
        folder.remove_stages(deletion.condemned)
    # The process dies before it writes the table; then the line is lost.
    (path / "ledger.jsonl").write_bytes(b"")
    with pytest.raises(
        FolderError, match=r"ledger.jsonl does not hold the 1 lines with which ledger.head was written"
    ):
        load(path)
    with pytest.raises(FolderError, match=r"deletions would be forgotten. Restore it from a backup"):
        SystemFolder(path)
