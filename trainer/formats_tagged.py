"""Formats in which problem and steps are one text, cut by a tag after each step, or a conversation of steps."""

from __future__ import annotations

import re
from typing import Any

from modeling_prm.step_loss import IGNORED_LABEL

from .format_parts import Reader, ReaderOptions, Row, RowLeftOut, strip_step_numbers, to_object, to_text, to_tuple
from .records import StepRecord

# The tag of Math-Shepherd, as a word of its own: Russian text has the two letters inside words.
_TAG = re.compile(r"(?<!\w)ки(?!\w)")
_FIRST_STEP = re.compile(r"(?<!\w)Step 1:")
_NEXT_STEP = re.compile(r"\n\s*(?=Step \d{1,9}:)")
_LABEL_OF_SIGN = {"+": 1.0, "-": 0.0}


def read_math_shepherd(row: Row, options: ReaderOptions) -> list[StepRecord]:
    """Math-Shepherd (arXiv 2312.08935): `input` with " ки" after each step, and `label`, the same with + or -.

    The problem stands before "Step 1:". A step without a tag has no label. Rows with a tag inside the problem or a
    second "Step 1:" before the first tag are refused, since where the problem ends is a guess there. Step numbers are
    removed as `strip_step_numbers` says.
    """
    text, marked = to_text("input", row["input"]), to_text("label", row["label"])
    labels: list[float] = []
    place = end = 0
    for tag in _TAG.finditer(text):
        between = text[end : tag.start()]
        place += len(between)
        sign = marked[place : place + 1]
        if not marked.startswith(between, place - len(between)) or sign not in _LABEL_OF_SIGN:
            raise ValueError(
                f"label must be the input with + or - for each tag: it differs before tag {len(labels) + 1}; correct "
                "the row or pass on_bad_row='skip'"
            )
        labels.append(_LABEL_OF_SIGN[sign])
        place += 1
        end = tag.end()
    if marked[place:].rstrip() != text[end:].rstrip():
        raise ValueError(
            "label must be the input with + or - for each tag: it differs after the last tag; correct the row or "
            "pass on_bad_row='skip'"
        )
    return [_tagged_record(text, tuple(labels), "input")]


def read_openrlhf(row: Row, options: ReaderOptions) -> list[StepRecord]:
    """OpenRLHF's process data: `input` with " ки" after each step, and `value`, for each tag + or - or a number.

    Numbers are soft labels, also as text. Otherwise as `read_math_shepherd`.
    """
    values = tuple(_label_of(value) for value in to_tuple("value", row["value"]))
    return [_tagged_record(to_text("input", row["input"]), values, "input")]


def read_er_prm(row: Row, options: ReaderOptions) -> list[StepRecord]:
    """ER-PRM (arXiv 2412.11006): `text` with " ки" after each step, and `value`, a soft label for each tag.

    Otherwise as `read_openrlhf`.
    """
    values = tuple(_label_of(value) for value in to_tuple("value", row["value"]))
    return [_tagged_record(to_text("text", row["text"]), values, "text")]


def read_rlhflow(row: Row, options: ReaderOptions) -> list[StepRecord]:
    """RLHFlow's conversations: user turns that hold a step each, answered by the assistant with + or -.

    The first user turn holds the problem and the first step, told apart by "Step 1:". Without that, nothing says
    where the problem ends: the whole turn is the problem then, and its sign is not used. Step numbers are removed as
    `strip_step_numbers` says.
    """
    turns = [to_object("turn", turn, "role", "content") for turn in to_tuple("conversations", row["conversations"])]
    if not turns or len(turns) % 2:
        raise ValueError(f"conversations must be pairs of user and assistant: got {len(turns)} turns; correct the row")
    steps: list[str] = []
    labels: list[float] = []
    for number, (user, assistant) in enumerate(zip(turns[::2], turns[1::2], strict=True), start=1):
        if (user["role"], assistant["role"]) != ("user", "assistant"):
            raise ValueError(
                f"conversations must be pairs of user and assistant: got {user['role']!r} and {assistant['role']!r} "
                f"in pair {number}; correct the row"
            )
        sign = to_text("turn's content", assistant["content"]).strip()
        if sign not in _LABEL_OF_SIGN:
            raise ValueError(
                f"the assistant's turn must be + or -: got {sign[:40]!r} in pair {number}; correct the row"
            )
        steps.append(to_text("turn's content", user["content"]).strip())
        labels.append(_LABEL_OF_SIGN[sign])
    found = list(_FIRST_STEP.finditer(steps[0]))
    if len(found) > 1:
        raise ValueError(
            "problem and steps cannot be told apart: 'Step 1:' stands several times in the first turn; correct the row"
        )
    if not found and len(steps) == 1:
        raise RowLeftOut("the only turn does not say with 'Step 1:' where the problem ends")
    start = found[0].start() if found else len(steps[0])
    problem, steps[0] = steps[0][:start].strip(), steps[0][start:]
    if not found:
        del steps[0], labels[0]
    return [StepRecord(problem=problem, steps=strip_step_numbers(steps), labels=tuple(labels))]


def _label_of(value: Any) -> Any:
    """The label that + or - or the text of a number stands for; what else is no label the record refuses."""
    if not isinstance(value, str):
        return IGNORED_LABEL if value is None else value
    sign = value.strip()
    if sign in _LABEL_OF_SIGN:
        return _LABEL_OF_SIGN[sign]
    try:
        return float(sign)
    except ValueError:
        raise ValueError(f"value must be + or - or a number: got {value[:40]!r}; correct the row") from None


def _tagged_record(text: str, labels: tuple[Any, ...], name: str) -> StepRecord:
    """The record of a text that is cut by tags, with a label for each tag."""
    *segments, rest = _TAG.split(text)
    if len(segments) != len(labels):
        raise ValueError(
            f"as many labels as tags are needed: got {len(labels)} labels for {len(segments)} tags; correct the row or "
            "pass on_bad_row='skip'"
        )
    if not segments:
        raise ValueError(f"{name} has no step: there is no tag ' ки' in it; correct the row or pass the right format=")
    starts = list(_FIRST_STEP.finditer(segments[0]))
    if not starts:
        raise ValueError(
            "problem and steps cannot be told apart: there is no 'Step 1:' before the first tag; correct the row or "
            "pass on_bad_row='skip'"
        )
    if len(starts) > 1:
        raise ValueError(
            "problem and steps cannot be told apart: 'Step 1:' stands several times before the first tag; correct the "
            "row or pass on_bad_row='skip'"
        )
    problem, segments[0] = segments[0][: starts[0].start()].strip(), segments[0][starts[0].start() :]
    steps: list[str] = []
    step_labels: list[Any] = []
    for segment, label in zip([*segments, rest], [*labels, IGNORED_LABEL], strict=True):
        parts = [part.strip() for part in _NEXT_STEP.split(segment.strip())]
        if parts == [""] and segment is rest:
            continue
        steps += parts
        step_labels += [IGNORED_LABEL] * (len(parts) - 1) + [label]
    return StepRecord(problem=problem, steps=strip_step_numbers(steps), labels=tuple(step_labels))


TAGGED_READERS = (
    Reader(name="math_shepherd", columns=("input", "label"), json_columns=(), read_row=read_math_shepherd),
    Reader(name="openrlhf", columns=("input", "value"), json_columns=("value",), read_row=read_openrlhf),
    Reader(name="er_prm", columns=("text", "value"), json_columns=("value",), read_row=read_er_prm),
    Reader(
        name="rlhflow",
        columns=("conversations",),
        json_columns=("conversations",),
        read_row=read_rlhflow,
    ),
)
"""The formats of this module."""
