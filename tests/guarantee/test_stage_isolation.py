"""
A stage sees the examples of its slices and nothing else, trains its own adapter and nothing else, and depends on
nothing else (E1).
"""

import copy
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, prepare_model_for_kbit_training
from safetensors.torch import load_file
from support.insides import stack_of
from support.tiny import (
    BOS,
    EOS,
    FIRST_WORD,
    PAD,
    UNKNOWN,
    batch_of,
    build,
    classification_rows,
    ids_of,
    lm_rows,
    lora,
    make_trainer,
    plant_stages,
    s3t_config,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_roberta,
    training_arguments,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import SFTConfig

from hf_s3t import S3TModel, S3TSFTTrainer, S3TTrainer
from hf_s3t.errors import ConfigError, EmptySliceError
from hf_s3t.model.tensor_files import differing_tensors


# Minutes on two cores: part of `make test-slow`.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


# Examples that can be told apart: each has a word of its own in its prompt, and one in its answer


COMMON = range(FIRST_WORD, 40)
EXAMPLES = 20
IN_PROMPT, IN_ANSWER = 100, 200
WORDS = 300


def planted(number: int) -> tuple[int, int]:
    """The tokens that only this example has."""
    return IN_PROMPT + number, IN_ANSWER + number


def told_apart(number: int) -> tuple[list[int], list[int]]:
    """Prompt and answer of an example as tokens: of many lengths, the planted tokens somewhere in the middle."""
    draw = random.Random(number)
    parts = []
    for token, longest in zip(planted(number), (7, 5), strict=True):
        words = [draw.choice(COMMON) for _ in range(draw.randint(1, longest))]
        # Not at the very beginning, which nothing predicts.
        words.insert(draw.randint(1, len(words)), token)
        parts.append(words)
    return parts[0], parts[1]


def text_of(tokens: list[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


def _message(role: str, tokens: list[int]) -> dict[str, str]:
    return {"role": role, "content": text_of(tokens)}


FORMATS: dict[str, Callable[[list[int], list[int]], dict[str, Any]]] = {
    "tokens": lambda prompt, answer: {"input_ids": prompt + answer, "labels": prompt + answer},
    "text": lambda prompt, answer: {"text": text_of(prompt + answer)},
    "prompt-completion": lambda prompt, answer: {"prompt": text_of(prompt), "completion": f" {text_of(answer)}"},
    "chat": lambda prompt, answer: {"messages": [_message("user", prompt), _message("assistant", answer)]},
    "chat prompt-completion": lambda prompt, answer: {
        "prompt": [_message("user", prompt)],
        "completion": [_message("assistant", answer)],
    },
    "custom": lambda prompt, answer: {"question": text_of(prompt), "answer": text_of(answer)},
}


def rows_as(form: str, numbers=range(EXAMPLES)) -> list[dict[str, Any]]:
    ids = ids_of(EXAMPLES)
    return [{"id": ids[number], **FORMATS[form](*told_apart(number))} for number in numbers]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": UNKNOWN, "<|user|>": 4}
    words |= {f"w{token}": token for token in range(FIRST_WORD, WORDS)}
    words["<|assistant|>"] = words.pop(f"w{COMMON.stop}")
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=(
            "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} </s> {% endfor %}"
            "{% if add_generation_prompt %}<|assistant|> {% endif %}"
        ),
    )


# Trainers that record


class Records:
    """Mix-in: keeps the batches of every stage."""

    def training_step(self, model, inputs, *args, **kwargs):
        if not hasattr(self, "seen"):
            self.seen: dict[str, list[dict[str, torch.Tensor]]] = {}
        batch = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        self.seen.setdefault(str(self._stage), []).append(batch)
        return super().training_step(model, inputs, *args, **kwargs)


class RecordingTrainer(Records, S3TTrainer):
    pass


class RecordingSFTTrainer(Records, S3TSFTTrainer):
    pass


def members(folder: Path) -> dict[tuple[int, int], set[str]]:
    """The ids of each (shard, slice), as the system's table says."""
    columns = pq.read_table(folder / "examples.parquet").to_pydict()
    found: dict[tuple[int, int], set[str]] = {}
    for example, shard, slice_ in zip(columns["id"], columns["shard"], columns["slice"], strict=True):
        found.setdefault((shard, slice_), set()).add(example)
    return found


def count_tokens(batches: list[dict[str, torch.Tensor]], name: str = "input_ids") -> Counter:
    """How often each planted token was in the batches."""
    return Counter(token for batch in batches for token in batch[name].flatten().tolist() if token >= IN_PROMPT)


def assert_stages_saw_their_own(
    folder: Path,
    seen: dict,
    epochs: int = 1,
    dropped=(),
    truncated: bool = False,
    split: bool = False,
    answers_only: bool = False,
) -> None:
    """
    Each stage saw each example of its slices once an epoch, and no other.

    Args:
        folder: The system's.
        seen: What the trainer recorded.
        epochs: How many a stage trains for.
        dropped: Ids that preparation leaves out.
        truncated: Whether parts of examples, and with them planted tokens, may be missing.
        split: Whether examples are cut into parts, of which the first token bears no loss.
        answers_only: Whether prompts bear no loss.
    """
    numbers = {example: number for number, example in enumerate(ids_of(EXAMPLES))}
    table = members(folder)
    assert sorted(set().union(*table.values())) == ids_of(EXAMPLES)
    assert seen
    for stage, batches in seen.items():
        shard, prefix = stage.removeprefix("shard-").split("/")
        own = set().union(*(table[int(shard), int(s)] for s in prefix.split("-"))) - set(dropped)
        prompts, answers = (Counter() for _ in range(2))
        for example in own:
            prompt, answer = planted(numbers[example])
            prompts[prompt] += epochs
            answers[answer] += epochs
        found, in_labels = count_tokens(batches), count_tokens(batches, "labels")
        if truncated:
            assert set(found) <= set(prompts + answers), stage
            assert all(number == epochs for number in found.values()), stage
            # Of every example something was seen.
            assert {token % 100 for token in found} == {token % 100 for token in prompts}, stage
        else:
            assert found == prompts + answers, stage
            labelled = answers if answers_only else prompts + answers
            assert in_labels <= labelled if split else in_labels == labelled, stage


STAGES = {"shard-0/0", "shard-0/0-1", "shard-1/0", "shard-1/0-1"}


def config(**changes):
    settings = dict(num_shards=2, budget=1, sequence_selection=[[0, 1]], partition="hashed", seed=5)
    return s3t_config(**{**settings, **changes})


def fresh_llama(layers: int = 2, **changes):
    return tiny_llama(layers, vocab_size=WORDS, **changes)


# What a stage sees: Trainer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train_sampling_strategy": "group_by_length"},
        {"train_sampling_strategy": "batch_rebalance"},
        {"train_sampling_strategy": "sequential"},
        {"gradient_accumulation_steps": 3},
        {"num_train_epochs": 2},
        {"dataloader_num_workers": 1, "per_device_train_batch_size": 8},
    ],
    ids=lambda settings: ", ".join(map(str, settings.values())) or "defaults",
)
def test_a_stage_of_a_trainer_sees_its_own_examples(tmp_path, tokenizer, settings):
    trainer = make_trainer(
        tmp_path,
        fresh_llama(),
        rows_as("tokens"),
        cls=RecordingTrainer,
        config=config(),
        args=training_arguments(tmp_path, **{"per_device_train_batch_size": 3, **settings}),
        processing_class=tokenizer,
        data_collator=partial(padded, pad=PAD),
    )
    trainer.train()
    assert set(trainer.seen) == STAGES
    assert_stages_saw_their_own(tmp_path, trainer.seen, epochs=settings.get("num_train_epochs", 1))


