"""A gate says who answers which row: the answers are those of plain PEFT, and nobody computes more than is asked."""

import contextlib
import shutil
import threading
from pathlib import Path

import pytest
import torch
from support.insides import routing_of, wait_for_cleaner
from support.plain_peft import difference, naive_member
from support.tiny import (
    PAD,
    VOCABULARY,
    batch_of,
    classification_rows,
    image_rows,
    lm_rows,
    lora,
    make_trainer,
    plant_stages,
    s3t_config,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_llava,
    tiny_vit,
    tokenizer_of_words,
)
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

from hf_s3t import S3TModel
from hf_s3t.errors import CallStoppedError, ConfigError, FolderError, FormatVersionError, S3TError, StaleCacheError
from hf_s3t.model.gates import chosen
from hf_s3t.model.gating import Gating
from hf_s3t.model.route import Route
from hf_s3t.plan.stages import StageKey


pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-5
SHARDS = 3
# One who knows it alone, two who share it, and a prompt of which nobody knows anything.
ALONE, SHARED, UNKNOWN = [0.98, 0.01, 0.01], [0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]


class ByFirstWord:
    """A gate that goes by the first word of a prompt alone, and counts how often it is asked."""

    def __init__(self):
        self.asked = 0

    def weights(self, input_ids, attention_mask, seen):
        self.asked += 1
        words = [row[mask.bool()][:1].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
        alive = torch.tensor([float(bool(slices)) for slices in seen], dtype=torch.float64)
        of_rows = torch.stack([known(word[0] if word else None) * alive for word in words])
        return of_rows / of_rows.sum(1, keepdim=True)


def known(word: int | None) -> torch.Tensor:
    """How much each shard knows of a word."""
    if word is None or word % 5 == 4:
        return torch.tensor(UNKNOWN, dtype=torch.float64)
    return torch.tensor(SHARED if word % 5 == 3 else ALONE, dtype=torch.float64).roll(word % 5)


def weights_of(ids: torch.Tensor, top_k: int | None = None) -> torch.Tensor:
    """What the gate says of rows whose padding, if any, stands left of them."""
    rows = torch.stack([known(row[row != PAD][0].item()) for row in ids])
    return chosen(rows, [frozenset({0})] * SHARDS, top_k)


def made(path: Path, base: nn.Module, rows: list, **settings):
    """A system of three shards of two slices, whose stages are random numbers."""
    config = s3t_config(num_shards=SHARDS, partition="balanced", **settings)
    trainer = make_trainer(path, base, rows, config=config, peft_config=lora(base))
    plant_stages(trainer)
    return path


def served(path: Path, base: nn.Module, gate=None, **settings) -> S3TModel:
    return S3TModel.from_pretrained(path, base_model=base, gate=gate or ByFirstWord(), **settings)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("gates") / "llama", tiny_llama(), lm_rows())


@pytest.fixture(scope="module")
def members(path) -> list:
    return members_of(path, tiny_llama)


def members_of(path: Path, fresh) -> list:
    """The stack that answers of each shard, as plain PEFT, each on a base of its own."""
    tips = [tips[0] for tips in routing_of(S3TModel.from_pretrained(path, base_model=fresh(), gate=None)).served]
    return [naive_member(fresh(), path, tip.shard, tip.prefix) for tip in tips]


def mixture(members: list, weights: torch.Tensor, inputs: dict, how: str = "mean_probabilities") -> torch.Tensor:
    """The naive loop: each member answers all rows, and each row's answers are mixed by its weights."""
    with torch.no_grad():
        each = [member(**inputs).logits for member in members]
    rows = []
    for row, of_row in enumerate(weights.to(each[0].dtype)):
        answers = [(weight, logits[row]) for weight, logits in zip(of_row, each, strict=True) if weight > 0]
        if how == "mean_logits" or len(answers) == 1:
            rows.append(sum(weight * logits for weight, logits in answers))
        else:
            rows.append(sum(weight * logits.softmax(-1) for weight, logits in answers).log())
    return torch.stack(rows)


class NaiveMixture(PreTrainedModel, GenerationMixin):
    """What Transformers' own loop generates from the naive mixture: everything is computed anew at each step."""

    _supports_sdpa = True

    def __init__(self, config, members, weights):
        super().__init__(config)
        self.members, self.weights = members, weights
        self.device_holder = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, attention_mask=None, **ignored):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        times = len(input_ids) // len(self.weights)
        return CausalLMOutput(logits=mixture(self.members, self.weights.repeat_interleave(times, 0), inputs))


