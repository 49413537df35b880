"""How a conversation of an agent is laid out: what a chat template writes around messages, taken down once.

Texts between two messages, around tool calls and around the list of tools are read off the template's own
renderings of conversations made of marks, so that at scoring time no template is run: a date, a default system prompt
or a later version of the template changes nothing, and what is written up to a turn never depends on what follows it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from transformers import PreTrainedTokenizerBase

# An assistant's turn with tool calls is of the kind "calls".
KINDS = ("start", "system", "user", "assistant", "calls", "tool")
PLACEHOLDER = re.compile(r"\{(name|id|thinking|tools)\}")

# How Hermes and Qwen write calls and results, also where a template has no place of its own for them.
_CALL_OPEN, _CALL_MIDDLE = '<tool_call>\n{"name": "', '", "arguments": '
_CALL_END, _RESULT_OPEN, _RESULT_END = "}\n</tool_call>", "<tool_response>\n", "\n</tool_response>"
_THINKING = "<think>\n{thinking}\n</think>\n\n"

# Kinds of messages of which each conversation of marks is made; "calls" has one call and "calls2" two. The first must
# be writable, of the others a template may refuse any.
_NEEDED = ("user", "assistant", "user", "assistant", "user")
_CHATS: tuple[tuple[str, ...], ...] = (
    ("system", "user", "assistant", "user", "assistant", "user"),
    ("user", "assistant", "assistant", "user"),
    ("user", "user", "assistant", "user"),
    ("system", "assistant", "user", "assistant", "user"),
    ("assistant", "user", "assistant", "user"),
)
_TOOL_CHATS: tuple[tuple[str, ...], ...] = (
    ("user", "calls", "tool", "calls", "tool", "assistant", "user"),
    ("system", "user", "calls2", "tool", "tool", "assistant", "user"),
    ("user", "assistant", "user", "calls", "tool", "user", "assistant", "user"),
    ("user", "calls", "user", "assistant", "user"),
    ("user", "calls", "assistant", "user"),
    ("user", "assistant", "calls", "tool", "assistant", "user"),
    ("user", "calls", "calls", "tool", "assistant", "user"),
    ("system", "calls", "tool", "assistant", "user"),
)


class CaptureError(ValueError):
    """A chat template does what cannot be taken down as texts between messages."""


@dataclass(frozen=True, kw_only=True)
class ConversationLayout:
    """The texts between the parts of a conversation; special tokens in them are themselves.

    Attributes:
        between: for two kinds of messages, such as `"user>assistant"`, what stands between their contents; `"start"`
            is what comes before the first. `{name}` and `{id}` are those of a tool's result.
        between_with_tools: those texts that differ where tools are given, with `{tools}` once.
        end: for `"assistant"` and `"calls"`, what closes the turn: what the texts after it begin with.
        call_open, call_open_bare: from the turn's text, or from the turn's beginning where it has none, to the name
            of the first call.
        call_middle: from a call's name to its arguments.
        call_end, call_next: from a call's arguments to its end, and from there to the next call's name.
        thinking: a turn's thinking, before its text.
        tool_joiner, tool_indent: what stands between two tools, and the indent of their JSON.
        trimmed: kinds of messages whose content is written without white space around it.
        adds_bos: whether the tokenizer's own first ids come before it all.

    Raises:
        TypeError, ValueError: a part is missing or of the wrong type.
    """

    between: Mapping[str, str]
    end: Mapping[str, str]
    call_open: str = f"\n{_CALL_OPEN}"
    call_open_bare: str = _CALL_OPEN
    call_middle: str = _CALL_MIDDLE
    call_end: str = _CALL_END
    call_next: str = f"\n{_CALL_OPEN}"
    thinking: str = _THINKING
    between_with_tools: Mapping[str, str] = field(default_factory=dict)
    tool_joiner: str = "\n"
    tool_indent: int | None = None
    trimmed: Sequence[str] = ()
    adds_bos: bool = False

    def __post_init__(self) -> None:
        for name in ("between", "end", "between_with_tools"):
            texts = getattr(self, name)
            if not isinstance(texts, Mapping) or not all(isinstance(text, str) for text in texts.values()):
                raise TypeError(f"{name} of a conversation layout must map names to texts, got {texts!r:.80}")
        for item in fields(self):
            if item.type == "str" and not isinstance(getattr(self, item.name), str):
                raise TypeError(
                    f"{item.name} of a conversation layout must be a text, got {getattr(self, item.name)!r:.80}"
                )
        if missing := [kind for kind in ("assistant", "calls") if kind not in self.end]:
            raise ValueError(f"end of a conversation layout lacks {', '.join(missing)}")
        for pair, text in {**self.between, **self.between_with_tools}.items():
            before = pair.partition(">")[0]
            if not text.startswith(self.end.get(before, "")):
                raise ValueError(f"{pair} of a conversation layout must begin with what ends {before}, got {text!r}")

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> ConversationLayout:
        """From what `to_dict` gave, as a config holds it.

        Raises:
            TypeError, ValueError: as the class, or an option is unknown or missing.
        """
        if not isinstance(options, Mapping):
            raise TypeError(f"a conversation layout is a dictionary, got {type(options).__name__}")
        known = {item.name for item in fields(cls)}
        if unknown := sorted(options.keys() - known):
            raise ValueError(f"a conversation layout has no {', '.join(unknown)}; a newer release may have written it")
        if missing := sorted({"between", "end"} - options.keys()):
            raise ValueError(f"a conversation layout needs {', '.join(missing)}")
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary of JSON's types."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def plain_layout() -> ConversationLayout:
    """The layout of a PRM whose tokenizer has no chat template: the role's name before each message."""
    names = {"system": "System: ", "user": "User: ", "assistant": "Assistant: "}
    between = {f"start>{kind}": name for kind, name in names.items()}
    for before in names:
        between |= {f"{before}>{kind}": "\n\n" + name for kind, name in names.items() if kind != "system"}
    tools = {
        f"start>{kind}": "You can call these tools:\n{tools}\n\n" + names[kind]
        for kind in ("system", "user", "assistant")
    }
    return ConversationLayout(
        between=_with_tools_as_text(between),
        end={"assistant": "\n\n", "calls": _CALL_END + "\n\n"},
        between_with_tools=tools,
        adds_bos=True,
    )


