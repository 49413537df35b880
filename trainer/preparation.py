"""From records to token ids, once, before training; what does not fit is counted."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import datasets

from modeling_prm import PRMProcessor
from modeling_prm.step_loss import IGNORED_LABEL

logger = logging.getLogger(__name__)

RECORD_COLUMNS = ("problem", "steps", "labels")
TOKEN_COLUMNS = ("input_ids", "step_positions", "labels")


@dataclass(frozen=True, kw_only=True)
class PreparationReport:
    """What tokenizing a dataset kept: counts of records, of steps and of steps with a label."""

    records: int
    kept_records: int
    steps: int
    kept_steps: int
    labelled_steps: int

    def __str__(self) -> str:
        text = f"kept {self.kept_records} of {self.records} records and {self.kept_steps} of {self.steps} steps"
        return f"{text}; {self.labelled_steps} steps have a label"


def tokenize_dataset(
    dataset: datasets.Dataset,
    processor: PRMProcessor,
    *,
    truncation: str = "drop",
    overlong_problems: str = "error",
) -> tuple[datasets.Dataset, PreparationReport]:
    """Tokenize records as the processor does for scoring; labels go where their steps go.

    Args:
        dataset: columns `problem`, `steps` and `labels`, as `trainer.readers.load_step_dataset` gives them.
        processor: the model's processor; its `max_length` limits each input.
        truncation: `"drop"` leaves out whole steps that do not fit, with their labels; `"error"` raises.
        overlong_problems: `"error"` raises where no step of a record fits, `"skip"` leaves the record out.

    Returns:
        A dataset of `input_ids` (L ids), `step_positions` (S) and `labels` (S floats) a record, and the counts.

    Raises:
        ValueError: columns are missing, a record does not fit, or no step has a label.
    """
    if missing := [name for name in RECORD_COLUMNS if name not in dataset.column_names]:
        raise ValueError(
            f"the dataset lacks the columns {missing}, it has {dataset.column_names}; read it with "
            "trainer.readers.load_step_dataset, which gives problem, steps and labels"
        )
    tokenized = dataset.map(
        _tokenize_batch,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        fn_kwargs={"processor": processor, "truncation": truncation},
        features=_FEATURES,
        desc="Tokenizing",
    )
    fits = [len(positions) > 0 for positions in tokenized["step_positions"]]
    overlong = [index for index, fit in enumerate(fits) if not fit]
    if overlong and overlong_problems == "error":
        raise ValueError(
            f"{len(overlong)} records have a problem that leaves room for no step at max_length="
            f"{processor.max_length}, the first are numbers {overlong[:5]} (from 0); raise max_length or pass "
            "overlong_problems='skip'"
        )
    if overlong:
        tokenized = tokenized.select([index for index, fit in enumerate(fits) if fit])
    labels = tokenized["labels"]
    report = PreparationReport(
        records=len(dataset),
        kept_records=len(tokenized),
        steps=sum(map(len, dataset["steps"])),
        kept_steps=sum(map(len, tokenized["step_positions"])),
        labelled_steps=sum(label != IGNORED_LABEL for row in labels for label in row),
    )
    if report.labelled_steps == 0:
        raise ValueError(f"no step has a label ({report}), so there is nothing to learn or to measure")
    lost = report.kept_steps < report.steps or report.kept_records < report.records
    logger.log(logging.WARNING if lost else logging.INFO, "at max_length=%s %s", processor.max_length, report)
    return tokenized, report


_FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int64")),
        "step_positions": datasets.List(datasets.Value("int64")),
        "labels": datasets.List(datasets.Value("float32")),
    }
)


def _tokenize_batch(
    batch: dict[str, list[Any]], indices: list[int], processor: PRMProcessor, truncation: str
) -> dict[str, list[Any]]:
    for index, steps, labels in zip(indices, batch["steps"], batch["labels"], strict=True):
        if len(steps) != len(labels):
            raise ValueError(f"record {index} has {len(steps)} steps and {len(labels)} labels; give one label a step")
    try:
        encoded = processor.encode(batch["problem"], batch["steps"], truncation=truncation)
    except ValueError as error:
        raise ValueError(f"in records {indices[0]} to {indices[-1]}: {error}") from error
    return {
        "input_ids": [item.input_ids for item in encoded],
        "step_positions": [item.step_positions for item in encoded],
        "labels": [row[: len(item.step_positions)] for item, row in zip(encoded, batch["labels"], strict=True)],
    }
