"""The figures that need no trained model as a command: its options, and what it does by them."""

import argparse
import time
from importlib.metadata import version
from pathlib import Path

from studies.figures import draw
from studies.stored import stored_data, write_data
from studies.theory import STUDIES

from hf_s3t.analysis.pictures import check_picture


def make_parser(description: str | None = None) -> argparse.ArgumentParser:
    """
    The options of the figures.

    Args:
        description (`str`, *optional*): Of the command that takes them.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/figures"), help="folder for data and pictures")
    parser.add_argument("--only", nargs="+", choices=sorted(STUDIES), help="these figures (default: all)")
    parser.add_argument("--format", choices=("png", "svg"), default="png", help="of the pictures (default: png)")
    parser.add_argument("--redraw", action="store_true", help="draw from the JSON that is there, compute nothing")
    return parser


def make_figures(options: argparse.Namespace) -> None:
    """
    Compute and draw.

    Args:
        options (`Namespace`): What [`make_parser`] read.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If a picture cannot be drawn there, or there are no numbers to draw again.
    """
    files = {
        name: [options.output / f"{name}.{suffix}" for suffix in ("json", options.format)]
        for name in options.only or STUDIES
    }
    for data_file, picture in files.values():
        if options.redraw:
            stored_data(data_file)
        check_picture(picture, make_folder=not options.redraw)
    for name, (data_file, picture) in files.items():
        started = time.perf_counter()
        if not options.redraw:
            write_data(
                data_file, {**STUDIES[name](), "versions": {n: version(n) for n in ("hf_s3t", "numpy", "scipy")}}
            )
        draw(name, stored_data(data_file), picture)
        print(f"{picture}: {time.perf_counter() - started:.1f} s")
