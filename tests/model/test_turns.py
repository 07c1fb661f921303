"""Calls of a live model and stages in training share one base, and neither leaves a trace in the other."""

import asyncio
import contextlib
import random
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from support.insides import stack_of
from support.launched import launched
from support.tiny import (
    batch_of,
    classification_rows,
    lm_rows,
    lora,
    make_trainer,
    plant_stages,
    s3t_config,
    tiny_bert,
    tiny_llama,
    training_arguments,
)
from torch import nn
from transformers import TrainerCallback

from hf_s3t import S3TModel, launch
from hf_s3t.errors import ExhaustedError, S3TError
from hf_s3t.folder.system import SystemFolder
from hf_s3t.model import turns as turns_module
from hf_s3t.model.randomness import RandomStates
from hf_s3t.model.tensor_files import differing_tensors
from hf_s3t.model.turns import Turns


pytestmark = pytest.mark.usefixtures("one_thread", "shared_key")

SOON = 20  # seconds within which what shall happen happens


@pytest.fixture
def base():
    return nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2)).train()


@pytest.fixture
def turns(base):
    return Turns(base)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as threads:
        yield threads


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def has_begun_to_wait(turns, count=1):
    """Wait until so many calls wait."""
    with turns._changed:
        return turns._changed.wait_for(lambda: len(turns._waiting) >= count, SOON)


# Without training


def test_calls_of_several_threads_run_next_to_each_other(turns, pool):
    both = threading.Barrier(2, timeout=SOON)

    def call():
        with turns.call():
            both.wait()
            return True

    assert [future.result() for future in (pool.submit(call), pool.submit(call))] == [True, True]


def test_without_training_a_call_changes_neither_modes_nor_random_states(turns, base):
    before = RandomStates()
    with turns.call():
        assert base.training
    assert RandomStates() == before


# While a stage trains


def test_a_call_waits_until_training_stands_between_two_steps(turns, base, pool):
    done = []

    def call():
        with turns.call():
            done.append((base.training, base[0].training))

    with turns.taken():
        base[0].eval()
        future = pool.submit(call)
        assert has_begun_to_wait(turns) and not done
        with turns.callbacks("on_log"):
            pass
        assert not done
        with turns.callbacks("on_step_begin"):
            pass
        future.result(SOON)
        assert done == [(False, False)]
        # As training had them, module by module.
        assert (base.training, base[0].training, base[1].training) == (True, False, True)


def test_calls_draw_from_random_states_of_their_own_and_training_from_its_own(turns, pool):
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    undisturbed = [draw() for _ in range(3)]

    def call():
        with turns.call():
            return draw()

    answers = []
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    own = [draw() for _ in range(2)]
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    with turns.taken():
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        drawn = []
        for _ in range(2):
            drawn.append(draw())
            future = pool.submit(call)
            assert has_begun_to_wait(turns)
            with turns.callbacks("on_substep_end"):
                pass
            answers.append(future.result(SOON))
        drawn.append(draw())
    assert drawn == undisturbed
    # Where the process was when training began, and on from there: no two answers are alike.
    assert answers == own


def test_all_that_wait_run_together_and_who_comes_later_waits_for_the_next_step(turns, pool, monkeypatch):
    # Where calls take long, those behind them are let in: they may be what the first wait for.
    monkeypatch.setattr(turns_module, "_PATIENCE", 10 * SOON)
    order, go_on, inside = [], threading.Event(), threading.Semaphore(0)

    def call(name):
        with turns.call():
            order.append(name)
            inside.release()
            if name != "late":
                assert go_on.wait(SOON)
            order.append(f"{name} ends")

    def step():
        with turns.callbacks("on_step_begin"):
            order.append("step")

    with turns.taken():
        early = [pool.submit(call, name) for name in ("one", "two")]
        assert has_begun_to_wait(turns, 2)

        def come_late():
            assert inside.acquire(timeout=SOON) and inside.acquire(timeout=SOON)
            late = pool.submit(call, "late")
            assert has_begun_to_wait(turns)
            go_on.set()
            return late

        helper = pool.submit(come_late)
        step()
        late = helper.result(SOON)
        assert not late.done()
        step()
        for future in (*early, late):
            future.result(SOON)
    assert set(order[:2]) == {"one", "two"} and order.index("step") > max(
        order.index(f"{n} ends") for n in ("one", "two")
    )
    assert order.index("late") > order.index("step")


