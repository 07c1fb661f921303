"""The classification recipes: every task's data path, what bad input gets, and whole runs on tiny models."""

import json
import pickle
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import deletion_study
import image_classification as images
import numpy as np
import pretrain_vit
import pytest
import text_classification as texts
import torch
import yaml
from common import classification, command_line, image_task, text_task
from common.forgetting import named
from common.images import Shown
from common.options import CONFIGS
from common.rows import Source, by_hash, sample, split_off
from common.scores import answers, check_metrics, score, shown_predictions
from common.tasks import IMAGE_TASKS, TEXT_TASKS
from common.texts import tokenize
from common.vit_pretraining import Settings, training_images
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from support.launched import launched
from support.tiny import IMAGE_SIZE, make_trainer, rows_for, tiny_bert, tiny_roberta, tiny_vit, training_arguments
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

from hf_s3t import S3TModel
from hf_s3t.baselines import METHODS
from hf_s3t.errors import ConfigError, S3TError, UnknownExampleError
from hf_s3t.folder.system import SystemFolder


RECIPES = Path(texts.__file__).parent
pytestmark = pytest.mark.usefixtures("one_thread")
COLA_COLUMNS = ["source", "label", "mark", "sentence"]
WORDS = "red green blue one two three cat dog bird runs sleeps sings because so not ?".split()
PAPER = ["sst2", "cola", "stsb", "qnli", "qqp", "mrpc", "mnli", "rte", "wic", "cb", "copa", "boolq", "multirc"]


# Invented rows in the layout that the benchmarks have on the Hub


def sentence(number: int) -> str:
    return " ".join(WORDS[(number * k) % len(WORDS)] for k in (1, 3, 5, 7))


def invented(task: str, count: int = 12) -> Dataset:
    """Rows as `load_dataset` gives them."""
    layouts = {
        "sst2": ["sentence"],
        "cola": ["sentence"],
        "stsb": ["sentence1", "sentence2"],
        "qnli": ["question", "sentence"],
        "qqp": ["question1", "question2"],
        "mrpc": ["sentence1", "sentence2"],
        "mnli": ["premise", "hypothesis"],
        "rte": ["premise", "hypothesis"],
        "wic": ["word", "sentence1", "sentence2"],
        "cb": ["premise", "hypothesis"],
        "copa": ["premise", "choice1", "choice2"],
        "boolq": ["question", "passage"],
        "multirc": ["paragraph", "question", "answer"],
        "trec": ["text"],
    }
    labels = TEXT_TASKS[task].labels
    rows = []
    for number in range(count):
        row = {column: sentence(number + place) for place, column in enumerate(layouts[task])}
        row["label"] = number % 6 * 0.9 if labels is None else number % len(labels)
        row["idx"] = number
        if task == "copa":
            row["question"] = ("cause", "effect")[number % 2]
        if task == "multirc":
            row["idx"] = {"paragraph": number // 4, "question": number // 2, "answer": number}
        rows.append(row)
    dataset = Dataset.from_list(rows)
    if labels is not None:
        dataset = dataset.cast_column("label", ClassLabel(names=list(labels)))
    return dataset


@pytest.fixture
def on_the_hub(monkeypatch):
    """Has the recipes read invented rows where they would ask the Hub, and notes what they asked for."""
    asked = []

    def read(source, split):
        asked.append((source.name, source.config or source.data_dir, split))
        name = next(t for t in PAPER if TEXT_TASKS[t].dataset.name == source.name and asked[-1][1] == t)
        return invented(name)

    monkeypatch.setattr(Source, "_read_split", read)
    return asked


@pytest.fixture
def audits_here(monkeypatch):
    """
    Audits take place in this process, with what could be sent to another. That a recipe's has one is tested in
    `test_recipe.py`.
    """

    def here(function, *arguments):
        return pickle.loads(pickle.dumps(function))(*pickle.loads(pickle.dumps(arguments)))

    monkeypatch.setattr(classification, "in_new_process", here)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """The folder of a tiny RoBERTa with a tokenizer of a few words."""
    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{word: n for n, word in enumerate(WORDS, 4)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=64,
    )
    fast.save_pretrained(folder)
    tiny_roberta(2).save_pretrained(folder)
    return str(folder)


def line(encoder, folder, *more) -> list[str]:
    """The command line of a run that takes a moment."""
    return [
        *("--model_name_or_path", encoder, "--output_dir", str(folder / "system"), "--disable_tqdm", "True"),
        *("--num_slices", "2", "--budget", "1", "--lora_r", "2", "--target_modules", "[query, value]"),
        *("--num_train_epochs", "1", "--per_device_train_batch_size", "4", "--learning_rate", "1e-2"),
        *map(str, more),
    ]


def text_options(*argv: str):
    return text_task.read(["--model_name_or_path", "m", "--output_dir", "o", *map(str, argv)])


def load_text(*argv: str):
    options = text_options(*argv)
    return options, *text_task.load_rows(options, text_task.task_of(options))


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# Data paths


@pytest.mark.parametrize("name", PAPER)
def test_every_task_s_rows_become_texts_and_labels(name, on_the_hub):
    options, task, train, evaluation = load_text("--task_name", name)
    assert {split for *_, split in on_the_hub} == {task.dataset.train_split, *task.dataset.eval_splits}
    assert set(evaluation) == set(task.dataset.eval_splits)
    count = 24 if name == "copa" else 12
    pair = ["text_pair"] if len(task.texts) == 2 else []
    assert len(train) == count and len(set(train[options.s3t.id_column])) == count
    assert {"text", *pair, "label"} <= set(train.column_names)
    if task.class_names is None:
        assert all(0 <= label <= 5 for label in train["label"])
    else:
        assert set(train["label"]) <= set(range(len(task.class_names)))
    rows = next(iter(evaluation.values()))
    assert (rows.questions is not None) == (name in ("copa", "multirc"))
    assert options.s3t.group_column == {"copa": "question_id", "multirc": "paragraph_id"}.get(name)


def test_copa_s_choices_are_rows_of_their_question(on_the_hub):
    _, _, train, evaluation = load_text("--task_name", "copa")
    first = train[0], train[1]
    assert [row["idx"] for row in first] == ["0-0", "0-1"] and {row["question_id"] for row in first} == {"0"}
    assert [row["label"] for row in first] == [1, 0]
    assert first[0]["text"] == first[1]["text"] == sentence(0)
    assert first[0]["text_pair"] == f"because {sentence(1)}" and train[2]["text_pair"].startswith("so ")
    assert evaluation["validation"].questions[:4] == ["0", "0", "1", "1"]


def test_multirc_is_grouped_by_paragraph_and_scored_by_question(on_the_hub):
    options, _, train, evaluation = load_text("--task_name", "multirc")
    assert train["paragraph_id"][:5] == ["0", "0", "0", "0", "1"]
    assert evaluation["validation"].questions[:4] == ["0-0", "0-0", "0-1", "0-1"]
    assert train[options.s3t.id_column][5] == "1-2-5"


def test_a_word_in_context_comes_with_its_word(on_the_hub):
    _, _, train, _ = load_text("--task_name", "wic")
    assert train[0]["text"] == f"{sentence(0)}: {sentence(1)}"


@pytest.mark.parametrize("kind", ["json", "csv", "tsv", "parquet", "lines"])
def test_local_files_of_every_kind_are_read(kind, tmp_path):
    rows = [{"topic": "cat" if n % 2 else "dog", "words": f'"{sentence(n)}', "other": "NA"} for n in range(8)]
    path = tmp_path / f"rows.{'jsonl' if kind == 'json' else kind}"
    more = []
    if kind == "json":
        write_jsonl(path, rows)
    elif kind == "csv":
        Dataset.from_list(rows).to_csv(path)
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif kind == "tsv":
        path.write_text("".join(f"{row['topic']}\t{row['words']}\t{row['other']}\n" for row in rows))
        more = ["--column_names", "topic", "words", "other"]
    else:
        path.write_text("".join(f"{row['topic']}:x {row['words']}\n" for row in rows))
        more = ["--line_format", r"(?P<topic>\w+):\S+ (?P<words>.*)"]
    _, task, train, evaluation = load_text(
        *("--dataset_name", path, "--eval_file", path, "--text_columns", "words", "--label_column", "topic"),
        *("--label_set", "cat", "dog", *more),
    )
    assert task.labels == ("cat", "dog") and train["text"][:] == [row["words"] for row in rows]
    assert train["label"][:] == [int(row["topic"] == "dog") for row in rows]
    assert evaluation["evaluation"].references == train["label"][:]


def test_labels_may_be_names_numbers_or_truth_values(tmp_path):
    for labels in (["entailment", "not_entailment"], [0, 1], ["0", "1"], [False, True]):
        rows = [{"premise": "one", "hypothesis": "two", "label": label} for label in labels]
        path = write_jsonl(tmp_path / f"{labels[0]!r}.jsonl", rows)
        _, _, train, _ = load_text("--task_name", "rte", "--dataset_name", path, "--eval_file", path)
        assert train["label"][:] == [0, 1]


def test_labels_that_a_dataset_declares_in_another_order_mean_what_they_say(monkeypatch):
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["positive", "negative"])})
    rows = Dataset.from_dict({"sentence": ["one", "two"], "label": [0, 1]}, features=features)
    monkeypatch.setattr(Source, "_read_split", lambda source, split: rows)
    _, task, train, _ = load_text("--task_name", "sst2")
    assert task.labels == ("negative", "positive") and train["label"][:] == [1, 0]


