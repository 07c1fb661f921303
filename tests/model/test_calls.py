"""Calls while a deletion arrives: each works on one snapshot; those on the old are waited for or stopped."""

import asyncio
import contextlib
import copy
import random
import shutil
import sys
import threading
import time
import weakref
from contextvars import copy_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.folders import apply
from support.insides import calls_of, routing_of
from support.tiny import batch_of, ids_of, lm_rows, lora, make_trainer, plant_stages, s3t_config, tiny_llama
from transformers.generation.streamers import BaseStreamer

from hf_s3t import S3TModel
from hf_s3t.errors import CallStoppedError, ConfigError, ExhaustedError, S3TError, StaleCacheError
from hf_s3t.folder.layout import PENDING_FILE
from hf_s3t.folder.system import SystemFolder
from hf_s3t.model.calls import Calls, Routing
from hf_s3t.model.route import LENGTHS, ROUTE, Route, noting_lengths, routed
from hf_s3t.model.scope import Scope
from hf_s3t.plan import StageKey


pytestmark = pytest.mark.usefixtures("one_thread")


OLD = Routing([[StageKey(0, (0, 1))], [StageKey(1, (0,))]])
NEW = Routing([[StageKey(0, (0,))], [StageKey(1, (0,))]])
GONE = OLD.stages - NEW.stages
PATIENCE = 20.0


@contextlib.contextmanager
def in_thread(work):
    """Run something beside; its outcome is in the list that is yielded, once the thread was joined at the end."""
    outcome = []

    def run():
        try:
            outcome.append(work())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield outcome
    thread.join(PATIENCE)
    assert not thread.is_alive(), "the thread is stuck"


class Blocked:
    """A call that begins, says so, and ends when it is told to."""

    def __init__(self, calls: Calls):
        self.calls, self.begun, self.go_on = calls, threading.Event(), threading.Event()

    def __call__(self):
        with self.calls.call() as routing:
            self.begun.set()
            assert self.go_on.wait(PATIENCE)
            with self.calls.computing(routing):
                return routing


# The counting


def test_a_call_works_on_one_routing_from_start_to_end():
    calls = Calls(OLD)
    with calls.call() as first:
        calls.switch(NEW)
        with calls.call() as inside:
            assert inside is first is OLD
    with calls.call() as later:
        assert later is NEW


def test_calls_on_two_models_do_not_mix():
    one, other = Calls(OLD), Calls(NEW)
    with one.call() as outer, other.call() as inner:
        assert (outer, inner) == (OLD, NEW)
        assert one.is_inside and other.is_inside
    assert not one.is_inside and not other.is_inside


def test_switching_to_the_same_stacks_keeps_their_route():
    calls = Calls(OLD)
    calls.switch(Routing(OLD.served))
    assert calls.routing is OLD


def test_switching_to_stages_that_were_grown_anew_under_their_names_is_a_switch():
    calls, grown = Calls(Routing(OLD.served, ["one", "other"])), Routing(OLD.served, ["one", "another"])
    calls.switch(grown)
    assert calls.routing is grown


def test_what_stays_is_not_waited_for():
    calls, blocked = Calls(OLD), None
    blocked = Blocked(calls)
    with in_thread(blocked) as outcome:
        assert blocked.begun.wait(PATIENCE)
        calls.switch(NEW)
        assert calls.wait_for(frozenset({StageKey(1, (3,))}), 0)
        assert not calls.wait_for(GONE, 0)
        blocked.go_on.set()
        assert calls.wait_for(GONE, PATIENCE)
    assert outcome == [OLD]


def test_new_calls_go_on_while_an_old_one_is_waited_for():
    calls = Calls(OLD)
    blocked = Blocked(calls)
    with in_thread(blocked):
        assert blocked.begun.wait(PATIENCE)
        calls.switch(NEW)
        with in_thread(lambda: calls.wait_for(GONE, PATIENCE)) as waited:
            with calls.call() as routing:
                assert routing is NEW
            blocked.go_on.set()
        assert waited == [True]


def test_a_stopped_call_raises_instead_of_returning():
    calls = Calls(Routing(OLD.served))
    blocked = Blocked(calls)
    with in_thread(blocked) as outcome:
        assert blocked.begun.wait(PATIENCE)
        calls.switch(NEW)
        calls.stop(GONE)  # returns: a call that computes nothing needs no waiting for
        assert calls.wait_for(GONE, 0)
        blocked.go_on.set()
    assert isinstance(outcome[0], CallStoppedError)
    assert "Call again" in str(outcome[0])


