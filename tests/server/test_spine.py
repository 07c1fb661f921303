"""The app as clients see it: what there is, who is let in, and how errors are told."""

import httpx2
import pytest
from support.served import serving, tiny_system

from hf_s3t.server.keys import Keys, Scope


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    return tiny_system(tmp_path_factory.mktemp("served") / "system")


def test_without_keys_a_client_on_this_machine_is_answered(system):
    with serving(system) as (url, service):
        assert httpx2.get(f"{url}/v1/models").json()["data"][0]["id"] == service.name == "system"
        body = {"model": "system", "prompt": "w7 w8", "max_tokens": 3}
        answer = httpx2.post(f"{url}/v1/completions", json=body).json()
        assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}


def test_with_keys_each_request_needs_one_of_its_scope(system):
    keys = Keys({Scope.ANSWER: ["answering"], Scope.ERASE: ["erasing-key"]})
    with serving(system, keys=keys) as (url, _):
        statuses = [
            httpx2.get(f"{url}/v1/models", headers=headers).status_code
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer erasing-key"},
                            {"Authorization": "Bearer answering"})
        ]  # fmt: skip
        assert statuses == [401, 401, 403, 200]
