"""Benchmarks: their files as their authors write them, and their protocols by hand."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from trainer.benchmarks import (
    first_error_of,
    prmbench_scores,
    processbench_scores,
    read_benchmark,
    read_prmbench,
    read_processbench,
)

REAL_PRMBENCH = Path(__file__).resolve().parents[2] / "shared" / "data" / "prmbench"

RIGHT, WRONG, NONE = 1.0, 0.0, -100.0


def processbench_row(**changes: Any) -> dict[str, Any]:
    return {
        "id": "gsm8k-0",
        "generator": "Qwen2-7B-Instruct",
        "problem": "2 + 3 - 1?",
        "steps": ["2 + 3 = 6.", "6 - 1 = 5.", "The answer is 5."],
        "final_answer_correct": False,
        "label": 0,
        **changes,
    }


def prmbench_row(**changes: Any) -> dict[str, Any]:
    return {
        "original_question": "2 + 3?",
        "modified_question": "2 + 3 + 0?",
        "original_process": ["2 + 3 = 5."],
        "modified_process": ["1. 2 + 3 = 6.", "2. 6 + 0 = 6."],
        "modified_steps": [1],
        "error_steps": [1],
        "reason": "",
        "idx": "p_0",
        "question": "2 + 3?",
        "classification": "deception",
        **changes,
    }


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_processbench_rows(tmp_path: Path) -> None:
    write(
        tmp_path / "part.jsonl",
        processbench_row(label=1),
        processbench_row(id="omnimath-7", label=-1, generator="other"),
        processbench_row(id="own", label=2),
    )
    first, second, third = read_processbench(tmp_path)
    assert (first.id, first.subset, first.generator) == ("gsm8k-0", "gsm8k", "Qwen2-7B-Instruct")
    assert (first.problem, first.steps[0]) == ("2 + 3 - 1?", "2 + 3 = 6.")
    assert first.labels == (RIGHT, WRONG, NONE)
    assert (second.subset, second.labels, second.generator) == ("omnimath", (RIGHT, RIGHT, RIGHT), "other")
    assert (third.subset, third.labels) == ("part", (RIGHT, RIGHT, WRONG))
    (tmp_path / "list.json").write_text(json.dumps([processbench_row()]), encoding="utf-8")
    assert read_benchmark("processbench", str(tmp_path / "list.json"))[0].labels == (WRONG, NONE, NONE)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (processbench_row(label=3), r"part.jsonl:1: label must be from -1 to 2, got 3"),
        (processbench_row(label=-2), "label must be from -1 to 2, got -2"),
        (processbench_row(label=True), "label must be an int, got True"),
        (processbench_row(steps="a"), "steps must be a list of texts"),
        (processbench_row(steps=[]), "steps is empty"),
        (processbench_row(problem=None), "problem must be text"),
        ({"id": "gsm8k-0"}, "lacks generator, problem, steps, label"),
        ([1], "a row must be an object, got list"),
    ],
)
def test_processbench_refuses(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        read_processbench(write(tmp_path / "part.jsonl", row))


def test_prmbench_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(
        tmp_path / "part.jsonl",
        prmbench_row(error_steps=[2]),
        prmbench_row(error_steps=[1]),  # the same again
        prmbench_row(classification="circular", error_steps=[1, 9], modified_process=["a", "", "64. b"]),
        prmbench_row(classification="multi_solutions", error_steps=[]),
    )
    first, second, third = read_prmbench(file)
    assert (first.id, first.subset, first.problem) == ("deception_p_0", "deception", "2 + 3 + 0?")
    assert (first.steps, first.labels) == (("2 + 3 = 6.", "6 + 0 = 6."), (RIGHT, WRONG))
    assert (second.steps, second.labels) == (("a", "", "64. b"), (WRONG, RIGHT, RIGHT))
    assert third.labels == (RIGHT, RIGHT)
    assert "1 rows name a wrong step beyond the last, which is passed over; 1 repeat another" in caplog.text
    for errors in ([0], "1", [True]):
        with pytest.raises((TypeError, ValueError), match=r"part\.jsonl:1: error_steps"):
            read_prmbench(write(file, prmbench_row(error_steps=errors)))


@pytest.mark.skipif(not REAL_PRMBENCH.is_dir(), reason="PRMBench's files are not here")
def test_the_real_files_of_prmbench() -> None:
    items = read_prmbench(REAL_PRMBENCH)
    # Counted apart, from the raw lines.
    rows = [json.loads(line) for file in sorted(REAL_PRMBENCH.glob("*.jsonl")) for line in file.open(encoding="utf-8")]
    unique = {(row["classification"], row["idx"]): row for row in reversed(rows)}
    assert Counter(item.subset for item in items) == Counter(category for category, _ in unique)
    assert sum(len(item.steps) for item in items) == sum(len(row["modified_process"]) for row in unique.values())
    wrong = sum(
        len({step for step in row["error_steps"] if step <= len(row["modified_process"])}) for row in unique.values()
    )
    assert sum(item.labels.count(WRONG) for item in items) == wrong
    # Whoever calls each step right: all F1 of correct steps is 2 r / (2 r + w) with r right and w wrong steps.
    right = sum(len(item.steps) for item in items) - wrong
    scores = prmbench_scores([[False] * len(item.steps) for item in items], [item.labels for item in items])
    assert scores["prm_score"] == pytest.approx(0.5 * 2 * right / (2 * right + wrong))


def test_labelled_data_is_a_benchmark_too(tmp_path: Path) -> None:
    file = write(tmp_path / "own.jsonl", {"problem": "p", "steps": ["a", "b", "c"], "labels": [1, None, -1]})
    (item,) = read_benchmark(str(file))
    assert (item.subset, item.steps, item.labels) == ("own", ("a", "b", "c"), (RIGHT, NONE, WRONG))
    with pytest.raises(ValueError, match="leave it out"):
        read_benchmark(str(file), str(file))


def test_first_error_of_labels() -> None:
    assert first_error_of([RIGHT, 0.4, WRONG]) == 1
    assert first_error_of([NONE, RIGHT, 0.5]) == -1
    assert first_error_of([NONE, NONE]) is None


def test_processbench_by_hand() -> None:
    labels = [(RIGHT, WRONG, NONE), (WRONG, NONE), (RIGHT, WRONG), (RIGHT, RIGHT), (RIGHT,), (RIGHT,), (NONE,)]
    judgements = [
        [False, True, False],  # found
        [False, True],  # found a step too late
        None,  # not scored: missed
        [False, False],  # found right
        [True],  # a false alarm
        None,  # missed
        [True],  # of no matter
    ]
    scores = processbench_scores(judgements, labels)
    # a = 1 of 3, b = 1 of 3, so F1 = 2 / 9 / (2 / 3).
    assert scores == pytest.approx(
        {"f1": 1 / 3, "acc_error": 1 / 3, "acc_correct": 1 / 3, "num_error": 3, "num_correct": 3}
    )
    some = processbench_scores(judgements[:1] + judgements[3:6], labels[:1] + labels[3:6])
    assert some["f1"] == pytest.approx(2 * 1 * (1 / 3) / (4 / 3))
    assert processbench_scores([[False], [True]], [(WRONG,), (RIGHT,)])["f1"] == 0.0
    assert math.isnan(processbench_scores([[False]], [(WRONG,)])["f1"])


def test_prm_score_by_hand() -> None:
    labels = [(RIGHT, WRONG, RIGHT, NONE), (WRONG, RIGHT), (RIGHT, WRONG)]
    judgements = [[False, True, True, True], [False, False], None]
    # Right steps: 2 called right, 1 called wrong; wrong ones: 1 called wrong, 1 right.
    scores = prmbench_scores(judgements, labels)
    f1 = 2 * (2 / 3) * (2 / 3) / (4 / 3)  # precision 2/3, recall 2/3
    negative = 0.5  # precision 1/2, recall 1/2
    assert scores == pytest.approx(
        {"prm_score": 0.5 * f1 + 0.5 * negative, "f1": f1, "negative_f1": negative, "num_steps": 5}
    )
    alone = prmbench_scores([[False, True, False]], [(RIGHT, RIGHT, RIGHT)])
    assert alone["prm_score"] == alone["f1"] == pytest.approx(2 * 2 / 3 / (5 / 3))
    assert math.isnan(alone["negative_f1"])
    assert prmbench_scores([[True, True]], [(RIGHT, WRONG)]) == pytest.approx(
        {"prm_score": 1 / 3, "f1": 0.0, "negative_f1": 2 / 3, "num_steps": 2}
    )
    assert math.isnan(prmbench_scores([None], [(RIGHT,)])["prm_score"])
