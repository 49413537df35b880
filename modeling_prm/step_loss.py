"""Masked losses over step labels."""

from __future__ import annotations

import torch
from torch.nn import functional as F

IGNORED_LABEL = -100.0


def step_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """The sum of the labelled steps' losses divided by their number.

    One logit a step gives binary cross-entropy `-y log s(z) - (1 - y) log(1 - s(z))` with the sigmoid s,
    which is exact for soft labels too; K logits a step give cross-entropy with the label as class index.

    Args:
        logits: `(B, S)`, or `(B, S, K)` for K classes; computed in float32.
        labels: `(B, S)`, -100 where ignored; otherwise in [0, 1] (1 correct, 0 incorrect, between them a
            soft label), or the class index 0 to K-1.
        num_items_in_batch: number of labelled steps in the whole optimizer step, which makes the sum over
            its micro-batches and processes the mean over its labelled steps. By default the number in
            these labels.

    Returns:
        A float32 scalar; 0 with a gradient of 0 where no step is labelled.

    Raises:
        TypeError: the labels are booleans.
    """
    if labels.dtype == torch.bool:
        raise TypeError("labels must be numbers: as booleans they have lost the -100 of ignored steps; use floats")
    logits = logits.float()
    labels = labels.to(logits.device)
    labelled = labels != IGNORED_LABEL
    if logits.dim() == labels.dim():
        targets = torch.where(labelled, labels, 0).to(logits.dtype)
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    else:
        targets = torch.where(labelled, labels, 0).long()
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    total = torch.where(labelled, losses, 0).sum()
    if num_items_in_batch is None:
        num_items_in_batch = labelled.sum()
    if not isinstance(num_items_in_batch, torch.Tensor):
        return total / max(num_items_in_batch, 1)
    return total / num_items_in_batch.to(total.device).clamp(min=1)