def test_a_call_of_the_training_thread_itself_waits_for_nothing(turns, base):
    with turns.taken():
        torch.manual_seed(0)
        before = RandomStates()
        with turns.callbacks("on_step_end"), turns.call(), turns.call():
            assert not base.training
            draw()
        assert base.training and RandomStates() == before


@pytest.mark.parametrize("how", ["joins a thread", "waits for an event loop", "sleeps meanwhile"])
def test_a_callback_may_wait_for_a_call_of_another_thread(how, turns, base, pool):
    """No next step comes before it: training stands still, and the call goes on."""

    def call():
        with turns.call():
            return base.training

    with turns.taken():
        before = RandomStates()
        with turns.callbacks("on_step_end"):
            if how == "joins a thread":
                assert pool.submit(call).result(SOON) is False
            elif how == "waits for an event loop":
                assert asyncio.run(asyncio.wait_for(asyncio.to_thread(call), SOON)) is False
            else:
                future, pause = pool.submit(call), threading.Event()
                while not future.done():
                    pause.wait(0.01)
        assert base.training and RandomStates() == before


def test_a_call_may_wait_for_another_one_that_it_started(turns, pool, monkeypatch):
    """In a thread that knows nothing of it: while training waits for the first, the second is let in."""
    monkeypatch.setattr(turns_module, "_PATIENCE", 0.05)

    def inner():
        with turns.call():
            return "inner"

    def outer():
        with turns.call():
            return pool.submit(inner).result(SOON)

    with turns.taken():
        future = pool.submit(outer)
        assert has_begun_to_wait(turns)
        with turns.callbacks("on_step_begin"):
            pass
        assert future.result(SOON) == "inner"


def test_what_a_call_started_and_left_behind_is_no_part_of_it_any_more(turns, base):
    """Tasks inherit the context of the call that starts them, and may begin when it has ended."""

    async def call():
        with turns.call():
            return base.training

    async def main():
        with turns.call():
            later = asyncio.create_task(call())
        with turns.taken():
            assert turns.is_inside is False
        return await later

    assert asyncio.run(main()) is True


def test_training_begins_when_the_calls_under_way_have_ended(turns, base, pool):
    begun, go_on, order = threading.Event(), threading.Event(), []

    def call():
        with turns.call():
            begun.set()
            assert go_on.wait(SOON)
            order.append(("call", base.training))

    future = pool.submit(call)
    assert begun.wait(SOON)
    threading.Timer(0.1, go_on.set).start()
    with turns.taken():
        order.append(("training", base.training))
    future.result(SOON)
    assert order == [("call", True), ("training", True)]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_ends_training_lets_the_calls_go_on(error, turns, pool):
    def call():
        with turns.call():
            return True

    with pytest.raises(error), turns.taken():
        future = pool.submit(call)
        assert has_begun_to_wait(turns)
        raise error
    assert future.result(SOON) and pool.submit(call).result(SOON)
    with turns.taken():
        pass


def test_a_call_that_fails_puts_everything_back(turns, base, pool):
    def call():
        with turns.call():
            draw()
            raise ValueError

    with turns.taken():
        before = RandomStates()
        future = pool.submit(call)
        assert has_begun_to_wait(turns)
        with turns.callbacks("on_prediction_step"):
            pass
        with pytest.raises(ValueError):
            future.result(SOON)
        assert base.training and RandomStates() == before


