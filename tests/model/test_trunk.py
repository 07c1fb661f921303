"""What lies below every stage of a route is computed, and cached, once: the answers are those of plain PEFT."""

import contextlib
import itertools
from functools import partial

import pytest
import torch
from support.plain_peft import difference, naive_ensemble, naive_member
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
    tiny_vit,
)
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_s3t import S3TModel
from hf_s3t.errors import CallStoppedError
from hf_s3t.model.answering import Ensemble
from hf_s3t.model.route import Route
from hf_s3t.model.trunk import Trunk, Trunks
from hf_s3t.plan.stages import StageKey


TOLERANCE = 1e-5
MEMBERS, LAYERS = 3, 4


class Everyone(Trunks):
    """Every member computes and keeps by itself what lies below its stages."""

    @contextlib.contextmanager
    def shared(self, *given):
        yield


@contextlib.contextmanager
def each_by_itself(model: S3TModel):
    trunks, model._ensemble._trunks = model._ensemble._trunks, Everyone(model.base_model)
    yield
    model._ensemble._trunks = trunks


def made(path, base: PreTrainedModel, rows, peft_config=None) -> S3TModel:
    """A system of three shards, whose stages adapt one layer each of four."""
    config = s3t_config(
        num_shards=MEMBERS,
        num_slices=LAYERS,
        budget=1,
        sequence_selection=[list(range(LAYERS))],
        partition="balanced",
    )
    trainer = make_trainer(path, base, rows, config=config, peft_config=peft_config or lora(base))
    plant_stages(trainer)
    trainer.s3t_model.refresh()
    return trainer.s3t_model.eval()


BASES = {
    "llama": (tiny_llama, lm_rows),
    "gpt2": (tiny_gpt2, lm_rows),
    "bert": (tiny_bert, classification_rows),
    "vit": (tiny_vit, image_rows),
}


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    models: dict[str, tuple[S3TModel, list]] = {}

    def get(name: str):
        if name not in models:
            fresh, rows = BASES[name]
            models[name] = made(tmp_path_factory.mktemp("trunk"), fresh(), rows()), rows()
        return models[name]

    return get


def inputs_of(rows, count: int, padding: str | None = None) -> dict[str, torch.Tensor]:
    batch = batch_of(rows[:count])
    batch.pop("labels", None)
    if padding is not None:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        for row in range(count):
            hidden = slice(0, row + 1) if padding == "left" else slice(-1 - row, None)
            batch["input_ids"][row, hidden] = PAD
            batch["attention_mask"][row, hidden] = 0
    return batch


def rows_of_layers(model: S3TModel, call) -> list[int]:
    """How many rows each layer was given in the last pass of a call."""
    rows: dict[int, int] = {}
    layers = model.base_model.get_submodule(model.stack.layers.path)
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, i=i: rows.update({i: len((*args, *kwargs.values())[0])}), with_kwargs=True
        )
        for i, layer in enumerate(layers)
    ]
    call()
    for hook in hooks:
        hook.remove()
    return [rows[i] for i in range(len(layers))]


