"""Answers beside deletions: what runs is waited for, or stopped and begun again; nothing old is told after it."""

import asyncio
import json
import socket
import threading

import httpx2
import openai
import pytest
from support.served import HeldTokenizer, service_of, serving, tiny_system
from support.tiny import s3t_config, tokenizer_of_words

from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.deletion import apply
from hf_s3t.records.request import DeletionRequest
from hf_s3t.server.answers import AnswerResponse, Answers
from hf_s3t.server.app import create_app
from hf_s3t.server.batching import Item
from hf_s3t.server.problems import Problem
from hf_s3t.server.rows import Part


ASKED = {"model": "system", "prompt": "w7 w8", "max_tokens": 12, "temperature": 0, "logit_bias": {"2": -100}}
PATIENCE = 60
# Of an app that is asked without a port.
URL = "http://127.0.0.1"


@pytest.fixture
def system(tmp_path):
    return tiny_system(tmp_path / "system", config=s3t_config(num_shards=2))


@pytest.fixture
def held():
    tokenizer = HeldTokenizer(tokenizer_of_words())
    yield tokenizer
    tokenizer.let_go()


class Asking(threading.Thread):
    """A client in a thread of its own."""

    def __init__(self, url, **more):
        super().__init__(daemon=True)
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self.asked, self.text, self.error = {**ASKED, **more}, "", None
        self.has_some = threading.Event()
        self.start()

    def run(self):
        try:
            answer = self.client.completions.create(**self.asked)
            for chunk in answer if self.asked.get("stream") else [answer]:
                self.text += "".join(choice.text for choice in chunk.choices)
                self.has_some.set()
        except openai.APIError as error:
            self.error = error

    def ended(self):
        self.join(PATIENCE)
        assert not self.is_alive()
        return self


def first_of_a_shard(service) -> str:
    """An example whose deletion takes a stage that serves."""
    return service.model.folder.table.ids_in(0, 0)[0]


def unlearning(service, **how):
    """A deletion in a thread of its own."""
    thread = threading.Thread(target=lambda: service.model.unlearn([first_of_a_shard(service)], **how), daemon=True)
    thread.start()
    return thread


def test_a_cancelled_answer_of_which_nothing_was_sent_is_begun_again_on_what_is_left(system, held):
    with serving(system, held) as (url, service):
        before = Asking(url).ended().text
        # Answers that are not streamed are decoded token by token too.
        held.hold(after=8)
        asking = Asking(url)
        held.is_holding()
        service.model.unlearn([first_of_a_shard(service)], on_running="cancel")
        held.let_go()
        after = asking.ended().text
        assert after == Asking(url).ended().text != before and asking.error is None


def test_a_cancelled_stream_ends_with_an_error_that_clients_understand(system, held):
    with serving(system, held) as (url, service):
        whole = Asking(url).ended().text
        held.hold(after=12)
        asking = Asking(url, stream=True)
        held.is_holding()
        assert asking.has_some.wait(PATIENCE)
        service.model.unlearn([first_of_a_shard(service)], on_running="cancel")
        held.let_go()
        error = asking.ended().error
        assert error is not None and error.code == "stopped_by_erasure" and whole.startswith(asking.text)


def test_waited_for_a_running_answer_ends_as_it_began_and_what_comes_meanwhile_runs_apart(system, held):
    with serving(system, held) as (url, service):
        old = Asking(url).ended().text
        sizes = []
        service.metrics.batch = sizes.append
        held.hold(after=8)
        running = Asking(url)
        held.is_holding()
        deletion = unlearning(service)
        # Until the ledger knows it: from then on calls that begin work on what is left.
        while not service.model.folder.ledger.num_deletions:
            assert deletion.is_alive()
        coming = Asking(url)
        held.is_holding(2)
        assert deletion.is_alive() and sizes == [1, 1]
        held.let_go()
        assert running.ended().text == old
        deletion.join(PATIENCE)
        assert coming.ended().text == Asking(url).ended().text != old


def test_what_another_process_deletes_holds_up_no_answers_that_come_after(system, held):
    with serving(system, held) as (url, service):
        old = Asking(url).ended().text
        held.hold(after=8)
        running = Asking(url)
        held.is_holding()
        apply(SystemFolder(system), DeletionRequest([first_of_a_shard(service)]))
        coming = Asking(url)
        held.is_holding(2)
        held.let_go()
        assert running.ended().text == old
        assert coming.ended().text == Asking(url).ended().text != old


