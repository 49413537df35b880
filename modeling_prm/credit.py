"""From the probabilities of a solution's steps to a reward for each step, and on to the tokens.

With each of the functions for credit a solution's reward is the sum of its steps' rewards.

    sum_credit([0.9, 0.2, 0.8])  # [0.9, 0.2, 0.8]
    min_form_credit([0.9, 0.2, 0.8], temperature=0.1)  # [0.001, 0.199, 0.002]: about 0.2, the lowest, in all
    first_error_credit([0.9, 0.2, 0.8], prefix_reward=0.5)  # [0.5, 0.0, 0.0]
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .aggregation import first_error
from .step_splitting import split_steps

Values = torch.Tensor | Sequence[float]
StepStyle = str | Callable[[str], list[str]]


def sum_credit(step_values: Values, *, mask: torch.Tensor | None = None) -> Any:
    """Each step gets its own value, r_i = v_i: the plain sum.

    With probabilities every further step adds to the sum, and a policy is paid for writing more of them (2504.15275
    finds that this form invites reward hacking); `mean_credit` and `min_form_credit` do not grow with their number.

    Args:
        step_values: finite numbers, usually the probabilities that the steps are correct: one solution's as a list
            or a tensor (S,), or (B, S) with `mask`. Tensors are differentiable.
        mask: bool, of the shape of `step_values`, True where there is a step; all by default.

    Returns:
        A list of S floats for a list, otherwise a tensor of the shape and dtype of `step_values`; 0 where there
        is no step. Computed in float64.

    Raises:
        ValueError: a solution without a step, a value that is not finite, or shapes that do not fit.
    """
    values, mask = _as_batch(step_values, mask)
    return _like(values, step_values)


def mean_credit(step_values: Values, *, mask: torch.Tensor | None = None) -> Any:
    """Each step gets its share of the mean, r_i = v_i / S. Arguments, result and errors as for `sum_credit`."""
    values, mask = _as_batch(step_values, mask)
    return _like(values / mask.sum(dim=1, keepdim=True), step_values)


def min_form_credit(step_values: Values, *, temperature: float = 0.1, mask: torch.Tensor | None = None) -> Any:
    """The lowest step decides: r_i = w_i v_i with w = softmax(-v / T) over the steps (PURE, 2504.15275).

    The rewards sum to a soft minimum: the mean as T grows, the minimum as T goes to 0 (equal lowest steps share it).

    PURE's code takes v = P(correct) - P(wrong) = 2 p - 1 and T = 0.1. Its weights are those of v = p at T = 0.05,
    and its sum is then twice this one minus 1, which a trainer that compares with a group's mean and divides by
    its standard deviation does not notice. For its rewards step by step give `2 * step_probs - 1` as values.

    Args:
        step_values: as for `sum_credit`; any finite numbers.
        temperature: T, above 0, in the units of the values.
        mask: as for `sum_credit`.

    Returns:
        As `sum_credit`.

    Raises:
        ValueError: as `sum_credit`, or a temperature that is not above 0 and finite.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}; for the minimum take 0.001")
    values, mask = _as_batch(step_values, mask)
    weights = torch.softmax((-values / temperature).masked_fill(~mask, -torch.inf), dim=1)
    return _like(weights * values, step_values)