def conversation_layout(tokenizer: PreTrainedTokenizerBase, kind: str) -> tuple[ConversationLayout, str | None]:
    """The layout that a new PRM gets.

    Args:
        tokenizer: the backbone's.
        kind: `"chat"`, that of the tokenizer's chat template; `"plain"`; or `"auto"`, plain where there is no chat
            template or one that cannot be taken down.

    Returns:
        The layout, and why it is not that of the chat template with `"auto"`.

    Raises:
        ValueError: there is no such kind, or with `"chat"` no chat template that can be taken down.
    """
    if kind not in ("auto", "chat", "plain"):
        raise ValueError(f"conversations must be 'auto', 'chat' or 'plain', got {kind!r}")
    if kind == "plain":
        return plain_layout(), None
    try:
        if not tokenizer.chat_template:
            raise CaptureError("the tokenizer has no chat template")
        return capture_layout(tokenizer), None
    except CaptureError as error:
        if kind == "chat":
            raise ValueError(
                f"conversations='chat' cannot be: {error}; pass conversations='plain', which writes the role's name "
                "before each message"
            ) from error
        return plain_layout(), str(error)


def capture_layout(tokenizer: PreTrainedTokenizerBase) -> ConversationLayout:
    """Take down what the tokenizer's chat template writes.

    Where the template has no place for tool calls or results, they are written as Hermes does, in the assistant's and
    in a user's turn. Thinking is written in every turn that has some, whatever the template does with earlier turns.

    Raises:
        CaptureError: it refuses a conversation of user and assistant, changes or moves messages, or writes a turn in
            another way in another place.
    """
    render = _renderer(tokenizer)
    between = _gaps(_NEEDED, render(_NEEDED) or "")
    if between is None:
        raise CaptureError("the chat template does not write the messages of a plain conversation as they stand")
    for chat in _CHATS:
        text = render(chat)
        _merge(between, _gaps(chat, text) if text is not None else None, chat)
    end = {"assistant": _end(render, ("user", "assistant"), _content("assistant", 1))}
    call_parts: dict[str, Any] = {}
    with_calls = _capture_calls(render, between, end)
    if with_calls is None:
        between = _with_tools_as_text(between)
        end = {**end, "calls": _CALL_END + end["assistant"]}
    else:
        between, end, call_parts = with_calls
    for pair, text in between.items():
        before = pair.partition(">")[0]
        if not text.startswith(end.get(before, "")):
            raise CaptureError(
                f"the chat template closes the last turn with {end[before]!r}, and one before others with {text!r}, so "
                "that a turn would be written differently once something follows it"
            )
    with_tools, tool_parts = _capture_tools(render, between)
    return ConversationLayout(
        between=between,
        end=end,
        between_with_tools=with_tools,
        thinking=_capture_thinking(render, between),
        trimmed=[kind for kind in ("system", "user", "assistant", "tool") if _is_trimmed(render, kind)],
        **call_parts,
        **tool_parts,
    )


