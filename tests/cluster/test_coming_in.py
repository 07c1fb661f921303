"""Workers that come in: each refusal says what was got, what was expected and what to do, and nothing is lost."""

import itertools
import sys
import threading
import time

import pytest
from accelerate.state import AcceleratorState
from datasets import Dataset
from support.on_ray import ROWS, System, ThreadRay
from support.tiny import lm_rows

from hf_s3t import errors
from hf_s3t.cluster import ray_pool, train_on_ray
from hf_s3t.cluster.agreement import Agreement, error_from
from hf_s3t.cluster.desk import FolderDesk
from hf_s3t.cluster.ray_cluster import is_head_there, resources_of, room_for
from hf_s3t.cluster.ray_pool import RayPool, Terms
from hf_s3t.cluster.worker import Worker
from hf_s3t.errors import ClusterError, ConfigError
from hf_s3t.folder.system import SystemFolder


pytestmark = pytest.mark.usefixtures("one_thread", "shared_key")

MORE = [{**row, "id": f"later-{number}"} for number, row in enumerate(lm_rows(6, seed=5))]


class InTurn:
    """Makes each time another trainer: what a worker has that is not as the others."""

    def __init__(self, *makers):
        self.makers, self.lock = itertools.cycle(makers), threading.Lock()

    def __call__(self):
        with self.lock:
            maker = next(self.makers)
        return maker()


@pytest.fixture
def pool_of(monkeypatch):
    """A pool of workers in threads, which are let go at the end."""
    pools = []
    # Arguments that are made reset the state of Accelerate, which threads share and workers do not: another one that
    # asks for it meanwhile would find none.
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(AcceleratorState, "_reset_state", staticmethod(lambda reset_partial_state=False: None))
    monkeypatch.setattr(ray_pool, "_A_MOMENT", 0.05)
    monkeypatch.setattr(ray_pool, "is_head_there", lambda head: True)

    def made(make_trainer, num_workers=2, shared_folder=None, same_kind=False):
        terms = Terms(shared_folder, same_kind)
        pools.append(RayPool(ThreadRay(), make_trainer, num_workers, {"CPU": 1.0}, terms))
        return pools[-1]

    yield made
    for pool in pools:
        pool.close()
        for actor in pool._ray.actors:
            actor.die()


def files_of(path):
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def is_refused(pool, kind, says, path):
    """That a pool does not come to be, for a reason, and that nothing was trained."""
    with pytest.raises(kind, match=says):
        pool.come_in()
    assert not list(path.glob("stages/shard-*")) and not list(path.glob(".tmp-*"))


def test_workers_that_agree_share_the_folder_where_they_see_it(pool_of, tmp_path):
    pool = pool_of(System(tmp_path / "system"))
    pool.come_in()
    assert pool.is_shared and pool.free == 2 and pool.folder.path == tmp_path / "system"


def test_a_worker_without_the_base_is_refused_and_leaves_nothing(pool_of, tmp_path):
    def no_base():
        raise OSError("meta-llama/Llama-2-7b-hf is not a local folder.")

    pool = pool_of(no_base)
    with pytest.raises(ClusterError, match=r"Worker \d .* raised OSError: meta-llama.* Every worker needs base, data"):
        pool.come_in()
    pool.close()
    assert list(tmp_path.iterdir()) == []


def test_a_worker_with_another_base_is_refused(pool_of, tmp_path):
    path = tmp_path / "system"
    pool = pool_of(InTurn(System(path), System(path, base=1)))
    is_refused(pool, errors.BaseModelMismatchError, r"Worker \d .*: The base model", path)


def test_a_worker_with_another_recipe_is_refused(pool_of, tmp_path):
    path = tmp_path / "system"
    pool = pool_of(InTurn(System(path), System(path, rate=5e-3)))
    says = r"Worker \d .* has another recipe than Worker \d .*: learning_rate=.* \(there .*\)\. Have `make_trainer`"
    is_refused(pool, ClusterError, says, path)


