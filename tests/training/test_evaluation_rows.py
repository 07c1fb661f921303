"""Where evaluation chooses, it chooses by no training example, however the rows are stored and shown."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from support.tiny import (
    classification_rows,
    image_rows,
    lm_rows,
    make_trainer,
    s3t_config,
    tiny_bert,
    tiny_llama,
    tiny_vit,
    training_arguments,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast
from trl import SFTConfig

from hf_s3t import S3TSFTTrainer
from hf_s3t.errors import IsolationError


CHOOSES = dict(load_best_model_at_end=True, eval_strategy="epoch", save_strategy="epoch")
ROWS = classification_rows(12)
OTHERS = classification_rows(6, seed=9)


def without_ids(rows):
    return [{name: value for name, value in row.items() if name != "id"} for row in rows]


def padded(row, length=16):
    """A row as a tokenizer pads it."""
    missing = length - len(row["input_ids"])
    return {
        "input_ids": row["input_ids"] + [0] * missing,
        "attention_mask": [1] * len(row["input_ids"]) + [0] * missing,
        "token_type_ids": [0] * length,
        "labels": row["labels"],
    }


class Rows(torch.utils.data.Dataset):
    """Rows as tensors, or as something else."""

    def __init__(self, rows, show=lambda row: {name: torch.tensor(value) for name, value in row.items()}):
        self.rows, self.show = rows, show

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.show(self.rows[index])


class Stream(torch.utils.data.IterableDataset):
    """Rows one after the other."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def narrow(rows):
    """Stored in half the width, or less."""
    features = {"input_ids": List(Value("int16")), "attention_mask": List(Value("int8")), "labels": Value("int32")}
    return Dataset.from_list(rows, features=Features(features))


def transformed(rows):
    return Dataset.from_list(rows).with_transform(
        lambda batch: {name: [torch.tensor(value) for value in values] for name, values in batch.items()}
    )


STORED = {
    "as they are": Dataset.from_list,
    "with a column beside": lambda rows: Dataset.from_list([{**row, "source": "web"} for row in rows]),
    "with a column less": lambda rows: Dataset.from_list(rows).remove_columns("attention_mask"),
    "cast": narrow,
    "padded": lambda rows: Dataset.from_list(list(map(padded, rows))),
    "the label by another name": lambda rows: Dataset.from_list(rows).rename_column("labels", "label"),
    "as tensors": Rows,
    "as arrays": lambda rows: Rows(rows, lambda row: {n: np.asarray(v, np.int32) for n, v in row.items()}),
    "as floats": lambda rows: Rows(rows, lambda row: {**row, "labels": float(row["labels"])}),
    "formatted": lambda rows: Dataset.from_list(rows).with_format("torch"),
    "by a transform": transformed,
    "as part of another": lambda rows: torch.utils.data.Subset(Rows([*OTHERS_AS_ROWS, *rows]), [1, 7, 8]),
    "a stream": Stream,
    "by one name of several": lambda rows: {"held out": Dataset.from_list(OTHERS_AS_ROWS), "more": Rows(rows)},
}
OTHERS_AS_ROWS = without_ids(OTHERS)


def trainer_of(path, eval_dataset, rows=ROWS, model=None, **more):
    # Of several sets, one decides.
    decides = {"metric_for_best_model": f"{next(iter(eval_dataset))}_loss"} if isinstance(eval_dataset, dict) else {}
    settings = dict(config=s3t_config(budget=1), args=training_arguments(path, **CHOOSES, **decides))
    return make_trainer(path, model or tiny_bert(2), rows, eval_dataset=eval_dataset, **{**settings, **more})


@pytest.mark.parametrize("stored", STORED)
def test_training_examples_are_found_however_they_are_stored(stored, tmp_path):
    given = STORED[stored](without_ids(ROWS[:3] if stored != "as part of another" else ROWS))
    with pytest.raises(IsolationError, match=r"`eval_dataset` holds \d+ training examples?,"):
        trainer_of(tmp_path / "system", given)
    assert not (tmp_path / "system").exists()


@pytest.mark.parametrize("stored", STORED)
def test_other_rows_pass(stored, tmp_path):
    trainer_of(tmp_path / "system", STORED[stored](OTHERS_AS_ROWS * 2))


def test_they_are_found_among_tensors_too(tmp_path):
    """A dataset of torch to train on: row numbers are the ids."""
    config = s3t_config(budget=1, id_column=None)
    with pytest.raises(IsolationError, match="`eval_dataset` holds 3 training examples"):
        trainer_of(tmp_path / "a", Dataset.from_list(without_ids(ROWS[:3])), Rows(without_ids(ROWS)), config=config)
    trainer_of(tmp_path / "b", Dataset.from_list(OTHERS_AS_ROWS), Rows(without_ids(ROWS)), config=config)


def test_a_row_that_is_told_apart_by_its_label_alone_is_another(tmp_path):
    other = [{**row, "labels": (row["labels"] + 1) % 3} for row in without_ids(ROWS[:3])]
    trainer_of(tmp_path / "system", Dataset.from_list(other))


