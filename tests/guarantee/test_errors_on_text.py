"""What a trainer of language models on text would stumble over is refused before anything is written (E6)."""

from pathlib import Path

import pytest
import tokenizers
import transformers
from datasets import Dataset
from peft import LoraConfig
from support.insides import rows_of_stages
from support.refusals import Refusal, cases, files_of
from support.tiny import (
    ids_of,
    make_trainer,
    plant_stages,
    s3t_config,
    tiny_bert,
    tiny_llama,
    training_arguments,
)
from torch import nn

from hf_s3t.errors import (
    ConfigError,
    EmptySliceError,
    ExampleIdError,
    S3TError,
)


pytestmark = pytest.mark.usefixtures("one_thread")


def base():
    return tiny_llama(layers=2)


# Language models on text


def tokenizer():
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{n}" for n in range(4, 60))]
    model = tokenizers.models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def text_rows(prompts) -> list[dict]:
    return [{"id": i, "prompt": prompt, "completion": " w5"} for i, prompt in zip(ids_of(len(prompts)), prompts)]


def sft_trainer(output_dir: Path, rows, config, model=None, processing_class=None, **changes):
    from trl import SFTConfig

    from hf_s3t import S3TSFTTrainer

    arguments = {"max_length": 12, "gradient_checkpointing": False, "bf16": False, **changes}
    model = base() if model is None else model
    return make_trainer(
        output_dir,
        model,
        rows,
        cls=S3TSFTTrainer,
        args=training_arguments(output_dir, cls=SFTConfig, **arguments),
        config=config,
        processing_class=tokenizer() if processing_class is None else processing_class or None,
        peft_config=LoraConfig(target_modules="all-linear") if not isinstance(model, nn.Module) else None,
    )


def test_a_slice_of_which_truncation_leaves_nothing_is_refused_before_anything_is_written(tmp_path):
    rows = text_rows([" ".join(f"w{n}" for n in range(4, 40)) if n % 2 else "w4" for n in range(8)])
    columns = s3t_config(partition="column", shard_column="s", slice_column="t")
    rows = [{**row, "s": 0, "t": n % 2} for n, row in enumerate(rows)]
    with pytest.raises(EmptySliceError) as caught:
        sft_trainer(tmp_path / "system", rows, columns)
    said = (r"dropped every example of the \(shard, slice\) pairs \[\(0, 1\)\]", "every example", "Raise `max_length`")
    Refusal(EmptySliceError, "", *said).check(caught)
    assert not files_of(tmp_path / "system")


def test_examples_of_which_truncation_leaves_nothing_are_no_error_where_others_remain(tmp_path):
    rows = text_rows([" ".join(f"w{n}" for n in range(4, 40)) if n == 5 else "w4" for n in range(8)])
    trainer = sft_trainer(tmp_path / "system", rows, s3t_config(partition="balanced"))
    assert len(trainer.folder.table) == 8 and rows_of_stages(trainer).dropped(trainer.folder.table) == 1


def test_a_slice_of_which_a_deletion_leaves_only_what_truncation_dropped_is_grown_no_more(tmp_path):
    texts = [" ".join(f"w{n}" for n in range(4, 40)), *["w4"] * 7]
    rows = [{**row, "shard": 0, "slice": int(n > 1)} for n, row in enumerate(text_rows(texts))]
    trainer = sft_trainer(
        tmp_path / "system", rows, s3t_config(partition="column", shard_column="shard", slice_column="slice")
    )
    plant_stages(trainer)
    trainer.s3t_model.unlearn([rows[1]["id"]])
    trainer.train()
    assert {str(key) for key in trainer.folder.stages} == {"shard-0/1"}


def test_a_text_trainer_refuses_what_every_trainer_refuses(tmp_path):
    rows = text_rows(["w4"] * 8)
    rows[1]["id"] = rows[0]["id"]
    with pytest.raises(ExampleIdError, match=r"more than once \(1\): 'example-000'"):
        sft_trainer(tmp_path / "system", rows, s3t_config())
    assert not (tmp_path / "system").exists()


EIGHT = ids_of(8)


@cases(
    Refusal(ConfigError, "other columns", "has the columns id, question, answer",
        "expected 'text', 'messages', or 'prompt' and 'completion'", "Rename them .* or give a `formatting_func`",
        rows=Dataset.from_dict({"id": EIGHT, "question": ["w4"] * 8, "answer": ["w5"] * 8})),
    Refusal(ConfigError, "half a pair", "has the columns id, prompt", "'prompt' and 'completion'", "Rename them",
        rows=Dataset.from_dict({"id": EIGHT, "prompt": ["w4"] * 8})),
    Refusal(ConfigError, "missing texts", "`train_dataset` lacks `text` in 1 of 8 rows", "Drop them",
        r"`dataset.filter\(", rows=Dataset.from_dict({"id": EIGHT, "text": ["w4"] * 7 + [None]})),
    Refusal(ConfigError, "a classifier", "BertForSequenceClassification is no language model",
        "which `S3TSFTTrainer` trains", "use `S3TTrainer`", model=tiny_bert(2)),
    Refusal(ConfigError, "no tokenizer", "`processing_class` is missing", "the model was made in memory",
        "Give the tokenizer", processing_class=False),
    Refusal(ConfigError, "a folder that is not there", "`model='nowhere/at/all'` cannot be loaded",
        "Give the folder of a model", "or its id on the Hub", model="nowhere/at/all"),
    Refusal(ConfigError, "a folder as a path", "`model` is the path 'some/folder'", "a loaded model or its name",
        "Give 'some/folder'", model=Path("some/folder")),
    Refusal(ConfigError, "a model's class", "`model` is the class LlamaForCausalLM", "a loaded model or its name",
        "from_pretrained", model=transformers.LlamaForCausalLM),
)  # fmt: skip
def test_what_a_text_trainer_would_stumble_over_is_refused_before_anything_is_written(case, tmp_path):
    given = {
        "rows": Dataset.from_list(text_rows(["w4"] * 8)),
        "config": s3t_config(partition="balanced"),
        **case.given,
    }
    with pytest.raises(S3TError) as caught:
        sft_trainer(tmp_path / "system", **given)
    case.check(caught)
    assert not (tmp_path / "system").exists()


def test_a_text_trainer_takes_no_list_of_rows(tmp_path):
    from hf_s3t import S3TSFTTrainer

    with pytest.raises(ConfigError, match=r"`train_dataset` is a list, .* Give `Dataset.from_list\(rows\)`\."):
        S3TSFTTrainer(base(), training_arguments(tmp_path / "system"), train_dataset=text_rows(["w4"] * 8))
    assert not (tmp_path / "system").exists()
