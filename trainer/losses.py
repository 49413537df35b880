"""Losses over step labels, with the options that `PRMTrainer` adds to the model's masked cross-entropy.

A loss is a sum of terms, and each term a sum divided by a count. The counts depend on the labels alone, so
they can be added up over the micro-batches and processes of an optimizer step before any of it is computed,
and the loss of the step does not depend on how it was cut:

    counts = loss.counts(labels_of_micro_batch_1) + loss.counts(labels_of_micro_batch_2)
    loss(logits_1, labels_1, counts) + loss(logits_2, labels_2, counts)

Letters: B solutions, S steps, K classes. Every solution is a row of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch.nn import functional as F

from modeling_prm.step_loss import IGNORED_LABEL

STEP_WEIGHTINGS = ("uniform", "linear")
NORMALIZATIONS = ("step", "solution")
RANKINGS = ("none", "pairwise", "pqm")

# From the rank (B, S) of each labelled step in its solution, 1 to n, and n (B, 1), to weights (B, S).
StepWeights = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class StepLoss:
    """`bce_weight` times the cross-entropy of the steps, plus `ranking_weight` times a ranking loss.

    The default is the masked binary cross-entropy of `step_loss`.

    Args:
        num_labels: logits a step. With K classes the steps' loss is cross-entropy, labels are class indices.
        pos_weight: factor on the loss of correct steps: -w y log s(z) - (1 - y) log(1 - s(z)), as in
            `torch.nn.BCEWithLogitsLoss`. The mean divides by the number of steps, not by their weights.
        label_smoothing: e in [0, 1): labels y become (1 - e) y + e / 2, or (1 - e) onehot + e / K
            (Szegedy et al., 1512.00567). The ranking takes the labels as they are.
        step_weighting: `"uniform"`, or `"linear"`: step i of n labelled ones weighs 2 i / (n + 1), so that
            later steps count more and the mean weight is 1; or a function of i (B, S) and n (B, 1).
            The mean divides by the sum of the weights. The ranking has no such weights.
        normalization: `"step"`: the mean over all labelled steps, and over all pairs. `"solution"`: the mean over
            solutions of each one's mean, so that long solutions count no more than short ones.
        ranking: `"none"`; `"pairwise"`: log(1 + exp(z_w - z_c)), the mean over all pairs of a correct step c and
            a wrong step w of one solution (RankNet; Burges et al., 2005); `"pqm"`: the comparative loss of
            PQM (2410.11287, equation 10), always the mean over solutions of the mean over their correct steps t of
            -log(exp z_t / (sum over correct q up to t of exp z_q + sum over wrong w of exp(z_w + margin))), where a
            step of score 0 before the first stands for the problem; it has a term of its own where a step is wrong.
        ranking_weight: factor on the ranking loss.
        bce_weight: factor on the cross-entropy; 0 trains on the ranking alone.
        margin: of `"pqm"` (zeta in the paper).
        label_threshold: a soft label counts as correct in the ranking from here on, and as wrong below.

    Raises:
        ValueError: an option has a value outside those allowed, does not go with `num_labels`, or changes nothing
            beside the others.
    """

    num_labels: int = 1
    pos_weight: float = 1.0
    label_smoothing: float = 0.0
    step_weighting: str | StepWeights = "uniform"
    normalization: str = "step"
    ranking: str = "none"
    ranking_weight: float = 1.0
    bce_weight: float = 1.0
    margin: float = 4.0
    label_threshold: float = 0.5

    def __post_init__(self) -> None:
        for name, allowed in (("normalization", NORMALIZATIONS), ("ranking", RANKINGS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if not callable(self.step_weighting) and self.step_weighting not in STEP_WEIGHTINGS:
            raise ValueError(
                f"step_weighting must be one of {STEP_WEIGHTINGS} or a function, got {self.step_weighting!r}"
            )
        if not 0.0 < self.pos_weight < math.inf or not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(
                "pos_weight must be above 0 and label_smoothing in [0, 1), got "
                f"{self.pos_weight} and {self.label_smoothing}"
            )
        if not math.isfinite(self.margin) or not 0.0 < self.label_threshold <= 1.0:
            raise ValueError(
                "margin must be a finite number and label_threshold above 0 and at most 1, got "
                f"{self.margin} and {self.label_threshold}"
            )
        ranking_weight = self.ranking_weight if self.ranking != "none" else 0.0
        weights_are_finite = 0.0 <= self.bce_weight < math.inf and 0.0 <= self.ranking_weight < math.inf
        if not weights_are_finite or self.bce_weight + ranking_weight == 0.0:
            raise ValueError(
                "bce_weight and ranking_weight must not be negative, and one of the two losses must count; got "
                f"bce_weight={self.bce_weight}, ranking={self.ranking!r} with ranking_weight={self.ranking_weight}"
            )
        if self.num_labels > 1 and (self.ranking != "none" or self.pos_weight != 1.0):
            raise ValueError(
                f"ranking and pos_weight are for one logit a step, the model has {self.num_labels} classes; leave them "
                "out"
            )
        self._check_options_count()

    def _check_options_count(self) -> None:
        """A value that someone chose and that changes nothing is a mistake."""
        of_cross_entropy = ["pos_weight", "label_smoothing", "step_weighting"]
        if self.ranking == "pqm":
            of_cross_entropy.append("normalization")
        without = {
            "a ranking loss": ["ranking_weight"] if self.ranking == "none" else [],
            "the ranking loss 'pqm'": ["margin"] if self.ranking != "pqm" else [],
            "the cross-entropy": of_cross_entropy if self.bce_weight == 0.0 else [],
        }
        defaults = {field.name: field.default for field in fields(self)}
        for part, names in without.items():
            for name in names:
                if getattr(self, name) != defaults[name]:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} changes nothing without {part}; turn that on, or leave "
                        f"{name} at {defaults[name]!r}"
                    )

    def counts(self, labels: torch.Tensor) -> torch.Tensor:
        """What each term is divided by.

        Args:
            labels: (B, S), -100 where ignored.

        Returns:
            (2,) float32, for the cross-entropy and for the ranking.

        Raises:
            TypeError: the labels are booleans.
            ValueError: a function for `step_weighting` gives weights that are not (B, S), finite and not negative.
        """
        if labels.dtype == torch.bool:
            raise TypeError("labels must be numbers: as booleans they have lost the -100 of ignored steps; use floats")
        weights = self._weights(labels != IGNORED_LABEL)
        steps = (weights > 0.0).any(dim=1).sum() if self.normalization == "solution" else weights.sum()
        correct, wrong = self._classes(labels)
        if self.ranking == "pairwise":
            pairs = correct.sum(dim=1) * wrong.sum(dim=1)
            pairs = (pairs > 0).sum() if self.normalization == "solution" else pairs.sum()
        elif self.ranking == "pqm":
            pairs = (correct | wrong).any(dim=1).sum()
        else:
            pairs = torch.zeros_like(steps)
        return torch.stack([steps.float(), pairs.float()])

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor | None = None) -> torch.Tensor:
        """The part of these solutions in the loss of an optimizer step.

        Args:
            logits: (B, S), or (B, S, K); computed in float32, or in float64 if they are.
            labels: (B, S), -100 where ignored, otherwise in [0, 1], or class indices 0 to K - 1.
            counts: the sum of `counts` over the whole optimizer step; by default that of these labels.

        Returns:
            A scalar of that dtype; 0 with a gradient of 0 where nothing is labelled.

        Raises:
            TypeError, ValueError: as `counts`.
        """
        logits = logits if logits.dtype == torch.float64 else logits.float()
        labels = labels.to(logits.device)
        counts = (self.counts(labels) if counts is None else counts).to(logits)
        # At most a division by 1 of a sum without a term.
        steps, pairs = torch.where(counts > 0, counts, 1.0)
        total = self.bce_weight * self._step_sum(logits, labels) / steps
        if self.ranking != "none":
            total = total + self.ranking_weight * self._ranking_sum(logits, labels) / pairs
        return total

    def _step_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        labelled = labels != IGNORED_LABEL
        targets = torch.where(labelled, labels, 0)
        if self.num_labels > 1:
            losses = F.cross_entropy(
                logits.transpose(1, 2), targets.long(), reduction="none", label_smoothing=self.label_smoothing
            )
        else:
            targets = (1.0 - self.label_smoothing) * targets.to(logits.dtype) + 0.5 * self.label_smoothing
            pos_weight = logits.new_tensor(self.pos_weight)
            losses = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=pos_weight, reduction="none")
        weights = self._weights(labelled)
        if self.normalization == "solution":
            weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        return (losses * weights).sum()

    def _ranking_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        correct, wrong = self._classes(labels)
        if self.ranking == "pqm":
            return _pqm(logits, correct, wrong, self.margin).sum()
        gaps = F.softplus(logits.unsqueeze(1) - logits.unsqueeze(2))  # (B, c, w): z_w - z_c
        pairs = correct.unsqueeze(2) & wrong.unsqueeze(1)
        sums = torch.where(pairs, gaps, 0).sum(dim=(1, 2))
        if self.normalization == "solution":
            sums = sums / pairs.sum(dim=(1, 2)).clamp(min=1)
        return sums.sum()

    def _classes(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which steps (B, S) are correct, and which wrong."""
        labelled = labels != IGNORED_LABEL
        return labelled & (labels >= self.label_threshold), labelled & (labels < self.label_threshold)

    def _weights(self, labelled: torch.Tensor) -> torch.Tensor:
        """Weights (B, S) in float32 of the labelled steps, 0 elsewhere."""
        if self.step_weighting == "uniform":
            return labelled.float()
        rank, total = labelled.cumsum(dim=1), labelled.sum(dim=1, keepdim=True)
        if callable(self.step_weighting):
            weights = self.step_weighting(rank, total).float()
            given = weights[labelled] if weights.shape == labelled.shape else None
            if given is None or not bool(((given >= 0.0) & given.isfinite()).all()):
                raise ValueError(
                    f"step_weighting must give weights of shape {tuple(labelled.shape)} that are finite and not "
                    f"negative, got {weights}"
                )
        else:
            weights = 2.0 * rank.float() / (total + 1.0)
        return torch.where(labelled, weights, 0.0)


