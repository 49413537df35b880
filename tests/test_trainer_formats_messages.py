"""Labelled conversations: the two formats, and the same commands for them as for solutions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_modeling_prm_conversations import assistant, by_hand, call, chat_prm, tool, user

from trainer.conversation_data import encode_records
from trainer.evaluate import main as evaluate
from trainer.preparation import tokenize_dataset
from trainer.readers import load_step_dataset, read_step_records

MESSAGES = [user("2 + 3?"), assistant("", call("add", "a", x=2)), tool("5", "a"), assistant("It is 6.")]


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def labels_of(file: Path, **options: Any) -> list[tuple[float, ...]]:
    return [record.labels for record in read_step_records(file, **options)[0]]


def test_messages_with_a_label_a_turn(tmp_path: Path) -> None:
    file = write(tmp_path, {"messages": MESSAGES, "labels": [1, -1], "tools": [{"name": "add"}]})
    (record,), report = read_step_records(file)
    assert (report.format, record.problem, record.labels) == ("messages", "2 + 3?", (1.0, 0.0))
    assert record.steps == ('add({"x": 2})', "It is 6.")
    assert json.loads(record.conversation or "") == {
        "messages": MESSAGES,
        "tools": [{"name": "add"}],
        "step_unit": "turn",
    }
    two = assistant("", call("add", x=2), call("add", x=3))
    file = write(tmp_path, {"messages": [user("a"), two], "labels": [True, False], "step_unit": "call"})
    assert labels_of(file) == [(1.0, 0.0)]
    file = write(tmp_path, {"messages": [user("a"), two], "labels": [True, False]})
    with pytest.raises(ValueError, match=r"data.jsonl:1: as many labels as .* got 2 labels for 1 turns"):
        read_step_records(file)


def test_neutral_is_a_choice(tmp_path: Path) -> None:
    three = [*MESSAGES, user("Sure?"), assistant("Yes.")]
    plain = write(tmp_path, {"messages": three, "labels": [1, 0, -1]})
    with pytest.raises(ValueError, match="labels hold both -1 and 0"):
        labels_of(plain)
    assert labels_of(plain, neutral="ignored") == [(1.0, -100.0, 0.0)]
    assert labels_of(plain, neutral="correct") == [(1.0, 1.0, 0.0)]
    assert labels_of(plain, neutral="class") == [(0.0, 1.0, 2.0)]
    # AgentProcessBench: by the index of the message, among its other columns.
    row = {"query_index": 0, "question": "2 + 3?", "messages": three, "tools": [], "final_label": -1}
    bench = write(tmp_path, row | {"step_labels": {"1": 1, "3": 0, "5": -1}})
    assert read_step_records(bench)[1].format == "agentprocessbench"
    assert labels_of(bench) == [(1.0, -100.0, 0.0)]
    assert labels_of(bench, neutral="incorrect") == [(1.0, 0.0, 0.0)]
    bench = write(tmp_path, row | {"step_labels": {"5": -1}})
    assert labels_of(bench) == [(-100.0, -100.0, 0.0)]
    for wrong, message in (({"2": 1}, "no turn of the assistant: got '2'"), ({"1": 2}, "must be .1, 0 or -1: got 2")):
        bench = write(tmp_path, row | {"step_labels": wrong})
        with pytest.raises(ValueError, match=message):
            labels_of(bench)


def test_conversations_and_solutions_are_tokenized_side_by_side(tmp_path: Path) -> None:
    _, processor = chat_prm()
    messages = [{"role": "system", "content": "Add."}, *MESSAGES]
    data = load_step_dataset(write(tmp_path, {"messages": messages, "labels": [1, 0]}))
    written = (
        *("<|im_start|>", "system\nAdd.", "<|im_end|>", "\n"),
        *("<|im_start|>", "user\n2 + 3?", "<|im_end|>", "\n", "<|im_start|>"),
        'assistant\n<tool_call>\n{"name": "add", "arguments": {"x": 2}}\n</tool_call>',
        *("<|im_end|>", "|", "\n", "<|im_start|>", "user\n<tool_response>\n5\n</tool_response>", "<|im_end|>", "\n"),
        *("<|im_start|>", "assistant\nIt is 6.", "<|im_end|>", "|"),
    )
    ids, positions = by_hand(written, processor)
    tokenized, report = tokenize_dataset(data, processor)
    assert tokenized[0]["input_ids"] == ids
    assert (tokenized[0]["step_positions"], report.labelled_steps) == (positions, 2)
    mixed = {"problem": ["1?", "2 + 3?"], "steps": [["1."], list(data[0]["steps"])]}
    mixed["conversation"] = [None, data[0]["conversation"]]
    items = encode_records(processor, mixed)
    assert items[0] == processor.encode(["1?"], [["1."]])[0]
    assert items[1].input_ids == ids


def test_evaluate_scores_the_conversations(tmp_path: Path) -> None:
    model, processor = chat_prm()
    with torch.no_grad():
        model.value_head.out.weight.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    rows = [{"messages": [user(f"{n} + 1?"), *MESSAGES[1:]], "labels": [n % 2, 1]} for n in range(4)]
    file = write(tmp_path, *rows)
    options = ["--model", str(tmp_path / "model"), "--benchmark", str(file), "--threshold", "0.5"]
    evaluate([*options, "--output-dir", str(tmp_path / "out")])
    predictions = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    verifier = model.verifier(processor)
    for row, prediction in zip(rows, predictions, strict=True):
        expected = verifier.score_messages(row["messages"]).step_probs
        assert prediction["step_probs"] == pytest.approx(expected, abs=1e-5)
