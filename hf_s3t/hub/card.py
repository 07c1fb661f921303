"""The cards of systems, of recipes' configurations and of runs."""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.filesize import decimal

from ..analysis import expected_deletions_left
from ..config import S3TConfig
from ..folder.layout import CARD_FILE, DIAGRAM_FILE
from ..folder.status import system_status
from ..folder.system import SystemFolder
from ..plan.stages import Plan, StageKey
from ..sequences.families import work_of
from .diagram import has_rows_of_sets, render_diagram


_HERE = Path(__file__).resolve().parents[1]
# Beside the package in a checkout, inside it where it is installed.
TEMPLATES = next(
    (folder for folder in (_HERE / "model_cards", _HERE.parent / "model_cards") if folder.is_dir()), _HERE
)
TAGS = ("s3t", "machine-unlearning", "peft", "lora")
# Recipe -> the Hub's name of its tasks.
_PIPELINE_TAGS = {
    "text_classification": "text-classification",
    "image_classification": "image-classification",
    "llama_alpaca": "text-generation",
}
_RECIPE = (
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "per_device_train_batch_size",
    "optim",
    # Of preferences: which loss, how far from the reference.
    "loss_type",
    "loss_weights",
    "beta",
)


def render_card(
    folder: SystemFolder,
    repo_id: str,
    *,
    datasets: Sequence[str] = (),
    license: str | None = None,
    evaluation: Mapping[str, float] | None = None,
    previous: str | None = None,
    is_same_state: bool = False,
    has_gate: bool = False,
) -> str:
    """
    The model card of a system as it is now.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        repo_id (`str`): The repository that the card is for.
        datasets (sequence of `str`, *optional*): Ids of the datasets it was trained on.
        license (`str`, *optional*): Identifier of the licence.
        evaluation (mapping from `str` to `float`, *optional*): Evaluation numbers of the system as it is now.
        previous (`str`, *optional*): The card so far, from which datasets and licence are kept where none are given.
        is_same_state (`bool`, defaults to `False`):
            Whether no example was deleted since the card so far: else its evaluation numbers are dropped.
        has_gate (`bool`, defaults to `False`): Whether the repository holds the system's gate.

    Returns:
        `str`: The card, metadata included.
    """
    before = ModelCard(previous, ignore_metadata_errors=True).data if previous else ModelCardData()
    datasets = list(datasets) or _as_list(before.get("datasets"))
    numbers = dict(evaluation or (_numbers_on(before) if is_same_state else {}))
    record, title = folder.record, repo_id.rpartition("/")[2]
    public = _public_base(record)
    task = record["task"]
    data = ModelCardData(
        library_name="hf_s3t",
        base_model=public,
        tags=list(TAGS),
        datasets=datasets or None,
        pipeline_tag=None if task == "other" else task,
        license=license or before.get("license"),
        model_name=title,
        eval_results=_eval_results(task, datasets, numbers),
    )
    return _render(
        "system.md",
        data,
        title=title,
        repo_id=repo_id,
        task=task,
        is_language_model=task == "text-generation",
        datasets=datasets,
        evaluation={name: _number(value) for name, value in numbers.items()},
        is_base_known=folder.base_id is not None,
        gate=folder.config.gate if has_gate else None,
        **_base_facts(record, public),
        **_layer_facts(record),
        **_plan_facts(folder),
        **_stage_facts(folder),
        **_deletion_facts(folder),
    )


# What the card of a system says


def _base_name(record: Mapping[str, Any]) -> str:
    """The base's id; of one that is nobody else's, the name of its folder."""
    return str(record["base_model"]["id"] or record["base_model"].get("folder") or "")


def _public_base(record: Mapping[str, Any]) -> str | None:
    name = _base_name(record)
    return name if _is_public(name) else None


def _numbers_on(card: CardData) -> dict[str, Any]:
    results = card.get("eval_results") or ()
    return {result.metric_name or result.metric_type: result.metric_value for result in results}


def _eval_results(task: str, datasets: Sequence[str], numbers: Mapping[str, Any]) -> list[EvalResult] | None:
    dataset = datasets[0] if datasets else "held-out"
    found = [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=name.lower().replace(" ", "_"),
            metric_name=name,
            metric_value=value,
        )
        for name, value in numbers.items()
    ]
    return found or None


def _base_facts(record: Mapping[str, Any], public: str | None) -> dict[str, Any]:
    owners = "A language model of its owner's" if record["task"] == "text-generation" else "A model of its owner's"
    return {
        "base_id": public or _base_name(record).rpartition("/")[2] or "a model of one's own",
        "base_link": f"[{public}](https://huggingface.co/{public})" if public else owners,
        "quantization": record["base_model"].get("quantization"),
    }


def _layer_facts(record: Mapping[str, Any]) -> dict[str, Any]:
    adapters = _adapter_settings(record["peft_config"])
    targets = adapters["target_modules"]
    return {
        "layers_per_slice": [len(group) for group in record["layers"]["groups"]],
        "num_layers": record["layers"]["num_layers"],
        "rank": adapters["r"],
        "alpha": adapters["lora_alpha"],
        "targets": _joined(set(targets) if isinstance(targets, list) else targets),
        "aggregation": record["aggregation"].replace("_", " "),
        "versions": _joined_versions(record["versions"]),
    }


