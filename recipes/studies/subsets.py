"""Smaller budgets from the stages of a larger one: which there are, and the system of one of them."""

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_s3t import S3TConfig
from hf_s3t.errors import ConfigError
from hf_s3t.folder.files import write_checked_json
from hf_s3t.folder.layout import CONFIG_FILE, STAGES
from hf_s3t.folder.system import SystemFolder
from hf_s3t.plan import Plan, StageKey


def check_budgets(config: S3TConfig, budgets: Sequence[int]) -> None:
    """
    Refuse budgets whose stages are not among those of the largest, before that is trained.

    Args:
        config ([`~hf_s3t.S3TConfig`]): The system, but for its budget.
        budgets (sequence of `int`): Numbers of sequences per shard.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: With the first that is not, and those that are.
    """

    def stages(budget: int) -> set[StageKey]:
        return {*Plan.from_config(dataclasses.replace(config, budget=budget)).stages()}

    largest = max(budgets)
    there = stages(largest)
    fitting = [budget for budget in range(1, largest + 1) if stages(budget) <= there]
    for budget in sorted(budgets):
        if budget not in fitting:
            raise ConfigError(
                f"Budget {budget} has sequences that {largest}, the largest, does not have, so its system cannot be "
                f"served from that one's stages. Choose among {', '.join(map(str, fitting))}, or another rule by "
                "`--sequence_selection`, such as cyclic-paper."
            )


def served_subset(source: Path, target: Path, *, shards: Sequence[int] | None = None, **changes: Any) -> Path:
    """
    A system of fewer sequences from the stages of one with more.

    A stage depends on its prefix alone, so what a smaller budget would train is among what the larger one has trained,
    to the bit: it need not be trained again. Stages are linked, not copied, where the file system can.

    Args:
        source (`Path`): The folder of the trained system.
        target (`Path`): The new folder.
        shards (sequence of `int`, *optional*): Take the stages of these shards only; the others have none.
        **changes: Fields of `S3TConfig` that differ: `budget`, `sequence_selection`, `keep_idle` or `select`.

    Returns:
        `Path`: The new folder.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If other fields are changed, the new folder is there, or the system lacks
            stages that the smaller one has.
    """
    others = set(changes) - {"budget", "sequence_selection", "keep_idle", "select"}
    if others:
        raise ConfigError(
            f"{', '.join(sorted(others))} cannot be changed after training. Change budget, sequence_selection, "
            "keep_idle or select, or train another system."
        )
    target = Path(target)
    if target.exists():
        raise ConfigError(f"{target} is there already. Name a new folder.")
    folder = SystemFolder(source)
    config = dataclasses.replace(folder.config, **changes)
    plan = Plan.from_config(config)
    wanted = [key for key in plan.stages(folder.table.empty) if shards is None or key.shard in shards]
    valid = folder.valid_stages
    missing = [key for key in wanted if key not in valid]
    if missing and not folder.ledger.num_deletions:
        raise ConfigError(
            f"{folder.path} lacks {len(missing)} of the {len(wanted)} stages that are asked for, such as "
            f"{missing[0]}. Train it with a budget whose sequences start with those of the smaller one."
        )
    (target / STAGES).mkdir(parents=True)
    for entry in folder.path.iterdir():
        if entry.is_file() and entry.name != CONFIG_FILE:
            shutil.copy2(entry, target / entry.name)
    for key in wanted:
        if key not in missing:
            shutil.copytree(folder.path / key.path, target / key.path, copy_function=_link)
    record = {**folder.record, "s3t_config": config.to_dict(), "plan": plan.to_record()}
    write_checked_json(target / CONFIG_FILE, record)
    return target


def _link(source: str, target: str) -> None:
    # A stage's files are removed, never written again, so copies may share them.
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
