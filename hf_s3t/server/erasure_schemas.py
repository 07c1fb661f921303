"""What who erases sends and gets."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator


Name = StrictInt | StrictStr
Names = Annotated[list[Name], Field(max_length=100_000)]
State = Literal["done", "waiting", "interrupted", "running"]


class ErasureRequest(BaseModel):
    """Examples to be forgotten, by their ids or by whole groups."""

    model_config = ConfigDict(extra="forbid")

    ids: Names | None = Field(default=None, description='Ids as the dataset has them; 17 and "17" are the same here.')
    groups: Names | None = Field(default=None, description="Groups, all of whose examples are meant.")
    include_duplicates: StrictBool = Field(
        default=False, description="Forget examples of equal content too. Otherwise the answer names them."
    )
    max_delay: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="Seconds for which it may wait for others. It is in force at once if this is left out.",
    )
    missing: Literal["error", "ignore"] = Field(
        default="error", description="`ignore` passes over what was never trained on."
    )
    on_running: Literal["wait", "cancel"] | None = Field(
        default=None,
        description="What to do with answers that run on stages which go: as the server is set if this is left out.",
    )

    @model_validator(mode="after")
    def _names_something(self) -> Self:
        if not self.ids and not self.groups:
            raise ValueError("name what to forget in `ids` or `groups`")
        if self.include_duplicates and self.max_delay is not None:
            raise ValueError(
                "`include_duplicates` does not go with `max_delay`: what is of equal content is found when it is "
                "erased. Leave one of them out"
            )
        return self

    def canonical(self) -> dict[str, Any]:
        """What is asked for, the same for two requests that ask for the same."""
        said = self.model_dump()
        return {**said, **{name: sorted(set(map(str, said[name] or []))) for name in ("ids", "groups")}}


class Erasure(BaseModel):
    """What became of a request."""

    object: Literal["erasure"] = "erasure"
    id: str
    status: State = Field(
        description="`done` is in force. `waiting` is recorded, and in force by `apply_by`. `interrupted` came to "
        "nothing, because the server died: repeat it with its key."
    )
    created: str
    apply_by: str | None = None
    requested: int = Field(description="Examples that were asked for, those of the groups included.")
    deleted: int
    already_deleted: int
    unknown: int
    unknown_groups: int
    duplicates: list[Name] | None = Field(
        default=None, description="What is still in and of equal content: told once, and written nowhere."
    )
    stages_removed: list[str]
    depths_before: list[int] | None = None
    depths_after: list[int] | None = None
    is_exhausted: bool | None = None
    seconds: float | None = None
    receipts: list[dict[str, Any]] | None = Field(
        default=None, description="The lines of the ledger that prove it; left out of lists."
    )
    signatures: list[dict[str, Any] | None] | None = Field(
        default=None, description="Of each receipt the signed envelope of its line; null where nobody signed it."
    )
    engine: dict[str, Any] | None = None


class ErasureList(BaseModel):
    """The latest requests, the newest first."""

    object: Literal["list"] = "list"
    data: list[Erasure]


class ErasurePreview(BaseModel):
    """What an erasure would do. Nothing was recorded, and nothing is changed."""

    object: Literal["erasure.preview"] = "erasure.preview"
    requested: int
    deleted: int
    already_deleted: int
    unknown: int
    unknown_groups: int
    stages: list[str]
    depths_before: list[int]
    depths_after: list[int]
    is_exhausted: bool
    deletions_left_before: float
    deletions_left_after: float
    duplicates: list[Name]
    work_to_regrow: float = Field(description="What growing the stages again costs, in full fine-tunings of all data.")


class ExampleFound(BaseModel):
    """An example that is in, or was."""

    id: Name | None
    deleted: bool
    shard: int | None = None
    slice: int | None = None
    group: Name | None = None


class ExampleList(BaseModel):
    """Examples that were asked for."""

    object: Literal["list"] = "list"
    data: list[ExampleFound]
