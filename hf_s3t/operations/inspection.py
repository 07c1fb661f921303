"""Looks at a system's folder without changing it: what is wrong, and what the next load would remove."""

import os
from pathlib import Path

from ..errors import FolderError, counted
from ..folder.audits_file import read_audits
from ..folder.erasure_requests_file import ErasureBook
from ..folder.files import stamp
from ..folder.foreign import entries, foreign_parts, foreign_problem, is_foreign
from ..folder.layout import (
    AUDITS_FILE,
    CHECKPOINTS,
    CLAIMS,
    COMPANIONS,
    CONFIG_FILE,
    ERASURES_FILE,
    GATE_FILE,
    HISTORY,
    LEDGER_FILE,
    PARTS,
    PENDING_FILE,
    SIGNATURES_FILE,
    STAGES,
    TEMPORARY,
    is_log,
)
from ..folder.opening import ReadOnlyFolder
from ..records.request import some
from ..signing.keys import PublicKey
from .erasures import states_of
from .findings import Findings, Inspection, require_file, require_private
from .inspected_gate import inspect_gate
from .inspected_records import inspect_records
from .inspected_signatures import inspect_signatures
from .inspected_stages import inspect_checkpoints, inspect_claims, inspect_stages
from .pending import PendingRequests


# How often it is looked at anew where somebody deletes meanwhile.
_ATTEMPTS = 3


def inspect(path: str | os.PathLike[str], adapters: bool = True, public_key: PublicKey | None = None) -> Inspection:
    """
    Read everything in a folder and say what is wrong with it: ledger, digests, validity, what does not belong there.

    Nothing is changed, no lock is taken, and no damage raises.

    Args:
        path (`str` or `os.PathLike`): The folder of the system.
        adapters (`bool`, defaults to `True`): Read the adapters too, which are nearly all of the folder's bytes.
        public_key ([`~hf_s3t.signing.keys.PublicKey`], *optional*):
            Of whoever signs the lines of the ledger. Without it they are compared with what was signed, whoever did.

    Returns:
        [`~hf_s3t.operations.findings.Inspection`]: What was found.
    """
    path = Path(path)
    for _ in range(_ATTEMPTS):
        before = stamp(path / LEDGER_FILE)
        findings = _look(path, adapters, public_key)
        if stamp(path / LEDGER_FILE) == before:
            break
        # Someone deleted meanwhile, and what was read belongs to two states of the folder.
    return findings.result()


def _look(path: Path, adapters: bool, public_key: PublicKey | None) -> Findings:
    findings = Findings()
    with findings.reading(path):
        if not (path / CONFIG_FILE).is_file():
            raise FolderError(
                f"{path} holds no S3T system: there is no {CONFIG_FILE}. Give the `output_dir` of a training run."
            )
        findings.problems.extend(map(foreign_problem, foreign_parts(path)))
        _inspect_root(path, findings)
        records = inspect_records(path, findings)
        with findings.reading(path / SIGNATURES_FILE):
            inspect_signatures(path, records.ledger, public_key, findings)
        with findings.reading(path / AUDITS_FILE):
            if os.path.lexists(path / AUDITS_FILE):
                require_file(path / AUDITS_FILE)
                read_audits(path)
        with findings.reading(path / GATE_FILE):
            inspect_gate(path, records, findings)
        with findings.reading(path / STAGES):
            inspect_stages(path, records, adapters, findings)
        with findings.reading(path / CHECKPOINTS):
            inspect_checkpoints(path, records, findings)
        with findings.reading(path / CLAIMS):
            inspect_claims(path, records, findings)
        with findings.reading(path / PENDING_FILE):
            _inspect_requests(path, findings)
        with findings.reading(path / ERASURES_FILE):
            _inspect_erasures(path, findings)
    return findings


def _inspect_root(path: Path, findings: Findings) -> None:
    for entry in entries(path):
        name = entry.name
        if is_foreign(entry):
            findings.problems.append(foreign_problem(entry))
        elif name.startswith(TEMPORARY):
            findings.condemned(entry, "leftover")
        elif is_log(name):
            findings.notes.append(f"{entry} holds logs of training, which no deletion reaches. See `hf-s3t purge`.")
        elif name == HISTORY:
            findings.notes.append(f"{entry} may hold earlier versions of the folder's files. See `hf-s3t purge`.")
        elif name not in PARTS and name not in COMPANIONS:
            findings.unknown(entry)


def _inspect_requests(path: Path, findings: Findings) -> None:
    """Note what waits to be deleted."""
    # A folder that cannot be opened has problems enough, which are told already.
    if not os.path.lexists(path / PENDING_FILE) or len(findings.problems) > len(findings.to_remove):
        return
    require_file(path / PENDING_FILE)
    requests = PendingRequests(ReadOnlyFolder(path))
    due, waiting = requests.apply_by(), len(requests.ids())
    if waiting:
        by = "" if due is None else f" by the first load of the model after {due.isoformat(timespec='seconds')}"
        findings.notes.append(f"{path / PENDING_FILE}: {counted(waiting, 'example')} wait to be deleted{by}.")


def _inspect_erasures(path: Path, findings: Findings) -> None:
    """Look at the book of a server, and note which of its requests came to nothing."""
    if not os.path.lexists(path / ERASURES_FILE) or len(findings.problems) > len(findings.to_remove):
        return
    require_file(path / ERASURES_FILE)
    require_private(path / ERASURES_FILE, findings, "others could see when somebody asked to be forgotten")
    folder = ReadOnlyFolder(path)
    erasures = ErasureBook(folder).latest()
    lost = [one for one, state in zip(erasures, states_of(folder, erasures), strict=True) if state == "interrupted"]
    forgotten = [one.id for one in lost if one.report is not None]
    interrupted = [one.id for one in lost if one.report is None]
    if forgotten:
        findings.problems.append(
            f"{path / LEDGER_FILE} lacks deletions of {counted(len(forgotten), 'request')} which by "
            f"{path / ERASURES_FILE} were done ({some(forgotten)}): it is older. Restore the newest from a backup; "
            "do not serve this system."
        )
    if interrupted:
        findings.notes.append(
            f"{path / ERASURES_FILE}: {counted(len(interrupted), 'request')} to erase came to nothing, because a "
            f"server died meanwhile ({some(interrupted)}). Who asked was told nothing; a repeated request goes on."
        )
