"""The app's own description, gone over by schemathesis: whatever is sent, nothing is a fault of the server."""

import shutil

import pytest
from hypothesis import HealthCheck, settings
from support.served import service_of, tiny_system
from support.tiny import ids_of, lm_rows, s3t_config

from hf_s3t.server.app import create_app


schemathesis = pytest.importorskip("schemathesis")

IDS = ids_of(24)


@pytest.fixture(scope="module")
def app_schema(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "system"
    rows = [{**row, "person": f"person-{n // 4}"} for n, row in enumerate(lm_rows(24))]
    config = s3t_config(num_shards=2, group_column="person", partition="balanced")
    tiny_system(path, rows=rows, config=config)
    copy = shutil.copytree(path, path.parent / "copy")
    # Long answers say nothing more, and requests that are refused at once no less.
    app = create_app(service_of(copy, max_new_tokens=8, max_queue=1000))
    return schemathesis.openapi.from_asgi("/openapi.json", app)


lazy = schemathesis.pytest.from_fixture("app_schema")


@pytest.mark.slow
@lazy.parametrize()
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_whatever_is_sent_is_no_fault_of_the_server(case):
    headers = {"Host": "localhost", **({"Content-Type": "application/json"} if case.method == "POST" else {})}
    response = case.call(headers=headers)
    assert response.status_code < 500 or response.status_code == 503, response.text
