"""Commands on a system's repository on the Hub."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..errors import counted
from ..folder.opening import open_folder
from ..signing.keys import signing_with
from . import rendering
from .arguments import AsJson, DryRun, Folder, Repo, SigningKey, Token


def push(
    folder: Folder,
    repo_id: Repo,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository; the owner's default if not given.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Forget here, too, what the Hub knows as deleted.")] = False,
    include_gate: Annotated[
        bool | None,
        typer.Option(
            "--include-gate/--no-gate",
            help="Push the gate, whose words can be guessed by who has the secret; as it is there if not given.",
        ),
    ] = None,
    token: Token = None,
    signing_key: SigningKey = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """
    Bring a system to the Hub: one commit, of what is not there yet, with a model card.

    What a deletion removed stays in older commits until `erase`.
    """
    # Each command brings what it needs of the Hub's client, which is slow to import.
    from ..hub.card import description
    from ..hub.pushing import push as push_system
    from ..hub.repository import HubRepo

    describe = partial(description, repo_id=repo_id)
    repo, system = HubRepo(repo_id, token), open_folder(folder, read_only=dry_run)
    with signing_with(signing_key):
        done = push_system(
            system,
            repo,
            describe,
            private=private,
            commit_message=message,
            merge=merge,
            include_gate=include_gate,
            dry_run=dry_run,
        )
    if as_json:
        rendering.print_json({"dry_run": dry_run, **asdict(done)})
    else:
        rendering.show_push(done, dry_run)


def pull(
    repo_id: Repo,
    target: Annotated[Path, typer.Argument(help="A new folder to write the system to.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; the main branch if not given.")] = None,
    token: Token = None,
    dry_run: DryRun = False,
) -> None:
    """
    Write a system on the Hub into a folder, every stage of it, to train on and push from.

    The system's secret must be in HF_S3T_KEY. To serve, no pull is needed: `S3TModel.from_pretrained` takes the name.
    """
    # As in `push`.
    from ..hub.folder import HubFolder

    system = HubFolder(repo_id, revision, token)
    stages = counted(len(system.valid_stages), "stage")
    if dry_run:
        rendering.say(f"would pull {stages} of {repo_id} at {system.commit} to {target}")
    else:
        system.copy_to(target)
        rendering.say(f"{repo_id} at {system.commit} is in {target}: {stages}")


def erase(repo_id: Repo, token: Token = None, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """
    Erase from the Hub what the main branch no longer holds: history, refs with an old state, their large files.

    Push the deletion first. Where this was interrupted, calling it again finishes it.
    """
    # As in `push`.
    from ..hub.erasure import erase as erase_superseded
    from ..hub.repository import HubRepo

    done = erase_superseded(HubRepo(repo_id, token), dry_run=dry_run)
    if as_json:
        rendering.print_json(asdict(done))
    else:
        rendering.show_erasure(done)
