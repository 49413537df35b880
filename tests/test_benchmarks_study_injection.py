"""Errors put into annotated solutions: every line and label worked by hand."""

from __future__ import annotations

import itertools
import random
import re
import sys
from fractions import Fraction
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are in the repository and not installed

from benchmarks.study import gsm8k
from benchmarks.study.injection import (
    change,
    evaluate,
    inject_error,
    parse_solution,
    show_number,
    to_number,
    tokenize,
    visible,
)

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"

QUESTION = "Natalia sold clips to 48 of her friends in April, and half as many in May. How many in all?"
ANSWER = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "She sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n"
    "A: 72"
)
# The second line stands on nothing that comes before it.
LONGER_QUESTION = "A pen costs $3 and a book $20. Ann buys 4 pens and 5 books and pays with $150. What is her change?"
LONGER_ANSWER = (
    "The pens cost 4*$3 = $<<4*3=12>>12.\n"
    "The books cost 5 x $20 = $<<5*20=100>>100.\n"
    "Together they cost $12 + $100 = $<<12+100=112>>112.\n"
    "Her change is $150 - $112 = $<<150-112=38>>38.\n"
    "A: 38"
)


def _outcomes(kind: str, question: str, answer: str, place: int) -> dict[tuple[str, ...], tuple[float, ...]]:
    """What comes out over many seeds: the labels by the lines."""
    lines = parse_solution(answer)
    assert lines is not None
    found = [change(kind, question, lines, place, random.Random(seed)) for seed in range(60)]
    return {wrong.lines: wrong.labels for wrong in found if wrong is not None}


def test_lines_are_read_without_annotations_and_with_their_calculations() -> None:
    lines = parse_solution(ANSWER)
    assert lines is not None
    assert [line.text for line in lines] == [
        "Natalia sold 48/2 = 24 clips in May.",
        "She sold 48+24 = 72 clips altogether in April and May.",
        "A: 72",
    ]
    assert [line.tokens for line in lines] == [("48", "/", "2"), ("48", "+", "24"), ()]
    assert [line.result for line in lines] == [24, 72, None]
    assert visible(" It is $<<0.2*50=10>>10. ") == "It is $10."
    assert visible("So it is 3/440 = <<3/440=0.0068") == "So it is 3/440 ="


@pytest.mark.parametrize(
    "answer",
    [
        "He gets 2*3=<<2*3=6>>6 and 1+1=<<1+1=2>>2",  # two calculations
        "He gets 2*3=<<2*3=7>>7",  # not what it says
        "He gets 2*x=<<2*x=6>>6",  # an unknown
        "He gets <<6>>6",  # no calculation
        "He gets 2/0=<<2/0=1>>1",
    ],
)
def test_a_solution_that_is_not_as_annotated_is_not_taken(answer: str) -> None:
    assert parse_solution(answer) is None


@pytest.mark.parametrize(
    ("calculation", "value"),
    [("2+3*4", 14), ("(2+3)*4", 20), ("10-4-3", 3), ("12/4/3", 1), ("-2*3", -6), (".5*3", 1.5), ("2*(1+(3-1))", 6)],
)
def test_calculations(calculation: str, value: float) -> None:
    assert evaluate(tokenize(calculation) or ()) == Fraction(value)


@pytest.mark.parametrize("calculation", ["2+", "(2+3", "2 3", "2+3)", "1/0", "1/(2-2)"])
def test_what_is_no_calculation_has_no_value(calculation: str) -> None:
    assert evaluate(tokenize(calculation) or ()) is None


def test_numbers_are_written_as_solutions_write_them() -> None:
    assert [show_number(Fraction(value)) for value in ("7", "2.5", "0.25", "1200")] == ["7", "2.5", "0.25", "1200"]
    assert show_number(Fraction(1200), commas=True) == "1,200"
    assert [show_number(Fraction(value)) for value in ("1/3", "0", "-2", "0.125", "100000000")] == [None] * 5
    assert [to_number(text) for text in ("$1,200", "2.5", "x", "", "3.")] == [1200, Fraction(5, 2), None, None, None]


def test_a_line_left_out_lets_what_it_started_from_stand_for_its_result() -> None:
    assert _outcomes("a line left out", QUESTION, ANSWER, 0) == {
        ("She sold 48+48 = 96 clips altogether in April and May.", "A: 96"): (0.0, 0.0)
    }


def test_a_line_left_out_whose_result_no_calculation_uses_is_none() -> None:
    assert _outcomes("a line left out", QUESTION, ANSWER, 1) == {}


def test_another_operator_is_carried_to_the_answer() -> None:
    before = "Natalia sold 48/2 = 24 clips in May."
    assert _outcomes("another operator", QUESTION, ANSWER, 1) == {
        (before, "She sold 48-24 = 24 clips altogether in April and May.", "A: 24"): (1.0, 0.0, 0.0),
        (before, "She sold 48*24 = 1152 clips altogether in April and May.", "A: 1152"): (1.0, 0.0, 0.0),
    }


def test_lines_that_stand_on_nothing_wrong_stay_right() -> None:
    found = _outcomes("another operator", LONGER_QUESTION, LONGER_ANSWER, 0)
    books = "The books cost 5 x $20 = $100."
    # 4 / 3 takes more than two places, and is left out.
    assert found == {
        (
            "The pens cost 4+$3 = $7.",
            books,
            "Together they cost $7 + $100 = $107.",
            "Her change is $150 - $107 = $43.",
            "A: 43",
        ): (0.0, 1.0, 0.0, 0.0, 0.0)
    }


