"""
Whatever a folder's files hold, by accident or design: a reader works or says what is wrong, and does no more (E4, E6).
"""

import contextlib
import json
import os
import pickle
import random
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.crashes import plant
from support.folders import NAMES, USERS, add_checkpoint, apply, forge, forge_stage, grow, new_system, request_later
from support.tables import rewrite_table, write_own
from typer.testing import CliRunner

from hf_s3t import S3TConfig
from hf_s3t.cli import app as cli
from hf_s3t.errors import ConfigError, FolderError, IsolationError, S3TError
from hf_s3t.folder import table_file
from hf_s3t.folder.files import file_digest, read_checked_json, write_checked_json
from hf_s3t.folder.layout import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CONFIG_FILE,
    LEDGER_FILE,
    PENDING_FILE,
    STAGE_FILE,
    TABLE_FILE,
)
from hf_s3t.folder.opening import open_folder
from hf_s3t.folder.secret import read_key
from hf_s3t.folder.status import system_status
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.inspection import inspect
from hf_s3t.operations.pending import PendingRequests
from hf_s3t.operations.receipts import Receipts
from hf_s3t.plan import Plan, StageKey
from hf_s3t.records.ledger import Ledger, LedgerEntry, line_hash


pytestmark = pytest.mark.usefixtures("surroundings")

KEY = "ledger.key"
CONFIG = S3TConfig(num_shards=2, num_slices=2, budget=1, group_column="user", seed=1)


# What is done outside of a folder while it is read


class Watch:
    """Hears of what Python does: files opened, changed and removed, programs started, pickles that call something."""

    CHANGES = frozenset(
        "os.remove os.rename os.rmdir os.mkdir os.link os.symlink os.truncate os.chmod os.chown os.utime".split()
    )
    RUNS = frozenset(
        "pickle.find_class subprocess.Popen os.system os.exec os.posix_spawn os.fork socket.connect".split()
    )

    def __init__(self):
        self.system: str | None = None
        self.place = ""
        self.heard: list[str] = []

    def __call__(self, event: str, args: tuple) -> None:
        if self.system is None:
            return
        if event in self.RUNS:
            self.heard.append(f"{event} {args}")
        elif event in self.CHANGES:
            folders = [a for a in args if isinstance(a, int) and a > 2] if event != "os.chmod" else []
            for path in args[:2] if event in ("os.rename", "os.link") else args[:1]:
                self._hear(event, path, folders, follow=False)
        elif event == "open" and not isinstance(args[0], int):
            changes = bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
            self._hear("written" if changes else "read", args[0], [], follow=True)

    def _hear(self, what: str, path: Any, folders: list[int], follow: bool) -> None:
        path = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else None
        if path is None or (not os.path.isabs(path) and (folders or what in ("read", "written"))):
            # Below a folder that is open, which was looked at when it was opened.
            return
        above, name = os.path.split(os.path.abspath(path))
        real = os.path.realpath(path) if follow else os.path.join(os.path.realpath(above), name)
        inside = real == self.system or real.startswith(self.system + os.sep)
        harmless = "__pycache__" in real or real == os.devnull or (what == "read" and not real.startswith(self.place))
        if not (inside or harmless):
            self.heard.append(f"{what} {real}")

    @contextlib.contextmanager
    def over(self, system: Path, place: Path) -> Iterator[None]:
        """Nothing but the system is touched meanwhile."""
        self.heard, self.place, self.system = [], os.path.realpath(place), os.path.realpath(system)
        try:
            yield
        finally:
            self.system = None
        assert not self.heard


watch = Watch()
sys.addaudithook(watch)


def picture(root: Path) -> dict[str, Any]:
    """All below a folder: the bytes of files, `None` for folders, and where links lead, which are not followed."""
    found: dict[str, Any] = {}
    waiting = [""]
    while waiting:
        above = waiting.pop()
        for entry in os.scandir(root / above):
            name = os.path.join(above, entry.name)
            if entry.is_symlink():
                found[name] = os.readlink(entry.path)
            elif entry.is_dir():
                found[name] = None
                waiting.append(name)
            elif not entry.is_file():
                found[name] = "pipe"
            elif entry.name != ".lock" or entry.stat().st_size:
                with open(entry.path, "rb") as file:
                    found[name] = file.read()
    return found


