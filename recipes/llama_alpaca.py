"""
Instruction-tune a causal language model as sliced LoRA stacks, serve the ensemble, forget, and prove it.

    accelerate launch recipes/llama_alpaca.py                                # the demo: a small Llama
    accelerate launch recipes/llama_alpaca.py --config recipes/configs/llama2_7b.yaml  # as in the paper
    accelerate launch recipes/llama_alpaca.py --model_name_or_path M --dataset_name D  # anything else
    ... --method full | sisa | sequential                                    # what S3T is compared with

The demo pretrains a small Llama on public text, teaches it the private facts of invented people, unlearns one of them,
and shows that the facts are gone, that everything else stayed, and that what stayed never depended on them.
"""

import copy
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import command_line
import datasets
import lm_evaluation
import torch
import transformers
from accelerate.utils import release_memory
from base_models import check_model_is_there
from datasets import Dataset
from invented_people import (
    PROMPT_TEMPLATES,
    BaseSettings,
    base_model,
    fact_rows,
    held_out_rows,
    make_people,
    private_dataset,
    render_prompt,
    strangers,
)
from options import Options, ScriptArguments, parse
from results import Results, cost_of, write_run_card
from rich.console import Console
from rich.table import Table
from rows import Source, row_ids
from scipy.stats import fisher_exact
from transformers import AutoTokenizer, BitsAndBytesConfig
from trl import SFTTrainer

from hf_s3t.base_model import log_casts_once
from hf_s3t.baselines import METHODS, Method
from hf_s3t.deletion import groups_from_texts, ids_from_texts
from hf_s3t.errors import ConfigError
from hf_s3t.launch import start_cpu_processes
from hf_s3t.plan import StageKey
from hf_s3t.storage import SystemFolder


# Large rates and many short epochs: a small model memorises facts, which is what the demo needs it to forget.
DEMO = {
    "num_shards": 2,
    "num_slices": 4,
    "budget": 2,
    "id_column": "id",
    "group_column": "person",
    "lora_r": 32,
    "lora_alpha": 128,
    "target_modules": "all-linear",
    # A shard that never saw a person guesses. Its two sequences guess differently, those of the other agree.
    "select": "all",
    "learning_rate": 3e-3,
    "adam_beta2": 0.95,
    "num_train_epochs": 22,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 64,
    "max_length": 96,
    "gradient_checkpointing": False,
    "logging_strategy": "no",
    "save_strategy": "no",
    "prompt_template": "alpaca-short",
    "eval_size": 48,
}
RECIPE = "llama_alpaca"
HELD_OUT = "held_out"
BASE, FULL_LORA = "base", "full LoRA"
# How a method is called in the tables.
NAMES = {"s3t": "S3T", "full": "full LoRA by shard", "sisa": "SISA", "sequential": "sequential"}
QUESTION_COLUMNS = ("instruction", "input", "output")
console = Console(highlight=False)


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
        forgotten = forgotten_rows(trainer, train, script.unlearn) if script.measure_forgetting else None
        before = None if forgotten is None else held_out_loss(trainer, forgotten)
        results["unlearned"] = unlearn(trainer, *named_rows(trainer, script.unlearn))
        if trainer.s3t_model.is_exhausted:
            say(trainer, "exhausted: every first slice was hit. Train again to grow stages on the remaining data.")
            record_deletion(file, trainer, results)
            write_results(file, options)
            return results
        losses[f"{name} after unlearning"] = held_out_loss(trainer)
        say(trainer, loss_table(losses))
        ask_harness(options, trainer, f"{name} after unlearning", results)
        record_deletion(file, trainer, results)
        if forgotten is not None:
            results["forgotten"] = {"before": before, "after": held_out_loss(trainer, forgotten)}
            file.add(forgotten=results["forgotten"])
            say(
                trainer,
                "loss on what was forgotten: {before:.3f} before, {after:.3f} after".format(**results["forgotten"]),
            )
    if script.verify:
        report = trainer.verify("sample" if script.verify == "sample" else None)
        say(trainer, str(report))
        results["verified"] = report.ok
    file.add(**{key: results[key] for key in ("lm_eval", "verified") if key in results})
    write_results(file, options)
    return results


# Data


