"""The rows of a dataset on the Hub or on this machine: reading them, their ids, and parts of them chosen by id."""

import codecs
import hashlib
import math
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, load_dataset
from datasets.exceptions import DatasetsError

from hf_s3t import S3TConfig
from hf_s3t.errors import ConfigError


_NAMED = 5
# What the libraries that read files and ask the Hub raise where these are not what they should be.
_UNREADABLE = (
    OSError, ValueError, TypeError, LookupError, StopIteration, RuntimeError, DatasetsError, zipfile.BadZipFile,
)  # fmt: skip


@contextmanager
def said_in_one_line(name: str) -> Iterator[None]:
    """
    Say why rows could not be read, whichever library noticed it.

    Args:
        name (`str`): The file, folder or id on the Hub.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: With the innermost reason.
    """
    try:
        yield
    except ConfigError:
        raise
    except StopIteration as error:
        # What `datasets` makes of a json file without a line.
        raise _without_rows(name) from error
    except _UNREADABLE as error:
        if "corresponds to no data" in str(error):
            raise _without_rows(name) from error
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        if isinstance(reason, UnicodeDecodeError):
            raise ConfigError(
                f"{name} is not in {reason.encoding}: {reason.reason} at byte {reason.start}. Give its encoding, such "
                "as `--encoding latin-1`."
            ) from error
        said = next(iter(str(reason).strip().splitlines()), "") or type(reason).__name__
        remedy = (
            "Expected a whole file of the kind that its name says."
            if Path(name).is_file()
            else "Give the path of a file or folder with rows, or an id on the Hub that can be reached from here."
        )
        raise ConfigError(f"{name} cannot be read: {said.rstrip('.')}. {remedy}") from error


def _without_rows(name: str) -> ConfigError:
    return ConfigError(f"{name} holds no rows. Give data with a row for each example.")


@dataclass(frozen=True)
class Source:
    """
    Where rows come from.

    Args:
        name (`str`): An id on the Hub, a file, or a folder that `datasets.load_dataset` understands.
        config, data_dir, revision (`str`, *optional*): As in `datasets.load_dataset`, for the Hub.
        line_format (`str`, *optional*): For a file with a row in each line: a regular expression whose named groups
            are the columns.
        column_names (sequence of `str`, *optional*): For a csv or tsv file without a line of column names.
        encoding (`str`): Encoding of a file of text.
        endings (tuple of `str`): What the names of files can end with.
        remedy (`str`): What to do about a file that ends otherwise.
    """

    name: str
    config: str | None = None
    data_dir: str | None = None
    revision: str | None = None
    line_format: str | None = None
    column_names: Sequence[str] | None = None
    encoding: str = "utf-8"
    endings: tuple[str, ...] = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
    remedy: str = "Give a file that does."

    @property
    def is_file(self) -> bool:
        """Whether this is one file, which has no splits."""
        return Path(self.name).is_file()

    def check(self) -> None:
        """
        Check what can be checked without reading.

        Raises:
            [`~hf_s3t.errors.ConfigError`]: If a file is not there, the encoding is unknown, or the regular expression
                names no columns.
        """
        try:
            codecs.lookup(self.encoding)
        except LookupError as error:
            raise ConfigError(
                f"`--encoding {self.encoding}` is unknown. Give utf-8 or latin-1, for example."
            ) from error
        looks_local = self.name.startswith((".", "/", "~")) or self.name.count("/") > 1 or Path(self.name).suffix in (
            ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".npz", ".txt",
        )  # fmt: skip
        if looks_local and not Path(self.name).exists():
            raise ConfigError(f"There is no file or folder {self.name}. Give a path that exists, or an id on the Hub.")
        if self.line_format is not None:
            try:
                groups = re.compile(self.line_format).groupindex
            except re.error as error:
                raise ConfigError(f"`--line_format {self.line_format}` is no regular expression: {error}.") from error
            if not groups:
                raise ConfigError(
                    f"`--line_format {self.line_format}` has no named groups, which become the columns. Write "
                    r"`(?P<label>\d) (?P<sentence>.*)`, for example."
                )

    def read(self, split: str) -> Dataset:
        """
        Read the rows of a split; of a file, all of them.

        Raises:
            [`~hf_s3t.errors.ConfigError`]: If there is no such split, the file cannot be read as asked, or there are
                no rows.
        """
        self.check()
        with said_in_one_line(self.name):
            rows = self._read(split)
        if len(rows) == 0:
            raise _without_rows(self.name)
        return rows

    def _read(self, split: str) -> Dataset:
        if not self.is_file:
            return self._read_split(split)
        if self.line_format is not None:
            return Dataset.from_list(self._lines())
        suffix = Path(self.name).suffix.lstrip(".")
        if suffix in ("csv", "tsv"):
            # A tsv of the benchmarks quotes nothing, and its texts hold quotation marks; "NA" is a word.
            settings = {"sep": "\t", "quoting": 3} if suffix == "tsv" else {}
            names = list(self.column_names) if self.column_names else None
            return load_dataset(
                "csv",
                data_files=self.name,
                split="train",
                names=names,
                encoding=self.encoding,
                keep_default_na=False,
                **settings,
            )
        if suffix in ("json", "jsonl"):
            return load_dataset("json", data_files=self.name, split="train")
        if suffix == "parquet":
            return load_dataset("parquet", data_files=self.name, split="train")
        raise ConfigError(
            f"{self.name} is a file of an unknown kind: its name ends with none of {', '.join(self.endings)}. "
            f"{self.remedy}"
        )

    def _read_split(self, split: str) -> Dataset:
        try:
            return load_dataset(self.name, self.config, data_dir=self.data_dir, revision=self.revision, split=split)
        except ValueError as error:
            if "split" not in str(error).lower():
                raise
            raise ConfigError(f"{self.name} has no split {split!r}: {error}") from error

    def _lines(self) -> list[dict[str, str]]:
        pattern = re.compile(self.line_format)
        with open(self.name, encoding=self.encoding) as file:
            lines = [line.rstrip("\n") for line in file]
        found = [(number, pattern.fullmatch(line)) for number, line in enumerate(lines, 1) if line.strip()]
        wrong = [number for number, match in found if match is None]
        if wrong:
            raise ConfigError(
                f"{len(wrong)} of {len(found)} lines of {self.name} do not fit `--line_format {self.line_format}`: "
                f"the first is line {wrong[0]}."
            )
        return [match.groupdict() for _, match in found]


