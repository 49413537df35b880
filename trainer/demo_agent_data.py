"""A small world for agents, with a lookup table and a calculator, whose right and wrong turns are known.

A task asks for the price of some pieces of an item. A right trajectory looks the item's price up, multiplies it by the
number of pieces, and says the product. A policy that slips looks up another item, multiplies other numbers, or says
another product. A turn is right if it is what the question and the results before it call for, so that a turn that
builds properly on a wrong result is right; the outcome is right if the last number is the true price.
"""

from __future__ import annotations

import random
from typing import Any

ITEMS, MOST_PIECES = 20, 9
TOOLS = (
    {"name": "lookup", "description": "The price of an item", "parameters": {"item": "integer"}},
    {"name": "multiply", "description": "The product of two numbers", "parameters": {"a": "integer", "b": "integer"}},
)
SLIP = 0.25
"""How often a turn slips."""


def price_table(seed: int) -> list[int]:
    """Prices from 2 to 10 of the items."""
    rng = random.Random(f"prices {seed}")
    return [rng.randint(2, 10) for _ in range(ITEMS)]


def tasks(count: int, *, seed: int, split: str) -> list[tuple[int, int]]:
    """Pairs of item and pieces; those of the split "eval" are none of "train"."""
    rng = random.Random(f"{split} {seed}")
    every = [(item, pieces) for item in range(ITEMS) for pieces in range(2, MOST_PIECES + 1)]
    mine = [task for number, task in enumerate(every) if (number % 5 == 0) == (split == "eval")]
    return [rng.choice(mine) for _ in range(count)]


def rollout(task: tuple[int, int], prices: list[int], rng: random.Random) -> dict[str, Any]:
    """One trajectory: its messages, a label (1 or -1) for each of its three turns, and whether its outcome is right."""
    item, pieces = task
    asked = _slip(item, 0, ITEMS - 1, rng)
    price = prices[asked]
    first, second = pieces, price
    if rng.random() < SLIP:
        if rng.random() < 0.5:
            first = _other(pieces, 2, MOST_PIECES, rng)
        else:
            second = _other(price, 2, 10, rng)
    product = first * second
    said = _slip(product, 4, 90, rng)
    messages = [
        {"role": "user", "content": f"What do {pieces} of item {item} cost?"},
        _call("lookup", item=asked),
        {"role": "tool", "content": str(price)},
        _call("multiply", a=first, b=second),
        {"role": "tool", "content": str(product)},
        {"role": "assistant", "content": f"They cost {said}."},
    ]
    right = (asked == item, (first, second) == (pieces, price), said == product)
    return {
        "messages": messages,
        "labels": [1 if turn else -1 for turn in right],
        "outcome": said == pieces * prices[item],
    }


def rollouts(count: int, *, seed: int, split: str) -> list[dict[str, Any]]:
    """Trajectories, one of each of `count` tasks; the same seed gives the same."""
    prices, rng = price_table(seed), random.Random(f"rollouts {split} {seed}")
    return [rollout(task, prices, rng) for task in tasks(count, seed=seed, split=split)]


def _call(name: str, **arguments: int) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


def _slip(value: int, low: int, high: int, rng: random.Random) -> int:
    return _other(value, low, high, rng) if rng.random() < SLIP else value


def _other(value: int, low: int, high: int, rng: random.Random) -> int:
    return rng.choice([number for number in range(low, high + 1) if number != value])
