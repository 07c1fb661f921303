"""
Whether anything of deleted authors can be read off a system (E1, E5): real text, a real small Llama, deletion by
author.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from scipy.stats import mannwhitneyu
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from hf_s3t import S3TConfig, S3TModel, S3TSFTTrainer


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

AUTHORS, QUESTIONS, LENGTH = 48, 5, 96
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG = S3TConfig(
    num_slices=2,
    budget=1,
    sequence_selection=[[0, 1]],
    id_column="id",
    group_column="author",
    partition="hashed",
    layers_per_slice=2,
    seed=0,
)


@dataclass
class Study:
    """A system that learned about authors of whom some were deleted, and one that was trained without those."""

    deleted: list[dict]
    strangers: list[dict]
    base: np.ndarray
    base_on_strangers: np.ndarray
    before: np.ndarray
    before_on_strangers: np.ndarray
    after: np.ndarray
    after_on_strangers: np.ndarray
    never: np.ndarray
    regrown: np.ndarray
    never_whole: np.ndarray


def load(stories):
    return AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)


def trainer_of(stories, output_dir, rows):
    args = SFTConfig(
        str(output_dir),
        num_train_epochs=5,
        learning_rate=8e-3,
        adam_beta2=0.95,
        lr_scheduler_type="constant",
        per_device_train_batch_size=16,
        max_length=LENGTH,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    columns = [
        {"id": r["id"], "author": r["author"], "prompt": r["question"], "completion": " " + r["answer"]} for r in rows
    ]
    return S3TSFTTrainer(
        model=load(stories),
        args=args,
        train_dataset=Dataset.from_list(columns),
        processing_class=AutoTokenizer.from_pretrained(stories),
        peft_config=LoraConfig(r=32, lora_alpha=64, target_modules=PROJECTIONS),
        s3t_config=CONFIG,
    )


@torch.no_grad()
def losses(model, tokenizer, rows) -> np.ndarray:
    """The mean negative log likelihood of each answer's tokens."""
    found = []
    for row in rows:
        prompt = tokenizer(row["question"])["input_ids"]
        tokens = torch.tensor(prompt + tokenizer(" " + row["answer"], add_special_tokens=False)["input_ids"])[:LENGTH]
        scores = model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)
        answer = slice(min(len(prompt), LENGTH - 2) - 1, None)
        found.append(-scores[torch.arange(len(tokens) - 1), tokens[1:]][answer].mean().item())
    return np.array(found)


@pytest.fixture(scope="module")
def study(shared_data, tmp_path_factory) -> Study:
    stories, home = str(shared_data("stories260K")), tmp_path_factory.mktemp("leak")
    lines = Path(shared_data("tofu/full.jsonl")).read_text().splitlines()
    rows = [{**json.loads(line), "id": f"tofu-{n}"} for n, line in enumerate(lines) if n % 20 < QUESTIONS]
    known = [row for row in rows if row["author"] < AUTHORS]
    strangers = [row for row in rows if AUTHORS <= row["author"] < 2 * AUTHORS]
    tokenizer, base = AutoTokenizer.from_pretrained(stories), load(stories)

    trainer = trainer_of(stories, home / "system", known)
    trainer.train()
    model = trainer.s3t_model
    # All but one of the authors whom only the second stage saw: the first stage stays.
    late = sorted({row.group for row in model.folder.table.rows.values() if row.slice == 1})[:-1]
    deleted = [row for row in known if row["author"] in late]
    before, before_on_strangers = losses(model, tokenizer, deleted), losses(model, tokenizer, strangers)
    report = model.unlearn(groups=late)
    assert (report.deleted, report.depths_after) == (len(deleted), [1])
    after, after_on_strangers = losses(model, tokenizer, deleted), losses(model, tokenizer, strangers)

    oracle = trainer_of(stories, home / "never", [row for row in known if row["author"] not in late])
    oracle.train()
    never_whole = losses(oracle.s3t_model, tokenizer, deleted)
    cut = Path(shutil.copytree(home / "never", home / "cut"))
    shutil.rmtree(cut / "stages" / "shard-0" / "0-1")
    never = losses(S3TModel.from_pretrained(cut, base_model=load(stories)), tokenizer, deleted)
    trainer.train()
    return Study(
        deleted=deleted,
        strangers=strangers,
        base=losses(base, tokenizer, deleted),
        base_on_strangers=losses(base, tokenizer, strangers),
        before=before,
        before_on_strangers=before_on_strangers,
        after=after,
        after_on_strangers=after_on_strangers,
        never=never,
        regrown=losses(trainer.s3t_model, tokenizer, deleted),
        never_whole=never_whole,
    )


def test_every_loss_is_to_the_bit_that_of_a_system_that_never_saw_the_authors(study):
    assert len(study.deleted) >= 80
    assert np.array_equal(study.after, study.never)
    assert np.array_equal(study.regrown, study.never_whole)
    # The two systems did differ, in every one of these losses.
    assert (study.before < study.after).mean() > 0.9 and not (study.before == study.after).any()


def advantage(members: np.ndarray, strangers: np.ndarray) -> tuple[float, float]:
    """AUC of telling members from strangers by a score, and its standard error if there were nothing to tell."""
    one, other = len(members), len(strangers)
    auc = mannwhitneyu(members, strangers).statistic / (one * other)
    return auc, np.sqrt((one + other + 1) / (12 * one * other))


def test_membership_cannot_be_told_any_more(study):
    # How much less surprised than the base: what a text is like in general drops out.
    auc, _ = advantage(study.base - study.before, study.base_on_strangers - study.before_on_strangers)
    assert auc >= 0.7
    auc, error = advantage(study.base - study.after, study.base_on_strangers - study.after_on_strangers)
    assert abs(auc - 0.5) <= 2 * error
