"""Choosing one of N candidates, against numbers worked by hand and against all draws counted out."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest

from trainer.selection import (
    best_of_n,
    bootstrap_interval,
    draw_subsets,
    expected_best_of_n,
    majority_vote,
    pass_at_n,
    vote,
    weighted_majority_vote,
)


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ([0.2, 0.9, 0.5], 1),
        ([0.2, 0.9, 0.9], 1),
        ([None, 0.1, None], 1),
        ([None, -3.0, -2.0], 2),
        ([None, None], 0),
        ([0.0], 0),
    ],
)
def test_best_of_n(scores: list[float | None], chosen: int) -> None:
    assert best_of_n(scores) == chosen


@pytest.mark.parametrize(
    ("groups", "chosen"),
    [
        (["a", "b", "b"], 1),
        (["a", "b", "b", "a"], 0),  # two each; a is seen first
        (["b", "a", "a", "b", "c"], 0),
        ([None, None, None, "a"], 3),  # no answer is no vote
        ([None, None], 0),
        ([3, 3, 1], 0),
    ],
)
def test_majority_vote(groups: list[object], chosen: int) -> None:
    assert majority_vote(groups) == chosen


@pytest.mark.parametrize(
    ("groups", "scores", "chosen"),
    [
        (["a", "b", "b"], [0.9, 0.2, 0.3], 0),  # 0.9 against 0.5
        (["a", "b", "b"], [0.9, 0.5, 0.6], 1),  # 0.9 against 1.1
        (["a", "b", "b"], [0.3, 0.1, 0.2], 0),  # equal, though 0.1 + 0.2 > 0.3 in floats
        (["b", "b", "a"], [0.1, 0.2, 0.3], 0),
        (["a", "b", "b"], [0.1, None, 0.2], 2),  # the first of b that could be scored
        (["a", "b", "b"], [-5.0, None, None], 0),  # b has no scored candidate
        ([None, "b", "a"], [0.9, None, 0.1], 2),
        (["a", "b", "b"], [None, None, None], 1),  # nothing scored: the majority
        ([None, "b", "b"], [0.9, None, None], 1),
        ([None, None], [0.1, 0.9], 0),
        (["a", "b"], [0.0, 0.0], 0),
        (["a", "b"], [-2.0, -1.0], 1),
    ],
)
def test_weighted_majority_vote(groups: list[str | None], scores: list[float | None], chosen: int) -> None:
    assert weighted_majority_vote(groups, scores) == chosen


def test_weighted_vote_sums_as_search_and_learn_does() -> None:
    """Its loop: a dictionary of sums by answer, and the first largest."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        answers = [str(answer) for answer in rng.integers(0, 4, 9)]
        scores = rng.random(9).tolist()
        sums: dict[str, float] = defaultdict(float)
        for answer, score in zip(answers, scores, strict=True):
            sums[answer] += score
        best = max(sums, key=lambda answer: sums[answer])
        assert answers[weighted_majority_vote(answers, scores)] == best


def test_votes_in_subsets() -> None:
    groups = ["a", "b", "b", None, "c"]
    subsets = np.array([[0, 1, 2], [0, 1, 4], [3, 4, 4], [1, 3, 4]])
    assert vote(groups, subsets).tolist() == [1, 0, 4, 1]
    # Sums: b 0.5 against a 0.4; c 0.6; c 0.6; c 0.6 against b 0.2.
    assert vote(groups, subsets, scores=[0.4, 0.2, 0.3, 0.9, 0.6]).tolist() == [1, 4, 4, 4]
    # Only candidate 3 is scored, which has no answer: the majority everywhere.
    assert vote(groups, subsets, scores=[None, None, None, 0.9, None]).tolist() == [1, 0, 4, 1]
    # Only in the last subset a candidate with an answer is scored.
    assert vote(groups, subsets[[0, 3]], scores=[None, None, None, None, 0.1]).tolist() == [1, 4]


@pytest.mark.parametrize(
    ("num_candidates", "num_correct", "n", "value"),
    [
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 / 2),  # 1 - C(3, 2) / C(4, 2) = 1 - 3 / 6
        (5, 2, 3, 9 / 10),  # 1 - C(3, 3) / C(5, 3) = 1 - 1 / 10
        (5, 0, 3, 0.0),
        (5, 3, 3, 1.0),
        (5, 5, 1, 1.0),
        (10_000, 1, 5_000, 0.5),  # beyond what floats hold of the binomials
    ],
)
def test_pass_at_n(num_candidates: int, num_correct: int, n: int, value: float) -> None:
    assert pass_at_n(num_candidates, num_correct, n) == pytest.approx(value, rel=1e-15)


def test_expected_best_of_n_by_hand() -> None:
    # Best to worst: candidates 1, 0, 2 (1 and 3 are equal, 3 comes after 1; order 1, 3, 0, 2). Of the six draws of
    # two, 1 wins three, 3 wins two, 0 wins one.
    scores, correct = [0.5, 0.9, None, 0.9], [True, False, True, True]
    assert expected_best_of_n(scores, correct, 1) == pytest.approx(3 / 4)
    assert expected_best_of_n(scores, correct, 2) == pytest.approx(3 / 6)
    assert expected_best_of_n(scores, correct, 3) == pytest.approx(1 / 4)  # without 1 in one of four draws
    assert expected_best_of_n(scores, correct, 4) == 0.0
    assert expected_best_of_n([0.5, 0.9], [False, True], 2) == 1.0


