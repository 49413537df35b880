r"""Final answers: where they are found, which spellings are one, and the two ways to compare them."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import pytest

from trainer.answers import (
    answers_equal,
    describe_comparison,
    extract_answer,
    group_answers,
    normalize_answer,
    resolve_comparison,
)

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "example_model_solutions.jsonl"


@pytest.fixture
def without_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"First \boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"half-open \boxed{\left\{1, 2)}", r"\left\{1, 2)"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{3}, and the rest is cut off: \boxed{\frac{1}", "3"),
        (r"\boxed{7} and an empty \boxed{ }", "7"),
        (r"The answer is 8, that is \boxed{9}.", "9"),
        ("2 + 3 = 5\n#### 1,005\n", "1,005"),
        ("#### 4\nThe answer is 5.", "4"),
        ("The answer is 1. No, the answer is 18 dollars.", "18 dollars"),
        ("The answer is 3.5. I hope it is correct.", "3.5"),
        ("The answer is: $x$. I hope it is correct.", "$x$"),
        ("**Final answer:** Tuesday", "Tuesday"),
        ("The answer is:\n\n42", "42"),
        ("(so the answer is 12)", "12"),
        ("The answer is (B).", "(B)"),
        ("16 - 3 = 13", "13"),
        ("16-3", "3"),
        ("so it is -3", "-3"),
        ("A: $1,234.50", "$1,234.50"),
        ("there are 18, 19, and 20.", "20"),
        (r"which is \frac{3}{4}.", r"\frac{3}{4}"),
        ("which is 3/4.", "3/4"),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_finds_the_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_an_answer_is_looked_for_in_text_only() -> None:
    with pytest.raises(TypeError, match="must be a string, got list"):
        extract_answer(["5"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("normalized", "spellings"),
    [
        ("18", ["18", " 18. ", "18.0", "+18", "018", "$18$", r"\$18", "$18", r"\(18\)", r"\boxed{18}", "**18**"]),
        ("18", ["18 dollars", r"18\text{ cm}", r"18 \text{ cm}^2", "18 miles per hour", "x = 18", r"18^\circ", "18°"]),
        ("1200", ["1,200", "$1,200.00", r"\$1{,}200"]),
        ("0", ["0", "-0", "0.00", "-0.0"]),
        ("-0.5", ["-.5", "-0.50", "−0.5"]),
        (r"\frac{1}{2}", ["1/2", r"\frac12", r"\dfrac{1}{2}", r"\tfrac 1 2"]),
        (r"\sqrt{2}", [r"\sqrt2", r"\sqrt{2}", "sqrt(2)"]),
        (r"(1,200)", ["(1,200)", r"\left( 1, 200 \right)", r"(1,\! 200)"]),
        ("50", ["50", "50%", r"50\%"]),
        ("tuesday", ["Tuesday", r"\text{Tuesday}", "tuesday."]),
        ("B", ["B", "(B)", r"\text{(B)}"]),
        ("3 million", ["3 million", r"3\text{ million}"]),
        ("", ["", " ", "$", "."]),
    ],
)
def test_spellings_of_one_answer(normalized: str, spellings: list[str]) -> None:
    assert {spelling: normalize_answer(spelling) for spelling in spellings} == dict.fromkeys(spellings, normalized)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("10 am", "10 pm"),
        ("3 million", "3 thousand"),
        ("3 k", "3"),
        ("2 sin x", "2"),
        ("a", "A"),
        ("12", "1,2"),
        ("(1,200)", "1200"),
        ("-5", "5"),
        ("Tuesday", "Thursday"),
    ],
)
def test_answers_that_stay_apart(first: str, second: str) -> None:
    assert not answers_equal(first, second, comparison="string")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("1/2", "0.5"),
        ("50%", "0.5"),
        ("100%", "1"),
        ("(x+1)^2", "x^2+2x+1"),
        (r"3\frac{1}{2}", "3.5"),
        (r"\{1, 2\}", r"\{2, 1\}"),
        (r"\frac{2}{\sqrt{2}}", "sqrt(2)"),
        ("5 pi", r"\pi \cdot 5"),
    ],
)
def test_math_verify_sees_what_strings_do_not(first: str, second: str) -> None:
    pytest.importorskip("math_verify", reason="needs the extra math")
    assert answers_equal(first, second)
    assert answers_equal(second, first, comparison="math-verify")
    assert not answers_equal(first, second, comparison="string")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        # As products of letters these would be equal.
        ("silent", "listen"),
        ("no", "on"),
        (r"\text{dog}", "god"),
        ("3", "-3"),
        ("(1,2)", "(2,1)"),
        ("100000000000000000001", "100000000000000000002"),
        (r"9^{9^{9^9}}", "5"),
    ],
)
def test_math_verify_is_not_led_astray(first: str, second: str) -> None:
    pytest.importorskip("math_verify", reason="needs the extra math")
    assert not answers_equal(first, second, comparison="math-verify")


@pytest.mark.parametrize("comparison", ["math-verify", "string"])
def test_no_answer_equals_nothing(comparison: str) -> None:
    if comparison == "math-verify":
        pytest.importorskip("math_verify", reason="needs the extra math")
    assert not answers_equal("5", None, comparison=comparison)  # type: ignore[arg-type]
    assert not answers_equal("$", ".", comparison=comparison)  # type: ignore[arg-type]
    assert not answers_equal("{", "5", comparison=comparison)  # type: ignore[arg-type]


def test_groups_are_numbered_as_they_are_seen() -> None:
    answers = ["7", "1/2", None, "7.0", "$", "0.5", "50%", "50", r"\frac12"]
    # By form, 50 and 50% are one, and 1/2 and 0.5 are two.
    assert group_answers(answers, comparison="string") == [0, 1, None, 0, None, 2, 3, 3, 1]
    pytest.importorskip("math_verify", reason="needs the extra math")
    # 50% is first compared with 7, then with 1/2, which it equals; 50 equals neither.
    assert group_answers(answers) == [0, 1, None, 0, None, 1, 1, 2, 1]


def test_either_answer_may_be_the_reference_in_groups() -> None:
    pytest.importorskip("math_verify", reason="needs the extra math")
    # math-verify takes an interval for the inequality, but not the inequality for the interval.
    assert answers_equal("1 < x < 2", "(1, 2)") is not answers_equal("(1, 2)", "1 < x < 2")
    assert group_answers(["(1, 2)", "1 < x < 2"]) == group_answers(["1 < x < 2", "(1, 2)"]) == [0, 0]


def test_groups_of_nothing() -> None:
    assert group_answers([]) == []


def test_compares_in_another_thread() -> None:
    """Where math-verify cannot set its timeouts, which are signals, it does without."""
    pytest.importorskip("math_verify", reason="needs the extra math")
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(answers_equal("3/8", "0.375", comparison="math-verify")))
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.usefixtures("without_math_verify")
def test_without_math_verify_strings_are_compared_and_it_says_so() -> None:
    assert resolve_comparison("auto") == "string"
    assert not answers_equal("1/2", "0.5")
    assert answers_equal("1/2", r"\frac12")
    assert group_answers(["1/2", "0.5", r"\dfrac12"]) == [0, 1, 0]
    assert describe_comparison("auto") == (
        'by normalized strings only, since math-verify is not installed (run `pip install "modeling-prm[math]"`)'
    )
    with pytest.raises(ImportError, match=r"modeling-prm\[math\]"):
        answers_equal("1", "1", comparison="math-verify")


def test_says_which_comparison_is_in_use() -> None:
    assert describe_comparison("string") == "by normalized strings"
    with pytest.raises(ValueError, match="no comparison 'exact'; choose one of auto, math-verify, string"):
        resolve_comparison("exact")  # type: ignore[arg-type]
    pytest.importorskip("math_verify", reason="needs the extra math")
    assert resolve_comparison("auto") == "math-verify"
    assert describe_comparison("auto").startswith("by math-verify 0.")


@pytest.mark.skipif(not GSM8K.exists(), reason="needs GSM8K's example solutions")
@pytest.mark.parametrize("comparison", ["math-verify", "string"])
def test_agrees_with_the_authors_of_gsm8k(comparison: str) -> None:
    """The solutions of four models to 1,319 problems, each marked by the data set's authors."""
    if comparison == "math-verify":
        pytest.importorskip("math_verify", reason="needs the extra math")
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    ours, theirs = [], []
    for row in rows:
        reference = extract_answer(row["ground_truth"])
        assert reference is not None
        for solution in (value for value in row.values() if isinstance(value, dict)):
            answer = extract_answer(solution["solution"])
            ours.append(answers_equal(reference, answer, comparison=comparison))  # type: ignore[arg-type]
            theirs.append(solution["is_correct"])
    assert len(theirs) == 4 * 1319
    assert ours == theirs
