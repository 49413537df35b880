"""Solutions to score in bulk, read row by row, each with its number; what cannot be read keeps its place.

A row of the input holds a problem and one solution (a text, or a list of steps), or in a column `solutions` several, as
`trainer.candidates` reads them. Solutions are numbered from 0 through all files; a row that cannot be read counts as
one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet

from .candidates import read_solution
from .data_files import SourceRow, iter_file_rows
from .records import MAX_CHARACTERS

PROBLEM_NAMES = ("problem", "question", "prompt")
SOLUTION_NAMES = ("steps", "solution", "completion", "response")
SOLUTIONS_NAMES = ("solutions",)
_ID = "id"
_ENDS_READ = 1 << 20
# A column that so many rows lack is no fault of single rows.
_ROWS_WITHOUT = 1_000


class _MissingColumnError(ValueError):
    pass


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns that are read; `solution` or `solutions` is None, and `id` may be."""

    problem: str
    solution: str | None
    solutions: str | None
    id: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SolutionRow:
    """One solution, or in its place an input row that cannot be read.

    Attributes:
        row: its number among all solutions of the input, from 0.
        place: `file:number` of its input row.
        id: the input row's id as text.
        solution_idx: its place among the solutions of its input row, from 0.
        problem, solution: what is to be scored; None where there is an error.
        error: why it cannot be read.
    """

    row: int
    place: str
    id: str | None = None
    solution_idx: int = 0
    problem: str | None = None
    solution: str | list[str] | None = None
    error: str | None = None


def find_columns(
    files: Sequence[Path],
    *,
    problem: str | None = None,
    solution: str | None = None,
    solutions: str | None = None,
    id: str | None = None,
) -> Columns:
    """The columns as named, or as found by their usual names in the first row that has all that is needed.

    Raises:
        ValueError: no row can be parsed, a column is in none of the first thousand that can, or several fit; the
            message names those there are.
    """
    fault: _MissingColumnError | None = None
    parsed = (row for row in _iter_rows(files) if row.error is None and isinstance(row.value, dict))
    for row in itertools.islice(parsed, _ROWS_WITHOUT):
        try:
            return _columns_of(row, problem=problem, solution=solution, solutions=solutions, id=id)
        except _MissingColumnError as error:
            fault = fault or error
    raise fault or ValueError(f"{', '.join(map(str, files))}: no row can be parsed; see trainer.score for what is read")


def _columns_of(
    row: SourceRow, *, problem: str | None, solution: str | None, solutions: str | None, id: str | None
) -> Columns:
    there = [str(name) for name in row.value]
    for option, name in (("problem", problem), ("solution", solution), ("solutions", solutions), ("id", id)):
        if name is not None and name not in there:
            raise _MissingColumnError(
                f"{row.place} has no column {name!r}, which --{option}-column names; it has {', '.join(there)}"
            )
    if problem is None:
        problem = _choose(PROBLEM_NAMES, there, "problem", row.place)
    if solution is None and solutions is None:
        found = _choose((*SOLUTION_NAMES, *SOLUTIONS_NAMES), there, "solution", row.place)
        solution, solutions = (None, found) if found in SOLUTIONS_NAMES else (found, None)
    if id is None and _ID in there:
        id = _ID
    return Columns(problem=problem, solution=solution, solutions=solutions, id=id)


def _choose(names: Sequence[str], there: Sequence[str], option: str, place: str) -> str:
    fit = [name for name in names if name in there]
    if len(fit) == 1:
        return fit[0]
    what = f"several columns that may hold the {option}: {', '.join(fit)}" if fit else f"no column {' or '.join(names)}"
    kind = ValueError if fit else _MissingColumnError
    raise kind(f"{place} has {what}; name it with --{option}-column, of {', '.join(there)}")


def read_solutions(files: Sequence[Path], columns: Columns) -> Iterator[list[SolutionRow]]:
    """The solutions of each input row in turn, at least one.

    Raises:
        ValueError: a file cannot be read any further, so that the number of what follows is not known.
    """
    number = 0
    for row in _iter_rows(files):
        solutions = list(_read_row(row, columns, number))
        number += len(solutions)
        yield solutions


def count_input_rows(files: Sequence[Path]) -> int | None:
    """How many rows the input has; None where only reading all would tell."""
    total = 0
    for file in files:
        if file.suffix == ".parquet":
            total += pyarrow.parquet.read_metadata(file).num_rows
        elif file.suffix == ".jsonl":
            with file.open("rb") as lines:
                total += sum(1 for line in lines if line.strip())
        else:
            return None
    return total


def describe_files(files: Sequence[Path]) -> list[str]:
    """Name, bytes and a hash of the first and last MiB of each file: what tells whether the input is the same."""
    described = []
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as content:
            digest = hashlib.sha256(content.read(_ENDS_READ))
            content.seek(max(0, size - _ENDS_READ))
            digest.update(content.read())
        described.append(f"{file.name}, {size} bytes, {digest.hexdigest()[:16]}")
    return described


def storable(text: str) -> str:
    """The text with halves of surrogate pairs, which cannot be written as UTF-8, spelled out."""
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def _iter_rows(files: Iterable[Path]) -> Iterator[SourceRow]:
    for file in files:
        yield from iter_file_rows(file)


def _read_row(row: SourceRow, columns: Columns, number: int) -> Iterator[SolutionRow]:
    id = None
    try:
        if row.error is not None:
            raise row.error
        if not isinstance(row.value, Mapping):
            raise TypeError(f"a row must be an object, got {type(row.value).__name__}")
        id = _as_id(row.value.get(columns.id)) if columns.id is not None else None
        problem = row.value.get(columns.problem)
        if not isinstance(problem, str):
            raise TypeError(f"{columns.problem} must be a text, got {problem!r:.80}")
        _check_length(problem, columns.problem)
        values = [row.value.get(columns.solution)] if columns.solution is not None else _as_list(row, columns.solutions)
    except (TypeError, ValueError) as error:
        yield SolutionRow(row=number, place=row.place, id=id, error=f"{row.place}: {error}")
        return
    for index, value in enumerate(values):
        name = columns.solution or f"solution {index + 1}"
        try:
            solution = read_solution(_parse_cell(value) if row.is_text and columns.solution else value, name)
            for text in [solution] if isinstance(solution, str) else solution:
                _check_length(text, name)
        except (TypeError, ValueError) as error:
            fault = f"{row.place}: {error}"
            yield SolutionRow(row=number + index, place=row.place, id=id, solution_idx=index, error=fault)
            continue
        yield SolutionRow(
            row=number + index, place=row.place, id=id, solution_idx=index, problem=problem, solution=solution
        )


def _as_list(row: SourceRow, name: str | None) -> list[Any]:
    value = row.value.get(name)
    if row.is_text:
        try:
            value = json.loads(value)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{name} must be a list as JSON text in a CSV file: {error}") from error
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} must be a list with at least one solution, got {value!r:.80}")
    return value


def _parse_cell(cell: Any) -> Any:
    """A cell of a CSV file that is a JSON list of texts as these steps, any other as the text that it is."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            value = json.loads(cell)
        except (ValueError, RecursionError):
            return cell
        if isinstance(value, list) and value and all(isinstance(step, str) for step in value):
            return value
    return cell


def _as_id(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return None if value is None else storable(value)
    return json.dumps(value, ensure_ascii=True, default=str)


def _check_length(text: str, name: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{name} has {len(text):,} characters, more than the {MAX_CHARACTERS:,} that are read")
