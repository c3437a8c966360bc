"""Every mistake of the table is caught by the check that is said to catch it, and right code passes all checks."""

import pytest
from mutants.mutation import Check, Mutant, edited, live, outcome
from mutants.table import MUTANTS

CHECKS = {mutant.check.name: mutant.check for mutant in MUTANTS}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_right_code_passes(check: Check) -> None:
    errors = check.errors()
    assert errors
    assert max(errors) <= check.tolerance


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.function}: {mutant.mistake}")
def test_a_mistake_is_caught(mutant: Mutant) -> None:
    result = outcome(mutant)
    assert result.caught, result


def test_a_check_has_one_meaning() -> None:
    assert all(CHECKS[mutant.check.name] == mutant.check for mutant in MUTANTS)


def test_no_mistake_is_made_twice() -> None:
    assert len({mutant[:4] for mutant in MUTANTS}) == len(MUTANTS)
    assert len({(mutant.function, mutant.mistake) for mutant in MUTANTS}) == len(MUTANTS)


def test_the_mistake_is_taken_back() -> None:
    before = [live(mutant.function).__code__ for mutant in MUTANTS]
    for mutant in MUTANTS[:3]:
        outcome(mutant)
    assert all(live(mutant.function).__code__ is code for mutant, code in zip(MUTANTS, before))


@pytest.mark.parametrize("passage", ["no such passage", "x"])
def test_an_edit_that_does_not_apply_once_is_an_error(passage: str) -> None:
    with pytest.raises(ValueError, match="not once"):
        edited(live("model.rms_norm"), passage, "y")
