"""Metrics over step probabilities, for the trainer and for evaluation.

Letters: N solutions, S steps (the most in any solution). Arrays are padded to (N, S): a label of -100
marks a step that is padding or has no label, and whatever stands beside it is never read.

    step_metrics(np.array([[0.9, 0.2]]), np.array([[1.0, 0.0]]))["processbench_acc_error"]  # 1.0
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from modeling_prm.step_loss import IGNORED_LABEL

FloatArray = npt.NDArray[np.floating[Any]]
BoolArray = npt.NDArray[np.bool_]

CORRECT_FROM = 0.5
"""A soft label from here on counts as correct wherever a metric needs two classes."""

CALIBRATION_BINS = 15
"""As many bins of equal width as Guo et al. take (arXiv 1706.04599)."""


def step_metrics(step_probs: FloatArray, labels: FloatArray, *, threshold: float = 0.5) -> dict[str, float]:
    """Compare step probabilities with labels.

    The *error* class is the positive one: a step is predicted wrong where its probability is below the
    threshold, and is wrong where its label is below 0.5. The comparison with the threshold is made in the
    dtype of `step_probs`. A threshold tuned on the data measured here makes every number that depends on
    it too good.

    Args:
        step_probs: Float (N, S), the probability in [0, 1] that a step is correct; anything where there
            is no label.
        labels: Float (N, S), 1.0 correct, 0.0 incorrect, between them a soft label, -100 no label.
        threshold: A probability in [0, 1].

    Returns:
        Python floats. All are shares in [0, 1], higher is better, unless it says otherwise.

        Over all labelled steps, pooled (micro):

        - `step_accuracy`: steps judged right. Compare it with `majority_accuracy`: where one step in seven
          is wrong, calling every step correct already gives 0.86.
        - `balanced_accuracy`: mean of the shares found of the correct and of the wrong steps; 0.5 is
          chance. Where the labels hold one class only, the share found of that class.
        - `error_precision`, `error_recall`, `error_f1`: of the steps called wrong, how many are; of the
          wrong steps, how many are called so; their harmonic mean. 0 where the denominator is 0.
        - `roc_auc`: probability that a random correct step gets a higher score than a random wrong one;
          0.5 is chance, no threshold is involved. NaN where the labels hold one class only.
        - `average_precision`: area under the precision-recall curve of the error class, steps ranked by
          1 - p; chance is `error_share`, no threshold is involved. NaN where no step is wrong.
        - `brier`: mean of (p - label)^2, soft labels as they are; lower is better, 0.25 is what a
          constant 0.5 gets on hard labels (Brier, 1950).
        - `ece`: expected calibration error, the mean distance of probability and share of correct steps in
          15 bins of equal width, see `reliability_table`; lower is better, no threshold is involved.

        Over solutions with a labelled step, by the protocol of ProcessBench (arXiv 2412.06559), of which
        the unlabelled steps are left out; the prediction is the first step called wrong, or none:

        - `processbench_acc_error`: of the solutions with a wrong step, how many have exactly their first
          wrong step predicted. NaN where there is no such solution.
        - `processbench_acc_correct`: of the solutions without one, how many have none predicted. NaN
          where there is no such solution.
        - `processbench_f1`: harmonic mean of these two, 0 where both are 0, NaN where one is NaN.

        About the data, not the model:

        - `error_share`: wrong steps among the labelled.
        - `majority_accuracy`: `step_accuracy` of always predicting the more frequent class.
        - `num_steps`, `num_solutions`: counts of labelled steps, and of solutions with at least one.

    Raises:
        ImportError: If scikit-learn is missing.
        TypeError: If an array is not a floating-point NumPy array.
        ValueError: If the arrays are not of one shape (N, S), no step is labelled, a label is neither in
            [0, 1] nor -100, or a probability of a labelled step or the threshold is not in [0, 1].
    """
    sklearn_metrics = import_sklearn_metrics()
    mask = check_labelled("step_probs", step_probs, labels)
    _check_threshold(threshold)
    probs, targets = step_probs[mask], labels[mask].astype(np.float64)
    _check_probs(probs)

    is_error = targets < CORRECT_FROM
    called_error = probs < threshold
    precision, recall, f1, _ = sklearn_metrics.precision_recall_fscore_support(
        is_error, called_error, average="binary", pos_label=True, zero_division=0.0
    )
    # balanced_accuracy_score is this mean of recalls, and warns where a class is absent.
    balanced = sklearn_metrics.recall_score(
        is_error, called_error, labels=np.unique(is_error), average="macro", zero_division=0.0
    )
    error_share = float(is_error.mean())
    has_errors, has_both = error_share > 0.0, 0.0 < error_share < 1.0
    # Ranking by -p is ranking by 1 - p without the ties that rounding makes near p = 0.
    auc = sklearn_metrics.roc_auc_score(is_error, -probs) if has_both else np.nan
    average_precision = sklearn_metrics.average_precision_score(is_error, -probs) if has_errors else np.nan
    return {
        "step_accuracy": float(sklearn_metrics.accuracy_score(is_error, called_error)),
        "balanced_accuracy": float(balanced),
        "error_precision": float(precision),
        "error_recall": float(recall),
        "error_f1": float(f1),
        "roc_auc": float(auc),
        "average_precision": float(average_precision),
        # brier_score_loss takes hard labels only.
        "brier": float(np.mean((probs.astype(np.float64) - targets) ** 2)),
        "ece": _reliability(probs, targets, CALIBRATION_BINS).ece,
        **_processbench(step_probs, labels, mask, threshold),
        "error_share": error_share,
        "majority_accuracy": max(error_share, 1.0 - error_share),
        "num_steps": float(mask.sum()),
        "num_solutions": float(mask.any(axis=1).sum()),
    }


def bce_from_logits(logits: FloatArray, labels: FloatArray) -> float:
    """Mean binary cross-entropy over all labelled steps, whatever batches they were computed in.

    For a logit x and a label y it is `max(x, 0) - x * y + log(1 + exp(-|x|))`, which overflows for no
    finite x; in nats, so ln 2 = 0.693 is what a constant probability of 0.5 gets on any labels. With
    soft labels the least that can be reached is their mean entropy, not 0.

    Args:
        logits: Float (N, S), one logit a step; anything where there is no label.
        labels: Float (N, S), in [0, 1], -100 where there is no label.

    Returns:
        The mean, computed in float64; NaN or infinity if a labelled step's logit is.

    Raises:
        TypeError: If an array is not a floating-point NumPy array.
        ValueError: If the arrays are not of one shape (N, S), no step is labelled, or a label is neither
            in [0, 1] nor -100.
    """
    mask = check_labelled("logits", logits, labels)
    x, y = logits[mask].astype(np.float64), labels[mask].astype(np.float64)
    with np.errstate(invalid="ignore"):
        losses = np.maximum(x, 0.0) - x * y + np.log1p(np.exp(-np.abs(x)))
    return float(losses.mean())


@dataclass(frozen=True, kw_only=True)
class ReliabilityTable:
    """How often steps of about one probability are correct.

    Args:
        counts: labelled steps in each of M bins; bin m holds the probabilities from m / M on and below
            (m + 1) / M, the last one 1 too.
        mean_probs, mean_labels: their mean probability and mean label in each bin, NaN in an empty one.
    """

    counts: tuple[int, ...]
    mean_probs: tuple[float, ...]
    mean_labels: tuple[float, ...]

    @property
    def ece(self) -> float:
        """Expected calibration error: |mean probability - mean label| of the bins, weighted by their counts."""
        rows = zip(self.counts, self.mean_probs, self.mean_labels, strict=True)
        return sum(count * abs(prob - label) for count, prob, label in rows if count) / sum(self.counts)


def reliability_table(step_probs: FloatArray, labels: FloatArray, *, bins: int = CALIBRATION_BINS) -> ReliabilityTable:
    """Sort the labelled steps into bins of equal width by their probability.

    Guo et al. (arXiv 1706.04599) bin the confidence in the predicted class; here it is the probability
    that the step is correct, which is what users of a PRM read. Soft labels count as they are.

    Args:
        step_probs: Float (N, S), the probability in [0, 1] that a step is correct; anything where there
            is no label.
        labels: Float (N, S), in [0, 1], -100 where there is no label.
        bins: How many, at least 1.

    Raises:
        TypeError: If an array is not a floating-point NumPy array.
        ValueError: If `bins` is below 1, or as in `step_metrics`.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    mask = check_labelled("step_probs", step_probs, labels)
    _check_probs(step_probs[mask])
    return _reliability(step_probs[mask], labels[mask].astype(np.float64), bins)


