"""A stage that sees a share of the earlier slices in each epoch: what is drawn, and that it is that to the bit."""

import itertools
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.insides import rows_of_stages
from support.launched import launched
from support.tiny import lm_rows, lora, make_trainer, s3t_config, tiny_llama, training_arguments
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, set_seed
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler
from trl import SFTConfig

from hf_s3t import S3TConfig, S3TSFTTrainer, S3TTrainer, launch
from hf_s3t.errors import ConfigError
from hf_s3t.folder.files import read_checked_json, write_checked_json
from hf_s3t.folder.layout import CONFIG_FILE
from hf_s3t.plan import StageKey, stage_seed
from hf_s3t.training.sampler import ReplayBatches, ReplayDraw, ReplaySampler, replayed


pytestmark = [pytest.mark.usefixtures("one_thread", "shared_key")]

FIRST, SECOND = StageKey(0, (0,)), StageKey(0, (0, 1))
EPOCHS = 2
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


def epochs_of(sampler, count: int = EPOCHS) -> list[list[int]]:
    epochs = []
    for epoch in range(count):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    return epochs


@pytest.mark.parametrize(
    "base",
    [
        RandomSampler(range(30)),
        SequentialSampler(range(30)),
        LengthGroupedSampler(4, lengths=[1 + number * 7 % 11 for number in range(30)]),
    ],
    ids=lambda base: type(base).__name__,
)
def test_an_epoch_takes_each_new_row_once_and_another_share_of_the_earlier_ones(base):
    sampler = ReplaySampler(base, ReplayDraw(20, 10, 8, seed=5))
    epochs = epochs_of(sampler, 40)
    shares = [frozenset(position for position in epoch if position < 20) for epoch in epochs]
    assert all(sorted(set(epoch) - share) == list(range(20, 30)) for epoch, share in zip(epochs, shares, strict=True))
    assert {len(epoch) for epoch in epochs} == {len(sampler)} == {18} and {len(share) for share in shares} == {8}
    assert len(set(shares)) == 40 and frozenset.union(*shares) == set(range(20))
    # Of seed and epoch, whatever was drawn before and whoever draws beside.
    torch.manual_seed(1)
    again = ReplaySampler(base, ReplayDraw(20, 10, 8, seed=5))
    again.set_epoch(7)
    assert list(again) == epochs[7] == list(again)
    assert epochs_of(ReplaySampler(base, ReplayDraw(20, 10, 8, seed=6))) != epochs[:EPOCHS]


def test_batches_of_balanced_cost_are_made_of_what_is_drawn():
    lengths = [1 + number * 7 % 11 for number in range(30)]
    draw = ReplayDraw(20, 10, 10, seed=5)
    for drop_last in (False, True):
        settings = [dict(seed=3, rank=rank, drop_last=drop_last) for rank in range(2)]
        samplers = [ReplayBatches(BatchRebalanceSampler(lengths, 8, 2, 2, **given), draw) for given in settings]
        for epoch in range(EPOCHS):
            drawn, _ = draw.of_epoch(epoch)
            seen = []
            for sampler, given in zip(samplers, settings, strict=True):
                # As if nothing else were there.
                alone = BatchRebalanceSampler([lengths[position] for position in drawn], 8, 2, 2, **given)
                for each in (sampler, alone):
                    each.set_epoch(epoch)
                batches = list(sampler)
                assert batches == [[drawn[number] for number in batch] for batch in alone]
                assert len(batches) == len(sampler)
                seen += [position for batch in batches for position in batch]
            assert set(seen) < set(drawn) if drop_last else sorted(seen) == drawn


@pytest.mark.parametrize(
    "sampler", [RandomSampler(range(30), replacement=True), BatchSampler(SequentialSampler(range(30)), 2, False)]
)
def test_what_is_put_in_another_order_than_trainers_own_is_not_drawn_from(sampler):
    with pytest.raises(ConfigError, match=rf"has a {type(sampler).__name__} of its own\. Leave `replay` out"):
        replayed(sampler, ReplayDraw(20, 10, 6, seed=5))


