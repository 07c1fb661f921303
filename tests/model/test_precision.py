"""What is in memory is the file, bit for bit: in every precision, and however a stage comes into memory."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save
from support.hub_systems import send
from support.insides import routing_of, stack_of, wait_for_cleaner
from support.tiny import (
    batch_of,
    build,
    classification_rows,
    lora,
    make_trainer,
    plant_stages,
    rows_for,
    s3t_config,
    tiny_bert,
    tiny_llama,
    training_arguments,
)
from torch import nn
from transformers import BitsAndBytesConfig, TrainerCallback

from hf_s3t import S3TModel
from hf_s3t.baselines import ProtoSISA
from hf_s3t.errors import BaseModelMismatchError, FolderError, IsolationError, LayersNotFoundError
from hf_s3t.folder.system import SystemFolder
from hf_s3t.model.adapter_places import Slot
from hf_s3t.model.aggregation import answer_of
from hf_s3t.model.layers import LayerGroups
from hf_s3t.model.route import Route, routed
from hf_s3t.model.stack import StageStack
from hf_s3t.model.stage_configs import _matching
from hf_s3t.model.tensor_files import differing_tensors
from hf_s3t.plan import StageKey


pytestmark = pytest.mark.usefixtures("one_thread")

ADAPTER = "adapter_model.safetensors"
# The stages of the systems of the matrix.
BOTH = ["shard-0/0", "shard-0/0-1"]
HALF = torch.bfloat16


# Bases in every precision


@dataclass(frozen=True)
class Precision:
    """How a base is held: a precision, and by which settings it is quantised."""

    dtype: torch.dtype
    quantization: dict | None = None

    def load(self, name: str, folder: Path):
        """A tiny model in this precision: a language model, or a classifier, whose head is not quantised."""
        # bitsandbytes' kernels want a multiple of 32 columns, and on some CPUs as many rows.
        wide = {"hidden_size": 64, "intermediate_size": 128}
        model = {"llama": tiny_llama, "bert": tiny_bert}[name](2, **wide)
        if self.quantization is None:
            return model.to(self.dtype)
        model.save_pretrained(folder)
        settings = BitsAndBytesConfig(**self.quantization, llm_int8_skip_modules=["lm_head", "classifier"])
        cls = getattr(transformers, type(model).__name__)
        return cls.from_pretrained(folder, quantization_config=settings, dtype=self.dtype).eval()


PRECISIONS = {
    "bf16": Precision(torch.bfloat16),
    "fp32": Precision(torch.float32),
    "fp16": Precision(torch.float16),
    "8 bit": Precision(torch.bfloat16, {"load_in_8bit": True, "llm_int8_threshold": 0.0}),
    "4 bit": Precision(torch.bfloat16, {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}),
}
# The fast tests hold what is commonest; the rest of the matrix is slow by its number.
CELLS = [
    pytest.param((model, precision), marks=[] if precision == "bf16" else pytest.mark.slow, id=f"{model}, {precision}")
    for precision, model in itertools.product(PRECISIONS, ("llama", "bert"))
]


class Made:
    """A system that was grown in one go, in one process, by a trainer that is still alive."""

    def __init__(self, model: str, precision: str, folder: Path):
        self.model, self.precision, self.folder = model, precision, folder
        self.rows = rows_for(self.base(), 16)
        self.trainer = self.new(folder / "system")
        self.trainer.train()
        self.path = self.trainer.folder.path

    def base(self):
        """The base, loaded again."""
        return PRECISIONS[self.precision].load(self.model, self.folder / "base")

    def new(self, path: Path, rows=None, callbacks=None, save_strategy: str = "no"):
        """A trainer of two stages with a base of its own."""
        args = training_arguments(path, save_strategy=save_strategy, save_steps=1)
        settings = {"config": s3t_config(budget=1), "peft_config": self.lora(), "callbacks": callbacks}
        return make_trainer(path, self.base(), rows or self.rows, args=args, **settings)

    def lora(self) -> LoraConfig:
        targets = {"llama": ["q_proj", "down_proj"], "bert": ["query", "value"]}[self.model]
        return LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, use_rslora=True, target_modules=targets)

    def copy(self, to: Path) -> Path:
        """A copy of the system, as it was when training ended."""
        return shutil.copytree(self.path, to)

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        batch = batch_of(self.rows[:3])
        del batch["labels"]
        return batch


_MADE: dict[tuple[str, str], Made] = {}


@pytest.fixture(scope="module")
def systems(tmp_path_factory):
    """A function from a cell to its system, which is made once."""

    def of(cell: tuple[str, str]) -> Made:
        if cell not in _MADE:
            _MADE[cell] = Made(*cell, tmp_path_factory.mktemp("system"))
        return _MADE[cell]

    yield of
    _MADE.clear()


@pytest.fixture(params=CELLS)
def made(request, systems) -> Made:
    return systems(request.param)


# Comparing


def files_of(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of every stage, by what its folder is called."""
    found = sorted(path.glob(f"stages/*/*/{ADAPTER}"))
    return {f"{file.parent.parent.name}/{file.parent.name}": load_file(file) for file in found}


