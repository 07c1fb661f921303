"""
Train what a recipe's configuration says, and publish the system with its card; or make the cards of configurations.

    accelerate launch recipes/publish.py me/llama-s3t --config recipes/configs/llama2_7b.yaml
    accelerate launch recipes/publish.py me/rte-s3t --config recipes/configs/rte.yaml
    accelerate launch recipes/publish.py me/demo-s3t --private      # the demo's system
    accelerate launch recipes/publish.py demo --folder              # into demo/system, and its base into demo/base
    python recipes/publish.py --cards                               # model_cards/recipes/, from recipes/configs/

All other options are those of the recipe that the configuration, or `--task_name`, is for; without either, those of
`recipes/llama_alpaca.py`. A system that is trained already is pushed as it is; missing stages are trained first.
"""

import argparse
import functools
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import image_classification
import llama_alpaca
import text_classification
import yaml
from accelerate import PartialState
from common import command_line
from common.options import Options, known_options, parse, read_options
from common.options import make_parser as make_llama_parser
from common.tasks import IMAGE_TASKS, TEXT_TASKS
from demo import people_demo

from hf_s3t.errors import ConfigError
from hf_s3t.folder.layout import CONFIG_FILE, KEY_FILE
from hf_s3t.folder.system import SystemFolder
from hf_s3t.hub.card import description, render_recipe_card
from hf_s3t.hub.pushing import Describe, PushReport, push
from hf_s3t.hub.repository import HubRepo


HERE = Path(__file__).resolve().parent
CONFIGS, CARDS = HERE / "configs", HERE.parent / "model_cards" / "recipes"


@dataclass(frozen=True)
class Recipe:
    """
    A recipe, as far as publishing goes.

    Args:
        script (`str`): Its file.
        pipeline_tag (`str`): The Hub's name of its tasks.
        parser (function): Makes the parser of its options.
        main (function): Runs it; from a command line to its results.
        options (function): From a command line to its options.
        evaluation (function): From its results to the numbers on the card.
    """

    script: str
    pipeline_tag: str
    parser: Callable[[], argparse.ArgumentParser]
    main: Callable[[list[str]], dict[str, Any]]
    options: Callable[[list[str]], Options]
    evaluation: Callable[[dict[str, Any]], dict[str, float]]


def held_out_losses(results: dict[str, Any]) -> dict[str, float]:
    """The numbers of a language model: its loss on the held-out rows as it is now, and the base's."""
    losses = results["losses"]
    names = {
        "S3T after unlearning": "Held-out loss",
        "S3T": "Held-out loss",
        "base": "Held-out loss of the base",
    }
    shown: dict[str, float] = {}
    for name, title in names.items():
        if name in losses:
            shown.setdefault(title, round(losses[name], 4))
    return shown


def deepest_metrics(results: dict[str, Any]) -> dict[str, float]:
    """The numbers of a classifier, with all the slices that it has now."""
    sets = {name: by_depth[max(by_depth, key=int)] for name, by_depth in results["metrics"].items()}
    return {
        f"{metric} ({name})" if len(sets) > 1 else metric: round(value, 4)
        for name, found in sets.items()
        for metric, value in found.items()
    }


def train_llama(argv: list[str]) -> dict[str, Any]:
    """Run the recipe; of the demo, only the training: what is published is there to forget somebody."""
    options = parse(argv, demo_defaults=people_demo.DEMO)
    return {"losses": people_demo.train_demo(options)[0]} if options.is_demo else llama_alpaca.main(argv)


LLAMA = Recipe(
    "recipes/llama_alpaca.py",
    "text-generation",
    make_llama_parser,
    train_llama,
    functools.partial(parse, demo_defaults=people_demo.DEMO),
    held_out_losses,
)
TEXT = Recipe(
    "recipes/text_classification.py",
    "text-classification",
    text_classification.make_parser,
    text_classification.main,
    lambda argv: read_options(text_classification.make_parser(), argv),
    deepest_metrics,
)
IMAGES = Recipe(
    "recipes/image_classification.py",
    "image-classification",
    image_classification.make_parser,
    image_classification.main,
    lambda argv: read_options(image_classification.make_parser(), argv),
    deepest_metrics,
)


def recipe_for(settings: Mapping[str, Any]) -> Recipe:
    """The recipe that a configuration is for: its task says so."""
    task = settings.get("task_name")
    return TEXT if task in TEXT_TASKS else IMAGES if task in IMAGE_TASKS else LLAMA


