"""A push, a deletion and an erasure with the Xet store on; a program of its own: the client reads that once."""

import os
import sys
from pathlib import Path

from support.local_hub import FakeHub


def main(home: Path) -> None:
    hub = FakeHub(home / "server", xet=True).__enter__()
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_OFFLINE"))]:
        del os.environ[name]
    os.environ.update(
        HF_ENDPOINT=hub.url, HF_HOME=str(home / "home"), HF_TOKEN="hf_owner", HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_UPDATE_CHECK="1", NO_PROXY="127.0.0.1",
    )  # fmt: skip
    import torch
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    from hf_s3t import S3TModel
    from hf_s3t.hub.repository import HubRepo
    from support.tiny import lm_rows, make_trainer, plant_stages, s3t_config, tiny_llama

    rows = lm_rows(12)
    trainer = make_trainer(home / "system", rows=rows, config=s3t_config(num_slices=2, partition="balanced"))
    plant_stages(trainer)
    trainer.s3t_model.push_to_hub("alice/xet")
    assert hub.calls("GET", "xet-write-token") and not hub.calls("POST", "objects/batch"), "Xet was not used"
    assert len(hub.calls("POST", "/commit/")) == 1
    os.environ["HF_S3T_KEY"] = (home / "system" / "ledger.key").read_text()
    repo = HubRepo("alice/xet")
    old = repo.state().commit
    model = S3TModel.from_pretrained("alice/xet", base_model=tiny_llama())
    report = model.unlearn([rows[0]["id"]])
    done = model.push_to_hub("alice/xet", erase_history=True)
    assert done.blobs == len(report.stages_removed) + 1, done
    for stage in report.stages_removed:
        try:
            path = f"stages/{stage}/adapter_model.safetensors"
            hf_hub_download("alice/xet", path, revision=old, cache_dir=home / "empty")
        except (EntryNotFoundError, RevisionNotFoundError):
            continue
        raise SystemExit(f"{stage} is still served")
    again = S3TModel.from_pretrained("alice/xet", base_model=tiny_llama(), cache_dir=home / "other")
    inputs = {"input_ids": torch.tensor([rows[1]["input_ids"]])}
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    print("done")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
