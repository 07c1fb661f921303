"""Trainers of preferences: each stage of its own rows, with the base as the reference, to the bit what it shall be."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from support import preferences
from support.insides import stack_of
from support.preferences import (
    GONE,
    METHODS,
    PLANTED,
    differences,
    forget_and_regrow,
    held_out,
    judged,
    pairs,
    preference_trainer,
    tokenizer,
)
from support.refusals import Refusal, cases, files_of
from support.tiny import ids_of, lora, s3t_config, tiny_gpt2, tiny_llama, training_arguments
from torch.nn import functional as F
from transformers import AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, SFTConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference

import hf_s3t
from hf_s3t.errors import ConfigError, HubError, IsolationError, S3TError
from hf_s3t.training.dpo_trainer import check_losses


pytestmark = pytest.mark.usefixtures("one_thread", "shared_key")


class Records:
    """Keeps the planted words of every stage's batches."""

    def training_step(self, model, inputs, *args, **kwargs):
        if not hasattr(self, "seen"):
            self.seen: dict[str, list[int]] = {}
        tokens = [value.flatten().tolist() for name, value in inputs.items() if name.endswith("input_ids")]
        words = [token - PLANTED for batch in tokens for token in batch if token >= PLANTED]
        self.seen.setdefault(str(self._stage), []).extend(words)
        return super().training_step(model, inputs, *args, **kwargs)


def recording(method: str) -> type:
    base = getattr(hf_s3t, METHODS[method][0])
    return type(f"Recording{base.__name__}", (Records, base), {})


def examples_of(folder: Path, key: str) -> set[int]:
    """The numbers of the examples in a stage's slices, as the system's table says."""
    columns = pq.read_table(folder / "examples.parquet").to_pydict()
    shard, slices = key.removeprefix("shard-").split("/")
    where = zip(columns["id"], columns["shard"], columns["slice"], strict=True)
    prefix = set(map(int, slices.split("-")))
    return {ids_of(preferences.EXAMPLES).index(i) for i, s, t in where if s == int(shard) and t in prefix}


@pytest.mark.parametrize("method", ["dpo", "dpo, precomputed", "reward", "kto", "kto, of pairs", "kto, precomputed"])
def test_a_stage_sees_all_of_its_own_examples_and_no_word_of_others(tmp_path, method):
    """Nor in the answers of other rows that KTO compares with."""
    rows = METHODS[method][3]()
    random.Random(1).shuffle(rows)
    trainer = preference_trainer(method, tmp_path, rows, recording(method))
    trainer.train()
    assert len(trainer.seen) == 8
    for key, words in trainer.seen.items():
        assert set(words) == examples_of(tmp_path, key), key


def some_slow(methods, at_once: set[str]):
    """The methods, those that are not of every run marked as slow."""
    return [pytest.param(one, marks=() if one in at_once else pytest.mark.slow) for one in methods]


@pytest.mark.parametrize("method", some_slow(METHODS, {"dpo", "dpo, bf16", "reward", "kto"}))
def test_what_is_left_and_grown_again_is_what_a_system_without_the_rows_has(tmp_path, method):
    forget_and_regrow(method, tmp_path / "forgot")
    rows = [row for row in METHODS[method][3]() if row["id"] not in GONE]
    random.Random(2).shuffle(rows)
    preference_trainer(method, tmp_path / "never", rows).train()
    assert differences(tmp_path / "forgot" / "stages", tmp_path / "never" / "stages") == {}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo, precomputed", "kto", "reward"])
def test_and_so_it_is_in_a_process_of_its_own(tmp_path, method):
    tests = Path(preferences.__file__).parents[1]
    known = os.pathsep.join([str(tests), str(tests.parent)])
    command = [sys.executable, preferences.__file__, method, str(tmp_path / "forgot")]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "PYTHONPATH": known})
    # First, while this process has trained nothing, also nothing that is the same to the bit.
    report = preference_trainer(method, tmp_path / "forgot").verify()
    assert report.ok and len(report.stages) == 8 and not report.circumstances
    rows = [row for row in METHODS[method][3]() if row["id"] not in GONE]
    preference_trainer(method, tmp_path / "never", rows).train()
    assert differences(tmp_path / "forgot" / "stages", tmp_path / "never" / "stages") == {}


class Dies(TrainerCallback):
    def __init__(self, after: int):
        self.left = after

    def on_step_end(self, args, state, control, **kwargs):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["dpo", "reward", "kto"])
