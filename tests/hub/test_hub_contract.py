"""
The same calls against a real endpoint, for who has a token for throwaway repositories: set HF_S3T_CONTRACT_TOKEN.

HF_S3T_CONTRACT_ENDPOINT names another endpoint than https://huggingface.co. The repository is private and deleted at
the end. Run it by itself: `pytest tests/hub/test_hub_contract.py`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


TOKEN = "HF_S3T_CONTRACT_TOKEN"

pytestmark = pytest.mark.skipif(not os.environ.get(TOKEN), reason=f"asks a real Hub: set {TOKEN} to run it")

SCRIPT = """
import os, sys, uuid
from pathlib import Path
home = Path(sys.argv[1])
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, EntryNotFoundError
from support.tiny import lm_rows, make_trainer, plant_stages, s3t_config, tiny_llama
from hf_s3t import S3TModel
from hf_s3t.hub.pushing import HubRepo

api = HfApi()
repo_id = f"{api.whoami()['name']}/hf-s3t-contract-{uuid.uuid4().hex[:8]}"
rows = lm_rows(12)
trainer = make_trainer(home / "system", rows=rows, config=s3t_config(num_slices=2, partition="balanced"))
plant_stages(trainer)
try:
    trainer.s3t_model.push_to_hub(repo_id, private=True)
    os.environ["HF_S3T_KEY"] = (home / "system" / "ledger.key").read_text()
    old = HubRepo(repo_id).state().commit
    model = S3TModel.from_pretrained(repo_id, base_model=tiny_llama())
    report = model.unlearn([rows[0]["id"]])
    done = model.push_to_hub(repo_id, erase_history=True)
    assert done.blobs == len(report.stages_removed) + 1, done
    for stage in report.stages_removed:
        path = f"stages/{stage}/adapter_model.safetensors"
        try:
            hf_hub_download(repo_id, path, revision=old, cache_dir=home / "empty")
        except (EntryNotFoundError, HfHubHTTPError):
            continue
        raise SystemExit(f"{path} is still served at {old}")
    print("confirmed:", *done.confirmed, sep="\\n  ")
    print("not confirmable:", *done.unconfirmed, sep="\\n  ")
finally:
    api.delete_repo(repo_id, missing_ok=True)
"""


def test_a_real_hub_does_what_the_local_one_does(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_TOKEN": os.environ[TOKEN], "HF_HOME": str(tmp_path / "home")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    if os.environ.get("HF_S3T_CONTRACT_ENDPOINT"):
        environment["HF_ENDPOINT"] = os.environ["HF_S3T_CONTRACT_ENDPOINT"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
