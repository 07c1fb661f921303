"""The order of a stage's examples in each epoch, where `Trainer`'s own would depend on what ran before; and replay."""

from collections.abc import Iterator

import torch
from torch.utils.data import RandomSampler, Sampler, SequentialSampler
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler


class EpochSeededSampler(Sampler[int]):
    """
    A length-grouping sampler whose order in an epoch depends on the seed and the epoch, not on what ran before.

    Args:
        sampler ([`~transformers.trainer_pt_utils.LengthGroupedSampler`]): The sampler to seed.
        seed (`int`): The stage's seed.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int):
        self.sampler = sampler
        self.seed = seed
        self.epoch = 0
        sampler.generator = torch.Generator()

    def set_epoch(self, epoch: int) -> None:
        """Accelerate's data loader announces the epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator.manual_seed(self.seed + self.epoch)
        return iter(self.sampler)


class ReplayDraw:
    """
    Which examples of a stage an epoch takes: all of the new slice, and a share of the earlier ones, drawn anew.

    Args:
        num_earlier (`int`): Examples of the earlier slices, which come first in the stage's dataset.
        num_new (`int`): Examples of the new slice.
        num_drawn (`int`): How many of the earlier ones an epoch takes.
        seed (`int`): The stage's seed.
    """

    def __init__(self, num_earlier: int, num_new: int, num_drawn: int, seed: int):
        self.num_earlier, self.num_new, self.num_drawn, self.seed = num_earlier, num_new, num_drawn, seed

    def __len__(self) -> int:
        return self.num_drawn + self.num_new

    def of_epoch(self, epoch: int) -> tuple[list[int], torch.Generator]:
        """The positions, ascending, and the generator that drew them, to put them in order by."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        drawn = torch.randperm(self.num_earlier, generator=generator)[: self.num_drawn].sort().values.tolist()
        return [*drawn, *range(self.num_earlier, self.num_earlier + self.num_new)], generator


class ReplaySampler(Sampler[int]):
    """
    A stage's examples of one epoch, in the order that the training arguments ask for.

    Args:
        sampler (`torch.utils.data.Sampler`): Trainer's own sampler of the whole dataset, which says in what order.
        draw ([`ReplayDraw`]): Which examples an epoch takes.
    """

    def __init__(self, sampler: RandomSampler | SequentialSampler | LengthGroupedSampler, draw: ReplayDraw):
        self.sampler, self.draw, self.epoch = sampler, draw, 0

    def set_epoch(self, epoch: int) -> None:
        """Accelerate's data loader announces the epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.draw)

    def __iter__(self) -> Iterator[int]:
        drawn, generator = self.draw.of_epoch(self.epoch)
        within: Sampler[int]
        if isinstance(self.sampler, LengthGroupedSampler):
            lengths = [self.sampler.lengths[position] for position in drawn]
            within = LengthGroupedSampler(self.sampler.batch_size, lengths=lengths, generator=generator)
        elif isinstance(self.sampler, RandomSampler):
            within = RandomSampler(drawn, generator=generator)
        else:
            within = SequentialSampler(drawn)
        return iter([drawn[number] for number in within])


class ReplayBatches(BatchRebalanceSampler):
    """
    The batches of one epoch of a stage that `train_sampling_strategy="batch_rebalance"` makes, of what is drawn.

    Args:
        sampler ([`~transformers.trainer_pt_utils.BatchRebalanceSampler`]): Trainer's own sampler of the whole dataset.
        draw ([`ReplayDraw`]): Which examples an epoch takes.
    """

    def __init__(self, sampler: BatchRebalanceSampler, draw: ReplayDraw):
        super().__init__(
            # Only how many there are counts until an epoch begins.
            sampler.lengths[: len(draw)],
            sampler.effective_batch_size,
            sampler.dp_size,
            sampler.grad_accum,
            sampler.shuffle,
            sampler.seed,
            sampler.rank,
            sampler.drop_last,
        )
        self.all_lengths, self.draw = sampler.lengths, draw

    def __iter__(self) -> Iterator[list[int]]:
        drawn, _ = self.draw.of_epoch(self.epoch)
        self.lengths = [self.all_lengths[position] for position in drawn]
        for batch in super().__iter__():
            yield [drawn[number] for number in batch]
