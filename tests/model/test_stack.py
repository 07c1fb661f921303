"""Stage adapters in memory: which act and learn, what the base answers beside them, what is left when they go."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save
from support.insides import stack_of
from support.tiny import batch_of, lora, make_trainer, plant_stages, rows_for, s3t_config, tiny_bert, tiny_llama
from torch import nn

from hf_s3t.errors import LayersNotFoundError, S3TError
from hf_s3t.model.batches import repeat_rows
from hf_s3t.model.route import Route, routed
from hf_s3t.model.tensor_files import differing_tensors
from hf_s3t.plan import StageKey


pytestmark = pytest.mark.usefixtures("one_thread")

FIRST, SECOND, OTHER = StageKey(0, (0,)), StageKey(0, (0, 1)), StageKey(0, (1,))
MODELS = {"without a head": tiny_llama, "with a head": tiny_bert}


def make(path, base, **settings) -> SimpleNamespace:
    """A stack that holds nothing, on a base whose answer is known, beside a folder with every stage."""
    trainer = make_trainer(path / "system", base, config=s3t_config(), peft_config=lora(base, **settings))
    answers = answer(trainer.model)
    plant_stages(trainer)
    return SimpleNamespace(stack=stack_of(trainer), base=trainer.model, answers=answers, folder=trainer.folder)


@pytest.fixture(params=MODELS)
def made(request, tmp_path):
    return make(tmp_path, MODELS[request.param]())


def load(made, *keys) -> None:
    for key in keys:
        made.stack.load(key, made.folder.read_adapter(key), made.folder.adapter_digest(key))


def answer(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch_of(rows_for(model, 2))).logits


def learning(model) -> set[str]:
    """What an optimizer would be given."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def names_of(model, key) -> set[str]:
    return {name for name, _ in model.named_parameters() if key.adapter_name in name.split(".")}


def copies(tensors) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def test_the_base_answers_as_itself_and_learns_nothing_whatever_is_attached(made):
    load(made, FIRST, SECOND)
    made.stack.add(OTHER)
    assert torch.equal(answer(made.base), made.answers) and not learning(made.base)
    for key in (OTHER, SECOND, FIRST):
        made.stack.drop([key])
        assert torch.equal(answer(made.base), made.answers) and not learning(made.base)


def test_a_stage_in_training_acts_with_those_it_stands_on_and_learns_alone(made):
    load(made, FIRST, SECOND, OTHER)
    made.stack.train_only(FIRST)
    below = answer(made.base)
    made.stack.train_only(SECOND)
    assert learning(made.base) == names_of(made.base, SECOND)
    both = answer(made.base)
    assert not torch.equal(both, below) and not torch.equal(below, made.answers)
    made.stack.deactivate()
    assert torch.equal(answer(made.base), made.answers) and not learning(made.base)


def test_the_base_answers_as_itself_while_a_stage_is_being_attached(made, monkeypatch):
    made.stack.wrap()
    put, meanwhile = torch.nn.ModuleDict.__setitem__, []

    def called_by_another_thread(self, name, module):
        put(self, name, module)
        meanwhile.append(answer(made.base))

    monkeypatch.setattr(torch.nn.ModuleDict, "__setitem__", called_by_another_thread)
    load(made, FIRST, SECOND)
    assert len(meanwhile) > 2 and all(torch.equal(logits, made.answers) for logits in meanwhile)


def test_loading_draws_nothing(made):
    state = torch.get_rng_state()
    load(made, FIRST, SECOND)
    made.stack.wrap()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_new_stage_starts_with_the_head_of_the_one_it_stands_on_and_the_first_with_the_bases(made):
    load(made, FIRST)
    made.stack.add(SECOND)
    made.stack.add(OTHER)
    for name in made.stack.head:
        start, below, first = (
            {n.rpartition(name)[2]: t for n, t in made.stack.tensors(key).items() if f".{name}." in n}
            for key in (SECOND, FIRST, OTHER)
        )
        bases = dict(made.base.get_submodule(name).original_module.named_parameters())
        assert start and not differing_tensors(start, below)
        assert not differing_tensors(first, {f".{n}": t for n, t in bases.items()})
        assert differing_tensors(first, below)


def test_what_is_dropped_leaves_nothing_behind_and_the_others_as_they_were(made):
    load(made, FIRST, SECOND, OTHER)
    digest = made.folder.adapter_digest(SECOND)
    others = {key: copies(made.stack.tensors(key)) for key in (FIRST, OTHER)}
    made.stack.drop([SECOND, SECOND])
    assert set(made.stack.loaded) == {FIRST, OTHER}
    assert SECOND not in made.stack and not made.stack.holds(SECOND, digest)
    assert not names_of(made.base, SECOND)
    for key, tensors in others.items():
        assert not differing_tensors(tensors, made.stack.tensors(key))


def test_a_stage_that_is_made_anew_is_not_the_one_whose_file_was_loaded_under_its_name(made):
    load(made, FIRST)
    digest = made.folder.adapter_digest(FIRST)
    assert made.stack.holds(FIRST, digest) and not made.stack.holds(FIRST, made.folder.adapter_digest(OTHER))
    made.stack.drop([FIRST])
    made.stack.add(FIRST)
    assert FIRST in made.stack and not made.stack.holds(FIRST, digest)
    load(made, FIRST)
    assert made.stack.holds(FIRST, digest)


