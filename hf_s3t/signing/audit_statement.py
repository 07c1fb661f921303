"""What somebody signs who has trained stages again: an in-toto Statement about these stages, and how they came out."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ReceiptError
from .dsse import PAYLOAD_TYPE, Envelope, Signature, pae
from .fields import Fields
from .keys import PublicKey, Signer
from .statement import STATEMENT_TYPE
from .strict_json import compact, parse_object


AUDIT_VERSION = 1
AUDIT_TYPE = f"urn:hf-s3t:audit:v{AUDIT_VERSION}"


@dataclass(frozen=True)
class AuditStatement:
    """
    What an audit came to.

    Args:
        system (`str`): The identity of the system.
        stages (`dict[str, str]`): The stages that were trained again, and the SHA-256 of the adapters that serve.
        differing (`tuple[str, ...]`): Those of them of which a tensor came out otherwise.
        other_circumstances (`tuple[str, ...]`): Names of what was recorded of the training and is otherwise here.
        fresh (`bool`): Whether the process had trained none of them before.
        time (`str`): When, UTC.
        versions (`dict[str, str]`): Of Python and the libraries that trained them again.
    """

    system: str
    stages: Mapping[str, str]
    differing: tuple[str, ...]
    other_circumstances: tuple[str, ...]
    fresh: bool
    time: str
    versions: Mapping[str, str]

    def signed_by(self, signer: Signer) -> Envelope:
        """The signed envelope."""
        payload = compact(
            {
                "_type": STATEMENT_TYPE,
                "subject": [{"name": one, "digest": {"sha256": self.stages[one]}} for one in sorted(self.stages)],
                "predicateType": AUDIT_TYPE,
                "predicate": {
                    "version": AUDIT_VERSION,
                    "system": self.system,
                    "time": self.time,
                    "differing": [{"stage": one} for one in self.differing],
                    "other_circumstances": dict.fromkeys(self.other_circumstances, "differs"),
                    "fresh_process": int(self.fresh),
                    "versions": dict(self.versions),
                },
            }
        )
        _read(payload)
        return Envelope(payload, (Signature(signer.public_key.keyid, signer(pae(PAYLOAD_TYPE, payload))),))

    @classmethod
    def verified(cls, envelope: Envelope, key: PublicKey) -> "AuditStatement":
        """
        What an envelope says, if a key signed it.

        Raises:
            [`~hf_s3t.errors.ReceiptError`]: If it did not, or the envelope holds no audit of a known version.
        """
        if not any(key.holds(one.value, envelope.signed_bytes) for one in envelope.signatures):
            raise ReceiptError(
                f"The result of the audit is not signed by the key {key.keyid[:12]}…, or was altered. Give the public "
                "key of whoever did the audit."
            )
        if envelope.payload_type != PAYLOAD_TYPE:
            raise ReceiptError("What was signed is no in-toto Statement, and so no audit. Ask for the result again.")
        return _read(envelope.payload)


def _read(payload: bytes) -> AuditStatement:
    whole = Fields(parse_object(payload, "The result of the audit"))
    if whole.text("_type") != STATEMENT_TYPE or whole.text("predicateType") != AUDIT_TYPE:
        raise ReceiptError(
            "What was signed is no audit of a version that this hf_s3t reads. Ask for the result, or update hf_s3t."
        )
    told = whole.below("predicate")
    stages = {one.stage("name"): one.below("digest").digest("sha256") for one in whole.each("subject")}
    differing = tuple(one.stage("stage") for one in told.each("differing"))
    if not stages or not set(differing) <= stages.keys():
        raise ReceiptError("The result of the audit contradicts itself: it names other stages than it is about.")
    return AuditStatement(
        system=told.word("system"),
        stages=stages,
        differing=differing,
        other_circumstances=tuple(told.words("other_circumstances")),
        fresh=told.number("fresh_process") == 1,
        time=told.time("time"),
        versions=told.words("versions"),
    )
