"""The frozen words: seeds, ids, scores."""

import doctest
import math

import pytest

from core import errors, schema
from core.schema import Completion, Score, group_id, sample_seed


def test_examples_in_docstrings_are_true():
    assert doctest.testmod(schema).failed == doctest.testmod(errors).failed == 0


def test_seeds_depend_on_nothing_but_run_group_and_sample():
    seeds = {sample_seed(run, group, sample) for run in range(3) for group in range(20) for sample in range(8)}
    assert len(seeds) == 3 * 20 * 8  # all different
    assert sample_seed(0, 7, 3) == sample_seed(0, 7, 3)
    # A fixed number: a change of the rule would silently change every run that is resumed.
    assert sample_seed(0, 0, 0) == 195705416
    assert group_id(0, 0) == "de0bd9167419e4a5"
    assert group_id(0, 1) != group_id(1, 0)


def test_a_missing_score_has_no_value_and_a_given_one_has():
    assert math.isnan(Score("timeout").value)
    with pytest.raises(ValueError, match="does not go with"):
        Score("ok")
    with pytest.raises(ValueError, match="does not go with"):
        Score("error", 0.0)


def test_staleness_is_that_of_the_oldest_token():
    completion = Completion((1, 2, 3), (0.0, 0.0, 0.0), (4, 5, 5), "", "length")
    assert completion.staleness(6) == 2
    assert completion.truncated
