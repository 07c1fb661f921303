"""The command that plans a system before there is one."""

import json
import math
import re
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from . import rendering
from .arguments import AsJson


if TYPE_CHECKING:
    from ..analysis.backbone import Backbone


# Arguments of the planning that have another name here.
_OPTIONS = {"num_examples": "examples", "goal_months": "months"}


class Until(StrEnum):
    """What ends a system."""

    first_shard = "first_shard"
    exhausted = "exhausted"


class Targets(StrEnum):
    """The matrices of a layer that get an adapter."""

    query_value = "query-value"
    all_linear = "all-linear"


def _above_zero(value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value:g} is no number above 0.")
    return value


Examples = Annotated[int, typer.Option(min=1, help="Number of training examples.")]
DeletionsPerMonth = Annotated[
    float, typer.Option(callback=_above_zero, help="Deletion requests to expect in a month.")
]
HoursPerEpoch = Annotated[
    float,
    typer.Option(callback=_above_zero, help="Hours that an epoch of ordinary LoRA fine-tuning on all the data takes."),
]
Model = Annotated[
    str | None, typer.Option(help="Id on the Hub, folder or config.json of the base model: its layers and sizes.")
]
NumLayers = Annotated[int | None, typer.Option(min=1, help="Transformer layers, where no model is given.")]
HiddenSize = Annotated[
    int | None,
    typer.Option(min=1, help="Hidden size, where no model is given; without it storage is not estimated."),
]
Rank = Annotated[int, typer.Option(min=1, help="Rank of LoRA.")]
TargetModules = Annotated[
    Targets | None,
    typer.Option(help="Matrices with an adapter; all of causal language models and two of others if not given."),
]
NumLabels = Annotated[int, typer.Option(min=0, help="Classes of the head that every stage keeps a copy of.")]
Epochs = Annotated[int, typer.Option(min=1, help="Epochs of ordinary fine-tuning; every stage gets at least these.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples per optimizer step.")]
Months = Annotated[float, typer.Option(callback=_above_zero, help="Months that the system should last.")]
EndsWith = Annotated[Until, typer.Option(help="What ends it: the first dead shard, or all of them.")]
MaxHours = Annotated[float | None, typer.Option(callback=_above_zero, help="Hours that training may take.")]
MaxShards = Annotated[int, typer.Option(min=1, help="Shards at most; each learns from its part of the data alone.")]
Figure = Annotated[Path | None, typer.Option(dir_okay=False, help="Draw what to expect into this .png or .svg file.")]


def plan(
    examples: Examples,
    deletions_per_month: DeletionsPerMonth,
    hours_per_epoch: HoursPerEpoch,
    model: Model = None,
    num_layers: NumLayers = None,
    hidden_size: HiddenSize = None,
    rank: Rank = 16,
    target_modules: TargetModules = None,
    num_labels: NumLabels = 0,
    epochs: Epochs = 3,
    batch_size: BatchSize = 8,
    months: Months = 12.0,
    until: EndsWith = Until.first_shard,
    max_hours: MaxHours = None,
    max_shards: MaxShards = 5,
    figure: Figure = None,
    as_json: AsJson = False,
) -> None:
    """
    Recommend shards, slices, layers per slice, budget and epochs, with what they cost and how long they last.

    Expected times, for requests that hit examples at random; and the number that suffices to somebody who knows where
    examples lie.
    """
    # It brings an optimizer, which is slow to import, and only this command needs it.
    from ..analysis.planning import Workload, recommend

    workload = Workload(examples, deletions_per_month, hours_per_epoch, epochs, batch_size)
    backbone = _backbone(
        model, num_layers, hidden_size, rank, None if target_modules is None else target_modules.value, num_labels
    )
    if figure is not None:
        # Only for a picture, what draws it.
        from ..analysis.pictures import check_picture
        from ..analysis.plan_figure import draw_plan

        check_picture(figure)
    try:
        found = recommend(
            workload, backbone, goal_months=months, until=until.value, max_hours=max_hours, max_shards=max_shards
        )
    except ConfigError as error:
        raise ConfigError(re.sub(r"\b[a-z]+_[a-z]+(?==)", _option_for, str(error))) from error
    if as_json:
        rendering.print_json({"workload": asdict(workload), "backbone": asdict(backbone), **asdict(found)})
    else:
        rendering.show_recommendation(found)
    if figure is not None:
        draw_plan(found, workload, figure)


def _option_for(argument: re.Match[str]) -> str:
    """The option for an argument of the planning, which it names where nothing can be recommended."""
    return "--" + _OPTIONS.get(argument[0], argument[0]).replace("_", "-")


def _backbone(
    model: str | None,
    num_layers: int | None,
    hidden_size: int | None,
    rank: int,
    target_modules: str | None,
    num_labels: int,
) -> "Backbone":
    """The model to plan for, by its config or by the numbers given."""
    # As in `plan`.
    from ..analysis.backbone import Backbone

    if (model is None) == (num_layers is None) or (model is not None and hidden_size is not None):
        raise typer.BadParameter(
            "Got both --model and sizes of its own, or neither; expected --model, or --num-layers and perhaps "
            "--hidden-size."
        )
    if model is None:
        settings = {"num_layers": num_layers, "hidden_size": hidden_size}
    else:
        settings = _model_config(model)
    return Backbone.from_config(settings, rank=rank, target_modules=target_modules, num_labels=num_labels)


def _model_config(model: str) -> Any:
    """The `config.json` of a model, from a folder, a file or the Hub."""
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
            raise ConfigError(f"{path} is not there. Give the folder of a model, an id on the Hub, or --num-layers.")
        path = _config_of_the_hub(model)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}. Give another model, or --num-layers.") from error


def _config_of_the_hub(repo_id: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo_id, "config.json"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"The config of {repo_id!r} cannot be had from the Hub: {reason} Give the model's folder, or --num-layers."
        ) from error