def _adapter_settings(written: Mapping[str, Any]) -> Mapping[str, Any]:
    """The adapters' settings; what was left as it is in PEFT is not written down."""
    if written.keys() >= {"r", "lora_alpha", "target_modules"}:
        return written
    # Not above: a push would wait seconds for it, and hold torch in memory.
    from peft import LoraConfig

    return vars(LoraConfig(**written))


def _plan_facts(folder: SystemFolder) -> dict[str, Any]:
    return {
        "num_shards": folder.config.num_shards,
        "num_slices": folder.config.num_slices,
        "num_planned": len(folder.plan.stages()),
        "first_layers": "bottom" if folder.config.growth == "bottom-up" else "top",
        "replay": folder.config.replay,
    }


def _stage_facts(folder: SystemFolder) -> dict[str, Any]:
    valid = folder.valid_records
    keys = sorted(valid)
    records = [valid[key] for key in keys]
    return {
        "depth_one": next((key.path for key in keys if key.depth == 1), None),
        "recipe": _recipe(records),
        "training_time": _duration(sum(record["metrics"].get("train_runtime", 0.0) for record in records)),
        "num_stages": len(records),
    }


def _deletion_facts(folder: SystemFolder) -> dict[str, Any]:
    status = system_status(folder)
    return {
        "num_examples": status["examples"],
        "num_deletions": status["deletions"],
        "depths": status["depths"],
        "until_first": _number(status["deletions_until_first_dead_shard"]),
        "until_exhausted": _number(status["deletions_until_exhausted"]),
        "by_sets": has_rows_of_sets(folder.plan),
        "shards": _shards(folder.plan, folder.valid_stages, status["sequence_depths"]),
    }


# Cards without a system


def render_recipe_card(
    name: str,
    settings: Mapping[str, Any],
    *,
    script: str = "recipes/llama_alpaca.py",
    pipeline_tag: str = "text-generation",
    dataset: str | None = None,
) -> str:
    """
    The card of a recipe's configuration: what it would train, and how many deletions that would outlive.

    Args:
        name (`str`): The configuration's name.
        settings (mapping from `str`): Its settings, those of [`S3TConfig`] among others.
        script (`str`, defaults to `"recipes/llama_alpaca.py"`): The recipe that takes the configuration.
        pipeline_tag (`str`, defaults to `"text-generation"`): The Hub's name of the task.
        dataset (`str`, *optional*): Id of the dataset, where the settings leave it to the recipe.

    Returns:
        `str`: The card, metadata included.

    Example:

    ```python
    >>> from hf_s3t.hub.card import render_recipe_card

    >>> settings = {"model_name_or_path": "me/base", "dataset_name": "me/data", "num_slices": 2}
    >>> "| stages to train | 3 |" in render_recipe_card("small", settings)
    True
    ```
    """
    config = S3TConfig(**{field.name: settings[field.name] for field in fields(S3TConfig) if field.name in settings})
    kind = "language model" if pipeline_tag == "text-generation" else "model"
    base_id = settings.get("model_name_or_path") or f"a {kind} that you name"
    dataset = settings.get("dataset_name") or dataset or "data that you name"
    public = _is_public(base_id)
    data = ModelCardData(
        library_name="hf_s3t",
        base_model=base_id if public else None,
        tags=list(TAGS),
        datasets=[dataset] if _is_public(dataset) else None,
        pipeline_tag=pipeline_tag,
    )
    return _render(
        "recipe.md",
        data,
        name=name,
        script=script,
        title=f"{name}: settings",
        base_id=base_id,
        dataset=dataset,
        layers_per_slice=settings.get("layers_per_slice") or "layers of the base // slices",
        **_planned_facts(config),
        settings={name: ", ".join(value) if isinstance(value, list) else value for name, value in settings.items()},
    )


def _planned_facts(config: S3TConfig) -> dict[str, Any]:
    plan = Plan.from_config(config)
    works = [work_of(family, config.num_slices, config.replay) for family in plan.families]
    alive = plan.first_slices_alive(set(plan.stages()))
    until_first, until_exhausted = (
        expected_deletions_left(alive, config.num_shards, config.num_slices, prior=config.deletion_prior, until=until)
        for until in ("first_shard", "exhausted")
    )
    return {
        "num_shards": config.num_shards,
        "num_slices": config.num_slices,
        "num_stages": len(plan.stages()),
        "work": _number(sum(works) / len(works)),
        "until_first": _number(until_first),
        "until_exhausted": _number(until_exhausted),
        "by_sets": has_rows_of_sets(plan),
        "shards": _shards(plan),
    }


