"""Cards and pictures: those of the configurations in the repository, and how a system's card is made."""

import sys
from pathlib import Path
from xml.etree import ElementTree

import publish
import pytest
from huggingface_hub import ModelCard
from jinja2 import UndefinedError
from peft import LoraConfig
from support.tiny import make_trainer, plant_stages, s3t_config, tiny_llama

from hf_s3t import S3TConfig
from hf_s3t.hub.card import render_card, render_recipe_card
from hf_s3t.hub.diagram import render_diagram
from hf_s3t.plan import Plan, StageKey


ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(file.stem for file in publish.CONFIGS.glob("*.yaml"))


def test_every_configuration_has_its_card_as_the_code_makes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "CARDS", tmp_path)
    made = {file.name: file.read_text() for file in publish.main(["--cards"])}
    kept = {file.name: file.read_text() for file in (ROOT / "model_cards" / "recipes").glob("*.md")}
    assert made == kept, "run `python recipes/publish.py --cards`"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_s_card_has_metadata_and_no_hole(name):
    card = ModelCard.load(ROOT / "model_cards" / "recipes" / f"{name}.md")
    assert card.data.library_name == "hf_s3t" and "s3t" in card.data.tags
    assert f"recipes/configs/{name}.yaml" in card.text
    assert "{{" not in card.text and "None" not in card.text and "| |\n" not in card.text.replace("| | |\n", "")


SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    "config",
    [
        S3TConfig(num_slices=3),
        S3TConfig(num_shards=2, num_slices=4, budget=3),
        S3TConfig(num_shards=5, num_slices=4, budget=4),
        S3TConfig(num_shards=12, num_slices=12, budget=2),
    ],
    ids=lambda config: f"{config.num_shards}x{config.num_slices}",
)
def test_a_picture_has_a_box_for_each_stage_inside_its_frame(config):
    plan = Plan.from_config(config)
    picture = ElementTree.fromstring(render_diagram(plan, frozenset(plan.stages())))
    width, height = float(picture.get("width")), float(picture.get("height"))
    boxes = [group.find(f"{SVG}rect") for group in picture.iter(f"{SVG}g")]
    assert len(boxes) == sum(len(sequence) for sequences in plan.sequences for sequence in sequences)
    places = [tuple(float(box.get(name)) for name in ("x", "y", "width", "height")) for box in boxes]
    for x, y, wide, high in places:
        assert 0 < x and x + wide <= width and 0 < y and y + high <= height
        # No other box lies over it.
        assert sum(abs(x - other) < wide and abs(y - below) < high for other, below, *_ in places) == 1
    # As wide as a card has room for; a letter is about 8 wide, and each line of text must end inside the picture.
    assert width <= 900
    for text in picture.iter(f"{SVG}text"):
        start = float(text.get("x")) - (4 * len(text.text) if text.get("text-anchor") else 0)
        assert start > 0 and start + 7.2 * len(text.text) <= width and float(text.get("y")) < height


def test_a_card_says_how_large_the_adapters_are_where_nobody_set_it(tmp_path):
    model = tiny_llama()
    trainer = make_trainer(tmp_path / "system", model=model, peft_config=LoraConfig(target_modules=["q_proj"]))
    plant_stages(trainer)
    card = render_card(trainer.folder, "me/system")
    assert "| LoRA | r = 8, alpha = 8, on q_proj |" in card and "None" not in card


def test_a_card_says_what_a_stage_sees_of_earlier_slices(tmp_path):
    said = {}
    for share in (0.0, 0.25, 1.0):
        model = tiny_llama()
        trainer = make_trainer(tmp_path / str(share), model=model, config=s3t_config(replay=share))
        said[share] = render_card(trainer.folder, "me/system").partition("| training of a stage | ")[2]
    assert said[0.0].startswith("on its last slice only; ")
    assert said[0.25].startswith("each epoch on its last slice and a share of 0.25 of the slices before it; ")
    assert not said[1.0].startswith(("on its", "each epoch"))


@pytest.mark.parametrize("targets", [["v_proj", "q_proj"], ".*[qv]_proj"])
def test_a_card_of_written_settings_is_the_one_that_peft_would_give_and_loads_no_peft(tmp_path, monkeypatch, targets):
    """Else a push would hold torch in memory and take seconds, whatever it has to send."""
    adapters = LoraConfig(r=2, lora_alpha=5, target_modules=targets)
    trainer = make_trainer(tmp_path / "system", peft_config=adapters)
    plant_stages(trainer)
    monkeypatch.setitem(sys.modules, "peft", None)
    card = render_card(trainer.folder, "me/system")
    assert f"| LoRA | r = 2, alpha = 5, on {targets if isinstance(targets, str) else 'q_proj, v_proj'} |" in card


def test_a_picture_tells_live_from_gone():
    plan = Plan.from_config(S3TConfig(num_slices=3))
    picture = render_diagram(plan, frozenset([StageKey(0, (0,)), StageKey(0, (0, 1))]))
    assert (picture.count('class="live"'), picture.count('class="gone"')) == (2, 7)


@pytest.mark.parametrize("wrong", [[], ["--private"]])
def test_a_name_is_needed_to_publish(wrong, capsys):
    with pytest.raises(SystemExit):
        publish.main(wrong)
    assert "repo_id" in capsys.readouterr().err


@pytest.mark.slow
def test_a_recipe_s_system_is_trained_and_published_with_its_numbers(hub, shared_data, tmp_path):
    repo_id = f"{hub.user}/stories"
    report = publish.main([
        repo_id, "--private", "--license", "mit",
        "--config", str(publish.CONFIGS / "stories260k.yaml"),
        "--model_name_or_path", str(shared_data("stories260K")),
        "--dataset_name", str(shared_data("alpaca/alpaca_union.jsonl")),
        "--output_dir", str(tmp_path / "system"), "--disable_tqdm", "True",
        "--max_train_samples", "24", "--eval_size", "8", "--max_length", "192", "--budget", "1",
    ])  # fmt: skip
    assert report.repo_id == repo_id and "README.md" in report.added
    card = ModelCard.load(repo_id)
    numbers = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert numbers["Held-out loss"] < numbers["Held-out loss of the base"]
    assert card.data.license == "mit" and str(tmp_path) not in card.content


def test_a_template_that_asks_for_what_no_card_has_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "recipe.md").write_text(
        "---\n{{ card_data }}\n---\n{{ name }} {{ nobody_gives_this }}\n", encoding="utf-8"
    )
    monkeypatch.setattr("hf_s3t.hub.card.TEMPLATES", tmp_path)
    with pytest.raises(UndefinedError, match="nobody_gives_this"):
        render_recipe_card("small", {"model_name_or_path": "me/base", "num_slices": 2})
