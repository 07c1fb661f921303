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
from typing import Any

import datasets
import transformers
from common import command_line, lm_evaluation
from common.base_models import check_model_is_there
from common.command_line import console
from common.forgetting import is_asked_for, must_train, named
from common.instruction_rows import load_data
from common.instruction_tuning import (
    EXHAUSTED,
    NAMES,
    RECIPE,
    ask_harness,
    audit,
    forgotten_rows,
    held_out_loss,
    loss_table,
    record_answers,
    record_deletion,
    say,
    train_all,
    unlearn,
    write_results,
)
from common.options import Options, ScriptArguments, parse
from common.results import Results
from datasets import Dataset
from demo.invented_people import PROMPT_TEMPLATES
from demo.people_demo import DEMO, run_demo

from hf_s3t.errors import ConfigError
from hf_s3t.launch import start_cpu_processes
from hf_s3t.operations.deletion import preview
from hf_s3t.records.request import DeletionRequest


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
    found, goes_on = file.earlier(), is_asked_for(script) or script.verify or script.eval
    if found is not None and not goes_on and file.is_current(found):
        console.print(f"{file.path} holds the results of this run already. --overwrite_results runs it again.")
        return found
    train, held_out = load_data(options)
    check_model_is_there(script.model_name_or_path)
    ids, groups = named(script, train, options.s3t, options.training.output_dir)
    trains = must_train(found is not None, options.training.output_dir, ids, groups)
    losses, trainer = train_all(options, script.model_name_or_path, train, held_out, file, trains)
    say(trainer, loss_table(losses))
    results = {"losses": losses}
    ask_harness(options, trainer, name, results)
    if ids or groups:
        forget(options, trainer, train, file, results, ids, groups)
    if script.verify and not trainer.s3t_model.is_exhausted:
        which = "sample" if script.verify == "sample" else None
        report = audit(options, trainer, script.model_name_or_path, train, held_out, which)
        say(trainer, str(report))
        results["verified"] = report.ok
    record_answers(file, results)
    write_results(file, options)
    return results


def forget(
    options: Options,
    trainer: Any,
    train: Dataset,
    file: Results,
    results: dict[str, Any],
    ids: list,
    groups: list,
) -> None:
    """Unlearn what the command line names, and measure again."""
    script, name = options.script, NAMES[options.script.method]
    forgotten = forgotten_rows(trainer, train, ids, groups) if script.measure_forgetting else None
    if forgotten is not None and preview(trainer.folder, DeletionRequest(ids, groups)).present:
        # Kept before the deletion: nothing can measure it afterwards.
        file.keep(forgotten={"before": held_out_loss(trainer, forgotten)})
    results["unlearned"] = unlearn(trainer, file, ids, groups)
    if trainer.s3t_model.is_exhausted:
        say(trainer, EXHAUSTED)
        record_deletion(file, trainer, results)
        return
    results["losses"][f"{name} after unlearning"] = held_out_loss(trainer)
    say(trainer, loss_table(results["losses"]))
    ask_harness(options, trainer, f"{name} after unlearning", results)
    record_deletion(file, trainer, results)
    if forgotten is not None:
        results["forgotten"] = {**file.content.get("forgotten", {}), "after": held_out_loss(trainer, forgotten)}
        file.add(forgotten=results["forgotten"])
        shown = ", ".join(f"{loss:.3f} {when}" for when, loss in results["forgotten"].items())
        say(trainer, f"loss on what was forgotten: {shown}")


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
