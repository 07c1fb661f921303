"""What a row becomes does not tell of fields that other rows have, as tables of mappings have it."""

import json

import pytest
from datasets import Dataset, load_dataset
from support.preferences import GONE, pairs, tokenizer
from support.tiny import lora, plant_stages, s3t_config, tiny_llama, training_arguments
from trl import SFTConfig

from hf_s3t import S3TSFTTrainer
from hf_s3t.errors import IsolationError
from hf_s3t.records.contents import said
from hf_s3t.training.own_fields import with_own_fields


pytestmark = pytest.mark.usefixtures("one_thread", "shared_key")

TOOL = {"name": "f", "parameters": {"30": 1, "31": 2.0}}
ASKED = {"role": "user", "content": "w5"}


def stored(rows, how, path):
    """Rows as a table, whose mappings have the fields of all; as JSON, once one has others; as a file is read."""
    if how == "file":
        path.mkdir()
        (path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return load_dataset("json", data_files=str(path / "rows.jsonl"), split="train", cache_dir=str(path))
    return Dataset.from_list(rows, on_mixed_types="use_json" if how == "json" else None)


@pytest.mark.parametrize("how", ["table", "json", "file"])
@pytest.mark.parametrize(
    ("column", "value", "odd"),
    [
        ("tools", [TOOL], [{"name": "g", "parameters": {"30": 0.5, "33": 4}}]),
        ("messages", [{**ASKED, "calls": [{"a": 1}]}], [{**ASKED, "calls": [{"b": [1]}]}]),
        ("chat_template_kwargs", {"thinks": True}, {"aloud": 1.5}),
        ("tools", None, [TOOL]),
    ],
)  # fmt: skip
def test_a_row_is_the_same_whichever_fields_others_have(tmp_path, how, column, value, odd):
    rows = [{"id": n, column: value, "other": {"a": 1}} for n in range(3)]
    alone = with_own_fields(stored(rows, how, tmp_path / "alone"))
    among = with_own_fields(stored([*rows, {"id": 3, column: odd, "other": {"b": 2}}], how, tmp_path / "among"))
    assert json.dumps(alone[:][column]) == json.dumps(among[:][column][:3])
    assert json.dumps(among[3][column]) == json.dumps(said(odd))
    assert among["id"][:] == [0, 1, 2, 3] and list(among.column_names) == ["id", column, "other"]
    # What no template reads is as it was given.
    if how == "table":
        assert among[0]["other"] == {"a": 1, "b": None}


@pytest.mark.parametrize("how", ["table", "json"])
def test_rows_that_have_the_same_fields_stay_as_they_are(tmp_path, how):
    rows = [{"id": n, "messages": [ASKED], "n": 1.0, "tools": [{"name": "f", "least": 0.5}]} for n in range(3)]
    for dataset in (stored(rows, how, tmp_path), Dataset.from_list(pairs())):
        assert with_own_fields(dataset) is dataset


def test_fields_that_json_has_no_place_for_are_refused():
    dataset = Dataset.from_list([{"tools": [{"a": b"1"}]}, {"tools": [{"b": 1}]}])
    with pytest.raises(
        IsolationError, match=r"`tools` of `train_dataset` is a column of .*seen in texts.*`json.dumps`"
    ):
        with_own_fields(dataset)


# Writes the names of a tool's parameters, and what they are.
TEMPLATE = (
    "{% for tool in tools %}{% for name, value in tool.parameters.items() %}"
    "w{{ name }} {{ {'1': 'w11', '1.0': 'w12', '2': 'w13', '2.0': 'w14'}[value | string] or 'w15' }} "
    "{% endfor %}{% endfor %}{% for message in messages %}{{ message.content }} {% endfor %}"
)


@pytest.mark.parametrize("how", ["table", "file"])
def test_what_a_deleted_row_had_is_in_no_text_of_others_and_nothing_is_missing_when_it_left(tmp_path, how):
    def rows():
        for row in pairs():
            tool = {"name": "g", "parameters": {"33": 1, "30": 0.5}} if row["id"] in GONE else TOOL
            yield {"id": row["id"], "messages": [{"role": "user", "content": row["prompt"]}], "tools": [tool]}

    def trainer(name, left_out=()):
        words, base = tokenizer(), tiny_llama(2)
        words.chat_template = TEMPLATE
        dataset = stored([row for row in rows() if row["id"] not in left_out], how, tmp_path / f"{len(given)}")
        given.append(dataset)
        args = training_arguments(tmp_path / name, SFTConfig, bf16=False, max_length=24)
        config = s3t_config(budget=1, num_slices=2)
        return S3TSFTTrainer(
            base, args, train_dataset=dataset, processing_class=words, peft_config=lora(base), s3t_config=config
        )

    given = []
    first = trainer("system")
    texts = dict(zip(first.train_dataset["id"], first.train_dataset["input_ids"], strict=True))
    assert [i for i, words in texts.items() if 33 in words[:4]] == GONE
    plant_stages(first)
    first.s3t_model.unlearn(GONE)
    again = trainer("system", GONE)
    left = dict(zip(again.train_dataset["id"], again.train_dataset["input_ids"], strict=True))
    assert left == {i: words for i, words in texts.items() if i not in GONE}
    # Neither are the rows told to be others, nor to be fed otherwise.
    assert again.train(max_stages=1).metrics["stages_trained"] == 1
