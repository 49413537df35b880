"""GSM8K's files as the study reads them: a line is a step, and the annotations `<<a=b>>` are taken out of the text."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from trainer.answers import answers_equal, group_answers

from .injection import AnnotatedLine, inject_error, parse_solution, visible

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
_ANSWER = re.compile(r"A:\s*(.+)")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model's solution: its lines without annotations, whether it is right, and the group of its answer."""

    model: str
    steps: tuple[str, ...]
    is_correct: bool
    answer_group: int | None


@dataclass(frozen=True, kw_only=True)
class ModelProblem:
    """A problem of the test file with the four models' solutions."""

    question: str
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, kw_only=True)
class TrainProblem:
    """A problem of the training file with its own solution; the last line is `A: ` with the answer."""

    question: str
    lines: tuple[AnnotatedLine, ...]


def read_model_solutions(file: Path) -> list[ModelProblem]:
    """All problems of `example_model_solutions.jsonl`; a solution without text is one step, `(no solution)`."""
    problems = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        texts = [row[model]["solution"] for model in MODELS]
        answers = [_answer(text) for text in texts]
        groups = group_answers(answers, comparison="string")
        candidates = tuple(
            Candidate(
                model=model,
                steps=tuple(part for part in map(visible, text.splitlines()) if part) or ("(no solution)",),
                is_correct=bool(row[model]["is_correct"]),
                answer_group=group,
            )
            for model, text, group in zip(MODELS, texts, groups, strict=True)
        )
        problems.append(ModelProblem(question=row["question"], candidates=candidates))
    return problems


def disagreements(file: Path) -> int:
    """How many of the file's verdicts differ from the comparison of the answer with the reference's."""
    count = 0
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        reference = _answer(row["ground_truth"]) or ""
        for model in MODELS:
            equal = answers_equal(reference, _answer(row[model]["solution"]), comparison="string")
            count += equal != row[model]["is_correct"]
    return count


def read_train_problems(file: Path) -> list[TrainProblem]:
    """The problems of `train.jsonl` whose annotations are calculations that this module understands."""
    problems = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        # The models end theirs in "A: 72", which the training file writes as "#### 72".
        lines = parse_solution(row["answer"].replace("####", "A:"))
        if lines is not None:
            problems.append(TrainProblem(question=row["question"], lines=lines))
    return problems


def right_and_wrong(problem: TrainProblem, rng: random.Random) -> list[tuple[str, tuple[str, ...], tuple[float, ...]]]:
    """The solution as it is, and where that can be, once with an error: name, lines and labels of each."""
    right = tuple(line.text for line in problem.lines)
    found = [("right", right, (1.0,) * len(right))]
    if (wrong := inject_error(problem.question, problem.lines, rng)) is not None:
        found.append((wrong.kind, wrong.lines, wrong.labels))
    return found


def _answer(text: str) -> str | None:
    """What stands behind the last `A:`, None where nothing does."""
    found = _ANSWER.findall(text)
    return found[-1].strip() if found else None