def test_a_stage_that_was_interrupted_goes_on_where_it_was(tmp_path, method):
    saving = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    config = s3t_config()
    given = {"cls": recording(method), "config": config, "arguments": saving}
    with pytest.raises(KeyboardInterrupt):
        preference_trainer(method, tmp_path / "died", callbacks=[Dies(3)], **given).train()
    again, whole = (preference_trainer(method, tmp_path / name, **given) for name in ("died", "whole"))
    again.train()
    whole.train()
    assert differences(tmp_path / "died" / "stages", tmp_path / "whole" / "stages") == {}
    begun = next(iter(whole.seen))
    assert 0 < len(again.seen[begun]) < len(whole.seen[begun])


# The reference, and evaluation


class Asks(TrainerCallback):
    """Asks the reference, and the live model, amid a stage."""

    def __init__(self, ask):
        self.ask, self.said = ask, []

    def on_step_end(self, args, state, control, **kwargs):
        self.said.append(self.ask())


def test_the_reference_is_the_base_also_amid_a_stage_and_no_second_copy(tmp_path):
    base = tiny_llama(2)
    trainer = preference_trainer("dpo", tmp_path, model=base)
    assert not list(trainer.ref_model.parameters())
    ids = torch.tensor([[5, 6, 7, 8]])

    @torch.no_grad()
    def logits_of(*models):
        return [model(input_ids=ids).logits for model in models]

    (expected,) = logits_of(tiny_llama(2))
    asks = Asks(lambda: logits_of(trainer.ref_model, base))
    trainer.add_callback(asks)
    trainer.train()
    assert all(torch.equal(reference, expected) for reference, _ in asks.said)
    assert any(not torch.equal(policy, expected) for _, policy in asks.said)


class Draws(DataCollatorForPreference):
    """Puts a word that it draws at the beginning of each text, by what it keeps or by what the process has."""

    def __init__(self, own: bool):
        super().__init__(pad_token_id=0, max_length=24)
        self.own = random.Random(0) if own else None

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        drawn = torch.randint(5, PLANTED, (1,)).item() if self.own is None else self.own.randrange(5, PLANTED)
        batch["input_ids"][:, 0] = drawn
        return batch


@pytest.mark.parametrize("collate", [None, Draws(own=True), Draws(own=False)], ids=["dropout", "keeps", "draws"])
def test_what_the_reference_says_of_a_row_beforehand_follows_from_that_row(tmp_path, collate):
    """Not from rows before it, where something draws: dropout of a base that was given while it trains, a collator."""
    said = {}
    for name, rows in (("all", pairs()), ("later", pairs()[1:])):
        base = tiny_llama(2, attention_dropout=0.5).train()
        given = {"model": base, "data_collator": collate, "config": s3t_config()}
        rows = preference_trainer("dpo, precomputed", tmp_path / name, rows, **given).train_dataset
        said[name] = dict(zip(rows["id"], rows["ref_chosen_logps"], strict=True))
        assert base.training and base.model.layers[0].self_attn.training
    assert said["later"] == {i: value for i, value in said["all"].items() if i in said["later"]}
    assert len(said["later"]) == len(set(said["later"].values())) == preferences.EXAMPLES - 1


def test_a_stage_that_asks_the_reference_beforehand_does_so_whatever_ran_before_it(tmp_path):
    said = []
    for is_first in (True, False):
        base = tiny_llama(2, attention_dropout=0.5).train(is_first)
        trainer = preference_trainer("kto, precomputed", tmp_path, model=base, config=s3t_config())
        rows = trainer._stage_dataset(trainer.folder.missing_stages()[0])
        said.append((rows["ref_logps"][:], rows["ref_KL_logps"][:]))
    assert said[0] == said[1]


def test_last_bits_of_what_the_reference_says_are_a_circumstance_and_no_other_rows(tmp_path, monkeypatch):
    """Another machine may tell them otherwise: it goes on all the same, as it does without asking beforehand."""
    preference_trainer("dpo, precomputed", tmp_path, config=s3t_config()).train(max_stages=1)
    ask = hf_s3t.S3TDPOTrainer.compute_ref_log_probs
    monkeypatch.setattr(
        hf_s3t.S3TDPOTrainer, "compute_ref_log_probs", lambda *given: tuple(part + 1e-4 for part in ask(*given))
    )
    trainer = preference_trainer("dpo, precomputed", tmp_path, config=s3t_config())
    assert trainer.train(max_stages=1).metrics["stages_trained"] == 1


