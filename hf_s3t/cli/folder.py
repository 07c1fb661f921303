"""Commands on the folder of a system: what is in it, deletions, their receipts and remains, and what leaves it."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, ExhaustedError, S3TError
from ..folder.foreign import refuse_foreign_parts
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
from ..operations.receipts import Receipt, Receipts
from ..records.examples import Example
from ..records.naming import find_ids, resolve_names
from ..records.report import UnlearningReport
from ..records.request import DeletionRequest
from ..signing.keys import PUBLIC_VARIABLE, PublicKey, signing_with
from . import rendering
from .arguments import AsJson, DryRun, Folder, FromFile, Groups, Ids, Missing, SigningKey, named_examples
from .exit_codes import EXHAUSTED, FINE, REFUSED
from .signing import write_signed_receipt
from .watching import watch as watch_workers


if TYPE_CHECKING:
    from ..model.modeling import S3TModel


# What messages for Python callers say, and what they are to say here.
_IN_EXPORT = {"`base_model`": "--base-model", ": the module, ": ": ", "`token`": "the token of `hf auth login`"}


def status(
    folder: Folder,
    watch: Annotated[
        bool, typer.Option("--watch", help="Tell who trains which stage, at each change, until none is missing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show depths, stages and how many deletions are left."""
    if watch:
        with contextlib.suppress(KeyboardInterrupt):
            watch_workers(folder, as_json)
        raise typer.Exit(FINE)
    system = open_folder(folder, read_only=True)
    found = system_status(system)
    found["pending"] = len(PendingRequests(system).ids())
    found["is_exhausted"] = not any(found["depths"])
    if as_json:
        rendering.print_json(found)
    else:
        rendering.show_status(found, system.plan)
    raise typer.Exit(EXHAUSTED if found["is_exhausted"] else FINE)


def locate(
    folder: Folder,
    ids: Ids = None,
    from_file: FromFile = None,
    group: Groups = None,
    as_json: AsJson = False,
) -> None:
    """Show the shard and slice of examples, or that they were deleted."""
    system = open_folder(folder, read_only=True)
    places, deleted_groups = _places(system, *named_examples(system, ids, from_file, group))
    if as_json:
        rendering.print_json(
            {
                "examples": [_place_record(example_id, row) for example_id, row in places],
                "deleted_groups": [{"group": group, "line": line} for group, line in deleted_groups],
            }
        )
    else:
        rendering.show_places(places, deleted_groups)


def _places(
    system: SystemFolder, ids: Sequence[int | str], groups: Sequence[int | str]
) -> tuple[list[tuple[int | str, Example | None]], list[tuple[int | str, int | None]]]:
    """The examples that were asked for, `None` for those that were deleted; the deleted groups and their lines."""
    table = system.table
    request = resolve_names(table, ids, groups, system.ledger, system.names)
    named = dict(zip(find_ids(table, ids, system.ledger, system.names), ids, strict=True))
    wanted = [*dict.fromkeys([*named, *request.present])]
    places = [(named.get(kept, kept), row) for kept, row in zip(wanted, table.examples(wanted), strict=True)]
    return places, [(group, _deletion_line(system, group)) for group in request.deleted_groups]


def _deletion_line(system: SystemFolder, group: int | str) -> int | None:
    # Where groups are kept as digests, one may be named by its digest.
    return system.ledger.line_of_group(system.key.of_group(group)) or system.ledger.line_of_group(str(group))


def _place_record(example_id: int | str, row: Example | None) -> dict[str, Any]:
    if row is None:
        return {"id": example_id, "deleted": True, "shard": None, "slice": None, "group": None}
    return {"id": example_id, "deleted": False, "shard": row.shard, "slice": row.slice, "group": row.group}


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
    signing_key: SigningKey = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """
    Forget examples: remove every stage that saw one. All ids are checked first; it is all or nothing.

    Processes that serve the folder follow before their next answer.
    """
    _check_later(later, max_delay, include_duplicates, dry_run)
    system = open_folder(folder, read_only=dry_run)
    named_ids, named_groups = named_examples(system, ids, from_file, group)
    request = DeletionRequest(named_ids, named_groups, missing.value, include_duplicates)
    if later:
        _show_pending(request_later(system, request, max_delay), as_json)
        return
    if dry_run:
        exhausts = _show_preview(preview(system, request), as_json)
    else:
        with signing_with(signing_key):
            exhausts = _show_report(system, apply(system, request), as_json)
    raise typer.Exit(EXHAUSTED if exhausts else FINE)


def apply_pending(
    folder: Folder, signing_key: SigningKey = None, dry_run: DryRun = False, as_json: AsJson = False
) -> None:
    """Forget, in one go, what `unlearn --later` (or `S3TModel.unlearn_later`) recorded."""
    system = open_folder(folder, read_only=dry_run)
    if dry_run:
        exhausts = _show_preview(preview(system, PendingRequests(system).request()), as_json)
    else:
        with signing_with(signing_key):
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
        rendering.print_json({"pending": asdict(found)})
    else:
        rendering.show_pending(found)


def _show_preview(found: DeletionPreview, as_json: bool) -> bool:
    if as_json:
        rendering.print_json({"dry_run": True, "preview": asdict(found)})
    else:
        rendering.show_preview(found)
    return found.would_exhaust


def _show_report(system: SystemFolder, report: UnlearningReport, as_json: bool) -> bool:
    # The ledger in memory ends with the line that this call wrote.
    receipt = Receipts.read(system.path).of_line(len(system.ledger.lines)) if report.deleted else None
    if as_json:
        rendering.print_json(
            {"dry_run": False, "report": asdict(report), "receipt": None if receipt is None else receipt.to_dict()}
        )
    else:
        rendering.show_report(report, receipt, len(system.table))
    return report.is_exhausted


