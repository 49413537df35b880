"""Temperature and threshold from validation data: known ones found again, and every choice against brute force."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from trainer.calibration import THRESHOLD_METRICS, choose_threshold, fit_temperature
from trainer.metrics import bce_from_logits, step_metrics


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-logits))


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_a_known_temperature_is_found_again(temperature: float) -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(1.0, 1.5, (5000, 20))
    labels = (rng.random(true.shape) < sigmoid(true)).astype(float)
    labels[:, 15:] = -100.0
    logits = true * temperature
    logits[:, 15:] = np.nan
    # 75,000 steps know it to about half a per cent.
    assert fit_temperature(logits.astype(np.float32), labels.astype(np.float32)) == pytest.approx(temperature, rel=0.02)


def test_soft_labels_give_it_exactly() -> None:
    # Labels that are the probabilities themselves leave nothing to chance.
    rng = np.random.default_rng(1)
    true = rng.normal(0.0, 2.0, (50, 4))
    assert fit_temperature(true * 1.7, sigmoid(true)) == pytest.approx(1.7, rel=1e-9)


def test_a_temperature_worked_by_hand() -> None:
    # Logits 2 and -2, three of four right: s(2 / T) = 3/4, so 2 / T = ln 3.
    logits = np.array([[2.0, 2.0, 2.0, 2.0], [-2.0, -2.0, -2.0, -2.0]])
    labels = np.array([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    assert fit_temperature(logits, labels) == pytest.approx(2.0 / math.log(3.0), rel=1e-9)
    # With K classes of logits (3, 0, 0): the first is right in 5 of 8, so e^(3 / T) / (e^(3 / T) + 2) = 5/8.
    classes = np.tile(np.array([3.0, 0.0, 0.0]), (1, 8, 1))
    indices = np.array([[0.0] * 5 + [1.0, 1.0, 2.0]])
    assert fit_temperature(classes, indices) == pytest.approx(3.0 / math.log(10.0 / 3.0), rel=1e-9)
    with_ignored = np.concatenate([classes, np.full((1, 1, 3), np.nan)], axis=1), np.append(indices, [[-100.0]], axis=1)
    assert fit_temperature(*with_ignored) == pytest.approx(3.0 / math.log(10.0 / 3.0), rel=1e-9)


def test_no_other_temperature_has_a_smaller_loss_and_calibration_improves() -> None:
    rng = np.random.default_rng(2)
    true = rng.normal(0.5, 1.0, (300, 10))
    labels = (rng.random(true.shape) < sigmoid(true)).astype(float)
    logits = 4.0 * true + 0.3
    found = fit_temperature(logits, labels)
    best = bce_from_logits(logits / found, labels)
    for other in np.geomspace(0.06, 19.0, 60):
        assert bce_from_logits(logits / other, labels) >= best
    for other in (0.999, 1.001):
        assert bce_from_logits(logits / (found * other), labels) > best
    before, after = (step_metrics(sigmoid(values), labels) for values in (logits, logits / found))
    assert after["ece"] < 0.3 * before["ece"]
    assert after["brier"] < before["brier"]
    assert after["roc_auc"] == pytest.approx(before["roc_auc"], abs=1e-12)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ([[-9.0, 3.0]], [[0.0, 1.0]], r"divided by 0.05 or less: the logits separate them"),
        ([[-9e3, 9e3]], [[0.0, 1.0]], r"divided by 0.05 or less"),
        ([[-9.0, 3.0]], [[1.0, 0.0]], r"divided by 20 or more: they do not tell right from wrong"),
        ([[0.0, 0.0]], [[1.0, 0.0]], r"divided by 20 or more"),
        ([[[2.0, 2.0], [1.0, 1.0]]], [[1.0, 0.0]], r"divided by 20 or more"),
        ([[np.nan, 0.0]], [[1.0, 0.0]], "must be finite; NaN or infinity: the model has diverged"),
        ([[np.inf, 0.0]], [[1.0, 0.0]], "must be finite"),
        ([[1.0, 0.0]], [[-100.0, -100.0]], "at least one labelled step"),
        ([[[1.0, 0.0]]], [[-100.0]], "at least one labelled step"),
        ([[1.0, 0.0]], [[2.0, 0.0]], "labels must be in"),
    ],
)
def test_labels_that_say_nothing_of_a_temperature(logits: Any, labels: Any, message: str) -> None:
    with np.errstate(over="raise", invalid="raise"), pytest.raises(ValueError, match=message):
        fit_temperature(np.array(logits), np.array(labels))


def test_a_threshold_by_hand() -> None:
    # First errors: solution 0 is judged right for thresholds in (.3, .8], 1 in (.2, .6], 2, without one, up to .5.
    probs = np.array([[0.8, 0.3, 0.1], [0.6, 0.7, 0.2], [0.9, 0.5, 0.1]])
    labels = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, -100.0]])
    # So all three in (.3, .5], whose middle is .4.
    threshold, value = choose_threshold(probs, labels)
    assert threshold == pytest.approx(0.4)
    assert value == 1.0
    # Wrong steps .3 .1 .2, right ones .8 .6 .7 .9 .5: the same range, by steps.
    for metric in ("error_f1", "balanced_accuracy", "step_accuracy"):
        assert choose_threshold(probs, labels, metric=metric) == (pytest.approx(0.4), 1.0)


def brute_force(probs: np.ndarray, labels: np.ndarray, metric: str) -> float:
    """The best value of a metric over thresholds between, below and above all scores."""
    edges = np.unique(np.concatenate([[0.0, 1.0], probs[labels != -100.0]]))
    return max(step_metrics(probs, labels, threshold=t)[metric] for t in (edges[:-1] + edges[1:]) / 2)


@pytest.mark.parametrize("metric", THRESHOLD_METRICS)
@pytest.mark.parametrize("seed", range(4))
def test_no_other_threshold_is_better(metric: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random((12, 5)) < 0.2, -100.0, (rng.random((12, 5)) < 0.8).astype(float))
    labels[0] = -100.0
    signal = np.where(labels == 0.0, -1.0, 1.0) * (1 if seed % 2 else -0.3)
    probs = sigmoid(signal + rng.normal(0.0, 1.0, labels.shape))
    # With ties, and 0 and 1 themselves.
    probs = np.round(probs, 1) if seed > 1 else probs
    probs[labels == -100.0] = np.nan
    threshold, value = choose_threshold(probs, labels, metric=metric)
    assert 0.0 <= threshold <= 1.0
    assert value == pytest.approx(step_metrics(probs, labels, threshold=threshold)[metric], abs=1e-12)
    assert value == pytest.approx(brute_force(probs, labels, metric), abs=1e-12)
    assert value >= step_metrics(probs, labels, threshold=0.5)[metric] - 1e-12


def test_the_widest_of_equal_ranges_is_taken() -> None:
    # A wrong step at .2 and .7, right ones at .3 and .9: error F1 is 2/3 up to .3, then 2/4, then 4/5 in (.7, .9].
    probs, labels = np.array([[0.2, 0.3, 0.7, 0.9]]), np.array([[0.0, 1.0, 0.0, 1.0]])
    assert choose_threshold(probs, labels, metric="error_f1") == (pytest.approx(0.8), pytest.approx(0.8))
    # Accuracy is 3/4 in (.2, .3] and in (.7, .9]; the second is wider.
    assert choose_threshold(probs, labels, metric="step_accuracy") == (pytest.approx(0.8), 0.75)
    probs = np.array([[0.2, 0.5, 0.7, 0.9]])
    # Now (.2, .5] is, and its middle is .35.
    assert choose_threshold(probs, labels, metric="step_accuracy") == (pytest.approx(0.35), 0.75)


def test_a_threshold_above_all_scores_can_be_the_best() -> None:
    probs, labels = np.array([[0.2, 0.6], [0.4, 0.8]]), np.array([[1.0, 0.0], [0.0, 0.0]])
    threshold, value = choose_threshold(probs, labels, metric="error_f1")
    assert threshold == pytest.approx(0.9)
    assert value == pytest.approx(2 * 3 / (3 + 1 + 3))


@pytest.mark.parametrize(
    ("labels", "metric", "message"),
    [
        ([[1.0, 0.0]], "processbench_f1", "needs solutions with a wrong step and solutions without"),
        ([[1.0, 1.0]], "processbench_f1", "needs solutions with a wrong step"),
        ([[1.0, 1.0]], "error_f1", "error_f1 needs correct and wrong steps"),
        ([[0.0, 0.0]], "balanced_accuracy", "balanced_accuracy needs correct and wrong steps"),
        ([[1.0, 0.0]], "roc_auc", r"metric must be one of \('processbench_f1', .*got 'roc_auc'"),
        ([[-100.0, -100.0]], "error_f1", "at least one labelled step"),
    ],
)
def test_labels_that_no_threshold_can_be_chosen_by(labels: Any, metric: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_threshold(np.array([[0.4, 0.6]]), np.array(labels), metric=metric)
    with pytest.raises(ValueError, match="got nan and in all 1 such"):
        choose_threshold(np.array([[np.nan, 0.6]]), np.array([[1.0, 0.0]]))
