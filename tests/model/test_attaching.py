"""A stage after the first of its layers: attached without a look through the model, as PEFT attaches it to the bit."""

import copy
import gc
import sys
from collections.abc import Mapping
from contextlib import contextmanager

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import layer as peft_layer
from safetensors.torch import load, save
from support.tiny import (
    lora,
    make_trainer,
    plant_stages,
    s3t_config,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_roberta,
)
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from hf_s3t import S3TModel
from hf_s3t.errors import LayersNotFoundError
from hf_s3t.model import stage_files
from hf_s3t.model.adapter_places import Slot
from hf_s3t.model.layers import LayerGroups
from hf_s3t.model.route import Route, routed
from hf_s3t.model.stack import StageStack
from hf_s3t.model.tensor_files import differing_tensors
from hf_s3t.plan import StageKey


pytestmark = pytest.mark.usefixtures("one_thread")

KEY, EARLIER, ABOVE = StageKey(1, (0,)), StageKey(0, (0,)), StageKey(0, (0, 1))


# Which stages


def quantised(bits: int):
    def load(folder):
        # bitsandbytes' kernels want a multiple of 32 columns.
        tiny_llama(2, hidden_size=64, intermediate_size=128).save_pretrained(folder)
        settings = {f"load_in_{bits}bit": True, "llm_int8_skip_modules": ["lm_head"]}
        config = BitsAndBytesConfig(**settings)
        return LlamaForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16).eval()

    return load


def half(make):
    return lambda folder: make(2).to(torch.bfloat16)


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {r".*1\.mlp\.down_proj": 7}}
# A base, where its layers are, its head, and what the config changes.
STAGES = {
    "plain": (lambda folder: tiny_llama(2), "model.layers", (), {"target_modules": SEVEN}),
    "rslora": (lambda folder: tiny_llama(2), "model.layers", (), {"use_rslora": True}),
    "dora": (lambda folder: tiny_llama(2), "model.layers", (), {"use_dora": True, "lora_dropout": 0.2}),
    "dora, bf16": (half(tiny_llama), "model.layers", (), {"use_dora": True, "use_rslora": True}),
    "patterns": (lambda folder: tiny_llama(2), "model.layers", (), {"target_modules": SEVEN, **PATTERNS}),
    "expression": (lambda folder: tiny_llama(2), "model.layers", (), {"target_modules": r".*\.(q|up)_proj"}),
    "all linear": (half(tiny_llama), "model.layers", (), {"target_modules": "all-linear", "lora_dropout": 0.1}),
    "biases": (lambda folder: tiny_gpt2(2), "transformer.h", (), {"target_modules": ["c_attn"], "lora_bias": True}),
    "Conv1D": (half(tiny_gpt2), "transformer.h", (), {"target_modules": ["c_attn", "c_fc"], "use_dora": True}),
    "orthogonal": (lambda folder: tiny_llama(2), "model.layers", (), {"init_lora_weights": "orthogonal", "r": 2}),
    "a head": (lambda folder: tiny_bert(2), "bert.encoder.layer", ("classifier",), {}),
    "a head of several modules": (half(tiny_roberta), "roberta.encoder.layer", ("classifier",), {"use_rslora": True}),
    "8 bit": (quantised(8), "model.layers", (), {"target_modules": SEVEN, "use_rslora": True}),
    "4 bit": (quantised(4), "model.layers", (), {"target_modules": SEVEN, "lora_dropout": 0.1}),
    "4 bit, dora": (quantised(4), "model.layers", (), {"use_dora": True}),
}


def stack_on(base, path: str, head=(), count: int = 2, **changes) -> StageStack:
    return StageStack(base, lora(base, **changes), LayerGroups(path, count, (tuple(range(count - 2, count)),)), head)


def file_of(stack: StageStack, key: StageKey = EARLIER) -> bytes:
    """A file of random numbers, none of which half precision holds, that fits a stage; the stage is dropped."""
    torch.manual_seed(0)
    stack.add(key)
    state = {name: torch.randn_like(tensor) for name, tensor in stack.tensors(key).items()}
    stack.drop([key])
    return save(state)


# What there is to see of them

# What decides, besides the adapters that there are, what a module of PEFT computes.
GOVERNING = ("_active_adapter", "_disable_adapters", "merged_adapters", "training", "_adapters")


