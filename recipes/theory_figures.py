"""
The figures of the paper that need no trained model, and what we add to them: numbers as JSON, pictures as PNG.

    python recipes/theory_figures.py --output docs/figures
"""

import argparse
import json
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import command_line
from studies.pictures_of_theory import draw
from studies.theory import STUDIES

from hf_s3t.analysis.pictures import check_picture
from hf_s3t.errors import ConfigError


def make_parser() -> argparse.ArgumentParser:
    """The options of this study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/figures"), help="folder for data and pictures")
    parser.add_argument("--only", nargs="+", choices=sorted(STUDIES), help="these figures (default: all)")
    parser.add_argument("--format", choices=("png", "svg"), default="png", help="of the pictures (default: png)")
    parser.add_argument("--redraw", action="store_true", help="draw from the JSON that is there, compute nothing")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute and draw."""
    options = make_parser().parse_args(arguments)
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


def write_data(path: Path, data: dict[str, Any]) -> None:
    """Write the numbers of a figure; its folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def stored_data(path: Path) -> dict[str, Any]:
    """
    The numbers of a figure that were written before.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If there are none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"There is no {path} to draw from. Run the study without --redraw.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON ({error}). Run the study without --redraw.") from error


if __name__ == "__main__":
    command_line.run(main)
