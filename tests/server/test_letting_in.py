"""Who is let in, and how much of a body: keys, pages of other sites, bodies that are too large or too slow."""

import asyncio
import socket

import httpx2
import pytest
from support.served import listening, service_of, serving, tiny_system

from hf_s3t.errors import ConfigError
from hf_s3t.server.app import create_app
from hf_s3t.server.keys import Keys, Scope
from hf_s3t.server.limits import BodyLimits, impatient
from hf_s3t.server.running import bound, check_address
from hf_s3t.server.settings import ServerSettings


KEYS = Keys({Scope.ANSWER: ["answering"], Scope.ERASE: ["erasing-key"]})
BODY = {"prompt": "w7 w8", "max_tokens": 3, "temperature": 0}


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    return tiny_system(tmp_path_factory.mktemp("served") / "system")


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def test_with_keys_each_request_needs_one_of_its_scope(system):
    with serving(system, keys=KEYS) as (url, _):
        headers = [
            {},
            bearer("wrong"),
            {"Authorization": "Basic answering"},
            bearer("erasing-key"),
            bearer("answering"),
        ]
        found = [httpx2.get(f"{url}/v1/models", headers=one) for one in headers]
        assert [one.status_code for one in found] == [401, 401, 401, 403, 200]
        assert found[0].headers["www-authenticate"] == "Bearer"
        assert "wrong" not in found[1].text
        # Before anything of the body is read, and also where there is nothing.
        assert httpx2.post(f"{url}/v1/completions", content=b"{").status_code == 401
        assert httpx2.get(f"{url}/v1/nothing").status_code == 401
        assert httpx2.get(f"{url}/v1/nothing", headers=bearer("answering")).status_code == 404


def test_without_keys_a_page_of_another_site_is_not_answered(system):
    with serving(system) as (url, service):

        def ask(**headers):
            given = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
            return httpx2.post(f"{url}/v1/completions", json=BODY, headers=given)

        assert ask().json()["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
        assert ask(Origin="http://localhost:8000").status_code == 200
        assert ask(Host="rebound.example:8000").status_code == 403
        assert ask(Origin="https://else.example").status_code == 403
        assert ask(Origin="null").status_code == 403
        assert ask(Content_Type="text/plain").status_code == 415
        # A proxy may have put this machine's name in the place of the host that was asked.
        assert ask(X_Forwarded_For="203.0.113.7").json()["error"]["code"] == "behind_a_proxy"
        assert httpx2.get(f"{url}/v1/models").json()["data"][0]["id"] == service.name == "system"
        assert httpx2.get(f"{url}/v1/models/system").json()["object"] == "model"
        assert httpx2.get(f"{url}/v1/models/other").status_code == 404
        assert httpx2.delete(f"{url}/v1/models").status_code == 405
        # No redirect: by a proxy's TLS it would lead to where there is none.
        assert httpx2.get(f"{url}/v1/status/").status_code == 404


def test_a_body_that_is_too_large_is_refused_with_and_without_its_length(system):
    with serving(system, max_body_bytes=1000) as (url, _):
        large = b'{"prompt": "' + b"w7 " * 1000 + b'"}'

        def chunks():
            yield large

        for content in (large, chunks()):
            headers = {"Content-Type": "application/json"}
            try:
                refused = httpx2.post(f"{url}/v1/completions", content=content, headers=headers)
            except httpx2.TransportError:
                # It was still sending when the connection was closed.
                continue
            assert refused.status_code == 413


def test_a_body_that_does_not_come_in_time_is_given_up():
    sent = []

    async def receive():
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    limits = BodyLimits(lambda *_: pytest.fail("The app was asked."), ServerSettings(body_timeout=0.01))
    asyncio.run(limits({"type": "http", "headers": [], "method": "POST"}, receive, send))
    assert sent[0]["status"] == 408 and (b"connection", b"close") in sent[0]["headers"]


def test_a_client_that_goes_while_it_sends_is_forgotten():
    async def receive():
        return {"type": "http.disconnect"}

    limits = BodyLimits(lambda *_: pytest.fail("The app was asked."), ServerSettings())
    asyncio.run(limits({"type": "http", "headers": []}, receive, lambda _: pytest.fail("Something was sent.")))


@pytest.mark.parametrize("begun", [b"", b"GET /healthz HTTP/1.1\r\nHost: loc"])
def test_a_connection_on_which_no_request_comes_is_closed(begun):
    async def app(scope, receive, send):
        # An answer may take longer than a request.
        await asyncio.sleep(0.5)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    with listening(app, http=impatient(0.1), lifespan="off") as url:
        assert httpx2.get(url).status_code == 204
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 30) as client:
            client.sendall(begun)
            assert client.recv(1) == b""
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 30) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(1000).startswith(b"HTTP/1.1 204")
            client.sendall(b"G")
            while client.recv(1000):
                continue


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::"])
def test_without_keys_no_other_machine_is_listened_to(host):
    with pytest.raises(ConfigError, match="HF_S3T_ANSWER_KEYS"):
        check_address(ServerSettings(host=host), Keys({}))
    check_address(ServerSettings(host=host), KEYS)


def test_a_port_that_is_taken_is_told_in_a_sentence():
    with bound(ServerSettings(port=0)) as taken:
        taken.listen()
        with pytest.raises(ConfigError, match="cannot listen on 127"):
            bound(ServerSettings(port=taken.getsockname()[1]))


@pytest.mark.parametrize(
    "changes",
    [
        {"port": 70_000}, {"port": -1}, {"host": ""}, {"name": " "}, {"max_batch_size": 0}, {"batch_wait": -1},
        {"request_timeout": 0}, {"max_prompt_tokens": 0}, {"on_running": "kill"}, {"max_queue": True},
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused(changes):
    with pytest.raises(ConfigError):
        ServerSettings(**changes)


def test_an_app_is_described_without_starting_it(system):
    assert create_app(service_of(system)).openapi()["info"]["title"] == "hf_s3t"
