"""What a deletion did, for who asked for it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class UnlearningReport:
    """
    What one call of `unlearn` did.

    Args:
        requested (`int`): Number of distinct ids asked for, groups resolved to their members.
        deleted (`int`): How many of them were deleted by this call.
        already_deleted (`int`): How many the ledger knew as deleted before.
        duplicates (`tuple[int | str, ...]`):
            Examples that are still in and whose content equals that of one deleted by this call. Their ids are told to
            the caller and written nowhere; `unlearn` of these ids deletes them too.
        stages_removed (`tuple[str, ...]`): The stages that went, as `shard-0/2-0-1`.
        depths_before (`list[int]`): Per shard the depth of the stack that served before the call.
        depths_after (`list[int]`): The same after the call; 0 means the shard has left the ensemble.
        is_exhausted (`bool`): Whether no shard is left.
        seconds (`float`): Duration of the call.
        lock_seconds (`float`): How long the routing lock was held, all that a concurrent call can feel.
        deleted_groups (`tuple[int | str, ...]`):
            The groups among those asked for that were deleted before: none of their examples is known any more.
        unknown (`int`): How many ids were never trained on, and passed over by `missing="ignore"`.
        unknown_groups (`int`): The same of groups.
    """

    requested: int
    deleted: int
    already_deleted: int
    stages_removed: tuple[str, ...]
    depths_before: list[int]
    depths_after: list[int]
    is_exhausted: bool
    seconds: float
    lock_seconds: float
    duplicates: tuple[int | str, ...] = ()
    deleted_groups: tuple[int | str, ...] = ()
    unknown: int = 0
    unknown_groups: int = 0
