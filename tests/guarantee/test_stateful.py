"""The life of a system in any order: whoever does what, and whoever dies, it is what a plain model says (E2, E4)."""

import itertools
import shutil
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.crashes import Faults
from support.folders import (
    NAMES,
    USERS,
    apply,
    delete_and_die,
    files_of,
    gate_says,
    gate_that_never_had,
    grow,
    new_system,
    request_later,
    stages_on_disk,
    stored_gate,
)
from support.insides import wait_for_cleaner

from hf_s3t import S3TConfig
from hf_s3t.errors import FolderError, UnknownExampleError
from hf_s3t.folder.layout import LEDGER_FILE, TABLE_FILE
from hf_s3t.folder.opening import open_folder
from hf_s3t.folder.status import system_status
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.inspection import inspect
from hf_s3t.operations.pending import PendingRequests, apply_pending


pytestmark = pytest.mark.usefixtures("surroundings")

# Two of a shard's sequences share their first stage.
SEQUENCES = [[[0, 1, 2], [0, 2, 1], [2, 0, 1]], [[1, 2, 0], [2, 1, 0], [0, 1, 2]]]
SHORT_SEQUENCES = [[[0, 1], [1, 0]], [[1, 0], [0, 1]]]


class PlainModel:
    """
    What shall be true of a system, in a few sets: the method without its files, tensors and processes.

    Args:
        places: The shard and slice of each id.
        groups: The group of each id.
        sequences: The sequences of each shard.
    """

    def __init__(self, places: dict[str, tuple[int, int]], groups: dict[str, str], sequences: list):
        self.places, self.groups, self.sequences = places, groups, sequences
        self.present = set(places)
        self.stages: set[str] = set()
        self.deletions = 0
        self.waiting: set[str] = set()
        self.waiting_groups: set[str] = set()

    def missing(self) -> list[str]:
        """The stages to train, in their order: a sequence ends before a slice that is empty."""
        filled = {self.places[i] for i in self.present}
        found = []
        for shard, sequences in enumerate(self.sequences):
            for sequence in sequences:
                for depth in range(1, len(sequence) + 1):
                    if (shard, sequence[depth - 1]) not in filled:
                        break
                    found.append(stage_name(shard, sequence[:depth]))
        return [stage for stage in dict.fromkeys(found) if stage not in self.stages]

    def members(self, groups: Iterable[str]) -> set[str]:
        return {i for i in self.present if self.groups[i] in set(groups)}

    def knows(self, group: str) -> bool:
        return group in self.groups.values()

    def delete(self, ids: Iterable[str], groups: Iterable[str] = ()) -> int:
        """Returns how many examples it deleted."""
        gone = (set(ids) & self.present) | self.members(groups)
        if gone:
            self.deletions += 1
            self.present -= gone
            hit = {self.places[i] for i in gone}
            self.stages = {stage for stage in self.stages if not hit & slices_of(stage)}
        return len(gone)

    def wait(self, ids: Iterable[str], groups: Iterable[str]) -> None:
        self.waiting |= (set(ids) & self.present) | self.members(groups)
        self.waiting_groups |= {group for group in groups if self.members([group])}

    def apply_waiting(self) -> int:
        deleted = self.delete(self.waiting, self.waiting_groups)
        self.waiting, self.waiting_groups = set(), set()
        return deleted

    @property
    def depths(self) -> list[int]:
        return [max(self.depth_of(shard, s) for s in sequences) for shard, sequences in enumerate(self.sequences)]

    def depth_of(self, shard: int, sequence: list[int]) -> int:
        depth = 0
        while depth < len(sequence) and stage_name(shard, sequence[: depth + 1]) in self.stages:
            depth += 1
        return depth


def stage_name(shard: int, prefix: list[int]) -> str:
    return f"shard-{shard}/" + "-".join(map(str, prefix))