def declared_as(monkeypatch, names, labels):
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=names)})
    rows = Dataset.from_dict({"sentence": [f"s{n}" for n in range(len(labels))], "label": labels}, features=features)
    monkeypatch.setattr(Source, "_read_split", lambda source, split: rows)


def test_a_declared_label_outside_the_label_set_is_refused_by_its_name(monkeypatch):
    declared_as(monkeypatch, ["positive", "neg"], [0, 1])
    with pytest.raises(ConfigError, match=r"labels outside the label set \(negative, positive\): neg\."):
        load_text("--task_name", "sst2")
    declared_as(monkeypatch, ["Positive", "Negative"], [0, 1])
    with pytest.raises(ConfigError, match=r"outside the label set \(negative, positive\): Negative, Positive\."):
        load_text("--task_name", "sst2")


def test_a_label_set_that_shares_no_name_with_the_declared_ones_names_their_numbers(monkeypatch):
    declared_as(monkeypatch, ["LABEL_0", "LABEL_1"], [1, 0])
    _, task, train, _ = load_text("--task_name", "sst2")
    assert task.labels == ("negative", "positive") and train["label"][:] == [1, 0]


def test_a_task_alone_is_the_paper_s(monkeypatch):
    for recipe, name, model in (
        (text_task, "sst2", "FacebookAI/roberta-large"),
        (image_task, "tiny_imagenet", "google/vit-large-patch16-224-in21k"),
    ):
        alone = recipe.read(["--task_name", name, "--num_train_epochs", "2"])
        by_file = recipe.read(["--config", str(CONFIGS / f"{name}.yaml")])
        assert alone.script == by_file.script and alone.script.model_name_or_path == model
        assert (alone.s3t, alone.lora) == (by_file.s3t, by_file.lora)
        assert alone.training.learning_rate == by_file.training.learning_rate and alone.training.num_train_epochs == 2
    # A model of one's own comes with none of it.
    own = text_task.read(["--task_name", "sst2", "--model_name_or_path", "m"])
    assert own.script.model_name_or_path == "m" and own.lora.r == 8


def test_a_part_of_the_training_rows_is_held_out_by_their_ids_alone(on_the_hub):
    _, _, train, evaluation = load_text("--task_name", "sst2", "--validation_share", "0.25", "--seed", "7")
    _, _, again, _ = load_text("--task_name", "sst2", "--validation_share", "0.25", "--seed", "8")
    held_out = evaluation["held_out"]
    assert len(train) == 9 and len(held_out.ids) == 3
    assert not set(train["idx"]) & set(held_out.ids) and train["idx"][:] == again["idx"][:]
    assert all(split == "train" for *_, split in on_the_hub)


def test_a_group_is_held_out_or_chosen_as_a_whole(on_the_hub):
    _, _, train, evaluation = load_text("--task_name", "copa", "--validation_share", "0.5")
    assert not set(train["question_id"]) & set(evaluation["held_out"].questions)
    _, _, few, _ = load_text("--task_name", "copa", "--max_train_samples", "5")
    assert len(few) == 4 and len(set(few["question_id"])) == 2


def test_what_is_chosen_stays_when_other_rows_leave():
    rows = Dataset.from_dict({"id": list(range(50))})
    fewer = rows.select([i for i in range(50) if i not in by_hash(range(50), "sample")[:3]])
    chosen = set(sample(rows, rows["id"][:], 20)["id"])
    assert len(chosen) == 20 and len(chosen & set(sample(fewer, fewer["id"][:], 20)["id"])) == 17
    kept, off = split_off(rows, rows["id"][:], 0.2, "anything")
    assert len(off) == 10 and sorted([*kept["id"], *off["id"]]) == rows["id"][:]


def test_the_tokens_of_a_row_depend_on_nothing_else(on_the_hub, encoder):
    options, _, train, _ = load_text("--task_name", "qnli", "--max_length", "7")
    options.script.model_name_or_path = encoder
    tokens = tokenize(train, text_task.load_tokenizer(options), options)
    alone = tokenize(train.select([3]), text_task.load_tokenizer(options), options)
    assert tokens[3] == alone[0] and max(map(len, tokens["input_ids"])) <= 7
    columns = {*tokens.column_names, "token_type_ids"}
    assert columns == {"idx", "input_ids", "attention_mask", "token_type_ids", "labels"}


# The real files, where they are