def prompts(first_words: list[int], length: int = 5, padded: bool = False) -> dict:
    """Prompts whose first words are given; of some lengths, with padding left of them."""
    ids = torch.randint(5, VOCABULARY, (len(first_words), length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    for row, word in enumerate(first_words):
        start = row % 3 if padded else 0
        ids[row, :start], mask[row, :start] = PAD, 0
        ids[row, start] = word
    return {"input_ids": ids, "attention_mask": mask}


# Of all kinds: alone by each of the shards, shared, unknown.
MIXED = [10, 11, 12, 13, 14, 16]


@contextlib.contextmanager
def rows_computed(model: S3TModel):
    """How many rows the base's topmost layer is given, pass by pass."""
    seen = []
    layer = model.base_model.get_decoder().layers[-1]
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    yield seen
    hook.remove()


# Forward


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_a_batch_that_mixes_shards_equals_the_naive_loop(path, members, top_k):
    model = served(path, tiny_llama(), gate_top_k=top_k)
    for inputs in (prompts(MIXED), prompts(MIXED, padded=True), prompts([11]), prompts([14])):
        weights = weights_of(inputs["input_ids"], top_k)
        assert difference(model(**inputs).logits, mixture(members, weights, inputs)) <= TOLERANCE


def test_only_the_members_that_are_asked_compute_and_only_their_rows(path):
    """In the batch: one row each by shard 0, 1 and 2; one by two of them; one by all; one by shard 1."""
    model = served(path, tiny_llama(), gate_top_k=1)

    def answer():
        model(**prompts([10]))
        model(**prompts([10, 15, 20]))
        model(**prompts(MIXED))
        model.generate(**prompts(MIXED), max_new_tokens=3, do_sample=False, eos_token_id=None)

    # The first calls try whether rows can be taken apart.
    answer()
    with rows_computed(model) as seen:
        answer()
    assert seen == [1, 3, 1 + 1 + 1 + 2 + 3 + 1, *[9] * 3]


def test_one_member_answers_as_it_does_alone(path, members):
    """To the bit where it has the batch to itself: it is the pass that plain PEFT makes."""
    model = served(path, tiny_llama(), gate_top_k=1)
    alone = prompts([11, 16])
    assert torch.equal(model(**alone).logits, members[1](**alone).logits)
    mixed = prompts([10, 11, 12])
    for row, logits in enumerate(model(**mixed).logits):
        assert difference(logits, members[row](**mixed).logits[row]) <= TOLERANCE


def test_a_prompt_that_nobody_knows_gets_the_mean_to_the_bit(path):
    inputs = prompts([14, 19])
    plain = S3TModel.from_pretrained(path, base_model=tiny_llama(), gate=None)
    for top_k in (None, 1):
        assert torch.equal(served(path, tiny_llama(), gate_top_k=top_k)(**inputs).logits, plain(**inputs).logits)


@pytest.mark.slow
def test_gradients_flow_through_blocks_of_unequal_size(path, members):
    model = served(path, tiny_llama())
    embedded = [tiny_llama().get_input_embeddings()(prompts(MIXED)["input_ids"]).detach() for _ in range(2)]
    for one in embedded:
        one.requires_grad_()
    with model.weighted_by(model.gate_weights(**prompts(MIXED))):
        model(inputs_embeds=embedded[0]).logits.square().sum().backward()
    answers = 0
    for member, weights in zip(members, weights_of(prompts(MIXED)["input_ids"]).float().t(), strict=True):
        answers = answers + weights[:, None, None] * member(inputs_embeds=embedded[1]).logits.softmax(-1)
    answers.log().square().sum().backward()
    assert difference(embedded[0].grad, embedded[1].grad) <= 1e-3 * embedded[1].grad.abs().max()


def test_in_half_precision_it_equals_the_naive_loop_too(path):
    def fresh():
        return tiny_llama().to(torch.bfloat16)

    members, inputs = members_of(path, fresh), prompts(MIXED, padded=True)
    expected = mixture(members, weights_of(inputs["input_ids"], 1).float(), inputs)
    answer = served(path, fresh(), gate_top_k=1)(**inputs).logits
    assert answer.dtype == torch.float32
    assert difference(answer, expected.float()) <= 2**-7 * expected.abs().max()


@pytest.mark.slow
def test_in_8_bit_it_equals_the_naive_loop_too(tmp_path):
    tiny_llama(2, hidden_size=32, intermediate_size=64).save_pretrained(tmp_path / "base")

    def fresh():
        quantization = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization).eval()

    made(tmp_path / "system", fresh(), lm_rows())
    model, members = served(tmp_path / "system", fresh(), gate_top_k=1), members_of(tmp_path / "system", fresh)
    inputs = prompts(MIXED, padded=True)
    expected = mixture(members, weights_of(inputs["input_ids"], 1), inputs)
    assert difference(model(**inputs).logits, expected) <= TOLERANCE
    asked = dict(max_new_tokens=4, do_sample=False, pad_token_id=PAD, eos_token_id=None)
    naive = NaiveMixture(model.config, members, weights_of(inputs["input_ids"], 1))
    assert torch.equal(model.generate(**inputs, **asked), naive.generate(**inputs, **asked, use_cache=False))


@pytest.mark.parametrize(
    "fresh",
    [tiny_bert, *(pytest.param(fresh, marks=pytest.mark.slow) for fresh in (tiny_gpt2, tiny_vit))],
    ids=["bert", "gpt2", "vit"],
)
def test_heads_and_other_layers_are_applied_block_by_block(tmp_path, fresh):
    rows = {tiny_bert: classification_rows, tiny_gpt2: lm_rows, tiny_vit: image_rows}[fresh]()
    made(tmp_path / "system", fresh(), rows)
    inputs = batch_of(rows[:4])
    inputs.pop("labels")
    model = served(tmp_path / "system", fresh())
    weights = torch.tensor([ALONE, [0.0, 1.0, 0.0], SHARED, [0.0, 0.3, 0.7]])
    with model.weighted_by(weights):
        answer = model(**inputs).logits
    how = "mean_probabilities" if fresh is tiny_gpt2 else "mean_logits"
    expected = mixture(members_of(tmp_path / "system", fresh), weights, inputs, how)
    assert difference(answer, expected) <= TOLERANCE


# Labels


def test_what_stands_before_the_first_label_is_the_prompt(path, members):
    """Two rows with a prompt, one of which is padded; one that is labelled from its first token on."""
    model = served(path, tiny_llama(), gate_top_k=1)
    inputs = prompts([11, 12, 10], length=8)
    inputs["input_ids"][1, 0], inputs["attention_mask"][1, 0], inputs["input_ids"][1, 1] = PAD, 0, 12
    labels = inputs["input_ids"].clone()
    labels[:2, :4] = -100
    weights = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], UNKNOWN])
    expected = mixture(members, weights, inputs)
    answer = model(**inputs, labels=labels)
    assert difference(answer.logits, expected) <= TOLERANCE
    loss = nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert answer.loss.item() == pytest.approx(loss.item(), abs=TOLERANCE)