def test_a_call_that_is_stopped_when_it_has_computed_all_does_not_return_it():
    calls, returned = Calls(Routing(OLD.served)), []
    with pytest.raises(CallStoppedError):
        with calls.call() as routing:
            with calls.computing(routing):
                answer = routing
            calls.switch(NEW)
            calls.stop(GONE)
        returned.append(answer)
    assert not returned


def test_a_stopped_call_begins_to_compute_nothing_more():
    calls, computed = Calls(Routing(OLD.served)), []
    with pytest.raises(CallStoppedError), calls.call() as routing:
        calls.switch(NEW)
        calls.stop(GONE)
        with calls.computing(routing):
            computed.append(routing)
    assert not computed and calls.wait_for(OLD.stages, 0)


def test_stopping_waits_for_what_is_being_computed():
    calls, computing, go_on = Calls(Routing(OLD.served)), threading.Event(), threading.Event()

    def work():
        with calls.call() as routing, calls.computing(routing):
            computing.set()
            go_on.wait(PATIENCE)

    with in_thread(work) as outcome:
        assert computing.wait(PATIENCE)
        calls.switch(NEW)
        with in_thread(lambda: calls.stop(GONE)) as stopped:
            time.sleep(0.05)
            assert not stopped
            go_on.set()
        assert stopped == [None]
    assert isinstance(outcome[0], CallStoppedError)


def test_calls_that_end_in_an_error_are_over():
    calls = Calls(OLD)
    with pytest.raises(ZeroDivisionError), calls.call() as routing, calls.computing(routing):
        _ = 1 / 0
    assert calls.wait_for(OLD.stages, 0) and not calls._passes


def test_a_limit_cuts_what_is_deeper_and_leaves_what_is_not():
    deep = Routing([[StageKey(0, (2,))], [StageKey(1, (0, 1, 2))], []])
    assert deep.cut(2).served == ((StageKey(0, (2,)),), (StageKey(1, (0, 1)),), ())
    assert deep.cut(2).stages < deep.stages
    assert deep.cut(None) is deep.cut(3) is deep.cut(4) is deep


# What was started inside of a call and outlives it


@contextlib.contextmanager
def started_inside(calls):
    """The context of a call on the old stacks, as a task that it starts is given it."""
    with calls.call():
        yield copy_context()


def test_a_call_begun_in_a_task_of_a_call_that_has_ended_is_one_of_its_own():
    calls = Calls(OLD)
    with started_inside(calls) as context:
        assert context.run(lambda: calls.is_inside)
    assert not context.run(lambda: calls.is_inside)
    calls.switch(NEW)
    call = Blocked(calls)
    with in_thread(lambda: context.run(call)) as outcome:
        assert call.begun.wait(PATIENCE)
        assert list(calls._calls) == [NEW]
        # It is waited for like any other.
        assert not calls.wait_for(NEW.stages, 0) and calls.wait_for(GONE, 0)
        call.go_on.set()
    assert outcome == [NEW]


def test_steps_are_of_the_thread_that_takes_them_and_end_with_their_call():
    """What another thread, or a task that outlives the call, begins is counted by itself."""
    calls = Calls(OLD)
    assert calls.steps is None
    with calls.call() as routing, calls.stepping(routing):
        assert calls.steps is not None and calls.steps.routing is OLD
        context = copy_context()
        with in_thread(lambda: context.run(lambda: calls.steps)) as outcome:
            pass
        assert outcome == [None]
    assert calls.steps is None and context.run(lambda: calls.steps) is None


def test_a_call_that_joins_the_one_it_was_started_in_and_outlives_it_is_waited_for():
    calls = Calls(OLD)
    with calls.call():
        context = copy_context()
        call = Blocked(calls)
        beside = in_thread(lambda: context.run(call))
        outcome = beside.__enter__()
        assert call.begun.wait(PATIENCE)
    calls.switch(NEW)
    assert not calls.wait_for(GONE, 0), "it computes on the old stacks"
    call.go_on.set()
    beside.__exit__(None, None, None)
    assert outcome == [OLD] and calls.wait_for(GONE, 0)