@pytest.mark.parametrize("name", BASES)
def test_answers_are_those_of_plain_peft(system, name):
    model, rows = system(name)
    how = "mean_probabilities" if model.can_generate() else "mean_logits"
    paddings = [None] if name == "vit" else [None, "left" if model.can_generate() else "right"]
    for depth, count, padding in itertools.product((1, 3, 4), (1, 4), paddings):
        members = [
            [naive_member(BASES[name][0](), model.folder.path, shard, tuple(range(depth)))] for shard in range(MEMBERS)
        ]
        inputs = inputs_of(rows, count, padding)
        with model.limited_to(depth):
            answer = model(**inputs).logits
            given = rows_of_layers(model, lambda inputs=inputs: model(**inputs))
        assert difference(answer, naive_ensemble(members, how, inputs)) <= TOLERANCE, (depth, count, padding)
        assert given == [count] * (LAYERS - depth) + [MEMBERS * count] * depth


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("depth", [1, 2])
def test_of_keys_and_values_there_is_one_block_below_the_stages(system, name, depth):
    model, rows = system(name)
    # As many rows of all members as there are positions: sizes alone do not tell them apart.
    inputs = inputs_of(rows, 2)
    inputs = {name: value[:, : 2 * MEMBERS] for name, value in inputs.items()}
    with model.limited_to(depth):
        shared = model(**inputs, use_cache=True)
        with each_by_itself(model):
            each = model(**inputs, use_cache=True)
        held, before = (
            sum(layer.keys.numel() + layer.values.numel() for layer in answer.past_key_values.layers)
            for answer in (shared, each)
        )
        assert held * MEMBERS * LAYERS == before * (LAYERS - depth + MEMBERS * depth)
        assert difference(shared.logits, each.logits) <= TOLERANCE
        # And they are continued, each in its own way, also one in the other's.
        more = {"input_ids": inputs["input_ids"][:, :1], "use_cache": True}
        one = model(**more, past_key_values=shared.past_key_values)
        other = model(**more, past_key_values=each.past_key_values)
        assert [len(layer.keys) for layer in one.past_key_values.layers[:1]] == [2]
        assert [len(layer.keys) for layer in other.past_key_values.layers[:1]] == [2 * MEMBERS]
        assert difference(one.logits, other.logits) <= TOLERANCE
        one.past_key_values.crop(-1)
        assert torch.equal(model(**more, past_key_values=one.past_key_values).logits, one.logits)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}, {"cache_implementation": "static"}],
    ids=["greedy", "beams", "no cache", "static cache"],
)
def test_texts_are_those_of_members_that_share_nothing(system, name, settings):
    model, rows = system(name)
    inputs = inputs_of(rows, 3, "left")
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD, **settings}
    with model.limited_to(1):
        text = model.generate(**inputs, **settings)
        with each_by_itself(model):
            assert torch.equal(model.generate(**inputs, **settings), text)


def test_sampled_texts_are_those_of_members_that_share_nothing(system):
    model, rows = system("llama")
    draw = partial(model.generate, **inputs_of(rows, 2), do_sample=True, num_return_sequences=2, max_new_tokens=6)
    with model.limited_to(1):
        torch.manual_seed(0)
        text = draw(eos_token_id=None)
        with each_by_itself(model):
            torch.manual_seed(0)
            assert torch.equal(draw(eos_token_id=None), text)


def test_gradients_reach_the_inputs(system):
    model, rows = system("llama")
    embeddings = model.base_model.get_input_embeddings()(inputs_of(rows, 2)["input_ids"]).detach().requires_grad_()
    with model.limited_to(1):
        (shared,) = torch.autograd.grad(model(inputs_embeds=embeddings).logits.sum(), embeddings)
        with each_by_itself(model):
            (each,) = torch.autograd.grad(model(inputs_embeds=embeddings).logits.sum(), embeddings)
    assert difference(shared, each) <= TOLERANCE and shared.abs().max() > 0


@pytest.mark.parametrize("what", ["another choice of inputs", "a loss", "a text", "the base"])
def test_a_hook_in_a_layer_that_computes_once_may_call_the_model(system, what):
    model, rows = system("llama")
    inputs, others = inputs_of(rows, 2), inputs_of(rows[4:], 3)
    calls = {
        "another choice of inputs": lambda: model(**inputs_of(rows[4:], 3, "left")).logits,
        "a loss": lambda: model(**others, labels=others["input_ids"]).loss,
        "a text": lambda: model.generate(**others, max_new_tokens=3, do_sample=False, eos_token_id=None),
        # Inside it goes by the route, as all that the base computes there.
        "the base": lambda: model.base_model(**others, use_cache=False).logits,
    }
    answers = []

    def call_once(*given):
        if not answers:
            answers.append(None)
            answers.append(calls[what]())

    with model.limited_to(1), torch.no_grad():
        alone, within = model(**inputs).logits, calls[what]()
        # What is known of the base by now, need not be tried inside of a pass.
        model._ensemble = Ensemble(model.base_model)
        model(**inputs)
        hook = model.base_model.get_submodule(model.stack.layers.path)[1].register_forward_pre_hook(call_once)
        answer = model(**inputs).logits
        hook.remove()
    assert torch.equal(answer, alone)
    assert torch.equal(answers[1], within) == (what != "the base")


def test_a_cache_that_was_cropped_to_nothing_is_filled_anew_at_any_depth(system):
    model, rows = system("llama")
    inputs = inputs_of(rows, 2)
    with model.limited_to(2):
        cache = model(**inputs, use_cache=True).past_key_values
    for depth in (1, 3):
        cache.crop(-cache.get_seq_length())
        with model.limited_to(depth):
            assert torch.equal(model(**inputs, past_key_values=cache).logits, model(**inputs).logits)
        assert [len(layer.keys) for layer in cache.layers] == [2] * (LAYERS - depth) + [2 * MEMBERS] * depth


