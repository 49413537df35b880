"""StepRecord: what it takes, what it refuses and what it says then."""

import dataclasses
from typing import Any

import pytest

from modeling_prm.step_loss import IGNORED_LABEL
from trainer.records import StepRecord


def make(**changes: Any) -> StepRecord:
    fields: dict[str, Any] = {"problem": "1 + 1?", "steps": ("1 + 1 = 2.", "So 2."), "labels": (1.0, 0.0)}
    return StepRecord(**(fields | changes))


def test_record_keeps_its_values_and_gives_lists() -> None:
    record = make(labels=(0.25, IGNORED_LABEL))
    assert record.to_dict() == {
        "problem": "1 + 1?",
        "steps": ["1 + 1 = 2.", "So 2."],
        "labels": [0.25, -100.0],
    }


def test_to_dict_gives_floats_where_ints_were_given() -> None:
    labels = make(labels=(1, 0)).to_dict()["labels"]
    assert [type(label) for label in labels] == [float, float]


def test_record_is_frozen_keyword_only_and_hashable() -> None:
    record = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.problem = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        StepRecord("1 + 1?", ("2",), (1.0,))  # type: ignore[call-arg]
    assert hash(record) == hash(make())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem": ""}, "problem must not be empty: got ''"),
        ({"problem": " \n"}, "problem must not be empty"),
        ({"steps": (), "labels": ()}, "at least one step: got none"),
        ({"steps": ("a", "")}, "step must not be empty: got '' at step 2 of 2"),
        ({"steps": ("\t ", "b")}, r"step must not be empty: got '\\t ' at step 1 of 2"),
        ({"labels": (1.0,)}, "got 1 labels for 2 steps"),
        ({"labels": (1.0, 0.0, 0.0)}, "got 3 labels for 2 steps"),
        ({"labels": (1.0, -1.0)}, r"labels must be in \[0, 1\] or -100: got -1.0 at step 2 of 2"),
        ({"labels": (1.5, 0.0)}, "got 1.5 at step 1 of 2"),
        ({"labels": (float("nan"), 0.0)}, "got nan at step 1 of 2"),
        ({"labels": (float("inf"), 0.0)}, "got inf at step 1 of 2"),
        ({"labels": (10**400, 0.0)}, "got 1000"),
        ({"problem": "a\0b"}, "problem must not hold NUL bytes: got one at character 1"),
        ({"steps": ("a", "\0")}, "step must not hold NUL bytes: got one at character 0 at step 2"),
        ({"steps": ("a", "b\ud800")}, "step must be valid Unicode: got a lone surrogate at character 1"),
    ],
)
def test_bad_values_are_value_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem": None}, "problem must be a string: got NoneType"),
        ({"steps": ["a", "b"]}, "steps must be a tuple of strings: got list"),
        ({"steps": "ab"}, "steps must be a tuple of strings: got str"),
        ({"steps": ("a", 2)}, "step must be a string: got int at step 2 of 2"),
        ({"labels": [1.0, 0.0]}, "labels must be a tuple of numbers: got list"),
        ({"labels": (1.0, True)}, r"labels must be ints or floats: got True \(bool\) at step 2"),
        ({"labels": ("1", 0.0)}, r"got '1' \(str\) at step 1"),
        ({"labels": (None, 0.0)}, r"got None \(NoneType\) at step 1"),
    ],
)
def test_bad_types_are_type_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make(**changes)
