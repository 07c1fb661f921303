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
    from .measuring import Measured


# Arguments of the planning that have another name here.
_OPTIONS = {"num_examples": "examples", "goal_months": "months", "goal_depth": "depth"}


class Until(StrEnum):
    """What ends a system."""

    first_shard = "first_shard"
    exhausted = "exhausted"


class Learns(StrEnum):
    """What a system is to learn."""

    facts = "facts"
    skills = "skills"
    both = "both"


class Targets(StrEnum):
    """The matrices of a layer that get an adapter."""

    query_value = "query-value"
    all_linear = "all-linear"


def _above_zero(value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value:g} is no number above 0.")
    return value


Examples = Annotated[
    int | None, typer.Option(min=1, help="Number of training examples; the rows of --measure if not given.")
]
DeletionsPerMonth = Annotated[
    float, typer.Option(callback=_above_zero, help="Deletion requests to expect in a month.")
]
HoursPerEpoch = Annotated[
    float | None,
    typer.Option(
        callback=_above_zero,
        help="Hours that an epoch of ordinary LoRA fine-tuning on all the data takes; as measured if not given.",
    ),
]
Measure = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help="Train a few steps of stages of --model on these rows, a file or a dataset's id, and measure them.",
    ),
]
MaxLength = Annotated[int | None, typer.Option(min=1, help="Tokens of an example at most, where it is measured.")]
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
Months = Annotated[
    float,
    typer.Option(callback=_above_zero, help="Months that the system should last, and over which hours are summed."),
]
Depth = Annotated[
    float, typer.Option(min=0, max=1, help="Share of the slices that should serve, in the mean over these months.")
]
Replay = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Share of earlier slices' rows in an epoch of a stage: 0.25 from 600 rows a slice, 0.5 from 200, else 1.",
        show_default="by the rows of a slice",
    ),
]
EndsWith = Annotated[
    Until, typer.Option(help="What should not come sooner: the first dead shard, or all of them dead at once.")
]
MaxHours = Annotated[float | None, typer.Option(callback=_above_zero, help="Hours that the first training may take.")]
MaxHoursPerMonth = Annotated[
    float | None, typer.Option(callback=_above_zero, help="Hours of a month that may go into growing again.")
]
MaxShards = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Shards at most; each learns from its part of the data alone.",
        show_default="20 to learn facts, else 5",
    ),
]
WhatItLearns = Annotated[
    Learns | None,
    typer.Option(
        help="What it is to learn: facts of whose subject all rows lie in one shard, which a gate then asks; skills, "
        "which all rows teach; or both.",
    ),
]
Workers = Annotated[
    str | None,
    typer.Option(
        metavar="N,N,...",
        help="Say how long the first training takes by so many workers, such as 1,2,4,8; a picture shows it too.",
    ),
]
Figure = Annotated[Path | None, typer.Option(dir_okay=False, help="Draw what to expect into this .png or .svg file.")]


def plan(
    deletions_per_month: DeletionsPerMonth,
    examples: Examples = None,
    hours_per_epoch: HoursPerEpoch = None,
    model: Model = None,
    measure: Measure = None,
    max_length: MaxLength = None,
    num_layers: NumLayers = None,
    hidden_size: HiddenSize = None,
    rank: Rank = 16,
    target_modules: TargetModules = None,
    num_labels: NumLabels = 0,
    epochs: Epochs = 3,
    batch_size: BatchSize = 8,
    months: Months = 12.0,
    depth: Depth = 0.75,
    replay: Replay = None,
    until: EndsWith = Until.first_shard,
    max_hours: MaxHours = None,
    max_hours_per_month: MaxHoursPerMonth = None,
    max_shards: MaxShards = None,
    learns: WhatItLearns = None,
    workers: Workers = None,
    figure: Figure = None,
    as_json: AsJson = False,
) -> None:
    """
    Recommend shards, slices, stages, replay and epochs, and how far to grow again after each request.

    With hours of training and of growing again, expected depth over time, and how long the system lasts if nothing is
    grown again: expected values for requests that hit examples at random; and the number that suffices to somebody who
    knows where examples lie.
    """
    # It simulates, by libraries that are slow to import, and only this command needs it.
    from ..analysis.planning import Workload, recommend
    from ..analysis.speedup import speedups

    _check_what_is_measured(examples, hours_per_epoch, model, measure)
    numbers = _numbers(workers)
    targets = None if target_modules is None else target_modules.value
    backbone = _backbone(model, num_layers, hidden_size, rank, targets, num_labels)
    if figure is not None:
        # Only for a picture, what draws it.
        from ..analysis.pictures import check_picture
        from ..analysis.plan_figure import draw_plan

        check_picture(figure)
    measured = None
    if measure is not None and model is not None:
        measured = _measured(model, measure, backbone, rank, targets, num_labels, batch_size, examples, max_length)
        examples = examples or measured.rows
        hours_per_epoch = hours_per_epoch or measured.hours_per_epoch
    workload = Workload(examples or 0, deletions_per_month, hours_per_epoch or 0, epochs, batch_size)
    try:
        found = recommend(
            workload,
            backbone,
            goal_months=months,
            goal_depth=depth,
            until=until.value,
            replay=replay,
            max_hours=max_hours,
            max_hours_per_month=max_hours_per_month,
            max_shards=max_shards,
            learns=None if learns is None else learns.value,
        )
    except ConfigError as error:
        raise ConfigError(re.sub(r"\b[a-z]+_[a-z]+(?==)", _option_for, str(error))) from error
    faster = speedups(found.chosen, backbone.num_layers, numbers) if numbers else ()
    if as_json:
        of_run = None if measured is None else asdict(measured)
        rendering.print_json(
            {
                "workload": asdict(workload),
                "backbone": asdict(backbone),
                "measured": of_run,
                **asdict(found),
                "workers": [asdict(one) for one in faster] or None,
            }
        )
    else:
        if measured is not None:
            rendering.show_measured(measured)
        rendering.show_recommendation(found)
        if faster:
            rendering.show_speedups(faster)
    if figure is not None:
        draw_plan(found, workload, figure, faster)


def _numbers(workers: str | None) -> list[int]:
    """Numbers of workers, each once."""
    if workers is None:
        return []
    words = [word.strip() for word in workers.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words) or len({*map(int, words)}) < len(words):
        raise typer.BadParameter(f"Got --workers {workers}, expected different numbers above 0, such as 1,2,4,8.")
    return list(map(int, words))


def _check_what_is_measured(
    examples: int | None, hours_per_epoch: float | None, model: str | None, measure: str | None
) -> None:
    if measure is not None and model is None:
        raise typer.BadParameter("Got --measure without --model, expected the model whose stages are to be measured.")
    for option, value in (("--examples", examples), ("--hours-per-epoch", hours_per_epoch)):
        if measure is None and value is None:
            raise typer.BadParameter(f"Got neither {option} nor --measure. Give {option}, or rows to measure with.")


def _measured(
    model: str,
    data: str,
    backbone: "Backbone",
    rank: int,
    target_modules: str | None,
    num_labels: int,
    batch_size: int,
    examples: int | None,
    max_length: int | None,
) -> "Measured":
    from ..analysis.backbone import targets_of

    # It loads a model, as nothing else here does.
    from .measuring import measure

    return measure(
        model,
        data,
        batch_size=batch_size,
        rank=rank,
        target_modules=target_modules or targets_of(_model_config(model)),
        num_layers=backbone.num_layers,
        num_labels=num_labels,
        num_examples=examples,
        max_length=max_length,
    )


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
