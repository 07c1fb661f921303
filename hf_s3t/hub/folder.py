"""A system that is served from the Hub: its files come from the cache, its deletions from a folder of this machine."""

import os
import shutil
from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..errors import FolderError, HubError, KeyMissingError, counted
from ..folder.config_file import read_record
from ..folder.earlier_slices import EarlierSlices
from ..folder.files import check_digest, digested_json, make_folders, stamp, sync, write_atomically
from ..folder.foreign import forgeries_told
from ..folder.gate_file import write_gate
from ..folder.identity import damaged_parts, is_same_system
from ..folder.layout import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    ATTRIBUTES_FILE,
    CACHE,
    COMPANIONS,
    CONFIG_FILE,
    GATE_FILE,
    IGNORE_FILE,
    KEY_FILE,
    LEDGER_FILE,
    SIGNATURES_FILE,
    STAGES,
    TABLE_FILE,
)
from ..folder.ledger_file import pin_of, read_ledger, require_pinned
from ..folder.removal import discard
from ..folder.secret import KEY_VARIABLE, load_key
from ..folder.signatures_file import Signatures, sign_merge
from ..folder.system import SystemFolder
from ..folder.table_file import read_table, write_table
from ..plan.stages import StageKey
from ..records.digests import DigestKey, KeptNames
from ..records.examples import ExampleTable
from ..records.ledger import Ledger
from .client import call_with_retries, hub_errors_as_sentences
from .memory import may_remember, remember, state_folder, warn_of_other_systems
from .repository import INDEX_FILE, REMEDY, HubRepo, read_index


_FORGED = "Do not serve it; push the system again from its folder."


