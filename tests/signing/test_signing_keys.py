"""Keys: made where they belong, read from file, environment or a callable, and never shown."""

import os
import stat
import traceback

import pytest
from support.receipts import OTHER_KEY, OUR_KEY, public, signer

from hf_s3t.errors import SigningKeyError
from hf_s3t.folder.layout import CONFIG_FILE
from hf_s3t.signing import keys
from hf_s3t.signing.keys import SIGNING_VARIABLE, PublicKey, Signer, current_signer, required_signer, signing_with


BODY = OUR_KEY.splitlines()[1]


@pytest.fixture(autouse=True)
def no_signer():
    yield
    keys.use_signer(None)


def test_a_pair_is_written_once_and_the_private_key_for_its_owner_alone(tmp_path):
    made = keys.write_pair(tmp_path / "signing.key")
    assert stat.S_IMODE((tmp_path / "signing.key").stat().st_mode) == 0o600
    assert PublicKey.read(tmp_path / "signing.key.pub").keyid == made.keyid
    assert made.holds(Signer.read(tmp_path / "signing.key")(b"data"), b"data")
    before = (tmp_path / "signing.key").read_bytes()
    with pytest.raises(SigningKeyError, match="is there, and a key is not written over"):
        keys.write_pair(tmp_path / "signing.key")
    (tmp_path / "signing.key.pub").rename(tmp_path / "another.key.pub")
    with pytest.raises(SigningKeyError, match=r"another\.key\.pub is there"):
        keys.write_pair(tmp_path / "another.key")
    assert (tmp_path / "signing.key").read_bytes() == before and not (tmp_path / "another.key").exists()


@pytest.mark.parametrize("inside", ["key", "stages/key", "stages/shard-0/key"])
def test_no_key_is_written_into_a_system_s_folder_nor_read_there(tmp_path, inside):
    assert keys._OF_A_SYSTEM == CONFIG_FILE
    (tmp_path / CONFIG_FILE).write_text("{}")
    target = tmp_path / inside
    target.parent.mkdir(parents=True, exist_ok=True)
    with pytest.raises(SigningKeyError, match="does not belong into the folder of a system"):
        keys.write_pair(target)
    assert not target.exists()
    target.write_text(OUR_KEY)
    with pytest.raises(SigningKeyError, match="does not belong into the folder of a system"):
        Signer.read(target)


def test_a_link_into_a_system_s_folder_is_seen_through(tmp_path):
    (tmp_path / "system").mkdir()
    (tmp_path / "system" / CONFIG_FILE).write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "system")
    with pytest.raises(SigningKeyError, match="does not belong"):
        keys.write_pair(tmp_path / "link" / "key")


@pytest.mark.parametrize("form", [OUR_KEY, BODY, OUR_KEY.replace("\n", "\\n"), f"\n{OUR_KEY}\n"])
def test_the_environment_holds_the_key_itself(monkeypatch, form):
    monkeypatch.setenv(SIGNING_VARIABLE, form)
    assert current_signer().public_key.keyid == public().keyid


def test_the_environment_names_the_file_of_a_key(monkeypatch, tmp_path):
    (tmp_path / "key").write_text(OUR_KEY)
    monkeypatch.setenv(SIGNING_VARIABLE, str(tmp_path / "key"))
    assert current_signer().public_key.keyid == public().keyid


def test_without_a_key_nothing_is_signed(monkeypatch):
    monkeypatch.delenv(SIGNING_VARIABLE, raising=False)
    assert current_signer() is None
    with pytest.raises(SigningKeyError, match="There is no key to sign with"):
        required_signer()


def test_a_file_that_is_given_counts_before_the_environment_for_as_long(monkeypatch, tmp_path):
    monkeypatch.setenv(SIGNING_VARIABLE, OTHER_KEY)
    (tmp_path / "key").write_text(OUR_KEY)
    with signing_with(tmp_path / "key"):
        assert current_signer().public_key.keyid == public().keyid
    assert current_signer().public_key.keyid == public(OTHER_KEY).keyid
    with signing_with(None):
        assert current_signer().public_key.keyid == public(OTHER_KEY).keyid


def test_a_callable_signs_in_the_place_of_a_key():
    asked = []

    def hsm(data: bytes) -> bytes:
        asked.append(data)
        return signer()(data)

    keys.use_signer(Signer(hsm, public().pem))
    assert public().holds(current_signer()(b"data"), b"data") and asked == [b"data"]


@pytest.mark.parametrize("answer", [b"", b"\x00" * 64, None, "text"])
def test_a_callable_that_signs_with_something_else_is_told(answer):
    with pytest.raises(SigningKeyError, match="returned no signature by the key"):
        Signer(lambda data: answer, public())(b"data")


def bad_keys() -> list[str]:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    ours = ed25519.Ed25519PrivateKey.generate()
    other = ec.generate_private_key(ec.SECP256R1())
    forms = (ours, BestAvailableEncryption(b"word")), (other, NoEncryption())
    return [key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, form).decode() for key, form in forms]


@pytest.mark.parametrize("number", range(6))
def test_no_error_shows_anything_of_a_key(monkeypatch, number):
    texts = [*bad_keys(), OUR_KEY[:-40], BODY[:-2], BODY[:-1] + "!", BODY[4:]]
    text = texts[number]
    monkeypatch.setenv(SIGNING_VARIABLE, text)
    for call in (current_signer, lambda: PublicKey.read(text), lambda: PublicKey.from_text(text)):
        with pytest.raises(SigningKeyError) as caught:
            call()
        shown = "".join(traceback.format_exception(caught.value))
        told = str(caught.value) + repr(caught.value.__cause__)
        secret = max(text.replace("\\n", "\n").splitlines(), key=len)
        assert secret[8:24] not in told and not caught.value.__cause__ and "BEGIN" not in told, shown


def test_neither_key_nor_signer_shows_itself():
    shown = repr(signer()) + repr(public()) + str(vars(public()).keys())
    assert BODY[10:30] not in shown and public().keyid[:12] in shown


def test_a_public_key_of_another_kind_is_refused():
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    text = other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    with pytest.raises(SigningKeyError, match="of another kind, expected Ed25519"):
        PublicKey.from_text(text)
    with pytest.raises(SigningKeyError, match="Got a private key, expected the public one"):
        PublicKey.from_text(OUR_KEY)
    with pytest.raises(SigningKeyError, match="no file that is there"):
        PublicKey.read("nowhere.pub")


def test_the_keyid_is_the_digest_of_the_public_key():
    import base64
    import hashlib

    body = "".join(public().pem.splitlines()[1:-1])
    assert public().keyid == hashlib.sha256(base64.b64decode(body)).hexdigest()
    assert PublicKey.read(body).keyid == public().keyid, "the base64 alone is a key too"


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SigningKeyError, match="is no text"):
        Signer.read(tmp_path / "binary")
    with pytest.raises(SigningKeyError, match="is no file that is there"):
        Signer.read(tmp_path / "nowhere")
    if os.geteuid():
        (tmp_path / "closed").write_text(OUR_KEY)
        (tmp_path / "closed").chmod(0)
        with pytest.raises(SigningKeyError, match="Check its permissions"):
            Signer.read(tmp_path / "closed")


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cryptography", None)
    with pytest.raises(SigningKeyError, match=r"pip install hf_s3t\[sign\]"):
        keys.generate()