def test_wrapping_keeps_what_is_loaded(made):
    load(made, FIRST)
    tensors = copies(made.stack.tensors(FIRST))
    made.stack.wrap()
    assert made.stack.loaded == [FIRST] and not differing_tensors(tensors, made.stack.tensors(FIRST))
    modules = dict(made.base.named_modules())
    load(made, SECOND, OTHER)
    now = dict(made.base.named_modules())
    assert [name for name, module in modules.items() if now.get(name) is not module] == []


def test_loading_again_replaces_what_is_there(made):
    load(made, FIRST)
    written = copies(made.stack.tensors(FIRST))
    for tensor in made.stack.tensors(FIRST).values():
        tensor.data.add_(1)
    load(made, FIRST)
    assert made.stack.loaded == [FIRST] and not differing_tensors(written, made.stack.tensors(FIRST))


MISFITS = {
    "a tensor less": (lambda state, name, base: state.pop(name), "missing"),
    "a tensor of the base": (lambda state, name, base: state.update({base: torch.zeros(16)}), "unexpected"),
    "another shape": (lambda state, name, base: state.update({name: state[name][:1]}), ""),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_tensors_that_are_not_a_stages_own_are_refused_and_nothing_of_it_stays(misfit, made):
    load(made, FIRST, OTHER)
    state, (change, says) = copies(made.stack.tensors(FIRST)), MISFITS[misfit]
    norm = next(name for name, _ in made.base.named_parameters() if "norm" in name.lower() and "lora" not in name)
    change(state, sorted(state)[0], f"base_model.model.{norm}")
    with pytest.raises(LayersNotFoundError, match=rf"The adapter of {FIRST} does not fit the base model: .*{says}"):
        made.stack.load(FIRST, save(state), "digest")
    assert made.stack.loaded == [OTHER] and not names_of(made.base, FIRST)
    assert torch.equal(answer(made.base), made.answers)


# Routes


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_each_block_of_rows_is_answered_as_peft_does_with_the_adapters_of_its_member(
    model, precision, settings, tmp_path
):
    made = make(tmp_path, MODELS[model]().to(precision), **settings)
    load(made, FIRST, SECOND, OTHER)
    alone = []
    for tip in (SECOND, OTHER):
        made.stack.train_only(tip)
        alone.append(answer(made.base))
    made.stack.deactivate()
    rows = {name: value for name, value in batch_of(rows_for(made.base, 2)).items() if name != "labels"}
    for grad in (torch.no_grad, torch.enable_grad):
        with routed(Route((SECOND, OTHER))), grad():
            blocks = made.base(**repeat_rows(rows, 2, 2)).logits.detach().chunk(2)
        for block, expected in zip(blocks, alone):
            torch.testing.assert_close(block, expected)
    assert (alone[0] - alone[1]).abs().max() > 0.01 < (alone[1] - made.answers).abs().max()


@pytest.mark.parametrize("where", ["on it", "on all there are", "on its way back"])
def test_hooks_of_the_bases_own_layers_are_run(tmp_path, where):
    made, ran = make(tmp_path, tiny_llama()), []
    load(made, FIRST)
    layer = made.stack._places[FIRST.group].layers["model.layers.3.mlp.down_proj"].base_layer

    def note(module, *given):
        ran.append(module)

    register = {
        "on it": layer.register_forward_hook,
        "on all there are": nn.modules.module.register_module_forward_hook,
        "on its way back": layer.register_full_backward_hook,
    }[where]
    hook = register(note)
    embeddings = made.base.get_input_embeddings()(batch_of(rows_for(made.base, 2))["input_ids"]).detach()
    with routed(Route((FIRST,))):
        made.base(inputs_embeds=embeddings.requires_grad_()).logits.sum().backward()
    hook.remove()
    assert layer in ran


def test_an_adapter_that_somebody_merged_into_the_base_is_taken_out_by_the_next_pass(tmp_path):
    made = make(tmp_path, tiny_llama())
    load(made, FIRST)
    with routed(Route((FIRST,))):
        expected = answer(made.base)
    for layer in made.stack._places[FIRST.group].layers.values():
        layer.merge(adapter_names=[FIRST.adapter_name])
    with routed(Route((FIRST,))):
        assert torch.allclose(answer(made.base), expected, atol=1e-6)
    with routed(Route(())):
        assert torch.allclose(answer(made.base), made.answers, atol=1e-6)
    assert not torch.allclose(expected, made.answers, atol=1e-6)


def test_a_number_of_rows_that_members_cannot_share_is_refused(made):
    load(made, FIRST, OTHER)
    rows = {name: value for name, value in batch_of(rows_for(made.base, 3)).items() if name != "labels"}
    with pytest.raises(S3TError, match=r"was given 3 rows for 2 ensemble members.*Leave it out of `target_modules`"):
        with routed(Route((FIRST, OTHER))):
            made.base(**rows)


def test_what_answers_can_be_differentiated_by_its_inputs_and_what_trains_builds_no_graph_below_its_layers(tmp_path):
    made = make(tmp_path, tiny_llama())
    load(made, FIRST)
    embeddings = made.base.get_input_embeddings()(batch_of(rows_for(made.base, 2))["input_ids"]).requires_grad_()
    with routed(Route((FIRST,))):
        made.base(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad.abs().sum() > 0
    embeddings.grad = None
    made.stack.train_only(FIRST)
    made.base(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad is None
    learned = {name for name, parameter in made.base.named_parameters() if parameter.grad is not None}
    assert learned == names_of(made.base, FIRST)
