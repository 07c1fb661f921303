"""What serves equals plain PEFT, one stack at a time; generation, pipelines and memory follow from that."""

import gc
import itertools
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from support.insides import routing_of
from support.plain_peft import difference, naive_ensemble, naive_member
from support.tiny import (
    BOS,
    EOS,
    FIRST_WORD,
    LABELS,
    PAD,
    VOCABULARY,
    batch_of,
    build,
    classification_rows,
    ids_of,
    image_rows,
    lm_rows,
    lora,
    make_trainer,
    plant_stages,
    s3t_config,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_qwen2,
    tiny_roberta,
    tiny_vit,
    training_arguments,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationMixin,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    pipeline,
)
from transformers.modeling_outputs import CausalLMOutput

from hf_s3t import S3TModel
from hf_s3t.errors import ConfigError, ExhaustedError, FolderError, IsolationError, S3TError, StaleCacheError


# Minutes on two cores: part of `make test-slow`.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


TOLERANCE = 1e-5


# Systems


def tiny_distilbert(**changes):
    settings = dict(vocab_size=VOCABULARY, pad_token_id=PAD, dim=16, hidden_dim=32, n_layers=4, n_heads=2)
    return build(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        **{**settings, "max_position_embeddings": 64, "num_labels": LABELS, **changes},
    )


@dataclass(frozen=True)
class Made:
    """A system in a folder that no test changes, and how to make its base again."""

    path: Path
    fresh: Callable[[], nn.Module]
    rows: list[dict[str, Any]]
    _members: dict = field(default_factory=dict)

    @cached_property
    def model(self) -> S3TModel:
        """The model of the folder itself, for tests that change nothing."""
        return S3TModel.from_pretrained(self.path, base_model=self.fresh())

    def copy(self, to: Path, **settings) -> S3TModel:
        """The model of a copy of the folder, free to be changed."""
        shutil.copytree(self.path, to)
        return S3TModel.from_pretrained(to, base_model=self.fresh(), **settings)

    def member(self, shard: int, prefix: tuple[int, ...]) -> PeftModel:
        """One stack as plain PEFT, each on a base of its own."""
        if (shard, prefix) not in self._members:
            self._members[shard, prefix] = naive_member(self.fresh(), self.path, shard, prefix)
        return self._members[shard, prefix]


@dataclass(frozen=True)
class Recipe:
    fresh: Callable[[], nn.Module]
    shards: int = 3
    slices: int = 3
    sequences: tuple | None = None
    peft: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    rows: Callable[[], list] | None = None
    trained: bool = False

    def make(self, path: Path) -> Made:
        model = self.fresh()
        rows = (self.rows or rows_of(model))()
        sequences = self.sequences or (tuple(range(self.slices)),)
        config = s3t_config(
            num_shards=self.shards,
            num_slices=self.slices,
            budget=len(sequences),
            sequence_selection=[list(sequence) for sequence in sequences],
            partition="balanced",
            **self.config,
        )
        trainer = make_trainer(
            path,
            model,
            rows,
            config=config,
            peft_config=lora(model, **self.peft),
            args=training_arguments(path, max_steps=2, learning_rate=5e-2),
        )
        if self.trained:
            trainer.train()
        else:
            plant_stages(trainer)
        return Made(path, self.fresh, rows)


def rows_of(model) -> Callable[[], list]:
    if model.main_input_name == "pixel_values":
        return image_rows
    return lm_rows if model.can_generate() else classification_rows


ROTATED = ((0, 1), (1, 0))
RANKS = {"rank_pattern": {"q_proj": 3, "layers.2.mlp.down_proj": 1}, "alpha_pattern": {"q_proj": 7}}
RECIPES = {
    # Every architecture, with stages that were trained for two and planted for the others.
    "llama": Recipe(partial(tiny_llama, 3), trained=True),
    "gpt2": Recipe(partial(tiny_gpt2, 3)),
    "qwen2": Recipe(partial(tiny_qwen2, 3)),
    "bert": Recipe(partial(tiny_bert, 3)),
    "roberta": Recipe(partial(tiny_roberta, 3), trained=True),
    "vit": Recipe(partial(tiny_vit, 3)),
    "distilbert": Recipe(partial(tiny_distilbert, n_layers=3)),
    # One member, and two.
    "llama, m = 1": Recipe(tiny_llama, shards=1),
    "bert, m = 1": Recipe(tiny_bert, shards=1),
    "gpt2, m = 2": Recipe(tiny_gpt2, shards=2),
    "roberta, m = 2": Recipe(tiny_roberta, shards=2),
    # The variants of LoRA.
    "llama, rslora": Recipe(partial(tiny_llama, 3), peft={"use_rslora": True, "lora_alpha": 3}),
    "llama, dora": Recipe(partial(tiny_llama, 3), peft={"use_dora": True}),
    "gpt2, dora": Recipe(partial(tiny_gpt2, 3), peft={"use_dora": True}, shards=2),
    "vit, dora and rslora": Recipe(partial(tiny_vit, 3), peft={"use_dora": True, "use_rslora": True}, shards=2),
    "llama, rank_pattern": Recipe(partial(tiny_llama, 3), peft={**RANKS, "target_modules": "all-linear"}),
    "bert, regular expression": Recipe(partial(tiny_bert, 3), peft={"target_modules": r".*\.(query|output\.dense)"}),
    "llama, lora dropout": Recipe(partial(tiny_llama, 3), peft={"lora_dropout": 0.5}, shards=2),
    # Other ways to make one answer of many.
    "llama, mean_logits": Recipe(
        tiny_llama, slices=1, shards=2, config={"aggregation": "mean_logits"}, peft={"use_rslora": True}
    ),
    "bert, mean_probabilities": Recipe(tiny_bert, slices=1, config={"aggregation": "mean_probabilities"}),
    "bert, majority_vote": Recipe(tiny_bert, slices=1, config={"aggregation": "majority_vote"}),
    "llama, all": Recipe(tiny_llama, shards=2, slices=2, sequences=ROTATED, config={"select": "all"}),
    "bert, all": Recipe(tiny_bert, shards=2, slices=2, sequences=ROTATED, config={"select": "all"}),
    "bert, all in memory": Recipe(tiny_bert, shards=2, slices=2, sequences=ROTATED),
    "llama, m = 5": Recipe(tiny_llama, shards=5, slices=2, rows=partial(lm_rows, 30)),
    "bert, m = 5": Recipe(tiny_bert, shards=5, slices=2, rows=partial(classification_rows, 30)),
}
LANGUAGE = ("llama", "gpt2", "qwen2")


