"""The paper's figures that need no model: their numbers, that pictures come out, and what wrong input gets."""

import json
import re
from pathlib import Path

import pytest
import theory_figures
from studies import theory
from studies.figures import draw

from hf_s3t.errors import ConfigError


FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"
NAMES = sorted(theory.STUDIES)


def stored(name):
    return json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8"))


# The search of families takes a minute.
MARKS = {"table-3": [], "families": [pytest.mark.slow, pytest.mark.long]}


class TestNumbers:
    @pytest.mark.parametrize("name", [pytest.param(n, marks=MARKS.get(n, pytest.mark.slow)) for n in NAMES])
    def test_stored_ones_are_those_of_the_code(self, name):
        again = json.loads(json.dumps(theory.STUDIES[name]()))
        before = stored(name)
        assert before.pop("versions").keys() == {"hf_s3t", "numpy", "scipy"}
        assert flat(again) == pytest.approx(flat(before), rel=1e-9)

    def test_figure_7(self):
        data = stored("figure-7")
        gains = {row["budget"]: row["gain"] for row in data["against_budget"]}
        assert round(gains[8], 2) == 1.87  # the paper says 1.6, its own formula this
        assert {row["num_shards"]: round(row["gain"], 1) for row in data["against_shards"]}[7] == 2.3

    def test_exact_and_simulated_agree(self):
        rows = [
            row for key in ("against_budget", "against_shards", "against_slices") for row in stored("figure-7")[key]
        ]
        drawn = [row for row in rows if "simulated" in row]
        assert len(drawn) > 20
        assert all(abs(row["simulated"] - row["theory"]) < 4.5 * row["error"] for row in drawn)
        table = stored("table-3")["rows"]
        assert all(abs(row["simulated_rate"] - row["exact_rate"]) < 4.5 * row["simulated_error"] for row in table)
        few = stored("without-replacement")["rows"]
        assert all(abs(row["simulated"] - row["exact"]) < 4.5 * row["error"] for row in few)

    def test_table_3(self):
        rows = stored("table-3")["rows"]
        assert [round(row["exact_rate"], 1) for row in rows] == [68.5, 87.9, 99.5, 107.9, 114.5, 119.8]
        assert all(abs(row["paper_rate"] / row["exact_rate"] - 1) < 0.04 for row in rows)
        assert all(abs(row["paper_gigabytes"] / row["whole_adapters_gigabytes"] - 1) < 0.02 for row in rows)

    def test_figure_8(self):
        data = stored("figure-8")
        assert all(c >= r - 1e-9 for c, r in zip(data["cyclic"][1:80], data["random_mean"][1:80]))
        assert data["cyclic"][-1] == pytest.approx(data["all_permutations"])
        for row in data["priors"]:
            assert row["bms_edit_distance"] == 5
            assert all(found["bms"] > found["random"] for found in row["scores"].values())

    def test_figure_15(self):
        assert all(row["bms"] >= row["sorted-cyclic"] for row in stored("figure-15")["scores"])

    def test_optimal_is_deepest(self):
        for name in ("uniform", "skewed"):
            for key in ("methods", "methods_beyond"):
                depths = {m: c["mean_depth_over_100"] for m, c in stored("selection-rules")[name][key].items()}
                assert len(depths) >= 5 and max(depths, key=depths.get) == "optimal"


def flat(value):
    """All numbers in a nest of lists and objects, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in flat(item)]
    return [value] if isinstance(value, (int, float)) else []


class TestPictures:
    @pytest.mark.parametrize("name", NAMES)
    def test_every_figure_is_drawn_with_named_axes(self, name, tmp_path):
        path = tmp_path / "figure.svg"
        draw(name, stored(name), path)
        text = path.read_text(encoding="utf-8")
        # Matplotlib names what it writes in comments: a title and two labels for every panel.
        panels = len(re.findall(r'id="axes_\d+"', text))
        assert (
            panels >= 1
            and len(re.findall("<!-- .*(request|epoch|budget|number|prior|share|example|score)", text)) >= panels
        )
        assert (FIGURES / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    def test_the_same_numbers_give_the_same_picture(self, tmp_path):
        for number in (1, 2):
            draw("retention", stored("retention"), tmp_path / f"{number}.png")
        assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()

    def test_a_figure_of_an_unknown_name_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="no figure 'figure-99'; expected one of figure-6-right"):
            draw("figure-99", {}, tmp_path / "a.png")


class TestRecipe:
    def test_writes_numbers_and_picture(self, tmp_path, capsys):
        theory_figures.main(["--output", str(tmp_path / "new"), "--only", "table-3", "--format", "svg"])
        assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["table-3.json", "table-3.svg"]
        assert "table-3.svg" in capsys.readouterr().out

    def test_redraws_what_is_there(self, tmp_path):
        (tmp_path / "retention.json").write_text((FIGURES / "retention.json").read_text())
        theory_figures.main(["--output", str(tmp_path), "--only", "retention", "--redraw"])
        assert (tmp_path / "retention.png").exists()

    @pytest.mark.parametrize("content", [None, "no JSON"])
    def test_without_numbers_nothing_is_redrawn(self, content, tmp_path):
        (tmp_path / "retention.json").write_text((FIGURES / "retention.json").read_text())
        if content:
            (tmp_path / "table-3.json").write_text(content)
        before = sorted(tmp_path.iterdir())
        with pytest.raises(ConfigError, match=r"table-3\.json .*Run the study without --redraw"):
            theory_figures.main(["--redraw", "--only", "retention", "table-3", "--output", str(tmp_path)])
        with pytest.raises(ConfigError, match=r"There is no .* to draw from"):
            theory_figures.main(["--redraw", "--output", str(tmp_path / "none")])
        assert sorted(tmp_path.iterdir()) == before