@pytest.mark.parametrize(
    ("folder", "train", "test", "count", "more"),
    [
        ("trec", "TREC.train", "TREC.test", 5452, ["--config", RECIPES / "configs" / "minilm_trec.yaml"]),
        ("sst2", "stsa.binary.train", "stsa.binary.dev", 6920, ["--config", RECIPES / "configs" / "minilm_sst2.yaml"]),
        ("cola", "train.tsv", "dev.tsv", 8551, ["--task_name", "cola", "--column_names", *COLA_COLUMNS]),
        ("rte", "train.tsv", "dev.tsv", 2490, ["--task_name", "rte", "--text_columns", "sentence1", "sentence2"]),
        ("cb", "train.jsonl", "val.jsonl", 250, ["--task_name", "cb"]),
    ],
)  # fmt: skip
def test_the_real_files_are_read(shared_data, folder, train, test, count, more):
    data = shared_data(folder)
    options = ["--dataset_name", data / train, "--eval_file", data / test, "--max_train_samples", "100000"]
    _, task, rows, evaluation = load_text(*more, *options)
    assert len(rows) == count and set(rows["label"]) == set(range(len(task.labels)))
    assert set(evaluation["evaluation"].references) <= set(range(len(task.labels)))


# What bad input gets


def fails(match: str, *argv: str) -> None:
    with pytest.raises(ConfigError, match=match):
        texts.main([*map(str, argv)])


