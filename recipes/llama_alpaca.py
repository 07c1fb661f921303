"""
Instruction-tune a causal language model as sliced LoRA stacks, serve the ensemble, forget, and prove it.

    accelerate launch recipes/llama_alpaca.py                                # the demo: a small Llama
    accelerate launch recipes/llama_alpaca.py --config recipes/configs/llama2_7b.yaml  # as in the paper
    accelerate launch recipes/llama_alpaca.py --model_name_or_path M --dataset_name D  # anything else
    ... --method full | sisa | sequential                                    # what S3T is compared with

The demo pretrains a small Llama on public text, teaches it the private facts of invented people, unlearns one of them,
and shows that the facts are gone, that everything else stayed, and that what stayed never depended on them.
"""

from typing import Any

from common import command_line
from common.instruction_task import check, quiet, read, run
from demo.people_demo import DEMO, run_demo

from hf_s3t.launch import start_cpu_processes


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """
    Run the recipe.

    Returns:
        `dict[str, Any]`: The numbers that were printed.
    """
    quiet()
    options = read(argv, demo_defaults=DEMO)
    if not options.is_demo:
        return run(options)
    check(options)
    return run_demo(options)


if __name__ == "__main__":
    start_cpu_processes()
    command_line.run(main)