def padded(rows: list[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """A batch of rows of several lengths."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [pad] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != pad).long(), "labels": ids.masked_fill(ids == pad, -100)}


def test_every_planned_stage_sees_the_slices_of_its_prefix(tmp_path, tokenizer):
    """With more sequences, three slices: each stage the union of its slices."""
    trainer = make_trainer(
        tmp_path,
        fresh_llama(3),
        rows_as("tokens"),
        cls=RecordingTrainer,
        config=config(num_shards=1, num_slices=3, budget=2, sequence_selection=[[0, 1, 2], [2, 0, 1]]),
        data_collator=partial(padded, pad=PAD),
    )
    trainer.train()
    assert set(trainer.seen) == {f"shard-0/{stage}" for stage in ("0", "0-1", "0-1-2", "2", "2-0", "2-0-1")}
    assert_stages_saw_their_own(tmp_path, trainer.seen)


class Rows(torch.utils.data.Dataset):
    """A dataset of PyTorch, whose ids are row numbers."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {name: value for name, value in self.rows[index].items() if name != "id"}


def test_a_dataset_of_pytorch(tmp_path):
    trainer = make_trainer(
        tmp_path,
        fresh_llama(),
        Rows(rows_as("tokens")),
        cls=RecordingTrainer,
        config=config(id_column=None),
        data_collator=partial(padded, pad=PAD),
    )
    trainer.train()
    table = members(tmp_path)
    for stage, batches in trainer.seen.items():
        shard, prefix = stage.removeprefix("shard-").split("/")
        own = set().union(*(table[int(shard), int(s)] for s in prefix.split("-")))
        assert count_tokens(batches) == Counter(token for number in own for token in planted(number)), stage


def test_a_transform_of_the_dataset_is_applied_to_the_stages_rows(tmp_path):
    """Tokenising on the fly, as image pipelines do: ids still follow their examples."""

    def tokenise(batch):
        tokens = [[int(word[1:]) for word in text.split()] for text in batch["text"]]
        return {"input_ids": tokens, "labels": tokens}

    dataset = Dataset.from_list(rows_as("text")).with_transform(tokenise)
    trainer = make_trainer(
        tmp_path,
        fresh_llama(),
        dataset,
        cls=RecordingTrainer,
        config=config(),
        args=training_arguments(tmp_path, remove_unused_columns=False),
        data_collator=partial(padded, pad=PAD),
    )
    trainer.train()
    assert set(trainer.seen) == STAGES
    assert_stages_saw_their_own(tmp_path, trainer.seen)


def test_the_order_of_the_datasets_rows_does_not_matter(tmp_path):
    """Batch by batch the same, whatever the order the rows come in."""
    numbers = list(range(EXAMPLES))
    random.Random(1).shuffle(numbers)
    seen = []
    for name, order in (("one", range(EXAMPLES)), ("other", numbers)):
        trainer = make_trainer(
            tmp_path / name,
            fresh_llama(),
            rows_as("tokens", order),
            cls=RecordingTrainer,
            config=config(),
            data_collator=partial(padded, pad=PAD),
        )
        trainer.train()
        seen.append(trainer.seen)
    assert_same_batches(*seen)


def assert_same_batches(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for stage in one:
        assert len(one[stage]) == len(other[stage]), stage
        for left, right in zip(one[stage], other[stage], strict=True):
            assert left.keys() == right.keys()
            assert all(torch.equal(left[name], right[name]) for name in left), stage


def test_regrown_stages_never_see_what_was_deleted(tmp_path):
    def make():
        return make_trainer(
            tmp_path,
            fresh_llama(),
            rows_as("tokens"),  # with the deleted rows still in it
            cls=RecordingTrainer,
            config=config(),
            data_collator=partial(padded, pad=PAD),
        )

    trainer = make()
    trainer.train()
    table = members(tmp_path)
    gone = [min(table[0, 0]), min(table[1, 1])]
    trainer.s3t_model.unlearn(gone)
    for again in (trainer, make()):
        again.seen = {}
        again.train()
        if again is trainer:
            assert set(again.seen) == {"shard-0/0", "shard-0/0-1", "shard-1/0-1"}
            tokens = set().union(*map(count_tokens, again.seen.values()))
            for example in gone:
                assert not tokens & set(planted(ids_of(EXAMPLES).index(example)))
            # Everything else was seen.
            left = table[0, 0] | table[0, 1] | table[1, 0] | table[1, 1]
            expected = {ids_of(EXAMPLES).index(example) for example in left - set(gone)}
            assert {token % 100 for token in tokens} == expected
        else:
            assert again.seen == {}, "nothing is missing any more"


# What a stage sees: SFTTrainer


def sft_arguments(output_dir: Path, **changes) -> SFTConfig:
    settings = dict(bf16=False, max_length=64, per_device_train_batch_size=3)
    return training_arguments(output_dir, SFTConfig, **{**settings, **changes})


def sft_trainer(output_dir: Path, tokenizer, form: str, rows=None, **settings) -> RecordingSFTTrainer:
    more = {name: settings.pop(name) for name in ("formatting_func", "eval_dataset") if name in settings}
    return make_trainer(
        output_dir,
        settings.pop("model", None) or fresh_llama(),
        rows if rows is not None else rows_as(form),
        cls=RecordingSFTTrainer,
        config=settings.pop("s3t_config", None) or config(),
        args=sft_arguments(output_dir, **settings),
        processing_class=tokenizer,
        **more,
    )


PACKINGS = {
    "no packing": {},
    "bfd": {"packing": True, "max_length": 40},
    "bfd, truncating": {"packing": True, "max_length": 9},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 9},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 9},
}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("form", ["text", "prompt-completion", "chat", "chat prompt-completion", "tokens"])
def test_a_stage_of_an_sft_trainer_sees_its_own_examples(tmp_path, tokenizer, form, packing):
    trainer = sft_trainer(tmp_path, tokenizer, form, **PACKINGS[packing])
    trainer.train()
    assert set(trainer.seen) == STAGES
    assert_stages_saw_their_own(
        tmp_path,
        trainer.seen,
        truncated="truncating" in packing,
        split="split" in packing,
        # Completions alone bear loss where prompts are told apart, which they are by default.
        answers_only="prompt" in form,
    )
    if PACKINGS[packing]:
        # Packing did pack, a stage at a time: fewer rows than examples.
        rows = sum(batch["input_ids"].numel() for batch in trainer.seen["shard-0/0-1"])
        assert rows <= len(trainer.seen["shard-0/0-1"]) * 3 * PACKINGS[packing]["max_length"]


@pytest.mark.parametrize(
    "settings",
    [
        {"shuffle_dataset": True},
        {"shuffle_dataset": True, **PACKINGS["wrapped"]},
        {"shuffle_dataset": True, **PACKINGS["bfd"]},
        {"train_sampling_strategy": "group_by_length"},
        {"gradient_accumulation_steps": 2, "num_train_epochs": 2},
        {"completion_only_loss": False},
        {"dataset_num_proc": 2},
    ],
    ids=lambda settings: ", ".join(settings),
)
def test_ids_follow_examples_through_sft_settings(tmp_path, tokenizer, settings):
    rows = rows_as("prompt-completion")
    random.Random(2).shuffle(rows)
    trainer = sft_trainer(tmp_path, tokenizer, "prompt-completion", rows, **settings)
    trainer.train()
    assert set(trainer.seen) == STAGES
    assert_stages_saw_their_own(
        tmp_path,
        trainer.seen,
        epochs=settings.get("num_train_epochs", 1),
        answers_only=settings.get("completion_only_loss", True),
    )


def test_a_formatting_function(tmp_path, tokenizer):
    def as_text(row):
        return f"{row['question']} {row['answer']}"

    trainer = sft_trainer(tmp_path, tokenizer, "custom", formatting_func=as_text)
    trainer.train()
    assert_stages_saw_their_own(tmp_path, trainer.seen)


def test_examples_whose_answer_is_truncated_away_are_dropped_and_can_be_unlearned(tmp_path, tokenizer):
    longest = 8
    dropped = {example for number, example in enumerate(ids_of(EXAMPLES)) if len(told_apart(number)[0]) >= longest}
    assert 2 <= len(dropped) <= EXAMPLES - 8
    trainer = sft_trainer(tmp_path, tokenizer, "prompt-completion", max_length=longest)
    trainer.train()
    table = members(tmp_path)
    assert_stages_saw_their_own(tmp_path, trainer.seen, dropped=dropped, truncated=True, answers_only=True)
    # Each stage says how many of its examples it left out.
    for stage in STAGES:
        shard, prefix = stage.removeprefix("shard-").split("/")
        own = set().union(*(table[int(shard), int(s)] for s in prefix.split("-")))
        record = trainer.folder.stage_record(next(key for key in trainer.folder.stages if str(key) == stage))
        assert record["examples_dropped"] == len(own & dropped)
        assert record["counts"] == [len(table[int(shard), int(s)]) for s in prefix.split("-")]
    # They are the system's all the same.
    one = min(dropped)
    (place,) = trainer.s3t_model.locate([one]).values()
    assert trainer.s3t_model.unlearn([one]).deleted == 1
    assert {str(key) for key in trainer.folder.valid_stages} == {
        stage for stage in STAGES if not (int(stage[6]) == place[0] and str(place[1]) in stage.split("/")[1])
    }


def test_a_slice_that_truncation_empties_is_refused(tmp_path, tokenizer):
    with pytest.raises(EmptySliceError, match="max_length"):
        sft_trainer(tmp_path, tokenizer, "prompt-completion", max_length=2)


# What a stage depends on


DROPOUT = dict(attention_dropout=0.2)


def tensors_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {
        f"{path.parent.parent.name}/{path.parent.name}": load_file(path)
        for path in sorted(folder.glob("stages/*/*/adapter_model.safetensors"))
    }


def assert_same_stages(one: dict, other: dict, stages=None) -> None:
    assert one.keys() == other.keys()
    differing = {stage: differing_tensors(one[stage], other[stage]) for stage in stages or one}
    assert not any(differing.values()), {stage: names for stage, names in differing.items() if names}


def rows_of_dropout() -> list[dict[str, Any]]:
    return lm_rows(18)


def dropout_trainer(folder: Path, rows=None, cls=S3TTrainer, args=None, **more) -> S3TTrainer:
    """Two shards, two slices, both orders: eight stages, with dropout everywhere and rows drawn at random."""
    model = more.pop("model", None) or tiny_llama(2, **DROPOUT)
    return make_trainer(
        folder,
        model,
        rows if rows is not None else rows_of_dropout(),
        cls=cls,
        config=config(budget=None, sequence_selection="cyclic"),
        peft_config=lora(model, lora_dropout=0.2, target_modules=["q_proj", "down_proj"]),
        args=training_arguments(folder, **(args or {})),
        **more,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    """The stages of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    dropout_trainer(folder).train()
    tensors = tensors_of(folder)
    assert len(tensors) == 8
    return tensors


def draw_from_every_generator() -> None:
    torch.rand(7)
    np.random.rand(5)
    random.random()


class Meddling(TrainerCallback):
    """Draws random numbers and changes seeds between stages."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps = 0

    def on_train_end(self, args, state, control, **kwargs):
        draw_from_every_generator()
        torch.manual_seed(torch.randint(1000, ()).item())


class ShardsLast(S3TTrainer):
    """Trains all first stages before any second one, and the last shard first."""

    def _first_of_missing(self, current, behind):
        return min(self._missing(current), key=lambda key: (key.depth, -key.shard, key.prefix), default=None)


class DeepestFirst(S3TTrainer):
    """Trains the last sequence of the last shard first."""

    def _first_of_missing(self, current, behind):
        keys = self._missing(current)
        tips = [key for key in keys if key.depth == 2]
        return next((stage for tip in reversed(tips) for stage in tip.lineage if stage in keys), None)


EVALUATION = dict(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=2)


@pytest.mark.parametrize(
    "disturbed",
    [
        {"args": EVALUATION, "eval_dataset": Dataset.from_list(lm_rows(5, seed=8))},
        {"eval_dataset": Dataset.from_list(lm_rows(5, seed=8))},
        {"args": {"logging_strategy": "steps", "logging_steps": 1, "logging_first_step": True}},
        {"args": {"save_strategy": "steps", "save_steps": 1}},
        {"args": {"seed": 7, "data_seed": 9}},
        {"args": {"disable_tqdm": False}},
        {"callbacks": [Meddling()]},
        {"cls": ShardsLast},
        {"cls": DeepestFirst},
        {"rows": rows_of_dropout()[::-1]},
    ],
    ids=lambda d: ", ".join(str(getattr(v, "__name__", k)) for k, v in d.items()),
)
def test_a_stage_does_not_change_by_a_bit(tmp_path, undisturbed, disturbed):
    # Callbacks and datasets are made once for all tests: a trainer gets its own.
    trainer = dropout_trainer(tmp_path, **{k: v if k == "cls" else copy.deepcopy(v) for k, v in disturbed.items()})
    trainer.train()
    assert_same_stages(tensors_of(tmp_path), undisturbed)


def test_serving_between_stages_does_not_change_them(tmp_path, undisturbed):
    """The live model answers, samples and is evaluated while the system grows, in several calls of `train`."""

    class OneStage(S3TTrainer):
        def train(self):
            self.is_done = False
            return super().train()

        def _next_stage(self):
            key, self.is_done = None if self.is_done else super()._next_stage(), True
            return key

    random.seed(3)
    trainer = dropout_trainer(tmp_path, cls=OneStage, eval_dataset=Dataset.from_list(lm_rows(5, seed=8)))
    ids = batch_of(lm_rows(2))["input_ids"]
    for number in range(1, 9):
        trainer.train()
        assert len(tensors_of(tmp_path)) == number
        draw_from_every_generator()
        trainer.s3t_model.generate(ids, max_new_tokens=2, do_sample=True)
        trainer.evaluate()
        trainer.predict(Dataset.from_list(lm_rows(3)))
    assert_same_stages(tensors_of(tmp_path), undisturbed)


def test_other_slices_and_shards_do_not_change_a_stage(tmp_path, undisturbed):
    """Every example of one slice is another; stages that have it differ, all others are the same to the bit."""
    dropout_trainer(tmp_path / "same")  # writes the table
    table = members(tmp_path / "same")
    others = {row["id"]: row for row in lm_rows(18, seed=77)}
    rows = [others[row["id"]] if row["id"] in table[1, 0] else row for row in rows_of_dropout()]
    dropout_trainer(tmp_path / "changed", rows).train()
    changed = tensors_of(tmp_path / "changed")
    without = {"shard-0/0", "shard-0/0-1", "shard-0/1", "shard-0/1-0", "shard-1/1"}
    assert_same_stages(changed, undisturbed, without)
    for stage in undisturbed.keys() - without:
        assert differing_tensors(changed[stage], undisturbed[stage]), stage


def test_the_number_of_examples_elsewhere_does_not_change_a_stage(tmp_path, undisturbed):
    dropout_trainer(tmp_path / "same")
    table = members(tmp_path / "same")
    some = sorted(table[0, 1])[:2]
    dropout_trainer(tmp_path / "fewer", [row for row in rows_of_dropout() if row["id"] not in some]).train()
    assert_same_stages(
        tensors_of(tmp_path / "fewer"), undisturbed, {"shard-0/0", *(s for s in undisturbed if "shard-1" in s)}
    )


@pytest.mark.parametrize("packing", ["wrapped", "bfd"])
def test_packing_does_not_depend_on_the_order_of_stages(tmp_path, tokenizer, packing):
    """Shuffling before packing is seeded by the stage, not by what was trained before it."""

    class Backwards(RecordingSFTTrainer):
        def _first_of_missing(self, current, behind):
            return min(self._missing(current), key=lambda key: (key.depth, -key.shard), default=None)

    seen = []
    for name, cls in (("forwards", RecordingSFTTrainer), ("backwards", Backwards)):
        trainer = make_trainer(
            tmp_path / name,
            fresh_llama(),
            rows_as("text"),
            cls=cls,
            config=config(),
            args=sft_arguments(tmp_path / name, shuffle_dataset=True, **PACKINGS[packing]),
            processing_class=tokenizer,
        )
        trainer.train()
        seen.append(trainer.seen)
    assert_same_batches({stage: seen[1][stage] for stage in seen[0]}, seen[0])
    assert_same_stages(tensors_of(tmp_path / "forwards"), tensors_of(tmp_path / "backwards"))


# What a stage trains, and what it computes


class Watch(TrainerCallback):
    """
    Notes during training which layers' outputs require gradients, which parameters are trainable and which have
    gradients when the optimizer steps.
    """

    def __init__(self, trainer: S3TTrainer):
        self.trainer = trainer
        self.outputs: dict[tuple[int, ...], dict[int, set[bool]]] = {}
        self.trainable: dict[str, set[str]] = {}
        self.with_gradients: dict[str, set[str]] = {}
        self.nonzero: dict[str, set[str]] = {}
        self.reached_embeddings = False
        layers = trainer.model.get_submodule(stack_of(trainer).layers.path)
        for index, layer in enumerate(layers):
            layer.register_forward_hook(partial(self._note, index))
        # The last to see what leaves the embeddings, after hooks that make it require gradients.
        try:
            embeddings = trainer.model.get_input_embeddings()
        except NotImplementedError:
            embeddings = None
        if embeddings is not None:
            layers[0].register_forward_pre_hook(self._watch_embeddings, with_kwargs=True, prepend=True)
        trainer.add_callback(self)

    def _note(self, index: int, layer, args, output):
        if stack_of(self.trainer).in_training is not None and torch.is_grad_enabled():
            hidden = output[0] if isinstance(output, tuple) else output
            by_layer = self.outputs.setdefault(stack_of(self.trainer).in_training.prefix, {})
            by_layer.setdefault(index, set()).add(hidden.requires_grad)

    def _watch_embeddings(self, layer, args, kwargs):
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                value.register_hook(self._embeddings_reached)

    def _embeddings_reached(self, gradient):
        self.reached_embeddings = True

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        stage = str(stack_of(self.trainer).in_training)
        for noted, holds in (
            (self.trainable, lambda p: p.requires_grad),
            (self.with_gradients, lambda p: p.grad is not None),
            (self.nonzero, lambda p: p.grad is not None and p.grad.abs().max() > 0),
        ):
            noted.setdefault(stage, set()).update(n for n, p in self.trainer.model.named_parameters() if holds(p))

    def check(self, depths: int, head: tuple[str, ...] = ()) -> None:
        groups = stack_of(self.trainer).layers.groups
        assert {len(prefix) for prefix in self.outputs} == set(range(1, depths + 1))
        for prefix, by_layer in self.outputs.items():
            lowest = min(groups[len(prefix) - 1])
            expected = {index: {index >= lowest} for index in range(stack_of(self.trainer).layers.num_layers)}
            assert by_layer == expected, prefix
        assert not self.reached_embeddings
        for stage, names in self.trainable.items():
            shard, prefix = stage.removeprefix("shard-").split("/")
            adapter = f"shard{shard}_{prefix.replace('-', '_')}"
            assert names and all(f".{adapter}." in name for name in names), stage
            layers = stack_of(self.trainer).layers.module_names(prefix.count("-"))
            for name in names:
                assert name.startswith((*(f"{layer}." for layer in layers), *(f"{h}." for h in head))), name
            # All of them take part.
            assert self.with_gradients[stage] == names, stage
            # At the first steps A has no gradient while B is zero; afterwards both have.
            assert self.nonzero[stage] == names, stage


def eight_bit(folder: Path):
    tiny_llama(4, hidden_size=32, intermediate_size=64, vocab_size=WORDS).save_pretrained(folder / "base")
    quantization = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=quantization)


def with_input_gradients(model):
    model.enable_input_require_grads()
    return model


def tiny_wav2vec2(**changes):
    """A speech classifier, whose feature extractor makes what it puts out require gradients."""
    return build(
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        conv_dim=(8, 8),
        conv_stride=(4, 4),
        conv_kernel=(4, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
        num_labels=3,
        layerdrop=0.0,
        mask_time_prob=0.0,
        **changes,
    )


def audio_rows(count: int = 12) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"id": example, "input_values": torch.randn(200, generator=generator).tolist(), "labels": number % 3}
        for number, example in enumerate(ids_of(count))
    ]


