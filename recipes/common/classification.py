"""What the classification recipes share: their arguments, the checks before training, and the run itself."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import transformers
from accelerate import PartialState
from common.adding import add_rows, check_adding
from common.command_line import console
from common.forgetting import EXHAUSTED, is_asked_for, must_train, named
from common.fresh_process import in_new_process
from common.options import Options
from common.results import HELD_OUT, Results, cost_of, on_hub, write_run_card
from common.rows import Source, check_placing_columns, label_set, sample, split_off, with_ids
from common.scores import score, shown_predictions
from common.tasks import METRICS
from common.workers import RayArguments, audit_over_workers, train_over_workers
from datasets import Dataset
from rich.table import Table
from transformers import EvalPrediction

from hf_s3t import S3TConfig
from hf_s3t.baselines import METHODS, Method
from hf_s3t.errors import ConfigError
from hf_s3t.folder.system import SystemFolder
from hf_s3t.hub.card import description
from hf_s3t.training.audit import VerificationReport


@dataclass
class ClassificationArguments(RayArguments):
    """What a classification recipe trains on, and what it does afterwards."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Base: an id on the Hub or a folder."})
    task_name: str | None = field(
        default=None, metadata={"help": "A benchmark's task, which brings data, columns, labels and metrics."}
    )
    method: str = field(default="s3t", metadata={"help": "s3t, full, sisa, protosisa or sequential."})
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Training data: an id on the Hub, a file or a folder; the task's if not given."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    train_split: str | None = field(default=None, metadata={"help": "Split to train on; train if not given."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on; the task's if not given."})
    eval_file: str | None = field(default=None, metadata={"help": "File to evaluate on, where training data is one."})
    validation_share: float = field(
        default=0.0,
        metadata={
            "help": "Evaluate on this share of the training rows, left out of training, instead of the test set."
        },
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on so many rows, chosen by their ids."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many rows."})
    label_column: str | None = field(default=None, metadata={"help": "Column of labels, as numbers or names."})
    label_set: list[str] | None = field(
        default=None, metadata={"help": "The label set, in the order of the label numbers."}
    )
    metrics: list[str] | None = field(default=None, metadata={"help": f"Of {', '.join(METRICS)}."})
    add_file: str | None = field(
        default=None, metadata={"help": "Rows to add to the system that is there, in a file like that of the others."}
    )
    add_into: str = field(
        default="new_shards", metadata={"help": "Where they go: new_shards, or slices, those cheapest to grow again."}
    )
    unlearn: list[str] | None = field(default=None, metadata={"help": "Ids to unlearn after training."})
    unlearn_groups: list[str] | None = field(
        default=None, metadata={"help": "Groups whose rows are all to be unlearnt; see --group_column."}
    )
    verify: str | None = field(
        default=None, metadata={"help": "Audit at the end: 'sample' for one surviving stage, 'all' for every one."}
    )
    results_file: str | None = field(
        default=None, metadata={"help": "Where the results go; OUTPUT_DIR-results.json if not given."}
    )
    overwrite_results: bool = field(default=False, metadata={"help": "Run again although the results are there."})


@dataclass(frozen=True)
class EvaluationSet:
    """
    Rows to evaluate on.

    Args:
        dataset (`Dataset`): As the model takes them.
        ids (`list`): The id of each row.
        references (`list`): The true label of each row.
        questions (`list`, *optional*): The question of each row, where several are one.
    """

    dataset: Dataset
    ids: list
    references: list
    questions: list | None = None


class Parts(NamedTuple):
    """
    What a method is made of, beside its options.

    Args:
        task: What is told apart, and how that is scored.
        load_model (callable): Makes a base.
        train (`Dataset`): The rows to train on, as the model takes them.
        evaluation (mapping from `str` to [`EvaluationSet`]): What is evaluated on.
        data_collator (callable): Makes batches of rows.
        processing_class: The tokenizer or image processor.
        new (`Dataset`, *optional*): The rows to add to a system that was trained on the others.
    """

    task: Any
    load_model: Callable[[], Any]
    train: Dataset
    evaluation: Mapping[str, EvaluationSet]
    data_collator: Callable
    processing_class: Any
    new: Dataset | None = None

    @property
    def first(self) -> EvaluationSet:
        """What is evaluated on while training."""
        return next(iter(self.evaluation.values()))


# Data


