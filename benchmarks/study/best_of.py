"""Best of four: what choosing by a PRM is worth beside choosing without one.

values = choices(scored, "min")  # per problem: was the chosen solution right?
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modeling_prm.aggregation import aggregate
from trainer.selection import best_of_n, majority_vote, weighted_majority_vote

from .measures import sigmoid
from .predictions import Scored, Target

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The solutions of one problem: their targets, and the step probabilities of each."""

    targets: tuple[Target, ...]
    step_probs: tuple[tuple[float, ...], ...]


def by_problem(scored: Scored) -> list[Candidates]:
    """The scored solutions, those of one problem together, in the order in which problems come first.

    Raises:
        ValueError: of a solution it is not known whether it is right.
    """
    problems: dict[str, list[int]] = {}
    for index, target in enumerate(scored.targets):
        if target.right is None:
            raise ValueError(f"{target.id} does not say whether it is right; score the set anew")
        problems.setdefault(target.group, []).append(index)
    probs = sigmoid(scored.logits)
    return [
        Candidates(
            targets=tuple(scored.targets[index] for index in indices),
            step_probs=tuple(tuple(probs[index, : len(scored.targets[index].labels)].tolist()) for index in indices),
        )
        for indices in problems.values()
    ]


def chosen_by_score(problems: Sequence[Candidates], aggregation: str) -> FloatArray:
    """1 for each problem of which the solution with the highest score is right, 0 for the others."""
    return np.array(
        [float(bool(p.targets[best_of_n([aggregate(q, aggregation) for q in p.step_probs])].right)) for p in problems]
    )


def chosen_by_vote(problems: Sequence[Candidates], aggregation: str | None = None) -> FloatArray:
    """The chance for each problem that the vote's solution is right, ties broken at random.

    The votes count the same, or with an aggregation as much as the solutions' scores. Where two answers have equally
    many votes, the one that comes first wins, so the mean over all orders of the solutions is taken.
    """
    chances = []
    for problem in problems:
        groups = [target.answer for target in problem.targets]
        scores = None if aggregation is None else [aggregate(q, aggregation) for q in problem.step_probs]
        hits = []
        for order in itertools.permutations(range(len(groups))):
            shuffled = [groups[index] for index in order]
            if scores is None:
                place = majority_vote(shuffled)
            else:
                place = weighted_majority_vote(shuffled, [scores[index] for index in order])
            hits.append(bool(problem.targets[order[place]].right))
        chances.append(sum(hits) / len(hits))
    return np.array(chances)


def free_choices(problems: Sequence[Candidates]) -> dict[str, FloatArray]:
    """For each way to choose that needs no PRM, and for the oracle, the chance to be right on each problem."""
    right = [[bool(target.right) for target in problem.targets] for problem in problems]
    models = sorted({_model(target) for problem in problems for target in problem.targets})
    rows = {"random choice": np.array([sum(row) / len(row) for row in right])}
    for model in models:
        rows[f"always {model}"] = np.array(
            [float(any(t.right for t in problem.targets if _model(t) == model)) for problem in problems]
        )
    rows["fewest steps"] = np.array([_fewest_steps(problem) for problem in problems])
    rows["majority vote"] = chosen_by_vote(problems)
    rows["oracle"] = np.array([float(any(row)) for row in right])
    return rows


def _model(target: Target) -> str:
    return target.id.partition("-")[2]


def _fewest_steps(problem: Candidates) -> float:
    """The chance that a solution with the fewest steps is right, which an aggregation may choose without reading."""
    fewest = min(len(target.labels) for target in problem.targets)
    right = [bool(target.right) for target in problem.targets if len(target.labels) == fewest]
    return sum(right) / len(right)
