"""The gate of a system is made of the prompts of its rows, when the folder is made or later, and of nothing else."""

import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from support.folders import apply
from support.launched import launched
from support.tiny import (
    classification_rows,
    lm_rows,
    make_trainer,
    plant_stages,
    s3t_config,
    tiny_bert,
    tiny_llama,
    tiny_vit,
    training_arguments,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig

from hf_s3t import S3TModel, S3TSFTTrainer, S3TTrainer
from hf_s3t.errors import ConfigError, ContentChangedError
from hf_s3t.folder.layout import GATE_FILE
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.inspection import inspect
from hf_s3t.records.terms import vocabulary_digest
from hf_s3t.training.gate_rows import prompt_tokens


pytestmark = pytest.mark.usefixtures("one_thread")

GATED = s3t_config(num_shards=2, gate="terms", gate_top_k=1, gate_temperature=0.5)
PLAIN = s3t_config(num_shards=2)
# Says which tokens an assistant generates.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }} {% endgeneration %}"
    "{% else %}{{ m.content }} {% endif %}{% endfor %}"
)


def tokenizer(word=lambda number: f"w{number}") -> PreTrainedTokenizerFast:
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    vocabulary = {**{word(number): number for number in range(4, 60)}, "<pad>": 0, "</s>": 2, "<unk>": 3}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE, **named)


def terms_in(folder: SystemFolder) -> dict[str, set[int]]:
    """The terms of each row of the gate by its id."""
    rows, kept = folder.load_gate().rows.settled(), {}
    begins = [0, *rows.ends.tolist()]
    for one in folder.table.rows:
        found = np.flatnonzero((rows.digests == folder.key.of_ids([one])).all(axis=1))
        if not len(found):
            continue
        number = int(found[0])
        kept[one] = set(rows.terms[begins[number] : begins[number + 1]].tolist())
    return kept


def terms_of_words(folder: SystemFolder, words) -> set[int]:
    return set(folder.key.of_terms(words).tolist())


def said(row, name="input_ids") -> list[str]:
    return [f"w{token}" for token in row[name]]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, [7, 8, 9]),
        ({"labels": 1}, [7, 8, 9]),
        ({"labels": [-100, -100, 9]}, [7, 8]),
        ({"labels": [7, -100, 9]}, [7, 8, 9]),
        ({"labels": [-100] * 3}, [7, 8, 9]),
        ({"labels": [4, 5]}, [7, 8, 9]),
        ({"completion_mask": [0, 1, 1]}, [7]),
        ({"assistant_masks": np.array([0, 1, 0])}, [7]),
    ],
)
def test_the_prompt_is_what_stands_before_the_first_label(more, expected):
    assert prompt_tokens({"input_ids": [7, 8, 9], **more}) == expected


QUESTIONS = [{"id": f"q{n}", "q": f"w{5 + n} w{20 + n} W{30 + n}", "a": f"w{40 + n} w{50 + n % 9}"} for n in range(10)]


# Its question leaves no room for an answer.
LONG = {"id": "long", "q": "w5 w6 w7 w8 w9 w10 w11 w12 w13", "a": "w14"}


@pytest.mark.parametrize("kind", ["completion", "packed", "chat"])
def test_of_a_conversation_the_gate_has_the_question(tmp_path, kind):
    arguments = {"max_length": 8, "bf16": False, "gradient_checkpointing": False, "packing": kind == "packed"}
    asked = [*QUESTIONS, LONG]
    if kind == "chat":
        rows = [
            {
                "id": r["id"],
                "messages": [{"role": "user", "content": r["q"]}, {"role": "assistant", "content": r["a"]}],
            }
            for r in asked
        ]
        arguments["assistant_only_loss"] = True
    else:
        rows = [{"id": r["id"], "prompt": r["q"], "completion": " " + r["a"]} for r in asked]
    args = training_arguments(tmp_path / "system", SFTConfig, **arguments)
    trainer = make_trainer(
        tmp_path, tiny_llama(), Dataset.from_list(rows), cls=S3TSFTTrainer, args=args, config=GATED,
        processing_class=tokenizer(),
    )  # fmt: skip
    folder = trainer.folder
    # What the tokenizer does not know is none of its words: "W30" is unknown to it.
    expected = {row["id"]: terms_of_words(folder, row["q"].split()[:2]) for row in QUESTIONS}
    if kind == "packed":
        # Packs are cut, not rows.
        expected["long"] = terms_of_words(folder, LONG["q"].split())
    assert terms_in(folder) == expected and "long" in folder.table.rows
    assert folder.gate_tokenizer_digest == vocabulary_digest(tokenizer().get_vocab())
    assert stat.S_IMODE((tmp_path / "system" / GATE_FILE).stat().st_mode) == 0o600
    assert (folder.config.gate, folder.config.gate_top_k, folder.config.gate_temperature) == ("terms", 1, 0.5)
    assert not inspect(tmp_path / "system").problems


