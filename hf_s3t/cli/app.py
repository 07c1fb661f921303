"""
The command line `hf-s3t`, over the folder of a system on this machine, or before there is one (`plan`). Only `export`
loads a model.
"""

import codecs
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import ConfigError, ExampleIdError, ExhaustedError, S3TError
from ..folder.foreign import printable, refuse_foreign_parts
from ..folder.opening import open_folder
from ..folder.secret import load_key
from ..folder.status import serving_depths, system_status
from ..folder.system import SystemFolder
from ..operations.deletion import DeletionPreview, apply, preview
from ..operations.inspection import inspect
from ..operations.pending import PendingReceipt, PendingRequests, request_later
from ..operations.pending import apply_pending as apply_what_waits
from ..operations.purge import purge as purge_remnants
from ..operations.purge import take_inventory
from ..operations.receipts import Receipts
from ..operations.written_ids import groups_from_texts, ids_from_texts
from ..records.examples import Example
from ..records.report import UnlearningReport
from ..records.request import DeletionRequest
from . import rendering


FINE, REFUSED, USAGE, EXHAUSTED = 0, 1, 2, 3
_EXIT_CODES = (
    "Exit codes: 0 fine; 1 problems were found, or the request was refused and nothing changed; 2 wrong usage; "
    "3 exhausted: no shard is left to answer (`unlearn` did its work), or none of the one to export."
)
_STDIN = "-"
# What messages for Python callers say, and what they are to say here.
_IN_EXPORT = {"`base_model`": "--base-model", ": the module, ": ": ", "`token`": "the token of `hf auth login`"}
_OPTIONS = {"num_examples": "examples", "goal_months": "months"}


class Missing(StrEnum):
    """What to do about ids that a system never saw."""

    error = "error"
    ignore = "ignore"


class _Commands(TyperGroup):
    """Commands whose errors end in one line on standard error, and an exit code."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except ExhaustedError as error:
            raise _ended(str(error), EXHAUSTED) from error
        except S3TError as error:
            raise _ended(str(error), REFUSED) from error
        except BrokenPipeError:
            # Typer ends quietly when who read the output is gone.
            raise
        except OSError as error:
            where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
            raise _ended(f"{where}{error.strerror or error}. Check the path and its permissions.", REFUSED) from error


def _ended(message: str, code: int) -> typer.Exit:
    _complain(f"Error: {message}")
    return typer.Exit(code)


def _complain(line: str) -> None:
    typer.echo(printable(line), err=True)


app = typer.Typer(
    cls=_Commands,
    name="hf-s3t",
    help="Look after an S3T system: its state, deletions, receipts and remains. " + _EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Folder = Annotated[
    Path,
    typer.Argument(exists=True, file_okay=False, help="The folder of a system: the `output_dir` of its training run."),
]
Ids = Annotated[
    list[str] | None,
    typer.Argument(
        help="Ids of examples; `-` reads them from standard input. Put `--` before one that starts with -."
    ),
]
FromFile = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="A file with one id per line; empty lines are passed over."),
]
Groups = Annotated[list[str] | None, typer.Option("--group", help="A group whose examples are all meant; repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON with a stable schema.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done; change nothing.")]


def main() -> None:
    """Run the command line."""
    app(prog_name="hf-s3t")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf-s3t {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""


@app.command(epilog=_EXIT_CODES)
def status(folder: Folder, as_json: AsJson = False) -> None:
    """Show depths, stages and how many deletions are left."""
    system = open_folder(folder, read_only=True)
    found = system_status(system)
    found["pending"] = len(PendingRequests(system).ids())
    found["is_exhausted"] = not any(found["depths"])
    if as_json:
        _print_json(found)
    else:
        rendering.show_status(found, system.plan)
    raise typer.Exit(EXHAUSTED if found["is_exhausted"] else FINE)


@app.command(epilog=_EXIT_CODES)
def locate(
    folder: Folder,
    ids: Ids = None,
    from_file: FromFile = None,
    group: Groups = None,
    as_json: AsJson = False,
) -> None:
    """Show the shard and slice of examples, or that they were deleted."""
    system = open_folder(folder, read_only=True)
    ids, groups = _request(system, ids, from_file, group)
    places, deleted_groups = _places(system, ids, groups)
    if as_json:
        _print_json(
            {
                "examples": [_place_record(example_id, row) for example_id, row in places],
                "deleted_groups": [{"group": group, "line": line} for group, line in deleted_groups],
            }
        )
    else:
        rendering.show_places(places, deleted_groups)


@app.command(epilog=_EXIT_CODES)
def unlearn(
    folder: Folder,
    ids: Ids = None,
    from_file: FromFile = None,
    group: Groups = None,
    missing: Annotated[Missing, typer.Option(help="Refuse ids that were never trained on, or pass over them.")] = (
        Missing.error
    ),
    include_duplicates: Annotated[
        bool, typer.Option("--include-duplicates", help="Forget examples of equal content too.")
    ] = False,
    later: Annotated[
        bool, typer.Option("--later", help="Only record the request, to be applied with others by `apply-pending`.")
    ] = False,
    max_delay: Annotated[
        float | None,
        typer.Option(min=0, help="With --later: seconds after which a process that loads the system applies it."),
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """
    Forget examples: remove every stage that saw one. All ids are checked first; it is all or nothing.

    Processes that serve the folder follow before their next answer.
    """
    _check_later(later, max_delay, include_duplicates, dry_run)
    system = open_folder(folder, read_only=dry_run)
    ids, groups = _request(system, ids, from_file, group)
    request = DeletionRequest(ids, groups, missing.value, include_duplicates)
    if later:
        _show_pending(request_later(system, request, max_delay), as_json)
        return
    if dry_run:
        exhausts = _show_preview(preview(system, request), as_json)
    else:
        exhausts = _show_report(system, apply(system, request), as_json)
    raise typer.Exit(EXHAUSTED if exhausts else FINE)


@app.command("apply-pending", epilog=_EXIT_CODES)
def apply_pending(folder: Folder, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Forget, in one go, what `unlearn --later` (or `S3TModel.unlearn_later`) recorded."""
    system = open_folder(folder, read_only=dry_run)
    if dry_run:
        exhausts = _show_preview(preview(system, PendingRequests(system).request()), as_json)
    else:
        exhausts = _show_report(system, apply_what_waits(system), as_json)
    raise typer.Exit(EXHAUSTED if exhausts else FINE)


