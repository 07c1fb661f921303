"""How many batches and optimizer steps the stages get, and what is too few of them."""

import math
from collections.abc import Iterable, Sequence

from transformers import TrainingArguments

from ..errors import ConfigError, counted
from ..plan.stages import StageKey
from ..records.examples import ExampleTable
from .rows import StageRows


def check_batches(
    keys: Sequence[StageKey], rows: StageRows, table: ExampleTable, args: TrainingArguments, processes: int
) -> None:
    """
    Refuse stages of too few rows to make a batch; packing makes of rows no more than they are.

    Args:
        keys (sequence of [`~hf_s3t.plan.stages.StageKey`]): The stages.
        rows ([`StageRows`]): What they are trained on.
        table ([`~hf_s3t.records.examples.ExampleTable`]): The examples that are in.
        args ([`~transformers.TrainingArguments`]): The recipe of a stage.
        processes (`int`): How many processes share a batch.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: Naming the first stage.
    """
    size = args.train_batch_size * processes
    few = [key for key in keys if rows.num_per_epoch(key, table) < size] if args.dataloader_drop_last else []
    if few:
        raise ConfigError(
            f"`dataloader_drop_last=True` leaves {few[0]} ({counted(len(few), 'stage')} in all) without a batch: it "
            f"has {counted(rows.num_per_epoch(few[0], table), 'example')} an epoch, and a batch {size}. Leave it off, "
            "or have smaller batches, fewer shards or fewer slices."
        )


def fewest_steps(
    keys: Iterable[StageKey], rows: StageRows, table: ExampleTable, args: TrainingArguments, processes: int
) -> int | None:
    """
    Optimizer steps of the shortest of some stages, if there is one and they are known beforehand.

    Args:
        keys (iterable of [`~hf_s3t.plan.stages.StageKey`]): The stages.
        rows ([`StageRows`]): What they are trained on.
        table ([`~hf_s3t.records.examples.ExampleTable`]): The examples that are in.
        args ([`~transformers.TrainingArguments`]): The recipe of a stage.
        processes (`int`): How many processes share a batch.
    """
    keys = list(keys)
    if not keys or getattr(args, "packing", False):
        return None
    if args.max_steps > 0:
        return args.max_steps
    kept = {
        (shard, s): rows.num_per_epoch(StageKey(shard, (s,)), table)
        for shard in {key.shard for key in keys}
        for s in range(table.num_slices)
    }
    examples = min(rows.config.examples_per_epoch([kept[key.shard, s] for s in rows.slices(key)]) for key in keys)
    share = examples / (args.train_batch_size * processes)
    batches = math.floor(share) if args.dataloader_drop_last else math.ceil(share)
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))
