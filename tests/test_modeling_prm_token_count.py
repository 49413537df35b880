"""How many tokens scoring computes against how many there are: counts, not times, so that waste cannot creep in."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from modeling_prm import PRMForStepScoring, PRMProcessor

MakePRM = Callable[..., tuple[PRMForStepScoring, PRMProcessor]]
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "again", "12", "30", "42", "is", "apples"]


def text(generator: random.Random, words: int) -> str:
    return " ".join(generator.choices(WORDS, k=words))


class Count:
    """What a model is given: tokens, tokens with padding, passes, and how many tokens its head reads."""

    def __init__(self, model: PRMForStepScoring) -> None:
        self.tokens = self.padded = self.passes = self.head = 0
        model.register_forward_pre_hook(self._look, with_kwargs=True)
        model.value_head.register_forward_pre_hook(self._look_at_head)

    def _look(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.passes += 1
        self.padded += kwargs["input_ids"].numel()
        # Padding has the place of the last token before it.
        self.tokens += sum(len(set(row)) for row in kwargs["position_ids"].tolist())

    def _look_at_head(self, module: Any, args: Any) -> None:
        self.head += args[0].shape[:-1].numel()


def distinct_tokens(processor: PRMProcessor, problems: list[str], solutions: list[list[str]]) -> int:
    """The ideal: every token that comes after other tokens, once."""
    prefixes = set()
    for item in processor.encode(problems, solutions):
        prefixes |= {tuple(item.input_ids[: end + 1]) for end in range(len(item.input_ids))}
    return len(prefixes)


def count(make_prm: MakePRM, problems: list[str], solutions: list[list[str]], **options: Any) -> tuple[Count, int]:
    model, processor = make_prm("llama")
    counted = Count(model)
    model.verifier(processor).score_solutions(problems, solutions, **options)
    return counted, distinct_tokens(processor, problems, solutions)


def test_solutions_of_one_problem_compute_it_once(make_prm: MakePRM) -> None:
    generator = random.Random(0)
    problem = text(generator, 30)
    # First words that differ, so that nothing but the problem is shared.
    solutions = [[f"{word} {text(generator, 5)}", text(generator, 4)] for word in WORDS]
    counted, ideal = count(make_prm, [problem] * len(WORDS), solutions)
    assert counted.tokens <= ideal + len(WORDS)
    assert counted.passes == 2
    # The head reads one place a step; what it pads is less than as much again.
    assert counted.head <= 2 * 2 * len(WORDS)


def test_solutions_that_share_first_steps_compute_them_once(make_prm: MakePRM) -> None:
    generator = random.Random(1)
    problem, steps = text(generator, 20), [text(generator, 9) for _ in range(4)]
    solutions = [[*steps[:shared], f"{word} {text(generator, 3)}"] for shared in (0, 1, 2, 3, 4) for word in WORDS[:4]]
    counted, ideal = count(make_prm, [problem] * len(solutions), solutions)
    read = sum(len(item.input_ids) for item in make_prm("llama")[1].encode([problem] * len(solutions), solutions))
    assert read > 4 * ideal
    assert counted.tokens <= 1.05 * ideal


def test_many_problems_in_bulk(make_prm: MakePRM) -> None:
    generator = random.Random(2)
    problems, solutions = [], []
    for _ in range(80):
        problem = text(generator, generator.randint(10, 25))
        for _ in range(generator.randint(1, 8)):
            problems.append(problem)
            solutions.append([text(generator, generator.randint(3, 12)) for _ in range(generator.randint(1, 3))])
    order = generator.sample(range(len(problems)), len(problems))
    problems, solutions = [problems[i] for i in order], [solutions[i] for i in order]
    counted, ideal = count(make_prm, problems, solutions, max_tokens_per_batch=512)
    assert counted.tokens <= 1.05 * ideal
    # Padding, and passes that are not full.
    assert counted.padded <= 1.12 * counted.tokens
    assert counted.passes <= 1.35 * counted.padded / 512


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_what_shares_nothing_is_computed_once_too(family: str, make_prm: MakePRM) -> None:
    generator = random.Random(3)
    model, processor = make_prm(family)
    problems = [f"{10 + i} {text(generator, 3)}" for i in range(90)]
    solutions = [[text(generator, generator.randint(1, 20))] for _ in problems]
    read = sum(len(item.input_ids) for item in processor.encode(problems, solutions))
    padded: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: padded.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    model.verifier(processor).score_solutions(problems, solutions, max_tokens_per_batch=256)
    assert sum(padded) <= 1.1 * read
