"""Benchmarks of PRMs: their files, read as solutions to score, and their protocols, as functions of judgements.

    items = read_processbench("ProcessBench/")
    processbench_scores([[False, True], [False]], [(1.0, 0.0), (1.0,)])["f1"]  # 1.0

A *judgement* of a solution says for each step whether it is called wrong, and is None where the solution could not
be scored. Labels are as everywhere: 1 correct, 0 incorrect, -100 none. `trainer.evaluate` is the command.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_prm.step_loss import IGNORED_LABEL

from .conversation_data import CONVERSATION
from .data_files import SourceRow, is_hub_id, iter_file_rows, iter_hub_rows, list_data_files
from .formats import strip_step_numbers
from .metrics import CORRECT_FROM
from .readers import load_step_dataset

logger = logging.getLogger(__name__)

PROCESSBENCH, PRMBENCH = "processbench", "prmbench"
HUB_IDS = {PROCESSBENCH: "Qwen/ProcessBench", PRMBENCH: "hitsmy/PRMBench_Preview"}
PROCESSBENCH_SUBSETS = ("gsm8k", "math", "olympiadbench", "omnimath")

Judgement = Sequence[bool] | None

_PROCESSBENCH_ID = re.compile(rf"({'|'.join(PROCESSBENCH_SUBSETS)})-\d+")
_PROCESSBENCH_COLUMNS = ("id", "generator", "problem", "steps", "label")
_PRMBENCH_COLUMNS = ("idx", "modified_question", "modified_process", "error_steps", "classification")


@dataclass(frozen=True, kw_only=True)
class BenchmarkItem:
    """One solution of a benchmark.

    Args:
        id: its name there.
        subset: the part of the benchmark that results are given for: a subset of ProcessBench, a category of PRMBench.
        problem: the problem.
        steps: S steps.
        labels: S labels.
        generator: the model that wrote the solution, where it is known.
        conversation: of an agent's, its messages as `trainer.conversation_data` writes them.
    """

    id: str
    subset: str
    problem: str
    steps: tuple[str, ...]
    labels: tuple[float, ...]
    generator: str | None = None
    conversation: str | None = None


def read_benchmark(benchmark: str, data: str | None = None, *, split: str | None = None) -> list[BenchmarkItem]:
    """The solutions of ProcessBench, PRMBench, or of any labelled data that `load_step_dataset` reads.

    Args:
        benchmark: `"processbench"`, `"prmbench"`, or a path or Hub id of labelled solutions.
        data: where the former two are: a file, a folder, or a Hub id, by default that of the authors.
        split: of a Hub dataset; by default all of ProcessBench's, and `train` of PRMBench.

    Raises:
        TypeError, ValueError, OSError: it cannot be read, naming file, row and reason.
    """
    if benchmark == PROCESSBENCH:
        return read_processbench(data or HUB_IDS[benchmark], split=split)
    if benchmark == PRMBENCH:
        return read_prmbench(data or HUB_IDS[benchmark], split=split)
    if data is not None:
        raise ValueError(f"--data says where processbench or prmbench is, and {benchmark} is data itself; leave it out")
    name = benchmark if is_hub_id(benchmark) else Path(benchmark).name.partition(".")[0]
    rows = load_step_dataset(benchmark, split=split)
    return [
        BenchmarkItem(
            id=str(number),
            subset=name,
            problem=row["problem"],
            steps=tuple(row["steps"]),
            labels=tuple(row["labels"]),
            conversation=row.get(CONVERSATION),
        )
        for number, row in enumerate(rows)
    ]


def read_processbench(path: str | os.PathLike[str], *, split: str | None = None) -> list[BenchmarkItem]:
    """ProcessBench (arXiv 2412.06559): `label` is the 0-based index of the first wrong step, -1 where there is none.

    Steps before the first error are correct; those after it have no label. The subset is what `id` begins with
    (`gsm8k-12`), or else the file's or split's name.

    Args:
        path: a file, a folder, or a Hub id.
        split: one split of a Hub dataset; by default the four subsets.

    Raises:
        TypeError, ValueError: a row is not of this form.
    """
    items = []
    for row in _rows(os.fspath(path), (split,) if split else PROCESSBENCH_SUBSETS):
        value = _object(row, _PROCESSBENCH_COLUMNS)
        steps, label = _texts(row, "steps", value["steps"]), value["label"]
        if isinstance(label, bool) or not isinstance(label, int):
            raise TypeError(f"{row.place}: label must be an int, got {label!r}")
        if not -1 <= label < len(steps):
            raise ValueError(f"{row.place}: label must be from -1 to {len(steps) - 1}, got {label}; correct the row")
        if label == -1:
            labels = (1.0,) * len(steps)
        else:
            labels = (1.0,) * label + (0.0,) + (IGNORED_LABEL,) * (len(steps) - label - 1)
        match = _PROCESSBENCH_ID.fullmatch(str(value["id"]))
        items.append(
            BenchmarkItem(
                id=str(value["id"]),
                subset=match[1] if match else _name_of(row.file),
                problem=_text(row, "problem", value["problem"]),
                steps=steps,
                labels=labels,
                generator=str(value["generator"]),
            )
        )
    return _not_empty(items, path)


def read_prmbench(path: str | os.PathLike[str], *, split: str | None = None) -> list[BenchmarkItem]:
    """PRMBench (arXiv 2501.03124): the solutions with errors put in, `error_steps` counted from 1.

    As in the authors' evaluation, an index beyond the last step is passed over (one logged line counts them), and of
    records of one category and `idx` the first counts. The numbers that the steps of some records carry are removed,
    as in training.

    Args:
        path: a file, a folder, or a Hub id.
        split: of a Hub dataset; by default `train`.

    Raises:
        TypeError, ValueError: a row is not of this form.
    """
    items: dict[str, BenchmarkItem] = {}
    beyond = repeated = 0
    for row in _rows(os.fspath(path), (split or "train",)):
        value = _object(row, _PRMBENCH_COLUMNS)
        steps = strip_step_numbers(_texts(row, "modified_process", value["modified_process"]))
        errors = value["error_steps"]
        if not isinstance(errors, list) or any(isinstance(e, bool) or not isinstance(e, int) for e in errors):
            raise TypeError(f"{row.place}: error_steps must be a list of ints, got {errors!r}")
        if any(error < 1 for error in errors):
            raise ValueError(f"{row.place}: error_steps count from 1, got {errors}; correct the row")
        beyond += any(error > len(steps) for error in errors)
        category = str(value["classification"])
        name = f"{category}_{value['idx']}"
        if name in items:
            repeated += 1
            continue
        items[name] = BenchmarkItem(
            id=name,
            subset=category,
            problem=_text(row, "modified_question", value["modified_question"]),
            steps=steps,
            labels=tuple(0.0 if number in errors else 1.0 for number in range(1, len(steps) + 1)),
        )
    if beyond or repeated:
        logger.warning(
            "%s: %d rows name a wrong step beyond the last, which is passed over; %d repeat another and are left out",
            path,
            beyond,
            repeated,
        )
    return _not_empty(list(items.values()), path)


def first_error_of(labels: Sequence[float]) -> int | None:
    """0-based index of the first wrong step, -1 where there is none, None where no step is labelled."""
    known = [index for index, label in enumerate(labels) if label != IGNORED_LABEL]
    if not known:
        return None
    return next((index for index in known if labels[index] < CORRECT_FROM), -1)


def processbench_scores(judgements: Sequence[Judgement], labels: Sequence[Sequence[float]]) -> dict[str, float]:
    """ProcessBench's protocol (arXiv 2412.06559, section 4): is the first step called wrong the first wrong one?

    With a and b the accuracies on solutions with and without an error, F1 = 2ab / (a + b). A solution that could not
    be scored counts as missed. Steps without a label are not asked about; they all come after the first error, where
    they change nothing.

    Returns:
        `acc_error` and `acc_correct` (NaN where there is no such solution), `f1` (0 where both are 0, NaN where one is
        NaN), and the counts `num_error` and `num_correct`; solutions without a label are left out.
    """
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for judgement, own in zip(judgements, labels, strict=True):
        first = first_error_of(own)
        if first is None:
            continue
        found: int | None = None
        if judgement is not None:
            wrong = (i for i, called in enumerate(judgement) if called and own[i] != IGNORED_LABEL)
            found = next(wrong, -1)
        hits[first >= 0].append(found == first)
    acc_error, acc_correct = (sum(own) / len(own) if own else math.nan for own in (hits[True], hits[False]))
    return {
        "f1": _harmonic_mean(acc_error, acc_correct),
        "acc_error": acc_error,
        "acc_correct": acc_correct,
        "num_error": float(len(hits[True])),
        "num_correct": float(len(hits[False])),
    }


def prmbench_scores(judgements: Sequence[Judgement], labels: Sequence[Sequence[float]]) -> dict[str, float]:
    """PRMBench's protocol (arXiv 2501.03124, section 3): PRMScore = 0.5 F1 + 0.5 F1_neg, over all steps at once.

    F1 is that of the correct steps, F1_neg that of the wrong ones; each is 0 where nothing is found. Where no step is
    wrong (`multi_solutions`) F1 alone counts. A solution that could not be scored is left out, as the authors do.

    Returns:
        `prm_score`, `f1`, `negative_f1` (NaN where no step is wrong), and `num_steps`; NaN throughout without a step.
    """
    counts = dict.fromkeys(itertools.product((True, False), (True, False)), 0)
    for judgement, own in zip(judgements, labels, strict=True):
        for called, label in zip(judgement or (), own if judgement is not None else (), strict=True):
            if label != IGNORED_LABEL:
                counts[label < CORRECT_FROM, called] += 1
    found_right, false_alarms = counts[False, False], counts[False, True]
    missed, found_wrong = counts[True, False], counts[True, True]
    num_steps = sum(counts.values())
    f1 = _f1(found_right, missed, false_alarms) if num_steps else math.nan
    negative_f1 = _f1(found_wrong, false_alarms, missed) if missed + found_wrong else math.nan
    score = f1 if math.isnan(negative_f1) else 0.5 * f1 + 0.5 * negative_f1
    return {"prm_score": score, "f1": f1, "negative_f1": negative_f1, "num_steps": float(num_steps)}


def _f1(hits: int, wrongly: int, missed: int) -> float:
    total = 2 * hits + wrongly + missed
    return 2 * hits / total if total else 0.0


def _harmonic_mean(a: float, b: float) -> float:
    return 0.0 if a + b == 0.0 else 2.0 * a * b / (a + b)


def _rows(path: str, splits: Iterable[str]) -> Iterator[SourceRow]:
    if is_hub_id(path):
        return itertools.chain.from_iterable(iter_hub_rows(path, split) for split in splits)
    return itertools.chain.from_iterable(map(iter_file_rows, list_data_files(Path(path))))


def _name_of(file: str) -> str:
    """The split of `dataset[split]`, or the file's name without what follows its first point."""
    return file.removesuffix("]").rpartition("[")[2] if file.endswith("]") else Path(file).name.partition(".")[0]


def _object(row: SourceRow, columns: Sequence[str]) -> Mapping[str, Any]:
    if row.error is not None:
        raise ValueError(f"{row.place}: {row.error}") from row.error
    if not isinstance(row.value, dict):
        raise TypeError(f"{row.place}: a row must be an object, got {type(row.value).__name__}")
    if missing := [name for name in columns if name not in row.value]:
        raise ValueError(f"{row.place}: the row lacks {', '.join(missing)}; it has {', '.join(map(str, row.value))}")
    return row.value


def _text(row: SourceRow, name: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{row.place}: {name} must be text, got {type(value).__name__}")
    return value


def _texts(row: SourceRow, name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(step, str) for step in value):
        raise TypeError(f"{row.place}: {name} must be a list of texts, got {str(value)[:80]!r}")
    if not value:
        raise ValueError(f"{row.place}: {name} is empty; leave the row out")
    return tuple(value)


def _not_empty(items: list[BenchmarkItem], path: object) -> list[BenchmarkItem]:
    if not items:
        raise ValueError(f"{path} holds no solution; check the path")
    return items