class Playground:
    """A system between things that are none of its business, put back after each change."""

    def __init__(self, place: Path):
        self.place, self.path = place, place / "system"
        folder = grow(new_system(self.path, NAMES, CONFIG))
        apply(folder, NAMES[:1])
        grow(folder)
        apply(folder, NAMES[3:4])
        key = folder.plan.missing(folder.valid_stages)[0]
        add_checkpoint(folder, key)
        request_later(folder, NAMES[5:6], [USERS[6]], max_delay=60)
        (place / "canary").write_text("alive")
        plant(
            {"x": b"alive", "stages": None, "stages/shard-0": None, "stages/shard-0/0": b"alive"}, place / "neighbour"
        )
        victim = grow(new_system(place / "neighbour" / "system", NAMES, CONFIG), limit=1)
        add_checkpoint(victim, StageKey(1, (0,)), recorded=False)
        self.stages = [key.path for key in folder.stages]
        self.whole = picture(self.path)
        self.around = self.what_is_around()

    def what_is_around(self) -> dict:
        return {name: data for name, data in picture(self.place).items() if name.split(os.sep)[0] != "system"}

    def put_back(self) -> None:
        now = picture(self.path)
        for name in sorted(now, reverse=True):
            if name not in self.whole or type(now[name]) is not type(self.whole[name]):
                (self.path / name).rmdir() if now[name] is None else (self.path / name).unlink()
        for name, data in sorted(self.whole.items()):
            if data is None:
                (self.path / name).mkdir(exist_ok=True)
            elif now.get(name) != data:
                (self.path / name).write_bytes(data)
                (self.path / name).chmod(0o600)

    @contextlib.contextmanager
    def untouched(self, act: str) -> Iterator[None]:
        """What is read is not changed, neither is anything around it."""
        before = picture(self.path)
        with watch.over(self.path, self.place):
            yield
        assert picture(self.path) == before, act


@pytest.fixture(scope="module")
def playground(tmp_path_factory, surroundings):
    return Playground(tmp_path_factory.mktemp("fuzzed"))


# Readers


def read(path: Path) -> None:
    folder = open_folder(path, read_only=True)
    system_status(folder)
    requests = PendingRequests(folder)
    requests.ids(), requests.groups(), requests.apply_by()


def receipts(path: Path) -> None:
    for receipt in Receipts.read(path).receipts:
        json.dumps(receipt.to_dict())


LOOKS = [
    ["status"], ["status", "--json"], ["check"], ["check", "--json"], ["receipt"], ["receipt", "--json"],
    ["receipt", "--line", "1"], ["receipt", "--id", NAMES[0]], ["locate", NAMES[1]],
    ["locate", "--group", USERS[4], "--json"], ["unlearn", "--dry-run", NAMES[1]], ["apply-pending", "--dry-run"],
    ["purge", "--dry-run"],
]  # fmt: skip
ACTS = [["unlearn", NAMES[1]], ["unlearn", "--later", "--max-delay", "9", NAMES[1]], ["apply-pending"], ["purge"]]


def typed(path: Path, words: list[str]) -> None:
    result = CliRunner().invoke(cli.app, [words[0], str(path), *words[1:]], prog_name="hf-s3t")
    assert isinstance(result.exception, (SystemExit, type(None))), (words, result.exc_info)
    assert result.exit_code in (0, 1, 2, 3) and "Traceback" not in result.output, words


def survives(playground: Playground, chance: random.Random, opened: Callable = open_folder) -> bool:
    """Have one look, and perhaps more, at a folder that was changed; returns whether it could be opened."""
    path = playground.path
    with playground.untouched("looking"):
        found = inspect(path)
        assert all(problem.isprintable() for problem in (*found.problems, *found.notes))
        could = True
        try:
            read(path)
        except S3TError:
            could = False
        assert could or found.problems, "what cannot be opened is a problem"
        if chance.random() < 0.4:
            with contextlib.suppress(S3TError):
                receipts(path)
        if chance.random() < 0.1:
            typed(path, chance.choice(LOOKS))
    # These may write: into the folder and nowhere else.
    with watch.over(path, playground.place):
        if chance.random() < 0.04:
            typed(path, chance.choice(ACTS))
        with contextlib.suppress(S3TError):
            opened(path)
    return could


# Bytes


def garbled(data: bytes, chance: random.Random) -> bytes:
    """Bytes that accidents make of others."""
    at, other = sorted((chance.randrange(len(data) + 1), chance.randrange(len(data) + 1)))
    return chance.choice(
        [
            lambda: data[:at],
            lambda: data[other:],
            lambda: data[:at] + data[other:],
            lambda: data + data,
            lambda: data[:other] + data[at:other] + data[other:],
            lambda: data[:at] + bytes(other - at) + data[other:],
            lambda: data[:at] + chance.randbytes(chance.randrange(1, 9)) + data[at:],
            lambda: bytes(byte ^ (chance.random() < 0.02) * chance.randrange(256) for byte in data),
            lambda: flipped(data, chance),
            lambda: flipped(data, chance),
            lambda: chance.randbytes(chance.randrange(64)),
            lambda: data.replace(b"\n", b"\r\n"),
            lambda: data.decode("latin-1").encode("utf-16"),
            lambda: b"",
        ]
    )()


def flipped(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data) or 1)
    return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :] if data else b"\0"


