"""What a receipt says, as an in-toto Statement: its subject is the system before and after, its predicate the rest."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ReceiptError, counted
from .fields import Fields, place_of
from .person import SCHEME, Commitment
from .stages_digest import stages_digest
from .strict_json import compact, parse_object


STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
RECEIPT_VERSION = 1
_FAMILY = "urn:hf-s3t:deletion-receipt:v"
PREDICATE_TYPE = f"{_FAMILY}{RECEIPT_VERSION}"
# When a statement was signed: by who wrote the line, with it; by who had a key later; or when a receipt was made.
SIGNED = ("written", "later", "receipt")


@dataclass(frozen=True)
class Statement:
    """
    What is signed of one line of a ledger. It names nobody: ids and groups are digests keyed with the system's secret.

    A signature in the folder says what the line changed. A receipt, made for somebody, also lists all that stayed,
    the keyed digests and the hashes of all lines before; unless it is a person's, who is told of no others.

    Args:
        system (`str`): The identity of the system.
        line (`int`): Number of the line, counted from 1.
        hash (`str`): SHA-256 of the line.
        previous (`tuple[str, ...]`): Hash of the line before; two after a merge, none in the first line.
        kind (`str`): Such as `"deletion"`.
        time (`str`): When the line was written, UTC.
        before (`str`): Digest of the system before, over its stages.
        after (`str`): Digest of the system after.
        removed (`dict[str, str]`): Stages that went, and the digests of their adapters.
        exported (`dict[str, str]`): Stages handed out.
        counts (`dict[str, int]`): Of `examples` and `groups` named, and of stages `removed`, `exported` and `left`.
        versions (`dict[str, str]`): Of Python and the libraries.
        signed (`str`): When this was signed, of `SIGNED`.
        signed_time (`str`): That moment, UTC.
        left (`dict[str, str]`, *optional*): Stages that stay.
        history (`tuple[str, ...]`, *optional*): The hashes of all lines before, oldest first.
        ids (`tuple[str, ...]`, *optional*): Keyed digests of the ids.
        groups (`tuple[str, ...]`, *optional*): Keyed digests of the groups that were named.
        line_signed (`str`, *optional*): Of a receipt, when the line itself was signed; `None` where it was not.
        audits (`tuple[dict, ...]`): What audits of stages that stayed came to.
        person ([`~hf_s3t.signing.person.Commitment`], *optional*): For whom the receipt is.
    """

    system: str
    line: int
    hash: str
    previous: tuple[str, ...]
    kind: str
    time: str
    before: str
    after: str
    removed: Mapping[str, str]
    exported: Mapping[str, str]
    counts: Mapping[str, int]
    versions: Mapping[str, str]
    signed: str
    signed_time: str
    left: Mapping[str, str] | None = None
    history: tuple[str, ...] | None = None
    ids: tuple[str, ...] | None = None
    groups: tuple[str, ...] | None = None
    line_signed: str | None = None
    audits: tuple[Mapping[str, Any], ...] = field(default=())
    person: Commitment | None = None

    def to_payload(self) -> bytes:
        """The statement as the bytes that are signed."""
        predicate: dict[str, Any] = {
            "version": RECEIPT_VERSION,
            "system": self.system,
            "line": {
                "number": self.line,
                "hash": self.hash,
                "previous": self.previous,
                "kind": self.kind,
                "time": self.time,
            },
            "signed": {"when": self.signed, "time": self.signed_time},
            "counts": dict(self.counts),
            "removed": _listed(self.removed),
            "exported": _listed(self.exported),
            "versions": dict(self.versions),
            "audits": [dict(one) for one in self.audits],
        }
        optional = {
            "left": None if self.left is None else _listed(self.left),
            "history": self.history,
            "ids": self.ids,
            "groups": self.groups,
            "line_signed": self.line_signed,
            "person": None if self.person is None else self.person.to_record(),
        }
        predicate |= {name: value for name, value in optional.items() if value is not None}
        subject = [{"name": f"system {name}", "digest": {"sha256": getattr(self, name)}} for name in _SUBJECTS]
        return compact(
            {
                "_type": STATEMENT_TYPE,
                "subject": subject,
                "predicateType": PREDICATE_TYPE,
                "predicate": predicate,
            }
        )

    @classmethod
    def from_payload(cls, payload: bytes) -> "Statement":
        """
        What signed bytes say. Fields that are not known are passed over, as in-toto asks.

        Raises:
            [`~hf_s3t.errors.ReceiptError`]: If they say anything that no receipt of this version says.
        """
        whole = Fields(parse_object(payload, "What was signed"))
        _require_version(whole.text("_type"), whole.text("predicateType"))
        subjects = {one.text("name"): one.below("digest").digest("sha256") for one in whole.each("subject")}
        if subjects.keys() != {f"system {name}" for name in _SUBJECTS} or len(whole.each("subject")) != len(_SUBJECTS):
            raise ReceiptError(
                "The receipt's subject is not a system before and after: it was made by another program. Ask its "
                "issuer for one by hf_s3t."
            )
        told = whole.below("predicate")
        line, signed = told.below("line"), told.below("signed")
        found = cls(
            system=told.word("system"),
            line=line.number("number"),
            hash=line.digest("hash"),
            previous=line.digests("previous"),
            kind=line.word("kind"),
            time=line.time("time"),
            before=subjects["system before"],
            after=subjects["system after"],
            removed=told.stages("removed"),
            exported=told.stages("exported"),
            counts=told.counts("counts"),
            versions=told.words("versions"),
            signed=signed.word("when"),
            signed_time=signed.time("time"),
            left=told.stages("left") if told.has("left") else None,
            history=told.digests("history") if told.has("history") else None,
            ids=told.digests("ids") if told.has("ids") else None,
            groups=told.digests("groups") if told.has("groups") else None,
            line_signed=told.word("line_signed") if told.has("line_signed") else None,
            audits=tuple(map(_audit, told.each("audits"))),
            person=_commitment(told.below("person")) if told.has("person") else None,
        )
        contradiction = _contradiction(found)
        if contradiction is not None:
            raise ReceiptError(f"The receipt contradicts itself: {contradiction}. Ask its issuer for another.")
        return found

    def sentence(self) -> str:
        """What it says, in words that follow a colon."""
        what = f"line {self.line} of the ledger of system {self.system} is"
        if self.kind == "deletion":
            said = (
                f"a deletion of {counted(self.counts['examples'], 'example')} on {self.time}, by which "
                f"{counted(self.counts['removed'], 'stage')} went and {self.counts['left']} stayed"
            )
        elif self.kind == "export":
            said = f"an export of {counted(self.counts['exported'], 'stage')} on {self.time}"
        else:
            said = f"of the kind {self.kind}, written on {self.time}"
        when = {"written": "with the line", "later": f"later, on {self.signed_time}", "receipt": self.signed_time}
        equal, differing = (sum(one[name] for one in self.audits) for name in ("equal", "differing"))
        audited = f"; trained again, {equal} came out the same and {differing} not" if self.audits else ""
        return f"{what} {said}; signed {when[self.signed]}{audited}"


_SUBJECTS = ("before", "after")
_COUNTED = ("examples", "groups", "removed", "exported", "left")


def _require_version(statement: str, predicate: str) -> None:
    if statement == STATEMENT_TYPE and predicate == PREDICATE_TYPE:
        return
    version = re.fullmatch(re.escape(_FAMILY) + "([0-9]{1,9})", predicate)
    if version is None or statement != STATEMENT_TYPE:
        raise ReceiptError("What was signed is no receipt of a deletion, but something else. Ask for the receipt.")
    raise ReceiptError(
        f"The receipt is of version {version[1]}; this hf_s3t reads version {RECEIPT_VERSION}. Update hf_s3t "
        "(`pip install -U hf_s3t`)."
    )


def _listed(stages: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"stage": one, **place_of(one), "adapter_sha256": stages[one]} for one in sorted(stages)]


def _audit(told: Fields) -> dict[str, Any]:
    return {
        "time": told.time("time"),
        "by": told.digest("by"),
        "equal": told.number("equal"),
        "differing": told.number("differing"),
        "envelope": told.digest("envelope"),
    }


def _commitment(told: Fields) -> Commitment:
    if told.word("scheme") != SCHEME or told.word("names") not in ("id", "group"):
        raise ReceiptError(
            "The receipt names a person in a way that this hf_s3t does not know. Update hf_s3t "
            "(`pip install -U hf_s3t`)."
        )
    return Commitment(told.word("names"), told.digest("value"))


def _contradiction(found: Statement) -> str | None:
    """What in a statement does not fit together: it was signed, and by a program that computes otherwise."""
    counts = found.counts
    if not set(_COUNTED) <= counts.keys() or found.line < 1 or found.signed not in SIGNED:
        return "a count, the line or the moment of signing is none that there is"
    if len(found.removed) != counts["removed"] or len(found.exported) != counts["exported"]:
        return "it lists other stages than it counts"
    if found.left is not None and not _fits_subjects(found):
        return "the stages that stayed, and those that went, are not the systems that it is about"
    if found.history is not None:
        followed = found.previous[:1] == found.history[-1:] or len(found.previous) > 1
        if len(found.history) != found.line - 1 or not followed or not set(found.previous) <= set(found.history):
            return "its history is not that of its line"
    for listed, name in ((found.ids, "examples"), (found.groups, "groups")):
        if listed is not None and len(listed) != counts[name]:
            return "it lists other digests than it counts"
    return None


def _fits_subjects(found: Statement) -> bool:
    left = found.left or {}
    return (
        len(left) == found.counts["left"]
        and stages_digest(left) == found.after
        and stages_digest({**left, **found.removed}) == found.before
    )
