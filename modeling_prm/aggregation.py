"""From the probabilities of a solution's steps to one score, and to the first step that is wrong.

aggregate([0.95, 0.90, 0.30, 0.85], "min")  # 0.3
first_error([0.95, 0.90, 0.30, 0.85], threshold=0.5)  # 2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .configuration_prm import AGGREGATIONS

_ALIASES = {"prod": "product"}


def check_aggregation(method: str) -> str:
    """The method's full name.

    Raises:
        TypeError: it is not named by a string.
        ValueError: there is no such method.
    """
    if not isinstance(method, str):
        raise TypeError(f"an aggregation is named by a string such as 'min', got {type(method).__name__}")
    name = _ALIASES.get(method, method)
    if name not in AGGREGATIONS:
        raise ValueError(f"there is no aggregation {method!r}; choose one of {', '.join(map(repr, AGGREGATIONS))}")
    return name


def aggregate(
    step_probs: torch.Tensor | Sequence[float],
    method: str = "min",
    *,
    mask: torch.Tensor | None = None,
    weights: torch.Tensor | Sequence[float] | None = None,
    decay: float = 0.9,
) -> Any:
    """One score for a solution out of its steps' probabilities of being correct.

    | method | score | |
    | --- | --- | --- |
    | `min` | the lowest | Lightman et al., 2305.20050; the score of a chain by its weakest step |
    | `product`, `prod` | p_1 · p_2 · ... | 2305.20050; the chance that all are right; prefers few steps |
    | `last` | the last | 2312.08935; for models trained on Monte Carlo estimates |
    | `mean` | arithmetic mean | |
    | `weighted_mean` | sum of w_i p_i | the weights are divided by their sum |
    | `max` | the highest | |
    | `geometric_mean` | (p_1 · p_2 · ...)^(1 / S) | the product without its preference for few steps |

    Everything is computed in float64, products as sums of logarithms, so that long solutions lose nothing on the
    way. A score below what the dtype that is returned can hold (1e-45 in float32, 1e-323 in float64) is 0.

    Args:
        step_probs: one solution's probabilities as a list or a tensor (S,), or (B, S) with `mask`. Tensors are
            differentiable; where a probability is 0, `product` and `geometric_mean` are 0 and their gradient is 0.
        method: one of the table.
        mask: bool, of the shape of `step_probs`, True where there is a step; all by default. What lies where
            there is none, in `step_probs` and in `weights`, is not read.
        weights: for `weighted_mean`, (S,) or (B, S), not negative. By default `decay ** i` for the i-th step,
            so that later steps, which stand on earlier ones, count less.
        decay: between 0 (excluded) and 1.

    Returns:
        A float for a list, otherwise a tensor () or (B,), float64 for float64 and float32 for any other dtype.

    Raises:
        TypeError: a list of something else than numbers.
        ValueError: a solution without a step, a probability outside [0, 1] or NaN, an unknown method, or a mask,
            weights or a decay that do not fit.
    """
    method = check_aggregation(method)
    if weights is not None and method != "weighted_mean":
        raise ValueError(f"weights belong to method='weighted_mean', got method={method!r}; leave them out")
    probs, mask = _as_batch(step_probs, mask)
    if method == "weighted_mean":
        share = _weights(weights, decay, mask)
        scores = (share * probs).sum(dim=1)
    else:
        scores = _UNWEIGHTED[method](probs, mask)
    if not isinstance(step_probs, torch.Tensor):
        return scores.item()
    # Half precision would round a score, and integers would cut it off.
    scores = scores.to(torch.promote_types(step_probs.dtype, torch.float32))
    return scores if step_probs.dim() == 2 else scores[0]


def first_error(
    step_probs: torch.Tensor | Sequence[float], threshold: float = 0.5, *, mask: torch.Tensor | None = None
) -> Any:
    """0-based index of the first step whose probability is below the threshold, -1 where there is none.

    Args:
        step_probs: as in `aggregate`.
        threshold: a step is called wrong where p < threshold; in [0, 1].
        mask: as in `aggregate`.

    Returns:
        An int for a list, otherwise an int64 tensor () or (B,).

    Raises:
        TypeError: a list of something else than numbers.
        ValueError: a solution without a step, or a probability or threshold outside [0, 1] or NaN.
    """
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    probs, mask = _as_batch(step_probs, mask)
    wrong = (probs < threshold) & mask
    index = torch.where(wrong.any(dim=1), wrong.int().argmax(dim=1), -1)
    if not isinstance(step_probs, torch.Tensor):
        return int(index)
    return index if step_probs.dim() == 2 else index[0]


def _as_batch(step_probs: Any, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Checked probabilities (B, S) in float64, 1 where there is no step, and the mask (B, S)."""
    probs = step_probs if isinstance(step_probs, torch.Tensor) else _as_tensor(step_probs)
    if probs.dim() not in (1, 2):
        raise ValueError(f"step_probs must be of shape (S,) or (B, S), got {tuple(probs.shape)}")
    mask = torch.ones_like(probs) if mask is None else torch.as_tensor(mask, device=probs.device)
    if mask.shape != probs.shape:
        raise ValueError(f"mask of shape {tuple(mask.shape)} does not match step_probs of shape {tuple(probs.shape)}")
    if probs.dim() == 1:
        probs, mask = probs.unsqueeze(0), mask.unsqueeze(0)
    mask = mask.bool()
    probs = probs.double().masked_fill(~mask, 1.0)
    if not bool(mask.any(dim=1).all()):
        empty = int((~mask.any(dim=1)).int().argmax()) if mask.shape[1] else 0
        raise ValueError(f"solution {empty} has no step, so there is nothing to aggregate; leave it out")
    bad = ~((probs >= 0) & (probs <= 1))
    if bool(bad.any()):
        row, step = bad.nonzero()[0].tolist()
        raise ValueError(
            f"step {step + 1} of solution {row} has probability {probs[row, step].item()}; probabilities lie in [0, 1]"
        )
    return probs, mask


