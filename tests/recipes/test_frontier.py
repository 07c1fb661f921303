"""Figure 9 as a frontier, and a stream that is really answered: what is compared, and both on a tiny system."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import deletion_study
import pytest
from studies.answers import Trained, named
from studies.figures import draw
from studies.frontier import SHARES, called, compared, simulated
from studies.trained_stream import simulated_stream, ways
from support.tiny import tiny_vit
from transformers import ViTImageProcessorPil

from hf_s3t import S3TConfig
from hf_s3t.analysis.streams import Policy


FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"
BY_DEPTH = (0.1, 0.8, 0.9)


def table(size: int, shards: int, by_depth=BY_DEPTH) -> dict[str, float]:
    """The mean over shards of a quality by depth."""
    combinations = itertools.combinations_with_replacement(range(size + 1), shards)
    return {named(depths): sum(by_depth[depth] for depth in depths) / shards for depths in combinations}


@pytest.fixture(scope="module")
def points():
    """Two shards of two slices; SISA serves as well as S3T at every depth."""
    tables = {f"{method}-{share:g}": table(2, 2) for method in ("s3t", "sisa") for share in SHARES}
    tables |= {"full": table(1, 1, (0.1, 0.95)), "full-per-shard": table(1, 2, (0.1, 0.85))}
    return simulated(2, 2, tables, requests=200, runs=2, amounts=1)


class TestFrontier:
    def test_full_retraining_costs_one_a_request_and_a_shard_its_part(self, points):
        alone, in_shards = points["full"]
        assert (alone.work, in_shards.work) == (1 + 200, 1 + 200 / 2)
        assert (alone.quality, in_shards.quality) == (pytest.approx(0.95), pytest.approx(0.85))

    def test_at_once_is_the_quality_of_full_depth(self, points):
        for kind in ("published-sisa", "published-s3t"):
            exhausted, dead, at_once = points[kind]
            assert at_once.quality == pytest.approx(BY_DEPTH[2]) and at_once.mean_depth == 2
            assert exhausted.work < dead.work < at_once.work
            assert exhausted.quality < dead.quality < at_once.quality

    def test_idle_stages_are_paid_for_by_the_published_plan_alone(self, points):
        """Of the rotations (0, 1) and (1, 0) one stage of both slices is idle."""
        published, ours = points["published-s3t"][2], points["s3t"]
        (lattice,) = (p for p in ours if (p.plan, p.replay, p.policy) == ("lattice", 1.0, Policy.all_at_once(2)))
        assert published.first_work == pytest.approx(lattice.first_work + 1.0)
        assert published.work > lattice.work and published.quality == pytest.approx(lattice.quality)

    def test_stages_as_good_as_those_of_sisa_cost_less(self, points):
        """Where shards serve most of the time: below, a policy of few stages comes in steps."""
        goal = compared(points)["goal"]
        serving = [row["less"] for row in goal if row["sisa"]["quality"] >= BY_DEPTH[1]]
        assert len(serving) > 3 and min(serving) > 1
        assert all(row["s3t"]["quality"] >= row["sisa"]["quality"] for row in goal)

    def test_a_quality_that_s3t_does_not_reach_is_said(self, points):
        better = [replace(point, quality=0.99) for point in points["sisa"]]
        *_, last = compared({**points, "sisa": better})["goal"]
        assert last["s3t"] is last["less"] is None

    def test_frontiers_ascend_and_nothing_tried_is_above_them(self, points):
        found = compared(points)
        for kind in ("sisa", "s3t"):
            best = found["frontiers"][kind]
            assert all(a["work"] < b["work"] and a["quality"] < b["quality"] for a, b in itertools.pairwise(best))
            for point in points[kind]:
                assert any(b["work"] <= point.work + 1e-4 and b["quality"] >= point.quality - 1e-6 for b in best)

    def test_the_factors_of_the_paper_are_amounts_of_work(self, points):
        exhausted, at_once, full = compared(points)["factors"]
        assert (exhausted["factor"], full["factor"]) == (2.8, 25)
        assert exhausted["work"] == pytest.approx(points["published-sisa"][0].work / 2.8, abs=1e-4)
        assert at_once["work"] == pytest.approx(points["published-sisa"][2].work / 2.8, abs=1e-4)
        assert full["work"] == pytest.approx(201 / 25)
        assert at_once["s3t"]["work"] <= at_once["work"] and at_once["s3t"]["quality"] > at_once["sisa"]["quality"]


def test_policies_have_names_of_their_own(points):
    policies = {point.policy for kind in ("sisa", "published-s3t") for point in points[kind]}
    assert len({called(policy) for policy in policies}) == len(policies)


def test_depths_together_are_called_alike_in_any_order():
    assert named([0, 2, 1]) == named((2, 1, 0)) == "2-1-0"


def test_a_rate_is_chosen_with_one_sequence_and_measured_with_all_sets():
    assert Trained("s3t", 0.25).changes(chooses=True) == {"replay": 0.25, "budget": 1}
    assert Trained("s3t", 0.25).changes()["sequence_selection"] == "lattice"
    assert Trained("full", num_shards=1).changes() == {"num_shards": 1}


@pytest.fixture(scope="module")
def studied(tmp_path_factory, one_thread):
    """Both studies on a tiny ViT."""
    folder = tmp_path_factory.mktemp("frontier")
    tiny_vit(2, labels=10).save_pretrained(folder / "base")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder / "base")
    common = [
        *("--task_name", "digits", "--model_name_or_path", str(folder / "base"), "--augmentation", "none"),
        *("--max_train_samples", "48", "--max_eval_samples", "20", "--num_shards", "2", "--num_slices", "2"),
        *("--num_train_epochs", "1", "--per_device_train_batch_size", "4", "--disable_tqdm", "true"),
        *("--lora_r", "2", "--target_modules", "[q_proj, v_proj]", "--rates", "0.01", "--baseline_rates", "0.01"),
        *("--work_dir", str(folder / "work"), "--output", str(folder / "figures"), "--seeds", "1"),
    ]
    deletion_study.main(["stream", *common, "--requests", "6", "--stages", "1"])
    deletion_study.main(["frontier", *common, "--stream", "50", "--streams", "2"])
    return {
        name: json.loads((folder / "figures" / f"{name}.json").read_text())
        for name in ("frontier-trained", "frontier")
    }


@pytest.mark.slow
class TestStudies:
    def test_what_is_trained_is_what_is_simulated(self, studied):
        """The same depths after every request, as many stages, and the work but for the rows that are gone."""
        systems = studied["frontier-trained"]["systems"]
        assert [system["method"] for system in systems] == ["s3t", "sisa", "sisa", "s3t"]
        for system in systems:
            simulated = system["simulated"]
            assert system["depths"] == simulated["depths"] and len(system["depths"]) == 7
            assert system["stages_trained"] == simulated["stages"]
            assert 0.7 * simulated["work"] <= system["work"] <= simulated["work"]
            assert system["work_in_steps"] >= system["work"]

    def test_qualities_of_all_depths_together_are_measured(self, studied):
        data = studied["frontier"]["tasks"][0]
        for name, system in data["systems"].items():
            shards = 1 if name == "full" else 2
            assert len(next(iter(system["quality"])).split("-")) == shards
            assert all(0 <= quality <= 1 for quality in system["quality"].values())
        assert data["systems"]["s3t-1"]["quality"]["0-0"] == studied["frontier"]["quality_of_guessing"]
        assert data["points"]["goal"] and data["points"]["tried"]["s3t"] > data["points"]["tried"]["sisa"]


class TestStoredFigures:
    @pytest.mark.parametrize(("name", "panels"), [("families", 6), ("frontier", 3), ("frontier-trained", 2)])
    def test_every_figure_is_drawn_with_named_axes(self, name, panels, tmp_path):
        data = json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8"))
        assert not re.search(r'"/[a-z]+/', json.dumps(data)), "a path of a machine"
        draw(name, data, tmp_path / "figure.svg")
        text = (tmp_path / "figure.svg").read_text(encoding="utf-8")
        assert len(re.findall(r'id="axes_\d+"', text)) == panels
        assert len(re.findall("<!-- .*(?:request|work|accuracy|depth).* -->", text)) >= 2 * panels
        picture = (FIGURES / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) < 120_000

    def test_the_simulated_stream_is_where_the_trained_one_is(self):
        """Depths and stages to the number; the work but for rows that are gone; accuracy within its own error."""
        data = json.loads((FIGURES / "frontier-trained.json").read_text(encoding="utf-8"))
        assert data["requests"] >= 100 and {system["method"] for system in data["systems"]} == {"s3t", "sisa"}
        config = S3TConfig(num_shards=data["num_shards"], num_slices=data["num_slices"])
        for way, system in zip(ways(0.25, [1, 2]), data["systems"], strict=True):
            simulated = system["simulated"]
            now = simulated_stream(config, way, system["works"], data["requests"], data["order"])
            assert [round(depth, 4) for depth in now.depth_after] == simulated["depths"]
            assert len(system["depths"]) == data["requests"] + 1
            assert system["depths"] == simulated["depths"] and system["mean_depth"] == simulated["mean_depth"]
            assert system["stages_trained"] == simulated["stages"]
            assert system["work"] == pytest.approx(simulated["work"], rel=0.15)
            assert system["mean_quality"] == pytest.approx(simulated["mean_quality"], abs=0.02)


def test_the_page_shows_what_its_example_prints(capsys):
    page = (FIGURES.parent / "beyond_the_paper.md").read_text(encoding="utf-8")
    ((code, printed),) = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", page, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out == printed