@pytest.fixture(scope="module")
def system(tmp_path_factory) -> Callable[[str], Made]:
    """A function from the name of a recipe to its system, made when it is first asked for."""
    made: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in made:
            made[name] = RECIPES[name].make(tmp_path_factory.mktemp("system") / "folder")
        return made[name]

    return get


def forget(model: S3TModel, rows: list[dict[str, Any]], *places: tuple[int, int]):
    """Unlearn one example of each (shard, slice)."""
    left = [row["id"] for row in rows if not model.folder.is_deleted(row["id"])]
    at = {place: i for i, place in model.locate(left).items()}
    return model.unlearn([at[place] for place in places])


def is_language_model(made: Made) -> bool:
    return "labels" in made.rows[0] and isinstance(made.rows[0]["labels"], list)


def inputs_of(made: Made, count: int, padding: str | None = None) -> dict[str, torch.Tensor]:
    """A batch of the system's rows, with padding on a side where it is asked for."""
    batch = batch_of(made.rows[:count])
    batch.pop("labels", None)
    if padding is not None:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        for row in range(count):
            hidden = slice(0, 2 * row + 1) if padding == "left" else slice(7 - 2 * row, None)
            batch["input_ids"][row, hidden] = PAD
            batch["attention_mask"][row, hidden] = 0
    return batch


# Forward


FULL = "full"
UNEQUAL = "unequal"
ONE_DEAD = "one shard dead"
# What is unlearned on the way from each state to the next, by (shard, slice), and the depths that serve then.
STATES = {
    FULL: ([], [3, 3, 3]),
    UNEQUAL: ([(0, 2), (1, 1)], [2, 1, 3]),
    ONE_DEAD: ([(0, 0), (2, 2)], [0, 1, 2]),
}


def states(model: S3TModel, made: Made) -> Iterator[tuple[str, list[list[nn.Module]]]]:
    """Take a model of three slices a shard from state to state; with each comes its naive ensemble."""
    for state, (places, depths) in STATES.items():
        depths = depths[: model.folder.plan.num_shards]
        if not any(depths):
            return
        if places:
            forget(model, made.rows, *(place for place in places if place[0] < len(depths)))
        assert model.status()["depths"] == depths
        yield state, [[made.member(shard, tuple(range(depth)))] if depth else [] for shard, depth in enumerate(depths)]


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.slices == 3])
def test_forward_equals_plain_peft(system, tmp_path, name):
    made = system(name)
    model = made.copy(tmp_path / "copy")
    how = "mean_probabilities" if is_language_model(made) else "mean_logits"
    paddings = [None] if "pixel_values" in made.rows[0] else [None, "left" if is_language_model(made) else "right"]
    for state, members in states(model, made):
        for count, padding in itertools.product((1, 4), paddings):
            inputs = inputs_of(made, count, padding)
            expected = naive_ensemble(members, how, inputs)
            assert difference(model(**inputs).logits, expected) <= TOLERANCE, (state, count, padding)
        # The stacks have something to say, each its own: otherwise equality would mean little.
        answers = [made.fresh()(**inputs).logits, *(stacks[0](**inputs).logits for stacks in members if stacks)]
        for one, other in itertools.combinations(answers, 2):
            assert difference(one, other) > 100 * TOLERANCE


def test_depth_matters(system):
    """The states above differ: each stage of a stack changes the answer."""
    for name in ("llama", "roberta"):
        made = system(name)
        inputs = inputs_of(made, 4)
        answers = [made.member(0, tuple(range(depth)))(**inputs).logits for depth in (1, 2, 3)]
        assert difference(answers[0], answers[1]) > 100 * TOLERANCE
        assert difference(answers[1], answers[2]) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["llama, mean_logits", "bert, mean_probabilities"])
def test_the_aggregation_can_be_chosen(system, name):
    made = system(name)
    model = made.model
    members = [[made.member(shard, (0,))] for shard in range(RECIPES[name].shards)]
    inputs = inputs_of(made, 4)
    chosen = RECIPES[name].config["aggregation"]
    other = "mean_probabilities" if chosen == "mean_logits" else "mean_logits"
    assert difference(model(**inputs).logits, naive_ensemble(members, chosen, inputs)) <= TOLERANCE
    assert difference(model(**inputs).logits, naive_ensemble(members, other, inputs)) > 10 * TOLERANCE


def test_mean_probabilities_are_the_logarithm_of_the_mean(system):
    made = system("llama")
    logits = made.model(**inputs_of(made, 4)).logits
    assert torch.allclose(logits.exp().sum(-1), torch.ones(4, logits.shape[1]), atol=1e-5)
    with torch.no_grad():
        probabilities = [made.member(shard, (0, 1, 2))(**inputs_of(made, 4)).logits.softmax(-1) for shard in range(3)]
    assert difference(logits.exp(), torch.stack(probabilities).mean(0)) <= TOLERANCE


def test_majority_vote(system):
    made = system("bert, majority_vote")
    model = made.model
    inputs = inputs_of(made, len(made.rows))
    with torch.no_grad():
        votes = torch.stack([made.member(shard, (0,))(**inputs).logits.argmax(-1) for shard in range(3)])
    assert {len(column.unique()) for column in votes.T} == {2, 3}, "needs rows with a majority and rows with none"
    shares = model(**inputs).logits
    for row in range(len(made.rows)):
        for label in range(LABELS):
            assert shares[row, label].item() == pytest.approx((votes[:, row] == label).sum().item() / 3)


@pytest.mark.parametrize("name", ["llama, all", "bert, all"])
def test_select_all_gives_every_shard_the_same_weight(system, tmp_path, name):
    made = system(name)
    model = made.copy(tmp_path / "copy")
    how = "mean_probabilities" if is_language_model(made) else "mean_logits"
    inputs = inputs_of(made, 4)
    both = [[made.member(shard, (0, 1)), made.member(shard, (1, 0))] for shard in range(2)]
    assert difference(model(**inputs).logits, naive_ensemble(both, how, inputs)) <= TOLERANCE
    # Of the first shard one sequence is left, of depth one: it counts as much as the two of the other shard.
    forget(model, made.rows, (0, 1))
    left = [[made.member(0, (0,))], both[1]]
    assert difference(model(**inputs).logits, naive_ensemble(left, how, inputs)) <= TOLERANCE
    equal = naive_ensemble([[stack] for stacks in left for stack in stacks], how, inputs)
    assert difference(model(**inputs).logits, equal) > 10 * TOLERANCE


