"""Problems with candidate solutions: read from a file, each line checked, and written back with what was found out.

`trainer.best_of_n` describes the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modeling_prm.aggregation import aggregate

from .answers import extract_answer, normalize_answer
from .data_files import iter_file_rows, list_data_files


@dataclass(kw_only=True, slots=True)
class Candidate:
    """One solution: its text or steps, and what is found out about it.

    Attributes:
        solution: a text that is still to be cut, or the steps.
        answer: the final answer, None where there is none.
        step_probs: a probability a step; None where it is not scored (yet).
        error: why it could not be scored.
        group: the number of its answer among the problem's, None where there is no answer.
        correct: whether its answer equals the reference.
        scores: one score an aggregation; empty where it could not be scored.
    """

    solution: str | list[str]
    answer: str | None
    step_probs: list[float] | None = None
    error: str | None = None
    group: int | None = None
    correct: bool = False
    scores: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The candidate as an entry of `solutions` in a file that this module reads."""
        values = asdict(self)
        solution = values.pop("solution")
        values = {"text" if isinstance(solution, str) else "steps": solution, **values}
        return {name: value for name, value in values.items() if name != "error" or value is not None}


@dataclass(kw_only=True, slots=True)
class Problem:
    """A problem with its reference answer, its candidates, and its place in the file."""

    place: str
    problem: str
    answer: str
    candidates: list[Candidate]

    def to_dict(self) -> dict[str, Any]:
        """The problem as a line of a file that this module reads."""
        solutions = [candidate.to_dict() for candidate in self.candidates]
        return {"problem": self.problem, "answer": self.answer, "solutions": solutions}


def read_problems(path: str | Path) -> list[Problem]:
    """The problems of a file, with the answers that their candidates state.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: a line is not as `trainer.best_of_n` describes; the message names file, line and reason.
    """
    problems: list[Problem] = []
    places: dict[str, str] = {}
    for file in list_data_files(Path(path)):
        for row in iter_file_rows(file):
            try:
                if row.error is not None:
                    raise row.error
                problem = _read_problem(row.value, row.place)
                if problem.problem in places:
                    raise ValueError(
                        f"the problem stands in {places[problem.problem]} already; put all its solutions in one line"
                    )
            except (TypeError, ValueError) as error:
                raise ValueError(f"{row.place}: {error}") from error
            places[problem.problem] = row.place
            problems.append(problem)
    if not problems:
        raise ValueError(f"{path} holds no problem; write one a line, with problem, answer and solutions")
    return problems


def write_problems(problems: Sequence[Problem], file: Path) -> None:
    """Write problems as a file that `read_problems` reads, a line each."""
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(problem.to_dict(), ensure_ascii=False) + "\n" for problem in problems)


def unscored(problems: Iterable[Problem]) -> list[tuple[Problem, int]]:
    """Each candidate that is still to be scored: its problem, and its place among the candidates."""
    return [
        (problem, index)
        for problem in problems
        for index, candidate in enumerate(problem.candidates)
        if candidate.step_probs is None and candidate.error is None
    ]


def count(problems: Sequence[Problem]) -> dict[str, int]:
    """Numbers of problems and candidates, and of candidates without a score or an answer."""
    candidates = [candidate for problem in problems for candidate in problem.candidates]
    return {
        "num_problems": len(problems),
        "num_solutions": len(candidates),
        "num_unscored": sum(candidate.step_probs is None for candidate in candidates),
        "num_without_answer": sum(candidate.group is None for candidate in candidates),
    }


def _read_problem(row: Any, place: str) -> Problem:
    if not isinstance(row, dict):
        raise TypeError(f"a line must be an object with problem, answer and solutions, got {type(row).__name__}")
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("a text holds half of a surrogate pair; decode the source with the right encoding") from error
    if missing := [name for name in ("problem", "answer", "solutions") if row.get(name) is None]:
        raise ValueError(f"{', '.join(missing)} missing; a line needs problem, answer and solutions")
    if not isinstance(row["problem"], str) or not row["problem"].strip():
        raise ValueError(f"problem must be a text that is not empty, got {row['problem']!r:.80}")
    reference = _as_answer(row["answer"], "answer")
    if "####" in reference or "\\boxed" in reference:  # a whole solution, as GSM8K and MATH give it
        reference = extract_answer(reference) or ""
    if not normalize_answer(reference):
        raise ValueError(f"answer must be the final answer, got {row['answer']!r:.80}")
    solutions = row["solutions"]
    if not isinstance(solutions, list) or not solutions:
        raise ValueError(f"solutions must be a list with at least one solution, got {solutions!r:.80}")
    candidates = [_read_candidate(value, f"solution {index}") for index, value in enumerate(solutions, start=1)]
    return Problem(place=place, problem=row["problem"], answer=reference, candidates=candidates)


def read_solution(value: Any, name: str) -> str | list[str]:
    """The text or the steps of an entry of `solutions`: itself, or what its `"text"` or `"steps"` holds.

    Args:
        value: the entry.
        name: what the messages call it.

    Raises:
        TypeError, ValueError: it is none of these.
    """
    fields = _as_fields(value)
    text, steps = fields.get("text"), fields.get("steps")
    if (text is None) == (steps is None):
        raise ValueError(f"{name} must be a text, a list of steps, or an object with either text or steps")
    if not isinstance(text, str | None):
        raise TypeError(f"{name}: text must be a string, got {type(text).__name__}")
    if steps is not None and not (isinstance(steps, list) and all(isinstance(step, str) for step in steps)):
        raise TypeError(f"{name}: steps must be a list of strings, got {steps!r:.80}")
    return text if text is not None else list(steps or [])


def _as_fields(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"text" if isinstance(value, str) else "steps": value}


def _read_candidate(value: Any, name: str) -> Candidate:
    fields, solution = _as_fields(value), read_solution(value, name)
    text, steps = (solution, None) if isinstance(solution, str) else (None, solution)
    answer = fields.get("answer")
    answer = extract_answer(text or "\n".join(steps or [])) if answer is None else _as_answer(answer, f"{name}: answer")
    error, step_probs = fields.get("error"), fields.get("step_probs")
    if error is not None and not isinstance(error, str):
        raise TypeError(f"{name}: error must be a text, got {error!r:.80}")
    if step_probs is not None:
        if steps is None or not isinstance(step_probs, list) or len(step_probs) != len(steps):
            raise ValueError(f"{name}: step_probs must be a list with one probability for each entry of steps")
        try:
            aggregate(step_probs)
        except (TypeError, ValueError) as fault:
            raise ValueError(f"{name}: step_probs: {fault}") from fault
    return Candidate(solution=solution, answer=answer, step_probs=step_probs, error=error)


def _as_answer(value: Any, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError(f"{name} must be a text or a number, got {value!r:.80}")
    return str(value)
