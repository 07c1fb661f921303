"""Systems without tensors: folders whose stages hold, in the place of weights, a digest of what weights depend on."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from hf_s3t import S3TConfig
from hf_s3t.folder.addition_file import StoredAddition
from hf_s3t.folder.files import write_checked_json
from hf_s3t.folder.gate_file import StoredGate, read_gate
from hf_s3t.folder.layout import GATE_FILE, KEY_FILE, STAGE_FILE
from hf_s3t.folder.secret import read_key, write_key
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations import deletion, pending
from hf_s3t.plan import StageKey
from hf_s3t.plan.partition import assign
from hf_s3t.records.digests import DigestKey, KeptNames
from hf_s3t.records.examples import Example, ExampleTable
from hf_s3t.records.report import UnlearningReport
from hf_s3t.records.request import DeletionRequest
from hf_s3t.records.terms import TermRows, terms_of, vocabulary_digest


NUMBERS = list(range(12))
NAMES = [f"someone-{name}@example.org" for name in "abcdefghijkl"]
VOCABULARY = vocabulary_digest({"what": 0, "known": 1})
USERS = [f"user-{number // 2}" for number in range(12)]
# Each user has two examples.
CONFIG = S3TConfig(num_shards=2, num_slices=3, group_column="user", keep_idle=True, seed=1)


@contextmanager
def own_surroundings(home: Path) -> Iterator[None]:
    """Caches of our own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(home / "datasets"))
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
        patch.setattr("huggingface_hub.constants.HF_XET_CACHE", str(home / "xet"))
        yield