CHECKPOINTING = {"gradient_checkpointing": True}
WATCHED = {
    "llama": (lambda folder: tiny_llama(4), {}, ()),
    "llama, checkpointing": (lambda folder: tiny_llama(4), CHECKPOINTING, ()),
    "llama, input gradients": (lambda folder: with_input_gradients(tiny_llama(4)), {}, ()),
    "llama, both": (lambda folder: with_input_gradients(tiny_llama(4)), CHECKPOINTING, ()),
    "gpt2, both": (lambda folder: with_input_gradients(tiny_gpt2(4)), CHECKPOINTING, ()),
    "roberta": (lambda folder: tiny_roberta(4), {}, ("classifier",)),
    "roberta, both": (lambda folder: with_input_gradients(tiny_roberta(4)), CHECKPOINTING, ("classifier",)),
    "wav2vec2": (lambda folder: tiny_wav2vec2(), {}, ("projector", "classifier")),
    "wav2vec2, checkpointing": (lambda folder: tiny_wav2vec2(), CHECKPOINTING, ("projector", "classifier")),
    "8 bit": (eight_bit, {}, ()),
    "8 bit, checkpointing": (eight_bit, CHECKPOINTING, ()),
    "8 bit, prepared": (lambda folder: prepare_model_for_kbit_training(eight_bit(folder)), {}, ()),
    "8 bit, prepared, checkpointing": (
        lambda folder: prepare_model_for_kbit_training(eight_bit(folder)),
        CHECKPOINTING,
        (),
    ),
}


