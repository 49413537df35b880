"""What the dataset formats share: their description, their options, and parts of reading a row."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from modeling_prm.step_loss import IGNORED_LABEL

from .records import StepRecord

Row = Mapping[str, Any]
Neutral = Literal["correct", "incorrect", "ignored", "class"]
Paths = Literal["all", "chosen"]

# With neutral as a class of its own: the order of right, neutral and wrong in a model of three classes.
_CLASS_OF_RATING = {1: 0.0, 0: 1.0, -1: 2.0}
_LABEL_OF_NEUTRAL = {"correct": 1.0, "incorrect": 0.0, "ignored": IGNORED_LABEL}

_STEP_NUMBER = re.compile(r"\s*(?:step\s+(\d+)[.:]|(\d+)\.)\s+(?=\S)", re.IGNORECASE)


class RowLeftOut(Exception):
    """A row that is read well and says itself that there is nothing in it to learn from; the message is the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReaderOptions:
    """What a user chooses about reading; a format takes what concerns it.

    Attributes:
        neutral: What a neutral rating counts as: "correct", "incorrect", "ignored" (-100), or "class", with which
            labels are class indices: 0 right, 1 neutral, 2 wrong. None is the format's own default.
        paths: Of data in which solutions branch and one path was chosen: "all" solutions, or the "chosen" alone.

    Raises:
        ValueError: If an option has a value outside those allowed.
    """

    neutral: Neutral | None = None
    paths: Paths = "all"

    def __post_init__(self) -> None:
        if self.neutral is not None and self.neutral not in get_args(Neutral):
            raise ValueError(f"neutral must be None or one of {get_args(Neutral)}, got {self.neutral!r}")
        if self.paths not in get_args(Paths):
            raise ValueError(f"paths must be one of {get_args(Paths)}, got {self.paths!r}")


DEFAULT_OPTIONS = ReaderOptions()


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """A dataset format.

    Attributes:
        name: What `format=` takes.
        columns: The columns that a row must have; others are not read. `format="auto"` goes by them.
        json_columns: Those columns that are not strings: in a CSV file they hold JSON text.
        read_row: Makes the records of one row.
        drop_duplicates: Whether records equal to an earlier one are dropped, for formats that repeat a
            solution in many rows.
        found_by_columns: Whether `format="auto"` may take it; False where another format has its columns.
        has_neutral: Whether there are neutral labels, so that `neutral="class"` can be.
        label_code: For a format of several label codes: the code that a row shows, "+1/-1" or "0/1", or None where
            it fits both. All rows of a source must show the same.
    """

    name: str
    columns: tuple[str, ...]
    json_columns: tuple[str, ...]
    read_row: Callable[[Row, ReaderOptions], list[StepRecord]]
    drop_duplicates: bool = False
    found_by_columns: bool = True
    has_neutral: bool = False
    label_code: Callable[[Row], str | None] | None = None

    def read(self, row: Row, options: ReaderOptions = DEFAULT_OPTIONS) -> list[StepRecord]:
        """The records of one row.

        Raises:
            RowLeftOut: If the row says itself that it is not to be used.
            TypeError, ValueError: If the row is bad.
        """
        return self.read_row(row, options)


def label_of_rating(rating: int, neutral: Neutral) -> float:
    """The label of a rating +1, 0 or -1, with 0 as `neutral` says."""
    if neutral == "class":
        return _CLASS_OF_RATING[rating]
    if rating == 0:
        return _LABEL_OF_NEUTRAL[neutral]
    return 1.0 if rating == 1 else 0.0


def labels_up_to(first_error: int, num_steps: int, *, name: str, base: int = 0) -> tuple[float, ...]:
    """Labels of a solution of which only the first error is known: 1 before it, 0 at it, -100 after it.

    Args:
        first_error: Its index from `base` on; `base - 1` where there is none.
        num_steps: How many steps there are.
        name: The column's, for the message.
        base: The index of the first step.

    Raises:
        ValueError: If there is no such step.
    """
    index = first_error - base
    if index == -1:
        return (1.0,) * num_steps
    if not 0 <= index < num_steps:
        raise ValueError(
            f"{name} names a step that does not exist: got {first_error} where the solution has steps {base} to "
            f"{num_steps - 1 + base}; correct the row or pass on_bad_row='skip'"
        )
    return (*(1.0,) * index, 0.0, *(IGNORED_LABEL,) * (num_steps - index - 1))


def strip_step_numbers(steps: Sequence[Any]) -> tuple[Any, ...]:
    """Remove the numbers that a solution's steps carry, since the prompt layout numbers the steps itself.

    A number is "1. ", "Step 1. " or "Step 1: " at the start of a step, with text after it. It is removed
    only if every step has one and each is the step's own place, counted from 1; else the steps come back
    unchanged, so that a step like "64. " or "7.8 minutes is ..." keeps its figure.
    """
    matches = [_STEP_NUMBER.match(step) if isinstance(step, str) else None for step in steps]
    bare = []
    for number, (step, match) in enumerate(zip(steps, matches, strict=True), start=1):
        # Longer figures are no step's number, and may be more than int() takes.
        digits = (match[1] or match[2]) if match is not None else ""
        if match is None or len(digits) > 9 or int(digits) != number:
            return tuple(steps)
        bare.append(step[match.end() :])
    return tuple(bare)


def to_tuple(name: str, value: object) -> tuple[Any, ...]:
    """A list as a tuple; TypeError for anything else."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list: got {type(value).__name__}; write one entry a step")
    return tuple(value)


def to_text(name: str, value: object) -> str:
    """A string as it is; TypeError for anything else."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string: got {type(value).__name__}; convert it, or drop the row")
    return value


def to_object(name: str, value: object, *keys: str) -> Row:
    """An object that has these keys, as it is.

    Raises:
        TypeError: If it is no object.
        ValueError: If a key is missing.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be an object: got {type(value).__name__}; write {{...}}")
    if missing := [key for key in keys if key not in value]:
        raise ValueError(f"{name} lacks a field: {', '.join(missing)}; add it, or drop the row")
    return value


def to_index(name: str, value: object) -> int:
    """An integer as it is, also as a float without a fraction, which tables with empty cells make of it."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer: got {value!r}; correct the row")
    return value


def to_floats(labels: tuple[Any, ...]) -> tuple[Any, ...]:
    """Labels with null as -100 and booleans as numbers; what else is no label the record refuses.

    Raises:
        ValueError: If booleans and numbers are mixed.
    """
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