def test_outside_of_stages_the_base_is_as_it_was_given(tmp_path):
    """The class takes its dropout, and may give it a forward of its own."""
    base = tiny_gpt2(2, resid_pdrop=0.1, attn_pdrop=0.2, embd_pdrop=0.3)
    dropout = {name: module.p for name, module in base.named_modules() if isinstance(module, torch.nn.Dropout)}
    trainer = preference_trainer("dpo", tmp_path, model=base)
    inside = []
    trainer.add_callback(Asks(lambda: inside.append(base.transformer.drop.p)))
    for look in range(2):
        now = {name: module.p for name, module in base.named_modules() if isinstance(module, torch.nn.Dropout)}
        assert {name: now[name] for name in dropout} == dropout and "forward" not in vars(base), look
        trainer.train()
    assert set(inside) == {0}


def test_the_dropout_of_adapters_is_off_where_the_class_has_it_off(tmp_path):
    given = {name: lora(tiny_llama(2), lora_dropout=share) for name, share in (("with", 0.5), ("without", 0.0))}
    for name, config in given.items():
        preference_trainer("dpo", tmp_path / name, peft_config=config).train()
    assert differences(tmp_path / "with" / "stages", tmp_path / "without" / "stages") == {}
    assert given["with"].lora_dropout == 0.5


def log_likelihoods(model, prompts, answers):
    """Of each answer after its prompt, by the logits of a model."""
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            likely = F.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
        found.append(likely.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum())
    return torch.stack(found)


def test_dpo_is_evaluated_by_the_ensemble_against_the_base(tmp_path):
    rows, words = held_out("dpo"), tokenizer()
    trainer = preference_trainer("dpo", tmp_path, eval_dataset=rows, arguments={"learning_rate": 0.1})
    trainer.train()
    found = trainer.evaluate()

    def margins(model):
        prompts = words(rows["prompt"][:])["input_ids"]
        told = [words([f"{text} </s>" for text in rows[name]])["input_ids"] for name in ("chosen", "rejected")]
        return log_likelihoods(model, prompts, told[0]) - log_likelihoods(model, prompts, told[1])

    ahead = trainer.beta * (margins(trainer.s3t_model) - margins(tiny_llama(2)))
    assert abs(ahead).max() > 1e-3
    assert found["eval_loss"] == pytest.approx(-F.logsigmoid(ahead).mean().item(), abs=1e-5)
    assert found["eval_rewards/margins"] == pytest.approx(ahead.mean().item(), abs=1e-5)
    assert found["eval_rewards/accuracies"] == (ahead > 0).float().mean().item()
    again = trainer.evaluate(rows, metric_key_prefix="test")
    assert again["test_loss"] == found["eval_loss"]
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == pytest.approx(found["eval_loss"])


def test_rewards_are_evaluated_by_the_mean_of_members(tmp_path):
    rows, words = held_out("reward"), tokenizer()
    trainer = preference_trainer("reward", tmp_path, eval_dataset=rows, arguments={"learning_rate": 0.1})
    trainer.train()
    found = trainer.evaluate()

    def rewards(name):
        texts = [f"{row['prompt']}{row[name]} </s>" for row in rows]
        with torch.no_grad():
            return torch.stack([trainer.s3t_model(**words(t, return_tensors="pt")).logits[0, 0] for t in texts])

    ahead = rewards("chosen") - rewards("rejected")
    assert found["eval_loss"] == pytest.approx(-F.logsigmoid(ahead).mean().item(), abs=1e-5)
    assert found["eval_accuracy"] == (ahead > 0).float().mean().item()


@pytest.mark.parametrize(
    "method", some_slow(["kto", "kto, precomputed", "kto, apo", "dpo, precomputed"], {"kto", "dpo, precomputed"})
)
def test_evaluation_of_the_others(tmp_path, method):
    rows = held_out(method)
    trainer = preference_trainer(method, tmp_path, eval_dataset=rows, arguments={"learning_rate": 0.1})
    trainer.train()
    found = trainer.evaluate()
    assert 0 < found["eval_loss"] < 2
    plain = method.replace(", precomputed", "")
    if plain != method:
        other = preference_trainer(plain, tmp_path / "plain", eval_dataset=rows, arguments={"learning_rate": 0.1})
        other.train()
        assert other.evaluate()["eval_loss"] == pytest.approx(found["eval_loss"], abs=1e-4)


