"""Whoever reads from a streamer gets an end, however the call ends that feeds it."""

import asyncio
import contextlib
import shutil
import threading

import pytest
import torch
from support.insides import routing_of
from support.tiny import batch_of, ids_of, lm_rows, make_trainer, plant_stages, s3t_config, tiny_bert, tiny_llama
from transformers import AsyncTextIteratorStreamer, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from hf_s3t import S3TModel
from hf_s3t.errors import CallStoppedError, ConfigError, ExhaustedError
from hf_s3t.model.streaming import streamer_of


pytestmark = pytest.mark.usefixtures("one_thread")

PATIENCE = 20.0
TOKENS = 6


class Numbers:
    """A tokenizer whose words are the numbers of the tokens."""

    def decode(self, tokens, **settings) -> str:
        return " ".join(map(str, tokens))


class Stop(Exception):
    pass


def at_the_third_token(ids, scores, **kwargs):
    """As a criterion."""
    if ids.shape[1] == 8 + 3:
        raise Stop
    return torch.zeros(len(ids), dtype=torch.bool)


def with_the_third_token(ids, scores):
    """As a processor."""
    if ids.shape[1] == 8 + 3:
        raise Stop
    return scores


class CannotDecode(Numbers):
    def __init__(self):
        self.count = 0

    def decode(self, tokens, **settings):
        self.count += 1
        if self.count > 2:
            raise Stop
        return super().decode(tokens)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("system") / "made"
    plant_stages(make_trainer(folder, tiny_llama(2), lm_rows(24), config=s3t_config(num_shards=2)))
    return folder


def load(folder) -> S3TModel:
    return S3TModel.from_pretrained(folder, base_model=tiny_llama(2))


@pytest.fixture(scope="module")
def serving(made):
    return load(made)


@pytest.fixture
def model(made, tmp_path):
    return load(shutil.copytree(made, tmp_path / "system"))


def prompt(rows: int = 1) -> dict[str, torch.Tensor]:
    return {"input_ids": batch_of(lm_rows(rows))["input_ids"]}


def asked(**settings):
    return {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, **settings}


def reader(**settings) -> TextIteratorStreamer:
    # Without an end, whoever reads gives up with `queue.Empty`.
    return TextIteratorStreamer(settings.pop("tokenizer", Numbers()), skip_prompt=True, timeout=2.0, **settings)


FAILURES = {
    "stopping criterion": (Stop, dict(stopping_criteria=[at_the_third_token])),
    "processor of logits": (Stop, dict(logits_processor=[with_the_third_token])),
    "beams, which do not stream": (ValueError, dict(num_beams=2)),
    "an unknown argument": (ValueError, dict(unheard_of=1)),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_call_that_fails_ends_the_stream(serving, name):
    error, settings = FAILURES[name]
    streamer = reader()
    with pytest.raises(error):
        serving.generate(**prompt(), **asked(**settings), streamer=streamer)
    handed_out = list(streamer)
    assert streamer.text_queue.empty()
    # And it can be used again, from the start.
    serving.generate(**prompt(), **asked(), streamer=streamer)
    whole = "".join(streamer)
    assert whole.startswith("".join(handed_out)) and len(whole.split()) == TOKENS


def test_a_tokenizer_that_fails_ends_the_stream(serving):
    streamer = reader(tokenizer=CannotDecode())
    with pytest.raises(Stop):
        serving.generate(**prompt(), **asked(), streamer=streamer)
    list(streamer)


def test_a_streamer_of_ones_own_is_ended_once_and_its_errors_hide_none(serving):
    class Own(BaseStreamer):
        ends = 0

        def put(self, value):
            pass

        def end(self):
            self.ends += 1
            raise RuntimeError("the listener has gone")

    streamer = Own()
    with pytest.raises(Stop):
        serving.generate(**prompt(), **asked(stopping_criteria=[at_the_third_token]), streamer=streamer)
    assert streamer.ends == 1


def test_a_streamer_may_be_given_by_position(serving):
    streamer = reader()
    before = (None, None, [at_the_third_token], None, None, None)
    with pytest.raises(Stop):
        serving.generate(prompt()["input_ids"], *before, streamer)
    list(streamer)
    assert streamer_of((prompt(), *before, streamer), {}) is streamer and streamer_of((), {}) is None


def test_what_is_refused_before_it_begins_ends_the_stream(model, tmp_path):
    model.unlearn(ids_of(24))
    streamer = reader()
    with pytest.raises(ExhaustedError):
        model.generate(**prompt(), streamer=streamer)
    assert list(streamer) == [""]
    trainer = make_trainer(tmp_path / "classifier", tiny_bert(2))
    plant_stages(trainer)
    with pytest.raises(ConfigError, match="no model that generates"):
        trainer.s3t_model.generate(**prompt(), streamer=streamer)
    assert list(streamer) == [""]


def test_who_awaits_text_gets_an_end(serving):
    async def read() -> list[str]:
        streamer = AsyncTextIteratorStreamer(Numbers(), skip_prompt=True, timeout=2.0)
        settings = asked(stopping_criteria=[at_the_third_token], streamer=streamer)
        call = asyncio.create_task(asyncio.to_thread(serving.generate, **prompt(), **settings))
        pieces = [piece async for piece in streamer]
        with pytest.raises(Stop):
            await call
        return pieces

    assert asyncio.run(read())


# Deletions


class Pausing(TextIteratorStreamer):
    """Stops when it has taken the third token, or at its end, until it is told to go on."""

    def __init__(self, at: str):
        super().__init__(Numbers(), skip_prompt=True, timeout=2.0)
        self.at, self.tokens = at, 0
        self.reached, self.go_on = threading.Event(), threading.Event()

    def put(self, value):
        super().put(value)
        # The first is the prompt.
        self.tokens += 1
        if self.at == "third token" and self.tokens == 4:
            self.wait()

    def end(self):
        super().end()
        if self.at == "end":
            self.wait()

    def wait(self):
        self.reached.set()
        assert self.go_on.wait(PATIENCE)


@contextlib.contextmanager
def stopped_by_a_deletion(model: S3TModel, streamer: Pausing):
    """Inside, the deletion has returned, and the call that it stopped stands still yet."""
    errors = []

    def call():
        try:
            model.generate(**prompt(), **asked(), streamer=streamer)
        except CallStoppedError as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    assert streamer.reached.wait(PATIENCE)
    (tip,) = routing_of(model).served[0]
    model.unlearn([model.folder.table.members(0, tip.prefix[-1])[0]], on_running="cancel")
    yield
    streamer.go_on.set()
    thread.join(PATIENCE)
    assert not thread.is_alive() and len(errors) == 1, "the caller must be told"


def test_a_reader_of_a_stopped_call_gets_its_end_and_no_word_more(model):
    whole = "".join(_read(load(model.folder.path)))
    streamer = Pausing("third token")
    with stopped_by_a_deletion(model, streamer):
        # Two words are handed out; the third was held back until a fourth begins.
        before = [streamer.text_queue.get_nowait() for _ in range(3)]
    after = "".join(streamer)
    assert "".join(before) == " ".join(whole.split()[:2]) + " " and after == ""


def _read(model: S3TModel) -> TextIteratorStreamer:
    streamer = reader()
    model.generate(**prompt(), **asked(), streamer=streamer)
    return streamer


def test_a_stream_that_had_ended_when_the_call_was_stopped_is_not_ended_again(model):
    streamer = Pausing("end")
    with stopped_by_a_deletion(model, streamer):
        assert len("".join(streamer).split()) == TOKENS
    assert streamer.text_queue.empty(), "the next reader would find an end in it"
