"""Conversations of agents, in which a step is an assistant's turn, or each of its tool calls.

    {"role": "user", "content": "What is 2 + 3?"}
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2, "b": 3}}}]}
    {"role": "tool", "content": "5"}
    {"role": "assistant", "content": "It is 5."}

Messages are those that the chat templates of Transformers take. What the system, a user or a tool says is context and
no step; what follows the last scored turn is not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
STEP_UNITS = ("turn", "call")
DROPPED_RESULT = "[tool result left out: the conversation is too long]"
# The names under which a message may hold its thinking.
_THINKING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_TITLE_LENGTH = 4_000


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call: the tool's name, its arguments as JSON text (or as they came, where they are none), and its id."""

    name: str
    arguments: str
    id: str | None = None

    def __str__(self) -> str:
        return f"{self.name}({self.arguments})"


@dataclass(frozen=True, kw_only=True)
class Message:
    """A message, checked.

    Attributes:
        role: one of `ROLES`.
        text: its content, text parts joined.
        thinking: the thinking of an assistant's turn.
        calls: its tool calls.
        name, id: of a tool's result, the tool's name and the call's id.
    """

    role: str
    text: str
    thinking: str = ""
    calls: tuple[ToolCall, ...] = ()
    name: str = ""
    id: str | None = None

    @property
    def kind(self) -> str:
        return "calls" if self.calls else self.role


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A conversation, checked.

    Attributes:
        messages: in order, at least one of them an assistant's turn.
        tools: descriptions of the tools, as dictionaries.
        step_unit: `"turn"`, or `"call"`: each tool call is a step, with the turn's text in its first one.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    step_unit: str = "turn"

    @property
    def step_messages(self) -> list[int]:
        """For each step, the 0-based index of its message."""
        places = []
        for index, message in enumerate(self.messages):
            if message.role == "assistant":
                places += [index] * (max(len(message.calls), 1) if self.step_unit == "call" else 1)
        return places

    @property
    def steps(self) -> list[str]:
        """For each step its text, as people read it."""
        steps = []
        for message in self.messages:
            if message.role != "assistant":
                continue
            head = [part for part in (message.thinking.strip(), message.text.strip()) if part]
            if self.step_unit == "call" and message.calls:
                steps.append("\n".join([*head, str(message.calls[0])]))
                steps += map(str, message.calls[1:])
            else:
                steps.append("\n".join([*head, *map(str, message.calls)]) or "(nothing)")
        return steps

    @property
    def task(self) -> str:
        """What the user asks first, for titles and to tell tasks apart."""
        texts = [message.text for message in self.messages if message.role == "user" and message.text.strip()]
        return texts[0][:_TITLE_LENGTH] if texts else "(no message of a user)"

    @property
    def tool_results(self) -> list[int]:
        """The 0-based indices of the tool results before the last scored turn that are longer than their marker."""
        last = self.step_messages[-1]
        return [
            index
            for index, message in enumerate(self.messages[:last])
            if message.role == "tool" and len(message.text) > len(DROPPED_RESULT)
        ]

    def without_results(self, count: int) -> Conversation:
        """The same with the oldest `count` of `tool_results` replaced by a marker that says so."""
        dropped = set(self.tool_results[:count])
        messages = (
            replace(message, text=DROPPED_RESULT) if index in dropped else message
            for index, message in enumerate(self.messages)
        )
        return replace(self, messages=tuple(messages))


def check_conversation(
    messages: Any, tools: Any = None, *, step_unit: str = "turn", name: str = "the conversation"
) -> Conversation:
    """Check messages in the convention of Transformers' chat templates.

    Args:
        messages: dictionaries with `role` and `content` (a text, text parts, or None beside tool calls), of the
            assistant also `tool_calls` and `reasoning_content`, of a tool also `name` and `tool_call_id`. Other keys
            are not read. A call's `arguments` may be an object or its JSON text.
        tools: JSON schemas of the tools.
        step_unit: `"turn"` or `"call"`.
        name: what to call it in messages.

    Raises:
        TypeError: something is of the wrong type.
        ValueError: no message, no assistant's turn, an unknown role, a system message that is not the first, a tool's
            result without its call, content that is no text, half of a surrogate pair, or no such unit.
    """
    if step_unit not in STEP_UNITS:
        raise ValueError(f"step_unit must be 'turn' or 'call', got {step_unit!r}")
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(f"{name} must be a list of messages, got {type(messages).__name__}")
    checked: list[Message] = []
    open_calls: list[ToolCall] = []
    for index, message in enumerate(messages):
        where = f"message {index} of {name}"
        item = _check_message(message, where)
        if item.role == "system" and index:
            raise ValueError(f"{where} is of the system, which only the first may be; join it to that one")
        if item.role == "tool":
            item = _find_call(item, open_calls, where)
        else:
            open_calls = list(item.calls)
        checked.append(item)
    if not any(message.role == "assistant" for message in checked):
        raise ValueError(f"{name} has no turn of the assistant among {len(checked)} messages, so nothing to score")
    return Conversation(messages=tuple(checked), tools=_check_tools(tools, name), step_unit=step_unit)


