"""Where a system stands, for people and for what watches it; and logs in which nobody is named."""

import io
import json
import logging
import re
import shutil

import httpx2
import pytest
from support.served import served_trainer, serving, tiny_system
from support.tiny import ids_of, lm_rows, plant_stages, s3t_config

from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.deletion import apply
from hf_s3t.records.request import DeletionRequest
from hf_s3t.server import logs
from hf_s3t.server.keys import Keys, Scope


WATCHED = ("/v1/status", "/metrics", "/healthz", "/readyz")
IDS = ids_of(24)
CONFIG = s3t_config(num_shards=2, partition="balanced")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_system(tmp_path_factory.mktemp("served") / "system", rows=lm_rows(24), config=CONFIG)


@pytest.fixture
def system(made, tmp_path):
    return shutil.copytree(made, tmp_path / "system")


@pytest.fixture
def server(system):
    with serving(system) as (url, service):
        yield httpx2.Client(base_url=url, timeout=60), service


def numbers(text: str) -> dict[str, float]:
    """The samples of an exposition by their names with labels."""
    return {name: float(value) for name, value in re.findall(r"^([a-z][^#\s]*) (\S+)$", text, re.M)}


def test_the_status_is_that_of_the_model_with_its_stacks(server):
    client, service = server
    status, model = client.get("/v1/status").json(), service.model
    expected = model.status()
    assert {
        name: status[name] for name in ("examples", "deletions", "depths", "pending", "work_left", "failures")
    } == {name: expected[name] for name in ("examples", "deletions", "depths", "pending", "work_left", "failures")}
    assert (
        status["model"] == "system" and status["num_shards"] == 2 and status["queue"] == {"waiting": 0, "running": 0}
    )
    planned = [stage for shard in status["shards"] for stage in shard["planned"]]
    assert planned == [str(key) for key in model.folder.plan.stages()]
    serving_now = {s["stage"] for shard in status["shards"] for s in shard["stages"] if s["is_serving"]}
    assert serving_now == {str(key) for key in model._routing.stages}


def test_what_others_delete_and_grow_shows_without_a_request_for_an_answer(server, system):
    client, _ = server
    before = client.get("/v1/status").json()
    apply(SystemFolder(system), DeletionRequest(IDS[:1]))
    less = client.get("/v1/status").json()
    assert less["deletions"] == 1 and less["stages_left"] > 0 and sum(less["depths"]) < sum(before["depths"])
    plant_stages(served_trainer(system, lm_rows(24), config=CONFIG), seed=7)
    again = client.get("/v1/status").json()
    assert again["stages_left"] == 0 and again["depths"] == before["depths"]


def test_what_could_not_be_done_is_told_without_the_places_of_this_machine(server, system):
    client, service = server
    service.model._cleaner.problem = (
        f"What went is still there: {system}/stages/0 could not be removed (see /etc/a b)."
    )
    assert client.get("/v1/status").json()["failures"] == [
        "What went is still there: system/stages/0 could not be removed (see a b)."
    ]


def test_metrics_count_what_was_asked_answered_and_erased(server):
    client, _ = server
    client.post("/v1/completions", json={"model": "system", "prompt": "w7 w8", "max_tokens": 3, "temperature": 0})
    client.post("/v1/erasures", json={"ids": IDS[:2]})
    client.get("/v1/erasures/somebody@example.org")
    client.get("/nothing/here")
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = numbers(answer.text)
    assert found['hf_s3t_requests_total{route="/v1/completions",status="200"}'] == 1
    assert found['hf_s3t_requests_total{route="/v1/erasures/{erasure_id}",status="404"}'] == 1
    assert found['hf_s3t_requests_total{route="",status="404"}'] == 1
    assert found["hf_s3t_prompt_tokens_total"] == 2 and found["hf_s3t_completion_tokens_total"] == 3
    assert found["hf_s3t_first_token_seconds_count"] == 1
    assert found["hf_s3t_batch_rows_count"] == found["hf_s3t_unlearning_seconds_count"] == 1
    assert found["hf_s3t_erased_examples_total"] == 2 and found["hf_s3t_deletions"] == 1
    assert found["hf_s3t_examples"] == 22 and found["hf_s3t_exhausted"] == found["hf_s3t_failures"] == 0
    depths = client.get("/v1/status").json()["depths"]
    assert [found[f'hf_s3t_depth{{shard="{n}"}}'] for n in range(2)] == depths
    assert "example.org" not in answer.text


