"""Tiny models, data and trainers, made from configs and fixed seeds: nothing is fetched, stages train in a moment."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainingArguments

from hf_s3t import S3TConfig, S3TTrainer
from hf_s3t.plan import stage_seed
from support.insides import stack_of


VOCABULARY = 60
PAD, BOS, EOS, UNKNOWN = 0, 1, 2, 3
FIRST_WORD = 5
LENGTH = 8
LABELS = 3
IMAGE_SIZE = 8


# Models


def build(architecture: str, config: str, seed: int = 0, **settings) -> PreTrainedModel:
    """A randomly initialised model of a Transformers class, the same for the same seed, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, architecture)(getattr(transformers, config)(**settings)).eval()


def _tokens() -> dict[str, int]:
    return dict(vocab_size=VOCABULARY, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)


def _decoder(layers: int) -> dict[str, Any]:
    return dict(
        **_tokens(),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
    )


def _encoder(layers: int) -> dict[str, Any]:
    return dict(
        **_tokens(),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=128,
    )


def tiny_llama(layers: int = 4, seed: int = 0, *, labels: int | None = None, **changes) -> PreTrainedModel:
    """A Llama language model; with `labels`, a sequence classifier (head `score`)."""
    name = "LlamaForCausalLM" if labels is None else "LlamaForSequenceClassification"
    heads = {} if labels is None else {"num_labels": labels}
    return build(name, "LlamaConfig", seed, **{**_decoder(layers), **heads, **changes})


def tiny_qwen2(layers: int = 4, seed: int = 0, *, labels: int | None = None, **changes) -> PreTrainedModel:
    """A Qwen2 language model (biases in attention, tied embeddings); with `labels`, a sequence classifier."""
    name = "Qwen2ForCausalLM" if labels is None else "Qwen2ForSequenceClassification"
    heads = {} if labels is None else {"num_labels": labels}
    return build(name, "Qwen2Config", seed, **{**_decoder(layers), "tie_word_embeddings": True, **heads, **changes})


def tiny_gpt2(layers: int = 4, seed: int = 0, *, labels: int | None = None, **changes) -> PreTrainedModel:
    """A GPT-2 language model (Conv1D layers, tied embeddings); with `labels`, a sequence classifier."""
    name = "GPT2LMHeadModel" if labels is None else "GPT2ForSequenceClassification"
    heads = {} if labels is None else {"num_labels": labels}
    settings = dict(**_tokens(), n_embd=16, n_inner=32, n_layer=layers, n_head=2, n_positions=128)
    return build(name, "GPT2Config", seed, **{**settings, **heads, **changes})


def tiny_bert(layers: int = 4, seed: int = 0, *, labels: int = LABELS, **changes) -> PreTrainedModel:
    """A BERT sequence classifier (head `classifier`)."""
    return build(
        "BertForSequenceClassification", "BertConfig", seed, **{**_encoder(layers), "num_labels": labels, **changes}
    )


def tiny_roberta(layers: int = 4, seed: int = 0, *, labels: int = LABELS, **changes) -> PreTrainedModel:
    """A RoBERTa sequence classifier (head `classifier` of two layers)."""
    return build(
        "RobertaForSequenceClassification",
        "RobertaConfig",
        seed,
        **{**_encoder(layers), "num_labels": labels, **changes},
    )


def tiny_vit(layers: int = 4, seed: int = 0, *, labels: int = LABELS, **changes) -> PreTrainedModel:
    """A ViT image classifier for images of 8 by 8 pixels."""
    settings = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=4,
        num_labels=labels,
    )
    return build("ViTForImageClassification", "ViTConfig", seed, **{**settings, **changes})


def tiny_llava() -> PreTrainedModel:
    """A LLaVA model: a Llama behind a tower that sees images of 8 by 8 pixels."""
    tower = dict(
        model_type="clip_vision_model", hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, image_size=8, patch_size=4,
    )  # fmt: skip
    return build(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        vision_config=tower,
        text_config=dict(
            model_type="llama",
            vocab_size=60,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        ),
        image_token_id=50,
    )