def test_an_interruption_waits_for_the_calls_that_were_let_in(turns, base, pool, monkeypatch):
    """Else they would go on while training takes down what it built."""
    inside, go_on = threading.Event(), threading.Event()

    def call():
        with turns.call():
            inside.set()
            assert go_on.wait(SOON)
            return base.training

    real, raised = turns._changed.wait_for, []

    def interrupted(predicate, timeout=None):
        if threading.current_thread() is threading.main_thread() and turns._aside is not None and not raised:
            raised.append(True)
            threading.Timer(0.1, go_on.set).start()
            raise KeyboardInterrupt
        return real(predicate, timeout)

    with pytest.raises(KeyboardInterrupt), turns.taken():
        future = pool.submit(call)
        assert has_begun_to_wait(turns)
        monkeypatch.setattr(turns._changed, "wait_for", interrupted)
        with turns.callbacks("on_step_begin"):
            pass
    assert raised and future.result(SOON) is False and base.training


def test_a_forward_that_was_prepared_for_training_is_put_aside(turns, base, pool):
    """Mixed precision wraps it, and calls compute in the base's own precision."""

    def call():
        with turns.call():
            return "forward" in vars(base)

    with turns.taken():
        base.forward = base._original_forward = base.forward
        prepared = base.forward
        future = pool.submit(call)
        assert has_begun_to_wait(turns)
        with turns.callbacks("on_step_begin"):
            pass
        assert future.result(SOON) is False and vars(base)["forward"] is prepared


def test_training_twice_on_one_base_or_from_inside_a_call_is_refused(turns, pool):
    def take():
        with turns.taken():
            pass

    with turns.taken(), pytest.raises(S3TError, match="trains on this base already"):
        pool.submit(take).result(SOON)
    with turns.call(), pytest.raises(S3TError, match=r"`train` was called from inside a running call of the model"):
        turns.refuse_inside("train")


# With trainers


def bits_of(trainer):
    folder = trainer.folder
    return {str(key): load_file(folder.adapter_path(key) / "adapter_model.safetensors") for key in folder.stages}


class Serves(TrainerCallback):
    """
    A server of the trainer's live model, whose requests come in the middle of steps.

    In the first steps of a stage the first layer of the base starts a call in another thread, and gives it the time in
    which it would be answered.
    """

    def __init__(self, trainer, call):
        self.trainer, self.call, self.model = trainer, call, trainer.s3t_model
        self.pool, self.futures, self.left = ThreadPoolExecutor(2), [], 0
        trainer.model.get_input_embeddings().register_forward_pre_hook(self.request)

    def on_train_begin(self, args, state, control, **kwargs):
        """Two steps of each stage are disturbed."""
        self.left = 2

    def request(self, module, args):
        """Only of the training thread's own passes."""
        if module.training and self.left and threading.current_thread() is threading.main_thread():
            self.left -= 1
            self.futures.append(self.pool.submit(self.call, self.model))
            wait(self.futures, timeout=0.1)


class Asks(TrainerCallback):
    """Calls the live model from the training thread, after every step."""

    def __init__(self, trainer, call):
        self.trainer, self.call = trainer, call
        self.answers = []

    def on_step_end(self, args, state, control, **kwargs):
        """Ask."""
        self.answers.append(self.call(self.trainer.s3t_model))

    on_substep_end = on_step_end


class AsksFromAThread(Asks):
    """Calls the live model from another thread, and waits for its answer."""

    def on_step_end(self, args, state, control, **kwargs):
        """Ask."""
        with ThreadPoolExecutor(1) as pool:
            self.answers.append(pool.submit(self.call, self.trainer.s3t_model).result(SOON))


KINDS = {
    "dropout in adapters": (lambda: tiny_llama(2), lm_rows, {"lora_dropout": 0.3}),
    "dropout in the base": (lambda: tiny_bert(2), classification_rows, {"lora_dropout": 0.0}),
}


@torch.no_grad()
def answer(model):
    rows = (lm_rows if model.can_generate() else classification_rows)(2, seed=7)
    return model(**{k: v for k, v in batch_of(rows).items() if k != "labels"}).logits