def choose_step_loss(described: StepLoss, given: StepLoss | None) -> StepLoss:
    """The loss that is given, or else the one that the options describe.

    Raises:
        TypeError: what is given is no `StepLoss`.
        ValueError: it is for another number of logits, or the options describe one too.
    """
    if given is None:
        return described
    if not isinstance(given, StepLoss):
        raise TypeError(f"step_loss must be a trainer.losses.StepLoss, got {type(given).__name__}")
    if given.num_labels != described.num_labels:
        raise ValueError(
            f"step_loss is for {given.num_labels} logits a step, the model has {described.num_labels}; give it "
            f"num_labels={described.num_labels}"
        )
    if described != StepLoss(num_labels=described.num_labels, label_threshold=described.label_threshold):
        raise ValueError(
            f"step_loss stands in place of the loss of the training arguments, which describe one too: {described}; "
            "leave those options at their defaults, or step_loss out"
        )
    return given


def _pqm(logits: torch.Tensor, correct: torch.Tensor, wrong: torch.Tensor, margin: float) -> torch.Tensor:
    """The comparative loss (B,) of each solution, 0 where it has no term."""
    lowest = torch.finfo(logits.dtype).min
    start = logits.new_zeros(len(logits), 1)
    scores = torch.cat([start, logits], dim=1)
    has_wrong = wrong.any(dim=1, keepdim=True)
    terms = torch.cat([has_wrong, correct], dim=1)
    counted = torch.cat([torch.ones_like(has_wrong), correct], dim=1)
    so_far = torch.where(counted, scores, lowest).logcumsumexp(dim=1)
    against = torch.where(wrong, logits + margin, lowest).logsumexp(dim=1, keepdim=True)
    losses = torch.where(terms, torch.logaddexp(so_far, against) - scores, 0)
    return losses.sum(dim=1) / terms.sum(dim=1).clamp(min=1)