def read_sets(options: Options, task: Any, source: Source) -> tuple[Dataset, dict[str, Dataset]]:
    """
    The rows to train on and those to evaluate on, as they were read, each with a column of ids.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If there is nothing to evaluate on, or a share is none.
    """
    script, on_hub = options.script, task.dataset
    if not 0 <= script.validation_share < 1:
        raise ConfigError(
            f"`--validation_share {script.validation_share}` is no share of the training rows. Give 0.2, for example."
        )
    splits = [script.eval_split] if script.eval_split else on_hub.eval_splits if on_hub else ("test",)
    elsewhere = [
        name
        for name, value in (("eval_file", script.eval_file), ("eval_split", script.eval_split))
        if value and script.validation_share
    ]
    if elsewhere:
        raise ConfigError(f"`--validation_share` evaluates on training rows: leave `--{elsewhere[0]}` out.")
    if source.is_file and not script.eval_file and not script.validation_share:
        raise ConfigError(
            f"{source.name} is one file, and there is nothing to evaluate on. Give `--eval_file`, or "
            "`--validation_share 0.2` to leave out a part of the training rows."
        )
    file = dataclasses.replace(source, name=script.eval_file) if script.eval_file else None
    if file is not None:
        file.check()
    train = source.read(script.train_split or (on_hub.train_split if on_hub else "train"))
    if script.validation_share:
        return train, {}
    if file is not None:
        return train, {"evaluation": file.read("train")}
    return train, {split: source.read(split) for split in splits}


def choose_rows(options: Options, train: Dataset) -> tuple[Dataset, Dataset | None]:
    """The rows of a data set to train on, and those that are left out of training to evaluate on them."""
    script = options.script
    held_out, units = None, units_of(train, options.s3t)
    if script.validation_share:
        train, held_out = split_off(train, units, script.validation_share, HELD_OUT)
    if script.max_train_samples:
        train = sample(train, units_of(train, options.s3t), script.max_train_samples)
    if len(train) == 0:
        raise ConfigError(
            f"`--max_train_samples {script.max_train_samples}` and `--validation_share {script.validation_share}` "
            "leave no rows to train on."
        )
    return train, held_out


def first_rows(dataset: Dataset, count: int | None) -> Dataset:
    """At most so many rows."""
    return dataset if count is None else dataset.select(range(min(count, len(dataset))))


# Checks


def resolve_labels(options: Options, task: Any, dataset: Dataset, name: str) -> Any:
    """The task with its label set: the one given, the benchmark's own, or the one the dataset declares."""
    given = options.script.label_set
    if task.labels is not None and not given:
        return task
    return dataclasses.replace(task, labels=label_set(dataset, task.label_column, given, name))


# The run


