"""
Which stack the engine has, under which name: changed when deletions take one back, or growth brings a longer one.

A switch goes in this order, whatever it is for:

1. Nothing is passed on to a stack of which a stage was taken back. Requests that begin wait.
2. What serves now is exported under a name that nothing ever had, and loaded.
3. New requests are passed on to that name.
4. Requests under way on the old name are waited for, or ended.
5. The engine lets go of the old name, and lists it no more.
6. The files of the old export are removed.

What fails of the last three is tried again until it is done. A server that dies in between leaves the folder of an
export, or a name that the engine still lists. Both are known by the identity of the folder of exports, and the next
server with that folder begins by removing them.
"""

import hashlib
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ...errors import ExhaustedError, S3TError, counted
from ...model.following import PATIENCE
from ...plan.stages import StageKey
from .exports import Exports
from .names import Loaded, Names
from .vllm import EngineDownError, EngineError, Vllm


logger = logging.get_logger(__name__)

Stages = tuple[tuple[StageKey, str], ...]

# Seconds until requests that were told to end have ended.
_ENDING = 10.0
# Seconds until what failed is tried again, for the first time and at the latest.
_SOON, _AT_THE_LATEST = 1.0, 15.0


class Switch:
    """
    The stack that an engine serves for one system.

    Whoever calls what changes it holds the model's deletion lock: one thread at a time does.

    Args:
        vllm ([`~hf_s3t.server.engine.vllm.Vllm`]): The engine.
        exports ([`~hf_s3t.server.engine.exports.Exports`]): Where exports lie.
    """

    def __init__(self, vllm: Vllm, exports: Exports):
        self.names = Names()
        self.vllm = vllm
        self.exports = exports
        # What the engine is to let go of, with what it was, and what stood against it last.
        self._retired: dict[str, Loaded | None] = {}
        self._problems: dict[str, str] = {}
        # Until when requests on stacks that were taken back may run.
        self._latest: dict[str, float] = {}
        self._not_loaded: Exception | None = None
        self._knows_leftovers = False
        # When the engine's process began that had stacks which were taken back.
        self._had_others: set[float | None] = set()
        self._pause, self._next = _SOON, 0.0

    # What serves

    def has(self, stages: Stages) -> bool:
        """Whether new requests are passed on to this very stack."""
        loaded = self.names.loaded
        return loaded is not None and loaded.stages == stages

    def close_unless(self, valid: Collection[tuple[StageKey, str]]) -> None:
        """Pass nothing on to a stack of which a stage is not valid any more."""
        loaded = self.names.loaded
        if loaded is not None and not set(loaded.stages) <= set(valid):
            self.names.close()
            self._retire(loaded)

    def close(self, why: Exception) -> None:
        """Pass nothing on, and say why."""
        loaded, self._not_loaded = self.names.loaded, None
        self.names.close(why)
        if loaded is not None:
            self._retire(loaded)

    def put(self, stages: Stages, write: Callable[[Path], None]) -> None:
        """
        Have the engine load a stack, and pass new requests on to it.

        Where that fails, what serves already goes on if it may; else requests are told why.

        Args:
            stages (`tuple`): The stages of the stack, with the digests of their files.
            write (callable): Writes it as a plain adapter into the folder it is called with.
        """
        name = self.exports.new_name(_digest_of(stages))
        before, loaded = self.names.loaded, Loaded(name, stages, self.vllm.started())
        try:
            self.vllm.load(name, self.exports.write(name, write))
        except (S3TError, OSError) as error:
            self._not_loaded = error
            self._retired[name] = loaded
            if isinstance(error, EngineDownError):
                # What it was told to load, and did not say of, it may list later.
                self._knows_leftovers = self._knows_leftovers and not error.was_asked
                if not error.was_asked:
                    self._has_let_go(name, [self.exports.remove])
            if before is None:
                self.names.close(error)
            return
        self._not_loaded = None
        self.names.open(loaded)
        if before is not None:
            self._retire(before)

    def forget(self, name: str) -> None:
        """Take note that the engine, which was restarted say, lacks a name."""
        loaded = self.names.loaded
        if loaded is not None and loaded.name == name and name not in self.vllm.models():
            self.names.close()
            self._retire(loaded)

    # What does not serve any more

    def find_leftovers(self) -> None:
        """Have what a server that died left, at the engine or among the exports, removed."""
        loaded = self.names.loaded
        left = set(self.exports.names())
        try:
            left.update(filter(self.exports.is_ours, self.vllm.models()))
            self._knows_leftovers = True
        except EngineError as error:
            self._problems[""] = str(error)
        else:
            self._problems.pop("", None)
        for name in left - {loaded.name if loaded else ""}:
            self._retired.setdefault(name, None)
        if self._knows_leftovers and None in self._retired.values():
            self._had_others.add(self.vllm.started())

    def retire(self, valid: Collection[tuple[StageKey, str]], on_running: str, timeout: float | None) -> None:
        """
        Have the engine let go of all that does not serve any more, when no request is under way on it.

        Requests on a stack that is only not the best any more run to their end, which is not waited for.

        Args:
            valid (collection of `tuple[StageKey, str]`): The stages that are valid, with the digests of their files.
            on_running (`str`): `"wait"` lets requests on a stack that was taken back end, `"cancel"` ends them.
            timeout (`float`, *optional*):
                Seconds to wait here at most; then they are ended. Without it nothing is waited for here: a later call
                finds that they ended, or took too long.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        for name, loaded in list(self._retired.items()):
            must_go = loaded is None or not set(loaded.stages) <= set(valid)
            if self.names.wait_until_free(name, 0) or (must_go and self._ended(name, on_running, deadline)):
                self._let_go(name)
        self._plan_next()

    def _ended(self, name: str, on_running: str, deadline: float | None) -> bool:
        """Whether the requests on a stack that was taken back have ended, told to if they had their time."""
        latest = self._latest.setdefault(name, time.monotonic() + PATIENCE)
        if on_running != "cancel":
            if deadline is None and time.monotonic() < latest:
                return False
            if deadline is not None and self.names.wait_until_free(name, max(0.0, deadline - time.monotonic())):
                return True
        self.names.stop(name)
        if self.names.wait_until_free(name, _ENDING):
            return True
        self._problems[name] = f"Requests on {name} were told to end and have not."
        return False

    def _retire(self, loaded: Loaded) -> None:
        self._retired[loaded.name] = loaded
        self._had_others.add(loaded.engine_started)

    def _let_go(self, name: str) -> None:
        problem = self._has_let_go(name, [self.vllm.unload, self.exports.remove])
        if problem is not None and self._problems.get(name) != problem:
            logger.error(f"The engine has not let go of {name}: {problem} It is tried again.")
        if problem is not None:
            self._problems[name] = problem

    def _has_let_go(self, name: str, steps: Sequence[Callable[[str], None]]) -> str | None:
        """Do what letting go of a name takes, each step whatever becomes of the others; returns what failed."""
        problems = []
        for step in steps:
            try:
                step(name)
            except (S3TError, OSError) as error:
                problems.append(str(error))
        if problems:
            return " ".join(problems)
        del self._retired[name]
        for notes in (self._problems, self._latest):
            notes.pop(name, None)
        return None

    # What is tried again

    @property
    def has_work(self) -> bool:
        """Whether something is to be done that could not be done before."""
        return bool(self._retired) or self._not_loaded is not None or not self._knows_leftovers

    @property
    def is_due(self) -> bool:
        """Whether it is time to try it again."""
        return self.has_work and time.monotonic() >= self._next

    @property
    def knows_leftovers(self) -> bool:
        """Whether the engine was asked what a server that died left there."""
        return self._knows_leftovers

    def _plan_next(self) -> None:
        self._pause = _SOON if self.problem is None else min(2 * self._pause, _AT_THE_LATEST)
        self._next = time.monotonic() + self._pause

    # What is told of it

    @property
    def problem(self) -> str | None:
        """What could not be done yet and is tried again; `None` if all is done."""
        found = [*self._problems.values()]
        if self._not_loaded is not None:
            found.insert(0, str(self._not_loaded))
        return " ".join(dict.fromkeys(found)) or None

    @property
    def not_loaded(self) -> Exception | None:
        """Why what shall serve could not be loaded; `None` if it was."""
        return self._not_loaded

    def receipt(self) -> dict[str, Any]:
        """
        What is confirmed of the stacks that were taken back by now, what is not, and what is to be done about that.

        Returns:
            `dict` with `confirmed` and `not_confirmed`, lists of sentences, and `next_step`, a sentence or `None`.
        """
        confirmed, not_confirmed, steps = [self._where_requests_go()], [], []
        open_names = sorted(self._retired)
        for name in open_names:
            not_confirmed.append(f"That the engine let go of {name}: {self._problems.get(name, 'it is under way.')}")
        if open_names:
            steps.append(
                "Start the engine again if it is down, or restart it; letting go is tried again until it is done "
                "(`GET /v1/status` shows it)."
            )
        elif self._had_others:
            confirmed.append(
                "The requests on the stacks that served before have ended, the engine lists their names no more, and "
                "the files of their exports are removed."
            )
        if self._may_hold_weights():
            not_confirmed.append(
                "That their weights are out of the engine's memory: vLLM keeps what it let go of until other adapters "
                "take its place, or it is restarted."
            )
            steps.append("To have them out of its memory at once, restart the engine: this server loads into it anew.")
        reach = "" if self.vllm.address.is_loopback else " Its address is not this machine's alone."
        not_confirmed.append(
            "What clients do that reach the engine beside this server: they may ask it for any name that it has, or "
            f"load copies of exports.{reach}"
        )
        steps.append("Let nobody but this server reach the engine's port, and read the folder of exports.")
        return {"confirmed": confirmed, "not_confirmed": not_confirmed, "next_step": " ".join(steps)}

    def _where_requests_go(self) -> str:
        loaded = self.names.loaded
        if loaded is None:
            return "No request through this server reaches a stack: nothing is passed on to the engine now."
        return (
            "No request through this server reaches a stack that was taken back: they are passed on to "
            f"{loaded.name}, {counted(loaded.depth, 'stage')} deep."
        )

    def _may_hold_weights(self) -> bool:
        # One that was started since has nothing of them.
        return bool(self._had_others) and (
            None in self._had_others or self.vllm.started() in {None, *self._had_others}
        )

    def status(self) -> dict[str, Any]:
        """Where the engine stands, for whoever watches."""
        loaded = self.names.loaded
        return {
            "url": self.vllm.address.url,
            "is_ready": loaded is not None,
            "name": None if loaded is None else loaded.name,
            "depth": 0 if loaded is None else loaded.depth,
            "running": self.names.running,
            "to_let_go": len(self._retired),
            "problem": self.problem,
        }

    def end(self) -> None:
        """Leave nothing behind: the engine lets go of everything, and no export is left."""
        self.close(ExhaustedError("This server is stopping. Ask again when it runs."))
        self.retire((), "cancel", 0.0)
        self.vllm.close()
        self.exports.release()


def _digest_of(stages: Stages) -> str:
    hasher = hashlib.sha256()
    for key, digest in stages:
        hasher.update(f"{key} {digest}\n".encode())
    return hasher.hexdigest()


def is_worth_waiting(error: Exception) -> bool:
    """Whether an engine that did not load a stack may do so later by itself: it is starting, say."""
    return isinstance(error, EngineDownError)
