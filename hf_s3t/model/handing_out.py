"""What a served system hands out: copies of its folder, pushes to the Hub, plain PEFT adapters."""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, ExhaustedError
from ..folder.versions import library_versions
from ..hub.card import description
from ..hub.erasure import ErasureReport, erase
from ..hub.folder import HubFolder
from ..hub.pushing import PushReport, push
from ..hub.repository import HubRepo
from .following import Following


class HandingOut(Following):
    """The part of [`~hf_s3t.S3TModel`] that hands the system out; what leaves the folder is noted in its ledger."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """
        Copy what is valid of the system into another, empty folder (into its own, only make sure that all is written).

        The copy is a second system, with the secret of this one: no deletion here reaches it, and what is forgotten
        here must be forgotten there too. The ledger notes it with the stages that were handed out, as it notes
        exported adapters. (Of a model that is served from the Hub it is a pull, which nothing notes.) A deletion that
        is under way is waited for.

        Args:
            save_directory (`str` or `os.PathLike`): The folder.
            **kwargs: Refused: how files are written is the system's own.

        Raises:
            [`~hf_s3t.errors.ConfigError`]: If anything else is given, as `Trainer.save_model` does.
            [`~hf_s3t.errors.FolderError`]: If the folder is not empty, or the copy cannot be noted in the ledger.
            [`~hf_s3t.errors.S3TError`]: If called from inside a running call of this model.
        """
        if kwargs:
            raise ConfigError(
                f"`save_pretrained` of a served model copies the system and takes no `{next(iter(kwargs))}`. Call it "
                "with a folder alone, instead of a trainer's `save_model`; for a plain adapter use `export_adapter`."
            )
        self._calls.refuse_inside("save_pretrained")
        with self._deletion_lock:
            self._wait_for_cleaner()
            if Path(save_directory).resolve() != self.folder.path.resolve():
                self.folder.copy_to(save_directory)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        erase_history: bool = False,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        merge: bool = False,
        datasets: Sequence[str] = (),
        license: str | None = None,
        evaluation: Mapping[str, float] | None = None,
        include_gate: bool | None = None,
    ) -> PushReport | ErasureReport:
        """
        Bring the system to the Hub, with its deletions and a model card: one commit, of what is not there yet.

        A deletion pushed by itself leaves what it removed in older commits. `erase_history=True` rewrites the history,
        deletes branches and tags that hold an old state, and erases the large files that nothing holds any more.

        Args:
            repo_id (`str`): The repository; made if it does not exist.
            erase_history (`bool`, defaults to `False`): Erase on the Hub what deletions removed.
            private (`bool`, *optional*): Whether a new repository is private; the owner's default if not given.
            token (`str`, *optional*): Token with write access; the one of `hf auth login` if not given.
            commit_message (`str`, *optional*): Title of the commit.
            merge (`bool`, defaults to `False`):
                Forget here, too, what the Hub knows as deleted and this folder does not. Without it such a push is
                refused, because it would bring examples back. A model loaded from the Hub always merges.
            datasets (sequence of `str`, *optional*): For the card: ids of the datasets it was trained on.
            license (`str`, *optional*): For the card: identifier of the licence.
            evaluation (mapping from `str` to `float`, *optional*):
                For the card: numbers measured with the system as it is now. They are dropped with the next deletion.
            include_gate (`bool`, *optional*):
                Whether the gate goes with it, by which members are weighed. It leaks: for each row that is in, it has
                keyed digests of the words of its prompt, in which shard and slice it lies, and how many rows share
                each word. Who has the system's secret can guess the words, and everybody can count them. Left out, a
                repository that has it keeps it, in step with deletions, and no other gets it; who loads a system
                without it gets the mean of its members.

        Returns:
            [`~hf_s3t.hub.pushing.PushReport`], or with `erase_history=True` an
            [`~hf_s3t.hub.erasure.ErasureReport`], which separates what is confirmed gone from what cannot be
            confirmed from here.

        Raises:
            [`~hf_s3t.errors.MergeNeededError`]: If the Hub knows deletions that this folder does not.
            [`~hf_s3t.errors.HubError`]: If the Hub refuses or cannot be reached. Calling again finishes the work.
        """
        self._calls.refuse_inside("push_to_hub")
        with self._deletion_lock:
            self.refresh()
            repo = HubRepo(repo_id, token or getattr(getattr(self.folder, "repo", None), "token", None))
            if isinstance(self.folder, HubFolder):
                if repo_id != self.folder.repo.repo_id:
                    raise ConfigError(
                        f"This model is served from {self.folder.repo.repo_id}. To push it to {repo_id}, pull it to a "
                        "folder first (`save_pretrained`), and push that."
                    )
                merge = True
            describe = functools.partial(
                description, repo_id=repo_id, datasets=datasets, license=license, evaluation=evaluation
            )
            try:
                pushed = push(
                    self.folder,
                    repo,
                    describe,
                    private=private,
                    commit_message=commit_message,
                    merge=merge,
                    on_merge=self._serve,
                    include_gate=include_gate,
                )
            finally:
                self.refresh()
        return erase(repo) if erase_history else pushed

    def export_adapter(self, shard: int, folder: str | os.PathLike[str]) -> None:
        """
        Write the stack that serves a shard as one plain PEFT adapter, for use without hf_s3t.

        The ledger notes it: a later deletion cannot reach the copy, which must be revoked by hand. The note comes
        first, and stays if the export fails. What PEFT makes of the files is compared with what serves.

        Args:
            shard (`int`): Number of the shard.
            folder (`str` or `os.PathLike`): A new folder to write the adapter to, outside the system's own.

        Raises:
            [`~hf_s3t.errors.ExhaustedError`]: If the shard has no stage left.
            [`~hf_s3t.errors.ConfigError`]: If there is no such shard, or several stacks answer for it together.
            [`~hf_s3t.errors.FolderError`]: If something is in the folder, it is inside the system's, or cannot be
                made.
            [`~hf_s3t.errors.LayersNotFoundError`]: If PEFT would make something else of it; nothing is left then.
        """
        if not 0 <= shard < self.folder.plan.num_shards:
            raise ConfigError(f"shard={shard}, expected 0 to {self.folder.plan.num_shards - 1}.")
        self.folder.check_target(Path(folder))
        self._calls.refuse_inside("export_adapter")
        with self._deletion_lock:
            # Whoever writes the table now needs the folder's lock for it.
            self._wait_for_cleaner()
            # Nobody deletes between the look at what serves and its writing.
            with self.folder.lock():
                self._export(shard, Path(folder))

    def _export(self, shard: int, folder: Path) -> None:
        self.refresh()
        tips = self._routing.served[shard]
        if not tips:
            raise ExhaustedError(f"Shard {shard} has no stage left to export. Call `train()` to grow it again.")
        if len(tips) > 1:
            raise ConfigError(
                f'{len(tips)} stacks answer for shard {shard} together (select="all"), and a plain adapter is '
                "one. Export from a system that serves one stack a shard."
            )
        self.folder.record_export(tips[0], library_versions())
        # This line changes nothing that serves.
        self._has_followed(self._state())
        self.stack.export(tips[0], folder, self.folder.base_id, self.folder.base_revision)
