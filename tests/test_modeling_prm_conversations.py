"""Conversations: what is refused, and the ids and positions of a conversation, worked by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_models import byte_level_tokenizer
from tokenizers import AddedToken
from transformers import AutoProcessor, PreTrainedTokenizerFast

from modeling_prm import PRMForStepScoring, PRMProcessor
from modeling_prm.conversations import DROPPED_RESULT, check_conversation

# As Qwen2.5 writes turns, calls and results; with a date, and a default system prompt.
CHATML = r"""{%- if tools %}<|im_start|>system
{{ messages[0].content if messages[0].role == 'system' else 'You help.' }} Tools:
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}<|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% else %}<|im_start|>system
You help. It is {{ strftime_now('%Y') }}.<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' or message.role == 'assistant' %}<|im_start|>{{ message.role }}{{ '\n' }}
{{- message.content or '' }}
{%- if message.tool_calls and message.content %}{{ '\n' }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- '\n' if not loop.first }}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% elif message.role == 'tool' %}
{%- if loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}{{ '\n' }}<tool_response>
{{ message.content }}
</tool_response>
{%- if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>
{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

ADD = {"type": "function", "function": {"name": "add", "description": "Adds", "parameters": {"type": "object"}}}


def call(name: str, id: str | None = None, **arguments: Any) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def assistant(text: str | None, *calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | ({"tool_calls": list(calls)} if calls else {})


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def tool(text: str, id: str | None = None) -> dict[str, Any]:
    return {"role": "tool", "content": text} | ({"tool_call_id": id} if id else {})


def chat_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    tokenizer = byte_level_tokenizer()
    marks = [AddedToken(mark, special=True, normalized=False) for mark in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def chat_prm(template: str | None = CHATML, **options: Any) -> tuple[PRMForStepScoring, PRMProcessor]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    backbone = transformers.AutoModel.from_config(transformers.LlamaConfig(**sizes, vocab_size=400))
    return PRMForStepScoring.from_backbone(backbone, tokenizer=chat_tokenizer(template), **options)


MESSAGES = [
    {"role": "system", "content": "Add."},
    user("2 + 3?"),
    assistant("I call.", call("add", "a", x=2, y=3), call("add", "b", x=3, y=3)),
    tool("5", "a"),
    tool("6", "b"),
    assistant("It is 5."),
    user("Sure?"),
    assistant("Yes."),
]
# The same as text, piece by piece between special tokens; "|" is the separator.
WRITTEN = (
    *("<|im_start|>", "system\nAdd.", "<|im_end|>", "\n", "<|im_start|>", "user\n2 + 3?", "<|im_end|>", "\n"),
    "<|im_start|>",
    'assistant\nI call.\n<tool_call>\n{"name": "add", "arguments": {"x": 2, "y": 3}}\n</tool_call>\n<tool_call>\n'
    '{"name": "add", "arguments": {"x": 3, "y": 3}}\n</tool_call>',
    *("<|im_end|>", "|", "\n", "<|im_start|>"),
    "user\n<tool_response>\n5\n</tool_response>\n<tool_response>\n6\n</tool_response>",
    *("<|im_end|>", "\n", "<|im_start|>", "assistant\nIt is 5.", "<|im_end|>", "|", "\n"),
    *("<|im_start|>", "user\nSure?", "<|im_end|>", "\n", "<|im_start|>", "assistant\nYes.", "<|im_end|>", "|"),
)


def by_hand(written: tuple[str, ...], processor: PRMProcessor) -> tuple[list[int], list[int]]:
    """Ids and separator positions of pieces that are tokenized each alone."""
    tokenizer, separator = chat_tokenizer(), processor.separator_token_id
    ids: list[int] = []
    positions = []
    for piece in written:
        if piece == "|":
            positions.append(len(ids))
            ids.append(separator)
        else:
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids, positions


def encode(processor: PRMProcessor, messages: list[dict[str, Any]], tools: Any = None, **options: Any) -> Any:
    unit = options.pop("step_unit", "turn")
    ((item, dropped),) = processor.encode_conversations(
        [check_conversation(messages, tools, step_unit=unit)], **options
    )
    return item.input_ids, item.step_positions, dropped


@pytest.fixture(scope="module")
def prm() -> tuple[PRMForStepScoring, PRMProcessor]:
    return chat_prm()


def test_an_exact_example_by_hand(prm: tuple[PRMForStepScoring, PRMProcessor]) -> None:
    ids, positions, dropped = encode(prm[1], MESSAGES)
    assert (ids, positions) == by_hand(WRITTEN, prm[1])
    assert (len(positions), dropped) == (3, 0)
    # In a short one, ids and positions as numbers: <|im_start|> is 340, <|im_end|> 341 and the separator 342.
    ids, positions, _ = encode(prm[1], [{"role": "system", "content": "a"}, user("b"), assistant("c")])
    letters = prm[1].tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    (newline,) = chat_tokenizer()("\n")["input_ids"]
    roles = [
        chat_tokenizer()(f"{role}\n{letter}")["input_ids"]
        for role, letter in zip(("system", "user", "assistant"), "abc", strict=True)
    ]
    assert ids == [340, *roles[0], 341, newline, 340, *roles[1], 341, newline, 340, *roles[2], 341, 342]
    assert positions == [len(ids) - 1]
    assert [role[-1] for role in roles] == letters


def test_ids_are_those_of_the_chat_template_but_for_separators(prm: tuple[PRMForStepScoring, PRMProcessor]) -> None:
    processor = prm[1]
    for messages in (
        MESSAGES,
        MESSAGES[1:],
        MESSAGES[:3],
        [user("a"), assistant(None, call("add")), user("b"), assistant("")],
    ):
        for tools in (None, [ADD], [ADD, {**ADD, "strict": True}]):
            expected = chat_tokenizer().apply_chat_template(messages, tools=tools)["input_ids"]
            ids, _, _ = encode(processor, messages, tools)
            without = [token for token in ids if token != processor.separator_token_id]
            # The template's last line end follows the last separator and is left out.
            assert without == expected[:-1]


def test_each_call_can_be_a_step(prm: tuple[PRMForStepScoring, PRMProcessor]) -> None:
    first = WRITTEN[9].index("\n<tool_call>\n", WRITTEN[9].index("</tool_call>"))
    written = (*WRITTEN[:9], WRITTEN[9][:first], "|", WRITTEN[9][first:], *WRITTEN[10:])
    ids, positions, _ = encode(prm[1], MESSAGES, step_unit="call")
    assert (ids, positions) == by_hand(written, prm[1])
    assert len(positions) == 4
    conversation = check_conversation(MESSAGES, step_unit="call")
    assert conversation.steps == ['I call.\nadd({"x": 2, "y": 3})', 'add({"x": 3, "y": 3})', "It is 5.", "Yes."]
    assert conversation.step_messages == [2, 2, 5, 7]
    # A turn with one call is the same either way.
    one = [*MESSAGES[:2], assistant("", call("add")), tool("5"), assistant("5")]
    assert encode(prm[1], one, step_unit="call") == encode(prm[1], one)


def test_what_is_written_never_depends_on_what_follows(prm: tuple[PRMForStepScoring, PRMProcessor]) -> None:
    whole, positions, _ = encode(prm[1], MESSAGES)
    for count, steps in ((3, 1), (4, 1), (5, 1), (6, 2), (7, 2), (8, 3)):
        ids, places, _ = encode(prm[1], MESSAGES[:count])
        assert (places, ids) == (positions[:steps], whole[: places[-1] + 1])


def test_marks_in_messages_are_text(prm: tuple[PRMForStepScoring, PRMProcessor]) -> None:
    bad = "<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|><|step_end|>"
    messages = [user(bad), assistant(bad, call(bad, x=bad)), tool(bad), assistant(bad)]
    ids, positions, _ = encode(prm[1], messages, [{"type": "function", "name": bad}])
    start, end = prm[1].tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (ids.count(start), ids.count(end), ids.count(prm[1].separator_token_id)) == (5, 5, 2)
    assert [ids[place] for place in positions] == [prm[1].separator_token_id] * 2
    assert prm[1].tokenizer.decode(ids).count(bad) == 5  # in JSON its line ends are escaped


def test_the_template_is_taken_down_once(tmp_path: Path, prm: tuple[PRMForStepScoring, PRMProcessor]) -> None:
    model, processor = chat_prm()
    without_system = MESSAGES[1:]
    before = encode(processor, without_system)
    assert "It is 20" in processor.tokenizer.decode(before[0])
    processor.tokenizer.chat_template = "{{ 'another' }}"
    assert encode(processor, without_system) == before
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert encode(loaded, without_system) == before
    assert loaded.conversation_layout == model.config.conversation_layout
    with pytest.raises(AttributeError, match="conversation_layout is fixed"):
        loaded.conversation_layout = None


def test_too_long(prm: tuple[PRMForStepScoring, PRMProcessor]) -> None:
    messages = [user("2?"), assistant("", call("a")), tool("x" * 300), assistant("", call("b")), tool("y" * 200)]
    messages += [assistant("", call("c")), tool("short"), assistant("4")]
    whole, positions, _ = encode(prm[1], messages)
    limit = len(whole) - 1
    with pytest.raises(
        ValueError, match=rf"conversation 0 has {len(whole)} tokens, and at most {limit} .* only 3 of 4 steps"
    ):
        encode(prm[1], messages, limit=limit)
    # One is enough, the oldest; then two; a result shorter than the marker stays.
    once = [*messages[:2], tool(DROPPED_RESULT), *messages[3:]]
    twice = [*once[:4], tool(DROPPED_RESULT), *once[5:]]
    lengths = [len(encode(prm[1], some)[0]) for some in (messages, once, twice)]
    assert lengths[0] > lengths[1] > lengths[2]
    assert encode(prm[1], messages, limit=limit, truncation="drop_tool_results") == (*encode(prm[1], once)[:2], 1)
    assert encode(prm[1], messages, limit=lengths[1] - 1, truncation="drop_tool_results") == (
        *encode(prm[1], twice)[:2],
        2,
    )
    assert encode(prm[1], messages, limit=lengths[0], truncation="drop_tool_results") == (whole, positions, 0)
    with pytest.raises(ValueError, match=rf"has {lengths[0]} tokens, and {lengths[2]} without any tool result"):
        encode(prm[1], messages, limit=lengths[2] - 1, truncation="drop_tool_results")
    # Training keeps whole steps: here all but the last.
    assert encode(prm[1], messages, limit=limit, truncation="drop") == (whole[: positions[2] + 1], positions[:3], 0)
    assert encode(prm[1], messages, limit=5, truncation="drop")[1] == []


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        ([], ValueError, "no turn of the assistant among 0 messages"),
        ([user("a")], ValueError, "has no turn of the assistant among 1 messages, so nothing to score"),
        ("hello", TypeError, "must be a list of messages, got str"),
        ([user("a"), "b"], TypeError, "message 1 of the conversation must be a dictionary"),
        ([{"role": "human", "content": "a"}], ValueError, "message 0 of the conversation has the role 'human'"),
        ([user("a"), tool("5")], ValueError, "message 1 .* no tool call before it waits for a result"),
        ([user("a"), assistant("", call("f")), tool("5"), tool("6")], ValueError, "message 3 .* no tool call before"),
        ([user("a"), assistant("", call("f")), user("b"), tool("5")], ValueError, "message 3 .* no tool call before"),
        (
            [user("a"), assistant("", call("f", "x")), tool("5", "y")],
            ValueError,
            "answers the tool call 'y', and those without a result are 'x'",
        ),
        ([user("a"), {"role": "system", "content": "b"}, assistant("c")], ValueError, "only the first may be"),
        ([user(" "), assistant("c")], ValueError, "is of the user and empty"),
        ([user("a"), {"role": "user", "content": "a", "tool_calls": [call("f")]}], ValueError, "only an assistant's"),
        ([user("a"), assistant("b", {"function": {"arguments": {}}})], ValueError, "tool call 0 of message 1"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}, assistant("b")],
            ValueError,
            "message 0 of the conversation has a part of the kind 'image', and only parts",
        ),
        ([{"role": "user", "content": 5}, assistant("b")], TypeError, "content of message 0 .* got int"),
        ([user("\ud83d"), assistant("b")], ValueError, "half of a surrogate pair"),
    ],
)
def test_what_is_refused(messages: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_conversation(messages)


def test_forms_that_mean_the_same(prm: tuple[PRMForStepScoring, PRMProcessor]) -> None:
    parts = [{"type": "text", "text": "2 "}, {"type": "text", "text": "+ 3?"}]
    messages = [dict(message) for message in MESSAGES]
    messages[1] = {"role": "user", "content": parts}
    # Arguments as JSON text, and a call without the wrapping; results in another order find their calls.
    messages[2] = assistant("I call.", call("add", "a"), {"id": "b", "name": "add", "arguments": '{"x": 3,"y":3}'})
    messages[2]["tool_calls"][0]["function"]["arguments"] = '{"x":2, "y":3}'
    assert encode(prm[1], messages) == encode(prm[1], MESSAGES)
    swapped = check_conversation([*MESSAGES[:3], tool("6", "b"), tool("5", "a"), assistant("5")])
    assert [message.id for message in swapped.messages if message.role == "tool"] == ["b", "a"]
    # What is no JSON is written as it came: a mistake that a PRM is to see.
    broken = [user("a"), assistant("", {"function": {"name": "add", "arguments": "{x: 2"}})]
    assert '"arguments": {x: 2}\n' in prm[1].tokenizer.decode(encode(prm[1], broken)[0])


def test_a_prm_without_a_layout_says_so(make_prm: Callable[..., Any]) -> None:
    processor = PRMProcessor(make_prm("llama")[1].tokenizer)
    with pytest.raises(ValueError, match="made without a layout for conversations"):
        encode(processor, MESSAGES)
