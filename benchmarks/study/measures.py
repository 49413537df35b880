"""What the tables hold: metrics of saved scores with bootstrap intervals over problems.

The temperature and the thresholds are those that are best on the validation part, one threshold for each metric. The
resamples draw problems, all solutions of one together, and are the same for all models, so that differences of two
models have intervals too.

Letters: N solutions, S steps, G problems, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modeling_prm.step_loss import IGNORED_LABEL
from trainer.calibration import choose_threshold, fit_temperature
from trainer.metrics import CALIBRATION_BINS, CORRECT_FROM, first_true, import_sklearn_metrics, step_metrics
from trainer.step_index import StepIndexPredictor

FloatArray = npt.NDArray[np.float64]

METRICS = ("error_f1", "balanced_accuracy", "roc_auc", "processbench_f1", "ece", "ece_scaled")
"""What is measured; the first two and the fourth depend on a threshold of their own."""

THRESHOLD_METRICS = ("error_f1", "balanced_accuracy", "processbench_f1")
RESAMPLES = 1_000
_FALLBACK_THRESHOLD = 0.5


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What was chosen on validation data: a threshold a metric, on unscaled probabilities, and a temperature."""

    thresholds: Mapping[str, float]
    temperature: float | None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The metrics of a predictor.

    Args:
        values: a number a metric; NaN where it is not defined.
        resampled: float (R,) a metric, its values on the resamples.
        fitted: what they depend on.
    """

    values: Mapping[str, float]
    resampled: Mapping[str, FloatArray]
    fitted: Fitted

    def interval(self, metric: str) -> tuple[float, float]:
        """The ends of the 95 % percentile interval of a metric."""
        return interval(self.resampled[metric])


def interval(resampled: FloatArray) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles of the values on resamples, those that are not defined left out."""
    known = resampled[~np.isnan(resampled)]
    if len(known) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def sigmoid(logits: FloatArray) -> FloatArray:
    """Probabilities of logits, without overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * logits)


def fit(probs: FloatArray, labels: FloatArray, logits: FloatArray | None = None) -> Fitted:
    """Choose thresholds, and from logits a temperature, on validation data (N, S).

    A threshold that the data cannot tell is 0.5, and a temperature that they cannot tell None.
    """
    thresholds = {}
    for metric in THRESHOLD_METRICS:
        try:
            thresholds[metric], _ = choose_threshold(probs, labels, metric=metric)
        except ValueError:
            thresholds[metric] = _FALLBACK_THRESHOLD
    temperature = None
    if logits is not None:
        try:
            temperature = fit_temperature(logits, labels)
        except ValueError:
            temperature = None
    return Fitted(thresholds=thresholds, temperature=temperature)


def measure(
    probs: FloatArray,
    labels: FloatArray,
    groups: Sequence[str],
    fitted: Fitted,
    *,
    logits: FloatArray | None = None,
    seed: int = 0,
) -> Measured:
    """All metrics of step probabilities (N, S), with resamples of the problems in `groups` (N).

    Args:
        probs: how likely each step is to be correct.
        labels: 1, 0, or -100 where there is none.
        groups: a name for each solution's problem.
        fitted: from `fit`, on other data.
        logits: of the probabilities, for the scaled ECE; without them it is NaN.
        seed: of the resamples.
    """
    scaled = None
    if logits is not None and fitted.temperature is not None:
        scaled = sigmoid(logits / fitted.temperature)
    values = {
        metric: step_metrics(probs, labels, threshold=threshold)[metric]
        for metric, threshold in fitted.thresholds.items()
    }
    whole = step_metrics(probs, labels)
    values |= {"roc_auc": whole["roc_auc"], "ece": whole["ece"]}
    values["ece_scaled"] = float("nan") if scaled is None else step_metrics(scaled, labels)["ece"]
    counts = group_weights(groups, seed=seed)
    resampled = weighted_metrics(probs, labels, fitted.thresholds, counts, scaled=scaled)
    return Measured(values=values, resampled=resampled, fitted=fitted)


def group_weights(groups: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0) -> FloatArray:
    """How often each solution comes in each resample of the problems: float (R, N)."""
    names = {name: index for index, name in enumerate(sorted(set(groups)))}
    place = np.array([names[group] for group in groups])
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(names), (resamples, len(names)))
    counts = np.stack([np.bincount(row, minlength=len(names)) for row in drawn])
    return counts[:, place].astype(np.float64)


def weighted_metrics(
    probs: FloatArray,
    labels: FloatArray,
    thresholds: Mapping[str, float],
    weights: FloatArray,
    *,
    scaled: FloatArray | None = None,
) -> dict[str, FloatArray]:
    """The metrics where each solution counts as often as `weights` (R, N) say: float (R,) each.

    What `trainer.metrics.step_metrics` gives for the solutions repeated so often.
    """
    mask = labels != IGNORED_LABEL
    wrong = mask & (labels < CORRECT_FROM)
    right = mask & ~wrong
    num_wrong, num_right = weights @ wrong.sum(axis=1), weights @ right.sum(axis=1)
    found: dict[str, FloatArray] = {}
    with np.errstate(invalid="ignore", divide="ignore"):
        called = (probs < thresholds["error_f1"]) & mask
        hits, alarms = weights @ (called & wrong).sum(axis=1), weights @ (called & right).sum(axis=1)
        total = hits + alarms + num_wrong
        found["error_f1"] = np.where(total > 0, 2.0 * hits / total, 0.0)
        called = (probs < thresholds["balanced_accuracy"]) & mask
        hits, alarms = weights @ (called & wrong).sum(axis=1), weights @ (called & right).sum(axis=1)
        recalls = np.stack([hits / num_wrong, 1.0 - alarms / num_right])
        found["balanced_accuracy"] = np.nanmean(recalls, axis=0)
        found["processbench_f1"] = _first_error_f1(probs, mask, wrong, thresholds["processbench_f1"], weights)
        found["ece"] = _ece(probs, labels, mask, weights)
        missing = np.full(len(weights), np.nan)
        found["ece_scaled"] = missing if scaled is None else _ece(scaled, labels, mask, weights)
        found["roc_auc"] = _auc(probs[mask], wrong[mask], np.repeat(np.arange(len(mask)), mask.sum(axis=1)), weights)
    return found


def _first_error_f1(
    probs: FloatArray, mask: npt.NDArray[np.bool_], wrong: npt.NDArray[np.bool_], threshold: float, weights: FloatArray
) -> FloatArray:
    true = first_true(wrong)
    hit = (first_true((probs < threshold) & mask) == true).astype(np.float64)
    has_error, is_right = (true >= 0).astype(np.float64), ((true < 0) & mask.any(axis=1)).astype(np.float64)
    acc_error = (weights @ (hit * has_error)) / (weights @ has_error)
    acc_right = (weights @ (hit * is_right)) / (weights @ is_right)
    total = acc_error + acc_right
    return np.where(total == 0.0, 0.0, 2.0 * acc_error * acc_right / total)


def _ece(probs: FloatArray, labels: FloatArray, mask: npt.NDArray[np.bool_], weights: FloatArray) -> FloatArray:
    place = np.minimum((probs * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    gaps = [
        np.abs(weights @ np.where(mask & (place == m), probs - labels, 0.0).sum(axis=1))
        for m in range(CALIBRATION_BINS)
    ]
    total: FloatArray = np.sum(gaps, axis=0) / (weights @ mask.sum(axis=1))
    return total


def _auc(
    probs: FloatArray, wrong: npt.NDArray[np.bool_], solutions: npt.NDArray[np.int64], weights: FloatArray
) -> FloatArray:
    roc_auc_score = import_sklearn_metrics().roc_auc_score
    areas = np.full(len(weights), np.nan)
    for index, row in enumerate(weights[:, solutions]):
        used = row > 0
        if wrong[used].any() and not wrong[used].all():
            areas[index] = roc_auc_score(wrong[used], -probs[used], sample_weight=row[used])
    return areas


def all_right(labels: FloatArray) -> FloatArray:
    """The probabilities (N, S) of whoever calls every step right."""
    return np.ones(labels.shape)


def index_alone(train_labels: FloatArray, labels: FloatArray) -> FloatArray:
    """The probabilities (N, S) of whoever knows nothing but how often a step of each index is right in training."""
    return StepIndexPredictor.fit(train_labels).predict(labels).astype(np.float64)