@pytest.mark.parametrize("name", WATCHED)
def test_layers_below_the_trained_group_build_no_graph(tmp_path, name):
    make, settings, head = WATCHED[name]
    model = make(tmp_path)
    rows = audio_rows() if "wav2vec2" in name else None
    trainer = make_trainer(
        tmp_path / "system",
        model,
        rows,
        config=config(num_shards=1, num_slices=2, layers_per_slice=[1, 2]),
        args=training_arguments(tmp_path / "system", max_steps=3, **settings),
    )
    watch = Watch(trainer)
    trainer.train()
    watch.check(depths=2, head=head)


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": False}], ids=["defaults", "no checkpointing"])
def test_layers_below_the_trained_group_build_no_graph_in_sft(tmp_path, tokenizer, settings):
    """By default SFTTrainer checkpoints activations and makes the embeddings require gradients."""
    trainer = sft_trainer(
        tmp_path,
        tokenizer,
        "text",
        model=fresh_llama(3),
        s3t_config=config(num_shards=1, num_slices=3, sequence_selection=[[0, 1, 2]]),
        max_steps=3,
        **settings,
    )
    assert trainer.args.gradient_checkpointing == (not settings)
    watch = Watch(trainer)
    trainer.train()
    watch.check(depths=3)


def test_the_watch_sees_a_graph_where_there_is_one(tmp_path):
    """Otherwise the tests above could not fail: PEFT by itself builds one down to the embeddings."""
    trainer = make_trainer(
        tmp_path,
        with_input_gradients(tiny_llama(4)),
        config=config(num_shards=1),
        args=training_arguments(tmp_path, max_steps=1, **CHECKPOINTING),
    )
    first = trainer.model.get_submodule("model.layers.0")
    first._forward_pre_hooks.clear()
    first._forward_pre_hooks_with_kwargs.clear()
    watch = Watch(trainer)
    trainer.train()
    assert watch.reached_embeddings
    assert watch.outputs[0,][0] == {True}


