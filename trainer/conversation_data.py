"""Labelled conversations among labelled solutions: a column of a dataset, ids for it, and scores.

A conversation is kept as JSON text, `{"messages": [...], "tools": [...], "step_unit": "turn"}`, beside the problem
(what the user asks first), the steps (the assistant's turns as text) and the labels that every record has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from modeling_prm import PRMProcessor
from modeling_prm.conversations import Conversation, check_conversation
from modeling_prm.processing_prm import EncodedSolution

CONVERSATION = "conversation"


def dump_conversation(messages: Any, tools: Any = None, step_unit: str = "turn") -> str:
    """As text for the column; the messages as they are."""
    return json.dumps({"messages": messages, "tools": tools, "step_unit": step_unit}, ensure_ascii=True)


def load_conversation(text: str) -> Conversation:
    """The conversation that the column holds.

    Raises:
        TypeError, ValueError: as `check_conversation`, or it is no such text.
    """
    value = json.loads(text)
    if not isinstance(value, Mapping) or "messages" not in value:
        raise ValueError(f"{CONVERSATION} must be a JSON object with messages, got {text!r:.80}")
    return check_conversation(value["messages"], value.get("tools"), step_unit=value.get("step_unit", "turn"))


def encode_records(processor: PRMProcessor, batch: Mapping[str, Sequence[Any]]) -> list[EncodedSolution]:
    """Ids of B records, of which the whole steps that fit are kept.

    Args:
        processor: the model's.
        batch: columns `problem`, `steps` and, where some are conversations, `conversation`.

    Raises:
        ValueError: as `PRMProcessor.encode` and `encode_conversations`.
    """
    texts = list(batch.get(CONVERSATION) or [None] * len(batch["problem"]))
    plain = [row for row, text in enumerate(texts) if text is None]
    talks = [row for row, text in enumerate(texts) if text is not None]
    problems, steps = [batch["problem"][row] for row in plain], [batch["steps"][row] for row in plain]
    encoded: dict[int, EncodedSolution] = {}
    encoded |= zip(plain, processor.encode(problems, steps, truncation="drop"), strict=True)
    conversations = [load_conversation(texts[row]) for row in talks]
    items = processor.encode_conversations(conversations, truncation="drop") if talks else []
    encoded |= zip(talks, (item for item, _ in items), strict=True)
    return [encoded[row] for row in range(len(texts))]


def score_records(
    verifier: Any,
    problems: Sequence[str],
    steps: Sequence[Any],
    conversations: Sequence[str | None],
    **options: Any,
) -> list[Any]:
    """The results of `score_solutions`, with conversations by `score_conversations`, in the order given.

    Args:
        verifier: a `PRMVerifier`, or anything with its methods.
        problems, steps: N of them.
        conversations: N texts of the column, None for solutions.
        **options: `max_tokens_per_batch`, `on_error`, `show_progress` and, for solutions, `step_style`.
    """
    if not any(text is not None for text in conversations):
        return list(verifier.score_solutions(list(problems), list(steps), **options))
    results: dict[int, Any] = {}
    plain = [row for row, text in enumerate(conversations) if text is None]
    if plain:
        scores = verifier.score_solutions([problems[row] for row in plain], [steps[row] for row in plain], **options)
        results |= zip(plain, scores, strict=True)
    options.pop("step_style", None)
    loaded = {row: json.loads(text) for row, text in enumerate(conversations) if text is not None}
    for unit in sorted({value.get("step_unit", "turn") for value in loaded.values()}):
        rows = [row for row, value in loaded.items() if value.get("step_unit", "turn") == unit]
        talks = [{"messages": loaded[row]["messages"], "tools": loaded[row].get("tools")} for row in rows]
        results |= zip(rows, verifier.score_conversations(talks, step_unit=unit, **options), strict=True)
    return [results[row] for row in range(len(conversations))]
