"""Arithmetic problems with step-by-step solutions, right and wrong, made from a seed.

The demo trains on these and nothing is downloaded. A problem is a chain of three to five additions and
subtractions within ten, told as a short story or as a bare calculation; a solution writes one operation
a step and closes with the answer:

    Anna has 5 apples, buys 3 more, gives away 2 and finds 1 more. How many apples does Anna have now?
    5 + 3 = 8.  |  8 - 2 = 6.  |  6 + 1 = 7.  |  The answer is 7.

Numbers stay this small because a model that starts from nothing has to learn arithmetic itself from
right and wrong alone, in minutes on a CPU.

What a label says. A step is correct (1.0) when everything it states is right for the *problem*: the
operands, the operator and the result are those of the operation which the problem asks for, from the
true value so far. It is wrong (0.0) otherwise. So a step that goes on from a wrong value is wrong even
where its own arithmetic holds, and every later step is wrong too until a correction step restores the
true value. A correction step ("Wait, 5 + 3 = 8.") is judged by the value it puts forward: a true one is
correct, a failed or needless one is wrong. After a true correction the solution goes on from the true
value and its steps are correct again.

Where an error comes from (`ERROR_KINDS`): `slip` gets a result wrong, `copy` copies a number wrongly (the
value so far; in the first step the number that the problem adds or subtracts) and computes with it,
`recheck` "corrects" a right result into a wrong one, `answer` reports another final number.

    python -c "from trainer.demo_data import generate_arithmetic as g; print(g(2, seed=0))"
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["train", "eval"]

ERROR_KINDS = ("slip", "copy", "recheck", "answer")

_ERROR_WEIGHTS = (40, 20, 15, 15)
_LARGEST_VALUE = 10
_LARGEST_OPERAND = 3
_NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry")
_ITEMS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pencils", "stamps")
_GAINS = ("buys {} more", "finds {} more", "gets {} more", "wins {} more")
_LOSSES = ("gives away {}", "loses {}", "sells {}", "uses {}")


@dataclass(frozen=True)
class _Problem:
    """A chain of operations and the text that asks for it; `operations` holds (operator, operand)."""

    text: str
    start: int
    operations: tuple[tuple[str, int], ...]

    def values(self) -> list[int]:
        """The true value before the first operation and after each: `len(operations) + 1` integers."""
        values = [self.start]
        for operator, operand in self.operations:
            values.append(_apply(values[-1], operator, operand))
        return values


@dataclass(frozen=True)
class _Plan:
    """What goes wrong in a solution.

    `position` is the index of the faulty operation (the number of operations: the answer itself),
    `attempted` says whether a failed correction follows the error, and `delay` is how many more steps
    are taken before the true correction, None where there is none.
    """

    kind: str
    position: int
    attempted: bool = False
    delay: int | None = None


def generate_arithmetic(
    num_problems: int,
    *,
    seed: int,
    split: Split | None = None,
    operations: tuple[int, int] = (3, 5),
    wrong_share: float = 0.35,
    corrected_share: float = 0.35,
) -> list[dict[str, Any]]:
    """Generate solved arithmetic problems with a label for every step.

    The same arguments give the same rows on every machine.

    Args:
        num_problems: How many rows; every row has a problem of its own, no text comes twice.
        seed: Seeds a private `random.Random`; the global generator is left alone.
        split: "train" or "eval" keeps problems of that side only. A problem's side depends on its text
            alone (about one in ten is "eval"), so the two sides share no problem whatever the seeds and
            sizes. None takes any problem.
        operations: The least and the most operations of a problem.
        wrong_share: Share of solutions with an error that stays.
        corrected_share: Share of solutions with an error that a later step corrects.

    Returns:
        `num_problems` rows `{"problem": str, "steps": list[str], "labels": list[float]}` with as many
        labels as steps, 1.0 for a correct step and 0.0 for a wrong one.

    Raises:
        ValueError: If a count, range or share is out of bounds, or if the settings allow too few
            different problems.
    """
    _check_arguments(num_problems, split, operations, wrong_share, corrected_share)
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    draws = 0
    while len(rows) < num_problems:
        draws += 1
        if draws > 100 * num_problems + 1000:
            raise ValueError(
                f"found only {len(rows)} different problems of the {num_problems} asked for; "
                "ask for fewer, or widen operations"
            )
        problem = _draw_problem(rng, operations)
        if problem.text in seen or (split is not None and split != problem_split(problem.text)):
            continue
        seen.add(problem.text)
        steps, labels = _draw_solution(rng, problem, wrong_share, corrected_share)
        rows.append({"problem": problem.text, "steps": steps, "labels": labels})
    return rows


def problem_split(problem: str) -> Split:
    """Return the side, "train" or "eval", that a problem's text belongs to: about one in ten is "eval"."""
    digest = hashlib.sha256(problem.encode("utf-8")).digest()
    return "eval" if digest[0] < 26 else "train"


