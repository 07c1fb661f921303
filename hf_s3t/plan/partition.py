"""Where an example goes: from its id (or group), the seed and a secret to its shard, its slice, and its rank there."""

import hashlib
import heapq
import hmac
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np

from ..checks import require_choice, require_int
from ..config import PARTITIONS
from ..errors import ConfigError, EmptySliceError, ExampleIdError, counted


# An id, a group, or what else names rows that stay together.
Name = int | str

# What digests are for, so that those of one purpose tell nothing of another's.
_ORDER, _PLACE = b"hf_s3t order", b"hf_s3t place"
_NAMED = 5
_SHORTEST_KEY = 16


def check_ids(ids: Iterable[Any]) -> list[int | str]:
    """
    Check that every example has an id, and that no two share one.

    Args:
        ids (`list[int]`, `list[str]` or array):
            The id of each row.

    Returns:
        `list[int | str]`: The same ids as plain Python integers or strings.

    Raises:
        [`~hf_s3t.errors.ExampleIdError`]: If there are no ids, or some are missing, repeated, of mixed type, or
            neither integers nor strings.

    Example:

    ```python
    >>> from hf_s3t.plan.partition import check_ids

    >>> check_ids(["ann", "bob"])
    ['ann', 'bob']
    ```
    """
    checked = _plain(ids, "id", "Fill or drop these rows, or leave `id_column` out to use row numbers.")
    if len(set(checked)) < len(checked):
        repeated = [value for value, count in Counter(checked).items() if count > 1]
        raise ExampleIdError(
            f"Ids that occur more than once ({len(repeated)}): {_some(map(repr, repeated))}. Expected an id to name "
            "one example: drop the repeated rows, choose another `id_column`, or use the column as `group_column`."
        )
    return checked


