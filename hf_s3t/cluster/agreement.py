"""Whether workers make the same stages: what each tells of itself, compared with others and with what is recorded."""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers.utils import logging

from .. import __version__, errors
from ..errors import ClusterError, S3TError
from ..training.circumstances import differing
from ..training.parts import differing_parts, shown_parts


logger = logging.get_logger(__name__)

_SHOWN = 5


def refuse_other_version(worker: str, greeting: Mapping[str, Any]) -> None:
    """
    Refuse a worker with another hf_s3t.

    Args:
        worker (`str`): Which one.
        greeting (mapping): What it told of itself.

    Raises:
        [`~hf_s3t.errors.ClusterError`]: With both versions.
    """
    if greeting["hf_s3t"] != __version__:
        raise ClusterError(
            f"{worker} has hf_s3t {greeting['hf_s3t']}, expected {__version__} as here. Install one version on every "
            "machine."
        )


def error_from(worker: str, told: Mapping[str, Any]) -> S3TError:
    """
    What a worker raised.

    Args:
        worker (`str`): Which one.
        told (mapping): The error in words.
    """
    kind = getattr(errors, told["error"], None) if told["is_ours"] else None
    if isinstance(kind, type) and issubclass(kind, S3TError):
        return kind(f"{worker}: {told['message']}")
    return ClusterError(
        f"{worker} raised {told['error']}: {told['message']} Every worker needs base, data and code where "
        f"`make_trainer` looks for them.\n{told['where'] or ''}".rstrip()
    )


class Agreement:
    """
    What the first worker told, which all others have to tell too.

    Args:
        recorded (iterable of mappings): The records of the stages that are there.
        same_kind (`bool`): Whether workers on other hardware than recorded are refused.
    """

    def __init__(self, recorded: Iterable[Mapping[str, Any]], same_kind: bool):
        self._circumstances = [dict(record["circumstances"]) for record in recorded if "circumstances" in record]
        for one in self._circumstances:
            one.pop("data_digest", None)
        self._same_kind = same_kind
        self._first: tuple[str, Mapping[str, Any]] | None = None
        self._told: set[str] = set()

    @property
    def threads(self) -> int | None:
        """With how many threads the stages that are there were trained, if it was one number."""
        found = {one.get("threads") for one in self._circumstances}
        return found.pop() if len(found) == 1 else None

    def check(self, worker: str, statement: Mapping[str, Any]) -> None:
        """
        Refuse a worker that would make other stages.

        Args:
            worker (`str`): Which one.
            statement (mapping): By what it trains.

        Raises:
            [`~hf_s3t.errors.ClusterError`]: With what differs.
        """
        if self._first is None:
            self._first = worker, statement
        first, then = self._first
        other = [f"{n}={new!r} (there {old!r})" for n, (old, new) in _differing(then, statement, "recipe").items()]
        parts = differing_parts(then["parts"], statement["parts"])
        if parts:
            other.append(shown_parts(parts))
        if then["kind"] != statement["kind"]:
            other.append(f"a {statement['kind']} (there a {then['kind']})")
        if other:
            raise ClusterError(
                f"{worker} has another recipe than {first}: {', '.join(other)}. Have `make_trainer` give every worker "
                "the same arguments and parts."
            )
        # A slice that a deletion reached since the first one looked says nothing.
        there, here = then["rows"], statement["rows"]
        rows = sorted(p for p in there.keys() & here.keys() if there[p][0] == here[p][0] and there[p][1] != here[p][1])
        if rows:
            shown = ", ".join(rows[:_SHOWN]) + (", ..." if len(rows) > _SHOWN else "")
            raise ClusterError(
                f"{worker} has other rows than {first}, or prepares them otherwise, in the slices {shown} (of "
                "shard/slice). Have `make_trainer` give every worker the same dataset, tokenizer and preparation."
            )
        if then["folder"]["system_id"] != statement["folder"]["system_id"]:
            raise ClusterError(
                f"{worker} works on another system than {first}: its folder is another one of the same name. Mount "
                "one folder on every machine, or give `shared_folder=False`."
            )
        self._compare_kind(worker, statement["circumstances"])

    def _compare_kind(self, worker: str, circumstances: Mapping[str, Any]) -> None:
        """Tell once of workers of another kind than recorded, or refuse them."""
        present = dict(circumstances)
        if not self._circumstances:
            self._circumstances = [present]
        found = [differing(recorded, present) for recorded in self._circumstances]
        nearest = min(found, key=len)
        if not nearest:
            return
        shown = ", ".join(f"{name}={new!r} (recorded {old!r})" for name, (old, new) in nearest.items())
        if self._same_kind:
            raise ClusterError(
                f"{worker} is of another kind than the stages were trained with: {shown}. Give it what they were "
                "trained with, or leave `same_kind=True` out: its stages are right, and are audited on its kind."
            )
        if shown not in self._told:
            self._told.add(shown)
            logger.warning(
                f"{worker} is of another kind than the stages were trained with: {shown}. Its stages are right, and "
                "recorded as of its kind; an audit elsewhere may find other bits. `same_kind=True` refuses it."
            )


def _differing(then: Mapping[str, Any], now: Mapping[str, Any], name: str) -> dict[str, tuple[Any, Any]]:
    return differing(then[name], now[name])
