"""Arithmetic problems with step-by-step solutions, right and wrong, made from a seed.

The demo trains on these and nothing is downloaded. A problem is a chain of two to four operations,
told as a short story or as a bare calculation; a solution writes one operation a step and closes with
the answer:

    Anna has 17 apples, buys 25 more and gives away 18. How many apples does Anna have now?
    17 + 25 = 42.  |  42 - 18 = 24.  |  The answer is 24.

What a label says. A step is correct (1.0) when everything it states is right for the *problem*: the
operands, the operator and the result are those of the operation which the problem asks for, from the
true value so far. It is wrong (0.0) otherwise. So a step that goes on from a wrong value is wrong even
where its own arithmetic holds, and every later step is wrong too until a correction step restores the
true value. A correction step ("Wait, 17 + 25 is 42, not 43.") is judged by the value it puts forward: a
true one is correct, a failed or needless one is wrong. After a true correction the solution goes on from
the true value and its steps are correct again.

Where an error comes from (`ERROR_KINDS`): `slip` changes one digit of the result, `carry` is off by a
forgotten or added carry, `operand` copies a number wrongly and computes with it, `operator` uses another
operation, `recheck` "corrects" a right result into a wrong one, `answer` reports another final number.

    python -c "from trainer.demo_data import generate_arithmetic as g; print(g(2, seed=0))"
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["train", "eval"]

ERROR_KINDS = ("slip", "carry", "operand", "operator", "recheck", "answer")

_ERROR_WEIGHTS = (30, 15, 20, 12, 11, 12)
_LARGEST_VALUE = 999
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
    operations: tuple[int, int] = (2, 4),
    operands: tuple[int, int] = (10, 99),
    multiplication: bool = True,
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
        operands: The least and the largest number to add or subtract; a problem starts from 10 to 99.
        multiplication: Whether some problems multiply by a factor from 2 to 5.
        wrong_share: Share of solutions with an error that stays.
        corrected_share: Share of solutions with an error that a later step corrects.

    Returns:
        `num_problems` rows `{"problem": str, "steps": list[str], "labels": list[float]}` with as many
        labels as steps, 1.0 for a correct step and 0.0 for a wrong one.

    Raises:
        ValueError: If a count, range or share is out of bounds, or if the settings allow too few
            different problems.
    """
    _check_arguments(num_problems, split, operations, operands, wrong_share, corrected_share)
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    draws = 0
    while len(rows) < num_problems:
        draws += 1
        if draws > 100 * num_problems + 1000:
            raise ValueError(
                f"found only {len(rows)} different problems of the {num_problems} asked for; "
                "ask for fewer, or widen operands or operations"
            )
        problem = _draw_problem(rng, operations, operands, multiplication)
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
    """Return one fixed problem, which the "train" split never holds, with three solutions.

    Returns:
        The problem's text, and `{"right": ..., "wrong": ..., "self-corrected": ...}` where each value
        is `{"steps": list[str], "labels": list[float]}`.
    """
    problem = "Anna has 47 apples, buys 38 more, gives away 28 and finds 19 more. How many apples does Anna have now?"
    right = ["47 + 38 = 85.", "85 - 28 = 57.", "57 + 19 = 76.", "The answer is 76."]
    wrong = ["47 + 38 = 75.", "75 - 28 = 47.", "47 + 19 = 66.", "The answer is 66."]
    corrected = [
        "47 + 38 = 85.",
        "85 - 28 = 67.",
        "67 + 19 = 86.",
        "Wait, 85 - 28 is 57, not 67.",
        "57 + 19 = 76.",
        "The answer is 76.",
    ]
    return problem, {
        "right": {"steps": right, "labels": [1.0, 1.0, 1.0, 1.0]},
        "wrong": {"steps": wrong, "labels": [0.0, 0.0, 0.0, 0.0]},
        "self-corrected": {"steps": corrected, "labels": [1.0, 0.0, 0.0, 1.0, 1.0, 1.0]},
    }


def _check_arguments(
    num_problems: int,
    split: str | None,
    operations: tuple[int, int],
    operands: tuple[int, int],
    wrong_share: float,
    corrected_share: float,
) -> None:
    if num_problems < 0:
        raise ValueError(f"num_problems is {num_problems}; it must not be negative")
    if split not in (None, "train", "eval"):
        raise ValueError(f"split is {split!r}; it must be 'train', 'eval' or None")
    if not 1 <= operations[0] <= operations[1] <= 8:
        raise ValueError(f"operations is {operations}; it must be (least, most) within 1 to 8")
    if not 1 <= operands[0] < operands[1] <= 500:
        raise ValueError(f"operands is {operands}; it must be (least, largest) within 1 to 500")
    if min(wrong_share, corrected_share) < 0 or wrong_share + corrected_share > 1:
        raise ValueError(
            f"wrong_share is {wrong_share} and corrected_share is {corrected_share}; "
            "neither may be negative and their sum may not be above 1"
        )


def _apply(value: int, operator: str, operand: int) -> int:
    if operator == "+":
        return value + operand
    return value - operand if operator == "-" else value * operand