@torch.no_grad()
def sample(model):
    words = batch_of(lm_rows(1, seed=7))["input_ids"]
    return model.generate(input_ids=words, do_sample=True, max_new_tokens=6, pad_token_id=0)


def regrown(path, kind, disturb=None, call=answer, **arguments):
    """One shard of a system grown again while the other serves; the trainer, and the callback that disturbed it."""
    model_of, rows_of, settings = KINDS[kind]
    model = model_of()
    trainer = make_trainer(
        path,
        model,
        rows_of(16),
        config=s3t_config(num_shards=2, budget=1, partition="balanced"),
        peft_config=lora(model, **settings),
        args=training_arguments(path, per_device_train_batch_size=2, **arguments),
    )
    plant_stages(trainer)
    live = trainer.s3t_model
    live.refresh()
    live.unlearn(trainer.folder.table.members(1, trainer.folder.plan.sequences[1][0][0])[:1])
    undisturbed = answer(live)
    callback = None
    if disturb is not None:
        callback = disturb(trainer, call)
        trainer.add_callback(callback)
    trainer.train()
    return trainer, callback, undisturbed


def are_of_what_was_there(answers, trainer, kind, undisturbed):
    """Whether each answer is that of the stages that were there when it was asked for: before, or after each stage."""
    expected, folder = [undisturbed], trainer.folder.path
    for depth in (1, 2):
        snapshot = folder.with_name(f"{folder.name}-{depth}")
        shutil.copytree(folder, snapshot)
        for stage in snapshot.glob("stages/shard-1/*"):
            if len(stage.name.split("-")) > depth:
                shutil.rmtree(stage)
        expected.append(answer(S3TModel.from_pretrained(snapshot, base_model=KINDS[kind][0]())))
    return all(any(torch.equal(one, other) for other in expected) for one in answers)


def equal(one, other):
    return one.keys() == other.keys() and not any(differing_tensors(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("kind", "call", "arguments"),
    [
        ("dropout in adapters", answer, {}),
        ("dropout in the base", answer, {}),
        ("dropout in adapters", sample, {}),
        ("dropout in adapters", answer, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}),
        ("dropout in the base", answer, {"bf16": True}),
    ],
    ids=["adapters", "base", "sampling", "accumulation and checkpointing", "bf16"],
)
def test_requests_in_the_middle_of_steps_change_neither_stages_nor_answers(kind, call, arguments, tmp_path):
    quiet, _, _ = regrown(tmp_path / "quiet", kind, **arguments)
    served, server, undisturbed = regrown(tmp_path / "served", kind, Serves, call, **arguments)
    answers = [future.result(SOON) for future in server.futures]
    assert len(answers) == 4 and equal(bits_of(served), bits_of(quiet))
    if call is answer:
        assert are_of_what_was_there(answers, served, kind, undisturbed)
    else:
        assert len({tuple(one[0].tolist()) for one in answers}) > 1


@pytest.mark.parametrize("disturb", [Asks, AsksFromAThread])
def test_a_callback_may_call_the_live_model(disturb, tmp_path):
    quiet, _, _ = regrown(tmp_path / "quiet", "dropout in the base")
    asked, asks, undisturbed = regrown(tmp_path / "asked", "dropout in the base", disturb)
    assert equal(bits_of(asked), bits_of(quiet))
    assert len(asks.answers) > 4
    assert are_of_what_was_there(asks.answers, asked, "dropout in the base", undisturbed)


def test_a_callback_may_sample_from_the_live_model(tmp_path):
    quiet, _, _ = regrown(tmp_path / "quiet", "dropout in adapters", gradient_accumulation_steps=2)
    asked, asks, _ = regrown(tmp_path / "asked", "dropout in adapters", Asks, sample, gradient_accumulation_steps=2)
    assert equal(bits_of(asked), bits_of(quiet)) and len({tuple(one[0].tolist()) for one in asks.answers}) > 1


