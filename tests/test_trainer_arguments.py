"""Options of training: their names, their defaults beside those of Transformers, and what is refused."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from small_training import make_arguments
from transformers import TrainingArguments

from trainer.adapters import AdapterArguments
from trainer.arguments import DataArguments, ModelArguments, PRMTrainingArguments
from trainer.model_calibration import CalibrationArguments

# What users write in their scripts and files. A name that leaves this list breaks them.
MODEL_OPTIONS = {
    "backbone": None,
    "model": None,
    "head_type": None,
    "num_labels": None,
    "class_weights": None,
    "head_dropout": None,
    "separator_token": None,
    "prompt_layout": None,
    "max_length": None,
    "aggregation": None,
    "attn_implementation": None,
    "backbone_dtype": "float32",
    "backbone_revision": None,
    "model_revision": None,
}
ADAPTER_OPTIONS = {"lora_r": None, "lora_alpha": None, "lora_dropout": 0.0, "lora_target_modules": ["all-linear"]}
CALIBRATION_OPTIONS = {"calibrate": True, "calibration_set": None, "threshold_metric": "processbench_f1"}
DATA_OPTIONS = {
    "train_data": MISSING,
    "eval_data": [],
    "eval_fraction": 0.0,
    "train_split": "train",
    "eval_split": "test",
    "data_format": "auto",
    "on_bad_row": "error",
    "rejected_file": None,
    "neutral": None,
    "paths": "all",
    "decontaminate_against": [],
    "streaming": False,
}
TRAINING_OPTIONS = {
    "head_learning_rate": None,
    "freeze_backbone": False,
    "truncation": "drop",
    "overlong_problems": "error",
    "error_threshold": None,
    "soft_labels": "harden",
    "label_threshold": 0.5,
    "after_first_error": "keep",
    "train_on_last_step_only": False,
    "pos_weight": 1.0,
    "label_smoothing": 0.0,
    "step_weighting": "uniform",
    "loss_normalization": "step",
    "ranking_loss": "none",
    "ranking_weight": 1.0,
    "ranking_margin": 4.0,
    "bce_weight": 1.0,
    "disable_dropout": False,
    "packing": "none",
    "dataset_num_proc": None,
    "shuffle_buffer_size": 10_000,
}


def defaults(dataclass: type) -> dict[str, Any]:
    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(dataclass)
    }


def test_names_and_defaults_of_our_options_are_frozen() -> None:
    assert defaults(ModelArguments) == MODEL_OPTIONS
    assert defaults(AdapterArguments) == ADAPTER_OPTIONS
    assert defaults(CalibrationArguments) == CALIBRATION_OPTIONS
    assert defaults(DataArguments) == DATA_OPTIONS
    theirs, ours = defaults(TrainingArguments), defaults(PRMTrainingArguments)
    assert {name: value for name, value in ours.items() if name not in theirs} == TRAINING_OPTIONS
    changed = {name: value for name, value in theirs.items() if ours[name] != value}
    assert changed == {"learning_rate": 5e-5, "logging_steps": 500}
    assert (ours["learning_rate"], ours["logging_steps"]) == (1e-5, 10)


def test_names_are_in_one_dataclass_only_and_explained() -> None:
    seen: set[str] = set()
    for dataclass in (ModelArguments, AdapterArguments, CalibrationArguments, DataArguments, PRMTrainingArguments):
        names = {field.name for field in fields(dataclass)}
        assert not names & seen
        seen |= names
        for field in fields(dataclass):
            if field.name in MODEL_OPTIONS | ADAPTER_OPTIONS | CALIBRATION_OPTIONS | DATA_OPTIONS | TRAINING_OPTIONS:
                assert field.metadata["help"].endswith(".")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"label_smoothing_factor": 0.1},
            r"label_smoothing_factor=0.1 smooths the targets of a softmax.*give label_smoothing",
        ),
        ({"average_tokens_across_devices": False}, "the number of processes; leave it at True"),
        ({"truncation": "cut"}, r"truncation must be one of \('drop', 'error'\), got 'cut'"),
        ({"overlong_problems": "drop"}, r"overlong_problems must be one of \('error', 'skip'\), got 'drop'"),
        ({"packing": "tight"}, r"packing must be one of \('none', 'pack', 'share'\), got 'tight'"),
        ({"shuffle_buffer_size": 0}, "shuffle_buffer_size must be at least 1, got 0; to leave the order as it is"),
        ({"dataset_num_proc": 0}, "dataset_num_proc must be None or at least 1, got 0"),
        ({"error_threshold": 1.01}, r"error_threshold must be in \[0, 1\], got 1.01"),
        ({"error_threshold": float("nan")}, r"error_threshold must be in \[0, 1\], got nan"),
        ({"head_learning_rate": -1e-5}, "head_learning_rate must be None or at least 0, got -1e-05"),
        ({"bf16": True, "fp16": True}, "At most one of fp16 and bf16"),
    ],
)
def test_values_outside_those_allowed_are_refused(tmp_path: Any, option: dict[str, Any], message: str) -> None:
    make_arguments(tmp_path)
    with pytest.raises(ValueError, match=message):
        make_arguments(tmp_path, **option)


def test_values_at_the_border_are_taken(tmp_path: Any) -> None:
    args = make_arguments(tmp_path, error_threshold=1.0, head_learning_rate=0.0, truncation="error")
    assert (args.error_threshold, args.head_learning_rate, args.truncation) == (1.0, 0.0, "error")


def test_evaluation_data_come_from_one_place() -> None:
    with pytest.raises(ValueError, match="give --eval-data or --eval-fraction, not both"):
        DataArguments(train_data=["a"], eval_data=["b"], eval_fraction=0.1)
    with pytest.raises(ValueError, match="--eval-fraction needs all training data at hand; give --eval-data"):
        DataArguments(train_data=["a"], eval_fraction=0.1, streaming=True)


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_pushes_that_would_send_optimizer_states_are_refused(strategy: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"hub_strategy='{strategy}' would push optimizer states"):
        PRMTrainingArguments(output_dir=str(tmp_path), push_to_hub=True, hub_strategy=strategy)
    # Without a push there is nothing to refuse.
    PRMTrainingArguments(output_dir=str(tmp_path), hub_strategy=strategy)


@pytest.mark.parametrize("strategy", ["end", "every_save"])
def test_pushes_of_the_model_are_taken(strategy: str, tmp_path: Path) -> None:
    args = PRMTrainingArguments(output_dir=str(tmp_path), push_to_hub=True, hub_strategy=strategy)
    assert args.hub_strategy == strategy


@pytest.mark.parametrize(
    ("metric", "greater"), [("brier", False), ("eval_set_brier", False), ("ece", False), ("error_f1", True)]
)
def test_direction_of_the_metric_for_the_best_model(metric: str, greater: bool, tmp_path: Path) -> None:
    args = PRMTrainingArguments(output_dir=str(tmp_path), metric_for_best_model=metric, use_cpu=True)
    assert args.greater_is_better is greater
