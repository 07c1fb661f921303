"""What all routes of a server share: the model, what it is called, who may ask, and what runs beside the requests."""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..hub.folder import HubFolder
from ..model.modeling import S3TModel
from .answers import Answers
from .batching import Batcher
from .classification import Classifier
from .generation import Generator, eos_tokens
from .keys import Keys
from .measuring import Metrics
from .prompts import Prompts
from .settings import ServerSettings
from .watching import PrometheusMetrics


# Seconds between two looks whether the folder was followed, and for which stages that come are waited for.
_A_MOMENT, _LOADING = 0.005, 5.0


class Task(StrEnum):
    """What a system does."""

    GENERATION = "generation"
    TEXT_CLASSIFICATION = "text-classification"
    IMAGE_CLASSIFICATION = "image-classification"


@dataclass
class Service:
    """
    A model that is served, and what its routes share.

    What runs beside the requests is started by `on_start` and ended by `on_stop`: functions without arguments that
    parts add in their `routes(service)`, called in a thread before the first request and after the last one, the last
    added ends first.

    Args:
        model ([`~hf_s3t.S3TModel`]): The model.
        processor (*optional*): Its tokenizer; of an image classifier its image processor.
        settings ([`~hf_s3t.server.settings.ServerSettings`], *optional*): How it is served.
        keys ([`~hf_s3t.server.keys.Keys`], *optional*): Who may ask what; without any, everybody on this machine.
        metrics ([`~hf_s3t.server.measuring.Metrics`], *optional*): What is told of requests and batches.
        engine (*optional*): What answers in the model's place, for systems of one shard; the model itself if not
            given.
    """

    model: S3TModel
    processor: Any
    settings: ServerSettings = field(default_factory=ServerSettings)
    keys: Keys = field(default_factory=lambda: Keys({}))
    metrics: Metrics = field(default_factory=PrometheusMetrics)
    engine: Any = None
    started: float = field(default_factory=time.time)
    # Set by the part that erases, for those that show what waits.
    erasures: Any = None
    # The answers that are not handed out yet: an erasure waits for `answers.settled` before it is acknowledged.
    answers: Answers = field(init=False)
    # What runs rows through the model; its `num_waiting` and `num_running` are the queue.
    batcher: Batcher[Any] = field(init=False)
    prompts: Prompts = field(init=False)
    eos: frozenset[int] = field(init=False, default=frozenset())
    on_start: list[Callable[[], None]] = field(default_factory=list)
    on_stop: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.task is not Task.IMAGE_CLASSIFICATION and not hasattr(self.processor, "decode"):
            raise ConfigError(
                f"A system for {self.task} is served with its tokenizer, got a {type(self.processor).__name__}. Save "
                "the tokenizer into the system's folder with its `save_pretrained`."
            )

        run: Callable[[Sequence[Any]], None]
        self.answers = Answers(self._deletions, self.settings.request_timeout)
        self.prompts = Prompts(self.model, self.processor, self.settings)
        if self.task is Task.GENERATION:
            self.eos = eos_tokens(self.model, self.processor)
            run = Generator(self.model, self.processor, self.settings.max_batch_size).run
        else:
            run = Classifier(self.model, self.processor).run
        self.batcher = Batcher(lambda items: self._run(run, items), self._deletions, self.settings, self.metrics)
        self.on_start.append(self.batcher.start)
        self.on_stop.append(self.batcher.stop)

    def _run(self, run: Callable[[Sequence[Any]], None], items: Sequence[Any]) -> None:
        """
        Run a batch when what other processes deleted answers no more.

        Whoever follows the folder waits for the answers that are under way on what they deleted, and a batch need not.
        """
        model = self.model
        if model.is_behind():
            following = threading.Thread(target=self._follow, name="hf-s3t-following", daemon=True)
            following.start()
            end = time.monotonic() + _LOADING
            while following.is_alive():
                following.join(_A_MOMENT)
                if not model.is_behind() and (model.serves_all() or time.monotonic() > end):
                    break
        run(items)

    def _follow(self) -> None:
        # What goes wrong the batch finds too, and tells.
        with contextlib.suppress(Exception):
            self.model.follow()

    def _deletions(self) -> int:
        """How many lines the ledger has: what begins at as many works on what these deletions left."""
        return len(self.model.folder.ledger.lines)

    @property
    def name(self) -> str:
        """What clients call the model."""
        folder = self.model.folder
        own = folder.repo.repo_id if isinstance(folder, HubFolder) else Path(folder.path).resolve().name
        return self.settings.name or own

    @property
    def task(self) -> Task:
        """What the system does."""
        if self.model.can_generate():
            return Task.GENERATION
        is_of_images = self.model.base_model.main_input_name == "pixel_values"
        return Task.IMAGE_CLASSIFICATION if is_of_images else Task.TEXT_CLASSIFICATION

    def start(self) -> None:
        """Start what runs beside the requests."""
        for begin in self.on_start:
            begin()

    def stop(self) -> None:
        """End it."""
        for end in reversed(self.on_stop):
            end()