def test_a_stop_while_it_is_tried_says_nothing_of_the_base(system):
    model, rows = system("gpt2")
    inputs = inputs_of(rows, 2)
    stopped = model._routing.cut(1).route.stopped
    with model.limited_to(1):
        expected = model(**inputs).logits
        model._ensemble._trunks._found.clear()
        layers = model.base_model.get_submodule(model.stack.layers.path)
        hook = layers[0].register_forward_pre_hook(lambda *given: stopped.set())
        with pytest.raises(CallStoppedError):
            model(**inputs)
        hook.remove()
        stopped.clear()
        assert torch.equal(model(**inputs).logits, expected)
        assert rows_of_layers(model, lambda: model(**inputs))[0] == 2


# Models of which it is not known, or not so


class OwnConfig(PreTrainedConfig):
    model_type = "a model whose layers share more than an answer"


class Block(nn.Module):
    def __init__(self, index: int):
        super().__init__()
        self.index = index
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x, cache=None, lower=None):
        x = x + self.down(torch.relu(self.up(x)))
        if cache is not None:
            keys, _ = cache.update(x[:, None], x[:, None], self.index)
            if self.index == 3:
                # Keys that another layer left.
                x = x + (keys @ cache.layers[0].keys.transpose(2, 3) @ keys)[:, 0]
        if lower is not None:
            lower.append(x)
            x = x + lower[0]
        return x


class Own(PreTrainedModel):
    config_class = OwnConfig
    main_input_name = "input_ids"
    way = "skips"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.blocks = nn.ModuleList(map(Block, range(LAYERS)))
        self.head = nn.Linear(16, VOCABULARY)
        self.post_init()

    def forward(self, input_ids, labels=None, use_cache=True, **ignored):
        x, kept = self.embed(input_ids), []
        ways = {"borrows": {"cache": DynamicCache() if use_cache else None}, "writes": {"lower": []}}
        given = ways.get(self.way, {})
        for block in self.blocks:
            x = block(x, **given)
            kept.append(x)
        if self.way == "skips":
            # What lower layers answered is used again above, as in a U-Net.
            x = x + kept[0] * kept[1]
        logits = self.head(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits.transpose(1, 2), labels)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class Borrows(Own):
    way = "borrows"


class Writes(Own):
    way = "writes"


@pytest.mark.parametrize(("cls", "count"), [(Own, 1), (Borrows, MEMBERS), (Writes, MEMBERS)])
def test_a_model_whose_layers_share_more_than_an_answer(tmp_path, cls, count):
    """Skips are seen from outside; layers that write where others read are left to compute for every member."""
    torch.manual_seed(0)
    model = made(tmp_path, cls(OwnConfig()), lm_rows(), lora(cls(OwnConfig()), target_modules=["up", "down"]))
    for rows in (1, 3):
        inputs = {"input_ids": batch_of(lm_rows(rows))["input_ids"]}
        with model.limited_to(1):
            answer = model(**inputs).logits
            given = rows_of_layers(model, lambda inputs=inputs: model(**inputs))
            with each_by_itself(model):
                assert difference(model(**inputs).logits, answer) <= TOLERANCE
        assert given == [rows * count] * 3 + [rows * MEMBERS]


def test_a_cache_is_a_way_to_share_more_than_an_answer_and_is_tried_by_itself(tmp_path):
    model = made(tmp_path, Borrows(OwnConfig()), lm_rows(), lora(Borrows(OwnConfig()), target_modules=["up", "down"]))
    inputs = {"input_ids": batch_of(lm_rows(3))["input_ids"]}
    with model.limited_to(1):
        for use_cache, count in ((False, 1), (True, MEMBERS)):
            answer = model(**inputs, use_cache=use_cache).logits
            given = rows_of_layers(model, lambda use_cache=use_cache: model(**inputs, use_cache=use_cache))
            with each_by_itself(model):
                assert difference(model(**inputs, use_cache=use_cache).logits, answer) <= TOLERANCE
            assert given == [3 * count] * 3 + [3 * MEMBERS]


# One layer after the other


ROUTE = Route(tuple(StageKey(shard, (0,)) for shard in range(MEMBERS)))


