"""The runs behind docs/reproduction.md: what each is, and running them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

from common import image_task, instruction_task, text_task
from common.options import CONFIGS
from common.vit_pretraining import Settings, pretrain

from hf_s3t.baselines import use_public_secret
from hf_s3t.errors import ConfigError


DOCS = Path(__file__).resolve().parents[2] / "docs"
RESULTS, FIGURES = DOCS / "results", DOCS / "figures"
# Name of a recipe -> what reads its options and runs it.
RECIPES: dict[str, ModuleType] = {
    "text_classification": text_task,
    "image_classification": image_task,
    "llama_alpaca": instruction_task,
}
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


@dataclass(frozen=True)
class Run:
    """
    One command of a recipe.

    Args:
        name (`str`): Names its results file and the folder of its system.
        config (`str`): The configuration in `recipes/configs/`, without `.yaml`.
        files (`tuple[str, ...]`):
            Files to train on and, if it is another one, to evaluate on, below the data folder; none if the task brings
            its rows.
        options (`dict`): What the command sets beyond the configuration.
        recipe (`str`): A key of `RECIPES`.
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
        # The rows to choose settings by are some of those to train on.
        wanted = self.files[:1] if "validation_share" in self.options else self.files
        own = {
            "config": CONFIGS / f"{self.config}.yaml",
            "model_name_or_path": model,
            "output_dir": work_dir / self.name,
            "results_file": self.results,
            **{name: data / file for name, file in zip(("dataset_name", "eval_file"), wanted, strict=False)},
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
        *_replay(),
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


# Replay


# What an epoch of a later stage takes of the earlier slices' rows; "equal": all, but for a first stage's steps only.
SHARES = ("0", "0.25", "0.5", "1", "equal")
# The share of none had a name before there were others.
_HOW = {"0": {"stage_data": "slice"}, "0.25": {"replay": 0.25}, "0.5": {"replay": 0.5}, "1": {}}


@dataclass(frozen=True)
class ReplayTask:
    """
    A model and a data set on which the shares of replay are compared, with one published sequence a shard.

    Args:
        name (`str`): Begins the names of its runs.
        title (`str`): What tables and pictures call it.
        config (`str`), files (`tuple[str, ...]`): As in [`Run`].
        options (`dict`): What all of its runs set beyond the configuration.
        choice (`dict`): What those set beside that choose a rate, on rows that training could have had.
        tried (`tuple[float, ...]`): The rates that they choose of.
        rates (`dict[str, float]`): Share -> the rate that was chosen: the best mean over the depths.
        steps (`tuple[int, int]`): Steps of a first stage, of a run that chooses and of one that is compared.
        num_slices (`int`): L.
        metric (`str`): What is measured.
        recipe (`str`): A key of `RECIPES`.
        is_chosen (`bool`): Whether the rate of the share of all was chosen before, for the comparison with full LoRA.
        earlier (`str`, *optional*): Begins the names of runs that have the share of all already, and do for it.
    """

    name: str
    title: str
    config: str
    files: tuple[str, ...]
    options: dict[str, Any]
    choice: dict[str, Any]
    tried: tuple[float, ...]
    rates: dict[str, float]
    steps: tuple[int, int]
    num_slices: int = 3
    metric: str = "accuracy"
    recipe: str = "text_classification"
    is_chosen: bool = True
    earlier: str | None = None

    @property
    def num_shards(self) -> int:
        """Shards that each take their share of the rows."""
        return self.options["num_shards"]

    def named(self, share: str, seed: int) -> str:
        """The name of a run that is compared."""
        return f"{self.earlier if share == '1' and self.earlier else f'replay-{self.name}-{share}'}-seed{seed}"

    def chooses(self, share: str, rate: float) -> str:
        """The name of a run that a rate is chosen by."""
        return f"select-replay-{self.name}-{share}-rate{rate:g}"

    def runs(self) -> Iterator[Run]:
        """The runs that choose, then those that are compared; but for those that are there already."""
        for share in SHARES:
            for rate in () if share == "1" and self.is_chosen else self.tried:
                options = {"seed": 42, "learning_rate": rate, **self.choice}
                yield self._run(self.chooses(share, rate), share, self.steps[0], options)
        for seed in SEEDS:
            for share in SHARES:
                options = {"seed": seed, "learning_rate": self.rates[share]}
                if share != "1" or not self.earlier:
                    yield self._run(self.named(share, seed), share, self.steps[1], options)

    def _run(self, name: str, share: str, steps: int, options: dict[str, Any]) -> Run:
        how = {"max_steps": steps} if share == "equal" else _HOW[share]
        return Run(name, self.config, self.files, {"method": "s3t", **self.options, **how, **options}, self.recipe)


_CHOICE = {"validation_share": 0.2, "max_eval_samples": 500}
_DIGITS = {"budget": 1, "num_slices": 4}
_ALPACA = {"num_shards": 1, "budget": 1, "max_train_samples": 500, "skip_full_lora": True}
# Rows that choose are neither trained on nor measured by the runs that are compared.
_ALPACA_CHOICE = {"max_train_samples": 800, "eval_size": 200}


def _all(rate: float) -> dict[str, float]:
    return dict.fromkeys(SHARES, rate)


REPLAY_TASKS = (
    ReplayTask(
        "trec-m1",
        "MiniLM on TREC, m = 1",
        *TREC,
        options={"num_shards": 1, **_settings(1)},
        choice=_CHOICE,
        tried=(1e-3, 2e-3),
        rates=_all(2e-3),
        steps=(210, 210),
    ),
    ReplayTask(
        "digits-m1",
        "ViT on the digits, m = 1",
        "digits",
        (),
        options={"num_shards": 1, **_DIGITS},
        choice={"validation_share": 0.2},
        tried=(2.5e-3, 5e-3, 1e-2, 2e-2),
        rates={**_all(5e-3), "1": 1e-2},
        steps=(48, 64),
        num_slices=4,
        recipe="image_classification",
        is_chosen=False,
    ),
    ReplayTask(
        "digits-m5",
        "ViT on the digits, m = 5",
        "digits",
        (),
        options={"num_shards": 5, **_DIGITS},
        choice={"validation_share": 0.2},
        tried=(5e-3, 1e-2, 2e-2, 4e-2),
        rates={**_all(1e-2), "0.25": 2e-2, "equal": 2e-2},
        steps=(16, 16),
        num_slices=4,
        recipe="image_classification",
        is_chosen=False,
    ),
    ReplayTask(
        "alpaca-m1",
        "a small Llama on Alpaca, m = 1",
        "stories260k",
        ("alpaca/alpaca_union.jsonl",),
        options=_ALPACA,
        choice=_ALPACA_CHOICE,
        tried=(2e-3, 4e-3),
        rates=_all(2e-3),
        steps=(39, 24),
        num_slices=4,
        metric="loss",
        recipe="llama_alpaca",
        is_chosen=False,
    ),
    ReplayTask(
        "trec-m5",
        "MiniLM on TREC, m = 5",
        *TREC,
        options={"num_shards": 5, **_settings(5)},
        choice=_CHOICE,
        tried=(1e-3, 2e-3),
        rates=_all(2e-3),
        steps=(170, 170),
        earlier="trec-s3t-m5",
    ),
    ReplayTask(
        "sst2-m1",
        "MiniLM on SST-2, m = 1",
        *SST2,
        options={"num_shards": 1, **_settings(1)},
        choice=_CHOICE,
        tried=(5e-4, 1e-3),
        rates=_all(5e-4),
        steps=(210, 210),
        earlier="sst2-s3t-m1",
    ),
    # As everywhere for SST-2, with five shards at the rates of one.
    ReplayTask(
        "sst2-m5",
        "MiniLM on SST-2, m = 5",
        *SST2,
        options={"num_shards": 5, **_settings(5)},
        choice=_CHOICE,
        tried=(),
        rates=_all(5e-4),
        steps=(170, 170),
        earlier="sst2-s3t-m5",
    ),
)


def _replay() -> Iterator[Run]:
    for task in REPLAY_TASKS:
        yield from task.runs()


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def run_all(names: Sequence[str], *, minilm: str, data: Path, work_dir: Path, workers: Sequence[str] = ()) -> None:
    """
    Run, one after the other, the runs that are named and not done.

    Args:
        names (sequence of `str`): Patterns of their names.
        minilm (`str`): The folder of MiniLM.
        data (`Path`): The folder with the sets, and the small Llama.
        work_dir (`Path`): Where systems go.
        workers (sequence of `str`, *optional*): The recipes' options of workers.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If a pattern names no run.
    """
    for pattern in names:
        if not any(fnmatch(run.name, pattern) for run in runs()):
            raise ConfigError(
                f"{pattern!r} names no run. `reproduce.py list` shows their names; * stands for anything."
            )
    chosen = [run for run in runs() if any(fnmatch(run.name, pattern) for pattern in names)]
    for run in chosen:
        if run.is_done:
            continue
        model = minilm
        if run.recipe == "llama_alpaca":
            model = str(data / "stories260K")
        elif run.recipe == "image_classification":
            images = data / run.files[0] if run.files else None
            model = small_vit(work_dir / f"{run.config}-vit", run.config, images)
        # The data is public, and methods are compared: their rows lie in the same places.
        use_public_secret(work_dir / run.name)
        RECIPES[run.recipe].main([*run.arguments(model, data, work_dir), *workers])
        shorten(run.results)


# What the vision transformer of a configuration is pretrained on, and how.
_PRETRAINED: dict[str, dict[str, Any]] = {
    "small_vit_cifar10": {"task_name": "cifar10", "image_size": 32, "patch_size": 4, "hidden_size": 128, "epochs": 60},
    "digits": {"task_name": "digits", "share": 0.35, "hidden_size": 64, "epochs": 150, "learning_rate": 2e-3},
}


def small_vit(folder: Path, config: str, images: Path | None) -> str:
    """A vision transformer pretrained on a part of the images, made once."""
    if not (folder / "config.json").is_file():
        pretrain(Settings(str(folder), dataset_name=images and str(images), **_PRETRAINED[config]))
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
