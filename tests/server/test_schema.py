"""The app's own description, gone over by schemathesis: whatever is sent, nothing is a fault of the server."""

import pytest
from hypothesis import HealthCheck, given, settings
from support.served import serving, tiny_system
from support.tiny import lm_rows, s3t_config


schemathesis = pytest.importorskip("schemathesis")

# As the description has it, and not as it has it.
MODES = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "system"
    rows = [{**row, "person": f"person-{n // 4}"} for n, row in enumerate(lm_rows(24))]
    config = s3t_config(num_shards=2, group_column="person", partition="balanced")
    tiny_system(path, rows=rows, config=config)
    # Long answers say nothing more.
    with serving(path, max_new_tokens=8) as (url, _):
        yield url


@pytest.mark.slow
@pytest.mark.parametrize("examples", [5, pytest.param(100, marks=pytest.mark.long)])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
def test_whatever_is_sent_is_no_fault_of_the_server(server, mode, examples):
    schema, seen = schemathesis.openapi.from_url(f"{server}/openapi.json"), set()
    for found in schema.get_all_operations():
        operation = found.ok()
        strategy = operation.as_strategy(generation_mode=mode)

        @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=strategy)
        def send(case):
            response = case.call()
            seen.add(response.status_code)
            # An exhausted system says so; nothing else may be the server's fault.
            assert response.status_code < 500 or response.status_code == 503, response.text

        try:
            send()
        except Exception as error:
            # There is nothing that the description forbids of what has no parameters.
            if type(error).__name__ not in ("Unsatisfiable", "SkipTest", "InvalidArgument"):
                raise AssertionError(f"{operation.label}: {error}") from error
    expected = range(200, 300) if mode is schemathesis.GenerationMode.POSITIVE else range(400, 500)
    assert seen.intersection(expected), f"only {sorted(seen)} were seen"
