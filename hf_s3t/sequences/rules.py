"""Which sequences (orders of a shard's slices) are trained: the selection rules, and measures of what they chose."""

import functools
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..checks import check_prior, require_choice, require_horizon, require_int
from ..config import OPTIMAL_MOST_SLICES, SEQUENCE_SELECTIONS
from ..errors import ConfigError
from .optimal import best_sequences


# Matchings whose totals agree to this share of the largest weight count as tied. Float sums differ between platforms
# in the last bits, and the sequences name the folders of trained stages: they must not.
_TIE = 1e-12


def select_sequences(
    num_slices: int,
    budget: int,
    method: str = "cyclic",
    prior: list[float] | None = None,
    horizon: int = 100,
    seed: int = 42,
) -> list[tuple[int, ...]]:
    """
    Choose the sequences that one shard trains (Section 3.3 of the S3T paper).

    The answer depends on the arguments alone: no global random state, no order of calls, no library version.

    Args:
        num_slices (`int`):
            Number of slices `L` of the shard.
        budget (`int`):
            Number of distinct sequences `B`, up to `L!` (up to `L` for `"bms"` and `"sorted-cyclic"`).
        method (`str`, defaults to `"cyclic"`):
            - `"cyclic"`: rotations whose first slices are spaced `L / B` apart. Beyond `L` sequences, prefixes
              are kept and the rest is rotated: the numbers of sequences under sibling prefixes differ by at most one.
            - `"cyclic-paper"`: the first `B` right rotations (Algorithm 1), extended in the same way beyond `L`.
            - `"bms"`: iterative bipartite matching on the scores (Algorithm 2).
            - `"conditional"`: the sequences of BMS, then random ones in which a slice comes the later the likelier
              its deletion is: each is drawn from its last slice to its first, with the probabilities of `prior`.
            - `"sorted-cyclic"`: rotations of the slices sorted by probability, those with safe first slices first.
            - `"random"`: distinct permutations, all equally likely.
            - `"optimal"`: the best set found by a search for the greatest exact depth that the shard serves, on
              average over the first `horizon` requests that hit it; at least as good as `"cyclic"`, `"bms"` and
              `"sorted-cyclic"`. Up to 8 slices; a second of work.
        prior (`list[float]`, *optional*):
            Probability that a deletion request hits each slice. Needed by `"bms"`, `"conditional"`, `"sorted-cyclic"`;
            `"optimal"` takes it to be uniform if not given.
        horizon (`int`, defaults to 100):
            Number of deletions `t` in the [`score`] that BMS maximises, and over which `"optimal"` averages.
        seed (`int`, defaults to 42):
            Seed of `"conditional"` and `"random"`.

    Returns:
        `list[tuple[int, ...]]`: `budget` distinct permutations of the slices `0..num_slices - 1`.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If an argument is out of range, or the method needs a prior and has none.

    Example:

    ```python
    >>> from hf_s3t.sequences import select_sequences

    >>> select_sequences(4, 2)
    [(0, 1, 2, 3), (2, 3, 0, 1)]
    >>> select_sequences(4, 4, method="bms", prior=[0.4, 0.3, 0.2, 0.1])
    [(3, 2, 1, 0), (2, 3, 0, 1), (1, 0, 3, 2), (0, 1, 2, 3)]
    ```
    """
    _check_request(num_slices, budget, method, prior, horizon, seed)
    if method == "cyclic":
        return _rotations((), tuple(range(num_slices)), budget, _spaced)
    if method == "cyclic-paper":
        return _rotations((), tuple(range(num_slices)), budget, _rightward)
    if method == "random":
        return _random(num_slices, budget, seed)
    # Only `"optimal"` may come here without one.
    likelihoods = tuple([1 / num_slices] * num_slices if prior is None else prior)
    if method == "bms":
        return _matched(likelihoods, horizon)[:budget]
    if method == "conditional":
        return _conditional(likelihoods, horizon, budget, seed)
    if method == "sorted-cyclic":
        order = tuple(sorted(range(num_slices), key=lambda s: likelihoods[s]))
        return [order[k:] + order[:k] for k in range(budget)]
    return list(_optimal(likelihoods, budget, horizon))


