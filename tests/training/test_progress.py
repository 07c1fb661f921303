"""One bar over all stages: it moves with every step by what the step computes, ends full, and keeps quiet."""

from types import SimpleNamespace

import pytest
from datasets import Dataset
from support.tiny import lm_rows, make_trainer, s3t_config, tiny_llama, training_arguments
from tqdm.auto import tqdm
from transformers import TrainerCallback

from hf_s3t.training import progress
from hf_s3t.training.progress import PlanProgress


pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = lm_rows(16)


class Bar(tqdm):
    """A bar that keeps where it was after each update, and what stood beside it."""

    made: list["Bar"] = []

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen, self.labels, self.closed = [self.n], [], False
        Bar.made.append(self)

    def update(self, n=1):
        super().update(n)
        self.seen.append(self.n)

    def set_postfix_str(self, s="", refresh=True):
        super().set_postfix_str(s, refresh)
        self.labels.append(s)

    def close(self):
        super().close()
        self.closed = True


@pytest.fixture
def bars(monkeypatch):
    """The bars over all stages that were opened, in their order."""
    monkeypatch.setattr(progress, "tqdm", Bar)
    monkeypatch.setattr(Bar, "made", [])
    return Bar.made


def trainer_with(tmp_path, callbacks=None, **arguments):
    """Two stages of two slices with equal rows: two steps and four."""
    path = tmp_path / "system"
    args = training_arguments(path, **{"disable_tqdm": False, **arguments})
    config = s3t_config(budget=1, partition="balanced")
    return make_trainer(path, tiny_llama(2), ROWS, config=config, args=args, callbacks=callbacks)


def test_the_bar_moves_with_every_step_of_every_stage_and_ends_full(tmp_path, bars):
    trainer = trainer_with(tmp_path)
    costs = [trainer._cost(key) for key in trainer.folder.plan.stages()]
    trainer.train()
    (bar,) = bars
    assert len(costs) == 2 and bar.total == pytest.approx(sum(costs))
    assert bar.seen == sorted(bar.seen) and len(set(bar.seen)) == 1 + 2 + 4
    # Each stage moves it by its cost, in steps of equal length.
    expected = [n / 2 * costs[0] for n in range(3)] + [costs[0] + n / 4 * costs[1] for n in range(1, 5)]
    assert sorted(set(bar.seen)) == pytest.approx(expected)
    assert bar.n == pytest.approx(bar.total) and bar.closed
    assert bar.labels == ["stage 1/2: shard-0/0", "stage 2/2: shard-0/0-1"]


def test_a_run_with_a_limit_has_a_bar_over_the_stages_that_it_will_train(tmp_path, bars):
    path = tmp_path / "system"
    config = s3t_config(num_slices=3, keep_idle=None, sequence_selection="lattice")
    trainer = make_trainer(path, tiny_llama(3), ROWS, config=config, args=training_arguments(path, disable_tqdm=False))
    trainer.train(max_stages=2)
    trainer.train(max_stages=0)
    (bar,) = bars
    assert bar.labels == ["stage 1/2: shard-0/0", "stage 2/2: shard-0/0-1"]
    assert bar.total == pytest.approx(sum(map(trainer._cost, trainer.folder.valid_stages)))
    assert bar.n == pytest.approx(bar.total) and bar.closed
    trainer.train(max_stages=99)
    assert bars[1].labels[-1].startswith("stage 5/5") and bars[1].n == pytest.approx(bars[1].total)


def test_there_is_no_bar_where_nothing_is_missing_or_bars_are_disabled(tmp_path, bars):
    trainer = trainer_with(tmp_path, disable_tqdm=True)
    trainer.train()
    assert not bars
    trainer_with(tmp_path).train()
    assert not bars


class Interrupt(TrainerCallback):
    """Ends the process, as it were, in the middle of the second stage."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.max_steps == 4 and state.global_step == 3:
            raise KeyboardInterrupt


def test_the_bar_is_closed_when_training_is_interrupted_and_covers_what_is_missing_afterwards(tmp_path, bars):
    with pytest.raises(KeyboardInterrupt):
        trainer_with(tmp_path, [Interrupt()], save_strategy="steps", save_steps=2).train()
    trainer = trainer_with(tmp_path, save_strategy="steps", save_steps=2)
    (missing,) = trainer.folder.plan.missing(trainer.folder.valid_stages, trainer.folder.table.empty)
    trainer.train()
    first, second = bars
    assert first.closed and first.n < first.total
    assert second.total == pytest.approx(trainer._cost(missing)) and second.n == pytest.approx(second.total)
    # The two steps that the checkpoint held are done when it opens.
    assert sorted(set(second.seen)) == pytest.approx([second.total * done / 4 for done in (0, 2, 3, 4)])


def test_a_bar_never_passes_its_end(bars):
    bar = PlanProgress()
    bar.begin(0.3, True)
    bar.begin_stage("shard-0/0", 1, 1, 0.1)
    for _ in range(4):
        bar._advance(1.0)
    assert bars[0].n == bars[0].total


LOGGED = {"train_runtime": 1.25, "train_loss": 0.5}


def printed_by(strategy: str, tmp_path, capsys) -> str:
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=2)
    shown, args = PlanProgress(), training_arguments(tmp_path, logging_strategy=strategy, disable_tqdm=False)
    shown.begin(1.0, False)
    shown.on_train_begin(args, state, None)
    shown.on_log(args, state, None, logs=dict(LOGGED))
    shown.on_train_end(args, state, None)
    caught = capsys.readouterr()
    return caught.out + caught.err


def test_what_is_logged_is_printed_where_logs_were_asked_for(tmp_path, capsys):
    assert "train_runtime" in printed_by("steps", tmp_path, capsys)


def test_the_summary_of_a_stage_is_not_printed_where_no_logs_were_asked_for(tmp_path, capsys):
    assert "train_" not in printed_by("no", tmp_path, capsys)


def test_a_whole_training_leaves_bars_and_no_lines_where_no_logs_were_asked_for(tmp_path, capsys):
    trainer = trainer_with(tmp_path)
    capsys.readouterr()
    trainer.train()
    caught = capsys.readouterr()
    assert "S3T: 100%" in caught.err
    assert "train_runtime" not in caught.out + caught.err and "train_loss" not in caught.out + caught.err


def test_an_evaluation_inside_a_stage_does_not_move_the_bar(tmp_path, bars):
    path = tmp_path / "system"
    trainer = make_trainer(
        path,
        tiny_llama(2),
        ROWS,
        config=s3t_config(budget=1, partition="balanced"),
        args=training_arguments(path, disable_tqdm=False, eval_strategy="epoch"),
        eval_dataset=Dataset.from_list(lm_rows(4, seed=9)),
    )
    trainer.train()
    (bar,) = bars
    assert len(set(bar.seen)) == 1 + 2 + 4 and bar.n == pytest.approx(bar.total)