def test_select_metric_serves_the_stack_with_the_lowest_loss(tmp_path):
    path, rows, held_out = tmp_path / "system", lm_rows(16), lm_rows(6, seed=9)
    trainer = make_trainer(
        path,
        tiny_llama(2),
        rows,
        config=s3t_config(num_shards=1, partition="balanced", select="metric"),
        args=training_arguments(path, max_steps=3, learning_rate=5e-2),
        eval_dataset=Dataset.from_list(held_out),
    )
    trainer.train()
    batch = batch_of(held_out)
    losses = {}
    for prefix in ((0,), (0, 1), (1,), (1, 0)):
        with torch.no_grad():
            losses[prefix] = naive_member(tiny_llama(2), path, 0, prefix)(**batch).loss.item()
    best = min(losses, key=losses.get)
    assert len({round(loss, 4) for loss in losses.values()}) == 4, "a tie would decide nothing"
    model = S3TModel.from_pretrained(path, base_model=tiny_llama(2))
    assert model(**batch).loss.item() == pytest.approx(losses[best], abs=TOLERANCE)
    assert model.status()["depths"] == [len(best)]
    # Without the best, the best of what is left.
    forget(model, rows, (0, best[-1]))
    left = {prefix: loss for prefix, loss in losses.items() if best[-1] not in prefix}
    assert model(**batch).loss.item() == pytest.approx(min(left.values()), abs=TOLERANCE)


# Loss and output


def test_the_loss_is_that_of_the_aggregated_logits(system):
    made = system("gpt2")
    model = made.model
    members = [[made.member(shard, (0, 1, 2))] for shard in range(3)]
    inputs = inputs_of(made, 4, "left")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, 5] = -100
    expected = naive_ensemble(members, "mean_probabilities", inputs)
    loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert model(**inputs, labels=labels).loss.item() == pytest.approx(loss.item(), abs=TOLERANCE)
    # A mean of the members' losses would be larger (Jensen).
    with torch.no_grad():
        mean = sum(member[0](**inputs, labels=labels).loss for member in members) / 3
    assert mean - loss > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["bert", "roberta", "vit", "distilbert"])
def test_the_loss_of_a_classifier_is_that_of_the_aggregated_logits(system, name):
    made = system(name)
    inputs, labels = inputs_of(made, 4), batch_of(made.rows[:4])["labels"]
    expected = naive_ensemble([[made.member(shard, (0, 1, 2))] for shard in range(3)], "mean_logits", inputs)
    loss = made.model(**inputs, labels=labels).loss
    assert loss.item() == pytest.approx(F.cross_entropy(expected, labels).item(), abs=TOLERANCE)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_the_loss_of_other_problems(tmp_path, problem):
    fresh = partial(tiny_bert, 2, labels=1 if problem == "regression" else LABELS, problem_type=problem)
    target = (
        (lambda row: row["labels"] / 2) if problem == "regression" else (lambda row: [row["labels"] / 2, 1.0, 0.0])
    )
    rows = [{**row, "labels": target(row)} for row in classification_rows()]
    made = Recipe(fresh, shards=2, slices=1, rows=lambda: rows, trained=True).make(tmp_path / "system")
    inputs, labels = inputs_of(made, 4), batch_of(rows[:4])["labels"]
    expected = naive_ensemble([[made.member(shard, (0,))] for shard in range(2)], "mean_logits", inputs)
    if problem == "regression":
        loss = F.mse_loss(expected[:, 0], labels)
    else:
        loss = F.binary_cross_entropy_with_logits(expected, labels)
    answer = made.model(**inputs, labels=labels)
    assert difference(answer.logits, expected) <= TOLERANCE
    assert answer.loss.item() == pytest.approx(loss.item(), abs=TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_outputs_are_those_of_the_base_model(system, name):
    made = system(name)
    model, base = made.model, made.fresh()
    batch = batch_of(made.rows[:3])
    answer = model(**batch)
    assert type(answer) is type(base(**batch))
    # As a tuple, as the base orders it: the loss if there is one, then the logits.
    as_tuple = model(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], answer.loss) and torch.equal(as_tuple[1], answer.logits)
    del batch["labels"]
    assert torch.equal(model(**batch, return_dict=False)[0], answer.logits)
    # Positional arguments, as the base's forward names them.
    first = batch.pop(model.main_input_name)
    assert torch.equal(model(first).logits, model(**{model.main_input_name: first}).logits)
    assert answer.logits.shape == base(first).logits.shape


def test_positional_attention_mask(system):
    made = system("bert")
    model = made.model
    inputs = inputs_of(made, 3, "right")
    by_position = model(inputs["input_ids"], inputs["attention_mask"]).logits
    assert torch.equal(by_position, model(**inputs).logits)
    assert not torch.equal(by_position, model(inputs["input_ids"]).logits)


def test_embeddings_and_positions_can_be_given_instead_of_ids(system):
    made = system("gpt2")
    model = made.model
    ids = inputs_of(made, 3)["input_ids"]
    embeddings = made.fresh().get_input_embeddings()(ids).detach()
    assert difference(model(inputs_embeds=embeddings).logits, model(input_ids=ids).logits) <= TOLERANCE
    positions = torch.arange(4, 12).expand(3, -1)
    members = [[made.member(shard, (0, 1, 2))] for shard in range(3)]
    shifted = {"input_ids": ids, "position_ids": positions}
    expected = naive_ensemble(members, "mean_probabilities", shifted)
    assert difference(model(**shifted).logits, expected) <= TOLERANCE
    # One row of positions for all.
    assert difference(model(input_ids=ids, position_ids=positions[:1]).logits, expected) <= TOLERANCE


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_hidden_states_of_an_ensemble_are_refused(system, asked):
    made = system("bert")
    with pytest.raises(S3TError, match="export_adapter"):
        made.model(**inputs_of(made, 1), **{asked: True})


def test_a_model_without_its_inputs_says_which(system):
    with pytest.raises(S3TError, match="input_ids"):
        system("bert").model()