def test_labels_that_say_the_words_again_are_no_difference(tmp_path):
    words = Dataset.from_list([{"input_ids": row["input_ids"]} for row in lm_rows(3)])
    with pytest.raises(IsolationError, match="`eval_dataset` holds 3 training examples"):
        trainer_of(tmp_path, words, lm_rows(12), tiny_llama(2))


@pytest.mark.parametrize("masked", ["training", "evaluation"])
def test_words_that_the_loss_passes_over_are_no_difference(masked, tmp_path):
    """An answer trained on without its prompt, and evaluated with it, is one example."""
    rows = lm_rows(12)
    less = [{**row, "labels": [-100] * 4 + row["input_ids"][4:]} for row in rows]
    train, evaluation = (less, rows) if masked == "training" else (rows, less)
    with pytest.raises(IsolationError, match="`eval_dataset` holds 3 training examples"):
        trainer_of(tmp_path, Dataset.from_list(without_ids(evaluation[:3])), train, tiny_llama(2))


@pytest.mark.parametrize("cast", [np.float32, np.float64])
def test_images_are_compared_in_single_precision(cast, tmp_path):
    shown = Rows(
        without_ids(image_rows(3)), lambda row: {**row, "pixel_values": np.asarray(row["pixel_values"], cast)}
    )
    with pytest.raises(IsolationError, match="`eval_dataset` holds 3 training examples"):
        trainer_of(tmp_path, shown, image_rows(12), tiny_vit(2))


TEXTS = [f"w{number} w{number + 7} w{number + 2}" for number in range(5, 25)]


@pytest.fixture
def tokenizer():
    words = {"[PAD]": 0, "[UNK]": 1, "</s>": 2, **{f"w{number}": number for number in range(3, 60)}}
    own = Tokenizer(models.WordLevel(words, "[UNK]"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="[PAD]", eos_token="</s>")


@pytest.mark.parametrize("packing", [False, True], ids=["row by row", "packed"])
def test_texts_are_compared_as_tokens(tokenizer, tmp_path, packing):
    """With a column beside, or other spaces; packed, rows are compared as they are before."""
    train = [{"id": f"row-{number}", "text": text} for number, text in enumerate(TEXTS[:12])]

    def trainer(name, texts, **columns):
        args = training_arguments(tmp_path / name, SFTConfig, bf16=False, max_length=8, packing=packing, **CHOOSES)
        evaluation = Dataset.from_list([{"text": text, **columns} for text in texts])
        return trainer_of(
            tmp_path / name,
            evaluation,
            train,
            tiny_llama(2),
            cls=S3TSFTTrainer,
            args=args,
            processing_class=tokenizer,
        )

    with pytest.raises(IsolationError, match="`eval_dataset` holds 2 training examples"):
        trainer("the same", TEXTS[10:14], source="web")
    # Other spaces are the same tokens.
    with pytest.raises(IsolationError, match="`eval_dataset` holds 2 training examples"):
        trainer("spaces", [f" {text} " for text in TEXTS[10:14]])
    trainer("others", TEXTS[12:])


def test_rows_that_the_collator_tokenizes_are_compared_as_it_makes_them(tokenizer, tmp_path):
    class Tokenizes:
        def __call__(self, rows):
            return tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True) | {
                "labels": torch.tensor([row["label"] for row in rows])
            }

    train = [{"id": f"row-{n}", "text": text, "label": n % 3} for n, text in enumerate(TEXTS[:12])]
    more = {"data_collator": Tokenizes(), "args": training_arguments(tmp_path, remove_unused_columns=False, **CHOOSES)}
    evaluation = Rows([{"text": text, "label": n % 3} for n, text in enumerate(TEXTS[:2])], dict)
    with pytest.raises(IsolationError, match="`eval_dataset` holds 2 training examples"):
        trainer_of(tmp_path, evaluation, train, **more)


def test_a_set_that_is_given_later_is_compared_before_training(tmp_path):
    trainer = trainer_of(tmp_path, Dataset.from_list(OTHERS_AS_ROWS))
    trainer.eval_dataset = Rows(without_ids(ROWS[:3]))
    with pytest.raises(IsolationError, match="`eval_dataset` holds 3 training examples"):
        trainer.train()
    assert not trainer.folder.valid_stages


def test_where_evaluation_only_reports_any_rows_will_do(tmp_path):
    trainer = trainer_of(
        tmp_path, Dataset.from_list(without_ids(ROWS[:3])), args=training_arguments(tmp_path, eval_strategy="epoch")
    )
    trainer.train()
    assert trainer.evaluate(Rows(without_ids(ROWS)))["eval_loss"] > 0


def test_a_collator_that_draws_is_asked_nothing_where_the_rows_are_inputs(tmp_path):
    words = {"[PAD]": 0, "[MASK]": 1, "[UNK]": 2, **{f"w{number}": number for number in range(3, 60)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "[UNK]")), pad_token="[PAD]", mask_token="[MASK]"
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    words = Dataset.from_list([{"input_ids": row["input_ids"]} for row in lm_rows(3)])
    rows = [{"id": row["id"], "input_ids": row["input_ids"]} for row in lm_rows(12)]
    with pytest.raises(IsolationError, match="`eval_dataset` holds 3 training examples"):
        trainer_of(tmp_path, words, rows, tiny_llama(2), data_collator=collator)