# --------------------------------------------------------------------------- marks, and what is written around them

Render = Callable[..., str | None]


def _content(kind: str, index: int) -> str:
    return f"Mark{kind}{index}end"


def _call(index: int, number: int) -> tuple[str, str, str]:
    """Name, value of the one argument, and id, of nine letters and digits as some templates want it."""
    return f"Func{index}n{number}end", f"Value{index}n{number}end", f"id{index:03d}n{number}en"


def _arguments(value: str) -> dict[str, str]:
    return {"Key": value}


def _message(kind: str, index: int, calls_before: list[tuple[str, str, str]]) -> dict[str, Any]:
    if kind == "tool":
        name, _, id = calls_before.pop(0) if calls_before else _call(0, 0)
        return {"role": "tool", "content": _content("tool", index), "name": name, "tool_call_id": id}
    if not kind.startswith("calls"):
        return {"role": kind, "content": _content(kind, index)}
    calls_before[:] = [_call(index, number) for number in range(2 if kind == "calls2" else 1)]
    calls = [
        {"id": id, "type": "function", "function": {"name": name, "arguments": _arguments(value)}}
        for name, value, id in calls_before
    ]
    return {"role": "assistant", "content": _content("calls", index), "tool_calls": calls}


def _renderer(tokenizer: PreTrainedTokenizerBase) -> Render:
    def render(
        kinds: Sequence[str], *, tools: Any = None, changed: Callable[[list[dict[str, Any]]], None] | None = None
    ) -> str | None:
        """The template's text of marks of these kinds, or None where it refuses them."""
        calls: list[tuple[str, str, str]] = []
        messages = [_message(kind, index, calls) for index, kind in enumerate(kinds)]
        if changed is not None:
            changed(messages)
        try:
            # Llama's templates take this date in place of today's.
            return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, date_string="26 Jul 2024"))
        except ImportError as error:
            raise CaptureError(str(error)) from error
        except Exception:
            # Templates are programs of others, which refuse messages with errors of any kind.
            return None

    return render


