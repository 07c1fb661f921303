"""What must lie in the large-file storage of a repository, out of which it can be erased."""

from collections.abc import Iterable
from pathlib import PurePosixPath

from ..errors import HubError
from ..folder.layout import ADAPTER_FILE, ATTRIBUTES_FILE, GATE_FILE, TABLE_FILE
from .git_attributes import state_of
from .repository import HubRepo, HubState


_LARGE = "filter=lfs diff=lfs merge=lfs -text"


def must_be_erasable(path: str) -> bool:
    """Whether a file holds weights, ids or words and belongs into the large-file storage: what git keeps, it keeps."""
    return path in (TABLE_FILE, GATE_FILE) or path.endswith(f"/{ADAPTER_FILE}")


def refuse_what_git_would_keep(repo: HubRepo, state: HubState, added: Iterable[str]) -> None:
    """No erasure reaches what lies in git itself, in any old commit, until the Hub collects garbage."""
    if not state.commit:
        # Of a repository that is not made yet; a new one has the Hub's own rules, under which these files are large.
        return
    paths = sorted(filter(must_be_erasable, added))
    folders = {folder for path in paths for folder in PurePosixPath(path).parents}
    names = state.tree.keys() & {str(folder / ATTRIBUTES_FILE) for folder in folders}
    rules = {name: repo.download(name, state.commit).read_bytes().decode(errors="surrogateescape") for name in names}
    kept = [path for path in paths if state_of("filter", path, rules) != "lfs"]
    if kept:
        wanted = sorted({f"*{PurePosixPath(path).suffix} {_LARGE}" for path in kept})
        raise HubError(
            f"By the {ATTRIBUTES_FILE} of {repo.repo_id}, {kept[0]}{' and others' if len(kept) > 1 else ''} would lie "
            "in git itself, where a deletion could not be erased from old commits; expected are rules that make it a "
            f"large file. Add to {ATTRIBUTES_FILE} there: {'; '.join(wanted)}, as its last lines, and remove files of "
            "that name from the folders below. Then push again. Nothing was pushed."
        )
