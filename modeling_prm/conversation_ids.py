"""Conversations as token ids: the layout's texts, the messages' texts, and a separator after each step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from .conversation_layout import PLACEHOLDER, ConversationLayout
from .conversations import Conversation, ToolCall
from .joined_text import Piece


class ConversationIds(NamedTuple):
    """The ids of a conversation up to the separator of its last step, and where each step's separator ends."""

    input_ids: list[int]
    separator_ends: list[int]


def conversation_ids(
    conversations: Sequence[Conversation],
    layout: ConversationLayout,
    *,
    cut: Callable[[str], list[Piece]],
    tokenize: Callable[[list[str]], list[list[int]]],
    bos_ids: Sequence[int],
    separator_ids: Sequence[int],
) -> list[ConversationIds]:
    """Ids of conversations.

    What stands between two special tokens of the layout, or a separator and one, is tokenized as one text, as
    Transformers tokenizes a rendered template; in messages, special tokens are plain text.

    Args:
        conversations: what to write.
        layout: what stands around messages.
        cut: a layout's text cut at its special tokens, which are given as ids.
        tokenize: texts to ids, with special tokens as plain text.
        bos_ids: what comes before it all.
        separator_ids: what closes a step.

    Raises:
        ValueError: the layout has no place for what a conversation holds.
    """
    written = [_join(write_parts(one, layout), cut, list(bos_ids)) for one in conversations]
    texts = list(dict.fromkeys(piece for pieces in written for piece in pieces if isinstance(piece, str)))
    ids_of = dict(zip(texts, tokenize(texts) if texts else [], strict=True))
    results = []
    for pieces in written:
        ids: list[int] = []
        ends: list[int] = []
        for piece in pieces:
            if piece is None:
                ids += separator_ids
                ends.append(len(ids) - 1)
            else:
                ids += [piece] if isinstance(piece, int) else ids_of[piece]
        results.append(ConversationIds(ids, ends))
    return results


def _join(parts: Iterator[Part], cut: Callable[[str], list[Piece]], pieces: list[int]) -> list[Piece | None]:
    """Pieces of which two texts in a row are one, and None for a separator."""
    joined: list[Piece | None] = [*pieces]
    for part in parts:
        if part.kind == "separator":
            joined.append(None)
            continue
        for piece in cut(part.text) if part.kind == "template" else [part.text]:
            if isinstance(piece, str) and joined and isinstance(last := joined[-1], str):
                joined[-1] = last + piece
            elif piece != "":
                joined.append(piece)
    return joined


@dataclass(frozen=True)
class Part:
    """A stretch of a conversation: `"template"` text, in which special tokens are themselves, a user's `"text"`, or
    the `"separator"` after a step."""

    kind: str
    text: str = ""


def write_parts(conversation: Conversation, layout: ConversationLayout) -> Iterator[Part]:
    """A conversation up to the separator of its last step.

    What comes before a separator never depends on what comes after it.

    Raises:
        ValueError: the layout has no place for what the conversation holds.
    """
    before, rest = "start", ""
    last = conversation.step_messages[-1]
    for index, message in enumerate(conversation.messages[: last + 1]):
        opening = rest + _between(before, message.kind, index, conversation, layout)[len(layout.end.get(before, "")) :]
        yield from _fill(opening, {"name": message.name, "id": message.id}, conversation, layout, index)
        text = message.text.strip() if message.role in layout.trimmed else message.text
        if message.thinking:
            yield from _fill(layout.thinking, {"thinking": message.thinking}, conversation, layout, index)
        yield Part("text", text)
        before, rest = message.kind, ""
        if message.role == "assistant":
            if message.calls:
                yield from _write_calls(message.calls, bool(text), conversation, layout, index)
            end = layout.end[message.kind]
            # White space after a turn belongs to what follows it, as a step's joiner does.
            rest = end[len(end.rstrip()) :]
            ids = {"id": message.calls[-1].id if message.calls else None}
            yield from _fill(end.rstrip(), ids, conversation, layout, index)
            yield Part("separator")


def _between(before: str, kind: str, index: int, conversation: Conversation, layout: ConversationLayout) -> str:
    pair = f"{before}>{kind}"
    if pair not in layout.between:
        raise ValueError(
            f"message {index} is of the kind {kind!r} and follows {before!r}, which the chat template that this PRM "
            "was made with refuses; leave it out, join it to another message, or make the PRM with "
            "conversations='plain'"
        )
    if not conversation.tools or index > 1:
        return layout.between[pair]
    text = layout.between_with_tools.get(pair, layout.between[pair])
    # Of the first two messages one is written with the tools.
    is_last_place = index == 1 or conversation.messages[0].role != "system"
    if is_last_place and not any("{tools}" in one for one in _openings(conversation, layout)):
        raise ValueError(
            "the chat template that this PRM was made with has no place for tools here; describe them in the system "
            "message, or make the PRM with conversations='plain'"
        )
    return text


def _openings(conversation: Conversation, layout: ConversationLayout) -> list[str]:
    kinds = ["start", *(message.kind for message in conversation.messages[:2])]
    return [layout.between_with_tools.get(f"{one}>{two}", "") for one, two in pairwise(kinds)]


def _write_calls(
    calls: Sequence[ToolCall], has_text: bool, conversation: Conversation, layout: ConversationLayout, index: int
) -> Iterator[Part]:
    """The calls of a turn without what closes the last."""
    for number, call in enumerate(calls):
        ids = {"id": call.id}
        opening = (layout.call_open if has_text else layout.call_open_bare) if number == 0 else layout.call_next
        yield from _fill(opening, ids, conversation, layout, index)
        yield Part("text", call.name)
        yield from _fill(layout.call_middle, ids, conversation, layout, index)
        yield Part("text", call.arguments)
        if number < len(calls) - 1:
            yield from _fill(layout.call_end, ids, conversation, layout, index)
            if conversation.step_unit == "call":
                yield Part("separator")


def _fill(
    text: str, values: Mapping[str, str | None], conversation: Conversation, layout: ConversationLayout, index: int
) -> Iterator[Part]:
    """A layout's text with what its placeholders stand for."""
    pieces = PLACEHOLDER.split(text)
    for number, piece in enumerate(pieces):
        if number % 2 == 0:
            yield Part("template", piece)
        elif piece == "tools":
            tools = (json.dumps(tool, ensure_ascii=False, indent=layout.tool_indent) for tool in conversation.tools)
            yield Part("text", layout.tool_joiner.join(tools))
        elif (value := values.get(piece)) is None:
            raise ValueError(
                f"message {index} has a tool call without {piece}, which the chat template that this PRM was made with "
                "writes; give it"
            )
        else:
            yield Part("text", value)