def _as_tensor(step_probs: Any) -> torch.Tensor:
    try:
        if isinstance(step_probs, str):
            raise TypeError
        return torch.tensor([float(prob) for prob in step_probs], dtype=torch.float64)
    except (TypeError, ValueError):
        raise TypeError(
            f"step_probs must be the probabilities of one solution, or a tensor (S,) or (B, S), got {step_probs!r:.80}"
        ) from None


def _log_sum(probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of logarithms (B,) and, apart, where a probability is 0 and has none."""
    is_zero = probs == 0
    return probs.masked_fill(is_zero, 1.0).log().sum(dim=1), is_zero.any(dim=1)


def _product(probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    log_sum, has_zero = _log_sum(probs)
    return log_sum.exp().masked_fill(has_zero, 0.0)


def _geometric_mean(probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    log_sum, has_zero = _log_sum(probs)
    return (log_sum / mask.sum(dim=1)).exp().masked_fill(has_zero, 0.0)


def _last(probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    index = torch.arange(mask.shape[1], device=mask.device).masked_fill(~mask, -1).amax(dim=1, keepdim=True)
    return probs.gather(1, index).squeeze(1)


def _mean(probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (probs * mask).sum(dim=1) / mask.sum(dim=1)


# Where there is no step, `probs` is 1, which leaves a product as it is. For an extreme it is moved out of reach: a
# place that ties with a step would take a part of its gradient.
_UNWEIGHTED = {
    "min": lambda probs, mask: probs.masked_fill(~mask, 2.0).amin(dim=1),
    "max": lambda probs, mask: probs.masked_fill(~mask, -1.0).amax(dim=1),
    "product": _product,
    "geometric_mean": _geometric_mean,
    "last": _last,
    "mean": _mean,
}


def _weights(weights: Any, decay: float, mask: torch.Tensor) -> torch.Tensor:
    """Weights (B, S) in float64 that sum to 1 over the steps of each solution."""
    if weights is None:
        if not 0.0 < decay <= 1.0:
            raise ValueError(f"decay must be above 0 and at most 1, got {decay}")
        order = mask.cumsum(dim=1) - 1
        given = torch.full_like(order, decay, dtype=torch.float64) ** order
    else:
        given = torch.as_tensor(weights, dtype=torch.float64, device=mask.device)
        if given.shape not in (mask.shape, mask.shape[1:]):
            raise ValueError(
                f"weights of shape {tuple(given.shape)} do not match {mask.shape[0]} solutions of {mask.shape[1]} "
                "steps; give one weight a step"
            )
    given = given.expand(mask.shape).masked_fill(~mask, 0.0)
    if not bool(((given >= 0) & given.isfinite()).all()):
        raise ValueError("weights must be finite and not negative")
    total = given.sum(dim=1, keepdim=True)
    if not bool((total > 0).all()):
        raise ValueError("the weights of a solution's steps sum to 0; at least one must be positive")
    return given / total
