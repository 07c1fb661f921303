"""A system that an engine answers for: it forgets and grows as any served model, and the engine follows."""

import dataclasses
import os
import threading
import time
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ...errors import ConfigError, ExhaustedError, S3TError
from ...folder.opening import check_method
from ...folder.system import SystemFolder
from ...folder.versions import library_versions
from ...hub.folder import HubFolder
from ...model.following import PATIENCE
from ...model.loading import open_system, recorded_shape
from ...model.modeling import S3TModel
from ...model.skeleton import skeleton_of_base
from ...model.stack import StageStack
from ...plan.stages import StageKey
from ...records.ledger import LedgerEntry
from ...records.report import UnlearningReport
from ...records.request import DeletionRequest
from .address import EngineAddress
from .exports import Exports
from .switching import Switch, is_worth_waiting
from .vllm import Vllm


logger = logging.get_logger(__name__)

# Seconds between two looks at the folder where no request comes: what another process deletes is let go of by then.
_BETWEEN_LOOKS = 1.0
# What PEFT computes otherwise than vLLM, which does not look at these settings or refuses them.
_REFUSED_LORA = ("rank_pattern", "alpha_pattern", "use_dora", "lora_bias")


class EngineModel(S3TModel):
    """
    An [`~hf_s3t.S3TModel`] of one shard whose answers an engine computes.

    All that a served model does with its folder it does too: `unlearn`, requests that wait, deletions and growth by
    other processes, `status`. Where another model changes the stages by which its own calls compute, this one has the
    engine change them, see [`~hf_s3t.server.engine.switching`]: a deletion has returned when no request through this
    server can reach what was taken back, and the engine let go of it, or the switch's receipt says what of that is not
    confirmed.

    Its base has no weights, see [`~hf_s3t.model.skeleton`]: the engine has them, and here there is nothing to compute.
    Only the adapters of the stack that serves are in memory, and PEFT is shown the base's modules, so that what it
    makes of an export is compared with what the system's files say. A process that only records deletions, as the
    command line does, could not write exports; one that loads the base would hold it twice on one machine.

    Exports are copies that a deletion must reach. The ledger notes a stage, as one that was handed out, when it first
    leaves the folder in an export; exports of stages that were noted are not noted again. Where this server lives it
    removes them itself; where it died for good, the folder of exports and the engine have to be looked after by hand.

    Args:
        stack ([`~hf_s3t.model.stack.StageStack`]): The adapters in memory, on a skeleton of the base.
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system's folder.
        switch ([`~hf_s3t.server.engine.switching.Switch`]): What the engine serves for it.
    """

    def __init__(self, stack: StageStack, folder: SystemFolder, switch: Switch):
        self.switch = switch
        # Stages that the ledger notes as handed out, and up to which of its lines that was looked up.
        self._noted: set[tuple[str, str]] = set()
        self._looked_up = 0
        self._end = threading.Event()
        switch.find_leftovers()
        super().__init__(stack, folder)
        self._watch = threading.Thread(target=self._look_and_try, name="hf_s3t-engine", daemon=True)
        self._watch.start()

    # Following the folder

    def _serve(self, on_running: str = "wait", timeout: float = PATIENCE) -> float:
        valid = self._valid()
        # Before anybody can believe that the folder was followed.
        self.switch.close_unless(valid)
        try:
            seconds = super()._serve(on_running, timeout)
            self._put()
        except Exception as error:
            if self.switch.names.loaded is None:
                self.switch.close(error)
            raise
        finally:
            # Whoever waits for requests to end does so after this: those that come now wait for this.
            self.switch.retire(valid, on_running, None)
            self.switch.names.tell()
        return seconds

    def _unlearn(self, request: DeletionRequest, on_running: str, timeout: float, started: float) -> UnlearningReport:
        report = super()._unlearn(request, on_running, timeout, started)
        self.switch.retire(self._valid(), on_running, timeout)
        return dataclasses.replace(report, seconds=time.perf_counter() - started)

    def _valid(self) -> set[tuple[StageKey, str]]:
        return {(key, self.folder.adapter_digest(key)) for key in self.folder.valid_stages}

    def _put(self) -> None:
        """Have the engine serve what serves here."""
        if self.folder.config.num_shards > 1:
            self._refuse_added_shards()
            return
        tips = self._routing.served[0]
        if not tips:
            self.switch.close(ExhaustedError(_exhausted(self.folder)))
            return
        tip = tips[0]
        stages = tuple((key, self.folder.adapter_digest(key)) for key in tip.lineage)
        # Where a deletion came meanwhile, the next look serves what that leaves.
        if not self.switch.has(stages) and self._note(tip, stages):
            folder = self.folder
            self.switch.put(stages, lambda path: self.stack.export(tip, path, folder.base_id, folder.base_revision))

    def _refuse_added_shards(self) -> None:
        """Pass nothing on, and say so once: what the engine has is one member of several by now."""
        if not isinstance(self.switch.names.why, ConfigError):
            error = _of_several_shards(self.folder)
            logger.error(f"Shards were added, and nothing is passed on to the engine any more: {error}")
            self.switch.close(error)

    def _note(self, tip: StageKey, stages: tuple[tuple[StageKey, str], ...]) -> bool:
        """Have the ledger say that these stages leave the folder, before they do; `False` if there is news in it."""
        folder = self.folder
        with folder.lock():
            if folder.has_news():
                return False
            if not {(str(key), digest) for key, digest in stages} <= self._handed_out():
                folder.record_export(tip, library_versions())
                # This line changes nothing that serves.
                self._has_followed(self._state())
        return True

    def _handed_out(self) -> set[tuple[str, str]]:
        lines = self.folder.ledger.lines
        for number in range(self._looked_up, len(lines)):
            if '"export"' in lines[number]:
                entry = LedgerEntry.from_line(lines[number])
                self._noted.update(entry.removed.items() if entry.kind == "export" else ())
        self._looked_up = len(lines)
        return self._noted

    # What is tried again

    def try_again(self, on_running: str = "wait", timeout: float | None = None) -> None:
        """
        Do at the engine what could not be done before: load what serves, let go of the rest.

        Args:
            on_running (`str`, defaults to `"wait"`): As in [`~hf_s3t.S3TModel.unlearn`].
            timeout (`float`, *optional*): The same; requests under way are not waited for here if not given.
        """
        with self._deletion_lock:
            if not self.switch.knows_leftovers:
                self.switch.find_leftovers()
            if not self.is_behind():
                self._put()
            self.switch.retire(self._valid(), on_running, timeout)
            self.switch.names.tell()

    def reload(self, name: str) -> None:
        """Have the engine, which says that it lacks a name, load what serves anew."""
        with self._deletion_lock:
            self.switch.forget(name)
        self.try_again()

    def _look_and_try(self) -> None:
        while not self._end.wait(_BETWEEN_LOOKS):
            try:
                self.follow()
                if self.switch.is_due:
                    self.try_again()
            except (S3TError, OSError) as error:
                # The folder may be out of reach for a while; requests say so, and the next look may find it.
                logger.debug(f"The folder or the engine could not be looked at: {error}")
            except Exception:
                # Whoever looks must not end: then nothing would be tried again.
                logger.exception("The folder or the engine could not be looked at")

    @property
    def _failures(self) -> list[str]:
        problem = self.switch.problem
        return [*super()._failures, *([] if problem is None else [problem])]

    def end(self) -> None:
        """Leave nothing at the engine, and no export: this process serves the system no more."""
        self._end.set()
        self._watch.join()
        with self._deletion_lock:
            self.switch.end()