def test_expectations_equal_the_mean_over_all_draws() -> None:
    rng = np.random.default_rng(1)
    for n in range(1, 8):
        scores: list[float | None] = [float(score) for score in rng.integers(0, 4, 7)]  # with ties
        scores[int(rng.integers(0, 7))] = None
        correct = (rng.random(7) < 0.4).tolist()
        draws = list(itertools.combinations(range(7), n))
        right = [correct[draw[best_of_n([scores[index] for index in draw])]] for draw in draws]
        assert expected_best_of_n(scores, correct, n) == pytest.approx(float(Fraction(sum(right), len(draws))))
        some = [any(correct[index] for index in draw) for draw in draws]
        assert pass_at_n(7, sum(correct), n) == pytest.approx(float(Fraction(sum(some), len(draws))))


def test_all_subsets_where_they_are_few() -> None:
    subsets = draw_subsets(5, 2, count=10, seed=(0,))
    assert subsets.tolist() == [list(pair) for pair in itertools.combinations(range(5), 2)]
    assert draw_subsets(5, 5, count=1, seed=(0,)).tolist() == [[0, 1, 2, 3, 4]]


def test_random_subsets_where_they_are_many() -> None:
    subsets = draw_subsets(6, 3, count=19, seed=(0, 1))  # of 20
    assert subsets.shape == (19, 3)
    assert (np.diff(subsets, axis=1) > 0).all()
    assert np.array_equal(subsets, draw_subsets(6, 3, count=19, seed=(0, 1)))
    assert not np.array_equal(subsets, draw_subsets(6, 3, count=19, seed=(0, 2)))
    # Each candidate is in half of the draws; with 4,000 of them a deviation of 0.04 is five sigma.
    many = Counter(draw_subsets(40, 20, count=4000, seed=(3,)).ravel().tolist())
    assert len(many) == 40
    assert all(abs(number / 4000 - 0.5) < 0.04 for number in many.values())


def test_bootstrap_interval_of_shares() -> None:
    """Of 400 problems a quarter is solved: the mean's standard deviation is sqrt(0.25 * 0.75 / 400) = 0.02165."""
    values = np.zeros((400, 3))
    values[:100, 0] = 1.0
    values[300:, 1] = 1.0
    values[:, 2] = 0.5
    low, high = bootstrap_interval(values, resamples=4000, seed=0)
    for column in (0, 1):
        assert low[column] == pytest.approx(0.25 - 1.96 * 0.02165, abs=0.005)
        assert high[column] == pytest.approx(0.25 + 1.96 * 0.02165, abs=0.005)
    assert (low[2], high[2]) == (0.5, 0.5)
    again = bootstrap_interval(values, resamples=4000, seed=0)
    assert np.array_equal(again[0], low)
    narrow = bootstrap_interval(values, resamples=4000, seed=0, level=0.5)
    assert low[0] < narrow[0][0] < narrow[1][0] < high[0]


def test_bootstrap_resamples_whole_problems() -> None:
    """Two columns that sum to 1 in each problem do so in each resample, so their intervals mirror each other."""
    first = np.random.default_rng(0).random((30, 1))
    low, high = bootstrap_interval(np.hstack([first, 1.0 - first]), resamples=500, seed=1)
    assert low[0] == pytest.approx(1.0 - high[1], abs=1e-12)
    assert high[0] == pytest.approx(1.0 - low[1], abs=1e-12)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="at least one candidate is needed, got none"):
        best_of_n([])
    with pytest.raises(ValueError, match="at least one candidate is needed, got none"):
        majority_vote([])
    with pytest.raises(ValueError, match="candidate 1 has the score nan; give None"):
        best_of_n([0.5, math.nan])
    with pytest.raises(ValueError, match="candidate 0 has the score inf"):
        weighted_majority_vote(["a"], [math.inf])
    with pytest.raises(ValueError, match="got 2 groups and 1 scores"):
        weighted_majority_vote(["a", "b"], [0.5])
    with pytest.raises(ValueError, match="got 2 scores and 1 correct"):
        expected_best_of_n([0.5, 0.6], [True], 1)
    for wrong in (0, 3):
        with pytest.raises(ValueError, match=f"n must be from 1 to the number of candidates, 2, got {wrong}"):
            expected_best_of_n([0.5, 0.6], [True, False], wrong)
        with pytest.raises(ValueError, match=f"candidates, 2, got {wrong}"):
            pass_at_n(2, 1, wrong)
        with pytest.raises(ValueError, match=f"candidates, 2, got {wrong}"):
            draw_subsets(2, wrong, count=5, seed=(0,))
    with pytest.raises(ValueError, match="num_correct must be from 0 to num_candidates=2, got 3"):
        pass_at_n(2, 3, 1)
    with pytest.raises(ValueError, match="got count=0"):
        draw_subsets(2, 1, count=0, seed=(0,))
    with pytest.raises(ValueError, match=r"with rows, got shape \(0, 2\)"):
        bootstrap_interval(np.empty((0, 2)), resamples=10, seed=0)
    with pytest.raises(ValueError, match=r"level in \(0, 1\), got 10 and 95"):
        bootstrap_interval(np.ones((2, 2)), resamples=10, seed=0, level=95)
