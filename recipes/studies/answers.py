"""What shards answer together, at whatever depths they serve: from the answers of single stages, computed once."""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any

import numpy as np
import torch
from common.scores import score
from studies.workbench import RECIPES, Workbench

from hf_s3t.baselines import Method
from hf_s3t.plan import StageKey


# Of stages of the same depth, and shards, so many are drawn for each combination of depths and system.
_DRAWS = 4
# Of the rows to train on, the share that chooses rates.
_HELD_OUT = 0.2


@dataclass(frozen=True)
class Trained:
    """
    A method, and how it is trained.

    Args:
        method (`str`): A key of `METHODS`.
        replay (`float`, defaults to 1.0): Share of the earlier slices' rows in an epoch.
        num_shards (`int`, *optional*): Its number of shards; the recipe's if not given.
    """

    method: str
    replay: float = 1.0
    num_shards: int | None = None

    @property
    def name(self) -> str:
        """What figures and files call it."""
        if self.method == "full":
            return "full" if self.num_shards == 1 else "full-per-shard"
        return f"{self.method}-{self.replay:g}"

    def changes(self, chooses: bool = False) -> dict[str, Any]:
        """The fields of `S3TConfig` that differ; a rate is chosen with one sequence a shard."""
        if self.method == "full":
            return {} if self.num_shards is None else {"num_shards": self.num_shards}
        plan = {"budget": 1} if chooses else {"sequence_selection": "lattice", "keep_idle": False}
        return {"replay": self.replay, **(plan if self.method == "s3t" else {})}


class Benches:
    """
    Workbenches of one recipe, one for each learning rate and seed.

    Args:
        options (`Namespace`): The study's own options.
        others (sequence of `str`): The recipe's.
    """

    def __init__(self, options: argparse.Namespace, others: Sequence[str]):
        self._options, self._others = options, others
        self.at = cache(self._at)

    def _at(self, rate: float, seed: int, held_out: bool = False) -> Workbench:
        own = ["--learning_rate", f"{rate:g}", "--seed", str(seed)]
        own += ["--validation_share", str(_HELD_OUT)] if held_out else []
        label = f"{'held-out-' if held_out else ''}rate{rate:g}-seed{seed}"
        return Workbench(self._options.recipe, [*self._others, *own], self._options.work_dir / label)

    def given(self) -> Workbench:
        """The one of the recipe's own rate and seed: for what all have in common."""
        options = RECIPES[self._options.recipe].read([*self._others, "--output_dir", str(self._options.work_dir)])
        return self.at(options.training.learning_rate, options.s3t.seed)


def chosen_rate(benches: Benches, trained: Trained, rates: Sequence[float], seed: int) -> dict[str, Any]:
    """
    The learning rate of a method: the best mean over the depths, on rows held out from those to train on.

    Returns:
        `dict[str, Any]`: `rate`, and `held_out`, by rate what was measured.
    """
    found = {}
    for rate in rates:
        bench = benches.at(rate, seed, held_out=True)
        found[f"{rate:g}"] = bench.kept(f"by-depth-{trained.name}", lambda b=bench: _by_depth(b, trained))
    return {"rate": max(rates, key=lambda rate: fmean(found[f"{rate:g}"])), "held_out": found}


def _by_depth(bench: Workbench, trained: Trained) -> list[float]:
    method = bench.trained(trained.method, **trained.changes(chooses=True))
    return [bench.quality(method, depth) for depth in range(1, method.max_depth + 1)]


def quality_together(benches: Benches, trained: Trained, rate: float, seeds: Sequence[int]) -> dict[str, float]:
    """
    The quality of a system's shards at every combination of depths, in the mean over seeds.

    Returns:
        `dict[str, float]`: By the depths, deepest first, such as `"4-4-2"`.
    """
    tables = []
    for seed in seeds:
        bench = benches.at(rate, seed)
        tables.append(bench.kept(f"together-{trained.name}", lambda b=bench: _table(b, trained), draws=_DRAWS))
    return {depths: round(fmean(table[depths] for table in tables), 6) for depths in tables[0]}


def _table(bench: Workbench, trained: Trained) -> dict[str, float]:
    method = bench.trained(trained.method, **trained.changes())
    answers = answers_of_stages(bench, method)
    shards, size = range(method.trainer.folder.config.num_shards), method.max_depth
    at_depth = [
        [[answers[key] for key in sorted(answers) if (key.shard, key.depth) == (shard, depth)] for shard in shards]
        for depth in range(size + 1)
    ]
    rng = np.random.default_rng(0)
    combinations = itertools.combinations_with_replacement(range(size, -1, -1), len(shards))
    return {named(depths): _mean_quality(bench, depths, at_depth, rng) for depths in combinations}


def named(depths: Sequence[int]) -> str:
    """What a combination of depths is called, whose order does not matter."""
    return "-".join(map(str, sorted(depths, reverse=True)))


def _mean_quality(bench: Workbench, depths: Sequence[int], at_depth: list, rng: np.random.Generator) -> float:
    """The quality of some depths together: the mean over which shard has which, and over its stages of the depth."""
    if not any(depths):
        return bench.quality_of_guessing
    rows, found = bench.loaded.evaluation, []
    for _ in range(_DRAWS):
        drawn = []
        for shard, depth in zip(rng.permutation(len(depths)), depths, strict=True):
            if depth:
                stages = at_depth[depth][shard]
                drawn.append(stages[rng.integers(len(stages))])
        scores = score(np.mean(drawn, axis=0), rows.references, rows.questions, bench.loaded.task)
        found.append(next(iter(scores.values())))
    return fmean(found)


def answers_of_stages(bench: Workbench, method: Method) -> Mapping[StageKey, np.ndarray]:
    """Stage -> what it answers by itself, on the rows to evaluate on: logits, as `mean_logits` aggregates them."""
    folder, stack, base = method.trainer.folder, method.model.stack, method.model.base_model
    batches = list(method.trainer.get_test_dataloader(bench.loaded.evaluation.dataset))
    answers = {}
    for key in sorted(folder.valid_stages):
        for stage in key.lineage:
            if stage not in stack:
                stack.load(stage, folder.read_adapter(stage), folder.adapter_digest(stage))
        stack.train_only(key)
        base.eval()
        with torch.no_grad():
            logits = [base(**{n: t for n, t in batch.items() if n != "labels"}).logits for batch in batches]
        answers[key] = torch.cat(logits).float().cpu().numpy()
    return answers