def _check_later(later: bool, max_delay: float | None, include_duplicates: bool, dry_run: bool) -> None:
    if later and (include_duplicates or dry_run):
        raise typer.BadParameter(
            "--later only records the request: preview it by `apply-pending --dry-run`, and name duplicates by their "
            "ids. Leave out --dry-run and --include-duplicates."
        )
    if max_delay is not None and not later:
        raise typer.BadParameter("--max-delay was given without --later. Add --later, or leave it out.")


def _show_pending(found: PendingReceipt, as_json: bool) -> None:
    if as_json:
        _print_json({"pending": asdict(found)})
    else:
        rendering.show_pending(found)


def _show_preview(found: DeletionPreview, as_json: bool) -> bool:
    if as_json:
        _print_json({"dry_run": True, "preview": asdict(found)})
    else:
        rendering.show_preview(found)
    return found.would_exhaust


def _show_report(system: SystemFolder, report: UnlearningReport, as_json: bool) -> bool:
    # The ledger in memory ends with the line that this call wrote.
    receipt = Receipts.read(system.path).of_line(len(system.ledger.lines)) if report.deleted else None
    if as_json:
        _print_json(
            {"dry_run": False, "report": asdict(report), "receipt": None if receipt is None else receipt.to_dict()}
        )
    else:
        rendering.show_report(report, receipt, len(system.table))
    return report.is_exhausted


@app.command(epilog=_EXIT_CODES)
def check(folder: Folder, as_json: AsJson = False) -> None:
    """Verify ledger, digests and validity, and say what does not belong in the folder. Changes nothing."""
    found = inspect(folder)
    if as_json:
        _print_json({"ok": not found.problems, "problems": found.problems, "notes": found.notes})
    else:
        for note in found.notes:
            rendering.say(f"note: {note}")
        for problem in found.problems:
            rendering.say(f"problem: {problem}")
        if not found.problems:
            rendering.say("no problems")
    raise typer.Exit(REFUSED if found.problems else FINE)


