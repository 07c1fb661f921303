"""
Tensors in memory of an ensemble, counted: one base whatever the number of shards, and the adapters that serve.

The alternative is one model per shard, each a base with its shard's adapters.
"""

import gc
from pathlib import Path

import torch
from harness import Report, options
from safetensors import safe_open
from systems import llama, make_system, temporary_folder
from transformers import AutoModelForCausalLM

from hf_s3t import S3TConfig, S3TModel
from hf_s3t.folder.layout import ADAPTER_FILE


NUM_SLICES = 4


def tensor_bytes() -> int:
    """Bytes of every storage that a tensor in this process holds."""
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    # Those on the meta device hold nothing, whatever their storage says.
    storages = (tensor.untyped_storage() for tensor in tensors if not tensor.is_meta)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def adapter_bytes(model: S3TModel) -> int:
    """Bytes of the tensors in the files of the stages that serve."""
    total = 0
    for key in model._routing.stages:
        with safe_open(model.folder.path / key.path / ADAPTER_FILE, framework="pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())
    return total


def main() -> None:
    chosen = options(__doc__)
    layers, hidden = (4, 64) if chosen.quick else (8, 512)
    settings = {"layers": layers, "hidden": hidden, "num_slices": NUM_SLICES, "budget": NUM_SLICES, "rank": 16}
    report = Report("memory", chosen, settings)
    with temporary_folder() as folder:
        path = Path(folder) / "base"
        llama(layers, hidden).save_pretrained(path)
        before = tensor_bytes()
        base = AutoModelForCausalLM.from_pretrained(path)
        base_bytes = tensor_bytes() - before
        del base
        report.add("base", base_bytes, "bytes")
        for shards in (1, 5):
            system = Path(folder) / f"system-{shards}"
            make_system(
                system,
                AutoModelForCausalLM.from_pretrained(path),
                S3TConfig(num_shards=shards, num_slices=NUM_SLICES, keep_idle=True),
                100,
            )
            before = tensor_bytes()
            model = S3TModel.from_pretrained(system, base_model=str(path))
            held, adapters = tensor_bytes() - before, adapter_bytes(model)
            # One weight per member goes into the mean.
            beyond = held - base_bytes - adapters - model._routing.weights.nbytes
            report.add(f"m = {shards}: adapters that serve", adapters, "bytes")
            report.add(
                f"m = {shards}: in memory beyond base and adapters",
                beyond,
                "bytes",
                exactly=0,
            )
            with torch.inference_mode():
                model(input_ids=torch.zeros(1, 8, dtype=torch.long))
            # Where the adapters of members are put together, at the first call, no copy is left.
            report.add(f"m = {shards}: after a call", tensor_bytes() - before - held, "bytes more", exactly=0)
            report.add(f"m = {shards}: against a base per shard", held / (shards * base_bytes + adapters), "of theirs")
            del model
    report.finish()


if __name__ == "__main__":
    main()
