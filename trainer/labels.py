"""What training does to the labels of a solution before the loss sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from modeling_prm.step_loss import IGNORED_LABEL

SOFT_LABELS = ("harden", "keep")
AFTER_FIRST_ERROR = ("keep", "mask")


@dataclass(frozen=True, kw_only=True)
class LabelRules:
    """Rules from the labels of a whole solution to those that are trained on.

    Args:
        soft_labels: `"harden"`: a label in [0, 1] becomes 1 from `label_threshold` on and 0 below, which the
            field measured as good as soft Monte Carlo estimates, and better once they are filtered (2501.07301);
            `"keep"` trains on them as they are.
        label_threshold: for `"harden"`.
        after_first_error: `"mask"` ignores the steps after the first wrong one, as in 2305.20050; `"keep"`
            trains on them.
        last_step_only: ignore every step but the last of the solution, which makes an outcome reward model. A
            solution whose last step did not fit then teaches nothing.
        class_weights: with K classes, how much each counts as correct; labels are class indices then and are
            not hardened.
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

    def __call__(self, labels: Sequence[float]) -> list[float]:
        """The labels of a whole solution, one a step, -100 where ignored."""
        labels = list(labels)
        if self.after_first_error == "mask":
            first = next((index for index, label in enumerate(labels) if self._is_wrong(label)), len(labels))
            labels[first + 1 :] = [IGNORED_LABEL] * len(labels[first + 1 :])
        if self.last_step_only:
            labels[:-1] = [IGNORED_LABEL] * len(labels[:-1])
        if self.soft_labels == "harden" and self.class_weights is None:
            labels = [label if label == IGNORED_LABEL else float(label >= self.label_threshold) for label in labels]
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
        return label < self.label_threshold


LabelFunction = Callable[[Sequence[float]], list[float]]