def slices_of(stage: str) -> set[tuple[int, int]]:
    shard, _, prefix = stage.removeprefix("shard-").partition("/")
    return {(int(shard), int(s)) for s in prefix.split("-")}


ids = st.lists(st.sampled_from(NAMES), min_size=1, max_size=2)
groups = st.lists(st.sampled_from(sorted(set(USERS))), min_size=1, max_size=2)
moments = st.integers(0, 30)
NUMBER = itertools.count()


class Life(RuleBasedStateMachine):
    """
    What can happen to a system. Those who serve it are added by subclasses.

    Args:
        start: A system with every stage, which is copied.
        place: Where the copies go.
        plain: What is true of the system.
    """

    def __init__(self, start: Path, place: Path, plain: PlainModel):
        super().__init__()
        self.path = Path(shutil.copytree(start, place / f"{next(NUMBER)}" / "system"))
        self.plain = plain
        self.plain.stages = set(self.plain.missing())
        # Whether who serves has seen all that others did to the folder.
        self.follows = True

    @initialize()
    def begin(self):
        self.load()

    def teardown(self):
        if self.is_running:
            self.settle()
        shutil.rmtree(self.path.parent)

    def load(self) -> None:
        raise NotImplementedError

    def follow(self, way: str) -> None:
        raise NotImplementedError

    def ledger_lines(self) -> int:
        return (self.path / LEDGER_FILE).read_bytes().count(b"\n")

    def check_report(self, report, deleted: int) -> None:
        assert (report.deleted, report.depths_after) == (deleted, self.plain.depths)
        assert report.is_exhausted == (not any(self.plain.depths))
        self.follows = True

    def adopt(self, before: int) -> None:
        """Take over how many of the missing stages were written before a death: any number, in their order."""
        missing = self.plain.missing()
        written = len(stages_written(self.path)) - before
        self.plain.stages |= set(missing[:written])

    # What others do

    @rule(ids=ids, way=st.sampled_from(["refresh", "call", "nothing"]))
    def another_process_deletes(self, ids, way):
        report = apply(SystemFolder(self.path), ids)
        deleted = self.plain.delete(ids)
        self.check_report(report, deleted)
        self.follows = False
        self.follow(way)

    @rule(groups=groups, way=st.sampled_from(["refresh", "call", "nothing"]))
    def another_process_deletes_groups(self, groups, way):
        if not all(map(self.plain.knows, groups)):
            with pytest.raises(UnknownExampleError):
                apply(SystemFolder(self.path), None, groups)
            return
        apply(SystemFolder(self.path), None, groups)
        self.plain.delete([], groups)
        self.follows = False
        self.follow(way)

    @rule(ids=ids)
    def another_process_asks_for_later(self, ids):
        receipt = request_later(SystemFolder(self.path), ids)
        self.plain.wait(ids, [])
        assert receipt.pending == len(self.plain.waiting & self.plain.present)

    @rule()
    def everyone_starts_again(self):
        self.load()

    # Who dies, and the load that comes after

    @rule(ids=ids)
    def someone_dies_when_a_deletion_is_recorded(self, ids):
        ids = sorted(set(ids) & self.plain.present)
        if ids:
            delete_and_die(SystemFolder(self.path), ids)
            self.plain.delete(ids)
        self.load()

    @rule(ids=ids, moment=moments)
    def someone_dies_while_deleting(self, ids, moment):
        lines = self.ledger_lines()
        folder = SystemFolder(self.path)
        with suppress(FolderError), Faults(moment).running():
            apply(folder, ids)
        # Its line in the ledger is what a deletion is.
        if self.ledger_lines() > lines:
            self.plain.delete(ids)
        self.load()

    @rule(moment=moments)
    def someone_dies_while_applying_what_waits(self, moment):
        lines = self.ledger_lines()
        folder = SystemFolder(self.path)
        with suppress(FolderError), Faults(moment).running():
            apply_pending(folder)
        waits = (self.path / "pending.jsonl").exists()
        if self.ledger_lines() > lines:
            waiting, named = self.plain.waiting, self.plain.waiting_groups
            self.plain.apply_waiting()
            if waits:
                self.plain.waiting, self.plain.waiting_groups = waiting, named
        elif not waits:
            assert not self.plain.waiting & self.plain.present, "requests are lost"
            self.plain.waiting, self.plain.waiting_groups = set(), set()
        self.load()

    @rule(stage=st.sampled_from(["0", "0-1", "1-0"]), shard=st.integers(0, 1))
    def someone_dies_while_writing_a_stage(self, stage, shard):
        half = self.path / "stages" / f"shard-{shard}" / f".tmp-{stage}-0123abcd"
        half.mkdir(parents=True, exist_ok=True)
        (half / "adapter_model.safetensors").write_bytes(b"half")
        (self.path / f".tmp-{TABLE_FILE}-0123abcd").write_bytes(b"PAR1")
        self.load()

    @precondition(lambda self: self.plain.stages)
    @rule(data=st.data())
    def someone_dies_while_removing_a_stage(self, data):
        """A rename into `.gone-` is lost by nobody: whoever sees it finishes it, though `train` must grow it again."""
        # Of a stage that none stands on.
        tips = [s for s in sorted(self.plain.stages) if not any(o.startswith(f"{s}-") for o in self.plain.stages)]
        stage = data.draw(st.sampled_from(tips))
        folder = self.path / "stages" / stage
        (folder / "adapter_model.safetensors").unlink()
        folder.rename(folder.with_name(f".gone-{folder.name}-0123abcd"))
        self.plain.stages.remove(stage)
        self.load()

    # What is true after each

    @invariant()
    def everything_is_as_the_plain_model_says(self):
        if self.is_running:
            # What follows a deletion is written a moment later.
            self.settle()
            self.check_folder()
            if self.follows:
                self.check_who_serves()

    def check_folder(self) -> None:
        assert stages_written(self.path) == self.plain.stages
        assert set(pq.read_table(self.path / TABLE_FILE).column("id").to_pylist()) == self.plain.present
        assert inspect(self.path).problems == ()
        folder = open_folder(self.path, read_only=True)
        if folder.has_gate:
            assert stored_gate(folder) == gate_that_never_had(folder)
        status = system_status(folder)
        assert status["depths"] == self.plain.depths
        assert status["sequence_depths"] == [
            [self.plain.depth_of(shard, sequence) for sequence in sequences]
            for shard, sequences in enumerate(self.plain.sequences)
        ]
        assert status["examples"] == len(self.plain.present) and status["deletions"] == self.plain.deletions
        gone = [i.encode() for i in self.plain.places if i not in self.plain.present]
        for name, data in files_of(self.path).items():
            assert not [i for i in gone if i in (data or b"")], f"{name} names who was deleted"

    def check_who_serves(self) -> None:
        raise NotImplementedError

    is_running = False

    def settle(self) -> None:
        """Wait for what is done in the background."""


