"""Formats of one label a step, as they are: our own, class indices, and TRL's stepwise supervision."""

from __future__ import annotations

from typing import Any

from modeling_prm.step_loss import IGNORED_LABEL

from .format_parts import (
    Neutral,
    Reader,
    ReaderOptions,
    Row,
    label_of_rating,
    strip_step_numbers,
    to_floats,
    to_tuple,
)
from .records import StepRecord


def read_plain(row: Row, options: ReaderOptions) -> list[StepRecord]:
    """Our own format: `problem`, `steps`, and `labels` in one of three codes, null or -100 for no label.

    The codes are +1/-1, booleans, and numbers in [0, 1]. One list is in one code, and so are the lists of one source
    (see `plain_code`), since a 0 is incorrect in 0/1 and neutral beside -1. Neutral is refused unless `neutral` says
    what it counts as; where that is given, numbers must be +1, 0 and -1. Texts are taken as they are. A column
    `problem_group` may say which problem this one is a version of.
    """
    labels = labels_of_plain(to_tuple("labels", row["labels"]), options)
    return [
        StepRecord(
            problem=row["problem"],
            steps=to_tuple("steps", row["steps"]),
            labels=labels,
            problem_group=row.get("problem_group"),
            classes=options.neutral == "class",
        )
    ]


def labels_of_plain(given: tuple[Any, ...], options: ReaderOptions) -> tuple[Any, ...]:
    """Labels in one of the codes of `read_plain`."""
    return _binary_labels(given) if options.neutral is None else _labels_of_ratings(given, options.neutral)


def plain_code(row: Row) -> str | None:
    """The code that a row's labels show: "+1/-1" with a -1 in them, "0/1" with a 0 and no -1, else None."""
    labels = row["labels"]
    numbers = _numbers(tuple(labels)) if isinstance(labels, (list, tuple)) else []
    return "+1/-1" if -1 in numbers else "0/1" if 0 in numbers else None


def _binary_labels(given: tuple[Any, ...]) -> tuple[Any, ...]:
    numbers = _numbers(given)
    labels = to_floats(given)
    if -1 not in numbers:
        return labels
    if 0 in numbers:
        raise ValueError(
            "labels hold both -1 and 0: with -1 for incorrect a 0 is neutral, and what neutral counts as is a choice; "
            "pass neutral= (--neutral) as 'correct', 'incorrect', 'ignored' or 'class', or write 1 (correct), "
            "-1 (incorrect) or null (no label) in its place"
        )
    if others := [number for number in numbers if number not in (1, -1, IGNORED_LABEL)]:
        raise ValueError(
            f"labels must be of one code: got {others[0]!r} beside -1; write +1/-1, or probabilities in [0, 1]"
        )
    return tuple(0.0 if label == -1 else label for label in labels)


def _labels_of_ratings(given: tuple[Any, ...], neutral: Neutral) -> tuple[Any, ...]:
    if others := [number for number in _numbers(given) if number not in (1, 0, -1, IGNORED_LABEL)]:
        raise ValueError(
            f"labels must be +1, 0 or -1 where neutral= is given: got {others[0]!r}; leave neutral= out to read "
            "probabilities in [0, 1]"
        )
    to_floats(given)  # which refuses booleans beside numbers
    ratings = [label if not isinstance(label, bool) else 1 if label else -1 for label in given]
    return tuple(
        IGNORED_LABEL
        if rating in (None, IGNORED_LABEL)
        else label_of_rating(int(rating), neutral)
        if rating in (1, 0, -1)
        else rating
        for rating in ratings
    )


def _numbers(labels: tuple[Any, ...]) -> list[int | float]:
    return [label for label in labels if isinstance(label, (int, float)) and not isinstance(label, bool)]


def read_classes(row: Row, options: ReaderOptions) -> list[StepRecord]:
    """`problem`, `steps`, and `labels` as class indices 0, 1, 2, ..., null or -100 for no label.

    For PRMs of several classes a step, as right, neutral and wrong. Nothing in a row tells an index from a label of
    the plain format, so this one is never found by its columns. Otherwise as `read_plain`.
    """
    labels = tuple(IGNORED_LABEL if label is None else label for label in to_tuple("labels", row["labels"]))
    steps = to_tuple("steps", row["steps"])
    group = row.get("problem_group")
    return [StepRecord(problem=row["problem"], steps=steps, labels=labels, problem_group=group, classes=True)]


def read_trl(row: Row, options: ReaderOptions) -> list[StepRecord]:
    """TRL's stepwise supervision: `prompt`, `completions`, and `labels` as booleans or soft labels.

    Step numbers are removed as `strip_step_numbers` says.
    """
    steps = strip_step_numbers(to_tuple("completions", row["completions"]))
    labels = to_floats(to_tuple("labels", row["labels"]))
    return [StepRecord(problem=row["prompt"], steps=steps, labels=labels)]


PLAIN_READERS = (
    Reader(
        name="plain",
        columns=("problem", "steps", "labels"),
        json_columns=("steps", "labels"),
        read_row=read_plain,
        has_neutral=True,
        label_code=plain_code,
    ),
    Reader(
        name="trl",
        columns=("prompt", "completions", "labels"),
        json_columns=("completions", "labels"),
        read_row=read_trl,
    ),
    Reader(
        name="classes",
        columns=("problem", "steps", "labels"),
        json_columns=("steps", "labels"),
        read_row=read_classes,
        found_by_columns=False,
        has_neutral=True,
    ),
)
"""The formats of this module."""
