"""A stage that sees a share of the earlier slices in each epoch: what is drawn, and that it is that to the bit."""

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.insides import rows_of_stages
from support.tiny import lm_rows, lora, make_trainer, s3t_config, tiny_llama, training_arguments
from torch.utils.data import Sampler
from transformers import Trainer, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler

from hf_s3t import S3TConfig, S3TTrainer
from hf_s3t.errors import ConfigError
from hf_s3t.plan import StageKey, stage_seed


pytestmark = [pytest.mark.usefixtures("one_thread", "shared_key")]

FIRST, SECOND = StageKey(0, (0,)), StageKey(0, (0, 1))
EPOCHS = 3
TARGETS = ["q_proj", "v_proj"]
# Of unequal length, so that grouping by length has something to do; one a batch, so that nothing is padded.
ROWS = [
    {**row, **{name: row[name][: 2 + number % 6] for name in ("input_ids", "labels")}}
    for number, row in enumerate(lm_rows(16))
]


def config(**changes) -> S3TConfig:
    return s3t_config(**{"sequence_selection": [[0, 1]], **changes})


def trainer_on(folder: Path, rows=ROWS, *, callbacks=(), arguments=None, model=None, **changes) -> S3TTrainer:
    settings = dict(num_train_epochs=EPOCHS, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    args = training_arguments(folder, **{**settings, **(arguments or {})})
    model = tiny_llama(2) if model is None else model
    return make_trainer(
        folder,
        model,
        rows,
        args=args,
        peft_config=lora(model, target_modules=TARGETS),
        config=config(**changes),
        callbacks=list(callbacks),
    )


def stages_in(folder: Path) -> dict[str, bytes]:
    return {
        path.parent.name: path.read_bytes() for path in sorted(folder.glob("stages/*/*/adapter_model.safetensors"))
    }


def trained(folder: Path, **settings) -> dict[str, bytes]:
    trainer_on(folder, **settings).train()
    return stages_in(folder)


# The setting


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), math.inf, True, "0.5", None])
def test_a_share_is_a_number_from_0_to_1(value):
    with pytest.raises(ConfigError, match=r"`replay` must be a number from 0 to 1, got "):
        S3TConfig(replay=value)


def test_no_share_is_the_ablation_of_one_slice_by_either_name():
    assert S3TConfig(replay=0) == S3TConfig(stage_data="slice") == S3TConfig(stage_data="slice", replay=0.0)
    assert (S3TConfig(replay=0).stage_data, S3TConfig(stage_data="slice").replay) == ("slice", 0.0)
    assert S3TConfig(replay=0).slices_trained_on((2, 0, 1)) == (1,)
    assert S3TConfig(replay=0.1).slices_trained_on((2, 0, 1)) == (2, 0, 1)
    with pytest.raises(ConfigError, match=r'stage_data="slice", which is replay=0.0, with replay=0.5. Leave'):
        S3TConfig(stage_data="slice", replay=0.5)


@pytest.mark.parametrize("changes", [{}, {"replay": 1}, {"replay": 0.25}, {"replay": 0}, {"stage_data": "slice"}])
def test_the_share_survives_json(changes):
    given = S3TConfig(**changes)
    assert isinstance(given.replay, float)
    assert S3TConfig.from_json(given.to_json()) == given
    # As versions without it wrote it.
    if given.replay in (0, 1):
        earlier = {name: value for name, value in given.to_dict().items() if name != "replay"}
        assert S3TConfig.from_dict(earlier) == given


@pytest.mark.parametrize(
    ("share", "earlier", "drawn"),
    [(1.0, 7, 7), (0.5, 8, 4), (0.25, 10, 2), (0.01, 10, 1), (0.99, 10, 10), (0.5, 0, 0), (0.0, 9, 0)],
)
def test_a_share_is_of_the_nearest_number_and_of_one_at_least(share, earlier, drawn):
    assert S3TConfig(replay=share).num_replayed(earlier) == drawn
    assert S3TConfig(replay=share).examples_per_epoch([earlier, 5]) == drawn + 5


# What is drawn


class InOrder(Sampler):
    """The rows that a slow draw takes, epoch after epoch, in the order that it takes them."""

    def __init__(self, epochs: list[list[int]]):
        self.epochs, self.epoch = epochs, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.epochs[0])

    def __iter__(self):
        return iter(self.epochs[self.epoch])


def slow_draw(trainer, key: StageKey, share: float, strategy: str, group_size: int = 2) -> list[list[int]]:
    """Per epoch the positions in the stage's dataset, by the words of the documentation."""
    sizes = rows_of_stages(trainer).sizes(key, trainer.folder.table)
    earlier, new = sum(sizes[:-1]), sizes[-1]
    rows = rows_of_stages(trainer).select(key, trainer.folder.table)
    epochs = []
    for epoch in range(EPOCHS):
        generator = torch.Generator().manual_seed(stage_seed(trainer.s3t_config.seed, key) + epoch)
        share_of_earlier = torch.randperm(earlier, generator=generator).tolist()[: round(share * earlier)]
        drawn = [position for position in range(earlier + new) if position >= earlier or position in share_of_earlier]
        if strategy == "random":
            order = torch.randperm(len(drawn), generator=generator).tolist()
        elif strategy == "group_by_length":
            lengths = [len(rows[position]["input_ids"]) for position in drawn]
            order = list(LengthGroupedSampler(group_size, lengths=lengths, generator=generator))
        else:
            order = range(len(drawn))
        epochs.append([drawn[number] for number in order])
    return epochs


def by_hand(folder: Path, trainer, key: StageKey, epochs: list[list[int]], **arguments) -> dict[str, torch.Tensor]:
    """The second stage as anybody would train it: plain PEFT on the first one, a plain Trainer, rows in this order."""
    seed = stage_seed(trainer.s3t_config.seed, key)
    model = PeftModel.from_pretrained(
        tiny_llama(2), trainer.folder.path / key.parent.path, adapter_name="first", is_trainable=False
    )
    set_seed(seed)
    layers = trainer.folder.stage_record(key)["layers"]
    model.add_adapter("second", lora(model, target_modules=TARGETS, layers_to_transform=layers))
    model.base_model.set_adapter(["first", "second"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".second." in name)

    class Plain(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return InOrder(epochs)

    settings = dict(num_train_epochs=EPOCHS, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    args = training_arguments(folder, seed=seed, **{**settings, **arguments})
    rows = rows_of_stages(trainer).select(key, trainer.folder.table)
    Plain(model, args, train_dataset=rows).train()
    return {name.replace(".second", ""): tensor for name, tensor in model.state_dict().items() if ".second." in name}


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
def test_a_stage_is_what_plain_peft_makes_of_the_rows_that_are_drawn(strategy, tmp_path):
    arguments = {"train_sampling_strategy": strategy}
    trainer = trainer_on(tmp_path / "s", replay=0.5, arguments=arguments)
    trainer.train()
    epochs = slow_draw(trainer, SECOND, 0.5, strategy)
    expected = by_hand(tmp_path / "plain", trainer, SECOND, epochs, **arguments)
    made = load_file(tmp_path / "s" / SECOND.path / "adapter_model.safetensors")
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in made)