def first_error_credit(
    step_probs: Values,
    *,
    threshold: float = 0.5,
    prefix_reward: float = 0.5,
    penalty: float = 0.0,
    spread: bool = False,
    is_correct: bool | Sequence[bool] | torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> Any:
    """Credit only for the good prefix, the steps before the first one with p < threshold.

    The probabilities do nothing but find that step:

    | solution | reward | on which step |
    | --- | --- | --- |
    | correct | 1 | the last |
    | wrong, with a good prefix | `prefix_reward` | the last of the prefix |
    | wrong from the first step on | 0 | |

    The first wrong step gets `penalty`, all others 0. A wrong solution in which no step is below the threshold is
    a good prefix to its end. This is the reward of VPPO (2601.18984) as summaries of the paper give it, with
    `prefix_reward` for its alpha and, by default, no penalty but what a trainer's baseline makes of 0. VPPO knows
    by the final answer which solutions are correct, so give `is_correct` to follow it; it also cuts some tokens off
    the end of the prefix, against steps that are split up to earn more, and takes a baseline by tokens: both
    belong to the trainer and are not done here.

    Args:
        step_probs: as for `sum_credit`, but in [0, 1].
        threshold: a step is called wrong where p < threshold.
        prefix_reward: in [0, 1].
        penalty: at most 0.
        spread: share the reward of the prefix, or of the solution, so that each of its steps gets 1 / S of it and
            the solution's reward grows with the share of steps before the first error: for trainers that
            take one number a solution.
        is_correct: whether the solution is correct: a bool, or B of them for (B, S). By default it is where no
            step is below the threshold.
        mask: as for `sum_credit`.

    Returns:
        As `sum_credit`.

    Raises:
        ValueError: as `sum_credit`, a probability outside [0, 1], or an option outside its range.
    """
    if not 0.0 <= prefix_reward <= 1.0:
        raise ValueError(f"prefix_reward must lie in [0, 1], got {prefix_reward}; a correct solution gets 1")
    if not (penalty <= 0.0 and math.isfinite(penalty)):
        raise ValueError(f"penalty must be finite and at most 0, got {penalty}; it is added, not subtracted")
    probs, mask = _as_batch(step_probs, mask)
    found = first_error(probs, threshold, mask=mask).unsqueeze(1)
    correct = found < 0 if is_correct is None else _as_column(is_correct, mask)
    order = torch.where(mask, mask.cumsum(dim=1) - 1, -1)
    error = order.gather(1, found.clamp(min=0))
    count = mask.sum(dim=1, keepdim=True)
    # The number of steps that earn credit: all of a correct solution, otherwise those before the first error.
    credited = torch.where(correct | (found < 0), count, error)
    total = torch.where(correct, 1.0, torch.full_like(probs[:, :1], prefix_reward))
    rewards = total / count * (order < credited) if spread else total * (order == credited - 1)
    rewards = rewards + penalty * (~correct & (found >= 0) & (order == error))
    return _like(rewards * mask, step_probs)


@dataclass(frozen=True, kw_only=True)
class StepRewards:
    """The rewards of one completion's S steps.

    Args:
        text: the text that was scored; of a conversation, what the assistant wrote.
        steps: the S steps as they were scored.
        step_probs: S probabilities that the steps are correct; empty where the completion was not scored.
        rewards: S rewards; empty where it was not scored.
        spans: S pairs (start, end) of characters, so that `text[start:end]` is the step; with step markers that
            the model is not shown, its marker too.
        reward: the reward of the whole completion, the sum of `rewards`; where it was not scored, what was
            asked for in that case.
        error: why it was not scored.
    """

    text: str
    steps: tuple[str, ...]
    step_probs: tuple[float, ...]
    rewards: tuple[float, ...]
    spans: tuple[tuple[int, int], ...]
    reward: float | None
    error: str | None = None


def place_on_tokens(step_rewards: StepRewards, offsets: Sequence[tuple[int, int]]) -> list[float]:
    """A reward for each token of a completion: a step's reward on the last token that holds some of it, 0 elsewhere.

    Where two steps end in one token it gets both, so that the rewards' sum stays. The tokens that a policy sampled
    need not be those that the tokenizer makes of the text; for them take `place_on_sampled_tokens`.

    Args:
        step_rewards: from `PRMReward.step_rewards`.
        offsets: L pairs (start, end) of characters in `step_rewards.text`, as a fast tokenizer gives them with
            `return_offsets_mapping=True`; (0, 0) for special tokens.

    Returns:
        L rewards.

    Raises:
        ValueError: the tokens end before a step does.
    """
    token_rewards = [0.0] * len(offsets)
    for reward, (start, end) in zip(step_rewards.rewards, step_rewards.spans, strict=True):
        inside = [index for index, (left, right) in enumerate(offsets) if left < end and right > start]
        if not inside or max(right for _, right in offsets) < end:
            raise ValueError(
                f"a step ends at character {end}, the tokens at {max((right for _, right in offsets), default=0)}; "
                "give the offsets of the whole completion"
            )
        token_rewards[inside[-1]] += reward
    return token_rewards


def place_on_sampled_tokens(step_rewards: StepRewards, token_ids: Sequence[int], tokenizer: Any) -> list[float]:
    """As `place_on_tokens`, for the tokens that a policy sampled: a step's reward on the token that completes it.

    Args:
        step_rewards: from `PRMReward.step_rewards`.
        token_ids: the L ids of the completion, as TRL hands them over in `completion_ids`.
        tokenizer: the policy's, fast or not.

    Returns:
        L rewards.

    Raises:
        ValueError: the ids do not decode to `step_rewards.text`.
    """
    ids, text = list(token_ids), step_rewards.text

    def decoded(count: int) -> str:
        return tokenizer.decode(ids[:count], skip_special_tokens=True)

    if decoded(len(ids)) != text:
        raise ValueError(f"the token ids decode to {decoded(len(ids))!r:.80}, not to the text scored, {text!r:.80}")
    token_rewards = [0.0] * len(ids)
    count = 1
    for reward, (_, end) in zip(step_rewards.rewards, step_rewards.spans, strict=True):

        def is_complete(count: int, end: int = end) -> bool:
            return decoded(count)[:end] == text[:end]

        # Decoding beginnings tells where a step ends whatever the tokens are; halving keeps it to a few.
        count += bisect.bisect_left(range(count, len(ids)), True, key=is_complete)
        token_rewards[count - 1] += reward
    return token_rewards


def find_steps(text: str, steps: Sequence[str], step_style: StepStyle) -> tuple[tuple[int, int], ...]:
    """Where each step stands in the text that it was cut from: pairs (start, end) of characters.

    Raises:
        ValueError: a step does not stand in the text.
    """
    # `split_steps` cuts a text with plain line ends; `origin` leads from its characters back to the given ones.
    plain = text if callable(step_style) else text.replace("\r\n", "\n")
    origin = [i for i in range(len(text)) if plain == text or text[i : i + 2] != "\r\n"]
    pieces = steps if callable(step_style) else split_steps(text, step_style)
    spans: list[tuple[int, int]] = []
    cursor = 0
    remaining = iter(pieces)
    for number, step in enumerate(steps, start=1):
        # A verifier that leaves out markers gives the end of a piece, and nothing for a marker alone.
        piece = next((piece for piece in remaining if piece.endswith(step)), None)
        start = -1 if piece is None else plain.find(piece, cursor)
        if piece is None or start < 0:
            raise ValueError(
                f"step {number}, {step!r:.60}, does not stand in the completion after the steps before it; rewards "
                "can be placed only where the steps are parts of the text"
            )
        cursor = start + len(piece)
        spans.append((origin[start], origin[cursor - 1] + 1))
    return tuple(spans)


def _as_batch(step_values: Values, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Checked values (B, S) in float64, 0 where there is no step, and the mask (B, S)."""
    if isinstance(step_values, torch.Tensor):
        values = step_values
    else:
        values = torch.tensor(list(step_values), dtype=torch.float64)
    if values.dim() not in (1, 2):
        raise ValueError(f"the steps' values must be of shape (S,) or (B, S), got {tuple(values.shape)}")
    if mask is None:
        mask = torch.ones_like(values, dtype=torch.bool)
    elif mask.shape != values.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be bool of shape {tuple(values.shape)} as the values, got {mask.dtype} {tuple(mask.shape)}"
        )
    if values.dim() == 1:
        values, mask = values.unsqueeze(0), mask.unsqueeze(0)
    values = values.double().masked_fill(~mask, 0.0)
    has_step = mask.any(dim=1)
    if not bool(has_step.all()):
        raise ValueError(f"solution {int((~has_step).int().argmax())} has no step to give credit to; leave it out")
    if not bool(values.isfinite().all()):
        row, step = (~values.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"step {step + 1} of solution {row} has the value {values[row, step].item()}; it must be finite"
        )
    return values, mask


def _like(rewards: torch.Tensor, given: Values) -> Any:
    """Rewards (B, S) in the form, shape and dtype of what was given."""
    if not isinstance(given, torch.Tensor):
        return rewards[0].tolist()
    return (rewards if given.dim() == 2 else rewards[0]).to(given.dtype)


def _as_column(is_correct: bool | Sequence[bool] | torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    column = torch.as_tensor(is_correct, device=mask.device)
    if column.dtype != torch.bool or column.numel() != mask.shape[0]:
        raise ValueError(
            f"is_correct must hold a bool for each of {mask.shape[0]} solutions, got {column.numel()} of {column.dtype}"
        )
    return column.reshape(-1, 1)