MODEL = ("--model_name_or_path", "a/model/that/is/nowhere")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset_name", "a.csv"], "`--model_name_or_path` is missing. .* such as FacebookAI/roberta-large"),
        (["--task_name", "trec"], "`--model_name_or_path` is missing"),
        ([*MODEL], "Give `--task_name` .*, or `--dataset_name`"),
        ([*MODEL, "--task_name", "sst3"], "`--task_name sst3` is unknown. Choose of sst2"),
        ([*MODEL, "--task_name", "trec"], "no data on the Hub. Give `--dataset_name`"),
        ([*MODEL, "--task_name", "sst2", "--method", "magic"], "`--method magic` is unknown. Choose one of s3t, full"),
        ([*MODEL, "--task_name", "sst2", "--metrics", "pearson"], "scores numbers, and sst2 has 2 classes. Choose of"),
        ([*MODEL, "--task_name", "mnli", "--metrics", "f1"], "scores two classes, and mnli has 3 classes"),
        ([*MODEL, "--task_name", "stsb", "--metrics", "accuracy"], "scores classes, and stsb has numbers"),
        ([*MODEL, "--task_name", "sst2", "--metrics", "copa"], "scores choices of questions"),
        ([*MODEL, "--task_name", "sst2", "--metrics", "bleu"], "`--metrics bleu` is unknown"),
        ([*MODEL, "--task_name", "sst2", "--validation_share", "1.5"], "is no share"),
        ([*MODEL, "--task_name", "sst2", "--dataset_name", "./none.tsv"], "no file or folder ./none.tsv"),
        ([*MODEL, "--task_name", "sst2", "--text_columns", "a", "b", "c"], "one or two columns or templates, got 3"),
        ([*MODEL, "--config", "none.yaml"], "is no file"),
        ([*MODEL, "--task_name", "sst2", "--max_eval_samples", "-1"], "`--max_eval_samples -1` would leave none"),
        ([*MODEL, "--task_name", "sst2", "--max_train_samples", "0"], "`--max_train_samples 0` would leave none"),
        ([*MODEL, "--task_name", "sst2", "--verify", "smaple"], "`--verify smaple` is unknown. Give `sample`"),
        ([*MODEL, "--task_name", "sst2", "--label_set", "a", "b", "a"], "`--label_set` names a more than once"),
        ([*MODEL, "--task_name", "sst2", "--is_regression", "True"], "`--is_regression` does not fit sst2"),
        ([*MODEL, "--task_name", "stsb", "--label_set", "a", "b"], "`--label_set a b` does not fit a regression"),
        ([*MODEL, "--task_name", "sst2", "--text_columns", "{sentence"], "`--text_columns {sentence` is no template"),
        ([*MODEL, "--task_name", "sst2", "--text_columns", "{}"], "must name a column in each pair of braces"),
        ([*MODEL, "--task_name", "sst2", "--text_columns", "{0}"], "must name a column in each pair of braces"),
        ([*MODEL, "--task_name", "sst2", "--dataset_name", ".", "--encoding", "utf-99"], "`--encoding utf-99` is unk"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_read(argv, message):
    fails(message, *argv)


def test_wrong_data_is_refused_before_a_model_is_loaded(tmp_path):
    good = write_jsonl(tmp_path / "good.jsonl", [{"sentence": "one", "label": n % 2} for n in range(4)])
    task = [*MODEL, "--task_name", "sst2", "--output_dir", tmp_path / "system"]
    fails("is one file, and there is nothing to evaluate on. Give `--eval_file`", *task, "--dataset_name", good)
    none = tmp_path / "none.jsonl"
    fails("no file or folder", *task, "--dataset_name", good, "--eval_file", none)
    own = [*MODEL, "--dataset_name", good, "--eval_file", good, "--output_dir", tmp_path / "system"]
    fails("labels .* are not declared, and are not read off its rows.*--label_set", *own, "--text_columns", "sentence")
    fails(
        "lacks title, which the task of your own needs; its columns are sentence, label",
        *(*own, "--text_columns", "title", "--label_set", "a", "b"),
    )
    fails(
        "`--id_column number` is no column",
        *task,
        "--dataset_name",
        good,
        "--eval_file",
        good,
        "--id_column",
        "number",
    )
    fails(
        "`--group_column who` is no column",
        *task,
        "--dataset_name",
        good,
        "--eval_file",
        good,
        "--group_column",
        "who",
    )
    wrong = write_jsonl(tmp_path / "wrong.jsonl", [{"sentence": "one", "label": n} for n in (-1, 0, 1, 2)])
    fails(
        r"2 rows of .* labels outside the label set \(negative, positive\): -1, 2",
        *(*task, "--dataset_name", wrong, "--eval_file", good),
    )
    fails("2 rows of the evaluation rows", *task, "--dataset_name", good, "--eval_file", wrong)
    numbers = write_jsonl(tmp_path / "stsb.jsonl", [{"sentence1": "one", "sentence2": "two", "label": 9.5}])
    fails("numbers from 0 to 5: 9.5", *MODEL, "--task_name", "stsb", "--dataset_name", numbers, "--eval_file", numbers)
    copa = [*MODEL, "--task_name", "copa", "--dataset_name", good, "--eval_file", good]
    fails("lacks premise, choice1, choice2, question, .*layout of SuperGLUE", *copa)
    assert not (tmp_path / "system").exists()


@pytest.mark.parametrize(
    ("idx", "message"),
    [
        (7, "its `idx` is 7, expected the numbers of its paragraph, question and answer"),
        ({"paragraph": 1, "question": 2}, "its `idx` is .*, expected the numbers of its paragraph"),
        ({"paragraph": 1, "question": 2, "answer": None}, "its `idx` is .*'answer': None.*expected"),
    ],
)
def test_a_row_of_multirc_that_does_not_say_its_question_is_refused(idx, message, tmp_path):
    row = {"paragraph": "one", "question": "two", "answer": "cat", "label": 1, "idx": idx}
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    given = ["--task_name", "multirc", "--dataset_name", path, "--eval_file", path]
    fails(f"The row 0 of .*rows.jsonl is none of multirc: {message}", *MODEL, *given)


@pytest.mark.parametrize("question", ["Cause", "why", 3])
def test_a_row_of_copa_that_asks_for_neither_cause_nor_effect_is_refused(question, tmp_path):
    row = {"premise": "one", "choice1": "cat", "choice2": "dog", "question": question, "label": 1, "idx": 5}
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    given = ["--task_name", "copa", "--dataset_name", path, "--eval_file", path]
    fails(f"The row 5 of .* is none of copa: its `question` is {question!r}, expected cause or effect", *MODEL, *given)


def test_a_file_of_an_unknown_kind_is_refused_with_what_its_recipe_takes(tmp_path):
    path = tmp_path / "rows.xyz"
    path.write_text("0 one\n")
    given = ["--dataset_name", path, "--eval_file", path]
    fails(r"ends with none of .json, .jsonl, .csv, .tsv, .parquet\. .*`--line_format`", *MODEL, "--task_name", "sst2",
          *given)  # fmt: skip
    with pytest.raises(ConfigError, match=r"none of .npz, .parquet\. .* a folder with a folder of images") as refused:
        load_images("--task_name", "cifar10", *given)
    assert "--line_format" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"none of .json, .*, .parquet\. Give a file that does\.$"):
        Source(str(path)).read("train")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("rows.jsonl", '{"sentence": "one"}\n{"sentence": ', "cannot be read: JSON parse error"),
        ("rows.jsonl", "", "holds no rows"),
        ("rows.csv", "sentence,label\n", "holds no rows"),
        ("rows.csv", "", "cannot be read: No columns to parse"),
        ("rows.parquet", "x", "cannot be read: Parquet file size is 1 bytes"),
        (
            "rows.jsonl",
            '{"sentence": null, "label": 1}\n{"sentence": "one", "label": 0}\n',
            "1 of 2 rows .* no sentence",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(file, content, message, tmp_path):
    (tmp_path / file).write_text(content)
    given = ["--dataset_name", tmp_path / file, "--validation_share", "0.5", "--output_dir", tmp_path / "system"]
    fails(message, *MODEL, "--task_name", "sst2", *given)


def test_an_id_that_the_hub_does_not_give_is_named(monkeypatch):
    def refuse(*args, **more):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("common.rows.load_dataset", refuse)
    with pytest.raises(ConfigError, match=r"some/data cannot be read: Couldn't reach the Hub. Give the path"):
        Source("some/data").read("train")


def test_what_is_to_be_unlearned_has_the_type_of_the_ids_and_an_id_is_no_group(tmp_path):
    train = Dataset.from_dict({"id": [1, 2, 3], "user": [7, 2, 2]})

    def asked_for(*argv):
        options = text_options("--id_column", "id", "--group_column", "user", *argv)
        return named(options.script, train, options.s3t, tmp_path)

    assert asked_for("--unlearn", "2", "--unlearn_groups", "2", "7") == ([2], [2, 7])
    assert asked_for() == ([], [])
    with pytest.raises(UnknownExampleError, match=r"`--unlearn 7`: .* But `--unlearn_groups` would know them"):
        asked_for("--unlearn", "1", "7")
    with pytest.raises(
        UnknownExampleError, match=r"`--unlearn_groups x`: .* no such groups, theirs are such as 7\. N"
    ):
        asked_for("--unlearn_groups", "x")


def test_a_column_called_id_is_the_ids_and_other_columns_may_be_called_as_ours(tmp_path):
    rows = [{"id": 100 + n, "text": "good", "label": n % 2, "label_text": ["neg", "pos"][n % 2]} for n in range(6)]
    argv = ["--dataset_name", write_jsonl(tmp_path / "a.jsonl", rows), "--text_columns", "text"]
    argv += ["--label_column", "label_text", "--label_set", "neg", "pos", "--validation_share", "0.2"]
    _, _, train, _ = load_text(*argv)
    assert train["id"][:] == [i for i in range(100, 106) if i in train["id"][:]] and set(train["label"][:]) == {0, 1}


def test_a_template_that_a_row_cannot_fill_is_refused(on_the_hub):
    with pytest.raises(ConfigError, match="names choice1, and a row of copa has choice, connective"):
        load_text("--task_name", "copa", "--text_columns", "premise", "choice1")
    with pytest.raises(ConfigError, match=r"a column whose name has a point or a bracket, such as text\.en"):
        load_text("--task_name", "sst2", "--text_columns", "text.en")


def test_a_question_is_evaluated_with_all_of_its_rows(on_the_hub):
    *_, sets = load_text("--task_name", "copa", "--max_eval_samples", "3")
    assert [len(rows.ids) for rows in sets.values()] == [2]


def test_one_value_in_a_file_is_a_list_of_one(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("metrics: f1\nunlearn: [17, 3]\ntext_columns: text\nmodel_name_or_path: m\noutput_dir: o\n")
    script = text_task.read(["--config", str(path)]).script
    assert (script.metrics, script.unlearn, script.text_columns) == (["f1"], ["17", "3"], ["text"])


@pytest.mark.parametrize("recipe", ["text_classification", "pretrain_vit"])
def test_a_refusal_is_one_line_on_the_command_line(recipe, monkeypatch, tmp_path, capsys):
    argv = ["--task_name", "none", "--output_dir", str(tmp_path), *(MODEL if recipe == "text_classification" else ())]
    monkeypatch.setattr(sys, "argv", [recipe, *argv])
    with pytest.raises(SystemExit) as end:
        command_line.run({"text_classification": texts, "pretrain_vit": pretrain_vit}[recipe].main)
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("Error: `--task_name none` is unknown.") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "is no regular expression"),
        (r"\d .*", "no named groups"),
        (r"(?P<label>x) (?P<sentence>.*)", "do not fit .*line 1"),
    ],
)
def test_a_line_format_that_does_not_fit_is_refused(pattern, message, tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("0 one two\n")
    fails(
        message, *MODEL, "--task_name", "sst2", "--dataset_name", path, "--eval_file", path, "--line_format", pattern
    )


def test_another_encoding_is_named(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_bytes("0 crème\n".encode("latin-1"))
    argv = ["--task_name", "sst2", "--dataset_name", path, "--eval_file", path]
    argv += ["--line_format", r"(?P<label>\d) (?P<sentence>.*)"]
    fails("not in utf-8.*--encoding latin-1", *MODEL, *argv)
    assert load_text(*argv, "--encoding", "latin-1")[2]["text"][0] == "crème"


def test_an_unknown_key_of_a_configuration_names_the_nearest(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("task_nam: sst2\n")
    fails(r"`task_nam`, which is no option. Did you mean `task_name`\?", "--config", path)


# Whole runs


def test_a_run_writes_its_results_and_is_not_run_twice(on_the_hub, encoder, tmp_path, capsys):
    argv = line(encoder, tmp_path, "--task_name", "sst2")
    found = texts.main(argv)
    path = tmp_path / "system-results.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(found))
    assert found["method"] == "s3t" and found["seed"] == 42 and found["depths"] == [2]
    assert set(found["metrics"]["validation"]) == {"1", "2"}
    predictions = found["predictions"]["validation"]
    assert len(predictions["by_depth"]["1"]) == len(predictions["references"]) == len(predictions["ids"]) == 12
    right = sum(a == b for a, b in zip(predictions["by_depth"]["2"], predictions["references"], strict=True))
    assert found["metrics"]["validation"]["2"]["accuracy"] == pytest.approx(right / 12, abs=1e-6)
    assert found["cost"]["steps"] == sum(unit["steps"] for unit in found["cost"]["units"]) == 5
    assert found["storage_bytes"] > 0 and found["hardware"]["cpu_cores"] and found["versions"]["torch"]
    assert str(tmp_path) not in json.dumps(found["settings"])
    assert "| validation | 2 | accuracy |" in path.with_suffix(".md").read_text()
    assert "library_name: hf_s3t" in (tmp_path / "system" / "README.md").read_text()
    assert S3TModel.from_pretrained(tmp_path / "system").check() == []
    stamp = path.stat().st_mtime_ns
    assert texts.main(argv) == found and path.stat().st_mtime_ns == stamp
    assert "holds the results of this run already" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ConfigError, match=r"results of another run: .*learning_rate=0.02 \(was 0.01\)"):
        texts.main([*argv, "--learning_rate", "2e-2"])
    assert texts.main([*argv, "--overwrite_results"])["metrics"] == found["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_takes_the_same_command(name, on_the_hub, encoder, tmp_path):
    found = texts.main(line(encoder, tmp_path, "--task_name", "sst2", "--method", name))
    assert found["method"] == name and list(found["metrics"]["validation"]) == (
        ["1"] if name == "full" else ["1", "2"]
    )
    assert found["cost"]["seconds"] > 0 and (tmp_path / "system-results.md").exists()


def test_a_configuration_serves_all_methods_in_folders_of_their_own(tmp_path):
    config = tmp_path / "options.yaml"
    config.write_text("task_name: sst2\noutput_dir: somewhere\n")
    given = ["--config", str(config), "--method", "full"]
    assert text_task.read(given).training.output_dir == "somewhere-full"
    assert text_task.read([*given, "--output_dir", "x"]).training.output_dir == "x"


@pytest.mark.parametrize(
    ("name", "sets", "metrics"),
    [
        ("stsb", ["validation"], {"pearson", "spearman"}),
        ("mnli", ["validation_matched", "validation_mismatched"], {"accuracy"}),
        ("copa", ["validation"], {"accuracy"}),
        ("multirc", ["validation"], {"f1_a", "exact_match"}),
        ("cb", ["validation"], {"accuracy", "macro_f1"}),
    ],
)
def test_tasks_are_scored_as_their_benchmark_scores_them(name, sets, metrics, on_the_hub, encoder, tmp_path):
    found = texts.main(line(encoder, tmp_path, "--task_name", name, "--method", "full"))
    assert list(found["metrics"]) == sets and all(set(found["metrics"][s]["1"]) == metrics for s in sets)
    if name == "copa":
        # Of the six steps of accuracy over twelve questions: not those over rows.
        assert (found["metrics"]["validation"]["1"]["accuracy"] * 12) == pytest.approx(
            round(found["metrics"]["validation"]["1"]["accuracy"] * 12), abs=1e-4
        )
        assert len(found["predictions"]["validation"]["questions"]) == 24


def test_what_was_measured_with_deleted_rows_is_not_kept(on_the_hub, audits_here, encoder, tmp_path):
    argv = line(encoder, tmp_path, "--task_name", "copa", "--budget", "2")
    before = texts.main(argv)
    with pytest.raises(UnknownExampleError):
        texts.main([*argv, "--output_dir", str(tmp_path / "other"), "--unlearn_groups", "77"])
    assert not (tmp_path / "other").exists()
    after = texts.main([*argv, "--unlearn_groups", "3", "--verify", "sample"])
    # A question goes with both its choices.
    assert after["unlearned"]["examples"] == 2 and after["verified"]
    assert before["depths"] == [2] and after["depths"] == [1] and list(after["metrics"]["validation"]) == ["1"]
    assert "3-0" not in json.dumps(after["settings"])


def stages_of(folder: Path) -> dict[str, int]:
    """The stages of a system, with the moments when they were written."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("stages/shard-*/*/stage.json")
    }


def test_a_run_that_forgets_never_grows_what_is_gone(on_the_hub, audits_here, encoder, tmp_path):
    """Deleting again, auditing, or measuring after somebody else's deletion trains nothing and loses no results."""
    argv = line(encoder, tmp_path, "--task_name", "sst2", "--budget", "2", "--num_shards", "2")
    texts.main(argv)
    model = S3TModel.from_pretrained(tmp_path / "system")
    first, second = (model.folder.table.members(shard, 1)[0] for shard in (0, 1))
    found = texts.main([*argv, "--unlearn", str(first)])
    left = stages_of(tmp_path / "system")
    assert found["deletions"] == found["unlearned"]["examples"] == 1 and sorted(found["depths"]) == [1, 2]
    again = texts.main([*argv, "--unlearn", str(first), "--verify", "sample"])
    assert again["unlearned"] == found["unlearned"] and again["metrics"] == found["metrics"] and again["verified"]
    assert texts.main(argv) == again and stages_of(tmp_path / "system") == left
    S3TModel.from_pretrained(tmp_path / "system").unlearn([second])
    measured = texts.main(argv)
    assert measured["depths"] == [1, 1] and measured["deletions"] == 2 and "verified" not in measured
    assert stages_of(tmp_path / "system").items() < left.items()
    with pytest.raises(UnknownExampleError):
        texts.main([*argv, "--unlearn", "100000"])
    # A run that died between the deletion and the end of the measurement.
    results = tmp_path / "system-results.json"
    results.write_text(json.dumps({k: v for k, v in json.loads(results.read_text()).items() if k != "finished"}))
    left = stages_of(tmp_path / "system")
    assert texts.main([*argv, "--unlearn", str(first)])["depths"] == [1, 1] and stages_of(tmp_path / "system") == left
    assert texts.main([*argv, "--overwrite_results", "True"])["depths"] == [2, 2]


@pytest.mark.parametrize("method", ["s3t", "protosisa"])
def test_a_system_with_nothing_left_is_measured_as_far_as_it_answers(method, on_the_hub, encoder, tmp_path):
    argv = line(encoder, tmp_path, "--task_name", "sst2", "--method", method)
    texts.main(argv)
    model = METHODS[method]._model_type.from_pretrained(tmp_path / "system")
    gone = model.folder.table.members(0, model.folder.plan.sequences[0][0][0])[0]
    found = texts.main([*argv, "--unlearn", str(gone), "--verify", "sample"])
    assert found["depths"] == [0] and found["unlearned"]["examples"] == 1 and "verified" not in found
    assert {name: list(by_depth) for name, by_depth in found["metrics"].items()} == (
        {} if method == "s3t" else {"validation": ["0"]}
    )


def test_a_folder_called_as_an_option_is_no_other_run(on_the_hub, encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = line(encoder, Path(), "--task_name", "cb")
    argv[argv.index("system")] = "cb"
    assert texts.main(argv) == texts.main(argv)


# Rows that are added


def more_of(rows, count, **changes) -> list[dict]:
    """Rows behind others, with ids of their own."""
    return [{**rows[n], "id": len(rows) + n, **changes} for n in range(count)]


def added_to(run, argv, write, rows, tmp_path) -> None:
    """A recipe trains, adds the rows of a file, and finds nothing to add when the same command comes again."""
    run.main(argv)
    folder = SystemFolder(tmp_path / "system")
    first, more = len(folder.table), write(tmp_path / "more", more_of(rows, 4))
    argv = [*argv, "--add_file", more, "--add_into", "slices"]
    found = run.main(argv)
    folder.refresh()
    assert len(folder.table) == first + 4 == found["data"]["train_rows"] and not folder.missing_stages()
    left = stages_of(tmp_path / "system")
    again = run.main([*argv, "--verify", "all"])
    assert len(folder.ledger.additions) == 1 and stages_of(tmp_path / "system") == left and again["verified"]


def test_texts_of_a_file_are_added_once_and_audited(encoder, audits_here, tmp_path):
    def write(path, rows):
        return write_jsonl(path.with_suffix(".jsonl"), rows)

    rows = [{"id": n, "sentence": sentence(n), "label": n % 2} for n in range(12)]
    path = write(tmp_path / "rows", rows)
    argv = line(encoder, tmp_path, "--task_name", "sst2", "--dataset_name", path, "--eval_file", path)
    argv += ["--id_column", "id", "--partition", "balanced"]
    with pytest.raises(ConfigError, match=r"no system in .*Train it first, by the same command without"):
        texts.main([*argv, "--add_file", path])
    added_to(texts, argv, write, rows, tmp_path)
    # What came by a file and was deleted since does not come back when the same command comes again.
    more = [*argv, "--add_file", str(tmp_path / "more.jsonl"), "--add_into", "slices"]
    texts.main([*more, "--unlearn", "13"])
    texts.main(more)
    folder = SystemFolder(tmp_path / "system")
    assert len(folder.table) == 15 and folder.is_deleted(13) and len(folder.ledger.additions) == 1
    before, refused = stages_of(tmp_path / "system"), more_of(rows, 2)
    wrong = {
        "outside the label set": [{**refused[0], "id": 90, "label": "sad"}],
        "sentence": [{"id": 91, "label": 1}],
        r"expected ids in `id` among them": [{"sentence": "one", "label": 1}],
        r"The content of 1 example is not what it was at the first training: 0\.": [
            {**rows[0], "sentence": "because so not"}
        ],
    }
    for says, given in wrong.items():
        bad = write(tmp_path / "bad", given)
        with pytest.raises(S3TError, match=says):
            texts.main([*argv, "--add_file", bad])
        assert stages_of(tmp_path / "system") == before and len(SystemFolder(tmp_path / "system").table) == 15


@pytest.mark.slow
def test_studies_take_the_options_of_the_text_recipe(encoder, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"sentence": sentence(n), "label": n % 2} for n in range(24)])
    common = [
        *("--recipe", "text", "--task_name", "sst2", "--dataset_name", path, "--eval_file", path),
        *("--work_dir", str(tmp_path / "work"), "--output", str(tmp_path / "figures"), *line(encoder, tmp_path)),
    ]
    deletion_study.main(["slices", *common, "--layers", "1", "2", "--slices", "1", "2", "--seeds", "1", "2"])
    data = json.loads((tmp_path / "figures" / "figure-13.json").read_text())
    sizes = [(cell["layers_per_slice"], cell["num_slices"]) for cell in data["cells"]]
    assert sizes == [(1, 1), (1, 2), (2, 1)] and data["metric"] == "accuracy" and data["train_rows"] == 24
    assert all(0 < value <= 1 and len(cell["quality"]) == 2 for cell in data["cells"] for value in cell["quality"])
    deletion_study.main(["drop", *common, "--max_depth", "2"])
    runs = json.loads((tmp_path / "figures" / "figure-12.json").read_text())["runs"]
    assert [run["name"] for run in runs] == ["sst2: S3T", "sst2: SISA"]
    assert all(len(run["quality"]) == 2 and run["drop"][0] == 0 for run in runs)
    assert {file.name for file in (tmp_path / "figures").glob("*.png")} == {"figure-12.png", "figure-13.png"}


# Images


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("vit")
    tiny_vit(2, labels=10).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(folder)
    return str(folder)


def test_a_model_that_cannot_be_read_is_said_in_one_line(vit, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_bytes((Path(vit) / "config.json").read_bytes())
    options = ["--task_name", "digits", "--output_dir", str(tmp_path / "system"), "--model_name_or_path"]
    for model, reason in (("nowhere", "there is no such folder"), ("base", "image processor")):
        with pytest.raises(ConfigError, match=f"{model}` cannot be read: .*{reason}.* Give the folder of a model"):
            images.main([*options, str(tmp_path / model)])
    (tmp_path / "base" / "preprocessor_config.json").write_bytes((Path(vit) / "preprocessor_config.json").read_bytes())
    with pytest.raises(ConfigError, match=r"base` cannot be read: .*safetensors"):
        images.main([*options, str(tmp_path / "base")])


@pytest.mark.slow
def test_two_processes_train_measure_and_forget_as_one_system(vit, tmp_path):
    """What one process deletes the other stops serving, and both measure what is left: one file of results."""
    options = [
        *("--task_name", "digits", "--model_name_or_path", vit, "--augmentation", "none", "--use_cpu", "true"),
        *("--max_train_samples", "48", "--max_eval_samples", "20", "--num_shards", "2", "--num_slices", "2"),
        *("--num_train_epochs", "1", "--per_device_train_batch_size", "4", "--disable_tqdm", "true"),
        *("--lora_r", "2", "--target_modules", "[q_proj, v_proj]", "--output_dir", str(tmp_path / "system")),
    ]
    run = {"processes": 2, "environment": {"OMP_NUM_THREADS": "1"}}
    launched(Path(images.__file__), *options, **run)
    file = tmp_path / "system-results.json"
    before = json.loads(file.read_text())
    assert before["depths"] == [2, 2] and before["hardware"]["processes"] == 2
    gone = S3TModel.from_pretrained(tmp_path / "system", base_model=tiny_vit(2, labels=10)).folder.table.members(1, 1)[
        0
    ]
    printed = launched(Path(images.__file__), *options, "--unlearn", str(gone), "--verify", "all", **run)
    after = json.loads(file.read_text())
    assert printed.count("unlearned 1 examples") == 1
    assert sorted(after["depths"]) == [1, 2] and after["unlearned"]["examples"] == 1 and after["verified"]
    assert S3TModel.from_pretrained(tmp_path / "system", base_model=tiny_vit(2, labels=10)).status()["deletions"] == 1


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 10, 10, 3), dtype=np.uint8)


@pytest.fixture(params=["arrays", "encoded", "parquet"])
def image_file(request, tmp_path) -> str:
    """Twelve images of three classes in one file."""
    path, labels = tmp_path / "images.npz", np.arange(12, dtype=np.uint8) % 3
    if request.param == "arrays":
        np.savez(path, images=pixels(12), labels=labels)
        return str(path)
    files = []
    for image in pixels(12):
        buffer = BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        files.append(buffer.getvalue())
    if request.param == "encoded":
        ends = np.cumsum([len(file) for file in files])
        np.savez(path, data=np.frombuffer(b"".join(files), np.uint8), end=ends, label=labels)
        return str(path)
    path = path.with_suffix(".parquet")
    features = Features({"img": ImageFeature(), "label": Value("int64")})
    rows = {"img": [{"bytes": file, "path": None} for file in files], "label": labels.tolist()}
    Dataset.from_dict(rows, features=features).to_parquet(path)
    return str(path)


def load_images(*argv: str):
    options = image_task.read(["--model_name_or_path", "m", "--output_dir", "o", *map(str, argv)])
    return options, *image_task.load_rows(options, image_task.task_of(options))


def test_images_are_read_from_files_of_every_kind(image_file):
    given = ["--task_name", "cifar10", "--dataset_name", image_file, "--eval_file", image_file]
    options, task, train, sets = load_images(*given)
    assert options.s3t.id_column == "id" and len(train) == 12 and list(sets) == ["evaluation"]
    shown = [np.array(image) for image in train[task.image_column]]
    assert train["labels"][:4] == [0, 1, 2, 0] and np.array_equal(shown[5], pixels(12)[5])


def test_images_are_read_from_a_folder_for_each_class(tmp_path):
    for split in ("train", "test"):
        for number, image in enumerate(pixels(4)):
            place = tmp_path / split / ("dog" if number % 2 else "cat")
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{number}.png")
    _, task, train, sets = load_images("--dataset_name", tmp_path)
    assert task.labels == ("cat", "dog") and sorted(train["labels"]) == [0, 0, 1, 1] and list(sets) == ["test"]
    with pytest.raises(ConfigError, match="no split 'validation', but train, test"):
        load_images("--dataset_name", tmp_path, "--eval_split", "validation")


def test_augmentation_follows_from_the_seed_and_leaves_what_is_stored(vit):
    processor = ViTImageProcessorPil.from_pretrained(vit)
    task = IMAGE_TASKS["digits"]
    batch = {"image": [Image.fromarray(image) for image in pixels(3)], "labels": [0, 1, 2]}

    def shown(seed, padding):
        torch.manual_seed(seed)
        return torch.stack(Shown(processor, task, padding)(batch)["pixel_values"])

    assert torch.equal(shown(0, 2), shown(0, 2)) and not torch.equal(shown(0, 2), shown(1, 2))
    assert torch.equal(shown(0, None), shown(1, None))
    assert np.array_equal(np.array(batch["image"][0]), pixels(3)[0])


def image_line(vit, tmp_path, *more) -> list[str]:
    at = line(vit, tmp_path, *more)
    at[at.index("[query, value]")] = "[q_proj, v_proj]"
    return at


def test_images_are_trained_forgotten_and_audited_bit_for_bit(vit, audits_here, tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, images=pixels(16), labels=np.arange(16) % 10)
    argv = image_line(
        *(vit, tmp_path, "--task_name", "cifar10", "--dataset_name", path, "--eval_file", path, "--padding", "2")
    )
    found = images.main([*argv, "--unlearn", "3", "--budget", "2", "--verify", "all"])
    assert found["recipe"] == "image_classification" and found["verified"] and found["unlearned"]["examples"] == 1
    assert len(found["predictions"]["evaluation"]["by_depth"]["1"]) == 16


def test_images_of_a_file_are_added_once_and_audited(vit, audits_here, tmp_path):
    def write(path, rows):
        features = Features({"id": Value("int64"), "image": ImageFeature(), "label": Value("int64")})
        path = path.with_suffix(".parquet")
        Dataset.from_list(rows, features=features).to_parquet(path)
        return str(path)

    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(12)]
    rows = [{"id": n, "image": picture, "label": n % 2} for n, picture in enumerate(pictures)]
    path = write(tmp_path / "rows", rows)
    argv = [
        *("--dataset_name", path, "--eval_file", path, "--image_column", "image", "--label_column", "label"),
        *("--label_set", "one", "two", "--model_name_or_path", vit, "--id_column", "id", "--partition", "balanced"),
        *("--output_dir", str(tmp_path / "system"), "--num_slices", "2", "--budget", "1", "--lora_r", "2"),
        *("--target_modules", "[q_proj, v_proj]", "--num_train_epochs", "1", "--disable_tqdm", "true"),
        *("--per_device_train_batch_size", "4"),
    ]
    added_to(images, argv, write, rows, tmp_path)
    with pytest.raises(S3TError, match="label"):
        images.main([*argv, "--add_file", write(tmp_path / "bad", more_of(rows, 1, id=90, label=7))])
    assert len(SystemFolder(tmp_path / "system").table) == 16


