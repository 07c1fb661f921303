"""The app's own description, gone over by schemathesis: whatever is sent, nothing is a fault of the server."""

import pytest
from hypothesis import HealthCheck, settings
from support.served import serving, tiny_system
from support.tiny import ids_of, lm_rows, s3t_config


schemathesis = pytest.importorskip("schemathesis")

IDS = ids_of(24)


@pytest.fixture(scope="module")
def app_schema(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "system"
    rows = [{**row, "person": f"person-{n // 4}"} for n, row in enumerate(lm_rows(24))]
    config = s3t_config(num_shards=2, group_column="person", partition="balanced")
    tiny_system(path, rows=rows, config=config)
    # Long answers say nothing more.
    with serving(path, max_new_tokens=8) as (url, _):
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


lazy = schemathesis.pytest.from_fixture("app_schema")


@pytest.mark.slow
@lazy.parametrize()
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_whatever_is_sent_is_no_fault_of_the_server(case):
    response = case.call()
    assert response.status_code < 500 or response.status_code == 503, response.text