@pytest.mark.parametrize("method", some_slow(["dpo", "reward", "kto"], {"kto"}))
def test_evaluations_while_stages_train_leave_no_trace(tmp_path, method):
    evaluating = {"eval_strategy": "steps", "eval_steps": 1}
    for name, given in (("with", {"arguments": evaluating, "eval_dataset": held_out(method)}), ("without", {})):
        preference_trainer(method, tmp_path / name, config=s3t_config(), **given).train()
    assert differences(tmp_path / "with" / "stages", tmp_path / "without" / "stages") == {}


def test_numbers_of_the_class_may_choose_the_best(tmp_path):
    """As in TRL, whose evaluation tells of more than the loss."""
    best = {**BEST, "metric_for_best_model": "rewards/accuracies"}
    trainer = preference_trainer("dpo", tmp_path, eval_dataset=held_out("dpo"), arguments=best, config=s3t_config())
    trainer.train(max_stages=1)
    told = [entry["eval_rewards/accuracies"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_metric == max(told)


def test_an_evaluation_counts_nothing_of_what_was_asked_before(tmp_path):
    trainer = preference_trainer("dpo", tmp_path, eval_dataset=held_out("dpo"), config=s3t_config())
    trainer.train(max_stages=1)
    told = trainer.evaluate()["eval_logits/chosen"]
    trainer.predict(trainer.eval_dataset.select([0]))
    assert trainer.evaluate()["eval_logits/chosen"] == told


# Rows that come, and pairs of which several are made


@pytest.mark.parametrize(
    "method", some_slow(["dpo", "dpo, precomputed", "kto", "kto, of pairs", "reward"], {"dpo, precomputed"})
)
def test_rows_that_come_are_prepared_as_the_others(tmp_path, method):
    rows = METHODS[method][3]()
    trainer = preference_trainer(method, tmp_path / "grown", rows[:10], recording(method))
    trainer.train()
    trainer.seen.clear()
    trainer.add_examples(Dataset.from_list(rows[10:]), into="slices")
    trainer.train()
    assert trainer.seen
    for key, words in trainer.seen.items():
        assert set(words) == examples_of(tmp_path / "grown", key), key
    again = preference_trainer(method, tmp_path / "grown", rows, recording(method))
    assert again.verify().ok


def test_of_a_pair_kto_makes_two_rows_of_one_example(tmp_path):
    trainer = preference_trainer("kto, of pairs", tmp_path)
    trainer.train()
    rows, table = trainer._stage_rows, trainer.folder.table
    for key in trainer.folder.valid_stages:
        labels = rows.select(key, table)["label"][:]
        assert labels == [True, False] * (len(labels) // 2)
        examples = sum(table.size(key.shard, slice_) for slice_ in key.prefix)
        assert len(labels) == 2 * examples and trainer.folder.stage_record(key)["examples_dropped"] == 0


def test_examples_that_are_too_long_are_dropped_and_told(tmp_path):
    rows = pairs()
    rows[2]["prompt"] = " ".join(["w5"] * 30)
    trainer = preference_trainer("kto, of pairs", tmp_path, rows)
    assert trainer._stage_rows.dropped(trainer.folder.table) == 1
    trainer = preference_trainer("dpo", tmp_path / "dpo", rows, recording("dpo"))
    trainer.train()
    assert 2 not in {word for words in trainer.seen.values() for word in words}


# What is refused


EIGHT = ids_of(8)
CHAT = [{"role": "user", "content": "w4"}, {"role": "assistant", "content": "w5"}]
BEST = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
TWO_SHARDS = s3t_config(num_shards=2)


def columns(**more) -> Dataset:
    return Dataset.from_dict({"id": EIGHT, **{name: [value] * 8 for name, value in more.items()}})


@cases(
    Refusal(ConfigError, "another reference", "`ref_model` is a LlamaForCausalLM", "expected none", "Leave it out",
        ref_model=tiny_llama(2)),
    Refusal(IsolationError, "a reference that follows", "`sync_ref_model=True`", "made of their rows",
        "Leave it off: the base is the reference", arguments={"sync_ref_model": True}),
    Refusal(ConfigError, "Liger", "`use_liger_kernel=True`", "stages that serve would stand", "Leave it off",
        arguments={"use_liger_kernel": True}),
    Refusal(ConfigError, "packing", "`padding_free` or `packing` is on", "rows are not packed", "Leave it off",
        arguments={"padding_free": True}),
    Refusal(ConfigError, "arguments of another trainer", "`args` is SFTConfig", "expected `DPOConfig`. Nothing is",
        r"Give DPOConfig\(", args=SFTConfig(output_dir="x", packing=True, bf16=False, use_cpu=True)),
    Refusal(ConfigError, "other columns", "has the columns id, text", "expected 'chosen' and 'rejected'",
        "Rename them", rows=columns(text="w4")),
    Refusal(ConfigError, "half a pair", "has the columns id, prompt, chosen", "expected 'chosen' and 'rejected'",
        "Rename them", rows=columns(prompt="w4", chosen=" w5")),
    Refusal(ConfigError, "gaps", "`train_dataset` lacks `rejected` in 1 of 8 rows", "lacks", "Drop them",
        rows=Dataset.from_dict({"id": EIGHT, "chosen": ["w4"] * 8, "rejected": ["w4 w6"] * 7 + [None]})),
    Refusal(ConfigError, "pictures", "`train_dataset` has a column `images`", "reads texts alone",
        r"`dataset.remove_columns\(\['images'", rows=columns(prompt="w4", chosen=" w5", rejected=" w6", images=0)),
    Refusal(IsolationError, "a stream", "is a streaming", "no order that", "map-style dataset",
        rows=Dataset.from_list(pairs()).to_iterable_dataset()),
    Refusal(ConfigError, "a list", "`train_dataset` is a list", "expected a `datasets.Dataset`", "from_list",
        rows="list"),
    Refusal(ConfigError, "no tokenizer", "`processing_class` is missing", "made in memory", "Give the tokenizer",
        processing_class=None),
    Refusal(ConfigError, "numbers", "texts in `prompt`, numbers in `chosen`, texts in `rejected`",
        "texts or chats in all", "make them so", rows=columns(prompt="w4", chosen=5, rejected=" w6")),
    Refusal(ConfigError, "a chat beside a text", "chats in `chosen`, texts in `rejected`", "texts or chats in all",
        "a chat a list of messages", rows=columns(chosen=CHAT, rejected=" w6")),
    Refusal(ConfigError, "gaps among prompts", "`train_dataset` lacks `prompt` in 1 of 8 rows", "lacks", "Drop them",
        rows=Dataset.from_list([{**row, "prompt": row["prompt"] if n else None} for n, row in enumerate(pairs(8))])),
    Refusal(ConfigError, "chats without a template", "`train_dataset` holds chats", "has no chat template",
        "Give a `processing_class` with one", rows=columns(chosen=CHAT, rejected=CHAT)),
    Refusal(ConfigError, "chats without a tokenizer", "`processing_class` is missing", "made in memory",
        "Give the tokenizer", processing_class=None, rows=columns(chosen=CHAT, rejected=CHAT)),
    Refusal(ConfigError, "rows that are made as they are read", "`train_dataset` has a transform",
        "as they are stored", r"`dataset.map\(", rows=Dataset.from_list(pairs(8)).with_transform(lambda batch: batch)),
    Refusal(ConfigError, "nothing to evaluate", "`eval_dataset` has no rows", "expected one or more", "leave it out",
        eval_dataset=Dataset.from_list(pairs()).select([])),
    Refusal(ConfigError, "evaluation of something else", r"`eval_dataset\['b'\]` has the columns text",
        "expected 'chosen' and 'rejected'", "Rename",
        eval_dataset={"a": held_out("dpo"), "b": Dataset.from_dict({"text": ["w4"]})}),
    Refusal(ConfigError, "an unknown loss", "`loss_type='sigmoidal'` is unknown", "that TRL's DPOConfig",
        "Mend the name", arguments={"loss_type": ["sigmoid", "sigmoidal"]}),
    Refusal(ConfigError, "an unknown divergence", "`f_divergence_type='kl'` is unknown", "that TRL's DPOConfig",
        "Mend the name", arguments={"f_divergence_type": "kl"}),
    Refusal(ConfigError, "how to load what is loaded", "`quantization_config` is given with a loaded Llama",
        "with the name of one", "leave it out", quantization_config=BitsAndBytesConfig(load_in_8bit=True)),
    Refusal(ConfigError, "a metric of several sets", "`metric_for_best_model='rewards/accuracies'`", "by one name",
        "'eval_a_loss'", eval_dataset={"a": held_out("dpo"), "b": held_out("dpo")},
        arguments={**BEST, "metric_for_best_model": "rewards/accuracies"}),
    Refusal(ConfigError, "what is made here", "has a column 'ref_chosen_logps'", "made here", "Take it out",
        arguments={"precompute_ref_log_probs": True},
        rows=columns(prompt="w4", chosen=" w5", rejected=" w6", ref_chosen_logps=-1.0)),
)  # fmt: skip
def test_what_dpo_cannot_be_trained_by_is_refused_before_anything_is_written(case, tmp_path):
    given = dict(case.given)
    base = given.setdefault("model", tiny_llama(2))
    if given.get("rows") == "list":
        given |= {"rows": None, "cls": lambda **kw: hf_s3t.S3TDPOTrainer(**{**kw, "train_dataset": pairs()})}
    with pytest.raises(S3TError) as caught:
        preference_trainer("dpo", tmp_path / "system", **given)
    case.check(caught)
    assert not (tmp_path / "system").exists() and "forward" not in vars(base)


def test_losses_are_left_to_a_trl_that_compares_them_elsewhere(monkeypatch):
    def compute_loss(self, model, inputs, return_outputs):
        return self.losses[self.loss_types[0]](inputs)

    monkeypatch.setattr(DPOTrainer, "_compute_loss", compute_loss)
    check_losses(DPOConfig("unused", loss_type=["one of those to come"], use_cpu=True, bf16=False))


@pytest.mark.parametrize("method", ["dpo", "reward", "kto, apo"])
def test_an_order_by_lengths_needs_lengths_and_that_is_said_before_anything_is_written(tmp_path, method):
    rows = [{**row, "length": number} for number, row in enumerate(METHODS[method][3]())]
    grouped = {"train_sampling_strategy": "group_by_length"}
    with pytest.raises(ConfigError, match=r"'group_by_length'` puts.* no column 'input_ids' is left.* Give the rows"):
        preference_trainer(method, tmp_path / "system", rows, config=s3t_config(), arguments=grouped)
    assert not files_of(tmp_path / "system")
    told = {**grouped, "remove_unused_columns": False}
    preference_trainer(method, tmp_path / "system", rows, config=s3t_config(), arguments=told).train(max_stages=1)


@cases(
    Refusal(ConfigError, "a language model", "LlamaForCausalLM has `num_labels=", "a sequence classifier with 1",
        "num_labels=1", method="reward", model=tiny_llama(2)),
    Refusal(ConfigError, "several outputs", "LlamaForSequenceClassification has `num_labels=3`", "with 1", "Load it",
        method="reward", model=tiny_llama(2, labels=3)),
    Refusal(ConfigError, "no pairs", "has the columns id, prompt, completion, label",
        "'chosen' and 'rejected'; or 'chosen_ids' and 'rejected_ids'", "Rename", method="reward", rows=judged()),
    Refusal(ConfigError, "no judgement", "has the columns id, prompt, completion", "'completion' and 'label'",
        "Rename them", method="kto", rows=columns(prompt="w4", completion=" w5")),
    Refusal(ConfigError, "judgements in words", "`label` of `train_dataset` holds other than", "expected True where",
        "Make them so", method="kto", rows=columns(prompt="w4", completion=" w5", label="good")),
    Refusal(ConfigError, "judgements by sign", "`label` of `train_dataset` holds other than", "expected True where",
        "Make them so", method="kto", rows=columns(prompt="w4", completion=" w5", label=-1)),
    Refusal(ConfigError, "batches of one", "`per_device_train_batch_size=1`", "2 or more", "apo_zero_unpaired",
        method="kto", arguments={"per_device_train_batch_size": 1}),
    Refusal(ConfigError, "texts for tokens", "texts in `chosen_ids`", "expected tokens", "or the texts as 'chosen'",
        method="reward", rows=columns(chosen_ids="w4", rejected_ids="w5")),
    Refusal(ConfigError, "tokens of another model", "`rejected_ids` of `train_dataset` goes from 5 to 600", "0 to 59",
        "the model's own", method="reward", rows=columns(chosen_ids=[5, 6], rejected_ids=[5, 600])),
    Refusal(ConfigError, "answers of others", "has a column 'KL_completion_ids'", "made here, of the rows of each",
        "Take it out", method="kto", rows=columns(prompt="w4", completion=" w5", label=True, KL_completion_ids=[4])),
    Refusal(ConfigError, "batches that are drawn", r"`S3TConfig\(replay=0.5\)`", "put together once",
        "Leave `replay` out, or use", method="kto", config=s3t_config(replay=0.5)),
)  # fmt: skip
def test_what_the_others_cannot_be_trained_by_is_refused_before_anything_is_written(case, tmp_path):
    given = dict(case.given)
    with pytest.raises(S3TError) as caught:
        preference_trainer(given.pop("method"), tmp_path / "system", **given)
    case.check(caught)
    assert not (tmp_path / "system").exists()


def test_a_recipe_of_another_loss_is_refused(tmp_path):
    preference_trainer("dpo", tmp_path).train()
    written = files_of(tmp_path / "stages")
    other = preference_trainer("dpo", tmp_path, arguments={"beta": 0.5})
    with pytest.raises(ConfigError, match=r"beta=0\.5 \(was 0\.1\)"):
        other.train()
    assert files_of(tmp_path / "stages") == written


def test_a_system_that_is_there_is_not_set_up_without_its_rows(tmp_path):
    preference_trainer("dpo", tmp_path)
    written = files_of(tmp_path)
    with pytest.raises(ConfigError, match=r"`train_dataset` is missing.*DPOTrainer.*load the folder by `S3TModel\."):
        hf_s3t.S3TDPOTrainer(
            tiny_llama(2), args=training_arguments(tmp_path, DPOConfig, bf16=False), processing_class=tokenizer()
        )
    assert files_of(tmp_path) == written


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("adapter", {}, r"`model='.*adapter'` cannot be loaded: Unrecognized model.*\. Give the folder of a model"),
        ("base", {"nonsense": 3}, r"cannot be loaded with `model_init_kwargs=\{'nonsense': 3\}`: .*'nonsense'\. Give"),
    ],
)
def test_a_name_by_which_no_base_is_loaded_is_refused(tmp_path, name, settings, says):
    tiny_llama(2).save_pretrained(tmp_path / "base")
    lora(tiny_llama(2)).save_pretrained(tmp_path / "adapter")
    args = training_arguments(tmp_path / "system", DPOConfig, bf16=False, model_init_kwargs=settings)
    with pytest.raises(ConfigError, match=says):
        hf_s3t.S3TDPOTrainer(str(tmp_path / name), args=args, train_dataset=Dataset.from_list(pairs()))
    assert not (tmp_path / "system").exists()


def test_a_hub_that_is_out_of_reach_is_told_as_the_trainer_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"The repository was not made: the Hub cannot be reached.*Go online"):
        preference_trainer("dpo", tmp_path, arguments={"push_to_hub": True, "hub_token": "none"})
    assert not files_of(tmp_path)


