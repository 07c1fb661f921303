"""The loss: of one member the base's own, of several what the task defines on their joint logits, or a refusal."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, PeftModel
from support.tiny import (
    LABELS,
    VOCABULARY,
    batch_of,
    build,
    classification_rows,
    ids_of,
    lm_rows,
    make_trainer,
    plant_stages,
    s3t_config,
    tiny_bert,
    tiny_llama,
    training_arguments,
)
from transformers import BertForSequenceClassification, LlamaForCausalLM, PreTrainedModel, Trainer

from hf_s3t import S3TModel
from hf_s3t.errors import ConfigError, ExhaustedError, S3TError


pytestmark = pytest.mark.usefixtures("one_thread")


COUNT = 16
SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
PIXELS = dict(image_size=8, patch_size=4)
SOUND = dict(
    **SIZES, conv_dim=(8,), conv_stride=(4,), conv_kernel=(4,), num_feat_extract_layers=1, num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2, mask_time_prob=0.0, num_labels=LABELS, vocab_size=VOCABULARY,
)  # fmt: skip
BART = dict(
    d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=VOCABULARY, is_encoder_decoder=False, is_decoder=True,
    init_std=0.2,
)  # fmt: skip
EXPERTS = dict(
    **SIZES, vocab_size=VOCABULARY, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=1,
    output_router_logits=True, router_aux_loss_coef=1.0,
)  # fmt: skip


def numbers(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def noise(row: int, *shape: int) -> list:
    return numbers(row).normal(size=shape).tolist()


def rows_of(make: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"id": i, **make(number)} for number, i in enumerate(ids_of(COUNT))]


def choices(row: int) -> dict[str, Any]:
    return {
        "input_ids": numbers(row).integers(5, VOCABULARY, (3, 6)).tolist(),
        "attention_mask": [[1] * 6] * 3,
        "labels": row % 3,
    }


def seen_and_asked(row: int) -> dict[str, Any]:
    answers = numbers(row).integers(0, 2, LABELS).astype(float).tolist()
    return {**words(row), "pixel_values": noise(row, 3, 8, 8), "pixel_mask": [[1] * 8] * 8, "labels": answers}


def words(row: int) -> dict[str, Any]:
    return {"input_ids": numbers(row).integers(5, VOCABULARY, 6).tolist(), "attention_mask": [1] * 6}


def captioned(row: int) -> dict[str, Any]:
    text = words(row)
    return {**text, "pixel_values": noise(row, 3, 8, 8), "labels": text["input_ids"]}


def spoken(row: int) -> dict[str, Any]:
    return {"input_values": noise(row, 80), "labels": numbers(row).integers(1, VOCABULARY, 4).tolist()}


def frames(row: int) -> dict[str, Any]:
    return {"input_values": noise(row, 80), "labels": np.eye(LABELS)[numbers(row).integers(0, LABELS, 20)].tolist()}


def next_words(base, logits, batch) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def aligned(base, logits, batch) -> torch.Tensor:
    """Of connectionist temporal classification."""
    lengths = torch.full((len(logits),), logits.shape[1])
    targets = torch.full((len(logits),), batch["labels"].shape[1])
    log_probabilities = logits.log_softmax(-1).transpose(0, 1)
    reduction = base.config.ctc_loss_reduction
    return F.ctc_loss(log_probabilities, batch["labels"], lengths, targets, base.config.pad_token_id, reduction)


@dataclass(frozen=True)
class Kind:
    """A base, rows for it, and its loss as the task defines it on logits."""

    fresh: Callable[[], PreTrainedModel]
    rows: Callable[[], list[dict[str, Any]]]
    loss: Callable[[PreTrainedModel, torch.Tensor, dict], torch.Tensor]
    targets: Any


QV, QUERY = ["q_proj", "v_proj"], ["query", "value"]
KINDS = {
    "decoder that does not shift": Kind(
        partial(build, "BartForCausalLM", "BartConfig", **BART),
        lambda: lm_rows(COUNT),
        lambda base, logits, batch: F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()),
        QV,
    ),
    "multiple choice": Kind(
        partial(build, "BertForMultipleChoice", "BertConfig", **SIZES, vocab_size=VOCABULARY),
        partial(rows_of, choices),
        lambda base, logits, batch: F.cross_entropy(logits, batch["labels"]),
        QUERY,
    ),
    "speech": Kind(partial(build, "Wav2Vec2ForCTC", "Wav2Vec2Config", **SOUND), partial(rows_of, spoken), aligned, QV),
    "frames of audio": Kind(
        partial(build, "Wav2Vec2ForAudioFrameClassification", "Wav2Vec2Config", **SOUND),
        partial(rows_of, frames),
        lambda base, logits, batch: F.cross_entropy(logits.flatten(0, 1), batch["labels"].argmax(-1).flatten()),
        QV,
    ),
    "visual questions": Kind(
        partial(
            build,
            "ViltForQuestionAnswering",
            "ViltConfig",
            **SIZES,
            **PIXELS,
            vocab_size=VOCABULARY,
            num_labels=LABELS,
        ),
        partial(rows_of, seen_and_asked),
        lambda base, logits, batch: F.binary_cross_entropy_with_logits(logits, batch["labels"]) * LABELS,
        QUERY,
    ),
    # The picture's places come before those of the words.
    "captions": Kind(
        partial(
            build,
            "GitForCausalLM",
            "GitConfig",
            **SIZES,
            vocab_size=VOCABULARY,
            vision_config={**SIZES, **PIXELS, "num_hidden_layers": 1},
        ),
        partial(rows_of, captioned),
        lambda base, logits, batch: next_words(base, logits[:, -batch["labels"].shape[1] :], batch),
        QUERY,
    ),
    "words": Kind(partial(tiny_llama, 2), lambda: lm_rows(COUNT), next_words, QV),
}


@dataclass(frozen=True)
class Made:
    """A trainer with a system of planted stages, and its members as plain PEFT."""

    path: Path
    kind: Kind
    shards: int
    evaluated: dict[str, float] = field(default_factory=dict)

    @cached_property
    def trainer(self):
        trainer = make_trainer(
            self.path,
            self.kind.fresh(),
            self.kind.rows(),
            config=s3t_config(num_shards=self.shards, budget=1, sequence_selection=[[0, 1]], partition="balanced"),
            peft_config=LoraConfig(r=2, lora_alpha=128, target_modules=self.kind.targets),
            compute_metrics=self.note,
        )
        plant_stages(trainer)
        return trainer

    @property
    def held_out(self) -> Dataset:
        return Dataset.from_list(self.kind.rows()[:4])

    def note(self, evaluated) -> dict[str, float]:
        predictions = evaluated.predictions[0] if isinstance(evaluated.predictions, tuple) else evaluated.predictions
        return {"rows": len(predictions), "labelled": len(evaluated.label_ids), "mean": float(predictions.mean())}

    @property
    def model(self) -> S3TModel:
        return self.trainer.s3t_model

    @cached_property
    def plain(self) -> list[PeftModel]:
        members = []
        for shard in range(self.shards):
            exported = self.path.with_name(f"{self.path.name}-{shard}")
            self.model.export_adapter(shard, exported)
            members.append(PeftModel.from_pretrained(self.kind.fresh(), exported).eval())
        return members

    @property
    def batch(self) -> dict[str, torch.Tensor]:
        return batch_of(self.kind.rows()[:5])

    def joined(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        each = torch.stack([member(**batch).logits for member in self.plain])
        if self.model.aggregation == "mean_logits":
            return each.mean(0)
        return each.log_softmax(-1).logsumexp(0) - np.log(len(each))


@pytest.fixture(scope="module")
def system(tmp_path_factory) -> Callable[..., Made]:
    made: dict[tuple[str, int], Made] = {}

    def get(name: str, shards: int) -> Made:
        if (name, shards) not in made:
            new = made[name, shards] = Made(tmp_path_factory.mktemp("made") / "system", KINDS[name], shards)
            # Here: of a process' trainers only the newest has the devices.
            new.evaluated.update(new.trainer.evaluate(new.held_out))
        return made[name, shards]

    return get


# What shows the same in another way.
MORE = {"visual questions", "frames of audio"}
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in MORE else name for name in KINDS]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_of_one_member_it_is_that_of_plain_peft(system, name):
    made = system(name, 1)
    assert torch.equal(made.model(**made.batch).loss, made.plain[0](**made.batch).loss)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_of_several_members_it_is_what_the_task_defines_on_their_logits(system, name):
    made = system(name, 2)
    batch = made.batch
    expected = made.kind.loss(made.model.base_model, made.joined(batch), batch).item()
    answer = made.model(**batch)
    assert answer.loss.item() == pytest.approx(expected, rel=1e-5)
    # And with what the first batch taught.
    assert made.model(**batch).loss.item() == pytest.approx(expected, rel=1e-5)
    own = [member(**batch).loss.item() for member in made.plain]
    assert not any(loss == pytest.approx(expected, rel=1e-5) for loss in [*own, np.mean(own)]), "shows nothing"


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_trainer_evaluates(system, name, shards):
    made = system(name, shards)
    with torch.no_grad():
        answer = made.model(**batch_of(made.kind.rows()[:4]))
    evaluated = made.evaluated
    assert evaluated["eval_loss"] == pytest.approx(answer.loss.item(), rel=1e-5)
    assert evaluated["eval_rows"] == evaluated["eval_labelled"] == 4
    assert evaluated["eval_mean"] == pytest.approx(answer.logits.mean().item(), abs=1e-4)
    if shards == 1:
        arguments = training_arguments(made.path.with_name("plain"))
        expected = Trainer(made.plain[0], arguments, compute_metrics=made.note).evaluate(made.held_out)
        assert evaluated["eval_loss"] == expected["eval_loss"] and evaluated["eval_mean"] == expected["eval_mean"]


def passes(model: S3TModel, batch: dict[str, torch.Tensor]) -> int:
    counted = []
    hook = model.base_model.register_forward_pre_hook(lambda *_: counted.append(1))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return len(counted)


def test_where_the_function_of_the_config_gives_the_same_it_is_used(system):
    """So that evaluating most models takes one pass per batch, as ever."""
    words, unshifted = system("words", 2), system("decoder that does not shift", 2)
    for made in (words, unshifted):
        passes(made.model, made.batch)
    assert passes(words.model, words.batch) == 1
    assert passes(unshifted.model, unshifted.batch) > 1


def test_it_is_differentiated_through_the_members(system):
    made = system("multiple choice", 2)
    batch = made.batch
    ids = batch.pop("input_ids")
    given = made.kind.fresh().get_input_embeddings()(ids).detach().requires_grad_()
    loss = made.model(inputs_embeds=given, **batch).loss
    expected = made.kind.loss(made.model.base_model, made.joined({**batch, "inputs_embeds": given}), batch)
    (found,), (wanted,) = torch.autograd.grad(loss, given), torch.autograd.grad(expected, given)
    assert wanted.abs().max() > 1e-5 and torch.allclose(found, wanted, rtol=1e-3, atol=1e-6)


def test_it_counts_items_over_devices_as_the_base_does(system):
    for shards in (1, 2):
        made = system("words", shards)
        batch = made.batch
        with torch.no_grad():
            logits, count = made.joined(batch), torch.tensor(11)
            summed = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
            assert made.model(**batch, num_items_in_batch=count).loss.item() == pytest.approx(summed.item() / 11)


def test_what_the_base_adds_is_the_mean_of_the_members(tmp_path):
    kind = Kind(
        partial(build, "MixtralForCausalLM", "MixtralConfig", **EXPERTS), lambda: lm_rows(COUNT), next_words, QV
    )
    made = Made(tmp_path / "system", kind, 2)
    batch = made.batch
    with torch.no_grad():
        added = [out.loss - next_words(None, out.logits, batch) for out in (plain(**batch) for plain in made.plain)]
        answer = made.model(**batch)
        assert (added[0] - added[1]).abs() > 1e-4, "shows nothing"
        expected = next_words(None, answer.logits, batch) + sum(added) / 2
    assert answer.loss.item() == pytest.approx(expected.item(), rel=1e-5)


# Losses of one's own


class MasksPadding(LlamaForCausalLM):
    """Padding counts for nothing, whatever its labels say; without any it is what the config's function gives."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        if labels is not None and attention_mask is not None:
            labels = labels.masked_fill(attention_mask == 0, -100)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)


