"""The solutions of an input scored by one process among several, and written as rows; see `trainer.score`."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers.utils import logging as transformers_logging

from .result_shards import ShardWriter
from .scoring_input import Columns, SolutionRow, count_input_rows, read_solutions, storable

# Characters of problems and solutions that are scored between two looks at the time for a shard: some forward passes.
_PIECE_CHARACTERS_ON_CPU, _PIECE_CHARACTERS = 50_000, 400_000


class RunOptions(Protocol):
    """The options of `trainer.score` that are read here."""

    on_bad_row: str
    step_style: str
    with_problem: bool
    with_steps: bool
    max_tokens_per_batch: int | None
    window: int


@dataclass(kw_only=True)
class Counts:
    """What one process did."""

    scored: int = 0
    failed: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_error: str | None = None


def score_files(
    files: Sequence[Path], columns: Columns, verifier: Any, writer: ShardWriter, options: RunOptions, *, show: bool
) -> tuple[int, Counts]:
    """Score what is due of this process: the input rows whose number it has, without the solutions that are written.

    Args:
        files, columns: the input.
        verifier: a `PRMVerifier`, or anything with its method `score_solutions`.
        writer: takes the results.
        options: those of steps, batches, windows and bad rows are read.
        show: whether to show progress, in input rows of all processes.

    Returns:
        The number of solutions that the input has, and what this process did.

    Raises:
        ValueError: an input row that cannot be read, with `--on-bad-row error`; a file that cannot be read on.
        OSError: as `ShardWriter.flush`.
    """
    counts, start = Counts(), time.monotonic()
    device = getattr(getattr(verifier, "model", None), "device", torch.device("cpu"))
    piece = _PIECE_CHARACTERS_ON_CPU if device.type == "cpu" else _PIECE_CHARACTERS
    num_rows, due, passed = 0, [], 0
    total = count_input_rows(files) if show else None
    with transformers_logging.tqdm(total=total, desc="Scoring", unit="row", disable=not show) as progress:
        for number, rows in enumerate(read_solutions(files, columns)):
            if options.on_bad_row == "error" and (bad := [row.error for row in rows if row.error is not None]):
                raise ValueError(bad[0])
            num_rows += len(rows)
            passed += 1
            if number % writer.num_processes == writer.process_index:
                due += [row for row in rows if row.row not in writer.finished]
            if len(due) >= options.window or (not due and passed >= options.window):
                score_window(due, verifier, writer, options, counts, piece, _advance(progress, passed))
                due, passed = [], 0
        score_window(due, verifier, writer, options, counts, piece, _advance(progress, passed))
    counts.seconds = time.monotonic() - start
    return num_rows, counts


def _advance(progress: Any, passed: int) -> Callable[[float], None]:
    """Moves the bar on to a share of the input rows that a window stands for."""
    shown = 0

    def advance(share: float) -> None:
        nonlocal shown
        progress.update(round(passed * share) - shown)
        shown = round(passed * share)

    return advance


def score_window(
    rows: Sequence[SolutionRow],
    verifier: Any,
    writer: ShardWriter,
    options: RunOptions,
    counts: Counts,
    piece_characters: int,
    advance: Callable[[float], None],
) -> None:
    """Score some solutions and write them, in pieces of about one length, those of one problem together."""
    done = 0
    unread = [row for row in rows if row.error is not None]
    pieces = plan_pieces([row for row in rows if row.error is None], piece_characters)
    for piece in [unread, *pieces] if unread else pieces:
        for row, record in score_piece(piece, verifier, options):
            counts.scored += record["error"] is None
            counts.failed += record["error"] is not None
            counts.first_error = counts.first_error or record["error"]
            writer.add(row, record)
        done += len(piece)
        advance(done / len(rows))
    if not rows:
        advance(1.0)


def plan_pieces(rows: Sequence[SolutionRow], characters: int) -> Iterator[list[SolutionRow]]:
    """Rows grouped by problem, the longest first, in pieces that end where they have so many characters."""
    problems: dict[str, list[SolutionRow]] = {}
    for row in rows:
        problems.setdefault(row.problem or "", []).append(row)
    piece: list[SolutionRow] = []
    size = 0
    for group in sorted(problems.values(), key=lambda group: -max(map(_length, group))):
        piece += group
        size += sum(map(_length, group))
        if size >= characters:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _length(row: SolutionRow) -> int:
    solution = row.solution or ""
    return len(row.problem or "") + (len(solution) if isinstance(solution, str) else sum(map(len, solution)))


def score_piece(
    rows: Sequence[SolutionRow], verifier: Any, options: RunOptions
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number and the record of each solution."""
    if rows[0].error is not None:
        yield from ((row.row, _record(row, options, error=row.error)) for row in rows)
        return
    try:
        results = verifier.score_solutions(
            [row.problem for row in rows],
            [row.solution for row in rows],
            step_style=options.step_style,
            max_tokens_per_batch=options.max_tokens_per_batch,
            on_error="record",
            show_progress=False,
        )
    except RuntimeError as failure:
        # The verifier makes passes smaller by itself, so one solution alone is too much for the memory.
        if not any(words in str(failure) for words in ("out of memory", "can't allocate memory")):
            raise
        if len(rows) > 1:
            for row in rows:
                yield from score_piece([row], verifier, options)
        else:
            reason = f"{rows[0].place}: the solution alone needs more memory than there is; score it on a larger device"
            yield rows[0].row, _record(rows[0], options, reason)
        return
    for place, (row, result) in enumerate(zip(rows, results, strict=True)):
        # The verifier counts through the piece.
        error = result.error and f"{row.place}: " + re.sub(rf"\b(solution|problem) {place}\b", r"the \1", result.error)
        scores = {name: getattr(result, name) for name in ("step_probs", "overall_score", "first_error")}
        yield row.row, _record(row, options, error, result.steps, weakest_step=result.weakest_step, **scores)


def _record(
    row: SolutionRow,
    options: RunOptions,
    error: str | None,
    steps: Iterable[str] | None = None,
    *,
    step_probs: Sequence[float] | None = None,
    overall_score: float | None = None,
    first_error: int | None = None,
    weakest_step: int | None = None,
) -> dict[str, Any]:
    record: dict[str, Any] = {"id": row.id, "solution_idx": row.solution_idx}
    if options.with_problem:
        record["problem"] = None if row.problem is None else storable(row.problem)
    if options.with_steps:
        record["steps"] = None if steps is None else [storable(step) for step in steps]
    return {
        **record,
        "step_probs": None if step_probs is None else list(step_probs),
        "overall_score": overall_score,
        "first_error": first_error,
        "weakest_step": weakest_step,
        "error": error and storable(error),
    }


@contextmanager
def counting_tokens(verifier: Any) -> Iterator[Callable[[], int]]:
    """Gives what returns the number of tokens that the backbone has read since, without padding.

    It is 0 for a verifier that has no model here.
    """
    backbone = getattr(getattr(verifier, "model", None), "backbone", None)
    counts: list[torch.Tensor | int] = [0]

    def count(module: object, args: object, inputs: dict[str, Any]) -> None:
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if ids is None:
            return
        # Where a part of the row is cached, the mask covers that too. Summed up on the device, so that nothing waits.
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            counts[0] = counts[0] + mask[:, -ids.shape[1] :].sum()
        else:
            counts[0] = counts[0] + ids.numel()

    handle = backbone.register_forward_pre_hook(count, with_kwargs=True) if backbone is not None else None
    try:
        yield lambda: int(counts[0])
    finally:
        if handle is not None:
            handle.remove()