def test_a_deletion_is_settled_when_what_was_computed_before_it_is_handed_out(system, held):
    with serving(system, held) as (url, service):
        held.hold(after=8)
        running = Asking(url)
        held.is_holding()
        loops = [answer._loop for answer in service.answers._open]

        def settled(timeout):
            return asyncio.run_coroutine_threadsafe(service.answers.settled(timeout), loops[0])

        # Nothing was deleted: nothing is waited for.
        assert settled(PATIENCE).result(PATIENCE) == 0
        deletion = unlearning(service)
        while not service.model.folder.ledger.num_deletions:
            assert deletion.is_alive()
        waiting = settled(PATIENCE)
        held.let_go()
        assert waiting.result(PATIENCE) == 0 and running.ended().text
        assert len(service.answers) == 0


def test_an_answer_that_is_not_handed_out_in_time_is_cut(system, held):
    with serving(system, held) as (url, service):
        held.hold(after=8)
        running = Asking(url)
        held.is_holding()
        (answer,) = service.answers._open
        deletion = unlearning(service)
        while not service.model.folder.ledger.num_deletions:
            assert deletion.is_alive()
        cutting = asyncio.run_coroutine_threadsafe(service.answers.settled(0.01), answer._loop)
        assert cutting.result(PATIENCE) == 1
        assert running.ended().error.code == "stopped_by_erasure"
        held.let_go()
        deletion.join(PATIENCE)


def test_an_erasure_is_acknowledged_when_what_was_computed_before_it_is_not_sent_any_more(system):
    async def erase_beside_an_open_answer():
        service = service_of(system)
        app = create_app(service)
        transport = httpx2.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx2.AsyncClient(transport=transport, base_url=URL) as client:
            answer = service.answers.open()
            answer.items = [Item("", answer.put_for(0))]
            answer.items[0].mark = 0
            answer.put_for(0)(Part("of before", [], 1))

            async def send_on():
                # As the one who sends it: it ends when there is nothing that may be sent any more.
                await answer.is_cut.wait()
                service.answers.close(answer)

            sending = asyncio.ensure_future(send_on())
            body = {"ids": [first_of_a_shard(service)], "on_running": "cancel"}
            erased = await client.post("/v1/erasures", json=body, timeout=PATIENCE)
            was_handed_out = answer.is_handed_out.is_set()
            sending.cancel()
            return erased.status_code, was_handed_out

    assert asyncio.run(erase_beside_an_open_answer()) == (200, True)


def answers_of(marks):
    """One answer of two rows that began at these marks, and its answers, at a ledger of two lines."""
    answers = Answers(lambda: 2, PATIENCE)
    answer = answers.open()
    answer.items = [Item("", answer.put_for(index)) for index in range(len(marks))]
    for item, mark in zip(answer.items, marks, strict=True):
        item.mark = mark
    return answers, answer


def test_what_waits_to_be_sent_of_an_answer_that_was_cut_is_not_sent():
    async def cut_and_read():
        answers, answer = answers_of([1])
        answer.put_for(0)(Part("of before", [], 1))
        answer.put_for(0)(Part("too", [], 1))
        await asyncio.sleep(0)
        assert await answers.settled(0.01, cuts=False) == 1 and (await answer.next())[1].text == "of before"
        settling = asyncio.ensure_future(answers.settled(0.01))
        await answer.is_cut.wait()
        with pytest.raises(Problem) as caught:
            await answer.next()
        # Acknowledged is when whoever sent it has stopped.
        assert not settling.done()
        answers.close(answer)
        assert await settling == 1
        return caught.value.code

    assert asyncio.run(cut_and_read()) == "stopped_by_erasure"


def test_an_answer_that_began_again_meanwhile_is_not_cut():
    async def begin_again_while_waited_for():
        answers, answer = answers_of([1, 2])
        waiting = asyncio.ensure_future(answers.settled(0.05))
        await asyncio.sleep(0)
        answer.items[0].begin_again()
        return await waiting

    assert asyncio.run(begin_again_while_waited_for()) == 0


