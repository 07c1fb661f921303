"""Proof by repetition for a third party: what they need to train stages again, and their signed result taken back."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from ..errors import ConfigError, FolderError, ReceiptError, counted
from ..folder.audits_file import StoredAudit, append_audit, read_audits
from ..folder.config_file import read_record
from ..folder.copying import copy_system
from ..folder.files import file_digest, write_atomically
from ..folder.identity import identity_of
from ..folder.layout import ADAPTER_FILE, CONFIG_FILE, COST_FILE, KEY_FILE, PENDING_FILE, PROTOTYPES_FILE, STAGES
from ..folder.stage_record import adapter_of
from ..folder.system import SystemFolder
from ..folder.versions import library_versions
from ..plan.stages import StageKey
from ..signing.audit_statement import AuditStatement
from ..signing.dsse import Envelope
from ..signing.keys import PublicKey, Signer, current_signer


PACK_VERSION = 1
MANIFEST, SYSTEM, SCRIPT = "audit.json", "system", "audit.py"
_SCRIPT = Path(__file__).with_name("audit_pack") / SCRIPT
_README = Path(__file__).with_name("audit_pack") / "README.md"


class Found(Protocol):
    """What `trainer.verify()` returns, as far as it is signed."""

    @property
    def stages(self) -> Sequence[str]:
        """The stages that were trained again."""

    @property
    def mismatches(self) -> Mapping[str, Any]:
        """Those of them that differ."""

    @property
    def circumstances(self) -> Mapping[str, Any]:
        """Recorded circumstances that differ here."""

    @property
    def adapters(self) -> Mapping[str, str]:
        """The digests of the adapters that they were compared with."""

    @property
    def trained_here(self) -> Sequence[str]:
        """Those that the process had trained itself."""


def write_audit_pack(folder: SystemFolder, target: Path, stages: Iterable[str]) -> tuple[str, ...]:
    """
    Write what somebody else needs to train stages again: recipe, seeds, layout, digests, the stages, and a script.

    The stages are handed out by this, and the ledger notes it. The pack has no secret, and no data: who audits gets
    both from whoever trusts them with it. It has the table of examples, whose ids are personal data.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        target (`Path`): A folder that is empty or not there.
        stages (iterable of `str`): Names of valid stages, such as `shard-0/2-0`.

    Returns:
        `tuple[str, ...]`: The stages in it: those, and the ones that they stand on.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If there is no such stage.
        [`~hf_s3t.errors.FolderError`]: If something is in the target, or it cannot be written.
    """
    folder.check_target(target)
    chosen = _chosen(folder, stages)
    with folder.lock():
        folder.refresh()
        _require_valid(folder, chosen)
        folder.record_handing_out(chosen, library_versions())
    target.mkdir(parents=True, exist_ok=True)
    system = target / SYSTEM
    copy_system(folder.path, system, lambda: replace(folder.snapshot(), stages=frozenset(chosen)))
    for name in (KEY_FILE, PENDING_FILE, COST_FILE, PROTOTYPES_FILE):
        (system / name).unlink(missing_ok=True)
    manifest = _manifest(folder, chosen)
    write_atomically(target / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True).encode() + b"\n")
    for file in (_SCRIPT, _README):
        write_atomically(target / file.name, file.read_bytes())
    return tuple(map(str, chosen))


def read_audit_pack(pack: Path) -> dict[str, Any]:
    """
    The manifest of a pack, if the stages in it are those that it names: what is trained again is compared with them.

    Args:
        pack (`Path`): The pack.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If it is of another version, or was put together of two.
    """
    try:
        manifest = json.loads((pack / MANIFEST).read_bytes())
    except (OSError, ValueError):
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("pack_version") != PACK_VERSION:
        raise FolderError(
            f"{pack / MANIFEST} is no manifest of version {PACK_VERSION}. Use the hf_s3t that wrote the pack, or ask "
            "for another one."
        )
    record = read_record(pack / SYSTEM / CONFIG_FILE)
    other = [] if identity_of(record) == manifest["system"] else ["the system"]
    other += [name for name, stage in manifest["stages"].items() if _digest_in(pack, name) != stage["adapter_sha256"]]
    if other:
        raise FolderError(
            f"{pack}: {', '.join(other)} in {SYSTEM} {'is' if len(other) == 1 else 'are'} not what {MANIFEST} names, "
            "so a result would be of something else. Ask for the pack again."
        )
    return manifest


def signed_result(pack: Path, found: Found, signer: Signer) -> bytes:
    """
    The signed result of an audit with a pack.

    Args:
        pack (`Path`): The pack.
        found ([`~hf_s3t.training.audit.VerificationReport`]): What `trainer.verify()` returned.
        signer ([`~hf_s3t.signing.keys.Signer`]): Of whoever did the audit.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If the stages in the pack are not those that it names.
    """
    manifest = read_audit_pack(pack)
    expected = {name: record["adapter_sha256"] for name, record in manifest["stages"].items()}
    return _statement(manifest["system"], expected, found).signed_by(signer).to_json()


def record_audit(folder: SystemFolder, found: Found) -> bool:
    """
    Record an audit of one's own with those of others, signed by the key of this process, if it has one.

    Equal tensors in a process that trained the stages itself say too little: they are not recorded.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        found ([`~hf_s3t.training.audit.VerificationReport`]): What was found.

    Returns:
        `bool`: Whether it was recorded.

    Raises:
        [`~hf_s3t.errors.S3TError`]: Its children, if the folder cannot be written to, or a deletion took what was
            audited.
    """
    signer = current_signer()
    if signer is None or (found.trained_here and not found.mismatches):
        return False
    # What was compared: a stage that was grown again since is another, and such an audit is refused.
    envelope = _statement(folder.identity, found.adapters, found).signed_by(signer)
    add_audit(folder, envelope.to_json(), signer.public_key)
    return True


def _statement(system: str, served: Mapping[str, str], found: Found) -> AuditStatement:
    return AuditStatement(
        system=system,
        stages={name: served[name] for name in found.stages},
        differing=tuple(sorted(found.mismatches)),
        other_circumstances=tuple(sorted(found.circumstances)),
        fresh=not found.trained_here,
        time=datetime.now(UTC).isoformat(timespec="milliseconds"),
        versions=library_versions(),
    )


def add_audit(folder: SystemFolder, data: bytes, key: PublicKey) -> AuditStatement:
    """
    Take a signed result into a system's folder: receipts of lines after which its stages stayed tell of it.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        data (`bytes`): The result.
        key ([`~hf_s3t.signing.keys.PublicKey`]): Of whoever did the audit.

    Returns:
        [`~hf_s3t.signing.audit_statement.AuditStatement`]: What it says.

    Raises:
        [`~hf_s3t.errors.ReceiptError`]: If the key did not sign it, or it is of other stages than are here.
    """
    envelope = Envelope.from_json(data, "The result of the audit")
    statement = AuditStatement.verified(envelope, key)
    if statement.system != folder.identity:
        raise ReceiptError(
            f"The audit is of another system: got {statement.system}, expected {folder.identity}. Give the result of "
            "a pack of this one."
        )
    with folder.writing():
        folder.refresh()
        here = {str(one): folder.adapter_digest(one) for one in folder.valid_stages}
        other = sorted(name for name, digest in statement.stages.items() if here.get(name) != digest)
        if other:
            raise ReceiptError(
                f"The audit is of {', '.join(other)} as {'it is' if len(other) == 1 else 'they are'} not any more: a "
                "deletion took what was audited, or it was grown again. Write a new pack."
            )
        if not any(one.envelope.payload == envelope.payload for one in read_audits(folder.path)):
            append_audit(folder.path, envelope, key)
    return statement


def audits_of(path: Path, left: Mapping[str, str] | None, system: str) -> Iterator[dict[str, Any]]:
    """
    What audits came to of stages that stayed at a line, as receipts and reports tell of it.

    Args:
        path (`Path`): The folder of the system.
        left (mapping from `str` to `str`, *optional*):
            The stages that stayed, and the digests of their adapters; if not given, all that an audit is about.
        system (`str`): The identity of the system.
    """
    for audit in read_audits(path):
        told = audit.statement.stages
        ours = {name for name, digest in told.items() if left is None or left.get(name) == digest}
        if ours and audit.statement.system == system:
            yield _told(audit, ours)


def _digest_in(pack: Path, stage: str) -> str | None:
    file = pack / SYSTEM / STAGES / stage / ADAPTER_FILE
    return file_digest(file) if file.is_file() else None


def _told(audit: StoredAudit, ours: set[str]) -> dict[str, Any]:
    differing = len(ours & set(audit.statement.differing))
    return {
        "time": audit.statement.time,
        "by": audit.key.keyid,
        "equal": len(ours) - differing,
        "differing": differing,
        "envelope": hashlib.sha256(audit.envelope.to_json()).hexdigest(),
    }


def _chosen(folder: SystemFolder, stages: Iterable[str]) -> list[StageKey]:
    named = [StageKey.from_path(f"{STAGES}/{one}") for one in stages]
    if not named:
        raise ConfigError("Got no stage to audit. Name stages, such as shard-0/2-0, as `hf-s3t receipt` shows them.")
    chosen = sorted({key for tip in named for key in tip.lineage})
    _require_valid(folder, chosen)
    return chosen


def _require_valid(folder: SystemFolder, stages: Sequence[StageKey]) -> None:
    missing = [str(key) for key in stages if key not in folder.valid_stages]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} is no valid stage of this system, which has "
            f"{counted(len(folder.valid_stages), 'stage')}. Name stages that stayed, as `hf-s3t receipt` shows them."
        )
    behind = [str(key) for key in stages if key not in folder.current_stages]
    if behind:
        raise ConfigError(
            f"{', '.join(behind)} lacks rows that came to its slices since: whoever audits it has none but these to "
            "train it again on. Call `train()`, which grows it with them, or name other stages."
        )


def _manifest(folder: SystemFolder, stages: Iterable[StageKey]) -> dict[str, Any]:
    base, config = folder.record["base_model"], folder.config
    return {
        "pack_version": PACK_VERSION,
        "system": folder.identity,
        "base_model": {name: base.get(name) for name in ("id", "revision", "digest")},
        "layout": {"num_shards": config.num_shards, "num_slices": config.num_slices, "seed": config.seed},
        "ledger": list(folder.ledger.hashes[-1:]),
        "stages": {str(key): _stage(folder, key) for key in stages},
    }


def _stage(folder: SystemFolder, key: StageKey) -> dict[str, Any]:
    record = folder.stage_record(key)
    names = ("seed", "layers", "slices", "counts", "recipe", "parts", "circumstances")
    return {**{name: record.get(name) for name in names}, "adapter_sha256": adapter_of(record)}