def stages_written(path: Path) -> set[str]:
    """Everything that lies where stages do: what is left of others too."""
    return stages_on_disk(path)


# Without tensors


class FolderLife(Life):
    """A process that holds the folder open, as a trainer and a model do, and deletes through it."""

    def load(self):
        self.folder, self.follows, self.is_running = SystemFolder(self.path), True, True

    def follow(self, way):
        if way == "refresh":
            self.folder.refresh()
            self.follows = True

    @rule()
    def train(self):
        self.folder.refresh()
        grow(self.folder)
        self.plain.stages |= set(self.plain.missing())
        self.follows = True

    @rule(limit=st.integers(1, 3))
    def train_a_little(self, limit):
        self.folder.refresh()
        grow(self.folder, limit=limit)
        self.plain.stages |= set(self.plain.missing()[:limit])
        self.follows = True

    @rule(moment=moments)
    def someone_dies_while_training(self, moment):
        before = len(self.plain.stages)
        folder = SystemFolder(self.path)
        with suppress(OSError), Faults(moment).running():
            grow(folder)
        self.load()
        self.adopt(before)

    @rule(ids=ids)
    def unlearn(self, ids):
        self.check_report(apply(self.folder, ids), self.plain.delete(ids))

    @rule(groups=groups)
    def unlearn_groups(self, groups):
        if all(map(self.plain.knows, groups)):
            self.check_report(apply(self.folder, None, groups), self.plain.delete([], groups))
        else:
            with pytest.raises(UnknownExampleError):
                apply(self.folder, None, groups)
            self.follows = True

    @rule(ids=ids, groups=groups)
    def unlearn_later(self, ids, groups):
        groups = [group for group in groups if self.plain.knows(group)]
        request_later(self.folder, ids, groups)
        self.plain.wait(ids, groups)

    @rule()
    def apply_pending(self):
        self.check_report(apply_pending(self.folder), self.plain.apply_waiting())

    def check_who_serves(self):
        assert {str(key) for key in self.folder.valid_stages} == self.plain.stages
        assert set(self.folder.table.rows) == self.plain.present
        assert gate_says(self.folder.load_gate()) == gate_that_never_had(self.folder)


