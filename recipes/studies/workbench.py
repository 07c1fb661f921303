"""Systems of every method on one recipe's model and data in a work folder: trained once, copied, deleted from."""

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import image_task, text_task
from common.base_models import check_model_is_given
from common.classification import EvaluationSet, quiet
from common.images import Shown
from common.options import Options
from common.results import settings_of
from common.scores import score
from common.texts import tokenize
from datasets import Dataset
from transformers import DataCollatorWithPadding, DefaultDataCollator

from hf_s3t import S3TConfig
from hf_s3t.baselines import METHODS, Method, use_public_secret
from hf_s3t.errors import ConfigError
from hf_s3t.folder.files import write_atomically, write_checked_json
from hf_s3t.folder.layout import CONFIG_FILE, STAGES
from hf_s3t.folder.system import SystemFolder
from hf_s3t.plan import Plan, StageKey


RECIPES = {"image": image_task, "text": text_task}
# Images of a data set that are kept in memory as the model takes them, at most so many numbers.
_MOST_NUMBERS = 2**27


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a recipe trains: rows, a fresh base model, and what the trainer needs beside them."""

    task: Any
    train: Dataset
    evaluation: EvaluationSet
    model: torch.nn.Module
    data_collator: Callable
    processing_class: Any
    config: S3TConfig


class Workbench:
    """
    Trains systems of all methods by one recipe, keeps them and what was measured of them, and deletes from copies.

    Args:
        recipe (`str`): `"image"` or `"text"`, by whose options the rest is read.
        argv (sequence of `str`): The recipe's command line.
        work_dir (`Path`): Where systems and measurements are kept.
    """

    def __init__(self, recipe: str, argv: Sequence[str], work_dir: Path):
        quiet()
        self.work_dir = Path(work_dir)
        self.recipe = RECIPES[recipe]
        self.options: Options = self.recipe.read([*argv, "--output_dir", str(self.work_dir / "systems")])
        check_model_is_given(self.options.script.model_name_or_path, self.recipe.EXAMPLE_MODEL)
        self.settings = settings_of(self.options)

    @cached_property
    def loaded(self) -> Loaded:
        """Rows and model, when something is first trained or measured."""
        task = self.recipe.task_of(self.options)
        found = self._images(task) if self.recipe is image_task else self._texts(task)
        # Deleted rows stay in a study's data, so the number of a row names it.
        return dataclasses.replace(found, config=dataclasses.replace(self.options.s3t, id_column=None))

    @property
    def ids(self) -> range:
        """The ids of the rows to train on."""
        return range(len(self.loaded.train))

    def _images(self, task: Any) -> Loaded:
        options = self.options
        task, train, sets = image_task.load_rows(options, task)
        processor = image_task.load_processor(options)
        evaluation = image_task.evaluation_set(next(iter(sets.values())), options, None)
        plain = Shown(processor, task)
        if options.script.augmentation == "none":
            train = as_pixels(train, plain)
        else:
            train.set_transform(Shown(processor, task, task.padding, options.script.augmentation == "crop-flip"))
        evaluation = dataclasses.replace(evaluation, dataset=as_pixels(evaluation.dataset, plain))
        model = image_task.load_model(options, task)
        return Loaded(task, train, evaluation, model, DefaultDataCollator(), processor, options.s3t)

    def _texts(self, task: Any) -> Loaded:
        options = self.options
        task, train, sets = text_task.load_rows(options, task)
        tokenizer = text_task.load_tokenizer(options)
        train = tokenize(train, tokenizer, options)
        rows = next(iter(sets.values()))
        tokens = tokenize(rows.dataset, tokenizer, options, keep=())
        model = text_task.load_model(options, task, tokenizer)
        collator = DataCollatorWithPadding(tokenizer)
        evaluation = dataclasses.replace(rows, dataset=tokens)
        return Loaded(task, train, evaluation, model, collator, tokenizer, options.s3t)

    # Systems

    def method(self, name: str, folder: Path, config: S3TConfig | None = None) -> Method:
        """
        A method on a folder.

        Args:
            name (`str`): A key of `METHODS`.
            folder (`Path`): Its folder.
            config (`S3TConfig`, *optional*): Its settings; the recorded ones if not given.
        """
        args = copy.copy(self.options.training)
        args.output_dir = str(folder)
        # What is compared has its rows in the same places.
        use_public_secret(folder)
        return METHODS[name](
            copy.deepcopy(self.loaded.model),
            args,
            train_dataset=self.loaded.train,
            data_collator=self.loaded.data_collator,
            processing_class=self.loaded.processing_class,
            peft_config=copy.deepcopy(self.options.lora),
            s3t_config=config,
        )

    def trained(self, name: str, **changes: Any) -> Method:
        """
        A trained system of a method, from the work folder if it is there.

        Args:
            name (`str`): A key of `METHODS`.
            **changes: Fields of `S3TConfig` that differ from the command line's.
        """
        config = dataclasses.replace(self.loaded.config, **changes)
        label = "-".join([name, *(f"{field}={_short(value)}" for field, value in sorted(changes.items()))])
        method = self.method(name, self.work_dir / "systems" / label, config)
        method.train()
        return method

    def copy_of(
        self, name: str, source: Method, label: str, shards: Sequence[int] | None = None, **changes: Any
    ) -> Method:
        """
        A method on a copy of a trained system, to delete from.

        Args:
            name (`str`): A key of `METHODS`.
            source (`Method`): The trained system.
            label (`str`): Names the copy; an older one of the name is replaced.
            shards (sequence of `int`, *optional*): Copy the stages of these shards only; the others do not answer.
            **changes: As in [`served_subset`].
        """
        target = self.work_dir / "copies" / label
        shutil.rmtree(target, ignore_errors=True)
        served_subset(source.output_dir, target, shards=shards, **changes)
        return self.method(name, target)

    def settings_of_study(self, systems: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
        """
        What decides a study: the recipe's settings, but of the systems that were trained, not of the recipe's own.

        Args:
            systems (sequence of pairs):
                Per system its method, a key of `METHODS`, and the fields of `S3TConfig` that differ from the command
                line's, as in [`Workbench.trained`].

        Returns:
            `dict[str, Any]`: As the recipe's settings. `s3t` holds the fields that all systems share, and `systems`
            for each its method and the fields that they do not share.
        """
        configs = [
            METHODS[name]._layout.settings(dataclasses.replace(self.loaded.config, **changes)).to_dict()
            for name, changes in systems
        ]
        shared = {field: value for field, value in configs[0].items() if all(c[field] == value for c in configs)}
        own = [{field: value for field, value in config.items() if field not in shared} for config in configs]
        # A study has methods of its own, whatever `--method` says.
        script = {name: value for name, value in self.settings["script"].items() if name != "method"}
        return {
            **self.settings,
            "script": script,
            "s3t": shared,
            "systems": [{"method": name, **fields} for (name, _), fields in zip(systems, own, strict=True)],
        }

    # Measurements

    def quality(self, method: Method, depth: int | None = None) -> float:
        """The task's main metric, on the rows to evaluate on."""
        rows = self.loaded.evaluation
        scores = method.predict(rows.dataset, depth=depth).predictions
        return next(iter(score(scores, rows.references, rows.questions, self.loaded.task).values()))

    @property
    def metric(self) -> str:
        """Name of the task's main metric."""
        return self.loaded.task.metrics[0]

    @property
    def quality_of_guessing(self) -> float:
        """What is left of the main metric when nothing answers: the share of the commonest class, for accuracies."""
        if self.metric not in ("accuracy", "copa"):
            return 0.0
        _, counts = np.unique(self.loaded.evaluation.references, return_counts=True)
        return float(counts.max() / counts.sum())

    def kept(self, label: str, measure: Callable[[], Any], **settings: Any) -> Any:
        """
        A measurement, from the work folder if it was made before under the same settings.

        Args:
            label (`str`): Names the measurement.
            measure (callable): Makes it; what it returns is JSON.
            **settings: What decides it beside the recipe's options.

        Raises:
            [`~hf_s3t.errors.ConfigError`]: If one of the name was made under other settings.
        """
        path = self.work_dir / "measurements" / f"{label}.json"
        now = json.loads(json.dumps({"recipe": self.settings, **settings}))
        if path.is_file():
            found = json.loads(path.read_text())
            if found["settings"] != now:
                raise ConfigError(
                    f"{path} was measured under other settings. Choose another `--work_dir`, or remove the file to "
                    "measure again."
                )
            return found["measured"]
        measured = json.loads(json.dumps(measure()))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps({"settings": now, "measured": measured}, indent=1) + "\n").encode())
        return measured