@pytest.mark.slow
def test_a_small_vision_transformer_is_made_here_and_fine_tuned_on_other_images(tmp_path):
    small = ["--hidden_size", "16", "--num_layers", "2", "--num_heads", "2", "--epochs", "1", "--patch_size", "4"]
    folder = pretrain_vit.main(["--output_dir", str(tmp_path / "vit"), *small])
    settings = Settings(folder)
    # The pixels themselves: the two sides may number the images differently.
    used = {image.tobytes() for image in training_images(settings, IMAGE_TASKS["digits"])["image"]}
    _, _, train, _ = load_images("--task_name", "digits", "--leave_out_share", "0.5")
    assert len(used) == 719 and len(train) == 718 and not used & {image.tobytes() for image in train["image"]}
    digits = [
        "--task_name",
        "digits",
        "--leave_out_share",
        "0.5",
        "--max_train_samples",
        "32",
        "--max_eval_samples",
        "9",
    ]
    found = images.main(image_line(folder, tmp_path, *digits))
    assert len(found["predictions"]["test"]["ids"]) == 9


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "Give `--task_name` .*, or `--dataset_name` and `--label_set`"),
        (["--task_name", "cifar11"], "`--task_name cifar11` is unknown"),
        (["--task_name", "digits", "--augmentation", "blur"], "`--augmentation blur` is unknown"),
        (["--task_name", "digits", "--remove_unused_columns", "True"], "would remove the images"),
        (["--task_name", "digits", "--leave_out_share", "1"], "is no share"),
        (["--task_name", "digits", "--metrics", "f1"], "scores two classes, and digits has 10 classes"),
        (["--task_name", "digits", "--label_set", "a", "b"], r"labels outside the label set \(a, b\): 2, 3"),
        (["--task_name", "digits", "--dataset_name", "./none.npz"], "no file or folder"),
        (["--task_name", "digits", "--padding", "-1"], "`--padding -1` is no number of pixels"),
    ],
)
def test_wrong_settings_of_images_are_refused(argv, message):
    with pytest.raises(ConfigError, match=message):
        images.main([*MODEL, *argv])


