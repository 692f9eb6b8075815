"""A few of the deaths of benches/determinism.py: the same end, whichever record was the last."""

import pytest

from benches.determinism import config, counts, killed_at, outcome
from tests.rig import LocalLearner, Rig
from tests.tiny import tiny_policy

STEPS = 5
DEATHS = (1, 9, 20, 33, 41, 52, 60)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def peace(policy, tmp_path_factory):
    rows = []
    rig = Rig(config(tmp_path_factory.mktemp("peace"), policy, STEPS), LocalLearner, look=counts(rows))
    assert rig.run() == STEPS and max(DEATHS) < len(rows)
    return outcome(rig)


@pytest.mark.parametrize("number", DEATHS)
def test_a_run_that_dies_at_any_record_ends_like_one_that_did_not(policy, peace, tmp_path, number):
    rig, problems = killed_at(number, tmp_path / "killed", policy, STEPS, torn=number % 2 == 0)
    assert outcome(rig) == peace and problems == []
    assert [step for step, _ in peace[1]] == list(range(STEPS))