def test_the_loss_of_rows_that_one_member_answers_is_the_bases_own(path, members):
    model = served(path, tiny_llama(), gate_top_k=1)
    inputs = prompts([11, 16], length=8)
    labels = inputs["input_ids"].clone()
    labels[:, :3] = -100
    assert torch.equal(model(**inputs, labels=labels).loss, members[1](**inputs, labels=labels).loss)


# Generation


WAYS = {
    "greedy": dict(do_sample=False),
    "without a cache": dict(do_sample=False, use_cache=False),
    "sampling": dict(do_sample=True, temperature=0.8, top_k=20),
    "beams": dict(do_sample=False, num_beams=3, num_return_sequences=2),
    "return sequences": dict(do_sample=True, num_return_sequences=3),
    "beams that sample": dict(do_sample=True, num_beams=2),
    "static cache": dict(do_sample=False, cache_implementation="static"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("top_k", [pytest.param(None, marks=pytest.mark.slow), 1])
def test_generation_equals_the_naive_loop(path, members, way, top_k):
    gate = ByFirstWord()
    model = served(path, tiny_llama(), gate, gate_top_k=top_k)
    inputs = prompts(MIXED, padded=True)
    asked = dict(max_new_tokens=6, pad_token_id=PAD, eos_token_id=None, **WAYS[way])
    naive = NaiveMixture(model.config, members, weights_of(inputs["input_ids"], top_k))
    torch.manual_seed(0)
    answer = model.generate(**inputs, **asked)
    torch.manual_seed(0)
    asked.pop("cache_implementation", None)
    assert torch.equal(answer, naive.generate(**inputs, **{**asked, "use_cache": False}))
    # Once per prompt, however many tokens.
    assert gate.asked == 1


def test_a_decoding_loop_of_the_users_own_keeps_the_gating_in_its_cache(path, members):
    gate = ByFirstWord()
    model = served(path, tiny_llama(), gate, gate_top_k=1)
    inputs = prompts(MIXED)
    weights = weights_of(inputs["input_ids"], 1)
    ids, output = inputs["input_ids"], model(**inputs, use_cache=True)
    for _ in range(3):
        assert difference(output.logits[:, -1], mixture(members, weights, {"input_ids": ids})[:, -1]) <= TOLERANCE
        new = output.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, new], 1)
        # By its own word the gate would say something else: what counts is what the cache was filled with.
        output = model(input_ids=new, past_key_values=output.past_key_values, use_cache=True)
    assert gate.asked == 1
    with pytest.raises(StaleCacheError, match="filled with 6 rows"):
        model(input_ids=new[:2], past_key_values=output.past_key_values, use_cache=True)