def score(sequence: list[int] | tuple[int, ...], prior: list[float], horizon: int) -> float:
    """
    Expected number of working slices of a sequence after `horizon` deletions, as the paper scores it (Section 3.3).

    `score(S, t) = sum over i = 1..n of i * (1 - p(S[0]) - ... - p(S[i - 1])) ** t`

    Args:
        sequence (`list[int]` or `tuple[int, ...]`):
            Distinct slices, in training order: a permutation or the beginning of one.
        prior (`list[float]`):
            Probability that a deletion request hits each slice.
        horizon (`int`):
            Number of deletions `t`.

    Returns:
        `float`: The score; the higher the better.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If the sequence, the prior or the horizon is invalid.

    Example:

    ```python
    >>> from hf_s3t.sequences import score

    >>> score([0, 1], [0.5, 0.25, 0.25], horizon=1)
    1.0
    ```
    """
    check_prior(prior, len(prior))
    require_horizon("horizon", horizon)
    if len(set(sequence)) != len(sequence) or not set(sequence) <= set(range(len(prior))):
        raise ConfigError(
            f"`sequence` is {list(sequence)!r}; expected distinct slices out of 0..{len(prior) - 1}, one for each "
            "entry of `prior`."
        )
    return _score(sequence, prior, horizon)


def mean_edit_distance(sequences: list[tuple[int, ...]]) -> float:
    """
    Mean number of positions in which two sequences differ, over all pairs of distinct sequences (Figure 8).

    Args:
        sequences (`list[tuple[int, ...]]`):
            Permutations of the same slices. A repeated one counts once.

    Returns:
        `float`: The mean distance, at most the number of slices; 0.0 for a single sequence, which has no pair.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If the list is empty or holds anything but permutations of the same slices.

    Example:

    ```python
    >>> from hf_s3t.sequences import mean_edit_distance

    >>> mean_edit_distance([(0, 1, 2), (1, 2, 0), (1, 0, 2)])
    2.3333333333333335
    ```
    """
    distinct = set(check_sequences(sequences))
    pairs = math.comb(len(distinct), 2)
    if pairs == 0:
        return 0.0
    columns = [Counter(column) for column in zip(*distinct)]
    agreements = sum(math.comb(count, 2) for column in columns for count in column.values())
    return (pairs * len(columns) - agreements) / pairs


def check_sequences(sequences: Iterable[Iterable[int]], num_slices: int | None = None) -> list[tuple[int, ...]]:
    """
    Check that every sequence is a permutation of the slices.

    Args:
        sequences (`list[tuple[int, ...]]`):
            The sequences of one shard, in any nested form that iterates (lists, tuples, an array).
        num_slices (`int`, *optional*):
            Number of slices; the length of the first sequence if not given.

    Returns:
        `list[tuple[int, ...]]`: The same sequences as tuples of plain integers.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If there is none, or one of them is no such permutation.

    Example:

    ```python
    >>> from hf_s3t.sequences import check_sequences

    >>> check_sequences([[1, 0], [0, 1]])
    [(1, 0), (0, 1)]
    ```
    """
    rows = _rows(sequences)
    wanted = set(range(len(rows[0]) if num_slices is None else num_slices))
    for row in rows:
        if not _are_integers(row) or len(row) != len(wanted) or set(row) != wanted:
            raise ConfigError(
                f"`sequences` holds {row!r}, which is not a permutation of the slices 0..{len(wanted) - 1}. Name "
                "every slice once, counted from 0."
            )
    return [tuple(map(int, row)) for row in rows]


