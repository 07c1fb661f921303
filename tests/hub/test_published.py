"""Who was deleted cannot be told without the secret (E5): attacks on what a push brings to the Hub alone."""

import hashlib
import heapq
import json
import random
import shutil
import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from datasets import Dataset
from support.folders import apply
from support.tiny import make_trainer, s3t_config

from hf_s3t import S3TConfig
from hf_s3t.errors import KeyMissingError
from hf_s3t.folder.ledger_file import pin_of
from hf_s3t.folder.system import SystemFolder
from hf_s3t.folder.table_file import read_pin, read_table, write_table
from hf_s3t.hub.pushing import _operations
from hf_s3t.hub.repository import HubState
from hf_s3t.records.digests import DigestKey, KeptNames
from hf_s3t.records.examples import ExampleTable
from hf_s3t.records.ledger import Ledger


# So that what is found does not hang on a draw.
pytestmark = pytest.mark.usefixtures("one_thread", "shared_key")

SHARDS, SLICES, SEED = 3, 4, 7
CELLS = SHARDS * SLICES


def names(count, chance) -> list[str]:
    return [f"{chance.randrange(10**9)}.{number}@example.org" for number in range(count)]


def system(path, ids, groups=None, **changes) -> SystemFolder:
    """A system as a trainer makes it."""
    columns = {
        "id": ids,
        "input_ids": [[5, 6]] * len(ids),
        "labels": [[5, 6]] * len(ids),
        **({} if groups is None else {"person": groups}),
    }
    settings = {"num_shards": SHARDS, "num_slices": SLICES, "seed": SEED, "partition": "balanced", **changes}
    config = s3t_config(**settings, group_column=None if groups is None else "person")
    return make_trainer(path, rows=Dataset.from_dict(columns), config=config).folder


def no_secret():
    raise KeyMissingError("It is not published.")


class Published:
    """What a stranger reads of a system: the files of a push."""

    def __init__(self, folder: SystemFolder, path: Path):
        files = _operations(folder, HubState("", {}), lambda *_: {}, None).added
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        assert not list(path.rglob("*.key"))
        self.bytes = b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())
        config = S3TConfig.from_dict(json.loads((path / "s3t_config.json").read_text())["s3t_config"])
        self.seed = config.seed
        # Without the secret, which is not published.
        self.table = read_table(path / "examples.parquet").examples(config, KeptNames(no_secret, config.keep_ids))
        self.rows = dict(zip(self.table.rows, map(self.table.example, self.table.row_numbers), strict=True))
        self.ledger = Ledger.parse((path / "ledger.jsonl").read_text())

    def cell(self, example_id) -> int:
        row = self.rows[example_id]
        return row.slice * SHARDS + row.shard

    @property
    def groups(self) -> dict[str, list]:
        found: dict[str, list] = {}
        for example_id, row in self.rows.items():
            found.setdefault(row.group, []).append(example_id)
        return found

    def order(self, name: str) -> bytes:
        """Where a name would come if names were dealt in the order of a hash that everybody can compute."""
        key = hashlib.blake2b(str(self.seed).encode()).digest()
        return hashlib.blake2b(b"s" + name.encode(), key=key, person=b"hf_s3t place", digest_size=16).digest()


@pytest.fixture
def publish(tmp_path):
    return lambda folder: Published(folder, tmp_path / "published")


# Whole units are gone: gaps in the deal


def found_in_gaps(published: Published, cells: dict[str, int], candidates: list[str]) -> float:
    """The share of names that would have been dealt where the cells of those that are left skip one."""
    left = sorted((published.order(name), cell) for name, cell in cells.items())
    gaps = [(a, b) for (a, one), (b, two) in pairwise(left) if (two - one) % CELLS != 1]
    return sum(any(a < published.order(name) < b for a, b in gaps) for name in candidates) / len(candidates)


def test_no_gap_shows_where_a_deleted_id_was(tmp_path, publish):
    chance = random.Random(1)
    people, strangers = names(600, chance), names(300, chance)
    folder, gone = system(tmp_path / "system", people), chance.sample(people, 12)
    apply(folder, gone)
    published = publish(folder)
    cells = {name: published.cell(name) for name in published.rows}
    assert len(cells) == 588
    advantage = found_in_gaps(published, cells, gone) - found_in_gaps(published, cells, strangers)
    assert abs(advantage) < 0.2


def test_no_gap_shows_where_a_deleted_group_was(tmp_path, publish):
    chance = random.Random(2)
    people, strangers = names(300, chance), names(300, chance)
    groups = [person for person in people for _ in range(2)]
    folder, gone = system(tmp_path / "system", names(600, chance), groups), chance.sample(people, 12)
    apply(folder, groups=gone)
    published = publish(folder)
    cells = {name: published.cell(members[0]) for name, members in published.groups.items()}
    assert len(cells) == 288
    advantage = found_in_gaps(published, cells, gone) - found_in_gaps(published, cells, strangers)
    assert abs(advantage) < 0.2


# Some rows of a group are gone, and its name is still there: sizes