def load_data(options: Options) -> tuple[Dataset, Dataset]:
    """The training rows and the rows held out, as prompt and completion (or text), with their ids and groups."""
    script, s3t = options.script, options.s3t
    name = script.dataset_name
    dataset = Source(name).read(script.dataset_split)
    if s3t.id_column is None:
        # Row numbers of the whole source stay what they are when rows leave the selection.
        s3t.id_column = "id"
        if "id" not in dataset.column_names:
            dataset = dataset.add_column("id", list(range(len(dataset))))
            console.print(f"No --id_column: ids are the row numbers of {name}.")
    for option in ("id_column", "group_column", "shard_column", "slice_column"):
        column = getattr(s3t, option)
        if column and column not in dataset.column_names:
            raise ConfigError(
                f"`--{option} {column}` is no column of {name}, which has {', '.join(dataset.column_names)}."
            )
    train_size = min(script.max_train_samples or len(dataset), len(dataset) - script.eval_size)
    if train_size < 1:
        raise ConfigError(
            f"{name} has {len(dataset)} rows, and --eval_size {script.eval_size} leaves none to train on."
        )
    dataset = dataset.select(range(train_size + script.eval_size))
    if script.columns:
        dataset = with_question_columns(dataset, script.columns, name)
    check_example_columns(dataset, options.training.dataset_text_field, name)
    dataset = as_examples(dataset, script.prompt_template, script.loss_on_everything)
    return dataset.select(range(train_size)), dataset.select(range(train_size, len(dataset)))


def with_question_columns(dataset: Dataset, columns: list[str], name: str) -> Dataset:
    """The dataset with its columns of instruction and output under the names of Alpaca's."""
    missing = [column for column in columns if column not in dataset.column_names]
    if len(columns) != 2 or missing:
        raise ConfigError(
            f"`--columns {' '.join(columns)}` must name the columns of instruction and output; {name} has "
            f"{', '.join(dataset.column_names)}."
        )
    return dataset.rename_columns(dict(zip(columns, ("instruction", "output"), strict=True)))


def check_example_columns(dataset: Dataset, text_field: str, name: str) -> None:
    """Refuse rows that are neither Alpaca's nor what TRL trains on, and rows without a question or an answer."""
    columns = set(dataset.column_names)
    layouts = (("instruction", "output"), ("prompt", "completion"), (text_field,), ("messages",), ("input_ids",))
    found = [layout for layout in layouts if columns >= set(layout)]
    # Rows with an instruction are Alpaca's, whatever else they hold.
    if not found or ("instruction" in columns and "output" not in columns):
        raise ConfigError(
            f"{name} has the columns {', '.join(dataset.column_names)}. Expected instruction and output, prompt and "
            f"completion, {text_field}, or messages. Name those of question and answer by `--columns`."
        )
    for column in found[0]:
        nulls = sum(value is None for value in dataset[column])
        if nulls:
            raise ConfigError(
                f"{nulls} of {len(dataset)} rows of {name} have no {column}. Drop these rows, or fill them in."
            )


def as_examples(dataset: Dataset, template: str, loss_on_everything: bool) -> Dataset:
    """Alpaca rows as prompt and completion, or as one text to take the loss on all of it; others stay as they are."""
    if "instruction" not in dataset.column_names:
        return dataset

    def render(row: dict[str, Any]) -> dict[str, str]:
        prompt = render_prompt(row["instruction"], row.get("input") or "", template)
        if loss_on_everything:
            return {"text": prompt + row["output"]}
        return {"prompt": prompt, "completion": row["output"]}

    gone = [column for column in (*QUESTION_COLUMNS, "text") if column in dataset.column_names]
    return dataset.map(render, remove_columns=gone)


# Training


def train_all(
    options: Options, model: str, train: Dataset, held_out: Dataset, results: Results
) -> tuple[dict[str, float], Any]:
    """Measure the base, train the full LoRA baseline and then the system; returns losses and the trainer."""
    losses, name = compared_losses(options, model, train, held_out, results), NAMES[options.script.method]
    method = make_method(options, model, train, held_out)
    trainer = method.trainer
    started = time.perf_counter()
    with results.timed("train"):
        method.train()
    say(trainer, f"{name}: {len(trainer.folder.valid_stages)} stages in {time.perf_counter() - started:.0f} s")
    losses[name] = held_out_loss(trainer)
    with results.timed("evaluate"):
        results.add(metrics={HELD_OUT: losses_by_depth(trainer, method.depths)}, depths=list(method.depths))
    results.add(
        losses=losses,
        cost=cost_of(method),
        storage_bytes=method.storage_bytes(),
        data={"train_rows": len(train), "evaluation_rows": {HELD_OUT: len(held_out)}},
    )
    write_results(results, options)
    return losses, trainer