def settings_in(argv: list[str]) -> dict[str, Any]:
    """What a command line says about the recipe, with what its configuration says."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "task_name", "method"):
        parser.add_argument(f"--{name}")
    given = {name: value for name, value in vars(parser.parse_known_args(argv)[0]).items() if value}
    config = Path(given["config"]) if "config" in given else None
    from_file = yaml.safe_load(config.read_text()) if config is not None and config.is_file() else None
    return {**from_file, **given} if isinstance(from_file, dict) else given


def make_parser() -> argparse.ArgumentParser:
    """The options that the recipe does not have."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("repo_id", nargs="?", help="the repository on the Hub, such as me/llama-s3t")
    parser.add_argument("--folder", action="store_true", help="write a new folder of that name, and push nothing")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--license", help="for the card: identifier of the licence")
    parser.add_argument("--cards", action="store_true", help="only write the cards of all configurations")
    return parser


def main(argv: list[str] | None = None) -> PushReport | list[Path] | None:
    """
    Train and publish, or write the cards.

    Returns:
        `PushReport`, the list of cards that were written, or `None` in all processes but the first.
    """
    parser = make_parser()
    ours, recipe_options = parser.parse_known_args(argv)
    if ours.cards:
        known_options(parser, argv)
        return write_cards()
    if ours.repo_id is None:
        parser.error("the following arguments are required: repo_id (or --cards)")
    settings = settings_in(recipe_options)
    if settings.get("method", "s3t") != "s3t":
        raise ConfigError(
            f"`--method {settings['method']}` makes no system that could be served from the Hub. Use s3t."
        )
    recipe = recipe_for(settings)
    known_options(recipe.parser(), recipe_options, vars(ours))
    results = recipe.main(recipe_options)
    if not PartialState().is_main_process:
        return None
    if ours.folder:
        return write_folder(ours, recipe.options(recipe_options), recipe.evaluation(results))
    report = publish(ours, recipe.options(recipe_options), recipe.evaluation(results))
    print(f"https://huggingface.co/{report.repo_id} at {report.commit}: {len(report.added)} files new or changed")
    return report


def describe_with(ours: argparse.Namespace, options: Options, evaluation: dict[str, float]) -> Describe:
    """The card of the recipe's system, with the numbers it measured."""
    task = {**TEXT_TASKS, **IMAGE_TASKS}.get(getattr(options.script, "task_name", None))
    dataset = options.script.dataset_name or (task.dataset.name if task is not None and task.dataset else None)
    return functools.partial(
        description,
        repo_id=f"me/{Path(ours.repo_id).name}" if ours.folder else ours.repo_id,
        datasets=[dataset] if dataset and not Path(dataset).exists() and dataset.count("/") == 1 else [],
        license=ours.license,
        evaluation=evaluation,
    )


def publish(ours: argparse.Namespace, options: Options, evaluation: dict[str, float]) -> PushReport:
    """Push the folder of the recipe."""
    describe = describe_with(ours, options, evaluation)
    return push(SystemFolder(options.training.output_dir), HubRepo(ours.repo_id), describe, private=ours.private)


def write_folder(ours: argparse.Namespace, options: Options, evaluation: dict[str, float]) -> list[Path]:
    """Write what others may have of the recipe's system into a folder, and the demo's base, which is nowhere else."""
    system, target = SystemFolder(options.training.output_dir), Path(ours.repo_id)
    system.copy_to(target / "system")
    (target / "system" / KEY_FILE).unlink(missing_ok=True)
    files = describe_with(ours, options, evaluation)(system, None, False) | {CONFIG_FILE: system.config_bytes()}
    for name, content in files.items():
        (target / "system" / name).write_bytes(content)
    if options.is_demo:
        shutil.copytree(system.record["base_model"]["id"], target / "base")
    written = sorted(path for path in target.rglob("*") if path.is_file())
    print(f"{target}: {len(written)} files, {sum(path.stat().st_size for path in written) / 1000:.0f} kB")
    return written


def write_cards() -> list[Path]:
    """Write the card of every configuration."""
    CARDS.mkdir(parents=True, exist_ok=True)
    written = []
    for file in sorted(CONFIGS.glob("*.yaml")):
        settings = yaml.safe_load(file.read_text())
        recipe = recipe_for(settings)
        on_hub = getattr({**TEXT_TASKS, **IMAGE_TASKS}.get(settings.get("task_name")), "dataset", None)
        card = render_recipe_card(
            file.stem,
            settings,
            script=recipe.script,
            pipeline_tag=recipe.pipeline_tag,
            # A configuration with a file's format is for files that one names.
            dataset=on_hub.name if on_hub is not None and "line_format" not in settings else None,
        )
        written.append(CARDS / f"{file.stem}.md")
        written[-1].write_text(card)
    return written


if __name__ == "__main__":
    command_line.run(main)
