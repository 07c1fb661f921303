"""Where an example goes: from its id (or group), the seed and a secret to its shard, its slice, and its rank there."""

import hashlib
import heapq
import hmac
from collections import Counter
from collections.abc import Sequence
from functools import cache

import numpy as np

from ..config import PARTITIONS, require_choice, require_int
from ..errors import ConfigError, EmptySliceError, ExampleIdError


_NAMED = 5
_SHORTEST_KEY = 16


def check_ids(ids) -> list[int | str]:
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
    repeated = [value for value, count in Counter(checked).items() if count > 1]
    if repeated:
        raise ExampleIdError(
            f"Ids that occur more than once ({len(repeated)}): {_some(map(repr, repeated))}. Expected an id to name "
            "one example: drop the repeated rows, choose another `id_column`, or use the column as `group_column`."
        )
    return checked


def units_of(ids: Sequence, groups: Sequence | None, contents: Sequence[str]) -> list:
    """
    What must lie in one slice, where equal rows are kept together: per row the name of its unit.

    Rows of one group belong together, rows of equal content do, and so does all that this connects.

    Args:
        ids (sequence): The id of each row.
        groups (sequence, *optional*): The group of each row.
        contents (sequence of `str`): A digest of each row's content.

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

    names = list(ids) if groups is None else list(groups)
    nodes: dict[tuple[str, object], int] = {}
    edges = [
        (nodes.setdefault(("name", name), len(nodes)), nodes.setdefault(("content", content), len(nodes)))
        for name, content in zip(names, contents, strict=True)
    ]
    rows, columns = zip(*edges, strict=True)
    graph = coo_array((np.ones(len(edges)), (rows, columns)), shape=(len(nodes), len(nodes)))
    _, component = connected_components(graph, directed=False)
    first: dict[int, object] = {}
    for name in sorted(set(names), key=str):
        first.setdefault(component[nodes["name", name]], name)
    return [first[component[nodes["name", name]]] for name in names]


def assign(
    ids,
    *,
    num_shards: int,
    num_slices: int,
    method: str = "balanced",
    seed: int = 42,
    groups=None,
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
    units = ids if groups is None else _checked_groups(groups, len(ids))
    _check_enough(units, groups is not None, num_shards, num_slices)
    if method == "column":
        places = list(zip(_numbers("shard", shards, num_shards, ids), _numbers("slice", slices, num_slices, ids)))
        if groups is not None:
            _check_groups_whole(units, places)
    else:
        cells = num_shards * num_slices
        cell_of = _balanced(ids, units, cells, seed, key) if method == "balanced" else _hashed(units, cells, seed)
        # Neighbouring cells lie in different shards, so that what is left over by the division spreads over them.
        places = [(cell_of[unit] % num_shards, cell_of[unit] // num_shards) for unit in units]
    _check_filled(places, num_shards, num_slices, method)
    return places


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
    return _digest(example_id, _hasher(seed, b"hf_s3t order"))


# Python's own hash() of strings differs between processes.
@cache
def _hasher(seed: int, purpose: bytes):
    return _hasher_of(hashlib.blake2b(str(seed).encode()).digest(), purpose)


def _hasher_of(key: bytes, purpose: bytes):
    return hashlib.blake2b(key=key, person=purpose, digest_size=16)


def _digest(value: int | str, hasher) -> bytes:
    hasher = hasher.copy()
    hasher.update((b"s" if isinstance(value, str) else b"i") + str(value).encode("utf-8", "surrogatepass"))
    return hasher.digest()


def _place_hash(unit: int | str, seed: int) -> bytes:
    return _digest(unit, _hasher(seed, b"hf_s3t place"))


def _hashed(units, cells, seed) -> dict:
    return {unit: int.from_bytes(_place_hash(unit, seed), "big") % cells for unit in set(units)}


def _balanced(ids, units, cells, seed, key) -> dict:
    sizes = Counter(units)
    if key is None:
        order = sorted(sizes, key=lambda unit: (-sizes[unit], _place_hash(unit, seed)))
    else:
        order = _by_first_row(ids, units, seed, key)
    # Filling the emptiest cell, the lowest among equals, deals units of one size out in turn.
    emptiest = [(0, cell) for cell in range(cells)]
    cell_of = {}
    for unit in order:
        load, cell = emptiest[0]
        cell_of[unit] = cell
        heapq.heapreplace(emptiest, (load + sizes[unit], cell))
    return cell_of


def _by_first_row(ids, units, seed, key) -> list:
    """
    Units in the order in which their first rows come, where rows come in the order of a hash under a key.

    Not in the order of their sizes: by that, who reads the places can tell which group lost a row.
    """
    hasher = _hasher_of(hmac.digest(key, str(seed).encode(), "sha512"), b"hf_s3t place")
    rows = sorted(zip((_digest(i, hasher) for i in ids), units, strict=True), key=lambda row: row[0])
    return list(dict.fromkeys(unit for _, unit in rows))


def _checked_groups(groups, rows) -> list[int | str]:
    groups = _plain(groups, "group", "Give every row a group: a row on its own gets a group of its own.")
    if len(groups) != rows:
        raise ConfigError(f"`groups` has {len(groups)} entries for {rows} ids. Give one group per row.")
    return groups


def _plain(values, what, remedy) -> list[int | str]:
    """The values as plain integers, or all as strings."""
    rows = [] if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__") else list(values)
    if not rows:
        raise ExampleIdError(
            f"Got {values!r} as {what}s, expected a list with one integer or string per example. Is the dataset empty?"
        )
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
        kinds = {type(v): f"{v!r} (row {row})" for row, v in enumerate(plain)}
        raise ExampleIdError(
            f"The {what}s mix integers and strings, {kinds[int]} and {kinds[str]} for example. Expected one type: "
            "convert the column to strings."
        )
    return plain


def _is_integer(value) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _numbers(name, values, bound, ids) -> list[int]:
    values = list(values)
    if len(values) != len(ids):
        raise ConfigError(f"`{name}s` has {len(values)} entries for {len(ids)} ids. Give one {name} per row.")
    wrong = [f"{v!r} (id {i!r})" for v, i in zip(values, ids) if not _is_integer(v) or not 0 <= v < bound]
    if wrong:
        raise ConfigError(
            f"Rows with a wrong {name} number ({len(wrong)}): {_some(wrong)}. Expected integers from 0 to {bound - 1} "
            f"(num_{name}s={bound})."
        )
    return [int(v) for v in values]


def _check_groups_whole(groups, places):
    spread = {}
    for group, place in zip(groups, places):
        spread.setdefault(group, set()).add(place)
    torn = [
        f"{group!r} in " + " and ".join(f"shard {shard} slice {slice_}" for shard, slice_ in sorted(where))
        for group, where in spread.items()
        if len(where) > 1
    ]
    if torn:
        raise ConfigError(
            f"Groups that lie in more than one slice ({len(torn)}): {_some(torn)}. Expected one slice per group: mend "
            "the columns, or leave `group_column` out."
        )


def _check_enough(units, grouped, num_shards, num_slices):
    distinct = len(set(units))
    if distinct < num_shards * num_slices:
        what = "groups" if grouped else "examples"
        raise EmptySliceError(
            f"{distinct} {what} cannot fill num_shards={num_shards} times num_slices={num_slices} slices: at least "
            f"{num_shards * num_slices} {what} are expected. Lower `num_shards` or `num_slices`."
        )


def _check_filled(places, num_shards, num_slices, method):
    filled = set(places)
    cells = ((shard, slice_) for shard in range(num_shards) for slice_ in range(num_slices))
    empty = [f"shard {shard} slice {slice_}" for shard, slice_ in cells if (shard, slice_) not in filled]
    if empty:
        ways = {"column": "mend the columns", "hashed": 'use partition="balanced" or another seed'}
        raise EmptySliceError(
            f"Slices without an example ({len(empty)} of {num_shards * num_slices}): {_some(empty)}. Expected at "
            f"least one in each: lower `num_shards` or `num_slices`, or {ways[method]}."
        )


def _some(offenders) -> str:
    offenders = list(offenders)
    left_out = len(offenders) - _NAMED
    return ", ".join(offenders[:_NAMED]) + (f" and {left_out} more" if left_out > 0 else "")
