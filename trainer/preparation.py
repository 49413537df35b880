"""From records to token ids, once, before training; what does not fit is counted."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

import datasets

from modeling_prm import PRMProcessor
from modeling_prm.step_loss import IGNORED_LABEL

from .conversation_data import encode_records
from .records import StepRecord
from .token_cache import tokens_file, tokens_fingerprint

logger = logging.getLogger(__name__)

RECORD_COLUMNS = ("problem", "steps", "labels")
TOKEN_COLUMNS = ("input_ids", "step_positions", "labels")
# The number of a record in the dataset that was given, from 0.
RECORD_NUMBER = "record"
# A number of a record's problem, the same wherever the text is the same.
PROBLEM_ID = "problem_id"


@dataclass(frozen=True, kw_only=True)
class PreparationReport:
    """What tokenizing a dataset kept: counts of records, of steps, of steps with a label, and of soft labels."""

    records: int
    kept_records: int
    steps: int
    kept_steps: int
    labelled_steps: int
    soft_labels: int = 0

    def __str__(self) -> str:
        text = f"kept {self.kept_records} of {self.records} records and {self.kept_steps} of {self.steps} steps"
        return f"{text}; {self.labelled_steps} steps have a label"


def tokenize_dataset(
    dataset: datasets.Dataset,
    processor: PRMProcessor,
    *,
    truncation: str = "drop",
    overlong_problems: str = "error",
    num_labels: int = 1,
    num_proc: int | None = None,
) -> tuple[datasets.Dataset, PreparationReport]:
    """Tokenize records as the processor does for scoring; labels go where their steps go.

    What was tokenized is kept in the cache of `datasets` and taken from there the next time, see `token_cache`.

    Args:
        dataset: columns `problem`, `steps` and `labels`, as `trainer.readers.load_step_dataset` gives them.
        processor: the model's processor; its `max_length` limits each input.
        truncation: `"drop"` leaves out whole steps that do not fit, with their labels; `"error"` raises.
        overlong_problems: `"error"` raises where no step of a record fits, `"skip"` leaves the record out.
        num_labels: the model's; with K classes, labels are class indices.
        num_proc: how many processes tokenize; by default this one alone.

    Returns:
        A dataset of `input_ids` (L ids), `step_positions` (S), `labels` (floats), `problem_id` (an integer) and
        `record` (its number in the column `record` of `dataset`, or from 0 without integers there) a record, and the
        counts. Labels are those of all its steps, so that the first S belong to the steps that fit.

    Raises:
        ValueError: the dataset is empty or lacks columns, a record is not valid or does not fit, or no step
            has a label.
    """
    if truncation not in ("drop", "error") or overlong_problems not in ("error", "skip"):
        raise ValueError(
            "truncation must be 'drop' or 'error' and overlong_problems 'error' or 'skip', got "
            f"{truncation!r} and {overlong_problems!r}"
        )
    if missing := [name for name in RECORD_COLUMNS if name not in dataset.column_names]:
        raise ValueError(
            f"the dataset lacks the columns {missing}, it has {dataset.column_names}; read it with "
            "trainer.readers.load_step_dataset, which gives problem, steps and labels"
        )
    if len(dataset) == 0:
        raise ValueError("the dataset is empty; give at least one record")
    dataset = dataset.with_format(None)
    numbers = dataset.features.get(RECORD_NUMBER)
    if numbers is not None and "int" not in str(getattr(numbers, "dtype", "")):
        dataset = dataset.remove_columns(RECORD_NUMBER)  # of another meaning
    options = {"truncation": truncation, "num_labels": num_labels}
    code = (type(processor), StepRecord, _tokenize_batch, encode_records)
    fingerprint = tokens_fingerprint(dataset, processor, options, code)
    tokenized = dataset.map(
        _tokenize_batch,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        fn_kwargs={"processor": processor, **options},
        features=_FEATURES,
        num_proc=num_proc,
        new_fingerprint=fingerprint,
        cache_file_name=tokens_file(dataset, fingerprint),
        desc="Tokenizing",
    )
    tokenized = _without_overlong(tokenized, processor, overlong_problems)
    kept = [
        row[: len(positions)] for row, positions in zip(tokenized["labels"], tokenized["step_positions"], strict=True)
    ]
    report = PreparationReport(
        records=len(dataset),
        kept_records=len(tokenized),
        steps=sum(map(len, dataset["steps"])),
        kept_steps=sum(map(len, tokenized["step_positions"])),
        labelled_steps=sum(label != IGNORED_LABEL for row in kept for label in row),
        soft_labels=sum(0 < label < 1 for row in kept for label in row),
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
        RECORD_NUMBER: datasets.Value("int64"),
        PROBLEM_ID: datasets.Value("int64"),
    }
)


def _tokenize_batch(
    batch: dict[str, list[Any]], indices: list[int], processor: PRMProcessor, truncation: str, num_labels: int
) -> dict[str, list[Any]]:
    for index, problem, steps, labels in zip(indices, *(batch[name] for name in RECORD_COLUMNS), strict=True):
        try:
            check_record(problem, steps or [], labels or [], num_labels)
        except (TypeError, ValueError) as error:
            raise ValueError(f"record {index} (from 0): {error}") from error
    try:
        encoded = encode_records(processor, batch)
    except ValueError as error:
        raise ValueError(f"in records {indices[0]} to {indices[-1]}: {error}") from error
    for index, item in zip(indices, encoded, strict=True):
        if truncation == "error" and 0 < len(item.step_positions) < item.num_steps:
            raise ValueError(
                f"record {index} (from 0) keeps {len(item.step_positions)} of {item.num_steps} steps at "
                f"max_length={processor.max_length}; raise max_length or pass truncation='drop'"
            )
    return {
        "input_ids": [item.input_ids for item in encoded],
        "step_positions": [item.step_positions for item in encoded],
        "labels": batch["labels"],
        RECORD_NUMBER: batch.get(RECORD_NUMBER, indices),
        PROBLEM_ID: [problem_id(problem) for problem in batch["problem"]],
    }


def problem_id(problem: str) -> int:
    """A number of a problem's text, of 64 bits."""
    return int.from_bytes(hashlib.blake2b(problem.encode(), digest_size=8).digest(), "big", signed=True)


