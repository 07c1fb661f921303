"""What an engine serves: by what the folder says, under names used once, and no longer than a deletion allows."""

import stat
import threading

import pytest
from support.behind import behind, of_last_slice, wait_for
from support.fake_vllm import FakeVllm
from support.folders import add, apply
from support.served import tiny_system
from support.tiny import ids_of, s3t_config

from hf_s3t.errors import ConfigError, ExhaustedError
from hf_s3t.folder.system import SystemFolder


CONFIG = s3t_config(num_slices=3)


@pytest.fixture
def fake():
    with FakeVllm().running() as engine:
        yield engine


@pytest.fixture
def system(tmp_path):
    return tiny_system(tmp_path / "system", config=CONFIG)


def exports_noted(path) -> int:
    return sum(entry.kind == "export" for entry in SystemFolder(path).ledger.entries)


# What is passed on


def test_answers_are_those_of_the_stack_that_the_folder_says(system, fake):
    with behind(system, fake) as server:
        before = server.expected
        assert server.answer(2) == f"{before} {before}"
        server.model.unlearn([of_last_slice(system)])
        after = server.expected
        assert server.answer() == after != before


def test_the_name_at_the_engine_is_seen_by_no_client(system, fake):
    with behind(system, fake) as server:
        (name,) = fake.loaded
        whole = server.ask()
        with server.stream(3, prompt="w7") as events:
            streamed = list(events)
        fake.refusals["complete"] = (400, {"error": {"message": f"{name} has no room for so many tokens"}})
        refused = server.ask()
        assert whole.json()["model"] == "system"
        assert [event["model"] for event in streamed[:-1]] == ["system"] * 3
        assert streamed[-1] == "[DONE]"
        assert (refused.status_code, refused.json()["error"]["message"]) == (
            400,
            "system has no room for so many tokens",
        )
        assert name not in whole.text + str(streamed) + refused.text


def test_a_deletion_returns_when_the_engine_let_go_of_what_saw_the_example(system, fake):
    with behind(system, fake) as server:
        (before,) = fake.loaded
        report = server.model.unlearn([of_last_slice(system)])
        assert (report.depths_before, report.depths_after) == ([3], [2])
        assert server.exports == list(fake.loaded) != [before]
        receipt = server.engine.receipt()
        assert "2 stages deep" in receipt["confirmed"][0]
        assert "lists their names no more" in receipt["confirmed"][1]
        assert [sentence.split()[0:3] for sentence in receipt["not_confirmed"]] == [
            ["That", "their", "weights"],
            ["What", "clients", "do"],
        ]


def test_a_deletion_of_what_no_serving_stage_saw_changes_nothing_at_the_engine(tmp_path, fake):
    system = tiny_system(tmp_path / "system", config=s3t_config(num_slices=2, sequence_selection=[[0], [0, 1]]))
    with behind(system, fake) as server:
        history = list(fake.history)
        server.model.unlearn([of_last_slice(system)], missing="ignore")
        server.model.unlearn([of_last_slice(system)], missing="ignore")
        assert len(fake.history) == len(history) + 1


@pytest.mark.slow
def test_no_name_is_used_twice(system, fake):
    with behind(system, fake) as server:
        for example in ids_of(24):
            server.model.unlearn([example])
    with behind(system, fake):
        pass
    assert len(set(fake.history)) == len(fake.history) >= 3
    assert not fake.loaded


def test_an_exhausted_system_passes_nothing_on(system, fake):
    with behind(system, fake) as server:
        server.model.unlearn(ids_of(24))
        asked = len(fake.requests)
        response = server.ask()
        assert (response.status_code, response.json()["error"]["code"]) == (503, "exhausted")
        assert response.headers["retry-after"]
        assert len(fake.requests) == asked
        assert not fake.loaded and not server.exports
        assert server.model.is_exhausted
        assert isinstance(server.model.switch.names.why, ExhaustedError)


