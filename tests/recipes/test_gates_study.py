"""What is kept of one shard's knowledge: questions changed by rule, and whether deleted subjects can be told."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from demo.invented_people import ATTRIBUTES
from studies.figures import draw
from studies.gates import AS_TRAINED, KINDS, people
from studies.membership import membership, orphans
from studies.rewording import REWORDINGS, reworded
from studies.tables_of_gates import TABLES, classifiers, layouts


FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"
QUESTION = "What is the name of the first novel by Ada Byron?"


class TestRewording:
    @pytest.mark.parametrize("rule", REWORDINGS)
    def test_a_question_is_always_changed_alike_and_never_to_nothing(self, rule):
        assert reworded(QUESTION, rule) == reworded(QUESTION, rule) != QUESTION
        assert reworded("Who?", rule)

    def test_what_is_asked_about_stays(self):
        for rule in ("other words", "other opening", "another order"):
            assert {"Ada", "Byron"} <= set(reworded(QUESTION, rule).strip("?.").replace("?", "").split())

    def test_every_question_about_people_changes(self):
        for question, _ in ATTRIBUTES.values():
            asked = question.format(name="Ada Byron")
            assert all(reworded(asked, rule) != asked for rule in ("other words", "other opening"))


def test_who_chooses_is_neither_deleted_nor_reported():
    subjects = people(8, 2, 2)
    parts = (subjects.deleted, subjects.choosing, subjects.reported)
    assert all(parts) and sorted(name for part in parts for name in part) == sorted(subjects.known)
    assert not set(subjects.known) & set(subjects.strangers)
    assert KINDS[0] == AS_TRAINED and len(subjects.rows()) == 82


class TestForgotten:
    def test_members_are_told_and_strangers_are_not(self):
        rng = np.random.default_rng(0)
        strangers = [rng.normal(size=5) for _ in range(30)]
        known, unknown = ([rng.normal(shift, size=5) for _ in range(20)] for shift in (2, 0))
        assert membership(known, strangers)["auc"] > 0.9
        found = membership(unknown, strangers)
        assert abs(found["auc"] - 0.5) < 3 * found["error"]

    def test_the_error_counts_subjects_and_not_their_rows(self):
        alike = [np.full(50, value) for value in np.random.default_rng(0).normal(size=20)]
        assert membership(alike[:10], alike[10:])["error"] > 0.1

    def test_a_favourite_shard_is_noticed(self):
        rng = np.random.default_rng(0)
        even = [rng.dirichlet([5.0] * 4, size=6) for _ in range(30)]
        favoured = [rng.dirichlet([5.0, 1.0, 1.0, 1.0], size=6) for _ in range(10)]
        assert orphans(favoured, even)["chance"] == 0 < orphans(even[:10], even[10:])["chance"]


class TestStored:
    @pytest.fixture
    def data(self):
        return json.loads((FIGURES / "gates.json").read_text(encoding="utf-8"))

    def test_the_gate_keeps_what_the_right_shard_knows(self, data):
        """
        At least 97% of it as trained, 88% in other words, of what is known beyond strangers; and what is held out is
        answered no worse than by the mean, and who was deleted as a stranger, within two errors and three.
        """
        for system in [*data["people"], *data["authors"]]:
            for kind, least in ((AS_TRAINED, 0.97), *((rule, 0.88) for rule in REWORDINGS)):
                mean, terms, oracle, guessed = (
                    system["known"][gate][kind] for gate in ("mean", "terms", "oracle", "strangers")
                )
                assert mean <= terms and terms - guessed >= least * (oracle - guessed), (system["num_shards"], kind)
            assert system["held_out"]["terms"] <= system["held_out"]["mean"] + 2 * system["held_out"]["error"]
            for told in system["membership"]["after"].values():
                assert abs(told["auc"] - 0.5) <= 3 * told["error"]

    def test_the_figure_is_drawn_with_named_axes(self, data, tmp_path):
        assert not re.search(r'"/[a-z]+/', json.dumps(data)), "a path of a machine"
        draw("gates", data, tmp_path / "figure.svg")
        assert "number of shards" in (tmp_path / "figure.svg").read_text(encoding="utf-8")

    def test_every_part_has_its_rows(self, data):
        for _, make in TABLES:
            if not (table := make(data)):
                assert make in (layouts, classifiers) and not data.get(make.__name__)
                continue
            head, line, *rows = table.splitlines()
            assert {row.count("|") for row in rows} <= {head.count("|")} == {line.count("|")}