def test_bytes_that_were_changed_by_accident_are_survived(playground, cases):
    files = [CONFIG_FILE, TABLE_FILE, LEDGER_FILE, PENDING_FILE, KEY]
    files += [f"{stage}/{name}" for stage in playground.stages for name in (STAGE_FILE, ADAPTER_CONFIG_FILE)]
    files += [f"{stage}/{ADAPTER_FILE}" for stage in playground.stages]
    files += [name for name in playground.whole if name.startswith("checkpoints/") and name.endswith(STAGE_FILE)]
    # Of each kind the same number.
    kinds: dict[str, list[str]] = {}
    for name in files:
        kinds.setdefault(os.path.basename(name) + name.split("/")[0][:6], []).append(name)
    refused = 0
    for number in range(cases(50, 2500)):
        chance = random.Random(number)
        name = chance.choice(chance.choice(list(kinds.values())))
        with told(playground, f"case {number}, {name}"):
            (playground.path / name).write_bytes(garbled(playground.whole[name], chance))
            refused += not survives(playground, chance, SystemFolder)
    assert refused > number / 4, "few of the cases were damages"
    assert playground.what_is_around() == playground.around


@contextlib.contextmanager
def told(playground: Playground, case: str) -> Iterator[None]:
    """Says which case it was, so that it can be repeated; and puts back what it changed."""
    try:
        yield
    except BaseException as error:
        error.add_note(case)
        raise
    finally:
        playground.put_back()


@pytest.fixture
def cases(request) -> Callable[[int, int], int]:
    """How many: few in a hurry, many in the slow variant."""
    return lambda few, many: many if request.param else few


def pytest_generate_tests(metafunc):
    if "cases" in metafunc.fixturenames:
        many = pytest.param(True, marks=[pytest.mark.slow, pytest.mark.long], id="many")
        metafunc.parametrize("cases", [pytest.param(False, id="few"), many], indirect=True)


# Values


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


ODD = [
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, 2**64, 10**30, 10**400, -(10**4000), 0.5, 1e308, -0.0, 5e-324,
    float("nan"), float("inf"), -float("inf"), "", " ", "0", "../../x", "../../../neighbour/x", "/etc/passwd", "..",
    "C:\\x", "a\0b", "a\nb", "\x1b[2J\x1b]0;owned\a", "\ud800", "\u202e\u2066", "٣", "e\u0301" * 50, "x" * 10_000,
    "1" * 5000, "shard-0/0", "shard-0/../../x", f"shard-0/{'1' * 5000}", "2026-01-01", "2026-01-01T00:00:00+00:00",
    "9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59", [], [[]], {}, {"": {}}, {"../../x": "../../x"}, [None],
    nested(200), {"__class__": "os.system"}, [10**400], [0.5, 10**400], list(range(300)), "digest", "column",
]  # fmt: skip
# Sizes that nobody has the memory for.
HUGE = [10**9, 10**12, 2**62, 10**400]


def twisted(value: Any, chance: random.Random, odd: list = ODD) -> Any:
    """A JSON value of which one place holds something else, or nothing."""
    value = json.loads(json.dumps(value))
    places: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        found = waiting.pop()
        keys = found if isinstance(found, dict) else range(len(found))
        places += [(found, key) for key in keys]
        waiting += [found[key] for key in keys if isinstance(found[key], (dict, list))]
    holder, key = chance.choice(places)
    what = chance.random()
    if what < 0.12:
        del holder[key]
    elif what < 0.2 and isinstance(holder, dict):
        holder[chance.choice([o for o in odd if isinstance(o, str)])] = holder.pop(key)
    elif what < 0.28:
        # What stands elsewhere, in a type that is right there.
        other, name = chance.choice(places)
        holder[key] = json.loads(json.dumps(other[name]))
    else:
        holder[key] = chance.choice(odd)
    return value


def twist_config(path: Path, chance: random.Random) -> None:
    record = read_checked_json(path / CONFIG_FILE)
    if chance.random() < 0.6:
        record["s3t_config"] = twisted(record["s3t_config"], chance, ODD + HUGE)
    else:
        record = twisted(record, chance)
    write_checked_json(path / CONFIG_FILE, record)


def twist_stage(path: Path, chance: random.Random) -> None:
    file = chance.choice(sorted(path.glob(f"stages/*/*/{STAGE_FILE}")))
    write_checked_json(file, twisted(read_checked_json(file), chance))


def twist_checkpoint(path: Path, chance: random.Random) -> None:
    (file,) = path.glob(f"checkpoints/*/*/*/{STAGE_FILE}")
    write_checked_json(file, twisted(read_checked_json(file), chance))


def twist_ledger(path: Path, chance: random.Random) -> None:
    """A chain that holds, and a table that was written with it: an odd line is all that is wrong."""
    entries = [json.loads(line) for line in (path / LEDGER_FILE).read_text().splitlines()]
    at = chance.randrange(len(entries))
    entries[at] = twisted(entries[at], chance)
    lines: list[str] = []
    for number, entry in enumerate(entries):
        if lines and "previous" in entry and number > at:
            entry["previous"] = [line_hash(lines[-1])]
        lines.append(json.dumps(entry, sort_keys=True, separators=(",", ":")))
    (path / LEDGER_FILE).write_text("".join(line + "\n" for line in lines))
    rewrite_table(path / TABLE_FILE, lambda columns: columns, ledger=f"{len(lines)} {line_hash(lines[-1])}")


