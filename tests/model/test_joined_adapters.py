"""Adapters of several members in one piece of memory: what they answer, what they hold, what is left when one goes."""

import copy
import gc
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.lora import LoraLayer
from support.insides import stack_of
from support.tiny import batch_of, lm_rows, lora, make_trainer, plant_stages, rows_for, s3t_config, tiny_llama

from hf_s3t.folder.layout import ADAPTER_FILE
from hf_s3t.model.batches import repeat_rows
from hf_s3t.model.route import Route, routed
from hf_s3t.plan import StageKey


pytestmark = pytest.mark.usefixtures("one_thread")

SHARDS = 3
LOWER = tuple(StageKey(shard, (0,)) for shard in range(SHARDS))
TIPS = tuple(StageKey(shard, (0, 1)) for shard in range(SHARDS))


def make(path, loaded=(*LOWER, *TIPS), **settings) -> SimpleNamespace:
    """Three stacks of two stages in memory, as they come from a folder."""
    base = tiny_llama()
    config = s3t_config(num_shards=SHARDS, budget=1, sequence_selection=[[0, 1]], partition="balanced")
    trainer = make_trainer(path / "system", base, lm_rows(24), config=config, peft_config=lora(base, **settings))
    plant_stages(trainer)
    made = SimpleNamespace(stack=stack_of(trainer), base=trainer.model, folder=trainer.folder)
    load(made, *loaded)
    return made


def load(made, *keys) -> None:
    for key in keys:
        made.stack.load(key, made.folder.read_adapter(key), made.folder.adapter_digest(key))


@pytest.fixture
def made(tmp_path):
    return make(tmp_path)


def answer(made, tips, route=None) -> torch.Tensor:
    """What members answer in one pass, one after the other."""
    rows = {name: value for name, value in batch_of(rows_for(made.base, 2)).items() if name != "labels"}
    with torch.inference_mode(), routed(route or Route(tuple(tips))):
        return made.base(**repeat_rows(rows, 2, len(tips))).logits.clone()


def as_plain_peft(made, tip) -> torch.Tensor:
    rows = {name: value for name, value in batch_of(rows_for(made.base, 2)).items() if name != "labels"}
    made.stack.train_only(tip)
    with torch.no_grad():
        logits = made.base(**rows).logits
    made.stack.deactivate()
    return logits


def memory_of(made, key) -> set[int]:
    """Where the tensors of a stage lie."""
    return {tensor.untyped_storage().data_ptr() for tensor in made.stack.tensors(key).values()}


def are_joined(made, *keys) -> bool:
    """Whether stages lie in the same pieces of memory, all of their tensors; none of them may in part."""
    first, *others = (memory_of(made, key) for key in keys)
    assert all(other == first or not other & first for other in others)
    return all(other == first for other in others)