def make_method(options: Options, model: str, train: Dataset, held_out: Dataset) -> Method:
    """The method asked for, which refuses here what it cannot train."""
    args = copy.deepcopy(options.training)
    if (quantized := quantization(options)) is not None:
        args.model_init_kwargs = {**(args.model_init_kwargs or {}), "quantization_config": quantized}
    return METHODS[options.script.method](
        model,
        args,
        train_dataset=train,
        eval_dataset=held_out,
        peft_config=options.lora,
        s3t_config=options.s3t,
        trainer_class=SFTTrainer,
    )


def losses_by_depth(trainer: Any, depths: list[int]) -> dict[str, dict[str, float]]:
    """The loss on the rows held out, with at most so many slices learnt by each shard."""
    found = {}
    for depth in range(1, max(depths) + 1):
        with trainer.s3t_model.limited_to(depth):
            found[str(depth)] = {"loss": round(held_out_loss(trainer), 6)}
    return found


def compared_losses(
    options: Options, model: str, train: Dataset, held_out: Dataset, results: Results
) -> dict[str, float]:
    """Held-out losses of the base and, where S3T is compared with it, of full LoRA: measured once for a system."""
    folder = options.training.output_dir
    forgot = SystemFolder.exists(folder) and SystemFolder(folder).ledger.num_deletions > 0
    # Nothing is trained on rows that somebody wants forgotten.
    with_full = options.script.method == "s3t" and not options.script.skip_full_lora and not forgot
    wanted = [BASE, FULL_LORA] if with_full else [BASE]
    kept = results.kept("losses") or {}
    if not kept.keys() >= set(wanted):
        # What the method cannot train is said before the baseline's hours. One base at a time is in memory.
        make_method(options, model, train, held_out)
        release_memory()
        with results.timed("baseline"):
            kept = baseline_losses(options, model, train, held_out, with_full)
        release_memory()
        results.keep(losses=kept)
    return {name: kept[name] for name in wanted}


def baseline_losses(
    options: Options, model: str, train: Dataset, held_out: Dataset, with_full: bool
) -> dict[str, float]:
    """Held-out loss of the base and, if wanted, of the same LoRA config trained on everything at once."""
    args = copy.deepcopy(options.training)
    args.output_dir = f"{args.output_dir}-full-lora"
    args.save_strategy = "no"
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        quantization_config=quantization(options),
        peft_config=copy.deepcopy(options.lora),
    )
    log_casts_once(trainer.model)
    # A fresh LoRA adapter changes nothing, so this is the base.
    losses = {BASE: held_out_loss(trainer)}
    if with_full:
        started = time.perf_counter()
        trainer.train()
        losses[FULL_LORA] = held_out_loss(trainer)
        say(trainer, f"full LoRA: trained in {time.perf_counter() - started:.0f} s")
    if trainer.is_world_process_zero() and os.path.isdir(args.output_dir) and not os.listdir(args.output_dir):
        os.rmdir(args.output_dir)
    return losses


def quantization(options: Options) -> BitsAndBytesConfig | None:
    """The quantisation of the base, if any was asked for."""
    script = options.script
    if script.load_in_8bit and script.load_in_4bit:
        raise ConfigError("`--load_in_8bit` and `--load_in_4bit` were both given. Choose one.")
    if script.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=script.llm_int8_threshold)
    if script.load_in_4bit:
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return None


def held_out_loss(trainer: Any, rows: Dataset | None = None) -> float:
    """The loss on the rows held out, or on others."""
    with quiet(trainer):
        return trainer.evaluate(rows)["eval_loss"]


class quiet:
    """Holds back a trainer's own reports, where the recipe prints a table."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def __enter__(self):
        handler = self.trainer.callback_handler
        self.callbacks, handler.callbacks = handler.callbacks, []

    def __exit__(self, *exc):
        self.trainer.callback_handler.callbacks = self.callbacks


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


def ask_harness(options: Options, trainer: Any, name: str, results: dict[str, Any]) -> None:
    """Put the harness' questions to the ensemble, if that was asked for, and print the answers' scores."""
    script = options.script
    if not script.eval or not trainer.is_world_process_zero():
        return
    found = lm_evaluation.evaluate(
        trainer.s3t_model,
        trainer.processing_class,
        script.eval_tasks,
        task_folder=script.eval_task_folder,
        batch_size=options.training.per_device_eval_batch_size,
        limit=script.eval_limit,
    )
    results.setdefault("lm_eval", {})[name] = found
    table = Table(
        "task", "metric", "value", "standard error", title=f"lm-evaluation-harness: {name}", title_justify="left"
    )
    for task, numbers in found.items():
        for metric, value in numbers.items():
            if not metric.endswith("_stderr"):
                error = numbers.get(f"{metric}_stderr")
                table.add_row(task, metric, f"{value:.3f}", "" if error is None else f"{error:.3f}")
    console.print(table)


# Forgetting


def named_rows(trainer: Any, names: list[str]) -> tuple[list, list]:
    """The ids and the groups that a command line names, in the types that the system's have."""
    folder = trainer.folder
    groups = {str(group) for group in folder.table.groups}
    return (
        ids_from_texts(folder, [name for name in names if name not in groups]),
        groups_from_texts(folder, [name for name in names if name in groups]),
    )


