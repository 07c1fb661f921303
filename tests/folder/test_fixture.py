"""The demo's system as a recipe built it, kept in `tests/fixtures`: it loads, answers, and forgets a person."""

import re
import shlex
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from common.prompts import render_prompt
from demo import people_demo
from demo.invented_people import make_people
from support.format_1 import format_of
from transformers import AutoTokenizer

from hf_s3t import S3TModel
from hf_s3t.errors import BaseModelMismatchError, ConfigError, UnknownExampleError
from hf_s3t.folder.layout import COST_FILE, GATE_FILE
from hf_s3t.folder.secret import KEY_VARIABLE
from hf_s3t.hub.card import description
from hf_s3t.hub.pushing import push
from hf_s3t.hub.repository import HubRepo
from hf_s3t.operations.inspection import inspect


ROOT = Path(__file__).resolve().parents[2]
PEOPLE = ROOT / "tests" / "fixtures" / "people"
SECRET = "invented people have no secrets"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the fixture, with its secret at hand."""
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    return Path(shutil.copytree(PEOPLE, tmp_path / "people"))


def load(copy):
    return S3TModel.from_pretrained(copy / "system", base_model=str(copy / "base"))


def answer(model, copy):
    tokenizer = AutoTokenizer.from_pretrained(copy / "base")
    batch = tokenizer(render_prompt("Which stone?", template="alpaca-short"), return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=batch["input_ids"]).logits


def test_it_is_small_and_says_nothing_of_the_machine_that_built_it(copy):
    files = [path for path in copy.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 400_000
    assert not any(path.name == "ledger.key" for path in files)
    places = re.compile(rb"/home/|/root/|/tmp/|/Users/|[A-Z]:\\\\")
    assert not [path for path in files if places.search(path.read_bytes())]


def test_a_person_is_forgotten_on_a_copy_and_all_checks_out(copy):
    assert inspect(copy / "system").problems == ()
    # It was built when format 1 was written.
    assert format_of(copy / "system") == 1
    model = load(copy)
    before = answer(model, copy)
    person = make_people(4, 0, private=True)[0].name
    report = model.unlearn(groups=[person])
    assert report.deleted == 10 and report.stages_removed and sorted(report.depths_after) < [4, 4]
    assert model.check() == [] and not torch.equal(answer(model, copy), before) and format_of(copy / "system") == 2
    with pytest.raises(UnknownExampleError):
        model.locate([f"{person.lower().replace(' ', '-')}-pet"])
    # The demo shows it once.
    people_demo.check_is_known(make_people(4, 0, private=True)[1].name, copy / "system")
    with pytest.raises(ConfigError, match=rf"has forgotten {person} already. Remove the folder, or name another by"):
        people_demo.check_is_known(person, copy / "system")
    again = load(copy)
    assert again.check() == [] and torch.equal(answer(again, copy), answer(model, copy))
    # What is kept for everybody is as it was.
    assert inspect(PEOPLE / "system").problems == ()


def test_without_its_base_it_says_what_to_give(copy):
    with pytest.raises(BaseModelMismatchError, match="Give it as `base_model`"):
        S3TModel.from_pretrained(copy / "system")


def test_it_goes_to_the_hub_and_is_served_from_there(copy, hub):
    model = load(copy)
    repo = HubRepo(f"{hub.user}/people")
    push(model.folder, repo, partial(description, repo_id=repo.repo_id))
    served = S3TModel.from_pretrained(repo.repo_id, base_model=str(copy / "base"))
    assert torch.equal(answer(served, copy), answer(model, copy))


@pytest.mark.slow
@pytest.mark.long
def test_the_command_that_built_it_builds_such_a_system(copy, tmp_path):
    import publish

    readme = (ROOT / "tests" / "fixtures" / "README.md").read_text()
    command = shlex.split(re.search(r"```bash\n(.*?)```", readme, re.DOTALL)[1].replace("\\\n", " "))
    at = command.index("tests/fixtures/people")
    assert command[at - 1] == "recipes/publish.py" and command[0] == f"{KEY_VARIABLE}={SECRET}"
    places = ["--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "out"), "--disable_tqdm", "True"]
    written = publish.main([str(tmp_path / "made"), *command[at + 1 :], *places])
    # What the training took is of no use to those who only load the fixture, which is older than gates and chats.
    later = {Path("system", name) for name in (COST_FILE, GATE_FILE, "chat_template.jinja")}
    assert {path.relative_to(tmp_path / "made") for path in written} - later == {
        path.relative_to(PEOPLE) for path in PEOPLE.rglob("*") if path.is_file()
    }
    made, kept = load(tmp_path / "made"), load(copy)
    assert made.folder.plan == kept.folder.plan and set(made.folder.table.rows) == set(kept.folder.table.rows)
    assert made.check() == []