def test_checkpointing_that_needs_gradients_at_the_input_is_refused(tmp_path):
    """Reentrant checkpointing, enabled by the user beforehand: adapters would stay what they are, without a word."""
    model = tiny_bert(2)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ConfigError, match="use_reentrant"):
        make_trainer(tmp_path, model)
    with pytest.raises(ConfigError, match="use_reentrant"):
        make_trainer(
            tmp_path,
            tiny_bert(2),
            args=training_arguments(
                tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
            ),
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", [tiny_llama, tiny_roberta], ids=["llama", "roberta"])
def test_training_a_stage_changes_nothing_but_the_stage(tmp_path, make):
    """Base, other stages and what serves are the same to the bit before and after each stage."""

    class Checking(S3TTrainer):
        def _train_stage(self, key, *args, **kwargs):
            before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            output = super()._train_stage(key, *args, **kwargs)
            after = self.model.state_dict()
            kept = {name for name in before if name in after}
            # The base is wrapped at its first stage; its tensors keep their values under new names.
            renamed = {
                name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
                for name, tensor in after.items()
            }
            base = {n: t for n, t in before.items() if f".{key.adapter_name}." not in n and ".shard" not in n}
            assert len(base) > 20
            for name, tensor in base.items():
                plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
                assert torch.equal(renamed[plain], tensor), name
            for name in kept:
                assert torch.equal(after[name], before[name]), name
            new = {name for name in after if name not in before and ".shard" in name}
            assert any(f".{key.adapter_name}." in name for name in new)
            self.checked = getattr(self, "checked", 0) + 1
            return output

    trainer = make_trainer(
        tmp_path,
        make(2),
        cls=Checking,
        config=config(budget=2, sequence_selection="cyclic"),
        args=training_arguments(tmp_path, max_steps=2, weight_decay=0.1),
    )
    pristine = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    assert trainer.checked == 8
    # Of each file as of the base: what was written stays.
    plain = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in trainer.model.state_dict().items()
    }
    assert all(torch.equal(plain[name], tensor) for name, tensor in pristine.items())
    for key in trainer.folder.stages:
        record = trainer.folder.stage_record(key)
        assert record["frozen_before"] == record["frozen_after"]


