"""Hooks of MkDocs: the pages that lie outside of `docs/`, links as GitHub reads them, and the tree of errors."""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

from hf_s3t import errors


ROOT = Path(__file__).resolve().parents[2]
# Where a file of the repository is on the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}
_SOURCES = {page: source for source, page in PAGES.items()}
_FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
_TREE = "<!-- the tree of errors -->"


def on_files(files, config):
    """Bring in what lies beside `docs/`."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Have links lead to the site where it has what they name; of what it has not, the words stay."""
    name = page.file.src_uri
    source = _SOURCES.get(name, f"docs/{name}")
    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [_with_links(markdown[end : fence.start()], name, source), fence[0]]
        end = fence.end()
    parts.append(_with_links(markdown[end:], name, source))
    return "".join(parts).replace(_TREE, tree_of_errors())


def _with_links(text: str, page: str, source: str) -> str:
    def link(match):
        words, target = match.groups()
        path, mark, anchor = target.partition("#")
        if not path or "://" in path or path.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if path in PAGES:
            path = PAGES[path]
        elif path.startswith("docs/"):
            path = path.removeprefix("docs/")
        elif (ROOT / path).exists():
            return words
        else:
            # As it is: the build fails on it.
            return match[0]
        return f"[{words}]({posixpath.relpath(path, posixpath.dirname(page) or os.curdir)}{mark}{anchor})"

    return _LINK.sub(link, text)


def tree_of_errors() -> str:
    """Every error below its base, as a block of text."""
    return "\n".join(["```text", *_branch(errors.S3TError, ""), "```"])


def _branch(error: type, indent: str):
    also = [base.__name__ for base in error.__bases__ if base.__module__ == "builtins" and base is not Exception]
    yield indent + error.__name__ + (f"  (and {', '.join(also)})" if also else "")
    for child in error.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from _branch(child, indent + "    ")
