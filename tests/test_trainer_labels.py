"""What training does to labels: rules worked by hand, what truncation leaves, and that evaluation measures all."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from small_training import make_arguments, make_rows, make_trainer

from modeling_prm import PRMForStepScoring, PRMProcessor
from trainer.collator import PRMDataCollator
from trainer.labels import LabelRules, report_trained_steps
from trainer.prm_trainer import PRMTrainer

IGNORED = -100.0
MakePRM = Callable[..., tuple[PRMForStepScoring, PRMProcessor]]
Folder = Callable[..., Path]


@pytest.mark.parametrize(
    ("options", "labels", "expected"),
    [
        # By default soft labels are hardened at 0.5, and nothing is left out.
        ({}, [1.0, 0.0, 0.5, 0.49, IGNORED, 1.0], [1.0, 0.0, 1.0, 0.0, IGNORED, 1.0]),
        ({"label_threshold": 0.25}, [0.25, 0.24, 0.0], [1.0, 0.0, 0.0]),
        ({"label_threshold": 1.0}, [1.0, 0.99], [1.0, 0.0]),
        ({"soft_labels": "keep"}, [0.3, 1.0, IGNORED], [0.3, 1.0, IGNORED]),
        # The first wrong step is kept, what follows it is not.
        ({"after_first_error": "mask"}, [1.0, 0.0, 1.0, 0.0], [1.0, 0.0, IGNORED, IGNORED]),
        ({"after_first_error": "mask"}, [0.0, 1.0], [0.0, IGNORED]),
        ({"after_first_error": "mask"}, [1.0, 1.0], [1.0, 1.0]),
        ({"after_first_error": "mask"}, [1.0, 0.0], [1.0, 0.0]),
        ({"after_first_error": "mask"}, [IGNORED, IGNORED], [IGNORED, IGNORED]),
        # A step without a label is no error.
        ({"after_first_error": "mask"}, [1.0, IGNORED, 1.0, 0.0, 1.0], [1.0, IGNORED, 1.0, 0.0, IGNORED]),
        # What is an error goes by the threshold, also of labels that stay soft.
        ({"after_first_error": "mask", "soft_labels": "keep"}, [0.9, 0.4, 0.8], [0.9, 0.4, IGNORED]),
        (
            {"after_first_error": "mask", "soft_labels": "keep", "label_threshold": 0.3},
            [0.9, 0.4, 0.2, 1.0],
            [0.9, 0.4, 0.2, IGNORED],
        ),
        ({"last_step_only": True}, [1.0, 0.0, 1.0], [IGNORED, IGNORED, 1.0]),
        ({"last_step_only": True}, [0.0], [0.0]),
        ({"last_step_only": True}, [1.0, 0.0, IGNORED], [IGNORED, IGNORED, IGNORED]),
        # Classes: indices stay as they are, a class that counts less than 0.5 is an error.
        ({"class_weights": (1.0, 0.5, 0.0)}, [0.0, 1.0, 2.0, IGNORED], [0.0, 1.0, 2.0, IGNORED]),
        (
            {"class_weights": (1.0, 0.5, 0.0), "after_first_error": "mask"},
            [0.0, 1.0, 2.0, 0.0],
            [0.0, 1.0, 2.0, IGNORED],
        ),
        (
            {"class_weights": (0.0, 0.49, 1.0), "after_first_error": "mask"},
            [2.0, 1.0, 2.0, IGNORED],
            [2.0, 1.0, IGNORED, IGNORED],
        ),
        ({"class_weights": (1.0, 0.0), "last_step_only": True}, [0.0, 1.0], [IGNORED, 1.0]),
    ],
)
def test_rules_worked_by_hand(options: dict[str, Any], labels: list[float], expected: list[float]) -> None:
    given = list(labels)
    assert LabelRules(**options)(labels) == expected
    assert labels == given, "the rules must not change what they are given"


@pytest.mark.parametrize("tenth", range(1, 11))
def test_a_label_on_the_threshold_is_correct_also_after_float32(tenth: int) -> None:
    label = torch.tensor(tenth / 10).item()  # as a dataset gives it back
    rules = LabelRules(label_threshold=tenth / 10)
    assert rules([label, tenth / 10, tenth / 10 - 1e-6]) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"soft_labels": "round"}, r"soft_labels must be one of \('harden', 'keep'\), got 'round'"),
        ({"after_first_error": "drop"}, r"after_first_error must be one of \('keep', 'mask'\), got 'drop'"),
        ({"label_threshold": 0.0}, "label_threshold must be above 0 and at most 1, got 0.0"),
        ({"label_threshold": 1.01}, "label_threshold must be above 0 and at most 1, got 1.01"),
        ({"label_threshold": float("nan")}, "label_threshold must be above 0 and at most 1, got nan"),
        ({"last_step_only": True, "after_first_error": "mask"}, "would take the last step of every solution with an"),
    ],
)
def test_values_outside_those_allowed_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelRules(**options)


def test_options_of_training_refuse_what_leaves_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would take the last step of every solution"):
        make_arguments(tmp_path, train_on_last_step_only=True, after_first_error="mask")
    with pytest.raises(ValueError, match="ranking_loss='pairwise' finds no pair of steps where train_on_last_step_onl"):
        make_arguments(tmp_path, train_on_last_step_only=True, ranking_loss="pairwise")


def test_evaluation_hardens_and_leaves_nothing_out() -> None:
    labels = [0.6, 0.2, IGNORED, 1.0]
    for left_out in ({"after_first_error": "mask"}, {"last_step_only": True}):
        rules = LabelRules(label_threshold=0.3, **left_out).for_evaluation()
        assert rules(labels) == [1.0, 0.0, IGNORED, 1.0]
        soft = LabelRules(soft_labels="keep", class_weights=None, **left_out).for_evaluation()
        assert soft(labels) == labels
    classes = LabelRules(class_weights=(1.0, 0.0, 0.0), after_first_error="mask").for_evaluation()
    assert classes([1.0, 2.0, 0.0]) == [1.0, 2.0, 0.0]


def test_the_last_step_of_a_truncated_solution_teaches_nothing(make_prm: MakePRM) -> None:
    _, processor = make_prm("qwen2")
    # Three labelled steps, of which two fit.
    features = [
        {"input_ids": [1, 2, 3, 4], "step_positions": [1, 3], "labels": [1.0, 0.0, 1.0]},
        {"input_ids": [1, 2, 3, 4], "step_positions": [1, 3], "labels": [1.0, 0.0]},
    ]
    collator = PRMDataCollator(processor, LabelRules(last_step_only=True))
    assert collator(features)["labels"].tolist() == [[IGNORED, IGNORED], [IGNORED, 0.0]]
    # And an error that did not fit masks nothing.
    features[0]["labels"] = [1.0, 1.0, 0.0]
    collator = PRMDataCollator(processor, LabelRules(after_first_error="mask"))
    assert collator(features)["labels"].tolist() == [[1.0, 1.0], [1.0, 0.0]]


def batches(trainer: PRMTrainer, dataloader: Any) -> list[list[float]]:
    return [row for batch in dataloader for row in batch["labels"].tolist()]


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"after_first_error": "mask"}, [[1.0, 0.0, IGNORED, IGNORED], [0.0, IGNORED, IGNORED, IGNORED]]),
        ({"train_on_last_step_only": True}, [[IGNORED, IGNORED, IGNORED, 1.0], [IGNORED, 1.0, IGNORED, IGNORED]]),
        ({"soft_labels": "keep"}, [[0.75, 0.25, 1.0, 1.0], [0.0, 1.0, IGNORED, IGNORED]]),
        ({"label_threshold": 0.8}, [[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, IGNORED, IGNORED]]),
    ],
)
def test_the_trainer_leaves_out_in_training_and_never_in_evaluation(
    prm_folder: Folder, tmp_path: Path, options: dict[str, Any], trained: list[list[float]]
) -> None:
    rows = make_rows([[0.75, 0.25, 1.0, 1.0], [0.0, 1.0]])
    options = {"soft_labels": "harden", "train_sampling_strategy": "sequential"} | options
    dataset = datasets.Dataset.from_list(rows)
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, dataset, eval_dataset=dataset, **options)
    assert batches(trainer, trainer.get_train_dataloader()) == trained
    # All labels, hardened as in training.
    first = 0.0 if options.get("label_threshold") == 0.8 else 1.0
    hardened = [[first, 0.0, 1.0, 1.0], [0.0, 1.0, IGNORED, IGNORED]]
    measured = trained if options["soft_labels"] == "keep" else hardened
    assert batches(trainer, trainer.get_eval_dataloader()) == measured
    assert batches(trainer, trainer.get_test_dataloader(dataset)) == measured
    assert trainer.evaluate()["eval_num_steps"] == 6.0
    assert batches(trainer, trainer.get_train_dataloader()) == trained


def test_the_classes_of_the_model_say_what_an_error_is(make_prm: MakePRM, tmp_path: Path) -> None:
    model, processor = make_prm("qwen2", num_labels=3, class_weights=[0.0, 0.25, 1.0])
    rows = datasets.Dataset.from_list(make_rows([[2.0, 1.0, 2.0], [2.0, 2.0, 0.0]]))
    arguments = make_arguments(tmp_path, after_first_error="mask", train_sampling_strategy="sequential")
    trainer = PRMTrainer(model, arguments, processing_class=processor, train_dataset=rows)
    assert batches(trainer, trainer.get_train_dataloader()) == [[2.0, 1.0, IGNORED], [2.0, 2.0, 0.0]]


def test_what_training_leaves_out_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    labels = [[1.0, 0.0, 1.0, IGNORED], [0.5, 1.0], [0.0, 1.0]]
    positions = [[3, 5, 7, 9], [3, 5], [3]]  # the third solution keeps its first step
    with caplog.at_level(logging.INFO, logger="trainer.labels"):
        report_trained_steps(labels, positions, LabelRules(soft_labels="keep"))
        assert caplog.messages == []
        report_trained_steps(labels, positions, LabelRules(after_first_error="mask"))
        report_trained_steps(labels, positions, LabelRules(last_step_only=True))
    assert caplog.messages == [
        "training takes 5 of 6 labelled steps",
        # The last step of the first has no label, that of the third did not fit.
        "training takes 1 of 6 labelled steps",
    ]


def test_rules_that_leave_nothing_are_refused(prm_folder: Folder, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(make_rows([[1.0, IGNORED], [0.0, IGNORED]]))
    make_trainer(prm_folder("qwen2"), tmp_path, rows)
    with pytest.raises(ValueError, match=r"none of 2 labelled steps is left to train on.*train_on_last_step_only=True"):
        make_trainer(prm_folder("qwen2"), tmp_path, rows, train_on_last_step_only=True)
