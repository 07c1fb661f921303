"""Terms of rows: what is taken away leaves what was never there, and scores are those of BM25."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_s3t.records.buffers import hexadecimal
from hf_s3t.records.digests import DigestKey
from hf_s3t.records.terms import TermCounts, TermRows, terms_of, words_of


KEY = DigestKey(b"k" * 32)
SHARDS, SLICES = 3, 2
# Each row's shard, slice and terms.
ROWS = st.lists(
    st.tuples(
        st.integers(0, SHARDS - 1), st.integers(0, SLICES - 1), st.sets(st.integers(0, 9), max_size=6).map(sorted)
    ),
    max_size=12,
)
SEEN = st.lists(st.sets(st.integers(0, SLICES - 1)), min_size=SHARDS, max_size=SHARDS)


def rows_of(rows: list[tuple[int, int, list[int]]], ids: list[int]) -> TermRows:
    shards, slices, terms = zip(*rows, strict=True) if rows else ((), (), ())
    arrays = [np.array(one, np.uint32) for one in terms]
    return TermRows.of(KEY.of_ids(ids), np.array(shards, np.int32), np.array(slices, np.int32), arrays)


def arrays_of(one: TermRows | TermCounts) -> dict[str, tuple[str, list[int]]]:
    arrays = {name: value for name, value in vars(one.settled()).items() if isinstance(value, np.ndarray)}
    return {name: (array.dtype.str, array.tolist()) for name, array in arrays.items() if not name.startswith("_")}


def bm25(rows: list[tuple[int, int, list[int]]], query: set[int], seen: list[set[int]]) -> list[float]:
    """The scores, from the definition: shards that live are documents, and rows with a term its occurrences."""
    documents = {
        shard: [t for s, slice_, terms in rows if s == shard and slice_ in seen[shard] for t in terms]
        for shard in range(SHARDS)
        if seen[shard]
    }
    mean = sum(map(len, documents.values())) / max(1, len(documents))
    scores = [0.0] * SHARDS
    for term in sorted(query):
        known_to = sum(term in document for document in documents.values())
        for shard, document in documents.items():
            if frequency := document.count(term):
                idf = math.log(1 + (len(documents) - known_to + 0.5) / (known_to + 0.5))
                damping = 1.2 * (1 - 0.75 + 0.75 * len(document) / mean)
                scores[shard] += idf * frequency * (1.2 + 1) / (frequency + damping)
    return scores


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, seen=SEEN, query=st.sets(st.integers(0, 11)), data=st.data())
def test_without_some_rows_everything_is_as_if_they_had_never_been(rows, seen, query, data):
    gone = data.draw(st.sets(st.sampled_from(range(len(rows))))) if rows else set()
    left = [number for number in data.draw(st.permutations(range(len(rows)))) if number not in gone]
    every = rows_of(rows, list(range(len(rows))))
    never = rows_of([rows[number] for number in left], left)
    counts_never = TermCounts.of(never, SHARDS, SLICES)

    without, counts = every, TermCounts.of(every, SHARDS, SLICES)
    for some in (sorted(gone)[::2], sorted(gone)[1::2]):
        digests = hexadecimal(KEY.of_ids(some))
        counts, without = counts.without(without.only(digests)), without.without(digests)

    assert arrays_of(without) == arrays_of(never)
    assert arrays_of(counts) == arrays_of(counts_never)
    prompt = np.array(sorted(query), np.uint32)
    scores = counts.scores(prompt, seen)
    assert (
        scores.tobytes()
        == counts_never.scores(prompt, seen).tobytes()
        == counts.settled().scores(prompt, seen).tobytes()
    )
    assert scores == pytest.approx(bm25([rows[number] for number in left], query, seen), abs=1e-12)


def test_of_a_row_that_was_taken_away_before_nothing_is_taken_again():
    rows = rows_of([(0, 0, [1, 2]), (1, 1, [2, 3])], [7, 8])
    left = rows.without(hexadecimal(KEY.of_ids([7, 9])))
    assert len(left) == 1 and not left.is_settled and left.settled().is_settled
    assert len(left.only(hexadecimal(KEY.of_ids([7])))) == 0
    assert left.without(["no digest", "00" * 32]) is left


def test_terms_are_keyed_words_without_their_case():
    assert words_of("Straße, STRASSE und straße-Ecke\n42") == {"strasse", "und", "ecke", "42"}
    terms = terms_of("Who is Ada? who?", KEY)
    assert terms.dtype == np.uint32 and (np.diff(terms) > 0).all()
    assert (
        terms.tolist()
        == terms_of("ada IS who", KEY).tolist()
        == np.unique(KEY.of_terms(["who", "is", "ada"])).tolist()
    )
    assert not np.isin(terms, terms_of("who is ada", DigestKey(b"j" * 32))).any()
    assert terms_of(" ?! ", KEY).shape == (0,)
