"""An engine that is down, refuses, is restarted, or serves others too: what is passed on, and what receipts say."""

import logging

import httpx2
import pytest
from support.behind import Behind, behind, of_last_slice, wait_for
from support.fake_vllm import FakeVllm
from support.folders import apply
from support.served import tiny_system
from support.tiny import ids_of, lora, make_trainer, s3t_config, tiny_bert, tiny_llama

from hf_s3t import S3TModel
from hf_s3t.errors import ConfigError
from hf_s3t.folder.system import SystemFolder
from hf_s3t.server.engine.address import EngineAddress
from hf_s3t.server.engine.model import check_engine_can_serve, load_behind_engine
from hf_s3t.server.engine.vllm import EngineError


CONFIG = s3t_config(num_slices=3)


@pytest.fixture
def fake():
    with FakeVllm().running() as engine:
        yield engine


@pytest.fixture
def system(tmp_path):
    return tiny_system(tmp_path / "system", config=CONFIG)


def is_settled(server: Behind) -> bool:
    """Whether the engine has what serves, and nothing else of this server."""
    loaded = server.model.switch.names.loaded
    return loaded is not None and not server.model.switch.has_work and list(server.fake.loaded) == [loaded.name]


# Down, and up again


@pytest.mark.slow
def test_a_deletion_while_the_engine_is_down_is_in_force_and_finished_when_it_is_back(system, fake):
    with behind(system, fake) as server:
        (before,) = fake.loaded
        fake.stop()
        example = of_last_slice(system)
        report = server.model.unlearn([example])
        assert (report.deleted, report.depths_after) == (1, [2])
        assert SystemFolder(system).is_deleted(example)
        receipt = server.engine.receipt()
        assert receipt["confirmed"] == [
            "No request through this server reaches a stack: nothing is passed on to the engine now."
        ]
        assert f"That the engine let go of {before}" in receipt["not_confirmed"][0]
        assert "Start the engine" in receipt["next_step"]
        refused = server.ask()
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert before not in server.exports
        assert server.engine.status()["problem"] and server.model.status()["failures"]
        fake.start()
        wait_for(lambda: is_settled(server))
        assert server.answer() == server.expected
        assert before not in {name for name, _ in fake.requests}
        assert not server.model.status()["failures"]


def test_an_engine_that_was_restarted_is_given_what_serves_under_a_new_name(system, fake):
    with behind(system, fake) as server:
        answer = server.answer()
        (before,) = fake.loaded
        fake.restart()
        assert server.answer() == answer
        assert before not in fake.loaded
        wait_for(lambda: is_settled(server))
        assert len(server.exports) == 1


@pytest.mark.slow
def test_an_engine_that_is_down_at_the_start_is_asked_until_it_answers(system, fake, caplog):
    fake.stop()
    with caplog.at_level(logging.WARNING), behind(system, fake) as server:
        assert server.ask().status_code == 503
        fake.start()
        wait_for(lambda: is_settled(server))
        assert server.ask().status_code == 200
    assert "No engine answers" in caplog.text


def test_a_request_while_the_engine_is_down_is_told_to_come_again(system, fake):
    with behind(system, fake) as server:
        fake.stop()
        response = server.ask()
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_down")
        assert response.headers["retry-after"] == "5"
        fake.start()


def test_weights_are_not_confirmed_gone_until_the_engine_is_restarted(system, fake):
    with behind(system, fake) as server:
        assert not [s for s in server.engine.receipt()["not_confirmed"] if "memory" in s]
        server.model.unlearn([of_last_slice(system)])
        assert [s for s in server.engine.receipt()["not_confirmed"] if "memory" in s]
        assert "restart the engine" in server.engine.receipt()["next_step"]
        fake.restart()
        server.answer()
        assert not [s for s in server.engine.receipt()["not_confirmed"] if "memory" in s]
        assert "restart the engine" not in server.engine.receipt()["next_step"]


# Refusals of the engine


