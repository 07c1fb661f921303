"""
The figures of the paper that need no trained model, and what we add to them: numbers as JSON, pictures as PNG.

    python recipes/theory_figures.py --output docs/figures
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import command_line

from hf_s3t.analysis.figures import draw
from hf_s3t.analysis.paper_theory import STUDIES
from hf_s3t.analysis.pictures import check_picture


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
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.only or STUDIES:
        data_file, picture = (options.output / f"{name}.{suffix}" for suffix in ("json", options.format))
        check_picture(picture)
        started = time.perf_counter()
        if not options.redraw:
            data_file.write_text(json.dumps(STUDIES[name](), indent=1) + "\n", encoding="utf-8")
        draw(name, json.loads(data_file.read_text(encoding="utf-8")), picture)
        print(f"{picture}: {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    command_line.run(main)
