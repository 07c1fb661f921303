"""An extension of Griffe: reads docstrings in the style of Hugging Face as ones in the style of Google."""

import re

import griffe

import hf_s3t


_PUBLIC = ("analysis", "baselines", "errors", "launch", "metrics", "sequences")
# [`~hf_s3t.errors.ConfigError`], [`S3TModel.from_pretrained`]
_REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\]")
# num_slices (`int`, defaults to 4):
_ARGUMENT = re.compile(r"^(?P<start> +[\w*]+(?:, [\w*]+)* )\((?P<type>.*)\):", re.MULTILINE)
# compute_metrics, callbacks: As in `Trainer`.
_SEVERAL = re.compile(
    r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+)(?P<rest>(?: \(.*\))?:.*\n(?:(?P=indent) +.*\n)*)", re.MULTILINE
)
# `list[int]`: What it is.  [`Option`]: What it is.
_VALUE = re.compile(r"^(?P<start>\s+)(?P<type>\[?`[^:\n]*`\]?):(?=\s)", re.MULTILINE)
_SECTIONS = re.compile(r"^(Args|Returns|Raises|Yields):$", re.MULTILINE)
_NEXT = re.compile(r"^\S", re.MULTILINE)


class HuggingFaceStyle(griffe.Extension):
    """Types without backquotes, and references as links where the site has what they name."""

    def on_instance(self, *, obj, **kwargs):
        """Rewrite a docstring before anything parses it."""
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value, obj.module.path)


def rewritten(text: str, module: str) -> str:
    """
    A docstring as Google would write it.

    Args:
        text (`str`): The docstring.
        module (`str`): Where names without a module are looked for.
    """
    parts, end = [], 0
    for section in _SECTIONS.finditer(text):
        if section.start() < end:
            continue
        following = _NEXT.search(text, section.end())
        stop = following.start() if following else len(text)
        body = _ARGUMENT.sub(lambda m: f"{m['start']}({_type(m['type'])}):", text[section.end() : stop])
        body = _SEVERAL.sub(_one_by_one, body)
        body = _VALUE.sub(lambda m: f"{m['start']}{_type(m['type'])}:", body)
        parts += [text[end : section.end()], body]
        end = stop
    return _REFERENCE.sub(lambda m: _link(m[2], bool(m[1]), module), "".join([*parts, text[end:]]))


def _one_by_one(match: re.Match) -> str:
    """Each of several arguments by itself, with the words that they share."""
    return "".join(f"{match['indent']}{name}{match['rest']}" for name in match["names"].split(", "))


def _type(text: str) -> str:
    """A type as code: the default stands in the signature, and what is optional has one."""
    text = re.sub(r", defaults to .*|,? ?\*optional\*", "", text)
    return _REFERENCE.sub(lambda m: m[2].rpartition(".")[2], text).replace("`", "")


def _path(name: str) -> str:
    """The public path of a name, wherever it is defined."""
    head, dot, rest = name.removeprefix("hf_s3t.").partition(".")
    if head in hf_s3t.__all__:
        return f"hf_s3t.{head}{dot}{rest}"
    last = name.rpartition(".")[2]
    if name.startswith("hf_s3t.") and last in hf_s3t.__all__:
        return f"hf_s3t.{last}"
    return name


def _link(name: str, is_short: bool, module: str) -> str:
    path = _path(name)
    shown = name.rpartition(".")[2] if is_short else name
    # Of what a docstring calls by its name alone, and of what other libraries have, the site need not know.
    is_ours = path.startswith("hf_s3t.") and path.split(".")[1] in (*_PUBLIC, *hf_s3t.__all__)
    if not path.startswith("hf_s3t.") and "." not in path:
        path = f"{module}.{path}"
    return f'<autoref identifier="{path}"{"" if is_ours else " optional"}><code>{shown}</code></autoref>'
