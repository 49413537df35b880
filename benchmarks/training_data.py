"""Labelled solutions for the training benchmark, in TRL's format: one row a solution."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.readers import load_step_dataset


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> str:
    """Write rows as JSONL, and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def mixed_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Sums of 2 to 40 steps, their number spread evenly on a logarithmic scale: many short ones, some long."""
    rng = random.Random(seed)
    return [_row(rng, round(2 * 20 ** rng.random())) for _ in range(count)]


def equal_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Sums of 12 steps each, all with numbers of as many digits."""
    rng = random.Random(seed)
    return [_row(rng, 12) for _ in range(count)]


def prmbench_rows(count: int, seed: int, folder: str) -> list[dict[str, Any]]:
    """Solutions of PRMBench, drawn at random."""
    records = load_step_dataset(folder, on_bad_row="skip")
    chosen = random.Random(seed).sample(range(len(records)), count)
    return [
        {"prompt": row["problem"], "completions": row["steps"], "labels": [label >= 0.5 for label in row["labels"]]}
        for row in records.select(chosen)
    ]


def _row(rng: random.Random, num_steps: int) -> dict[str, Any]:
    value = first = rng.randint(3_000, 4_000)
    terms, steps, labels = [], [], []
    for _ in range(num_steps):
        term = rng.randint(10, 99)
        is_right = rng.random() < 0.7
        result = value + term + (0 if is_right else rng.randint(1, 9))
        terms.append(term)
        steps.append(f"Adding {term} to {value} we get {value} + {term} = {result}.")
        labels.append(is_right)
        value = result
    prompt = f"Start with {first} and add " + ", ".join(map(str, terms)) + "."
    return {"prompt": prompt, "completions": steps, "labels": labels}