def test_of_a_row_to_classify_it_has_all_words(tmp_path):
    rows = classification_rows(12)
    trainer = make_trainer(tmp_path / "system", tiny_bert(), rows, config=GATED, processing_class=tokenizer())
    assert terms_in(trainer.folder) == {row["id"]: terms_of_words(trainer.folder, said(row)) for row in rows}


def test_it_is_made_later_as_it_would_have_been_made_at_first(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_S3T_KEY", "one secret for both folders")
    rows = lm_rows(12)
    at_first = make_trainer(tmp_path / "first", rows=rows, config=GATED, processing_class=tokenizer()).folder
    make_trainer(tmp_path / "system", rows=rows, config=PLAIN)
    folder = SystemFolder(tmp_path / "system")
    assert not folder.has_gate and folder.config.gate is None
    apply(folder, [rows[0]["id"]])

    # Settings of serving are no other system; until it is built, they are not recorded.
    trainer = make_trainer(tmp_path / "system", rows=rows, config=GATED, processing_class=tokenizer())
    assert trainer.s3t_config == GATED and trainer.folder.config == PLAIN
    trainer.build_gate()
    again = SystemFolder(tmp_path / "system")
    assert again.config == GATED == trainer.folder.config
    apply(at_first, [rows[0]["id"]])
    assert again.load_gate().rows.digests.tolist() == at_first.load_gate().rows.settled().digests.tolist()
    assert terms_in(again) == terms_in(at_first) and not inspect(tmp_path / "system").problems

    # It goes on with what is recorded, or, by other rows, not at all.
    assert make_trainer(tmp_path / "system", rows=rows, config=PLAIN).s3t_config == GATED
    with pytest.raises(ContentChangedError):
        make_trainer(tmp_path / "system", rows=[*rows[:-1], {**rows[-1], "input_ids": [5] * 8}], config=GATED)


@pytest.mark.parametrize("before", [None, tokenizer(lambda number: f"other{number}")])
def test_the_tokenizer_of_a_gate_that_is_made_later_lies_beside_it(tmp_path, before):
    """Models read prompts by it, also where the system was made without one, or with another."""
    rows = lm_rows(12)
    make_trainer(tmp_path, rows=rows, config=PLAIN, processing_class=before)
    trainer = make_trainer(tmp_path, rows=rows, config=GATED, processing_class=tokenizer())
    plant_stages(trainer)
    trainer.build_gate()
    asked = torch.tensor([row["input_ids"] for row in rows])
    shards = [shard for shard, _ in trainer.folder.table.places_of([row["id"] for row in rows])]
    model = S3TModel.from_pretrained(tmp_path, base_model=tiny_llama())
    assert model.gate_weights(asked).argmax(1).tolist() == shards
    assert torch.equal(trainer.s3t_model.gate_weights(asked), model.gate_weights(asked))


def test_without_rows_or_words_it_is_refused_before_anything_is_written(tmp_path):
    rows, images = lm_rows(8), tiny_vit()
    silent = tokenizer(lambda number: "?" * number)
    for more, match in (
        ({"rows": rows}, "`processing_class` is missing, expected the tokenizer"),
        ({"rows": rows, "processing_class": silent}, "makes none of the first rows. Give the tokenizer that the rows"),
        ({"model": images, "processing_class": tokenizer()}, "rows have labels, pixel_values, expected `input_ids`"),
    ):
        with pytest.raises(ConfigError, match=match):
            make_trainer(tmp_path / "system", config=GATED, **more)
        assert not (tmp_path / "system" / "s3t_config.json").exists()
    make_trainer(tmp_path / "system", rows=rows, config=PLAIN)
    without = S3TTrainer(tiny_llama(), training_arguments(tmp_path / "system"), processing_class=tokenizer())
    with pytest.raises(ConfigError, match=r"got no rows, expected those of the system.*with the dataset"):
        without.build_gate()
    assert not SystemFolder(tmp_path / "system").has_gate


PROCESSES = """
import sys
sys.path.insert(0, sys.argv[2])
from support.tiny import lm_rows, make_trainer, s3t_config
from training.test_gate_rows import GATED, PLAIN, tokenizer

trainer = make_trainer(sys.argv[1] + "/made", rows=lm_rows(12), config=GATED, processing_class=tokenizer())
assert trainer.folder.has_gate and trainer.folder.load_gate().counts.totals.sum()
make_trainer(sys.argv[1] + "/later", rows=lm_rows(12), config=PLAIN, processing_class=tokenizer()).build_gate()
"""


@pytest.mark.slow
def test_of_two_processes_one_writes_it_and_both_have_it(tmp_path):
    (tmp_path / "script.py").write_text(PROCESSES)

    launched(tmp_path / "script.py", str(tmp_path), str(Path(__file__).parents[1]), processes=2)
    made, later = SystemFolder(tmp_path / "made"), SystemFolder(tmp_path / "later")
    assert set(terms_in(made)) == set(terms_in(later)) and later.config.gate == "terms"
    assert not inspect(tmp_path / "made").problems and not inspect(tmp_path / "later").problems
