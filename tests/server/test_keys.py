"""Keys and what they are for: from a file or the environment, never shown, and compared with all there are."""

import json

import pytest

from hf_s3t.errors import ConfigError
from hf_s3t.server.keys import Keys, Scope


ENVIRONMENT = {"HF_S3T_ANSWER_KEYS": "one-of-two-keys, two-of-two-keys,", "HF_S3T_ERASE_KEYS": "the-office-key"}


def file_of(path, record, mode=0o600):
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    path.chmod(mode)
    return path


def test_a_scope_has_the_keys_of_its_variable_and_who_erases_sees_the_state():
    keys = Keys.load(None, ENVIRONMENT)
    assert keys.scopes_of("one-of-two-keys") == keys.scopes_of("two-of-two-keys") == {Scope.ANSWER}
    assert keys.scopes_of("the-office-key") == {Scope.ERASE, Scope.STATUS}
    assert not keys.scopes_of("") and not keys.scopes_of("one-of-two-keys, two-of-two-keys,")


def test_a_key_of_two_scopes_has_both(tmp_path):
    keys = Keys.load(file_of(tmp_path / "keys", {"answer": ["for-all-of-it"], "erase": ["for-all-of-it"]}), {})
    assert keys.scopes_of("for-all-of-it") == set(Scope)


def test_without_any_there_are_none():
    assert not Keys.load(None, {}) and not Keys.load(None, {"HF_S3T_ANSWER_KEYS": ""})


def test_a_variable_that_holds_none_is_no_server_without_keys():
    with pytest.raises(ConfigError, match="HF_S3T_ERASE_KEYS has no key"):
        Keys.load(None, {"HF_S3T_ERASE_KEYS": " , "})


def test_nothing_shows_them():
    keys = Keys.load(None, ENVIRONMENT)
    assert "office" not in repr(keys) and "office" not in str(vars(keys))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_file_that_others_can_read_is_refused(tmp_path, mode):
    with pytest.raises(ConfigError, match="chmod 600"):
        Keys.load(file_of(tmp_path / "keys", {"answer": ["a-key-of-theirs"]}, mode), {})


@pytest.mark.parametrize(
    "record", ["a-key-of-theirs", [], {}, {"answer": []}, {"answer": "a-key-of-theirs"}, {"all": ["a-key-of-theirs"]}]
)
def test_what_is_no_file_of_keys_is_refused_without_showing_what_it_says(tmp_path, record):
    with pytest.raises(ConfigError, match="no file of keys") as refused:
        Keys.load(file_of(tmp_path / "keys", record), {})
    assert "a-key-of-theirs" not in str(refused.value)


def test_keys_in_two_places_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="in one place"):
        Keys.load(file_of(tmp_path / "keys", {"answer": ["a-key-of-theirs"]}), ENVIRONMENT)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys.load(tmp_path / "keys", {})


@pytest.mark.parametrize("key", ["short", "with a space in it", "ключ-не-аски", "with-a\ttab", 12345678])
def test_a_key_that_is_none_is_refused_and_not_shown(key):
    with pytest.raises(ConfigError) as refused:
        Keys({Scope.ERASE: [key]})
    assert str(key) not in str(refused.value)
