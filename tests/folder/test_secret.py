"""The secret of a system's digests: where it is read, made, and refused."""

import os
import stat

import pytest

from hf_s3t.errors import FolderError, KeyMissingError
from hf_s3t.folder.layout import KEY_FILE
from hf_s3t.folder.secret import KEY_VARIABLE, draw_key, read_key, write_key
from hf_s3t.records.digests import DigestKey


KEY = DigestKey(b"k" * 32)


@pytest.fixture(autouse=True)
def no_secret_of_the_environment(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def made_key(path) -> DigestKey:
    """The secret of a system that is made in a folder."""
    key = draw_key(path)
    write_key(path, key)
    return key


def test_a_new_key_file_is_for_its_owner_alone(tmp_path):
    umask = os.umask(0)
    try:
        made_key(tmp_path)
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / KEY_FILE).stat().st_mode) == 0o600


def test_a_key_file_is_made_once_and_read_ever_after(tmp_path):
    first = made_key(tmp_path)
    text = (tmp_path / KEY_FILE).read_text()
    assert len(text) == 64
    for again in (made_key(tmp_path), read_key(tmp_path)):
        assert again.of_id(1) == first.of_id(1)
    assert (tmp_path / KEY_FILE).read_text() == text


def test_two_systems_have_two_keys(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert made_key(tmp_path / "a").of_id(1) != made_key(tmp_path / "b").of_id(1)


def test_the_environment_goes_before_the_file_and_makes_none(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "k" * 32)
    assert made_key(tmp_path).of_id(1) == KEY.of_id(1)
    assert not (tmp_path / KEY_FILE).exists()


def test_a_missing_key_is_an_error_that_names_variable_and_file(tmp_path):
    with pytest.raises(KeyMissingError, match=rf"{KEY_VARIABLE} nor .*{KEY_FILE} holds.*Restore the file, or set"):
        read_key(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("secret", ["", "short", "x" * 15])
def test_a_short_key_is_refused(tmp_path, monkeypatch, secret):
    (tmp_path / KEY_FILE).write_text(secret)
    with pytest.raises(KeyMissingError, match=f"has {len(secret)} bytes, expected at least 16. Restore it"):
        read_key(tmp_path)
    with pytest.raises(KeyMissingError, match="Make one with `openssl rand -hex 32`"):
        draw_key(tmp_path)
    monkeypatch.setenv(KEY_VARIABLE, secret or "x")
    with pytest.raises(KeyMissingError, match=r"expected at least 16\. Restore it as it was at training"):
        read_key(tmp_path)


def test_a_new_key_is_in_memory_until_it_is_written(tmp_path):
    key = draw_key(tmp_path)
    assert not list(tmp_path.iterdir()) and draw_key(tmp_path).check != key.check
    write_key(tmp_path, key)
    assert stat.S_IMODE((tmp_path / KEY_FILE).stat().st_mode) == 0o600
    assert read_key(tmp_path).check == draw_key(tmp_path).check == key.check
    # A run that ended before there was a system goes on with what it wrote.
    write_key(tmp_path, key)
    assert [path.name for path in tmp_path.iterdir()] == [KEY_FILE]


def test_a_key_is_not_written_over_another_that_came_meanwhile(tmp_path):
    key = draw_key(tmp_path)
    made_key(tmp_path)
    with pytest.raises(FolderError, match=r"holds another secret than a moment ago.*or call again"):
        write_key(tmp_path, key)


def test_a_key_of_the_environment_is_drawn_and_not_written(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "k" * 32)
    key = draw_key(tmp_path)
    write_key(tmp_path, key)
    assert key.check == KEY.check and not list(tmp_path.iterdir())
    monkeypatch.setenv(KEY_VARIABLE, "short")
    with pytest.raises(KeyMissingError, match="Make one with"):
        draw_key(tmp_path)
