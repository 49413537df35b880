"""`SolutionScore`: read as attributes and by name, as JSON and as a table."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest

from modeling_prm import SolutionScore

SCORE = SolutionScore(
    steps=("2 + 3 = 5.", "5 - 1 = 3.", "The answer\n  is 3."),
    step_probs=(0.9523, 0.3, 0.475),
    overall_score=0.3,
    aggregation="min",
    weakest_step=1,
    weakest_prob=0.3,
    first_error=1,
    threshold=0.5,
    solution_idx=4,
    problem="2 + 3 - 1?",
)
FAILED = SolutionScore(
    steps=(),
    step_probs=None,
    overall_score=None,
    aggregation="mean",
    weakest_step=None,
    weakest_prob=None,
    first_error=None,
    threshold=0.5,
    solution_idx=2,
    error="solution 2 has no step; give at least one",
)
NAMES = [
    *("steps", "step_probs", "overall_score", "aggregation", "weakest_step", "weakest_prob", "first_error"),
    *("threshold", "solution_idx", "problem", "error"),
]


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SCORE.overall_score = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        SCORE["overall_score"] = 1.0  # type: ignore[index]
    with pytest.raises(TypeError):
        SolutionScore(("a",), (0.5,), 0.5, "min", 0, 0.5, -1, 0.5, 0)  # type: ignore[call-arg, misc]


def test_attributes_and_names_say_the_same() -> None:
    assert SCORE.step_probs == SCORE["step_probs"] == (0.9523, 0.3, 0.475)
    assert (SCORE.weakest_step, SCORE["weakest_step"], SCORE["problem"]) == (1, 1, "2 + 3 - 1?")
    assert list(SCORE) == list(SCORE.keys()) == NAMES
    assert len(SCORE) == 11
    assert "error" in SCORE
    assert "errors" not in SCORE
    assert 0 not in SCORE
    assert SCORE.get("threshold") == 0.5
    assert (SCORE.get("errors"), SCORE.get("errors", 7), SCORE.get("error", 7)) == (None, 7, None)


def test_a_dictionary_of_it() -> None:
    expected = {
        "steps": ("2 + 3 = 5.", "5 - 1 = 3.", "The answer\n  is 3."),
        "step_probs": (0.9523, 0.3, 0.475),
        "overall_score": 0.3,
        "aggregation": "min",
        "weakest_step": 1,
        "weakest_prob": 0.3,
        "first_error": 1,
        "threshold": 0.5,
        "solution_idx": 4,
        "problem": "2 + 3 - 1?",
        "error": None,
    }
    assert dict(SCORE) == dict(SCORE.items()) == {**SCORE} == expected
    assert SCORE.values() == tuple(expected.values())


@pytest.mark.parametrize("score", [SCORE, FAILED])
def test_json_and_back(score: SolutionScore) -> None:
    data = json.loads(json.dumps(score.to_dict()))
    assert data == score.to_dict()
    assert list(data) == NAMES
    for name in ("steps", "step_probs"):
        assert isinstance(data[name], (list, type(None)))
        data[name] = None if data[name] is None else tuple(data[name])
    assert SolutionScore(**data) == score


def test_copies_are_equal_and_hash_alike() -> None:
    for other in (copy.deepcopy(SCORE), pickle.loads(pickle.dumps(SCORE)), dataclasses.replace(SCORE)):
        assert other == SCORE
        assert hash(other) == hash(SCORE)
    assert dataclasses.replace(SCORE, solution_idx=5) != SCORE


@pytest.mark.parametrize("name", ["step_prob", "keys", 0])
def test_a_name_that_is_none_of_its_fields(name: object) -> None:
    with pytest.raises(KeyError) as caught:
        SCORE[name]  # type: ignore[index]
    assert caught.value.args[0] == f"{name!r}; a SolutionScore has {', '.join(NAMES)}"


# Bars of 20 at 1: 0.9523 is 19.046, 0.3 is 6, 0.475 is 9.5, which rounds to the even 10.
TABLE = """\
Solution 4: min 0.300, first error (below 0.5): step 2
  step  P(correct)                       text
     1       0.952 ###################   2 + 3 = 5.
     2       0.300 ######                5 - 1 = 3.  <- weakest
     3       0.475 ##########            The answer is 3."""


def test_printed_it_is_a_table() -> None:
    assert str(SCORE) == TABLE


def test_printed_without_a_wrong_step() -> None:
    score = dataclasses.replace(SCORE, first_error=-1, threshold=0.25, aggregation="mean", overall_score=0.5757667)
    assert str(score).splitlines()[0] == "Solution 4: mean 0.576, first error (below 0.25): none"


def test_printed_where_it_could_not_be_scored() -> None:
    assert str(FAILED) == "Solution 2: not scored, solution 2 has no step; give at least one"


def test_long_steps_are_cut_to_70_characters() -> None:
    """Also those without a space, as formulas and Chinese text are."""
    texts = ("x=" + "1+" * 60, "一" * 71, "word " * 20, "一" * 70)
    expected = ["x=" + "1+" * 32 + " ...", "一" * 66 + " ...", ("word " * 14)[:66] + " ...", "一" * 70]
    assert [len(text) for text in expected] == [70] * 4
    score = dataclasses.replace(SCORE, steps=texts, step_probs=(1.0, 0.0, 0.5, 0.5), weakest_step=None)
    start = len("     1       0.952 ###################   ")
    assert [line[start:] for line in str(score).splitlines()[2:]] == expected