class WritesToItsLogits(LlamaForCausalLM):
    """It never says the last word."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, **kwargs)
        outputs.logits[..., -1] -= 5.0
        if labels is not None:
            outputs.loss = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
        return outputs


class DividesItsLogits(BertForSequenceClassification):
    """In their place, as a mean over words does."""

    def forward(self, labels=None, **kwargs):
        outputs = super().forward(**kwargs)
        outputs.logits /= 4
        if labels is not None:
            outputs.loss = F.cross_entropy(outputs.logits, labels)
        return outputs


class WeighsClasses(BertForSequenceClassification):
    """Of one row, or of rows of one class, it is what the config's function gives."""

    def forward(self, labels=None, **kwargs):
        outputs = super().forward(**kwargs)
        if labels is not None:
            outputs.loss = weighed(outputs.logits, labels)
        return outputs


def weighed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, weight=torch.arange(1.0, 1.0 + logits.shape[-1]))


class FromItsStates(LlamaForCausalLM):
    """Its loss is made of something else than its logits."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, **kwargs)
        if labels is not None:
            states = self.model(input_ids=input_ids).last_hidden_state
            outputs.loss = F.cross_entropy(self.lm_head(states).flatten(0, 1), labels.flatten())
        return outputs


def of_class(cls: type[PreTrainedModel]) -> PreTrainedModel:
    base = tiny_llama(2)
    base.__class__ = cls
    return base


def own(path: Path, cls: type, shards: int = 2) -> Made:
    return Made(path / "system", Kind(partial(of_class, cls), lambda: lm_rows(COUNT), next_words, QV), shards)


def test_what_held_for_batches_without_padding_is_not_taken_to_hold_with_it(tmp_path):
    made = own(tmp_path, MasksPadding)
    batch = {**made.batch, "attention_mask": torch.ones(5, 8, dtype=torch.long)}
    made.model(**batch)
    batch["attention_mask"][:2, :3] = 0
    with torch.no_grad():
        masked = {**batch, "labels": batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)}
        expected = next_words(None, made.joined(batch), masked).item()
        assert made.model(**batch).loss.item() == pytest.approx(expected, rel=1e-5)
        assert next_words(None, made.joined(batch), batch).item() != pytest.approx(expected, rel=5e-5)


def test_a_base_that_writes_to_its_logits_changes_no_answer(tmp_path):
    """Whether the logits put there were written to before, nobody could tell: no loss rather than a wrong one."""
    made = own(tmp_path, WritesToItsLogits)
    logits = made.model(input_ids=made.batch["input_ids"]).logits
    before = logits.clone()
    with pytest.raises(S3TError, match="not compute its loss from the logits that it returns"):
        made.model(**made.batch)
    assert torch.equal(logits, before)


def classifying(path: Path, cls: type) -> Made:
    def fresh():
        base = tiny_bert(2)
        base.__class__ = cls
        return base

    return Made(path / "system", Kind(fresh, lambda: classification_rows(COUNT), next_words, QUERY), 2)


@torch.no_grad()
def test_logits_that_were_divided_in_their_place_are_not_divided_again(tmp_path):
    made = classifying(tmp_path, DividesItsLogits)
    expected = F.cross_entropy(made.joined(made.batch), made.batch["labels"]).item()
    for _ in range(2):
        assert made.model(**made.batch).loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows", [1, 5])
@torch.no_grad()
def test_what_held_for_rows_of_one_class_is_not_taken_to_hold_for_others(rows, tmp_path):
    made = classifying(tmp_path, WeighsClasses)
    first = {name: value[:rows] for name, value in made.batch.items()}
    made.model(**{**first, "labels": torch.full_like(first["labels"], 1)})
    batch = {**made.batch, "labels": torch.tensor([1, 2, 1, 2, 2])}
    expected = weighed(made.joined(batch), batch["labels"]).item()
    assert made.model(**batch).loss.item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_what_is_no_loss_of_the_base_is_none_of_the_ensemble(system, tmp_path):
    made = system("words", 2)
    made.model(**made.batch, logits_to_keep=made.batch["labels"].shape[1])
    # Not all that the labels are of: the base says so.
    with pytest.raises(ValueError, match="batch_size"):
        made.model(**made.batch, logits_to_keep=4)
    fresh = partial(build, "BertForQuestionAnswering", "BertConfig", **SIZES, vocab_size=VOCABULARY)
    spans = Kind(fresh, lambda: rows_of(lambda row: {**words(row), "start_positions": 1}), next_words, QUERY)
    half = Made(tmp_path / "system", spans, 2)
    assert half.model(**half.batch).loss is None and "start_logits" in half.model(**half.batch)


def test_a_loss_that_is_not_made_of_the_logits_is_refused_for_several(tmp_path):
    made = own(tmp_path, FromItsStates)
    with pytest.raises(S3TError, match="not compute its loss from the logits that it returns"):
        made.model(**made.batch)
    assert made.model(input_ids=made.batch["input_ids"]).loss is None
    one = own(tmp_path / "one", FromItsStates, shards=1)
    with torch.no_grad():
        assert torch.equal(one.model(**one.batch).loss, one.plain[0](**one.batch).loss)


def test_labels_go_with_the_whole_text(system):
    made = system("decoder that does not shift", 2)
    batch = made.batch
    cache = made.model(input_ids=batch["input_ids"], use_cache=True).past_key_values
    with pytest.raises(S3TError, match="`past_key_values` holds a part of it"):
        made.model(**batch, past_key_values=cache)


def test_the_base_that_answers_when_no_shard_is_left_has_its_own(tmp_path):
    kind = KINDS["decoder that does not shift"]
    made = Made(tmp_path / "system", kind, 2)
    made.model.unlearn(ids_of(COUNT))
    with pytest.raises(ExhaustedError):
        made.model(**made.batch)
    model = S3TModel.from_pretrained(made.path, base_model=kind.fresh(), when_exhausted="base")
    assert torch.equal(model(**made.batch).loss, kind.fresh()(**made.batch).loss)


def test_votes_of_one_member_have_its_loss(tmp_path):
    trainer = make_trainer(tmp_path / "system", tiny_bert(2), config=s3t_config(aggregation="majority_vote"))
    plant_stages(trainer)
    trainer.s3t_model.export_adapter(0, tmp_path / "exported")
    plain = PeftModel.from_pretrained(tiny_bert(2), tmp_path / "exported").eval()
    batch = batch_of(classification_rows(4))
    with torch.no_grad():
        assert torch.equal(trainer.s3t_model(**batch).loss, plain(**batch).loss)


# Sets of predictions


def tiny_yolos() -> PreTrainedModel:
    sizes = {**SIZES, "image_size": [8, 8], "patch_size": 4, "num_detection_tokens": 3, "num_labels": LABELS}
    return build("YolosForObjectDetection", "YolosConfig", **sizes)


def pictured(row: int) -> dict[str, Any]:
    return {"pixel_values": noise(row, 3, 8, 8), "classes": [row % LABELS], "boxes": [[0.5, 0.5, 0.3, 0.2]]}


def with_objects(rows: list[dict[str, Any]]) -> dict[str, Any]:
    labels = [{"class_labels": torch.tensor(r["classes"]), "boxes": torch.tensor(r["boxes"])} for r in rows]
    return {"pixel_values": torch.tensor([r["pixel_values"] for r in rows]), "labels": labels}


def detecting(path: Path, **config):
    return make_trainer(
        path,
        tiny_yolos(),
        rows_of(pictured),
        config=s3t_config(**config),
        peft_config=LoraConfig(r=2, target_modules=QUERY),
        data_collator=with_objects,
        args=training_arguments(path, remove_unused_columns=False, eval_do_concat_batches=False),
    )


@pytest.mark.parametrize("config", [{"num_shards": 2}, {"select": "all"}], ids=["shards", "stacks"])
def test_several_sets_of_predictions_are_refused_before_anything_is_written(tmp_path, config):
    with pytest.raises(ConfigError, match=r"`pred_boxes`, a set of predictions in no order.* Use num_shards=1"):
        detecting(tmp_path / "system", **config)
    assert not (tmp_path / "system").exists()


def test_one_detector_answers_and_is_evaluated_as_plain_peft(tmp_path):
    trainer = detecting(tmp_path / "system")
    plant_stages(trainer)
    model, rows = trainer.s3t_model, rows_of(pictured)[:4]
    model.export_adapter(0, tmp_path / "exported")
    plain = PeftModel.from_pretrained(tiny_yolos(), tmp_path / "exported").eval()
    with torch.no_grad():
        answer, expected = model(**with_objects(rows)), plain(**with_objects(rows))
    assert answer.keys() == expected.keys()
    for name in ("loss", "logits", "pred_boxes"):
        assert torch.equal(answer[name], expected[name])
    assert trainer.evaluate(Dataset.from_list(rows))["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