@pytest.mark.parametrize(
    "rows, kind",
    [
        ([{**ROWS[0], "labels": ROWS[1]["labels"]}, *ROWS[1:]], errors.ContentChangedError),
        (ROWS[1:], errors.S3TError),
    ],
    ids=["content", "fewer"],
)
def test_a_worker_with_another_dataset_is_refused(pool_of, tmp_path, rows, kind):
    path = tmp_path / "system"
    pool = pool_of(InTurn(System(path), System(path, rows=rows)))
    is_refused(pool, kind, r"Worker \d", path)


def test_a_worker_with_another_hf_s3t_is_refused_before_it_loads_anything(pool_of, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_s3t.cluster.worker.__version__", "0.0.9")
    pool = pool_of(lambda: pytest.fail("something was loaded"))
    is_refused(pool, ClusterError, r"has hf_s3t 0\.0\.9, expected 0\.1\.0 as here\. Install one version", tmp_path)


class Blind(Worker):
    """A worker, every second of which does not see the folder that the driver sees."""

    numbers = itertools.count()

    def sees(self, path, nonce):
        return super().sees(path, nonce) and next(self.numbers) % 2 == 0


def test_a_folder_that_only_some_see_is_refused(pool_of, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_pool, "Worker", Blind)
    path = tmp_path / "system"
    pool = pool_of(System(path))
    is_refused(pool, ClusterError, r"does not see the folder .* and other workers do\. Mount it .*shared_folder", path)


def test_a_folder_that_is_said_to_be_shared_and_is_not_is_refused_and_not_left(pool_of, tmp_path, monkeypatch):
    monkeypatch.setattr(Worker, "sees", lambda self, path, nonce: False)
    pool = pool_of(System(tmp_path / "system"), shared_folder=True)
    is_refused(pool, ClusterError, r"does not see the folder .*`shared_folder=True` says that all do", tmp_path)
    pool.close()
    assert list(tmp_path.iterdir()) == []


def test_workers_that_do_not_see_the_folder_have_folders_of_their_own_that_they_remove(pool_of, tmp_path, monkeypatch):
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(own))
    monkeypatch.setattr(Worker, "sees", lambda self, path, nonce: False)
    pool = pool_of(System(tmp_path / "system"))
    pool.come_in()
    assert not pool.is_shared and len(list(own.glob("hf-s3t-worker-*[0-9a-f]"))) == 2
    assert SystemFolder(tmp_path / "system").plan.stages()
    assert all((folder.stat().st_mode & 0o077) == 0 for folder in own.glob("hf-s3t-worker-*[0-9a-f]"))
    pool.close()
    assert list(own.iterdir()) == []


def test_what_make_trainer_returns_is_a_trainer(pool_of, tmp_path):
    is_refused(pool_of(lambda: None), ConfigError, "returned NoneType, expected an S3TTrainer", tmp_path)


def test_a_refusal_changes_nothing_of_a_system_that_is_there(pool_of, tmp_path):
    path = tmp_path / "system"
    System(path)()
    before = files_of(path)
    is_refused(pool_of(System(path, base=1)), errors.BaseModelMismatchError, r"Worker \d", path)
    assert files_of(path) == before


def test_workers_that_die_as_they_come_in_end_the_run(pool_of, tmp_path, monkeypatch):
    class Dying(Worker):
        def greet(self):
            for actor in pool._ray.actors:
                actor.die()
            return super().greet()

    monkeypatch.setattr(ray_pool, "Worker", Dying)
    pool = pool_of(System(tmp_path / "system"), num_workers=1)
    is_refused(pool, ClusterError, r"3 workers died before they could train, .*base and data fit", tmp_path)


def test_a_head_that_is_lost_is_told_before_ray_ends_the_process(pool_of, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_pool, "_BETWEEN_LOOKS", 0.0)
    monkeypatch.setattr(ray_pool, "is_head_there", is_head_there)
    pool = pool_of(System(tmp_path / "system"))
    assert not is_head_there(pool._head)
    is_refused(pool, ClusterError, r"head of the Ray cluster at 127\.0\.0\.1:1 does not answer.*only what", tmp_path)


