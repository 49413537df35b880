"""Solutions to label, read from files: with a reference answer, with labels to compare with, or both.

    read_items("candidates.jsonl").items[0].steps

A row may be

- a problem with `answer` and several `solutions`, as `trainer.candidates` reads them;
- one solution: `problem`, `steps` (a list) or `solution` (a text), and where there are any `answer`, the solution's own
  `solution_answer`, and `labels`;
- GSM8K's own form: `question`, and `answer` with a step a line and `#### 18` at its end;
- any labelled format that `load_step_dataset` reads, for the methods that need no answer.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from modeling_prm.step_loss import IGNORED_LABEL
from modeling_prm.step_splitting import split_steps

from .answers import extract_answer, normalize_answer
from .candidates import read_problems
from .data_files import SourceRow, iter_file_rows, json_fault, list_data_files
from .format_parts import DEFAULT_OPTIONS
from .formats_plain import read_plain
from .readers import OnBadRow, read_step_records
from .records import StepRecord

NO_STEP = "the solution holds no step"
# A form that so many rows do not have is not that of the file.
_ROWS_LOOKED_AT = 1_000


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelItem:
    """One solution.

    Attributes:
        problem: the problem.
        steps: S steps.
        answer: the reference answer; None where there is none.
        solution_answer: the final answer of the solution; None where it states none.
        labels: S labels that were given, -100 for none; None where the input has no labels.
    """

    problem: str
    steps: tuple[str, ...]
    answer: str | None
    solution_answer: str | None
    labels: tuple[float, ...] | None = None


@dataclass(kw_only=True)
class Items:
    """What was read: the solutions in the order of the input, and the numbers of those left out, by reason."""

    items: list[LabelItem] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def read_items(path: str | Path, *, step_style: str = "blank_lines", on_bad_row: OnBadRow = "error") -> Items:
    """The solutions of a file or of the files of a folder.

    Args:
        path: .jsonl, .json, .csv (lists as JSON text) or .parquet, the first three also compressed.
        step_style: where a solution that is a text is cut, as `modeling_prm.step_splitting.split_steps` says.
        on_bad_row: "skip" leaves rows out that cannot be read, and counts them by reason. A file of problems with
            several solutions is read whole or not at all.

    Raises:
        FileNotFoundError: there is nothing at the path.
        TypeError, ValueError: a row cannot be read, naming file, line and reason; or nothing is left.
    """
    files = list_data_files(Path(path))
    found = Items()
    form = _find_form(files)
    if form == "problems":
        _add_candidates(found, path, step_style)
    elif form is not None:
        read = _read_gsm8k if form == "gsm8k" else _read_flat
        _add_rows(found, files, read, step_style, on_bad_row)
    else:
        records, report = read_step_records(path, on_bad_row=on_bad_row)
        found.left_out.update(report.rejected)
        for record in records:
            answer = extract_answer("\n".join(record.steps))
            found.items.append(
                LabelItem(
                    problem=record.problem,
                    steps=record.steps,
                    answer=None,
                    solution_answer=answer,
                    labels=record.labels,
                )
            )
    if not found.items:
        raise ValueError(f"{path} holds no solution with a step; check the file, and --step-style")
    return found


_ReadRow = Callable[[Items, Mapping[str, Any], str], None]


def _find_form(files: list[Path]) -> Literal["problems", "gsm8k", "solutions"] | None:
    """That of the first row that has one of this module's own, so that a bad first row does not decide."""
    rows = (row.value for row in _iter_rows(files) if row.error is None and isinstance(row.value, dict))
    for row in itertools.islice(rows, _ROWS_LOOKED_AT):
        columns = set(row)
        if columns >= {"problem", "answer", "solutions"}:
            return "problems"
        if columns >= {"question", "answer"} and "####" in str(row["answer"]):
            return "gsm8k"
        if "problem" in columns and ("solution" in columns or columns >= {"steps", "answer"}):
            return "solutions"
    return None


def _iter_rows(files: list[Path]) -> Iterator[SourceRow]:
    for file in files:
        yield from iter_file_rows(file)


