"""Systems of every method on one recipe's model and data in a work folder: trained once, copied, measured."""

import argparse
import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import image_task, text_task
from common.base_models import check_model_is_given
from common.classification import EvaluationSet, quiet
from common.images import Shown
from common.options import Options, known_options
from common.results import settings_of
from common.scores import score
from common.texts import tokenize
from common.workers import train_over_workers
from datasets import Dataset
from studies.subsets import served_subset
from transformers import DataCollatorWithPadding, DefaultDataCollator

from hf_s3t import S3TConfig
from hf_s3t.baselines import METHODS, Method, use_public_secret
from hf_s3t.errors import ConfigError
from hf_s3t.folder.files import write_atomically


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
    Trains systems of all methods by one recipe, keeps them and what was measured of them, and makes copies.

    Args:
        recipe (`str`): `"image"` or `"text"`, by whose options the rest is read.
        argv (sequence of `str`): The recipe's command line.
        work_dir (`Path`): Where systems and measurements are kept.
    """

    def __init__(self, recipe: str, argv: Sequence[str], work_dir: Path):
        quiet()
        # By these a worker makes it anew.
        self._made_of = recipe, list(argv), Path(work_dir).absolute()
        self.work_dir = Path(work_dir)
        self.recipe = RECIPES[recipe]
        self.options: Options = self.recipe.read([*argv, "--output_dir", str(self.work_dir / "systems")])
        check_model_is_given(self.options.script.model_name_or_path, self.recipe.EXAMPLE_MODEL)
        if self.options.s3t.keep_idle is None:
            # The studies are of the published plans.
            self.options.s3t = dataclasses.replace(self.options.s3t, keep_idle=True)
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
        folder = self.work_dir / "systems" / label
        method = self.method(name, folder, config)
        train_over_workers(method, self.options.script, method_anew, self._made_of, name, folder, config)
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
        return kept(path, {"recipe": self.settings, **settings}, measure)


def kept(path: Path, settings: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
    """
    A measurement, from its file if it was made before under the same settings.

    Args:
        path (`Path`): The file.
        settings (mapping): What decides it.
        measure (callable): Makes it; what it returns is JSON.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If the file's was made under other settings.
    """
    now = json.loads(json.dumps(settings))
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


# What all studies do


def method_anew(bench: tuple[str, list[str], Path], name: str, folder: Path, config: S3TConfig) -> Method:
    """A method on the folder of a bench that is made anew, by a worker."""
    return Workbench(*bench).method(name, folder, config)


def open_bench(options: argparse.Namespace, others: Sequence[str]) -> Workbench:
    """
    The workbench of a study.

    Args:
        options (`Namespace`): The study's own options.
        others (sequence of `str`): The recipe's.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If one of them is unknown, with what was meant of either.
    """
    # One of the study's own options may have been meant.
    known_options(RECIPES[options.recipe].make_parser(), others, vars(options))
    return Workbench(options.recipe, others, options.work_dir)


def about(bench: Workbench, systems: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """What every study of trained systems says of what it was made with: those of `systems`, as a bench takes them."""
    return {
        "settings": bench.settings_of_study(systems),
        "metric": bench.metric,
        "train_rows": len(bench.loaded.train),
        "evaluation_rows": len(bench.loaded.evaluation.ids),
        "quality_of_guessing": bench.quality_of_guessing,
        "num_layers": bench.loaded.model.config.num_hidden_layers,
    }