def bytes_in_memory() -> int:
    """Of all tensors of this process."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if type(tensor) in (torch.Tensor, torch.nn.Parameter)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr()}.values())


def bytes_of(made, *keys) -> int:
    return sum(tensor.nbytes for key in keys for tensor in made.stack.tensors(key).values())


def input_gradients(made, tips) -> tuple[torch.Tensor, torch.Tensor]:
    """A sum of what members answer, and the embeddings by which it can be differentiated."""
    rows = {name: value for name, value in batch_of(rows_for(made.base, 2)).items() if name == "input_ids"}
    embedded = made.base.get_input_embeddings()(rows["input_ids"]).detach().requires_grad_()
    with routed(Route(tuple(tips))):
        logits = made.base(inputs_embeds=embedded.repeat(len(tips), 1, 1)).logits
    return logits.square().sum(), embedded


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "lora_alpha": 3}], ids=["lora", "rslora"])
def test_members_that_are_joined_answer_as_each_does_in_plain_peft(tmp_path, settings):
    made = make(tmp_path, **settings)
    expected = torch.cat([as_plain_peft(made, tip) for tip in TIPS])
    first = answer(made, TIPS)
    assert are_joined(made, *TIPS) and are_joined(made, *LOWER)
    torch.testing.assert_close(first, expected, atol=1e-6, rtol=0)
    assert torch.equal(answer(made, TIPS), first)
    assert (expected[:2] - expected[2:4]).abs().max() > 0.01


def test_one_member_answers_as_plain_peft_to_the_bit_wherever_its_adapter_lies(made):
    expected = [as_plain_peft(made, tip) for tip in TIPS]
    for when in ("by itself", "joined", "apart again"):
        if when == "joined":
            answer(made, TIPS)
        if when == "apart again":
            made.stack.drop([TIPS[1], LOWER[1]])
        for tip, logits in zip(TIPS, expected, strict=True):
            if tip in made.stack:
                assert torch.equal(answer(made, [tip]), logits), when
                assert torch.equal(as_plain_peft(made, tip), logits), when


def test_what_is_saved_is_what_was_loaded(made, tmp_path):
    answer(made, TIPS)
    for key in (LOWER[1], TIPS[2]):
        (tmp_path / key.adapter_name).mkdir()
        made.stack.save(key, tmp_path / key.adapter_name, None)
        assert (tmp_path / key.adapter_name / ADAPTER_FILE).read_bytes() == made.folder.read_adapter(key)


def test_there_is_no_second_copy_and_what_is_removed_is_out_of_memory(made):
    held = bytes_in_memory()
    answer(made, TIPS)
    assert are_joined(made, *TIPS) and bytes_in_memory() == held
    # The tip and what it stands on, then a tip alone: its member is shallower than the others.
    for gone in ([TIPS[1], LOWER[1]], [TIPS[2]]):
        held -= bytes_of(made, *gone)
        made.stack.drop(gone)
        assert bytes_in_memory() == held
        tips = [TIPS[0], TIPS[2] if TIPS[2] in made.stack else LOWER[2]]
        answer(made, tips)
        assert bytes_in_memory() == held
    assert are_joined(made, LOWER[0], LOWER[2])


def test_members_that_are_left_answer_as_if_there_had_been_no_other(made, tmp_path):
    answer(made, TIPS)
    made.stack.drop([TIPS[1], LOWER[1]])
    assert not are_joined(made, TIPS[0], TIPS[2])
    left = [TIPS[0], TIPS[2]]
    without = make(tmp_path / "without", loaded=(LOWER[0], LOWER[2], *left))
    assert torch.equal(answer(made, left), answer(without, left)) and are_joined(made, *left)


def test_to_a_removed_adapter_not_even_what_another_product_holds_on_to_leads(made):
    answer(made, TIPS)
    gone = made.stack.tensors(TIPS[1])
    # As a product of another member does in another thread, for as long as it computes.
    product = made.stack.tensors(TIPS[0])
    whole = {name: tensor.new_empty(0).set_(tensor.untyped_storage()) for name, tensor in product.items()}
    places = {name: slice(t.storage_offset(), t.storage_offset() + t.numel()) for name, t in gone.items()}
    kept = {name: tensor.clone() for name, tensor in product.items()}
    assert all(torch.equal(whole[name][place], gone[name].flatten()) for name, place in places.items())
    assert all(tensor.any() for tensor in gone.values())
    made.stack.drop([TIPS[1]])
    assert not any(whole[name][place].any() for name, place in places.items())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in product.items())


def test_a_removal_between_two_layers_of_a_call_of_others_changes_nothing_of_its_answer(made):
    left = [TIPS[0], TIPS[2]]
    made.stack.drop([TIPS[1], LOWER[1]])
    expected = answer(made, left)
    load(made, LOWER[1], TIPS[1])
    answer(made, TIPS)
    layers, gone = made.base.model.layers, []

    def remove(*args):
        gone.append(1)
        made.stack.drop([TIPS[1], LOWER[1]])

    handle = layers[len(layers) - 1].mlp.register_forward_pre_hook(remove)
    assert torch.equal(answer(made, left), expected) and gone
    handle.remove()
    assert torch.equal(answer(made, left), expected) and are_joined(made, *left)


def test_members_of_another_call_are_answered_the_same_whoever_is_joined(made, tmp_path):
    """While a call on the stacks of before is under way, say: those of now do not take its memory."""
    pairs = [(TIPS[0], TIPS[1]), (TIPS[2], TIPS[0]), (LOWER[2], TIPS[0]), (TIPS[1], TIPS[1])]
    expected = [answer(make(tmp_path / str(number)), pair) for number, pair in enumerate(pairs)]
    under_way = Route(TIPS)
    everyone = answer(made, TIPS, under_way)
    held = bytes_in_memory()
    for pair, logits in zip(pairs, expected, strict=True):
        found = answer(made, pair)
        assert torch.equal(found, logits)
        del found
        assert bytes_in_memory() == held
    assert are_joined(made, *TIPS) and torch.equal(answer(made, TIPS), everyone)


def test_those_who_answer_now_take_the_place_of_those_of_a_route_that_is_gone(made, tmp_path):
    """Stages grow under a live model, or another sequence answers after a deletion; all of the old ones may stay."""
    expected = answer(make(tmp_path / "anew"), TIPS)
    before = Route(TIPS[:2])
    answer(made, TIPS[:2], before)
    assert torch.equal(answer(made, TIPS), expected) and not are_joined(made, *TIPS)
    held = bytes_in_memory()
    del before
    assert torch.equal(answer(made, TIPS), expected) and are_joined(made, *TIPS)
    assert bytes_in_memory() == held
    answer(made, TIPS[1:])
    assert are_joined(made, *TIPS[1:]) and not are_joined(made, *TIPS)
    assert bytes_in_memory() == held


def test_a_copy_of_a_layer_knows_of_no_memory_but_its_own(made):
    answer(made, TIPS)
    layer = next(module for module in made.base.modules() if isinstance(module, LoraLayer))
    copied = copy.deepcopy(layer)
    assert vars(layer)["_s3t_joined"] is not None and vars(copied)["_s3t_joined"] is None


def test_a_stage_that_is_loaded_again_under_its_name_is_the_one_that_answers(made):
    before = answer(made, TIPS)
    state = made.folder.read_adapter(TIPS[0])
    made.stack.load(TIPS[1], state, "that of another one")
    after = answer(made, TIPS)
    assert torch.equal(before[:2], after[:2]) and torch.equal(before[4:], after[4:])
    torch.testing.assert_close(after[2:4], as_plain_peft(made, TIPS[1]), atol=1e-6, rtol=0)
    assert not torch.equal(before[2:4], after[2:4])


def test_what_is_moved_or_cast_is_moved_as_a_whole(made):
    answer(made, TIPS)
    held = bytes_in_memory()
    made.base.double()
    assert not are_joined(made, *TIPS) and bytes_in_memory() == 2 * held
    expected = torch.cat([as_plain_peft(made, tip) for tip in TIPS])
    torch.testing.assert_close(answer(made, TIPS), expected, atol=1e-12, rtol=0)


def test_stages_are_trained_above_what_was_joined_while_nothing_recorded_gradients(made):
    answer(made, TIPS)
    made.stack.train_only(TIPS[0])
    made.base(**batch_of(rows_for(made.base, 2))).loss.backward()
    learned = {name for name, parameter in made.base.named_parameters() if parameter.grad is not None}
    assert learned == {name for name, _ in made.base.named_parameters() if TIPS[0].adapter_name in name.split(".")}


@pytest.mark.parametrize("how", ["removed", "cast"])
def test_what_is_left_can_be_differentiated_though_it_was_taken_apart_where_nothing_can_be(made, how):
    """A call within `torch.inference_mode` follows what another process deleted, say."""
    answer(made, TIPS)
    with torch.inference_mode():
        if how == "removed":
            made.stack.drop([TIPS[1], LOWER[1]])
        else:
            made.base.float()
    left = [TIPS[0], TIPS[2]]
    assert not any(tensor.is_inference() for tip in left for tensor in made.stack.tensors(tip).values())
    total, embedded = input_gradients(made, left)
    total.backward()
    assert embedded.grad.any()


def test_gradients_of_a_member_that_is_gone_are_an_error_and_not_those_of_zeros(made):
    answer(made, TIPS)
    total, _ = input_gradients(made, TIPS)
    made.stack.drop([TIPS[1], LOWER[1]])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_what_an_optimizer_holds_stays_where_it_is(made):
    made.stack.train_only(TIPS[0])
    held = [parameter for parameter in made.base.parameters() if parameter.requires_grad]
    answer(made, TIPS)
    assert held and set(held) <= set(made.base.parameters())
    assert not are_joined(made, *TIPS) and are_joined(made, *LOWER)


# The second weights of the last are of 32 bytes.
OTHERS = {
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "small": {"r": 1, "lora_alpha": 2, "target_modules": ["k_proj"]},
}


@pytest.mark.parametrize("settings", OTHERS.values(), ids=OTHERS)
def test_what_is_more_than_two_products_or_would_not_lie_as_if_by_itself_stays_where_it_is(tmp_path, settings):
    made = make(tmp_path, **settings)
    expected = torch.cat([as_plain_peft(made, tip) for tip in TIPS])
    torch.testing.assert_close(answer(made, TIPS), expected, atol=1e-6, rtol=0)
    assert not are_joined(made, *TIPS)
