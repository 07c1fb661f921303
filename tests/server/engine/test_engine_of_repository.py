"""An engine in front of which a system of the Hub is served: it forgets here, and its exports lie where one says."""

import pytest
from support.behind import behind, of_last_slice
from support.fake_vllm import FakeVllm
from support.hub_systems import files_on, send
from support.served import tiny_system
from support.tiny import s3t_config

from hf_s3t.errors import ConfigError
from hf_s3t.folder.system import SystemFolder
from hf_s3t.server.engine.model import load_behind_engine


@pytest.fixture
def fake():
    with FakeVllm().running() as engine:
        yield engine


@pytest.fixture
def local(tmp_path, repo, monkeypatch):
    """The folder that was pushed, and its secret in the environment."""
    path = tiny_system(tmp_path / "system", config=s3t_config(num_slices=3))
    send(SystemFolder(path), repo)
    monkeypatch.setenv("HF_S3T_KEY", (path / "ledger.key").read_text())
    return path


def test_a_deletion_cuts_what_the_engine_serves_and_a_push_leaves_no_export_on_the_hub(local, repo, fake, tmp_path):
    pushed = files_on(repo)
    with behind(repo.repo_id, fake, exports=tmp_path / "exports") as server:
        before, names = server.answer(), set(fake.loaded)
        server.model.unlearn([of_last_slice(local)])
        assert server.answer() != before and not names & set(fake.loaded)
        (export,) = server.exports
        assert (tmp_path / "exports" / export).is_dir()
        server.model.push_to_hub(repo.repo_id)
        # Some stages went, and nothing came.
        assert files_on(repo) < pushed
    assert not server.exports and not fake.loaded
    # Who loads it anew knows of the deletion.
    with behind(repo.repo_id, fake, exports=tmp_path / "exports") as again:
        assert again.answer() != before and len(again.model.folder.ledger.lines) > 0


def test_without_a_folder_for_exports_it_is_refused(local, repo, fake):
    with pytest.raises(ConfigError, match="engine_exports"):
        load_behind_engine(repo.repo_id, fake.url)