def load_behind_engine(
    path: str | os.PathLike[str],
    engine: str,
    *,
    exports: str | os.PathLike[str] | None = None,
    engine_key: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> EngineModel:
    """
    Load a system that an engine answers for. What cannot be is refused before anything is loaded.

    Args:
        path (`str` or `os.PathLike`): The folder of the system, or its repository on the Hub.
        engine (`str`): The address of a vLLM server's API, such as `"http://127.0.0.1:8001/v1"`.
        exports (`str` or `os.PathLike`, *optional*):
            Where exports are written for the engine to read. A folder beside the system, with `.engine` behind its
            name, if not given.
        engine_key (`str`, *optional*): The key that the engine was started with.
        revision (`str`, *optional*): Branch, tag or commit of the repository.
        token (`str`, *optional*): Token for the Hub; the one of `hf auth login` if not given.
        cache_dir (`str` or `os.PathLike`, *optional*): The Hub's cache; the usual one if not given.

    Returns:
        [`EngineModel`]: The model. An engine that does not answer yet is asked again until it does.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If the system is not one that an engine can serve, or a setting is wrong.
        [`~hf_s3t.server.engine.vllm.EngineError`]: If the engine refuses the system's adapter.
        [`~hf_s3t.errors.FolderError`]: If the folder holds no intact system.
    """
    address = EngineAddress.parse(engine)
    folder = open_system(path, revision, token, cache_dir)
    check_engine_can_serve(folder)
    if exports is None and isinstance(folder, HubFolder):
        raise ConfigError(
            f"{path} is served from the Hub, and there is no folder beside it for exports. Give one that the engine "
            "can read (`--engine_exports`)."
        )
    beside = folder.path.resolve().with_name(f"{folder.path.resolve().name}.engine")
    switch = Switch(Vllm(address, engine_key), Exports(beside if exports is None else Path(exports), folder.path))
    if not address.is_loopback:
        logger.warning(
            f"The engine at {address.url} is not on this machine's own address: who reaches it can ask it for any "
            "adapter that it has, past this server. Let nobody but this server reach it."
        )
    try:
        shape = recorded_shape(folder)
        base = skeleton_of_base(folder.record["base_model"])
        stack = StageStack(base, shape.peft_config, shape.layers, shape.head)
        model = EngineModel(stack, folder, switch)
    except BaseException:
        switch.exports.release()
        raise
    refused = switch.not_loaded
    if refused is not None and not is_worth_waiting(refused):
        model.end()
        raise refused
    if refused is not None:
        logger.warning(f"{refused} Requests are answered with 503 until then; it is tried again.")
    return model


def check_engine_can_serve(folder: SystemFolder) -> None:
    """
    Refuse a system that an engine would answer for otherwise than hf_s3t.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: Saying what it is, what an engine can serve, and what to do.
    """
    check_method(folder.record, EngineModel.methods, folder.path)
    config, record = folder.config, folder.record
    alone = "Serve it without `--engine`."
    if config.num_shards != 1:
        raise _of_several_shards(folder)
    if config.select == "all":
        raise ConfigError(
            f'{folder.path} has select="all", expected "longest" or "metric": an engine answers with one adapter, and '
            f"all stacks of a shard would answer together. {alone}"
        )
    shape = recorded_shape(folder)
    if shape.head:
        raise ConfigError(
            f"{folder.path} has a trained head ({', '.join(shape.head)}), expected a language model: an engine loads "
            f"adapters and no heads. {alone}"
        )
    quantisation: dict[str, Any] = record["base_model"].get("quantization") or {}
    if quantisation.get("load_in_8bit"):
        raise ConfigError(
            f"{folder.path} was trained on a base in 8 bits, expected one in full or half precision, or in 4 bits: an "
            f"engine would compute with other weights than the stages were trained on. {alone}"
        )
    for name in _REFUSED_LORA:
        if getattr(shape.peft_config, name, None):
            raise ConfigError(
                f"{folder.path} was trained with {name}={getattr(shape.peft_config, name)!r}, expected none: vLLM "
                f"would compute something else of it. {alone}"
            )


def _of_several_shards(folder: SystemFolder) -> ConfigError:
    return ConfigError(
        f"{folder.path} has {folder.config.num_shards} shards, expected 1: an engine answers with one adapter, and "
        "several shards answer together. Serve it without `--engine`."
    )


def _exhausted(folder: SystemFolder) -> str:
    if not folder.ledger.num_deletions:
        return f"{folder.path.name} has no trained stage yet. Call `train()` of its trainer first."
    return (
        f"{folder.path.name} is exhausted: deletions reached the first slice of every sequence. Call `train()` of its "
        "trainer to grow stages on the remaining data; this server takes them up by itself."
    )