def twist_requests(path: Path, chance: random.Random) -> None:
    lines = [json.loads(line) for line in (path / PENDING_FILE).read_text().splitlines()] * 2
    lines[0] = twisted(lines[0], chance)
    (path / PENDING_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


COLUMNS = ["id", "id_digest", "shard", "slice", "digest", "group"]
EXTREMES = [
    pa.array([2**64 - 1], pa.uint64()), pa.array([-(2**63)], pa.int64()), pa.array([2**50], pa.timestamp("s")),
    pa.array([2**62], pa.timestamp("ns", "UTC")), pa.array([1], pa.timestamp("us", "Nowhere/There")),
    pa.array([2**63 - 1], pa.duration("s")), pa.array([2**31 - 1], pa.date32()), pa.array([2**62], pa.date64()),
    pa.array([86_400_000_000], pa.time64("us")), pa.array([b"\xff\0"], pa.binary()), pa.array([None], pa.null()),
    pa.array([float("nan")]), pa.array([True]), pa.array([[1]], pa.list_(pa.int8())), pa.array([{"a": 1}]),
    pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int8())), pa.array(["../../x"]), pa.array(["x" * 100_000]),
    pa.array(["a"]).dictionary_encode(), pa.array([10**37], pa.decimal128(38, 0)), pa.array([-1]), pa.array([1e300]),
    pa.array([2**40]), pa.array(["\x1b[2J\n\u202e"]), pa.array([""]), pa.array([0]),
    pa.array(["x"], pa.large_string()),
]  # fmt: skip


def twist_table(path: Path, chance: random.Random) -> None:
    arrow = pq.read_table(path / TABLE_FILE)
    said = dict(pq.read_metadata(path / TABLE_FILE).metadata)
    columns = {name: arrow[name].combine_chunks() for name in arrow.column_names}
    rows, name = arrow.num_rows, chance.choice(COLUMNS)
    what = chance.random()
    if what < 0.1:
        columns.pop(name, None)
    elif what < 0.2:
        columns[name] = pa.nulls(rows, columns[name].type if name in columns else pa.string())
    elif what < 0.3:
        columns = {n: pa.concat_arrays([c, c]) for n, c in columns.items()}
    elif what < 0.4:
        rows = chance.randrange(3)
        columns = {n: c.slice(0, rows) for n, c in columns.items()}
    elif what < 0.5:
        name = chance.choice([table_file._PIN, table_file._VERSION, table_file._SLICES])
        said[name] = json.dumps(chance.choice(ODD)).encode()
    else:
        columns[name] = pa.concat_arrays([chance.choice(EXTREMES)] * rows) if rows else pa.nulls(0)
    names = list(columns)
    if what > 0.95:
        names[chance.randrange(len(names))] = chance.choice(COLUMNS)
    write_own(path / TABLE_FILE, pa.table(list(columns.values()), names), said)


def twist_key(path: Path, chance: random.Random) -> None:
    """A secret of another kind, and a system that says it is its own."""
    (path / KEY).write_bytes(chance.choice([chance.randbytes(40), b"\xff\xfe" * 20, b"k" * 16, b"\0" * 32, b" " * 40]))
    with contextlib.suppress(S3TError):
        forge(path / CONFIG_FILE, key_check=read_key(path).check)


def twist_adapter(path: Path, chance: random.Random) -> None:
    """Files that no reader here opens; the record of the stage says that they are its own."""
    stage = chance.choice(sorted(path.glob("stages/*/*")))
    (stage / ADAPTER_FILE).write_bytes(chance.choice(HEADERS))
    (stage / ADAPTER_CONFIG_FILE).write_text(
        json.dumps({"peft_type": chance.choice(ODD), "auto_mapping": "os.system"})
    )
    own(stage)


def own(stage: Path) -> None:
    forge(stage / STAGE_FILE, files={n: file_digest(stage / n) for n in (ADAPTER_FILE, ADAPTER_CONFIG_FILE)})


TWISTS = [
    twist_config, twist_config, twist_stage, twist_checkpoint, twist_ledger, twist_ledger, twist_requests, twist_table,
    twist_table, twist_key, twist_adapter,
]  # fmt: skip


def header(text: bytes, size: int | None = None, data: bytes = b"") -> bytes:
    """The beginning of a safetensors file, with a length that may be a lie."""
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def tensor(**changes) -> bytes:
    record = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}
    return json.dumps({"lora": record}).encode()


