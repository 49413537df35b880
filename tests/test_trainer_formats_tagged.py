"""Formats of one text with tags, and of conversations: rows in their exact schemas, dirty rows, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.formats import READERS, RowLeftOut
from trainer.records import StepRecord

PROBLEM = "Janet has 3 eggs and eats 1. How many are left?"
INPUT = f"{PROBLEM} Step 1: She has 3 - 1 = 2 eggs. ки\nStep 2: Times -1. ки\nStep 3: The answer is: 2 ки"
SHEPHERD = {
    "input": INPUT,
    "label": f"{PROBLEM} Step 1: She has 3 - 1 = 2 eggs. +\nStep 2: Times -1. -\nStep 3: The answer is: 2 -",
    "task": "GSM8K",
}
STEPS = ("She has 3 - 1 = 2 eggs.", "Times -1.", "The answer is: 2")
RLHFLOW = {
    "conversations": [
        {"role": "user", "content": f"{PROBLEM} Step 1: She has 3 - 1 = 2 eggs."},
        {"role": "assistant", "content": "+"},
        {"role": "user", "content": "Step 2: Times -1."},
        {"role": "assistant", "content": "-"},
        {"role": "user", "content": "Step 3: The answer is: 2"},
        {"role": "assistant", "content": "-"},
    ]
}
EXPECTED = [StepRecord(problem=PROBLEM, steps=STEPS, labels=(1.0, 0.0, 0.0))]


def shepherd(text: str, marked: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
    (record,) = READERS["math_shepherd"].read({"input": text, "label": marked, "task": "MATH"})
    assert record.problem == "P?"
    return record.steps, record.labels


def test_the_same_solution_in_every_schema() -> None:
    assert READERS["math_shepherd"].read(SHEPHERD) == EXPECTED
    assert READERS["openrlhf"].read({"input": INPUT, "value": ["+", "-", "-"]}) == EXPECTED
    assert READERS["er_prm"].read({"text": INPUT, "value": [1.0, 0.0, 0.0]}) == EXPECTED
    assert READERS["rlhflow"].read(RLHFLOW) == EXPECTED


def test_values_may_be_soft() -> None:
    soft = READERS["openrlhf"].read({"input": INPUT, "value": ["0.75", 0.5, None]})[0]
    assert soft.labels == (0.75, 0.5, -100.0)
    assert READERS["er_prm"].read({"text": INPUT, "value": [0.9, 0.25, 0.125]})[0].labels == (0.9, 0.25, 0.125)


def test_steps_without_a_tag_have_no_label() -> None:
    assert shepherd("P? Step 1: a\nStep 2: b ки\nStep 3: c", "P? Step 1: a\nStep 2: b -\nStep 3: c") == (
        ("a", "b", "c"),
        (-100.0, 0.0, -100.0),
    )


def test_step_numbers_that_are_not_in_order_stay() -> None:
    text = "P? Step 1: a ки\nStep 1: b ки"
    assert shepherd(text, text.replace("ки", "+")) == (("Step 1: a", "Step 1: b"), (1.0, 1.0))


def test_the_letters_of_the_tag_inside_a_word_are_text() -> None:
    assert shepherd("P? Step 1: носки + 1 ки", "P? Step 1: носки + 1 -") == (("носки + 1",), (0.0,))


@pytest.mark.parametrize(
    ("text", "marked", "message"),
    [
        ("P ки? Step 1: a ки", "P +? Step 1: a +", "cannot be told apart: there is no 'Step 1:' before the first tag"),
        ("P Step 1: ? Step 1: a ки", "P Step 1: ? Step 1: a +", "'Step 1:' stands several times before the first tag"),
        ("P? Step 1: a", "P? Step 1: a", "input has no step: there is no tag"),
        ("P? Step 1: a ки", "P? Step 1: a *", "for each tag: it differs before tag 1"),
        ("P? Step 1: a ки", "P? Step 1: b +", "for each tag: it differs before tag 1"),
        ("P? Step 1: a ки", "P? Step 1: a", "for each tag: it differs before tag 1"),
        ("P? Step 1: a ки", "P? Step 1: a + b", "for each tag: it differs after the last tag"),
        ("P? Step 1: a ки\nки", "P? Step 1: a +\n+", "step must not be empty: got '' at step 2"),
        (" Step 1: a ки", " Step 1: a +", "problem must not be empty"),
    ],
)
def test_dirty_math_shepherd_rows_are_refused(text: str, marked: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        READERS["math_shepherd"].read({"input": text, "label": marked})


@pytest.mark.parametrize("format", ["openrlhf", "er_prm"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([1.0], ValueError, "as many labels as tags are needed: got 1 labels for 3 tags"),
        ([1.0, 0.0, 1.5], ValueError, r"labels must be in \[0, 1\] or -100: got 1.5 at step 3"),
        (["+", "-", "good"], ValueError, r"value must be \+ or - or a number: got 'good'"),
        ([True, False, True], TypeError, "labels must be ints or floats: got True"),
        ("+--", TypeError, "value must be a list: got str"),
    ],
)
def test_bad_values(format: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        READERS[format].read({"input": INPUT, "text": INPUT, "value": value})


def turns(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"conversations": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}


def test_rlhflow_without_a_mark_for_the_first_step() -> None:
    read = READERS["rlhflow"].read
    # Nothing says where the problem ends, so its turn is the problem and its sign labels nothing.
    assert read(turns("P? First.", "+", "Then.", "-")) == [
        StepRecord(problem="P? First.", steps=("Then.",), labels=(0.0,))
    ]
    with pytest.raises(RowLeftOut, match="the only turn does not say"):
        read(turns("P? First.", "+"))


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        (turns("P Step 1: a"), ValueError, "must be pairs of user and assistant: got 1 turns"),
        ({"conversations": []}, ValueError, "must be pairs of user and assistant: got 0 turns"),
        (turns("P Step 1: a", "maybe"), ValueError, r"assistant's turn must be \+ or -: got 'maybe' in pair 1"),
        (turns("P Step 1: Step 1: a", "+"), ValueError, "'Step 1:' stands several times in the first turn"),
        (turns("Step 1: a", "+"), ValueError, "problem must not be empty"),
        (
            {"conversations": [{"role": "assistant", "content": "+"}, {"role": "user", "content": "P Step 1: a"}]},
            ValueError,
            "got 'assistant' and 'user' in pair 1",
        ),
        ({"conversations": [{"role": "user"}]}, ValueError, "turn lacks a field: content"),
        ({"conversations": ["P"]}, TypeError, "turn must be an object: got str"),
        ({"conversations": "P"}, TypeError, "conversations must be a list: got str"),
    ],
)
def test_rlhflow_bad_rows(row: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        READERS["rlhflow"].read(row)