def pass_through(trunk: Trunk, *args, **kwargs):
    """What a layer is given that hands on its first argument, and what comes of that."""
    layer = nn.Identity()
    args, kwargs = trunk.enter(layer, False, (args, kwargs)) or (args, kwargs)
    if "past_key_values" in kwargs:
        kwargs["past_key_values"].update(args[0][:, None], args[0][:, None], 0)
    whole = trunk.leave(layer, args[0].clone())
    return args, kwargs, args[0] if whole is None else whole


def test_a_layer_is_given_the_first_block_of_what_has_blocks():
    block, for_all, positions = torch.randn(2, 5, 4), torch.randn(1, 5, 4), torch.arange(5).repeat(3, 2, 1)
    given = {
        "mask": block.repeat(MEMBERS, 1, 1) > 0,
        "pair": (for_all, for_all),
        "position_ids": positions.repeat(1, MEMBERS, 1),
        "cache_position": torch.arange(2 * MEMBERS),
    }
    args, kwargs, answer = pass_through(Trunk(ROUTE, 2), block.repeat(MEMBERS, 1, 1), **given)
    assert torch.equal(args[0], block) and torch.equal(kwargs["mask"], block > 0)
    assert kwargs["pair"][0] is for_all and torch.equal(kwargs["position_ids"], positions)
    assert kwargs["cache_position"] is given["cache_position"]
    assert torch.equal(answer, block.repeat(MEMBERS, 1, 1))


OTHERS = {
    "a mask that differs": {"mask": torch.arange(2 * MEMBERS)[:, None]},
    "a list that it may write to": {"states": []},
    "a cache of another kind": {"cache": StaticCache(PreTrainedConfig(num_hidden_layers=1), max_cache_len=8)},
}


@pytest.mark.parametrize("other", OTHERS)
def test_where_a_layer_is_not_given_the_same_caches_are_repeated_and_the_pass_goes_on_as_ever(other):
    block, cache, trunk = torch.randn(2, 5, 4), DynamicCache(), Trunk(ROUTE, 2)
    _, _, answer = pass_through(trunk, block.repeat(MEMBERS, 1, 1), past_key_values=cache)
    assert torch.equal(cache.layers[0].keys[:, 0], block)
    args, kwargs, _ = pass_through(trunk, answer, **OTHERS[other])
    assert args[0] is answer and kwargs == OTHERS[other]
    assert torch.equal(cache.layers[0].keys[:, 0], block.repeat(MEMBERS, 1, 1))
    # Nor does a later layer.
    args, _, _ = pass_through(trunk, answer)
    assert args[0] is answer


def test_a_cache_of_an_earlier_pass_is_repeated_though_this_one_shares_nothing():
    block, cache = torch.randn(2, 5, 4), DynamicCache()
    pass_through(Trunk(ROUTE, 2), block.repeat(MEMBERS, 1, 1), past_key_values=cache)
    whole = block.repeat(MEMBERS, 1, 1)
    args, _, _ = pass_through(Trunk(ROUTE, 2, cache), whole, states=[], past_key_values=cache)
    assert args[0] is whole
    assert torch.equal(cache.layers[0].keys[:, 0], block.repeat(MEMBERS, 2, 1))


def test_layers_inside_of_one_that_computes_once_do_too():
    block, outer, trunk = torch.randn(2, 5, 4), nn.Identity(), Trunk(ROUTE, 2)
    (given,), _ = trunk.enter(outer, False, ((block.repeat(MEMBERS, 1, 1),), {}))
    (inner,), _, answer = pass_through(trunk, given)
    assert inner is given and torch.equal(answer, block)
    # Itself too, as where a hook in it calls the base.
    assert trunk.enter(outer, False, ((given,), {})) is None and trunk.leave(outer, given) is None
    assert torch.equal(trunk.leave(outer, answer + 1), (block + 1).repeat(MEMBERS, 1, 1))
    assert torch.equal(pass_through(trunk, block.repeat(MEMBERS, 1, 1))[0][0], block)


def test_above_the_first_stage_nothing_is_shared():
    whole, trunk = torch.randn(2, 5, 4).repeat(MEMBERS, 1, 1), Trunk(ROUTE, 2)
    assert trunk.enter(nn.Identity(), True, ((whole,), {})) is None
    assert pass_through(trunk, whole)[0][0] is whole