def new_system(path, ids=NUMBERS, config=CONFIG, groups=USERS) -> SystemFolder:
    """A system whose table is written and whose stages are missing."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if not (path / KEY_FILE).exists():
        # A secret of its own, and the same in every run: so are the places.
        write_key(path, DigestKey(hashlib.sha256(path.name.encode()).hexdigest().encode()))
    key = read_key(path)
    shape = {"num_shards": config.num_shards, "num_slices": config.num_slices}
    places = assign(ids, **shape, seed=config.seed, groups=groups, key=key.for_places)
    groups = [None] * len(ids) if groups is None else groups
    rows = {i: Example(*place, key.of_content({"id": i}), group) for i, place, group in zip(ids, places, groups)}
    table = ExampleTable.of(rows, **shape, seed=config.seed, names=KeptNames(key, config.keep_ids))
    gate = gate_of(table, key) if config.gate else None
    return SystemFolder.create(path, {"s3t_config": config.to_dict(), "base_model": {"id": "base"}}, table, key, gate)


def gate_of(table: ExampleTable, key: DigestKey) -> StoredGate:
    """What `trainer.build_gate()` would make of rows whose prompts name their ids."""
    columns = table.columns.taken(table.row_numbers)
    terms = [terms_of(prompt_of(one), key) for one in columns.kept(np.arange(len(columns)))]
    rows = TermRows.of(columns.id_digests, columns.shards, columns.slices, terms)
    return StoredGate.of(rows, table.num_shards, table.num_slices, VOCABULARY)


def gate_says(gate: StoredGate) -> list[list]:
    """Everything that a gate says of rows."""
    rows, counts = gate.settled().rows, gate.settled().counts
    of_rows = [rows.digests, rows.shards, rows.slices, rows.ends, rows.terms]
    of_counts = [counts.terms, counts.ends, counts.places, counts.counts, counts.totals]
    return [array.tolist() for array in (*of_rows, *of_counts)]


def gate_that_never_had(folder: SystemFolder) -> list[list]:
    """What the gate of a system says that never had the rows which are not in."""
    return gate_says(gate_of(folder.table, folder.key))


def stored_gate(folder: SystemFolder) -> list[list]:
    """What the gate on the disk says."""
    return gate_says(read_gate(folder.path / GATE_FILE, folder.key.check, folder.config)[0])


def prompt_of(one: int | str) -> str:
    """The prompt of an example."""
    return f"What is known of {one}?"


def grow(folder: SystemFolder, limit: int | None = None) -> SystemFolder:
    """Make what `train()` would make."""
    for key in folder.missing_stages()[:limit]:
        plant(folder, key)
    return folder


def add(folder: SystemFolder, places: dict, replaced=(), contents=None, weights=None, **how) -> SystemFolder:
    """
    Add rows of ids by their places, perhaps with the digests of their contents; the ids of those that are replaced are
    in, and come with another content. Members weigh as they did, if `weights` does not say how.
    """
    key, config = folder.key, folder.config
    shards = max([config.num_shards, *(shard + 1 for shard, _ in places.values())])
    of_ids = {i: key.of_content({"id": i, "edited": True} if i in replaced else {"id": i}) for i in places}
    contents = {**of_ids, **(contents or {})}
    rows = {i: Example(*place, contents[i]) for i, place in places.items()}
    with folder.lock():
        folder.refresh()
        table = ExampleTable.of(rows, shards, config.num_slices, config.seed, folder.names)
        weights = weights or folder.record.get("added", {}).get("weights", "equal")
        added = {"shards": shards - folder.record["s3t_config"]["num_shards"], "weights": weights}
        removed = deletion.stages_that_saw(folder, [*replaced], folder.stages) if replaced else []
        folder.record_addition(StoredAddition(table, added), {}, [*replaced], removed, **how)
    return folder


def plant(folder: SystemFolder, key: StageKey) -> None:
    """Make one stage, which stands on one that is there."""
    below = folder.stage_record(key.parent)["files"]["adapter_model.safetensors"] if key.parent else None
    record = {"slices": folder.slice_digests(key), "below": below, "metrics": {}}
    folder.write_stage(key, record, partial(_fill, seen=[str(key), record]))


def _fill(path: Path, seen) -> None:
    tensor = np.frombuffer(hashlib.sha256(json.dumps(seen).encode()).digest(), dtype=np.uint8)
    safetensors.numpy.save_file({"lora": tensor}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))


def add_checkpoint(folder: SystemFolder, key: StageKey, step: int = 1, recorded: bool = True) -> Path:
    """A checkpoint of a stage in training, as a trainer leaves it when it dies."""
    path = folder.checkpoints(key) / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "optimizer.pt").write_bytes(b"moments")
    if recorded:
        folder.write_checkpoint_record(path, {"slices": folder.slice_digests(key)})
    return path


def apply(folder: SystemFolder, ids=None, groups=None, **how) -> UnlearningReport:
    """Forget examples of a folder."""
    return deletion.apply(folder, DeletionRequest(ids, groups, **how))


def preview(folder: SystemFolder, ids=None, groups=None, **how) -> deletion.DeletionPreview:
    """What `apply` would do."""
    return deletion.preview(folder, DeletionRequest(ids, groups, **how))


def record(folder: SystemFolder, ids=None, groups=None, **how) -> deletion.RecordedDeletion:
    """Put a deletion into the ledger, and remove nothing yet."""
    return deletion.record_request(folder, DeletionRequest(ids, groups, **how))


def request_later(folder: SystemFolder, ids=None, groups=None, max_delay=None, **how) -> pending.PendingReceipt:
    """Note a request that is to be applied with others."""
    return pending.request_later(folder, DeletionRequest(ids, groups, **how), max_delay)


def delete_and_die(folder: SystemFolder, ids) -> None:
    """A deletion that is in the ledger, and whose process died before it removed anything."""
    with folder.lock():
        record(folder, ids)


def take_claims_away(path) -> None:
    """Have every trainer at work be taken for dead, as one does that takes its stage over."""
    for claim in Path(path).glob("claims/shard-*"):
        claim.unlink()


def files_of(path) -> dict[str, bytes | None]:
    """Everything below a folder but the lock, which says nothing; `None` for folders and links."""
    path = Path(path)
    return {
        str(entry.relative_to(path)): entry.read_bytes() if entry.is_file() and not entry.is_symlink() else None
        for entry in sorted(path.rglob("*"))
        if entry.name not in (".lock", ".erasures.lock")
    }


def stages_on_disk(path) -> set[str]:
    """The stages that have a folder."""
    return {f"{folder.parent.name}/{folder.name}" for folder in Path(path).glob("stages/shard-*/*")}


def forge(path: Path, **changes) -> None:
    """Change a file that carries its own digest, and make the digest match."""
    record = json.loads(path.read_text())
    record.pop("digest")
    write_checked_json(path, {**record, **changes})


def forge_stage(path: Path, stage: str, **changes) -> None:
    """Change the record of a stage, and make its digest match."""
    forge(Path(path) / "stages" / stage / STAGE_FILE, **changes)