def test_a_cache_outlives_the_gate_that_filled_it(path, members):
    """Outside of the block other weights count, but what was begun inside goes on as it began."""
    model = S3TModel.from_pretrained(path, base_model=tiny_llama(), gate=None)
    inputs, weights = prompts([10, 10]), torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]])
    with model.weighted_by(weights):
        output = model(**inputs, use_cache=True)
    new = torch.tensor([[7], [8]])
    answer = model(input_ids=new, past_key_values=output.past_key_values)
    whole = {"input_ids": torch.cat([inputs["input_ids"], new], 1)}
    assert difference(answer.logits[:, -1], mixture(members, weights, whole)[:, -1]) <= TOLERANCE
    # Cropped to nothing it may be filled by others, with other rows.
    cache = answer.past_key_values
    cache.crop(-cache.get_seq_length())
    refilled = model(**prompts([10]), past_key_values=cache)
    assert difference(refilled.logits, mixture(members, torch.tensor([UNKNOWN]), prompts([10]))) <= TOLERANCE


def test_what_is_called_from_inside_of_generation_has_a_gating_of_its_own(path, members):
    model = served(path, tiny_llama(), gate_top_k=1)
    other, seen = prompts([12, 10]), []

    def look(ids, scores):
        seen.append(model(**other).logits)
        return scores

    model.generate(**prompts([11]), max_new_tokens=2, do_sample=False, logits_processor=[look])
    for logits in seen:
        assert difference(logits, mixture(members, weights_of(other["input_ids"], 1), other)) <= TOLERANCE


# Which members there are


def test_depth_deletions_and_dead_shards(tmp_path):
    """`limited_to` cuts what is seen; a shard that lost a slice answers with what is left; a dead one not at all."""
    path, rows = made(tmp_path / "system", tiny_llama(), lm_rows()), lm_rows()

    class Seeing(ByFirstWord):
        def weights(self, input_ids, attention_mask, seen):
            self.seen = seen
            return super().weights(input_ids, attention_mask, seen)

    gate = Seeing()
    model = served(path, tiny_llama(), gate, gate_top_k=1)
    inputs = prompts([10, 11, 13])

    def expected(depths):
        tips = [tips[0] if tips else None for tips in routing_of(model).served]
        weights = torch.stack([known(word) for word in (10, 11, 13)]) * torch.tensor([float(d > 0) for d in depths])
        weights = chosen(weights / weights.sum(1, keepdim=True), gate.seen, 1)
        there = [
            naive_member(tiny_llama(), path, tip.shard, tip.prefix[:depth])
            for tip, depth in zip(tips, depths, strict=True)
            if depth
        ]
        return mixture(there, weights[:, [d > 0 for d in depths]], inputs)

    with model.limited_to(1):
        answer = model(**inputs).logits
        assert [len(slices) for slices in gate.seen] == [1, 1, 1]
        assert difference(answer, expected([1, 1, 1])) <= TOLERANCE
    at = {place: i for i, place in model.locate([row["id"] for row in rows]).items()}
    model.unlearn([at[0, 1]])
    answer = model(**inputs).logits
    assert gate.seen == (frozenset({0}), frozenset({0, 1}), frozenset({0, 1}))
    assert difference(answer, expected([1, 2, 2])) <= TOLERANCE
    model.unlearn([at[1, 0], at[1, 1]])
    answer = model(**inputs).logits
    assert gate.seen[1] == frozenset()
    assert difference(answer, expected([1, 0, 2])) <= TOLERANCE


