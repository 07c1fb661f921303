"""What docs/serving.md says of the server: its paths, metrics, options, variables, limits, and its first line."""

import re
import socket
from dataclasses import fields
from pathlib import Path

import pytest
import typer.main


pytest.importorskip("fastapi", reason="the server needs the extra serve")

from fastapi.testclient import TestClient
from support.served import service_of, tiny_system

from hf_s3t.cli.app import app as command_line
from hf_s3t.server.app import create_app
from hf_s3t.server.keys import VARIABLES, Keys, Scope
from hf_s3t.server.running import announcement
from hf_s3t.server.settings import ServerSettings


DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "serving.md").read_text(encoding="utf-8")
OPTIONS = {name for one in typer.main.get_command(command_line).commands["serve"].params for name in one.opts}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    return service_of(tiny_system(tmp_path_factory.mktemp("served") / "llama-alpaca-s3t"))


def test_it_names_every_path_that_there_is_and_no_other(service):
    app = create_app(service)
    described = {re.sub(r"/\{.*", "", path) for path in app.openapi()["paths"]}
    named = set(re.findall(r"(?<![\w.-])/(?:v1/\w+(?:/completions)?|metrics|healthz|readyz)\b", PAGE))
    assert named == described


def test_it_names_every_metric_that_there_is_and_no_other(service):
    shown = TestClient(create_app(service), base_url="http://localhost").get("/metrics").text
    # Beside each counter and histogram stands when it was made.
    told = {name for name in re.findall(r"^# TYPE (\S+)", shown, re.MULTILINE) if not name.endswith("_created")}
    assert set(re.findall(r"\bhf_s3t_\w+", PAGE)) == told


def test_it_names_only_options_that_there_are():
    text = PAGE + re.search(r"^## serve\n.*", (DOCS / "cli.md").read_text(encoding="utf-8"), re.M | re.S)[0]
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    # Of other commands.
    assert named - OPTIONS <= {"--json", "--later", "--max-delay"}
    assert {"--keys", "--port", "--max-queue", "--request-timeout"} <= named


def test_it_names_the_variables_of_keys_and_what_each_scope_may():
    assert set(re.findall(r"HF_S3T_\w+_KEYS", PAGE)) == set(VARIABLES.values())
    rows = re.findall(r"^\| `(\w+)` \| .* \| `(HF_S3T_\w+)` \|$", PAGE, re.MULTILINE)
    assert dict(rows) == {scope.value: VARIABLES[scope] for scope in Scope}


def test_its_limits_are_the_defaults():
    defaults = {one.name: one.default for one in fields(ServerSettings)}
    table = re.search(r"^## Limits\n(.*?)^## ", PAGE, re.MULTILINE | re.DOTALL)[1]
    rows = {name: limit for limit, name in re.findall(r"\| ([^|]*), `--([a-z-]+)` \|", table)}
    assert rows.pop("max-prompt-tokens") == "what the base has room for"
    units = {"1 MiB": 2**20}
    for name, limit in rows.items():
        number = units.get(limit) or float(re.sub(r"[^\d.]", "", limit))
        assert number == defaults[name.replace("-", "_")], name
    assert len(rows) == 5


@pytest.mark.parametrize("page", ["docs/serving.md", "docs/cli.md", "README.md"])
def test_its_first_line_is_what_is_printed(service, page):
    keys = Keys({Scope.ANSWER: ["key-of-the-app"]})
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        printed = announcement(service, listener).replace(str(port), "8000")
        service.keys, none = keys, service.keys
        with_keys = announcement(service, listener).replace(str(port), "8000")
        service.keys = none
    text = (DOCS.parent / page).read_text(encoding="utf-8")
    shown = set(re.findall(r"^.* is at http://.*$", text, re.MULTILINE))
    assert shown == ({printed, with_keys} if page == "docs/serving.md" else {printed})
