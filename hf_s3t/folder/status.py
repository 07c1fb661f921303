"""Where a system stands, as its folder says: what serves, and how many deletions it outlives. No model is needed."""

from collections.abc import Collection
from typing import Any

from ..analysis import expected_deletions_left
from ..plan.stages import StageKey
from .gate_file import KIND
from .system import SystemFolder


def serving_depths(folder: SystemFolder, valid: Collection[StageKey]) -> list[int]:
    """
    Per shard the depth of the deepest stack that would answer; 0 where the shard is dead.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        valid (collection of [`~hf_s3t.plan.stages.StageKey`]): The stages to route over.

    Returns:
        `list[int]`: One depth per shard.
    """
    served = folder.served(valid)
    return [max((tip.depth for tip in tips), default=0) for tips in served]


def deletions_left(folder: SystemFolder, valid: Collection[StageKey], until: str = "exhausted") -> float:
    """
    Expected number of further requests that a system with these stages outlives (Lemma 1 from its present state).

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        valid (collection of [`~hf_s3t.plan.stages.StageKey`]): The stages that are left.
        until (`str`, defaults to `"exhausted"`): `"exhausted"`, or `"first_shard"` until one shard is dead.

    Returns:
        `float`: The expected number, by the prior of the config, uniform if it has none.
    """
    config = folder.config
    alive = folder.plan.first_slices_alive(valid)
    return expected_deletions_left(
        alive, config.num_shards, config.num_slices, prior=config.deletion_prior, until=until
    )


def outlook(folder: SystemFolder, valid: Collection[StageKey]) -> dict[str, Any]:
    """
    How long a system lasts as it is, and what its plan still lacks.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        valid (collection of [`~hf_s3t.plan.stages.StageKey`]): The stages that are there.

    Returns:
        `dict` with `expected_depth` (the mean depth over shards and the next requests, as many that hit each as it has
        slices, if nothing is trained),
        `stages_left` and `work_left` (what is to be trained: stages, and their work in full LoRA fine-tunings of all
        the data).
    """
    missing = folder.plan.missing(_current(folder, valid), folder.table.empty)
    return {
        "expected_depth": folder.growth.expected_depth(valid),
        "stages_left": len(missing),
        "work_left": folder.growth.work(missing),
    }


def next_stage(folder: SystemFolder, valid: Collection[StageKey]) -> dict[str, Any] | None:
    """
    The stage that is trained next, and what it brings by itself.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        valid (collection of [`~hf_s3t.plan.stages.StageKey`]): The stages that are there.

    Returns:
        `dict` with `stage`, `work`, `depth` (by how much the mean depth that serves rises) and `expected_depth` (by
        how much that one rises); `None` if nothing is missing. With `select="metric"` its loss will say whether it
        serves: there `depth` is `None`.
    """
    current = _current(folder, valid)
    step = folder.growth.next(current, folder.table.empty, frozenset(valid) - current)
    if step is None:
        return None
    depth = None if folder.config.select == "metric" else step.depth
    return {"stage": str(step.key), "work": step.work, "depth": depth, "expected_depth": step.expected_depth}


def _current(folder: SystemFolder, valid: Collection[StageKey]) -> frozenset[StageKey]:
    """Those of some stages that saw all that is in their slices now."""
    return frozenset(valid) & folder.current_stages if folder.ledger.additions else frozenset(valid)


def system_status(folder: SystemFolder) -> dict[str, Any]:
    """
    Where a system stands.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.

    Returns:
        `dict` with the keys of [`~hf_s3t.S3TModel.status`]: `examples` (how many are in), `deletions` (requests so
        far), `depths` (per shard the depth that serves), `sequence_depths` (per shard and sequence), `sets` (per
        shard and number of slices: sets that are there, planned), `stages` (valid, and with those that are missing),
        what `outlook` says, `stages_behind` (valid ones that lack rows which came since: they serve, and are to be
        grown again), `additions` (how often rows were added), `next_stage`, `deletions_until_first_dead_shard` and
        `deletions_until_exhausted` (expected further requests), `gate` (the `kind` of the gate that is there, its
        number of `rows` and of distinct `terms`;
        `None` without one).
    """
    valid = folder.valid_stages
    ahead = outlook(folder, valid)
    # They serve, and are to be grown again.
    behind = len(valid) - len(_current(folder, valid))
    return {
        "examples": len(folder.table),
        "deletions": folder.ledger.num_deletions,
        "depths": serving_depths(folder, valid),
        "sequence_depths": folder.plan.depths(valid),
        "sets": folder.plan.sets(valid, folder.table.empty),
        "stages": (len(valid), len(valid) + ahead["stages_left"] - behind),
        **ahead,
        "next_stage": next_stage(folder, valid),
        "deletions_until_first_dead_shard": deletions_left(folder, valid, "first_shard"),
        "deletions_until_exhausted": deletions_left(folder, valid),
        "gate": _gate(folder),
        "stages_behind": behind,
        "additions": len(folder.ledger.additions),
    }


def _gate(folder: SystemFolder) -> dict[str, Any] | None:
    if not folder.has_gate:
        return None
    head = folder.gate_head()
    return {"kind": KIND, "rows": head.rows, "terms": head.terms}
