"""Formats that say where the first error is: rows in their exact schemas, and the real BIG-Bench-Mistake files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.formats import READERS
from trainer.readers import read_step_records
from trainer.records import StepRecord

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"

PROCESSBENCH = {
    "id": "gsm8k-0",
    "generator": "Qwen2-7B-Instruct",
    "problem": "1 + 1 + 1?",
    "steps": ["1 + 1 = 2.", "2 + 1 = 4.", "So 4."],
    "final_answer_correct": False,
    "label": 1,
}
BIGBENCH = {
    "input": "1 + 1 + 1?",
    "steps": ["1 + 1 = 2.", "2 + 1 = 4.", "So 4."],
    "target": "3",
    "answer": "4",
    "mistake_index": 1,
}
MR_GSM8K = {
    "uuid": "abc",
    "question": "1 + 1 + 1?",
    "ground_truth_solution": "3",
    "ground_truth_answer": "3",
    "model_output_steps": ["Step 1: 1 + 1 = 2.", "Step 2: 2 + 1 = 4.", "Step 3: So 4."],
    "model_output_answer_correctness": "wrong",
    "model_output_solution_correctness": "wrong",
    "model_output_solution_first_error_step": 2,
    "model_output_solution_first_error_reason": "It adds wrongly.",
}
FIRST_ERROR = "model_output_solution_first_error_step"
CORRECT = "model_output_solution_correctness"
ROWS = {"processbench": PROCESSBENCH, "bigbench_mistake": BIGBENCH, "mr_gsm8k": MR_GSM8K}


@pytest.mark.parametrize("format", list(ROWS))
def test_steps_after_the_first_error_have_no_label(format: str) -> None:
    steps = ("1 + 1 = 2.", "2 + 1 = 4.", "So 4.")
    assert READERS[format].read(ROWS[format]) == [
        StepRecord(problem="1 + 1 + 1?", steps=steps, labels=(1.0, 0.0, -100.0))
    ]


@pytest.mark.parametrize(
    ("format", "changes", "labels"),
    [
        ("processbench", {"label": -1}, (1.0, 1.0, 1.0)),
        ("processbench", {"label": 0}, (0.0, -100.0, -100.0)),
        ("processbench", {"label": 2.0}, (1.0, 1.0, 0.0)),
        ("bigbench_mistake", {"mistake_index": None}, (1.0, 1.0, 1.0)),
        ("bigbench_mistake", {"mistake_index": 0}, (0.0, -100.0, -100.0)),
        ("mr_gsm8k", {FIRST_ERROR: "N/A", CORRECT: "correct"}, (1.0, 1.0, 1.0)),
        ("mr_gsm8k", {FIRST_ERROR: None, CORRECT: None}, (1.0, 1.0, 1.0)),
        ("mr_gsm8k", {FIRST_ERROR: 1}, (0.0, -100.0, -100.0)),
        ("mr_gsm8k", {FIRST_ERROR: "3"}, (1.0, 1.0, 0.0)),
    ],
)
def test_where_the_first_error_is(format: str, changes: dict[str, Any], labels: tuple[float, ...]) -> None:
    assert READERS[format].read(ROWS[format] | changes)[0].labels == labels


@pytest.mark.parametrize(
    ("format", "changes", "error", "message"),
    [
        ("processbench", {"label": 3}, ValueError, "does not exist: got 3 where the solution has steps 0 to 2"),
        ("processbench", {"label": -2}, ValueError, "label names a step that does not exist: got -2"),
        ("processbench", {"label": "1"}, TypeError, "label must be an integer: got '1'"),
        ("processbench", {"label": True}, TypeError, "label must be an integer: got True"),
        ("processbench", {"label": None}, TypeError, "label must be an integer: got None"),
        ("processbench", {"steps": [], "label": -1}, ValueError, "a solution needs at least one step"),
        ("bigbench_mistake", {"mistake_index": 3}, ValueError, "does not exist: got 3 where the solution has"),
        ("bigbench_mistake", {"mistake_index": -1}, ValueError, "mistake_index must be null or at least 0: got -1"),
        ("bigbench_mistake", {"mistake_index": 0.5}, TypeError, "mistake_index must be an integer: got 0.5"),
        ("mr_gsm8k", {FIRST_ERROR: 4}, ValueError, "does not exist: got 4 where the solution has steps 1 to 3"),
        ("mr_gsm8k", {FIRST_ERROR: 0}, ValueError, "must be 'N/A' or at least 1: got 0"),
        ("mr_gsm8k", {FIRST_ERROR: "two"}, TypeError, "first_error_step must be an integer: got 'two'"),
        ("mr_gsm8k", {FIRST_ERROR: "N/A"}, ValueError, "contradicts the first error step: got 'wrong' beside 'N/A'"),
        ("mr_gsm8k", {CORRECT: "correct"}, ValueError, "contradicts the first error step: got 'correct' beside 2"),
    ],
)
def test_bad_rows(format: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        READERS[format].read(ROWS[format] | changes)


@pytest.mark.parametrize("name", ["logical_deduction", "multistep_arithmetic"])
def test_real_bigbench_mistake(name: str) -> None:
    path = REAL_DATA / "bigbench_mistake" / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"the real BIG-Bench-Mistake file is not at {path}")
    records, report = read_step_records(path)
    assert (report.format, report.num_rows, report.num_records) == ("bigbench_mistake", 300, 300)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for record, row in zip(records, rows, strict=True):
        assert (record.problem, list(record.steps)) == (row["input"], row["steps"])
        wrong = record.labels.index(0.0) if 0.0 in record.labels else None
        assert wrong == row["mistake_index"]
        known = len(record.steps) if wrong is None else wrong
        assert record.labels.count(1.0) == known
        assert record.labels.count(-100.0) == len(record.steps) - known - (wrong is not None)
