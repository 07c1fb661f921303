"""`/v1/erasures`: checked, recorded, in force, answered; however often, and by however many at once, it is asked."""

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from support.receipts import OUR_KEY, public
from support.served import HeldTokenizer, listening, served_trainer, service_of, serving, tiny_system
from support.tiny import (
    ids_of,
    lm_rows,
    plant_stages,
    s3t_config,
    tokenizer_of_words,
)

from hf_s3t import S3TModel
from hf_s3t.errors import FolderError
from hf_s3t.folder.erasure_requests_file import ErasureBook
from hf_s3t.folder.layout import ERASURES_FILE, LEDGER_FILE, PENDING_FILE
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.deletion import apply
from hf_s3t.operations.pending import apply_pending, request_later
from hf_s3t.operations.receipts import Receipts
from hf_s3t.records.request import DeletionRequest
from hf_s3t.server.app import create_app
from hf_s3t.server.erasure_schemas import ErasureRequest
from hf_s3t.server.keys import Keys, Scope
from hf_s3t.signing.keys import SIGNING_VARIABLE
from hf_s3t.signing.verification import verify


IDS = ids_of(16)


def rows() -> list[dict]:
    """Four people with four rows each; the last two rows have one content."""
    made = [{**row, "person": f"person-{n // 4}"} for n, row in enumerate(lm_rows(16))]
    twin = {name: value for name, value in made[14].items() if name != "id"}
    return [*made[:15], {"id": IDS[15], **twin}]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A system of two shards, not to be changed."""
    config = s3t_config(num_shards=2, group_column="person", partition="balanced")
    return tiny_system(tmp_path_factory.mktemp("served") / "system", rows=rows(), config=config)


@pytest.fixture
def system(made, tmp_path):
    return shutil.copytree(made, tmp_path / "system")


@pytest.fixture
def server(system):
    with serving(system) as (url, service):
        yield httpx2.Client(base_url=url, timeout=60), service


def erase(client, key=None, dry_run=False, **wanted):
    headers = {} if key is None else {"Idempotency-Key": key}
    return client.post("/v1/erasures", json=wanted, headers=headers, params={"dry_run": True} if dry_run else {})


def ledger_of(system) -> list[str]:
    return (system / LEDGER_FILE).read_text().splitlines()


# Now


def test_what_is_erased_is_in_force_and_proved_when_it_is_answered(server, system):
    client, service = server
    answer = erase(client, ids=IDS[:2])
    told = answer.json()
    assert answer.status_code == 200 and told["object"] == "erasure" and told["status"] == "done"
    assert (told["requested"], told["deleted"], told["already_deleted"], told["unknown"]) == (2, 2, 0, 0)
    folder = SystemFolder(system)
    assert all(map(folder.is_deleted, IDS[:2])) and not set(told["stages_removed"]) & set(map(str, folder.stages))
    assert told["depths_after"] == service.model.status()["depths"] and told["is_exhausted"] is False
    assert told["receipts"] == [Receipts.read(system).of_line(1).to_dict()]
    assert client.get(f"/v1/erasures/{told['id']}").json() == {**told, "duplicates": None}


def test_a_server_with_a_key_answers_with_what_it_signed(server, system, monkeypatch):
    client, _ = server
    assert erase(client, ids=IDS[:1]).json()["signatures"] == [None]
    monkeypatch.setenv(SIGNING_VARIABLE, OUR_KEY)
    told = erase(client, ids=IDS[2:3]).json()
    (envelope,) = told["signatures"]
    statement = verify(json.dumps(envelope).encode(), public())
    assert statement.hash == told["receipts"][0]["hash"] and statement.signed == "written"
    assert OUR_KEY.splitlines()[1] not in json.dumps(client.get("/v1/status").json())


def test_a_group_goes_as_a_whole_and_naming_it_again_is_no_error(server, system):
    client, _ = server
    assert erase(client, groups=["person-1"]).json()["deleted"] == 4
    again = erase(client, groups=["person-1"], ids=IDS[4:5]).json()
    assert (again["deleted"], again["already_deleted"], again["status"]) == (0, 1, "done")
    assert [receipt["line"] for receipt in again["receipts"]] == [1] and len(ledger_of(system)) == 1


def test_examples_of_equal_content_are_told_once_or_go_too(server, system):
    client, _ = server
    told = erase(client, ids=IDS[14:15]).json()
    assert told["duplicates"] == [IDS[15]] and IDS[15] not in (system / ERASURES_FILE).read_text()
    assert client.get(f"/v1/erasures/{told['id']}").json()["duplicates"] is None


def test_examples_of_equal_content_go_too_if_they_are_asked_for(server):
    client, _ = server
    told = erase(client, ids=IDS[14:15], include_duplicates=True).json()
    assert (told["deleted"], told["duplicates"]) == (2, [])


def test_unknown_names_are_refused_and_nothing_is_written(server, system):
    client, _ = server
    for wanted in ({"ids": [IDS[0], "nobody"]}, {"groups": ["no people"]}):
        answer = erase(client, key="1", **wanted)
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "unknown_example"
    assert ledger_of(system) == [] and not (system / ERASURES_FILE).exists()
    told = erase(client, key="1", ids=[IDS[0], "nobody"], missing="ignore").json()
    assert (told["deleted"], told["unknown"]) == (1, 1)


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"ids": []},
        {"ids": "example-001"},
        {"ids": [True]},
        {"ids": [1.5]},
        {"ids": [None]},
        {"ids": ["x"], "max_delay": -1},
        {"ids": ["x"], "max_delay": 1e300},
        {"ids": ["x"], "max_delay": 5, "include_duplicates": True},
        {"ids": ["x"], "missing": "forget"},
        {"ids": ["x"], "on_running": "stop"},
        {"ids": ["x"], "everything": True},
    ],
    ids=json.dumps,
)
def test_a_request_that_is_none_is_422_and_changes_nothing(server, system, wanted):
    client, _ = server
    wanted = {name: [IDS[0]] if value == ["x"] else value for name, value in wanted.items()}
    answer = erase(client, **wanted)
    assert answer.status_code == 422 and answer.json()["error"]["message"]
    assert ledger_of(system) == [] and not (system / ERASURES_FILE).exists()
    assert not (system / PENDING_FILE).exists()


def test_an_erasure_that_exhausts_the_system_is_answered_and_nothing_else_is(server):
    client, service = server
    assert client.get("/readyz").status_code == 200
    told = erase(client, ids=IDS)
    assert told.status_code == 200 and told.json()["is_exhausted"] is True
    assert service.model.is_exhausted
    refused = client.post("/v1/completions", json={"model": "system", "prompt": "w7 w8", "max_tokens": 2})
    assert refused.status_code == 503 and int(refused.headers["Retry-After"]) > 0
    ready = client.get("/readyz")
    assert ready.status_code == 503 and ready.json() == {"status": "exhausted"} and ready.headers["Retry-After"]
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/v1/status").json()["is_exhausted"] is True


# The same request


def test_a_repeated_key_is_the_same_request_after_a_restart_too(system):
    with serving(system) as (url, _):
        client = httpx2.Client(base_url=url)
        first = erase(client, "7f3", ids=IDS[:2]).json()
        assert erase(client, "7f3", ids=IDS[:2]).json() == {**first, "duplicates": None}
        # However the names are written.
        assert erase(client, "7f3", ids=[IDS[1], IDS[0], IDS[0]]).json()["id"] == first["id"]
        assert erase(client, "8a4", ids=IDS[:2]).json()["already_deleted"] == 2
    with serving(system) as (url, _):
        client = httpx2.Client(base_url=url)
        assert erase(client, "7f3", ids=IDS[:2]).json() == {**first, "duplicates": None}
    assert len(ledger_of(system)) == 1


def test_a_key_that_came_with_another_request_is_422_and_changes_nothing(server, system):
    client, _ = server
    erase(client, "7f3", ids=IDS[:1])
    for other in ({"ids": IDS[1:2]}, {"ids": IDS[:1], "max_delay": 5}, {"ids": IDS[:1], "groups": ["person-2"]}):
        answer = erase(client, "7f3", **other)
        assert answer.status_code == 422 and answer.json()["error"]["code"] == "idempotency_key_reused"
    assert len(ledger_of(system)) == 1


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb"], ids=["empty", "too long", "unprintable"])
def test_a_key_that_is_none_is_422(server, system, key):
    client, _ = server
    assert erase(client, key, ids=IDS[:1]).status_code == 422 and ledger_of(system) == []


def test_requests_that_come_at_once_with_one_key_are_one(server, system):
    client, _ = server
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: erase(client, "7f3", ids=IDS[:1]), range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["id"] for answer in answers}) == 1 and len(ledger_of(system)) == 1
    assert sum(answer.json()["duplicates"] is not None for answer in answers) == 1


def test_two_servers_on_one_folder_take_a_request_once(system):
    with serving(system) as (one, _), serving(system) as (other, _):
        clients = [httpx2.Client(base_url=url, timeout=60) for url in (one, other)]
        with ThreadPoolExecutor(6) as pool:
            asked = [
                pool.submit(erase, clients[n % 2], f"key-{n // 2}", ids=IDS[n // 2 : n // 2 + 1]) for n in range(6)
            ]
            told = [one.result().json() for one in asked]
        for n in range(0, 6, 2):
            assert {**told[n], "duplicates": None} == {**told[n + 1], "duplicates": None}
        listed = [client.get("/v1/erasures").json()["data"] for client in clients]
        assert listed[0] == listed[1] and len(listed[0]) == len(ledger_of(system)) == 3


def test_a_request_that_a_death_interrupted_is_gone_on_with_by_its_key(system):
    with serving(system) as (url, service):
        client = httpx2.Client(base_url=url)
        taking, book = service.erasures, service.erasures.book
        names = service.model.folder.key
        from hf_s3t.operations.erasures import record_erasure

        # As it lies there when the process died after the first line.
        wanted = ErasureRequest(ids=IDS[:1])
        with book.taking():
            body = names.of_erasure(wanted.canonical())
            died = record_erasure(book, DeletionRequest(IDS[:1]), body, names.of_repeat_key("7f3"))
        told = client.get(f"/v1/erasures/{died.id}").json()
        assert (told["status"], told["deleted"], told["receipts"]) == ("interrupted", 0, [])
        assert taking is service.erasures
        again = erase(client, "7f3", ids=IDS[:1]).json()
        assert (again["id"], again["status"], again["deleted"]) == (died.id, "done", 1)


def test_what_the_ledger_has_is_carried_to_its_end_when_it_is_repeated(system, caplog):
    """The line was written, and removing the stages failed."""
    with serving(system) as (url, service):
        client, folder = httpx2.Client(base_url=url), service.model.folder

        def fails(keys):
            raise FolderError("There is no room.")

        with pytest.MonkeyPatch.context() as patch, caplog.at_level("ERROR", "hf_s3t.server"):
            patch.setattr(folder, "remove_stages", fails)
            assert erase(client, "7f3", ids=IDS[:1]).status_code == 503
        assert "There is no room." in caplog.text
        assert len(ledger_of(system)) == 1
        told = erase(client, "7f3", ids=IDS[:1])
        assert told.status_code == 200 and told.json()["deleted"] == 1 and told.json()["stages_removed"]
        assert told.json()["duplicates"] is None
        there = {str(key) for key in SystemFolder(system).stages}
        assert not there & set(told.json()["stages_removed"])


def test_stages_that_do_not_answer_now_may_have_done_so_and_nothing_is_cut_for_them(tmp_path):
    data, config = lm_rows(18), s3t_config(num_slices=3, partition="balanced")
    path = tiny_system(tmp_path / "system", rows=data, config=config)
    service = service_of(path)
    create_app(service)
    folder, model = service.model.folder, service.model
    model.unlearn(folder.table.ids_in(0, 0)[:1])
    # Of the slice one stage, which is not the deepest.
    plant_stages(served_trainer(path, data, config=config), limit=1)
    taken = service.erasures.take(ErasureRequest(ids=folder.table.ids_in(0, 0)[:1]))
    assert taken.told.stages_removed == ["shard-0/0"] and taken.told.depths_before == taken.told.depths_after
    assert taken.patience is not None and not taken.cuts


# Later


def test_a_request_that_may_wait_is_202_until_it_is_applied(server, system):
    client, service = server
    asked = erase(client, "7f3", ids=IDS[:2], max_delay=3600)
    told = asked.json()
    assert asked.status_code == 202 and told["status"] == "waiting" and told["deleted"] == 0 and told["apply_by"]
    assert erase(client, "7f3", ids=IDS[:2], max_delay=3600).json() == told
    status = client.get("/v1/status").json()
    assert status["pending"] == 2 and [item["examples"] for item in status["erasures_waiting"]] == [2]
    # By whoever does: `hf-s3t apply-pending`, say.
    apply_pending(SystemFolder(system))
    done = client.get(f"/v1/erasures/{told['id']}").json()
    assert (done["status"], done["deleted"], len(done["receipts"])) == ("done", 2, 1) and done["stages_removed"]
    again = erase(client, "7f3", ids=IDS[:2], max_delay=3600)
    assert again.status_code == 200 and again.json() == done
    assert client.get("/v1/status").json()["erasures_waiting"] == []
    service.model._due.cancel()


def test_what_is_applied_later_is_not_told_as_done_while_answers_still_run_on_it(system):
    tokenizer = HeldTokenizer(tokenizer_of_words())
    with serving(system, tokenizer) as (url, service), ThreadPoolExecutor(3) as pool:
        client, model = httpx2.Client(base_url=url, timeout=60), service.model
        one = model.folder.table.ids_in(0, 0)[0]
        told = erase(client, "7f3", ids=[one], max_delay=3600).json()
        asked = {"model": service.name, "prompt": "w7 w8", "max_tokens": 12, "logit_bias": {"2": -100}}
        tokenizer.hold(after=8)
        answer = pool.submit(client.post, "/v1/completions", json=asked)
        tokenizer.is_holding()
        applied = pool.submit(model.apply_pending)
        while not model.folder.ledger.num_deletions:
            assert not applied.done()
        assert client.get(f"/v1/erasures/{told['id']}").json()["status"] == "running"
        again = pool.submit(erase, client, "7f3", ids=[one], max_delay=3600)
        assert not again.done() and not applied.done()
        tokenizer.let_go()
        assert again.result().json()["status"] == "done" and answer.done() and applied.done()
        assert client.get(f"/v1/erasures/{told['id']}").json()["status"] == "done"
        assert answer.result().status_code == 200


def test_a_request_that_waits_is_kept_by_a_restart_and_applied_when_it_is_due(system):
    with serving(system) as (url, service):
        told = erase(httpx2.Client(base_url=url), ids=IDS[:1], max_delay=0.5).json()
        service.model._due.cancel()
    with serving(system) as (url, service):
        client = httpx2.Client(base_url=url)
        for _ in range(200):
            found = client.get(f"/v1/erasures/{told['id']}").json()
            if found["status"] == "done":
                break
            threading.Event().wait(0.05)
        assert found["status"] == "done" and len(ledger_of(system)) == 1


# Looking


def test_what_another_process_recorded_for_later_is_applied_in_time(server, system):
    """By the command line, say, which is gone when it is due."""
    client, _ = server
    request_later(SystemFolder(system), DeletionRequest(IDS[:1]), max_delay=0.1)
    end = time.monotonic() + 60
    while client.get("/v1/status").json()["deletions"] == 0:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert len(ledger_of(system)) == 1 and SystemFolder(system).is_deleted(IDS[0])


def test_a_dry_run_says_what_would_go_and_changes_nothing(server, system):
    client, _ = server
    before = {file: file.read_bytes() for file in system.rglob("*") if file.is_file()}
    found = erase(client, "7f3", dry_run=True, groups=["person-3"]).json()
    assert {file: file.read_bytes() for file in system.rglob("*") if file.is_file()} == before
    assert found["object"] == "erasure.preview" and found["deleted"] == 4 and found["work_to_regrow"] > 0
    told = erase(client, "7f3", groups=["person-3"]).json()
    assert sorted(found["stages"]) == told["stages_removed"]
    assert [found[name] for name in ("depths_before", "depths_after")] == [told["depths_before"], told["depths_after"]]
    assert erase(client, dry_run=True, ids=["nobody"]).status_code == 404


def test_requests_are_listed_the_newest_first(server):
    client, _ = server
    made = [erase(client, ids=IDS[n : n + 1]).json()["id"] for n in range(3)]
    listed = client.get("/v1/erasures").json()
    assert [one["id"] for one in listed["data"]] == made[::-1] and listed["data"][0]["receipts"] is None
    assert [one["id"] for one in client.get("/v1/erasures", params={"limit": 1}).json()["data"]] == made[2:]
    assert client.get("/v1/erasures/era-of-nobody").status_code == 404
    assert client.get("/v1/erasures", params={"limit": 0}).status_code == 422


def test_examples_are_found_by_ids_and_groups_deleted_ones_too(server):
    client, service = server
    erase(client, ids=IDS[:1])
    found = client.get("/v1/examples", params={"id": IDS[:2], "group": "person-1"}).json()["data"]
    assert found[0] == {"id": IDS[0], "deleted": True, "shard": None, "slice": None, "group": None}
    shard, slice_ = service.model.locate([IDS[1]])[IDS[1]]
    assert found[1] == {"id": IDS[1], "deleted": False, "shard": shard, "slice": slice_, "group": "person-0"}
    assert [one["id"] for one in found[2:]] == IDS[4:8] and {one["group"] for one in found[2:]} == {"person-1"}
    assert client.get("/v1/examples", params={"id": "nobody"}).status_code == 404
    assert client.get("/v1/examples").json() == {"object": "list", "data": []}


def test_what_the_command_line_deletes_beside_the_server_shows(server, system):
    client, _ = server
    told = erase(client, ids=IDS[:1]).json()
    apply(SystemFolder(system), DeletionRequest(IDS[1:2]))
    assert client.get("/v1/status").json()["deletions"] == 2
    assert client.get("/v1/examples", params={"id": IDS[1]}).json()["data"][0]["deleted"] is True
    assert client.get(f"/v1/erasures/{told['id']}").json()["receipts"] == told["receipts"]


def test_integers_may_be_written_as_texts_and_the_other_way_round(tmp_path):
    made = [{**row, "id": number} for number, row in enumerate(lm_rows(12))]
    with serving(tiny_system(tmp_path / "system", rows=made)) as (url, _):
        client = httpx2.Client(base_url=url)
        assert erase(client, "7f3", ids=["3", 4]).json()["deleted"] == 2
        assert erase(client, "7f3", ids=[3, "4"]).json()["deleted"] == 2
        assert erase(client, ids=["three"]).status_code == 422


# Who may


def test_only_who_may_erase_erases(system):
    keys = Keys({Scope.ANSWER: ["answering"], Scope.ERASE: ["erasing-key"], Scope.STATUS: ["watching"]})
    with serving(system, keys=keys) as (url, _):
        paths = [
            ("POST", "/v1/erasures"),
            ("GET", "/v1/erasures"),
            ("GET", "/v1/erasures/era-1"),
            ("GET", "/v1/examples"),
        ]
        for method, path in paths:
            found = []
            for key in ("", "wrong", "answering", "watching"):
                headers = {"Authorization": f"Bearer {key}"} if key else {}
                body = {"json": {"ids": IDS[:1]}} if method == "POST" else {}
                found.append(httpx2.request(method, url + path, headers=headers, **body).status_code)
            assert found == [401, 401, 403, 403], path
        assert ledger_of(system) == []
        client = httpx2.Client(base_url=url, headers={"Authorization": "Bearer erasing-key"})
        assert erase(client, ids=IDS[:1]).status_code == 200
        assert client.get("/v1/status").status_code == 200 and client.get("/metrics").status_code == 200
        assert httpx2.get(f"{url}/metrics").status_code == 401 and httpx2.get(f"{url}/readyz").status_code == 200


def test_a_client_that_goes_away_does_not_stop_its_erasure(system):
    service = service_of(system)
    entered, go_on, model = threading.Event(), threading.Event(), service.model

    def unlearn(*args, **kwargs):
        entered.set()
        go_on.wait(30)
        return S3TModel.unlearn(model, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, listening(create_app(service)) as url:
        patch.setattr(model, "unlearn", unlearn)
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(f"{url}/v1/erasures", json={"ids": IDS[:1]}, timeout=0.5)
        assert entered.wait(30)
        client = httpx2.Client(base_url=url)
        (erasure,) = client.get("/v1/erasures").json()["data"]
        assert erasure["status"] == "running"
        go_on.set()
        # The next one waits for it.
        assert erase(client, ids=IDS[1:2]).status_code == 200
        assert client.get(f"/v1/erasures/{erasure['id']}").json()["status"] == "done"


def test_too_many_at_once_are_told_to_come_again(system):
    service = service_of(system, max_queue=1)
    entered, go_on, model = threading.Event(), threading.Event(), service.model

    def unlearn(*args, **kwargs):
        entered.set()
        go_on.wait(30)
        return S3TModel.unlearn(model, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, listening(create_app(service)) as url, ThreadPoolExecutor(1) as pool:
        patch.setattr(model, "unlearn", unlearn)
        client = httpx2.Client(base_url=url, timeout=60)
        first = pool.submit(erase, client, ids=IDS[:1])
        assert entered.wait(30)
        refused = erase(client, ids=IDS[1:2])
        assert refused.status_code == 429 and refused.headers["Retry-After"]
        go_on.set()
        assert first.result().status_code == 200
    assert len(ErasureBook(SystemFolder(system)).latest()) == 1