def differing(one: dict, other: dict) -> dict[str, list[str]]:
    """Per stage that both have the tensors that are not the same to the bit."""
    both = one.keys() & other.keys()
    return {key: unequal for key in sorted(both) if (unequal := differing_tensors(one[key], other[key]))}


def check_memory(stack: StageStack, path: Path) -> None:
    """Every stage in memory is its file."""
    files = files_of(path)
    assert stack.loaded
    assert {str(key): differing_tensors(stack.tensors(key), files[str(key)]) for key in stack.loaded} == {
        str(key): [] for key in stack.loaded
    }


def answer(model: S3TModel, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


class Stop(TrainerCallback):
    """Dies in the stage that is trained second, after so many of its steps."""

    def __init__(self, steps: int):
        self.steps, self.begun = steps, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun += 1

    def on_step_end(self, args, state, control, **kwargs):
        if self.begun == 2 and state.global_step == self.steps:
            raise KeyboardInterrupt


# The matrix


def test_a_system_that_is_loaded_is_the_one_that_was_trained(made, tmp_path):
    model = S3TModel.from_pretrained(made.copy(tmp_path / "copy"), base_model=made.base(), preload="all")
    assert sorted(map(str, model.stack.loaded)) == BOTH
    check_memory(model.stack, made.path)
    check_memory(stack_of(made.trainer), made.path)
    assert torch.equal(answer(model, made.inputs), answer(made.trainer.s3t_model, made.inputs))


def test_stages_grown_after_a_restart_are_those_grown_in_one_go(made, tmp_path):
    path = made.copy(tmp_path / "copy")
    shutil.rmtree(path / "stages" / BOTH[1])
    made.new(path).train()
    assert list(files_of(path)) == BOTH
    assert differing(files_of(path), files_of(made.path)) == {}


def test_a_stage_resumed_from_a_checkpoint_is_the_one_trained_in_one_go(made, tmp_path):
    with contextlib.suppress(KeyboardInterrupt):
        made.new(tmp_path / "again", callbacks=[Stop(2)], save_strategy="steps").train()
    assert list(tmp_path.glob("again/checkpoints/*/*/checkpoint-1"))
    assert len(files_of(tmp_path / "again")) == 1
    resumed = made.new(tmp_path / "again", save_strategy="steps")
    resumed.train()
    assert resumed.state.global_step > 1
    assert list(files_of(tmp_path / "again")) == BOTH
    assert differing(files_of(tmp_path / "again"), files_of(made.path)) == {}


def test_what_is_regrown_is_what_was_never_trained_on_the_deleted(made, tmp_path):
    """In a process that has served meanwhile, in a fresh one, and audited by a third."""
    path = made.copy(tmp_path / "copy")
    victim = SystemFolder(path).table.members(0, 1)[0]
    left = [row for row in made.rows if row["id"] != victim]
    never = made.new(tmp_path / "never", left)
    never.train()
    live, fresh = made.new(path), tmp_path / "fresh"
    answer(live.s3t_model, made.inputs)
    live.s3t_model.unlearn([victim])
    wait_for_cleaner(live.s3t_model)
    assert list(files_of(path)) == BOTH[:1]
    shutil.copytree(path, fresh)
    answer(live.s3t_model, made.inputs)
    live.train()
    made.new(fresh).train()
    for grown in (path, fresh):
        assert list(files_of(grown)) == BOTH
        assert differing(files_of(grown), files_of(never.folder.path)) == {}
    report = made.new(path).verify()
    assert report.ok and len(report.stages) == 2, str(report)
    again = S3TModel.from_pretrained(fresh, base_model=made.base())
    assert torch.equal(answer(live.s3t_model, made.inputs), answer(again, made.inputs))


def test_what_is_pulled_from_the_hub_is_what_was_trained(made, repo, tmp_path, monkeypatch):
    send(SystemFolder(made.copy(tmp_path / "copy")), repo)
    monkeypatch.setenv("HF_S3T_KEY", (made.path / "ledger.key").read_text())
    served = S3TModel.from_pretrained(repo.repo_id, base_model=made.base())
    check_memory(served.stack, made.path)
    served.save_pretrained(tmp_path / "pulled")
    pulled = S3TModel.from_pretrained(tmp_path / "pulled", base_model=made.base(), preload="all")
    check_memory(pulled.stack, made.path)
    expected = answer(made.trainer.s3t_model, made.inputs)
    assert torch.equal(answer(served, made.inputs), expected)
    assert torch.equal(answer(pulled, made.inputs), expected)


def test_what_is_exported_is_what_serves(made, tmp_path):
    model = S3TModel.from_pretrained(made.copy(tmp_path / "copy"), base_model=made.base())
    model.export_adapter(0, tmp_path / "plain")
    written, files = load_file(tmp_path / "plain" / ADAPTER), files_of(made.path)
    (tip,) = routing_of(model).served[0]
    stages = {name: tensor for key in tip.lineage for name, tensor in files[str(key)].items()}
    assert differing_tensors(written, stages) == []
    plain = PeftModel.from_pretrained(made.base(), tmp_path / "plain").eval()
    with torch.no_grad():
        expected = answer_of(plain(**made.inputs).logits, torch.ones(1), model.aggregation)
    answered = answer(model, made.inputs)
    if made.precision in ("bf16", "fp16"):
        assert torch.equal(answered, expected)
    # In single precision we add otherwise than PEFT; on quantised bases it rounds once more.
    tolerance = {"8 bit": 0.02, "4 bit": 0.02}.get(made.precision, 1e-5)
    assert (answered - expected).abs().max() <= tolerance * expected.abs().max()


STEP = """
import sys
from pathlib import Path
import test_precision as t
class Enough(Exception): pass
made = t.Made.__new__(t.Made)
made.model, made.precision, made.folder = sys.argv[2], sys.argv[3], Path(sys.argv[1])
made.rows = t.rows_for(made.base(), 16)
trainer = made.new(Path(sys.argv[1]) / "system")
write = trainer._write
def stop(*args):
    write(*args)
    raise Enough
trainer._write = stop
try: trainer.train()
except Enough: pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("cell", [("llama", "bf16"), ("bert", "bf16"), ("llama", "4 bit")], ids=", ".join)
def test_each_stage_may_be_grown_by_a_process_of_its_own(systems, cell, tmp_path):
    for stages in (BOTH[:1], BOTH):
        done = subprocess.run(
            [sys.executable, "-c", STEP, str(tmp_path), *cell],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert list(files_of(tmp_path / "system")) == stages
    assert differing(files_of(tmp_path / "system"), files_of(systems(cell).path)) == {}


# What PEFT trains, and what comes before


def test_a_head_is_trained_stored_and_loaded_in_the_precision_of_the_base(systems):
    """As by PEFT, which trains adapters in single precision and copies of modules as they are."""
    made = systems(("bert", "bf16"))
    dtypes = {name.rpartition(".lora_")[1] or "head": {} for name in files_of(made.path)["shard-0/0"]}
    for name, tensor in files_of(made.path)["shard-0/0"].items():
        dtypes[name.rpartition(".lora_")[1] or "head"][tensor.dtype] = name
    assert {kind: set(found) for kind, found in dtypes.items()} == {".lora_": {torch.float32}, "head": {HALF}}
    plain = PeftModel(made.base(), LoraConfig(target_modules=["query"], modules_to_save=["classifier"]))
    trained = {name: p.dtype for name, p in plain.named_parameters() if p.requires_grad}
    assert {d for n, d in trained.items() if ".lora_" in n} == {torch.float32}
    assert {d for n, d in trained.items() if ".lora_" not in n} == {HALF}


def _mixed(part: str):
    """A base in half precision but for its norms, or its head: rounded, its tensors stay what they are."""
    model = tiny_bert(2).to(HALF)
    for name, module in model.named_modules():
        if name == "classifier" if part == "head" else isinstance(module, nn.LayerNorm):
            module.float()
    return model


@pytest.mark.parametrize("part", ["norms", "head"])
def test_stages_are_grown_on_a_base_that_holds_every_tensor_in_the_precision_of_before(tmp_path, part):
    args = training_arguments(tmp_path, bf16=True)
    plant_stages(make_trainer(tmp_path, _mixed(part), args=args), 1)
    make_trainer(tmp_path, _mixed(part), args=args)
    with pytest.raises(BaseModelMismatchError, match="in float32"):
        make_trainer(tmp_path, _mixed(part).to(HALF), args=args)


def test_initial_values_do_not_depend_on_what_the_process_has_set_before(tmp_path):
    trainers = [make_trainer(tmp_path / name, tiny_bert(2), classification_rows()) for name in "ab"]
    plant_stages(trainers[0])
    torch.set_default_dtype(HALF)
    try:
        drawn = []
        for trainer in trainers:
            torch.manual_seed(0)
            stack_of(trainer).add(StageKey(1, (0,)))
            drawn.append(stack_of(trainer).tensors(StageKey(1, (0,))))
    finally:
        torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    stack_of(trainers[1]).add(StageKey(2, (0,)))
    drawn.append(stack_of(trainers[1]).tensors(StageKey(2, (0,))))
    assert differing_tensors(drawn[0], drawn[1]) == differing_tensors(drawn[1], drawn[2]) == []


@pytest.mark.parametrize("optim", ["adafactor", "adamw_torch"])
def test_what_an_optimizer_keeps_is_resumed_in_its_own_precision(tmp_path, optim):
    """Adafactor keeps single precision for a head in half precision, to which PyTorch rounds it in loading."""

    def new(path, callbacks=None):
        args = training_arguments(path, save_strategy="steps", save_steps=1, optim=optim)
        config = s3t_config(num_slices=1, budget=1)
        model = tiny_bert(2).to(HALF)
        return make_trainer(path, model, classification_rows(16), args=args, config=config, callbacks=callbacks)

    class End(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    new(tmp_path / "one").train()
    with contextlib.suppress(KeyboardInterrupt):
        new(tmp_path / "two", [End()]).train()
    assert list(tmp_path.glob("two/checkpoints/*/*/checkpoint-2"))
    new(tmp_path / "two").train()
    assert differing(files_of(tmp_path / "one"), files_of(tmp_path / "two")) == {}


# On CPUs that compute in bfloat16, bitsandbytes packs 4-bit weights when a model answers, and rounds what scales them.


def test_a_base_in_4_bit_is_what_it_was_after_it_has_answered(tmp_path):
    base = PRECISIONS["4 bit"].load("llama", tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    trainer = make_trainer(tmp_path / "system", base, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    plant_stages(trainer)
    answer(trainer.s3t_model, {"input_ids": torch.tensor([[5, 6, 7, 8]])})
    stack_of(trainer).drop(stack_of(trainer).loaded)
    after = {name.replace(".base_layer.", "."): tensor for name, tensor in base.state_dict().items()}
    assert len(after) > 40 and differing_tensors(before, after) == []


def test_a_base_in_4_bit_that_has_answered_before_is_refused_if_that_has_changed_it(tmp_path):
    base = PRECISIONS["4 bit"].load("llama", tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with torch.no_grad():
        base(torch.tensor([[5, 6, 7, 8]]))
    changed = differing_tensors(before, base.state_dict())
    refusal = pytest.raises(IsolationError, match=r"4-bit base has answered before.*Load it again")
    with refusal if changed else contextlib.nullcontext():
        make_trainer(tmp_path / "system", base, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    assert changed == [] or not (tmp_path / "system").exists()


@pytest.mark.slow
def test_in_4_bit_evaluations_change_no_stage(systems, tmp_path):
    made, path = systems(("llama", "4 bit")), tmp_path / "evaluated"
    args = training_arguments(path, eval_strategy="steps", eval_steps=1)
    settings = {"config": s3t_config(budget=1), "peft_config": made.lora()}
    held_out = Dataset.from_list(rows_for(made.base(), 4, seed=9))
    evaluated = make_trainer(path, made.base(), made.rows, args=args, eval_dataset=held_out, **settings)
    evaluated.train()
    assert list(files_of(path)) == BOTH
    assert differing(files_of(path), files_of(made.path)) == {}


# How a stage is attached


KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 7}},
    "dropout": {"lora_dropout": 0.2},
}
GROUPS = LayerGroups("model.layers", 4, ((2, 3), (0, 1)))


def stack_on(base, **changes) -> StageStack:
    return StageStack(base, lora(base, **{"target_modules": "all-linear", **changes}), GROUPS, ("score",))


def random_stage(stack: StageStack, key: StageKey) -> dict[str, torch.Tensor]:
    """A new stage of random numbers, none of which half precision holds."""
    stack.add(key)
    for tensor in stack.tensors(key).values():
        tensor.normal_()
    return {name: tensor.clone() for name, tensor in stack.tensors(key).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_loaded_as_its_file_says(kind, dtype):
    states = {}
    stack = stack_on(tiny_llama(4, labels=3).to(dtype), **KINDS[kind])
    for key in (StageKey(0, (0,)), StageKey(0, (0, 1))):
        states[key] = random_stage(stack, key)
    # Into modules that PEFT has found before, and on a bare base, where it has to find them.
    for target in (stack, stack_on(tiny_llama(4, labels=3).to(dtype), **KINDS[kind])):
        before = torch.get_rng_state()
        for shard, (key, state) in itertools.product((0, 1), states.items()):
            loaded = StageKey(shard, key.prefix)
            target.load(loaded, save(state), "digest")
            assert differing_tensors(target.tensors(loaded), state) == []
        assert torch.equal(torch.get_rng_state(), before)
        assert not any(p.requires_grad or p.is_meta for p in target.base.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_is_attached_as_peft_attaches_it(kind, tmp_path):
    """The oracle is PEFT's own way to load, in single precision."""
    key = StageKey(0, (0,))
    source = stack_on(tiny_llama(4, labels=3), **KINDS[kind])
    state = random_stage(source, key)
    source.save(key, tmp_path, None)
    theirs = PeftModel.from_pretrained(tiny_llama(4, labels=3), tmp_path, adapter_name=key.adapter_name).eval()
    stack = stack_on(tiny_llama(4, labels=3), **KINDS[kind])
    for name in (StageKey(1, (0,)), key):
        # The second time without looking through the model.
        stack.load(name, save(state), "digest")
    adapted = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert len(adapted) == 14
    for name, layer in adapted.items():
        ours = stack.base.get_submodule(name)
        for setting in ("r", "lora_alpha", "scaling", "use_rslora", "use_dora", "lora_bias"):
            assert getattr(ours, setting)[key.adapter_name] == getattr(layer, setting)[key.adapter_name], setting
        assert type(ours.lora_variant.get(key.adapter_name)) is type(layer.lora_variant.get(key.adapter_name))
        assert repr(ours.lora_dropout[key.adapter_name]) == repr(layer.lora_dropout[key.adapter_name])
    own = {n.removeprefix("base_model.model."): t for n, t in theirs.state_dict().items() if key.adapter_name in n}
    ours = {name: tensor for name, tensor in stack.base.state_dict().items() if key.adapter_name in name}
    assert len(own) == len(state) and differing_tensors(own, ours) == []
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    with torch.no_grad(), routed(Route((key,))):
        assert torch.allclose(stack.base(**batch).logits, theirs(**batch).logits, atol=1e-6)


def test_a_stage_that_memory_does_not_hold_as_its_file_says_is_refused(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "system")
    plant_stages(trainer)

    def rounding(slot, adapter, tensor, real=Slot.set):
        real(slot, adapter, tensor.bfloat16().float())

    monkeypatch.setattr(Slot, "set", rounding)
    with pytest.raises(FolderError, match=r"would not serve what its file says: .* are others in memory"):
        trainer.s3t_model.refresh()
    assert stack_of(trainer).loaded == []


def test_where_one_stage_cannot_be_loaded_none_is_attached(tmp_path):
    trainer = make_trainer(tmp_path / "system")
    plant_stages(trainer)
    stack, folder = stack_of(trainer), trainer.folder
    first, second = StageKey(0, (0,)), StageKey(0, (0, 1))
    files = [(key, folder.read_adapter(key), folder.adapter_digest(key)) for key in (first, second)]
    files[1] = (second, files[0][1], files[1][2])
    with pytest.raises(LayersNotFoundError, match="does not fit the base model"):
        stack.load_all(files)
    assert stack.loaded == [] and not any("lora_" in name for name, _ in stack.base.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_classifier_serves_on_a_base_of_another_precision(tmp_path, dtype):
    """Its heads are what their files say there, too."""
    rows = classification_rows()
    trainer = make_trainer(tmp_path / "system", tiny_bert(2), rows, config=s3t_config(num_shards=2))
    plant_stages(trainer)
    model = S3TModel.from_pretrained(tmp_path / "system", base_model=tiny_bert(2).to(dtype))
    check_memory(model.stack, tmp_path / "system")
    inputs = {name: value for name, value in batch_of(rows[:5]).items() if name != "labels"}
    single = answer(trainer.s3t_model, inputs)
    assert (answer(model, inputs).float() - single).abs().max() <= 0.02 * single.abs().max()
    # A plain adapter can be made of it, although PEFT rounds the head there.
    model.export_adapter(0, tmp_path / "plain")
    assert load_file(tmp_path / "plain" / ADAPTER)["base_model.model.classifier.weight"].dtype == torch.float32


# Files that change below what was read from them


def overwrite(file: Path) -> None:
    """Change a file in place, as `rsync --inplace` does; its tensors become zeros."""
    size = file.stat().st_size
    with open(file, "r+b") as opened:
        opened.seek(size // 2)
        opened.write(bytes(size - size // 2))


def maps_of(folder: Path) -> list[str]:
    maps = Path("/proc/self/maps")
    return [line for line in maps.read_text().splitlines() if str(folder) in line] if maps.exists() else []


@pytest.mark.parametrize("model", [tiny_llama, tiny_bert], ids=["llama", "bert"])
def test_a_live_model_does_not_follow_what_becomes_of_the_files(tmp_path, model):
    trainer = make_trainer(tmp_path / "system", model(2))
    plant_stages(trainer)
    served = S3TModel.from_pretrained(tmp_path / "system", base_model=model(2), preload="all")
    inputs = {n: v for n, v in batch_of(rows_for(model(2))[:2]).items() if n != "labels"}
    before = answer(served, inputs)
    assert maps_of(tmp_path) == []
    files = list(tmp_path.glob(f"system/stages/*/*/{ADAPTER}"))
    assert len(files) == 4
    for file in files:
        overwrite(file)
    assert torch.equal(answer(served, inputs), before)
    for file in files:
        os.truncate(file, 0)
    assert torch.equal(answer(served, inputs), before)


def test_stages_below_one_in_training_do_not_follow_what_becomes_of_their_files(tmp_path):
    trainer, other = (make_trainer(tmp_path / name) for name in ("system", "other"))
    for one in (trainer, other):
        plant_stages(one, 1)
    (key,) = trainer.folder.stages
    child = next(c for c in trainer.folder.plan.stages() if c.parent == key)
    trainer._bring_in(child)
    assert maps_of(tmp_path) == []
    overwrite(tmp_path / "system" / key.path / ADAPTER)
    other._bring_in(child)
    assert differing_tensors(stack_of(trainer).tensors(key), stack_of(other).tensors(key)) == []


def test_prototypes_do_not_follow_what_becomes_of_their_file(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "id"} for row in classification_rows()]
    method = ProtoSISA(
        model=tiny_bert(2),
        args=training_arguments(tmp_path / "system", max_steps=1),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=2, target_modules=["query"]),
        s3t_config=s3t_config(id_column=None, num_slices=2, partition="balanced"),
    )
    method.train()
    model = method._model_type.from_pretrained(tmp_path / "system", base_model=tiny_bert(2))
    before = {place: sums.features.clone() for place, sums in model.prototypes._sums.items()}
    assert before and maps_of(tmp_path) == []
    overwrite(tmp_path / "system/prototypes.safetensors")
    assert all(torch.equal(model.prototypes._sums[place].features, kept) for place, kept in before.items())


def test_what_is_loaded_is_what_was_checked(tmp_path):
    """Whatever becomes of the file between its being read and its tensors being in place."""
    trainer = make_trainer(tmp_path / "system")
    plant_stages(trainer)
    folder, key = trainer.folder, StageKey(0, (0,))
    file = tmp_path / "system" / key.path / ADAPTER
    expected, data = load_file(file), folder.read_adapter(key)
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    overwrite(file)
    stack_of(trainer).load(key, data, folder.adapter_digest(key))
    assert differing_tensors(stack_of(trainer).tensors(key), expected) == []
    with pytest.raises(FolderError, match=r"adapter_model.safetensors was altered or cut short"):
        folder.read_adapter(key)


def test_a_checkpoint_that_changes_after_it_was_chosen_is_not_resumed(tmp_path):
    trainer = make_trainer(tmp_path / "system", args=training_arguments(tmp_path, save_strategy="steps", save_steps=1))

    class Alter(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            (checkpoint, *_) = (tmp_path / "system/checkpoints").glob("*/*/checkpoint-1")
            assert trainer.folder.read_checkpoint_adapter(checkpoint)
            overwrite(checkpoint / ADAPTER)
            with pytest.raises(FolderError, match="was altered or cut short"):
                trainer._load_from_checkpoint(checkpoint)
            raise KeyboardInterrupt

    trainer = make_trainer(
        tmp_path / "system",
        args=training_arguments(tmp_path / "system", save_strategy="steps", save_steps=1),
        callbacks=[Alter()],
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


# Exports are compared with what serves


def tiny_zamba2():
    """Layers of two kinds, in which the same part has two names, one of which ends like the other."""
    return build(
        "Zamba2ForCausalLM",
        "Zamba2Config",
        vocab_size=60,
        pad_token_id=0,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        attention_head_dim=16,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        num_mem_blocks=1,
        mamba_d_state=8,
        mamba_headdim=16,
        mamba_ngroups=1,
        n_mamba_heads=4,
        use_mamba_kernels=False,
        chunk_size=8,
    )


class Trunk(nn.Module):
    """A list of layers."""

    def __init__(self, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(16, 16)}) for _ in range(depth))


class Echo(transformers.PreTrainedModel):
    """The names of its layers are the ends of other names."""

    config_class = transformers.BertConfig
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        self.trunk = Trunk(4)
        self.trunk.embed = nn.Embedding(config.vocab_size, 16)
        self.trunk.before = nn.Module()
        self.trunk.before.trunk = Trunk(5)
        self.head = nn.Linear(16, 3)
        self.post_init()

    def forward(self, input_ids, labels=None, **ignored):
        x = self.trunk.embed(input_ids)
        for layer in (*self.trunk.before.trunk.layers, *self.trunk.layers):
            x = x + torch.tanh(layer["up"](x))
        logits = self.head(x.mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return transformers.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=logits)


def tiny_echo():
    torch.manual_seed(0)
    return Echo(transformers.BertConfig(vocab_size=60, num_hidden_layers=4, num_labels=3)).eval()


@dataclass(frozen=True)
class Odd:
    """A model whose names mislead, and what to target in it."""

    build: Callable
    lora: dict
    rows: Callable


def _plain_rows(model):
    return [{k: v for k, v in row.items() if k != "attention_mask"} for row in classification_rows()]


ODD = {
    "two kinds of layers": Odd(tiny_zamba2, {"target_modules": ["in_proj"]}, rows_for),
    "two kinds, all linear": Odd(tiny_zamba2, {"target_modules": "all-linear"}, rows_for),
    "names that end alike": Odd(
        tiny_echo, {"target_modules": ["up"], "exclude_modules": r"(?!trunk\.layers\.).*"}, _plain_rows
    ),
}


@pytest.mark.parametrize("made", ODD.values(), ids=list(ODD))
def test_an_export_holds_every_adapted_module_whatever_it_is_called(made, tmp_path):
    rows, lora_config = made.rows(made.build()), LoraConfig(r=2, lora_alpha=4, **made.lora)
    trainer = make_trainer(tmp_path / "system", made.build(), rows, peft_config=lora_config)
    plant_stages(trainer)
    model = trainer.s3t_model
    inputs = {name: value for name, value in batch_of(rows[:3]).items() if name != "labels"}
    model.export_adapter(0, tmp_path / "plain")
    plain = PeftModel.from_pretrained(made.build(), tmp_path / "plain").eval()
    with torch.no_grad():
        expected = answer_of(plain(**inputs).logits, torch.ones(1), model.aggregation)
        base = answer_of(made.build()(**inputs).logits, torch.ones(1), model.aggregation)
    answered = answer(model, inputs)
    assert (answered - expected).abs().max() <= 1e-5 < (answered - base).abs().max()
    for key in routing_of(model).served[0][0].lineage:
        # And each stage's folder is an adapter for its own layers.
        alone = PeftModel.from_pretrained(made.build(), tmp_path / "system" / key.path)
        adapted = {n.removeprefix("base_model.model.") for n, m in alone.named_modules() if hasattr(m, "lora_A")}
        assert adapted == set(model.stack._targets[key.group])


def lose_a_module(config, targets, names, real=_matching):
    return real(config, sorted(targets)[1:], names)


def change_alpha(config, targets, names, real=_matching):
    config = real(config, targets, names)
    config.alpha_pattern = {"q_proj": 5}
    return config


def claim_dora(config, targets, names, real=_matching):
    config = real(config, targets, names)
    config.use_dora = True
    return config


@pytest.mark.parametrize(
    ("mistake", "why"),
    [
        (lose_a_module, "PEFT would not adapt model.layers"),
        (change_alpha, r"q_proj another lora_alpha, scaling"),
        (claim_dora, "another use_dora"),
    ],
)
def test_an_export_that_peft_would_take_for_something_else_is_none(tmp_path, monkeypatch, mistake, why):
    trainer = make_trainer(tmp_path / "system")
    plant_stages(trainer)
    model = trainer.s3t_model
    monkeypatch.setattr("hf_s3t.model.stage_configs._matching", mistake)
    with pytest.raises(LayersNotFoundError, match=rf"PEFT would make something else .*{why}.*Nothing is written"):
        model.export_adapter(0, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    # The note comes first: no copy leaves without one.
    assert [entry.kind for entry in SystemFolder(tmp_path / "system").ledger.entries] == ["export"]
    monkeypatch.undo()
    model.export_adapter(0, tmp_path / "plain")
    assert (tmp_path / "plain" / ADAPTER).is_file()


def test_an_export_to_where_no_folder_can_be_made_says_so(tmp_path):
    trainer = make_trainer(tmp_path / "system", tiny_bert(2), classification_rows())
    plant_stages(trainer)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FolderError, match="Give another folder"):
        trainer.s3t_model.export_adapter(0, tmp_path / "file" / "plain")


def test_comparing_an_export_touches_neither_base_nor_random_state(tmp_path):
    trainer = make_trainer(tmp_path / "system", tiny_bert(2), config=s3t_config(num_shards=1))
    plant_stages(trainer)
    model = trainer.s3t_model
    before = {name: (id(p), p.clone(), p.requires_grad) for name, p in model.base_model.named_parameters()}
    hooks, config = len(list(model.base_model.modules())), json.dumps(model.config.to_dict(), default=str)
    state = torch.get_rng_state()
    model.export_adapter(0, tmp_path / "plain")
    after = dict(model.base_model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: (id(p), p.requires_grad) for n, p in after.items()} == {n: (i, r) for n, (i, _, r) in before.items()}
    assert all(torch.equal(after[name], kept) for name, (_, kept, _) in before.items())
    assert len(list(model.base_model.modules())) == hooks
    assert json.dumps(model.config.to_dict(), default=str) == config


def test_a_stage_that_peft_would_take_for_something_else_is_not_written(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "system", tiny_llama(3, seed=77), config=s3t_config(num_slices=3))
    monkeypatch.setattr("hf_s3t.model.stack._KNOWN_AS_PLAIN", set())
    monkeypatch.setattr(
        "hf_s3t.model.stage_files.differences", lambda *args: ["PEFT would not adapt model.layers.2.mlp.up_proj"]
    )
    with pytest.raises(LayersNotFoundError, match=r"would not adapt model\.layers\.2\.mlp\.up_proj"):
        plant_stages(trainer, 1)
    assert list(tmp_path.glob("system/stages/*/*")) == []
