"""Formats of agents' conversations, in which the assistant's turns are labelled: plain rows, and AgentProcessBench."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modeling_prm.conversations import Conversation, check_conversation
from modeling_prm.step_loss import IGNORED_LABEL

from .conversation_data import dump_conversation
from .format_parts import Reader, ReaderOptions, Row, label_of_rating, to_index, to_object, to_tuple
from .formats_plain import labels_of_plain, plain_code
from .records import StepRecord


def read_messages(row: Row, options: ReaderOptions) -> list[StepRecord]:
    """`messages` as chat templates take them, and `labels`, one for each of the assistant's turns.

    Labels are in the codes of the plain format, null for a turn without one. `tools` may hold JSON schemas; with
    `"step_unit": "call"` each tool call has a label of its own.
    """
    unit = row.get("step_unit") or "turn"
    tools = row.get("tools") or None
    conversation = _conversation(row["messages"], tools, unit)
    labels = labels_of_plain(to_tuple("labels", row["labels"]), options)
    steps = conversation.steps
    if len(labels) != len(steps):
        raise ValueError(
            f"as many labels as the assistant has turns are needed: got {len(labels)} labels for {len(steps)} "
            f"{'turns' if unit == 'turn' else 'steps'}; label a turn that has none with null"
        )
    return [_record(conversation, dump_conversation(row["messages"], tools, unit), labels, options)]


def read_agent_process_bench(row: Row, options: ReaderOptions) -> list[StepRecord]:
    """AgentProcessBench (2603.14465), as in `data/AgentProcessBench` of its repository at commit 0a42606.

    `messages`, `tools`, and `step_labels`, which maps the index of each of the assistant's messages to +1, 0 or -1.
    A 0, an exploration that neither helps nor harms, is ignored unless `neutral` says otherwise.
    """
    ratings = to_object("step_labels", row["step_labels"])
    conversation = _conversation(row["messages"], row.get("tools") or None, "turn")
    turns = conversation.step_messages
    if unknown := sorted(set(ratings) - {str(turn) for turn in turns}):
        raise ValueError(f"step_labels names a message that is no turn of the assistant: got {unknown[0]!r}")
    labels = tuple(_label(ratings.get(str(turn)), options) for turn in turns)
    return [_record(conversation, dump_conversation(row["messages"], row.get("tools") or None), labels, options)]


def _conversation(messages: Any, tools: Any, unit: Any) -> Conversation:
    try:
        return check_conversation(messages, tools, step_unit=unit)
    except (TypeError, ValueError) as error:
        raise type(error)(f"the conversation cannot be read: {error}") from error


def _label(rating: Any, options: ReaderOptions) -> float:
    if rating is None:
        return IGNORED_LABEL
    number = to_index("a step label", rating)
    if number not in (1, 0, -1):
        raise ValueError(f"step labels must be +1, 0 or -1: got {number}")
    return label_of_rating(number, options.neutral or "ignored")


def _record(conversation: Conversation, text: str, labels: tuple[float, ...], options: ReaderOptions) -> StepRecord:
    return StepRecord(
        problem=conversation.task,
        steps=tuple(conversation.steps),
        labels=labels,
        classes=options.neutral == "class",
        conversation=text,
    )


def _code(row: Row) -> str | None:
    return plain_code(row) if not isinstance(row.get("labels"), Mapping) else None


MESSAGE_READERS = (
    Reader(
        name="messages",
        columns=("messages", "labels"),
        json_columns=("messages", "labels", "tools"),
        read_row=read_messages,
        has_neutral=True,
        label_code=_code,
    ),
    Reader(
        name="agentprocessbench",
        columns=("messages", "step_labels"),
        json_columns=("messages", "step_labels", "tools"),
        read_row=read_agent_process_bench,
        has_neutral=True,
    ),
)
"""The formats of this module."""
