r"""
lm-evaluation-harness on a system: the zero-shot tasks of the paper's Table 1, or task files of one's own.

    accelerate launch recipes/llama_alpaca.py --config recipes/configs/llama2_7b.yaml --eval lm_eval
    accelerate launch recipes/llama_alpaca.py --eval lm_eval --eval_task_folder recipes/lm_eval_tasks \
        --eval_tasks invented_facts invented_general                          # the demo, without the network

The harness asks the ensemble as it asks any Transformers model, through `HFLM`.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_s3t.errors import ConfigError


# The eight tasks of Table 1 by the harness' names, each with the metric that the paper reports.
TABLE_1 = {
    "mmlu": "acc",
    "hellaswag": "acc_norm",
    "piqa": "acc_norm",
    "winogrande": "acc",
    "arc_challenge": "acc_norm",
    "arc_easy": "acc_norm",
    "truthfulqa_mc2": "acc",
    "openbookqa": "acc_norm",
}


def check_tasks(tasks: Sequence[str] | None, task_folder: str | None) -> list[str]:
    """
    The tasks that the harness shall run, all known to it and their questions read: before anything is trained.

    Args:
        tasks (sequence of `str`, *optional*): Their names; those of Table 1 if not given.
        task_folder (`str`, *optional*): A folder with task files of one's own.

    Returns:
        `list[str]`: The names.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If the harness is not installed, the folder is missing, a task unknown or its
            data out of reach.

    Example:

    ```python
    >>> from common.lm_evaluation import check_tasks

    >>> check_tasks(["invented_facts"], "recipes/lm_eval_tasks")
    ['invented_facts']
    ```
    """
    names, manager = known_tasks(tasks, task_folder)
    for name in names:
        _read_questions(name, manager)
    return names


def known_tasks(tasks: Sequence[str] | None, task_folder: str | None) -> tuple[list[str], Any]:
    """As [`check_tasks`], but reads no questions; with the harness' `TaskManager`."""
    names = list(tasks or TABLE_1)
    manager = _manager(names, task_folder)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"`--eval_tasks {unknown[0]}`: lm-evaluation-harness knows no such task. `lm_eval ls tasks` lists its "
            "own; a folder with task files of yours is named by `--eval_task_folder`."
        )
    return names, manager


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] | None = None,
    *,
    task_folder: str | None = None,
    batch_size: int = 8,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """
    Zero-shot results of lm-evaluation-harness.

    Args:
        model ([`~hf_s3t.S3TModel`] or any causal language model of Transformers): The model to ask.
        tokenizer: Its tokenizer.
        tasks (sequence of `str`, *optional*): As in [`check_tasks`].
        task_folder (`str`, *optional*): As in [`check_tasks`].
        batch_size (`int`, defaults to 8): Requests per batch.
        limit (`int`, *optional*): Only the first so many questions of each task.

    Returns:
        `dict[str, dict[str, float]]`: Per task and metric a value from 0 to 1; `acc_stderr` and the like are the
        standard errors.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: As [`known_tasks`].
    """
    names, manager = known_tasks(tasks, task_folder)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    asked = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    found = lm_eval.simple_evaluate(
        asked,
        tasks=names,
        num_fewshot=0,
        limit=limit,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=0 if limit else 1000,
    )["results"]
    # The harness names a metric with its filter, "acc,none"; standard errors that it did not compute are texts.
    return {
        task: {
            metric.removesuffix(",none"): float(value)
            for metric, value in numbers.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and metric != "sample_len"
        }
        for task, numbers in found.items()
    }


def _read_questions(name: str, manager: Any) -> None:
    try:
        manager.load([name])
    except Exception as error:
        # The data sets library, the Hub's client and a task's own code each raise what they like.
        said = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ConfigError(
            f"`--eval_tasks {name}`: its questions cannot be read: {said.rstrip('.')}. Read them once where the Hub "
            "can be reached (they stay in the cache), or name other tasks."
        ) from error


def _manager(names: Sequence[str], task_folder: str | None) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            f"`--eval lm_eval` needs lm-evaluation-harness ({error}). Install the extra: "
            '`pip install -e ".[lm_eval]"` in a checkout.'
        ) from error
    # That a model was made beforehand is what is meant here.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if task_folder is not None:
        if not Path(task_folder).is_dir():
            raise ConfigError(
                f"`--eval_task_folder {task_folder}` is no folder. Name one that holds task files (yaml)."
            )
        ours = TaskManager(include_path=task_folder, include_defaults=False)
        # Reading the harness' own thousands of task files takes seconds.
        if set(names) <= set(ours.all_tasks):
            return ours
    return TaskManager(include_path=task_folder)