def check_prefixes(sequences: Iterable[Iterable[int]], num_slices: int | None = None) -> list[tuple[int, ...]]:
    """
    Check that every sequence names slices of a shard once, not necessarily all of them.

    Args:
        sequences (`list[tuple[int, ...]]`):
            The sequences of one shard, or the stages of a family, in any nested form that iterates.
        num_slices (`int`, *optional*):
            Number of slices; the length of the longest sequence if not given.

    Returns:
        `list[tuple[int, ...]]`: The same sequences as tuples of plain integers.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If there is none, or one of them is empty, repeats a slice or names no slice.

    Example:

    ```python
    >>> from hf_s3t.sequences.rules import check_prefixes

    >>> check_prefixes([[0, 1], [1]])
    [(0, 1), (1,)]
    ```
    """
    rows = _rows(sequences)
    size = max(map(len, rows)) if num_slices is None else num_slices
    for row in rows:
        if not row or not _are_integers(row) or len(set(row)) < len(row) or not set(row) <= set(range(size)):
            raise ConfigError(
                f"`sequences` holds {row!r}, expected slices from 0 to {size - 1}, each once. Where no sequence has "
                "all slices, give `num_slices`."
            )
    return [tuple(map(int, row)) for row in rows]


def _rows(sequences: Iterable[Iterable[int]]) -> list[tuple[int, ...]]:
    try:
        rows = [tuple(sequence) for sequence in sequences]
    except TypeError as error:
        raise ConfigError(f"`sequences` must be a list of permutations of the slices, got {sequences!r}.") from error
    if not rows or not rows[0]:
        raise ConfigError("`sequences` is empty. Give at least one permutation of at least one slice.")
    return rows


def _are_integers(row: Iterable[int]) -> bool:
    return all(isinstance(s, (int, np.integer)) and not isinstance(s, bool) for s in row)


def _check_request(
    num_slices: int, budget: int, method: str, prior: Sequence[float] | None, horizon: int, seed: int
) -> None:
    require_int("num_slices", num_slices, 1)
    require_int("budget", budget, 1)
    require_horizon("horizon", horizon)
    require_int("seed", seed, None)
    require_choice("method", method, SEQUENCE_SELECTIONS)
    if prior is not None:
        check_prior(prior, num_slices)
    elif method in ("bms", "conditional", "sorted-cyclic"):
        raise ConfigError(
            f'method="{method}" got no `prior`; it needs the probability of each slice to be hit. Give it, or use '
            '"cyclic", which assumes nothing.'
        )
    if method == "optimal" and num_slices > OPTIMAL_MOST_SLICES:
        raise ConfigError(
            f'num_slices={num_slices}, but method="optimal" searches over at most {OPTIMAL_MOST_SLICES} slices. '
            'Use "cyclic", or "bms" with a prior.'
        )
    if method in ("bms", "sorted-cyclic") and budget > num_slices:
        raise ConfigError(
            f'budget={budget}, but method="{method}" selects at most num_slices={num_slices} sequences. Lower the '
            'budget or use "conditional".'
        )
    # 20! exceeds any budget that fits in memory, so larger factorials need not be computed.
    if budget > math.factorial(min(num_slices, 20)):
        raise ConfigError(
            f"budget={budget}, but num_slices={num_slices} slices have only {math.factorial(num_slices)} "
            "permutations. Lower the budget."
        )


# -- cyclic rotation --------------------------------------------------------------------------------------------------