def _draw_problem(
    rng: random.Random, operations: tuple[int, int], operands: tuple[int, int], multiplication: bool
) -> _Problem:
    count = rng.randint(*operations)
    multiplied = multiplication and rng.random() < 0.3
    while True:
        start = rng.randint(10, 99)
        chain: list[tuple[str, int]] = []
        if multiplied:
            chain.append(("*", rng.randint(2, 5)))
        while len(chain) < count:
            chain.append((rng.choice("+-"), rng.randint(*operands)))
        problem = _Problem("", start, tuple(chain))
        if all(0 <= value <= _LARGEST_VALUE for value in problem.values()):
            break
    tell = _tell_story if rng.random() < 0.7 else _tell_calculation
    return _Problem(tell(rng, problem), problem.start, problem.operations)


def _tell_story(rng: random.Random, problem: _Problem) -> str:
    name, items = rng.choice(_NAMES), rng.choice(_ITEMS)
    parts = [f"{name} has {problem.start} {items}"]
    rest = problem.operations
    if rest[0][0] == "*":
        parts = [f"{name} has {problem.start} {items} in each of {rest[0][1]} boxes"]
        rest = rest[1:]
    for operator, operand in rest:
        parts.append(rng.choice(_GAINS if operator == "+" else _LOSSES).format(operand))
    return f"{_join(parts)}. How many {items} does {name} have now?"


def _tell_calculation(rng: random.Random, problem: _Problem) -> str:
    verbs = {"+": "add {}", "-": "subtract {}", "*": "multiply by {}"}
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
        if all(0 <= number <= _LARGEST_VALUE for number in writer.numbers):
            return writer.steps, writer.labels


class _Writer:
    """Writes one solution; `numbers` keeps every stated result, for the caller to check its size."""

    def __init__(self, problem: _Problem, rng: random.Random) -> None:
        self.problem = problem
        self.values = problem.values()
        self.rng = rng
        self.steps: list[str] = []
        self.labels: list[float] = []
        self.numbers: list[int] = []

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
                    shown = self._correct(error_at, self._truth(error_at), wrong)
                    index, wrong = error_at, None
                else:
                    countdown -= 1
            index += 1

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

    def _correct(self, index: int, result: int, wrong: int) -> int:
        """Write a correction of step `index` that puts `result` in the place of `wrong`."""
        stated = "the answer"
        if index < len(self.problem.operations):
            operator, operand = self.problem.operations[index]
            stated = f"{self.values[index]} {operator} {operand}"
        self._add(f"Wait, {stated} is {result}, not {wrong}.", result, result == self._truth(index))
        return result

    def _fail(self, index: int, shown: int, plan: _Plan) -> int:
        """Write step `index` with the error that `plan` asks for and return the wrong value."""
        rng, truth = self.rng, self._truth(index)
        if plan.kind == "answer":
            others = [value for value in self.values if value != truth]
            wrong = rng.choice(others) if others and rng.random() < 0.5 else _slip(rng, truth)
            self._add(f"The answer is {wrong}.", wrong, False)
        elif plan.kind == "recheck":
            self._go_on(index, shown)
            wrong = self._correct(index, _slip(rng, truth), truth)
        else:
            wrong = self._miscalculate(index, shown, plan.kind)
        if plan.attempted:
            again = _slip(rng, wrong)
            while again == truth:
                again = _slip(rng, wrong)
            wrong = self._correct(index, again, wrong)
        return wrong

    def _miscalculate(self, index: int, shown: int, kind: str) -> int:
        """Write operation `index` with a wrong result, operand or operator and return its result."""
        rng = self.rng
        operator, operand = self.problem.operations[index]
        if kind == "slip":
            result = _slip(rng, self._truth(index))
        elif kind == "carry":
            result = self._truth(index) + _carry_error(shown, operator, operand)
        else:
            if kind == "operator":
                operator = "-" if operator == "+" else "+"
            elif rng.random() < 0.5:
                operand = _miscopy(rng, operand)
            else:
                shown = _miscopy(rng, shown)
            result = _apply(shown, operator, operand)
        self._add(f"{shown} {operator} {operand} = {result}.", result, False)
        return result


def _slip(rng: random.Random, number: int) -> int:
    """Change one digit, half of the time by one; a number keeps its count of digits."""
    if number < 0:
        return -_slip(rng, -number)
    while True:
        digits = [int(digit) for digit in str(number)]
        place = rng.randrange(len(digits))
        digits[place] = digits[place] + rng.choice((-1, 1)) if rng.random() < 0.5 else rng.randrange(10)
        changed = int("".join(str(digit % 10) for digit in digits))
        if changed != number and len(str(changed)) == len(digits):
            return changed


def _miscopy(rng: random.Random, number: int) -> int:
    """Swap the first two digits where that makes another number of as many digits, or change one digit."""
    text = str(number)
    swapped = text[1:2] + text[:1] + text[2:]
    if rng.random() < 0.3 and swapped != text and swapped[0] != "0":
        return int(swapped)
    return _slip(rng, number)


def _carry_error(value: int, operator: str, operand: int) -> int:
    """The difference a forgotten carry or borrow makes, or a needless one where none is due."""
    if operator == "+":
        return -10 if value % 10 + operand % 10 >= 10 else 10
    if operator == "-":
        return 10 if value % 10 < operand % 10 else -10
    return -10 if value % 10 * operand >= 10 else 10
