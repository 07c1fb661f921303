"""
The figures of the paper that need no trained model, and what we add to them: numbers as JSON, pictures as PNG.

    python recipes/theory_figures.py --output docs/figures
"""

from collections.abc import Sequence

from common import command_line
from studies.theory_command import make_figures, make_parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute and draw."""
    make_figures(make_parser(__doc__).parse_args(arguments))


if __name__ == "__main__":
    command_line.run(main)
