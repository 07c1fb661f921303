"""What all tests share: an offline environment, the real data where it is there, and no way out of this machine."""

import os
import tempfile

from support.local_hub import FakeHub


# A Hub of our own, for the tests that ask for the fixture `hub`; all others are offline.
_HUB_HOME = tempfile.TemporaryDirectory(prefix="hf-s3t-hub-")
_HUB = FakeHub(os.path.join(_HUB_HOME.name, "server")).__enter__()

# What somebody set for systems of their own reaches no test: the secret, and where deletions of systems on the Hub are
# kept. A test that needs one sets it.
for name in ("HF_S3T_KEY", "HF_S3T_HOME", "HF_S3T_SIGNING_KEY", "HF_S3T_PUBLIC_KEY"):
    os.environ.pop(name, None)

# Before anything of Hugging Face is imported: the libraries read these once. Processes that tests start inherit them.
os.environ.update(
    HF_ENDPOINT=_HUB.url,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)

import gc
import ipaddress
import shutil
import socket
import sys
import time
import uuid
from pathlib import Path

import pytest
from hypothesis import settings


ROOT = Path(__file__).resolve().parent.parent

# Training makes many objects and little garbage in circles: it is looked for where there is much of it.
gc.set_threshold(20_000)

settings.register_profile("hf_s3t", deadline=None, derandomize=True)
settings.load_profile("hf_s3t")


def _is_local(host) -> bool:
    host = os.fsdecode(host) if isinstance(host, bytes) else host
    if host in (None, "", "localhost", "0.0.0.0", "::", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _stay_on_this_machine(event, args):
    """Audit hook: no name is resolved and nothing is sent beyond the loopback addresses and Unix sockets."""
    # Every file that is opened and every module that is looked for comes by here.
    if event[:1] != "s":
        return
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = args[1]
        host = address[0] if isinstance(address, tuple) else None
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = args[0]
    else:
        return
    if not _is_local(host):
        # Not an OSError: libraries catch those and go on without what they could not fetch.
        raise RuntimeError(f"A test tried to reach {host!r}. Tests run offline: use local data, or a loopback server.")


sys.addaudithook(_stay_on_this_machine)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU, and this machine has none")


@pytest.fixture(scope="session", autouse=True)
def nobody_waits_for_the_disk():
    """Nor for a machine that dies. What is synced, and when, is seen by who takes `os.fsync`'s place in a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Imports make objects that stay: nothing is gained by looking through them, again and again, for garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture(scope="module", autouse=True)
def old_objects_are_passed_over():
    """
    Trainer collects garbage at every stage; what imports and earlier modules left behind need not be looked through
    each time, nor counted, which takes as long: a trainer only asks whether something is frozen.
    """
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "get_freeze_count", lambda: 1)
        yield


@pytest.fixture(scope="module")
def one_thread():
    """The number of threads decides the order of float sums; and more of them are no faster on tiny models."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shared_key():
    """One secret for all systems: without, a seed places examples otherwise in each folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_S3T_KEY", "of all systems of these tests")
        yield
    # `Dataset.map` in several processes puts a copy in the place of `os.environ`, which the patch knows nothing of.
    os.environ.pop("HF_S3T_KEY", None)


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory):
    """For tests of folders without tensors: see `folders.own_surroundings`."""
    from support.folders import own_surroundings

    with own_surroundings(tmp_path_factory.mktemp("home")):
        yield


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty local Hub, logged in to, with caches and state of its own; see `local_hub.py` for its faults."""
    from huggingface_hub import _tree_cache, constants
    from huggingface_hub.utils import _http

    home = tmp_path / "home"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    _tree_cache._IN_MEMORY_TREE_CACHE.clear()
    user, token = f"u{uuid.uuid4().hex[:8]}", f"hf_{uuid.uuid4().hex}"
    _HUB.users[token] = (user, "write", {user})
    _HUB.user, _HUB.token = user, token
    monkeypatch.setenv("HF_TOKEN", token)
    # Nobody waits for a Hub that recovers at once.
    monkeypatch.setattr("hf_s3t.hub.pushing.time.sleep", lambda seconds: None)
    monkeypatch.setattr(_http, "time", type("Time", (), {"sleep": lambda seconds: None, "time": time.time}))
    _HUB.faults.clear()
    _HUB.requests.clear()
    _HUB.unrouted = []
    yield _HUB
    assert _HUB.unrouted == [], f"the client asked for what the local Hub does not know: {_HUB.unrouted}"
    for key in [key for key in _HUB.repos if key[1].startswith(f"{user}/")]:
        del _HUB.repos[key]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The folder of a system with a stage of random tensors for every planned one; not to be changed."""
    from support.hub_systems import plant

    return plant(tmp_path_factory.mktemp("hub") / "system")


@pytest.fixture
def system(planted, tmp_path):
    """A copy of it."""
    from hf_s3t.folder.system import SystemFolder

    return SystemFolder(shutil.copytree(planted, tmp_path / "system"))


@pytest.fixture
def repo(hub):
    """A repository that is not there yet."""
    from hf_s3t.hub.repository import HubRepo

    return HubRepo(f"{hub.user}/system")


@pytest.fixture
def pushed(system, repo, monkeypatch):
    """The system on the Hub, and its secret in the environment, as on another machine that knows it."""
    from support.hub_systems import send

    send(system, repo)
    monkeypatch.setenv("HF_S3T_KEY", (system.path / "ledger.key").read_text())
    return system


@pytest.fixture(scope="session")
def shared_data():
    """A function from a name to the path of that real data set or model; it skips the test where it is missing."""
    folder = Path(os.environ.get("HF_S3T_DATA") or ROOT.parent / "shared" / "data")

    def resolve(name: str) -> Path:
        path = folder / name
        if not path.exists():
            pytest.skip(f"needs the data {name!r}, looked for in HF_S3T_DATA or beside the repository")
        return path

    return resolve