# Heads


class HeadsAtStart(TrainerCallback):
    """Keeps the head of every stage as it is when training begins."""

    def __init__(self):
        self.heads: dict[str, dict[str, torch.Tensor]] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        names = {n: p for n, p in model.named_parameters() if p.requires_grad and ".modules_to_save." in n}
        (adapter,) = {name.split(".modules_to_save.")[1].split(".")[0] for name in names}
        self.heads[adapter] = {
            name.replace(f".modules_to_save.{adapter}.", "."): tensor.detach().clone()
            for name, tensor in names.items()
        }


def head_of(tensors: dict[str, torch.Tensor], head: str = "classifier") -> dict[str, torch.Tensor]:
    prefix = f"base_model.model.{head}."
    return {n.removeprefix("base_model.model."): t for n, t in tensors.items() if n.startswith(prefix)}


def head_starts(folder: Path, seed: int, model: nn.Module) -> tuple[S3TTrainer, dict]:
    starts = HeadsAtStart()
    trainer = make_trainer(
        folder,
        model,
        config=config(budget=2, sequence_selection="cyclic", seed=seed),
        args=training_arguments(folder, max_steps=2, learning_rate=0.05),
        callbacks=[starts],
    )
    trainer.train()
    return trainer, starts.heads


def test_heads_start_from_the_seed_or_from_the_stage_below(tmp_path):
    # A head that came with the base counts for nothing.
    with_head = tiny_roberta(2)
    with torch.no_grad():
        for parameter in with_head.classifier.parameters():
            parameter.fill_(3.0)
    trainer, starts = head_starts(tmp_path / "one", 5, with_head)
    _, again = head_starts(tmp_path / "again", 5, tiny_roberta(2))
    _, other = head_starts(tmp_path / "other", 6, tiny_roberta(2))
    stages = tensors_of(tmp_path / "one")
    names = {"classifier.dense.weight", "classifier.dense.bias", "classifier.out_proj.weight"} | {
        "classifier.out_proj.bias"
    }
    first = starts["shard0_0"]
    assert first.keys() == names
    assert first["classifier.dense.weight"].std() > 0
    for adapter, head in starts.items():
        parts = adapter.removeprefix("shard").split("_")
        if len(parts) == 2:
            # The same in every first stage, of every shard; another for another seed.
            assert not differing_tensors(head, first), adapter
            assert not differing_tensors(again[adapter], first)
            assert differing_tensors(other[adapter], first)
        else:
            parent = head_of(stages[f"shard-{parts[0]}/{parts[1]}"])
            assert parent.keys() == names
            assert not differing_tensors(head, parent), adapter
            assert differing_tensors(head, first), "a stage's head was trained"
    assert len(starts) == 8
    # And every stage trains its own.
    for stage, tensors in stages.items():
        adapter = stage.replace("shard-", "shard").replace("/", "_").replace("-", "_")
        assert differing_tensors(head_of(tensors), starts[adapter]), stage
    assert trainer.s3t_model.status()["depths"] == [2, 2]