def portrait(value):
    """All of a value that could tell one adapter from another: kinds, settings, and tensors to the bit."""
    if isinstance(value, torch.Tensor):
        bits = value.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
        return type(value), value.dtype, value.device, tuple(value.shape), value.requires_grad, bits
    if isinstance(value, nn.Module):
        return type(value), {name: portrait(attribute) for name, attribute in vars(value).items()}
    if isinstance(value, Mapping):
        return type(value), {name: portrait(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value), [portrait(item) for item in value]
    if isinstance(value, set):
        # The order in which they come tells nothing.
        return type(value), sorted(map(repr, value))
    if type(value).__module__.startswith("peft."):
        return type(value), vars(value)
    return value


def traces(base: nn.Module, adapter: str) -> dict:
    """What the modules of a base show of one adapter, and by what they are governed."""
    found = {}
    for name, module in base.named_modules():
        for attribute, value in {**vars(module), **module._modules}.items():
            if (
                hasattr(value, "keys")
                and adapter in value
                and not isinstance(module, (nn.ModuleDict, nn.ParameterDict))
            ):
                found[name, attribute] = portrait(value[adapter])
            elif attribute in GOVERNING:
                found[name, attribute] = portrait(value)
    return found


# What PEFT's own way makes of the file is compared with


@pytest.mark.parametrize("kind", STAGES)
def test_a_further_stage_is_attached_as_peft_attaches_it(kind, tmp_path):
    make, path, head, changes = STAGES[kind]
    stack = stack_on(make(tmp_path), path, head, **changes)
    data = file_of(stack)
    random = torch.get_rng_state()
    shown = {}
    for way in ("PEFT's", "ours"):
        with PEFTS_WAY[way](stack) as injections:
            stack.load(KEY, data, "digest")
        assert len(injections) == (way == "PEFT's")
        shown[way] = traces(stack.base, KEY.adapter_name), portrait(stack.base.peft_config[KEY.adapter_name].to_dict())
        stack.drop([KEY])
        assert not [trace for trace in traces(stack.base, KEY.adapter_name) if trace[1].startswith("lora_")]
    assert shown["ours"] == shown["PEFT's"]
    assert sum(attribute == "scaling" for _, attribute in shown["ours"][0]) >= 2
    assert torch.equal(torch.get_rng_state(), random)


@contextmanager
def peft_alone(stack: StageStack):
    """Inside, nothing that is known of the stages before is used."""
    known = dict(stack._places)
    stack._places.clear()
    with injections_of(stack) as injections:
        yield injections
    stack._places.update(known)


@contextmanager
def injections_of(stack: StageStack):
    injections, inject = [], stack._inject
    stack._inject = lambda *args, **kwargs: (injections.append(args), inject(*args, **kwargs))
    yield injections
    del stack._inject


PEFTS_WAY = {"PEFT's": peft_alone, "ours": injections_of}


@pytest.mark.parametrize("kind", STAGES)
def test_it_is_what_peft_loads_from_its_file(kind, tmp_path):
    """Of numbers that half precision holds: PEFT rounds others to the precision of the base."""
    make, path, head, changes = STAGES[kind]
    stack = stack_on(make(tmp_path / "base"), path, head, **changes)
    whole = {name: (8 * tensor).round() for name, tensor in load(file_of(stack)).items()}
    for key in (EARLIER, KEY):
        stack.load(key, save(whole), "digest")
    (tmp_path / "stage").mkdir()
    stack.save(KEY, tmp_path / "stage", None)
    theirs = PeftModel.from_pretrained(make(tmp_path / "base"), tmp_path / "stage", adapter_name=KEY.adapter_name)
    shown = [traces(base.eval(), KEY.adapter_name) for base in (stack.base, theirs.base_model.model)]
    parts = [{at: part for at, part in found.items() if at[1] not in (*GOVERNING, "peft_config")} for found in shown]
    assert parts[0] == parts[1] and len(parts[0]) > 14


def test_what_is_made_for_one_stage_is_no_part_of_another(tmp_path):
    make, path, head, changes = STAGES["dora"]
    stack = stack_on(make(tmp_path), path, head, **changes)
    first, second = file_of(stack), file_of(stack, KEY)
    for key, data in ((EARLIER, first), (KEY, second)):
        stack.load(key, data, "digest")
    before = {name: tensor.clone() for name, tensor in stack.tensors(EARLIER).items()}
    for tensor in stack.tensors(KEY).values():
        tensor.add_(1)
    stack.train_only(KEY)
    layer = next(module for module in stack.base.modules() if isinstance(module, LoraLayer))
    layer.lora_A[KEY.adapter_name].register_forward_hook(lambda *args: None)
    layer.lora_magnitude_vector[KEY.adapter_name]._cache_store("norm", 1)
    assert differing_tensors(stack.tensors(EARLIER), before) == []
    assert {p.requires_grad for n, p in stack.base.named_parameters() if EARLIER.adapter_name in n} == {False}
    assert not layer.lora_A[EARLIER.adapter_name]._forward_hooks
    assert not layer.lora_magnitude_vector[EARLIER.adapter_name]._dora_cache
    stack.load(StageKey(2, (0,)), first, "digest")
    assert not layer.lora_A[StageKey(2, (0,)).adapter_name]._forward_hooks
    memory = [{tensor.data_ptr() for tensor in stack.tensors(key).values()} for key in stack.loaded]
    assert len(set.union(*memory)) == sum(map(len, memory)) == 3 * len(before)


@pytest.mark.parametrize("kind", ["dora, bf16", "patterns", "a head"])
def test_a_call_on_other_stages_meanwhile_is_answered_by_them_at_every_step(kind, tmp_path, monkeypatch):
    make, path, head, changes = STAGES[kind]
    stack = stack_on(make(tmp_path), path, head, **changes)
    data = file_of(stack)
    stack.load(EARLIER, data, "digest")
    stack.base.eval()

    def answered() -> torch.Tensor:
        with torch.no_grad(), routed(Route((EARLIER,))):
            return stack.base(input_ids=torch.tensor([[5, 6, 7]])).logits

    before, meanwhile = answered(), []

    def with_a_call_after(real):
        def step(*args):
            real(*args)
            meanwhile.append(answered())

        return step

    for owner, name in ((nn.ModuleDict, "__setitem__"), (Slot, "set"), (nn.ModuleDict, "__delitem__")):
        monkeypatch.setattr(owner, name, with_a_call_after(getattr(owner, name)))
    stack.load(KEY, data, "digest")
    stack.drop([KEY])
    assert len(meanwhile) > 20 and all(torch.equal(logits, before) for logits in meanwhile)


def test_a_stage_that_was_added_to_be_trained_shows_how_others_are_attached(tmp_path):
    """What it holds stays its own: it is trained on."""
    make, path, head, changes = STAGES["a head"]
    stack = stack_on(make(tmp_path), path, head, **changes)
    torch.manual_seed(1)
    stack.add(EARLIER)
    before = {name: (tensor.clone(), tensor.data_ptr()) for name, tensor in stack.tensors(EARLIER).items()}
    stack.load(KEY, save({name: torch.ones_like(tensor) for name, (tensor, _) in before.items()}), "digest")
    after = stack.tensors(EARLIER)
    assert all(torch.equal(after[name], tensor) for name, (tensor, _) in before.items())
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == {n: at for n, (_, at) in before.items()}


def test_where_peft_keeps_more_of_an_adapter_than_is_known_it_attaches_every_stage(tmp_path, monkeypatch):
    real = peft_layer.Linear.update_layer

    def update_layer(layer, adapter_name, *args, **kwargs):
        real(layer, adapter_name, *args, **kwargs)
        layer.__dict__.setdefault("lora_of_tomorrow", {})[adapter_name] = object()

    monkeypatch.setattr(peft_layer.Linear, "update_layer", update_layer)
    make, path, head, changes = STAGES["plain"]
    stack = stack_on(make(tmp_path), path, head, **changes)
    data = file_of(stack)
    with injections_of(stack) as injections:
        for key in (EARLIER, KEY):
            stack.load(key, data, "digest")
    assert len(injections) == 2
    layers = [module for module in stack.base.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 14 and all(KEY.adapter_name in layer.lora_of_tomorrow for layer in layers)


# What PEFT is shown of a base


INITIALISED = {
    **{kind: {} for kind in STAGES},
    "dora, bf16": {"init_lora_weights": "gaussian"},
    "all linear": {"init_lora_weights": False},
}


@pytest.mark.parametrize("kind", INITIALISED)
def test_peft_makes_and_draws_of_the_layers_of_a_stage_what_it_does_of_the_whole_base(kind, tmp_path):
    make, path, head, changes = STAGES[kind]
    changes = {**changes, **INITIALISED[kind]}
    shown = {}
    for whole in (True, False):
        base = make(tmp_path / str(whole))
        stack = StageStack(base, lora(base, **changes), LayerGroups(path, 2, ((1,), (0,))), head)
        sections = [stack.section(key) for key in (EARLIER, ABOVE)]
        assert (sections == [base, base]) == isinstance(stack._configs[0].target_modules, str)
        if whole:
            stack._sections.of = lambda group, config, base=base: base
        torch.manual_seed(1)
        for key in (EARLIER, ABOVE, KEY):
            stack.add(key)
        stack.load(StageKey(1, (0, 1)), save({n: t.clone() for n, t in stack.tensors(ABOVE).items()}), "digest")
        shown[whole] = (
            [traces(base, key.adapter_name) for key in stack.loaded],
            [(name, type(module)) for name, module in base.named_modules()],
            [name for name, parameter in base.named_parameters() if parameter.requires_grad],
            portrait({name: config.to_dict() for name, config in base.peft_config.items()}),
            torch.get_rng_state().tolist(),
        )
    assert shown[True] == shown[False]
    assert len(shown[True][0][0]) > 14 and shown[True][2] == []


def test_layers_that_a_base_has_by_another_name_too_are_shown_as_a_whole():
    base = tiny_llama(2)
    base.again = base.model
    stack = StageStack(base, lora(base), LayerGroups("model.layers", 2, ((1,), (0,))))
    assert stack.section(EARLIER) is base
    assert StageStack(tiny_llama(2), lora(base), stack.layers).section(EARLIER) is not base


def test_what_is_shown_lacks_the_layers_of_other_groups_and_nothing_else():
    base = tiny_llama(4)
    stack = StageStack(base, lora(base), LayerGroups("model.layers", 4, ((2, 3), (0, 1))))
    names = dict(base.named_modules())
    shown = dict(stack.section(EARLIER).named_modules())
    assert [name for name in names if name not in shown] == [
        name for name in names if name.startswith(("model.layers.0", "model.layers.1"))
    ]
    assert {n for n, module in shown.items() if module is not names[n]} == {"", "model", "model.layers"}
    assert len(base.model.layers) == 4


@pytest.fixture
def compared(monkeypatch):
    """The stages of which PEFT was asked what it makes of their files."""
    monkeypatch.setattr("hf_s3t.model.stack._KNOWN_AS_PLAIN", set())
    seen, compare = [], stage_files.differences
    monkeypatch.setattr(stage_files, "differences", lambda *args: (seen.append(args), compare(*args))[1])
    return seen


def written(stack: StageStack, folder, keys) -> None:
    for key in keys:
        stack.add(key)
        (folder / key.adapter_name).mkdir()
        stack.save(key, folder / key.adapter_name, None)


@pytest.mark.parametrize(
    ("changes", "times"),
    [
        ({}, 1),
        # In one of the groups only.
        ({"rank_pattern": {r".*1\.self_attn\.q_proj": 3}}, 2),
        ({"alpha_pattern": {r".*1\.self_attn\.q_proj": 3}}, 2),
        # Which may mean something else in every group.
        ({"alpha_pattern": {r"q_proj": 3}}, 3),
    ],
    ids=str,
)
def test_peft_is_asked_what_it_makes_of_files_once_for_groups_that_are_alike(changes, times, tmp_path, compared):
    base = tiny_llama(3)
    stack = StageStack(base, lora(base, **changes), LayerGroups("model.layers", 3, ((2,), (1,), (0,))))
    written(stack, tmp_path, [StageKey(0, prefix) for prefix in ((0,), (0, 1), (0, 1, 2))] + [KEY])
    assert len(compared) == times


def test_peft_is_asked_of_a_group_of_other_modules_by_itself(tmp_path, compared):
    base = tiny_llama(3)
    base.model.layers[1].self_attn.q_proj = nn.Linear(16, 16, bias=True)
    base.model.layers[0].self_attn.q_proj = NonDynamicallyQuantizableLinear(16, 16, bias=False)
    stack = StageStack(base, lora(base), LayerGroups("model.layers", 3, ((2,), (1,), (0,))))
    written(stack, tmp_path, [StageKey(0, prefix) for prefix in ((0,), (0, 1), (0, 1, 2))])
    assert len(compared) == 2


def test_asking_peft_draws_nothing(tmp_path, compared):
    base = tiny_llama(2)
    stack = StageStack(base, lora(base, init_lora_weights="orthogonal"), LayerGroups("model.layers", 2, ((1,), (0,))))
    stack.add(EARLIER)
    random = torch.get_rng_state()
    stack.save(EARLIER, tmp_path, None)
    assert len(compared) == 1 and torch.equal(torch.get_rng_state(), random)


def test_files_that_name_other_layers_are_compared_with_the_whole_base(tmp_path, compared, monkeypatch):
    base = tiny_llama(3)
    stack = StageStack(base, lora(base), LayerGroups("model.layers", 3, ((2,), (1,), (0,))))
    written(stack, tmp_path, [EARLIER])
    write = stage_files.write_adapter

    def write_another(folder, config, *args):
        config = copy.deepcopy(config)
        config.layers_to_transform = [0, 1]
        write(folder, config, *args)

    monkeypatch.setattr("hf_s3t.model.stack.write_adapter", write_another)
    with pytest.raises(LayersNotFoundError, match=r"would adapt model\.layers\.0\.\S+ as well"):
        written(stack, tmp_path, [ABOVE])


# How much is looked at


def calls_of(work) -> int:
    """How many functions of Python a piece of work calls."""
    count = [0]

    def counting(frame, event, argument):
        count[0] += event == "call"

    gc.disable()
    sys.setprofile(counting)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count[0]


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert], ids=lambda make: make.__name__)
def test_what_it_takes_to_load_or_drop_a_stage_depends_on_its_own_layers_alone(make):
    path, head = {tiny_llama: ("model.layers", ()), tiny_bert: ("bert.encoder.layer", ("classifier",))}[make]
    counted = []
    for depth, others in ((2, 0), (2, 8), (12, 0), (12, 8)):
        stack = stack_on(make(depth), path, head, depth)
        data = file_of(stack)
        for shard in range(others):
            stack.load(StageKey(2 + shard, (0,)), data, "digest")
        # What is made at the first time.
        stack.load(KEY, data, "digest")
        stack.drop([KEY])
        loading = calls_of(lambda stack=stack, data=data: stack.load(KEY, data, "digest"))
        counted.append((loading, calls_of(lambda stack=stack: stack.drop([KEY]))))
    assert len(set(counted)) == 1 and min(counted[0]) > 0