def test_a_row_does_not_depend_on_the_rows_beside_it(system):
    for name in ("llama", "roberta"):
        made = system(name)
        model = made.model
        together = model(**inputs_of(made, 6)).logits
        for row in range(6):
            alone = {key: value[row : row + 1] for key, value in inputs_of(made, 6).items()}
            assert difference(model(**alone).logits, together[row : row + 1]) <= TOLERANCE


def test_gradients_reach_the_inputs(system):
    """Attribution methods differentiate an answer by the embeddings; the ensemble's gradient is the mean's."""
    made = system("bert")
    model = made.model
    embeddings = made.fresh().get_input_embeddings()(inputs_of(made, 2)["input_ids"]).detach()
    own, naive = embeddings.clone().requires_grad_(), embeddings.clone().requires_grad_()
    model(inputs_embeds=own).logits.sum().backward()
    sum(made.member(shard, (0, 1, 2))(inputs_embeds=naive).logits.sum() / 3 for shard in range(3)).backward()
    assert naive.grad.abs().max() > 0
    assert difference(own.grad, naive.grad) <= TOLERANCE


# Nothing left


def test_an_exhausted_system_refuses_to_answer(system, tmp_path):
    made = system("llama")
    model = made.copy(tmp_path / "copy")
    report = forget(model, made.rows, (0, 0), (1, 0), (2, 0))
    assert report.is_exhausted and model.is_exhausted
    for call in (lambda: model(**inputs_of(made, 1)), lambda: model.generate(**inputs_of(made, 1), max_new_tokens=2)):
        with pytest.raises(ExhaustedError, match="train"):
            call()
    reloaded = S3TModel.from_pretrained(tmp_path / "copy", base_model=made.fresh())
    with pytest.raises(ExhaustedError):
        reloaded(**inputs_of(made, 1))


def test_a_language_model_may_answer_as_its_base(system, tmp_path):
    made = system("llama")
    model = made.copy(tmp_path / "copy", when_exhausted="base")
    base, batch = made.fresh(), batch_of(made.rows[:3])
    assert not torch.equal(model(**batch).logits, base(**batch).logits)
    forget(model, made.rows, (0, 0), (1, 0), (2, 0))
    answer, expected = model(**batch), base(**batch)
    assert torch.equal(answer.logits, expected.logits)
    assert torch.equal(answer.loss, expected.loss)
    del batch["labels"]
    greedy = dict(max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(**batch, **greedy), base.generate(**batch, **greedy))


def test_a_classifier_has_no_base_to_fall_back_to(system, tmp_path):
    with pytest.raises(S3TError, match="when_exhausted"):
        system("bert").copy(tmp_path / "copy", when_exhausted="base")


# Generation


class NaiveLM(PreTrainedModel, GenerationMixin):
    """A language model for Transformers' `generate` whose forward is the naive ensemble, without any cache."""

    config_class = LlamaConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config, members):
        super().__init__(config)
        self.members = members
        self.device_holder = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, attention_mask=None, **ignored):
        return CausalLMOutput(logits=naive_next(self.members, input_ids, attention_mask))