# To the bit


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_thread, shared_key) -> dict[str, bytes]:
    """The stages of a system with half of the earlier slices' rows in each epoch."""
    return trained(tmp_path_factory.mktemp("whole"), replay=0.5)


def test_all_rows_are_what_they_were_and_first_stages_are_the_same_at_any_share(whole, tmp_path, monkeypatch):
    everything = trained(tmp_path / "1.0", replay=1.0)
    assert everything["0"] == whole["0"] and everything["0-1"] != whole["0-1"]
    # Trainer's own samplers, as if nothing were there to draw by.
    monkeypatch.setattr(S3TTrainer, "_get_train_sampler", lambda self, dataset=None: Trainer._get_train_sampler(self))
    assert trained(tmp_path / "own") == everything


def test_no_share_goes_on_with_a_folder_of_the_ablation(tmp_path):
    expected = trained(tmp_path / "slice", stage_data="slice")
    assert trained(tmp_path / "0", replay=0.0) == expected
    # As a version without the setting left it, with a stage to train.
    earlier = tmp_path / "slice"
    record = read_checked_json(earlier / CONFIG_FILE)
    del record["s3t_config"]["replay"]
    write_checked_json(earlier / CONFIG_FILE, record)
    shutil.rmtree(earlier / SECOND.path)
    trainer = trainer_on(earlier, replay=0.0)
    assert trainer.train().metrics["stages_trained"] == 1 and stages_in(earlier) == expected
    assert trainer.verify().ok


