"""What a gate is made of: the words of the prompts of training rows, as these were prepared."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..errors import ConfigError
from ..folder.gate_file import StoredGate
from ..records.digests import DigestKey
from ..records.examples import ExampleTable
from ..records.terms import TermRows, vocabulary_digest, words_of
from .dataset_rows import shown_rows, stored_rows
from .rows import StageRows


_TOKENS = "input_ids"
# What says which tokens of a row are answers: those with a label, or those that a mask marks.
_ANSWERS = ("labels", "completion_mask", "assistant_masks")
_NO_LABEL = -100
# Prompts that are made texts of at once, and those that are looked at before anything is written.
_AT_ONCE = 1000
_LOOKED_AT = 100


def check_has_prompts(rows: StageRows, processing_class: Any) -> None:
    """
    Refuse to make a gate of rows whose prompts cannot be read.

    Args:
        rows ([`~hf_s3t.training.rows.StageRows`]): The rows.
        processing_class: The trainer's.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: Saying what is missing.
    """
    tokenizer = tokenizer_of(processing_class)
    if tokenizer is None:
        given = "is missing" if processing_class is None else f"is a {type(processing_class).__name__}"
        raise ConfigError(
            f'gate="terms" reads the words of prompts, and `processing_class` {given}, expected the tokenizer of the '
            "rows. Give it, or leave out `gate`."
        )
    columns = sorted(getattr(rows.prepared, "column_names", None) or next(iter(_shown(rows.prepared)), {}))
    if _TOKENS not in columns:
        raise ConfigError(
            f'gate="terms" reads the words of prompts, and prepared rows have {", ".join(columns) or "nothing"},'
            f" expected `{_TOKENS}` among them. Give rows of tokens, or leave out `gate`."
        )
    if not any(map(words_of, islice(_texts(rows.prepared, tokenizer), _LOOKED_AT))):
        raise ConfigError(
            f'gate="terms" reads the words of prompts, and {type(tokenizer).__name__} makes none of the first rows. '
            "Give the tokenizer that the rows were made with, or leave out `gate`."
        )


def tokenizer_of(processing_class: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer in what a trainer was given to prepare rows."""
    if isinstance(processing_class, ProcessorMixin):
        processing_class = getattr(processing_class, "tokenizer", None)
    return processing_class if isinstance(processing_class, PreTrainedTokenizerBase) else None


def gate_of(rows: StageRows, table: ExampleTable, key: DigestKey, tokenizer: PreTrainedTokenizerBase) -> StoredGate:
    """
    The gate of the rows of a table; what preparation dropped has no part in it.

    Args:
        rows ([`~hf_s3t.training.rows.StageRows`]): The rows.
        table ([`~hf_s3t.records.examples.ExampleTable`]): The examples that are in.
        key ([`~hf_s3t.records.digests.DigestKey`]): The system's secret.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): What the rows were prepared with.
    """
    numbers, positions = rows.positions_of(table)
    known: dict[str, int] = {}
    terms = [_terms(words_of(text), known, key) for text in _texts(rows.prepared, tokenizer)]
    columns = table.columns
    found = TermRows.of(
        columns.id_digests[numbers],
        columns.shards[numbers],
        columns.slices[numbers],
        [terms[position] for position in positions],
    )
    return StoredGate.of(found, table.num_shards, table.num_slices, vocabulary_digest(tokenizer.get_vocab()))


def _terms(words: set[str], known: dict[str, int], key: DigestKey) -> np.ndarray:
    """The distinct terms of some words, ascending; each word is hashed once."""
    new = [word for word in words if word not in known]
    known.update(zip(new, key.of_terms(new).tolist(), strict=True))
    return np.unique(np.array([known[word] for word in words], np.uint32))


def _texts(prepared: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The prompt of each row, in the order of the rows."""
    prompts = map(prompt_tokens, _shown(prepared))
    while some := list(islice(prompts, _AT_ONCE)):
        yield from tokenizer.batch_decode(some, skip_special_tokens=True)


def _shown(prepared: Any) -> Iterator[Mapping[str, Any]]:
    """What is read of each row."""
    if isinstance(prepared, datasets.Dataset) and prepared.format["type"] != "custom":
        return stored_rows(prepared, [name for name in (_TOKENS, *_ANSWERS) if name in prepared.column_names] or None)
    return shown_rows(prepared)


def prompt_tokens(row: Mapping[str, Any]) -> list[int]:
    """
    The tokens of a row before the first that is answered; all of them where that is the first, or none is.

    Args:
        row (mapping): A prepared row, with `input_ids` and perhaps `labels`, `completion_mask` or `assistant_masks`.
    """
    given: Any = row[_TOKENS]
    tokens: list[int] = given.tolist() if hasattr(given, "tolist") else list(given)
    for name in _ANSWERS:
        marks: Any = row.get(name)
        # One label for the row is none of its tokens, and those of a decoder are of other tokens.
        if np.ndim(marks) == 1 and len(marks) == len(tokens):
            nothing = _NO_LABEL if name == "labels" else 0
            begin = next((number for number, mark in enumerate(marks) if int(mark) != nothing), 0)
            return tokens[:begin] or tokens
    return tokens