def test_what_holds_no_images_is_refused(tmp_path):
    share = ["--validation_share", "0.5"]
    broken = tmp_path / "x.npz"
    broken.write_text("x")
    with pytest.raises(ConfigError, match="is no npz file"):
        load_images("--dataset_name", broken, *share)
    with pytest.raises(ConfigError, match=r"cannot be read: The directory .* doesn't contain any data files"):
        (tmp_path / "empty").mkdir()
        load_images("--dataset_name", tmp_path / "empty", *share)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"words": "one", "label": 0}])
    with pytest.raises(ConfigError, match=r"The column words of .* holds no images; those that do: none"):
        load_images("--dataset_name", rows, "--image_column", "words", *share)


def test_the_images_of_the_pretraining_are_left_out_by_their_row_numbers(tmp_path):
    path = tmp_path / "images.parquet"
    features = Features({"img": ImageFeature(), "label": Value("int64"), "name": Value("string")})
    files = [Image.fromarray(image) for image in pixels(12)]
    columns = {"img": files, "label": [0] * 12, "name": [f"n{number}" for number in range(12)]}
    Dataset.from_dict(columns, features=features).to_parquet(path)
    settings = Settings(str(tmp_path), "cifar10", str(path))
    used = set(training_images(settings, IMAGE_TASKS["cifar10"])["name"])
    given = ["--task_name", "cifar10", "--dataset_name", path, "--eval_file", path, "--leave_out_share", "0.5"]
    _, _, train, _ = load_images(*given, "--id_column", "name")
    assert len(used) == len(train) == 6 and not used & set(train["name"])


