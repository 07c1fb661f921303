"""Which examples are meant by ids and groups that somebody names: those that are in, the deleted, and the unknown."""

from collections.abc import Iterable, Mapping, Sequence

from ..errors import UnknownExampleError
from .digests import KeptNames
from .examples import ExampleTable
from .ledger import Ledger
from .request import RequestedExamples, listed, some


def resolve_names(
    table: ExampleTable,
    ids: Iterable[int | str] | None,
    groups: Iterable[int | str] | None,
    ledger: Ledger,
    names: KeptNames,
    ignore_unknown: bool = False,
) -> RequestedExamples:
    """
    The examples that a request names, checked all before any is acted on.

    Args:
        table ([`~hf_s3t.records.examples.ExampleTable`]): The examples that are in.
        ids (iterable, *optional*): Example ids.
        groups (iterable, *optional*): Group names; all members are meant.
        ledger ([`~hf_s3t.records.ledger.Ledger`]): What was deleted before.
        names ([`~hf_s3t.records.digests.KeptNames`]): How the system keeps ids and groups.
        ignore_unknown (`bool`, defaults to `False`): Pass over ids and groups that were never trained on.

    Raises:
        [`~hf_s3t.errors.ExampleIdError`]: If `ids` or `groups` is no list of ids.
        [`~hf_s3t.errors.UnknownExampleError`]: If an id or group was never trained on.
    """
    given, named_groups = listed(ids, "ids"), listed(groups, "groups")
    wanted = dict(zip(find_ids(table, given, ledger, names), given, strict=True))
    named = {_find_group(table, group, ledger, names): group for group in named_groups}
    sizes = dict(zip(named, table.sizes_of_groups([*named]).tolist(), strict=True))
    deleted_groups, unknown_groups = _parted(
        {kept: group for kept, group in named.items() if not sizes[kept]},
        [names.group_digest(kept) in ledger.deleted_groups for kept in named if not sizes[kept]],
    )
    if unknown_groups and not ignore_unknown:
        has_any = table.groups or ledger.deleted_groups
        hint = "name them as there" if has_any else "this system has none, so name examples by their ids"
        raise UnknownExampleError(
            f"Unknown groups: {some(unknown_groups)}. Groups are the values of `group_column` at the first "
            f"training: {hint}."
        )
    for member in table.columns.kept(table.rows_of_groups([*named])):
        wanted.setdefault(member, member)
    is_in = (table.rows_of([*wanted]) >= 0).tolist()
    absent = {kept: wanted[kept] for kept, there in zip(wanted, is_in, strict=True) if not there}
    deleted, unknown = _parted(absent, [digest in ledger.deleted for digest in names.id_digests([*absent])])
    if unknown and not ignore_unknown:
        raise UnknownExampleError(
            f"Unknown ids: {some(unknown)}. {'' if names.are_digests else _id_hint(table)}Name examples by the "
            "ids that they had at the first training."
        )
    return RequestedExamples(
        [kept for kept, there in zip(wanted, is_in, strict=True) if there],
        len(deleted),
        [group for group in named if sizes[group]],
        tuple(deleted_groups),
        len(unknown),
        len(unknown_groups),
    )


def find_ids(table: ExampleTable, given: Sequence[int | str], ledger: Ledger, names: KeptNames) -> list[int | str]:
    """What stands in the table, or stood there, for ids. Where that is a digest, it may be given itself."""
    if not names.are_digests:
        return list(given)
    is_in = (table.rows_of(given) >= 0).tolist()
    return [
        one if there or one in ledger.deleted else names.of_id(one) for one, there in zip(given, is_in, strict=True)
    ]


def _find_group(table: ExampleTable, given: int | str, ledger: Ledger, names: KeptNames) -> int | str:
    if names.are_digests and (given in table.groups or given in ledger.deleted_groups):
        return given
    return names.of_group(given)


def _id_hint(table: ExampleTable) -> str:
    sample = next(iter(table.rows), None)
    if sample is None:
        return ""
    # A text may be somebody's name or address.
    kind = "texts" if isinstance(sample, str) else f"integers such as {sample}"
    return f"The ids of this system are {kind}. "


def _parted(
    absent: Mapping[int | str, int | str], are_deleted: Iterable[bool]
) -> tuple[list[int | str], list[int | str]]:
    """What was named and is not in, by what would stand for it in the table: the deleted, and the unknown."""
    told = list(zip(absent.values(), are_deleted, strict=True))
    return [given for given, was_in in told if was_in], [given for given, was_in in told if not was_in]