def check(
    folder: Folder,
    public_key: Annotated[
        str | None,
        typer.Option(envvar=PUBLIC_VARIABLE, help="The public key of whoever signs: a file, or the key itself."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Verify ledger, digests and validity, and say what does not belong in the folder. Changes nothing."""
    found = inspect(folder, public_key=None if public_key is None else PublicKey.read(public_key))
    if as_json:
        rendering.print_json({"ok": not found.problems, "problems": found.problems, "notes": found.notes})
    else:
        for note in found.notes:
            rendering.say(f"note: {note}")
        for problem in found.problems:
            rendering.say(f"problem: {problem}")
        if not found.problems:
            rendering.say("no problems")
    raise typer.Exit(REFUSED if found.problems else FINE)


def receipt(
    folder: Folder,
    line: Annotated[int | None, typer.Option(min=1, help="The receipt of this line of the ledger.")] = None,
    example_id: Annotated[str | None, typer.Option("--id", help="The receipts of the deletions of this id.")] = None,
    signed: Annotated[
        Path | None, typer.Option(help="With --line: write the signed receipt to this new file; `-` prints it.")
    ] = None,
    for_id: Annotated[
        str | None,
        typer.Option("--for", help="With --line: a signed receipt for the person of this id, and their salt."),
    ] = None,
    for_group: Annotated[str | None, typer.Option(help="The same for the person whom a group is.")] = None,
    signing_key: SigningKey = None,
    as_json: AsJson = False,
) -> None:
    """
    Print receipts of deletions: what was asked, when, which stages went and which stay. Without options, a list.

    With --signed or --for it is a signed one, which `verify-receipt` checks without the folder.
    """
    if line is not None and example_id is not None:
        raise typer.BadParameter("Got both --line and --id; expected one of them.")
    refuse_foreign_parts(folder)
    if signed is not None or for_id is not None or for_group is not None:
        if line is None or as_json or (for_id is not None and for_group is not None):
            raise typer.BadParameter(
                "A signed receipt is one of a line, for one person at most, and JSON as it is. Give --line, and of "
                "--for and --for-group one."
            )
        target = None if signed is None or str(signed) == "-" else signed
        write_signed_receipt(folder, line, target, for_id, for_group, signing_key)
        return
    ledger = Receipts.read(folder)
    chosen = ledger.receipts
    if line is not None:
        chosen = (ledger.of_line(line),)
    elif example_id is not None:
        chosen = ledger.of_id(example_id, load_key(folder))
    if as_json:
        signatures = {one.line: _signature_of(ledger, one) for one in chosen}
        rendering.print_json(
            {
                "problem": ledger.problem,
                "receipts": [found.to_dict() for found in chosen],
                "signatures": {line: signature for line, signature in signatures.items() if signature is not None},
            }
        )
    elif line is None and example_id is None:
        rendering.show_ledger(ledger)
    else:
        for found in chosen:
            rendering.show_receipt(found, _signature_of(ledger, found))
    if ledger.problem is not None:
        rendering.complain(f"Not verified: {ledger.problem}")
    if example_id is not None and not chosen:
        rendering.complain(f"The ledger knows of no deletion of {example_id!r}.")
    raise typer.Exit(FINE if ledger.problem is None and (chosen or example_id is None) else REFUSED)


def _signature_of(ledger: Receipts, found: Receipt) -> dict[str, Any] | None:
    """Who signed a line and when, as its signature says; by `check` it is found whether that holds."""
    signed = ledger.signatures.signed(found.hash)
    if signed is None:
        return None
    envelope, statement = signed
    return {
        "keyid": envelope.signatures[0].keyid,
        "when": statement.signed,
        "time": statement.signed_time,
        "envelope": json.loads(envelope.to_json()),
    }


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
        rendering.print_json({"dry_run": dry_run, **asdict(found)})
    else:
        rendering.show_purge(found, dry_run)
    for problem in found.problems:
        rendering.complain(f"Problem: {problem}")
    raise typer.Exit(REFUSED if found.problems else FINE)


def export(
    folder: Folder,
    shard: Annotated[int, typer.Argument(min=0, help="Number of the shard.")],
    target: Annotated[Path, typer.Argument(help="A new folder to write the adapter to.")],
    base_model: Annotated[
        str | None, typer.Option(help="Id or path of the base model; the recorded one if not given.")
    ] = None,
    signing_key: SigningKey = None,
) -> None:
    """
    Write the stack that serves a shard as one plain PEFT adapter, and note it in the ledger.

    No deletion reaches the copy: it must be revoked by hand.
    """
    _check_export(open_folder(folder, read_only=True), shard, target)
    with signing_with(signing_key):
        load_model(folder, base_model).export_adapter(shard, target)
    rendering.say(f"shard {shard} is in {target}; no deletion reaches this copy")


def _check_export(system: SystemFolder, shard: int, target: Path) -> None:
    """What can be refused before a model is loaded, which takes long."""
    depths = serving_depths(system, system.valid_stages)
    if shard >= len(depths):
        raise ConfigError(f"Got shard {shard}, expected 0 to {len(depths) - 1}. Name a shard of this system.")
    if depths[shard] == 0:
        raise ExhaustedError(f"Shard {shard} has no stage left to export. Call `train()` to grow it again.")
    system.check_target(target)


def load_model(folder: Path, base_model: str | None) -> "S3TModel":
    """The model of a system; what keeps it from loading is said in the words of the command line."""
    # Slow to import, and only `export` needs it.
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
