"""
Train what a recipe's configuration says, and publish the system with its card; or make the cards of configurations.

    accelerate launch recipes/publish.py me/llama-s3t --config recipes/configs/llama2_7b.yaml
    accelerate launch recipes/publish.py me/demo-s3t --private      # the demo's system
    python recipes/publish.py --cards                               # model_cards/recipes/, from recipes/configs/

All other options are those of `recipes/llama_alpaca.py`. A system that is trained already is pushed as it is, and its
missing stages are trained first.
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import llama_alpaca
import yaml
from accelerate import PartialState
from options import parse

from hf_s3t.hub import HubRepo, PushReport, push
from hf_s3t.model_card import description, render_recipe_card
from hf_s3t.storage import SystemFolder


HERE = Path(__file__).resolve().parent
CONFIGS, CARDS = HERE / "configs", HERE.parent / "model_cards" / "recipes"


def make_parser() -> argparse.ArgumentParser:
    """The options that the recipe does not have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo_id", nargs="?", help="the repository on the Hub, such as me/llama-s3t")
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
        return write_cards()
    if ours.repo_id is None:
        parser.error("the following arguments are required: repo_id (or --cards)")
    results = llama_alpaca.main(recipe_options)
    if not PartialState().is_main_process:
        return None
    options = parse(recipe_options, demo_defaults=llama_alpaca.DEMO)
    report = publish(ours, options, results["losses"])
    print(f"https://huggingface.co/{report.repo_id} at {report.commit}: {len(report.added)} files new or changed")
    return report


def publish(ours: argparse.Namespace, options: Any, losses: dict[str, float]) -> PushReport:
    """Push the folder of the recipe, with the losses it measured on its held-out rows."""
    now = losses.get("S3T after unlearning", losses["S3T"])
    dataset = options.script.dataset_name
    describe = functools.partial(
        description,
        repo_id=ours.repo_id,
        datasets=[dataset] if dataset and not Path(dataset).exists() and dataset.count("/") == 1 else [],
        license=ours.license,
        evaluation={"Held-out loss": round(now, 4), "Held-out loss of the base": round(losses["base"], 4)},
    )
    return push(SystemFolder(options.training.output_dir), HubRepo(ours.repo_id), describe, private=ours.private)


def write_cards() -> list[Path]:
    """Write the card of every configuration."""
    CARDS.mkdir(parents=True, exist_ok=True)
    written = []
    for file in sorted(CONFIGS.glob("*.yaml")):
        written.append(CARDS / f"{file.stem}.md")
        written[-1].write_text(render_recipe_card(file.stem, yaml.safe_load(file.read_text())))
    return written


if __name__ == "__main__":
    main()