def test_a_call_brings_the_routing_up_to_date_unless_it_joins_one():
    calls, followed = Calls(OLD), []
    with calls.call(lambda: followed.append(1)):
        context = copy_context()
        with calls.call(lambda: followed.append(2)):
            pass

    def later():
        with calls.call(lambda: (followed.append(3), calls.switch(NEW))) as routing:
            return routing

    assert context.run(later) is NEW and followed == [1, 3]


def test_a_limit_ends_with_its_block_also_in_what_was_started_there():
    calls = Calls(OLD)

    def depths():
        with calls.call() as routing:
            return routing.depths

    with calls.limited_to(1):
        inside = copy_context()
        assert inside.run(depths) == [1, 1]
    assert inside.run(depths) == depths() == [2, 1]


def test_a_limit_around_counts_again_when_the_one_in_it_has_ended():
    calls = Calls(Routing([[StageKey(0, (0, 1, 2))]]))

    def depths():
        with calls.call() as routing:
            return routing.depths

    with calls.limited_to(2):
        with calls.limited_to(1):
            inside = copy_context()
        assert inside.run(depths) == [2]
    assert inside.run(depths) == [3]


def test_two_models_in_one_context_do_not_keep_each_other_s_calls_open():
    one, other = Calls(OLD), Calls(OLD)
    with one.call():
        inside = copy_context()

    def call_the_other():
        with other.call(), other.limited_to(1):
            return one.is_inside, other.is_inside

    assert inside.run(call_the_other) == (False, True)
    with one.limited_to(1):
        inside = copy_context()

    def depths_inside_the_other():
        with other.limited_to(2), other.call(), one.call() as routing:
            return routing.depths

    assert inside.run(depths_inside_the_other) == OLD.depths


def test_blocks_that_have_ended_do_not_pile_up_where_each_task_starts_the_next():
    scope, context = Scope("test"), copy_context()

    def start_another():
        with scope.holding(object()):
            return copy_context()

    for _ in range(50):
        context = context.run(start_another)
    block, length = context.run(scope._innermost.get), 0
    while block is not None:
        assert block.value is None, "what was held is let go"
        block, length = block.outer, length + 1
    assert length <= 2


def test_a_block_of_a_generator_that_is_ended_in_another_context_ends_all_the_same():
    calls = Calls(OLD)

    def limited():
        with calls.limited_to(1):
            yield

    generator = limited()
    context = copy_context()
    context.run(next, generator)
    assert list(generator) == []
    with calls.call() as routing:
        assert routing.depths == OLD.depths
    with context.run(calls.call) as routing:
        assert routing.depths == OLD.depths


def test_a_pass_of_the_base_begun_in_what_outlives_a_call_goes_through_no_route():
    route = Route((StageKey(0, (0,)),))
    with routed(route), noting_lengths():
        inside = copy_context()
        assert ROUTE.get() is route and inside.run(ROUTE.get) is route
    assert inside.run(ROUTE.get) is None and inside.run(LENGTHS.get) is None


# A model


def make_system(folder, seed=0):
    """Two shards of three slices, every sequence: stages of random numbers on a tiny Llama."""
    model, config = tiny_llama(3), s3t_config(num_shards=2, num_slices=3, budget=3, seed=seed)
    # All of a layer: what a stage less changes is to be seen in what is generated.
    peft_config = lora(model, target_modules="all-linear")
    plant_stages(make_trainer(folder, model, lm_rows(24), peft_config=peft_config, config=config))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("system") / "made"
    make_system(folder)
    return folder


@pytest.fixture
def model(made, tmp_path):
    shutil.copytree(made, tmp_path / "system")
    return load(tmp_path / "system")


def load(folder, preload="best", **more) -> S3TModel:
    return S3TModel.from_pretrained(folder, base_model=tiny_llama(3), preload=preload, **more)


def last_of(model: S3TModel, shard: int) -> int | str:
    """An example of the slice that only the tip of the stack of a shard has seen."""
    (tip,) = routing_of(model).served[shard]
    return model.folder.table.members(shard, tip.prefix[-1])[0]


class Streamer(BaseStreamer):
    """Calls back with every token."""

    def __init__(self, callback):
        self.callback = callback

    def put(self, value):
        self.callback()

    def end(self):
        pass


