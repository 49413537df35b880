"""Models of several classes a step: labels as class indices from a file, on the command line, and what does not fit."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import make_rows

from modeling_prm import PRMForStepScoring, PRMProcessor
from trainer import train
from trainer.readers import load_step_dataset, read_step_records
from trainer.records import StepRecord

Folder = Callable[..., Path]
# Right, neutral, wrong; the second step of the fourth solution has no label.
CLASSES: list[list[Any]] = [[0, 1, 2], [0], [2, 2], [1, None, 0, 0], [0, 2, 1], [1]]


@pytest.fixture(autouse=True)
def _keep_logging() -> Iterator[None]:
    """The command sets up logging for its process, which is ours here."""
    root, handlers = logging.getLogger(), list(logging.getLogger().handlers)
    levels = {name: logging.getLogger(name).level for name in ("trainer", "modeling_prm", "hub_card")}
    yield
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classes") / "steps.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(CLASSES)), encoding="utf-8")
    return path


@pytest.fixture
def options(data: Path, tmp_path: Path) -> list[str]:
    words = ["--train-data", data, "--eval-data", data, "--output-dir", tmp_path / "out"]
    return [*map(str, words), "--use-cpu", "--report-to", "none", "--disable-tqdm", "true", "--max-steps", "1"]


def test_labels_are_read_as_class_indices(data: Path) -> None:
    dataset = load_step_dataset(data, format="classes")
    assert dataset["labels"][:] == [
        [0.0, 1.0, 2.0],
        [0.0],
        [2.0, 2.0],
        [1.0, -100.0, 0.0, 0.0],
        [0.0, 2.0, 1.0],
        [1.0],
    ]
    records, report = read_step_records(data, format="classes")
    assert records[0].classes
    assert records[3] == StepRecord(
        problem="What is 3 + 21?",
        steps=tuple(make_rows(CLASSES)[3]["steps"]),
        labels=(1, -100.0, 0, 0),
        classes=True,
    )
    assert (report.format, report.num_kept) == ("classes", 6)
    # A record's own line is a row of the format.
    assert records[3].to_dict()["labels"] == [1.0, -100.0, 0.0, 0.0]


def test_the_format_is_never_guessed(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"steps.jsonl:1.*labels must be in \[0, 1\] or -100: got 2 at step 3 of 3"):
        load_step_dataset(data)
    path = tmp_path / "binary.jsonl"
    path.write_text(json.dumps({"problem": "p", "steps": ["a", "b"], "labels": [1, 0]}) + "\n", encoding="utf-8")
    records, report = read_step_records(path)
    assert (report.format, records[0].classes, records[0].labels) == ("plain", False, (1.0, 0.0))


@pytest.mark.parametrize(
    ("label", "error", "message"),
    [
        (0.5, ValueError, r"labels must be class indices 0, 1, 2, ... or -100: got 0.5 at step 2 of 2"),
        (-1, ValueError, "got -1 at step 2 of 2; write the index of the step's class"),
        (float("nan"), ValueError, "got nan at step 2 of 2"),
        (float("inf"), ValueError, "got inf at step 2 of 2"),
        (True, TypeError, "labels must be ints or floats: got True"),
        ("wrong", TypeError, "labels must be ints or floats: got 'wrong'"),
    ],
)
def test_other_labels_are_refused(tmp_path: Path, label: Any, error: type[Exception], message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"problem": "p", "steps": ["a", "b"], "labels": [0, label]}) + "\n", encoding="utf-8")
    with pytest.raises(error, match=message):
        load_step_dataset(path, format="classes")


def test_three_classes_are_trained_from_a_file_and_gone_on_with(
    backbone_folder: Folder, options: list[str], tmp_path: Path
) -> None:
    classes = ["--num-labels", "3", "--class-weights", "1", "0.75", "0", "--data-format", "classes"]
    more = ["--max-steps", "60", "--learning-rate", "1e-2", "--label-smoothing", "0.01", "--head-dropout", "0"]
    metrics = train.main(["--backbone", str(backbone_folder("qwen2")), *options, *classes, *more])
    # Chance among three classes is a loss of ln 3 = 1.1.
    assert metrics["eval_loss"] < 0.3
    assert metrics["eval_step_accuracy"] == 1.0
    assert metrics["eval_num_steps"] == 13.0

    model = PRMForStepScoring.from_pretrained(tmp_path / "out")
    processor = PRMProcessor.from_pretrained(tmp_path / "out")
    assert (model.config.num_labels, model.config.class_weights) == (3, [1.0, 0.75, 0.0])
    for row in make_rows(CLASSES):
        batch = processor(row["problem"], row["steps"], return_tensors="pt")
        with torch.inference_mode():
            output = model(**batch)
        for index, label in enumerate(row["labels"]):
            assert label is None or int(output.logits[0, index].argmax()) == label

    # Another training starts from these classes, and needs no option for them.
    again = ["--model", str(tmp_path / "out"), *options, "--data-format", "classes", "--output-dir", tmp_path / "again"]
    metrics = train.main([*map(str, again), "--learning-rate", "0"])
    assert metrics["eval_step_accuracy"] == 1.0
    assert PRMForStepScoring.from_pretrained(tmp_path / "again").config.class_weights == [1.0, 0.75, 0.0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--num-labels 3 --class-weights 1 0.5 0",
            r"steps.jsonl:1.*labels must be in \[0, 1\] or -100: got 2 ",
        ),
        (
            "--data-format classes",
            "--data-format classes is for models of several classes, and this one has one logit a step; give "
            "--num-labels and --class-weights too",
        ),
        (
            "--data-format classes --num-labels 2 --class-weights 1 0",
            r"record 0 \(from 0\): labels must be class indices 0 to 1, or -100: got 2.0",
        ),
        ("--data-format classes --num-labels 3", "num_labels=3 needs class_weights, 3 numbers in"),
        ("--data-format classes --num-labels 3 --class-weights 1 0", "num_labels=3 needs class_weights, 3 numbers in"),
        ("--data-format classes --class-weights 1 0", "class_weights belong to num_labels of 2 or more"),
        (
            "--data-format classes --num-labels 3 --class-weights 1 0.5 0 --pos-weight 2",
            "ranking and pos_weight are for one logit a step, the model has 3 classes",
        ),
    ],
)
def test_labels_and_classes_that_do_not_fit_are_one_line(
    backbone_folder: Folder, options: list[str], words: str, message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train.main(["--backbone", str(backbone_folder("qwen2")), *options, *words.split()])
    assert re.search(message, str(stopped.value.code))
    assert "\n" not in str(stopped.value.code)


def test_correctness_and_classes_are_not_mixed_up(
    make_prm: Callable[..., Any], options: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "binary.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows([[1, 0], [1]])), encoding="utf-8")
    model, processor = make_prm("qwen2", num_labels=3, class_weights=[1.0, 0.5, 0.0])
    model.save_pretrained(tmp_path / "prm")
    processor.save_pretrained(tmp_path / "prm")
    words = ["--model", str(tmp_path / "prm"), *options, "--train-data", str(path), "--eval-data", str(path)]
    # 1 is correct in one code, and neutral in the other.
    with pytest.raises(SystemExit, match="the model has 3 classes a step, and the labels are read as how correct"):
        train.main(words)
    with pytest.raises(SystemExit, match=r"num_labels is 3, not 2"):
        train.main([*words, "--num-labels", "2"])
    with pytest.raises(SystemExit, match=r"class_weights is \[1.0, 0.5, 0.0\], not \[1.0, 1.0, 0.0\]"):
        train.main([*words, "--class-weights", "1", "1", "0"])