def test_data_without_the_task_s_images_is_refused_before_a_model_is_pretrained(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"question": "one", "answer": "two"}])
    argv = ["--task_name", "cifar10", "--output_dir", str(tmp_path / "vit"), "--dataset_name"]
    with pytest.raises(ConfigError, match=r"lacks img, label, which the task cifar10 needs; its columns are question"):
        pretrain_vit.main([*argv, rows])
    words = write_jsonl(tmp_path / "words.jsonl", [{"img": "one", "label": 0}])
    with pytest.raises(ConfigError, match=r"The column img of .* holds no images"):
        pretrain_vit.main([*argv, words])
    with pytest.raises(ConfigError, match=r"`--image_sizes` is no option. Did you mean `--image_size`\?"):
        pretrain_vit.main([*argv, words, "--image_sizes", "8"])
    assert not (tmp_path / "vit").exists()


def test_an_npz_file_without_images_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, weights=np.zeros(3))
    with pytest.raises(ConfigError, match=r"holds weights\. Expected `images` and `labels`"):
        load_images("--task_name", "cifar10", "--dataset_name", path, "--eval_file", path)


def test_the_real_images_are_read(shared_data):
    data = shared_data("cifar10")
    _, _, train, sets = load_images(
        *("--task_name", "cifar10", "--dataset_name", data / "cifar10_train2500_jpegs.npz"),
        *("--eval_file", data / "cifar10_test500_jpegs.npz"),
    )
    assert len(train) == 2500 and len(sets["evaluation"]) == 500
    assert train[0]["img"].size == (32, 32) and set(train["labels"]) == set(range(10))


