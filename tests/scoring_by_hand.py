"""What the tests of scoring share: solutions, their probabilities by hand, and what the model was given."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from modeling_prm import PRMForStepScoring, PRMProcessor

PROBLEM = "What is 12 + 30?"
# Lengths are mixed and in no order; the second has more steps than the others, the fourth longer ones.
SOLUTIONS = [
    ["12 + 30 = 42.", "So the answer is 42."],
    ["the quick", "brown fox", "jumps", "over", "the lazy dog", "again and again."],
    ["It is 7."],
    ["Ann has 3 apples. 3 * 4 = 12. It is (12) {x} [y].", "the quick brown fox jumps over the lazy dog, again."],
    ["12 + 30 = 43.", "So the answer is 43.", "It is (43)."],
]


def by_hand(model: PRMForStepScoring, processor: PRMProcessor, problem: str, steps: list[str]) -> list[float]:
    """Each step's probability from the backbone's last states and the linear head, one solution at a time."""
    inputs = processor(problem, steps)
    with torch.no_grad():
        hidden = model.backbone(input_ids=torch.tensor(inputs["input_ids"])).last_hidden_state[0].float()
    weight, bias = model.value_head.out.weight.detach().float(), model.value_head.out.bias.detach().float()
    logits = [float(hidden[position] @ weight[0] + bias[0]) for position in inputs["step_positions"][0]]
    return [1.0 / (1.0 + math.exp(-logit)) for logit in logits]


def shapes_seen(model: PRMForStepScoring, call: Callable[[], Any]) -> list[tuple[int, int]]:
    """Shapes of the ids that the model is given during a call."""
    seen: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        call()
    finally:
        hook.remove()
    return seen
