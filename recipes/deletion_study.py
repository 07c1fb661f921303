"""
The figures of the paper that need trained systems: quality, time and storage while examples are really deleted.

    python recipes/deletion_study.py quality --config recipes/configs/digits.yaml     # a stand-in, see there
    python recipes/deletion_study.py quality --config recipes/configs/cifar10.yaml --num_shards 5 --num_slices 4
    python recipes/deletion_study.py frontier --config recipes/configs/digits.yaml    # Figure 9 as work and quality
    python recipes/deletion_study.py gates --data DATA     # what an ensemble keeps of what one shard knows
    python recipes/deletion_study.py storage
    python recipes/deletion_study.py theory

What a study does not take is an option of `image_classification.py`, or with `--recipe text` of
`text_classification.py`. Systems and measurements stay in `--work_dir`: a study that was interrupted goes on where it
stopped, and what was measured under the same settings is not measured again. Numbers go to `--output` as JSON, beside
the picture that is drawn of them.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import command_line
from common.results import hardware
from studies import theory_command
from studies.depth import ablations, drop, layers_and_slices, run_of_results, sequential
from studies.figures import draw
from studies.frontier import frontiers
from studies.gates import PARTS, gates
from studies.lifetimes import lifetimes
from studies.quality import quality, together, weights
from studies.storage import storage
from studies.stored import stored_data, write_data
from studies.trained_stream import trained_stream
from studies.workbench import RECIPES

from hf_s3t.analysis.pictures import check_picture
from hf_s3t.errors import ConfigError
from hf_s3t.folder.versions import library_versions


# Options of studies of which none, or fewer, would leave nothing to do.
_COUNTS = (
    "budgets", "orders", "requests", "retrain_every", "stream", "max_depth", "layers", "slices", "members",
    "timing_image_size", "timing_batch_size", "streams", "stages", "shards", "authors",
)  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    """A subcommand per study, each with its options; others are the recipe's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="study", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--output", type=Path, default=Path("docs/figures"), help="folder for data and pictures")
    shared.add_argument("--format", choices=("png", "svg"), default="png", help="of the picture (default: png)")
    shared.add_argument("--redraw", action="store_true", help="draw from the JSON that is there, compute nothing")
    kept = argparse.ArgumentParser(add_help=False, parents=[shared])
    kept.add_argument(
        "--work_dir", type=Path, default=Path("runs/deletion-study"), help="where systems and measurements are kept"
    )
    trained = argparse.ArgumentParser(add_help=False, parents=[kept])
    trained.add_argument("--recipe", choices=sorted(RECIPES), default="image", help="whose options the others are")
    several = argparse.ArgumentParser(add_help=False)
    several.add_argument("--seeds", type=int, nargs="+", default=[42], help="seeds of the systems (default: 42)")
    deep = argparse.ArgumentParser(add_help=False)
    deep.add_argument(
        "--max_depth",
        type=int,
        default=6,
        help="slices of the one shard, which share the layers out (default: 6)",
    )

    def add(name: str, help_text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help_text, parents=parents, allow_abbrev=False)

    quality = add("quality", "Figure 6, left: quality against deletions", trained)
    lives = add("time", "Figure 9: time of many deletions", trained)
    for command in (quality, lives):
        command.add_argument("--budgets", type=int, nargs="+", default=[1, 2, 4, 24], help="of S3T")
        command.add_argument("--orders", type=int, default=3, help="orders of requests to delete in (default: 3)")
        command.add_argument("--requests", type=int, default=100, help="requests of each order (default: 100)")
        command.add_argument("--retrain_every", type=int, default=20, help="requests between full retrainings")
    lives.add_argument("--stream", type=int, default=1000, help="requests of a simulated stream (default: 1000)")
    measured = argparse.ArgumentParser(add_help=False)
    measured.add_argument("--rates", type=float, nargs="+", default=[1e-2, 2e-2], help="learning rates S3T chooses of")
    measured.add_argument(
        "--baseline_rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="those SISA and full choose of"
    )
    frontier = add("frontier", "Figure 9 as a frontier: quality against work", trained, several, measured)
    frontier.add_argument("--stream", type=int, default=1000, help="requests of a simulated stream (default: 1000)")
    frontier.add_argument("--streams", type=int, default=5, help="simulated streams (default: 5)")
    stream = add("stream", "a stream that is really answered by training", trained, several, measured)
    stream.add_argument("--requests", type=int, default=100, help="requests of the stream (default: 100)")
    stream.add_argument("--order", type=int, default=0, help="seed of the requests (default: 0)")
    stream.add_argument("--stages", type=int, nargs="+", default=[1, 2], help="S3T trains after each request")
    stream.add_argument("--replay", type=float, default=0.25, help="share of the earlier slices' rows (default: 0.25)")
    weights = add("weights", "Figure 15, right: weights of ProtoSISA's prototypes", trained)
    weights.add_argument("--orders", type=int, default=3, help="orders of requests to delete in (default: 3)")
    weights.add_argument("--after", type=int, nargs="+", default=[0, 10, 20, 30, 40], help="requests to measure after")
    weights.add_argument("--weights", type=float, nargs="+", default=[i / 10 for i in range(11)], help="from 0 to 1")
    drop = add("drop", "Figure 12: relative drop against deleted slices", trained, several, deep)
    drop.add_argument(
        "--results",
        type=Path,
        nargs="+",
        default=[],
        help="results files of recipes, drawn too; with --redraw in place of those that were drawn before",
    )
    slices = add("slices", "Figure 13: layers per slice, number of slices", trained, several)
    slices.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3], help="layers per slice")
    slices.add_argument("--slices", type=int, nargs="+", default=[1, 2, 3, 6], help="numbers of slices")
    sequential = add("sequential", "Figure 14: sequential training; time against layers", trained, several, deep)
    sequential.add_argument("--timing_image_size", type=int, default=112, help="images of ViT-base in the timing")
    sequential.add_argument("--timing_batch_size", type=int, default=2, help="batch of ViT-base in the timing")
    together = add("together", "Figure 16: one shard's sequences served together", trained)
    together.add_argument("--members", type=int, nargs="+", default=[1, 2, 3, 4, 8, 12, 24], help="of one shard")
    add("ablations", "Section C.2: bottom-up, and one slice per layer group", trained, several, deep)
    who_knows = add("gates", "what an ensemble keeps of what one shard knows, by gates", kept, several)
    who_knows.add_argument(
        "--data", type=Path, required=True, help="folder with stories260K/, tofu/, alpaca/, trec/, sst2/"
    )
    who_knows.add_argument("--shards", type=int, nargs="+", default=[2, 5, 8], help="numbers of shards")
    who_knows.add_argument("--authors", type=int, default=40, help="of TOFU, and as many strangers (default: 40)")
    who_knows.add_argument("--minilm", type=Path, help="folder of MiniLM, for the classifiers")
    who_knows.add_argument(
        "--systems", type=Path, default=Path("reproduction"), help="where the classifiers' systems are, or go"
    )
    who_knows.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts of the study")
    add("storage", "Table 3: storage of ViT-large, on files", kept)
    add("theory", "the figures that need no trained system, by theory_figures.py", shared)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run a study, or draw it again."""
    options, others = make_parser().parse_known_args(argv)
    if options.study == "theory":
        theory(options, others)
        return
    figure, study = STUDIES[options.study]
    data_file, picture = (options.output / f"{figure}.{suffix}" for suffix in ("json", options.format))
    if options.redraw:
        data = stored_data(data_file)
        check_picture(picture)
        if getattr(options, "results", []):
            data["runs"] = [run for run in data["runs"] if "results" not in run] + [
                run_of_results(path) for path in options.results
            ]
            write_data(data_file, data)
    else:
        check_picture(picture, make_folder=True)
        check_values(options)
        started = time.perf_counter()
        data = study(options, others)
        data["hardware"], data["versions"] = hardware(), library_versions()
        write_data(data_file, data)
        print(f"{data_file}: {time.perf_counter() - started:.0f} s")
    draw(figure, stored_data(data_file), picture)
    print(picture)


def theory(options: argparse.Namespace, others: Sequence[str]) -> None:
    """The figures that need no trained system."""
    redraw = ["--redraw"] if options.redraw else []
    given = ["--output", str(options.output), "--format", options.format, *redraw, *others]
    theory_command.make_figures(theory_command.make_parser().parse_args(given))


def check_values(options: argparse.Namespace) -> None:
    """
    Refuse values that a study would fail at when all is trained.

    Args:
        options (`Namespace`): The study's own options.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If a count is below 1, or a weight is none of a mean.
    """
    for name in _COUNTS:
        value = getattr(options, name, 1)
        least = min(value) if isinstance(value, list) else value
        if least < 1:
            raise ConfigError(f"`--{name}` is {least}, expected 1 or more. Leave it out for the default.")
    for request in getattr(options, "after", ()):
        if request < 0:
            raise ConfigError(f"`--after` is {request}, expected numbers of requests: 0 or more.")
    for weight in getattr(options, "weights", ()):
        if not 0 <= weight <= 1:
            raise ConfigError(f"`--weights` is {weight:g}, expected weights of a mean: from 0 to 1.")


# Study -> name of its figure, what computes it.
STUDIES: dict[str, tuple[str, Callable[[argparse.Namespace, Sequence[str]], dict[str, Any]]]] = {
    "quality": ("figure-6-left", quality),
    "weights": ("figure-15-weights", weights),
    "time": ("figure-9", lifetimes),
    "frontier": ("frontier", frontiers),
    "stream": ("frontier-trained", trained_stream),
    "drop": ("figure-12", drop),
    "slices": ("figure-13", layers_and_slices),
    "sequential": ("figure-14", sequential),
    "together": ("figure-16", together),
    "ablations": ("ablations", ablations),
    "gates": ("gates", gates),
    "storage": ("table-3-files", storage),
}


if __name__ == "__main__":
    command_line.run(main)