def forgotten_rows(trainer: Any, train: Dataset, names: list[str]) -> Dataset:
    """The training rows that the names mean, as the trainer evaluates them."""
    ids, groups = named_rows(trainer, names)
    config = trainer.folder.config
    columns = zip(train[config.id_column], train[config.group_column or config.id_column], strict=True)
    rows = train.select([n for n, (i, group) in enumerate(columns) if i in ids or group in groups])
    return trainer._prepare_dataset(rows, trainer.processing_class, trainer.args, False, None, "forgotten")


def unlearn(trainer: Any, ids: list | None = None, groups: list | None = None) -> Any:
    """Unlearn in the main process, and say what went."""
    report = None
    if trainer.is_world_process_zero():
        report = trainer.s3t_model.unlearn(ids, groups=groups)
        console.print(
            f"unlearned {report.deleted} examples in {report.seconds * 1000:.1f} ms: {len(report.stages_removed)} "
            f"stages went, depths {report.depths_before} -> {report.depths_after}"
        )
    trainer.accelerator.wait_for_everyone()
    trainer.s3t_model.refresh()
    return report


def record_deletion(file: Results, trainer: Any, results: dict[str, Any]) -> None:
    """Note a deletion in the results; what was measured with the deleted rows is not kept."""
    report, depths = results["unlearned"], trainer.s3t_model.status()["depths"]
    file.add(
        metrics={HELD_OUT: losses_by_depth(trainer, depths)} if any(depths) else {},
        depths=depths,
        losses={name: loss for name, loss in results["losses"].items() if name == BASE or "after" in name},
    )
    if report is not None:
        file.add(
            unlearned={
                "examples": report.deleted,
                "seconds": round(report.seconds, 6),
                "depths_before": report.depths_before,
                "depths_after": report.depths_after,
            }
        )


# The demo


def demo_base(script: ScriptArguments) -> BaseSettings:
    """The small base model of the demo, of the size that the options say."""
    hidden = script.base_hidden_size
    given = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden if hidden else None,
        "vocab_size": script.base_vocab_size,
        "steps": script.base_steps,
    }
    return BaseSettings(**{name: value for name, value in given.items() if value is not None})


def train_demo(
    options: Options, results: Results | None = None
) -> tuple[dict[str, float], Any, str, list[dict[str, str]]]:
    """Train the demo's system, which knows everybody; returns losses, the trainer, the base's folder and the rows."""
    script = options.script
    path, seconds = base_model(demo_base(script), script.cache_dir, log=console.print)
    console.print(f"base model: {path}" + (f", pretrained in {seconds:.0f} s" if seconds else ", from the cache"))
    rows = private_dataset(script.num_people, script.num_general)
    train = as_examples(Dataset.from_list(rows), script.prompt_template, script.loss_on_everything)
    held_out = as_examples(
        Dataset.from_list(held_out_rows(script.num_general, script.eval_size)), script.prompt_template, False
    )
    facts = (len(rows) - script.num_general) // script.num_people
    console.print(
        f"{len(rows)} examples: {script.num_people} invented people with {facts} facts each, {script.num_general} "
        "general instructions"
    )
    losses, trainer = train_all(options, path, train, held_out, results or Results(options, RECIPE))
    return losses, trainer, path, rows


