"""Tokenizing labelled solutions: labels go where their steps go, and what does not fit is counted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import datasets
import pytest

from modeling_prm import PRMForStepScoring, PRMProcessor
from trainer.preparation import PreparationReport, tokenize_dataset

MakePRM = Callable[..., tuple[PRMForStepScoring, PRMProcessor]]

# The tokenizer gives "x" and "y" one id each, and "Problem: ", "Step 1: " and the rest what `overhead` measures.
ROWS: list[dict[str, Any]] = [
    {"problem": "x", "steps": ["x"], "labels": [0.0]},
    {"problem": "x", "steps": ["x" * 10, "y" * 10, "x" * 40, "y"], "labels": [1.0, -100.0, 0.25, 0.0]},
    {"problem": "x" * 90, "steps": ["x", "y"], "labels": [1.0, 1.0]},
]


@pytest.fixture
def processor(make_prm: MakePRM) -> PRMProcessor:
    return make_prm("qwen2")[1]


def lengths(processor: PRMProcessor, row: dict[str, Any]) -> list[int]:
    """How many ids a record has with its first 1, 2, ... steps, counted from pieces tokenized alone."""

    def count(text: str) -> int:
        return len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    total, found = count(f"Problem: {row['problem']}\n\n"), []
    for number, step in enumerate(row["steps"], start=1):
        total += (count("\n") if number > 1 else 0) + count(f"Step {number}: {step}") + 1
        found.append(total)
    return found


def test_each_record_becomes_ids_positions_and_labels(processor: PRMProcessor) -> None:
    tokenized, report = tokenize_dataset(datasets.Dataset.from_list(ROWS), processor)
    assert tokenized.column_names == ["input_ids", "step_positions", "labels", "record", "problem_id"]
    for row, record in zip(ROWS, tokenized, strict=True):
        ends = lengths(processor, row)
        assert record["step_positions"] == [end - 1 for end in ends]
        assert len(record["input_ids"]) == ends[-1]
        assert [record["input_ids"][end - 1] for end in ends] == [processor.separator_token_id] * len(ends)
        assert record["labels"] == row["labels"]
    # 1 + 4 + 2 steps, one of them with the label -100.
    assert report == PreparationReport(
        records=3, kept_records=3, steps=7, kept_steps=7, labelled_steps=6, soft_labels=1
    )


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_truncation_drops_whole_steps_with_their_labels(processor: PRMProcessor, kept: int) -> None:
    ends = lengths(processor, ROWS[1])
    for limit in (ends[kept - 1], ends[kept] - 1):
        processor.max_length = limit
        tokenized, report = tokenize_dataset(datasets.Dataset.from_list(ROWS[:2]), processor)
        assert tokenized[1]["step_positions"] == [end - 1 for end in ends[:kept]]
        assert len(tokenized[1]["input_ids"]) == ends[kept - 1]
        # The labels of the steps that did not fit stay behind those that did.
        assert tokenized[1]["labels"] == ROWS[1]["labels"]
        labelled = 1 + {1: 1, 2: 1, 3: 2}[kept]
        assert report == PreparationReport(
            records=2, kept_records=2, steps=5, kept_steps=1 + kept, labelled_steps=labelled, soft_labels=kept // 3
        )
    # A step that would fit again after one that does not is left out too, so that none is scored without its past.
    assert len(ROWS[1]["steps"][3]) < len(ROWS[1]["steps"][2])


def test_what_was_left_out_is_logged_as_a_warning(processor: PRMProcessor, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="trainer.preparation")
    dataset = datasets.Dataset.from_list(ROWS)
    tokenize_dataset(dataset, processor)
    processor.max_length = lengths(processor, ROWS[1])[1]
    tokenize_dataset(dataset, processor, overlong_problems="skip")
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert "kept 3 of 3 records and 7 of 7 steps; 6 steps have a label" in caplog.messages[0]
    assert f"at max_length={processor.max_length} kept 2 of 3 records and 3 of 7 steps" in caplog.messages[1]
    assert "2 steps have a label" in caplog.messages[1]


def test_truncation_error_names_the_record(processor: PRMProcessor) -> None:
    # `map` reads 1000 records at a time: the number counts from the first record, not from the batch's.
    rows = [ROWS[0]] * 1003 + [ROWS[1]]
    processor.max_length = lengths(processor, ROWS[1])[1]
    with pytest.raises(ValueError, match=r"record 1003 \(from 0\) keeps 2 of 4 steps at max_length=\d+"):
        tokenize_dataset(datasets.Dataset.from_list(rows), processor, truncation="error")
    processor.max_length = lengths(processor, ROWS[1])[-1]
    assert tokenize_dataset(datasets.Dataset.from_list(rows), processor, truncation="error")[1].kept_steps == 1007


@pytest.mark.parametrize("truncation", ["drop", "error"])
def test_a_problem_that_leaves_no_room_is_named_or_skipped(processor: PRMProcessor, truncation: str) -> None:
    dataset = datasets.Dataset.from_list([ROWS[2], ROWS[0], ROWS[2], ROWS[0]])
    processor.max_length = lengths(processor, ROWS[2])[0] - 1
    with pytest.raises(ValueError, match=r"2 records have a problem that leaves room for no step .* \[0, 2\]"):
        tokenize_dataset(dataset, processor, truncation=truncation)
    tokenized, report = tokenize_dataset(dataset, processor, truncation=truncation, overlong_problems="skip")
    assert [record["labels"] for record in tokenized] == [[0.0], [0.0]]
    assert report == PreparationReport(records=4, kept_records=2, steps=6, kept_steps=2, labelled_steps=2)


def test_nothing_to_learn_is_refused(processor: PRMProcessor) -> None:
    unlabelled = [{**row, "labels": [-100.0] * len(row["steps"])} for row in ROWS]
    with pytest.raises(ValueError, match=r"no step has a label \(kept 3 of 3 records and 7 of 7 steps"):
        tokenize_dataset(datasets.Dataset.from_list(unlabelled), processor)
    # The only label stands at a step that does not fit.
    row = {**ROWS[1], "labels": [-100.0, -100.0, -100.0, 1.0]}
    processor.max_length = lengths(processor, ROWS[1])[2]
    with pytest.raises(ValueError, match="no step has a label"):
        tokenize_dataset(datasets.Dataset.from_list([row]), processor)
    with pytest.raises(ValueError, match="the dataset is empty"):
        tokenize_dataset(datasets.Dataset.from_list([ROWS[0]]).select([]), processor)


def test_missing_columns_are_named(processor: PRMProcessor) -> None:
    dataset = datasets.Dataset.from_list([{"prompt": "x", "steps": ["x"], "completions": ["y"]}])
    with pytest.raises(ValueError, match=r"lacks the columns \['problem', 'labels'\].*\['prompt', 'steps', 'compl"):
        tokenize_dataset(dataset, processor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [1.0]}, "got 1 labels for 2 steps"),
        ({"labels": None}, "got 0 labels for 2 steps"),
        ({"labels": [1.0, None]}, r"must be ints or floats: got None.*at step 2 of 2"),
        ({"labels": [1.0, -1.0]}, r"must be in \[0, 1\] or -100: got -1.0"),
        ({"labels": [1.0, float("nan")]}, "got nan"),
        ({"steps": [], "labels": []}, "at least one step"),
        ({"steps": ["x", " "]}, "step must not be empty"),
        ({"problem": ""}, "problem must not be empty"),
        ({"problem": None}, "problem must be a string"),
    ],
)
def test_a_record_that_is_not_valid_is_named(processor: PRMProcessor, change: dict[str, Any], message: str) -> None:
    bad = {**ROWS[2], **change}
    with pytest.raises(ValueError, match=rf"record 1002 \(from 0\): .*{message}"):
        tokenize_dataset(datasets.Dataset.from_list([ROWS[2]] * 1002 + [bad, ROWS[2]]), processor)


def test_options_are_checked(processor: PRMProcessor) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    with pytest.raises(ValueError, match="got 'cut' and 'error'"):
        tokenize_dataset(dataset, processor, truncation="cut")
    with pytest.raises(ValueError, match="got 'drop' and 'ignore'"):
        tokenize_dataset(dataset, processor, overlong_problems="ignore")


@pytest.mark.parametrize(
    ("dtype", "labels"),
    [
        ("float32", [1.0, -100.0, 0.25, 0.0]),
        ("float64", [1.0, -100.0, 0.75, 0.0]),
        ("int64", [1, -100, 0, 1]),
        ("int8", [0, -100, -100, 1]),
        ("bool", [True, False, True, True]),
    ],
)
def test_labels_of_every_type_become_the_same_numbers(processor: PRMProcessor, dtype: str, labels: list[Any]) -> None:
    features = datasets.Features(
        {
            "problem": datasets.Value("string"),
            "steps": datasets.List(datasets.Value("string")),
            "labels": datasets.List(datasets.Value(dtype)),
        }
    )
    rows = [{**ROWS[1], "labels": [labels[0]] * 4}, {**ROWS[1], "labels": labels}]
    dataset = datasets.Dataset.from_list(rows, features=features)
    tokenized, report = tokenize_dataset(dataset, processor)
    assert tokenized.features["labels"] == datasets.List(datasets.Value("float32"))
    assert tokenized[1]["labels"] == [float(label) for label in labels]
    assert report.labelled_steps == 8 - labels.count(-100)


def test_labels_of_classes_are_their_indices(processor: PRMProcessor) -> None:
    dataset = datasets.Dataset.from_list([{**ROWS[1], "labels": [2, 0, -100, 1]}])
    tokenized, report = tokenize_dataset(dataset, processor, num_labels=3)
    assert tokenized[0]["labels"] == [2.0, 0.0, -100.0, 1.0]
    assert report.labelled_steps == 3
    for wrong in (3, -1, 0.5):
        dataset = datasets.Dataset.from_list([{**ROWS[1], "labels": [2, 0, -100, wrong]}])
        with pytest.raises(ValueError, match=rf"record 0 .*class indices 0 to 2, or -100: got {wrong}"):
            tokenize_dataset(dataset, processor, num_labels=3)


def test_neither_dataset_nor_processor_is_changed(processor: PRMProcessor) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    processor.max_length = lengths(processor, ROWS[1])[0]
    before = processor.to_dict()
    tokenize_dataset(dataset, processor, overlong_problems="skip")
    assert [dict(row) for row in dataset] == ROWS
    assert processor.to_dict() == before
