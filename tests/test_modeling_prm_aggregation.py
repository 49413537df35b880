"""From step probabilities to one score and to the first error: every method by hand, masks, gradients, mistakes."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import Any

import pytest
import torch

from modeling_prm.aggregation import aggregate, check_aggregation, first_error
from modeling_prm.configuration_prm import AGGREGATIONS

PROBS = [0.95, 0.90, 0.30, 0.85]
# 0.95 · 0.90 = 0.855, · 0.30 = 0.2565, · 0.85 = 0.218025. The sum is 3.
# With the weights 1, 0.9, 0.81, 0.729: 0.95 + 0.81 + 0.243 + 0.61965 = 2.62265, over their sum 3.439.
BY_HAND = {
    "min": 0.30,
    "product": 0.218025,
    "last": 0.85,
    "mean": 0.75,
    "weighted_mean": 2.62265 / 3.439,
    "max": 0.95,
    "geometric_mean": math.sqrt(math.sqrt(0.218025)),
}


def test_every_method_has_a_value_by_hand() -> None:
    assert BY_HAND.keys() == set(AGGREGATIONS)


@pytest.mark.parametrize(("method", "expected"), [*BY_HAND.items(), ("prod", 0.218025)])
def test_by_hand(method: str, expected: float) -> None:
    score = aggregate(PROBS, method)
    assert type(score) is float
    assert score == pytest.approx(expected, rel=1e-12)
    for dtype, rel in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        tensor = aggregate(torch.tensor(PROBS, dtype=dtype), method)
        assert (tensor.dtype, tensor.shape) == (dtype, ())
        assert tensor.item() == pytest.approx(expected, rel=rel)


def test_the_worked_check_to_three_decimals() -> None:
    assert [f"{aggregate(PROBS, method):.3f}" for method in ("min", "prod", "last", "mean")] == [
        *("0.300", "0.218", "0.850", "0.750")
    ]
    assert aggregate(PROBS) == 0.30


def test_weights() -> None:
    # (1 · 0.5 + 3 · 0.9) / 4 = 0.8, whatever the weights' own sum.
    assert aggregate([0.5, 0.9], "weighted_mean", weights=[1, 3]) == pytest.approx(0.8, rel=1e-12)
    assert aggregate([0.5, 0.9], "weighted_mean", weights=[0.1, 0.3]) == pytest.approx(0.8, rel=1e-12)
    # The first step alone, and by decay 0.5: (0.5 + 0.45) / 1.5.
    assert aggregate([0.5, 0.9], "weighted_mean", weights=[2, 0]) == 0.5
    assert aggregate([0.5, 0.9], "weighted_mean", decay=0.5) == pytest.approx(0.95 / 1.5, rel=1e-12)
    assert aggregate([0.5, 0.9], "weighted_mean", decay=1.0) == pytest.approx(0.7, rel=1e-12)
    probs = torch.tensor([[0.5, 0.9], [0.2, 0.4]], dtype=torch.float64)
    one_row = aggregate(probs, "weighted_mean", weights=[1.0, 3.0])
    two_rows = aggregate(probs, "weighted_mean", weights=torch.tensor([[1.0, 3.0], [1.0, 0.0]]))
    assert one_row.tolist() == pytest.approx([0.8, 0.35], rel=1e-12)
    assert two_rows.tolist() == pytest.approx([0.8, 0.2], rel=1e-12)


def test_weights_belong_to_steps_where_the_mask_says_so() -> None:
    probs = torch.tensor([[0.5, 0.7, 0.9]], dtype=torch.float64)
    mask = torch.tensor([[True, False, True]])
    nan = float("nan")
    # The middle one is no step: its weight is not read, and by decay the third is the second step.
    given = aggregate(probs, "weighted_mean", mask=mask, weights=[1.0, nan, 3.0])
    assert given.item() == pytest.approx(0.8, rel=1e-12)
    decayed = aggregate(probs, "weighted_mean", mask=mask, decay=0.5)
    assert decayed.item() == pytest.approx(0.95 / 1.5, rel=1e-12)


def test_long_solutions_do_not_underflow() -> None:
    exact = float(Fraction(9, 10) ** 500)
    assert 1e-23 < exact < 2e-23
    assert aggregate([0.9] * 500, "product") == pytest.approx(exact, rel=1e-6)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        probs = torch.full((500,), 0.9, dtype=dtype)
        # What the dtype holds is not quite 0.9, and 500 of it multiply the difference.
        expected = float(Fraction(probs[0].item()) ** 500)
        score = aggregate(probs, "product")
        assert score.item() == pytest.approx(expected, rel=1e-6)
        assert score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_geometric_mean_of_thousands_of_steps() -> None:
    # The product itself, 0.5 ** 2500 · 0.125 ** 2500 = 2 ** -10000, is far below any float.
    probs = [0.5, 0.125] * 2500
    assert aggregate(probs, "geometric_mean") == pytest.approx(0.25, rel=1e-9)
    assert aggregate(torch.tensor(probs), "geometric_mean").item() == pytest.approx(0.25, rel=1e-6)
    assert aggregate(probs, "product") == 0.0


def random_batch(seed: int) -> tuple[list[list[float]], torch.Tensor, torch.Tensor]:
    """Rows of 1 to 7 probabilities, and the same with their places in a padded batch of width 9."""
    generator = random.Random(seed)
    rows, padded, mask = [], [], []
    for _ in range(12):
        probs = [generator.choice([0.0, 1.0, generator.random()]) for _ in range(generator.randint(1, 7))]
        places = sorted(generator.sample(range(9), len(probs))) if seed % 2 else list(range(len(probs)))
        filler = [generator.choice([float("nan"), -1.0, 0.0, 1.0, 7.0, float("inf")]) for _ in range(9)]
        for place, prob in zip(places, probs, strict=True):
            filler[place] = prob
        rows.append(probs)
        padded.append(filler)
        mask.append([place in places for place in range(9)])
    return rows, torch.tensor(padded, dtype=torch.float64), torch.tensor(mask)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("method", AGGREGATIONS)
def test_a_padded_batch_equals_its_rows_alone(method: str, seed: int) -> None:
    """Odd seeds have gaps in the mask, and padding is NaN, infinite, negative and what else there is."""
    rows, padded, mask = random_batch(seed)
    scores = aggregate(padded, method, mask=mask)
    assert scores.tolist() == pytest.approx([aggregate(row, method) for row in rows], rel=1e-12, abs=1e-300)
    first = [next((i for i, p in enumerate(row) if p < 0.4), -1) for row in rows]
    found = first_error(padded, 0.4, mask=mask)
    assert found.dtype == torch.int64
    steps_before = mask.cumsum(dim=1) - 1
    assert [-1 if i < 0 else int(steps_before[r, i]) for r, i in enumerate(found.tolist())] == first


@pytest.mark.parametrize("method", AGGREGATIONS)
def test_gradients(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    probs = (0.05 + 0.9 * torch.rand(3, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    mask = torch.tensor([[True] * 5, [True, True, False, False, False], [False, True, True, False, True]])
    assert torch.autograd.gradcheck(lambda p: aggregate(p, method, mask=mask), (probs,))
    aggregate(probs, method, mask=mask).sum().backward()
    assert bool((probs.grad[~mask] == 0).all())
    assert bool((probs.grad[mask] != 0).any())


@pytest.mark.parametrize("method", AGGREGATIONS)
def test_gradients_at_the_ends_are_finite_and_those_of_the_row_alone(method: str) -> None:
    values = [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0], [1.0, 0.5, 0.0, 0.5]]
    mask = torch.tensor([[True, True, False, False], [True, True, False, False], [True, False, True, False]])
    padded = torch.tensor(values, requires_grad=True)
    aggregate(padded, method, mask=mask).sum().backward()
    assert bool(padded.grad.isfinite().all())
    assert bool((padded.grad[~mask] == 0).all())
    for i in range(3):
        alone = padded.detach()[i][mask[i]].requires_grad_()
        aggregate(alone, method).backward()
        torch.testing.assert_close(padded.grad[i][mask[i]], alone.grad)


def test_the_gradient_of_an_extreme_is_whole_beside_padding() -> None:
    """Padding of the same value as the extreme must not take a share of it."""
    for method, value in (("min", 1.0), ("max", 0.0)):
        probs = torch.tensor([[value, 1.0, 0.0]], requires_grad=True)
        aggregate(probs, method, mask=torch.tensor([[True, False, False]])).sum().backward()
        assert probs.grad.tolist() == [[1.0, 0.0, 0.0]]


def test_integers_and_booleans_are_probabilities_too() -> None:
    assert aggregate([1, 0, 1], "mean") == pytest.approx(2 / 3, rel=1e-12)
    for values in (torch.tensor([1, 0, 1]), torch.tensor([True, False, True])):
        score = aggregate(values, "mean")
        assert (score.dtype, score.item()) == (torch.float32, pytest.approx(2 / 3, rel=1e-6))
    assert first_error([1, 0, 1]) == 1


def test_a_mask_for_one_solution() -> None:
    assert aggregate([0.2, 0.9, 0.8], mask=torch.tensor([False, True, True])) == 0.8
    assert first_error([0.2, 0.9, 0.1], mask=torch.tensor([False, True, True])) == 2
    assert aggregate(torch.tensor([0.25, 0.9]), mask=torch.tensor([True, False])).item() == 0.25


def test_first_error() -> None:
    assert first_error(PROBS) == 2
    assert type(first_error(PROBS)) is int
    assert first_error(PROBS, 0.92) == 1
    assert first_error([0.9, 0.8]) == -1
    # Strictly below.
    assert first_error([0.9, 0.5, 0.4], 0.5) == 2
    assert first_error([0.0, 0.0], 0.0) == -1
    assert first_error([1.0, 0.99], 1.0) == 1
    scalar = first_error(torch.tensor(PROBS))
    assert (scalar.dtype, scalar.shape, scalar.item()) == (torch.int64, (), 2)
    batch = first_error(torch.tensor([[0.9, 0.2, 0.1], [0.9, 0.8, 0.0]]), mask=torch.tensor([[1, 1, 1], [1, 1, 0]]) > 0)
    assert (batch.dtype, batch.tolist()) == (torch.int64, [1, -1])


BATCH = torch.tensor([[0.5, 0.5], [0.5, 0.5]])


@pytest.mark.parametrize(
    ("step_probs", "options", "message"),
    [
        ([], {}, "solution 0 has no step"),
        (torch.zeros(0), {}, "solution 0 has no step"),
        (torch.zeros(2, 0), {}, "solution 0 has no step"),
        (BATCH, {"mask": torch.tensor([[True, False], [False, False]])}, "solution 1 has no step"),
        ([0.5, float("nan")], {}, r"step 2 of solution 0 has probability nan; probabilities lie in \[0, 1\]"),
        ([0.5, 1.5], {}, "step 2 of solution 0 has probability 1.5"),
        ([-0.1], {}, "step 1 of solution 0 has probability -0.1"),
        (torch.tensor([[0.5, 0.5], [0.5, float("inf")]]), {}, "step 2 of solution 1 has probability inf"),
        (torch.zeros(1, 1, 1), {}, r"of shape \(S,\) or \(B, S\), got \(1, 1, 1\)"),
        (torch.tensor(0.5), {}, r"of shape \(S,\) or \(B, S\), got \(\)"),
        (BATCH, {"mask": torch.tensor([True, True])}, r"mask of shape \(2,\) does not match"),
    ],
)
def test_probabilities_that_cannot_be(step_probs: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aggregate(step_probs, **options)
    with pytest.raises(ValueError, match=message):
        first_error(step_probs, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "median"}, "there is no aggregation 'median'; choose one of 'min', 'product', .*'geometric_mean'"),
        ({"weights": [1.0, 1.0]}, "weights belong to method='weighted_mean', got method='min'"),
        ({"method": "weighted_mean", "weights": [1.0]}, r"weights of shape \(1,\) do not match 2 solutions of 2 steps"),
        ({"method": "weighted_mean", "weights": [[1.0, 1.0]]}, r"weights of shape \(1, 2\) do not match"),
        ({"method": "weighted_mean", "weights": [1.0, -1.0]}, "finite and not negative"),
        ({"method": "weighted_mean", "weights": [1.0, float("inf")]}, "finite and not negative"),
        ({"method": "weighted_mean", "weights": [1.0, float("nan")]}, "finite and not negative"),
        ({"method": "weighted_mean", "weights": [[1.0, 1.0], [0.0, 0.0]]}, "sum to 0"),
        ({"method": "weighted_mean", "weights": [0.0, 1.0], "mask": torch.tensor([[True, False]] * 2)}, "sum to 0"),
        ({"method": "weighted_mean", "decay": 0.0}, "decay must be above 0 and at most 1, got 0.0"),
        ({"method": "weighted_mean", "decay": 1.1}, "got 1.1"),
        ({"method": "weighted_mean", "decay": float("nan")}, "got nan"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aggregate(BATCH, **options)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_thresholds_that_cannot_be(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got"):
        first_error([0.5], threshold)


@pytest.mark.parametrize(
    "step_probs", [0.5, None, [None], [[0.5], [0.6]], "0.5", "1", ["a step"], {"step_probs": [0.5]}]
)
def test_something_else_than_numbers(step_probs: Any) -> None:
    with pytest.raises(TypeError, match="step_probs must be the probabilities of one solution"):
        aggregate(step_probs)


@pytest.mark.parametrize("method", [["min"], None, 3])
def test_an_aggregation_is_named_by_a_string(method: Any) -> None:
    with pytest.raises(TypeError, match=f"named by a string such as 'min', got {type(method).__name__}"):
        check_aggregation(method)


def test_names() -> None:
    assert check_aggregation("prod") == "product"
    assert [check_aggregation(name) for name in AGGREGATIONS] == list(AGGREGATIONS)