HEADERS = [
    b"", b"\0" * 8, b"\xff" * 8, header(b"{}", 2**63), header(b"{}", 100 * 2**40), header(b""), header(b"{}"),
    header(b"[" * 100_000), header(b'{"a":' * 5000), header(b"\xff\xfe"), header(b'{"__metadata__":{"a":1}}'),
    header(tensor(), data=bytes(4)), header(tensor(shape=[2**40], data_offsets=[0, 2**42]), data=bytes(16)),
    header(tensor(shape=[2**32, 2**32], data_offsets=[0, 2**63]), data=bytes(16)),
    header(tensor(data_offsets=[16, 0]), data=bytes(16)), header(tensor(data_offsets=[-1, 16]), data=bytes(16)),
    header(tensor(dtype="F1"), data=bytes(16)), header(tensor(dtype="F64"), data=bytes(16)),
    header(tensor(shape=[]), data=bytes(16)), header(tensor(shape=["2"]), data=bytes(16)),
    header(json.dumps({"../../x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode(), data=bytes(4)),
]  # fmt: skip


def test_odd_values_behind_digests_that_match_are_survived(playground, cases):
    opened = 0
    for number in range(cases(60, 3500)):
        chance = random.Random(number)
        twist = chance.choice(TWISTS)
        with told(playground, f"case {number}, {twist.__name__}"):
            twist(playground.path, chance)
            opened += survives(playground, chance)
    assert number / 20 < opened < number, "all or none could be opened"
    assert playground.what_is_around() == playground.around


# What else may lie in a folder


NAMES_OF_ENTRIES = [
    "shard-0", "shard-1", "shard-9", "shard-01", "shard-٣", "0", "0-1", "1-0", "9", "0-0", "1" * 250, "-1", "stages",
    ".tmp-x", ".gone-0-x", ".tmp-", ".gone-", ".lock", "checkpoint-1", "checkpoint-evil", STAGE_FILE, ADAPTER_FILE,
    KEY, "optimizer.pt", "pytorch_model.bin", PENDING_FILE, "a\nb", "\x1b[2J", "\udcff", "x\u202ey", "CON", "~", "*",
    "{}", "cache-0123.arrow", "runs", ".git", "README.md",
]  # fmt: skip
PLACES = [
    "",
    "stages",
    "stages/shard-0",
    "stages/shard-0/{stage}",
    "checkpoints",
    "checkpoints/shard-0",
    "{checkpoint}",
]
KINDS = ["file", "folder", "full folder", "link", "link to a folder", "link to itself", "link to nothing", "pipe"]


def strew(playground: Playground, chance: random.Random) -> None:
    """Put something into a folder where nothing of its name is, or in the place of what is there."""
    stage = os.path.basename(chance.choice([s for s in playground.stages if "shard-0" in s]))
    (checkpoint,) = playground.path.glob("checkpoints/*/*/*")
    place = chance.choice(PLACES).format(stage=stage, checkpoint=checkpoint.relative_to(playground.path))
    kind, name = chance.choice(KINDS), chance.choice(NAMES_OF_ENTRIES)
    parent = playground.path / place
    parent.mkdir(exist_ok=True, parents=True)
    if chance.random() < 0.4 and any(parent.iterdir()):
        name = chance.choice(sorted(entry.name for entry in parent.iterdir()))
    entry = parent / name
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    entry.unlink(missing_ok=True)
    neighbour = playground.place / "neighbour"
    if kind == "file":
        entry.write_bytes(b"\x80\x04N.")
    elif kind == "pipe":
        os.mkfifo(entry)
    elif "folder" in kind and "link" not in kind:
        entry.mkdir()
        if kind == "full folder":
            (entry / chance.choice(NAMES_OF_ENTRIES)).mkdir()
    else:
        like = neighbour / "system" / place / name
        target = {"link": neighbour / "x", "link to itself": entry, "link to nothing": Path("/nowhere")}.get(kind)
        entry.symlink_to(target or (like if like.exists() else neighbour / chance.choice(["stages", "system"])))


def test_entries_of_any_name_and_kind_are_survived_and_links_not_followed(playground, cases):
    for number in range(cases(30, 1000)):
        chance = random.Random(number)
        with told(playground, f"case {number}"):
            strew(playground, chance)
            survives(playground, chance)
    assert playground.what_is_around() == playground.around


def test_a_trainer_refuses_a_folder_whose_links_lead_elsewhere_before_it_removes_anything(tmp_path):
    from support.tiny import make_trainer, plant_stages

    trainer = make_trainer(tmp_path / "system")
    plant_stages(trainer)
    apply(SystemFolder(tmp_path / "system"), trainer.folder.table.members(0, 0)[:1])
    kept = tmp_path / "neighbour" / "checkpoints" / "shard-0" / "0" / "checkpoint-1"
    kept.mkdir(parents=True)
    (tmp_path / "system" / "checkpoints").symlink_to(tmp_path / "neighbour" / "checkpoints")
    with pytest.raises(FolderError, match="checkpoints is a symbolic link"):
        make_trainer(tmp_path / "system")
    assert kept.is_dir()


# Readers by themselves, many times


def outcome(read: Callable, *args: Any) -> Any:
    """What a reader gives, or the error that it raised on purpose."""
    try:
        return read(*args)
    except S3TError as error:
        return error


def plan_of(values: Any) -> Plan:
    return Plan.from_config(S3TConfig.from_dict(values))


WHOLE = [
    S3TConfig(num_shards=2, num_slices=3).to_dict(),
    S3TConfig(num_slices=2, sequence_selection="bms", deletion_prior=[0.5, 0.5]).to_dict(),
    S3TConfig(num_slices=3, budget=4, sequence_selection="random", layers_per_slice=[1, 2, 1]).to_dict(),
    S3TConfig(num_shards=2, num_slices=2, sequence_selection=[[[0, 1]], [[1, 0]]]).to_dict(),
    S3TConfig(num_slices=2, partition="column", shard_column="a", slice_column="b").to_dict(),
]


def test_a_config_of_any_values_is_a_plan_or_refused(cases):
    found = []
    for number in range(cases(300, 4000)):
        chance = random.Random(number)
        values = twisted(chance.choice(WHOLE), chance, ODD + HUGE)
        found.append(outcome(plan_of, values))
        outcome(S3TConfig.from_json, garbled(json.dumps(values).encode(), chance).decode("latin-1"))
    assert {type(one) for one in found} >= {Plan, ConfigError}


@pytest.mark.parametrize("version", [1, 2])
def test_a_ledger_of_any_lines_is_a_ledger_or_refused(cases, version):
    stages = {"shard-0/0": "aa", "shard-0/1": "ab"}
    first = LedgerEntry("deletion", "then", ("0a",), {}, stages if version == 1 else {}, (), {}, (), version=version)
    whole = Ledger([first.to_line()])
    for line in range(1, 3):
        whole = whole.append("deletion", ids=[f"{line}a"], removed={"shard-0/0": "aa"}, groups=["bb"])
    found = []
    for number in range(cases(300, 3000)):
        chance = random.Random(number)
        lines = [json.dumps(twisted(json.loads(whole.lines[0]), chance)), *whole.lines[1:]]
        text = whole.text if chance.random() < 0.5 else "\n".join(lines[: chance.randrange(1, 4)]) + "\n"
        text = garbled(text.encode(), chance).decode("latin-1") if chance.random() < 0.5 else text
        one = outcome(Ledger.parse, text)
        found.append(one)
        if isinstance(one, Ledger):
            assert one.text == text[: len(one.text)] and all(isinstance(digest, str) for digest in one.deleted)
            assert all(one.left_at(number + 1) is not None for number in range(len(one.lines)))
            assert Ledger.parse(one.append("deletion", ids=["ff"], stages_now=stages).text).deleted == {
                *one.deleted,
                "ff",
            }
    assert {type(one) for one in found} >= {Ledger, FolderError}


def test_an_address_of_a_stage_is_the_only_one_it_has(cases):
    for number in range(cases(500, 5000)):
        chance = random.Random(number)
        path = garbled(b"stages/shard-10/20-1-0", chance).decode("latin-1")
        path = chance.choice([path, path.replace("1", chance.choice(["٣", "²", "1" * 5000, "01", "-1", "1\n"]))])
        key = outcome(StageKey.from_path, path)
        assert isinstance(key, FolderError) or key.path == path


@pytest.mark.parametrize(
    "values",
    [
        {"num_shards": 10**9},
        {"num_slices": 10**9, "budget": 1},
        {"num_slices": 10**9, "sequence_selection": [[0]]},
        {"num_slices": 30, "budget": 10**12},
        {"num_slices": 1000},
        {"num_slices": 2, "sequence_selection": "bms", "deletion_prior": [0.5, 0.5], "score_horizon": 10**400},
        {"num_slices": 2, "deletion_prior": [10**400, 0]},
        {"num_slices": 2, "deletion_prior": [10**308, 10**308]},
        {"num_slices": 2, "deletion_prior": [float("nan"), 1]},
    ],
)
def test_a_config_that_nobody_has_the_memory_or_the_numbers_for_is_refused(playground, values):
    with pytest.raises(ConfigError):
        S3TConfig.from_dict(values)
    with told(playground, str(values)):
        forge(playground.path / CONFIG_FILE, s3t_config=values)
        assert CONFIG_FILE in " ".join(inspect(playground.path).problems)
        typed(playground.path, ["status"])


def test_the_largest_systems_anybody_trains_are_not_refused():
    # Of the 32 stages that saw all slices one is enough.
    assert len(plan_of({"num_shards": 20, "num_slices": 32}).stages()) == 20 * (32 * 32 - 31)


def test_json_of_any_depth_is_read_or_refused(tmp_path):
    # At some depth Python still reads a value and no longer writes it, as the digest needs.
    for depth in range(850, 1010):
        (tmp_path / "x.json").write_text('{"digest": "", "x": ' + "[" * depth + "]" * depth + "}")
        with pytest.raises(FolderError):
            read_checked_json(tmp_path / "x.json")


# Times of requests


@pytest.mark.parametrize("delay", ["nan", "inf", "1e300", "1e12"])
def test_a_delay_that_leads_to_no_date_is_refused_and_nothing_recorded(playground, delay):
    before = picture(playground.path)
    folder = open_folder(playground.path, read_only=True)
    with pytest.raises(ConfigError, match="`max_delay` must be a number of seconds"):
        request_later(folder, NAMES[1:2], max_delay=float(delay))
    words = ["unlearn", str(playground.path), NAMES[1], "--later", "--max-delay", delay]
    result = CliRunner().invoke(cli.app, words, prog_name="hf-s3t")
    # Typer has an opinion on what is no number.
    assert result.exit_code == (2 if delay == "nan" else 1) and "Traceback" not in result.stderr
    assert picture(playground.path) == before


def test_a_request_with_a_time_of_no_zone_is_damaged(playground):
    with told(playground, "no zone"):
        line = json.loads((playground.path / PENDING_FILE).read_text())
        with open(playground.path / PENDING_FILE, "a") as file:
            file.write(json.dumps({**line, "apply_by": "2026-01-01T00:00:00"}) + "\n")
        with pytest.raises(FolderError, match=r"line 2 cannot be read \(its time has no zone\)"):
            PendingRequests(open_folder(playground.path, read_only=True)).apply_by()
        assert "line 2 cannot be read" in " ".join(inspect(playground.path).problems)


# What is typed


WORDS = [
    *"status locate unlearn apply-pending check receipt purge export".split(), NAMES[1], USERS[4], "--json",
    "--dry-run", "--group", "--from-file", "--id", "--line", "--missing", "--later", "--max-delay", "--repo-id",
    "--dataset-cache", "--yes-remove", "--base-model", "--", "-", "nan", "-inf", "1e400", "1e-400", "9" * 5000,
    "-9223372036854775809", "0x1", "1_0", "٣", "\udcff", "\udc80\udc81", "\u202e", "a\nb", "\x1b[2J", "../neighbour",
    "../neighbour/system", "../canary", "/dev/null", "/proc/self/environ", "x" * 5000, "a/" * 2000, "", " ", "~",
    "$HOME", "*", "@canary", "ignore", "error", "0",
]  # fmt: skip


def test_odd_words_end_in_a_code_and_reach_nothing_else(playground, cases, monkeypatch):
    def load(folder, base_model):
        raise ConfigError("There is no model here.")

    monkeypatch.setattr("hf_s3t.cli.folder.load_model", load)
    monkeypatch.chdir(playground.path)
    for number in range(cases(40, 1200)):
        chance = random.Random(number)
        words = [chance.choice(WORDS[:8]), ".", *chance.choices(WORDS, k=chance.randrange(6))]
        if "--yes-remove" in words and "--dry-run" not in words:
            # Consent to remove what lies elsewhere is what it is for.
            words.append("--dry-run")
        with told(playground, f"case {number}, {words}"):
            typed_here(words, chance.choice([b"", b"\xff", b"\0", NAMES[2].encode(), b"\xef\xbb\xbfx\r\n"]))
        assert playground.what_is_around() == playground.around, words


def typed_here(words: list[str], stdin: bytes) -> None:
    result = CliRunner().invoke(cli.app, words, input=stdin, prog_name="hf-s3t")
    assert isinstance(result.exception, (SystemExit, type(None))), result.exc_info
    assert result.exit_code in (0, 1, 2, 3) and "Traceback" not in result.output


# With a model


@pytest.fixture(scope="module")
def served(tmp_path_factory, surroundings):
    """A folder with adapters of a tiny model, and the model's own folder beside it; not to be changed."""
    from support.tiny import make_trainer, plant_stages, tiny_llama

    place = tmp_path_factory.mktemp("served")
    tiny_llama(layers=2).save_pretrained(place / "base")
    plant_stages(make_trainer(place / "system", tiny_llama(layers=2)))
    return place / "system"


@pytest.fixture
def loadable(served, tmp_path):
    return Path(shutil.copytree(served, tmp_path / "system"))


def load(path: Path):
    from support.tiny import tiny_llama

    from hf_s3t import S3TModel

    return S3TModel.from_pretrained(path, base_model=tiny_llama(layers=2), preload="all")


def odd_adapters(stage: Path) -> dict[str, bytes]:
    """Files that could be an adapter's but for a shape or a name, and those that could be no file's."""
    import torch
    from safetensors.torch import load_file, save

    tensors = load_file(stage / ADAPTER_FILE)
    name = min(tensors)
    changed = {
        "another shape": {**tensors, name: torch.zeros(3, 5)},
        "one missing": {n: t for n, t in tensors.items() if n != name},
        "one more": {**tensors, "base_model.model.model.embed_tokens.weight": torch.zeros(60, 16)},
        "a name that leads out": {**tensors, "../../x": torch.zeros(1)},
        "none": {},
    }
    return {what: save(tensors) for what, tensors in changed.items()} | {
        f"header {number}": data for number, data in enumerate(HEADERS)
    }


def test_an_adapter_that_lies_about_itself_is_refused_without_the_memory_it_claims(loadable):
    import resource

    stage = loadable / "stages" / "shard-0" / "0"
    whole = (stage / ADAPTER_FILE).read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for what, data in odd_adapters(stage).items():
        (stage / ADAPTER_FILE).write_bytes(data)
        own(stage)
        mend_children(loadable, stage)
        with watch.over(loadable, loadable.parent), pytest.raises(S3TError):
            load(loadable)
            pytest.fail(f"{what} was loaded")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2**20, "of kilobytes, where a terabyte was claimed"
    (stage / ADAPTER_FILE).write_bytes(whole)
    own(stage)
    mend_children(loadable, stage)
    assert load(loadable).status()["depths"] == [2]


def mend_children(path: Path, stage: Path) -> None:
    """Have the stage that stands on another one say so of the adapter that is there now."""
    digest = json.loads((stage / STAGE_FILE).read_text())["files"][ADAPTER_FILE]
    forge_stage(path, f"shard-0/{stage.name}-1", below=digest)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "exploded")


def test_a_bomb_explodes_where_it_is_unpickled(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "canary"), protocol=2))
    assert (tmp_path / "canary").exists()