def test_a_system_to_which_a_shard_was_added_passes_nothing_on(system, fake, caplog):
    with behind(system, fake) as server:
        assert server.answer()
        before, asked = SystemFolder(system), len(fake.requests)
        add(before, {f"new-{number}": (1, number) for number in range(3)})
        response = server.ask()
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_not_ready")
        assert len(fake.requests) == asked
        wait_for(lambda: not fake.loaded and not server.exports)
        told = [one.message for one in caplog.records if "Shards were added" in one.message]
        assert len(told) == 1 and "has 2 shards, expected 1" in told[0] and "without `--engine`" in told[0]


# Requests under way


def test_a_deletion_waits_for_requests_under_way_and_new_ones_go_to_what_is_left(system, fake):
    with behind(system, fake) as server:
        (before,) = fake.loaded
        with server.stream(3) as events:
            first = next(events)
            deletion = threading.Thread(target=server.model.unlearn, args=([of_last_slice(system)],))
            deletion.start()
            wait_for(lambda: len(fake.loaded) == 2)
            meanwhile = server.answer()
            assert deletion.is_alive() and before in fake.loaded and before in server.exports
            fake.go()
            rest = list(events)
        deletion.join()
        assert meanwhile == server.expected
        assert [first, *rest][0]["choices"] == rest[-2]["choices"] and rest[-1] == "[DONE]"
        assert before not in fake.loaded and before not in server.exports


def test_a_deletion_that_cancels_ends_a_stream_with_an_error_event(system, fake):
    with behind(system, fake) as server:
        (before,) = fake.loaded
        with server.stream(3) as events:
            next(events)
            server.model.unlearn([of_last_slice(system)], on_running="cancel")
            assert before not in fake.loaded
            (last,) = events
        assert last["error"]["code"] == "stopped_by_erasure"
        assert fake.broken_off == [before]


def test_a_deletion_that_cancels_has_an_answer_begun_again_of_which_nothing_was_sent(system, fake):
    with behind(system, fake) as server:
        (before,) = fake.loaded
        answers = []
        asking = threading.Thread(target=lambda: answers.append(server.answer(2, prompt="slow")))
        asking.start()
        assert fake.begun.wait(30)
        server.model.unlearn([of_last_slice(system)], on_running="cancel")
        fake.go()
        asking.join()
        after = server.expected
        assert answers == [f"{after} {after}"]
        assert fake.broken_off == [before]


def test_a_deletion_waits_no_longer_than_it_was_told(system, fake):
    with behind(system, fake) as server, server.stream(3) as events:
        next(events)
        server.model.unlearn([of_last_slice(system)], timeout=0.1)
        assert len(fake.broken_off) == 1
        assert next(events)["error"]["code"] == "stopped_by_erasure"


@pytest.mark.slow
def test_requests_come_and_go_while_examples_are_deleted_and_each_gets_one_whole_stack(system, fake):
    failed, told = [], []
    with behind(system, fake) as server:
        is_over = threading.Event()

        def ask() -> None:
            while not is_over.is_set():
                response = server.ask(2)
                words = response.json()["choices"][0]["text"].split() if response.is_success else []
                (told if len(set(words)) == 1 else failed).append(response.text)

        clients = [threading.Thread(target=ask) for _ in range(4)]
        for client in clients:
            client.start()
        for _ in range(2):
            server.model.unlearn([of_last_slice(system)])
            server.grow(CONFIG)
        is_over.set()
        for client in clients:
            client.join()
    assert told and not failed


# What other processes do


@pytest.mark.parametrize("asks", [True, False], ids=["and a request comes", "and no request comes"])
def test_a_deletion_by_another_process_is_followed(asks, system, fake):
    with behind(system, fake) as server:
        (before,) = fake.loaded
        apply(SystemFolder(system), [of_last_slice(system)])
        if asks:
            assert server.answer() == server.expected
        wait_for(lambda: before not in fake.loaded and before not in server.exports)
        assert len(fake.loaded) == 1