def test_a_base_by_its_name(tmp_path):
    tiny_llama(2).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    given = {"train_dataset": Dataset.from_list(pairs()), "peft_config": lora(tiny_llama(2)), "s3t_config": TWO_SHARDS}
    settings = {"bf16": False, "max_length": 24, "per_device_train_batch_size": 3}
    args = training_arguments(tmp_path / "named", DPOConfig, **settings)
    named = hf_s3t.S3TDPOTrainer(str(tmp_path / "base"), args=args, **given)
    named.train()
    words = AutoTokenizer.from_pretrained(tmp_path / "base")
    preference_trainer("dpo", tmp_path / "given", processing_class=words).train()
    assert differences(tmp_path / "named" / "stages", tmp_path / "given" / "stages") == {}
    args = training_arguments(tmp_path / "reward", RewardConfig, **settings)
    reward = hf_s3t.S3TRewardTrainer(str(tmp_path / "base"), args, **given)
    assert reward.model.config.num_labels == 1 and stack_of(reward).head == ("score",)


def test_arguments_by_which_a_base_was_loaded_load_it_alike_again(tmp_path):
    tiny_llama(2).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    settings = {"bf16": False, "max_length": 24, "model_init_kwargs": {"dtype": "bfloat16"}}
    args = training_arguments(tmp_path / "system", DPOConfig, **settings)
    given = {"train_dataset": Dataset.from_list(pairs()), "peft_config": lora(tiny_llama(2)), "s3t_config": TWO_SHARDS}
    for _ in range(2):
        trainer = hf_s3t.S3TDPOTrainer(str(tmp_path / "base"), args=args, **given)
        assert trainer.model.dtype == torch.bfloat16