def _gaps(kinds: Sequence[str], text: str) -> dict[str, str] | None:
    """What stands between the marks, by the kinds on its sides; None unless each mark is there once, in order.

    After a turn with calls it begins after the last call's arguments.
    """
    gaps: dict[str, str] = {}
    calls: list[tuple[str, str, str]] = []
    position, before, id_before = 0, "start", ""
    for index, kind in enumerate(kinds):
        message = _message(kind, index, calls)
        mark = message["content"]
        start = text.find(mark, position)
        if start < 0 or text.count(mark) != 1:
            return None
        gap = text[position:start]
        ids = {id_before: "{id}"} if id_before else {}
        if kind == "tool":
            ids |= {message["tool_call_id"]: "{id}", message["name"]: "{name}"}
        kind = kind.rstrip("2")
        if gaps.setdefault(f"{before}>{kind}", _masked(gap, ids)) != _masked(gap, ids):
            raise CaptureError(f"the chat template writes two things between {before} and {kind}: {gaps} and {gap!r}")
        position, before, id_before = start + len(mark), kind, ""
        if kind == "calls":
            name, value, id_before = calls[-1]
            last = _find_arguments(text, value, text.find(name, position))
            if last is None:
                return None
            position = last[1]
    return gaps


def _masked(text: str, marks: Mapping[str, str]) -> str:
    if found := PLACEHOLDER.search(text):
        raise CaptureError(f"the chat template itself writes {found[0]}")
    for mark, placeholder in marks.items():
        text = text.replace(mark, placeholder)
    return text


def _merge(between: dict[str, str], found: dict[str, str] | None, kinds: Sequence[str]) -> None:
    for pair, text in (found or {}).items():
        if between.setdefault(pair, text) != text:
            before, after = pair.split(">")
            raise CaptureError(
                f"the chat template writes {between[pair]!r} and elsewhere {text!r} between {before} and {after} (in "
                f"{', '.join(kinds)})"
            )


def _find_arguments(text: str, value: str, start: int) -> tuple[int, int] | None:
    """Where the arguments stand as JSON, from `start` on; None where they do not."""
    written = json.dumps(_arguments(value))
    place = text.find(written, start) if start >= 0 else -1
    return None if place < 0 else (place, place + len(written))


def _end(render: Render, kinds: Sequence[str], mark: str) -> str:
    text = render(kinds)
    if text is None or text.count(mark) != 1:
        raise CaptureError("the chat template does not write a last turn of the assistant as it stands")
    return text.partition(mark)[2]


# --------------------------------------------------------------------------- calls, tools, thinking, white space


def _capture_calls(
    render: Render, between: Mapping[str, str], end: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str], dict[str, Any]] | None:
    """Texts between messages with those of calls and results, ends, and parts of a call; None where it has none."""
    # A plain turn and a user's message follow, since templates may write the newest turns in another way.
    one, two = ("user", "calls", "tool", "assistant", "user"), ("user", "calls2", "tool", "tool", "assistant", "user")
    text, bare, double, last = render(one), render(one, changed=_without_text), render(two), render(("user", "calls"))
    if text is None or bare is None or double is None or last is None:
        return None
    (name, value, id), (second, second_value, second_id) = _call(1, 0), _call(1, 1)
    places = [_find_arguments(written, value, written.find(name)) for written in (text, bare, double, last)]
    second_place = _find_arguments(double, second_value, double.find(second))
    mark, bare_start = _content("calls", 1), _content("user", 0) + between["user>assistant"]
    if None in places or second_place is None or text.count(mark) != 1 or bare.count(bare_start) != 1:
        return None
    (start, stop), _, (_, double_stop), (_, last_stop) = places  # type: ignore[misc]
    ids = {id: "{id}", second_id: "{id}"}
    next_call = _masked(double[double_stop : double.find(second)], ids)
    closing = _masked(last[last_stop:], ids)
    call_end = _common_start(next_call, closing)
    parts = {
        "call_open": _masked(text[text.find(mark) + len(mark) : text.find(name)], ids),
        "call_open_bare": _masked(bare[bare.find(bare_start) + len(bare_start) : bare.find(name)], ids),
        "call_middle": _masked(text[text.find(name) + len(name) : start], ids),
        "call_end": call_end,
        "call_next": next_call[len(call_end) :],
    }
    if not (
        _masked(double[second_place[1] :], ids).startswith(closing) and _masked(text[stop:], ids).startswith(closing)
    ):
        return None
    merged = dict(between)
    found = False
    for chat in _TOOL_CHATS:
        written = render(chat)
        gaps = _gaps(chat, written) if written is not None else None
        _merge(merged, gaps, chat)
        found |= gaps is not None and "calls>tool" in gaps
    if not found:
        return None
    return merged, {**end, "calls": closing}, parts


