"""What `.gitattributes` files say of a path, read as git reads them."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import PurePosixPath
from typing import NamedTuple

from pathspec.patterns.gitignore import GitIgnorePatternError
from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

from ..folder.layout import ATTRIBUTES_FILE


# An attribute is set, unset, unspecified, or has a value.
State = bool | str | None
Said = Sequence[tuple[str, State]]
_BLANKS = " \t\r\n"
_MACRO = "[attr]"
_MACROS_OF_GIT: dict[str, Said] = {"binary": [("diff", False), ("merge", False), ("text", False)]}
_NAME = re.compile(r"(?!-)[-\w.]+", re.ASCII)
# Git passes over lines from this length on.
_TOO_LONG = 2048
_ESCAPE = re.compile(rb'\\(?:([abfnrtv\\"])|([0-3][0-7][0-7]))')
_ESCAPED = dict(zip(b'abfnrtv\\"', b'\a\b\f\n\r\t\v\\"', strict=True))
# What pathspec and git read differently: three stars, and in brackets classes, backslashes and slashes, those included
# that a range, or a negation in the middle of a name, would match.
_DISPUTED = re.compile(
    r"""\*\*\*
    | \[ [!^]? \]? [^]]* ( [\\/[] | -- | && | ~~ | \|\| )
    | / .* \[ [^]]* [!-/]-   |  \[ [^]]* [!-/]- .* /
    | / .* [^/] \[ [!^]      |  [^/] \[ [!^] .* /
    """,
    re.VERBOSE,
)
UNREADABLE = "unreadable pattern"
# By this group the patterns of pathspec say that a folder of the path matches: git counts that for ignoring only.
_BY_FOLDER = "ps_d"


class _Line(NamedTuple):
    """A line that says something: its pattern, or the macro that it defines, and what it says of attributes."""

    name: str
    said: Said
    is_macro: bool


def state_of(attribute: str, path: str, files: Mapping[str, str]) -> State:
    """
    The state of an attribute of a path: as `git check-attr`, but for a user's own settings.

    Args:
        attribute (`str`): Its name, such as `"filter"`.
        path (`str`): The path of a file in the repository.
        files (mapping from `str` to `str`): The text of every `.gitattributes` by its path in the repository.

    Returns:
        `bool`, `str` or `None`: Set or unset, its value, or `None` where it is unspecified; `UNREADABLE` where that
        may hang on a pattern of a rare form, which would not be read as git reads it.

    Example:

    ```python
    >>> from hf_s3t.hub.git_attributes import state_of

    >>> state_of("filter", "data/a.bin", {".gitattributes": "*.bin filter=lfs"})
    'lfs'
    >>> state_of("filter", "data/a.bin", {".gitattributes": "*.bin filter=lfs", "data/.gitattributes": "* -filter"})
    False
    ```
    """
    lines = {name: _lines(text) for name, text in files.items()}
    # Only the file at the top may define macros.
    defined = {line.name: line.said for line in lines.get(ATTRIBUTES_FILE, ()) if line.is_macro}
    macros = {**_MACROS_OF_GIT, **defined}
    states: dict[str, State] = {}
    # What comes first here decides: the file nearest to the path, and in it the last line that fits.
    for folder in PurePosixPath(path).parents:
        below = str(PurePosixPath(path).relative_to(folder))
        for line in reversed(lines.get(str(folder / ATTRIBUTES_FILE), ())):
            if line.is_macro:
                continue
            if _DISPUTED.search(line.name):
                _decide(states, [(attribute, UNREADABLE)], {})
            elif _matches(line.name, below):
                _decide(states, line.said, macros)
    return states.get(attribute)


def _decide(states: dict[str, State], said: Said, macros: Mapping[str, Said]) -> None:
    """Take in what a line says of attributes that are not decided yet."""
    for name, state in reversed(said):
        if name not in states:
            states[name] = state
            if state is True and name in macros:
                _decide(states, macros[name], macros)


# A push asks for each of its files, which may be thousands: texts and patterns are read once.
@lru_cache(maxsize=64)
def _lines(text: str) -> tuple[_Line, ...]:
    found = []
    for line in text.removeprefix("\ufeff").split("\n"):
        line = line.strip(_BLANKS)
        if not line or line.startswith("#") or len(line.encode(errors="surrogateescape")) >= _TOO_LONG:
            continue
        pattern, rest = _unquoted(line)
        words = [_attribute(word) for word in rest.replace("\t", " ").replace("\r", " ").split(" ") if word]
        said = [word for word in words if word is not None]
        is_macro = pattern.startswith(_MACRO) and len(pattern) > len(_MACRO)
        name = pattern.removeprefix(_MACRO)
        if len(said) < len(words) or pattern.startswith("!") or (is_macro and not _NAME.fullmatch(name)):
            # Git warns of such a line and passes over all of it.
            continue
        found.append(_Line(name if is_macro else pattern, said, is_macro))
    return tuple(found)


def _unquoted(line: str) -> tuple[str, str]:
    """The pattern of a line, out of its quotes, and the rest."""
    quoted = re.match(r'"((?:[^"\\]|\\.)*)"', line)
    if quoted is not None:
        data = quoted[1].encode(errors="surrogateescape")
        if b"\\" not in _ESCAPE.sub(b"", data):
            plain = _ESCAPE.sub(lambda found: bytes([_ESCAPED[found[1][0]] if found[1] else int(found[2], 8)]), data)
            return plain.decode(errors="surrogateescape"), line[quoted.end() :]
    pattern = re.split(f"[{_BLANKS}]", line, maxsplit=1)[0]
    return pattern, line[len(pattern) :]


def _attribute(word: str) -> tuple[str, State] | None:
    """What a word says of an attribute; `None` if it is no name of one."""
    name, equals, value = word.partition("=")
    state: State = value if equals else True
    if name[:1] in ("-", "!"):
        name, state = name[1:], False if name[0] == "-" else None
    return (name, state) if _NAME.fullmatch(name) else None


def _matches(pattern: str, path: str) -> bool:
    """Whether a pattern matches a path, as seen from the folder of the file that holds the pattern."""
    if pattern.endswith("/"):
        # A folder has no attributes, and gives none to what is in it.
        return False
    if "/" not in pattern:
        path = path.rpartition("/")[2]
    # A quoted pattern may begin or end with what would be a comment, or passed over.
    pattern = f"\\{pattern}" if pattern.startswith("#") else pattern
    pattern = f"{pattern[:-1]}\\ " if pattern.endswith(" ") else pattern
    compiled = _compiled(pattern)
    found = None if compiled is None else compiled.match_file(path)
    return found is not None and found.match.groupdict().get(_BY_FOLDER) is None


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> GitIgnoreSpecPattern | None:
    try:
        return GitIgnoreSpecPattern(pattern)
    except (GitIgnorePatternError, re.error):
        # A backslash before nothing, a range from behind: git finds nothing by them either.
        return None
