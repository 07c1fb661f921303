"""Training on instructions by a method, its comparison, and forgetting: what llama_alpaca.py and its demo share."""

import copy
import os
import time
from pathlib import Path
from typing import Any

from accelerate.utils import release_memory
from common import lm_evaluation, workers
from common.adding import add_rows, joined
from common.chats import chat_template
from common.command_line import console
from common.forgetting import EXHAUSTED
from common.fresh_process import in_new_process
from common.options import Options
from common.results import HELD_OUT, Results, cost_of, write_run_card
from datasets import Dataset
from rich.table import Table
from transformers import BitsAndBytesConfig
from trl import SFTTrainer

from hf_s3t.baselines import METHODS, Method
from hf_s3t.errors import ConfigError
from hf_s3t.folder.system import SystemFolder
from hf_s3t.model.quantisation import log_casts_once
from hf_s3t.operations.purge import BASELINE_SUFFIX


RECIPE = "llama_alpaca"
BASE, FULL_LORA = "base", "full LoRA"
# How a method is called in the tables.
NAMES = {"s3t": "S3T", "full": "full LoRA by shard", "sisa": "SISA", "sequential": "sequential"}


# Training


def train_all(
    options: Options,
    model: str,
    train: Dataset,
    held_out: Dataset,
    results: Results,
    trains: bool = True,
    new: Dataset | None = None,
) -> tuple[dict[str, float], Any]:
    """
    Measure the base, train full LoRA and then the system, unless it is trained; returns losses and the trainer. Rows
    that are new come to the system before it is trained.
    """
    results.go_on()
    losses, name = compared_losses(options, model, train, held_out, results), NAMES[options.script.method]
    method = make_method(options, model, train, held_out)
    trainer = method.trainer
    if new is not None:
        add_rows(trainer, new, options)
        # What workers make the method of.
        train = joined(train, new, options)
    if trains:
        started = time.perf_counter()
        with results.timed("train"):
            workers.train_over_workers(method, options.script, make_method, options, model, train, held_out)
        say(trainer, f"{name}: {len(trainer.folder.valid_stages)} stages in {time.perf_counter() - started:.0f} s")
        write_chat_template(trainer, options)
    if method.is_exhausted:
        say(trainer, EXHAUSTED)
        results.add(metrics={})
    else:
        losses[name] = held_out_loss(trainer)
        with results.timed("evaluate"):
            results.add(metrics={HELD_OUT: losses_by_depth(trainer, method.depths)})
    results.keep(
        depths=list(method.depths),
        losses=losses,
        cost=cost_of(method),
        storage_bytes=method.storage_bytes(),
        data={"train_rows": len(train), "evaluation_rows": {HELD_OUT: len(held_out)}},
    )
    return losses, trainer


def write_chat_template(trainer: Any, options: Options) -> None:
    """Have a system answer chats by the prompt it was trained on, if its tokenizer has no template of its own."""
    if options.script.method == "s3t" and trainer.is_world_process_zero():
        tokenizer = trainer.processing_class
        if tokenizer.chat_template is None:
            has_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
            template = chat_template(options.script.prompt_template, has_bos)
            Path(options.training.output_dir, "chat_template.jinja").write_text(template, encoding="utf-8")


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


def audit(options: Options, trainer: Any, model: str, train: Dataset, held_out: Dataset, stages: Any) -> Any:
    """
    Train surviving stages again, in a process that has trained none of them, and compare them bit for bit.

    Args:
        options ([`~common.options.Options`]): Everything the recipe was told.
        trainer: The trainer of the system.
        model (`str`): The base it was made on.
        train (`Dataset`): The rows it was trained on.
        held_out (`Dataset`): The rows it was measured with.
        stages: As in `S3TTrainer.verify`.

    Returns:
        [`~hf_s3t.training.audit.VerificationReport`]: What the audit found.
    """
    if options.script.ray_workers is not None:
        given = options, model, train, held_out
        return workers.audit_over_workers(trainer.args.device, stages, options.script, make_method, *given)
    if trainer.args.world_size > 1:
        # Processes that belong together were started by a launcher: the same command, run again, only audits.
        return trainer.verify(stages)
    return in_new_process(audit_anew, options, model, train, held_out, stages)


def audit_anew(options: Options, model: str, train: Dataset, held_out: Dataset, stages: Any) -> Any:
    """The audit, of a method made anew."""
    return make_method(options, model, train, held_out).trainer.verify(stages)


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
    kept = results.content.get("losses", {})
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
    args.output_dir = f"{args.output_dir}{BASELINE_SUFFIX}"
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


def forgotten_rows(trainer: Any, train: Dataset, ids: list, groups: list) -> Dataset:
    """The training rows that are to be forgotten, as the trainer evaluates them."""
    config = trainer.folder.config
    columns = zip(train[config.id_column], train[config.group_column or config.id_column], strict=True)
    rows = train.select([n for n, (i, group) in enumerate(columns) if i in ids or group in groups])
    return trainer._prepare_dataset(rows, trainer.processing_class, trainer.args, False, None, "forgotten")


def unlearn(trainer: Any, file: Results, ids: list | None = None, groups: list | None = None) -> Any:
    """Unlearn in the main process, say what went, and note it at once."""
    report = None
    if trainer.is_world_process_zero():
        report = trainer.s3t_model.unlearn(ids, groups=groups)
        if report.deleted:
            file.keep(
                unlearned={
                    "examples": report.deleted,
                    "seconds": round(report.seconds, 6),
                    "depths_before": report.depths_before,
                    "depths_after": report.depths_after,
                }
            )
        console.print(
            f"unlearned {report.deleted} examples in {report.seconds * 1000:.1f} ms: {len(report.stages_removed)} "
            f"stages went, depths {report.depths_before} -> {report.depths_after}"
        )
    trainer.accelerator.wait_for_everyone()
    trainer.s3t_model.refresh()
    return report


def record_deletion(file: Results, trainer: Any, results: dict[str, Any]) -> None:
    """Note a deletion in the results; what was measured with the deleted rows is not kept."""
    depths = trainer.s3t_model.status()["depths"]
    file.void()
    file.add(
        metrics={HELD_OUT: losses_by_depth(trainer, depths)} if any(depths) else {},
        depths=depths,
        losses={name: loss for name, loss in results["losses"].items() if name == BASE or "after" in name},
    )


def record_answers(file: Results, results: dict[str, Any]) -> None:
    """Note the harness' scores, those after a deletion if there was one, and what an audit found."""
    if "lm_eval" in results:
        was_deleted = "unlearned" in results
        file.add(lm_eval={name: v for name, v in results["lm_eval"].items() if "after" in name or not was_deleted})
    if "verified" in results:
        file.add(verified=results["verified"])


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