@app.command(epilog=_EXIT_CODES)
def receipt(
    folder: Folder,
    line: Annotated[int | None, typer.Option(min=1, help="The receipt of this line of the ledger.")] = None,
    example_id: Annotated[str | None, typer.Option("--id", help="The receipts of the deletions of this id.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print receipts of deletions: what was asked, when, which stages went and which stay. Without options, a list."""
    if line is not None and example_id is not None:
        raise typer.BadParameter("Got both --line and --id; expected one of them.")
    refuse_foreign_parts(folder)
    ledger = Receipts.read(folder)
    chosen = ledger.receipts
    if line is not None:
        chosen = (ledger.of_line(line),)
    elif example_id is not None:
        chosen = ledger.of_id(example_id, load_key(folder))
    if as_json:
        _print_json({"problem": ledger.problem, "receipts": [found.to_dict() for found in chosen]})
    elif line is None and example_id is None:
        rendering.show_ledger(ledger)
    else:
        for found in chosen:
            rendering.show_receipt(found)
    if ledger.problem is not None:
        _complain(f"Not verified: {ledger.problem}")
    if example_id is not None and not chosen:
        _complain(f"The ledger knows of no deletion of {example_id!r}.")
    raise typer.Exit(FINE if ledger.problem is None and (chosen or example_id is None) else REFUSED)


@app.command(epilog=_EXIT_CODES)
def purge(
    folder: Folder,
    dataset_cache: Annotated[
        list[Path] | None,
        typer.Option(exists=True, file_okay=False, help="A cache of datasets; the library's own if none is given."),
    ] = None,
    repo_id: Annotated[str | None, typer.Option(help="The system's repository on the Hub.")] = None,
    yes_remove: Annotated[
        list[Path] | None, typer.Option(help="Remove this place too, named as it is listed; repeatable.")
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """
    List what may still hold deleted data or weights, and remove what may be removed.

    Removed are stages and checkpoints that a deletion condemned, and what interrupted writes left in the folder.
    Everything else, and everything outside, goes only by --yes-remove.
    """
    act = take_inventory if dry_run else purge_remnants
    found = act(folder, dataset_cache or None, repo_id, yes_remove or ())
    if as_json:
        _print_json({"dry_run": dry_run, **asdict(found)})
    else:
        rendering.show_purge(found, dry_run)
    for problem in found.problems:
        _complain(f"Problem: {problem}")
    raise typer.Exit(REFUSED if found.problems else FINE)


Repo = Annotated[str, typer.Argument(help="The repository on the Hub, such as me/llama-s3t.")]
Token = Annotated[str | None, typer.Option(help="Token for the Hub; the one of `hf auth login` if not given.")]


@app.command(epilog=_EXIT_CODES)
def push(
    folder: Folder,
    repo_id: Repo,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository; the owner's default if not given.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Forget here, too, what the Hub knows as deleted.")] = False,
    token: Token = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """
    Bring a system to the Hub: one commit, of what is not there yet, with a model card.

    What a deletion removed stays in older commits until `erase`.
    """
    from ..hub.card import description
    from ..hub.pushing import push as push_system
    from ..hub.repository import HubRepo

    describe = partial(description, repo_id=repo_id)
    repo, system = HubRepo(repo_id, token), open_folder(folder, read_only=dry_run)
    done = push_system(system, repo, describe, private=private, commit_message=message, merge=merge, dry_run=dry_run)
    if as_json:
        _print_json({"dry_run": dry_run, **asdict(done)})
    else:
        rendering.show_push(done, dry_run)


@app.command(epilog=_EXIT_CODES)
def pull(
    repo_id: Repo,
    target: Annotated[Path, typer.Argument(help="A new folder to write the system to.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; the main branch if not given.")] = None,
    token: Token = None,
    dry_run: DryRun = False,
) -> None:
    """
    Write a system on the Hub into a folder, every stage of it, to train on and push from.

    The system's secret must be in HF_S3T_KEY. To serve, no pull is needed: `S3TModel.from_pretrained` takes the name.
    """
    from ..hub.folder import HubFolder

    system = HubFolder(repo_id, revision, token)
    stages = len(system.valid_stages)
    if dry_run:
        rendering.say(f"would pull {stages} stages of {repo_id} at {system.commit} to {target}")
    else:
        system.copy_to(target)
        rendering.say(f"{repo_id} at {system.commit} is in {target}: {stages} stages")


@app.command(epilog=_EXIT_CODES)
def erase(repo_id: Repo, token: Token = None, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """
    Erase from the Hub what the main branch no longer holds: history, refs with an old state, their large files.

    Push the deletion first. Where this was interrupted, calling it again finishes it.
    """
    from ..hub.erasure import erase as erase_superseded
    from ..hub.repository import HubRepo

    done = erase_superseded(HubRepo(repo_id, token), dry_run=dry_run)
    if as_json:
        _print_json(asdict(done))
    else:
        rendering.show_erasure(done)


@app.command(epilog=_EXIT_CODES)
def export(
    folder: Folder,
    shard: Annotated[int, typer.Argument(min=0, help="Number of the shard.")],
    target: Annotated[Path, typer.Argument(help="A new folder to write the adapter to.")],
    base_model: Annotated[
        str | None, typer.Option(help="Id or path of the base model; the recorded one if not given.")
    ] = None,
) -> None:
    """
    Write the stack that serves a shard as one plain PEFT adapter, and note it in the ledger.

    No deletion reaches the copy: it must be revoked by hand.
    """
    _check_export(open_folder(folder, read_only=True), shard, target)
    _load_model(folder, base_model).export_adapter(shard, target)
    rendering.say(f"shard {shard} is in {target}; no deletion reaches this copy")


def _check_export(system: SystemFolder, shard: int, target: Path) -> None:
    """What can be refused before a model is loaded, which takes long."""
    depths = serving_depths(system, system.valid_stages)
    if shard >= len(depths):
        raise ConfigError(f"Got shard {shard}, expected 0 to {len(depths) - 1}. Name a shard of this system.")
    if depths[shard] == 0:
        raise ExhaustedError(f"Shard {shard} has no stage left to export. Call `train()` to grow it again.")
    system.check_target(target)


def _load_model(folder: Path, base_model: str | None):
    from ..model.modeling import S3TModel

    try:
        return S3TModel.from_pretrained(folder, base_model=base_model)
    except S3TError as error:
        text = _on_one_line(error)
        for argument, option in _IN_EXPORT.items():
            text = text.replace(argument, option)
        raise type(error)(text) from error
    # Also what values of a wrong type in the record lead to.
    except (AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = _on_one_line(error).rstrip(".")
        raise ConfigError(
            f"The base model cannot be loaded: {reason}. Name it by --base-model, an id or a path."
        ) from error


def _on_one_line(error: Exception) -> str:
    """What an error says, where line breaks are those of a sentence: Transformers has many."""
    return " ".join(str(error).split())


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


@app.command(epilog=_EXIT_CODES)
def plan(
    examples: Annotated[int, typer.Option(min=1, help="Number of training examples.")],
    deletions_per_month: Annotated[
        float, typer.Option(callback=_above_zero, help="Deletion requests to expect in a month.")
    ],
    hours_per_epoch: Annotated[
        float,
        typer.Option(
            callback=_above_zero, help="Hours that an epoch of ordinary LoRA fine-tuning on all the data takes."
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="Id on the Hub, folder or config.json of the base model: its layers and sizes.")
    ] = None,
    num_layers: Annotated[int | None, typer.Option(min=1, help="Transformer layers, where no model is given.")] = None,
    hidden_size: Annotated[
        int | None,
        typer.Option(min=1, help="Hidden size, where no model is given; without it storage is not estimated."),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of LoRA.")] = 16,
    target_modules: Annotated[
        Targets | None,
        typer.Option(help="Matrices with an adapter; all of causal language models and two of others if not given."),
    ] = None,
    num_labels: Annotated[int, typer.Option(min=0, help="Classes of the head that every stage keeps a copy of.")] = 0,
    epochs: Annotated[
        int, typer.Option(min=1, help="Epochs of ordinary fine-tuning; every stage gets at least these.")
    ] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per optimizer step.")] = 8,
    months: Annotated[float, typer.Option(callback=_above_zero, help="Months that the system should last.")] = 12.0,
    until: Annotated[Until, typer.Option(help="What ends it: the first dead shard, or all of them.")] = (
        Until.first_shard
    ),
    max_hours: Annotated[
        float | None, typer.Option(callback=_above_zero, help="Hours that training may take.")
    ] = None,
    max_shards: Annotated[
        int, typer.Option(min=1, help="Shards at most; each learns from its part of the data alone.")
    ] = 5,
    figure: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Draw what to expect into this .png or .svg file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    Recommend shards, slices, layers per slice, budget and epochs, with what they cost and how long they last.

    Expected times, for requests that hit examples at random; and the number that suffices to somebody who knows where
    examples lie.
    """
    from ..analysis.planning import Workload, recommend

    workload = Workload(examples, deletions_per_month, hours_per_epoch, epochs, batch_size)
    backbone = _backbone(
        model, num_layers, hidden_size, rank, None if target_modules is None else target_modules.value, num_labels
    )
    if figure is not None:
        from ..analysis.figures import draw_plan
        from ..analysis.pictures import check_picture

        check_picture(figure)
    try:
        found = recommend(
            workload, backbone, goal_months=months, until=until.value, max_hours=max_hours, max_shards=max_shards
        )
    except ConfigError as error:
        raise ConfigError(re.sub(r"\b[a-z]+_[a-z]+(?==)", _option_of, str(error))) from error
    if as_json:
        _print_json({"workload": asdict(workload), "backbone": asdict(backbone), **asdict(found)})
    else:
        rendering.show_recommendation(found)
    if figure is not None:
        draw_plan(found, workload, figure)


def _option_of(argument: re.Match[str]) -> str:
    """The option for an argument of the planning, which it names where nothing can be recommended."""
    return "--" + _OPTIONS.get(argument[0], argument[0]).replace("_", "-")


def _backbone(
    model: str | None,
    num_layers: int | None,
    hidden_size: int | None,
    rank: int,
    target_modules: str | None,
    num_labels: int,
):
    """The model to plan for, by its config or by the numbers given."""
    from ..analysis.planning import Backbone

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


# What the arguments name


def _request(
    system: SystemFolder, ids: Sequence[str] | None, from_file: Path | None, groups: Sequence[str] | None
) -> tuple[list[int | str], list[int | str]]:
    """The ids and groups that a command line names, in the types that this system's have."""
    texts = []
    for text in ids or ():
        texts += _lines(sys.stdin.buffer.read(), "standard input") if text == _STDIN else [text]
    if from_file is not None:
        texts += _lines(from_file.read_bytes(), str(from_file))
    # Also where a file or standard input is empty: most likely what should have filled it failed.
    if not texts and not groups:
        raise typer.BadParameter(
            "Got no ids. Name them as arguments, by --from-file, on standard input (-), or --group."
        )
    return ids_from_texts(system, texts), groups_from_texts(system, groups or ())


def _lines(data: bytes, source: str) -> list[str]:
    try:
        # What PowerShell writes into a file says so by its first two bytes.
        text = data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ExampleIdError(f"{source} is no UTF-8 text ({error}). Give one id per line.") from error
    # Not splitlines: ids may hold the other characters that it takes for line breaks.
    return [line for line in (line.removesuffix("\r") for line in text.split("\n")) if line]


def _places(
    system: SystemFolder, ids, groups
) -> tuple[list[tuple[int | str, Example | None]], list[tuple[int | str, int]]]:
    """The examples that were asked for, `None` for those that were deleted; the deleted groups and their lines."""
    table = system.table
    request = table.resolve(ids, groups, system.ledger, system.names)
    named = {table.find(i, system.ledger, system.names): i for i in ids}
    places = [(named.get(kept, kept), table.rows.get(kept)) for kept in dict.fromkeys([*named, *request.present])]
    return places, [(group, _line_of(system, group)) for group in request.deleted_groups]


def _line_of(system: SystemFolder, group: int | str) -> int | None:
    ledger, names = system.ledger, system.names
    # Where groups are kept as digests, one may be named by its digest.
    return ledger.line_of_group(names.group_digest(names.of_group(group))) or ledger.line_of_group(str(group))


def _place_record(example_id: int | str, row: Example | None) -> dict[str, Any]:
    if row is None:
        return {"id": example_id, "deleted": True, "shard": None, "slice": None, "group": None}
    return {"id": example_id, "deleted": False, "shard": row.shard, "slice": row.slice, "group": row.group}


# JSON


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(_strict(value), indent=2, allow_nan=False))


def _strict(value: Any) -> Any:
    """A value in the types that JSON has; a number without end, which it has not, is null."""
    if isinstance(value, dict):
        return {name: _strict(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
