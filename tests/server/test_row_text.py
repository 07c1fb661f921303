"""Text as tokens come: joined it is that of the whole, in whole characters, with nothing of a stop string in it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import tokenizer_of_words
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_s3t.server.row_text import Detokenizer, RowText, StopStrings, TokenLogprob


def tokenizer_of_bytes() -> PreTrainedTokenizerFast:
    """Each byte is a token: most characters are several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTES, WORDS = tokenizer_of_bytes(), tokenizer_of_words()


@given(text=st.text(max_size=30), before=st.text(max_size=8))
def test_pieces_joined_are_the_text_and_no_character_is_cut(text, before):
    detokenizer = Detokenizer(BYTES, BYTES(before)["input_ids"] if before else [])
    pieces = [detokenizer.take(token) for token in (BYTES(text)["input_ids"] if text else [])]
    assert "".join([*pieces, detokenizer.rest()]) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_the_space_before_the_first_word_of_an_answer_is_part_of_it():
    detokenizer = Detokenizer(WORDS, WORDS("w7 w8")["input_ids"])
    assert [detokenizer.take(token) for token in WORDS("w9 w10")["input_ids"]] == [" w9", " w10"]


def test_a_character_that_never_becomes_whole_is_told_at_the_end():
    euro = BYTES("€")["input_ids"]
    detokenizer = Detokenizer(BYTES)
    assert [detokenizer.take(token) for token in euro[:2]] == ["", ""] and detokenizer.rest() == "\ufffd"


def cut_slowly(pieces: list[str], strings: list[str]) -> str:
    """The text up to the first stop string, looked for in all of it after each piece."""
    text = ""
    for piece in pieces:
        text += piece
        found = [text.find(string) for string in strings if string in text]
        if found:
            return text[: min(found)]
    return text


LETTERS = st.text("ab", min_size=1, max_size=4)


@given(pieces=st.lists(st.text("ab", max_size=3), max_size=12), strings=st.lists(LETTERS, max_size=3))
def test_a_text_is_cut_before_the_first_stop_string_wherever_its_pieces_end(pieces, strings):
    stop, told = StopStrings(strings), []
    for piece in pieces:
        told.append(stop.take(piece))
        if stop.is_found:
            break
        # What was told is final: it is the beginning of every answer from here.
        assert cut_slowly(pieces, strings).startswith("".join(told))
    told.append(stop.rest())
    assert "".join(told) == cut_slowly(pieces, strings)


def told_of(tokens: list[int], stop: list[str]) -> tuple[str, list[str], list[int]]:
    text, found, entries = RowText(BYTES, [], stop), "", []
    for token in tokens:
        text.take(token, TokenLogprob(BYTES.decode([token]), -1.0, []))
        piece, logprobs = text.ready()
        found, entries = found + piece, entries + logprobs
        if text.is_stopped:
            break
    text.finish()
    piece, logprobs = text.ready()
    return found + piece, [e.token for e in entries + logprobs], [e.start for e in entries + logprobs]


def test_logprobs_come_with_their_text_and_none_of_a_stop_string():
    assert told_of(BYTES("abcd")["input_ids"], ["cd"]) == ("ab", ["a", "b"], [0, 1])
    assert told_of(BYTES("abc")["input_ids"], ["cd"]) == ("abc", ["a", "b", "c"], [0, 1, 2])


def test_tokens_of_one_character_begin_where_it_does():
    text, tokens, starts = told_of(BYTES("a€b")["input_ids"], [])
    assert text == "a€b" and len(tokens) == 5 and starts == [0, 1, 1, 1, 2]


@pytest.mark.parametrize("stop", [[], ["w9"]])
def test_words_are_told_as_the_tokenizer_joins_them(stop):
    text = RowText(WORDS, WORDS("w5")["input_ids"], stop)
    for token in WORDS("w7 w8")["input_ids"]:
        text.take(token, None)
    text.finish()
    assert text.ready()[0] == " w7 w8"