@pytest.mark.slow
def test_an_engine_that_does_not_let_go_is_told_again_and_the_receipt_says_so(system, fake):
    with behind(system, fake) as server:
        (before,) = fake.loaded
        fake.refusals["unload"] = (500, {"error": {"message": "busy"}})
        server.model.unlearn([of_last_slice(system)])
        receipt = server.engine.receipt()
        assert "2 stages deep" in receipt["confirmed"][0]
        assert f"That the engine let go of {before}: " in receipt["not_confirmed"][0]
        assert "busy" in receipt["not_confirmed"][0]
        assert before in fake.loaded and before not in server.exports
        assert server.answer() and fake.requests[-1][0] != before
        fake.refusals.clear()
        wait_for(lambda: is_settled(server))
        assert server.engine.switch()["confirmed"][1].startswith("The requests on the stacks that served before")


@pytest.mark.slow
def test_a_longer_stack_that_is_refused_leaves_the_one_that_serves(system, fake):
    with behind(system, fake) as server:
        server.model.unlearn([of_last_slice(system)])
        answer = server.answer()
        fake.refusals["load"] = (500, {"error": {"message": "no room"}})
        server.grow(CONFIG)
        wait_for(lambda: server.model.status()["depths"] == [3] and server.engine.status()["problem"])
        assert server.answer() == answer
        fake.refusals.clear()
        wait_for(lambda: server.answer() != answer)
        wait_for(lambda: is_settled(server))


@pytest.mark.parametrize(
    ("refusal", "why"),
    [
        ((404, {"detail": "Not Found"}), "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        ((401, {"error": "Unauthorized"}), "HF_S3T_ENGINE_KEY"),
        ((400, {"error": {"message": "LoRA rank 8 is greater than max_lora_rank 4."}}), "max_lora_rank"),
    ],
    ids=["no runtime updating", "a wrong key", "its rank"],
)
def test_an_engine_that_cannot_serve_the_system_is_refused_at_the_start(refusal, why, system, fake):
    fake.refusals["load"] = refusal
    with pytest.raises(EngineError, match=why), behind(system, fake):
        pass
    fake.refusals.clear()
    with behind(system, fake) as server:
        assert server.answer()


@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        ((400, {"error": {"message": "max_tokens is too large", "code": 400}}), 400, 400),
        ((422, {"error": {"message": "no", "code": "x"}}), 422, "x"),
        ((401, {"error": "Unauthorized"}), 503, "engine_not_ready"),
        ((500, {"error": {"message": "Traceback"}}), 502, "engine_failed"),
    ],
)
def test_what_the_engine_says_of_a_request_is_passed_back_and_its_own_faults_are_not(
    refusal, status, code, system, fake
):
    with behind(system, fake) as server:
        fake.refusals["complete"] = refusal
        for stream in (False, True):
            response = server.ask(stream=stream)
            assert (response.status_code, response.json()["error"]["code"]) == (status, code)
            assert "Traceback" not in response.text


# Limits, keys and clients


def test_the_engine_gets_its_own_key_and_nothing_of_the_client(system, fake):
    with behind(system, fake, key="engines-own") as server:
        body = {"model": "system", "prompt": "w7", "user": "somebody", "metadata": {"a": "b"}}
        httpx2.post(f"{server.url}/v1/completions", json=body, headers={"Authorization": "Bearer clients-own"})
        assert fake.headers[-1]["authorization"] == "Bearer engines-own"
        assert "clients-own" not in str(fake.headers[-1])
        assert fake.requests[-1][1].keys() == {"model", "prompt"}


def test_a_client_that_goes_away_ends_its_request_at_the_engine(system, fake):
    with behind(system, fake) as server:
        with server.stream(3) as events:
            next(events)
        wait_for(lambda: len(fake.broken_off) == 1)
        with pytest.raises(httpx2.ReadTimeout):
            body = {"model": "system", "prompt": "slow", "max_tokens": 3}
            httpx2.post(f"{server.url}/v1/completions", json=body, timeout=0.3)
        wait_for(lambda: len(fake.broken_off) == 2)
        wait_for(lambda: server.model.switch.names.running == 0)


