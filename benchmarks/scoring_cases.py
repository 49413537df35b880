"""What the scoring benchmark scores: problems and solutions of given lengths, made of words."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modeling_prm.step_generation import ProposedStep

WORDS = [
    *("the", "sum", "of", "three", "numbers", "is", "twelve", "and", "each", "apple", "costs", "four", "dollars"),
    *("so", "we", "add", "them", "first", "then", "divide", "by", "two", "which", "gives", "a", "total", "after"),
    *("that", "subtract", "seven", "from", "both", "sides", "because", "every", "box", "holds", "nine", "marbles"),
]
STEP_TOKENS = 20


@dataclass(frozen=True)
class Case:
    """N problems with their N solutions; for a search, one problem and none."""

    name: str
    problems: list[str]
    solutions: list[list[str]]
    beams: int = 0
    steps: int = 0


def make_case(name: str, processor: Any, *, bulk: int, seed: int) -> Case:
    """A case by its name; lengths are those of the processor's tokens, within a few.

    `short`, `long` and `very-long`: 16 solutions to a problem of 67 tokens, 16 to one of 600 and 64 to one of 1,000.
    `mixed`: 32 solutions of 20 to 600 tokens, each to a problem of its own. `beam`: a search of 8 beams by 20 steps.
    `bulk`: as many solutions as said, four to a problem.
    """
    rng = random.Random(seed)
    if name in ("short", "long", "very-long"):
        length, count = {"short": (67, 16), "long": (600, 16), "very-long": (1000, 64)}[name]
        problem = _problem(rng, processor, length)
        return Case(name, [problem] * count, [_solution(rng, rng.randint(80, 260)) for _ in range(count)])
    if name == "mixed":
        problems = [_problem(rng, processor, rng.randint(30, 120)) for _ in range(32)]
        return Case(name, problems, [_solution(rng, round(20 * 30 ** rng.random())) for _ in problems])
    if name == "beam":
        return Case(name, [_problem(rng, processor, 67)], [], beams=8, steps=20)
    if name == "bulk":
        problems = [text for _ in range(bulk // 4) for text in [_problem(rng, processor, rng.randint(40, 120))] * 4]
        return Case(name, problems, [_solution(rng, rng.randint(80, 260)) for _ in problems])
    raise ValueError(f"there is no case {name!r}")


def propose(problem: str, prefixes: Sequence[Sequence[str]], n: int) -> list[list[ProposedStep]]:
    """Four ways to go on a prefix, always the same: a step generator that takes no time."""
    proposals = []
    for prefix in prefixes:
        rng = random.Random("|".join(prefix))
        proposals.append([ProposedStep(_words(rng, STEP_TOKENS - 6), STEP_TOKENS, False) for _ in range(n)])
    return proposals


def distinct_tokens(encoded: Sequence[Any]) -> int:
    """How many tokens there are where what sequences begin with counts once."""
    prefixes = {hash(tuple(item.input_ids[: end + 1])) for item in encoded for end in range(len(item.input_ids))}
    return len(prefixes)


def _problem(rng: random.Random, processor: Any, tokens: int) -> str:
    words: list[str] = []
    while len(processor.tokenizer(" ".join(words))["input_ids"]) < tokens - 5:
        words.append(rng.choice(WORDS))
    return " ".join(words)


def _solution(rng: random.Random, tokens: int) -> list[str]:
    steps = max(1, round(tokens / STEP_TOKENS))
    return [_words(rng, max(1, tokens // steps - 6)) for _ in range(steps)]


def _words(rng: random.Random, count: int) -> str:
    # The first words differ more than others do, as those of sampled steps of one model do not: nothing is shared here.
    return " ".join([str(rng.randint(10, 99)), *rng.choices(WORDS, k=count - 1)])