class Pause:
    """A streamer's callback that stops at the third token until it is told to go on."""

    def __init__(self):
        self.reached, self.go_on, self.count = threading.Event(), threading.Event(), 0

    def __call__(self):
        self.count += 1
        if self.count == 3:
            self.reached.set()
            assert self.go_on.wait(PATIENCE)


def generating(model, callback, tokens=8):
    ids = batch_of(lm_rows(1))["input_ids"]
    return lambda: model.generate(
        ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=Streamer(callback)
    )


def test_a_call_follows_a_deletion_that_something_else_read_first(model):
    other = SystemFolder(model.folder.path)
    apply(other, [last_of(model, 0)])
    # Recording a request for later reads the ledger, and with it the other deletion.
    model.unlearn_later([last_of(model, 1)])
    assert not model.folder.has_news()
    model(**batch_of(lm_rows(1)))
    assert routing_of(model).depths == [2, 3]


def test_a_generation_ends_on_the_stacks_it_began_with_and_unlearn_waits_for_it(model):
    pause = Pause()
    expected = generating(model, lambda: None)()
    with in_thread(generating(model, pause)) as generated:
        assert pause.reached.wait(PATIENCE)
        with in_thread(lambda: model.unlearn([last_of(model, 0)])) as unlearned:
            while routing_of(model).depths == [3, 3]:
                time.sleep(0.001)
            assert model.generate(batch_of(lm_rows(1))["input_ids"], max_new_tokens=1) is not None
            assert not unlearned and model.folder.ledger.num_deletions == 1
            pause.go_on.set()
    assert torch.equal(generated[0], expected)
    assert unlearned[0].depths_after == [2, 3]


@pytest.mark.parametrize("how", [{"on_running": "cancel"}, {"timeout": 0.05}], ids=["cancelled", "out of patience"])
def test_a_generation_can_be_stopped_although_its_callback_never_returns(model, how):
    pause = Pause()
    with in_thread(generating(model, pause)) as generated:
        assert pause.reached.wait(PATIENCE)
        report = model.unlearn([last_of(model, 0)], **how)
        assert report.depths_after == [2, 3] and not generated
        pause.go_on.set()
    assert isinstance(generated[0], CallStoppedError)


def test_a_stopped_call_computes_to_the_next_adapted_module_and_no_further(model):
    batch = {"input_ids": batch_of(lm_rows(1))["input_ids"]}
    answers_of(model, batch)  # the first call also finds out whether members can share a pass
    route, layers, begun, ran = routing_of(model).route, model.base_model.model.layers, threading.Event(), []

    def until_stopped(*args):
        begun.set()
        assert route.stopped.wait(PATIENCE)

    layers[0].register_forward_pre_hook(until_stopped)
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *args, number=number: ran.append(number))
    with in_thread(lambda: answers_of(model, batch)) as answered:
        assert begun.wait(PATIENCE)
        report = model.unlearn([last_of(model, 0)], on_running="cancel")
    assert isinstance(answered[0], CallStoppedError) and ran == []
    assert report.depths_after == [2, 3]


def test_the_tokens_of_a_generation_are_one_call_that_a_streamer_may_make_others_in(model, monkeypatch):
    """Each token is a step of it; what a streamer's callback asks the model is one too, for it ends before."""
    begun, call = [], model._calls.call
    monkeypatch.setattr(model._calls, "call", lambda *given: (begun.append(1), call(*given))[1])
    batch, answers = {"input_ids": batch_of(lm_rows(1))["input_ids"]}, []
    expected = answers_of(model, batch)
    begun.clear()
    generating(model, lambda: answers.append(model(**batch).logits), tokens=4)()
    assert len(begun) == 1 and answers and all(torch.equal(answer, expected) for answer in answers)


def test_the_tensors_of_a_stage_are_freed_although_a_call_was_on_it(model):
    pause = Pause()
    (tip,) = routing_of(model).served[0]
    tensors = [weakref.ref(tensor) for tensor in model.stack.tensors(tip).values()]
    with in_thread(generating(model, pause)):
        assert pause.reached.wait(PATIENCE)
        model.unlearn([last_of(model, 0)], on_running="cancel")
        assert not any(tensor() is not None for tensor in tensors)
        pause.go_on.set()


class Leaving(Streamer):
    """A streamer that leaves the context of the call it is in to what outlives it: a queue's consumer, say."""

    def __init__(self):
        super().__init__(lambda: None)

    def end(self):
        self.context = copy_context()