def _spaced(size: int, count: int) -> list[int]:
    return [k * size // count for k in range(count)]


def _rightward(size: int, count: int) -> list[int]:
    return [-k % size for k in range(count)]


def _rotations(
    prefix: tuple[int, ...], rest: tuple[int, ...], count: int, starts: Callable[[int, int], list[int]]
) -> list[tuple[int, ...]]:
    """`count` sequences that begin with `prefix`: `rest` rotated to `starts`, recursively where that is not enough."""
    if count == 1:
        return [prefix + rest]
    size = len(rest)
    share, extra = divmod(count, size)
    favoured = set(starts(size, extra))
    branches = []
    for at in starts(size, size) if share else starts(size, extra):
        below = share + (at in favoured)
        branches.append(_rotations((*prefix, rest[at]), rest[at + 1 :] + rest[:at], below, starts))
    # One sequence of each branch in turn: the lowest numbers have different first slices, so a run that is stopped
    # early has already bought most of the deletion rate.
    rounds = itertools.zip_longest(*branches)
    return [sequence for turn in rounds for sequence in turn if sequence is not None]


# -- bipartite matching -----------------------------------------------------------------------------------------------


def _score(sequence: Sequence[int], prior: Sequence[float], horizon: int) -> float:
    return math.fsum(i * _unhit(sequence[:i], prior) ** horizon for i in range(1, len(sequence) + 1))


def _unhit(prefix: Iterable[int], prior: Sequence[float]) -> float:
    # fsum rounds once, so prefixes of the same slices in another order get the same number.
    return max(0.0, 1 - math.fsum(prior[s] for s in prefix))


def _horizons(horizon: int) -> list[int]:
    """The horizon and its halves: what ties or vanishes at `t` deletions is decided by what is better after fewer."""
    steps = [horizon]
    while steps[-1] > 1:
        steps.append(steps[-1] // 2)
    return steps


def _matched(prior: Sequence[float], horizon: int) -> list[tuple[int, ...]]:
    """All L sequences of Algorithm 2, the highest score first."""
    size = len(prior)
    sequences: list[tuple[int, ...]] = [(s,) for s in range(size)]
    for _ in range(size - 1):
        unhit = np.array([[0.0 if s in q else _unhit((*q, s), prior) for s in range(size)] for q in sequences])
        edges = np.array([[s not in q for s in range(size)] for q in sequences])
        for step in _horizons(horizon):
            # The scores of the sequences so far are the same in every matching, and so is the factor i: what is added
            # decides. Leaving them out keeps small differences from drowning in a large sum.
            edges, columns = _optimal_edges(unhit**step, edges)
            if edges.sum() == size:
                break
        sequences = [(*q, s) for q, s in zip(sequences, _lowest_matching(edges, columns))]

    def rank(sequence: tuple[int, ...]) -> tuple[list[float], tuple[int, ...]]:
        return [-float(f"{_score(sequence, prior, step):.11e}") for step in _horizons(horizon)], sequence

    return sorted(sequences, key=rank)


def _optimal_edges(weights: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges whose perfect matchings are the maximum-weight ones, and one of these as the column of each row."""
    from scipy.optimize import linear_sum_assignment  # a tenth of a second that only matching needs to pay

    rows, columns = linear_sum_assignment(np.where(edges, weights, -np.inf), maximize=True)
    # loss[i, k]: what row i loses by taking the column of row k. Shortest distances under it are dual potentials, and
    # by complementary slackness the perfect matchings of the edges without slack are exactly the maximum ones.
    loss = np.where(edges, weights[rows, columns][:, None] - weights, np.inf)[:, columns]
    potential = np.zeros(len(rows))
    for _ in rows:
        potential = np.minimum(potential, (potential[:, None] + loss).min(axis=0))
    tight = potential[:, None] + loss - potential <= _TIE * weights[edges].max()
    optimal = np.zeros_like(edges)
    optimal[:, columns] = tight
    return optimal, columns


def _lowest_matching(edges: np.ndarray, columns: Iterable[int]) -> list[int]:
    """The lexicographically first perfect matching within `edges`, starting from any (`columns`)."""
    column = [int(c) for c in columns]
    owner = {c: row for row, c in enumerate(column)}
    for row in range(len(column)):
        freed = column[row]
        # Rows behind this one that could pass their column on, step by step, until someone takes the freed one.
        takes: dict[int, int] = {}
        queue = [freed]
        for target in queue:
            for other in (np.flatnonzero(edges[row + 1 :, target]) + row + 1).tolist():
                if other not in takes:
                    takes[other] = target
                    queue.append(column[other])
        column[row] = min(c for c in np.flatnonzero(edges[row]).tolist() if c == freed or owner[c] in takes)
        given, mover = column[row], row
        while given != freed:
            mover, owner[given] = owner[given], mover
            given = column[mover] = takes[mover]
        owner[freed] = mover
    return column


# -- search over sets of sequences ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)  # the shards of a system ask the same question
def _optimal(prior: tuple[float, ...], budget: int, horizon: int) -> tuple[tuple[int, ...], ...]:
    size = len(prior)
    starts = [select_sequences(size, budget)]
    if budget <= size:
        starts += [select_sequences(size, budget, method, list(prior), horizon) for method in ("bms", "sorted-cyclic")]
    found = best_sequences(list(prior), budget, horizon, starts)
    if len(found) < budget:
        # The depth is the greatest there can be; the rest only makes up the number.
        others = select_sequences(size, min(budget + len(found), math.factorial(size)))
        found += [sequence for sequence in others if sequence not in set(found)][: budget - len(found)]
    return tuple(found)


# -- random draws -----------------------------------------------------------------------------------------------------
# Python promises the same stream from `random.Random(seed).random()` in every version, and no such thing of the other
# draws.


def _random(num_slices: int, budget: int, seed: int) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    if num_slices < 20 and 2 * budget > math.factorial(num_slices):
        # Past one half, drawing again after each repeat gets slow, and listing all is no longer than the answer.
        return sorted(itertools.permutations(range(num_slices)), key=lambda _: rng.random())[:budget]
    found: dict[tuple[int, ...], None] = {}
    while len(found) < budget:
        found.setdefault(tuple(sorted(range(num_slices), key=lambda _: rng.random())))
    return list(found)


def _conditional(prior: Sequence[float], horizon: int, budget: int, seed: int) -> list[tuple[int, ...]]:
    sequences = _matched(prior, horizon)[:budget]
    undrawn = _Undrawn(prior)
    for sequence in sequences:
        undrawn.remove(sequence)
    rng = random.Random(seed)
    while len(sequences) < budget:
        sequences.append(undrawn.draw(rng))
        undrawn.remove(sequences[-1])
    return sequences


@dataclass
class _Ending:
    """A node of the tree of endings: the sequences that share their last slices."""

    mass: float = 1.0  # share of the node's probability that is still undrawn
    drawn: int = 0
    # The slice before -> the longer ending; absent while nothing is drawn.
    longer: "dict[int, _Ending]" = field(default_factory=dict)


class _Undrawn:
    """
    The permutations that were not drawn yet. One draw here is what drawing until something new comes up would give,
    but it takes one pass however few are left: that other loop would not end near `L!`, or with a zero in the prior.
    """

    def __init__(self, prior: Iterable[float]):
        self.prior = list(prior)
        self.root = _Ending()

    def _weights(self, rest: Sequence[int]) -> list[float]:
        weights = [self.prior[s] for s in rest]
        return weights if sum(weights) > 0 else [1.0] * len(rest)

    def remove(self, sequence: Sequence[int]) -> None:
        path = [self.root]
        for s in reversed(sequence):
            path.append(path[-1].longer.setdefault(s, _Ending()))
        path[-1].mass = 0.0
        path[-1].drawn += 1
        rest: list[int] = []
        for node, s in zip(reversed(path[:-1]), sequence):
            rest.append(s)
            weights = self._weights(rest)
            left = (w * node.longer[r].mass if r in node.longer else w for w, r in zip(weights, rest))
            # A sum of what is left, never a difference: it is exactly zero when nothing is, and never negative.
            node.mass = sum(left) / sum(weights)
            node.drawn += 1

    def draw(self, rng: random.Random) -> tuple[int, ...]:
        node, rest = self.root, list(range(len(self.prior)))
        ending: list[int] = []
        while rest:
            nodes = [node.longer.get(s, _Ending()) for s in rest]
            weights = [w * child.mass for w, child in zip(self._weights(rest), nodes)]
            if sum(weights) == 0:
                # Only sequences of probability zero (a slice that is never hit, at the end) are left: any will do.
                full = math.factorial(len(rest) - 1)
                weights = [float(child.drawn < full) for child in nodes]
            at = _pick(weights, rng)
            node = nodes[at]
            ending.append(rest.pop(at))
        return tuple(reversed(ending))


def _pick(weights: Sequence[float], rng: random.Random) -> int:
    threshold = rng.random() * sum(weights)
    for at, total in enumerate(itertools.accumulate(weights)):
        if total > threshold:
            return at
    return max(at for at, weight in enumerate(weights) if weight > 0)  # the product above rounded up to the sum