def test_status_and_metrics_need_their_key_and_health_needs_none(system):
    keys = Keys({Scope.ANSWER: ["answering"], Scope.STATUS: ["watching"]})
    with serving(system, keys=keys) as (url, _):
        for path, expected in (("/v1/status", [401, 403, 200]), ("/metrics", [401, 403, 200]),
                               ("/healthz", [200] * 3), ("/readyz", [200] * 3)):  # fmt: skip
            headers = ({}, *({"Authorization": f"Bearer {key}"} for key in ("answering", "watching")))
            assert [httpx2.get(url + path, headers=one).status_code for one in headers] == expected, path


# Logs


@pytest.fixture
def written():
    """What the log says, as it is written; the loggers are left as they were."""
    names = [logging.getLogger(name) for name in ("hf_s3t", "transformers", "uvicorn", "uvicorn.error")]
    before = [(one.handlers, one.propagate, one.level) for one in names]
    stream = io.StringIO()
    logs.start(stream=stream)
    yield stream
    for one, (one.handlers, one.propagate, level) in zip(names, before, strict=True):
        one.setLevel(level)


def test_a_log_has_a_line_for_each_request_and_names_nobody(system, written):
    keys = Keys({Scope.ANSWER: ["answering-key"], Scope.ERASE: ["erasing-key"]})
    bearer_of_status = {"Authorization": "Bearer erasing-key"}
    with serving(system, keys=keys) as (url, _):
        body = {"model": "system", "prompt": "w7 w8", "max_tokens": 3}
        httpx2.post(f"{url}/v1/completions", json=body, headers={"Authorization": "Bearer answering-key"})
        stream = {**body, "stream": True, "logit_bias": {"2": -100}}
        httpx2.post(f"{url}/v1/completions", json=stream, headers={"Authorization": "Bearer answering-key"})
        # Whoever watches asks each second: no line of that.
        assert {httpx2.get(url + path, headers=bearer_of_status).status_code for path in WATCHED} == {200}
        assert httpx2.get(f"{url}/v1/status").status_code == 401
        headers = {"Authorization": "Bearer erasing-key", "Idempotency-Key": "please-once"}
        httpx2.post(f"{url}/v1/erasures", json={"ids": IDS[:1]}, headers=headers)
        httpx2.post(f"{url}/v1/erasures", json={"ids": ["somebody"]}, headers=headers)
        httpx2.get(f"{url}/v1/examples", params={"id": IDS[1]}, headers=headers)
        httpx2.get(f"{url}/v1/erasures/somebody", headers=headers)
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    requests = [line for line in lines if line["event"] == "request"]
    assert [(line["route"], line["status"]) for line in requests] == [
        ("/v1/completions", 200),
        ("/v1/completions", 200),
        ("", 401),
        ("/v1/erasures", 200),
        ("/v1/erasures", 422),
        ("/v1/examples", 200),
        ("/v1/erasures/{erasure_id}", 404),
    ]
    assert all(line["ms"] >= 0 and line["level"] == "info" for line in requests)
    assert requests[1]["prompt_tokens"] == 2 and requests[1]["completion_tokens"] == 3
    assert requests[0]["prompt_tokens"] == 2 and "prompt_tokens" not in requests[3]
    said = written.getvalue()
    assert not [word for word in ("w7", "example-", "somebody", "-key", "please") if word in said]


def test_of_an_error_the_log_has_the_place_and_not_the_words(written):
    try:
        raise KeyError("somebody@example.org")
    except KeyError:
        logging.getLogger("hf_s3t.server").exception("A batch failed.")
    (line,) = map(json.loads, written.getvalue().splitlines())
    assert line["error"] == "KeyError" and "test_status.py" in line["at"][0] and "example.org" not in json.dumps(line)
