"""The rule by which a stage is valid, and what of a request is refused before anything is looked up."""

import pytest

from hf_s3t.errors import ConfigError
from hf_s3t.records.request import DeletionRequest
from hf_s3t.records.validity import fits, is_current


RECORD = {"slices": ["a", "b"], "below": "c"}


def test_a_stage_fits_what_it_saw_on_the_adapter_it_was_trained_on():
    assert fits(RECORD, ["a", "b"], "c")
    assert fits({**RECORD, "below": None}, ["a", "b"], None)


@pytest.mark.parametrize("slices", [["a"], ["b", "a"], ["a", "b", "d"], ["a", "d"], []])
def test_a_stage_that_saw_something_else_fits_nothing_and_is_not_current(slices):
    assert not fits(RECORD, slices, "c") and not is_current(RECORD, slices)


@pytest.mark.parametrize("below", ["d", None])
def test_a_stage_on_another_adapter_does_not_fit_though_what_it_saw_is_current(below):
    assert not fits(RECORD, ["a", "b"], below) and is_current(RECORD, ["a", "b"])


def test_what_says_nothing_of_what_it_saw_is_not_current():
    assert not is_current({}, [])


@pytest.mark.parametrize(
    ("request_", "says"), [({}, "neither `ids` nor `groups`"), ({"ids": [1], "missing": "skip"}, "missing")]
)
def test_a_request_that_names_nothing_or_says_not_what_to_do_is_refused(request_, says):
    with pytest.raises(ConfigError, match=says):
        DeletionRequest(**request_)
