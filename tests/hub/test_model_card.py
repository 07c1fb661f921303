"""Cards and pictures: those of the configurations in the repository, and how a system's card is made."""

import sys
from pathlib import Path
from xml.etree import ElementTree

import publish
import pytest
from huggingface_hub import ModelCard
from jinja2 import UndefinedError
from peft import LoraConfig
from support.preferences import preference_trainer
from support.tiny import make_trainer, plant_stages, s3t_config, tiny_llama

from hf_s3t import S3TConfig
from hf_s3t.hub.card import render_card, render_recipe_card
from hf_s3t.hub.diagram import has_rows_of_sets, render_diagram
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
        S3TConfig(num_shards=2, num_slices=4, keep_idle=True),
        S3TConfig(num_shards=5, num_slices=4),
        S3TConfig(num_shards=2, num_slices=8, sequence_selection="lattice"),
        S3TConfig(num_shards=2, num_slices=6, work_budget=8.0),
        S3TConfig(num_slices=12, budget=30, sequence_selection="random"),
        S3TConfig(num_slices=3, sequence_selection=[[0, 1], [1], [2, 0, 1], [2, 1]]),
    ],
    ids=lambda config: f"{config.num_shards}x{config.num_slices}",
)
def test_a_picture_has_a_box_for_each_stage_inside_its_frame(config):
    plan = Plan.from_config(config)
    picture = ElementTree.fromstring(render_diagram(plan, frozenset(plan.stages())))
    width, height = float(picture.get("width")), float(picture.get("height"))
    boxes = [group.find(f"{SVG}rect") for group in picture.iter(f"{SVG}g")]
    assert len(boxes) == (
        len(plan.stages())
        if has_rows_of_sets(plan)
        else sum(len(sequence) for sequences in plan.sequences for sequence in sequences)
    )
    places = [tuple(float(box.get(name)) for name in ("x", "y", "width", "height")) for box in boxes]
    for x, y, wide, high in places:
        assert 0 < x and x + wide <= width and 0 < y and y + high <= height
        # No other box lies over it.
        over = [x < u + across and u < x + wide and y < v + down and v < y + high for u, v, across, down in places]
        assert sum(over) == 1
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


def test_a_card_says_by_which_trainer_and_loss_stages_were_trained(tmp_path):
    trainer = preference_trainer("kto, apo", tmp_path, arguments={"beta": 0.3})
    plant_stages(trainer)
    row = render_card(trainer.folder, "me/system").partition("| training of a stage | ")[2].splitlines()[0]
    assert row.startswith("`S3TKTOTrainer`, num_train_epochs ")
    assert row.endswith('loss_type "apo_zero_unpaired", beta 0.3 |')


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


def boxes_of(config, *prefixes) -> list[tuple[str, bool]]:
    """The boxes of the picture of one shard that has these stages: what is in each, and whether it is live."""
    plan = Plan.from_config(config)
    picture = render_diagram(plan, frozenset(StageKey(0, prefix) for prefix in prefixes))
    groups = ElementTree.fromstring(picture).iter(f"{SVG}g")
    return [(group.find(f"{SVG}text").text, group.get("class") == "live") for group in groups]


def test_a_picture_tells_live_from_gone():
    found = boxes_of(S3TConfig(num_slices=3, keep_idle=True), (0,), (0, 1))
    assert "".join(slice_ for slice_, _ in found) == "012120201"
    assert [live for _, live in found] == [True, True, *[False] * 7]


def test_a_picture_of_sets_has_each_once_by_depth_and_live_in_any_order():
    found = boxes_of(S3TConfig(num_slices=3), (2,), (2, 0), (2, 0, 1))
    assert [slices for slices, _ in found] == ["0", "1", "2", "01", "02", "12", "012"]
    assert [slices for slices, live in found if live] == ["2", "02", "012"]


def test_a_picture_of_few_sequences_has_a_row_for_each_without_idle_ones():
    found = boxes_of(S3TConfig(num_slices=3, budget=3), (2,), (2, 0), (2, 0, 1))
    assert "".join(slice_ for slice_, _ in found) == "0122012"
    # The last of the first sequence is there in another order.
    assert [live for _, live in found] == [False, False, True, True, True, False, False]


def test_a_picture_shows_what_is_live_beside_the_plan():
    """A folder made under another plan: what is valid serves, planned or not."""
    published = boxes_of(S3TConfig(num_slices=3, budget=1, keep_idle=True), (0,), (2,), (2, 1))
    assert published == [("0", True), ("1", False), ("2", False), ("2", True), ("1", True)]
    by_sets = boxes_of(
        S3TConfig(num_slices=3, sequence_selection=[[0, 1], [0, 2], [1, 2], [2]]), (1,), (1, 2), (1, 2, 0)
    )
    assert [slices for slices, _ in by_sets] == ["0", "1", "2", "01", "02", "12", "012"]
    assert [slices for slices, live in by_sets if live] == ["1", "12", "012"]


def test_a_card_of_sets_counts_them_by_depth(tmp_path):
    trainer = make_trainer(tmp_path / "system", config=S3TConfig(num_slices=3, id_column="id"))
    plant_stages(trainer)
    trainer.s3t_model.unlearn(trainer.folder.table.members(0, 1)[:1])
    card = render_card(trainer.folder, "me/system")
    assert "| 0 | 1: 2 of 3, 2: 1 of 3, 3: 0 of 1 |" in card and "| stages planned | 7 |" in card


def test_a_card_of_a_recipe_says_what_its_plan_costs():
    lattice = render_recipe_card("small", {"num_slices": 4})
    published = render_recipe_card("small", {"num_slices": 4, "keep_idle": True})
    assert "| stages to train | 15 |" in lattice and "same data | 6.5 |" in lattice
    assert "| 0 | 1: 4, 2: 6, 3: 4, 4: 1 |" in lattice
    assert "| stages to train | 16 |" in published and "same data | 8.75 |" in published
    assert "| 0 | 0-1-2-3, 1-2-3-0, 2-3-0-1, 3-0-1-2 |" in published


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
