"""Rows that run together: equal ones, the oldest first; none joins later, what a deletion stopped begins again."""

import threading

import pytest

from hf_s3t.errors import CallStoppedError, ExhaustedError
from hf_s3t.server.batching import Batcher, Item
from hf_s3t.server.measuring import NoMetrics
from hf_s3t.server.problems import Problem
from hf_s3t.server.settings import ServerSettings


PATIENCE = 10


class Noted(Item):
    """A row that notes what became of it."""

    def __init__(self, name, key="key"):
        super().__init__(key, lambda problem: None)
        self.name, self.problem, self.is_done = name, None, threading.Event()

    def end(self):
        self.is_ended = True
        self.is_done.set()

    def fail(self, problem):
        self.problem = problem
        self.end()


class Bench:
    """A batcher whose batches run when they are let."""

    def __init__(self, cls=Batcher, **settings):
        self.batches, self.begun, self.let = [], threading.Semaphore(0), threading.Semaphore(0)
        self.errors, self.num_deletions, self.most = [], 0, 0
        settings = ServerSettings(**{"batch_wait": 0, "overlap_wait": 0, "max_concurrent_batches": 1, **settings})
        self.batcher = cls(self.run, lambda: self.num_deletions, settings, NoMetrics())
        self.batcher.start()

    def run(self, items):
        self.batches.append("".join(item.name for item in items))
        self.most = max(self.most, self.batcher.num_running)
        self.begun.release()
        assert self.let.acquire(timeout=PATIENCE)
        if self.errors:
            raise self.errors.pop()
        for item in items:
            item.end()

    def submit(self, names, key="key", is_alone=False):
        rows = [Noted(name, key) for name in names]
        self.batcher.submit(rows, is_alone)
        return rows

    def has_begun(self):
        assert self.begun.acquire(timeout=PATIENCE)

    def finish(self, *rows, batches=10):
        for _ in range(batches):
            self.let.release()
        for row in rows:
            assert row.is_done.wait(PATIENCE)
        self.batcher.stop()
        return self.batches


@pytest.fixture
def bench():
    made = []

    def make(**settings):
        made.append(Bench(**settings))
        return made[-1]

    yield make
    for one in made:
        one.finish()


def test_what_waits_while_a_batch_runs_is_the_next_one_and_equal_rows_overtake_others(bench):
    one = bench()
    rows = one.submit("a")
    one.has_begun()
    rows += one.submit("b") + one.submit("x", key="other") + one.submit("cd")
    assert one.finish(*rows) == ["a", "bcd", "x"]


def test_a_batch_is_no_larger_than_it_may_be_and_a_request_may_need_several(bench):
    one = bench(max_batch_size=2)
    rows = one.submit("a")
    one.has_begun()
    rows += one.submit("bcd")
    assert one.finish(*rows) == ["a", "bc", "d"]


def test_a_batch_waits_for_others_until_it_is_full(bench):
    # It would wait for an hour, and begins at once when there are two.
    one = bench(max_batch_size=2, batch_wait=3600)
    rows = one.submit("a")
    rows += one.submit("b")
    assert one.finish(*rows) == ["ab"]


def test_as_many_batches_run_at_once_as_may(bench):
    one = bench(max_concurrent_batches=2)
    rows = one.submit("a")
    one.has_begun()
    rows += one.submit("b")
    one.has_begun()
    rows += one.submit("c")
    assert one.batcher.num_waiting == 1
    assert one.finish(*rows) == ["a", "b", "c"] and one.most == 2


def test_what_comes_beside_a_batch_waits_a_while_for_its_end_and_shares_the_next(bench):
    # It would wait for an hour, and begins at once when nothing is under way.
    one = bench(max_concurrent_batches=2, overlap_wait=3600)
    rows = one.submit("a")
    one.has_begun()
    rows += one.submit("b")
    rows += one.submit("c")
    assert one.finish(*rows) == ["a", "bc"] and one.most == 1