def test_the_stacks_of_one_shard_share_its_weight(tmp_path):
    path = made(tmp_path / "system", tiny_llama(), lm_rows(), select="all", sequence_selection=[[0, 1], [1, 0]])
    model = served(path, tiny_llama(), gate_top_k=1)
    stacks = routing_of(model).served
    assert [len(tips) for tips in stacks] == [2, 2, 2]
    members = [naive_member(tiny_llama(), path, tip.shard, tip.prefix) for tips in stacks for tip in tips]
    inputs = prompts([11, 13])
    weights = weights_of(inputs["input_ids"], 1).repeat_interleave(2, 1) / 2
    assert difference(model(**inputs).logits, mixture(members, weights, inputs)) <= TOLERANCE


def test_where_rows_cannot_be_taken_apart_members_answer_in_turn(path, members, monkeypatch):
    model = served(path, tiny_llama(), gate_top_k=1)
    monkeypatch.setattr(model._ensemble._shared_pass, "is_possible", lambda inputs, rows: False)
    inputs = prompts([11, 13, 16])
    with rows_computed(model) as seen:
        answer = model(**inputs, use_cache=False).logits
    assert difference(answer, mixture(members, weights_of(inputs["input_ids"], 1), inputs)) <= TOLERANCE
    # Shard 1 answers two of the rows alone, and the other one with shard 0: shard 2 computes nothing.
    assert seen == [3, 3]
    model.generate(**prompts([11]), max_new_tokens=2, do_sample=False)


@pytest.mark.slow
def test_pictures_that_generate_encoded_are_not_taken_apart(tmp_path):
    """Which of them is of which row only the base knows: every member that is needed computes all rows."""
    trainer = make_trainer(
        tmp_path / "system",
        tiny_llava(),
        lm_rows(),
        config=s3t_config(num_shards=SHARDS, partition="balanced"),
        peft_config=lora(tiny_llava(), target_modules=r".*language_model.*q_proj"),
    )
    plant_stages(trainer)
    model = served(tmp_path / "system", tiny_llava(), gate_top_k=1)
    members = members_of(tmp_path / "system", tiny_llava)
    inputs = prompts([10, 11, 14], length=9)
    inputs["input_ids"][:, 1:5] = 50
    inputs["pixel_values"] = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    asked = dict(max_new_tokens=4, do_sample=False, pad_token_id=PAD, eos_token_id=None)
    answer = model.generate(**inputs, **asked)
    for row, member in ((0, 0), (1, 1)):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        assert torch.equal(answer[row : row + 1], members[member].generate(**alone, **asked))


# What is given and refused


def test_weights_can_be_given(path, members):
    gate = ByFirstWord()
    model = served(path, tiny_llama(), gate)
    inputs = prompts([10, 10])
    with model.weighted_by(torch.tensor([0.0, 0.0, 2.0])):
        assert torch.equal(model(**inputs).logits, members[2](**inputs).logits)
    assert gate.asked == 0
    given = model.gate_weights(**prompts(MIXED))
    assert given.dtype == torch.float64 and torch.allclose(given, weights_of(prompts(MIXED)["input_ids"]))
    with model.weighted_by(given), pytest.raises(S3TError, match="Weights were given for 6 rows, and the call has 2"):
        model(**inputs)
    for wrong in ([1.0, 0.0, 0.0], torch.ones(2), torch.zeros(2, 3), -torch.ones(3), torch.full((3,), torch.nan)):
        with pytest.raises(ConfigError, match="Weights are"), model.weighted_by(wrong):
            pass
    with pytest.raises(ConfigError, match="no gate"):
        S3TModel.from_pretrained(path, base_model=tiny_llama(), gate=None).gate_weights(**inputs)


class Saying:
    """A gate that says one thing of all rows, whoever lives."""

    def __init__(self, said):
        self.said = said

    def weights(self, input_ids, attention_mask, seen):
        return self.said