def test_an_evaluation_inside_a_stage_lets_calls_in_between_its_batches(tmp_path):
    class CallsInEvaluation(TrainerCallback):
        def __init__(self):
            self.pool, self.futures, self.waiting = ThreadPoolExecutor(1), [], []

        def on_step_end(self, args, state, control, **kwargs):
            self.futures.append(self.pool.submit(answer, trainer.s3t_model))
            assert has_begun_to_wait(stack_of(trainer).turns)

        def on_evaluate(self, args, state, control, **kwargs):
            self.waiting.append(len(trainer._stack.turns._waiting))

    evaluation = Dataset.from_list(classification_rows(8, seed=5)).remove_columns("id")
    trainer = make_trainer(
        tmp_path,
        tiny_bert(2),
        classification_rows(8),
        config=s3t_config(budget=1),
        args=training_arguments(tmp_path, eval_strategy="steps", eval_steps=1),
        eval_dataset=evaluation,
    )
    plant_stages(trainer, limit=1)
    trainer.s3t_model.refresh()
    calls = CallsInEvaluation()
    trainer.add_callback(calls)
    trainer.train()
    assert len(calls.waiting) >= len(calls.futures) > 0 and not any(calls.waiting)
    assert all(future.result(SOON).shape == (2, 3) for future in calls.futures)


def test_a_metric_may_wait_for_a_call_of_another_thread(pool, tmp_path):
    def words(prediction):
        return {"sum": pool.submit(answer, trainer.s3t_model).result(SOON).sum().item()}

    evaluation = Dataset.from_list(classification_rows(4, seed=5)).remove_columns("id")
    trainer = make_trainer(
        tmp_path,
        tiny_bert(2),
        classification_rows(8),
        config=s3t_config(budget=1),
        args=training_arguments(tmp_path, eval_strategy="epoch"),
        eval_dataset=evaluation,
        compute_metrics=words,
    )
    plant_stages(trainer, limit=1)
    trainer.s3t_model.refresh()
    trainer.train()
    assert any("eval_sum" in line for line in trainer.state.log_history) and trainer.compute_metrics is words


def test_what_else_another_thread_might_do_with_a_trainer_at_work_is_refused(tmp_path):
    refused = {}

    class Tries(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            for name in ("evaluate", "train"):
                with ThreadPoolExecutor(1) as pool:
                    refused[name] = pool.submit(getattr(trainer, name)).exception(SOON)
            with contextlib.suppress(S3TError):
                refused["s3t_model"] = trainer.s3t_model

    trainer = make_trainer(tmp_path, tiny_bert(2), classification_rows(8), config=s3t_config(budget=1))
    trainer.add_callback(Tries())
    trainer.train()
    assert "Call `trainer.s3t_model`" in str(refused["evaluate"]) and isinstance(refused["train"], S3TError)
    assert "s3t_model" not in refused and trainer.s3t_model.status()["depths"] == [2]


def with_processes(path, mode):
    """A script of two processes, of which each serves the live model of its trainer, or none does."""

    def answer_or_none(model):
        with contextlib.suppress(ExhaustedError):
            return answer(model)

    model = tiny_bert(2)
    trainer = make_trainer(
        path,
        model,
        classification_rows(16),
        config=s3t_config(num_shards=2, budget=1, partition="balanced"),
        peft_config=lora(model, lora_dropout=0.1),
        args=training_arguments(path, per_device_train_batch_size=2),
    )
    if mode == "served":
        trainer.add_callback(Serves(trainer, answer_or_none))
    trainer.train()


@pytest.mark.slow
def test_processes_that_train_together_serve_meanwhile(tmp_path):
    bits = []
    for mode in ("quiet", "served"):
        run = {"processes": 2, "environment": {"OMP_NUM_THREADS": "1"}}
        launched(Path(__file__), str(tmp_path / mode), mode, **run)
        folder = SystemFolder(tmp_path / mode)
        bits.append({str(key): folder.adapter_digest(key) for key in folder.stages})
    assert len(bits[0]) == 4 and bits[0] == bits[1]


if __name__ == "__main__":
    launch.start_cpu_processes()
    with_processes(Path(sys.argv[1]), sys.argv[2])
