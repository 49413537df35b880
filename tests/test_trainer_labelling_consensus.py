"""Agreement of two label files on the first error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.labelling_consensus import agree, find_first_error

NONE = -100.0


@pytest.mark.parametrize(
    ("labels", "threshold", "first"),
    [
        ([1.0, 1.0], 0.5, -1),
        ([1.0, 0.0, 1.0], 0.5, 1),
        ([1.0, 0.0, NONE], 0.5, 1),
        ([NONE, 0.0], 0.5, None),
        ([1.0, NONE], 0.5, None),
        ([0.6, 0.4], 0.5, 1),
        ([0.6, 0.4], 0.7, 0),
        ([0.125, 0.0], 1e-6, 1),
        ([0.5], 0.5, -1),
    ],
)
def test_the_first_error_of_labels(labels: list[float], threshold: float, first: int | None) -> None:
    assert find_first_error(labels, threshold) == first


def written(file: Path, rows: dict[str, list[Any]], **columns: Any) -> Path:
    lines = [
        {"problem": problem, "steps": [f"s{i}" for i in range(len(labels))], "labels": labels, **columns}
        for problem, labels in rows.items()
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_what_both_agree_on_is_kept_and_the_rest_counted(tmp_path: Path) -> None:
    first = written(
        tmp_path / "a.jsonl",
        {
            "same error": [1, 0, 0],
            "other error": [1, 0, 0],
            "both right": [1, 1],
            "one right": [1, 1],
            "undecided": [None, 1],
            "missing": [1],
        },
    )
    second = written(
        tmp_path / "b.jsonl",
        {
            "same error": [0.9, 0.2, 0.9],
            "other error": [0.1, 0.2, 0.9],
            "both right": [0.9, 0.9],
            "one right": [0.9, 0.1],
            "undecided": [0.5, 0.5],
            "unasked": [0.7],
        },
    )
    found = agree(first, second)
    assert [(record.problem, record.labels, *counts) for record, *counts in found.kept] == [
        ("same error", (1.0, 0.0, 0.0), None, None),
        ("both right", (1.0, 1.0), None, None),
    ]
    assert found.counts == {
        "kept: both find an error at the same step": 1,
        "kept: both find no error": 1,
        "left out: they disagree": 2,
        "left out: no first error known in one of them": 1,
        "left out: not in the second file": 1,
        "of the second file, not in the first": 1,
    }
    # By another threshold 0.2 is no error.
    assert [record.problem for record, *_ in agree(first, second, threshold=0.15).kept] == ["both right"]


def test_counts_come_along(tmp_path: Path) -> None:
    first = written(tmp_path / "a.jsonl", {"p": [1, 0]}, successes=[3, 0], rollouts=[4, 1])
    second = written(tmp_path / "b.jsonl", {"p": [1, 0]})
    assert [counts for _, *counts in agree(first, second).kept] == [[[3, 0], [4, 1]]]


def test_solutions_count_once_and_contradictions_are_refused(tmp_path: Path) -> None:
    first = written(tmp_path / "a.jsonl", {"p": [1, 0]})
    twice = tmp_path / "twice.jsonl"
    twice.write_text(first.read_text() * 2)
    found = agree(twice, first)
    assert len(found.kept) == 1
    assert found.counts["left out: the solution stands in the first file already"] == 1
    twice.write_text(first.read_text() + first.read_text().replace("[1, 0]", "[0, 0]"))
    with pytest.raises(ValueError, match="labels one solution in two ways, to the problem 'p'"):
        agree(first, twice)