def _common_start(one: str, other: str) -> str:
    count = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:count]


def _without_text(messages: list[dict[str, Any]]) -> None:
    messages[1]["content"] = ""


def _with_tools_as_text(between: Mapping[str, str]) -> dict[str, str]:
    """The texts between messages with calls in the assistant's turn, and results in a user's."""
    merged = {pair: text for pair, text in between.items() if "calls" not in pair and "tool" not in pair}
    for before in ("start", "system", "user", "assistant"):
        if (text := merged.get(f"{before}>assistant")) is not None:
            merged[f"{before}>calls"] = text
    for after in ("user", "assistant", "calls"):
        if (text := merged.get(f"assistant>{after}")) is not None:
            merged[f"calls>{after}"] = _CALL_END + text
    merged["calls>tool"] = merged["calls>user"] + _RESULT_OPEN
    merged["tool>tool"] = _RESULT_END + "\n" + _RESULT_OPEN
    for after in ("assistant", "calls"):
        merged[f"tool>{after}"] = _RESULT_END + merged[f"user>{after}"]
    merged["tool>user"] = _RESULT_END + merged.get("user>user", "\n\n")
    return merged


def _capture_tools(render: Render, between: Mapping[str, str]) -> tuple[dict[str, str], dict[str, Any]]:
    """The texts that differ where tools are given, and how tools are written; empty where there is no place for any."""
    tools = [_tool(number) for number in range(2)]
    differing: dict[str, str] = {}
    for indent in (None, 4):
        first, second = (json.dumps(tool, indent=indent) for tool in tools)
        for chat in (("system", "user", "assistant", "user"), ("user", "assistant", "user")):
            text = render(chat, tools=tools)
            if text is None or text.count(first) != 1 or text.count(second) != 1:
                continue
            joiner = text.partition(first)[2].partition(second)[0]
            gaps = _gaps(chat, text.replace(first + joiner + second, "\0"))
            if gaps is None:
                continue
            for pair, gap in gaps.items():
                if gap != between.get(pair):
                    differing[pair] = gap.replace("\0", "{tools}")
        if differing:
            return differing, {"tool_joiner": joiner, "tool_indent": indent}
    return {}, {}


def _tool(number: int) -> dict[str, Any]:
    name = f"Tool{number}end"
    parameters = {"type": "object", "properties": {"Key": {"type": "string"}}, "required": ["Key"]}
    return {"type": "function", "function": {"name": name, "description": "Text", "parameters": parameters}}


def _capture_thinking(render: Render, between: Mapping[str, str]) -> str:
    def think(messages: list[dict[str, Any]]) -> None:
        messages[-1]["reasoning_content"] = "Markthinkingend"

    text = render(("user", "assistant"), changed=think) or ""
    written = text.partition(_content("user", 0))[2].partition(_content("assistant", 1))[0]
    opening = between["user>assistant"]
    if not written.startswith(opening) or written.count("Markthinkingend") != 1:
        return _THINKING
    return _masked(written[len(opening) :], {"Markthinkingend": "{thinking}"})


def _is_trimmed(render: Render, kind: str) -> bool:
    chats = {"system": ("system", "user"), "tool": ("user", "calls", "tool", "assistant", "user")}
    chat = chats.get(kind, ("user", "assistant", "user"))
    index = chat.index(kind)

    def pad(messages: list[dict[str, Any]]) -> None:
        messages[index]["content"] = f"\n {messages[index]['content']} \n"

    plain, padded = render(chat), render(chat, changed=pad)
    return plain is not None and plain == padded