@pytest.mark.parametrize("how", ["copied context", "asyncio.to_thread", "create_task"])
def test_what_a_call_left_behind_answers_by_what_is_left(model, how):
    batch, streamer = batch_of(lm_rows(1)), Leaving()
    model.generate(batch["input_ids"], max_new_tokens=1, min_new_tokens=1, do_sample=False, streamer=streamer)
    (tip,) = routing_of(model).served[0]
    before, path = model(**batch).logits, model.folder.path

    def left_behind():
        if how == "copied context":
            return model(**batch).logits
        if how == "asyncio.to_thread":
            return asyncio.run(call_in_thread(model, batch))
        return asyncio.run(call_in_task(model, batch))

    begun, go_on = threading.Event(), threading.Event()

    def pause(module, args):
        if threading.current_thread() is not threading.main_thread() and not begun.is_set():
            begun.set()
            assert go_on.wait(PATIENCE)

    handle = model.base_model.lm_head.register_forward_pre_hook(pause)
    with in_thread(lambda: streamer.context.run(left_behind)) as answered:
        assert begun.wait(PATIENCE)
        with in_thread(lambda: model.unlearn([last_of(model, 0)])) as unlearned:
            while routing_of(model).depths == [3, 3]:
                time.sleep(0.001)
            assert not unlearned and tip in model.stack.loaded, "the call is waited for"
            go_on.set()
    handle.remove()
    assert torch.equal(answered[0], before) and unlearned[0].depths_after == [2, 3]
    assert torch.equal(streamer.context.run(left_behind), load(path)(**batch).logits)


async def call_in_thread(model, batch):
    return await asyncio.to_thread(lambda: model(**batch).logits)


async def call_in_task(model, batch):
    async def call():
        return model(**batch).logits

    return await asyncio.create_task(call())


ON_ITSELF = {
    "unlearn": lambda model: model.unlearn([last_of(model, 0)]),
    "unlearn_later": lambda model: model.unlearn_later([last_of(model, 0)], max_delay=0),
    "apply_pending": lambda model: model.apply_pending(),
    "refresh": lambda model: model.refresh(),
    "export_adapter": lambda model: model.export_adapter(0, model.folder.path.parent / "exported"),
}


@pytest.mark.parametrize("what", ON_ITSELF)
def test_a_call_does_not_wait_for_itself(model, what):
    raised = []

    def callback():
        with pytest.raises(S3TError) as caught:
            ON_ITSELF[what](model)
        raised.append(str(caught.value))

    generating(model, callback, tokens=2)()
    assert raised and all(f"`{what}` was called from inside" in message for message in raised)
    assert model.folder.ledger.lines == () and not (model.folder.path / PENDING_FILE).exists()
    assert not (model.folder.path.parent / "exported").exists()


def test_a_refused_call_from_inside_leaves_what_waits_waiting(model):
    model.unlearn_later([last_of(model, 0)])
    waiting = (model.folder.path / PENDING_FILE).read_bytes()

    def callback():
        with pytest.raises(S3TError, match="`apply_pending` was called from inside"):
            model.apply_pending()

    generating(model, callback, tokens=2)()
    assert (model.folder.path / PENDING_FILE).read_bytes() == waiting and model.folder.ledger.num_deletions == 0


@pytest.mark.parametrize("depth", [1, 0], ids=["a stack", "the base alone"])
def test_deeper_stacks_are_attached_without_replacing_a_module_under_a_running_call(made, tmp_path, depth):
    folder = Path(shutil.copytree(made, tmp_path / "system"))
    for stage in folder.glob("stages/shard-*/*"):
        if stage.name.count("-") >= depth:
            shutil.rmtree(stage)
    model = load(folder, when_exhausted="base")
    assert routing_of(model).depths == [depth, depth]
    modules, pause = dict(model.base_model.named_modules()), Pause()
    expected = generating(model, lambda: None)()
    with in_thread(generating(model, pause)) as generated:
        assert pause.reached.wait(PATIENCE)
        shutil.copytree(made / "stages", folder / "stages", dirs_exist_ok=True)
        model.refresh()
        assert routing_of(model).depths == [3, 3]
        now = dict(model.base_model.named_modules())
        assert [name for name, module in modules.items() if now[name] is not module] == []
        pause.go_on.set()
    assert torch.equal(generated[0], expected)
    assert not torch.equal(generating(model, lambda: None)(), expected), "the stacks say what the base does not"