@pytest.mark.parametrize(
    "said",
    [None, [[0.5, 0.5, 0.0]], torch.ones(1, 4), torch.ones(1, 2), torch.zeros(1, 3), torch.full((1, 3), torch.nan)],
)
def test_what_a_gate_says_is_refused_where_it_is_no_weights(path, said):
    model, inputs = served(path, tiny_llama(), Saying(said)), prompts([10, 11])
    for refused in (model, model.gate_weights, model.generate):
        with pytest.raises(ConfigError, match=r"`Saying\.weights` returned are no weights.*\(rows, 3\)|not negative"):
            refused(**inputs)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"input_ids": torch.tensor([1, 2])}, r"a tensor of shape \(2,\) and type torch.int64, expected"),
        ({"input_ids": [[1, 2]]}, "are a list, expected"),
        ({"input_ids": torch.tensor([[1, -2]])}, "with the numbers of tokens"),
        ({"input_ids": torch.ones(1, 2)}, "type torch.float32, expected"),
        ({"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 3)}, r"one entry per token, \(1, 2\)"),
    ],
)
def test_what_is_no_prompt_is_not_weighed(path, given, said):
    with pytest.raises(ConfigError, match=said):
        served(path, tiny_llama(), Saying(torch.ones(1, 3))).gate_weights(**given)


def test_what_a_gate_gives_a_dead_shard_goes_to_the_others(path, members, tmp_path):
    path = shutil.copytree(path, tmp_path / "system")
    model = served(path, tiny_llama(), Saying(torch.tensor([[0.5, 0.0, 1.5], [0.0, 0.0, 2.0]])))
    table = model.folder.table
    model.unlearn([row for slice_ in range(2) for row in table.ids_in(2, slice_)])
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    inputs = prompts([10, 11])
    assert torch.equal(model.gate_weights(**inputs), weights.double())
    assert difference(model(**inputs).logits, mixture(members, weights, inputs)) <= TOLERANCE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate": "terms", "gate_top_k": 4}, "gate_top_k=4 is more than num_shards=3"),
        ({"gate": None, "gate_top_k": 1}, "gate_top_k=1 without a gate"),
        ({"gate": "terms", "gate_top_k": 0}, "`gate_top_k` must be an integer of at least 1"),
        ({"gate": "nearest"}, "`gate`"),
        ({"gate": "terms", "gate_temperature": 0}, "`gate_temperature`"),
    ],
)
def test_settings_that_make_no_sense_are_refused(path, settings, message):
    with pytest.raises(ConfigError, match=message):
        S3TModel.from_pretrained(path, base_model=tiny_llama(), **settings)


def test_few_stand_out_only_if_they_have_half_of_what_equal_weights_would_not_give_them():
    seen = [frozenset({0})] * 4
    weights = torch.tensor([[0.62, 0.18, 0.1, 0.1], [0.63, 0.17, 0.1, 0.1], [0.9985, 0.0005, 0.0005, 0.0005]])
    one = chosen(weights, seen, 1)
    assert torch.equal(one[0], weights[0]) and one[1:].tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]]
    assert chosen(weights, seen, 2)[1].tolist() == pytest.approx([0.7875, 0.2125, 0, 0])
    # Too small to count; and where there are so many shards that all would be, none is.
    assert chosen(weights, seen, None)[2].tolist() == [1, 0, 0, 0]
    assert chosen(torch.full((1, 2000), 1 / 2000), [frozenset({0})] * 2000, 1).count_nonzero() == 2000


# Deletions


