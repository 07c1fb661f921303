"""Where examples go, found row by row and unit by unit: what is computed of columns agrees with it, bit by bit."""

import hashlib
import heapq
import hmac
from collections import Counter


def order_by_row(ids, seed):
    """The ids of a slice in their order."""
    return sorted(ids, key=lambda i: (_digest(i, _hasher(seed, b"hf_s3t order")), str(i)))


def places_by_row(ids, *, num_shards, num_slices, method="balanced", seed=42, groups=None, key=None):
    """What `assign` answers, of lists of integers or texts."""
    units, cells = ids if groups is None else groups, num_shards * num_slices
    if method == "balanced":
        cell_of = _balanced(ids, units, cells, seed, key)
    else:
        cell_of = {unit: int.from_bytes(place_hash(unit, seed), "big") % cells for unit in set(units)}
    return [(cell_of[unit] % num_shards, cell_of[unit] // num_shards) for unit in units]


def units_by_row(ids, groups, contents):
    """What `units_of` answers: rows take over the first name that they share something with, until nothing changes."""
    names = list(ids if groups is None else groups)
    units = list(names)
    while True:
        first = {}
        for kind in (names, contents):
            for shared, unit in zip(kind, units, strict=True):
                at = kind is names, shared
                first[at] = min(first.get(at, unit), unit, key=str)
        news = [
            min(first[True, name], first[False, content], key=str)
            for name, content in zip(names, contents, strict=True)
        ]
        if news == units:
            return units
        units = news


def place_hash(unit, seed):
    """The hash by which anybody can tell a place, in a hashed partition."""
    return _digest(unit, _hasher(seed, b"hf_s3t place"))


def _hasher(seed, purpose):
    return _hasher_of(hashlib.blake2b(str(seed).encode()).digest(), purpose)


def _hasher_of(key, purpose):
    return hashlib.blake2b(key=key, person=purpose, digest_size=16)


def _digest(value, hasher):
    hasher = hasher.copy()
    hasher.update((b"s" if isinstance(value, str) else b"i") + str(value).encode("utf-8", "surrogatepass"))
    return hasher.digest()


def _balanced(ids, units, cells, seed, key):
    sizes = Counter(units)
    if key is None:
        order = sorted(sizes, key=lambda unit: (-sizes[unit], place_hash(unit, seed)))
    else:
        order = _by_first_row(ids, units, seed, key)
    emptiest = [(0, cell) for cell in range(cells)]
    cell_of = {}
    for unit in order:
        load, cell = emptiest[0]
        cell_of[unit] = cell
        heapq.heapreplace(emptiest, (load + sizes[unit], cell))
    return cell_of


def _by_first_row(ids, units, seed, key):
    hasher = _hasher_of(hmac.digest(key, str(seed).encode(), "sha512"), b"hf_s3t place")
    rows = sorted(zip((_digest(i, hasher) for i in ids), units, strict=True), key=lambda row: row[0])
    return list(dict.fromkeys(unit for _, unit in rows))