def naive_next(members, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Logits of the naive ensemble for whole sequences, with positions counted from each row's first token."""
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return naive_ensemble(members, "mean_probabilities", inputs)


def naive_generate(
    members, ids: torch.Tensor, mask: torch.Tensor, steps: int, choose: Callable, eos: int | None = None
) -> torch.Tensor:
    """Token by token, everything computed anew at each step; a row that has ended goes on with padding."""
    running = torch.ones(len(ids), dtype=torch.bool)
    for _ in range(steps):
        tokens = choose(naive_next(members, ids, mask)[:, -1])
        tokens = torch.where(running, tokens, PAD)
        ids = torch.cat([ids, tokens[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        running &= tokens != eos
        if not running.any():
            break
    return ids


def sample(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """One draw per row from the tokens that are left after cutting off all but the likeliest."""
    logits = logits / temperature
    logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    ordered, order = logits.sort(descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    logits = logits.masked_fill((before >= top_p).gather(-1, order.argsort(-1)), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]


@pytest.fixture(params=["llama", "gpt2", "qwen2"], scope="module")
def language(request, system, tmp_path_factory):
    """A language model in a state of its own, which no test changes, its naive members and the system it is of."""
    made = system(request.param)
    model = made.copy(tmp_path_factory.mktemp("language") / "copy")
    wanted = {"llama": UNEQUAL, "gpt2": FULL, "qwen2": ONE_DEAD}[request.param]
    members = next(members for state, members in states(model, made) if state == wanted)
    return model, members, made


@pytest.fixture(params=[None, "left"], ids=["no padding", "left padding"])
def prompt(request, language) -> dict[str, torch.Tensor]:
    batch = inputs_of(language[2], 3, request.param)
    batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    return batch


CACHED = pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])


@CACHED
def test_greedy_generation_equals_a_naive_loop(language, prompt, use_cache):
    model, members, _ = language
    greedy = partial(torch.argmax, dim=-1)
    expected = naive_generate(members, *prompt.values(), steps=7, choose=greedy)
    settings = dict(do_sample=False, max_new_tokens=7, use_cache=use_cache)
    assert torch.equal(model.generate(**prompt, **settings, eos_token_id=None), expected)
    # With an end-of-text token that does come up, at different times in different rows.
    eos = expected[0, -4].item()
    ended = naive_generate(members, *prompt.values(), steps=7, choose=greedy, eos=eos)
    assert not torch.equal(ended, expected)
    assert torch.equal(model.generate(**prompt, **settings, eos_token_id=eos, pad_token_id=PAD), ended)


@CACHED
def test_sampling_equals_a_naive_loop_with_the_same_seed(language, prompt, use_cache):
    model, members, _ = language
    settings = dict(temperature=0.7, top_k=20, top_p=0.9)
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = naive_generate(members, *prompt.values(), steps=6, choose=partial(sample, **settings))
        torch.manual_seed(seed)
        answer = model.generate(
            **prompt, do_sample=True, max_new_tokens=6, use_cache=use_cache, eos_token_id=None, **settings
        )
        assert torch.equal(answer, expected)
        drawn.append(answer)
    assert not torch.equal(*drawn)


@CACHED
def test_beam_search_equals_one_over_the_naive_ensemble(language, prompt, use_cache):
    model, members, made = language
    settings = dict(num_beams=3, num_return_sequences=2, max_new_tokens=6, do_sample=False, pad_token_id=PAD)
    naive = NaiveLM(made.fresh().config, members)
    for extra in ({"eos_token_id": None}, {"eos_token_id": 17, "length_penalty": -1.0, "early_stopping": True}):
        expected = naive.generate(**prompt, **settings, **extra, use_cache=False)
        assert torch.equal(model.generate(**prompt, **settings, **extra, use_cache=use_cache), expected)


def test_beam_search_wide_enough_finds_the_likeliest_continuation(language, prompt):
    """With as many beams as words, two steps see every continuation: their best is the best there is."""
    model, members, _ = language
    ids, mask = prompt["input_ids"][:2], prompt["attention_mask"][:2]
    found = model.generate(
        input_ids=ids, attention_mask=mask, num_beams=VOCABULARY, max_new_tokens=2, do_sample=False, eos_token_id=None
    )
    for row in range(2):
        first = naive_next(members, ids[row : row + 1], mask[row : row + 1])[0, -1]
        extended = torch.cat([ids[row].expand(VOCABULARY, -1), torch.arange(VOCABULARY)[:, None]], dim=1)
        longer = torch.cat([mask[row].expand(VOCABULARY, -1), torch.ones(VOCABULARY, 1, dtype=torch.long)], dim=1)
        scores = first[:, None] + naive_next(members, extended, longer)[:, -1]
        best = scores.argmax().item()
        assert found[row, -2:].tolist() == [best // VOCABULARY, best % VOCABULARY]


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_first_generation_of_a_model_may_be_with_a_static_cache(system, name):
    made = system(name)
    prompt = inputs_of(made, 3, "left")
    settings = dict(do_sample=False, max_new_tokens=6, eos_token_id=None)
    first, other = (S3TModel.from_pretrained(made.path, base_model=made.fresh()) for _ in range(2))
    static = first.generate(**prompt, **settings, cache_implementation="static")
    assert torch.equal(static, other.generate(**prompt, **settings))
    members = [[made.member(shard, (0, 1, 2))] for shard in range(3)]
    assert torch.equal(static, naive_generate(members, *prompt.values(), 6, partial(torch.argmax, dim=-1)))
    # And once more, when it is known that the members share a pass.
    assert torch.equal(first.generate(**prompt, **settings, cache_implementation="static"), static)


def test_the_cache_spares_computing_the_prompt_again(system):
    model = system("llama").model
    lengths = []
    inputs = inputs_of(system("llama"), 2)
    settings = dict(do_sample=False, max_new_tokens=4, eos_token_id=None)
    # With the first call of its kind it is found out whether the members can share a pass.
    model.generate(**inputs, **settings)
    embeddings = model.base_model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda *call: lengths.append(call[1][0].shape[1]))
    model.generate(**inputs, **settings)
    hook.remove()
    assert lengths == [8, 1, 1, 1]


# Caches


def next_token(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1:].argmax(-1)


def test_a_cache_continues_where_it_ended(language):
    model, members, made = language
    inputs = inputs_of(made, 2)
    first = model(**inputs, use_cache=True)
    token = next_token(first.logits)
    step = model(input_ids=token, past_key_values=first.past_key_values)
    whole = torch.cat([inputs["input_ids"], token], dim=1)
    assert difference(step.logits[:, -1], naive_next(members, whole, None)[:, -1]) <= TOLERANCE


def test_a_cache_made_before_a_deletion_is_refused_after(system, tmp_path):
    made = system("llama")
    model = made.copy(tmp_path / "copy")
    first = model(**inputs_of(made, 2), use_cache=True)
    token = next_token(first.logits)
    forget(model, made.rows, (1, 2))
    with pytest.raises(StaleCacheError, match="past_key_values"):
        model(input_ids=token, past_key_values=first.past_key_values)
    with pytest.raises(StaleCacheError):
        model.generate(
            torch.cat([inputs_of(made, 2)["input_ids"], token], dim=1),
            past_key_values=first.past_key_values,
            max_new_tokens=2,
        )
    # A fresh one is good.
    model(input_ids=token, past_key_values=model(**inputs_of(made, 2), use_cache=True).past_key_values)


def test_a_cache_stays_good_when_nothing_that_serves_changed(system, tmp_path):
    made = system("llama")
    model = made.copy(tmp_path / "copy")
    forget(model, made.rows, (0, 1), (1, 1))
    assert model.status()["depths"] == [1, 1, 3]
    inputs = inputs_of(made, 2)
    first = model(**inputs, use_cache=True)
    # Slice 2 of these shards was in no stage any more; and an id can be asked to be forgotten twice.
    gone = [i for i in ids_of(len(made.rows)) if model.folder.is_deleted(i)]
    assert forget(model, made.rows, (0, 2)).stages_removed == ()
    assert model.unlearn(gone).deleted == 0
    token = next_token(first.logits)
    step = model(input_ids=token, past_key_values=first.past_key_values)
    whole = model(input_ids=torch.cat([inputs["input_ids"], token], dim=1))
    assert difference(step.logits[:, -1], whole.logits[:, -1]) <= TOLERANCE


def test_a_cache_of_another_model_is_refused(system, tmp_path):
    made = system("llama")
    model, other, base = made.model, made.copy(tmp_path / "other"), made.fresh()
    inputs = inputs_of(made, 2)
    for stranger in (other, base, made.member(0, (0, 1, 2))):
        cache = stranger(**inputs, use_cache=True).past_key_values
        with pytest.raises(StaleCacheError):
            model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache)


def test_an_empty_cache_is_anybodys(system, tmp_path):
    from transformers import DynamicCache

    made = system("llama")
    model = made.copy(tmp_path / "copy")
    inputs = inputs_of(made, 2)
    cache = DynamicCache(config=model.config)
    assert difference(model(**inputs, past_key_values=cache).logits, model(**inputs).logits) <= TOLERANCE
    # Now it is this model's, filled.
    forget(model, made.rows, (1, 2))
    with pytest.raises(StaleCacheError):
        model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache)


# The tools of Transformers


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One word a token: `w5` is token 5."""
    words = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": 3, **{f"w{i}": i for i in range(4, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def test_text_generation_pipeline(system, tokenizer):
    made = system("llama")
    generator = pipeline("text-generation", model=made.model, tokenizer=tokenizer)
    prompts = ["w5 w9 w33", "w7 w8 w9 w10 w11"]
    answers = generator(
        prompts, max_new_tokens=4, do_sample=False, batch_size=2, return_full_text=False, eos_token_id=None
    )
    members = [[made.member(shard, (0, 1, 2))] for shard in range(3)]
    for words, (answer,) in zip(prompts, answers, strict=True):
        encoded = tokenizer(words, return_tensors="pt")
        expected = naive_generate(
            members, encoded["input_ids"], encoded["attention_mask"], 4, partial(torch.argmax, dim=-1)
        )
        # The pipeline leaves out special tokens.
        assert answer["generated_text"].split() == tokenizer.decode(expected[0, -4:], skip_special_tokens=True).split()


def test_text_classification_pipeline(system, tokenizer):
    made = system("bert")
    classifier = pipeline("text-classification", model=made.model, tokenizer=tokenizer, top_k=None)
    words = "w5 w9 w33"
    inputs = {"input_ids": torch.tensor([[5, 9, 33]])}
    members = [[made.member(shard, (0, 1, 2))] for shard in range(3)]
    expected = naive_ensemble(members, "mean_logits", inputs).softmax(-1)[0]
    answer = {entry["label"]: entry["score"] for entry in classifier([words])[0]}
    assert answer == {f"LABEL_{i}": pytest.approx(expected[i].item(), abs=TOLERANCE) for i in range(LABELS)}


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_trainer_evaluates_a_loaded_model(system, tmp_path, name):
    made = system(name)
    # Batches of three, the last smaller.
    trainer = Trainer(model=made.model, args=training_arguments(tmp_path / "out", per_device_eval_batch_size=3))
    rows = made.rows[:7]
    prediction = trainer.predict(Dataset.from_list([{k: v for k, v in row.items() if k != "id"} for row in rows]))
    inputs = inputs_of(made, 7)
    expected = naive_ensemble(
        [[made.member(shard, (0, 1, 2))] for shard in range(3)],
        "mean_probabilities" if is_language_model(made) else "mean_logits",
        inputs,
    )
    assert difference(torch.tensor(prediction.predictions), expected) <= TOLERANCE
    labels = batch_of(rows)["labels"]
    if is_language_model(made):
        loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    else:
        loss = F.cross_entropy(expected, labels)
    assert prediction.metrics["test_loss"] == pytest.approx(loss.item(), abs=TOLERANCE)


def test_the_trainers_own_evaluation_is_the_ensembles(tmp_path):
    made_at, rows = tmp_path / "system", classification_rows()
    trainer = make_trainer(made_at, tiny_bert(2), rows, config=s3t_config(num_shards=2, partition="balanced"))
    plant_stages(trainer)
    labels = batch_of(rows[:7])["labels"]
    inputs = batch_of(rows[:7])
    del inputs["labels"]
    members = [[naive_member(tiny_bert(2), made_at, shard, (0, 1))] for shard in range(2)]
    expected = F.cross_entropy(naive_ensemble(members, "mean_logits", inputs), labels).item()
    evaluated = trainer.evaluate(Dataset.from_list(rows[:7]))
    assert evaluated["eval_loss"] == pytest.approx(expected, abs=TOLERANCE)


# Handing out one shard


@pytest.mark.parametrize("name", ["llama", "gpt2", "roberta", "vit", "llama, dora", "llama, rank_pattern"])
def test_an_exported_adapter_is_plain_peft(system, tmp_path, name):
    made = system(name)
    model = made.copy(tmp_path / "copy")
    forget(model, made.rows, (0, 2))
    inputs = inputs_of(made, 4)
    for shard, depth in ((0, 2), (1, 3)):
        lines = (tmp_path / "copy" / "ledger.jsonl").read_text().splitlines()
        folder = tmp_path / f"exported-{shard}"
        model.export_adapter(shard, folder)
        exported = PeftModel.from_pretrained(made.fresh(), folder).eval()
        with torch.no_grad():
            expected = made.member(shard, tuple(range(depth)))(**inputs).logits
            assert difference(exported(**inputs).logits, expected) <= 1e-6
        # The ledger notes which stages left: a deletion cannot follow them.
        noted = (tmp_path / "copy" / "ledger.jsonl").read_text().splitlines()[len(lines) :]
        assert len(noted) == 1 and '"export"' in noted[0]
        stages = ["-".join(map(str, range(d + 1))) for d in range(depth)]
        assert all(f'"shard-{shard}/{stage}"' in noted[0] for stage in stages)
    # And exporting is not deleting: the model answers as before, also when it is loaded again.
    again = S3TModel.from_pretrained(tmp_path / "copy", base_model=made.fresh())
    assert again.status()["deletions"] == 1
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_an_adapter_is_not_exported_into_the_system_or_over_something(system, tmp_path):
    model = system("llama").copy(tmp_path / "copy")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    ledger = (tmp_path / "copy" / "ledger.jsonl").read_text()
    for folder, why in ((tmp_path / "copy" / "out", "inside the system"), (tmp_path / "taken", "no empty folder")):
        with pytest.raises(FolderError, match=why):
            model.export_adapter(0, folder)
    assert (tmp_path / "copy" / "ledger.jsonl").read_text() == ledger and not (tmp_path / "copy" / "out").exists()


def test_of_several_stacks_that_answer_together_none_is_exported(tmp_path):
    trainer = make_trainer(tmp_path / "system", config=s3t_config(select="all"))
    plant_stages(trainer)
    with pytest.raises(ConfigError, match=r"2 stacks answer for shard 0 together .* Export from a system that serves"):
        trainer.s3t_model.export_adapter(0, tmp_path / "out")
    assert not (tmp_path / "out").exists() and trainer.folder.ledger.lines == ()


def test_a_dead_shard_cannot_be_exported(system, tmp_path):
    made = system("llama")
    model = made.copy(tmp_path / "copy")
    forget(model, made.rows, (1, 0))
    ledger = (tmp_path / "copy" / "ledger.jsonl").read_text()
    with pytest.raises(ExhaustedError):
        model.export_adapter(1, tmp_path / "exported")
    with pytest.raises(S3TError):
        model.export_adapter(3, tmp_path / "exported")
    assert (tmp_path / "copy" / "ledger.jsonl").read_text() == ledger
    assert not (tmp_path / "exported").exists()


# Memory


def storages(tensors) -> dict[int, int]:
    """Bytes in memory by address: tensors that share memory count once."""
    found = {}
    for tensor in tensors:
        try:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        except (RuntimeError, NotImplementedError):
            continue  # what the compiler and other tests leave behind: tensors that stand for others, without memory
    found.pop(0, None)
    return found


def bytes_of_model(model: nn.Module) -> int:
    return sum(storages([*model.parameters(), *model.buffers()]).values())


def bytes_of_stages(path: Path, served: list[tuple[int, int]]) -> int:
    """Bytes of the tensors in the files of stacks, given as (shard, depth) of the one sequence in order of slices."""
    return sum(
        tensor.numel() * tensor.element_size()
        for shard, depth in served
        for d in range(1, depth + 1)
        for tensor in load_file(
            path / "stages" / f"shard-{shard}" / "-".join(map(str, range(d))) / "adapter_model.safetensors"
        ).values()
    )


@pytest.mark.parametrize("name", ["llama, m = 5", "bert, m = 5"])
def test_one_base_in_memory_whatever_the_number_of_members(system, tmp_path, name):
    made = system(name)
    base = bytes_of_model(made.fresh())
    model = made.copy(tmp_path / "copy")
    adapters = bytes_of_stages(tmp_path / "copy", [(shard, 2) for shard in range(5)])
    assert 0 < adapters < base
    assert bytes_of_model(model) == base + adapters
    model(**inputs_of(made, 4))
    assert bytes_of_model(model) == base + adapters
    forget(model, made.rows, (0, 1), (1, 0))
    assert bytes_of_model(model) == base + bytes_of_stages(tmp_path / "copy", [(0, 1), (2, 2), (3, 2), (4, 2)])
    assert {str(stage) for stage in model.stack.loaded} == {
        "shard-0/0",
        *(f"shard-{shard}/{stage}" for shard in (2, 3, 4) for stage in ("0", "0-1")),
    }


@pytest.mark.parametrize("name", ["llama, all", "bert, all"])
def test_unlearning_frees_the_tensors(system, tmp_path, name):
    made = system(name)
    model = made.copy(tmp_path / "copy")
    by_stage = {str(key): [weakref.ref(t) for t in _parameters(model, key)] for key in model.stack.loaded}
    assert set(by_stage) == {f"shard-{k}/{stage}" for k in (0, 1) for stage in ("0", "0-1", "1", "1-0")}
    assert all(by_stage.values())
    model(**inputs_of(made, 2))
    # Those that the call has put together in memory too.
    for key in model.stack.loaded:
        by_stage[str(key)] += [weakref.ref(t) for t in _parameters(model, key)]
    left = {"shard-0/0", *(f"shard-1/{stage}" for stage in ("0", "0-1", "1", "1-0"))}
    gc.disable()
    try:
        forget(model, made.rows, (0, 1))
        alive = {stage for stage, refs in by_stage.items() if any(ref() is not None for ref in refs)}
    finally:
        gc.enable()
    # At once, not when the garbage collector comes by.
    assert alive <= left == {str(key) for key in model.stack.loaded}


def live_tensors() -> tuple[int, int]:
    """How many pieces of memory the tensors of this process hold, and how many bytes."""
    gc.collect()
    found = storages(thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    return len(found), sum(found.values())


def of_model(model: S3TModel) -> tuple[int, int]:
    """The same for what a model consists of: its base, the adapters in memory and the members' weights."""
    found = storages([*model.parameters(), *model.buffers(), routing_of(model).weights])
    return len(found), sum(found.values())


def test_after_unlearning_no_tensor_lives_but_those_of_the_base_and_of_what_serves(tmp_path):
    recipe = Recipe(partial(tiny_llama, 3), shards=2)
    made = recipe.make(tmp_path / "system")
    before = live_tensors()
    model = made.copy(tmp_path / "copy")
    held = of_model(model)
    model.generate(**inputs_of(made, 2), max_new_tokens=3)
    forget(model, made.rows, (0, 2), (1, 1))
    left, (count, size) = of_model(model), live_tensors()
    assert left < held and model.status()["depths"] == [2, 1]
    assert (count - before[0], size - before[1]) == left
    weights = routing_of(model).weights
    served = bytes_of_stages(tmp_path / "copy", [(0, 2), (1, 1)])
    assert size - before[1] == bytes_of_model(made.fresh()) + served + weights.untyped_storage().nbytes()


def test_twenty_rounds_of_unlearning_and_growing_again_hold_no_more_memory_than_one(tmp_path):
    rows = lm_rows(60)
    path, config = tmp_path / "system", s3t_config(num_shards=2, partition="balanced")
    trainer = make_trainer(path, tiny_llama(2), rows, config=config)
    plant_stages(trainer)
    model = S3TModel.from_pretrained(path, base_model=tiny_llama(2))
    held = []
    for number in range(21):
        (tip,) = routing_of(model).served[number % 2]
        model.unlearn(model.folder.table.members(tip.shard, tip.prefix[-1])[:1])
        model(**inputs_of(Made(path, tiny_llama, rows), 2))
        trainer.folder.refresh()
        plant_stages(trainer)
        model.refresh()
        assert model.status()["depths"] == [2, 2]
        if number in (0, 20):
            held.append(live_tensors())
    assert held[0] == held[1]


def _parameters(model: S3TModel, key) -> list[nn.Parameter]:
    """The parameters of a stage, found by its name among the model's."""
    return [p for name, p in model.named_parameters() if f".{key.adapter_name}." in f"{name}."]


def test_the_trainers_model_shares_its_base(tmp_path):
    fresh = tiny_bert
    base = bytes_of_model(fresh())
    trainer = make_trainer(
        tmp_path / "system",
        fresh(),
        config=s3t_config(num_shards=2),
        args=training_arguments(tmp_path / "system", max_steps=1),
    )
    trainer.train()
    model = trainer.s3t_model
    served = [(0, 2), (1, 2)]
    assert bytes_of_model(model) == base + bytes_of_stages(tmp_path / "system", served)
    assert storages(model.base_model.parameters()) == storages(trainer.model.parameters())
    assert trainer.s3t_model is model
    # Training more with the model alive leaves what serves, and nothing else, in memory.
    example = next(i for i, place in model.locate(ids_of(24)).items() if place == (0, 1))
    model.unlearn([example])
    after = bytes_of_model(model)
    assert after < base + bytes_of_stages(tmp_path / "system", [(1, 2), (1, 2)])
    trainer.train()
    assert bytes_of_model(trainer.s3t_model) == base + bytes_of_stages(tmp_path / "system", served)


def test_preload_all_holds_every_stage_and_answers_the_same(system, tmp_path):
    made = system("bert, all in memory")
    best, everything = made.copy(tmp_path / "one"), made.copy(tmp_path / "two", preload="all")
    inputs = inputs_of(made, 3)
    assert torch.equal(best(**inputs).logits, everything(**inputs).logits)
    assert bytes_of_model(everything) > bytes_of_model(best)
    for model in (best, everything):
        forget(model, made.rows, (0, 1))
    assert torch.equal(best(**inputs).logits, everything(**inputs).logits)


def test_a_base_that_serves_a_system_cannot_serve_another(system, tmp_path):
    made = system("bert")
    model = made.copy(tmp_path / "copy")
    before = model(**inputs_of(made, 2)).logits
    with pytest.raises(IsolationError, match="adapters"):
        S3TModel.from_pretrained(made.path, base_model=model.base_model)
    assert torch.equal(model(**inputs_of(made, 2)).logits, before)


# Eight bits


@pytest.fixture(scope="module")
def eight_bit(tmp_path_factory):
    """A system trained on a base in 8 bit: its folder, how to load its base again, and its rows."""
    folder = tmp_path_factory.mktemp("eight-bit")
    tiny_llama(2, hidden_size=32, intermediate_size=64).save_pretrained(folder / "base")

    def fresh():
        quantization = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        return AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=quantization).eval()

    made = Recipe(fresh, shards=2, slices=2, trained=True, rows=partial(lm_rows, 12)).make(folder / "system")
    return made


def test_an_8_bit_ensemble_equals_plain_peft_on_the_same_base(eight_bit):
    model = eight_bit.model
    assert model.is_loaded_in_8bit
    members = [[eight_bit.member(shard, (0, 1))] for shard in range(2)]
    for count in (1, 4):
        for padding in (None, "left"):
            inputs = inputs_of(eight_bit, count, padding)
            expected = naive_ensemble(members, "mean_probabilities", inputs)
            assert difference(model(**inputs).logits, expected) <= TOLERANCE, (count, padding)
    assert difference(members[0][0](**inputs).logits, members[1][0](**inputs).logits) > 100 * TOLERANCE


def test_an_8_bit_base_is_loaded_again_by_name(eight_bit, tmp_path):
    shutil.copytree(eight_bit.path, tmp_path / "copy")
    model = S3TModel.from_pretrained(tmp_path / "copy")
    assert model.is_loaded_in_8bit
    inputs = inputs_of(eight_bit, 3)
    assert torch.equal(model(**inputs).logits, eight_bit.model(**inputs).logits)
    # And without quantisation, if that is asked for: close, but not the same.
    full = S3TModel.from_pretrained(tmp_path / "copy", quantization_config=False)
    assert not getattr(full, "is_loaded_in_8bit", False)
    assert 0 < difference(full(**inputs).logits, model(**inputs).logits) < 0.5


def test_in_8_bit_a_row_does_not_depend_on_the_rows_beside_it(eight_bit, tmp_path):
    shutil.copytree(eight_bit.path, tmp_path / "copy")
    model = S3TModel.from_pretrained(tmp_path / "copy")
    with torch.no_grad():
        # One token whose embedding is an outlier in some columns, in one row of the batch.
        model.base_model.get_input_embeddings().weight[FIRST_WORD, :3] = 60.0
    inputs = inputs_of(eight_bit, 4)
    inputs["input_ids"][:, :] = inputs["input_ids"].clamp(min=FIRST_WORD + 1)
    inputs["input_ids"][2, 3] = FIRST_WORD
    together = model(**inputs).logits
    for rows in ([0], [3], [0, 2], [3, 1, 0]):
        some = {name: value[rows] for name, value in inputs.items()}
        assert difference(model(**some).logits, together[rows]) <= TOLERANCE, rows


def test_a_base_in_another_precision(system):
    """A base in half precision serves the same adapters, in single precision, as plain PEFT does."""
    made = system("llama")
    model = S3TModel.from_pretrained(made.path, base_model=made.fresh().to(torch.bfloat16))
    inputs = inputs_of(made, 4)
    members = [[naive_member(made.fresh().to(torch.bfloat16), made.path, shard, (0, 1, 2))] for shard in range(3)]
    with torch.no_grad():
        expected = torch.stack([m[0](**inputs).logits.float().softmax(-1) for m in members]).mean(0).log()
    # Batches of another size may round to a neighbouring half-precision number, here and there.
    assert difference(model(**inputs).logits, expected) <= 0.05
    assert (model(**inputs).logits - expected).abs().mean() <= 0.005


def test_lora_config_is_what_was_asked_for(system):
    """The variants above are what they say."""
    assert LoraConfig.from_pretrained(system("llama, dora").path / "stages/shard-0/0").use_dora
    ranks = load_file(system("llama, rank_pattern").path / "stages/shard-0/0/adapter_model.safetensors")
    by_name = {name: tensor.shape[0] for name, tensor in ranks.items() if "lora_A" in name}
    assert {rank for name, rank in by_name.items() if "q_proj" in name} == {3}
    assert {rank for name, rank in by_name.items() if "down_proj" in name} == {1}
    assert {rank for name, rank in by_name.items() if "up_proj" in name} == {2}


def test_continuous_batching_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    plant_stages(trainer)
    model = trainer.s3t_model
    for way in (model.generate_batch, model.init_continuous_batching, model.continuous_batching_context_manager):
        with pytest.raises(ConfigError, match=r"Continuous batching .* Use `generate`"):
            way([[1, 2, 3]])


def test_what_is_excluded_is_excluded_of_all_linear_layers_too(tmp_path):
    lora_config = LoraConfig(r=2, target_modules="all-linear", exclude_modules=["gate_proj", "up_proj", "down_proj"])
    trainer = make_trainer(tmp_path, peft_config=lora_config)
    plant_stages(trainer, 1)
    (stage,) = trainer.folder.stages
    names = load_file(tmp_path / stage.path / "adapter_model.safetensors")
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_examples_are_located_whatever_names_them(tmp_path):
    model = make_trainer(tmp_path).s3t_model
    ids = [*model.folder.table.rows][:3]
    assert model.locate(i for i in ids) == model.locate(ids) == model.locate(set(ids))