def _reliability(probs: FloatArray, targets: FloatArray, bins: int) -> ReliabilityTable:
    probs = probs.astype(np.float64)
    place = np.minimum((probs * bins).astype(np.int64), bins - 1)
    counts = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean_probs, mean_labels = (np.bincount(place, values, minlength=bins) / counts for values in (probs, targets))
    return ReliabilityTable(
        counts=tuple(counts.tolist()), mean_probs=tuple(mean_probs.tolist()), mean_labels=tuple(mean_labels.tolist())
    )


def class_targets(labels: FloatArray, class_weights: Sequence[float] | None) -> FloatArray:
    """Labels as probabilities to be correct: class indices (N, S) by how much each class counts as correct.

    Args:
        labels: Float (N, S), -100 where there is no label.
        class_weights: Those of the model's config; None leaves the labels of one logit as they are.
    """
    if class_weights is None:
        return labels
    weights = np.array(class_weights, dtype=labels.dtype)
    return np.where(labels == IGNORED_LABEL, labels, weights[np.maximum(labels, 0).astype(np.int64)])


def _processbench(step_probs: FloatArray, labels: FloatArray, mask: BoolArray, threshold: float) -> dict[str, float]:
    true_index = first_true((labels < CORRECT_FROM) & mask)
    found = first_true((step_probs < threshold) & mask) == true_index
    has_error = true_index >= 0
    all_correct = mask.any(axis=1) & ~has_error
    acc_error = float(found[has_error].mean()) if has_error.any() else float("nan")
    acc_correct = float(found[all_correct].mean()) if all_correct.any() else float("nan")
    total = acc_error + acc_correct
    return {
        "processbench_f1": 0.0 if total == 0.0 else 2.0 * acc_error * acc_correct / total,
        "processbench_acc_error": acc_error,
        "processbench_acc_correct": acc_correct,
    }


