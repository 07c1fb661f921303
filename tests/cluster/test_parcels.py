"""What goes between machines without a shared folder: whole or not at all, and never what was deleted meanwhile."""

import pytest
from filelock import FileLock
from support.on_ray import ROWS, System, adapters_of
from support.tiny import plant_stages

from hf_s3t.cluster.parcels import accept_stage, pack_stage, pack_system, unpack_stages, unpack_system
from hf_s3t.cluster.worker import remove_folders_of_the_dead
from hf_s3t.errors import ClusterError, FolderError
from hf_s3t.folder.layout import ADAPTER_FILE, KEY_FILE
from hf_s3t.folder.system import SystemFolder


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def trainer(tmp_path):
    return System(tmp_path / "system")()


@pytest.fixture
def there(trainer, tmp_path):
    """The folder of a worker: the same system, with all stages."""
    own = tmp_path / "own"
    unpack_system(pack_system(trainer.folder), own)
    other = System(own)()
    plant_stages(other)
    return SystemFolder(own)


def test_a_system_that_was_unpacked_is_the_same_with_its_secret_and_no_stages(trainer, there):
    assert there.record == trainer.folder.record and there.key.secret == trainer.folder.key.secret
    assert (there.path / KEY_FILE).stat().st_mode & 0o077 == 0
    assert there.slice_digests(there.plan.stages()[0]) == trainer.folder.slice_digests(there.plan.stages()[0])


def test_stages_come_back_to_the_byte_and_go_out_again(trainer, there, tmp_path):
    folder = trainer.folder
    for key in folder.plan.stages():
        assert accept_stage(folder, key, pack_stage(there, key))
    assert adapters_of(folder.path) == adapters_of(there.path)
    assert folder.valid_stages == there.valid_stages
    third = tmp_path / "third"
    unpack_system(pack_system(folder), third)
    other = SystemFolder(third)
    tip = max(folder.plan.stages(), key=lambda key: key.depth)
    unpack_stages({key: pack_stage(folder, key) for key in tip.lineage}, other)
    assert other.valid_stages == set(tip.lineage)


def test_a_stage_whose_rows_were_deleted_meanwhile_is_not_written(trainer, there):
    folder = trainer.folder
    key = folder.plan.stages()[0]
    parcel = pack_stage(there, key)
    places = trainer.s3t_model.locate([row["id"] for row in ROWS])
    deleted = next(i for i, place in places.items() if place == (key.shard, key.prefix[0]))
    # By another process.
    System(folder.path)().s3t_model.unlearn([deleted])
    assert accept_stage(folder, key, parcel) is False
    assert folder.valid_stages == frozenset() and not list(folder.path.glob("stages/shard-*/[0-9]*"))


def test_a_stage_whose_parent_is_not_there_is_not_written(trainer, there):
    tip = max(there.plan.stages(), key=lambda key: key.depth)
    assert accept_stage(trainer.folder, tip, pack_stage(there, tip)) is False


@pytest.mark.parametrize("damage", ["bytes", "missing", "another", "no record"])
def test_what_does_not_come_back_whole_is_refused_and_nothing_is_written(trainer, there, damage):
    first, second = there.plan.stages()[:2]
    parcel = dict(pack_stage(there, first))
    if damage == "bytes":
        parcel[ADAPTER_FILE] = parcel[ADAPTER_FILE][:-1] + bytes([parcel[ADAPTER_FILE][-1] ^ 1])
    elif damage == "missing":
        del parcel[ADAPTER_FILE]
    elif damage == "another":
        parcel = pack_stage(there, second)
    else:
        parcel["stage.json"] = b"[]"
    with pytest.raises(ClusterError, match=r"did not come back whole: .* Nothing of it was written"):
        accept_stage(trainer.folder, first, parcel)
    assert trainer.folder.valid_stages == frozenset()


def test_a_parcel_writes_nowhere_else(trainer, tmp_path):
    parcel = {**pack_system(trainer.folder), "../evil": b""}
    with pytest.raises(FolderError, match=r"'\.\./evil' is no name of a file"):
        unpack_system(parcel, tmp_path / "own")
    assert not (tmp_path / "evil").exists() and not SystemFolder.exists(tmp_path / "own")


def test_a_system_that_is_there_is_not_written_over(trainer):
    with pytest.raises(FolderError, match="holds a system by now"):
        unpack_system(pack_system(trainer.folder), trainer.folder.path)


def test_what_killed_workers_left_goes_and_what_others_work_in_stays(tmp_path):
    for name in ("hf-s3t-worker-dead", "hf-s3t-worker-alive", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ledger.key").write_text("secret")
    with FileLock(tmp_path / "hf-s3t-worker-alive.lock"):
        remove_folders_of_the_dead(tmp_path)
        assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"hf-s3t-worker-alive", "other"}