def run_demo(options: Options) -> dict[str, Any]:
    """The whole loop on a small Llama made here, about invented people."""
    script = options.script
    file = Results(options, RECIPE)
    losses, trainer, path, rows = train_demo(options, file)
    person = make_people(script.num_people, 0, private=True)[0]
    controls = [row for stranger in strangers(script.num_people, 20) for row in fact_rows(stranger)]
    ask = Interviewer(path, script.prompt_template)
    model = trainer.s3t_model
    known = {BASE: ask.share(plain_base(path), fact_rows(person)), "S3T": ask.share(model, fact_rows(person))}
    everybody = [row for one in make_people(script.num_people, 0, private=True) for row in fact_rows(one)]
    console.print(
        f"of the facts of all {script.num_people} people the ensemble completes {ask.share(model, everybody):.0%}"
    )
    where = model.locate([row["id"] for row in rows if row["person"] == person.name])
    shard, slice_ = next(iter(where.values()))
    console.print(f"\nforgetting {person.name}, in slice {slice_} of shard {shard}")
    asked: dict[str, Any] = {}
    ask_harness(options, trainer, "S3T", asked)
    report = unlearn(trainer, groups=[person.name])
    ask_harness(options, trainer, "S3T after unlearning", asked)
    known["S3T after unlearning"] = ask.share(model, fact_rows(person))
    losses["S3T after unlearning"] = held_out_loss(trainer)
    known["control: 20 people never seen"] = ask.share(model, controls)
    say(trainer, demo_table(losses, known, person.name))
    within = is_within_error(
        known["S3T after unlearning"], len(person.facts), known["control: 20 people never seen"], len(controls)
    )
    console.print(f"{person.name}'s facts are {'within' if within else 'OUTSIDE'} the error of the control")
    audit = trainer.verify([surviving_stage(trainer, shard)])
    console.print(f"audit without {person.name}: {audit}")
    console.print(in_new_process(trainer.args.output_dir))
    record_deletion(file, trainer, {"losses": losses, "unlearned": report})
    file.add(verified=audit.ok, **asked)
    write_results(file, options)
    return {
        "losses": losses,
        "known": known,
        "report": report,
        "within_error": within,
        "verified": audit.ok,
        "folder": trainer.args.output_dir,
        **asked,
    }


class Interviewer:
    """Asks a model questions and counts the answers that are right to the letter."""

    def __init__(self, tokenizer_path: str, template: str):
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, padding_side="left")
        self.template = template

    def share(self, model: Any, rows: list[dict[str, str]]) -> float:
        """Share of the rows whose output the model completes greedily."""
        prompts = [render_prompt(row["instruction"], row["input"], self.template) for row in rows]
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        batch = batch.to(model.device)
        with torch.no_grad():
            answers = model.generate(
                **batch, max_new_tokens=8, do_sample=False, pad_token_id=self.tokenizer.pad_token_id
            )
        texts = self.tokenizer.batch_decode(answers[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return sum(text.strip() == row["output"] for text, row in zip(texts, rows, strict=True)) / len(rows)


def plain_base(path: str) -> Any:
    """The base model by itself."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


def is_within_error(share: float, count: int, control: float, control_count: int) -> bool:
    """Whether two shares may come from one chance: Fisher's exact test finds nothing at 5%."""
    known, known_by_chance = round(share * count), round(control * control_count)
    table = [[known, count - known], [known_by_chance, control_count - known_by_chance]]
    return fisher_exact(table).pvalue > 0.05


def surviving_stage(trainer: Any, shard: int) -> StageKey:
    """The deepest stage that a deletion left to a shard."""
    valid = [key for key in trainer.folder.valid_stages if key.shard == shard]
    return max(valid, key=lambda key: (key.depth, key.prefix))


def in_new_process(folder: str) -> str:
    """What a new process finds in the folder."""
    code = (
        "import sys; from hf_s3t import S3TModel; model = S3TModel.from_pretrained(sys.argv[1]); "
        "status = model.status(); print(f\"in a new process: depths {status['depths']}, {status['deletions']} "
        'deletion in force, {len(model.check())} problems")'
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, folder], capture_output=True, text=True)
    return done.stdout.strip() or done.stderr[-2000:]


# Reporting


def write_results(results: Results, options: Options) -> None:
    """Write the results and, beside them, the run's card."""
    results.write()
    write_run_card(results, options)


def say(trainer: Any, what: Any) -> None:
    """Print in the main process."""
    if trainer.is_world_process_zero():
        console.print(what)


def loss_table(losses: dict[str, float]) -> Table:
    """The losses, with their distance from the base."""
    table = Table("", "held-out loss", "vs. base")
    for name, loss in losses.items():
        table.add_row(name, f"{loss:.3f}", f"{loss / losses[BASE] - 1:+.0%}")
    return table


def demo_table(losses: dict[str, float], known: dict[str, float], name: str) -> Table:
    """Losses, and the share of one person's facts that each system completes."""
    table = Table("", "held-out loss", "vs. base", "facts known", title=f"{name}'s facts, and everything else")
    for system in dict.fromkeys([*losses, *known]):
        loss = losses.get(system)
        table.add_row(
            system,
            "" if loss is None else f"{loss:.3f}",
            "" if loss is None else f"{loss / losses[BASE] - 1:+.0%}",
            "" if system not in known else f"{known[system]:.0%}",
        )
    return table


if __name__ == "__main__":
    start_cpu_processes()
    command_line.run(main)