def check_record(problem: Any, steps: list[Any], labels: list[Any], num_labels: int) -> None:
    """Check a record for a model of so many logits a step; with several, labels are class indices.

    Raises:
        TypeError, ValueError: as `StepRecord`, or a label is no class index.
    """
    if num_labels > 1:
        classes = range(num_labels)
        if wrong := [label for label in labels if label != IGNORED_LABEL and label not in classes]:
            raise ValueError(f"labels must be class indices 0 to {num_labels - 1}, or -100: got {wrong[0]!r}")
        labels = [IGNORED_LABEL] * len(labels)
    # A column of booleans holds no -100, so that its values are what they say.
    labels = [float(label) if isinstance(label, bool) else label for label in labels]
    StepRecord(problem=problem, steps=tuple(steps), labels=tuple(labels))


def _without_overlong(tokenized: datasets.Dataset, processor: PRMProcessor, overlong_problems: str) -> datasets.Dataset:
    """The records of which a step fits; the others raise or are left out."""
    fits = [len(positions) > 0 for positions in tokenized["step_positions"]]
    overlong = [index for index, fit in enumerate(fits) if not fit]
    if overlong and overlong_problems == "error":
        raise ValueError(
            f"{len(overlong)} records have a problem that leaves room for no step at max_length="
            f"{processor.max_length}, the first are numbers {overlong[:5]} (from 0); raise max_length or pass "
            "overlong_problems='skip'"
        )
    if overlong:
        return tokenized.select([index for index, fit in enumerate(fits) if fit])
    return tokenized
