"""The paper's figures by their names: whatever it is that draws one."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from studies import pictures_beyond, pictures_of_deletions, pictures_of_studies, pictures_of_theory

from hf_s3t.analysis.pictures import check_picture, save
from hf_s3t.errors import ConfigError


# Name of the figure -> what draws its data.
DRAWERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    **pictures_of_theory.DRAWERS,
    **pictures_of_deletions.DRAWERS,
    **pictures_of_studies.DRAWERS,
    **pictures_beyond.DRAWERS,
}


def draw(name: str, data: Mapping[str, Any], path: str | Path) -> None:
    """
    Draw one of the paper's figures.

    Args:
        name (`str`):
            A key of `theory.STUDIES`, or the name of a study's figure, such as `"figure-6-left"`.
        data (mapping):
            What that study returned, or the JSON of it.
        path (`str` or `Path`):
            The picture to write, a `.png` or `.svg` file.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If there is no such figure, or no picture can be drawn there.
    """
    if name not in DRAWERS:
        raise ConfigError(f"There is no figure {name!r}; expected one of {', '.join(DRAWERS)}. Name one of them.")
    check_picture(path)
    save(DRAWERS[name](data), path)