def first_true(flags: BoolArray) -> npt.NDArray[np.int64]:
    """Index of the first True of each row of a bool (N, S) with S > 0, -1 where there is none: int64 (N,)."""
    return np.where(flags.any(axis=1), flags.argmax(axis=1), -1).astype(np.int64)


def import_sklearn_metrics() -> ModuleType:
    """The module `sklearn.metrics`, or an ImportError that says how to install it."""
    try:
        return importlib.import_module("sklearn.metrics")
    except ImportError as error:
        raise ImportError(
            'step_metrics needs scikit-learn, which is not installed: run `pip install "modeling-prm[train]"`'
        ) from error


def _kind(value: object) -> str:
    return f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__


def _check_float_array(name: str, array: object) -> None:
    if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.floating):
        raise TypeError(
            f"{name} must be a NumPy array of floats, got {_kind(array)}; convert a tensor with .float().cpu().numpy()"
        )


def _check_same_shape(name: str, array: FloatArray, other_name: str, other: npt.NDArray[Any]) -> None:
    if array.ndim != 2 or array.shape != other.shape or array.shape[1] == 0:
        raise ValueError(
            f"{name} and {other_name} must have one shape (N, S) with S > 0, got {array.shape} and "
            f"{other.shape}; pad the steps of every solution to the same number"
        )


def check_labelled(name: str, array: FloatArray, labels: FloatArray) -> BoolArray:
    """Check an array and labels, both (N, S), and return where there are labels: bool (N, S)."""
    _check_float_array(name, array)
    _check_float_array("labels", labels)
    _check_same_shape(name, array, "labels", labels)
    mask = labels != IGNORED_LABEL
    labelled = labels[mask]
    if labelled.size == 0:
        raise ValueError(
            f"at least one labelled step is needed, got labels of {IGNORED_LABEL:g} only; check how they were made"
        )
    outside = ~((labelled >= 0.0) & (labelled <= 1.0))
    if outside.any():
        raise ValueError(
            f"labels must be in [0, 1] or {IGNORED_LABEL:g}, got {float(labelled[outside][0])} and in all "
            f"{int(outside.sum())} such; convert the dataset's own code first"
        )
    return mask


def _check_threshold(threshold: float) -> None:
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold must be a probability in [0, 1], got {threshold}; pass for example 0.5")


def _check_probs(probs: FloatArray) -> None:
    outside = ~((probs >= 0.0) & (probs <= 1.0))
    if outside.any():
        raise ValueError(
            f"step_probs of labelled steps must be in [0, 1], got {float(probs[outside][0])} and in all "
            f"{int(outside.sum())} such; pass probabilities, not logits (NaN: the model has diverged)"
        )