def _check_message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise TypeError(f"{where} must be a dictionary with role and content, got {type(message).__name__}")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{where} has the role {role!r}; roles are {', '.join(ROLES)}")
    calls = message.get("tool_calls") or ()
    if calls and role != "assistant":
        raise ValueError(f"{where} is of the {role} and has tool_calls, which only an assistant's turn may have")
    if isinstance(calls, (str, Mapping)) or not isinstance(calls, Sequence):
        raise TypeError(f"tool_calls of {where} must be a list, got {type(calls).__name__}")
    thinking = next((message[key] for key in _THINKING_FIELDS if message.get(key) is not None), "")
    item = Message(
        role=role,
        text=_check_content(message.get("content"), role, where),
        thinking=_check_text(thinking, f"the thinking of {where}") if role == "assistant" else "",
        calls=tuple(_check_call(call, f"tool call {number} of {where}") for number, call in enumerate(calls)),
        name=_check_text(message.get("name") or "", f"name of {where}"),
        id=_check_id(message.get("tool_call_id"), where) if role == "tool" else None,
    )
    if role in ("system", "user") and not item.text.strip():
        raise ValueError(f"{where} is of the {role} and empty; leave it out or give its text")
    return item


def _check_content(content: Any, role: str, where: str) -> str:
    if content is None and role in ("assistant", "tool"):
        return ""
    if isinstance(content, str):
        return _check_text(content, where)
    if not isinstance(content, Sequence):
        raise TypeError(f"content of {where} must be a text or a list of text parts, got {type(content).__name__}")
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(
                f"content of {where} has a part of the kind {kind!r}, and only parts "
                '{"type": "text", "text": ...} are read: a PRM scores text; leave it out or describe it'
            )
        texts.append(part["text"])
    return _check_text("".join(texts), where)


def _check_text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{where} must be a text, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f"{where} holds half of a surrogate pair, {text!r:.80}; decode its source with the right encoding"
        ) from None
    return text


def _check_id(id: Any, where: str) -> str | None:
    return None if id is None else _check_text(id, f"the id of {where}")


def _check_call(call: Any, where: str) -> ToolCall:
    if not isinstance(call, Mapping):
        raise TypeError(f"{where} must be a dictionary, got {type(call).__name__}")
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f'{where} must have {{"function": {{"name": ..., "arguments": ...}}}}, got {call!r:.120}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            # Calls that are no JSON are mistakes that a PRM is to see.
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    if not isinstance(arguments, str):
        try:
            arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"arguments of {where} cannot be written as JSON: {error}") from error
    return ToolCall(
        name=_check_text(function["name"], where),
        arguments=_check_text(arguments, where),
        id=_check_id(call.get("id"), where),
    )


def _find_call(result: Message, open_calls: list[ToolCall], where: str) -> Message:
    """The tool's result with what its call says of it; the call is open no longer."""
    if not open_calls:
        raise ValueError(
            f"{where} is of a tool, and no tool call before it waits for a result: it must follow the assistant's turn "
            "that called it"
        )
    place = 0
    if result.id is not None and any(call.id is not None for call in open_calls):
        found = [index for index, call in enumerate(open_calls) if call.id == result.id]
        if not found:
            ids = ", ".join(repr(call.id) for call in open_calls)
            raise ValueError(f"{where} answers the tool call {result.id!r}, and those without a result are {ids}")
        place = found[0]
    call = open_calls.pop(place)
    return replace(result, name=result.name or call.name, id=call.id if result.id is None else result.id)


def _check_tools(tools: Any, name: str) -> tuple[Mapping[str, Any], ...]:
    if tools is None:
        return ()
    if isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence):
        raise TypeError(f"tools of {name} must be a list of JSON schemas, got {type(tools).__name__}")
    for number, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise TypeError(
                f"tool {number} of {name} must be its JSON schema as a dictionary, got {type(tool).__name__}; "
                "transformers.utils.get_json_schema makes one of a function"
            )
        try:
            json.dumps(tool)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"tool {number} of {name} cannot be written as JSON: {error}") from error
    return tuple(tools)