class HubFolder(SystemFolder):
    """
    A repository as the folder of a system.

    Only the config, the ledger, the index and the stages that serve are downloaded; the table of examples when it is
    first needed. What is deleted here is recorded in a small folder of this machine
    ([`~hf_s3t.hub.memory.state_folder`]), which holds the ledger and no weights, and which counts for every revision
    and cache of the repository, pinned and offline, that holds the same system.
    [`~hf_s3t.S3TModel.push_to_hub`] brings it to the Hub.

    Args:
        repo_id (`str`): The repository.
        revision (`str`, *optional*): A branch, tag or commit; the main branch if not given.
        token (`str`, *optional*): The token; the one of `hf auth login` if not given.
        cache_dir (`str` or `os.PathLike`, *optional*): The Hub's cache; the usual one if not given.

    Raises:
        [`~hf_s3t.errors.HubError`]: If repository or revision cannot be found or reached.
        [`~hf_s3t.errors.FolderError`]: If it holds no system, or a file is damaged.
        [`~hf_s3t.errors.KeyMissingError`]:
            If deletions are to be followed that this revision does not know, and the system's secret is not here.
    """

    def __init__(
        self,
        repo_id: str,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ):
        self.repo = HubRepo(repo_id, token, cache_dir)
        self.revision = revision
        self._key: DigestKey | None = None
        self._table: ExampleTable | None = None
        self.commit = ""
        with self._forgeries_told():
            config = self._resolve()
            record = read_record(config)
            self._begin(state_folder(repo_id, record), record, config)
        warn_of_other_systems(repo_id, self.record)
        self.refresh()

    def _forgeries_told(self) -> AbstractContextManager[None]:
        return forgeries_told(f"{self.repo.repo_id} at {self.commit or self.revision or 'main'}", _FORGED)

    # What needs the secret, or the table, asks for it when it is needed

    @property
    def key(self) -> DigestKey:
        """The system's secret."""
        if self._key is not None:
            return self._key
        try:
            key = load_key(self.path, self.record)
            self._use(key)
        except KeyMissingError as error:
            raise KeyMissingError(
                f"Matching ids with the deletions of {self.repo.repo_id} needs its secret. Set {KEY_VARIABLE} to the "
                f"content of the {KEY_FILE} of the folder of its training, or copy that file to {self.path}."
            ) from error
        return key

    @key.setter
    def key(self, key: DigestKey) -> None:
        self._key = key

    @property
    def names(self) -> KeptNames:
        """How ids and groups stand in the table; the secret is asked for when something is digested."""
        return KeptNames(lambda: self.key, self.config.keep_ids)

    @names.setter
    def names(self, names: KeptNames) -> None:
        """Nothing: they follow from the secret, whenever that comes."""

    @property
    def table(self) -> ExampleTable:
        """The examples that are in; downloaded when they are first asked for."""
        if self._table is None:
            self._table = self._load_table(self.ledger)
        return self._table

    @table.setter
    def table(self, table: ExampleTable) -> None:
        self._table = table

    def _load_table(self, ledger: Ledger) -> ExampleTable:
        file = self._download(TABLE_FILE)
        with self._forgeries_told():
            table = self._table_of(read_table(file), self._published)
            shards, slices = range(self.config.num_shards), range(self.config.num_slices)
            self._sizes = {(shard, slice_): table.size(shard, slice_) for shard in shards for slice_ in slices}
            return self._masked(table, ledger, 0)

    def _masked(self, table: ExampleTable, ledger: Ledger, lines: int) -> ExampleTable:
        # Without the secret a table can be used, as long as there is nothing to mask in it. What this machine knows
        # may stand between the lines of the repository: all that these do not delete is looked for.
        new = ledger.deleted - self._published.deleted
        return table.without_digests(new) if new else table

    # What is there

    def refresh(self) -> None:
        """
        Follow the repository's branch, and what this machine knows of its deletions.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If a file is damaged, or another system is there now.
        """
        with self._forgeries_told():
            self._follow_branch()

    def _follow_branch(self) -> None:
        self._resolve()
        # What was read of these lines before, here or on this machine, is not read again.
        self._published = read_ledger(self._download(LEDGER_FILE), self.ledger, advice=REMEDY)
        ledger = remember(self.repo.repo_id, self.record, self._published)
        if self.revision is not None:
            ledger = remember(self.repo.repo_id, self.record, self._newest())
        index = self._read_index()
        # All that may fail comes before anything changes.
        table = None if ledger.deleted <= self._published.deleted else self._load_table(ledger)
        self.ledger = self._read_ledger(known=ledger)
        self._slices, self._before, self._table = index["slices"], index["slices_before"], table
        self._stages.take_over(index["stages"])

    def _read_ledger(self, known: Ledger | None = None) -> Ledger:
        if may_remember(self.path):
            return super()._read_ledger(known)
        found = stamp(self.path / LEDGER_FILE)
        ledger = remember(self.repo.repo_id, self.record, self._published)
        if not ledger.deleted >= self.ledger.deleted:
            raise FolderError(
                f"{self.path / LEDGER_FILE} lacks deletions that it had: they would be forgotten. Restore it from a "
                "backup."
            )
        self._ledger_stamp = found
        return ledger

    def _read_index(self) -> dict[str, Any]:
        file = self._download(INDEX_FILE)
        index, config = read_index(file), self.config
        places = {(shard, slice_) for shard in range(config.num_shards) for slice_ in range(config.num_slices)}
        if set(index["slices"]) != places:
            raise FolderError(
                f"{file} has digests of {counted(len(index['slices']), 'slice')}, expected those of the "
                f"{counted(len(places), 'slice')} of the system. {_FORGED}"
            )
        if index["ledger"] != pin_of(self._published):
            raise FolderError(
                f"{file} was written with other lines of {LEDGER_FILE} than are there: lines were cut off or edited, "
                f"and deletions would be forgotten. {_FORGED}"
            )
        return index

    @property
    def signatures(self) -> Signatures:
        """What was signed of the lines of the ledger, in the repository and on this machine."""
        here = super().signatures
        with hub_errors_as_sentences(self.repo.repo_id, "The download ended"):
            try:
                text = self.repo.download(SIGNATURES_FILE, self.commit).read_bytes().decode(errors="replace")
            except EntryNotFoundError:
                # Most have none; offline, none is known.
                return here
        return Signatures(here.text_for(self.ledger, Signatures(text)))

    def _newest(self) -> Ledger:
        """What the main branch knows, if it can be asked: an old revision does not bring deleted examples back."""
        try:
            config = self._download(CONFIG_FILE, "main")
            if not is_same_system(read_record(config), self.record):
                # Of another system that was pushed under this name.
                return Ledger()
            return read_ledger(self._download(LEDGER_FILE, config.parent.name), self._published, advice=REMEDY)
        except HubError:
            return Ledger()

    def _resolve(self) -> Path:
        """Find the commit that the revision stands for now; offline, the one in the cache."""
        try:
            config = self._download(CONFIG_FILE, self.revision)
        except FolderError as error:
            raise FolderError(
                f"{self.repo.repo_id} holds no S3T system: there is no {CONFIG_FILE}. Give the repository of "
                "`push_to_hub`."
            ) from error
        commit = config.parent.name
        if commit != self.commit:
            if self.commit:
                self._use_record(self._same_system(read_record(config)))
            self.commit, self._table = commit, None
        return config

    def _same_system(self, record: dict[str, Any]) -> dict[str, Any]:
        if not is_same_system(record, self.record) or damaged_parts(record, self.record):
            raise FolderError(
                f"{self.repo.repo_id} holds another system now than was loaded from it. Load it anew, or give "
                f"revision={self.commit!r} to stay with this one."
            )
        return record

    def _download(self, name: str, revision: str | None = "") -> Path:
        with hub_errors_as_sentences(self.repo.repo_id, "The download ended"):
            try:
                return self.repo.download(name, self.commit if revision == "" else revision)
            except EntryNotFoundError as error:
                # What could not be asked for is told as such; what the Hub says it has not is a damaged repository.
                if isinstance(error, LocalEntryNotFoundError):
                    raise
                raise FolderError(f"{self.repo.repo_id} lacks {name}. Push the system again.") from error

    @property
    def is_table_behind(self) -> bool:
        """The table is on the Hub; a push brings one without the deleted rows."""
        return False

    def _compact(self) -> None:
        self.refresh_ledger()

    @property
    def has_gate(self) -> bool:
        """Whether the repository holds the gate: a push without it tells of none."""
        return self.record["s3t_config"].get("gate") is not None

    def _gate_path(self) -> Path:
        return self._download(GATE_FILE) if self.has_gate else self.path / GATE_FILE

    @property
    def is_gate_behind(self) -> bool:
        """As of the table: a push brings a gate without the deleted rows."""
        return False

    def _require_gate_pinned(self, pin: str) -> None:
        require_pinned(Path(LEDGER_FILE), self._published, pin, GATE_FILE)

    def _deleted_since(self, lines: int) -> Collection[str]:
        # As of the table: what this machine knows may stand between the lines of the repository.
        return self.ledger.deleted

    def refresh_stages(self) -> None:
        """A commit does not change."""

    def prepare(self) -> None:
        """Leave the table where it is until it is needed."""

    @property
    def holds_deleted_rows(self) -> bool:
        """Whether rows that were deleted are still in memory, masked."""
        # Asked of the rest, the table would be downloaded.
        return self._table is not None and super().holds_deleted_rows

    def slice_digests(self, key: StageKey) -> list[str]:
        """The digests of the slices of a stage as they are now."""
        places = [(key.shard, slice_) for slice_ in key.prefix]
        if self.ledger.deleted <= self._published.deleted:
            return [self._slices[place] for place in places]
        # What lost nothing is what the index says, in whatever format that is.
        table = self.table
        return [
            self._slices[place] if table.size(*place) == self._sizes[place] else table.slice_digest(*place)
            for place in places
        ]

    def slice_digests_ever(self, key: StageKey) -> list[tuple[str, ...]]:
        """Of each slice of a stage the digests that its remaining rows ever had, the one that they have now first."""
        if not self._published.additions:
            return [(digest,) for digest in self.slice_digests(key)]
        if self.ledger.deleted <= self._published.deleted:
            return [(self._slices[key.shard, s], *self._before.get((key.shard, s), ())) for s in key.prefix]
        return super().slice_digests_ever(key)

    @property
    def _generations(self) -> tuple[frozenset[int], ...]:
        # The table goes by the lines of its commit, whatever else this machine knows.
        return self._published.generations

    def _has_new_rows(self, ledger: Ledger) -> bool:
        """Never beside the table: they come with a commit."""
        return False

    def _learn_slices(self) -> None:
        """Nothing: stages and slices are compared as the index has both."""

    def _migrate(self) -> None:
        """Nothing: a push brings what is on the Hub to the newest format."""

    def earlier_slices(self) -> EarlierSlices:
        """By which what was written of this system in format 1 is understood; a copy."""
        earlier = super().earlier_slices()
        earlier.take_in(self.record.get("earlier_slices", {}))
        if not self.is_migrated:
            earlier.learn(self.table)
        return earlier

    def _stage_file(self, key: StageKey, name: str) -> Path:
        return self._download(f"{key.path}/{name}")

    @property
    def _lines_of_rows(self) -> Ledger:
        # What this machine knows of may have come with a later commit.
        return self._published

    def merge_ledger(
        self, other: Ledger, rows: ExampleTable | None = None, weights: str | None = None
    ) -> list[StageKey]:
        """Take in what another copy of the system recorded; its deletions are in force on return."""
        if self.lines_of_rows_not_here(other):
            # They come with their commit, and so does how members weigh.
            self.refresh()
            self._refuse_to_lack_rows(other)
        with self.lock():
            self.refresh_ledger()
            merged = self.ledger.merge(other)
            if merged is not self.ledger:
                self._replace_ledger(merged)
                sign_merge(self.path, merged, other, self.identity)
            return self.condemned_stages()

    def _refuse_to_lack_rows(self, other: Ledger) -> None:
        lacking = self.lines_of_rows_not_here(other)
        if lacking:
            raise HubError(
                f"{self.repo.repo_id} is served at revision={self.revision!r}, before "
                f"{counted(len(lacking), 'addition')} of rows that the main branch has: a push would take them from "
                "it. Load it without `revision`, and push from there; what was deleted here is in force there too."
            )

    def stage_paths(self, key: StageKey) -> dict[str, Path]:
        """None: what this serves is on the Hub."""
        return {}

    def companions(self) -> dict[str, Path]:
        """None: what this serves is on the Hub."""
        return {}

    def config_bytes(self, earlier: EarlierSlices | None = None, gated: bool = False) -> bytes:
        """`s3t_config.json` as it was written, or as a migration makes it."""
        return digested_json(self._record_for_others(earlier, gated))

    def problems(self) -> list[str]:
        """One sentence for each thing that is wrong with the ledger or with a file that serves."""
        found = []
        try:
            self.refresh()
            for key in sorted(self.valid_stages):
                self.adapter_path(key)
        except (FolderError, HubError) as error:
            found.append(str(error))
        return found

    def copy_to(self, path: str | os.PathLike[str]) -> None:
        """
        Pull the system into an empty folder, every valid stage of it: one that can be trained on and pushed from.

        No ledger notes it, unlike the copy of a folder: whoever may read the repository can make one. It learns of
        deletions when it is pushed from, with `merge`, or pulled again.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If the folder is not empty.
            [`~hf_s3t.errors.KeyMissingError`]: If the system's secret is not here.
        """
        target = Path(path)
        if target.exists() and any(target.iterdir()):
            raise FolderError(f"{target} is not empty. Give a new folder to pull the system to.")
        _ = self.key
        # What another process of this machine deleted meanwhile.
        self.refresh_ledger()
        records = {key: self.stage_record(key) for key in sorted(self.valid_stages)}
        companions = sorted(COMPANIONS - {ATTRIBUTES_FILE, IGNORE_FILE, CACHE})
        with hub_errors_as_sentences(self.repo.repo_id, "The pull ended"):
            snapshot = call_with_retries(
                lambda: snapshot_download(
                    self.repo.repo_id,
                    revision=self.commit,
                    token=self.repo.token,
                    cache_dir=self.repo.cache_dir,
                    allow_patterns=[f"{STAGES}/shard-*/*", *companions],
                    ignore_patterns=self._not_pulled(records),
                )
            )
        make_folders(target / STAGES)
        for name in companions:
            if (Path(snapshot) / name).is_file():
                shutil.copyfile(Path(snapshot) / name, target / name)
        for key, record in records.items():
            for name in (ADAPTER_FILE, ADAPTER_CONFIG_FILE):
                check_digest(Path(snapshot) / key.path / name, record["files"][name])
            shutil.copytree(Path(snapshot) / key.path, target / key.path)
        if (self.path / KEY_FILE).is_file():
            shutil.copy2(self.path / KEY_FILE, target / KEY_FILE)
        # Of one time, and with what was deleted while all this took its own.
        self.refresh_ledger()
        table, ledger, valid = self.as_of_one_time()
        discard(target / key.path for key in records.keys() - valid.keys())
        write_table(target / TABLE_FILE, table, ledger)
        if self.has_gate:
            write_gate(target / GATE_FILE, self.load_gate(), ledger, self.record["key_check"])
        write_atomically(target / LEDGER_FILE, ledger.text.encode())
        signatures = self.signatures.text_for(ledger)
        if signatures:
            write_atomically(target / SIGNATURES_FILE, signatures.encode())
        for file in (*target.rglob("*"), target):
            sync(file)
        write_atomically(target / CONFIG_FILE, self.config_bytes(gated=self.has_gate))

    def _not_pulled(self, stages: Collection[StageKey]) -> list[str]:
        """
        Patterns of the paths of all other stages. Each is matched with each file there is: they are no more than there
        are sequences, because what stands on a stage that is not pulled is not pulled either.
        """
        pulled = frozenset(stages)
        # The commit still has what a deletion here condemned, planned or not, which this knows no more.
        known = sorted({*read_index(self._download(INDEX_FILE))["stages"], *self.plan.stages()})
        lowest = (key for key in known if key not in pulled and (not key.parent or key.parent in pulled))
        return [f"{key.path}[-/]*" for key in lowest]