# Configurations


TABLE_2 = {
    "sst2": (7, 3, 16, 1e-5, 10), "cola": (7, 2, 8, 4e-4, 30), "stsb": (7, 3, 16, 1e-4, 30),
    "qnli": (7, 3, 8, 5e-5, 30), "qqp": (7, 3, 16, 5e-5, 30), "mrpc": (7, 3, 16, 5e-5, 30),
    "mnli": (7, 3, 16, 1e-4, 30), "rte": (8, 3, 16, 1e-5, 30), "wic": (12, 2, 16, 1e-4, 30),
    "cb": (12, 2, 16, 1e-4, 30), "copa": (12, 2, 32, 1e-5, 30), "boolq": (7, 3, 16, 1e-4, 30),
    "multirc": (7, 3, 16, 1e-4, 30), "cifar10": (6, 2, 16, 2e-3, 15), "cifar100": (6, 2, 16, 2e-3, 15),
    "tiny_imagenet": (6, 4, 16, 2e-3, 15),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE_2)
def test_the_configurations_have_the_papers_numbers(name):
    is_image = name in IMAGE_TASKS
    recipe = image_task if is_image else text_task
    options = recipe.read(["--config", str(RECIPES / "configs" / f"{name}.yaml")])
    lora, args = options.lora, options.training
    found = (options.s3t.num_slices, options.s3t.layers_per_slice, lora.r, args.learning_rate, args.num_train_epochs)
    assert found == TABLE_2[name]
    assert lora.lora_alpha == 2 * lora.r and lora.use_rslora and lora.lora_dropout == (0.1 if is_image else 0.01)
    assert len(lora.target_modules) == 2
    assert recipe.task_of(options).name == name
    layers = 12 if name.startswith("cifar") else 24
    assert options.s3t.num_slices * options.s3t.layers_per_slice <= layers


def test_every_configuration_is_taken_by_its_recipe():
    for file in (RECIPES / "configs").glob("*.yaml"):
        settings = yaml.safe_load(file.read_text())
        if "task_name" in settings:
            recipe = image_task if settings["task_name"] in IMAGE_TASKS else text_task
            recipe.read(["--config", str(file)])


# Too little of everything


def warned(trainer_args: dict, tmp_path, monkeypatch) -> list[str]:
    said = []
    monkeypatch.setattr("hf_s3t.training.trainer.logger.warning_once", said.append)
    model = tiny_bert(2)
    make_trainer(
        tmp_path / "system", model, rows_for(model, 24), args=training_arguments(tmp_path / "system", **trainer_args)
    )
    return said


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"num_train_epochs": 2}, 6),
        ({"max_steps": 49}, 49),
        ({"num_train_epochs": 17}, None),
        ({"max_steps": 50}, None),
    ],
)
def test_too_few_steps_for_a_stage_are_told_beforehand(given, steps, tmp_path, monkeypatch):
    said = warned(given, tmp_path, monkeypatch)
    assert len(said) == (steps is not None)
    if steps is not None:
        assert "The shortest stage gets" in said[0] and "Raise `num_train_epochs`" in said[0]


def test_scores_of_questions_compare_the_choices():
    task = TEXT_TASKS["copa"]
    scores = np.array([[0.0, 1.0], [0.0, 3.0], [5.0, 1.0], [9.0, 2.0]])
    assert answers(scores, task, "copa").tolist() == [1, 3, -4, -7]
    references, questions = [0, 1, 1, 0], ["a", "a", "b", "b"]
    assert score(scores, references, questions, task) == {"accuracy": 1.0}
    for metrics in (("copa", "accuracy"), ("accuracy", "copa")):
        both = replace(task, metrics=metrics)
        assert score(scores, references, questions, both) == {"copa": 1.0, "accuracy": 0.5}
        assert shown_predictions(scores, both) == [1, 3, -4, -7]
    with_f1 = score(scores, references, questions, replace(task, metrics=("copa", "f1")))
    assert with_f1 == {"accuracy": 1.0, "f1": 0.5}


@pytest.mark.parametrize(("task", "metric"), [("copa", "multirc"), ("multirc", "copa"), ("boolq", "copa")])
def test_a_metric_over_questions_is_for_its_own_task(task, metric):
    with pytest.raises(ConfigError, match=f"`--metrics {metric}` scores .* of questions, and {task} has 2 classes"):
        check_metrics(replace(TEXT_TASKS[task], metrics=("accuracy", metric)))
