"""`.gitattributes` as git reads them: every answer is compared with that of `git check-attr`."""

import os
import random
import shutil
import subprocess

import pytest

from hf_s3t.hub.git_attributes import UNREADABLE, state_of


PATHS = (
    "examples.parquet",
    "stages/shard-0/2/adapter_model.safetensors",
    "stages/shard-0/2-0/adapter_model.safetensors",
    "stages/shard-1/a b/adapter_model.safetensors",
    "data/more/one.bin",
    "data/TWO.BIN",
    "#three",
    "vier-\u00e9.bin",
    "a",
)
LFS = "filter=lfs diff=lfs merge=lfs -text"
NAMES = (".gitattributes", "stages/.gitattributes", "stages/shard-0/.gitattributes", "data/more/.gitattributes")


@pytest.fixture(scope="module")
def by_git(tmp_path_factory):
    """A function from files to the state of `filter` of every path, as git says it."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed, and it is what the answers are compared with")
    folder = tmp_path_factory.mktemp("repository")
    # No settings of this machine or of whoever runs the test.
    own = {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "GIT_CONFIG_NOSYSTEM": "1", "GIT_ATTR_NOSYSTEM": "1"}
    others = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    subprocess.run(["git", "init", "--quiet", str(folder)], env={**others, **own}, check=True)

    def ask(files):
        for name in NAMES:
            (folder / name).unlink(missing_ok=True)
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(text.encode(errors="surrogateescape"))
        command = ["git", "check-attr", "-z", "filter", "--", *PATHS]
        done = subprocess.run(command, cwd=folder, env={**others, **own}, capture_output=True, check=True)
        words = done.stdout.decode().split("\0")
        return dict(zip(words[0::3], words[2::3]))

    return ask


def ours(files):
    states = {path: state_of("filter", path, files) for path in PATHS}
    words = {True: "set", False: "unset", None: "unspecified"}
    return {path: state if isinstance(state, str) else words[state] for path, state in states.items()}


@pytest.mark.parametrize(
    "text",
    [
        f"*.safetensors {LFS}\n*.parquet {LFS}",
        # A star does not cross a slash; a pattern with a slash is one from the top.
        f"stages/*.safetensors {LFS}",
        f"stages/* {LFS}",
        f"shard-0/*/*.safetensors {LFS}",
        f"/examples.parquet {LFS}\n/adapter_model.safetensors {LFS}",
        f"stages/shard-?/[0-9]*/*.safetensors {LFS}",
        f"stages/** {LFS}",
        f"**/*.safetensors {LFS}",
        f"stages/**/adapter_model.safetensors {LFS}",
        f"**/shard-0/** {LFS}",
        f"st**ges/shard-0/2/* {LFS}",
        f"** {LFS}",
        # A folder gives nothing to what is in it.
        f"stages {LFS}\nstages/ {LFS}\nstages/shard-0 {LFS}\ndata/more/ {LFS}",
        f"*.bin {LFS}\n*.Bin -filter",
        # Later lines win, and later words of a line.
        f"* {LFS}\n*.parquet -filter\n*.bin !filter\na filter\ndata/** filter=other",
        "* -filter\n* filter=lfs",
        "* -filter filter=lfs\na filter=lfs !filter\n*.bin -filter=lfs",
        # What is no rule.
        f"# * {LFS}\n  # * {LFS}\n\n   *.bin\t{LFS} \r\n#three {LFS}",
        f"* {LFS}\n!a -filter\n!*.bin !filter",
        f"*.bin {LFS} bad!name\n*.parquet --text {LFS}\n* filter= ",
        "\ufeff*.parquet filter=lfs\na filter=lfs",
        f"* {LFS} " + "long" * 512,
        "*.bin\u2028filter=lfs\n*.parquet\u00a0filter=lfs\na\x0cfilter=lfs",
        # Quotes.
        f'"stages/shard-1/a b/*" {LFS}\n"#three" {LFS}\n\\#three text\n"*.bin"\t{LFS}',
        f'"vier-\\303\\251.bin" {LFS}\n"\\145xamples.parquet" {LFS}',
        f'"a {LFS}\n"a\\q" {LFS}\n"!a" {LFS}\n"" {LFS}',
        # Macros.
        f"[attr]large {LFS}\n*.safetensors large\n*.parquet -large\n*.bin !large",
        "[attr]large filter=lfs\n*.safetensors large\n[attr]large -filter\n*.parquet large -large",
        "[attr]a b\n[attr]b filter=lfs\n*.bin a\n*.parquet b\na a -b",
        "[attr]binary filter=lfs\n*.safetensors binary",
        "[attr]bad!name filter=lfs\n[attr] filter=lfs\n*.bin bad!name",
        "*.bin binary -binary\n[attr]large filter=lfs\n* large\n*.parquet -large",
    ],
)
def test_a_file_is_read_as_git_reads_it(text, by_git):
    assert ours({".gitattributes": text}) == by_git({".gitattributes": text})


@pytest.mark.parametrize(
    "files",
    [
        {NAMES[0]: f"*.safetensors {LFS}", NAMES[1]: "*.safetensors -filter"},
        {NAMES[0]: "* -filter", NAMES[1]: f"shard-0/** {LFS}", NAMES[2]: "/2/* !filter\n2-0/*.bin filter"},
        {NAMES[1]: f"[attr]large {LFS}\n* large\nstages/** filter=lfs", NAMES[3]: f"*.bin {LFS}"},
        {NAMES[0]: f"[attr]large {LFS}", NAMES[2]: "* large", NAMES[1]: "* -large"},
    ],
)
def test_the_file_nearest_to_a_path_counts_first(files, by_git):
    assert ours(files) == by_git(files)


@pytest.mark.parametrize(
    "pattern",
    ["[[:alpha:]]*", "stages/***/*.safetensors", "stages[!a]shard-0/**", "[\\]e]*", "data[+-9]more/*", "[[a]*"],
)
def test_a_pattern_of_a_rare_form_is_not_guessed_at(pattern):
    files = {".gitattributes": f"* {LFS}\n{pattern} -filter"}
    assert set(ours(files).values()) == {UNREADABLE}
    # What comes after it decides all the same.
    assert set(ours({".gitattributes": files[".gitattributes"] + f"\n* {LFS}"}).values()) == {"lfs"}


PIECES = (
    "stages shard-0 2 * ** *.safetensors *.parquet ex* ? [as]* [!x]* 2-* shard-[0-9] a one.bin *.BIN \\* \\#three "
    "\\[a s**s [ []a]* [a-] [z-a] x\\ [^a]* *[0-9] vier-\u00e9.bin more data"
).split() + ["a b", ""]
WORDS = (
    "filter=lfs -filter !filter filter filter=x large -large !large binary text bad!name filter= -filter=lfs".split()
)


def any_files(chance: random.Random):
    def pattern():
        found = "/".join(chance.choice(PIECES) for _ in range(chance.choice((1, 1, 1, 2, 2, 3, 4))))
        found = chance.choice(("", "", "", "/", "**/")) + found + chance.choice(("", "", "", "", "/", "/**"))
        return '"' + found.replace("\\", "\\\\") + '"' if chance.random() < 0.2 else found

    def line():
        said = chance.choice((" ", "\t")).join(chance.choices(WORDS, k=chance.choice((1, 1, 2))))
        start = "[attr]large" if chance.random() < 0.15 else pattern()
        return chance.choice(("", "", " ", "# ")) + start + chance.choice((" ", "\t ")) + said

    names = [NAMES[0], *(name for name in NAMES[1:] if chance.random() < 0.15)]
    return {name: "\n".join(line() for _ in range(chance.randint(1, 5))) for name in names}


def test_whatever_files_say_is_read_as_git_reads_it(by_git):
    chance, read = random.Random(0), 0
    for _ in range(150):
        files = any_files(chance)
        found, expected = ours(files), by_git(files)
        sure = {path for path in PATHS if found[path] != UNREADABLE}
        assert {p: found[p] for p in sure} == {p: expected[p] for p in sure}, files
        read += len(sure)
    # Few patterns are of a rare form.
    assert read > 0.8 * 150 * len(PATHS)