CONFIG = S3TConfig(
    num_shards=2,
    num_slices=3,
    sequence_selection=SEQUENCES,
    group_column="user",
    keep_idle=True,
    gate="terms",
    seed=1,
)


@pytest.fixture(scope="module")
def without_tensors(tmp_path_factory):
    path = tmp_path_factory.mktemp("first") / "system"
    grow(new_system(path, NAMES, CONFIG))
    return path


def run(machine, examples: int, steps: int) -> None:
    few = settings(
        max_examples=examples,
        stateful_step_count=steps,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=few)


@pytest.mark.parametrize(
    ("examples", "steps"), [(6, 10), pytest.param(200, 25, marks=[pytest.mark.slow, pytest.mark.long])]
)
def test_a_folder_is_at_any_time_what_its_history_makes_it(without_tensors, tmp_path, examples, steps):
    rows = SystemFolder(without_tensors).table.rows
    places = {i: (row.shard, row.slice) for i, row in rows.items()}
    named = dict(zip(NAMES, USERS))
    run(lambda: FolderLife(without_tensors, tmp_path, PlainModel(places, named, SEQUENCES)), examples, steps)


# With a model and a trainer


REAL_CONFIG = dict(num_shards=2, num_slices=2, sequence_selection=SHORT_SEQUENCES, group_column="user")
REAL_CONFIG |= dict(partition="column", shard_column="shard", slice_column="slice")
# Who belongs together lies together: the six pairs go round the four slices.
REAL_PLACES = {name: (number // 2 % 4 // 2, number // 2 % 2) for number, name in enumerate(NAMES)}


def trainer_of(path):
    """A trainer whose dataset still holds every row, as that of somebody who never learns of deletions."""
    from support.tiny import lm_rows, make_trainer, s3t_config, tiny_llama

    places = [dict(zip(("shard", "slice"), REAL_PLACES[name])) for name in NAMES]
    rows = [
        {**row, "id": name, "user": user, **place}
        for row, name, user, place in zip(lm_rows(len(NAMES)), NAMES, USERS, places)
    ]
    return make_trainer(path, tiny_llama(layers=2), rows, config=s3t_config(**REAL_CONFIG))


class ModelLife(Life):
    """A model that serves, and a trainer, perhaps in another process, that grows what is missing."""

    trainer = None

    def load(self):
        from support.tiny import tiny_llama

        from hf_s3t import S3TModel

        # Who dies takes all its objects along.
        self.trainer = None
        self.model = S3TModel.from_pretrained(self.path, base_model=tiny_llama(layers=2))
        self.follows = self.is_running = True
        assert self.model.check() == []

    def settle(self):
        wait_for_cleaner(self.model)

    def follow(self, way):
        if way == "refresh":
            self.model.refresh()
        elif way == "call":
            self.answer()
        self.follows |= way != "nothing"

    def answer(self):
        import torch

        from hf_s3t.errors import ExhaustedError

        exhausted = not any(self.plain.depths)
        with torch.no_grad(), pytest.raises(ExhaustedError) if exhausted else nullcontext():
            return self.model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits
        return None

    @rule(own=st.booleans())
    def train(self, own):
        """The trainer's live model may go on serving, or the one that was loaded learns of the stages."""
        self.trainer = self.trainer or trainer_of(self.path)
        self.trainer.train()
        self.plain.stages |= set(self.plain.missing())
        if own:
            self.model = self.trainer.s3t_model
        self.model.refresh()
        self.follows = True

    @rule(moment=moments)
    def someone_dies_while_training(self, moment):
        before = len(self.plain.stages)
        trainer = trainer_of(self.path)
        with suppress(OSError), Faults(moment).running():
            trainer.train()
        self.load()
        self.adopt(before)

    @rule(ids=ids)
    def unlearn(self, ids):
        self.check_report(self.model.unlearn(ids), self.plain.delete(ids))

    @rule(groups=groups)
    def unlearn_groups(self, groups):
        if all(map(self.plain.knows, groups)):
            self.check_report(self.model.unlearn(groups=groups), self.plain.delete([], groups))
        else:
            with pytest.raises(UnknownExampleError):
                self.model.unlearn(groups=groups)
            self.follows = False

    @rule(ids=ids, groups=groups)
    def unlearn_later(self, ids, groups):
        groups = [group for group in groups if self.plain.knows(group)]
        receipt = self.model.unlearn_later(ids, groups=groups)
        self.plain.wait(ids, groups)
        assert receipt.pending == len(self.plain.waiting & self.plain.present)

    @rule()
    def apply_pending(self):
        self.check_report(self.model.apply_pending(), self.plain.apply_waiting())

    @rule()
    def a_model_that_is_loaded_answers_the_same(self):
        import torch

        self.follow("call")
        before = self.answer()
        self.load()
        after = self.answer()
        assert before is after is None or torch.equal(before, after)

    def check_who_serves(self):
        status = self.model.status()
        assert status["depths"] == self.plain.depths and status["examples"] == len(self.plain.present)
        assert status["pending"] == len(self.plain.waiting & self.plain.present)
        assert self.model.is_exhausted == (not any(self.plain.depths))
        assert {str(key) for key in self.model.stack.loaded} <= self.plain.stages


@pytest.fixture(scope="module")
def trained(tmp_path_factory, one_thread):
    path = tmp_path_factory.mktemp("trained") / "system"
    trainer_of(path).train()
    return path


@pytest.mark.parametrize(
    ("examples", "steps"), [(3, 8), pytest.param(30, 15, marks=[pytest.mark.slow, pytest.mark.long])]
)
def test_a_model_serves_at_any_time_what_its_history_left(trained, tmp_path, examples, steps):
    named = dict(zip(NAMES, USERS))
    run(lambda: ModelLife(trained, tmp_path, PlainModel(REAL_PLACES, named, SHORT_SEQUENCES)), examples, steps)


def test_requests_that_were_applied_and_cannot_be_removed_are_told_and_applied_once(without_tensors, tmp_path):
    """Found by the machine above: the error of the operating system came out as it was."""
    folder = SystemFolder(shutil.copytree(without_tensors, tmp_path / "system"))
    request_later(folder, NAMES[:1])
    applied = apply(folder, NAMES[:1])
    with Faults(0).running(), pytest.raises(FolderError, match=r"pending.jsonl could not be removed .*are in force"):
        PendingRequests(folder).clear()
    assert applied.deleted == 1 and apply_pending(folder).deleted == 0
    assert not (folder.path / "pending.jsonl").exists()