@pytest.mark.parametrize("timeout", [PATIENCE, 0.05])
def test_a_client_that_does_not_read_gets_nothing_later_of_what_is_cut(timeout):
    sent, is_reading = [], asyncio.Event()

    async def send(message):
        if len(sent) == 2 and not is_reading.is_set():
            # As a server does whose buffers are full: it waits, and then writes.
            await is_reading.wait()
        sent.append(message)

    async def receive():
        await asyncio.Event().wait()

    async def events(answer):
        async for _, part in answer.parts():
            yield {"text": part.text}

    async def story():
        mark = 0
        answers = Answers(lambda: mark, timeout)
        answer, item = answers.open(), Item(None, lambda _: None)
        item.mark, answer.items = mark, [item]
        for text in ("first", "second", "third"):
            answer.put_for(0)(Part(text, [], 1))
        response = AnswerResponse(answers, answer, streamed=events(answer))
        scope = {"type": "http"}
        running = asyncio.ensure_future(response(scope, receive, send))
        while len(sent) < 2:
            await asyncio.sleep(0)
        mark = 1
        assert await answers.settled(0.01 if timeout == PATIENCE else PATIENCE) == (timeout == PATIENCE)
        assert item.is_cancelled and not len(answers)
        is_reading.set()
        await running
        return scope["hf_s3t.ended_with"]

    assert asyncio.run(story()) == (503 if timeout == PATIENCE else 504)
    bodies = [message["body"] for message in sent[1:]]
    assert b"first" in bodies[0] and b'"error"' in bodies[1] and len(bodies) == 2


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_goes_frees_its_row(system, held, is_streamed):
    with serving(system, held, max_concurrent_batches=1) as (url, service):
        held.hold(after=8)
        body = json.dumps({**ASKED, "max_tokens": 100, "stream": is_streamed}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        held.is_holding()
        (answer,) = service.answers._open
        client.close()
        _wait_in(answer)
        (row,) = answer.items
        assert row.is_cancelled
        held.let_go()
        assert Asking(url).ended().text
        assert len(row.tokens) < 100


def _wait_in(answer):
    async def handed_out():
        await answer.is_handed_out.wait()

    asyncio.run_coroutine_threadsafe(handed_out(), answer._loop).result(PATIENCE)


def test_an_answer_that_takes_too_long_is_given_up(system, held):
    with serving(system, held, request_timeout=0.3) as (url, _):
        held.hold()
        late = httpx2.post(f"{url}/v1/completions", json=ASKED, timeout=PATIENCE)
        assert late.status_code == 504 and late.json()["error"]["code"] == "timeout"
        stream = httpx2.post(f"{url}/v1/completions", json={**ASKED, "stream": True}, timeout=PATIENCE)
        assert stream.status_code == 504
        held.let_go()


@pytest.mark.slow
def test_a_stream_that_takes_too_long_ends_with_an_error(system, held):
    with serving(system, held, request_timeout=2) as (url, _):
        held.hold(after=12)
        text = httpx2.post(f"{url}/v1/completions", json={**ASKED, "stream": True}, timeout=PATIENCE).text
        held.let_go()
        # It began with 200, and counts as what became of it.
        assert '{route="/v1/completions",status="504"} 1.0' in httpx2.get(f"{url}/metrics").text
        events = [line.removeprefix("data: ") for line in text.splitlines() if line]
        assert json.loads(events[-1])["error"]["code"] == "timeout" and len(events) > 1


def test_when_too_many_wait_further_ones_are_told_to_ask_again(system, held):
    with serving(system, held, max_queue=1, max_concurrent_batches=1) as (url, service):
        held.hold(after=8)
        running = Asking(url)
        held.is_holding()
        thread = Asking(url)
        while not service.batcher.num_waiting:
            assert thread.is_alive()
        refused = httpx2.post(f"{url}/v1/completions", json=ASKED)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        held.let_go()
        assert running.ended().text == thread.ended().text


def test_an_exhausted_system_says_so_and_when_to_ask_again(system):
    with serving(system) as (url, service):
        table = service.model.folder.table
        service.model.unlearn(
            [one for shard in range(2) for number in range(2) for one in table.ids_in(shard, number)]
        )
        refused = httpx2.post(f"{url}/v1/completions", json=ASKED)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "exhausted"
        assert int(refused.headers["retry-after"]) > 0
        assert str(system) not in refused.text