def test_who_was_answered_may_ask_again_before_the_next_batch_begins(bench):
    one = bench(max_batch_size=3, batch_wait=3600, overlap_wait=3600)
    rows = one.submit("abc")
    one.has_begun()
    rows += one.submit("d")
    # It waited for long, and would begin at once.
    one.batcher._waiting[0].since -= 2 * 3600
    one.let.release()
    assert rows[0].is_done.wait(PATIENCE)
    rows += one.submit("e") + one.submit("f")
    assert one.finish(*rows) == ["abc", "def"]


def test_nothing_runs_beside_what_is_to_be_alone_and_nothing_overtakes_it(bench):
    one = bench(max_concurrent_batches=2)
    rows = one.submit("a")
    one.has_begun()
    rows += one.submit("s", is_alone=True) + one.submit("b")
    one.let.release()
    one.has_begun()
    assert one.batches == ["a", "s"] and one.batcher.num_running == 1
    assert one.finish(*rows) == ["a", "s", "b"]


def test_nothing_runs_alone_beside_what_was_taken_a_moment_ago(bench):
    taken, go_on = threading.Event(), threading.Event()

    class Lagging(Batcher):
        """One of whose threads comes to a halt between taking a batch and running it."""

        def _under_way(self, batch):
            if batch[0].name == "a":
                taken.set()
                go_on.wait(PATIENCE)
            return super()._under_way(batch)

    one = bench(max_concurrent_batches=2, cls=Lagging)
    rows = one.submit("a")
    assert taken.wait(PATIENCE)
    rows += one.submit("s", is_alone=True)
    assert not one.begun.acquire(timeout=0.3)
    go_on.set()
    one.has_begun()
    assert one.finish(*rows) == ["a", "s"] and one.most == 1


def test_what_a_deletion_stopped_begins_again_before_all_else_unless_some_of_it_was_sent(bench):
    one = bench()
    rows = one.submit("abc")
    one.has_begun()
    rows[1].has_sent = True
    rows[2].end()
    rows += one.submit("d", key="other")
    one.errors, one.num_deletions = [CallStoppedError("a deletion")], 1
    one.let.release()
    one.has_begun()
    assert one.batches == ["abc", "a"] and rows[0].mark == 1
    assert rows[1].problem.status == 503 and rows[1].problem.code == "stopped_by_erasure"
    assert one.finish(*rows) == ["abc", "a", "d"] and rows[0].problem is None


def test_an_error_is_told_to_each_row_and_the_next_batch_runs(bench):
    one = bench()
    one.errors = [ExhaustedError("no shard")]
    failed = one.submit("ab")
    one.let.release()
    assert all(row.is_done.wait(PATIENCE) for row in failed)
    assert {row.problem.code for row in failed} == {"exhausted"}
    assert one.finish(*one.submit("c")) == ["ab", "c"]


def test_of_an_error_that_nobody_foresaw_clients_learn_nothing(bench, caplog):
    one = bench()
    one.errors = [RuntimeError("/home/somebody/secret")]
    (row,) = one.submit("a")
    one.let.release()
    assert row.is_done.wait(PATIENCE)
    assert row.problem.status == 500 and "secret" not in row.problem.message


def test_rows_that_nobody_waits_for_do_not_run(bench):
    one = bench()
    rows = one.submit("a")
    one.has_begun()
    gone = one.submit("b")
    gone[0].is_cancelled = True
    rows += one.submit("c")
    assert one.finish(*rows) == ["a", "c"]


def test_more_requests_than_may_wait_are_refused_and_told_when_to_ask_again(bench):
    one = bench(max_queue=1)
    rows = one.submit("a")
    one.has_begun()
    rows += one.submit("b")
    with pytest.raises(Problem) as refused:
        one.submit("c")
    assert refused.value.status == 429 and refused.value.headers == {"Retry-After": "1"}
    one.finish(*rows)


def test_when_it_is_stopped_what_waits_is_told_and_nothing_more_is_taken(bench):
    one = bench()
    running = one.submit("a")
    one.has_begun()
    waiting = one.submit("b")
    stopping = threading.Thread(target=one.batcher.stop)
    stopping.start()
    assert waiting[0].is_done.wait(PATIENCE) and waiting[0].problem.status == 503
    assert running[0].is_cancelled
    with pytest.raises(Problem, match="being stopped"):
        one.submit("c")
    one.let.release()
    stopping.join(PATIENCE)
    assert not stopping.is_alive()
