"""
Instruction-tune a causal language model as sliced LoRA stacks, serve the ensemble, forget, and prove it.

    accelerate launch recipes/llama_alpaca.py                                # the demo: a small Llama
    accelerate launch recipes/llama_alpaca.py --config recipes/configs/llama2_7b.yaml  # as in the paper
    accelerate launch recipes/llama_alpaca.py --model_name_or_path M --dataset_name D  # anything else
    ... --method full | sisa | sequential                                    # what S3T is compared with

The demo pretrains a small Llama on public text, teaches it the private facts of invented people, unlearns one of them,
and shows that the facts are gone, that everything else stayed, and that what stayed never depended on them.
"""

import warnings
from pathlib import Path
from typing import Any

import command_line
import datasets
import lm_evaluation
import transformers
from base_models import check_model_is_there
from command_line import console
from datasets import Dataset
from instruction_rows import load_data
from instruction_tuning import (
    NAMES,
    RECIPE,
    ask_harness,
    forgotten_rows,
    held_out_loss,
    loss_table,
    named_rows,
    record_deletion,
    say,
    train_all,
    unlearn,
    write_results,
)
from invented_people import PROMPT_TEMPLATES
from options import Options, ScriptArguments, parse
from people_demo import DEMO, run_demo
from results import Results
from rows import row_ids

from hf_s3t.errors import ConfigError
from hf_s3t.launch import start_cpu_processes


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """
    Run the recipe.

    Returns:
        `dict[str, Any]`: The numbers that were printed.
    """
    # What TRL sets by default, Transformers calls deprecated; and only the stages deserve a progress bar.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers.(training_args|modeling_utils)")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    options = parse(argv, demo_defaults=DEMO)
    check_method(options)
    check_template(options.script)
    check_evaluation(options.script)
    if options.is_demo:
        return run_demo(options)
    script, name = options.script, NAMES[options.script.method]
    file = Results(options, RECIPE)
    goes_on = script.unlearn or script.verify or script.eval
    if (found := file.earlier()) is not None and not goes_on:
        console.print(f"{file.path} holds the results of this run already. --overwrite_results runs it again.")
        return found
    train, held_out = load_data(options)
    check_model_is_there(script.model_name_or_path)
    row_ids(script.unlearn or (), train, options.s3t, Path(options.training.output_dir))  # refuses unknown ones
    losses, trainer = train_all(options, script.model_name_or_path, train, held_out, file)
    say(trainer, loss_table(losses))
    results = {"losses": losses}
    ask_harness(options, trainer, name, results)
    if script.unlearn:
        forget(options, trainer, train, file, results)
    if script.verify and not trainer.s3t_model.is_exhausted:
        report = trainer.verify("sample" if script.verify == "sample" else None)
        say(trainer, str(report))
        results["verified"] = report.ok
    file.add(**{key: results[key] for key in ("lm_eval", "verified") if key in results})
    write_results(file, options)
    return results


def forget(options: Options, trainer: Any, train: Dataset, file: Results, results: dict[str, Any]) -> None:
    """Unlearn what the command line names, and measure again."""
    script, name = options.script, NAMES[options.script.method]
    forgotten = forgotten_rows(trainer, train, script.unlearn) if script.measure_forgetting else None
    before = None if forgotten is None else held_out_loss(trainer, forgotten)
    results["unlearned"] = unlearn(trainer, *named_rows(trainer, script.unlearn))
    if trainer.s3t_model.is_exhausted:
        say(trainer, "exhausted: every first slice was hit. Train again to grow stages on the remaining data.")
        record_deletion(file, trainer, results)
        return
    results["losses"][f"{name} after unlearning"] = held_out_loss(trainer)
    say(trainer, loss_table(results["losses"]))
    ask_harness(options, trainer, f"{name} after unlearning", results)
    record_deletion(file, trainer, results)
    if forgotten is not None:
        results["forgotten"] = {"before": before, "after": held_out_loss(trainer, forgotten)}
        file.add(forgotten=results["forgotten"])
        say(
            trainer,
            "loss on what was forgotten: {before:.3f} before, {after:.3f} after".format(**results["forgotten"]),
        )


def check_method(options: Options) -> None:
    """Refuse a method that does not fit, before anything is trained."""
    method = options.script.method
    if method not in NAMES:
        raise ConfigError(f"`--method {method}` is for classification. Choose one of {', '.join(NAMES)}.")
    if options.is_demo and method != "s3t":
        raise ConfigError(
            f"The demo shows S3T, got `--method {method}`. Give `--model_name_or_path` and `--dataset_name`."
        )


def check_template(script: ScriptArguments) -> None:
    """Refuse an unknown template, before anything is read."""
    if script.prompt_template not in PROMPT_TEMPLATES:
        raise ConfigError(
            f"`--prompt_template {script.prompt_template}` is unknown. Choose one of {', '.join(PROMPT_TEMPLATES)}."
        )


def check_evaluation(script: ScriptArguments) -> None:
    """Refuse an evaluation that cannot be made, before anything is trained."""
    if script.eval not in (None, "lm_eval"):
        raise ConfigError(f"`--eval {script.eval}` is unknown, expected `lm_eval`, lm-evaluation-harness.")
    if script.eval:
        lm_evaluation.check_tasks(script.eval_tasks, script.eval_task_folder)


if __name__ == "__main__":
    start_cpu_processes()
    command_line.run(main)
