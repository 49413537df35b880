"""Options and data of TRL's PRM trainer (last in TRL 1.13.0), and what takes their place here."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import datasets

from .formats import READERS

_Class = TypeVar("_Class", bound=type)

# Options of TRL's PRMConfig that PRMTrainingArguments lacks, with what to do instead.
PYTHON_NAMES: dict[str, str] = {
    "step_separator": "the separator is a token of its own, PRMForStepScoring.from_backbone(..., separator_token=...)",
    "max_length": "the processor limits the length, PRMForStepScoring.from_backbone(..., max_length=...)",
    "max_completion_length": "max_length of PRMForStepScoring.from_backbone limits problem and steps together, and "
    "truncation='drop' leaves out whole steps",
    "model_init_kwargs": "give dtype, attn_implementation and revision to PRMForStepScoring.from_backbone",
}

# The same on the command line, with those of the scripts that come with TRL.
COMMAND_LINE_NAMES: dict[str, str] = {
    "step_separator": "--separator-token, one token",
    "max_completion_length": "--max-length, which limits problem and steps together",
    "model_init_kwargs": "--backbone-dtype, --attn-implementation and --backbone-revision",
    "model_name_or_path": "--backbone, or --model to go on from a PRM",
    "dtype": "--backbone-dtype",
    "torch_dtype": "--backbone-dtype",
    "dataset_name": "--train-data",
    "dataset_train_split": "--train-split",
    "dataset_test_split": "--eval-split",
    "use_peft": "--lora-r",
}

_TRL = READERS["trl"]
_FEATURES = datasets.Features(
    {
        "problem": datasets.Value("string"),
        "steps": datasets.List(datasets.Value("string")),
        "labels": datasets.List(datasets.Value("float32")),
    }
)


def explain_trl_names(arguments: _Class) -> _Class:
    """A dataclass of options whose constructor names what replaces an option of TRL."""
    init = arguments.__init__  # type: ignore[misc]

    @functools.wraps(init)
    def explained(self: Any, *args: Any, **options: Any) -> None:
        for name in options:
            if name in PYTHON_NAMES:
                raise TypeError(f"{arguments.__name__} has no option {name!r} as TRL has: {PYTHON_NAMES[name]}")
        init(self, *args, **options)

    arguments.__init__ = explained  # type: ignore[misc]
    return arguments


def from_trl_columns(dataset: datasets.Dataset) -> datasets.Dataset:
    """A dataset in TRL's stepwise format as records; any other as it is.

    Args:
        dataset: `prompt`, `completions` and `labels` (booleans), read as `trainer.formats.read_trl` does.

    Returns:
        `problem`, `steps` and `labels` (float).

    Raises:
        ValueError: a row cannot be read; the message has its number.
    """
    names = set(dataset.column_names)
    if not names.issuperset(_TRL.columns) or names & {"problem", "steps"}:
        return dataset
    return dataset.map(
        _read_row, with_indices=True, remove_columns=dataset.column_names, features=_FEATURES, desc="Reading"
    )


def _read_row(row: dict[str, Any], index: int) -> dict[str, Any]:
    try:
        (record,) = _TRL.read(row)
    except (TypeError, ValueError) as error:
        raise ValueError(f"record {index} (from 0): {error}") from error
    return record.to_dict()
