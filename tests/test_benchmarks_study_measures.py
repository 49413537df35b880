"""Metrics and intervals of the study, against plain loops, `step_metrics` on repeated rows, and numbers by hand."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are in the repository and not installed

from benchmarks.study import best_of
from benchmarks.study.measures import (
    Fitted,
    all_right,
    fit,
    group_weights,
    index_alone,
    interval,
    measure,
    sigmoid,
    weighted_metrics,
)
from benchmarks.study.predictions import Scored, Target, padded, read_scored
from trainer.metrics import step_metrics

FIXTURE = Path(__file__).parent / "fixtures" / "study"
THRESHOLDS = {"error_f1": 0.4, "balanced_accuracy": 0.6, "processbench_f1": 0.5}


def _random_scores(solutions: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 7, solutions)
    labels = padded([(rng.random(n) < 0.7).astype(float).tolist() for n in lengths], -100.0)
    logits = rng.normal(0.0, 1.5, labels.shape) + np.where(labels == 0.0, -0.7, 0.7)
    return logits, labels


def test_with_each_solution_once_the_metrics_are_those_of_step_metrics() -> None:
    logits, labels = _random_scores(40, seed=0)
    probs = sigmoid(logits)
    found = weighted_metrics(probs, labels, THRESHOLDS, np.ones((1, 40)), scaled=sigmoid(logits / 2.0))
    for metric, threshold in THRESHOLDS.items():
        assert found[metric][0] == pytest.approx(step_metrics(probs, labels, threshold=threshold)[metric])
    whole = step_metrics(probs, labels)
    assert found["roc_auc"][0] == pytest.approx(whole["roc_auc"])
    assert found["ece"][0] == pytest.approx(whole["ece"])
    assert found["ece_scaled"][0] == pytest.approx(step_metrics(sigmoid(logits / 2.0), labels)["ece"])


def test_weights_count_a_solution_as_often_as_they_say() -> None:
    logits, labels = _random_scores(25, seed=1)
    probs = sigmoid(logits)
    weights = np.random.default_rng(2).integers(0, 4, (3, 25))
    found = weighted_metrics(probs, labels, THRESHOLDS, weights.astype(float))
    for row, counts in enumerate(weights):
        repeated = np.repeat(np.arange(25), counts)
        for metric, threshold in THRESHOLDS.items():
            expected = step_metrics(probs[repeated], labels[repeated], threshold=threshold)[metric]
            assert found[metric][row] == pytest.approx(expected)
        for metric in ("roc_auc", "ece"):
            assert found[metric][row] == pytest.approx(step_metrics(probs[repeated], labels[repeated])[metric])
    assert np.isnan(found["ece_scaled"]).all()


def test_metrics_worked_by_hand() -> None:
    # Solution 0: right, wrong (found, exactly first); 1: all right, its first step called wrong; 2: all right.
    probs = np.array([[0.9, 0.2], [0.3, 0.8], [0.7, 0.0]])
    labels = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, -100.0]])
    thresholds = dict.fromkeys(THRESHOLDS, 0.5)
    found = weighted_metrics(probs, labels, thresholds, np.array([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]]))
    # One error, found, with one false alarm: F1 = 2 / (2 + 1). Without solution 1 there is no alarm.
    assert found["error_f1"].tolist() == pytest.approx([2 / 3, 1.0])
    # All of the wrong steps and 3 of 4 right ones.
    assert found["balanced_accuracy"].tolist() == pytest.approx([(1 + 3 / 4) / 2, 1.0])
    # 1 of 1 with an error, 1 of 2 without: 2 * 1 * 0.5 / 1.5.
    assert found["processbench_f1"].tolist() == pytest.approx([2 / 3, 1.0])
    # The wrong step is below each of the right ones.
    assert found["roc_auc"].tolist() == pytest.approx([1.0, 1.0])
    # Each step has a bin of its own: mean of 0.1, 0.2, 0.7, 0.2, 0.3; then of 0.1, 0.2, 0.3.
    assert found["ece"].tolist() == pytest.approx([1.5 / 5, 0.6 / 3])


def test_resamples_draw_problems_with_all_of_their_solutions() -> None:
    groups = ["a", "b", "a", "c", "b", "a"]
    weights = group_weights(groups, resamples=500, seed=0)
    assert weights.shape == (500, 6)
    for same in ((0, 2, 5), (1, 4)):
        assert (weights[:, same] == weights[:, same[:1]]).all()
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all()  # as many problems as there are
    assert (weights == group_weights(groups, resamples=500, seed=0)).all()
    assert (weights != group_weights(groups, resamples=500, seed=1)).any()
    assert weights[:, 0].mean() == pytest.approx(1.0, abs=0.15)


def test_intervals_leave_out_what_is_not_defined() -> None:
    values = np.array([math.nan, *range(101)])
    assert interval(values) == pytest.approx((2.5, 97.5))
    assert all(math.isnan(end) for end in interval(np.array([math.nan])))


def test_thresholds_and_temperature_come_from_validation_alone() -> None:
    logits, labels = _random_scores(300, seed=3)
    fitted = fit(sigmoid(3.0 * logits), labels, 3.0 * logits)
    again = fit(sigmoid(logits), labels, logits)
    assert fitted.temperature is not None
    assert again.temperature is not None
    assert fitted.temperature == pytest.approx(3.0 * again.temperature, rel=1e-6)
    test_logits, test_labels = _random_scores(200, seed=4)
    groups = [str(index // 2) for index in range(200)]
    measured = measure(sigmoid(3.0 * test_logits), test_labels, groups, fitted, logits=3.0 * test_logits)
    best = max(
        step_metrics(sigmoid(3.0 * test_logits), test_labels, threshold=t)["error_f1"] for t in np.linspace(0, 1, 101)
    )
    assert measured.values["error_f1"] <= best + 1e-9
    assert measured.values["ece_scaled"] < measured.values["ece"]
    for metric, value in measured.values.items():
        low, high = measured.interval(metric)
        assert low < high
        assert low - 0.02 < value < high + 0.02


def test_rows_that_cost_nothing() -> None:
    train = padded([[1, 1, 0], [1, 0, 0], [1, 1]], -100.0)
    labels = padded([[1, 0, 1], [1]], -100.0)
    probs = index_alone(train, labels)
    # 5 of 8 right; p0 = (3 + 5/8) / 4, p1 = (2 + p0) / 4, p2 = (0 + p1) / 3.
    first = (3 + 5 / 8) / 4
    second = (2 + first) / 4
    assert probs[0].tolist() == pytest.approx([first, second, second / 3])
    assert probs[1].tolist() == probs[0].tolist()
    fitted = Fitted(thresholds=dict.fromkeys(THRESHOLDS, 0.5), temperature=None)
    measured = measure(all_right(labels), labels, ["a", "b"], fitted)
    assert measured.values["error_f1"] == 0.0
    assert measured.values["balanced_accuracy"] == 0.5
    assert measured.values["roc_auc"] == 0.5
    assert measured.values["ece"] == pytest.approx(1 / 4)  # one of four steps is wrong
    assert math.isnan(measured.values["ece_scaled"])


def _plain_metrics(rows: list[tuple[list[float], list[float]]], threshold: float) -> dict[str, float]:
    """The metrics of probabilities and labels in plain loops."""
    steps = [(p, y) for probs, labels in rows for p, y in zip(probs, labels, strict=True) if y != -100]
    hits = sum(p < threshold and y == 0 for p, y in steps)
    called, wrong = sum(p < threshold for p, _ in steps), sum(y == 0 for _, y in steps)
    right = len(steps) - wrong
    pairs = [(p, q) for p, y in steps if y == 0 for q, z in steps if z == 1]
    found = {
        "error_f1": 2 * hits / (called + wrong),
        "balanced_accuracy": (hits / wrong + (right - (called - hits)) / right) / 2,
        "roc_auc": sum((p < q) + (p == q) / 2 for p, q in pairs) / len(pairs),
    }
    accuracies = {}
    for has_error in (True, False):
        own = []
        for probs, labels in rows:
            first = next((i for i, y in enumerate(labels) if y == 0), -1)
            said = next(
                (i for i, (p, y) in enumerate(zip(probs, labels, strict=True)) if p < threshold and y != -100), -1
            )
            if (first >= 0) == has_error:
                own.append(first == said)
        accuracies[has_error] = sum(own) / len(own)
    a, b = accuracies.values()
    found["processbench_f1"] = 2 * a * b / (a + b) if a + b else 0.0
    bins: dict[int, list[tuple[float, float]]] = {}
    for p, y in steps:
        bins.setdefault(min(int(p * 15), 14), []).append((p, y))
    found["ece"] = sum(abs(sum(p - y for p, y in own)) for own in bins.values()) / len(steps)
    return found


def test_the_metrics_of_stored_predictions() -> None:
    scored = read_scored(FIXTURE, "early-checkpoint", "prmbench-test")
    assert len(scored.targets) == 60
    probs = sigmoid(scored.logits)
    rows = [
        ([1 / (1 + math.exp(-x)) for x in logits[: len(target.labels)]], list(target.labels))
        for target, logits in zip(scored.targets, scored.logits, strict=True)
    ]
    expected = _plain_metrics(rows, 0.5)
    fitted = Fitted(thresholds=dict.fromkeys(THRESHOLDS, 0.5), temperature=None)
    measured = measure(probs, scored.labels, [target.group for target in scored.targets], fitted)
    assert {name: measured.values[name] for name in expected} == pytest.approx(expected, abs=1e-9)


def _target(name: str, right: bool, answer: int | None, steps: int, group: str = "0") -> Target:
    return Target(id=f"{group}-{name}", group=group, labels=(-100.0,) * steps, right=right, answer=answer)


def test_choices_among_four_solutions() -> None:
    # Answers: a says 7 (right), b and c say 8, d says 9.
    targets = (
        _target("a", True, 0, 2),
        _target("b", False, 1, 2),
        _target("c", False, 1, 1),
        _target("d", False, 2, 2),
    )
    logits = padded([[3.0, 2.0], [4.0, -1.0], [1.0], [2.0, 1.5]], 0.0)
    problems = best_of.by_problem(Scored(targets=targets, logits=logits, labels=np.full((4, 2), -100.0)))
    assert len(problems) == 1
    assert best_of.chosen_by_score(problems, "min").tolist() == [1.0]  # 2.0 is the highest of the lowest
    assert best_of.chosen_by_score(problems, "max").tolist() == [0.0]  # b's 4.0
    free = best_of.free_choices(problems)
    assert {name: values.tolist() for name, values in free.items()} == {
        "random choice": [0.25],
        "always a": [1.0],
        "always b": [0.0],
        "always c": [0.0],
        "always d": [0.0],
        "fewest steps": [0.0],
        "majority vote": [0.0],
        "oracle": [1.0],
    }
    # By min: 7 has 0.881; 8 has 0.269 + 0.731 = 1.0; 9 has 0.818.
    assert best_of.chosen_by_vote(problems, "min").tolist() == [0.0]
    # By product: 7 has 0.953 * 0.881 = 0.839; 8 has 0.982 * 0.269 + 0.731 = 0.995.
    assert best_of.chosen_by_vote(problems, "product").tolist() == [0.0]
    # By last, c silenced: 7 has 0.881, 8 has 0.269 + 0.047.
    logits[2, 0] = -3.0
    problems = best_of.by_problem(Scored(targets=targets, logits=logits, labels=np.full((4, 2), -100.0)))
    assert best_of.chosen_by_vote(problems, "last").tolist() == [1.0]


def test_a_tied_vote_is_right_as_often_as_an_order_makes_it() -> None:
    targets = tuple(_target(name, index == 0, index, 1) for index, name in enumerate("abcd"))
    problems = best_of.by_problem(Scored(targets=targets, logits=np.zeros((4, 1)), labels=np.full((4, 1), -100.0)))
    assert best_of.chosen_by_vote(problems).tolist() == [0.25]


def test_scores_that_do_not_fit_their_set_are_refused(tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "sets" / "x.jsonl").write_text('{"id":"a","group":"g","labels":[1,0]}\n')
    (tmp_path / "run" / "x.jsonl").write_text('{"id":"a","logits":[0.5]}\n')
    with pytest.raises(ValueError, match=r"run/x\.jsonl does not fit"):
        read_scored(tmp_path, "run", "x")
