"""Labels of a solution's steps from completions of its beginnings, as searches that say what they want completed.

    plan = monte_carlo(item, True, rollouts=4)
    next(plan)  # [1, 2]: the beginnings of one and of two steps
    plan.send([[True, False, True, True], [False] * 4])  # StopIteration; its value is the labels

Each is a generator: it yields numbers of steps, and is sent for each of these a boolean for every completion of the
solution's first steps, whether it reached the right answer. So whoever drives them chooses where completions come from
and how many solutions are under way at a time.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

from modeling_prm.step_loss import IGNORED_LABEL

from .format_parts import labels_up_to
from .labelling_items import LabelItem

LabelKind = Literal["hard", "soft"]


@dataclass(frozen=True, kw_only=True)
class StepLabels:
    """What was found out about the S steps of a solution.

    Attributes:
        labels: S labels, -100 where nothing is known.
        successes: for each step, how many of the completions after it reached the right answer.
        rollouts: for each step, of how many; 0 where none was made. That of the last step is the solution itself.
        error: why there are no labels; None where there are.
    """

    labels: tuple[float, ...]
    successes: tuple[int, ...]
    rollouts: tuple[int, ...]
    error: str | None = None


Plan = Generator[list[int], Sequence[Sequence[bool]], StepLabels]


def label_of_counts(successes: int, rollouts: int, kind: LabelKind) -> float:
    """The label that counts give: hard, 1 if any completion succeeded (2312.08935, 2501.07301); soft, their share."""
    if rollouts == 0:
        return IGNORED_LABEL
    return float(successes > 0) if kind == "hard" else successes / rollouts


def outcome(item: LabelItem, is_right: bool) -> StepLabels:
    """Every step takes the correctness of the final answer."""
    num_steps = len(item.steps)
    return StepLabels(labels=(float(is_right),) * num_steps, successes=(0,) * num_steps, rollouts=(0,) * num_steps)


def monte_carlo(item: LabelItem, is_right: bool, *, rollouts: int, kind: LabelKind = "hard") -> Plan:
    """Monte Carlo estimates (Math-Shepherd, 2312.08935): completions after each step but the last.

    After the last step nothing is left to complete: its one rollout is the solution itself.

    Args:
        item: the solution, of S steps.
        is_right: whether its final answer is right.
        rollouts: completions a step.
        kind: which label the counts become.
    """
    num_steps = len(item.steps)
    found = (yield list(range(1, num_steps))) if num_steps > 1 else []
    successes = (*(sum(outcomes) for outcomes in found), int(is_right))
    counts = (*(len(outcomes) for outcomes in found), 1)
    labels = tuple(label_of_counts(hits, count, kind) for hits, count in zip(successes, counts, strict=True))
    return StepLabels(labels=labels, successes=successes, rollouts=counts)


def first_error(item: LabelItem, is_right: bool, *, check_problem: bool = True) -> Plan:
    """The first error by binary search (OmegaPRM, 2406.06592): the first step after which no completion succeeds.

    It takes completions after ceil(log2 S) steps in place of S - 1. A solution whose answer is right is taken to have
    no error, and takes none. Labels are 1 before the first error, 0 at it, and -100 after it. As in the paper, a
    beginning counts as right where any completion after it succeeds, and it is assumed that after an error none does.

    Args:
        item: the solution, of S steps.
        is_right: whether its final answer is right.
        check_problem: where no beginning was ever completed well, complete the problem alone; where that fails too,
            the completions say nothing about the steps, and all labels are -100. False calls the first step wrong.
    """
    num_steps = len(item.steps)
    successes, counts = [0] * num_steps, [0] * num_steps
    successes[-1], counts[-1] = int(is_right), 1

    def found(labels: tuple[float, ...], error: str | None = None) -> StepLabels:
        return StepLabels(labels=labels, successes=tuple(successes), rollouts=tuple(counts), error=error)

    if is_right:
        return found((1.0,) * num_steps)
    good, bad = 0, num_steps
    while bad - good > 1:
        middle = (good + bad) // 2
        (outcomes,) = yield [middle]
        if not outcomes:
            return found((IGNORED_LABEL,) * num_steps, f"the first {middle} steps leave no room for a completion")
        successes[middle - 1], counts[middle - 1] = sum(outcomes), len(outcomes)
        good, bad = (middle, bad) if any(outcomes) else (good, middle)
    if good == 0 and check_problem:
        (outcomes,) = yield [0]
        if not any(outcomes):
            return found((IGNORED_LABEL,) * num_steps)
    return found(labels_up_to(bad - 1, num_steps, name="first error"))
