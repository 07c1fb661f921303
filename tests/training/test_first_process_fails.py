"""What fails in the first of several data-parallel processes, which alone writes, is told in all of them."""

import json
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from support.launched import launched
from support.tiny import make_trainer, rows_for, s3t_config, tiny_llama, tokenizer_of_words

from hf_s3t import launch
from hf_s3t.errors import FolderError, S3TError
from hf_s3t.folder.system import SystemFolder
from hf_s3t.model.stack import StageStack


ROWS = rows_for(tiny_llama(), 18)
FIRST, MORE = ROWS[:12], ROWS[12:]
FULL = "No space left on device"
# The writes of the first process that fail, and what is raised there.
WRITES = {
    "create": OSError(28, FULL),
    "put_gate": FolderError(f"{FULL}. Make room."),
    "write_stage": OSError(28, FULL),
    "scratch": OSError(28, FULL),
    "save": OSError(28, FULL),
    "write_checkpoint_record": OSError(28, FULL),
    "record_addition": FolderError(f"{FULL}. Make room."),
}


def trainer_of(path, **settings):
    config = s3t_config(num_slices=2, budget=1, partition="balanced", **settings)
    return make_trainer(path, tiny_llama(3), rows=FIRST, config=config, processing_class=tokenizer_of_words())


def told_by(write, act):
    """What is told when a write of the first process fails, as on a full disk."""

    def fails(*args, **more):
        raise WRITES[write]

    with pytest.MonkeyPatch.context() as patch, pytest.raises((S3TError, OSError)) as raised:
        patch.setattr(StageStack if write == "save" else SystemFolder, write, fails)
        act()
    return [write, type(raised.value).__name__, str(raised.value)]


def have_writes_fail(path):
    """Each of them, and after it the same in peace."""
    system = path / "system"
    told = [told_by("create", lambda: trainer_of(system))]
    trainer = trainer_of(system)
    told.append(told_by("put_gate", trainer.build_gate))
    assert trainer.s3t_config.gate is None, "a refused call changes nothing"
    trainer.build_gate()
    told.append(told_by("write_stage", lambda: trainer.train(max_stages=1)))
    trainer.args.save_strategy = "steps"
    for write in ("scratch", "save", "write_checkpoint_record"):
        told.append(told_by(write, lambda: trainer.train(max_stages=1)))
    trainer.args.save_strategy = "no"
    assert trainer.train().metrics["stages_left"] == 0
    more = Dataset.from_list(MORE)
    told.append(told_by("record_addition", lambda: trainer.add_examples(more, into="slices")))
    told.append(told_by("put_gate", lambda: trainer.add_examples(more, into="slices")))
    assert trainer.train().metrics["stages_left"] == 0
    (path / f"told-{trainer.args.process_index}").write_text(json.dumps(told))


@pytest.mark.slow
def test_what_fails_in_the_first_process_is_raised_in_all(tmp_path):
    launched(Path(__file__), str(tmp_path), processes=2, environment={"OMP_NUM_THREADS": "1"})
    first, second = (json.loads((tmp_path / f"told-{process}").read_text()) for process in range(2))
    assert {write for write, _, _ in first} == WRITES.keys()
    assert "The rows are in" in second[-1][2] and "build_gate()" in second[-1][2]
    for (_, kind, said), (_, kind_there, said_there) in zip(first, second, strict=True):
        assert FULL in said and FULL in said_there
        assert kind_there == ("S3TError" if kind == "OSError" else kind)


if __name__ == "__main__":
    launch.start_cpu_processes()
    have_writes_fail(Path(sys.argv[1]))
