"""Examples of equal content: counted when one of them is deleted; on request deleted with it, or kept together."""

import json

import numpy as np
import pytest
from datasets import Dataset, Image
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from support.tiny import lm_rows, make_trainer, plant_stages, s3t_config

from hf_s3t.errors import ConfigError
from hf_s3t.plan.partition import assign, units_of
from hf_s3t.records.buffers import hexadecimal
from hf_s3t.records.digests import DigestKey
from hf_s3t.training.rows import TrainingRows


def rows_with_copies():
    """Twelve rows; the content of the first stands in two more."""
    rows = lm_rows(12)
    for copy in (5, 9):
        rows[copy] = {**rows[0], "id": rows[copy]["id"]}
    return rows


def system(tmp_path, **settings):
    rows = rows_with_copies()
    trainer = make_trainer(tmp_path / "system", rows=rows, config=s3t_config(num_shards=1, num_slices=3, **settings))
    plant_stages(trainer)
    return trainer.s3t_model, [rows[n]["id"] for n in (0, 5, 9)]


def test_examples_of_equal_content_that_are_still_in_are_told_to_the_caller_alone(tmp_path):
    model, (one, *others) = system(tmp_path)
    report = model.unlearn([one])
    assert report.deleted == 1 and sorted(report.duplicates) == sorted(others)
    assert set(others) <= set(model.folder.table.rows)
    ledger = (model.folder.path / "ledger.jsonl").read_text()
    assert not any(other in ledger for other in others)
    assert not any(model.folder.key.of_id(other) in ledger for other in others)


def test_examples_of_equal_content_go_too_where_that_is_asked_for(tmp_path):
    model, copies = system(tmp_path)
    report = model.unlearn(copies[:1], include_duplicates=True)
    assert report.deleted == 3 and report.duplicates == ()
    assert set(copies).isdisjoint(model.folder.table.rows)
    assert model.check() == []
    assert model.unlearn(copies).already_deleted == 3


def test_an_example_that_nothing_equals_has_no_duplicates(tmp_path):
    model, _ = system(tmp_path)
    assert model.unlearn([lm_rows(12)[1]["id"]]).duplicates == ()


def test_the_same_content_under_another_id_or_in_another_group_is_a_duplicate(tmp_path):
    rows = [{**row, "person": f"p{n % 4}"} for n, row in enumerate(rows_with_copies())]
    trainer = make_trainer(tmp_path, rows=rows, config=s3t_config(num_shards=1, num_slices=2, group_column="person"))
    plant_stages(trainer)
    assert len(trainer.s3t_model.unlearn([rows[0]["id"]]).duplicates) == 2


def test_kept_together_they_cost_one_slice(tmp_path):
    model, copies = system(tmp_path, colocate_duplicates=True, partition="balanced")
    assert len(set(model.locate(copies).values())) == 1
    assert json.loads((model.folder.path / "s3t_config.json").read_text())["s3t_config"]["colocate_duplicates"]


@pytest.mark.parametrize("partition", ["hashed", "column"])
def test_only_a_balanced_partition_can_keep_them_together(partition):
    columns = {"shard_column": "s", "slice_column": "t"} if partition == "column" else {}
    with pytest.raises(ConfigError, match=r"colocate_duplicates=True .* Use partition="):
        s3t_config(partition=partition, colocate_duplicates=True, **columns)


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("uvwxyz")), min_size=1, max_size=12),
)
def test_what_a_group_or_a_content_connects_is_one_unit_and_nothing_else_is(rows):
    groups, contents = zip(*rows, strict=True)
    units = units_of(range(len(rows)), groups, contents)
    # The slow way: join what touches until nothing changes.
    names = list(range(len(rows)))
    for _ in rows:
        for i, a in enumerate(rows):
            for j, b in enumerate(rows):
                if a[0] == b[0] or a[1] == b[1]:
                    names[i] = names[j] = min(names[i], names[j])
    for i in range(len(rows)):
        for j in range(len(rows)):
            assert (units[i] == units[j]) == (names[i] == names[j])
    assert all(unit in groups for unit in units)


def test_units_do_not_depend_on_the_order_of_rows():
    ids, contents = list("abcdefgh"), list("uvuwxwyu")
    units = dict(zip(ids, units_of(ids, None, contents), strict=True))
    again = dict(zip(ids[::-1], units_of(ids[::-1], None, contents[::-1]), strict=True))
    assert units == again
    places = assign(ids, num_shards=1, num_slices=3, groups=units_of(ids, None, contents))
    at = dict(zip(ids, places, strict=True))
    assert at["a"] == at["c"] == at["h"] and at["d"] == at["f"]


def test_a_picture_is_known_by_what_it_shows_wherever_its_file_lies(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3), dtype=np.uint8)

    def digests(folder, *shown):
        folder.mkdir()
        for number, picture in enumerate(shown):
            PILImage.fromarray(pixels[picture]).save(folder / f"{number}.png")
        files = [str(folder / f"{number}.png") for number in range(len(shown))]
        rows = Dataset.from_dict({"id": [*range(len(shown))], "image": files}).cast_column("image", Image())
        return hexadecimal(TrainingRows(rows, s3t_config(num_slices=1, budget=1)).digests(DigestKey(bytes(16))))

    here, moved, replaced = (
        digests(tmp_path / n, *s) for n, s in (("a", (0, 1, 0)), ("b", (0, 1, 0)), ("c", (0, 2, 0)))
    )
    assert here == moved and here[0] == here[2] != here[1]
    assert here[1] != replaced[1]