# What happens while they are there


def added(path, rows, into="slices"):
    """Another process adds rows."""
    trainer = System(path, partition="balanced")()
    trainer.add_examples(Dataset.from_list(rows), into=into)
    return trainer.folder


@pytest.mark.parametrize("into", ["slices", "new_shards"])
@pytest.mark.parametrize("sees", [True, False], ids=["one folder", "no folder"])
def test_rows_that_came_meanwhile_are_left_out_and_told_of_at_the_end(pool_of, tmp_path, monkeypatch, sees, into):
    path = tmp_path / "system"
    monkeypatch.setattr(Worker, "sees", lambda self, path, nonce: sees)
    pool = pool_of(System(path, partition="balanced"))
    pool.come_in()
    desk = FolderDesk(pool.folder, pool.is_shared, pool.empty)
    before = desk.plan(()).stages
    pool.refuse_rows_that_came()
    places = added(path, MORE, into).table.places_of([row["id"] for row in MORE])
    assert desk.has_news()
    pool.tell()
    assert set(places) <= set(pool.empty())
    # What can be made of the rows that are there is made, and nothing of a slice that is not whole.
    left = [key for key in before if not key.saw(set(places))]
    assert desk.plan(()).stages == left and (left == before) == (into == "new_shards")
    with pytest.raises(errors.ExampleIdError, match=r"6 examples came to .* Have `make_trainer` give the whole"):
        pool.refuse_rows_that_came()


def test_a_worker_in_the_place_of_a_dead_one_that_is_refused_costs_the_others_nothing(pool_of, tmp_path, caplog):
    path = tmp_path / "system"
    pool = pool_of(InTurn(System(path), System(path), System(path, rate=5e-3)))
    pool.come_in()
    pool._dismiss(pool._hired[0])
    pool._hire()
    until = time.monotonic() + 60
    while pool._coming and time.monotonic() < until:
        assert pool.outcomes() == []
    assert [r.message for r in caplog.records if r.message.endswith("The others go on without it.")] and pool.free == 1
    pool._dismiss(pool._hired[0])
    pool._hire()
    pool._make_trainer = lambda: None
    with pytest.raises(ConfigError, match="returned NoneType"):
        while pool._coming:
            pool.outcomes()


def test_workers_that_are_gone_with_the_head_are_not_replaced(pool_of, tmp_path, monkeypatch):
    """Ray would wait for the head in that, and end the process with no word of ours."""
    pool = pool_of(System(tmp_path / "system"), num_workers=1)
    pool.come_in()
    (hired,) = pool._hired
    hired.stage, lost = pool.folder.plan.stages()[0], hired.actor.share.remote()
    with monkeypatch.context() as patch:
        patch.setattr(ray_pool, "_BETWEEN_LOOKS", 0.0)
        patch.setattr(ray_pool, "is_head_there", lambda head: False)
        patch.setattr(pool._ray, "kill", lambda actor: pytest.fail("Ray was asked for something"))
        patch.setattr(pool._ray, "remote", lambda **options: pytest.fail("Ray was asked for something"))
        patch.setattr(pool._ray, "get", lambda call, timeout: (_ for _ in ()).throw(pool._ray.exceptions.RayError()))
        for died in (lambda: pool._outcome(hired, lost), lambda: pool._missing(hired, "begin", "it died.")):
            pool._lost_looks = 0
            with pytest.raises(ClusterError, match=r"head of the Ray cluster at .* only what is missing is trained"):
                died()
        pool.close()


# What they tell of themselves


def statement(**changes):
    kind = {"cpu_capability": "AVX2", "threads": 1, "versions": {"torch": "2.13"}}
    told = {
        "recipe": {"learning_rate": 0.1}, "parts": {}, "kind": "S3TTrainer",
        "rows": {"0/0": ["1", "a"], "0/1": ["2", "b"]},
        "folder": {"system_id": "s", "lines": 0}, "circumstances": kind,
    }  # fmt: skip
    return {**told, **changes}