def tokenizer_of_words(**settings) -> PreTrainedTokenizerFast:
    """Every token of the tiny models is a word, `w7` say."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = {word: number for number, word in enumerate([*special, *(f"w{n}" for n in range(4, VOCABULARY))])}
    tokenizer = Tokenizer(models.WordLevel({**words, **settings}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


# Where it does not matter which, one of attention and one of the MLP: all seven take twice the time to train.
LORA_TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "vit": "all-linear",
}


def lora(model: PreTrainedModel, **changes) -> LoraConfig:
    """LoRA settings that fit one of the tiny models."""
    targets = LORA_TARGETS.get(model.config.model_type, "all-linear")
    return LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": targets, **changes})


# Rows


def ids_of(count: int) -> list[str]:
    """The ids of the rows below; none is part of another."""
    return [f"example-{number:03d}" for number in range(count)]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _words(generator: torch.Generator, length: int) -> list[int]:
    return torch.randint(FIRST_WORD, VOCABULARY, (length,), generator=generator).tolist()


def lm_rows(count: int = 24, seed: int = 0, length: int = LENGTH) -> list[dict[str, Any]]:
    """Tokenised rows of one length for a language model, with string ids."""
    generator = _generator(seed)
    rows = [{"id": i, "input_ids": _words(generator, length)} for i in ids_of(count)]
    return [{**row, "labels": row["input_ids"]} for row in rows]


def classification_rows(count: int = 24, seed: int = 0, length: int = LENGTH, labels: int = LABELS) -> list[dict]:
    """Tokenised rows of one length for a sequence classifier, with string ids; the label follows from the words."""
    generator = _generator(seed)
    rows = [{"id": i, "input_ids": _words(generator, length)} for i in ids_of(count)]
    return [{**row, "attention_mask": [1] * length, "labels": row["input_ids"][0] % labels} for row in rows]


def image_rows(count: int = 24, seed: int = 0, labels: int = LABELS) -> list[dict[str, Any]]:
    """Images for the ViT, with string ids."""
    generator = _generator(seed)
    shape = (3, IMAGE_SIZE, IMAGE_SIZE)
    return [
        {"id": i, "pixel_values": torch.randn(shape, generator=generator).tolist(), "labels": number % labels}
        for number, i in enumerate(ids_of(count))
    ]


def rows_for(model: PreTrainedModel, count: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """Rows that the model can be trained on."""
    if model.main_input_name == "pixel_values":
        return image_rows(count, seed, model.config.num_labels)
    if model.get_output_embeddings() is not None:
        return lm_rows(count, seed)
    return classification_rows(count, seed, labels=model.config.num_labels)


def batch_of(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The rows as one batch of tensors, ids left out."""
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0] if name not in ("id", "group")}


# Trainers


def training_arguments(output_dir: str | Path, cls: type[TrainingArguments] = TrainingArguments, **changes):
    """Arguments under which a stage trains in a moment, on the CPU, and nothing is reported or saved."""
    settings = dict(
        output_dir=str(output_dir),
        num_train_epochs=1,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return cls(**{**settings, **changes})


def s3t_config(**changes) -> S3TConfig:
    """
    Two slices, one shard, the published plan of two sequences; ids in a column, each example's place a hash of its id.
    """
    published = {"keep_idle": True} if "work_budget" not in changes else {}
    settings = {"num_slices": 2, "id_column": "id", "partition": "hashed", "seed": 3, **published, **changes}
    return S3TConfig(**settings)


def make_trainer(
    output_dir: str | Path,
    model: PreTrainedModel | None = None,
    rows: list[dict[str, Any]] | Dataset | None = None,
    *,
    cls: type = S3TTrainer,
    args: TrainingArguments | None = None,
    peft_config: Any = None,
    config: S3TConfig | None = None,
    **more,
):
    """A trainer on a tiny model; all that is not given fits the rest. `more` goes to the trainer as it is."""
    model = model if model is not None else tiny_llama()
    rows = rows if rows is not None else rows_for(model)
    return cls(
        model=model,
        args=args if args is not None else training_arguments(output_dir),
        train_dataset=Dataset.from_list(copy.deepcopy(rows)) if isinstance(rows, list) else rows,
        peft_config=peft_config if peft_config is not None else lora(model),
        s3t_config=config if config is not None else s3t_config(),
        **more,
    )


def plant_stages(trainer, limit: int | None = None, seed: int = 0) -> None:
    """
    Make missing stages exist without training: adapters of random numbers that differ from stage to stage (and seed to
    seed), written as training writes them. A hundred times faster, for tests of everything that comes after it.
    """
    folder, stack = trainer.folder, stack_of(trainer)
    for key in folder.missing_stages()[:limit]:
        for stage in key.lineage[:-1]:
            if stage not in stack:
                stack.load(stage, folder.read_adapter(stage), folder.adapter_digest(stage))
        stack.add(key)
        generator = torch.Generator().manual_seed(stage_seed(folder.config.seed, key) + seed)
        for tensor in stack.tensors(key).values():
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) / 10)
        record = {**trainer._origin(key), "metrics": {}}
        folder.write_stage(key, record, lambda path, key=key: stack.save(key, path, None))
    stack.drop(stack.loaded)
