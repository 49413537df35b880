"""Labels from completions: estimates worked by hand, numbers of rollouts, and searches driven by a scripted policy."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from math import ceil, log2
from typing import Any

import pytest

from trainer.labelling_items import LabelItem
from trainer.labelling_methods import Plan, first_error, label_of_counts, monte_carlo, outcome
from trainer.labelling_rollouts import Rollout
from trainer.labelling_run import Labelled, label_solutions

NONE = -100.0


def item(num_steps: int, solution_answer: str | None = "5", answer: str = "7") -> LabelItem:
    steps = tuple(f"step {number}" for number in range(1, num_steps + 1))
    return LabelItem(problem="What?", steps=steps, answer=answer, solution_answer=solution_answer)


class Scripted:
    """Succeeds after a prefix of k steps in the first `successes[k]` of the completions, and counts what it makes."""

    def __init__(self, successes: Sequence[int], *, wrong: str = "It is 5.") -> None:
        self.successes, self.wrong = successes, wrong
        self.calls: list[tuple[int, ...]] = []
        self.problems: set[str] = set()

    def __call__(self, problem: str, prefixes: Sequence[Sequence[str]], n: int) -> list[list[Rollout]]:
        self.calls.append(tuple(map(len, prefixes)))
        self.problems.add(problem)
        right, wrong = Rollout("So the answer is 7.", 6, False), Rollout(self.wrong, 3, False)
        return [[right if index < self.successes[len(prefix)] else wrong for index in range(n)] for prefix in prefixes]


def search(num_steps: int, successes: Sequence[int], **options: Any) -> tuple[Labelled, Scripted]:
    policy = Scripted(successes)
    (found,) = label_solutions(
        [(0, item(num_steps))], lambda one, right: first_error(one, right, **options), policy, rollouts=4
    )
    return found, policy


def test_a_label_of_counts_is_hard_by_any_and_soft_by_share() -> None:
    assert [label_of_counts(hits, 4, "hard") for hits in range(5)] == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert [label_of_counts(hits, 4, "soft") for hits in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert label_of_counts(0, 0, "hard") == label_of_counts(0, 0, "soft") == NONE


@pytest.mark.parametrize(("is_right", "label"), [(True, 1.0), (False, 0.0)])
def test_outcome_gives_every_step_that_of_the_answer(is_right: bool, label: float) -> None:
    assert outcome(item(3), is_right).labels == (label,) * 3


@pytest.mark.parametrize(
    ("kind", "answer", "labels"),
    [("hard", "5", (1.0, 1.0, 0.0, 0.0)), ("soft", "5", (0.75, 0.25, 0.0, 0.0)), ("soft", "7", (0.75, 0.25, 0.0, 1.0))],
)
def test_monte_carlo_counts_what_succeeds_after_each_step(kind: Any, answer: str, labels: tuple[float, ...]) -> None:
    policy = Scripted([4, 3, 1, 0])
    (found,) = label_solutions(
        [(3, item(4, answer))],
        lambda one, right: monte_carlo(one, right, rollouts=4, kind=kind),
        policy,
        rollouts=4,
        instruction="Box it.",
    )
    assert found.row == 3
    assert found.result.labels == labels
    # The last step's one rollout is the solution itself; nothing is completed after it.
    assert found.result.successes == (3, 1, 0, int(answer == "7"))
    assert found.result.rollouts == (4, 4, 4, 1)
    assert policy.calls == [(1, 2, 3)]
    assert policy.problems == {"What?\n\nBox it."}
    # 4 right ones of 6 tokens and 8 wrong ones of 3.
    assert (found.num_rollouts, found.num_tokens, found.num_cut) == (12, 48, 0)


def test_a_solution_of_one_step_takes_no_rollout() -> None:
    policy = Scripted([])
    for plan in (lambda one, right: monte_carlo(one, right, rollouts=4), lambda one, right: first_error(one, right)):
        (found,) = label_solutions([(0, item(1, "7"))], plan, policy, rollouts=4)
        assert found.result.labels == (1.0,)
        assert policy.calls == []


@pytest.mark.parametrize("num_steps", [2, 3, 5, 8, 13, 16])
def test_first_error_finds_every_place_in_few_rollouts(num_steps: int) -> None:
    for error in range(num_steps):
        # Completions succeed after fewer steps than the wrong one, and after none from it on.
        found, policy = search(num_steps, [1] * (error + 1) + [0] * (num_steps - error))
        assert found.result.labels == (1.0,) * error + (0.0,) + (NONE,) * (num_steps - error - 1)
        # Where no step was good, the problem itself is completed too.
        assert len(policy.calls) <= ceil(log2(num_steps)) + (error == 0)
        assert found.num_rollouts == 4 * len(policy.calls)


def test_first_error_looks_where_it_says() -> None:
    # Steps 1 to 3 of 8 are good: it looks after 4 (bad), 2 (good), 3 (good), so that step 4 is the first error.
    found, policy = search(8, [4, 4, 2, 1, 0, 0, 0, 0])
    assert policy.calls == [(4,), (2,), (3,)]
    assert found.result.successes == (0, 2, 1, 0, 0, 0, 0, 0)
    assert found.result.rollouts == (0, 4, 4, 4, 0, 0, 0, 1)
    assert found.result.labels == (1.0, 1.0, 1.0, 0.0, NONE, NONE, NONE, NONE)


def test_a_right_answer_has_no_error_and_takes_no_rollout() -> None:
    policy = Scripted([0] * 4)
    (found,) = label_solutions([(0, item(4, "7.0"))], first_error, policy, rollouts=4)
    assert found.result.labels == (1.0,) * 4
    assert found.result.rollouts == (0, 0, 0, 1)
    assert policy.calls == []


def test_a_problem_that_is_never_solved_says_nothing_about_the_steps() -> None:
    found, policy = search(4, [0, 0, 0, 0])
    assert policy.calls == [(2,), (1,), (0,)]
    assert found.result.labels == (NONE,) * 4
    assert found.result.error is None
    found, policy = search(4, [0, 0, 0, 0], check_problem=False)
    assert policy.calls == [(2,), (1,)]
    assert found.result.labels == (0.0, NONE, NONE, NONE)


def completed(text: str, *, is_cut: bool = False) -> float:
    """The label of the first of two steps, "It is 7." and another, after one completion."""

    def policy(problem: str, prefixes: Sequence[Sequence[str]], n: int) -> list[list[Rollout]]:
        return [[Rollout(text, 1, is_cut)] for _ in prefixes]

    one = LabelItem(problem="?", steps=("It is 7.", "Or 5."), answer="7", solution_answer="5")
    (found,) = label_solutions([(0, one)], lambda i, r: monte_carlo(i, r, rollouts=1), policy, rollouts=1)
    return found.result.labels[0]


def test_a_completion_is_judged_by_the_answer_that_it_states() -> None:
    assert completed("So \\boxed{7.0}.") == 1.0
    assert completed("So it is 14/2.") == 1.0
    assert completed("The answer is 7, not 8.") == 0.0
    assert completed("Or rather 5.") == 0.0
    # Without a number of its own it ends what was begun.
    assert completed("Done.") == 1.0
    assert completed("") == 1.0
    # What is cut off reached no answer.
    assert completed("The answer is 7.", is_cut=True) == 0.0


def test_a_percentage_and_its_number_are_judged_apart() -> None:
    def policy(problem: str, prefixes: Sequence[Sequence[str]], n: int) -> list[list[Rollout]]:
        return [[Rollout(f"The answer is {answer}.", 1, False) for answer in ("50", "50%", "50", "1/2")]]

    one = LabelItem(problem="?", steps=("a", "b"), answer="0.5", solution_answer="1")
    (found,) = label_solutions([(0, one)], lambda i, r: monte_carlo(i, r, rollouts=4), policy, rollouts=4)
    # 50% and 1/2 are 0.5, and 50 is not, whichever of them came first.
    assert found.result.successes == (2, 0)


def test_a_prefix_without_room_has_no_label_and_a_problem_without_an_error() -> None:
    def short(problem: str, prefixes: Sequence[Sequence[str]], n: int) -> list[list[Rollout]]:
        return [[Rollout("7", 1, False)] * n if len(prefix) < 2 else [] for prefix in prefixes]

    def refuses(problem: str, prefixes: Sequence[Sequence[str]], n: int) -> list[list[Rollout]]:
        raise ValueError("the prompt is too long")

    def plan(one: LabelItem, right: bool) -> Plan:
        return monte_carlo(one, right, rollouts=2)

    (found,) = label_solutions([(0, item(3))], plan, short, rollouts=2)
    assert found.result.labels == (1.0, NONE, 0.0)
    (found,) = label_solutions([(0, item(5))], first_error, short, rollouts=2)
    assert found.result.labels == (NONE,) * 5
    assert "first 2 steps leave no room" in (found.result.error or "")
    found, other = label_solutions([(0, item(3)), (1, item(1, "7"))], plan, refuses, rollouts=2)
    assert found.result.labels == (NONE,) * 3
    assert found.result.error == "the prompt is too long"
    assert other.result.labels == (1.0,)


def test_several_solutions_may_be_under_way_and_none_waits_for_another() -> None:
    gate = threading.Barrier(3, timeout=10)

    def together(problem: str, prefixes: Sequence[Sequence[str]], n: int) -> list[list[Rollout]]:
        gate.wait()  # passes only where three are under way at once
        return [[Rollout("7" if len(prefix) == 1 else "5", 1, False)] * n for prefix in prefixes]

    found = list(
        label_solutions([(row, item(2)) for row in range(6)], first_error, together, rollouts=2, concurrency=3)
    )
    assert sorted(one.row for one in found) == list(range(6))
    assert {one.result.labels for one in found} == {(1.0, 0.0)}


def test_a_server_that_fails_ends_it() -> None:
    def dead(problem: str, prefixes: Sequence[Sequence[str]], n: int) -> list[list[Rollout]]:
        raise ConnectionError("gone")

    for concurrency in (1, 2):
        with pytest.raises(ConnectionError, match="gone"):
            list(label_solutions([(0, item(3))], first_error, dead, rollouts=2, concurrency=concurrency))


def test_a_policy_of_known_chances_is_estimated_within_its_spread() -> None:
    """With chance p and K = 2,000 completions the share has standard deviation sqrt(p (1 - p) / K) < 0.0112."""
    import random

    chances = [0.9, 0.5, 0.1]
    draw = random.Random(0)

    def policy(problem: str, prefixes: Sequence[Sequence[str]], n: int) -> list[list[Rollout]]:
        return [
            [Rollout("7" if draw.random() < chances[len(prefix) - 1] else "5", 1, False) for _ in range(n)]
            for prefix in prefixes
        ]

    (found,) = label_solutions(
        [(0, item(4))], lambda i, r: monte_carlo(i, r, rollouts=2000, kind="soft"), policy, rollouts=2000
    )
    assert found.result.labels == pytest.approx((*chances, 0.0), abs=0.045)  # four standard deviations
    assert found.num_rollouts == 3 * 2000