@pytest.mark.slow
def test_an_answer_that_takes_too_long_is_given_up(system, fake):
    with behind(system, fake, request_timeout=2) as server:
        assert server.ask(3, prompt="slow").status_code == 504
        with server.stream(3) as events:
            assert "choices" in next(events)
            assert next(events)["error"]["code"] == "timeout"
        wait_for(lambda: not any(fake.under_way.values()))
        wait_for(lambda: server.model.switch.names.running == 0)


def test_no_more_requests_are_under_way_than_may_be(system, fake):
    with behind(system, fake, max_queue=1) as server, server.stream(3) as events:
        next(events)
        refused = server.ask()
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        fake.go()
        assert list(events)[-1] == "[DONE]"


def test_each_event_is_passed_back_when_it_comes(system, fake):
    with behind(system, fake) as server, server.stream(2) as events:
        # The engine waits with the second until it is told to go on.
        assert "choices" in next(events)
        fake.go()
        assert "choices" in next(events)


# What is refused before anything is loaded


def refused_systems(tmp_path):
    """Systems that an engine cannot serve, and what of them is refused."""
    llama, bert = tiny_llama(), tiny_bert()
    patterned = lora(llama, rank_pattern={"q_proj": 4})
    yield make_trainer(tmp_path / "a", llama, config=s3t_config(num_shards=2)), "2 shards, expected 1"
    yield make_trainer(tmp_path / "b", llama, config=s3t_config(select="all")), 'select="all"'
    yield make_trainer(tmp_path / "c", bert), "a trained head"
    yield make_trainer(tmp_path / "d", llama, peft_config=patterned), "rank_pattern"


def test_systems_that_an_engine_would_answer_for_otherwise_are_refused_by_name(tmp_path, fake):
    for trainer, why in refused_systems(tmp_path):
        with pytest.raises(ConfigError, match=f"{why}.*Serve it without `--engine`"):
            load_behind_engine(trainer.folder.path, fake.url)
        assert not trainer.folder.path.with_name(f"{trainer.folder.path.name}.engine").exists()


def test_a_base_in_8_bits_is_refused(system, fake):
    folder = SystemFolder(system)
    base = {**folder.record["base_model"], "quantization": {"load_in_8bit": True}}
    folder.record = {**folder.record, "base_model": base}
    with pytest.raises(ConfigError, match="8 bits"):
        check_engine_can_serve(folder)


@pytest.mark.parametrize(
    "text", ["127.0.0.1:8001", "ftp://a/v1", "http://", "http://a:99999/v1", "http://a/v1?x=1", ""]
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ConfigError, match="such as http://127"):
        EngineAddress.parse(text)


def test_a_password_in_an_address_is_refused_and_not_shown():
    with pytest.raises(ConfigError, match="HF_S3T_ENGINE_KEY") as refused:
        EngineAddress.parse("http://me:secret@127.0.0.1/v1")
    assert "secret" not in str(refused.value)


def test_an_address_that_others_can_reach_is_told_of():
    addresses = (
        "http://127.0.0.1:1/v1",
        "http://[::1]:1",
        "http://localhost:1/v1/",
        "http://10.0.0.7:1",
        "https://x.org",
    )
    assert [EngineAddress.parse(text).is_loopback for text in addresses] == [True, True, True, False, False]


def test_this_process_holds_no_weights_of_the_base_and_does_not_answer(system, fake):
    with behind(system, fake) as server:
        base = server.model.base_model
        assert sum(tensor.untyped_storage().nbytes() for tensor in base.parameters()) < 10_000
        with pytest.raises(Exception, match="the engine does"):
            server.model(input_ids=base.dummy_inputs["input_ids"])


def test_a_model_that_answers_here_follows_the_same_folder(system, fake):
    with behind(system, fake) as server:
        other = S3TModel.from_pretrained(system, base_model=str(system / "base"))
        other.unlearn([of_last_slice(system)])
        assert server.answer()
        assert server.model.status()["depths"] == other.status()["depths"] == [2]
        apply(SystemFolder(system), ids_of(24))
        assert server.ask().status_code == 503
