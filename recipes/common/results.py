"""
The results of a run as one JSON file: settings, versions, hardware, what was measured, and what it cost.

A run whose results are there already is not run again, so that a list of long runs can be started over and over. The
file lies beside the system's folder and not in it: a later deletion does not reach what was measured before.
"""

import dataclasses
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from common.forgetting import num_deletions

from hf_s3t.errors import ConfigError
from hf_s3t.folder.files import write_atomically
from hf_s3t.folder.versions import library_versions
from hf_s3t.hub.card import render_run_card


FORMAT = 1
SUFFIX = "-results.json"
# The set of rows that were left out of training, to measure with them.
HELD_OUT = "held_out"
# Where things go, and what is done after the measurement.
_NOT_SETTINGS = (
    "output_dir", "results_file", "overwrite_results", "unlearn", "unlearn_groups", "verify", "cache_dir",
    "add_file", "add_into", "eval", "eval_tasks", "eval_task_folder", "eval_limit", "measure_forgetting",
    "ray_workers", "ray_address",
)  # fmt: skip
_PATHS = ("model_name_or_path", "dataset_name", "eval_file")
# What a deletion makes void: it was measured with rows that are gone.
_MEASURED = ("metrics", "predictions", "lm_eval", "verified")


class Results:
    """
    The results file of one run.

    Args:
        options ([`~common.options.Options`]): Everything the recipe was told.
        recipe (`str`): The recipe's name.
    """

    def __init__(self, options: Any, recipe: str):
        script = options.script
        self.path = Path(script.results_file or options.training.output_dir.rstrip("/") + SUFFIX)
        self.overwrite = script.overwrite_results
        self.folder = options.training.output_dir
        self.content: dict[str, Any] = {
            "format": FORMAT,
            "recipe": recipe,
            "method": script.method,
            "seed": options.training.seed,
            "settings": settings_of(options),
            "versions": library_versions(),
            "hardware": hardware(),
            "wall_seconds": {},
        }

    def earlier(self) -> dict[str, Any] | None:
        """
        The results of the same run, if it was run before, to its end.

        Raises:
            [`~hf_s3t.errors.ConfigError`]: If the file holds the results of another run.
        """
        found = self._found()
        return found if found and "finished" in found else None

    def is_current(self, found: Mapping[str, Any]) -> bool:
        """Whether nothing was deleted since these results were measured."""
        return found.get("deletions", 0) == num_deletions(self.folder)

    def go_on(self) -> None:
        """
        Take in what the same run has kept, so that nothing of it is lost; but not what a deletion made void.

        Raises:
            [`~hf_s3t.errors.ConfigError`]: If the file holds the results of another run.
        """
        found = self._found() or {}
        self.content = {**found, **self.content, "wall_seconds": found.get("wall_seconds", {})}
        self.content.pop("finished", None)
        if not self.is_current(found):
            self.void()

    def void(self) -> None:
        """Drop what was measured with rows that are deleted now."""
        for name in _MEASURED:
            self.content.pop(name, None)

    def _found(self) -> dict[str, Any] | None:
        if self.overwrite or not self.path.is_file():
            return None
        try:
            found = json.loads(self.path.read_text())
            differing = _differing(found["settings"], json.loads(json.dumps(self.content["settings"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self.path} holds no results of a recipe ({error!r}). Choose another `--results_file`, or replace "
                "it with `--overwrite_results`."
            ) from error
        if differing:
            shown = ", ".join(f"{name}={now!r} (was {then!r})" for name, (then, now) in differing.items())
            raise ConfigError(
                f"{self.path} holds the results of another run: {shown}. Choose another `--output_dir` or "
                "`--results_file`, or replace it with `--overwrite_results`."
            )
        return found

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Note the wall time of a part of the run."""
        started = time.perf_counter()
        try:
            yield
        finally:
            wall = self.content["wall_seconds"]
            wall[name] = round(wall.get(name, 0.0) + time.perf_counter() - started, 3)

    def add(self, **parts: Any) -> None:
        """Put parts of the results in, by name."""
        self.content.update(parts)

    @property
    def card(self) -> Path:
        """Where the run's card goes."""
        return self.path.with_suffix(".md")

    def keep(self, **parts: Any) -> None:
        """Put parts in, and write them at once, so that a run that is interrupted has them when it goes on."""
        self.add(**parts)
        self._write()

    def write(self) -> dict[str, Any]:
        """Write the file of a finished run, in the first process, and return what it holds."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.add(deletions=num_deletions(self.folder), finished=now)
        self._write()
        return self.content

    def _write(self) -> None:
        if PartialState().is_main_process:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, (json.dumps(self.content, indent=1) + "\n").encode())


def settings_of(options: Any) -> dict[str, Any]:
    """
    What decides a run, as JSON: the recipe's own arguments, the system, the adapters and the training arguments.

    Files count by their contents and folders by their name, so that results from two machines can be compared.
    """
    training = options.training
    usual = type(training)(output_dir=training.output_dir, report_to="none", use_cpu=training.use_cpu).to_dict()
    changed = {
        name: value
        for name, value in training.to_dict().items()
        if name not in _NOT_SETTINGS and value != usual.get(name)
    }
    lora = {
        f.name: _plain(getattr(options.lora, f.name))
        for f in dataclasses.fields(type(options.lora))
        if f.init and f.repr and getattr(options.lora, f.name) != getattr(type(options.lora)(), f.name)
    }
    script = dataclasses.asdict(options.script)
    return {
        "script": {
            name: _named(value) if name in _PATHS else value
            for name, value in script.items()
            if name not in _NOT_SETTINGS
        },
        "s3t": options.s3t.to_dict(),
        "lora": lora,
        "training": json.loads(json.dumps(changed, default=str)),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value if isinstance(value, (str, int, float, bool, list, dict, type(None))) else str(value)


def _named(value: Any) -> Any:
    """A path without the part of it that is this machine's; a file with the digest of its contents."""
    if not isinstance(value, str) or not os.path.exists(value):
        return value
    path = Path(value)
    name = "/".join(path.resolve().parts[-2:])
    if not path.is_file():
        return name
    with open(path, "rb") as file:
        return f"{name} (sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:16]})"


def _differing(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    found = {}
    for name in sorted({*then, *now} - {*_NOT_SETTINGS}):
        one, other = then.get(name), now.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found.update(_differing(one, other, f"{prefix}{name}."))
        elif one != other:
            found[prefix + name] = (one, other)
    return found


def hardware() -> dict[str, Any]:
    """The machine that a run's times belong to."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cpu": _processor(),
        "cpu_cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": PartialState().num_processes,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cost_of(method: Any) -> dict[str, Any]:
    """What training has cost so far, and each unit's share of it."""
    cost = method.cost
    return {
        "seconds": round(cost.seconds, 3),
        "steps": cost.steps,
        "examples": cost.examples,
        "units": [dataclasses.asdict(unit) for unit in cost.units],
    }


def write_run_card(results: Results, options: Any, dataset: str | None = None) -> None:
    """
    Write the card of a run beside its results, in the first process.

    Args:
        results ([`Results`]): The run's results.
        options ([`~common.options.Options`]): Everything the recipe was told.
        dataset (`str`, *optional*): Id of the dataset that the task stands for, where none was named.
    """
    if not PartialState().is_main_process:
        return
    name = os.path.basename(options.training.output_dir.rstrip("/"))
    base, dataset = on_hub(options.script.model_name_or_path), on_hub(options.script.dataset_name or dataset)
    results.card.write_text(
        render_run_card(name, results.content, base_model=base, datasets=[dataset] if dataset else [])
    )


def on_hub(name: str | None) -> str | None:
    """The name, if it is an id on the Hub and no path."""
    return name if name and name.count("/") == 1 and name[0] not in "./~" and not os.path.exists(name) else None
