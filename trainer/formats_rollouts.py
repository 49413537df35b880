"""Formats of Monte Carlo counts, as `trainer.label` writes them: of each step, how many completions succeeded.

The files hold `labels` too, so that `format="auto"` takes them as they are; these formats read the counts anew.
"""

from __future__ import annotations

from typing import Any

from modeling_prm.step_loss import IGNORED_LABEL

from .format_parts import Reader, ReaderOptions, Row, to_index, to_tuple
from .records import StepRecord


def read_rollouts_soft(row: Row, options: ReaderOptions) -> list[StepRecord]:
    """`problem`, `steps`, `successes` and `rollouts`: a label is the share of completions that succeeded.

    -100 where there was no completion. With `--soft-labels harden` training takes a share from `--label-threshold` on
    as correct.
    """
    return [_record(row, [hits / count if count else IGNORED_LABEL for hits, count in _counts(row)])]


def read_rollouts_hard(row: Row, options: ReaderOptions) -> list[StepRecord]:
    """The same columns: a label is 1 if any completion succeeded, 0 only if all failed (2312.08935, 2501.07301)."""
    return [_record(row, [float(hits > 0) if count else IGNORED_LABEL for hits, count in _counts(row)])]


def _counts(row: Row) -> list[tuple[int, int]]:
    successes, rollouts = (_integers(name, row[name]) for name in ("successes", "rollouts"))
    if len(successes) != len(rollouts):
        raise ValueError(
            f"as many successes as rollouts are needed: got {len(successes)} and {len(rollouts)}; correct the row"
        )
    for hits, count in zip(successes, rollouts, strict=True):
        if not 0 <= hits <= count:
            raise ValueError(f"successes must be from 0 to the rollouts: got {hits} of {count}; correct the row")
    return list(zip(successes, rollouts, strict=True))


def _integers(name: str, value: Any) -> list[int]:
    return [to_index(name, entry) for entry in to_tuple(name, value)]


def _record(row: Row, labels: list[float]) -> StepRecord:
    steps = to_tuple("steps", row["steps"])
    return StepRecord(problem=row["problem"], steps=steps, labels=tuple(labels), problem_group=row.get("problem_group"))


_COLUMNS = ("problem", "steps", "successes", "rollouts")

ROLLOUT_READERS = tuple(
    Reader(
        name=name,
        columns=_COLUMNS,
        json_columns=_COLUMNS[1:],
        read_row=read_row,
        # The files have labels too, which say what whoever wrote them chose.
        found_by_columns=False,
    )
    for name, read_row in (("rollouts_soft", read_rollouts_soft), ("rollouts_hard", read_rollouts_hard))
)
"""The formats of this module."""
