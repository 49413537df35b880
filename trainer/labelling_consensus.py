"""The solutions on which two label files agree about the first error.

Filtering Monte Carlo labels by the agreement of a second judge raised published PRMs most (2501.07301).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeling_prm.step_loss import IGNORED_LABEL

from .data_files import iter_file_rows, list_data_files
from .readers import read_step_records
from .records import StepRecord


@dataclass(kw_only=True)
class Agreement:
    """What two label files agree on.

    Attributes:
        kept: the records of the first file on which both agree, with their columns `successes` and `rollouts`, None
            where that file has none.
        counts: how many records of the first file were kept or left out, by reason, and how many of the second have
            no counterpart.
    """

    kept: list[tuple[StepRecord, list[int] | None, list[int] | None]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def agree(first: str | Path, second: str | Path, *, threshold: float = 0.5) -> Agreement:
    """The records of one file on whose first error another one agrees.

    Records are of one solution where problem and steps are equal. The first error is the first step whose label is
    below the threshold; -1 where there is none. A file that labels nothing up to there has no opinion.

    Args:
        first, second: what `load_step_dataset` reads; the labels that are kept are those of the first.
        threshold: from which a soft label counts as correct. 0.5 is the field's; the least above 0 reads shares of
            completions as hard labels.

    Raises:
        FileNotFoundError, TypeError, ValueError: a file cannot be read, or labels one solution in two ways.
    """
    found = Agreement()
    theirs = _first_errors(second, threshold)
    records, report = read_step_records(first)
    counts = _read_counts(first)
    seen: set[tuple[str, tuple[str, ...]]] = set()
    for record, source in zip(records, report.record_sources, strict=True):
        key = (record.problem, record.steps)
        if key in seen:
            found.counts["left out: the solution stands in the first file already"] += 1
            continue
        seen.add(key)
        mine = find_first_error(record.labels, threshold)
        if key not in theirs:
            found.counts["left out: not in the second file"] += 1
        elif mine is None or theirs[key] is None:
            found.counts["left out: no first error known in one of them"] += 1
        elif mine != theirs[key]:
            found.counts["left out: they disagree"] += 1
        else:
            found.counts["kept: both find an error at the same step" if mine >= 0 else "kept: both find no error"] += 1
            found.kept.append((record, *counts.get(source, (None, None))))
    found.counts["of the second file, not in the first"] = len(theirs.keys() - seen)
    return found


def find_first_error(labels: Iterable[float], threshold: float = 0.5) -> int | None:
    """0-based index of the first step below the threshold, -1 where there is none.

    None where that is not known: a step without a label stands before the first error, or anywhere where there is
    none.
    """
    for index, label in enumerate(labels):
        if label == IGNORED_LABEL:
            return None
        if label < threshold:
            return index
    return -1


def _first_errors(path: str | Path, threshold: float) -> dict[tuple[str, tuple[str, ...]], int | None]:
    errors: dict[tuple[str, tuple[str, ...]], int | None] = {}
    for record in read_step_records(path)[0]:
        key, mine = (record.problem, record.steps), find_first_error(record.labels, threshold)
        if errors.setdefault(key, mine) != mine:
            raise ValueError(
                f"{path} labels one solution in two ways, to the problem {record.problem!r:.60}; keep one of them"
            )
    return errors


def _read_counts(path: str | Path) -> dict[tuple[str, int], tuple[list[int] | None, list[int] | None]]:
    """For each row that has them, by file and number, its successes and rollouts."""
    if not Path(path).exists():
        return {}
    counts: dict[tuple[str, int], tuple[list[int] | None, list[int] | None]] = {}
    for file in list_data_files(Path(path)):
        for row in iter_file_rows(file):
            value = row.value if isinstance(row.value, Mapping) else {}
            successes, rollouts = value.get("successes"), value.get("rollouts")
            if _is_list(successes) and _is_list(rollouts):
                counts[row.file, row.number] = (list(successes or ()), list(rollouts or ()))
    return counts


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(entry) is int for entry in value)
