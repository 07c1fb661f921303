"""The baselines: they see what S3T sees, they forget to the bit, and they answer as plain PEFT does."""

import contextlib
import os
import shutil
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from filelock import FileLock, Timeout
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from support.folders import apply
from support.insides import calls_of, routing_of, rows_of_stages, stack_of
from support.tiny import (
    BOS,
    EOS,
    LABELS,
    PAD,
    UNKNOWN,
    batch_of,
    classification_rows,
    lm_rows,
    lora,
    make_trainer,
    plant_stages,
    rows_for,
    s3t_config,
    tiny_bert,
    tiny_llama,
    tiny_roberta,
    tiny_vit,
    training_arguments,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    default_data_collator,
    set_seed,
)

from hf_s3t import S3TConfig, S3TModel
from hf_s3t.baselines import METHODS, Method, use_public_secret
from hf_s3t.baselines.whole_adapter import WholeAdapterModel
from hf_s3t.errors import CallStoppedError, ConfigError, ExhaustedError, StaleCacheError, UnknownExampleError
from hf_s3t.folder.layout import ADAPTER_FILE, COST_FILE, PROTOTYPES_FILE, STAGES
from hf_s3t.folder.system import SystemFolder
from hf_s3t.model.calls import Routing
from hf_s3t.model.head import find_head, seed_head
from hf_s3t.model.layers import group_layers
from hf_s3t.model.tensor_files import differing_tensors
from hf_s3t.plan import StageKey, stage_seed
from hf_s3t.plan.partition import assign


pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = classification_rows(24)
NEW = classification_rows(6, seed=9)
SLOW = pytest.mark.slow
SLICED = ["sisa", "protosisa", "sequential"]


def bert(**changes):
    return tiny_bert(2, **changes)


def config_of(**changes):
    return s3t_config(**{"num_shards": 2, **changes})


def dataset(rows) -> Dataset:
    return Dataset.from_list(rows)


def make(name: str, folder: Path, rows=ROWS, model=None, config=None, args=None, **more) -> Method:
    model = model if model is not None else bert()
    return METHODS[name](
        model,
        args if args is not None else training_arguments(folder),
        train_dataset=dataset(rows),
        peft_config=lora(model),
        s3t_config=config if config is not None else config_of(),
        **more,
    )


def places(method: Method) -> dict:
    return {i: (row.shard, row.slice) for i, row in method.trainer.folder.table.rows.items()}


def assigned() -> dict:
    """Where S3T's own rule puts every row."""
    ids = [row["id"] for row in ROWS]
    return dict(zip(ids, assign(ids, num_shards=2, num_slices=2, method="hashed", seed=3), strict=True))


def assigned_sizes() -> Counter:
    return Counter(assigned().values())


def id_at(shard: int, slice_: int) -> str:
    return next(i for i, place in sorted(assigned().items()) if place == (shard, slice_))


def without(*gone: str) -> list:
    return [row for row in ROWS if row["id"] not in gone]


def tensors_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {
        str(path.parent.relative_to(folder)): load_file(path)
        for path in sorted(Path(folder).glob(f"stages/shard-*/*/{ADAPTER_FILE}"))
    }


def assert_same_units(one: dict, other: dict, units=None) -> None:
    units = units if units is not None else one.keys() | other.keys()
    assert units
    for unit in units:
        assert not differing_tensors(one[unit], other[unit]), unit


@pytest.fixture(scope="module")
def trained(tmp_path_factory, one_thread):
    """A function from a method's name to the folder of a trained one, which is made once and must not be changed."""
    made: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "system"
            make(name, made[name]).train()
        return made[name]

    return folder_of


@pytest.fixture
def copy_of(trained, tmp_path):
    """A function from a method's name to one opened on a copy of the trained folder."""

    def copied(name: str, **more) -> Method:
        shutil.copytree(trained(name), tmp_path / name)
        return make(name, tmp_path / name, **more)

    return copied


# The same data


@pytest.mark.parametrize("partition", ["hashed", "balanced"])
def test_under_one_secret_every_method_partitions_as_s3t_does(tmp_path, partition, monkeypatch):
    monkeypatch.setenv("HF_S3T_KEY", "of all that is compared")
    config = config_of(partition=partition, num_slices=2)
    expected = places(make("s3t", tmp_path / "s3t", config=config))
    for name in SLICED:
        assert places(make(name, tmp_path / name, config=config)) == expected
    shards = {i: shard for i, (shard, _) in places(make("full", tmp_path / "full", config=config)).items()}
    assert shards == {i: shard for i, (shard, _) in expected.items()}


