"""What a predictor that sees nothing of a solution but the step's number reaches, beside every evaluation.

Later steps are wrong more often, so that a metric over pooled steps is high for whoever only counts them: on
published benchmarks the index alone ranks steps with a ROC AUC of up to 0.86. A model that is no better has
read nothing.

    predictor = StepIndexPredictor.fit(training_labels)
    step_index_metrics(evaluation_labels, predictor)["index_only_roc_auc"]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from modeling_prm.step_loss import IGNORED_LABEL

from .calibration import choose_threshold
from .labels import LabelFunction
from .metrics import FloatArray, check_labelled, class_targets, step_metrics

PREFIX = "index_only_"
# What `step_metrics` says about the data and not about the predictor.
_OF_THE_DATA = ("error_share", "majority_accuracy", "num_steps", "num_solutions")
# Rates of so many records are known well enough.
_MOST_RECORDS = 50_000
_DEFAULT_THRESHOLD = 0.5


@dataclass(frozen=True, kw_only=True)
class StepIndexPredictor:
    """Step probabilities that depend on the step's index alone.

    Args:
        probs: the probability that the step of each index from 0 on is correct; later steps get the last one.
        threshold: below it, a step is called wrong.
    """

    probs: tuple[float, ...]
    threshold: float

    @classmethod
    def fit(cls, labels: FloatArray) -> StepIndexPredictor:
        """Learn the share of correct steps at each index, and the threshold with the best ProcessBench F1.

        With n_i labelled steps of sum s_i at index i, p_i = (s_i + p_(i-1)) / (n_i + 1), where p_(-1) is the
        share over all steps: an index that is seen seldom goes by the one before it. Where the labels do not
        hold wrong and all correct solutions, the threshold is 0.5.

        Args:
            labels: Float (N, S), in [0, 1], -100 where there is no label.

        Raises:
            TypeError, ValueError: as in `step_metrics`.
        """
        mask = check_labelled("labels", labels, labels)
        sums, counts = np.where(mask, labels, 0.0).sum(axis=0, dtype=np.float64), mask.sum(axis=0)
        prob = float(sums.sum() / counts.sum())
        probs = []
        for total, count in zip(sums.tolist(), counts.tolist(), strict=True):
            prob = (total + prob) / (count + 1)
            probs.append(prob)
        predictor = cls(probs=tuple(probs), threshold=_DEFAULT_THRESHOLD)
        try:
            threshold, _ = choose_threshold(predictor.predict(labels), labels)
        except ValueError:
            return predictor
        return cls(probs=predictor.probs, threshold=threshold)

    def predict(self, labels: FloatArray) -> FloatArray:
        """Probabilities (N, S) for steps as many as those of `labels` (N, S)."""
        index = np.minimum(np.arange(labels.shape[1]), len(self.probs) - 1)
        return np.tile(np.array(self.probs)[index], (len(labels), 1))


def step_index_metrics(labels: FloatArray, predictor: StepIndexPredictor | None) -> dict[str, float]:
    """The metrics of `step_metrics` for the step's index alone, under names that begin with `index_only_`.

    Args:
        labels: Float (N, S), in [0, 1], -100 where there is no label.
        predictor: one fitted on other data, the training set. None fits one on each half of the labelled
            solutions here (every other one) and measures it on the other half; each metric is then the mean
            over the halves, NaN where it is that in both or there is one solution only. Leaving out one
            solution at a time would not do: each label would lower the rate that it is compared with.

    Raises:
        TypeError, ValueError: as in `step_metrics`.
    """
    mask = check_labelled("labels", labels, labels)
    if predictor is not None:
        return _measure(predictor, labels)
    labels = labels[mask.any(axis=1)]
    halves = labels[::2], labels[1::2]
    if len(halves[1]) == 0:
        return dict.fromkeys(_measure(StepIndexPredictor.fit(labels), labels), math.nan)
    found = [
        _measure(StepIndexPredictor.fit(known), hidden)
        for known, hidden in ((halves[0], halves[1]), (halves[1], halves[0]))
    ]
    return {name: _mean([metrics[name] for metrics in found]) for name in found[0]}


def labels_of(
    dataset: Any, label_rules: LabelFunction, class_weights: Sequence[float] | None = None
) -> FloatArray | None:
    """Labels (N, S) of tokenized records, as evaluation takes them; of at most 50,000 records spread evenly.

    Args:
        dataset: what `tokenize_dataset` makes.
        label_rules: those of evaluation.
        class_weights: of the model's config.

    Returns:
        None where the dataset is of another kind, or holds no label.
    """
    columns = ("labels", "step_positions")
    if not isinstance(dataset, datasets.Dataset) or any(name not in dataset.column_names for name in columns):
        return None
    stride = math.ceil(len(dataset) / _MOST_RECORDS)
    part = dataset.with_format(None).select_columns(list(columns))
    part = part.select(range(0, len(dataset), stride)) if stride > 1 else part
    rows = [
        label_rules(labels)[: len(positions)]
        for batch in part.iter(batch_size=1000)
        for labels, positions in zip(batch["labels"], batch["step_positions"], strict=True)
    ]
    found = np.full((len(rows), max(map(len, rows), default=0)), IGNORED_LABEL)
    for index, row in enumerate(rows):
        found[index, : len(row)] = row
    return class_targets(found, class_weights) if bool((found != IGNORED_LABEL).any()) else None


class StepIndexGuard:
    """The metrics of the step's index for each evaluation of a training; the training labels are read once.

    Args:
        labels: gives the training labels, as `labels_of` does, or None where there are none.
    """

    def __init__(self, labels: Callable[[], FloatArray | None]) -> None:
        self._labels = labels
        self._predictor: StepIndexPredictor | None = None
        self._is_fitted = False

    def __call__(self, labels: FloatArray) -> dict[str, float]:
        """As `step_index_metrics`, with the predictor of the training set where there is one."""
        if not self._is_fitted:
            known = self._labels()
            self._predictor = None if known is None else StepIndexPredictor.fit(known)
            self._is_fitted = True
        return step_index_metrics(labels, self._predictor)


def _measure(predictor: StepIndexPredictor, labels: FloatArray) -> dict[str, float]:
    metrics = step_metrics(predictor.predict(labels), labels, threshold=predictor.threshold)
    return {PREFIX + name: value for name, value in metrics.items() if name not in _OF_THE_DATA}


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
