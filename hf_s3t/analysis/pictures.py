"""What all pictures have in common: colours, panels, legends and files, by matplotlib."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import ConfigError


SUFFIXES = (".png", ".svg")
# Colours that are told apart in print and with any colour vision (Okabe and Ito).
OURS, SISA, PAPER, FIRST = "#0072B2", "#D55E00", "#000000", "#009E73"
MORE = ("#CC79A7", "#E69F00", "#56B4E9", "#999999")


def check_picture(path: str | Path, make_folder: bool = False) -> None:
    """
    Check, before anything is computed, that a picture can be drawn into a file.

    Args:
        path (`str` or `Path`):
            The file.
        make_folder (`bool`, defaults to `False`):
            Whether its folder is made when there is something to write: it is enough then that it can be.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If it is no PNG or SVG file by its name, its folder is not there, or matplotlib
            is not installed.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"Pictures are drawn as {' or '.join(SUFFIXES)}, got {path.name!r}. Name the file so.")
    folder = path.absolute().parent
    if make_folder and not folder.exists():
        folder = next(parent for parent in folder.parents if parent.exists())
        if not folder.is_dir():
            raise ConfigError(f"{path.parent} cannot be made: {folder} is no folder. Name another.")
    if not folder.is_dir():
        raise ConfigError(f"{path.parent} is no folder that is there. Make it first, or name another.")
    new_figure(1, (1, 1))


def new_figure(panels: int, size: tuple[float, float], columns: int | None = None) -> tuple[Any, list[Any]]:
    """
    An empty figure with panels beside each other.

    Args:
        panels (`int`):
            How many.
        size (pair of `float`):
            Width and height in inches.
        columns (`int`, *optional*):
            Panels in a row; all of them if not given.

    Returns:
        The figure and the list of its axes.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If matplotlib is not installed.
    """
    try:
        # Not pyplot, which holds figures and looks for a screen.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "Pictures are drawn by matplotlib, which is not installed. In the checkout of hf_s3t, run "
            '`pip install -e ".[figures]"`.'
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    columns = columns or panels
    return figure, [figure.add_subplot(panels // columns, columns, number + 1) for number in range(panels)]


def finish(*panels: Any, legends: bool = True) -> None:
    """Give panels a grid and, unless they get a shared one, legends."""
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.title.set_fontsize(10.5)
        if legends:
            axes.legend(fontsize=8)


def plain_numbers(*log_axes: Any) -> None:
    """Ticks at 1, 2 and 5 times the powers of ten, written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in log_axes:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def shared_legend(figure: Any, panels: Iterable[Any], columns: int) -> None:
    """One legend for all panels, below them, where it covers nothing."""
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, fontsize=8)


def save(figure: Any, path: str | Path) -> None:
    """Write a figure; the same numbers give the same file, whenever they are drawn."""
    path = Path(path)
    if path.suffix.lower() == ".svg":
        figure.savefig(path, metadata={"Date": None})
        return
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    with Image.open(buffer) as image:
        # A picture of lines needs no more than a palette, and a third of the bytes.
        few = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
