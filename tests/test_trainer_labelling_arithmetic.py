"""Equations in the text of a step: which are judged, and which are false."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from trainer.labelling_arithmetic import arithmetic_labels, count_equations, false_equations

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

# Each with the number of its equations.
RIGHT = [
    ("Natalia sold 48/2 = 24 clips in May.", 1),
    ("Natalia sold 48/2 = <<48/2=24>>24 clips in May.", 2),
    ("10/3 = 3.33", 1),
    ("20/3 = 6.67", 1),
    ("20/3 = 6.66, cut off", 1),
    ("3.33 * 3 = 10", 1),
    ("7/2 ≈ 4", 1),
    ("That is about 7/2 = 4 boxes.", 1),
    ("5 apples + 3 apples = 8 apples", 1),
    ("She makes 9 * 2 = $18 every day.", 1),
    ("0.2 x 50 = 10", 1),
    ("1,200 + 300 = 1,500", 1),
    ("1{,}200 + 300 = 1500", 1),
    ("20% of 50 = 10", 1),
    ("20 percent of 50 = 10", 1),
    ("50/200 = 25%", 1),
    ("50/200 * 100 = 25%", 1),
    ("168/20% = 840", 1),
    ("3 * 4 = 12 + 5 = 17", 2),
    ("8 + 4 = 12 = 6 * 2", 2),
    ("2(3 + 4) = 14", 1),
    ("(1 + 2)(3 + 4) = 21", 1),
    ("1 1/2 + 1 = 2.5", 1),
    ("17/3 = 5 and 2/3", 1),
    ("2^3 = 8 and 2**3 = 8", 2),
    (r"\frac{1}{2} + \frac{1}{2} = 1", 1),
    (r"$5476/3 = 1825\frac{1}{3}$", 1),
    (r"\(2 \times 3 = 6\)", 1),
    ("7 × 8 = 56 and 56 ÷ 8 = 7", 2),
    ("- 5 + 3 = 8", 1),
    ("2. 5 + 3 = 8", 1),
    ("Step 1 - 5 + 3 = 8", 1),
    ("**5 + 3 = 8**", 1),
    ("$5/hour * 3 hours = $15", 1),
    ("5 - -3 = 8", 1),
    ("-14 + 1258 = 1244", 1),
    ("3 - 10 = -7", 1),
    ("(5 + 3 = 8)", 1),
    ("6/ 1/30 = 180", 1),
    ("1/2 of 50 = 25", 1),
]
WRONG = [
    ("3 + 4 = 8", 7.0, 8.0),
    ("48/2 = <<48/2=23>>24", 24.0, 23.0),
    ("48/2 = <<48/2=24>>23", 24.0, 23.0),
    ("10/3 = 3.34", 10 / 3, 3.34),
    ("10/3 = 3", 10 / 3, 3.0),
    ("5 apples + 3 apples = 9 apples", 8.0, 9.0),
    ("20% of 50 = 11", 10.0, 11.0),
    ("1,200 + 300 = 1,600", 1500.0, 1600.0),
    ("3 * 4 = 12 + 5 = 18", 17.0, 18.0),
    ("1 + 1 = 2 = 3 + 1", 2.0, 4.0),
    ("2(3 + 4) = 15", 14.0, 15.0),
    ("9 * 9 = 80.5", 81.0, 80.5),
    ("1 1/2 + 1 = 2", 2.5, 2.0),
    ("That is about 7/2 = 5 boxes.", 3.5, 5.0),
    ("-5 - 3 = 8", -8.0, 8.0),
    ("5 - 8 = -2", -3.0, -2.0),
]
NOT_JUDGED = [
    "x = 5",
    "x + 3 = 8",
    "2x + 3 = 7",
    "3x-5=16",
    "2g + 80 - 4g = 70",
    "f(2) + 1 = 9",
    "5 squared + 3 = 28",
    "2 dozen + 1 = 25",
    "3 feet = 36 inches",
    "Area of 4 bedrooms = 121 * 4",
    "sqrt(16) + 1 = 5",
    "17 mod 5 + 3 = 5",
    "5! + 1 = 121",
    "2:3 = 4:6",
    "3 + 4 < 8",
    "3 + 4 != 8",
    "Is 3 + 4 = 8?",
    "3 + 4\n= 8",
    "ar = 2 and ar^3 = 6",
    "if x = 3 and y = 7 then m = 3 * 7",
    "9**9**9**9 = 1",
    "10^100000 = 4",
    "1/0 = 5",
    "0^-1 = 5",
    "",
    "====",
]


@pytest.mark.parametrize(("text", "count"), RIGHT)
def test_what_holds_is_judged_and_not_marked(text: str, count: int) -> None:
    assert false_equations(text) == []
    assert count_equations(text) == count


@pytest.mark.parametrize(("text", "left", "right"), WRONG)
def test_what_does_not_hold_is_marked_with_both_values(text: str, left: float, right: float) -> None:
    (fault,) = false_equations(text)
    assert (fault.left, fault.right) == (pytest.approx(left), pytest.approx(right))


@pytest.mark.parametrize("text", NOT_JUDGED)
def test_what_is_not_sure_to_be_an_equation_is_left_alone(text: str) -> None:
    assert count_equations(text) == 0


def test_a_step_takes_the_label_of_its_equations() -> None:
    steps = ["She buys apples.", "3 + 4 = 7", "3 + 4 = 7 and 2 + 2 = 5"]
    assert arithmetic_labels(steps) == [1.0, 1.0, 0.0]
    assert arithmetic_labels(steps, unchecked=-100.0) == [-100.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "text",
    [
        "(" * 2400 + "1 + 1" + ")" * 2400 + " = 2",
        "1+" * 2400 + "1 = 2",
        "1" * 4900 + " + 1 = 2",
        "1/" * 2400 + "1 = 2",
        "1 and " * 800 + "= 2",
        "= " * 2400,
        "\\frac{" * 800,
        "((((2^64)^64)^64)^64) = 1",
        "1 + 1 = 2 " * 100_000,
    ],
)
def test_no_text_takes_long_or_fails(text: str) -> None:
    start = time.process_time()
    count_equations(text)
    assert time.process_time() - start < 5.0


def test_nothing_is_run() -> None:
    assert count_equations("__import__('os').system('x') + 1 = 2") == 0
    assert count_equations("(lambda: 3)() + 1 = 2") == 0


def test_few_steps_of_gsm8k_are_marked() -> None:
    """Its authors' own solutions; most of those marked hold an arithmetic slip or sloppy notation."""
    file = SHARED / "gsm8k" / "test.jsonl"
    if not file.exists():
        pytest.skip("../shared/data/gsm8k is absent")
    answers = [json.loads(line)["answer"] for line in file.read_text(encoding="utf-8").splitlines()]
    steps = [step for answer in answers for step in answer.split("\n")[:-1]]
    labels = Counter(arithmetic_labels(steps, unchecked=-100.0))
    assert len(steps) > 4_000
    assert labels[-100.0] < 0.1 * len(steps)
    assert labels[0.0] < 0.002 * len(steps)