def as_pixels(dataset: Dataset, shown: Shown) -> Dataset:
    """
    Rows whose images are stored as the model takes them, so that no epoch prepares them again.

    Only where no augmentation changes them, and where they are small; others are prepared with every batch.
    """
    columns = [shown.task.image_column]
    one = shown(dataset.with_format(None)[:1])["pixel_values"][0]
    if one.numel() * len(dataset) > _MOST_NUMBERS:
        return dataset.with_transform(shown)
    stored = dataset.with_format(None).map(
        lambda batch: {"pixel_values": torch.stack(shown(batch)["pixel_values"]).numpy()},
        batched=True,
        remove_columns=columns,
    )
    return stored.with_transform(_as_tensors)


def _as_tensors(batch: dict[str, list]) -> dict[str, Any]:
    pixels = torch.tensor(np.asarray(batch["pixel_values"], dtype=np.float32))
    return {"pixel_values": list(pixels), "labels": batch["labels"]}


def _short(value: Any) -> str:
    return str(value).replace(" ", "").replace("/", "_")


# Smaller budgets from the stages of a larger one


def check_budgets(config: S3TConfig, budgets: Sequence[int]) -> None:
    """
    Refuse budgets whose stages are not among those of the largest, before that is trained.

    Args:
        config ([`~hf_s3t.S3TConfig`]): The system, but for its budget.
        budgets (sequence of `int`): Numbers of sequences per shard.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: With the first that is not, and those that are.
    """

    def stages(budget: int) -> set[StageKey]:
        return {*Plan.from_config(dataclasses.replace(config, budget=budget)).stages()}

    largest = max(budgets)
    there = stages(largest)
    fitting = [budget for budget in range(1, largest + 1) if stages(budget) <= there]
    for budget in sorted(budgets):
        if budget not in fitting:
            raise ConfigError(
                f"Budget {budget} has sequences that {largest}, the largest, does not have, so its system cannot be "
                f"served from that one's stages. Choose among {', '.join(map(str, fitting))}, or another rule by "
                "`--sequence_selection`, such as cyclic-paper."
            )