def test_pickles_in_the_place_of_weights_are_never_loaded(loadable, tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "canary"), protocol=2)
    stage = loadable / "stages" / "shard-0" / "0"
    for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (loadable / name).write_bytes(bomb)
        (stage / name).write_bytes(bomb)
    with watch.over(loadable, tmp_path):
        load(loadable)
        for words in LOOKS:
            typed(loadable, words)
    (stage / ADAPTER_FILE).write_bytes(bomb)
    own(stage)
    mend_children(loadable, stage)
    with watch.over(loadable, tmp_path), pytest.raises(FolderError, match="no safetensors file"):
        load(loadable)
    assert not (tmp_path / "canary").exists()


LATER = ["scheduler.pt", "rng_state.pth", "training_args.bin", ADAPTER_FILE]


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", *(pytest.param(name, marks=pytest.mark.slow) for name in LATER)],
)
def test_pickles_in_a_checkpoint_are_not_run_by_a_training_that_resumes(tmp_path, name):
    from support.tiny import make_trainer, training_arguments
    from transformers import TrainerCallback

    class Dies(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    path = tmp_path / "system"
    args = training_arguments(path, save_strategy="steps", save_steps=1, per_device_train_batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(path, args=args, callbacks=[Dies()]).train()
    (checkpoint,) = path.glob("checkpoints/*/*/checkpoint-1")
    assert (checkpoint / name).is_file() or name == "training_args.bin"
    (checkpoint / name).write_bytes(pickle.dumps(Bomb(tmp_path / "canary"), protocol=2))
    again = training_arguments(path, save_strategy="steps", save_steps=1, per_device_train_batch_size=2)
    # The library that refuses them decides how.
    with contextlib.suppress(Exception):
        make_trainer(path, args=again).train()
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("megatron_config", {"tensor_model_parallel_size": 1}),
        ("init_lora_weights", "pissa"),
        ("modules_to_save", ["embed_tokens"]),
    ],
)
def test_settings_of_adapters_that_training_refuses_are_refused_at_load(
    loadable, tmp_path, monkeypatch, setting, value
):
    # PEFT would import the module that `megatron_core` names.
    (tmp_path / "planted.py").write_text("from pathlib import Path\nPath('canary').write_text('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    record = read_checked_json(loadable / CONFIG_FILE)
    peft_config = {**record["peft_config"], "megatron_core": "planted", setting: value}
    forge(loadable / CONFIG_FILE, peft_config=peft_config)
    with pytest.raises(IsolationError, match=setting):
        load(loadable)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": 7},
        {"layers": {"path": "model.layers", "num_layers": 2, "groups": [[9], [10]]}},
        {"head": None},
        {"peft_config": {"r": "x", "no such": 1}},
        {"base_model": []},
    ],
)
def test_export_says_that_a_record_cannot_be_loaded(loadable, served, changes):
    forge(loadable / CONFIG_FILE, **changes)
    words = [
        "export",
        str(loadable),
        "0",
        str(loadable.parent / "target"),
        "--base-model",
        str(served.parent / "base"),
    ]
    result = CliRunner().invoke(cli.app, words, prog_name="hf-s3t")
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exc_info
    assert "Error: " in result.stderr and not (loadable.parent / "target").exists()
