"""The order of a stage's examples in each epoch, where `Trainer`'s own would depend on what ran before."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler


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