def test_a_cache_of_keys_and_values_continues_at_the_depth_it_was_made_at_and_at_no_other(model):
    ids = batch_of(lm_rows(2))["input_ids"]
    with torch.no_grad():
        with model.limited_to(1):
            cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
        with pytest.raises(StaleCacheError):
            model(input_ids=ids[:, 5:], past_key_values=cache)
        with model.limited_to(2), pytest.raises(StaleCacheError):
            model(input_ids=ids[:, 5:], past_key_values=cache)
        with model.limited_to(1):
            whole = model(input_ids=ids).logits
            # A prompt's cache is copied to be continued more than once.
            for kept in (copy.deepcopy(cache), cache):
                continued = model(input_ids=ids[:, 5:], past_key_values=kept).logits
                torch.testing.assert_close(continued, whole[:, 5:])


@pytest.mark.parametrize("wrong", [{"on_running": "kill"}, {"timeout": -1}, {"timeout": "long"}, {"timeout": True}])
def test_how_to_treat_running_calls_is_checked_first(model, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        model.unlearn([last_of(model, 0)], **wrong)
    assert model.folder.ledger.num_deletions == 0


def test_nothing_touches_the_disk_while_the_routing_lock_is_held(model):
    lock, held = model._calls._changed._lock, []
    watching = threading.Event()

    def watch(event, args):
        if watching.is_set() and event.split(".")[0] in ("open", "os", "shutil") and lock.locked():
            held.append((event, args))

    sys.addaudithook(watch)
    watching.set()
    model.unlearn([last_of(model, 0)])
    model.unlearn([last_of(model, 1)])
    watching.clear()
    assert not held


# Other processes


def by_another_process(model: S3TModel, ids) -> None:
    """A deletion through a folder object of its own; the model is not told."""
    apply(SystemFolder(model.folder.path), ids)


def test_a_generation_ends_on_the_stacks_it_began_with_and_the_next_call_follows_what_another_process_deleted(model):
    victims, expected = [last_of(model, 0)], generating(model, lambda: None)()

    def at_the_first_token():
        if victims:
            by_another_process(model, [victims.pop()])

    assert torch.equal(generating(model, at_the_first_token)(), expected)
    assert not torch.equal(generating(model, lambda: None)(), expected) and routing_of(model).depths == [2, 3]


def exported(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_an_export_after_a_deletion_by_another_process_is_of_what_is_left(model, tmp_path):
    (tip,) = routing_of(model).served[0]
    model.export_adapter(0, tmp_path / "before")
    by_another_process(model, [last_of(model, 0)])
    model.export_adapter(0, tmp_path / "after")
    assert exported(tmp_path / "after").keys() < exported(tmp_path / "before").keys()
    (noted,) = [entry for entry in SystemFolder(model.folder.path).ledger.entries if entry.kind == "export"][1:]
    assert set(noted.removed) == {str(key) for key in tip.lineage[:-1]}
    assert routing_of(model).depths == [2, 3]


@pytest.mark.parametrize("shard", [0, 1], ids=["the exported shard", "another"])
def test_a_deletion_by_another_process_that_gets_in_before_an_export_is_followed(model, tmp_path, monkeypatch, shard):
    victim, lock = last_of(model, shard), model.folder.lock

    def overtaken():
        monkeypatch.undo()
        by_another_process(model, [victim])
        return lock()

    monkeypatch.setattr(model.folder, "lock", overtaken)
    model.export_adapter(0, tmp_path / "exported")
    deletion, export = SystemFolder(model.folder.path).ledger.entries
    assert (deletion.kind, export.kind) == ("deletion", "export")
    assert set(export.removed).isdisjoint(deletion.removed) and len(export.removed) == (2 if shard == 0 else 3)
    assert routing_of(model).depths == ([2, 3] if shard == 0 else [3, 2])
    model(**batch_of(lm_rows(1)))
    assert not {str(key) for key in model.stack.loaded} & set(deletion.removed)


def test_a_deletion_that_arrives_while_the_stacks_left_by_another_are_loaded_is_followed_too(model, monkeypatch):
    by_another_process(model, model.folder.table.members(0, routing_of(model).served[0][0].prefix[0])[:1])
    read_adapter = model.folder.read_adapter

    def overtaken(key):
        monkeypatch.undo()
        by_another_process(model, model.folder.table.members(key.shard, key.prefix[0])[:1])
        return read_adapter(key)

    monkeypatch.setattr(model.folder, "read_adapter", overtaken)
    assert answers_of(model, {"input_ids": batch_of(lm_rows(1))["input_ids"]}) is not None
    assert model.folder.ledger.num_deletions == 2 and set(model.stack.loaded) == routing_of(model).stages
    assert routing_of(model).stages <= SystemFolder(model.folder.path).valid_stages
    assert model.check() == []


# Many threads


def answers_of(model: S3TModel, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def naive_answer(model: S3TModel, routing: Routing, batch) -> torch.Tensor | None:
    """The ensemble on a snapshot, with nothing else going on; `None` where no shard is left."""
    calls_of(model).switch(Routing(routing.served))
    return None if model.is_exhausted else answers_of(model, batch)


class Caller:
    """A thread's work: call without end, and note each answer with the snapshots that there were meanwhile."""

    def __init__(self, model: S3TModel, batch, history: list[Routing], over: threading.Event, seed: int):
        self.model, self.batch, self.history, self.over = model, batch, history, over
        self.rng = random.Random(seed)
        self.answers: list[tuple[torch.Tensor, int, int]] = []

    def __call__(self):
        while not self.over.is_set():
            first = len(self.history) - 1
            try:
                if self.rng.random() < 0.3:
                    self.model.generate(self.batch["input_ids"], max_new_tokens=3, do_sample=False)
                else:
                    self.answers.append((answers_of(self.model, self.batch), first, len(self.history)))
            except CallStoppedError:
                continue
            except ExhaustedError:
                return


def hammer(made, tmp_path, rounds: int, preload: str, threads: int = 8) -> int:
    """Threads that call without end while deletions arrive; returns how many answers were compared."""
    batch = {name: tensor for name, tensor in batch_of(lm_rows(2)).items() if name != "labels"}
    compared = 0
    for number in range(rounds):
        folder, untouched = tmp_path / f"{preload}-{number}", tmp_path / f"{preload}-{number}-untouched"
        if number:
            make_system(untouched, seed=number)
        else:
            shutil.copytree(made, untouched)
        shutil.copytree(untouched, folder)
        rng, over = random.Random(number), threading.Event()
        model = load(folder, preload)
        history, switch = [routing_of(model)], calls_of(model).switch
        # Noted before it takes place: no call can work on a snapshot that is not in the list.
        calls_of(model).switch = lambda routing, h=history, s=switch: (h.append(routing), s(routing))[1]
        callers = [Caller(model, batch, history, over, seed) for seed in range(threads)]
        with contextlib.ExitStack() as stack:
            outcomes = [stack.enter_context(in_thread(caller)) for caller in callers]
            for example in rng.sample(ids_of(24), 4):
                time.sleep(rng.random() * 0.2)
                how = {"on_running": rng.choice(["wait", "cancel"]), "timeout": rng.choice([0.01, PATIENCE])}
                model.unlearn([example], **how)
            time.sleep(0.1)
            over.set()
        assert outcomes == [[None]] * threads
        assert set(model.stack.loaded) == (
            set(model.folder.valid_stages) if preload == "all" else routing_of(model).stages
        )
        assert not model._calls._calls and not model._calls._passes
        assert model.check() == []
        naive = load(untouched, "all")
        expected = [naive_answer(naive, routing, batch) for routing in history]
        for answer, first, last in (noted for caller in callers for noted in caller.answers):
            assert any(e is not None and (answer - e).abs().max() < 1e-5 for e in expected[first : last + 1])
            compared += 1
    return compared


@pytest.mark.parametrize("preload", ["best", "all"])
def test_every_answer_is_of_one_snapshot_while_deletions_arrive(made, tmp_path, preload):
    assert hammer(made, tmp_path, 1, preload) > 0


@pytest.mark.slow
@pytest.mark.parametrize("preload", ["best", "all"])
def test_every_answer_is_of_one_snapshot_while_deletions_arrive_for_long(made, tmp_path, preload):
    assert hammer(made, tmp_path, 5, preload) > 0
