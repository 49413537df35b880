"""Solutions to label, from rows of each form, and what is wrong with a row by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.labelling_items import NO_STEP, LabelItem, read_items


def written(folder: Path, *rows: Any) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def test_problems_with_several_solutions(tmp_path: Path) -> None:
    solutions = ["2 + 3 = 5.\n\nSo \\boxed{5}.", ["2 + 3 = 6."], {"text": "One step", "answer": 7}, " "]
    found = read_items(written(tmp_path, {"problem": "2 + 3?", "answer": "#### 5", "solutions": solutions}))
    assert found.items == [
        LabelItem(problem="2 + 3?", steps=("2 + 3 = 5.", "So \\boxed{5}."), answer="5", solution_answer="5"),
        LabelItem(problem="2 + 3?", steps=("2 + 3 = 6.",), answer="5", solution_answer="6"),
        LabelItem(problem="2 + 3?", steps=("One step",), answer="5", solution_answer="7"),
    ]
    assert found.left_out == {NO_STEP: 1}


def test_one_solution_a_row(tmp_path: Path) -> None:
    rows = [
        {"problem": "?", "answer": 5, "solution": "a 1\nb 2"},
        {"problem": "?", "answer": "5", "steps": ["a 1", "b 2"], "labels": [1, -1], "solution_answer": 9},
        {"problem": "?", "steps": ["a 1"], "labels": [True]},
    ]
    assert read_items(written(tmp_path, *rows), step_style="newlines").items == [
        LabelItem(problem="?", steps=("a 1", "b 2"), answer="5", solution_answer="2"),
        LabelItem(problem="?", steps=("a 1", "b 2"), answer="5", solution_answer="9", labels=(1.0, 0.0)),
        LabelItem(problem="?", steps=("a 1",), answer=None, solution_answer="1", labels=(1.0,)),
    ]


def test_gsm8k_as_it_is(tmp_path: Path) -> None:
    row = {"question": "How many?", "answer": "He has 2 + 3 = <<2+3=5>>5.\nTwice 10.\n#### 1,000"}
    assert read_items(written(tmp_path, row)).items == [
        LabelItem(
            problem="How many?",
            steps=("He has 2 + 3 = <<2+3=5>>5.", "Twice 10.", "#### 1,000"),
            answer="1,000",
            solution_answer="1,000",
        )
    ]


def test_labelled_formats(tmp_path: Path) -> None:
    row = {"prompt": "?", "completions": ["a 1", "b 2"], "labels": [True, False]}
    assert read_items(written(tmp_path, row)).items == [
        LabelItem(problem="?", steps=("a 1", "b 2"), answer=None, solution_answer="2", labels=(1.0, 0.0))
    ]


def test_csv_files_hold_lists_as_json_text_and_texts_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('problem,answer,solution\n?,5,"a 1\n\nb 5"\n', encoding="utf-8")
    expected = LabelItem(problem="?", steps=("a 1", "b 5"), answer="5", solution_answer="5")
    assert read_items(file).items == [expected]
    file.write_text(
        'problem,answer,steps,labels\n?,5,"[""a 1"", ""b 5""]",\n?,5,"[""a""]",[-1]\n?,5,[a,\n', encoding="utf-8"
    )
    with pytest.raises(ValueError, match=r"rows.csv:4: steps must be a list as JSON text in a CSV file: Expecting"):
        read_items(file)
    found = read_items(file, on_bad_row="skip")
    assert found.items == [
        expected,
        LabelItem(problem="?", steps=("a",), answer="5", solution_answer=None, labels=(0.0,)),
    ]
    assert found.left_out.total() == 1


def test_a_gsm8k_answer_without_its_mark_is_refused(tmp_path: Path) -> None:
    rows = [{"question": "?", "answer": "2 + 3 = 5\n#### 5"}, {"question": "?", "answer": "5 apples in 7 days"}]
    with pytest.raises(ValueError, match=r"rows.jsonl:2: answer must end in #### and the final answer"):
        read_items(written(tmp_path, *rows))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"rows.jsonl:2: line is not JSON"),
        ("[]", r"rows.jsonl:2: a row must be an object, got list"),
        ({"problem": "?", "answer": "5"}, "must have either steps"),
        ({"problem": "?", "answer": "5", "steps": ["a"], "solution": "a"}, "must have either steps"),
        ({"problem": 3, "answer": "5", "solution": "a"}, "problem must be a text"),
        ({"problem": "?", "answer": " ", "solution": "a"}, "answer must be the final answer"),
        ({"problem": "?", "answer": True, "solution": "a"}, "answer must be a text or a number"),
        ({"problem": "?", "answer": "5", "solution": 1}, "solution must be a text"),
        ({"problem": "?", "answer": "5", "steps": "a"}, "steps must be a list of texts"),
        ({"problem": "?", "answer": "5", "steps": ["a", " "]}, "step must not be empty"),
        ({"problem": "?", "answer": "5", "steps": ["a"], "labels": [1, 1]}, "as many labels as steps"),
        ({"problem": "a\0", "answer": "5", "solution": "a"}, "NUL"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, message: str) -> None:
    file = written(tmp_path, {"problem": "?", "answer": "5", "solution": "a"}, row)
    with pytest.raises(ValueError, match=message) as caught:
        read_items(file)
    assert "rows.jsonl:2" in str(caught.value)
    found = read_items(file, on_bad_row="skip")
    assert len(found.items) == 1
    assert found.left_out.total() == 1


def test_a_bad_first_row_does_not_decide_what_the_file_is(tmp_path: Path) -> None:
    good = {"problem": "?", "answer": "5", "steps": ["a 5"]}
    file = written(tmp_path, {"id": 1}, good)
    with pytest.raises(ValueError, match=r"rows.jsonl:1: a row must have either steps"):
        read_items(file)
    found = read_items(file, on_bad_row="skip")
    assert found.items == [LabelItem(problem="?", steps=("a 5",), answer="5", solution_answer="5")]
    assert found.left_out.total() == 1


def test_bad_rows_of_labelled_formats_may_be_left_out_too(tmp_path: Path) -> None:
    rows = [{"prompt": "?", "completions": ["a"], "labels": labels} for labels in ([True], [2.5])]
    with pytest.raises(ValueError, match=r"rows.jsonl:2"):
        read_items(written(tmp_path, *rows))
    found = read_items(written(tmp_path, *rows), on_bad_row="skip")
    assert (len(found.items), found.left_out.total()) == (1, 1)


def test_nothing_to_label_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no solution with a step"):
        read_items(written(tmp_path, {"problem": "?", "answer": "5", "solution": " "}))
    with pytest.raises(FileNotFoundError):
        read_items(tmp_path / "absent.jsonl")
