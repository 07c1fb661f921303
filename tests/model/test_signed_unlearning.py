"""A live model signs what it forgets, as the command line does: they write one ledger."""

import pytest
from support.hub_systems import plant
from support.receipts import OUR_KEY, public, signer
from support.tiny import ids_of, tiny_llama

from hf_s3t import S3TModel
from hf_s3t.errors import SigningKeyError
from hf_s3t.folder.signatures_file import Signatures
from hf_s3t.operations.inspection import inspect
from hf_s3t.signing.keys import SIGNING_VARIABLE, Signer, use_signer


pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_live_model_signs_what_it_unlearns(tmp_path, monkeypatch):
    path = plant(tmp_path / "system")
    model = S3TModel.from_pretrained(path, base_model=tiny_llama())
    monkeypatch.setenv(SIGNING_VARIABLE, "/nowhere")
    with pytest.raises(SigningKeyError, match="names no file"):
        model.unlearn(ids_of(24)[:1])
    assert not model.folder.ledger.lines
    monkeypatch.setenv(SIGNING_VARIABLE, OUR_KEY)
    model.unlearn(ids_of(24)[:1])
    asked = []
    use_signer(Signer(lambda data: asked.append(data) or signer()(data), public()))
    try:
        model.unlearn(ids_of(24)[1:2])
    finally:
        use_signer(None)
    # The table is written without the rows a moment later.
    model._wait_for_cleaner()
    signatures = Signatures.read(path)
    signed = [signatures.signed(one)[1] for one in model.folder.ledger.hashes]
    assert [one.signed for one in signed] == ["written"] * 2 and len(asked) == 1
    assert signed[0].after == signed[1].before and inspect(path, public_key=public()).problems == ()