def render_run_card(
    name: str, results: Mapping[str, Any], *, base_model: str | None = None, datasets: Sequence[str] = ()
) -> str:
    """
    The card of one run of a recipe, from the results that it wrote.

    Args:
        name (`str`): The run's name.
        results (mapping from `str`): What the results file holds.
        base_model (`str`, *optional*): Id of the base model, if it is on the Hub.
        datasets (sequence of `str`, *optional*): Ids of the datasets that it was trained on.

    Returns:
        `str`: The card, metadata included.
    """
    script = results["settings"]["script"]
    numbers = [
        (set_name, depth, metric, _number(value))
        for set_name, by_depth in results["metrics"].items()
        for depth, found in by_depth.items()
        for metric, value in found.items()
    ]
    data = ModelCardData(
        library_name="hf_s3t",
        base_model=base_model,
        tags=[*TAGS, results["method"]],
        datasets=list(datasets) or None,
        pipeline_tag=_PIPELINE_TAGS.get(results["recipe"]),
        model_name=name,
    )
    settings = {
        **{key: value for key, value in script.items() if value not in (None, False)},
        **results["settings"]["lora"],
        **results["settings"]["training"],
    }
    return _render(
        "run.md",
        data,
        name=name,
        method=results["method"],
        recipe=results["recipe"],
        base_id=base_model or f"A model of its owner's ({script['model_name_or_path'] or 'made here'})",
        dataset=", ".join(datasets) or "data of its owner's",
        numbers=numbers,
        num_shards=results["settings"]["s3t"]["num_shards"],
        num_slices=results["settings"]["s3t"]["num_slices"],
        seconds=_duration(results["cost"]["seconds"]),
        device=results["hardware"]["device"],
        storage=decimal(results["storage_bytes"]),
        versions=_joined_versions(results["versions"]),
        settings={name: _joined(value) for name, value in settings.items()},
    )


def description(
    folder: SystemFolder,
    previous: str | None,
    is_same_state: bool,
    has_gate: bool = False,
    *,
    repo_id: str,
    datasets: Sequence[str] = (),
    license: str | None = None,
    evaluation: Mapping[str, float] | None = None,
) -> dict[str, bytes]:
    """
    The files that describe a system in its repository: the card and the picture.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        previous (`str`, *optional*): As in [`render_card`].
        is_same_state (`bool`): As in [`render_card`].
        has_gate (`bool`, defaults to `False`): As in [`render_card`].
        repo_id (`str`): As in [`render_card`].
        datasets (sequence of `str`, *optional*): As in [`render_card`].
        license (`str`, *optional*): As in [`render_card`].
        evaluation (mapping from `str` to `float`, *optional*): As in [`render_card`].

    Returns:
        `dict[str, bytes]`: The files by their names.
    """
    card = render_card(
        folder,
        repo_id,
        datasets=datasets,
        license=license,
        evaluation=evaluation,
        previous=previous,
        is_same_state=is_same_state,
        has_gate=has_gate,
    )
    return {CARD_FILE: card.encode(), DIAGRAM_FILE: render_diagram(folder.plan, folder.valid_stages).encode()}


def _render(template: str, data: ModelCardData, **facts: Any) -> str:
    """A card. Not by `ModelCard.from_template`, which renders a missing variable as nothing."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, autoescape=False)
    text = environment.get_template(template).render(card_data=data.to_yaml(), **facts)
    return str(ModelCard(text))


def _shards(
    plan: Plan, valid: Collection[StageKey] | None = None, depths: Sequence[Sequence[int]] = ()
) -> list[list[str]]:
    """Per shard its sequences, or the sets of each depth, and of a system how much of them is left."""
    if not has_rows_of_sets(plan):
        names = [["-".join(map(str, sequence)) for sequence in sequences] for sequences in plan.sequences]
        if valid is None:
            return names
        return [[f"{n}: {depth}" for n, depth in zip(*pair, strict=True)] for pair in zip(names, depths, strict=True)]
    planned = Counter((key.shard, key.depth) for key in plan.stages())
    there = {key.slices for key in valid or ()}
    left = Counter((key.shard, key.depth) for key in plan.stages() if key.slices in there)
    return [
        [
            f"{depth}: {count}" if valid is None else f"{depth}: {left[shard, depth]} of {count}"
            for (of_shard, depth), count in sorted(planned.items())
            if of_shard == shard
        ]
        for shard in range(plan.num_shards)
    ]


def _recipe(records: Sequence[Mapping[str, Any]]) -> str:
    recipe: Mapping[str, Any] = next((record["recipe"] for record in records if record.get("recipe")), {})
    kept = {name: recipe[name] for name in _RECIPE if recipe.get(name) not in (None, -1)}
    written = ", ".join(f"{name} {json.dumps(value)}" for name, value in kept.items()) or "none left"
    # Stages of earlier versions do not say by which class they were trained.
    kinds = (record.get("parts", {}).get("trainer", {}).get("class") for record in records)
    kind = next(filter(None, kinds), None)
    return written if kind is None else f"`{kind.rpartition('.')[2]}`, {written}"


def _is_public(base_id: str) -> bool:
    return base_id.count("/") == 1 and not base_id.startswith((".", "/", "~")) and not Path(base_id).exists()


def _as_list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _joined(value: Any) -> str:
    if isinstance(value, (set, frozenset)):
        value = sorted(value)
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _joined_versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()) if name != "python")


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
