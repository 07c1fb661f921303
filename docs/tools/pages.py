"""Hooks of MkDocs: the pages that lie outside of `docs/`, and links as GitHub reads them."""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File


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
    return "".join(parts)


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
