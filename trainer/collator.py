"""Batches for training: pads tokenized records and their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modeling_prm import PRMProcessor
from modeling_prm.processing_prm import EncodedSolution
from modeling_prm.step_loss import IGNORED_LABEL

from .labels import LabelFunction
from .preparation import RECORD_NUMBER


@dataclass(frozen=True)
class PRMDataCollator:
    """Pads B tokenized records to the inputs of `PRMForStepScoring.forward`.

    Called with rows of `input_ids`, `step_positions` and `labels` (see `tokenize_dataset`), it returns
    `input_ids` and `attention_mask` (B, L) int64, `step_positions` (B, S) int64 padded with -1 and
    `labels` (B, S) float32 padded with -100; and `record` (B,) int64, the records' numbers, if asked to.

    Args:
        processor: the model's processor.
        label_rules: from the labels of a whole solution to those that count; as they are by default.
        with_records: whether the numbers of records that rows have are handed on.
    """

    processor: PRMProcessor
    label_rules: LabelFunction | None = None
    with_records: bool = False

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        encoded = [
            EncodedSolution(row["input_ids"], row["step_positions"], len(row["step_positions"])) for row in features
        ]
        batch = dict(self.processor.pad(encoded, return_tensors="pt"))
        labels = torch.full(batch["step_positions"].shape, IGNORED_LABEL)
        for index, (row, item) in enumerate(zip(features, encoded, strict=True)):
            row_labels = row["labels"] if self.label_rules is None else self.label_rules(row["labels"])
            # The labels of steps that did not fit come last.
            kept = torch.tensor(row_labels[: item.num_steps], dtype=torch.float32)
            labels[index, : len(kept)] = kept
        batch["labels"] = labels
        if self.with_records and all(RECORD_NUMBER in row for row in features):
            batch[RECORD_NUMBER] = torch.tensor([row[RECORD_NUMBER] for row in features])
        return batch