def dealt_by_size(sizes: dict[str, int]) -> Counter:
    """How many groups of each size every cell gets, where the largest come first: the order of equals has no say."""
    loads, found = [(0, cell) for cell in range(CELLS)], Counter()
    for size in sorted(sizes.values(), reverse=True):
        load, cell = loads[0]
        heapq.heapreplace(loads, (load + size, cell))
        found[size, cell] += 1
    return found


def suspects(published: Published, cell: int) -> list[str]:
    """The groups of a cell of whom one more row, then, would explain where all the others are now."""
    groups = published.groups
    found = []
    for name, members in groups.items():
        if published.cell(members[0]) == cell:
            sizes = {other: len(ids) + (other == name) for other, ids in groups.items()}
            cells = Counter((sizes[other], published.cell(ids[0])) for other, ids in groups.items())
            found += [name] if cells == dealt_by_size(sizes) else []
    return found


@pytest.mark.parametrize("number", range(3))
def test_no_size_shows_which_group_lost_a_row(number, tmp_path, publish):
    chance = random.Random(number)
    people = names(90, chance)
    groups = [person for person in people for _ in range(chance.randint(2, 12))]
    ids = names(len(groups), chance)
    folder, victim = system(tmp_path / "system", ids, groups), chance.randrange(len(ids))
    # Which slice it was, the stages that went show.
    row = folder.table.rows[ids[victim]]
    apply(folder, [ids[victim]])
    named = suspects(publish(folder), row.slice * SHARDS + row.shard)
    assert groups[victim] not in named


# Nothing stays in the files


@pytest.mark.parametrize("keep_ids", ["plain", "digest"])
def test_the_table_is_that_of_the_remaining_rows_to_the_byte(keep_ids, tmp_path, publish):
    chance = random.Random(3)
    ids, people = names(60, chance), names(60, chance)
    folder = system(tmp_path / "system", ids, people, keep_ids=keep_ids)
    apply(folder, ids[:5])
    published = publish(folder)
    anew = ExampleTable.of(published.rows, SHARDS, SLICES, SEED, folder.names)
    for file, table in (("now", folder.table), ("anew", anew)):
        write_table(tmp_path / file, table, folder.ledger)
    on_disk = (folder.path / "examples.parquet").read_bytes()
    assert on_disk == (tmp_path / "now").read_bytes() == (tmp_path / "anew").read_bytes()
    assert not any(name.encode() in published.bytes for name in (*ids[:5], *people[:5]))
    # The order of the rows is the dataset's, or, where that would tell whose a digest is, one of the digests.
    kept = KeptNames(folder.key, keep_ids)
    expected = [kept.of_id(i) for i in ids[5:]]
    assert list(published.rows) == (expected if keep_ids == "plain" else sorted(expected))


def test_whoever_of_a_slice_is_deleted_the_rest_that_is_published_is_the_same(tmp_path):
    ids = names(60, random.Random(4))
    folder = system(tmp_path / "system", ids)
    shown = []
    for number, victim in enumerate(folder.table.members(1, 2)):
        copy = SystemFolder(shutil.copytree(folder.path, tmp_path / f"copy-{number}"))
        apply(copy, [victim])
        published = Published(copy, tmp_path / f"published-{number}")
        (entry,) = published.ledger.entries
        told = {name: value for name, value in vars(entry).items() if name not in ("ids", "time")}
        shown.append((told, len(entry.ids), Counter(map(published.cell, published.rows)), list(published.rows)))
        assert shown[-1][3] == [i for i in ids if i != victim]
    assert len(shown) == 5 and all(one[:3] == shown[0][:3] for one in shown)


# A deletion meanwhile


def test_table_ledger_and_index_are_of_one_time_while_a_thread_follows_a_deletion(tmp_path, monkeypatch, publish):
    ids = names(60, random.Random(6))
    folder = system(tmp_path / "system", ids)
    text = Ledger.text

    def read_meanwhile(ledger):
        found = text.fget(ledger)
        if not ledger.lines and threading.current_thread() is threading.main_thread():
            follows = threading.Thread(target=lambda: (apply(SystemFolder(folder.path), ids[:1]), folder.refresh()))
            follows.start()
            follows.join()
        return found

    monkeypatch.setattr(Ledger, "text", property(read_meanwhile))
    published = publish(folder)
    assert folder.ledger.num_deletions == 1 and ids[0] not in folder.table.rows
    assert not published.ledger.lines and list(published.rows) == ids
    pin = pin_of(published.ledger)
    index = json.loads((tmp_path / "published" / "stages" / "index.json").read_text())
    assert read_pin(tmp_path / "published" / "examples.parquet") == index["ledger"] == pin


# Systems from before


def test_a_system_that_was_placed_without_its_secret_keeps_its_places(tmp_path, monkeypatch):
    ids = names(60, random.Random(5))
    with monkeypatch.context() as patch:
        patch.setattr(DigestKey, "for_places", None)
        before = system(tmp_path / "system", ids)
    assert before.record["keyed_places"] is False
    assert system(tmp_path / "system", ids).table.rows == before.table.rows
    now = system(tmp_path / "other", ids)
    assert now.record["keyed_places"] is True and now.table.rows != before.table.rows
    assert system(tmp_path / "hashed", ids, partition="hashed", num_slices=2).record["keyed_places"] is False
