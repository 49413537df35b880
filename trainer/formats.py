"""Dataset formats: for each, one function that makes `StepRecord`s of one row, and a line in `READERS`.

A function raises ValueError or TypeError for a row that it cannot take. The message opens with the kind of
fault in general words, then a colon and the particulars: rejected rows are counted by what stands before
the colon.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modeling_prm.step_loss import IGNORED_LABEL

from .records import StepRecord

Row = Mapping[str, Any]

_STEP_NUMBER = re.compile(r"\s*(?:step\s+(\d+)[.:]|(\d+)\.)\s+(?=\S)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """A dataset format.

    Attributes:
        name: What `format=` takes.
        columns: The columns that a row must have; others are not read. `format="auto"` goes by them.
        json_columns: Those of them that are not strings: in a CSV file they hold JSON text.
        read: Makes the records of one row.
        drop_duplicates: Whether records equal to an earlier one are dropped, for formats that repeat a
            solution in many rows.
        found_by_columns: Whether `format="auto"` may take it; False where another format has its columns.
    """

    name: str
    columns: tuple[str, ...]
    json_columns: tuple[str, ...]
    read: Callable[[Row], list[StepRecord]]
    drop_duplicates: bool = False
    found_by_columns: bool = True


def read_plain(row: Row) -> list[StepRecord]:
    """Our own format: `problem`, `steps`, and `labels` in one of three codes, null or -100 for no label.

    The codes are +1/-1, booleans, and numbers in [0, 1]. One list is in one code. With a -1 in it the code
    is +1/-1, and a 0 is refused: there it would mean neutral, which can count as correct, as incorrect or
    as no label. A list that holds 0 and no -1 is read as 0/1. Texts are taken as they are. A column
    `problem_group` may say which problem this one is a version of.
    """
    labels = _to_tuple("labels", row["labels"])
    numbers = [label for label in labels if isinstance(label, (int, float)) and not isinstance(label, bool)]
    if -1 in numbers:
        if 0 in numbers:
            raise ValueError(
                "labels hold both -1 and 0: with -1 for incorrect a 0 is neutral, and what neutral counts "
                "as is a choice; write 1 (correct), -1 (incorrect) or null (no label) in its place, or class "
                "indices for a model of three classes, in the format 'classes'"
            )
        if others := [number for number in numbers if number not in (1, -1, IGNORED_LABEL)]:
            raise ValueError(
                f"labels must be of one code: got {others[0]!r} beside -1; write +1/-1, or probabilities in [0, 1]"
            )
    floats = _to_floats(labels)
    if -1 in numbers:
        floats = tuple(0.0 if label == -1 else label for label in floats)
    steps = _to_tuple("steps", row["steps"])
    return [StepRecord(problem=row["problem"], steps=steps, labels=floats, problem_group=row.get("problem_group"))]


def read_classes(row: Row) -> list[StepRecord]:
    """`problem`, `steps`, and `labels` as class indices 0, 1, 2, ..., null or -100 for no label.

    For PRMs of several classes a step, as right, neutral and wrong. Nothing in a row tells an index from a label of
    the plain format, so this one is never found by its columns. Otherwise as `read_plain`.
    """
    labels = tuple(IGNORED_LABEL if label is None else label for label in _to_tuple("labels", row["labels"]))
    steps = _to_tuple("steps", row["steps"])
    group = row.get("problem_group")
    return [StepRecord(problem=row["problem"], steps=steps, labels=labels, problem_group=group, classes=True)]


def read_trl(row: Row) -> list[StepRecord]:
    """TRL's stepwise supervision: `prompt`, `completions`, and `labels` as booleans or soft labels.

    Step numbers are removed as `strip_step_numbers` says.
    """
    steps = strip_step_numbers(_to_tuple("completions", row["completions"]))
    labels = _to_floats(_to_tuple("labels", row["labels"]))
    return [StepRecord(problem=row["prompt"], steps=steps, labels=labels)]


def read_prmbench(row: Row) -> list[StepRecord]:
    """PRMBench (arXiv 2501.03124): the solution with errors put in, and the one before, all correct.

    `modified_process` answers `modified_question`, and `error_steps` are the 1-based numbers of its wrong
    steps; `original_process` answers `original_question`. Many rows share one original, which is the
    group of both. Step numbers are removed as `strip_step_numbers` says.
    """
    modified = strip_step_numbers(_to_tuple("modified_process", row["modified_process"]))
    original = strip_step_numbers(_to_tuple("original_process", row["original_process"]))
    errors = _to_tuple("error_steps", row["error_steps"])
    for number in errors:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"error_steps must be integers: got {number!r}; correct the row")
        if not 1 <= number <= len(modified):
            raise ValueError(
                f"error_steps names a step that does not exist: got {number} where modified_process has "
                f"steps 1 to {len(modified)}; correct the row or pass on_bad_row='skip'"
            )
    labels = tuple(0.0 if number in errors else 1.0 for number in range(1, len(modified) + 1))
    group = row["original_question"]
    return [
        StepRecord(problem=row["modified_question"], steps=modified, labels=labels, problem_group=group),
        StepRecord(problem=group, steps=original, labels=(1.0,) * len(original), problem_group=group),
    ]


READERS: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        Reader(
            name="plain",
            columns=("problem", "steps", "labels"),
            json_columns=("steps", "labels"),
            read=read_plain,
        ),
        Reader(
            name="trl",
            columns=("prompt", "completions", "labels"),
            json_columns=("completions", "labels"),
            read=read_trl,
        ),
        Reader(
            name="prmbench",
            columns=(
                "original_question",
                "modified_question",
                "original_process",
                "modified_process",
                "error_steps",
            ),
            json_columns=("original_process", "modified_process", "error_steps"),
            read=read_prmbench,
            drop_duplicates=True,
        ),
        Reader(
            name="classes",
            columns=("problem", "steps", "labels"),
            json_columns=("steps", "labels"),
            read=read_classes,
            found_by_columns=False,
        ),
    )
}
"""All formats by name."""


def strip_step_numbers(steps: Sequence[Any]) -> tuple[Any, ...]:
    """Remove the numbers that a solution's steps carry, since the prompt layout numbers the steps itself.

    A number is "1. ", "Step 1. " or "Step 1: " at the start of a step, with text after it. It is removed
    only if every step has one and each is the step's own place, counted from 1; else the steps come back
    unchanged, so that a step like "64. " or "7.8 minutes is ..." keeps its figure.
    """
    matches = [_STEP_NUMBER.match(step) if isinstance(step, str) else None for step in steps]
    bare = []
    for number, (step, match) in enumerate(zip(steps, matches, strict=True), start=1):
        if match is None or int(match[1] or match[2]) != number:
            return tuple(steps)
        bare.append(step[match.end() :])
    return tuple(bare)


def _to_tuple(name: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list: got {type(value).__name__}; write one entry a step")
    return tuple(value)


def _to_floats(labels: tuple[Any, ...]) -> tuple[Any, ...]:
    """Labels with null as -100 and booleans as numbers; what else is no label the record refuses."""
    has_bools = any(isinstance(label, bool) for label in labels)
    numbers = [label for label in labels if not isinstance(label, bool) and label not in (None, IGNORED_LABEL)]
    if has_bools and numbers:
        raise ValueError(
            f"labels must be of one code: got {numbers[0]!r} beside booleans; "
            "write booleans or numbers, and null where there is no label"
        )
    return tuple(
        IGNORED_LABEL if label in (None, IGNORED_LABEL) else float(label) if label in (0, 1) else label
        for label in labels
    )