def example_solutions() -> tuple[str, dict[str, dict[str, Any]]]:
    """Return one fixed problem that no training split holds, with three solutions.

    Returns:
        The problem's text, and `{"right": ..., "wrong": ..., "self-corrected": ...}` where each value
        is `{"steps": list[str], "labels": list[float]}`.
    """
    solutions = {
        "right": (
            ["5 + 3 = 8.", "8 - 2 = 6.", "6 + 1 = 7.", "The answer is 7."],
            [1.0, 1.0, 1.0, 1.0],
        ),
        "wrong": (
            ["5 + 3 = 8.", "8 - 2 = 7.", "7 + 1 = 8.", "The answer is 8."],
            [1.0, 0.0, 0.0, 0.0],
        ),
        "self-corrected": (
            ["5 + 3 = 8.", "8 - 2 = 7.", "7 + 1 = 8.", "Wait, 8 - 2 = 6.", "6 + 1 = 7.", "The answer is 7."],
            [1.0, 0.0, 0.0, 1.0, 1.0, 1.0],
        ),
    }
    return _EXAMPLE_TEXT, {name: {"steps": steps, "labels": labels} for name, (steps, labels) in solutions.items()}


_EXAMPLE_TEXT = "Carla has 5 books, buys 3 more, gives away 2 and finds 1 more. How many books does Carla have now?"


def _check_arguments(
    num_problems: int,
    split: str | None,
    operations: tuple[int, int],
    wrong_share: float,
    corrected_share: float,
) -> None:
    if num_problems < 0:
        raise ValueError(f"num_problems is {num_problems}; it must not be negative")
    if split not in (None, "train", "eval"):
        raise ValueError(f"split is {split!r}; it must be 'train', 'eval' or None")
    if not 1 <= operations[0] <= operations[1] <= 8:
        raise ValueError(f"operations is {operations}; it must be (least, most) within 1 to 8")
    if min(wrong_share, corrected_share) < 0 or wrong_share + corrected_share > 1:
        raise ValueError(
            f"wrong_share is {wrong_share} and corrected_share is {corrected_share}; "
            "neither may be negative and their sum may not be above 1"
        )


def _apply(value: int, operator: str, operand: int) -> int:
    return value + operand if operator == "+" else value - operand


def _draw_problem(rng: random.Random, operations: tuple[int, int]) -> _Problem:
    count = rng.randint(*operations)
    while True:
        start = rng.randint(1, _LARGEST_VALUE - 1)
        chain = tuple((rng.choice("+-"), rng.randint(1, _LARGEST_OPERAND)) for _ in range(count))
        problem = _Problem("", start, chain)
        if all(map(_can_be_written, problem.values())):
            break
    tell = _tell_story if rng.random() < 0.7 else _tell_calculation
    return _Problem(tell(rng, problem), problem.start, problem.operations)


def _can_be_written(number: int) -> bool:
    return 0 <= number <= _LARGEST_VALUE


def _tell_story(rng: random.Random, problem: _Problem) -> str:
    name, items = rng.choice(_NAMES), rng.choice(_ITEMS)
    parts = [f"{name} has {problem.start} {items}"]
    for operator, operand in problem.operations:
        parts.append(rng.choice(_GAINS if operator == "+" else _LOSSES).format(operand))
    return f"{_join(parts)}. How many {items} does {name} have now?"


def _tell_calculation(rng: random.Random, problem: _Problem) -> str:
    verbs = {"+": "add {}", "-": "subtract {}"}
    parts = [f"Start with {problem.start}"]
    parts += [verbs[operator].format(operand) for operator, operand in problem.operations]
    return f"{_join(parts)}. What is the result?"


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _draw_solution(
    rng: random.Random, problem: _Problem, wrong_share: float, corrected_share: float
) -> tuple[list[str], list[float]]:
    """Draw what goes wrong until every number that follows from it can be written."""
    fate = rng.random()
    if fate >= wrong_share + corrected_share:
        writer = _Writer(problem, rng)
        writer.write(None)
        return writer.steps, writer.labels
    while True:
        kind = rng.choices(ERROR_KINDS, _ERROR_WEIGHTS)[0]
        count = len(problem.operations)
        position = count if kind == "answer" else rng.randrange(count)
        delay = rng.choice((0, 0, 1, 2)) if fate >= wrong_share else None
        writer = _Writer(problem, rng)
        writer.write(_Plan(kind, position, rng.random() < 0.15, delay))
        if all(map(_can_be_written, writer.numbers)) and not writer.ambiguous:
            return writer.steps, writer.labels