class Dies(TrainerCallback):
    """Ends the process, as far as a test can, before a step of the second stage."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if state.global_step == self.step and len(train_dataloader.dataset) == len(ROWS):
            raise KeyboardInterrupt


def interrupted(folder: Path, step: int, **settings) -> dict[str, bytes]:
    """The stages of a system of which the second died before a step, and was gone on with by another trainer."""
    arguments = {"save_strategy": "steps", "save_steps": 1, **settings.pop("arguments", {})}
    with pytest.raises(KeyboardInterrupt):
        trainer_on(folder, callbacks=[Dies(step)], arguments=arguments, **settings).train()
    went_on = Notes()
    trainer_on(folder, callbacks=[went_on], arguments=arguments, **settings).train()
    assert went_on.first_steps == [step]
    return stages_in(folder)


class Notes(TrainerCallback):
    """After how many steps a trainer begins its stages."""

    def __init__(self):
        self.first_steps: list[int] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_steps.append(state.global_step)


STRATEGIES = ["random", "sequential", "group_by_length", "batch_rebalance"]


@pytest.mark.parametrize(("step", "strategy"), [(2, "random"), *((8, strategy) for strategy in STRATEGIES)], ids=str)
def test_a_stage_that_died_in_its_first_or_second_epoch_is_the_same(step, strategy, tmp_path):
    settings = dict(replay=0.5, arguments={"train_sampling_strategy": strategy})
    expected = trained(tmp_path / "whole", **settings)
    assert interrupted(tmp_path / "died", step, **settings) == expected


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_so_it_is_where_one_process_sends_the_batches_to_all(share, tmp_path):
    settings = dict(replay=share, arguments={"accelerator_config": {"dispatch_batches": True}})
    assert interrupted(tmp_path / "died", 10, **settings) == trained(tmp_path / "whole", **settings)


SETTINGS = {
    "steps": {"max_steps": 9},
    "whole batches": {"dataloader_drop_last": True, "per_device_train_batch_size": 3},
    "bf16": {"bf16": True},
    "workers": {"dataloader_num_workers": 1},
}


@pytest.mark.parametrize("name", [*list(SETTINGS)[:-1], pytest.param("workers", marks=pytest.mark.slow)])
def test_forgetting_is_never_having_seen_and_an_audit_draws_the_same(name, tmp_path):
    """The surviving stages of one shard saw what is left of earlier slices, and drew from that."""
    settings = dict(num_slices=3, sequence_selection=[[0, 1, 2], [1, 0, 2]], replay=0.4, arguments=SETTINGS[name])
    rows = lm_rows(16)
    saw = trainer_on(tmp_path / "saw", rows, model=tiny_llama(3), **settings)
    saw.train()
    table = saw.folder.table
    gone = [table.members(0, 2)[0]]
    left = [row for row in rows if row["id"] not in gone]
    saw.s3t_model.unlearn(gone)
    never = trainer_on(tmp_path / "never", left[::-1], model=tiny_llama(3), **settings)
    never.train()
    survivors = {str(key).partition("/")[2] for key in saw.folder.valid_stages}
    assert survivors == {"0", "0-1", "1", "1-0"}
    made = stages_in(tmp_path / "never")
    assert {name: stages_in(tmp_path / "saw")[name] for name in survivors}.items() < made.items()
    assert never.verify().ok
    saw.train()
    assert stages_in(tmp_path / "saw") == made


# Packing


class Sees(S3TSFTTrainer):
    """Notes the tokens of each batch, by stage and epoch."""

    def training_step(self, model, inputs, *args, **kwargs):
        noted = self.__dict__.setdefault("seen", {}).setdefault(self._stage, {})
        noted.setdefault(int(self.state.epoch), []).append(inputs["input_ids"].flatten().tolist())
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packs_of_earlier_rows_are_drawn_and_new_rows_are_all_there(strategy, tmp_path):
    # Each row has a word of its own, and packs hold two rows or parts of some.
    rows = [{"id": row["id"], "input_ids": [60 + number] * (3 + number % 6)} for number, row in enumerate(ROWS)]
    args = training_arguments(
        tmp_path,
        SFTConfig,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=1,
        packing=True,
        packing_strategy=strategy,
        max_length=12,
        bf16=False,
    )
    trainer = make_trainer(
        tmp_path,
        tiny_llama(2, vocab_size=80),
        rows,
        cls=Sees,
        args=args,
        config=config(replay=0.5),
        processing_class=tokenizer(),
    )
    trainer.train()
    tokens = {row["id"]: row["input_ids"] for row in rows}
    members = [trainer.folder.table.members(0, slice_) for slice_ in (0, 1)]
    earlier, new = (sorted(flat(tokens[i] for i in ids)) for ids in members)
    whole, epochs = trainer.seen[FIRST], list(trainer.seen[SECOND].values())
    assert all(sorted(flat(packs)) == earlier for packs in whole.values())
    drawn = [[pack for pack in packs if set(pack) & set(earlier)] for packs in epochs]
    rest = [[pack for pack in packs if not set(pack) & set(earlier)] for packs in epochs]
    # No pack is of both.
    assert all(sorted(flat(packs)) == new for packs in rest)
    assert [len(packs) for packs in drawn] == [round(len(whole[0]) / 2)] * EPOCHS
    assert {len(packs) for packs in epochs} == {len(epochs[0])}
    assert len({tuple(sorted(map(tuple, packs))) for packs in drawn}) > 1
    assert trainer.verify().ok


def test_what_truncation_drops_is_neither_drawn_nor_counted(tmp_path):
    # Each row has a word of its own; of every fourth row the answer begins beyond what is kept.
    rows = [
        {"id": row["id"], "prompt": " ".join([f"w{60 + number}"] * (9 if number % 4 == 0 else 2)), "completion": " w5"}
        for number, row in enumerate(ROWS)
    ]
    args = training_arguments(
        tmp_path, SFTConfig, num_train_epochs=EPOCHS, per_device_train_batch_size=1, max_length=8, bf16=False
    )
    model = tiny_llama(2, vocab_size=80)
    given = dict(cls=Sees, args=args, config=config(replay=0.5), processing_class=tokenizer())
    trainer = make_trainer(tmp_path, model, rows, **given)
    trainer.train()
    kept = {row["id"]: number for number, row in enumerate(rows) if number % 4}
    earlier, new = ({60 + kept[i] for i in trainer.folder.table.members(0, slice_) if i in kept} for slice_ in (0, 1))
    assert len(earlier) + len(new) == len(kept) == 12
    for batches in trainer.seen[SECOND].values():
        words = [tokens[0] for tokens in batches]
        assert len(words) == len(set(words)) == len(new) + round(len(earlier) / 2) and new < set(words) < earlier | new


def flat(lists) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(80)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2", unk_token="w3")


# What is told beforehand, and refused


def test_steps_costs_and_too_small_batches_are_of_what_is_drawn(tmp_path):
    rows, table = ROWS, None
    trainer = trainer_on(tmp_path / "s", rows, replay=0.5)
    table = trainer.folder.table
    sizes = table.size(0, 0), table.size(0, 1)
    drawn = sizes[1] + round(sizes[0] / 2)
    assert rows_of_stages(trainer).num_per_epoch(SECOND, table) == drawn
    assert trainer._cost(SECOND) / trainer._cost(FIRST) == pytest.approx(drawn * 2 / sizes[0] * 2 / 3)
    trainer.train()
    steps = math.ceil(drawn / 2) * EPOCHS
    first, last = trainer.folder.stage_record(SECOND)["steps"]
    assert last - first == steps
    arguments = {"dataloader_drop_last": True, "per_device_train_batch_size": drawn + 1}
    with pytest.raises(ConfigError, match=rf"without a batch: it has \d+ examples an epoch, and a batch {drawn + 1}"):
        trainer_on(tmp_path / "t", replay=0.5, arguments=arguments)


class OwnLoader(S3TTrainer):
    def get_train_dataloader(self):
        return self.accelerator.prepare(DataLoader(self.train_dataset, collate_fn=self.data_collator))


class OwnSampler(S3TTrainer):
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("cls", [OwnLoader, OwnSampler])
def test_a_trainer_that_samples_its_own_way_is_refused_where_a_share_is_to_be_drawn(cls, tmp_path):
    def trainer(name, **changes):
        args = training_arguments(tmp_path / name, max_steps=2, per_device_train_batch_size=1)
        return make_trainer(tmp_path / name, tiny_llama(2), ROWS, args=args, config=config(**changes), cls=cls)

    trainer("all").train()
    with pytest.raises(ConfigError, match=rf"replay=0.5, but nothing draws a share .* {cls.__name__} has samplers"):
        trainer("half", replay=0.5).train()
    assert list(stages_in(tmp_path / "half")) == ["0"]


# Several processes


def in_processes(folder: Path) -> None:
    """What each of several processes does: every strategy, undisturbed and interrupted in the second epoch."""
    for strategy in STRATEGIES:
        settings = dict(replay=0.5, arguments={"train_sampling_strategy": strategy, "gradient_accumulation_steps": 1})
        trainer_on(folder / strategy / "whole", **settings).train()
        trainer = trainer_on(folder / strategy / "whole", **settings)
        assert trainer.verify().ok
        interrupted(folder / strategy / "died", 8, **settings)
        # Without a share, too: the order of an epoch is the epoch's.
        settings["replay"] = 1.0
        trainer_on(folder / strategy / "all", **settings).train()
        interrupted(folder / strategy / "all, died", 11, **settings)


@pytest.mark.slow
@pytest.mark.long
def test_several_processes_draw_the_same_and_go_on_with_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_S3T_KEY", "of all of these systems")
    launched(Path(__file__), str(tmp_path), processes=2, environment={"OMP_NUM_THREADS": "1"})
    for strategy in STRATEGIES:
        made = {name: stages_in(tmp_path / strategy / name) for name in ("whole", "died", "all", "all, died")}
        assert made["whole"].keys() == made["all"].keys() == {"0", "0-1"}
        assert made["whole"] == made["died"] != made["all"] == made["all, died"]


if __name__ == "__main__":
    launch.start_cpu_processes()
    in_processes(Path(sys.argv[1]))