def test_whoever_compares_on_public_data_has_one_partition_by_ids_and_seed(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_S3T_KEY", raising=False)
    config = config_of(partition="balanced", num_slices=2)
    for name in ("s3t", "sisa"):
        use_public_secret(tmp_path / name)
    s3t, sisa = (make(name, tmp_path / name, config=config) for name in ("s3t", "sisa"))
    ids = [row["id"] for row in ROWS]
    expected = assign(ids, num_shards=2, num_slices=2, seed=config.seed)
    assert places(s3t) == places(sisa) == dict(zip(ids, expected, strict=True))
    assert s3t.trainer.folder.key.is_public and s3t.trainer.folder.record["keyed_places"] is False
    # Each for itself, they would lie otherwise.
    assert places(make("s3t", tmp_path / "own", config=config)) != places(s3t)


def test_a_folder_in_which_something_is_gets_no_public_secret(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_S3T_KEY", raising=False)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "ledger.key").write_text("a secret of its own")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("a file")
    for name in ("folder", "model", "file"):
        use_public_secret(tmp_path / name)
    assert (tmp_path / "folder" / "ledger.key").read_text() == "a secret of its own"
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]
    # The environment's secret goes before it.
    monkeypatch.setenv("HF_S3T_KEY", "of all that is compared")
    use_public_secret(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("planned", [{"work_budget": 3.0}, {"sequence_selection": "lattice"}, {"budget": 3}, {}])
@pytest.mark.parametrize("name", ["full", *SLICED])
def test_what_is_planned_is_a_matter_of_s3t(tmp_path, name, planned):
    """Others have one sequence, whose units are grown again as they were."""
    config = config_of(num_slices=3, keep_idle=None, **planned)
    method = make(name, tmp_path / name, model=tiny_bert(3), config=config)
    folder, chain = method.trainer.folder, ((0, 1, 2),)
    assert folder.plan.sequences == (((0,),) if name == "full" else chain,) * 2
    plant_stages(method.trainer)
    units = folder.plan.stages()
    method.unlearn([folder.table.members(0, 0 if name == "full" else 1)[0]])
    gone = [key for key in units if key not in folder.valid_stages]
    assert gone and folder.missing_stages() == gone
    # The settings that were given open it again, and so do none.
    for again in (config, None):
        assert (
            METHODS[name](
                tiny_bert(3), training_arguments(folder.path), train_dataset=dataset(ROWS), s3t_config=again
            ).trainer.folder.plan
            == folder.plan
        )


def test_units_see_what_they_should(trained):
    """Examples seen in one epoch: SISA trains on the slices so far, sequential training on one slice at a time."""
    sizes = assigned_sizes()
    for name in ("sisa", "sequential"):
        seen = {unit.unit: unit.examples for unit in make(name, trained(name)).cost.units}
        for shard in range(2):
            assert seen[f"shard-{shard}/0"] == sizes[shard, 0]
            assert seen[f"shard-{shard}/0-1"] == sizes[shard, 1] + (sizes[shard, 0] if name == "sisa" else 0)


def test_records_name_the_trainer_of_a_method_by_the_module_that_it_was_in_first(trained):
    """By another name no folder of an earlier version could be gone on with."""
    record = SystemFolder(trained("sisa")).stage_record(StageKey(0, (0,)))
    assert record["parts"]["trainer"]["class"] == "hf_s3t.baselines.SisaS3TTrainer"


# Plain PEFT, one unit after the other


def naive_unit(folder: Path, key: StageKey, rows: list, before: dict | None = None, **arguments) -> dict:
    """A unit as anybody would train it: a fresh base, PEFT's own model, a plain Trainer."""
    base = tiny_bert(2)
    head = find_head(base, "bert.encoder.layer")
    seed_head(base, head, 3)
    args = training_arguments(folder, seed=stage_seed(3, key), **arguments)
    set_seed(args.seed)
    model = get_peft_model(base, lora(base, modules_to_save=list(head)))
    if before is not None:
        set_peft_model_state_dict(model, before)
    state = torch.get_rng_state()
    trainer = Trainer(model=model, args=args, train_dataset=dataset(rows))
    # A new Trainer seeds again; a unit's adapter and its dropout draw from one stream.
    torch.set_rng_state(state)
    trainer.train()
    model.save_pretrained(folder)
    return load_file(folder / ADAPTER_FILE)


def rows_of(method: Method, key: StageKey) -> list:
    """A unit's rows in the order in which it is given them, less their ids."""
    by_id = {row["id"]: {name: value for name, value in row.items() if name != "id"} for row in ROWS}
    table = method.trainer.folder.table
    slices = method.trainer.folder.config.slices_trained_on(key.prefix)
    return [by_id[i] for slice_ in slices for i in table.members(key.shard, slice_)]


@pytest.mark.parametrize("name", ["full", "sisa", "sequential"])
def test_units_are_what_peft_and_trainer_make(trained, tmp_path, name):
    method = make(name, trained(name))
    made = tensors_of(method.output_dir)
    before = None
    for key in StageKey(0, tuple(range(method.max_depth))).lineage:
        before = naive_unit(tmp_path / str(key), key, rows_of(method, key), before)
        assert not differing_tensors(before, made[key.path])


def test_a_unit_of_sisa_replays_a_share_of_the_slices_before_it(tmp_path):
    method = make("sisa", tmp_path / "sisa", config=config_of(replay=0.5))
    method.train()
    first, second = StageKey(0, (0, 1)).lineage
    rows, earlier = rows_of(method, second), assigned_sizes()[0, 0]
    generator = torch.Generator().manual_seed(stage_seed(3, second))
    share = torch.randperm(earlier, generator=generator)[: round(earlier / 2)].tolist()
    drawn = [row for position, row in enumerate(rows) if position in share or position >= earlier]
    order = torch.randperm(len(drawn), generator=generator).tolist()
    # One epoch, so that it can be given row by row.
    before = naive_unit(tmp_path / "first", first, rows_of(method, first))
    given = [drawn[number] for number in order]
    expected = naive_unit(tmp_path / "second", second, given, before, train_sampling_strategy="sequential")
    assert not differing_tensors(expected, tensors_of(method.output_dir)[second.path])
    assert {unit.unit: unit.examples for unit in method.cost.units}["shard-0/0-1"] == len(drawn) < len(rows)
    method.unlearn([id_at(0, 1)])
    assert method.depths == [1, 2]
    method.retrain()
    never = make("sisa", tmp_path / "never", without(id_at(0, 1)), config=config_of(replay=0.5))
    never.train()
    assert_same_units(tensors_of(method.output_dir), tensors_of(never.output_dir))


def test_methods_without_earlier_slices_replay_none():
    given = config_of(replay=0.5)
    shares = {name: method._layout.settings(given).replay for name, method in METHODS.items()}
    assert shares == {"s3t": 0.5, "full": 1.0, "sisa": 0.5, "protosisa": 0.5, "sequential": 0.0}
    assert METHODS["full"]._layout.settings(config_of(replay=0.0)).stage_data == "cumulative"
    assert METHODS["sisa"]._layout.settings(config_of(replay=0.0)).stage_data == "slice"


def test_a_cut_merges_stacks_that_begin_alike():
    tips = [StageKey(0, (0, 1)), StageKey(0, (0, 2)), StageKey(0, (1,))]
    routing = Routing([tips, [StageKey(1, (2, 0))], []])
    cut = routing.cut(1)
    assert cut.served == ((StageKey(0, (0,)), StageKey(0, (1,))), (StageKey(1, (2,)),), ())
    assert cut.weights.tolist() == [0.25, 0.25, 0.5]
    assert cut.stages < routing.stages and cut is routing.cut(1)
    assert routing.cut(2) is routing is routing.cut(None)


def naive_answers(method: Method, tips: dict[int, StageKey], rows=NEW) -> torch.Tensor:
    """The mean of the logits of some units, each loaded as a plain PEFT adapter."""
    logits = []
    for key in tips.values():
        model = PeftModel.from_pretrained(bert(), method.output_dir / key.path).eval()
        with torch.no_grad():
            logits.append(model(**batch_of(rows)).logits)
    return torch.stack(logits).mean(0)


def answers(method: Method, **more) -> torch.Tensor:
    return torch.from_numpy(method.predict(dataset(NEW), **more).predictions)


@pytest.mark.parametrize("name", ["full", "sisa"])
def test_what_serves_is_plain_peft(copy_of, name):
    method = copy_of(name)
    top = {shard: StageKey(shard, tuple(range(method.max_depth))) for shard in range(2)}
    assert torch.allclose(answers(method), naive_answers(method, top), atol=1e-5)
    first = {shard: StageKey(shard, (0,)) for shard in range(2)}
    assert torch.allclose(answers(method, depth=1), naive_answers(method, first), atol=1e-5)
    deletion = method.unlearn([id_at(0, 1)])
    assert (deletion.depths_before, deletion.depths_after) == ([method.max_depth] * 2, method.depths)
    assert method.depths == ([0, 1] if name == "full" else [1, 2])
    left = {1: top[1]} if name == "full" else {0: first[0], 1: top[1]}
    assert torch.allclose(answers(method), naive_answers(method, left), atol=1e-5)


@pytest.mark.parametrize("name", ["full", "s3t"])
def test_answers_come_in_the_order_of_the_rows_with_batches_by_length_too(copy_of, name):
    method = copy_of(name)
    cut = [{**row, "input_ids": row["input_ids"][: 2 + i]} for i, row in enumerate(NEW)]
    one_by_one = [method.predict(dataset([row])).predictions[0] for row in cut]
    method.trainer.args.per_device_eval_batch_size = 1
    method.trainer.args.train_sampling_strategy = "group_by_length"
    assert torch.equal(torch.tensor(method.predict(dataset(cut)).predictions), torch.tensor(one_by_one))
    assert method.trainer.args.train_sampling_strategy == "group_by_length"


# Forgetting


@pytest.mark.parametrize(
    "name", ["sisa", "full", *(pytest.param(n, marks=SLOW) for n in ("protosisa", "sequential", "s3t"))]
)
def test_forgetting_is_exact(copy_of, tmp_path, name):
    """What is left, and what is trained again, is to the bit what comes of training that never saw the example."""
    gone = id_at(0, 1)
    method, never = copy_of(name), make(name, tmp_path / "never", without(gone))
    never.train()
    expected = tensors_of(never.output_dir)
    method.unlearn([gone])
    left = tensors_of(method.output_dir)
    assert len(left) < len(expected)
    assert_same_units(left, expected, left)
    cost = method.retrain()
    assert {f"stages/{unit.unit}" for unit in cost.units} == expected.keys() - left.keys()
    assert (
        cost.seconds > 0
        and method.cost.steps
        == never.cost.steps
        + sum(unit.steps for unit in method.cost.units if f"stages/{unit.unit}" not in left)
        - cost.steps
    )
    assert_same_units(tensors_of(method.output_dir), expected)
    assert torch.equal(answers(method), answers(never))


def test_a_deletion_in_the_first_slice_leaves_nothing_of_the_shard(copy_of):
    method = copy_of("sisa")
    assert method.unlearn([id_at(1, 0)]).depths_after == [2, 0]
    assert not method.is_exhausted
    assert method.unlearn([id_at(0, 0)]).depths_after == [0, 0]
    assert method.is_exhausted
    with pytest.raises(ExhaustedError):
        method.predict(dataset(NEW))


@pytest.mark.parametrize("name", ["full", "protosisa"])
def test_a_deletion_outlives_the_process(copy_of, name):
    method = copy_of(name)
    gone = id_at(0, 1)
    method.unlearn([gone])
    before = answers(method)
    again = make(name, method.output_dir)
    assert again.depths == method.depths
    assert torch.equal(answers(again), before)
    repeated = again.unlearn([gone])
    assert repeated.deleted == 0 and repeated.depths_after == again.depths


@pytest.mark.parametrize("name", ["full", "sisa"])
def test_an_unknown_id_is_refused_and_nothing_changes(copy_of, name):
    method = copy_of(name)
    before = {path: path.read_bytes() for path in method.output_dir.rglob("*") if path.is_file()}
    with pytest.raises(UnknownExampleError, match="Nothing was deleted"):
        method.unlearn([ROWS[0]["id"], "nobody"])
    assert {path: path.read_bytes() for path in method.output_dir.rglob("*") if path.is_file()} == before
    assert method.depths == [method.max_depth] * 2


class FailsInTheThirdUnit(TrainerCallback):
    """Ends the process, as it were, after the first step of the third unit."""

    units = 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Count."""
        self.units += 1

    def on_step_end(self, args, state, control, **kwargs):
        """Die."""
        if self.units == 3:
            raise KeyboardInterrupt


def test_a_killed_run_goes_on_at_the_last_finished_unit(trained, tmp_path):
    """It ends with the bits of one that was not, and every unit is counted once."""
    killed = make("sisa", tmp_path / "system")
    killed.trainer.add_callback(FailsInTheThirdUnit())
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "system").glob(f"stages/*/*/{ADAPTER_FILE}")}
    assert 0 < len(finished) < 4
    method = make("sisa", tmp_path / "system")
    method.train()
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    assert_same_units(tensors_of(method.output_dir), tensors_of(trained("sisa")))
    whole = make("sisa", trained("sisa")).cost
    assert [u.unit for u in method.cost.units] == [u.unit for u in whole.units]
    assert (method.cost.steps, method.cost.examples) == (whole.steps, whole.examples)
    method.train()
    assert method.cost.steps == whole.steps


# Prototypes


def naive_features(rows) -> torch.Tensor:
    """What BERT's head is given."""
    batch = batch_of(rows)
    labels = batch.pop("labels")
    with torch.no_grad():
        return bert().bert(**batch).pooler_output, labels


def test_what_a_method_keeps_beside_its_stages_is_written_under_the_folders_lock(copy_of, monkeypatch):
    """Who tidies a folder up removes half-written files that it finds while it holds the lock."""
    method, written = copy_of("protosisa"), {}
    folder, replace = method.output_dir, os.replace

    def noting(source, target):
        if Path(target).parent == folder:
            with contextlib.suppress(Timeout), FileLock(folder / STAGES / ".lock").acquire(timeout=0):
                written[Path(target).name] = "free"
            written.setdefault(Path(target).name, "locked")
        replace(source, target)

    monkeypatch.setattr(os, "replace", noting)
    method.unlearn([id_at(0, 0)])
    method.retrain()
    assert {COST_FILE, PROTOTYPES_FILE} <= written.keys() and set(written.values()) == {"locked"}


def naive_prototype_logits(rows, new=NEW) -> torch.Tensor:
    features, labels = naive_features(rows)
    mean = features.mean(0)
    prototypes = torch.stack([features[labels == c].mean(0) for c in range(LABELS)])
    cosine = nn.functional.cosine_similarity
    return 10 * cosine((naive_features(new)[0] - mean)[:, None], (prototypes - mean)[None], dim=-1)


def test_prototypes_are_those_of_the_examples_that_are_left(copy_of, tmp_path):
    method = copy_of("protosisa")
    assert method.storage_bytes() > (method.output_dir / PROTOTYPES_FILE).stat().st_size
    method.model.prototype_weight = 1
    assert torch.allclose(answers(method), naive_prototype_logits(ROWS), atol=1e-3)
    gone = [id_at(0, 0), id_at(1, 1)]
    sums = load_file(method.output_dir / PROTOTYPES_FILE)
    method.unlearn(gone)
    assert torch.allclose(answers(method), naive_prototype_logits(without(*gone)), atol=1e-3)
    # Slice by slice they are, to the bit, those of a method that never saw the examples.
    never = make("protosisa", tmp_path / "never", without(*gone))
    never.trainer.folder.prepare()
    never.model.prototypes.add(
        {
            (shard, slice_): method.model.prototypes.sum_up(
                never.trainer.get_test_dataloader(
                    rows_of_stages(never.trainer).select(StageKey(shard, (slice_,)), never.trainer.folder.table)
                ),
                never.trainer.folder.table.slice_digest(shard, slice_),
            )
            for shard in range(2)
            for slice_ in range(2)
        }
    )
    left, expected = (load_file(m.output_dir / PROTOTYPES_FILE) for m in (method, never))
    assert not differing_tensors(left, expected)
    assert {name.rpartition(".")[0] for name in differing_tensors(left, sums)} == {"0.0", "1.1"}


def test_prototypes_of_what_another_process_deleted_meanwhile_are_not_written(copy_of):
    method = copy_of("protosisa")
    prototypes, folder = method.model.prototypes, method.trainer.folder
    gone = id_at(0, 0)
    apply(SystemFolder(folder.path), [gone])
    # Whoever summed the slice up before knows nothing of it.
    prototypes.add({})
    assert {name.rpartition(".")[0] for name in load_file(folder.path / PROTOTYPES_FILE)} == {"0.1", "1.0", "1.1"}
    assert folder.is_deleted(gone)
    # Also of none there is a file that can be read.
    apply(SystemFolder(folder.path), [id_at(0, 1), id_at(1, 0), id_at(1, 1)])
    folder.refresh_ledger()
    prototypes.drop_stale(folder.table)
    assert prototypes.is_empty and load_file(folder.path / PROTOTYPES_FILE) == {}


def test_prototypes_answer_when_every_shard_is_dead(copy_of):
    method, sisa = copy_of("protosisa"), copy_of("sisa")
    prototypes = naive_prototype_logits(ROWS)
    for weight in (0, 0.25):
        method.model.prototype_weight = weight
        mixed = (1 - weight) * answers(sisa) + weight * prototypes
        assert torch.allclose(answers(method), mixed, atol=1e-3)
    gone = [id_at(0, 0), id_at(1, 0)]
    method.unlearn(gone)
    assert method.depths == [0, 0] and not method.is_exhausted
    assert torch.allclose(answers(method), naive_prototype_logits(without(*gone)), atol=1e-3)
    assert np.isfinite(method.evaluate(dataset(NEW))["eval_loss"])
    with pytest.raises(ConfigError, match="between 0 and 1, got 2"):
        method.model.prototype_weight = 2


def test_a_process_that_dies_before_the_prototypes_are_mended_leaves_none_of_the_deleted(copy_of, monkeypatch):
    method = copy_of("protosisa")
    gone = id_at(0, 0)
    monkeypatch.setattr(type(method), "_settle", lambda self: None)
    method.unlearn([gone])
    monkeypatch.undo()
    assert "0.0.features" not in load_file(method.output_dir / PROTOTYPES_FILE)
    again = make("protosisa", method.output_dir)
    again.model.prototype_weight = 1
    assert torch.allclose(answers(again), naive_prototype_logits(without(gone)), atol=1e-3)


@pytest.mark.parametrize("model", [tiny_llama, lambda layers: bert(labels=1)], ids=["language model", "regression"])
def test_prototypes_need_classes(tmp_path, model):
    model = model(2)
    with pytest.raises(ConfigError, match='Use "sisa"'):
        make("protosisa", tmp_path / "system", rows_for(model), model)
    assert not (tmp_path / "system").exists()


# What does not fit


def test_folders_are_opened_by_their_own_method_only(copy_of):
    method = copy_of("sisa")
    with pytest.raises(ConfigError, match="of the method 'sisa', expected sequential"):
        make("sequential", method.output_dir)
    with pytest.raises(ConfigError, match="of the method 'sisa', expected s3t"):
        make("s3t", method.output_dir)
    with pytest.raises(ConfigError, match="of the method 'sisa', expected s3t"):
        S3TModel.from_pretrained(method.output_dir, base_model=bert())
    loaded = WholeAdapterModel.from_pretrained(method.output_dir, base_model=bert())
    with torch.no_grad():
        assert torch.equal(loaded(**batch_of(NEW)).logits, method.model(**batch_of(NEW)).logits)
    assert loaded.check() == []
    with pytest.raises(ConfigError, match="baseline, which is for comparing"):
        loaded.push_to_hub("me/baseline")
    with pytest.raises(ConfigError, match="num_shards=3"):
        make("sisa", method.output_dir, config=config_of(num_shards=3))


def test_arguments_that_do_not_fit(copy_of, tmp_path):
    class OtherTrainer(Trainer):
        pass

    with pytest.raises(ConfigError, match=r"OtherTrainer, expected transformers\.Trainer or trl\.SFTTrainer"):
        make("full", tmp_path / "other", trainer_class=OtherTrainer)
    with pytest.raises(ConfigError, match="would take it for an S3T system"):
        make("full", tmp_path / "other", args=training_arguments(tmp_path / "other", push_to_hub=True))
    assert not (tmp_path / "other" / "stages").exists()
    method = copy_of("full")
    for depth in (0, 2, True, "1"):
        with pytest.raises(ConfigError, match="expected 1 to 1 for 'full'"):
            method.predict(dataset(NEW), depth=depth)
    with pytest.raises(ConfigError, match="needs the method's `eval_dataset`"):
        method.evaluate()


# Ablations of the method itself


def test_bottom_up_groups_leave_the_topmost_layers():
    assert group_layers(7, 3, 2, "bottom-up") == ((0, 1), (2, 3), (4, 5))
    assert group_layers(6, 2, [1, 3], "bottom-up") == ((0,), (1, 2, 3))
    before = {k: v for k, v in s3t_config().to_dict().items() if k not in ("growth", "stage_data")}
    assert S3TConfig.from_dict(before) == s3t_config(growth="top-down", stage_data="cumulative")
    with pytest.raises(ConfigError, match="`growth` must be one of top-down, bottom-up"):
        s3t_config(growth="sideways")
    with pytest.raises(ConfigError, match="`stage_data` must be one of cumulative, slice"):
        s3t_config(stage_data="all")


@pytest.mark.parametrize("changes", [{"growth": "bottom-up"}, {"stage_data": "slice"}], ids=["bottom-up", "slice"])
def test_ablations_are_exact(tmp_path, changes):
    config = s3t_config(sequence_selection=[[0, 1]], **changes)

    def train(name, rows):
        args = training_arguments(tmp_path / name, max_steps=2)
        trainer = make_trainer(tmp_path / name, bert(), rows, config=config, args=args)
        trainer.train()
        return trainer

    trainer = train("all", ROWS)
    gone = next(i for i, row in trainer.folder.table.rows.items() if row.slice == 1)
    never = train("never", without(gone))
    assert trainer.s3t_model.unlearn([gone]).depths_after == [1]
    left = tensors_of(tmp_path / "all")
    assert left.keys() == {"stages/shard-0/0"}
    assert_same_units(left, tensors_of(tmp_path / "never"), left)
    assert never.verify(["shard-0/0-1"]).ok
    record = never.folder.stage_record(StageKey(0, (0, 1)))
    assert record["layers"] == ([1] if changes.get("growth") else [0])


def test_a_stage_of_one_slice_trains_on_that_slice(tmp_path):
    class Noting:
        # Of the class: each stage has a copy of the collator.
        seen = []

        def __call__(self, rows):
            self.seen.append([row["labels"] for row in rows])
            return default_data_collator(rows)

    config = s3t_config(stage_data="slice", sequence_selection=[[1, 0]])
    trainer = make_trainer(tmp_path, bert(), ROWS, config=config, data_collator=Noting())
    trainer.train()
    table = trainer.folder.table
    assert sum(map(len, Noting.seen)) == table.size(0, 0) + table.size(0, 1) == len(ROWS)


def test_bottom_up_builds_no_graph_below_the_trained_group(tmp_path):
    trainer = make_trainer(tmp_path, bert(), ROWS, config=s3t_config(growth="bottom-up", budget=1))
    made: dict[str, set] = {}

    def note(index):
        def hook(module, args, output):
            if stack_of(trainer).in_training is not None and module.training:
                tensor = output[0] if isinstance(output, tuple) else output
                made.setdefault(str(stack_of(trainer).in_training), set()).add((index, tensor.requires_grad))

        return hook

    for index, layer in enumerate(trainer.model.bert.encoder.layer):
        layer.register_forward_hook(note(index))
    trainer.train()
    assert made == {"shard-0/0": {(0, True), (1, True)}, "shard-0/0-1": {(0, False), (1, True)}}


# A model at a smaller depth


@pytest.fixture(scope="module")
def language(tmp_path_factory, one_thread):
    """A system of a language model with stages of random numbers, and one that never grew deeper than a stage."""
    folder = tmp_path_factory.mktemp("language")
    trainer = make_trainer(folder / "deep", tiny_llama(2), lm_rows(24), config=config_of())
    plant_stages(trainer)
    shutil.copytree(folder / "deep", folder / "shallow")
    for stage in (folder / "shallow" / "stages").glob("*/*-*"):
        shutil.rmtree(stage)
    return folder


def load(folder: Path) -> S3TModel:
    return S3TModel.from_pretrained(folder, base_model=tiny_llama(2))


def test_a_model_limited_to_a_depth_is_the_one_cut_there(language):
    deep, shallow = load(language / "deep"), load(language / "shallow")
    batch = batch_of(lm_rows(3, seed=4))
    with torch.no_grad():
        full = deep(**batch)
        with deep.limited_to(1):
            cut = deep(**batch)
            tokens = deep.generate(batch["input_ids"], max_new_tokens=4, do_sample=False)
            with deep.limited_to(2):
                assert torch.equal(deep(**batch).logits, full.logits)
            assert torch.equal(deep(**batch).logits, cut.logits)
        expected = shallow(**batch)
        assert torch.equal(cut.logits, expected.logits) and torch.equal(cut.loss, expected.loss)
        assert torch.equal(tokens, shallow.generate(batch["input_ids"], max_new_tokens=4, do_sample=False))
        assert not torch.equal(full.logits, cut.logits)
        assert torch.equal(deep(**batch).logits, full.logits)
    for depth in (0, True, 1.0):
        with pytest.raises(ConfigError, match="`depth` must be an integer of at least 1"), deep.limited_to(depth):
            pass


def test_a_limit_counts_for_its_thread_and_a_deletion_takes_effect_inside(language, tmp_path):
    shutil.copytree(language / "deep", tmp_path / "system")
    model = load(tmp_path / "system")
    batch = batch_of(lm_rows(3, seed=4))
    answers = {}

    def call():
        with torch.no_grad():
            answers["elsewhere"] = model(**batch).logits

    with torch.no_grad():
        full = model(**batch).logits
        with model.limited_to(1):
            before = model(**batch, use_cache=True)
            other = threading.Thread(target=call)
            other.start()
            other.join()
            # Two sequences: the shard falls back on the one that begins with the other slice.
            (key,) = (tip for tip in routing_of(model).served[0])
            gone = next(
                i for i, row in model.folder.table.rows.items() if (row.shard, row.slice) == (0, key.prefix[0])
            )
            model.unlearn([gone])
            after = model(**batch)
            with pytest.raises(StaleCacheError):
                model(input_ids=batch["input_ids"][:, :1], past_key_values=before.past_key_values)
    assert torch.equal(answers["elsewhere"], full)
    again = load(tmp_path / "system")
    with torch.no_grad(), again.limited_to(1):
        assert torch.equal(after.logits, again(**batch).logits)
    assert not torch.equal(after.logits, before.logits)


@pytest.mark.parametrize("on_running", ["wait", "cancel"])
def test_a_deletion_waits_for_calls_that_are_limited_or_stops_them(language, tmp_path, on_running):
    shutil.copytree(language / "deep", tmp_path / "system")
    model = load(tmp_path / "system")
    inside, go_on, stopped = threading.Event(), threading.Event(), []

    def call():
        try:
            with torch.no_grad(), model.limited_to(1), calls_of(model).call():
                inside.set()
                go_on.wait(30)
                model(**batch_of(lm_rows(3, seed=4)))
        except CallStoppedError:
            stopped.append(True)

    caller = threading.Thread(target=call)
    caller.start()
    assert inside.wait(30)
    first = routing_of(model).served[0][0].prefix[0]
    gone = next(i for i, row in model.folder.table.rows.items() if (row.shard, row.slice) == (0, first))
    deleter = threading.Thread(target=model.unlearn, args=[[gone]], kwargs={"on_running": on_running})
    deleter.start()
    deleter.join(0.3 if on_running == "wait" else 30)
    assert deleter.is_alive() == (on_running == "wait")
    go_on.set()
    deleter.join(30)
    caller.join(30)
    assert not deleter.is_alive() and not caller.is_alive()
    assert bool(stopped) == (on_running == "cancel")


# Other models and tasks


def everything_works(name: str, folder: Path, model, fresh, rows, new, **more) -> None:
    method = make(name, folder, rows, model, **more)
    method.train()
    metrics = method.evaluate(new)
    assert np.isfinite(metrics["eval_loss"])
    assert method.depths == [method.max_depth] * 2
    table = method.trainer.folder.table
    gone = next(i for i, row in table.rows.items() if row.shard == 0)
    assert method.unlearn([gone]).deleted == 1
    cost = method.retrain()
    assert cost.steps > 0 and method.depths == [method.max_depth] * 2
    again = make(name, folder, rows, fresh, **more)
    again.train()
    assert again.cost == method.cost
    assert again.evaluate(new)["eval_loss"] == method.evaluate(new)["eval_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "build", [tiny_roberta, tiny_vit, lambda layers: bert(labels=1)], ids=["roberta", "vit", "regression"]
)
def test_other_models(tmp_path, name, build):
    model = build(2)
    if name == "protosisa" and model.config.num_labels == 1:
        pytest.skip("prototypes are of classes")
    rows = rows_for(model)
    if model.config.num_labels == 1:
        rows = [{**row, "labels": number / 10} for number, row in enumerate(rows)]
    everything_works(name, tmp_path / "system", model, build(2), rows, dataset(rows[:6]))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if name != "protosisa"])
def test_language_models(tmp_path, name):
    from trl import SFTConfig, SFTTrainer

    words = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": UNKNOWN, **{f"w{n}": n for n in range(4, 60)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    texts = [
        {"id": row["id"], "prompt": " ".join(f"w{n}" for n in row["input_ids"]), "completion": " w5 w6"}
        for row in lm_rows(24)
    ]
    args = training_arguments(tmp_path / "system", cls=SFTConfig, gradient_checkpointing=False, bf16=False)
    everything_works(
        name,
        tmp_path / "system",
        tiny_llama(2),
        tiny_llama(2),
        texts,
        dataset([{k: v for k, v in row.items() if k != "id"} for row in texts[:6]]),
        args=args,
        trainer_class=SFTTrainer,
        processing_class=tokenizer,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "sisa"])
def test_a_base_in_8_bit(tmp_path, name):
    tiny_llama(2, labels=LABELS).save_pretrained(tmp_path / "base")

    def load_base():
        return AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "base",
            num_labels=LABELS,
            quantization_config=BitsAndBytesConfig(
                load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=["score"]
            ),
        )

    everything_works(name, tmp_path / "system", load_base(), load_base(), ROWS, dataset(NEW))