def _add_candidates(found: Items, path: str | Path, step_style: str) -> None:
    for problem in read_problems(path):
        for number, candidate in enumerate(problem.candidates, start=1):
            given = candidate.solution
            steps = split_steps(given, step_style) if isinstance(given, str) else given
            try:
                _add(found, problem.problem, steps, problem.answer, candidate.answer)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{problem.place}, solution {number}: {error}") from error


def _add_rows(found: Items, files: list[Path], read: _ReadRow, step_style: str, on_bad_row: OnBadRow) -> None:
    for row in _iter_rows(files):
        try:
            if row.error is not None:
                raise row.error
            if not isinstance(row.value, Mapping):
                raise TypeError(f"a row must be an object, got {type(row.value).__name__}")
            read(found, _from_text(row.value) if row.is_text else row.value, step_style)
        except (TypeError, ValueError) as error:
            if on_bad_row == "error":
                raise ValueError(f"{row.place}: {error}") from error
            found.left_out[str(error).partition(": ")[0]] += 1


def _from_text(cells: Mapping[str, str]) -> dict[str, Any]:
    """A row of a CSV file, whose lists are JSON text and whose empty cells are absent."""
    row: dict[str, Any] = {name: cell or None for name, cell in cells.items()}
    for name in ("steps", "labels"):
        if row.get(name) is not None:
            try:
                row[name] = json.loads(row[name])
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{name} must be a list as JSON text in a CSV file: {json_fault(error)}") from error
    return row


def _read_gsm8k(found: Items, row: Mapping[str, Any], step_style: str) -> None:
    question, solution = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not isinstance(solution, str):
        raise TypeError("question and answer must be texts")
    if "####" not in solution:
        raise ValueError(f"answer must end in #### and the final answer, got {solution!r:.80}")
    answer = extract_answer(solution)
    _add(found, question, split_steps(solution, "newlines"), answer, answer)


def _read_flat(found: Items, row: Mapping[str, Any], step_style: str) -> None:
    problem, steps, text = row.get("problem"), row.get("steps"), row.get("solution")
    if (steps is None) == (text is None):
        raise ValueError("a row must have either steps (a list) or solution (a text)")
    if text is not None and not isinstance(text, str):
        raise TypeError(f"solution must be a text, got {text!r:.80}")
    if steps is not None and not (isinstance(steps, list) and all(isinstance(step, str) for step in steps)):
        raise TypeError(f"steps must be a list of texts, got {steps!r:.80}")
    if not isinstance(problem, str):
        raise TypeError(f"problem must be a text, got {problem!r:.80}")
    given: list[str] = split_steps(text, step_style) if text is not None else list(steps or ())
    answer = None if row.get("answer") is None else _as_answer(row["answer"], "answer")
    if answer is not None and ("####" in answer or "\\boxed" in answer):
        answer = extract_answer(answer)
    if answer is not None and not normalize_answer(answer):
        raise ValueError(f"answer must be the final answer, got {row['answer']!r:.80}")
    own = row.get("solution_answer")
    own = extract_answer(text or "\n".join(given)) if own is None else _as_answer(own, "solution_answer")
    labels = None
    if row.get("labels") is not None:
        labels = read_plain({"problem": problem, "steps": given, "labels": row["labels"]}, DEFAULT_OPTIONS)[0].labels
    _add(found, problem, given, answer, own, labels)


def _add(
    found: Items,
    problem: str,
    steps: list[str],
    answer: str | None,
    solution_answer: str | None,
    labels: tuple[float, ...] | None = None,
) -> None:
    if not steps:
        found.left_out[NO_STEP] += 1
        return
    record = StepRecord(
        problem=problem, steps=tuple(steps), labels=labels or (IGNORED_LABEL,) * len(steps)
    )  # checks the texts
    found.items.append(
        LabelItem(
            problem=record.problem, steps=record.steps, answer=answer, solution_answer=solution_answer, labels=labels
        )
    )


def _as_answer(value: Any, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError(f"{name} must be a text or a number, got {value!r:.80}")
    return str(value)
