"""`hf-s3t status --watch`: who trains which stage, told whenever that changes, until nothing is left to train."""

import time
from pathlib import Path
from typing import Any

from ..errors import counted
from ..folder.claims import Claim, ClaimWatch
from ..folder.opening import open_folder
from ..folder.processes import is_gone
from ..folder.system import SystemFolder
from . import rendering


# Seconds between two looks.
INTERVAL = 2.0
# A holder that gave no sign of life for this share of its lease is told to be silent.
_SILENT = 0.5


def watch(folder: Path, as_json: bool, interval: float = INTERVAL) -> None:
    """
    Tell who trains what, now and whenever it changes, until every planned stage is there.

    Args:
        folder (`Path`): The folder of the system.
        as_json (`bool`): One line of JSON for each look that found a change.
        interval (`float`): Seconds between two looks.
    """
    system = open_folder(folder, read_only=True)
    claims, told = ClaimWatch(system.claims), None
    while True:
        system.refresh_ledger()
        system.refresh_stages()
        found = _look(system, claims)
        # Seconds go on by themselves.
        seen = found["stages"], [{**worker, "silent": None} for worker in found["workers"]]
        if seen != told:
            told = seen
            if as_json:
                rendering.print_json_line(found)
            else:
                _show(found)
        if found["stages"][0] == found["stages"][1]:
            return
        time.sleep(interval)


def _look(system: SystemFolder, claims: ClaimWatch) -> dict[str, Any]:
    # Those that serve without rows which came are to be grown again.
    current = system.current_stages
    left = len(system.plan.missing(current, system.table.empty))
    return {
        "stages": [len(current), len(current) + left],
        "workers": [_worker(claim, silent) for claim, silent in claims.look()],
    }


def _worker(claim: Claim, silent: float) -> dict[str, Any]:
    state = "at work"
    if is_gone(claim.said):
        state = "gone"
    elif silent >= _SILENT * claim.lease:
        state = "silent"
    told = {name: claim.said.get(name) for name in ("host", "process", "since")}
    return {"stage": str(claim.key), **told, "state": state, "silent": round(silent, 1)}


def _show(found: dict[str, Any]) -> None:
    there, planned = found["stages"]
    workers = found["workers"]
    rendering.say(f"{there} of {counted(planned, 'stage')}, {counted(len(workers), 'worker')}")
    for worker in workers:
        state = worker["state"]
        if state == "silent":
            state = f"silent for {worker['silent']:.0f} s"
        who = f"process {worker['process']} on {worker['host']}"
        rendering.say(f"  {worker['stage']}: {who}, since {worker['since']}, {state}")