def served_subset(source: Path, target: Path, *, shards: Sequence[int] | None = None, **changes: Any) -> Path:
    """
    A system of fewer sequences from the stages of one with more.

    A stage depends on its prefix alone, so what a smaller budget would train is among what the larger one has trained,
    to the bit: it need not be trained again. Stages are linked, not copied, where the file system can.

    Args:
        source (`Path`): The folder of the trained system.
        target (`Path`): The new folder.
        shards (sequence of `int`, *optional*): Take the stages of these shards only; the others have none.
        **changes: Fields of `S3TConfig` that differ: `budget`, `sequence_selection` or `select`.

    Returns:
        `Path`: The new folder.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If other fields are changed, the new folder is there, or the system lacks
            stages that the smaller one has.
    """
    others = set(changes) - {"budget", "sequence_selection", "select"}
    if others:
        raise ConfigError(
            f"{', '.join(sorted(others))} cannot be changed after training. Change budget, sequence_selection or "
            "select, or train another system."
        )
    target = Path(target)
    if target.exists():
        raise ConfigError(f"{target} is there already. Name a new folder.")
    folder = SystemFolder(source)
    config = dataclasses.replace(folder.config, **changes)
    planned = Plan.from_config(config).stages(folder.table.empty)
    wanted = [key for key in planned if shards is None or key.shard in shards]
    valid = folder.valid_stages
    missing = [key for key in wanted if key not in valid]
    if missing and not folder.ledger.num_deletions:
        raise ConfigError(
            f"{folder.path} lacks {len(missing)} of the {len(wanted)} stages that are asked for, such as "
            f"{missing[0]}. Train it with a budget whose sequences start with those of the smaller one."
        )
    (target / STAGES).mkdir(parents=True)
    for entry in folder.path.iterdir():
        if entry.is_file() and entry.name != CONFIG_FILE:
            shutil.copy2(entry, target / entry.name)
    for key in wanted:
        if key not in missing:
            shutil.copytree(folder.path / key.path, target / key.path, copy_function=_link)
    record = {**folder.record, "s3t_config": config.to_dict()}
    write_checked_json(target / CONFIG_FILE, record)
    return target


def _link(source: str, target: str) -> None:
    # A stage's files are removed, never written again, so copies may share them.
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


# Deleting


def request_order(ids: Sequence, number: int) -> list:
    """The ids in the order in which one stream of requests deletes them."""
    return [ids[i] for i in np.random.default_rng(1000 + number).permutation(len(ids))]


def delete_one_by_one(bench: Workbench, method: Method, ids: Sequence, every: int | None = None) -> dict[str, Any]:
    """
    Delete examples, one request each, until nothing answers any more, and measure whenever another stack serves.

    Args:
        bench ([`Workbench`]): Where the method comes from.
        method (`Method`): A system that may be changed.
        ids (sequence): The requests.
        every (`int`, *optional*): Measure after every so many requests too: where deletions change more than stacks.

    Returns:
        `dict[str, Any]`: `points` (request, depths and quality when they changed; no quality where nothing answers),
        `seconds` of each deletion, and `exhausted_after`, the requests it outlived plus one.
    """
    points, seconds, known = [], [], {}
    serving = _serving(method)

    def measure(request: int) -> None:
        if serving not in known or every:
            known[serving] = None if method.is_exhausted else bench.quality(method)
        points.append({"request": request, "depths": method.depths, "quality": known[serving]})

    measure(0)
    exhausted_after = None
    for request, example in enumerate(ids, start=1):
        deletion = method.unlearn([example])
        seconds.append(deletion.seconds)
        now = _serving(method)
        if now != serving or (every and request % every == 0):
            serving = now
            measure(request)
        if exhausted_after is None and not any(method.depths):
            exhausted_after = request
            if method.is_exhausted:
                break
    return {
        "points": points,
        "seconds": seconds,
        "requests": len(seconds),
        "exhausted_after": exhausted_after,
    }


def _serving(method: Method) -> tuple:
    folder = method.trainer.folder
    return folder.plan.served(folder.valid_stages, folder.config.select, folder.losses())
