"""Pushing a system to the Hub by the arguments that `Trainer` knows: at the end, or as its sequences complete."""

import functools
from typing import Any

from transformers.utils import logging

from ..errors import ConfigError, FolderError, HubError
from ..hub.card import description
from ..hub.client import hub_errors_as_sentences
from ..hub.pushing import PushReport, push
from ..hub.repository import HubRepo
from .live_model import LiveModel


logger = logging.get_logger(__name__)


class Publishing(LiveModel):
    """The part of a trainer that pushes the system."""

    # `Trainer` begins with none.
    hub_model_id: str | None  # type: ignore[assignment]

    # A push brings a system, and tells what it brought.
    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> PushReport | None:
        """
        Bring the system to the Hub, into `args.hub_model_id` or a repository named like the output folder.

        Args:
            commit_message (`str`, *optional*): Title of the commit.
            blocking (`bool`, defaults to `True`): Must be true: the push is one commit on top of what it has read.
            token (`str`, *optional*): Token with write access; `args.hub_token`, else that of `hf auth login`.
            revision (`str`, *optional*): Must be `None` or `"main"`: a deletion has one branch to reach.
            private (`bool`, *optional*): Whether a new repository is private; `args.hub_private_repo` if not given.
            kwargs: `merge`, `datasets`, `license`, `evaluation` and `include_gate`, as in
                [`~hf_s3t.S3TModel.push_to_hub`].

        Returns:
            [`~hf_s3t.hub.pushing.PushReport`]: What was pushed; `None` in all processes but the first.

        Raises:
            [`~hf_s3t.errors.HubError`]: If the Hub refuses or cannot be reached.
            [`~hf_s3t.errors.ConfigError`]: If `blocking` is false, or another branch is named.
        """
        if not blocking or revision not in (None, "main"):
            raise ConfigError(
                f"`push_to_hub(blocking={blocking}, revision={revision!r})`: a system is pushed at once, to the main "
                "branch. Leave both out."
            )
        if not self.is_world_process_zero():
            return None
        token = token if token is not None else self.args.hub_token
        repo_id = self.hub_model_id if self.hub_model_id is not None else self._make_repo(token, private)
        how = {"merge": kwargs.pop("merge", False), "include_gate": kwargs.pop("include_gate", None)}
        describe = functools.partial(description, repo_id=repo_id, **kwargs)
        try:
            return push(self.folder, HubRepo(repo_id, token), describe, commit_message=commit_message, **how)
        finally:
            if self._live is not None and self._stack.in_training is None:
                self._live.refresh()

    def _push_meanwhile(self, message: str) -> None:
        """
        A Hub that cannot be reached, or a damaged stage, is no reason to lose training: the push at the end brings
        what is missing, or tells it.
        """
        try:
            self.push_to_hub(message)
        except (HubError, FolderError) as error:
            logger.warning(f"{message} could not be pushed: {error} It is tried again with the next.")

    def _make_repo(self, token: str | None, private: bool | None) -> str:
        self.init_hf_repo(token=token, private=private)
        return str(self.hub_model_id)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        As `Trainer.init_hf_repo`, which is called as a trainer with `push_to_hub=True` is made.

        Raises:
            [`~hf_s3t.errors.HubError`]: If the Hub refuses or cannot be reached.
        """
        with hub_errors_as_sentences(self.args.hub_model_id or self._output_dir, "The repository was not made"):
            # The oldest Trainers go by `hub_private_repo` alone.
            super().init_hf_repo(token=token, **({} if private is None else {"private": private}))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Checkpoints hold an optimizer's state; the system is pushed as its sequences complete."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Checkpoints of a stage get no model card; the system's is written when it is published."""