def test_another_number_changes_one_number_and_what_follows_from_it() -> None:
    found = _outcomes("another number", LONGER_QUESTION, LONGER_ANSWER, 3)
    lines = [line.text for line in parse_solution(LONGER_ANSWER) or ()]
    assert len(found) >= 4
    for texts, labels in found.items():
        assert list(texts[:3]) == lines[:3]
        assert labels == (1.0, 1.0, 1.0, 0.0, 0.0)
        match = re.fullmatch(r"Her change is \$(\d+) - \$(\d+) = \$(\d+)\.", texts[3])
        assert match is not None
        first, second, result = map(int, match.groups())
        assert first - second == result != 38
        assert (first == 150) != (second == 112)
        assert texts[4] == f"A: {result}"
    assert ("Her change is $151 - $112 = $39.", "A: 39") in {texts[3:] for texts in found}


def test_a_multiplication_written_with_an_x_is_found_and_rewritten() -> None:
    found = _outcomes("another operator", LONGER_QUESTION, LONGER_ANSWER, 1)
    assert {texts[1] for texts in found} == {"The books cost 5 + $20 = $25.", "The books cost 5 / $20 = $0.25."}
    assert {texts[4] for texts in found} == {"A: 113", "A: 137.75"}


@pytest.mark.parametrize(
    ("question", "answer", "why"),
    [
        ("48 friends, 24 of them tall?", ANSWER, "the result stands in the problem too"),
        (
            QUESTION,
            "She sold 48/2 = <<48/2=24>>24 clips, so 24 clips.\nIn all 48+24 = <<48+24=72>>72.\nA: 72",
            "the line states its result twice",
        ),
        (
            QUESTION,
            "She sold half, <<48/2=24>>24 clips.\nIn all 48+24 = <<48+24=72>>72.\nA: 72",
            "the calculation is not to be seen",
        ),
    ],
)
def test_a_change_that_is_not_exact_is_not_made(question: str, answer: str, why: str) -> None:
    assert _outcomes("another operator", question, answer, 0) == {}, why


def test_an_error_that_does_not_reach_the_answer_is_not_made() -> None:
    answer = "First 6/2 = <<6/2=3>>3 apples.\nThen 10+10 = <<10+10=20>>20 pears.\nA: 20"
    lines = parse_solution(answer)
    assert lines is not None
    assert change("another operator", "6 and 10?", lines, 0, random.Random(0)) is None


def test_an_answer_used_without_being_seen_is_not_carried() -> None:
    answer = "He has 6/2 = <<6/2=3>>3 apples.\nThree and two are <<3+2=5>>5.\nA: 5"
    lines = parse_solution(answer)
    assert lines is not None
    assert change("another operator", "6 and two?", lines, 0, random.Random(1)) is None


def test_a_changed_number_beside_others_without_an_annotation_is_not_carried() -> None:
    answer = (
        "There were 200*.2 = <<200*.2=40>>40 tickets.\nOf those 40*.8 = 32 win.\n"
        "They win 32*5 = <<32*5=160>>160 and lose 40.\nA: 160"
    )
    assert _outcomes("another operator", "200 tickets?", answer, 0) == {}


def test_the_same_seed_makes_the_same_error_and_others_others() -> None:
    lines = parse_solution(LONGER_ANSWER)
    assert lines is not None
    found = [inject_error(LONGER_QUESTION, lines, random.Random(seed)) for seed in (*range(20), *range(20))]
    assert found[:20] == found[20:]
    assert len({wrong.kind for wrong in found if wrong is not None}) == 3


def _calculations(line: str) -> list[tuple[str, str]]:
    """Plain calculations in a text, each with the number behind its equals sign."""
    plain = re.sub(r"[$,]", "", line).replace("×", "*")
    plain = re.sub(r"(?<=[\d.]) ?x ?(?=[\d.(])", "*", plain)
    found = []
    for left, right in itertools.pairwise(plain.split("=")):
        run = re.search(r"(?<![\w%])[\d.+*/() -]*$", left)
        stated = re.match(r" ?(\d+(?:\.\d+)?)(?![\d%]|\s*[*/+-])", right)
        if run is not None and stated is not None and re.match(r"\s*[\d.(]", run[0]):
            found.append((run[0].strip(), stated[1]))
    return found


@pytest.mark.skipif(not GSM8K.exists(), reason=f"GSM8K is not in {GSM8K}")
def test_on_real_solutions_every_changed_line_computes_what_it_says() -> None:
    checked = by_label = 0
    problems = gsm8k.read_train_problems(GSM8K / "train.jsonl")
    assert len(problems) == 7461
    for number, problem in enumerate(problems[:1500]):
        pair = gsm8k.right_and_wrong(problem, random.Random(number))
        if len(pair) == 1:
            continue
        (_, right, _), (kind, wrong, labels) = pair
        assert len(labels) == len(wrong) == len(right) - (kind == "a line left out")
        assert labels[-1] == 0.0
        assert wrong[-1] != right[-1]
        for line, label in zip(wrong, labels, strict=True):
            by_label += 1
            assert (line in right) == (label == 1.0)
            for calculation, stated in _calculations(line) if label == 0.0 else ():
                try:
                    value = eval(calculation)
                except (SyntaxError, TypeError):
                    continue
                checked += 1
                assert value == pytest.approx(float(stated), abs=0.006), line
    assert checked > 1000
    assert by_label > 3000
