"""What the driver knows of a system to which rows came: what is made anew, on what, and what is no answer to that."""

import pytest
from support.folders import add, grow, new_system, plant

from hf_s3t.cluster.desk import FolderDesk
from hf_s3t.cluster.driving import Outcome
from hf_s3t.folder.system import SystemFolder
from hf_s3t.plan import StageKey


@pytest.fixture
def folder(tmp_path):
    found = grow(new_system(tmp_path / "system"))
    return add(found, {101: (0, 0)})


def desk_of(folder):
    return FolderDesk(SystemFolder(folder.path), True, lambda: folder.table.empty)


def test_what_lacks_rows_that_came_is_made_anew_upon_what_saw_them(folder):
    desk, behind = desk_of(folder), folder.valid_stages - folder.current_stages
    schedule = desk.plan(())
    assert set(schedule.stages) == behind and StageKey(0, (0,)) in behind
    made = []
    while (key := schedule.take()) is not None:
        assert key.parent is None or key.parent in SystemFolder(folder.path).current_stages
        desk.begin(key)
        plant(SystemFolder(folder.path), key)
        assert desk.accept(Outcome(key, "a worker", result={"is_kept": True}))
        schedule.has_arrived(key)
        made.append(key)
    assert set(made) >= {key for key in behind if key.depth == 1}
    assert desk_of(folder).plan(()).stages == [] and SystemFolder(folder.path).valid_stages


def test_a_stage_that_lacks_rows_which_came_meanwhile_is_not_what_was_asked_for(folder):
    desk, key = desk_of(folder), StageKey(0, (0,))
    desk.begin(key)
    plant(SystemFolder(folder.path), key)
    add(SystemFolder(folder.path), {102: (0, 0)})
    assert not desk.accept(Outcome(key, "a worker", result={"is_kept": True}))
    assert SystemFolder(folder.path).is_valid(key)
