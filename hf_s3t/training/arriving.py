"""Rows that come to a system: which of a dataset are new to it, which may not come, and where they go."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError, ContentChangedError, ExampleIdError, UnknownExampleError, counted
from ..folder.system import SystemFolder
from ..operations.pending import PendingRequests
from ..plan.later_rows import Place, cheapest_slices, dealt_into, into_new_shards
from ..plan.partition import hashed_places, units_of
from ..records.buffers import hexadecimal
from ..records.columns import Columns
from ..records.examples import ExampleTable
from ..records.request import some
from .rows import TrainingRows


INTO = ("new_shards", "slices")


@dataclass(frozen=True)
class Arrival:
    """
    What a dataset brings to a system.

    Args:
        new (`list[int]`): Numbers of the rows that come, those that take the place of others among them.
        known (`int`): How many rows are in already, as they are.
        passed_over (`int`): How many were deleted before, and do not come back.
        replaced (`list`): The ids of rows that go for others, as they stand in the table.
        again (`list`): The ids that come back after they were deleted, as they stand in the table.
        again_groups (`list`): The same of groups.
    """

    new: list[int]
    known: int
    passed_over: int
    replaced: list[int | str]
    again: list[int | str]
    again_groups: list[int | str]


def arrival_of(
    rows: TrainingRows,
    digests: np.ndarray,
    folder: SystemFolder,
    again: Collection[int | str],
    known_before: Collection[int | str],
    replaces: bool,
) -> Arrival:
    """
    What a dataset brings to a system, all of it checked.

    Args:
        rows ([`~hf_s3t.training.rows.TrainingRows`]): The dataset.
        digests (`numpy.ndarray`): The keyed content digest of each row.
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system, as it is on the disk.
        again (collection of ids and groups): What was deleted and may come back.
        known_before (collection of ids): What the trainer has in its dataset: of this, deleted rows are passed over.
        replaces (`bool`): Whether rows take the place of those of their ids; otherwise whether new ones come.

    Raises:
        [`~hf_s3t.errors.ExampleIdError`]: If an id or group was deleted before, or waits to be.
        [`~hf_s3t.errors.ContentChangedError`]: If an id is in use by another row.
        [`~hf_s3t.errors.UnknownExampleError`]: If a row is to take the place of one that is not there.
    """
    table, names, ledger = folder.table, folder.names, folder.ledger
    numbers, known = table.rows_with(rows.ids, names)
    is_in = numbers >= 0
    there = np.flatnonzero(is_in)
    groups_there = None if rows.groups is None else [rows.groups[row] for row in there.tolist()]
    is_same = table.are_as(numbers[there], digests[there], groups_there, names)
    changed = there[~is_same].tolist()
    absent = np.flatnonzero(~is_in)
    deleted = {
        row
        for row, digest in zip(absent.tolist(), hexadecimal(known[absent]), strict=True)
        if digest in ledger.deleted
    }
    coming = [row for row in absent.tolist() if row not in deleted or rows.ids[row] in again]
    if replaces:
        _refuse_unknown(rows, coming)
    else:
        _refuse_changed(rows, changed)
    passed_over = {row for row in deleted if rows.ids[row] not in again}
    _refuse_deleted(rows, [row for row in passed_over if rows.ids[row] not in known_before])
    new = sorted([*changed, *coming]) if replaces else coming
    groups = _groups_that_come_back(rows, new, folder, again)
    _refuse_idle_words(rows, new, deleted, groups, again)
    return Arrival(
        new=new,
        known=int(is_same.sum()),
        passed_over=len(passed_over),
        replaced=table.columns.kept(numbers[changed]) if replaces else [],
        again=[names.of_id(rows.ids[row]) for row in coming if row in deleted],
        again_groups=[names.of_group(group) for group in groups],
    )


def _refuse_changed(rows: TrainingRows, changed: Sequence[int]) -> None:
    if not changed:
        return
    hint = (
        "Ids are row numbers here: give the whole dataset, with the new rows behind the others"
        if rows.config.id_column is None
        else "Give new rows ids of their own; rows that were edited go to `trainer.replace_examples`"
    )
    raise ContentChangedError(
        f"Got {counted(len(changed), 'id')} in use by other rows of this system: "
        f"{some([rows.ids[row] for row in changed])}. {hint}. Nothing was added."
    )


def _refuse_unknown(rows: TrainingRows, coming: Sequence[int]) -> None:
    if coming:
        raise UnknownExampleError(
            f"Got {counted(len(coming), 'row')} of ids that are not in: {some([rows.ids[row] for row in coming])}. "
            "Add them by `trainer.add_examples`. Nothing was replaced."
        )


def _refuse_deleted(rows: TrainingRows, deleted: Sequence[int]) -> None:
    if deleted:
        ids = [rows.ids[row] for row in sorted(deleted)]
        raise ExampleIdError(
            f"Got {counted(len(ids), 'example')} that somebody had deleted from this system: {some(ids)}. "
            "Leave them out; or name them in `again` if they may come back. Nothing was added."
        )


def _groups_that_come_back(
    rows: TrainingRows, new: Sequence[int], folder: SystemFolder, again: Collection[int | str]
) -> list[int | str]:
    """The groups of new rows that were deleted as a whole, all of them named; those that wait to be are refused."""
    if rows.groups is None:
        return []
    names, groups = folder.names, list(dict.fromkeys(rows.groups[row] for row in new))
    waiting = set(PendingRequests(folder).groups())
    asked_for = [group for group in groups if names.of_group(group) in waiting]
    if asked_for:
        raise ExampleIdError(
            f"Deleting {counted(len(asked_for), 'group')} was asked for and waits: {some(asked_for)}. Apply what "
            "waits first (`apply_pending`), or leave their rows out. Nothing was added."
        )
    gone = [
        group
        for group in groups
        if names.group_digest(names.of_group(group)) in folder.ledger.deleted_groups
        and not folder.table.sizes_of_groups([names.of_group(group)])[0]
    ]
    unnamed = [group for group in gone if group not in again]
    if unnamed:
        raise ExampleIdError(
            f"Got {counted(len(unnamed), 'group')} that somebody had deleted from this system: "
            f"{some(unnamed)}. Leave their rows out; or name them in `again` if they may come back. Nothing was added."
        )
    return gone


def _refuse_idle_words(
    rows: TrainingRows,
    new: Sequence[int],
    deleted: Collection[int],
    groups: Collection[int | str],
    again: Collection[int | str],
) -> None:
    used = {rows.ids[row] for row in new if row in deleted}.union(groups)
    idle = [one for one in again if one not in used]
    if idle:
        raise ExampleIdError(
            f"`again` names {some(idle)}, and no row of such an id or group comes back after it was deleted. Leave "
            "out what is not in the dataset or was never deleted. Nothing was added."
        )


@dataclass(frozen=True)
class Places:
    """
    Where rows go.

    Args:
        of_rows (`list` of `(shard, slice)`): The place of each row that comes.
        num_shards (`int`): How many shards there are then.
    """

    of_rows: list[Place]
    num_shards: int

    @property
    def sizes(self) -> dict[Place, int]:
        """How many rows go to each place."""
        found: dict[Place, int] = {}
        for place in sorted(self.of_rows):
            found[place] = found.get(place, 0) + 1
        return found


def places_of(arrival: Arrival, rows: TrainingRows, digests: np.ndarray, folder: SystemFolder, into: str) -> Places:
    """
    Where the rows of an arrival go: a row of a group that is in goes where that is, one that takes the place of
    another to its slice, all others into new shards, or into slices that cost little to grow again.

    Args:
        arrival ([`Arrival`]): What comes.
        rows ([`~hf_s3t.training.rows.TrainingRows`]): The dataset.
        digests (`numpy.ndarray`): The keyed content digest of each row.
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        into (`str`): `"new_shards"` or `"slices"`.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If a row cannot go where it must: saying which, and why.
        [`~hf_s3t.errors.EmptySliceError`]: If there are too few for a new shard.
    """
    config = folder.config
    if config.partition == "hashed" and into == "new_shards":
        raise ConfigError(
            'into="new_shards" with partition="hashed", in which the place of each row is its hash among all shards: '
            'with more of them most rows would move. Add rows with into="slices".'
        )
    if config.partition == "column":
        return _by_column(arrival, rows, folder, into)
    if config.partition == "hashed":
        return _hashed(arrival, rows, folder)
    ids = [rows.ids[row] for row in arrival.new]
    units = _units(arrival, rows, digests)
    settled = _where_units_are(arrival, rows, digests, units, folder)
    if into == "new_shards" and settled:
        named = [ids[at] for at, unit in enumerate(units) if unit in settled]
        raise ConfigError(
            f"Got {counted(len(named), 'row')} of groups, or equal to rows, that lie in a slice already, to "
            f'which into="new_shards" adds nothing: {some(named)}. Add them with into="slices", or leave them out.'
        )
    sizes, seed, key = folder.table.sizes_of_slices, config.seed, folder.key.for_places
    if into == "new_shards":
        has_units = rows.groups is not None or config.colocate_duplicates
        shard_sizes = [sum(sizes[shard, s] for s in range(config.num_slices)) for shard in range(config.num_shards)]
        found = into_new_shards(ids, units if has_units else None, shard_sizes, config.num_slices, seed, key)
        return Places(found, max(shard for shard, _ in found) + 1)
    free = [at for at, unit in enumerate(units) if unit not in settled]
    dealt: dict[int, Place] = {}
    if free:
        mean = max(1.0, len(folder.table) / len(sizes))
        count = -int(-len(free) // mean)
        stages, work = folder.current_stages, folder.growth.work
        chosen = cheapest_slices(count, list(sizes), stages, work, set(settled.values()))
        some_ids, some_units = [ids[at] for at in free], [units[at] for at in free]
        dealt = dict(zip(free, dealt_into(some_ids, some_units, chosen, sizes, seed, key), strict=True))
    of_rows = [dealt[at] if at in dealt else settled[unit] for at, unit in enumerate(units)]
    return Places(of_rows, config.num_shards)


def _units(arrival: Arrival, rows: TrainingRows, digests: np.ndarray) -> list[int | str]:
    """Per row that comes the name of what must lie in one slice with it."""
    ids = [rows.ids[row] for row in arrival.new]
    groups = None if rows.groups is None else [rows.groups[row] for row in arrival.new]
    if not rows.config.colocate_duplicates:
        return ids if groups is None else groups
    return units_of(ids, groups, [digests[row].tobytes() for row in arrival.new])


def _where_units_are(
    arrival: Arrival, rows: TrainingRows, digests: np.ndarray, units: Sequence[int | str], folder: SystemFolder
) -> dict[int | str, Place]:
    """Where the units are that have rows in the table already; those that lie in two places are refused."""
    table, names = folder.table, folder.names
    left = table.without(arrival.replaced)
    found: dict[int | str, dict[Place, int | str]] = {}
    place_of_group: dict[int | str, Place | None] = {}
    for row, unit in zip(arrival.new, units, strict=True):
        if rows.groups is not None:
            group = rows.groups[row]
            if group not in place_of_group:
                members = left.rows_of_groups([names.of_group(group)])
                place_of_group[group] = left.place_of_row(members[0]) if len(members) else None
            place = place_of_group[group]
            if place is not None:
                found.setdefault(unit, {})[place] = rows.ids[row]
    if rows.config.colocate_duplicates:
        contents = digests[arrival.new]
        for at, place in left.places_of_contents(contents).items():
            found.setdefault(units[at], {})[place] = rows.ids[arrival.new[at]]
    torn = [ids for ids in (list(places.values()) for places in found.values()) if len(ids) > 1]
    if torn:
        raise ConfigError(
            f"Rows that must lie in one slice, as a group or as equal rows, would join what lies in several slices: "
            f"{some([one for ids in torn for one in ids])}. Leave these rows out, or mend their groups."
        )
    settled = {unit: next(iter(places)) for unit, places in found.items()}
    if arrival.replaced:
        # Its slice lost its stages already.
        for row, unit in zip(arrival.new, units, strict=True):
            (old,) = table.places_of([names.of_id(rows.ids[row])])
            if old is not None:
                settled.setdefault(unit, old)
    return settled


def _hashed(arrival: Arrival, rows: TrainingRows, folder: SystemFolder) -> Places:
    names, config = rows.ids if rows.groups is None else rows.groups, folder.config
    chosen = [names[row] for row in arrival.new]
    return Places(hashed_places(chosen, config.num_shards, config.num_slices, config.seed), config.num_shards)


def _by_column(arrival: Arrival, rows: TrainingRows, folder: SystemFolder, into: str) -> Places:
    config = folder.config
    columns = [rows._column(str(name)) for name in (config.shard_column, config.slice_column)]
    found = [(columns[0][row], columns[1][row]) for row in arrival.new]
    num_shards = max([config.num_shards, *(shard + 1 for shard, _ in found if type(shard) is int)])
    if into == "slices" or arrival.replaced:
        allowed, num_shards = range(config.num_shards), config.num_shards
    else:
        allowed = range(config.num_shards, num_shards)
    wrong = [
        rows.ids[row]
        for row, (shard, slice_) in zip(arrival.new, found, strict=True)
        if shard not in allowed or slice_ not in range(config.num_slices)
    ]
    if wrong:
        raise ConfigError(
            f"Got {counted(len(wrong), 'row')} with a shard or slice that into={into!r} does not allow: {some(wrong)}."
            f" Expected slices 0 to {config.num_slices - 1}, and shards "
            + (
                f"0 to {config.num_shards - 1}."
                if into == "slices"
                else f"from {config.num_shards} on, without a gap."
            )
        )
    empty = {(shard, s) for shard in allowed for s in range(config.num_slices)} - set(found)
    if into == "new_shards" and empty:
        raise ConfigError(
            f"New shards whose slices have no row: (shard, slice) {some(sorted(empty))}. Name each slice of each new "
            "shard at least once."
        )
    _refuse_torn_groups(arrival, rows, folder, found)
    return Places(found, num_shards)


def _refuse_torn_groups(arrival: Arrival, rows: TrainingRows, folder: SystemFolder, found: Sequence[Place]) -> None:
    if rows.groups is None:
        return
    places: dict[int | str, Place] = {}
    left = folder.table.without(arrival.replaced)
    for row, place in zip(arrival.new, found, strict=True):
        group = rows.groups[row]
        members = left.rows_of_groups([folder.names.of_group(group)])
        expected = left.place_of_row(members[0]) if len(members) else places.setdefault(group, place)
        if place != expected:
            raise ConfigError(
                f"The row {rows.ids[row]!r} names slice {place[1]} of shard {place[0]}, and its group {group!r} lies "
                f"in slice {expected[1]} of shard {expected[0]}. Mend the columns, or leave the row out."
            )


def rows_of_arrival(
    arrival: Arrival, rows: TrainingRows, digests: np.ndarray, places: Places, folder: SystemFolder
) -> ExampleTable:
    """The rows that come as a table, in their places."""
    names, config, new = folder.names, folder.config, arrival.new
    shards = np.array([shard for shard, _ in places.of_rows], np.int32)
    slices = np.array([slice_ for _, slice_ in places.of_rows], np.int32)
    ids = [rows.ids[row] for row in new]
    groups = None if rows.groups is None else [names.of_group(rows.groups[row]) for row in new]
    contents = digests[new]
    if names.are_digests:
        kept = names.key.of_ids(ids)
        # Sorted: the dataset's order would tell which digest is whose.
        order = np.lexsort(kept.T[::-1])
        kept, shards, slices, contents = kept[order], shards[order], slices[order], contents[order]
        groups = None if groups is None else [groups[at] for at in order.tolist()]
        columns = Columns.of(names, kept, shards, slices, contents, groups)
    else:
        columns = Columns.of(names, ids, shards, slices, contents, groups)
    return ExampleTable(columns, places.num_shards, config.num_slices, config.seed)


def added_by(record: Mapping[str, Any], places: Places, weights: str | None) -> dict[str, Any]:
    """What the config of a system says of additions after one."""
    known = record.get("added", {"shards": 0, "weights": "equal"})
    shards = places.num_shards - record["s3t_config"]["num_shards"]
    return {**known, "shards": shards, "weights": weights or known["weights"]}