def quiet() -> None:
    """Only the stages deserve a progress bar."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def run_classification(options: Options, results: Results, parts: Parts) -> dict[str, Any]:
    """
    Train by the method asked for, measure at every depth, and write the results and the card.

    Returns:
        `dict[str, Any]`: What the results file holds.
    """
    script, output_dir = options.script, Path(options.training.output_dir)
    task, train, evaluation = parts.task, parts.train, parts.evaluation
    ids, groups = named(script, train, options.s3t, output_dir)
    brings = parts.new is not None and len(parts.new) > 0
    trains = brings or must_train(results.earlier() is not None, output_dir, ids, groups)
    results.go_on()
    method = make_method(options, parts)
    if parts.new is not None:
        add_rows(method.trainer, parts.new, options)
        # What is sent to other processes: Datasets cannot read back a selection of no rows.
        parts = parts._replace(train=method.trainer.train_dataset, new=None)
        train = parts.train
    if trains:
        with results.timed("train"):
            train_over_workers(method, script, make_method, options, parts)
    results.add(
        data={
            "train_rows": len(train),
            "evaluation_rows": {name: len(rows.ids) for name, rows in evaluation.items()},
            "label_names": list(task.class_names) if task.class_names else None,
        }
    )
    measure(method, results, task, evaluation)
    if ids or groups:
        unlearn(method, results, task, evaluation, ids, groups)
    results.add(cost=cost_of(method), storage_bytes=method.storage_bytes())
    if script.verify and method.trainer.folder.valid_stages:
        results.add(verified=audit(method, script.verify, options, parts))
    content = results.write()
    if PartialState().is_main_process:
        write_cards(script.method, output_dir, options, results, task)
        console.print(table_of(content))
        console.print(f"results: {results.path}")
    return content


def measure(method: Method, results: Results, task: Any, evaluation: Mapping[str, EvaluationSet]) -> None:
    """Evaluate at every depth that some shard has; where none is left and something answers, that."""
    metrics, predictions = {}, {}
    depths = [*range(1, max(method.depths) + 1)] or ([] if method.is_exhausted else [0])
    with results.timed("evaluate"):
        for name, rows in evaluation.items() if depths else ():
            by_depth, kept = {}, {}
            for depth in depths:
                scores = method.predict(rows.dataset, depth=depth or None).predictions
                by_depth[str(depth)] = score(scores, rows.references, rows.questions, task)
                kept[str(depth)] = shown_predictions(scores, task)
            metrics[name] = by_depth
            predictions[name] = {"ids": rows.ids, "references": rows.references, "by_depth": kept}
            if rows.questions is not None:
                predictions[name]["questions"] = rows.questions
    results.add(depths=list(method.depths), metrics=metrics, predictions=predictions)


def unlearn(
    method: Method,
    results: Results,
    task: Any,
    evaluation: Mapping[str, EvaluationSet],
    ids: Sequence,
    groups: Sequence,
) -> None:
    """Unlearn, and measure again: what was measured with the deleted rows is not kept."""
    state = PartialState()
    deletion = method.unlearn(ids, groups=groups) if state.is_main_process else None
    if deletion is not None and deletion.deleted:
        seconds = round(deletion.seconds, 6)
        results.void()
        # Kept at once: a run that ends here does not delete a second time.
        results.keep(
            unlearned={
                "examples": deletion.deleted,
                "seconds": seconds,
                "depths_before": list(deletion.depths_before),
                "depths_after": list(deletion.depths_after),
            }
        )
        console.print(
            f"unlearned {deletion.deleted} examples in {seconds * 1000:.1f} ms: depths "
            f"{list(deletion.depths_before)} -> {list(deletion.depths_after)}"
        )
    elif deletion is not None:
        console.print("All of these were deleted before.")
    state.wait_for_everyone()
    if deletion is None:
        # What the first process did is in the folder; the results are its to write.
        method.model.refresh()
    if method.is_exhausted and state.is_main_process:
        console.print(EXHAUSTED)
    measure(method, results, task, evaluation)


def make_method(options: Options, parts: Parts) -> Method:
    """The method asked for, on a base of its own."""
    first = parts.first

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return score(prediction.predictions, first.references, first.questions, parts.task)

    return METHODS[options.script.method](
        parts.load_model(),
        options.training,
        train_dataset=parts.train,
        eval_dataset=first.dataset,
        data_collator=parts.data_collator,
        processing_class=parts.processing_class,
        compute_metrics=compute_metrics,
        peft_config=options.lora,
        s3t_config=options.s3t,
    )


def audit(method: Method, which: str, options: Options, parts: Parts) -> bool:
    """Train surviving stages again, in a process that has trained none of them, and compare them bit for bit."""
    stages = "sample" if which == "sample" else None
    if options.script.ray_workers is not None:
        report = audit_over_workers(method.trainer.args.device, stages, options.script, make_method, options, parts)
    elif method.trainer.args.world_size > 1:
        # Processes that belong together were started by a launcher: the same command, run again, only audits.
        report = method.trainer.verify(stages)
    else:
        report = in_new_process(audit_anew, which, options, parts)
    console.print(str(report))
    return report.ok


def audit_anew(which: str, options: Options, parts: Parts) -> VerificationReport:
    """The audit, of a method made anew."""
    quiet()
    return make_method(options, parts).trainer.verify("sample" if which == "sample" else None)


def write_cards(method: str, folder: Path, options: Options, results: Results, task: Any) -> None:
    """Write the card of the run beside its results and, in its folder, that of a system that can be published."""
    dataset = options.script.dataset_name or (task.dataset.name if task.dataset else None)
    write_run_card(results, options, dataset)
    if method == "s3t":
        # Without numbers: a deletion makes them void, and would not find them here. A push puts them on the card.
        public = [dataset] if on_hub(dataset) else []
        for name, data in description(SystemFolder(folder), None, True, repo_id=folder.name, datasets=public).items():
            (folder / name).write_bytes(data)


def table_of(content: Mapping[str, Any]) -> Table:
    """The metrics by depth."""
    sets = content["metrics"]
    names = list(dict.fromkeys(name for by_depth in sets.values() for found in by_depth.values() for name in found))
    table = Table("set", "depth", *names, title=f"{content['method']}, seed {content['seed']}")
    for set_name, by_depth in sets.items():
        for depth, found in by_depth.items():
            table.add_row(set_name, depth, *(f"{found[name]:.4f}" for name in names))
    return table


def say_it_is_done(results: Results, options: Options) -> dict[str, Any] | None:
    """The results of the same run, if they are there and nothing is to follow, or was deleted since."""
    found = results.earlier()
    check_adding(options)
    goes_on = is_asked_for(options.script) or options.script.verify or options.script.add_file
    if goes_on or (found is not None and not results.is_current(found)):
        return None
    if found is not None and PartialState().is_main_process:
        console.print(f"{results.path} holds the results of this run already. --overwrite_results runs it again.")
    return found


def prepared_ids(dataset: Dataset, options: Options, task: Any, name: str) -> Dataset:
    """The dataset with the ids that the system will know its rows by, in the column that its config names."""
    # A question's group is made with its rows.
    check_placing_columns(dataset, options.s3t, name, made=getattr(task, "group_column", None))
    dataset, options.s3t.id_column = with_ids(dataset, options.s3t.id_column, task.id_column)
    return dataset


def prepared_eval_ids(dataset: Dataset, id_column: str) -> Dataset:
    """Evaluation rows are named in the results by the same column, or by their number."""
    if id_column in dataset.column_names:
        return dataset
    return dataset.add_column(id_column, list(range(len(dataset))))


def units_of(dataset: Dataset, s3t: S3TConfig) -> list:
    """For each row the id, or the group, that it stays or goes with."""
    return dataset[s3t.group_column or s3t.id_column][:]
