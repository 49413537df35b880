"""The file of problems with candidate solutions: each form that a line can have, and how a bad one is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.candidates import read_problems


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(*rows: Any, name: str = "candidates.jsonl") -> str:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return str(tmp_path / name)

    return write


def test_reads_each_form_of_a_solution(write: Callable[..., str]) -> None:
    path = write(
        {
            "problem": "p",
            "answer": "6 * 3 = 18\n#### 18",
            "solutions": [
                "First.\n\nThe answer is 18.",
                ["First.", "Second: 17."],
                {"text": "It is 5."},
                {"steps": ["It is 5."], "answer": 18.0},
                {"steps": ["It is 5."], "answer": None},
                {"text": "Nothing."},
            ],
        },
        "",
        {"problem": "q", "answer": r"so \boxed{\frac12}", "solutions": ["x"], "another column": 1},
    )
    first, second = read_problems(path)
    assert (first.answer, second.answer) == ("18", r"\frac12")
    assert [candidate.answer for candidate in first.candidates] == ["18", "17", "5", "18.0", "5", None]
    assert [candidate.solution for candidate in first.candidates[:3]] == [
        "First.\n\nThe answer is 18.",
        ["First.", "Second: 17."],
        "It is 5.",
    ]
    assert first.place == f"{path}:1"
    assert second.place == f"{path}:3"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "line is not JSON"),
        ([], "a line must be an object with problem, answer and solutions, got list"),
        ({"problem": "p", "solutions": ["x"]}, "answer missing; a line needs problem, answer and solutions"),
        ({"problem": " ", "answer": "1", "solutions": ["x"]}, "problem must be a text that is not empty"),
        ({"problem": "p", "answer": "$", "solutions": ["x"]}, "answer must be the final answer, got '$'"),
        ({"problem": "p", "answer": True, "solutions": ["x"]}, "answer must be a text or a number, got True"),
        ({"problem": "p", "answer": "1", "solutions": "x"}, "solutions must be a list with at least one solution"),
        ({"problem": "p", "answer": "1", "solutions": []}, "solutions must be a list with at least one solution"),
        ({"problem": "p", "answer": "1", "solutions": ["x", {}]}, "solution 2 must be a text, a list of steps, or"),
        ({"problem": "p", "answer": "1", "solutions": [{"text": "x", "steps": ["x"]}]}, "either text or steps"),
        ({"problem": "p", "answer": "1", "solutions": [{"text": 3}]}, "solution 1: text must be a string, got int"),
        ({"problem": "p", "answer": "1", "solutions": [["x", 3]]}, "solution 1: steps must be a list of strings"),
        ({"problem": "p", "answer": "1", "solutions": [7]}, "solution 1: steps must be a list of strings, got 7"),
        (
            {"problem": "p", "answer": "1", "solutions": [{"steps": ["x"], "answer": ["1"]}]},
            "solution 1: answer must be a text or a number",
        ),
        (
            {"problem": "p", "answer": "1", "solutions": [{"steps": ["x"], "step_probs": [0.1, 0.2]}]},
            "solution 1: step_probs must be a list with one probability for each entry of steps",
        ),
        (
            {"problem": "p", "answer": "1", "solutions": [{"text": "x", "step_probs": [0.1]}]},
            "solution 1: step_probs must be a list with one probability for each entry of steps",
        ),
        (
            {"problem": "p", "answer": "1", "solutions": [{"steps": ["x"], "step_probs": [1.5]}]},
            "solution 1: step_probs: step 1 of solution 0 has probability 1.5",
        ),
        ({"problem": "First?", "answer": "1", "solutions": ["x"]}, "put all its solutions in one line"),
        ('{"problem": "\\ud800", "answer": "1", "solutions": ["x"]}', "half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(write: Callable[..., str], row: Any, reason: str) -> None:
    path = write({"problem": "First?", "answer": "1", "solutions": ["x"]}, row)
    with pytest.raises(ValueError, match=r".") as raised:
        read_problems(path)
    assert str(raised.value).startswith(f"{path}:2: ")
    assert reason in str(raised.value)


def test_a_file_without_a_problem(write: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match="holds no problem"):
        read_problems(write(""))