def test_rows_that_are_fed_otherwise_are_named_by_their_slices():
    agreement = Agreement([], same_kind=False)
    agreement.check("Worker 1", statement())
    with pytest.raises(ClusterError, match=r"other rows than Worker 1, .*slices 0/1 \(of shard/slice\)"):
        agreement.check("Worker 2", statement(rows={"0/0": ["1", "a"], "0/1": ["2", "c"]}))


def test_a_worker_that_comes_in_after_a_deletion_is_compared_by_the_slices_that_are_what_they_were():
    agreement = Agreement([], same_kind=False)
    agreement.check("Worker 1", statement())
    agreement.check("Worker 2", statement(rows={"0/0": ["1", "a"], "0/1": ["3", "c"]}))
    with pytest.raises(ClusterError, match=r"slices 0/0 \(of shard/slice\)"):
        agreement.check("Worker 3", statement(rows={"0/0": ["1", "z"], "0/1": ["3", "c"]}))


def test_another_system_of_the_same_name_is_refused():
    agreement = Agreement([], same_kind=False)
    agreement.check("Worker 1", statement())
    with pytest.raises(ClusterError, match="works on another system than Worker 1"):
        agreement.check("Worker 2", statement(folder={"system_id": "other", "lines": 0}))


def test_workers_of_another_kind_are_told_of_once_or_refused(caplog):
    recorded = [{"circumstances": {**statement()["circumstances"], "data_digest": "d"}}]
    other = statement(circumstances={**statement()["circumstances"], "cpu_capability": "AVX512"})
    agreement = Agreement(recorded, same_kind=False)
    assert agreement.threads == 1
    for number in (1, 2):
        agreement.check(f"Worker {number}", other)
    told = [record.message for record in caplog.records if "of another kind" in record.message]
    assert len(told) == 1 and "cpu_capability='AVX512' (recorded 'AVX2')" in told[0]
    with pytest.raises(ClusterError, match=r"of another kind .*AVX512.*leave `same_kind=True` out"):
        Agreement(recorded, same_kind=True).check("Worker 1", other)
    Agreement(recorded, same_kind=True).check("Worker 1", statement())


def test_what_a_worker_raised_is_raised_by_its_kind_and_names_the_worker():
    told = {"error": "ConfigError", "message": "No.", "is_ours": True, "where": None}
    assert isinstance(error_from("Worker 1", told), ConfigError)
    other = error_from("Worker 1", {**told, "error": "MemoryError", "is_ours": False, "where": "File ..."})
    assert isinstance(other, ClusterError) and "Worker 1 raised MemoryError: No." in str(other)


# What is asked for


@pytest.mark.parametrize(
    "given, says",
    [
        (dict(make_trainer=3), "`make_trainer` is int, expected a function"),
        (dict(make_trainer=print, num_workers=0), "num_workers"),
        (dict(make_trainer=print, resources_per_worker={"GPU": -1}), r"'GPU': -1, expected an amount above 0"),
        (dict(make_trainer=print, resources_per_worker={"GPU": True}), "expected an amount"),
    ],
)
def test_arguments_are_checked_before_ray_starts(given, says):
    with pytest.raises(ConfigError, match=says):
        train_on_ray(**given)


def test_without_ray_it_is_said_how_to_have_it_and_what_works_without(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install hf_s3t\[ray\]`; without it, processes on one folder"):
        train_on_ray(print)


def test_a_worker_fits_on_one_machine_or_not_at_all():
    needs = resources_of({"GPU": 2})
    assert needs == {"CPU": 1.0, "GPU": 2.0}
    assert room_for([{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}], needs) == 0
    assert room_for([{"CPU": 8.0, "GPU": 5.0}, {"CPU": 1.0, "GPU": 4.0}], needs) == 3
    assert room_for([{"CPU": 1.0}], {"CPU": 0.1}) == 10