def test_the_head_that_answers_is_the_last_surviving_stages(tmp_path):
    rows = classification_rows()
    trainer = make_trainer(tmp_path, tiny_roberta(2), rows, config=config(num_shards=1))
    plant_stages(trainer)
    model = trainer.s3t_model
    inputs = {name: value for name, value in batch_of(rows[:4]).items() if name != "labels"}
    features = []
    model.base_model.get_submodule("classifier").register_forward_pre_hook(
        lambda module, args: features.append(args[0].detach().clone())
    )
    table = members(tmp_path)
    for stage in ("0-1", "0"):
        answer = model(**inputs).logits
        tensors = head_of(tensors_of(tmp_path)[f"shard-0/{stage}"])
        # RoBERTa's head: the first token through a layer, tanh and another layer.
        hidden = torch.tanh(
            features[-1][:, 0] @ tensors["classifier.dense.weight"].T + tensors["classifier.dense.bias"]
        )
        expected = hidden @ tensors["classifier.out_proj.weight"].T + tensors["classifier.out_proj.bias"]
        assert torch.allclose(answer, expected, atol=1e-6), stage
        model.unlearn([min(table[0, 1] if stage == "0-1" else table[0, 0])])
    assert model.is_exhausted


def test_a_norm_in_a_head_starts_as_a_norm(tmp_path):
    """Of whatever class: zeros would leave a head that answers nothing."""

    class MyRMSNorm(nn.Module):
        def __init__(self, size: int):
            super().__init__()
            self.weight = nn.Parameter(torch.full((size,), 7.0))

        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight

    model = tiny_bert(2)
    model.classifier = nn.Sequential(MyRMSNorm(16), nn.LayerNorm(16), nn.Linear(16, 3))
    trainer = make_trainer(tmp_path, model, config=config(num_shards=1))
    assert torch.equal(trainer.model.classifier[0].weight, torch.ones(16))
    assert torch.equal(trainer.model.classifier[1].weight, torch.ones(16))
    assert torch.equal(trainer.model.classifier[1].bias, torch.zeros(16))
    assert trainer.model.classifier[2].weight.std() > 0