@pytest.mark.parametrize("on_running", ["wait", "cancel"])
def test_a_deletion_meets_a_gated_generation(tmp_path, on_running):
    """Also if the stage that goes is of a member that its rows do not ask: the gate's weights are of its rows too."""
    path = made(tmp_path / "system", tiny_llama(), lm_rows())
    model = served(path, tiny_llama(), gate_top_k=1)
    begun, deleted, results = threading.Event(), threading.Event(), []

    def wait(ids, scores):
        begun.set()
        # Half a second is enough for a deletion that does not wait.
        deleted.wait(0.5)
        return scores

    def generate():
        asked = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, logits_processor=[wait])
        try:
            results.append(model.generate(**prompts([10, 12]), **asked))
        except CallStoppedError as error:
            results.append(error)

    before = model.generate(**prompts([10, 12]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    at = {place: i for i, place in model.locate([row["id"] for row in lm_rows()]).items()}
    thread = threading.Thread(target=generate)
    thread.start()
    begun.wait(10)
    model.unlearn([at[1, 1]], on_running=on_running)
    deleted.set()
    thread.join(10)
    if on_running == "cancel":
        assert isinstance(results[0], CallStoppedError)
    else:
        assert torch.equal(results[0], before)


def test_a_route_of_some_members_is_stopped_with_the_whole():
    route = Route((StageKey(0, (0,)), StageKey(1, (0,))))
    part = Gating(route, torch.tensor([[1.0, 0.5], [0.0, 0.5]])).route_of_pass
    assert part.sizes == (2, 1)
    route.stopped.set()
    assert part.is_stopped()


# By terms


def facts() -> list:
    """Rows of a prompt of four words and an answer of four."""
    return [{**row, "labels": [-100] * 4 + row["input_ids"][4:]} for row in lm_rows(12)]


def trainer_of_facts(path: Path, **settings):
    config = s3t_config(num_shards=SHARDS, partition="balanced", **settings)
    return make_trainer(path, tiny_llama(), facts(), config=config, processing_class=tokenizer_of_words())


@pytest.fixture
def known_facts(tmp_path, monkeypatch) -> Path:
    # It decides which facts a shard has; with some, one is worded like those of another shard.
    monkeypatch.setenv("HF_S3T_KEY", "each fact is told from the others")
    plant_stages(trainer_of_facts(tmp_path / "system", gate="terms", gate_top_k=1, gate_temperature=0.1))
    return tmp_path / "system"


def load(path: Path, **settings) -> S3TModel:
    return S3TModel.from_pretrained(path, base_model=tiny_llama(), **settings)


def prompt_of(row: dict, padding: int = 0) -> dict:
    ids = torch.tensor([[PAD] * padding + row["input_ids"][:4]])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def test_the_shard_that_was_trained_on_a_prompt_answers_it(known_facts):
    model, members = load(known_facts), members_of(known_facts, tiny_llama)
    places = model.locate([row["id"] for row in facts()])
    known_to = [model.gate_weights(**prompt_of(row)).argmax().item() for row in facts()]
    assert known_to == [places[row["id"]][0] for row in facts()]
    for row, shard in zip(facts()[:4], known_to, strict=False):
        asked = dict(max_new_tokens=4, do_sample=False, pad_token_id=PAD)
        assert torch.equal(
            model.generate(**prompt_of(row), **asked), members[shard].generate(**prompt_of(row), **asked)
        )
        # Neither padding nor what is labelled is part of the prompt.
        weights = model.gate_weights(**prompt_of(row))
        assert torch.equal(model.gate_weights(**prompt_of(row, padding=2)), weights)
        whole = {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}
        assert torch.equal(model(**whole).logits, members[shard](input_ids=whole["input_ids"]).logits)
    # What is recorded can be overruled.
    flat = load(known_facts, gate_temperature=1e9, gate_top_k=None).gate_weights(**prompt_of(facts()[0]))
    assert flat.tolist() == [pytest.approx([1 / 3] * 3)]
    unknown = {"input_ids": torch.full((1, 4), 3)}
    assert model.gate_weights(**unknown).tolist() == [[1 / 3] * 3]


@pytest.mark.parametrize(("temperature", "alike"), [(5e-324, [1.0, 0.0, 0.0]), (1e308, [1 / 3] * 3)])
def test_no_temperature_is_too_low_or_too_high(known_facts, temperature, alike):
    weights = load(known_facts, gate_temperature=temperature).gate_weights(**prompt_of(facts()[0]))
    assert sorted(weights[0].tolist(), reverse=True) == pytest.approx(alike)


def test_live_models_follow_deletions_and_forget_to_the_bit(known_facts):
    """By themselves and by others: as a model that is loaded afterwards, which reads what is left."""
    model, other = load(known_facts), load(known_facts)
    row = facts()[0]
    before = [one.gate_weights(**prompt_of(row)) for one in (model, other)]
    model.unlearn([row["id"]])
    after = [one.gate_weights(**prompt_of(row)) for one in (model, other, load(known_facts))]
    assert torch.equal(after[0], after[1]) and torch.equal(after[0], after[2])
    assert not torch.equal(before[0], after[0])
    # Once more with the gate written without the row; a cache that nothing of this concerns stays good.
    wait_for_cleaner(model)
    assert torch.equal(model.gate_weights(**prompt_of(row)), after[0])
    answer = other(**prompt_of(facts()[1]), use_cache=True)
    other.refresh()
    other(input_ids=torch.tensor([[7]]), past_key_values=answer.past_key_values)


def test_a_gate_that_is_made_later_is_taken_up(tmp_path):
    plant_stages(trainer_of_facts(tmp_path / "system"))
    model, mean = load(tmp_path / "system"), load(tmp_path / "system", gate=None)
    inputs = prompt_of(facts()[0])
    expected = mean(**inputs).logits
    assert torch.equal(model(**inputs).logits, expected)
    with pytest.raises(FolderError, match=r"build_gate\(\)"):
        load(tmp_path / "system", gate="terms")
    trainer_of_facts(tmp_path / "system", gate="terms", gate_top_k=1, gate_temperature=0.1).build_gate()
    shard = model.gate_weights(**inputs).argmax().item()
    assert torch.equal(model(**inputs).logits, members_of(tmp_path / "system", tiny_llama)[shard](**inputs).logits)
    assert torch.equal(mean(**inputs).logits, expected)


def test_nothing_is_answered_or_deleted_where_the_gate_cannot_be_read(known_facts):
    """Nobody gets a mean who asked for a gate."""
    model, inputs = load(known_facts), prompt_of(facts()[0])
    depths, gate = routing_of(model).depths, known_facts / "gate.safetensors"
    whole = gate.read_bytes()
    gate.write_bytes(whole[100:])
    for refused in (
        lambda: model(**inputs),
        lambda: model.generate(**inputs),
        lambda: load(known_facts),
        lambda: model.unlearn([facts()[0]["id"]]),
    ):
        with pytest.raises(FolderError, match="gate"):
            refused()
    assert routing_of(model).depths == depths
    gate.write_bytes(whole)
    assert torch.equal(model(**inputs).logits, load(known_facts)(**inputs).logits)


def test_another_tokenizer_is_refused(known_facts):
    tokenizer_of_words(w4=7, w7=4).save_pretrained(known_facts)
    with pytest.raises(FolderError, match="made with a tokenizer whose vocabulary has the digest"):
        load(known_facts)
    load(known_facts, gate=None)
    (known_facts / "tokenizer.json").unlink()
    (known_facts / "tokenizer_config.json").unlink()
    with pytest.raises(FolderError, match="cannot be loaded"):
        load(known_facts)


def test_embeddings_alone_are_no_prompt(known_facts):
    model, inputs = load(known_facts), prompt_of(facts()[0])
    embedded = {"inputs_embeds": tiny_llama().get_input_embeddings()(inputs["input_ids"]).detach()}
    asked = dict(max_new_tokens=3, do_sample=False, pad_token_id=PAD)
    for refused in (lambda: model(**embedded), lambda: model.generate(**embedded, **asked)):
        with pytest.raises(S3TError, match="reads a prompt by its `input_ids`"):
            refused()
    with model.weighted_by(model.gate_weights(**inputs)):
        assert difference(model(**embedded).logits, model(**inputs).logits) <= TOLERANCE
    whole = model.generate(**inputs, **asked)
    assert torch.equal(model.generate(**inputs, **embedded, **asked), whole)


def test_what_is_grown_again_is_weighed_without_what_was_deleted(known_facts):
    """What serves has seen the slice again, and only the counts tell what is gone from it."""
    model, other, row = load(known_facts), load(known_facts), facts()[0]
    before = [one.gate_weights(**prompt_of(row)) for one in (model, other)]
    model.unlearn([row["id"]])
    plant_stages(trainer_of_facts(known_facts, gate="terms", gate_top_k=1, gate_temperature=0.1))
    after = [one.gate_weights(**prompt_of(row)) for one in (model, other, load(known_facts))]
    assert model.status()["depths"] == [2] * SHARDS
    assert torch.equal(after[0], after[1]) and torch.equal(after[0], after[2])
    assert not torch.equal(before[0], after[0])


def test_a_live_model_deletes_nothing_that_a_gate_of_another_release_would_keep(known_facts):
    model, file = load(known_facts), known_facts / "gate.safetensors"
    file.write_bytes(file.read_bytes().replace(b'\\"version\\": 1', b'\\"version\\": 9'))
    with pytest.raises(FormatVersionError, match="version 9"):
        model.unlearn([facts()[0]["id"]])
    assert not (known_facts / "ledger.jsonl").read_bytes()
    assert model.folder.table.rows
