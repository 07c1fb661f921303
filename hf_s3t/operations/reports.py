"""Reports for the file: what ledger, signatures and checks say of a request or a period, without a single id."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..errors import ConfigError, FolderError, counted
from ..folder.config_file import read_record
from ..folder.foreign import entries, printable
from ..folder.identity import identity_of
from ..folder.layout import COMPANIONS, CONFIG_FILE, PARTS, STAGE_FILES, STAGES
from ..folder.versions import own_version
from ..signing.keys import PublicKey
from .audits import audits_of
from .inspection import inspect
from .receipts import Receipt, Receipts


_PAGES = Path(__file__).with_name("report_pages")
_OF_STAGES = re.compile(r"shard-[0-9]+|[0-9]+(-[0-9]+)*|index\.json|\.lock|\..*\.lock")
_FORMATS = {"html": "report.html", "md": "report.md"}


@dataclass(frozen=True)
class ReportedSignature:
    """
    What is known of the signature of a line.

    Args:
        when (`str`, *optional*): `"written"` with the line, or `"later"`; `None` where nobody signed it.
        time (`str`): When it was signed.
        keyid (`str`): By which key, as it says.
        holds (`bool`, *optional*): Whether the given key signed it; `None` where none was given.
    """

    when: str | None = None
    time: str = ""
    keyid: str = ""
    holds: bool | None = None


@dataclass(frozen=True)
class ReportedLine:
    """
    One line of the ledger, for people.

    Args:
        receipt ([`~hf_s3t.operations.receipts.Receipt`]): The line.
        facts (`dict`): What its receipt says; see [`~hf_s3t.operations.receipts.Receipt.to_dict`].
        left (`list`): Per shard the stages that stayed, each as its slices in the order of training.
        signature ([`ReportedSignature`]): Who signed it.
    """

    receipt: Receipt
    facts: Mapping[str, Any]
    left: list[tuple[int, list[list[int]]]]
    signature: ReportedSignature


@dataclass(frozen=True)
class Report:
    """
    What is reported of a system.

    Args:
        system (`str`): Its identity.
        made (`str`): When the report was made, UTC.
        scope (`str`): Of what it is, in words.
        lines (`tuple[ReportedLine, ...]`): The lines of the ledger that it is about, oldest first.
        of_lines (`int`): How many lines the ledger has.
        problem (`str`, *optional*): What is wrong with the chain of the ledger.
        problems (`tuple[str, ...]`): What the check of the folder found.
        notes (`tuple[str, ...]`): What it noted.
        audits (`tuple[dict, ...]`): What audits came to: `time`, `by`, `equal`, `differing`.
        keyid (`str`, *optional*): The key that signatures were checked by.
        version (`str`): Of hf_s3t.
    """

    system: str
    made: str
    scope: str
    lines: tuple[ReportedLine, ...]
    of_lines: int
    problem: str | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    audits: tuple[Mapping[str, Any], ...]
    keyid: str | None
    version: str

    @property
    def totals(self) -> Mapping[str, int]:
        """Numbers over all lines that are reported."""
        found = Counter(deletions=0, examples=0, removed=0, exports=0, signed=0, later=0, unsigned=0, failed=0)
        for line in self.lines:
            is_deletion = line.facts["kind"] == "deletion"
            found["deletions"] += is_deletion
            found["examples"] += len(line.facts["ids"]) if is_deletion else 0
            found["removed"] += len(line.facts["stages_removed"])
            found["exports"] += line.facts["kind"] == "export"
            found[{"written": "signed", "later": "later"}.get(line.signature.when or "", "unsigned")] += 1
            found["failed"] += line.signature.holds is False
        return found


def make_report(
    path: str | os.PathLike[str],
    *,
    line: int | None = None,
    since: str | None = None,
    until: str | None = None,
    public_key: PublicKey | None = None,
) -> Report:
    """
    The report of a request, a period, or all that a ledger has. Only reads.

    Args:
        path (`str` or `os.PathLike`): The folder of the system.
        line (`int`, *optional*): The number of the line of one request.
        since (`str`, *optional*): The first moment of a period, ISO 8601; UTC if none is said.
        until (`str`, *optional*): Its last moment; a date is meant to its end.
        public_key ([`~hf_s3t.signing.keys.PublicKey`], *optional*): Of whoever signs, to check signatures by.

    Returns:
        [`Report`]: What to show.

    Raises:
        [`~hf_s3t.errors.ConfigError`]:
            If a date is none, a period ends before it begins, or both a line and a period are given.
        [`~hf_s3t.errors.UnknownExampleError`]: If there is no such line.
    """
    if line is not None and (since is not None or until is not None):
        raise ConfigError("Got a line and a period, expected one of them. Leave the other out.")
    first, last = _moment(since, "since"), _moment(until, "until")
    if first is not None and last is not None and first >= last:
        raise ConfigError(f"Got a period from {since} to {until}, expected one that ends after it begins.")
    ledger, path = Receipts.read(path), Path(path)
    if line is not None:
        chosen: Iterator[Receipt] = iter([ledger.of_line(line)])
    else:
        chosen = (one for one in ledger.receipts if _is_within(one.entry.time, first, last))
    check, system = inspect(path, public_key=public_key), str(identity_of(read_record(path / CONFIG_FILE)))
    return Report(
        system=system,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        scope=_scope(line, since, until),
        lines=tuple(_reported(one, ledger, public_key) for one in chosen),
        of_lines=len(ledger.receipts),
        problem=None if ledger.problem is None else _without_place(ledger.problem, path),
        problems=tuple(_without_place(one, path) for one in check.problems),
        notes=tuple(_without_place(one, path) for one in check.notes),
        audits=_audits(path, system),
        keyid=None if public_key is None else public_key.keyid,
        version=own_version(),
    )


def render(report: Report, form: Literal["html", "md"] = "html") -> str:
    """
    A report as a page that needs nothing else, or as Markdown.

    Args:
        report ([`Report`]): The report.
        form (`str`, defaults to `"html"`): `"html"` or `"md"`.
    """
    if form not in _FORMATS:
        raise ConfigError(f"Got the format {form!r}, expected one of {', '.join(_FORMATS)}.")
    environment = Environment(
        loader=FileSystemLoader(_PAGES),
        autoescape=form == "html",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"counted": counted, "moment": _shown_moment, "plain": _plain}
    return environment.get_template(_FORMATS[form]).render(report=report)


def _reported(found: Receipt, ledger: Receipts, key: PublicKey | None) -> ReportedLine:
    facts, left = found.to_dict(), dict[int, list[list[int]]]()
    for stage in facts["stages_left"]:
        if stage["shard"] is not None:
            left.setdefault(stage["shard"], []).append(stage["slices"])
    signed = ledger.signatures.signed(found.hash)
    if signed is None:
        return ReportedLine(found, facts, sorted(left.items()), ReportedSignature())
    envelope, statement = signed
    said = ReportedSignature(statement.signed, statement.signed_time, envelope.signatures[0].keyid)
    if key is not None:
        said = replace(said, holds=any(key.holds(one.value, envelope.signed_bytes) for one in envelope.signatures))
    return ReportedLine(found, facts, sorted(left.items()), said)


def _audits(path: Path, system: str) -> tuple[Mapping[str, Any], ...]:
    try:
        return tuple(audits_of(path, None, system))
    except FolderError:
        # What is wrong with their file is among the problems.
        return ()


def _scope(line: int | None, since: str | None, until: str | None) -> str:
    if line is not None:
        return f"the request in line {line} of the ledger"
    if since is None and until is None:
        return "everything in the ledger"
    return (
        f"what the ledger has {' '.join(f'{word} {day}' for word, day in (('from', since), ('until', until)) if day)}"
    )


def _moment(text: str | None, name: str) -> datetime | None:
    if text is None:
        return None
    try:
        if len(text) == len("2026-11-29"):
            day = date.fromisoformat(text)
            found = datetime.combine(day, time.min) + (timedelta(days=1) if name == "until" else timedelta())
        else:
            found = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise ConfigError(
            f"Got {name} {text!r}, expected a date such as 2026-11-29, or 2026-11-29T12:00. Write it so."
        ) from None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _is_within(text: str, first: datetime | None, last: datetime | None) -> bool:
    if first is None and last is None:
        return True
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        # A foreign ledger may say anything; what cannot be placed is shown rather than hidden.
        return True
    moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return (first is None or moment >= first) and (last is None or moment < last)


def _without_place(text: str, path: Path) -> str:
    """What a check says, without where the folder lies on this machine and what somebody called a file in it."""
    for name in _names_of_others(path):
        text = text.replace(name, "(a file)")
    for place in sorted({str(path), str(path.absolute()), str(path.resolve())}, key=len, reverse=True):
        if place not in (".", ""):
            text = text.replace(f"{place}{os.sep}", "").replace(place, "the folder")
    return text


def _names_of_others(path: Path) -> list[str]:
    """Names in a folder that are not the system's, longest first: a person's may be one."""
    found = [one.name for one in entries(path) if one.name not in PARTS and one.name not in COMPANIONS]
    inside = [one for one in (path / STAGES).rglob("*") if not _OF_STAGES.fullmatch(one.name)]
    names = {*found, *(one.name for one in inside if one.name not in STAGE_FILES)}
    return sorted(filter(None, map(printable, names)), key=len, reverse=True)


def _shown_moment(text: str) -> str:
    try:
        return datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError):
        return printable(text)[:40]


def _plain(text: str) -> str:
    """A text of a foreign folder that marks up nothing in Markdown."""
    return "".join(f"\\{c}" if c in "\\*_[]<>|#" else c for c in printable(text))