@pytest.mark.slow
def test_requests_on_what_another_process_deleted_are_waited_for_and_hold_up_no_others(system, fake):
    with behind(system, fake) as server:
        (before,) = fake.loaded
        with server.stream(3) as events:
            next(events)
            apply(SystemFolder(system), [of_last_slice(system)])
            assert server.answer() == server.expected
            assert before in fake.loaded
            apply(SystemFolder(system), [of_last_slice(system)])
            assert server.answer() == server.expected
            fake.go()
            assert list(events)[-1] == "[DONE]"
        wait_for(lambda: before not in fake.loaded)


@pytest.mark.slow
def test_what_is_grown_again_is_taken_up_and_stops_nobody(system, fake):
    with behind(system, fake) as server:
        server.model.unlearn([of_last_slice(system)])
        with server.stream(3) as events:
            next(events)
            server.grow(CONFIG)
            # What serves goes on until the engine has the longer one.
            grown = server.expected
            wait_for(lambda: server.answer() == grown)
            assert server.model.status()["depths"] == [3]
            fake.go()
            assert list(events)[-1] == "[DONE]"
        wait_for(lambda: len(fake.loaded) == 1 and len(server.exports) == 1)


def test_a_request_that_waited_is_applied_in_time(system, fake):
    with behind(system, fake) as server:
        (before,) = fake.loaded
        server.model.unlearn_later([of_last_slice(system)], max_delay=0.1)
        wait_for(lambda: before not in fake.loaded)


# The ledger, and the disk


@pytest.mark.slow
def test_the_ledger_notes_a_stage_once_when_it_first_leaves_the_folder(system, fake):
    with behind(system, fake) as server:
        assert exports_noted(system) == 1
        entry = SystemFolder(system).ledger.entries[0]
        assert len(entry.removed) == 3
        # What is left was noted with the rest.
        server.model.unlearn([of_last_slice(system)])
        assert exports_noted(system) == 1
    with behind(system, fake) as server:
        assert exports_noted(system) == 1
        server.grow(CONFIG)
        wait_for(lambda: exports_noted(system) == 2)


def test_exports_can_be_read_by_this_user_alone_and_are_gone_with_the_server(system, fake):
    with behind(system, fake) as server:
        (name,) = server.exports
        folder = server.model.switch.exports.path
        assert folder == system.with_name("system.engine")
        modes = [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / name, *(folder / name).iterdir())]
        assert modes == [0o700, 0o700, 0o600, 0o600, 0o600][: len(modes)]
    assert not [path for path in folder.iterdir() if path.is_dir()]
    assert not fake.loaded


def test_what_a_server_that_died_left_is_removed_at_the_start(system, fake):
    with behind(system, fake) as server:
        exports = server.model.switch.exports
        died = exports.new_name("0" * 64)
        exports.write(died, lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""))
        without_files = exports.new_name("1" * 64)
    fake.loaded |= {died: "/x", without_files: "/y", "s3t-of-another-server": "/z"}
    with behind(system, fake) as server:
        assert set(fake.loaded) == {*server.exports, "s3t-of-another-server"}
        assert len(server.exports) == 1


@pytest.mark.slow
def test_two_servers_do_not_share_a_folder_of_exports(system, fake, tmp_path):
    with behind(system, fake), pytest.raises(ConfigError, match="in use by another server"), behind(system, fake):
        pass
    with behind(system, fake), behind(system, fake, exports=tmp_path / "others"):
        assert len(fake.loaded) == 2


def test_exports_are_refused_where_they_do_not_belong(system, fake, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    for exports, why in ((system / "exports", "inside the system's folder"), (shared, "others may write")):
        with pytest.raises(ConfigError, match=why), behind(system, fake, exports=exports):
            pass
    assert not fake.history