def test_a_system_trained_in_a_fresh_process_is_the_same(tmp_path, undisturbed):
    """Seeds and generators of the process do not matter: here all of them are somewhere else."""
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        torch.manual_seed(12345)
        np.random.seed(12345)
        random.seed(12345)
        dropout_trainer(tmp_path).train()
    finally:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])
        random.setstate(state[2])
    assert_same_stages(tensors_of(tmp_path), undisturbed)


def test_dropout_was_on(tmp_path, undisturbed):
    """The tests of bits above mean something only if training draws random numbers."""
    model = tiny_llama(2, attention_dropout=0.0)
    trainer = make_trainer(
        tmp_path,
        model,
        rows_of_dropout(),
        config=config(budget=None, sequence_selection="cyclic"),
        peft_config=lora(model, target_modules=["q_proj", "down_proj"]),
    )
    trainer.train()
    tensors = tensors_of(tmp_path)
    assert all(differing_tensors(tensors[stage], undisturbed[stage]) for stage in undisturbed)


def test_loaded_stages_are_the_trained_ones(tmp_path):
    """What a trainer serves, and what is loaded from its folder, are bit for bit the same."""
    trainer = make_trainer(tmp_path, tiny_roberta(2), config=config(), args=training_arguments(tmp_path, max_steps=2))
    trainer.train()
    loaded = S3TModel.from_pretrained(tmp_path, base_model=tiny_roberta(2))
    batch = batch_of(classification_rows(4))
    assert torch.equal(trainer.s3t_model(**batch).logits, loaded(**batch).logits)


def test_lora_on_the_layers_of_a_stage_only(tmp_path):
    """A stage's file holds tensors of its own layers, as its adapter config says."""
    trainer = make_trainer(
        tmp_path,
        tiny_llama(4),
        config=config(num_shards=1, layers_per_slice=[1, 2]),
        args=training_arguments(tmp_path),
    )
    plant_stages(trainer)
    for stage, layers in (("0", {3}), ("0-1", {1, 2})):
        names = load_file(tmp_path / "stages" / "shard-0" / stage / "adapter_model.safetensors")
        assert {int(name.split(".layers.")[1].split(".")[0]) for name in names} == layers
        adapter = LoraConfig.from_pretrained(tmp_path / "stages" / "shard-0" / stage)
        assert set(adapter.layers_to_transform) == layers