def units_of(ids: Sequence[Name], groups: Sequence[Name] | None, contents: Sequence[Hashable]) -> list[Name]:
    """
    What must lie in one slice, where equal rows are kept together: per row the name of its unit.

    Rows of one group belong together, rows of equal content do, and so does all that this connects.

    Args:
        ids (sequence): The id of each row.
        groups (sequence, *optional*): The group of each row.
        contents (sequence): A digest of each row's content.

    Returns:
        `list`: Per row the group (without groups the id) that comes first, by its text, among those of its unit.

    Example:

    ```python
    >>> from hf_s3t.plan.partition import units_of

    >>> units_of(["a", "b", "c"], None, ["same", "other", "same"])
    ['a', 'b', 'a']
    ```
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    names, name_of = _distinct(ids if groups is None else groups)
    distinct, content_of = _distinct(contents)
    edges = (name_of, len(names) + content_of)
    size = len(names) + len(distinct)
    graph = coo_array((np.ones(len(name_of)), edges), shape=(size, size))
    _, component = connected_components(graph, directed=False)
    in_order = np.array(sorted(range(len(names)), key=lambda number: str(names[number])), np.int64)
    of_names, first = np.unique(component[in_order], return_index=True)
    leading = in_order[first][np.searchsorted(of_names, component[name_of])]
    return [names[number] for number in leading.tolist()]


def assign(
    ids: Iterable[Any],
    *,
    num_shards: int,
    num_slices: int,
    method: str = "balanced",
    seed: int = 42,
    groups: Iterable[Any] | None = None,
    shards: list[int] | None = None,
    slices: list[int] | None = None,
    key: bytes | None = None,
) -> list[tuple[int, int]]:
    """
    Assign every example to a slice of a shard.

    The answer does not depend on content, row order, process or Python version.

    Args:
        ids (`list[int]`, `list[str]` or array):
            The id of each row, unique.
        num_shards (`int`):
            Number of shards `m`.
        num_slices (`int`):
            Number of slices `L` per shard.
        method (`str`, defaults to `"balanced"`):
            - `"balanced"`: ids are ordered by a hash of seed and `key` and dealt out, so that sizes of slices, and of
              shards, are within one of each other. A group goes to the emptiest slice when its first row comes, so
              that large ones tend to come first and sizes are as near as groups allow.
            - `"hashed"`: a hash of seed and id (or group) is the place. It holds whatever other rows come or leave,
              and anybody can compute it.
            - `"column"`: `shards` and `slices` say it.
        seed (`int`, defaults to 42):
            Seed of the hash.
        groups (`list[int]`, `list[str]` or array, *optional*):
            The group of each row (a person, say). The rows of a group go to one slice.
        shards (`list[int]`, *optional*):
            The shard of each row, for `method="column"`.
        slices (`list[int]`, *optional*):
            The slice of each row, for `method="column"`.
        key (`bytes`, *optional*):
            A secret of at least 16 bytes, which has a say in `"balanced"` alone: without it nobody can tell where an
            id that is not there would have been dealt. Systems that are compared need one key. Without one, ids and
            seed decide, groups are dealt in the order of their sizes, and whoever reads the places of those that are
            left can tell who is gone: for public data, and for places that were dealt before there were keys.

    Returns:
        `list[tuple[int, int]]`: Shard and slice of each row, counted from 0.

    Raises:
        [`~hf_s3t.errors.ExampleIdError`]: If an id or a group is missing, of mixed or wrong type, or an id repeated.
        [`~hf_s3t.errors.EmptySliceError`]: If a slice would have no example.
        [`~hf_s3t.errors.ConfigError`]: If the settings are out of range or contradict each other.

    Example:

    ```python
    >>> from collections import Counter
    >>> from hf_s3t.plan.partition import assign

    >>> places = assign(range(100), num_shards=2, num_slices=3)
    >>> sorted(Counter(places).values())
    [16, 16, 17, 17, 17, 17]
    ```
    """
    columns = shards_and_slices(
        ids,
        num_shards=num_shards,
        num_slices=num_slices,
        method=method,
        seed=seed,
        groups=groups,
        shards=shards,
        slices=slices,
        key=key,
    )
    return list(zip(*(column.tolist() for column in columns), strict=True))


def shards_and_slices(
    ids: Iterable[Any],
    *,
    num_shards: int,
    num_slices: int,
    method: str = "balanced",
    seed: int = 42,
    groups: Iterable[Any] | None = None,
    shards: Sequence[int] | None = None,
    slices: Sequence[int] | None = None,
    key: bytes | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """What [`assign`] answers, of the same arguments, as two columns of 32 bits: the shards, and the slices."""
    require_int("num_shards", num_shards, 1)
    require_int("num_slices", num_slices, 1)
    require_int("seed", seed, None)
    require_choice("method", method, PARTITIONS)
    if key is not None and (not isinstance(key, bytes) or len(key) < _SHORTEST_KEY):
        got = f"{len(key)} bytes" if isinstance(key, bytes) else type(key).__name__
        raise ConfigError(f"`key` must be at least {_SHORTEST_KEY} bytes, got {got}. Leave it out to have none.")
    if (method == "column") != (shards is not None and slices is not None) or (shards is None) != (slices is None):
        raise ConfigError(
            f'method="{method}" got {"no" if shards is None else "a"} shard and {"no" if slices is None else "a"} '
            'slice column. Both belong to method="column", and to it alone.'
        )
    ids = check_ids(ids)
    # What stays together: a group if there are groups, else the example itself.
    units, unit_of = _each(ids) if groups is None else _distinct(_checked_groups(groups, len(ids)))
    _check_enough(len(units), groups is not None, num_shards, num_slices)
    if method == "column":
        columns = _numbers("shard", shards, num_shards, ids), _numbers("slice", slices, num_slices, ids)
        if groups is not None:
            _check_groups_whole(units, unit_of, *columns)
    else:
        cells = num_shards * num_slices
        if method == "hashed":
            cell_of = _remainders(_digests(units, _hasher(seed, _PLACE)), cells)
        else:
            cell_of = _dealt(in_turns(ids, units, unit_of, seed, key), np.bincount(unit_of), cells)
        # Neighbouring cells lie in different shards, so that what is left over by the division spreads over them.
        shard_of, slice_of = cell_of % num_shards, cell_of // num_shards
        columns = shard_of.astype(np.int32)[unit_of], slice_of.astype(np.int32)[unit_of]
    _check_filled(*columns, num_shards, num_slices, method)
    return columns


def hashed_places(units: Sequence[Name], num_shards: int, num_slices: int, seed: int) -> list[tuple[int, int]]:
    """
    Where `"hashed"` puts an id (or group): it depends on nothing but the seed and the numbers of shards and slices.

    Args:
        units (sequence): Ids, or groups where there are groups.
        num_shards (`int`): Number of shards.
        num_slices (`int`): Number of slices per shard.
        seed (`int`): The system's seed.
    """
    cells = _remainders(_digests(units, _hasher(seed, _PLACE)), num_shards * num_slices).tolist()
    return [(cell % num_shards, cell // num_shards) for cell in cells]


def order_key(example_id: int | str, seed: int) -> bytes:
    """
    The key by which examples are sorted inside a slice, so that the order of the dataset's rows does not matter.

    Args:
        example_id (`int` or `str`):
            A checked id; 1 and `"1"` have different keys.
        seed (`int`):
            The seed of the system.

    Returns:
        `bytes`: 16 bytes.

    Example:

    ```python
    >>> from hf_s3t.plan.partition import order_key

    >>> sorted(range(6), key=lambda i: order_key(i, seed=42))
    [5, 4, 1, 0, 3, 2]
    ```
    """
    return _digest(example_id, _hasher(seed, _ORDER))


def in_order(ids: Sequence[Name], seed: int) -> np.ndarray:
    """
    How examples are sorted inside a slice: the positions of checked ids in the order of their [`order_key`].

    Args:
        ids (sequence): The ids of a slice.
        seed (`int`): The seed of the system.
    """
    return _sorted(_digests(ids, _hasher(seed, _ORDER)))


# Python's own hash() of strings differs between processes.
@cache
def _hasher(seed: int, purpose: bytes) -> hashlib.blake2b:
    return _hasher_of(hashlib.blake2b(str(seed).encode()).digest(), purpose)


def _hasher_of(key: bytes, purpose: bytes) -> hashlib.blake2b:
    return hashlib.blake2b(key=key, person=purpose, digest_size=16)


def _digest(value: Name, hasher: hashlib.blake2b) -> bytes:
    hasher = hasher.copy()
    hasher.update((b"s" if isinstance(value, str) else b"i") + str(value).encode("utf-8", "surrogatepass"))
    return hasher.digest()


def _digests(values: Iterable[Name], hasher: hashlib.blake2b) -> np.ndarray:
    """Of each value a row of two numbers, which are its digest and are sorted as digests are."""
    joined = b"".join([_digest(value, hasher) for value in values])
    return np.frombuffer(joined, ">u8").astype(np.uint64).reshape(-1, 2)


def _sorted(digests: np.ndarray) -> np.ndarray:
    """The positions of digests in their order."""
    return np.lexsort((digests[:, 1], digests[:, 0]))


def _remainders(digests: np.ndarray, divisor: int) -> np.ndarray:
    """Digests, taken for numbers of 128 bits, modulo a number of at most 32 bits: no product exceeds 64."""
    by = np.uint64(divisor)
    high, low = digests[:, 0] % by, digests[:, 1] % by
    return ((high * np.uint64(2**64 % divisor) + low) % by).astype(np.int64)


def _each(ids: Sequence[Name]) -> tuple[Sequence[Name], np.ndarray]:
    """Where every example is a unit of its own: what `_distinct` would find."""
    return ids, np.arange(len(ids))


def _distinct(values: Sequence[Any]) -> tuple[list[Any], np.ndarray]:
    """The distinct values in the order of their first rows, and of each row the number of its value among them."""
    number_of = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return list(number_of), np.fromiter(map(number_of.__getitem__, values), np.int64, len(values))


def _dealt(turns: np.ndarray, sizes: np.ndarray, cells: int) -> np.ndarray:
    """Per unit the cell that it is dealt to in its turn: the emptiest, among equals the lowest."""
    cell_of = np.empty(len(turns), np.int64)
    if sizes.min() == sizes.max():
        cell_of[turns] = np.arange(len(turns)) % cells
        return cell_of
    emptiest = [(0, cell) for cell in range(cells)]
    dealt = []
    for size in sizes[turns].tolist():
        load, cell = emptiest[0]
        dealt.append(cell)
        heapq.heapreplace(emptiest, (load + size, cell))
    cell_of[turns] = dealt
    return cell_of


def in_turns(
    ids: Sequence[Name], units: Sequence[Name], unit_of: np.ndarray, seed: int, key: bytes | None
) -> np.ndarray:
    """
    The units in the order in which they are dealt.

    Under a key they come as their first rows do, where rows come in the order of a hash. Not in the order of their
    sizes: by that, who reads the places can tell which group lost a row.
    """
    if key is None:
        digests = _digests(units, _hasher(seed, _PLACE))
        return np.lexsort((digests[:, 1], digests[:, 0], -np.bincount(unit_of)))
    hasher = _hasher_of(hmac.digest(key, str(seed).encode(), "sha512"), _PLACE)
    rows = _sorted(_digests(ids, hasher))
    if units is ids:
        return rows
    # The units are numbers from 0 on, so these are the positions of their first rows, unit by unit.
    _, first = np.unique(unit_of[rows], return_index=True)
    return np.argsort(first)


def _checked_groups(groups: Iterable[Any], rows: int) -> list[Name]:
    checked = _plain(groups, "group", "Give every row a group: a row on its own gets a group of its own.")
    if len(checked) != rows:
        raise ConfigError(
            f"`groups` has {counted(len(checked), 'value')} for {counted(rows, 'id')}. Give one group per row."
        )
    return checked


def _plain(values: Any, what: str, remedy: str) -> list[Name]:
    """The values as plain integers, or all as strings."""
    rows = [] if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__") else list(values)
    if not rows:
        raise ExampleIdError(
            f"Got {values!r} as {what}s, expected a list with one integer or string per example. Is the dataset empty?"
        )
    kinds = set(map(type, rows))
    if kinds == {str} or (kinds == {int} and -(2**63) <= min(rows) and max(rows) < 2**63):
        return rows
    plain = [
        str(v) if isinstance(v, str) else int(v) if _is_integer(v) else None  # numpy's scalars become Python's
        for v in rows
    ]
    wrong = [f"{rows[row]!r} (row {row})" for row, v in enumerate(plain) if v is None]
    if wrong:
        raise ExampleIdError(
            f"Values that are missing or of a type that no {what} has ({len(wrong)}): {_some(wrong)}. Expected "
            f"integers or strings. {remedy}"
        )
    # The table's columns hold 64 bits.
    large = [f"{v!r} (row {row})" for row, v in enumerate(plain) if isinstance(v, int) and not -(2**63) <= v < 2**63]
    if large:
        raise ExampleIdError(
            f"The {what}s have integers beyond 64 bits ({len(large)}): {_some(large)}. Convert the column to strings."
        )
    if len(set(map(type, plain))) > 1:
        shown = {type(v): f"{v!r} (row {row})" for row, v in enumerate(plain)}
        raise ExampleIdError(
            f"The {what}s mix integers and strings, {shown[int]} and {shown[str]} for example. Expected one type: "
            "convert the column to strings."
        )
    return [v for v in plain if v is not None]


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _numbers(name: str, values: Iterable[Any] | None, bound: int, ids: Sequence[Name]) -> np.ndarray:
    values = [] if values is None else list(values)
    if len(values) != len(ids):
        raise ConfigError(
            f"`{name}s` has {counted(len(values), 'value')} for {counted(len(ids), 'id')}. Give one {name} per row."
        )
    if set(map(type, values)) != {int} or min(values) < 0 or max(values) >= bound:
        wrong = [f"{v!r} (id {i!r})" for v, i in zip(values, ids) if not _is_integer(v) or not 0 <= v < bound]
        if wrong:
            raise ConfigError(
                f"Rows with a wrong {name} number ({len(wrong)}): {_some(wrong)}. Expected integers from 0 to "
                f"{bound - 1} (num_{name}s={bound})."
            )
    return np.array(values, np.int32)


def _check_groups_whole(groups: Sequence[Name], group_of: np.ndarray, shards: np.ndarray, slices: np.ndarray) -> None:
    # Sorted by group, then by place: a group that is whole has one.
    places = np.unique(np.stack([group_of, shards, slices]), axis=1)
    spread: dict[int, list[str]] = {}
    for group, shard, slice_ in places[:, np.bincount(places[0])[places[0]] > 1].T.tolist():
        spread.setdefault(group, []).append(f"shard {shard} slice {slice_}")
    torn = [f"{groups[group]!r} in " + " and ".join(where) for group, where in spread.items()]
    if torn:
        raise ConfigError(
            f"Groups that lie in more than one slice ({len(torn)}): {_some(torn)}. Expected one slice per group: mend "
            "the columns, or leave `group_column` out."
        )


def _check_enough(distinct: int, grouped: bool, num_shards: int, num_slices: int) -> None:
    if distinct < num_shards * num_slices:
        what = "group" if grouped else "example"
        raise EmptySliceError(
            f"{counted(distinct, what)} cannot fill num_shards={num_shards} times num_slices={num_slices} slices, "
            f"expected at least {num_shards * num_slices}. Lower `num_shards` or `num_slices`."
        )


def _check_filled(shards: np.ndarray, slices: np.ndarray, num_shards: int, num_slices: int, method: str) -> None:
    sizes = np.bincount(shards.astype(np.int64) * num_slices + slices, minlength=num_shards * num_slices)
    places = (divmod(cell, num_slices) for cell in np.flatnonzero(sizes == 0).tolist())
    empty = [f"shard {shard} slice {slice_}" for shard, slice_ in places]
    if empty:
        ways = {"column": "mend the columns", "hashed": 'use partition="balanced" or another seed'}
        raise EmptySliceError(
            f"Slices without an example ({len(empty)} of {num_shards * num_slices}): {_some(empty)}. Expected at "
            f"least one in each: lower `num_shards` or `num_slices`, or {ways[method]}."
        )


def _some(offenders: Iterable[str]) -> str:
    offenders = list(offenders)
    left_out = len(offenders) - _NAMED
    return ", ".join(offenders[:_NAMED]) + (f" and {left_out} more" if left_out > 0 else "")
