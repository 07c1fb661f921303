"""How the command line shows things: tables on the terminal for people, JSON for programs."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from ..errors import counted
from ..folder.foreign import printable
from ..operations.deletion import DeletionPreview
from ..operations.pending import PendingReceipt
from ..operations.purge import Purge
from ..operations.receipts import Receipt, Receipts
from ..plan.stages import Plan
from ..records.examples import Example
from ..records.report import UnlearningReport


if TYPE_CHECKING:
    # Imported by the commands that need them.
    from ..analysis.planning import Option, Recommendation
    from ..analysis.speedup import Speedup
    from ..hub.erasure import ErasureReport
    from ..hub.pushing import PushReport
    from .measuring import Measured


_SHORT = 12
_UNFOLDED = 10_000


def show_status(status: dict[str, Any], plan: Plan) -> None:
    """The depths of every shard, what is there of its plan, and what is left."""
    valid, planned = status["stages"]
    say(
        f"{counted(status['examples'], 'example')}, {counted(status['deletions'], 'deletion')}, {valid} of "
        f"{counted(planned, 'stage')}"
    )
    if plan.by_sets:
        _show_sets(status["depths"], status["sets"])
    else:
        _show_sequences(status["depths"], plan, status["sequence_depths"])
    first, all_ = status["deletions_until_first_dead_shard"], status["deletions_until_exhausted"]
    say(f"expected further deletions: {_number(first)} until a shard is dead, {_number(all_)} until all are")
    if status["next_stage"] is not None:
        _show_what_is_left_to_train(status)
    if status["stages_behind"]:
        behind = f"{counted(status['stages_behind'], 'stage')} {'serves' if status['stages_behind'] == 1 else 'serve'}"
        say(f"{behind} without rows that came since, until `train()` has grown what is behind again")
    if status["gate"] is not None:
        rows, terms = counted(status["gate"]["rows"], "row"), counted(status["gate"]["terms"], "distinct word")
        say(f"gate: {status['gate']['kind']}, of the prompts of {rows}, {terms}")
    if status["pending"]:
        say(f"waiting for `hf-s3t apply-pending`, and in until then: {counted(status['pending'], 'example')}")
    if status["is_exhausted"]:
        _show_exhausted(status["examples"])


def _show_sets(depths: Sequence[int], sets: Sequence[Sequence[tuple[int, int]]]) -> None:
    sizes = range(1, max(map(len, sets)) + 1)
    columns = [counted(size, "slice") for size in sizes]
    rows = [
        (shard, depth, *(f"{there} of {planned}" for there, planned in own), *[""] * (len(sizes) - len(own)))
        for shard, (depth, own) in enumerate(zip(depths, sets, strict=True))
    ]
    _table(("shard", "depth", f"sets of {columns[0]}", *columns[1:]), rows)


def _show_sequences(depths: Sequence[int], plan: Plan, of_sequences: Sequence[Sequence[int]]) -> None:
    rows = [
        (
            shard,
            depth,
            "  ".join(f"{_joined(sequence)}: {own}" for sequence, own in zip(sequences, found, strict=True)),
        )
        for shard, (depth, sequences, found) in enumerate(zip(depths, plan.sequences, of_sequences, strict=True))
    ]
    _table(("shard", "depth", "depth of each sequence"), rows)


def _show_what_is_left_to_train(status: dict[str, Any]) -> None:
    step = status["next_stage"]
    now, later = fmean(status["depths"]), status["expected_depth"]
    say(
        f"left to train: {counted(status['stages_left'], 'stage')}, the work of {_work(status['work_left'])} full "
        "fine-tunings"
    )
    serves = "its loss decides whether it serves"
    if step["depth"] is not None:
        serves = f"mean depth {now:.2f} -> {now + step['depth']:.2f}"
    say(
        f"one more ({step['stage']}, work {_work(step['work'])}): {serves}, over the next requests {later:.2f} "
        f"-> {later + step['expected_depth']:.2f}"
    )


def show_push(report: "PushReport", dry_run: bool) -> None:
    """What a push did, or would do, on the Hub and where it took in deletions here."""
    if report.forgotten:
        forgot = "would forget here" if dry_run else "forgot here"
        say(f"{forgot} what {report.repo_id} knows as deleted: {counted(report.forgotten, 'example')}")
        say(f"stages {'that would go' if dry_run else 'removed'} here: {_list(report.stages_removed)}")
    if not (report.added or report.deleted):
        say(f"{report.repo_id} is up to date at {report.commit}")
        return
    done = "would change" if dry_run else "changed"
    say(f"{done} {report.repo_id}: {counted(len(report.added), 'file')} added, {len(report.deleted)} deleted")
    if not dry_run:
        say(f"commit {report.commit}")
    if report.deleted:
        say("what was deleted stays in older commits until `hf-s3t erase`")


def show_erasure(report: "ErasureReport") -> None:
    """What is gone from the Hub, and what nobody here can confirm."""
    done = "would erase" if report.is_dry_run else "erased"
    say(f"{done} {counted(report.blobs, 'large file')} ({decimal(report.bytes)}) of {report.repo_id}")
    if report.refs_removed:
        say(f"branches and tags {'to be ' if report.is_dry_run else ''}removed: {', '.join(report.refs_removed)}")
    for line in report.confirmed:
        say(f"confirmed: {line}")
    for problem, step in report.unconfirmed:
        say(f"not confirmable from here: {problem}")
        say(f"  next: {step}")


def show_pending(receipt: PendingReceipt) -> None:
    """A request that was recorded for later."""
    say(
        f"recorded {receipt.time}: {counted(receipt.requested, 'example')} to be forgotten, {receipt.already_deleted} "
        "deleted before"
    )
    _show_passed_over(receipt)
    due = "when `hf-s3t apply-pending` is run"
    if receipt.apply_by is not None:
        # A process that runs by then does not see it: no time is kept but by a load.
        due = f"by `hf-s3t apply-pending`, or by the first load of the model after {receipt.apply_by}"
    say(f"waiting in all, and in until deleted {due}: {counted(receipt.pending, 'example')}")


def show_places(
    places: Sequence[tuple[int | str, Example | None]], deleted_groups: Sequence[tuple[int | str, int | None]] = ()
) -> None:
    """Where examples lie, and the lines of the ledger in which groups were deleted."""
    for group, line in deleted_groups:
        say(f"group {group!r} was deleted in line {line} of the ledger")
    if deleted_groups and not places:
        return
    rows = [
        (example_id, "deleted", "", "") if row is None else (example_id, row.shard, row.slice, _or_empty(row.group))
        for example_id, row in places
    ]
    _table(("id", "shard", "slice", "group"), rows)


def show_preview(preview: DeletionPreview) -> None:
    """What a deletion would do."""
    say(f"would unlearn {counted(len(preview.present), 'example')}, {preview.already_deleted} deleted before")
    _show_passed_over(preview)
    _show_depths(preview.depths_before, preview.depths_after)
    say(f"stages that would go: {_list(preview.stages_removed)}")
    _show_duplicates(preview.duplicates)
    before, after = _number(preview.deletions_left_before), _number(preview.deletions_left_after)
    say(f"expected further deletions until all shards are dead: {before} -> {after}")
    if preview.would_exhaust:
        say("no shard would be left to answer")


def show_report(report: UnlearningReport, receipt: Receipt | None, examples_left: int) -> None:
    """What a deletion did, and whether there is anything left to train on."""
    say(
        f"unlearned {counted(report.deleted, 'example')} in {report.seconds * 1000:.1f} ms, {report.already_deleted} "
        "deleted before"
    )
    _show_passed_over(report)
    _show_depths(report.depths_before, report.depths_after)
    say(f"stages removed: {_list(report.stages_removed)}")
    _show_duplicates(report.duplicates)
    if receipt is not None:
        say(f"line {receipt.line} of the ledger, {receipt.hash}")
    if report.is_exhausted:
        _show_exhausted(examples_left)


def show_ledger(receipts: Receipts) -> None:
    """One row per line of a ledger."""
    rows = [
        (
            receipt.line,
            receipt.entry.time,
            receipt.entry.kind,
            len(receipt.entry.ids),
            len(receipt.entry.removed),
            len(receipt.entry.left),
            receipt.hash[:_SHORT],
        )
        for receipt in receipts.receipts
    ]
    _table(("line", "time", "kind", "ids", "stages", "left", "hash"), rows)


def show_receipt(receipt: Receipt, signature: dict[str, Any] | None = None) -> None:
    """One line of a ledger in full; digests of stages are cut short."""
    facts = receipt.to_dict()
    moved = "stages_exported" if facts["kind"] == "export" else "stages_removed"
    rows = [
        ("line", facts["line"]),
        ("hash", facts["hash"]),
        *(("previous", previous) for previous in facts["previous"] or ["none: the first line"]),
        ("chain", "verified" if facts["chain_verified"] else "NOT VERIFIED"),
        ("signed", _signature(signature)),
        ("kind", facts["kind"]),
        ("time", facts["time"]),
        *(("id (keyed digest)", digest) for digest in facts["ids"]),
        *(("group (keyed digest)", digest) for digest in facts["groups"]),
        *((moved.replace("_", " "), _stage(stage)) for stage in facts[moved]),
        *(("stages left", _stage(stage)) for stage in facts["stages_left"]),
        *(("versions", f"{name} {version}") for name, version in facts["versions"].items()),
    ]
    _table(("", ""), _without_repeated_labels(rows), header=False)


def _signature(signature: dict[str, Any] | None) -> str:
    if signature is None:
        return "no"
    when = "with the line" if signature["when"] == "written" else f"later, on {signature['time']}"
    return f"{when}, by the key {signature['keyid'][:_SHORT]}…"


def show_purge(purge: Purge, dry_run: bool) -> None:
    """
    The places a purge found, and what it did to each, or would do; the cache files of a dataset as one row, by their
    folder.
    """
    sizes: dict[tuple[str, str, Path], list[int]] = {}
    for remnant in purge.remnants:
        sizes.setdefault((remnant.action, remnant.kind, remnant.listed_as), []).append(remnant.bytes)
    rows = [(action, kind, decimal(sum(own)), _place(path, own)) for (action, kind, path), own in sizes.items()]
    if rows:
        _table(("", "kind", "size", "path"), rows)
    kept = [remnant for remnant in purge.remnants if remnant.action == "keep"]
    for kind, advice in {remnant.kind: remnant.advice for remnant in kept}.items():
        say(f"{kind}: {advice}")
    going = "to remove" if dry_run else "removed"
    say(f"{going} {decimal(purge.size('remove', 'removed'))}, kept {decimal(purge.size('keep'))}")


def show_measured(found: "Measured") -> None:
    """What stages took, where a few steps of them were trained."""
    say(f"measured on {found.device}, {counted(found.rows, 'row')}:")
    speeds = [
        f"{seconds:.3g} seconds a step, {examples:.3g} examples a second, {counted(depth, 'layer')} trained"
        for seconds, examples, depth in zip(
            found.seconds_per_step, found.examples_per_second, found.depths, strict=True
        )
    ]
    rows = [
        ("first stage", speeds[0]),
        ("last stage", speeds[1]),
        ("ordinary fine-tuning", f"{_hours(found.hours_per_epoch)} an epoch"),
        ("most memory", decimal(found.peak_bytes)),
    ]
    _table(("", ""), rows, header=False)


def show_recommendation(found: "Recommendation") -> None:
    """What to set up and how to keep it up, what to expect of it, and what else there is."""
    best = found.chosen
    layers = counted(best.layers_per_slice, "layer")
    size = "not known without --model or --hidden-size" if best.storage_bytes is None else decimal(best.storage_bytes)
    goal = counted(found.goal_months, "month")
    rows = [
        ("shards (m)", best.num_shards),
        ("slices per shard (L)", f"{best.num_slices} of {layers} each"),
        ("stages per shard", f"{best.num_stages // best.num_shards}: {best.plan}"),
        ("rows of earlier slices", f"replay={best.replay:g}, {best.replay_reason}"),
        ("epochs per stage", f"{best.epochs}; at least {counted(best.steps_of_first_stage, 'step')}"),
        ("first training", f"{_hours(best.training_hours)}, {best.cost_ratio:.1f} times ordinary fine-tuning"),
        ("stages, storage", f"{best.num_stages}, {size}"),
        ("after each request", f"grow {best.after_each_request}"),
        (
            "what that takes",
            f"{best.stages_per_request:.1f} stages or {_hours(best.hours_per_request)} a request, "
            f"{_hours(best.hours_per_month)} a month",
        ),
        (f"in {goal}", f"{_hours(best.total_hours)}, {best.mean_depth:.1f} of {best.num_slices} slices serve"),
        ("a shard has nothing", _between(best.months_between_dead_shards, best.months_between_exhaustions)),
        *([("answered by", _who_answers(found))] if found.learns else []),
        ("never grown again:", ""),
        ("half of the slices serve", f"for {_months(best.months_until_half_depth)} months"),
        ("first dead shard", _end(best.months_until_first_dead_shard, best.deletions_until_first_dead_shard)),
        ("exhausted", _end(best.months_until_exhausted, best.deletions_until_exhausted)),
        (
            "targeted requests",
            f"{_does(best.targeted_deletions_until_first_dead_shard, 'kill')} a shard, "
            f"{_does(best.targeted_deletions_until_exhausted, 'exhaust')} the system",
        ),
    ]
    _table(("", ""), rows, header=False)
    for note in found.notes:
        say(f"note: {note}")
    say(f"slices that serve, of {best.num_slices}:")
    over_time = zip(found.months, best.depths, best.depths_without, found.published_depths, strict=True)
    published = f"published plan (B = {best.num_slices}; {_hours(found.published_hours)}), never"
    columns = ("month", "grown again", "never", published)
    _table(columns, [(f"{month:.4g}", *(f"{depth:.1f}" for depth in depths)) for month, *depths in over_time])
    say("more depth costs more training (months until dead and exhausted: if never grown again):")
    of_each = ("", "m", "L", "layers", "stages", "of each shard", "replay", "first hours")
    ends = ("after each request", "hours a month", f"hours in {goal}", "slices serve", "first dead shard", "exhausted")
    _table((*of_each, *ends), [_option(option, option == best) for option in found.options])


def _who_answers(found: "Recommendation") -> str:
    given = ", ".join(f"{name}={value!r}" for name, value in found.gate.items())
    return f"{given}: {found.answered_by}" if given else found.answered_by


def show_speedups(found: "Sequence[Speedup]") -> None:
    """How long the first training takes by more workers."""
    say("first training over workers, each with one stage at a time:")
    rows = [(f"{one.workers}", _hours(one.hours), f"{one.speedup:.1f}", f"{100 * one.busy:.0f}%") for one in found]
    _table(("workers", "first training", "times sooner", "busy"), rows)


def say(text: str) -> None:
    """A line, as it is: neither wrapped nor read as markup."""
    _console().print(Text(printable(text)), soft_wrap=True)


def complain(line: str) -> None:
    """A line on standard error."""
    typer.echo(printable(line), err=True)


def print_json(value: Any) -> None:
    """A value as JSON, for programs."""
    typer.echo(json.dumps(_strict(value), indent=2, allow_nan=False))


def print_json_line(value: Any) -> None:
    """A value as a line of JSON, for programs that read one after the other."""
    typer.echo(json.dumps(_strict(value), allow_nan=False))


def _strict(value: Any) -> Any:
    """A value in the types that JSON has; a number without end, which it has not, is null."""
    if isinstance(value, dict):
        return {name: _strict(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _console() -> Console:
    # Made when it is used: standard output may be another by then.
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        # Lines that another program or a file takes in are not folded.
        console.width = _UNFOLDED
    return console


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]], header: bool = True) -> None:
    table = Table(box=SIMPLE_HEAD, show_header=header, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    console = _console()
    with console.capture() as captured:
        console.print(table)
    # Rich fills the last column with spaces.
    typer.echo("\n".join(line.rstrip() for line in captured.get().split("\n")), nl=False)


def _option(option: "Option", is_chosen: bool) -> tuple[Any, ...]:
    return (
        "→" if is_chosen else "",
        option.num_shards,
        option.num_slices,
        option.layers_per_slice,
        option.num_stages,
        option.plan,
        f"{option.replay:g}",
        f"{option.training_hours:.3g}",
        option.after_each_request,
        f"{option.hours_per_month:.3g}",
        f"{option.total_hours:.3g}",
        f"{100 * option.mean_depth / option.num_slices:.0f}%",
        _months(option.months_until_first_dead_shard),
        _months(option.months_until_exhausted),
    )


def _between(dead: float, exhausted: float) -> str:
    once = "for a while" if math.isinf(dead) else f"for a while once in {_months(dead)} months"
    never = "in no simulated request" if math.isinf(dead) else once
    return never + ("" if math.isinf(exhausted) else f", all of them once in {_months(exhausted)}")


def _does(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number == 1 else "")


def _end(months: float, deletions: float) -> str:
    return f"expected after {_months(months)} months, {deletions:.1f} requests"


def _months(months: float) -> str:
    return f"{months:.1f}" if months >= 1 else f"{months:.2f}"


def _hours(hours: float) -> str:
    number, unit = (hours, "hour") if hours >= 1 else (hours * 60, "minute")
    return counted(float(f"{number:.3g}"), unit)


def _show_depths(before: list[int], after: list[int]) -> None:
    _table(("shard", "depth before", "after"), zip(range(len(before)), before, after, strict=True))


def _show_passed_over(found: UnlearningReport | DeletionPreview | PendingReceipt) -> None:
    """What was named and is not among the examples that go: without a word, a typo would look like a deletion."""
    for group in found.deleted_groups:
        say(f"group {group!r} was deleted before")
    for number, what in ((found.unknown, "id"), (found.unknown_groups, "group")):
        if number:
            say(f"{counted(number, what)} {'was' if number == 1 else 'were'} never trained on, and passed over")


def _show_exhausted(examples_left: int) -> None:
    if examples_left:
        say(f"no shard is left to answer: `train()` grows stages on the {counted(examples_left, 'example')} left")
    else:
        say("no shard is left to answer, and no example to train on: train a new system in another folder")


def _show_duplicates(duplicates: Sequence[int | str]) -> None:
    if duplicates:
        named = _list(tuple(map(repr, duplicates)))
        say(f"of equal content, and still in: {named} (unlearn these ids to forget them too)")


def _without_repeated_labels(rows: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    shown, last = [], None
    for label, value in rows:
        shown.append(("" if label == last else label, value))
        last = label
    return shown


def _stage(stage: dict[str, Any]) -> str:
    slices = "" if stage["slices"] is None else f" (slices {', '.join(map(str, stage['slices']))})"
    return f"{stage['stage']}{slices} {str(stage['adapter_sha256'])[:_SHORT]}…"


def _place(path: Path, sizes: Sequence[int]) -> str:
    return str(path) if len(sizes) == 1 else f"{path} ({len(sizes)} files)"


def _joined(sequence: Sequence[int]) -> str:
    return "-".join(map(str, sequence))


def _list(values: Sequence[str]) -> str:
    return ", ".join(values) or "none"


def _work(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _number(value: float) -> str:
    return "no end" if math.isinf(value) else f"{value:.1f}"


def _or_empty(value: Any) -> Any:
    return "" if value is None else value
