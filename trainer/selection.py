"""Choosing one of N candidate solutions, and what that is worth: pure functions on one problem's candidates.

    best_of_n([0.2, 0.9, 0.9])  # 1
    majority_vote(["7", "8", "8"])  # 1
    weighted_majority_vote(["7", "8", "8"], [0.9, 0.2, 0.3])  # 0
    pass_at_n(4, 1, 2)  # 0.5

Letters: N candidates, n of them drawn, M draws. A score of None is that of a candidate which could not be
scored; a group of None is that of one without an answer. Groups are anything hashable, such as the numbers of
`trainer.answers.group_answers`. Ties: the candidate that comes first, the answer that is seen first.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

# Sums of the same scores in another order differ in their last bits, and are a tie nevertheless.
_TIE = 1e-12


def best_of_n(scores: Sequence[float | None]) -> int:
    """Index of the highest score, the first of equal ones.

    A candidate that could not be scored (None) is never chosen, unless none could be: then the first is.

    Raises:
        ValueError: there is no candidate, or a score is NaN or infinite.
    """
    return _by_score(scores)[0]


def majority_vote(groups: Sequence[Hashable | None]) -> int:
    """Index of the first candidate with the most frequent answer, of equally frequent ones that seen first.

    A candidate without an answer (None) has no vote; where none has an answer, the first candidate is chosen.
    (Wang et al., 2203.11171.)

    Raises:
        ValueError: there is no candidate.
    """
    return int(vote(groups, np.arange(len(groups))[None])[0])


def weighted_majority_vote(groups: Sequence[Hashable | None], scores: Sequence[float | None]) -> int:
    """Index of the first candidate with the answer whose scores sum to the most, of equal sums that seen first.

    The sum over all candidates with an answer, as search-and-learn's "weighted" and as in 2206.02336. Unlike
    there, a candidate without an answer has no vote. One without a score (None) has none either, and an answer
    without a scored candidate is not chosen; where no candidate has both, the majority decides.

    Raises:
        ValueError: there is no candidate, a score is NaN or infinite, or there are not as many scores as groups.
    """
    return int(vote(groups, np.arange(len(groups))[None], scores=scores)[0])


def pass_at_n(num_candidates: int, num_correct: int, n: int) -> float:
    """The chance that n candidates drawn without replacement hold a correct one: 1 - C(N - c, n) / C(N, n).

    The unbiased estimator of pass@k (Chen et al., 2107.03374); what an oracle that chooses would reach.

    Raises:
        ValueError: not 1 <= n <= N, or not 0 <= c <= N.
    """
    _check_n(num_candidates, n)
    if not 0 <= num_correct <= num_candidates:
        raise ValueError(f"num_correct must be from 0 to num_candidates={num_candidates}, got {num_correct}")
    # In this order the difference of the counts is exact, and rounding comes once.
    total = math.comb(num_candidates, n)
    return (total - math.comb(num_candidates - num_correct, n)) / total


def expected_best_of_n(scores: Sequence[float | None], correct: Sequence[bool], n: int) -> float:
    """The chance that `best_of_n` of n candidates drawn without replacement is correct, exactly.

    With the candidates from best to worst, the one at place r (from 0) is chosen where it is drawn and none
    before it is, which C(N - 1 - r, n - 1) of the C(N, n) draws do.

    Args:
        scores: N scores, as in `best_of_n`.
        correct: N truths.
        n: candidates drawn, from 1 to N.

    Raises:
        ValueError: as `best_of_n`; not as many truths as scores; or not 1 <= n <= N.
    """
    _check_same_length("scores", scores, "correct", correct)
    order = _by_score(scores)
    _check_n(len(order), n)
    return float(np.asarray(correct, dtype=np.float64)[order] @ _chances(len(order), n))


def draw_subsets(num_candidates: int, n: int, *, count: int, seed: Sequence[int]) -> IntArray:
    """Draws of n of N candidates without replacement: int64 (M, n), each row's indices in rising order.

    Every subset once where there are at most `count`, so that the mean over them is exact; otherwise `count`
    random ones.

    Args:
        num_candidates: N.
        n: from 1 to N.
        count: most rows.
        seed: whole numbers that the draws depend on.

    Raises:
        ValueError: not 1 <= n <= N, or `count` below 1.
    """
    _check_n(num_candidates, n)
    if count < 1:
        raise ValueError(f"at least one subset is needed, got count={count}")
    if math.comb(num_candidates, n) <= count:
        return np.array(list(itertools.combinations(range(num_candidates), n)), dtype=np.int64)
    everyone = np.tile(np.arange(num_candidates, dtype=np.int64), (count, 1))
    return np.sort(np.random.default_rng(list(seed)).permuted(everyone, axis=1)[:, :n], axis=1)


def vote(
    groups: Sequence[Hashable | None], subsets: IntArray, *, scores: Sequence[float | None] | None = None
) -> IntArray:
    """The candidate that `majority_vote`, or with `scores` `weighted_majority_vote`, chooses in each subset.

    Args:
        groups: N groups.
        subsets: int64 (M, n), indices of candidates, each row in rising order.
        scores: N scores.

    Returns:
        int64 (M,): indices of candidates.

    Raises:
        ValueError: as `weighted_majority_vote`.
    """
    numbers = _numbered(groups)
    votes = numbers >= 0
    weights = votes.astype(np.float64)
    if scores is not None:
        _check_same_length("groups", groups, "scores", scores)
        _by_score(scores)
        weights = np.array([0.0 if score is None else float(score) for score in scores])
        votes &= np.array([score is not None for score in scores])
    chosen = _vote(numbers, weights, votes, subsets)
    undecided = chosen < 0
    if scores is not None and undecided.any():
        chosen[undecided] = vote(groups, subsets[undecided])
    return np.where(chosen < 0, subsets[:, 0], chosen)


def bootstrap_interval(
    values: FloatArray, *, resamples: int, seed: int, level: float = 0.95
) -> tuple[FloatArray, FloatArray]:
    """Percentile bootstrap intervals of the columns' means, rows resampled with replacement (Efron, 1979).

    Args:
        values: float (P, C): a row a problem, a column a quantity. All columns share the resamples, so that
            their intervals can be compared.
        resamples: number of resamples.
        seed: of the resamples.
        level: the intervals' coverage, in (0, 1).

    Returns:
        The lower and the upper ends, float (C,) each. They say how the mean varies with the choice of problems;
        with one problem they are the mean itself.

    Raises:
        ValueError: `values` is no matrix with rows, `resamples` is below 1, or `level` not in (0, 1).
    """
    if values.ndim != 2 or len(values) == 0:
        raise ValueError(f"values must be a matrix (problems, quantities) with rows, got shape {values.shape}")
    if resamples < 1 or not 0.0 < level < 1.0:
        raise ValueError(f"resamples must be at least 1 and level in (0, 1), got {resamples} and {level}")
    rng = np.random.default_rng(seed)
    means = np.stack([values[rng.integers(0, len(values), len(values))].mean(axis=0) for _ in range(resamples)])
    low, high = np.quantile(means, [(1.0 - level) / 2.0, (1.0 + level) / 2.0], axis=0)
    return low, high


def _vote(numbers: IntArray, weights: FloatArray, votes: BoolArray, subsets: IntArray) -> IntArray:
    """The chosen candidates (M,), -1 where no candidate of the subset votes."""
    num_groups = max(int(numbers.max()) + 1, 1)
    shares = np.zeros((len(numbers), num_groups))
    shares[votes, numbers[votes]] = 1.0
    rows = np.arange(len(subsets))[:, None]
    drawn = np.zeros((len(subsets), len(numbers)))
    drawn[rows, subsets] = 1.0
    totals = np.where(drawn @ shares > 0.0, drawn @ (shares * weights[:, None]), -np.inf)  # (M, groups)
    most = totals.max(axis=1, keepdims=True)
    wins = totals >= most - _TIE * np.abs(most)
    can_be_chosen = wins[rows, numbers[subsets]] & votes[subsets]  # (M, n)
    first = subsets[rows[:, 0], can_be_chosen.argmax(axis=1)]
    return np.where(can_be_chosen.any(axis=1), first, -1)


def _numbered(groups: Sequence[Hashable | None]) -> IntArray:
    """Groups as numbers from 0, -1 for None: int64 (N,)."""
    if len(groups) == 0:
        raise ValueError("at least one candidate is needed, got none")
    known: dict[Hashable, int] = {}
    return np.array([-1 if group is None else known.setdefault(group, len(known)) for group in groups], dtype=np.int64)


def _by_score(scores: Sequence[float | None]) -> list[int]:
    """Candidates from best to worst, those without a score last, equal ones in their order."""
    if len(scores) == 0:
        raise ValueError("at least one candidate is needed, got none")
    for index, score in enumerate(scores):
        if score is not None and not math.isfinite(score):
            raise ValueError(f"candidate {index} has the score {score}; give None where one could not be scored")
    return sorted(range(len(scores)), key=lambda index: math.inf if (s := scores[index]) is None else -s)


@functools.lru_cache(maxsize=1024)
def _chances(num_candidates: int, n: int) -> FloatArray:
    """The chance of each place from the best on to be that of the best of n: float (N,)."""
    total = math.comb(num_candidates, n)
    return np.array([math.comb(num_candidates - 1 - place, n - 1) / total for place in range(num_candidates)])


def _check_n(num_candidates: int, n: int) -> None:
    if not 1 <= n <= num_candidates:
        raise ValueError(f"n must be from 1 to the number of candidates, {num_candidates}, got {n}")


def _check_same_length(name: str, values: Sequence[object], other_name: str, others: Sequence[object]) -> None:
    if len(values) != len(others):
        raise ValueError(f"got {len(values)} {name} and {len(others)} {other_name}; give one of each a candidate")
