"""A temperature for logits, and a threshold for step probabilities, from labelled validation data.

    temperature = fit_temperature(logits, labels)
    threshold, f1 = choose_threshold(step_probs, labels)

`trainer.model_calibration` fits both for a trained model and stores them in its config.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from modeling_prm.step_loss import IGNORED_LABEL

from .metrics import CORRECT_FROM, BoolArray, FloatArray, check_labelled, first_true, reliability_table

THRESHOLD_METRICS = ("processbench_f1", "error_f1", "balanced_accuracy", "step_accuracy")
# Beyond these the labels only say that more, or less, were better still.
_LOWEST, _HIGHEST = 0.05, 20.0
# Halves the range, in logarithms, until it is narrower than float64 can tell.
_BISECTIONS = 60


def fit_temperature(logits: FloatArray, labels: FloatArray) -> float:
    """The temperature T with the least mean cross-entropy of `logits / T` (Guo et al., arXiv 1706.04599).

    The cross-entropy is convex in 1 / T, so its slope, mean((s(x / T) - y) x) with the sigmoid s, has one zero,
    which is bracketed by bisection. One number for all steps changes no order of them.

    Args:
        logits: Float (N, S), or (N, S, K) for K classes; anything where there is no label.
        labels: Float (N, S), in [0, 1], or class indices; -100 where there is no label.

    Returns:
        Between 0.05 and 20.

    Raises:
        TypeError: an array is not a floating-point NumPy array.
        ValueError: no step is labelled, a labelled step's logit is NaN or infinite, or no temperature in that
            range is the best: the logits separate the labels without an error, or not at all.
    """
    mask = labels != IGNORED_LABEL if logits.ndim == 3 else check_labelled("logits", logits, labels)
    x, y = logits[mask].astype(np.float64), labels[mask].astype(np.float64)
    if len(x) == 0:
        raise ValueError("at least one labelled step is needed, got none")
    if not np.isfinite(x).all():
        raise ValueError("the logits of labelled steps must be finite; NaN or infinity: the model has diverged")
    x = x if x.ndim == 1 else x - x.max(axis=1, keepdims=True)

    def slope(inverse: float) -> float:
        if x.ndim == 1:
            # The sigmoid by tanh, which does not overflow.
            return float(np.mean((0.5 + 0.5 * np.tanh(0.5 * inverse * x) - y) * x))
        powers = np.exp(inverse * x)
        probs = powers / powers.sum(axis=1, keepdims=True)
        return float(np.mean((probs * x).sum(axis=1) - x[np.arange(len(x)), y.astype(np.int64)]))

    low, high = math.log(1.0 / _HIGHEST), math.log(1.0 / _LOWEST)
    if slope(math.exp(low)) > 0.0 or not x.any():
        raise ValueError(
            f"these labels want the logits divided by {_HIGHEST:g} or more: they do not tell right from wrong steps"
        )
    if slope(math.exp(high)) <= 0.0:
        raise ValueError(
            f"these labels want the logits divided by {_LOWEST:g} or less: the logits separate them, or nearly so, and "
            "say nothing of a temperature; take more validation data"
        )
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if slope(math.exp(middle)) < 0.0 else (low, middle)
    return math.exp(-0.5 * (low + high))


def choose_threshold(
    step_probs: FloatArray, labels: FloatArray, *, metric: str = "processbench_f1"
) -> tuple[float, float]:
    """The threshold with the highest value of a metric, over all that tell these steps apart.

    Between two neighbouring probabilities every threshold gives the same. Of the ranges with the highest value
    the widest is taken, and its middle, which is farthest from scores that would change sides.

    Args:
        step_probs: Float (N, S), the probability in [0, 1] that a step is correct.
        labels: Float (N, S), in [0, 1], -100 where there is no label.
        metric: one of `THRESHOLD_METRICS`, as `step_metrics` computes them.

    Returns:
        The threshold in [0, 1], and the metric's value there, which is too good for other data.

    Raises:
        TypeError, ValueError: as in `step_metrics`; or there is no such metric, or the labels hold no wrong
            or no correct step (for ProcessBench F1: solution), so that every threshold is as good.
    """
    if metric not in THRESHOLD_METRICS:
        raise ValueError(f"metric must be one of {THRESHOLD_METRICS}, got {metric!r}")
    reliability_table(step_probs, labels)  # checks both
    mask = labels != IGNORED_LABEL
    edges = np.unique(np.concatenate([[0.0, 1.0], step_probs[mask].astype(np.float64)]))
    candidates = 0.5 * (edges[:-1] + edges[1:])
    probs = np.where(mask, step_probs, np.inf).astype(np.float64)
    is_error = mask & (labels < CORRECT_FROM)
    if metric == "processbench_f1":
        values = _first_error_f1(candidates, probs, is_error, mask)
    else:
        values = _step_values(metric, candidates, probs[mask], is_error[mask])
    best = values.max()
    # Ranges that touch and have the same value are one.
    is_best = np.concatenate([[False], values == best, [False]]).astype(np.int8)
    starts, ends = np.flatnonzero(np.diff(is_best) == 1), np.flatnonzero(np.diff(is_best) == -1)
    widest = int(np.argmax(edges[ends] - edges[starts]))
    return float(0.5 * (edges[starts[widest]] + edges[ends[widest]])), float(best)


def _first_error_f1(
    candidates: FloatArray, probs: FloatArray, is_error: BoolArray, mask: BoolArray
) -> npt.NDArray[np.float64]:
    """ProcessBench F1 at each candidate: each solution is judged right in one range of thresholds, (low, high]."""
    first = first_true(is_error)
    has_error, is_correct = first >= 0, mask.any(axis=1) & (first < 0)
    if not has_error.any() or not is_correct.any():
        raise ValueError("ProcessBench F1 needs solutions with a wrong step and solutions without, got one kind only")
    rows = np.flatnonzero(has_error)
    low = probs[rows, first[rows]]
    before = np.arange(probs.shape[1]) < first[rows, None]
    high = np.where(before, probs[rows], np.inf).min(axis=1)
    low, high = low[low < high], high[low < high]
    acc_error = (_below(low, candidates) - _below(high, candidates)) / len(rows)
    acc_correct = 1.0 - _below(probs[is_correct].min(axis=1), candidates) / is_correct.sum()
    total = acc_error + acc_correct
    return np.where(total > 0.0, 2.0 * acc_error * acc_correct / np.where(total > 0.0, total, 1.0), 0.0)


def _step_values(
    metric: str, candidates: FloatArray, probs: FloatArray, is_error: BoolArray
) -> npt.NDArray[np.float64]:
    num_wrong, num_right = int(is_error.sum()), int((~is_error).sum())
    if num_wrong == 0 or num_right == 0:
        raise ValueError(f"{metric} needs correct and wrong steps to choose a threshold by, got one kind only")
    found = _below(probs[is_error], candidates).astype(np.float64)
    false_alarms = _below(probs[~is_error], candidates).astype(np.float64)
    if metric == "error_f1":
        return 2.0 * found / (found + false_alarms + num_wrong)
    if metric == "balanced_accuracy":
        return 0.5 * (found / num_wrong + (num_right - false_alarms) / num_right)
    return (found + num_right - false_alarms) / (num_wrong + num_right)


def _below(values: FloatArray, candidates: FloatArray) -> npt.NDArray[np.int64]:
    """How many values are below each candidate."""
    return np.searchsorted(np.sort(values), candidates, side="left")
