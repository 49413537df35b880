"""What is kept of a model: a logit for each step of each scored solution, from which every table is computed.

    SETS/prmbench-test.jsonl            {"id": "p7", "group": "1f0c...", "labels": [1, 0, -100]}
    RESULTS/default-0/prmbench-test.jsonl   {"id": "p7", "logits": [2.1034, -0.5712, 0.0051]}

The texts of the data are in neither.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modeling_prm.step_loss import IGNORED_LABEL

from .data import Solution

FloatArray = npt.NDArray[np.float64]

RESULTS = Path(__file__).parent / "results"
SETS_FOLDER = "sets"
TRAIN_SET = "prmbench-train"
_PLACES = 4


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is known of a scored solution; see `data.Solution`."""

    id: str
    group: str
    labels: tuple[float, ...]
    right: bool | None = None
    answer: int | None = None


@dataclass(frozen=True, kw_only=True)
class Scored:
    """N solutions of at most S steps with a model's scores.

    Args:
        targets: N of them.
        logits: float (N, S), 0 where there is no step.
        labels: float (N, S), -100 where there is no step or no label.
    """

    targets: tuple[Target, ...]
    logits: FloatArray
    labels: FloatArray


def write_targets(folder: Path, name: str, solutions: Sequence[Solution]) -> None:
    """Write what is known of the solutions of a set."""
    rows = []
    for solution in solutions:
        row: dict[str, Any] = {"id": solution.id, "group": solution.group, "labels": [int(y) for y in solution.labels]}
        if solution.right is not None:
            row |= {"right": solution.right, "answer": solution.answer}
        rows.append(row)
    _write(folder / SETS_FOLDER / f"{name}.jsonl", rows)


def write_logits(
    folder: Path, run: str, name: str, solutions: Sequence[Solution], logits: Sequence[Sequence[float]]
) -> None:
    """Write a model's logits, one a step.

    Raises:
        ValueError: a solution has not as many logits as steps, or one is not finite.
    """
    rows = []
    for solution, row in zip(solutions, logits, strict=True):
        if len(row) != len(solution.steps) or not all(map(math.isfinite, row)):
            raise ValueError(f"solution {solution.id} has {len(solution.steps)} steps and the logits {row}")
        rows.append({"id": solution.id, "logits": [round(value, _PLACES) for value in row]})
    _write(folder / run / f"{name}.jsonl", rows)


def has_logits(folder: Path, run: str, name: str) -> bool:
    """Whether a run's logits of a set are there."""
    return (folder / run / f"{name}.jsonl").is_file() and (folder / SETS_FOLDER / f"{name}.jsonl").is_file()


def read_targets(folder: Path, name: str) -> tuple[Target, ...]:
    """What is known of the solutions of a set.

    Raises:
        OSError: there is no such file.
    """
    return tuple(
        Target(**{**row, "labels": tuple(map(float, row["labels"]))})
        for row in _read(folder / SETS_FOLDER / f"{name}.jsonl")
    )


def read_scored(folder: Path, run: str, name: str) -> Scored:
    """A run's logits of a set with what is known of it.

    Raises:
        OSError: there is no such file.
        ValueError: logits and set do not belong together.
    """
    targets = read_targets(folder, name)
    rows = {row["id"]: row["logits"] for row in _read(folder / run / f"{name}.jsonl")}
    if len(rows) != len(targets) or any(len(rows.get(t.id, ())) != len(t.labels) for t in targets):
        raise ValueError(f"{run}/{name}.jsonl does not fit the set of that name; score it again")
    logits = padded([rows[target.id] for target in targets], 0.0)
    return Scored(targets=targets, logits=logits, labels=padded([target.labels for target in targets], IGNORED_LABEL))


def padded(rows: Sequence[Sequence[float]], value: float) -> FloatArray:
    """Rows of unequal length as one float array (N, S)."""
    array = np.full((len(rows), max(map(len, rows))), value)
    for index, row in enumerate(rows):
        array[index, : len(row)] = row
    return array


def _write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # In one move, so that a file that is there is whole.
    part = file.with_suffix(".part")
    part.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows), encoding="utf-8")
    part.replace(file)


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
