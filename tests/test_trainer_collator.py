"""Batches for training hold exactly the ids that scoring reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_training import make_dataset, make_rows

from modeling_prm import PRMForStepScoring, PRMProcessor
from trainer.collator import PRMDataCollator
from trainer.preparation import tokenize_dataset

MakePRM = Callable[..., tuple[PRMForStepScoring, PRMProcessor]]

# Text in which tokenizers find a separator, a special token, or merge signs over the border of pieces.
AWKWARD = [
    {"problem": "Is <|step_end|> <s> [SEP] a token?\n", "steps": ["No.\n", "\n\tf(x) := {i} "], "labels": [1.0, 0.5]},
    {"problem": " naïve 四 шаг", "steps": ["<|endoftext|>.", "Step 2: \n\n"], "labels": [-100.0, 0.0]},
]


@pytest.mark.parametrize("family", ["qwen2", "llama", "bert", "opt"])
def test_collator_and_processor_give_identical_ids(make_prm: MakePRM, family: str) -> None:
    _, processor = make_prm(family)
    rows = make_rows() + AWKWARD
    dataset = make_dataset()
    for row in AWKWARD:
        dataset = dataset.add_item(row)
    tokenized, _ = tokenize_dataset(dataset, processor)
    batch = PRMDataCollator(processor)([tokenized[index] for index in range(len(tokenized))])
    direct = processor([row["problem"] for row in rows], [row["steps"] for row in rows], return_tensors="pt")
    assert batch.keys() - {"labels"} == set(direct.keys())
    for name, tensor in direct.items():
        assert batch[name].dtype == torch.int64
        assert torch.equal(batch[name], tensor), name
    alone = processor(rows[0]["problem"], rows[0]["steps"], return_tensors="pt")
    one = PRMDataCollator(processor)([tokenized[0]])
    assert all(torch.equal(one[name], alone[name]) for name in alone)


def test_labels_and_positions_are_padded_by_hand(make_prm: MakePRM) -> None:
    _, processor = make_prm("qwen2")
    rows: list[dict[str, Any]] = [
        {"input_ids": [5, 6, 7], "step_positions": [2], "labels": [0.25]},
        {"input_ids": [8, 9, 10, 11, 12], "step_positions": [1, 3, 4], "labels": [1.0, -100.0, 0.0]},
    ]
    batch = PRMDataCollator(processor)(rows)
    pad = processor.pad_token_id
    assert batch["input_ids"].tolist() == [[5, 6, 7, pad, pad], [8, 9, 10, 11, 12]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["step_positions"].tolist() == [[2, -1, -1], [1, 3, 4]]
    assert batch["labels"].tolist() == [[0.25, -100.0, -100.0], [1.0, -100.0, 0.0]]
    assert batch["labels"].dtype == torch.float32


def test_label_columns_of_integers_and_booleans_stay_numbers(make_prm: MakePRM) -> None:
    _, processor = make_prm("qwen2")
    rows: list[dict[str, Any]] = [
        {"input_ids": [5, 6, 7], "step_positions": [1, 2], "labels": [True, False]},
        {"input_ids": [5, 6, 7], "step_positions": [1, 2], "labels": [-100, 1]},
    ]
    assert PRMDataCollator(processor)(rows)["labels"].tolist() == [[1.0, 0.0], [-100.0, 1.0]]
