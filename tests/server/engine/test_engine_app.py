"""The whole app with an engine behind: routes, keys, limits, erasures, status."""

import contextlib
import json

import httpx2
import pytest
from support.behind import of_last_slice, wait_for
from support.fake_vllm import FakeVllm
from support.served import NO_KEYS, listening, tiny_system
from support.tiny import ids_of, s3t_config

from hf_s3t.errors import ConfigError
from hf_s3t.server.app import create_app
from hf_s3t.server.keys import Keys, Scope
from hf_s3t.server.running import bound, serve, service_behind_engine
from hf_s3t.server.settings import ServerSettings


@pytest.fixture
def fake():
    with FakeVllm().running() as engine:
        yield engine


@pytest.fixture
def system(tmp_path):
    return tiny_system(tmp_path / "system", config=s3t_config(num_slices=3))


@contextlib.contextmanager
def app(system, fake, keys=NO_KEYS, **settings):
    service = service_behind_engine(system, ServerSettings(**settings), keys, fake.url)
    with listening(create_app(service)) as url:
        yield url


def test_an_erasure_is_answered_with_what_is_confirmed_of_the_engine(system, fake):
    with app(system, fake) as url:
        example = of_last_slice(system)
        first = httpx2.post(f"{url}/v1/completions", json={"model": "system", "prompt": "w7", "max_tokens": 1}).json()
        erased = httpx2.post(f"{url}/v1/erasures", json={"ids": [example]}, headers={"Idempotency-Key": "1"}).json()
        assert (erased["status"], erased["depths_after"]) == ("done", [2])
        assert set(erased["engine"]) == {"confirmed", "not_confirmed", "next_step"}
        assert "2 stages deep" in erased["engine"]["confirmed"][0]
        assert str(system.parent) not in json.dumps(erased["engine"])
        then = httpx2.post(f"{url}/v1/completions", json={"prompt": "w7", "max_tokens": 1}).json()
        assert then["choices"][0]["text"] != first["choices"][0]["text"]
        assert then["usage"]["completion_tokens"] == 1
        status = httpx2.get(f"{url}/v1/status").json()
        assert (status["depths"], status["engine"]["depth"], status["engine"]["to_let_go"]) == ([2], 2, 0)
        assert "hf_s3t_completion_tokens_total 2.0" in httpx2.get(f"{url}/metrics").text
        # A stream is counted too, and its client is told only what it asked for.
        stream = httpx2.post(f"{url}/v1/completions", json={"prompt": "w7", "max_tokens": 1, "stream": True}).text
        assert "usage" not in stream and "[DONE]" in stream
        assert "hf_s3t_completion_tokens_total 3.0" in httpx2.get(f"{url}/metrics").text
        assert httpx2.get(f"{url}/readyz").status_code == 200
        httpx2.post(f"{url}/v1/erasures", json={"ids": ids_of(24)}, timeout=60)
        assert httpx2.get(f"{url}/readyz").json() == {"status": "exhausted"}
        exhausted = httpx2.post(f"{url}/v1/completions", json={"prompt": "w7"})
        assert (exhausted.status_code, exhausted.json()["error"]["code"]) == (503, "exhausted")
    assert not fake.loaded


@pytest.mark.slow
def test_a_server_whose_engine_is_down_is_not_ready(system, fake):
    with app(system, fake) as url:
        fake.stop()
        httpx2.post(f"{url}/v1/erasures", json={"ids": [of_last_slice(system)]}, timeout=60)
        answer = httpx2.get(f"{url}/readyz")
        assert (answer.status_code, answer.json()["status"]) == (503, "engine not ready")
        fake.start()
        wait_for(lambda: httpx2.get(f"{url}/readyz").is_success)


def test_requests_need_keys_of_this_server_and_are_checked_before_they_are_passed_on(system, fake):
    with app(system, fake, Keys({Scope.ANSWER: ["answering-key"]}), max_new_tokens=5) as url:
        own = {"Authorization": "Bearer answering-key"}
        asked = len(fake.requests)
        body = {"prompt": "w7", "max_tokens": 1}
        refused = [
            httpx2.post(f"{url}/v1/completions", json=sent, headers=headers).status_code
            for sent, headers in (
                (body, {}),
                ({**body, "model": "another"}, own),
                ({**body, "max_tokens": 6}, own),
                ({**body, "tools": []}, own),
                ({**body, "lora_request": "x"}, own),
            )
        ]
        assert refused == [401, 404, 422, 422, 422]
        assert len(fake.requests) == asked
        answer = httpx2.post(f"{url}/v1/completions", json={**body, "user": "me", "echo": False}, headers=own)
        assert answer.status_code == 200
        assert fake.requests[-1][1].keys() == {"model", "prompt", "max_tokens"}


def test_chats_are_passed_on(system, fake):
    with app(system, fake) as url:
        messages = [{"role": "user", "content": "w7"}]
        body = {"messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        answer = httpx2.post(f"{url}/v1/chat/completions", json=body)
        assert answer.text.endswith("data: [DONE]\n\n")
        sent = fake.requests[-1][1]
        assert sent["messages"] == messages
        assert sent["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("options", "why"), [({"dtype": "bfloat16"}, "dtype"), ({"when_exhausted": "base"}, "exhaust")]
)
def test_options_of_a_base_in_this_process_are_refused(options, why, system, fake):
    with pytest.raises(ConfigError, match=why):
        serve(system, ServerSettings(port=0), NO_KEYS, engine=fake.url, **options)
    bound(ServerSettings(port=0)).close()
    assert not fake.history
