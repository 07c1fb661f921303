"""Which terms the prompts of rows hold, and how many rows of each shard hold them: what a gate knows of a system."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np

from .buffers import DIGEST_BYTES, from_hexadecimal
from .digests import DigestKey


# Of BM25: how soon more rows with a term say no more, and how much the length of a shard counts.
_K1 = 1.2
_B = 0.75
_WORD = re.compile(r"\w+")


def words_of(text: str) -> set[str]:
    """
    The distinct words of a text, case aside.

    Example:

    ```python
    >>> from hf_s3t.records.terms import words_of

    >>> sorted(words_of("Who is Ada? Ada, who else."))
    ['ada', 'else', 'is', 'who']
    ```
    """
    return set(_WORD.findall(text.casefold()))


def terms_of(text: str, key: DigestKey) -> np.ndarray:
    """
    The distinct terms of a text, ascending: what stands for its words; see `DigestKey.of_terms`.

    Args:
        text (`str`): The text.
        key ([`~hf_s3t.records.digests.DigestKey`]): The system's secret.
    """
    return np.unique(key.of_terms(words_of(text)))


def vocabulary_digest(vocabulary: Mapping[str, int]) -> str:
    """
    SHA-256 of a tokenizer's vocabulary: with another one, the tokens of a prompt are other words.

    Args:
        vocabulary (mapping from `str` to `int`): What the tokenizer's `get_vocab()` returns.
    """
    return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()


class TermRows:
    """
    The terms of each row that is in, immutable: removing rows gives others, which share the arrays of these.

    Rows are in the order of the digests of their ids, so that nothing tells in which order they came, or what was
    between them.

    Args:
        digests (`numpy.ndarray`): The keyed digest of each row's id, 32 bytes in each row, ascending.
        shards (`numpy.ndarray`): The shard of each row.
        slices (`numpy.ndarray`): The slice of each row.
        ends (`numpy.ndarray` of int64): Where the terms of each row end.
        terms (`numpy.ndarray` of uint32): The distinct terms of each row, ascending in each, row after row.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_s3t.records.digests import DigestKey
    >>> from hf_s3t.records.terms import TermCounts, TermRows, terms_of

    >>> key, texts = DigestKey(b"sixteen bytes or more"), ["Who is Ada?", "Where is Bob?"]
    >>> ids = key.of_ids([7, 8])
    >>> rows = TermRows.of(ids, np.array([0, 1]), np.array([0, 0]), [terms_of(text, key) for text in texts])
    >>> counts = TermCounts.of(rows, num_shards=2, num_slices=1)
    >>> counts.scores(terms_of("Tell me of Bob.", key), seen=[[0], [0]]).round(3).tolist()
    [0.0, 0.693]
    >>> counts.without(rows.only(ids[1:])).scores(terms_of("Tell me of Bob.", key), seen=[[0], []]).tolist()
    [0.0, 0.0]
    ```
    """

    def __init__(
        self, digests: np.ndarray, shards: np.ndarray, slices: np.ndarray, ends: np.ndarray, terms: np.ndarray
    ):
        self.digests = digests
        self.shards = shards
        self.slices = slices
        self.ends = ends
        self.terms = terms
        # The numbers of those that were removed, ascending.
        self._gone = np.zeros(0, np.int64)

    @classmethod
    def of(
        cls, digests: np.ndarray, shards: np.ndarray, slices: np.ndarray, terms: Sequence[np.ndarray]
    ) -> "TermRows":
        """
        The terms of rows that come in any order.

        Args:
            digests (`numpy.ndarray`): The keyed digest of each row's id, 32 bytes in each row; no two are alike.
            shards (`numpy.ndarray`): The shard of each row.
            slices (`numpy.ndarray`): The slice of each row.
            terms (sequence of `numpy.ndarray`): The distinct terms of each row, ascending.
        """
        order = np.argsort(_comparable(digests), kind="stable")
        ends = np.cumsum([len(terms[row]) for row in order.tolist()], dtype=np.int64)
        joined = np.concatenate([np.zeros(0, np.uint32), *(terms[row] for row in order.tolist())])
        places = (np.asarray(shards, np.int32)[order], np.asarray(slices, np.int32)[order])
        return cls(np.ascontiguousarray(digests[order]), *places, ends, joined.astype(np.uint32))

    def __len__(self) -> int:
        return len(self.digests) - len(self._gone)

    @property
    def is_settled(self) -> bool:
        """Whether the arrays hold no row that was removed."""
        return not len(self._gone)

    def without(self, id_digests: Collection[str] | np.ndarray) -> "TermRows":
        """
        The rows but some, masked; those that are not there are passed over.

        Args:
            id_digests (collection of `str`, or `numpy.ndarray`):
                The keyed digests of their ids, in hexadecimal digits or as 32 bytes in each row.
        """
        gone = self._numbers_of(id_digests)
        if not len(gone):
            return self
        left = TermRows(self.digests, self.shards, self.slices, self.ends, self.terms)
        left._gone = np.union1d(self._gone, gone)
        return left

    def only(self, id_digests: Collection[str] | np.ndarray) -> "TermRows":
        """
        Some of the rows; those that are not there are passed over.

        Args:
            id_digests (collection of `str`, or `numpy.ndarray`): See [`TermRows.without`].
        """
        numbers = self._numbers_of(id_digests)
        begins = np.where(numbers > 0, self.ends[numbers - 1], 0)
        lengths = self.ends[numbers] - begins
        places, terms = (self.shards[numbers], self.slices[numbers]), self.terms[_ranges(begins, lengths)]
        return TermRows(self.digests[numbers], *places, np.cumsum(lengths, dtype=np.int64), terms)

    def joined(self, others: "TermRows") -> "TermRows":
        """
        These rows and others, none of which is among these.

        Args:
            others ([`TermRows`]): The others.
        """
        parts = [rows.settled() for rows in (self, others)]
        digests, shards, slices = (
            np.concatenate([getattr(rows, name) for rows in parts]) for name in ("digests", "shards", "slices")
        )
        terms = [one for rows in parts if len(rows) for one in np.split(rows.terms, rows.ends[:-1])]
        return TermRows.of(digests, shards, slices, terms)

    def settled(self) -> "TermRows":
        """The same rows in arrays that hold nothing of those that were removed."""
        if self.is_settled:
            return self
        left, lengths = np.ones(len(self.digests), bool), self._lengths
        left[self._gone] = False
        terms = self.terms[np.repeat(left, lengths)]
        ends = np.cumsum(lengths[left], dtype=np.int64)
        return TermRows(self.digests[left], self.shards[left], self.slices[left], ends, terms)

    def _numbers_of(self, id_digests: Collection[str] | np.ndarray) -> np.ndarray:
        """The numbers of the rows that are in of some ids, ascending."""
        wanted = _comparable(id_digests if isinstance(id_digests, np.ndarray) else _from_texts(id_digests))
        at = np.searchsorted(self._sought, wanted)
        inside = at < len(self.digests)
        at, wanted = at[inside], wanted[inside]
        at = at[self._sought[at] == wanted]
        return np.setdiff1d(at, self._gone)

    @cached_property
    def _sought(self) -> np.ndarray:
        return _comparable(self.digests)

    @property
    def _lengths(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)

    def pairs(self, num_slices: int) -> tuple[np.ndarray, np.ndarray]:
        """
        Each term of each row that is in, and the number of the row's slice among all slices.

        Args:
            num_slices (`int`): Number of slices per shard.
        """
        rows = self.settled()
        return rows.terms, np.repeat(rows.shards * np.int32(num_slices) + rows.slices, rows._lengths)


class TermCounts:
    """
    In how many rows of each slice a term occurs, immutable. What was counted of rows can be taken away again, to the
    last bit: these are integers, and scores are computed of them in an order that no history decides.

    Args:
        num_shards (`int`): Number of shards.
        num_slices (`int`): Number of slices per shard.
        terms (`numpy.ndarray` of uint32): The distinct terms, ascending.
        ends (`numpy.ndarray` of int64): Where the counts of each term end.
        places (`numpy.ndarray` of int32): Of each count, the number of the slice among all slices.
        counts (`numpy.ndarray` of uint32): The counts, term after term.
        totals (`numpy.ndarray` of int64): The sum of the counts of each slice.
    """

    def __init__(
        self,
        num_shards: int,
        num_slices: int,
        terms: np.ndarray,
        ends: np.ndarray,
        places: np.ndarray,
        counts: np.ndarray,
        totals: np.ndarray,
    ):
        self.num_shards = num_shards
        self.num_slices = num_slices
        self.terms = terms
        self.ends = ends
        self.places = places
        self.counts = counts
        self.totals = totals
        # What was taken away since, and where: a copy of millions of counts would be waited for.
        self._taken_at = np.zeros(0, np.int64)
        self._taken = np.zeros(0, np.uint32)

    @classmethod
    def of(cls, rows: TermRows, num_shards: int, num_slices: int) -> "TermCounts":
        """
        Count the terms of rows.

        Args:
            rows ([`TermRows`]): The rows.
            num_shards (`int`): Number of shards.
            num_slices (`int`): Number of slices per shard.
        """
        num_places = num_shards * num_slices
        terms, places = rows.pairs(num_slices)
        found, counts = np.unique(terms * np.uint64(num_places) + places.astype(np.uint64), return_counts=True)
        terms, places = found // np.uint64(num_places), (found % np.uint64(num_places)).astype(np.int32)
        distinct, sizes = np.unique(terms, return_counts=True)
        totals = np.bincount(places, counts, minlength=num_places).astype(np.int64)
        ends = np.cumsum(sizes, dtype=np.int64)
        return cls(num_shards, num_slices, distinct.astype(np.uint32), ends, places, counts.astype(np.uint32), totals)

    def without(self, rows: TermRows) -> "TermCounts":
        """
        The counts without some rows that were counted.

        Args:
            rows ([`TermRows`]): The rows that go.
        """
        if not len(rows):
            return self
        gone = TermCounts.of(rows, *self._shape)
        at, lengths = self._found(gone.terms)
        # Of these terms, in order: by this a count is found among all those of its term at once.
        where, num_places = _ranges(at, lengths), len(self.totals)
        sought = np.repeat(np.arange(len(at)), lengths) * num_places + self.places[where]
        wanted = np.repeat(np.arange(len(at)), gone._sizes) * num_places + gone.places
        at = np.concatenate([self._taken_at, where[np.searchsorted(sought, wanted)]])
        left = TermCounts(*self._shape, self.terms, self.ends, self.places, self.counts, self.totals - gone.totals)
        left._taken_at, which = np.unique(at, return_inverse=True)
        left._taken = np.zeros(len(left._taken_at), np.uint32)
        np.add.at(left._taken, which, np.concatenate([self._taken, gone.counts]))
        return left

    def of_shards(self, num_shards: int) -> "TermCounts":
        """The counts of a system with more shards, of whose rows nothing was counted."""
        totals = np.pad(self.totals, (0, num_shards * self.num_slices - len(self.totals)))
        wider = TermCounts(num_shards, self.num_slices, self.terms, self.ends, self.places, self.counts, totals)
        wider._taken_at, wider._taken = self._taken_at, self._taken
        return wider

    @property
    def _shape(self) -> tuple[int, int]:
        return self.num_shards, self.num_slices

    @property
    def is_settled(self) -> bool:
        """Whether the arrays hold nothing that was taken away."""
        return not len(self._taken_at)

    def settled(self) -> "TermCounts":
        """The same counts in arrays that hold nothing of terms that no row has any more."""
        if self.is_settled:
            return self
        counts = self._counts_at(np.arange(len(self.counts)))
        is_left = counts > 0
        left = np.cumsum(is_left, dtype=np.int64)[self.ends - 1]
        has_any = np.diff(left, prepend=0) > 0
        arrays = self.terms[has_any], left[has_any], self.places[is_left], counts[is_left]
        return TermCounts(*self._shape, *arrays, self.totals)

    def _counts_at(self, where: np.ndarray) -> np.ndarray:
        """Some of the counts, without what was taken away."""
        found = self.counts[where]
        if not self.is_settled:
            at = np.minimum(np.searchsorted(self._taken_at, where), len(self._taken_at) - 1)
            found -= np.where(self._taken_at[at] == where, self._taken[at], 0).astype(np.uint32)
        return np.asarray(found)

    def scores(self, terms: np.ndarray, seen: Sequence[Iterable[int]]) -> np.ndarray:
        """
        How much each shard knows of a prompt: BM25 with the living shards as documents, in which a term occurs as
        often as rows have it.

        Args:
            terms (`numpy.ndarray` of uint32): The terms of the prompt.
            seen (sequence of iterables of `int`):
                Of each shard, the slices that its serving stack has seen; those of a shard that is dead are empty.

        Returns:
            `numpy.ndarray` of shape `(num_shards,)`: The scores as float64; 0 where no term is known.
        """
        is_seen = np.zeros(self._shape, bool)
        for shard, slices in enumerate(seen):
            is_seen[shard, list(slices)] = True
        is_alive = is_seen.any(axis=1)
        frequencies = (self._of_terms(np.unique(terms)) * is_seen).sum(axis=2)
        known_to = np.count_nonzero(frequencies, axis=1)
        # Of what nobody knows nothing is added, so that it is the same whether somebody ever did.
        frequencies, known_to = frequencies[known_to > 0].astype(np.float64), known_to[known_to > 0]
        if not len(frequencies):
            return np.zeros(self.num_shards)
        lengths = (self.totals.reshape(is_seen.shape) * is_seen).sum(axis=1)
        num_alive = np.count_nonzero(is_alive)
        rarity = np.log1p((num_alive - known_to + 0.5) / (known_to + 0.5))
        damping = _K1 * (1 - _B + _B * lengths * num_alive / lengths.sum())
        parts = rarity[:, None] * frequencies * (_K1 + 1) / (frequencies + damping)
        # One after the other, in the order of terms: a sum by pairs would depend on how many there are.
        return np.asarray(np.cumsum(parts, axis=0)[-1])

    def _of_terms(self, terms: np.ndarray) -> np.ndarray:
        """The counts of those among some terms that are known, of shape `(terms, num_shards, num_slices)`."""
        begins, lengths = self._found(terms)
        where = _ranges(begins, lengths)
        found = np.zeros((len(begins), len(self.totals)), np.int64)
        found[np.repeat(np.arange(len(begins)), lengths), self.places[where]] = self._counts_at(where)
        return found.reshape(-1, *self._shape)

    def _found(self, terms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the counts begin of those among some terms that are known, and how many each has."""
        at = np.searchsorted(self.terms, terms)
        inside = at < len(self.terms)
        at = at[inside][self.terms[at[inside]] == terms[inside]]
        begins = np.where(at > 0, self.ends[at - 1], 0)
        return begins, np.asarray(self.ends[at] - begins)

    @property
    def _sizes(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)


def _from_texts(id_digests: Collection[str]) -> np.ndarray:
    digests, no_digest = from_hexadecimal(list(id_digests))
    return np.asarray(digests[~no_digest])


def _comparable(digests: np.ndarray) -> np.ndarray:
    """Digests, 32 bytes in each row, as numpy sorts and seeks them."""
    return np.ascontiguousarray(digests).view(f"S{DIGEST_BYTES}").reshape(-1)


def _ranges(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers from each beginning on, as many as its length says, range after range."""
    ends = np.cumsum(lengths)
    return np.asarray(np.arange(lengths.sum()) + np.repeat(begins - (ends - lengths), lengths))