@pytest.fixture
def walks(monkeypatch):
    """The modules through which somebody looked, and how many modules there were."""
    seen = []
    real = nn.Module.named_modules

    def named_modules(module, memo=None, prefix="", remove_duplicate=True):
        for found in real(module, memo, prefix, remove_duplicate):
            seen.append(module)
            yield found

    monkeypatch.setattr(nn.Module, "named_modules", named_modules)
    return seen


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert], ids=lambda make: make.__name__)
def test_what_it_takes_to_attach_a_new_stage_does_not_grow_with_the_groups_that_are_wrapped(make):
    path, head = {tiny_llama: ("model.layers", ()), tiny_bert: ("bert.encoder.layer", ("classifier",))}[make]
    counted = []
    # What a process does once comes at the first time.
    for others in (1, 1, 5):
        base = make(6)
        stack = StageStack(base, lora(base), LayerGroups(path, 6, tuple((layer,) for layer in range(6))), head)
        *below, key = (StageKey(0, tuple(range(group + 1))) for group in range(6))
        for stage in below[:others]:
            stack._inject(stage, low_cpu_mem_usage=False)
        stack.drop(stack.loaded)
        counted.append(calls_of(lambda stack=stack, key=key: stack._inject(key, low_cpu_mem_usage=False)))
    assert counted[1] == counted[2] > 0


def test_a_deletion_that_has_another_stack_loaded_looks_through_no_model(tmp_path, walks):
    base = tiny_llama()
    trainer = make_trainer(tmp_path / "system", base, config=s3t_config(num_slices=4, budget=4))
    plant_stages(trainer)
    model = S3TModel.from_pretrained(tmp_path / "system", base_model=tiny_llama())
    (tip,) = model._routing.served[0]
    (example, *_) = model.folder.table.members(0, tip.prefix[0])
    layers = model.base_model.get_submodule(model.stack.layers.path)
    before = set(model.stack.loaded)
    walks.clear()
    report = model.unlearn([example])
    through = [module for module in walks if module in (model, model.base_model, layers)]
    assert set(model.stack.loaded) - before and report.depths_after[0] > 0
    assert through == []
