"""What training does to the labels of a solution before the loss sees them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from modeling_prm.step_loss import IGNORED_LABEL

logger = logging.getLogger(__name__)

SOFT_LABELS = ("harden", "keep")
AFTER_FIRST_ERROR = ("keep", "mask")

LabelFunction = Callable[[Sequence[float]], list[float]]


@dataclass(frozen=True, kw_only=True)
class LabelRules:
    """Rules from the labels of a whole solution to those that are trained on.

    Args:
        soft_labels: `"harden"`: a label in [0, 1] becomes 1 from `label_threshold` on and 0 below, which the
            field measured as good as soft Monte Carlo estimates, and better once they are filtered (2501.07301);
            `"keep"` trains on them as they are.
        label_threshold: a label counts as correct from here on, for `"harden"` and `"mask"`; compared in float32,
            in which labels are kept.
        after_first_error: `"mask"` ignores the steps after the first wrong one, as in 2305.20050; `"keep"`
            trains on them.
        last_step_only: ignore every step but the last of the solution, which makes an outcome reward model
            (2211.14275). A solution whose last step did not fit then teaches nothing.
        class_weights: with K classes, how much each counts as correct; labels are class indices then and are
            not hardened. A class that counts less than 0.5 is an error for `"mask"`.

    Raises:
        ValueError: an option has a value outside those allowed, or `"mask"` meets `last_step_only`.
    """

    soft_labels: str = "harden"
    label_threshold: float = 0.5
    after_first_error: str = "keep"
    last_step_only: bool = False
    class_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("soft_labels", SOFT_LABELS), ("after_first_error", AFTER_FIRST_ERROR)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if not 0.0 < self.label_threshold <= 1.0:
            raise ValueError(f"label_threshold must be above 0 and at most 1, got {self.label_threshold}")
        if self.last_step_only and self.after_first_error == "mask":
            raise ValueError(
                "after_first_error='mask' would take the last step of every solution with an earlier error from "
                "training on the last step only; leave it at 'keep'"
            )

    def __call__(self, labels: Sequence[float]) -> list[float]:
        """The labels of a whole solution, one a step, -100 where ignored."""
        labels = list(labels)
        if self.after_first_error == "mask":
            first = next((index for index, label in enumerate(labels) if self._is_wrong(label)), len(labels))
            labels[first + 1 :] = [IGNORED_LABEL] * len(labels[first + 1 :])
        if self.last_step_only:
            labels[:-1] = [IGNORED_LABEL] * len(labels[:-1])
        if self.soft_labels == "harden" and self.class_weights is None:
            labels = [label if label == IGNORED_LABEL else float(self._is_correct(label)) for label in labels]
        return labels

    def for_evaluation(self) -> LabelRules:
        """The same without the rules that leave labels out, so that every labelled step is measured."""
        return LabelRules(
            soft_labels=self.soft_labels, label_threshold=self.label_threshold, class_weights=self.class_weights
        )

    def _is_wrong(self, label: float) -> bool:
        if label == IGNORED_LABEL:
            return False
        if self.class_weights is not None:
            return self.class_weights[int(label)] < 0.5
        return not self._is_correct(label)

    def _is_correct(self, label: float) -> bool:
        # A label of 0.7 that went through float32 lies below the double 0.7.
        return bool(np.float32(label) >= np.float32(self.label_threshold))


def report_trained_steps(
    labels: Iterable[Sequence[float]], step_positions: Iterable[Sequence[int]], rules: LabelRules
) -> None:
    """Log how many labelled steps of a training set the rules leave, if they leave any out.

    Args:
        labels: for each solution, the labels of all its steps.
        step_positions: for each, the positions of the steps that fit: the first ones.
        rules: what training does to the labels.

    Raises:
        ValueError: no step is left.
    """
    if rules == rules.for_evaluation():
        return
    labelled = trained = 0
    for row, positions in zip(labels, step_positions, strict=True):
        labelled += _count(row[: len(positions)])
        trained += _count(rules(row)[: len(positions)])
    if trained == 0:
        raise ValueError(
            f"none of {labelled} labelled steps is left to train on with after_first_error={rules.after_first_error!r} "
            f"and train_on_last_step_only={rules.last_step_only}; a solution's last step needs a label and must fit "
            "into max_length"
        )
    logger.info("training takes %d of %d labelled steps", trained, labelled)


def _count(labels: Sequence[float]) -> int:
    return sum(label != IGNORED_LABEL for label in labels)