# Ids


def check_placing_columns(dataset: Dataset, s3t: S3TConfig, name: str, made: str | None = None) -> None:
    """
    Refuse options that say by which column rows are named or placed, where there is none.

    Args:
        dataset (`Dataset`): The rows as they were read.
        s3t ([`~hf_s3t.S3TConfig`]): What was asked for.
        name (`str`): What to call the dataset in an error.
        made (`str`, *optional*): A column that the recipe makes.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: With the columns there are.
    """
    for option in ("id_column", "group_column", "shard_column", "slice_column"):
        column = getattr(s3t, option)
        if column not in (None, made, *dataset.column_names):
            raise ConfigError(
                f"`--{option} {column}` is no column of {name}, which has {', '.join(dataset.column_names)}. Name one "
                "of these."
            )


def with_ids(dataset: Dataset, id_column: str | None, suggested: str | None) -> tuple[Dataset, str]:
    """
    A dataset with ids: those of the column asked for, suggested or called `id`, or row numbers in a new one.

    Row numbers are those of the whole source, so that they stay what they are when a part of it is chosen.

    Args:
        dataset (`Dataset`): The rows.
        id_column (`str`, *optional*): The column that was asked for.
        suggested (`str`, *optional*): A column that is taken if it is there.

    Returns:
        `tuple[Dataset, str]`: The dataset and the column of ids.
    """
    columns = dataset.column_names
    if id_column is not None:
        return dataset, id_column
    for column in (suggested, "id"):
        if column in columns and not isinstance(dataset.features[column], dict):
            return dataset, column
    if "id" in columns:
        dataset = dataset.remove_columns("id")
    return dataset.add_column("id", list(range(len(dataset)))), "id"


def by_hash(units: Sequence[Any], purpose: str) -> list[Any]:
    """
    The distinct ids (or groups) in an order that depends on each one alone.

    A part of the rows that is chosen so stays the same when others leave, and for all seeds and methods.
    """
    return sorted(set(units), key=lambda unit: hashlib.sha256(f"{purpose}:{unit}".encode()).digest())