class _Writer:
    """Writes one solution.

    `numbers` keeps every stated result, for the caller to check its size; `ambiguous` says whether a
    correction can be read as one of a later step, where the same equation is due again.
    """

    def __init__(self, problem: _Problem, rng: random.Random) -> None:
        self.problem = problem
        self.values = problem.values()
        self.rng = rng
        self.steps: list[str] = []
        self.labels: list[float] = []
        self.numbers: list[int] = []
        self.ambiguous = False

    def write(self, plan: _Plan | None) -> None:
        """Write all steps, with what `plan` says goes wrong."""
        count = len(self.problem.operations)
        index, shown = 0, self.problem.start
        error_at = wrong = countdown = None
        while index <= count:
            if plan is not None and error_at is None and index == plan.position:
                shown = wrong = self._fail(index, shown, plan)
                error_at, countdown = index, plan.delay
            else:
                shown = self._go_on(index, shown)
            if error_at is not None and wrong is not None and countdown is not None:
                if countdown == 0 or index == count:
                    later = range(error_at + 1, index + 1)
                    self.ambiguous |= any(self._equation(i) == self._equation(error_at) for i in later)
                    shown = self._correct(error_at, self._truth(error_at))
                    index, wrong = error_at, None
                else:
                    countdown -= 1
            index += 1

    def _equation(self, index: int) -> tuple[int, tuple[str, int] | None]:
        """What is due at step `index`: the value before it and its operation, None for the answer."""
        is_answer = index == len(self.problem.operations)
        return self.values[index], None if is_answer else self.problem.operations[index]

    def _truth(self, index: int) -> int:
        """The true result of operation `index`, or the true answer where it is the number of operations."""
        return self.values[min(index + 1, len(self.problem.operations))]

    def _add(self, step: str, number: int, correct: bool) -> None:
        self.steps.append(step)
        self.labels.append(float(correct))
        self.numbers.append(number)

    def _go_on(self, index: int, shown: int) -> int:
        """Write step `index` faithfully from the value shown so far, right or wrong as that is."""
        correct = shown == self.values[index]
        if index == len(self.problem.operations):
            self._add(f"The answer is {shown}.", shown, correct)
            return shown
        operator, operand = self.problem.operations[index]
        result = _apply(shown, operator, operand)
        self._add(f"{shown} {operator} {operand} = {result}.", result, correct)
        return result

    def _correct(self, index: int, result: int) -> int:
        """Write a correction of step `index` that puts `result` forward."""
        if index == len(self.problem.operations):
            step = f"Wait, the answer is {result}."
        else:
            operator, operand = self.problem.operations[index]
            step = f"Wait, {self.values[index]} {operator} {operand} = {result}."
        self._add(step, result, result == self._truth(index))
        return result

    def _fail(self, index: int, shown: int, plan: _Plan) -> int:
        """Write step `index` with the error that `plan` asks for and return the wrong value."""
        rng, truth = self.rng, self._truth(index)
        if plan.kind == "answer":
            wrong = _another(rng, truth)
            self._add(f"The answer is {wrong}.", wrong, False)
        elif plan.kind == "recheck":
            self._go_on(index, shown)
            wrong = self._correct(index, _another(rng, truth))
        else:
            wrong = self._miscalculate(index, shown, plan.kind)
        if plan.attempted:
            again = wrong
            while again in (wrong, truth):
                again = _another(rng, wrong)
            wrong = self._correct(index, again)
        return wrong

    def _miscalculate(self, index: int, shown: int, kind: str) -> int:
        """Write operation `index` with a wrong result or a number copied wrongly, and return its result."""
        operator, operand = self.problem.operations[index]
        if kind == "copy" and index == 0:
            # Seen by comparison with the problem only, which is the hardest to learn; so these are few.
            kind = self.rng.choice(("copy", "slip"))
        if kind == "copy" and index == 0:
            operand = _another(self.rng, operand)
        elif kind == "copy":
            shown = _another(self.rng, shown)
        result = _apply(shown, operator, operand)
        if kind == "slip":
            result = _another(self.rng, result)
        self._add(f"{shown} {operator} {operand} = {result}.", result, False)
        return result


def _another(rng: random.Random, number: int) -> int:
    """Another number that can be written, half of the time a neighbour."""
    while True:
        other = number + rng.choice((-1, 1)) if rng.random() < 0.5 else rng.randint(0, _LARGEST_VALUE)
        if other != number and _can_be_written(other):
            return other