def split_off(dataset: Dataset, units: Sequence[Any], share: float, purpose: str) -> tuple[Dataset, Dataset]:
    """
    Split off a share of the ids (or groups), by hash.

    Returns:
        `tuple[Dataset, Dataset]`: What stays, and what was split off.
    """
    order = by_hash(units, purpose)
    taken = set(order[: math.ceil(share * len(order))])
    kept = [position for position, unit in enumerate(units) if unit not in taken]
    off = [position for position, unit in enumerate(units) if unit in taken]
    return dataset.select(kept), dataset.select(off)


def sample(dataset: Dataset, units: Sequence[Any], count: int, purpose: str = "sample") -> Dataset:
    """At most `count` rows, whole groups of them, by hash; in the order they had."""
    sizes: dict[Any, int] = {}
    for unit in units:
        sizes[unit] = sizes.get(unit, 0) + 1
    taken, total = set(), 0
    for unit in by_hash(units, purpose):
        if total + sizes[unit] > count:
            break
        taken.add(unit)
        total += sizes[unit]
    return dataset.select([position for position, unit in enumerate(units) if unit in taken])


# Columns and labels


def check_columns(dataset: Dataset, columns: Sequence[str], task: str, name: str, remedy: str) -> None:
    """
    Refuse a dataset without the columns of its task.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: With the columns there are.
    """
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise ConfigError(
            f"{name} lacks {', '.join(missing)}, which the task {task} needs; its columns are "
            f"{', '.join(dataset.column_names)}. {remedy}"
        )


def label_set(dataset: Dataset, column: str, given: Sequence[str] | None, name: str) -> tuple[str, ...]:
    """
    The label set: as given, or as the dataset declares it. It is not read off the rows.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If it is neither given nor declared.
    """
    if given:
        return tuple(map(str, given))
    feature = dataset.features.get(column)
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    raise ConfigError(
        f"The labels of {name} are not declared, and are not read off its rows: a label that only deleted rows had "
        f"would stay. Name them all, in the order of their numbers: `--label_set A B C`."
    )


def label_numbers(dataset: Dataset, column: str, labels: Sequence[str], name: str) -> list[int]:
    """
    The label of each row as its number in the label set.

    Args:
        dataset (`Dataset`): The rows.
        column (`str`): Column of labels: names or numbers.
        labels (sequence of `str`): The label set.
        name (`str`): What to call the dataset in an error.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If a label is outside the label set.
    """
    numbers = {label: number for number, label in enumerate(labels)}
    declared = dataset.features.get(column)
    names = list(declared.names) if isinstance(declared, ClassLabel) else None
    # With names in common, numbers mean what the dataset says; with none, the label set renames them.
    shared = {name.casefold() for name in names or ()} & {label.casefold() for label in labels}
    translate = names if shared else None

    def number_of(value: Any) -> int | None:
        if isinstance(value, str):
            if value in numbers:
                return numbers[value]
            value = int(value) if value.isdecimal() else None
        if not isinstance(value, Real) or not math.isfinite(value) or value != int(value):
            return None
        value = int(value)
        if not 0 <= value < len(translate or labels):
            return None
        return numbers.get(translate[value]) if translate else value

    def shown(value: Any) -> str:
        return translate[value] if translate and value in range(len(translate)) else repr(value)

    values = dataset.with_format(None)[column][:]
    found = [number_of(value) for value in values]
    wrong = {shown(value) for value, number in zip(values, found, strict=True) if number is None}
    if wrong:
        raise ConfigError(
            f"{sum(number is None for number in found)} rows of {name} have labels outside the label set "
            f"({', '.join(labels)}): {', '.join(sorted(wrong)[:_NAMED])}. Drop these rows, or name the labels by "
            "`--label_set`; a benchmark's test set comes without labels."
        )
    return found


def label_values(dataset: Dataset, column: str, bounds: tuple[float, float] | None, name: str) -> list[float]:
    """
    The label of each row as a number, for regression.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If a label is no number, or out of bounds.
    """
    low, high = bounds or (-math.inf, math.inf)
    found, wrong = [], []
    for value in dataset.with_format(None)[column][:]:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        found.append(number)
        if not (math.isfinite(number) and low <= number <= high):
            wrong.append(repr(value))
    if wrong:
        expected = f"numbers from {low:g} to {high:g}" if bounds else "finite numbers"
        raise ConfigError(
            f"{len(wrong)} rows of {name} have labels that are no {expected}: {', '.join(wrong[:_NAMED])}. Drop these "
            "rows, or choose another `--label_column`; a benchmark's test set comes without labels."
        )
    return found
