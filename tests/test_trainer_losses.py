"""The losses over step labels: values worked by hand, a plain implementation of each formula, gradients, extremes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from modeling_prm.step_loss import step_loss
from trainer.losses import StepLoss, choose_step_loss

IGNORED = -100.0
LN2, LN3 = math.log(2.0), math.log(3.0)
# The cross-entropy at a logit of ln 3, whose sigmoid is 3/4, of a correct and of a wrong step.
A, B = math.log(4 / 3), math.log(4)


def last_weighs_all(rank: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    return (rank == total).float()


def reciprocal(rank: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    return total / (rank + 1.0)


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "pos_weight": {"pos_weight": 2.5},
    "smoothing": {"label_smoothing": 0.3},
    "smoothing and pos_weight": {"label_smoothing": 0.3, "pos_weight": 0.2},
    "linear": {"step_weighting": "linear"},
    "own weights": {"step_weighting": reciprocal},
    "last step by own weights": {"step_weighting": last_weighs_all},
    "solution": {"normalization": "solution"},
    "solution, linear": {"normalization": "solution", "step_weighting": "linear", "pos_weight": 3.0},
    "pairwise": {"ranking": "pairwise"},
    "pairwise alone": {"ranking": "pairwise", "bce_weight": 0.0, "ranking_weight": 0.3},
    "pairwise, solution": {"ranking": "pairwise", "normalization": "solution"},
    "pairwise at 0.25": {"ranking": "pairwise", "label_threshold": 0.25},
    "pqm": {"ranking": "pqm"},
    "pqm alone": {"ranking": "pqm", "bce_weight": 0.0, "margin": 1.5},
    "pqm, weighted": {"ranking": "pqm", "bce_weight": 0.5, "ranking_weight": 2.0, "step_weighting": "linear"},
    "classes": {"num_labels": 3},
    "classes, all": {
        "num_labels": 3,
        "label_smoothing": 0.2,
        "step_weighting": "linear",
        "normalization": "solution",
        "bce_weight": 0.7,
    },
}
all_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())

# Both classes, one class, soft labels, gaps, one step, nothing labelled; eight solutions.
LABELS = torch.tensor(
    [
        [1.0, 0.0, 1.0, 0.25, IGNORED, 0.0],
        [1.0, 1.0, 1.0, IGNORED, IGNORED, IGNORED],
        [0.0, 0.0, IGNORED, IGNORED, IGNORED, IGNORED],
        [IGNORED] * 6,
        [IGNORED, 0.0, IGNORED, 1.0, IGNORED, IGNORED],
        [0.75, IGNORED, IGNORED, IGNORED, IGNORED, IGNORED],
        [1.0, 1.0, 1.0, 1.0, 1.0, 0.0],
        [0.0, IGNORED, IGNORED, IGNORED, IGNORED, IGNORED],
    ]
)


def make_batch(options: dict[str, Any], *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits in float64, (8, 6) or (8, 6, 3), and labels."""
    generator = torch.Generator().manual_seed(seed)
    if options.get("num_labels", 1) == 1:
        return torch.randn(8, 6, generator=generator, dtype=torch.float64) * 2.0, LABELS
    classes = torch.randint(0, 3, LABELS.shape, generator=generator).float()
    logits = torch.randn(8, 6, 3, generator=generator, dtype=torch.float64) * 2.0
    return logits, torch.where(LABELS == IGNORED, LABELS, classes)


def own_length(labels: torch.Tensor) -> int:
    """To how many steps a batch of these labels is padded."""
    columns = (labels != IGNORED).any(dim=0).nonzero()
    return int(columns.max()) + 1 if len(columns) else 1


def loss_and_gradient(
    loss: StepLoss, logits: torch.Tensor, labels: torch.Tensor, cuts: list[int]
) -> tuple[float, torch.Tensor]:
    """Those of one optimizer step, taken in micro-batches of so many solutions, each padded to its own length."""
    logits = logits.clone().requires_grad_()
    parts = [
        (part[:, : own_length(part_labels)], part_labels[:, : own_length(part_labels)])
        for part, part_labels in zip(logits.split(cuts), labels.split(cuts), strict=True)
    ]
    counts = torch.stack([loss.counts(part_labels) for _, part_labels in parts]).sum(dim=0)
    total = torch.zeros((), dtype=logits.dtype)
    for part, part_labels in parts:
        part_loss = loss(part, part_labels, counts)
        part_loss.backward()
        total += part_loss.detach()
    assert logits.grad is not None
    return float(total), logits.grad


def by_formula(options: dict[str, Any], logits: list[Any], labels: list[list[float]]) -> float:
    """The loss of whole solutions, written from the formulas in the docstring of `StepLoss`, a number at a time."""
    steps_mean = _steps_by_formula(options, logits, labels)
    ranking = {"none": lambda *_: 0.0, "pairwise": _pairwise_by_formula, "pqm": _pqm_by_formula}
    ranking_mean = ranking[options.get("ranking", "none")](options, logits, labels)
    return options.get("bce_weight", 1.0) * steps_mean + options.get("ranking_weight", 1.0) * ranking_mean


def _cross_entropy(options: dict[str, Any], logit: Any, label: float) -> float:
    smoothing, classes = options.get("label_smoothing", 0.0), options.get("num_labels", 1)
    if classes == 1:
        label = (1.0 - smoothing) * label + smoothing / 2
        right = 1.0 / (1.0 + math.exp(-logit))
        return -options.get("pos_weight", 1.0) * label * math.log(right) - (1.0 - label) * math.log(1.0 - right)
    total = sum(math.exp(other) for other in logit)
    targets = [(1.0 - smoothing) * (index == label) + smoothing / classes for index in range(classes)]
    return -sum(target * math.log(math.exp(other) / total) for target, other in zip(targets, logit, strict=True))


def _steps_by_formula(options: dict[str, Any], logits: list[Any], labels: list[list[float]]) -> float:
    weigh: dict[Any, Callable[[int, int], float]] = {
        "uniform": lambda i, n: 1.0,
        "linear": lambda i, n: 2.0 * i / (n + 1),
        reciprocal: lambda i, n: n / (i + 1),
        last_weighs_all: lambda i, n: float(i == n),
    }
    sums, weights = [], []
    for row, row_labels in zip(logits, labels, strict=True):
        losses = [_cross_entropy(options, z, y) for z, y in zip(row, row_labels, strict=True) if y != IGNORED]
        if losses:
            weight = weigh[options.get("step_weighting", "uniform")]
            row_weights = [weight(i, len(losses)) for i in range(1, len(losses) + 1)]
            sums.append(sum(w * x for w, x in zip(row_weights, losses, strict=True)))
            weights.append(sum(row_weights))
    if options.get("normalization") == "solution":
        return sum(total / weight for total, weight in zip(sums, weights, strict=True)) / len(sums)
    return sum(sums) / sum(weights)


def _correct_and_wrong(options: dict[str, Any], row: list[float], labels: list[float]) -> tuple[list[float], ...]:
    labelled = [(z, y) for z, y in zip(row, labels, strict=True) if y != IGNORED]
    threshold = options.get("label_threshold", 0.5)
    return [z for z, y in labelled if y >= threshold], [z for z, y in labelled if y < threshold]


def _pairwise_by_formula(options: dict[str, Any], logits: list[list[float]], labels: list[list[float]]) -> float:
    pairs = []
    for row, row_labels in zip(logits, labels, strict=True):
        correct, wrong = _correct_and_wrong(options, row, row_labels)
        pairs.append([math.log(1.0 + math.exp(w - c)) for c in correct for w in wrong])
    if options.get("normalization") == "solution":
        means = [sum(row) / len(row) for row in pairs if row]
        return sum(means) / len(means)
    return sum(sum(row) for row in pairs) / sum(len(row) for row in pairs)


def _pqm_by_formula(options: dict[str, Any], logits: list[list[float]], labels: list[list[float]]) -> float:
    means = []
    for row, row_labels in zip(logits, labels, strict=True):
        correct, wrong = _correct_and_wrong(options, row, row_labels)
        against = sum(math.exp(w + options.get("margin", 4.0)) for w in wrong)
        scores = [0.0, *correct]
        terms = []
        for t in range(0 if wrong else 1, len(scores)):
            so_far = sum(math.exp(score) for score in scores[: t + 1])
            terms.append(-math.log(math.exp(scores[t]) / (so_far + against)))
        if terms:
            means.append(sum(terms) / len(terms))
    return sum(means) / len(means)


HALF = [[LN3, LN3], [LN3, 0.0]], [[1.0, 0.0], [0.0, IGNORED]]  # losses A, B and B


@pytest.mark.parametrize(
    ("options", "logits", "labels", "expected"),
    [
        ({}, *HALF, (A + B + B) / 3),
        # 0.3 of the way: -0.3 log(3/4) - 0.7 log(1/4)
        ({}, [[LN3]], [[0.3]], 0.3 * A + 0.7 * B),
        ({"pos_weight": 2.0}, *HALF, (2 * A + B + B) / 3),
        ({"pos_weight": 2.0}, [[LN3]], [[0.3]], 0.6 * A + 0.7 * B),
        # 1 becomes 0.9, 0 becomes 0.1.
        ({"label_smoothing": 0.2}, *HALF, (0.9 * A + 0.1 * B + 2 * (0.1 * A + 0.9 * B)) / 3),
        ({"label_smoothing": 0.2, "pos_weight": 2.0}, [[LN3]], [[1.0]], 2 * 0.9 * A + 0.1 * B),
        # Steps 1 and 2 of 2 weigh 2/3 and 4/3, step 1 of 1 weighs 1: 3 in all.
        ({"step_weighting": "linear"}, *HALF, (2 / 3 * A + 4 / 3 * B + B) / 3),
        # Ignored steps have no rank: the labelled ones are 1 and 2 of 2.
        ({"step_weighting": "linear"}, [[LN3] * 4], [[IGNORED, 1.0, IGNORED, 0.0]], (2 / 3 * A + 4 / 3 * B) / 2),
        # n / (i + 1): 1 and 2/3, and 1/2: 13/6 in all.
        ({"step_weighting": reciprocal}, *HALF, (A + 2 / 3 * B + B / 2) / (13 / 6)),
        ({"step_weighting": last_weighs_all}, *HALF, (B + B) / 2),
        ({"normalization": "solution"}, *HALF, ((A + B) / 2 + B) / 2),
        ({"normalization": "solution", "step_weighting": "linear"}, *HALF, ((2 / 3 * A + 4 / 3 * B) / 2 + B) / 2),
        # Weights are relative, however small.
        ({"step_weighting": lambda i, n: 0.01 * i}, *HALF, (A + 2 * B + B) / 4),
        ({"step_weighting": lambda i, n: 0.01 * i, "normalization": "solution"}, *HALF, ((A + 2 * B) / 3 + B) / 2),
        # A solution whose weights are all 0 is none to take the mean over.
        ({"normalization": "solution", "step_weighting": lambda i, n: (i > 1).float()}, *HALF, B),
        # log(1 + exp(0 - ln 3)) and log(1 + exp(-ln 3 - ln 3))
        ({"ranking": "pairwise", "bce_weight": 0.0}, [[LN3, 0.0, -LN3]], [[1.0, 0.0, 0.0]], math.log(40 / 27) / 2),
        # Both orders count; the second solution has no pair.
        ({"ranking": "pairwise", "bce_weight": 0.0}, [[0.0, LN3], [LN3, 0.0]], [[0.0, 1.0], [1.0, 1.0]], A),
        # Three pairs of ln 2 in one solution, one of ln(4/3) in another.
        (
            {"ranking": "pairwise", "bce_weight": 0.0},
            [[0.0] * 4, [LN3, 0.0, 0.0, 0.0]],
            [[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, IGNORED, IGNORED]],
            (3 * LN2 + A) / 4,
        ),
        (
            {"ranking": "pairwise", "bce_weight": 0.0, "normalization": "solution"},
            [[0.0] * 4, [LN3, 0.0, 0.0, 0.0]],
            [[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, IGNORED, IGNORED]],
            (LN2 + A) / 2,
        ),
        ({"ranking": "pairwise", "ranking_weight": 3.0}, [[LN3, LN3]], [[1.0, 0.0]], (A + B) / 2 + 3 * LN2),
        ({"ranking": "pairwise", "bce_weight": 0.5}, [[LN3, LN3]], [[1.0, 0.0]], (A + B) / 4 + LN2),
        # From 0.25 on a label is correct: one pair, 0.2 below 0.25. From 0.5 on there is none.
        ({"ranking": "pairwise", "bce_weight": 0.0, "label_threshold": 0.25}, [[0.0, 0.0]], [[0.25, 0.2]], LN2),
        ({"ranking": "pairwise", "bce_weight": 0.0}, [[0.0, 0.0]], [[0.25, 0.2]], 0.0),
        # Wrong: exp(ln 3 + ln 2) = 6. The problem: -log(1 / (1 + 6)); the step: -log(2 / (1 + 2 + 6)).
        (
            {"ranking": "pqm", "bce_weight": 0.0, "margin": LN2},
            [[LN2, LN3]],
            [[1.0, 0.0]],
            (math.log(7) + math.log(9 / 2)) / 2,
        ),
        # A wrong step counts against correct ones before and after it: 7, (1 + 2 + 6) / 2, (1 + 2 + 3 + 6) / 3.
        (
            {"ranking": "pqm", "bce_weight": 0.0, "margin": LN2},
            [[LN2, LN3, LN3]],
            [[1.0, 0.0, 1.0]],
            (math.log(7) + math.log(9 / 2) + math.log(4)) / 3,
        ),
        # Without a wrong step the problem has no term: -log(2/3) and -log(3/6).
        ({"ranking": "pqm", "bce_weight": 0.0}, [[LN2, LN3]], [[1.0, 1.0]], (math.log(3 / 2) + LN2) / 2),
        # Without a correct one it has the only term: -log(1 / (1 + 6)).
        ({"ranking": "pqm", "bce_weight": 0.0, "margin": LN2}, [[LN3]], [[0.0]], math.log(7)),
        # The mean over the two solutions.
        (
            {"ranking": "pqm", "bce_weight": 0.0, "margin": LN2},
            [[LN3, 0.0], [LN2, LN3]],
            [[0.0, IGNORED], [1.0, 1.0]],
            (math.log(7) + (math.log(3 / 2) + LN2) / 2) / 2,
        ),
        # Softmax 1/8, 2/8, 5/8.
        ({"num_labels": 3}, [[[0.0, LN2, math.log(5)]]], [[1.0]], math.log(4)),
        (
            {"num_labels": 3, "label_smoothing": 0.3},
            [[[0.0, LN2, math.log(5)]]],
            [[1.0]],
            0.1 * math.log(8) + 0.8 * math.log(4) + 0.1 * math.log(8 / 5),
        ),
        ({"num_labels": 3, "bce_weight": 3.0}, [[[0.0, LN2, math.log(5)]] * 2], [[2.0, IGNORED]], 3 * math.log(8 / 5)),
    ],
)
def test_values_worked_by_hand(options: dict[str, Any], logits: Any, labels: Any, expected: float) -> None:
    loss = StepLoss(**options)
    labels = torch.tensor(labels)
    assert float(loss(torch.tensor(logits, dtype=torch.float64), labels)) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert float(loss(torch.tensor(logits), labels)) == pytest.approx(expected, rel=1e-5, abs=1e-7)


@all_options
def test_each_option_is_its_formula(options: dict[str, Any]) -> None:
    for seed in range(3):
        logits, labels = make_batch(options, seed=seed)
        expected = by_formula(options, logits.tolist(), labels.tolist())
        assert float(StepLoss(**options)(logits, labels)) == pytest.approx(expected, rel=1e-6)


def test_every_option_gives_another_loss() -> None:
    logits, labels = make_batch({})
    one_logit = {name: options for name, options in OPTIONS.items() if "num_labels" not in options}
    losses = {name: round(float(StepLoss(**options)(logits, labels)), 6) for name, options in one_logit.items()}
    assert len(set(losses.values())) == len(one_logit), losses
    logits, labels = make_batch({"num_labels": 3})
    classes = [
        {},
        {"label_smoothing": 0.2},
        {"step_weighting": "linear"},
        {"normalization": "solution"},
        {"bce_weight": 0.7},
    ]
    losses = {str(options): round(float(StepLoss(num_labels=3, **options)(logits, labels)), 6) for options in classes}
    assert len(set(losses.values())) == len(classes), losses


@all_options
def test_gradients_are_those_of_the_loss(options: dict[str, Any]) -> None:
    logits, labels = make_batch(options)
    loss = StepLoss(**options)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), logits.requires_grad_())


@all_options
@pytest.mark.parametrize("cuts", [[1] * 8, [2] * 4, [3, 3, 2], [5, 3]], ids=str)
def test_loss_and_gradients_do_not_depend_on_micro_batches(options: dict[str, Any], cuts: list[int]) -> None:
    logits, labels = make_batch(options)
    for dtype in (torch.float64, torch.float32):
        whole, gradient = loss_and_gradient(StepLoss(**options), logits.to(dtype), labels, [8])
        loss, in_parts = loss_and_gradient(StepLoss(**options), logits.to(dtype), labels, cuts)
        assert loss == pytest.approx(whole, rel=1e-6)
        assert float((in_parts - gradient).norm()) <= 1e-6 * float(gradient.norm())
        assert float(gradient.norm()) > 0.01


@all_options
def test_what_is_ignored_has_no_part_and_no_gradient(options: dict[str, Any]) -> None:
    logits, labels = make_batch(options)
    loss, ignored = StepLoss(**options), labels == IGNORED
    other = logits.clone()
    other[ignored] = 50.0 * torch.randn(other[ignored].shape, dtype=torch.float64)
    wider = torch.nn.functional.pad(other, (0,) * (2 * (other.dim() - 2)) + (0, 4), value=7.0)
    padding = torch.full((2, 10), IGNORED)
    wide_labels = torch.cat([torch.nn.functional.pad(labels, (0, 4), value=IGNORED), padding])
    wider = torch.cat([wider, torch.ones_like(wider[:2])]).requires_grad_()
    value = loss(wider, wide_labels)
    value.backward()
    assert value.item() == pytest.approx(float(loss(logits, labels)), rel=1e-12)
    assert wider.grad is not None
    assert not wider.grad[wide_labels == IGNORED].any()
    assert wider.grad[wide_labels != IGNORED].any()


@all_options
def test_without_a_label_loss_and_gradient_are_zero(options: dict[str, Any]) -> None:
    logits, _ = make_batch(options)
    logits.requires_grad_()
    loss = StepLoss(**options)(logits, torch.full((8, 6), IGNORED))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


@all_options
@pytest.mark.parametrize("size", [100.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_finite_numbers(options: dict[str, Any], size: float, dtype: torch.dtype) -> None:
    logits, labels = make_batch(options)
    for extreme in (logits.sign() * size, torch.full_like(logits, size), torch.full_like(logits, -size)):
        extreme = extreme.to(dtype).requires_grad_()
        loss = StepLoss(**options)(extreme, labels)
        loss.backward()
        assert loss.dtype == torch.float32
        assert bool(loss.isfinite())
        assert loss.item() < 10.0 * size
        assert extreme.grad is not None
        assert bool(extreme.grad.isfinite().all())


def test_a_saturated_mistake_still_has_its_gradient() -> None:
    for options, labels in (({}, [[0.0]]), ({"ranking": "pqm", "bce_weight": 0.0}, [[0.0]])):
        logits = torch.tensor([[100.0]], requires_grad=True)
        StepLoss(**options)(logits, torch.tensor(labels)).backward()
        torch.testing.assert_close(logits.grad, torch.tensor([[1.0]]))
    logits = torch.tensor([[-100.0, 100.0]], requires_grad=True)
    StepLoss(ranking="pairwise", bce_weight=0.0)(logits, torch.tensor([[1.0, 0.0]])).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-1.0, 1.0]]))


def test_solutions_of_one_class_have_no_pair_and_their_own_pqm() -> None:
    logits = torch.tensor([[1.0, 2.0], [1.0, 2.0]], requires_grad=True)
    labels = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    for normalization in ("step", "solution"):
        loss = StepLoss(ranking="pairwise", bce_weight=0.0, normalization=normalization)
        assert loss.counts(labels).tolist()[1] == 0.0
        assert float(loss(logits, labels)) == 0.0
    assert StepLoss(ranking="pqm").counts(labels).tolist() == [4.0, 2.0]


def test_counts_are_of_the_labels() -> None:
    # Labelled steps: 5, 3, 2, 0, 2, 1, 6, 1. Pairs of a correct and a wrong one: 2 x 3, 0, 0, 0, 1, 0, 5, 0.
    assert StepLoss().counts(LABELS).tolist() == [20.0, 0.0]
    assert StepLoss(step_weighting="linear").counts(LABELS).tolist() == pytest.approx([20.0, 0.0])
    assert StepLoss(step_weighting=last_weighs_all).counts(LABELS).tolist() == [7.0, 0.0]
    assert StepLoss(ranking="pairwise").counts(LABELS).tolist() == [20.0, 12.0]
    assert StepLoss(ranking="pairwise", normalization="solution").counts(LABELS).tolist() == [7.0, 3.0]
    assert StepLoss(ranking="pqm").counts(LABELS).tolist() == [20.0, 7.0]
    assert StepLoss(num_labels=3, normalization="solution").counts(LABELS).tolist() == [7.0, 0.0]


def test_the_default_is_the_loss_of_the_model() -> None:
    for num_labels in (1, 3):
        logits, labels = make_batch({"num_labels": num_labels})
        logits = logits.float()
        ours = StepLoss(num_labels=num_labels)(logits, labels)
        assert float(ours) == pytest.approx(float(step_loss(logits, labels)), rel=1e-6)
        counts = StepLoss(num_labels=num_labels).counts(labels)
        ours = StepLoss(num_labels=num_labels)(logits[:3], labels[:3], counts)
        assert float(ours) == pytest.approx(float(step_loss(logits[:3], labels[:3], counts[0])), rel=1e-6)


def test_labels_on_a_threshold_count_as_correct_in_float32() -> None:
    # In float32, 0.7 is a little less than the double.
    labels = torch.tensor([[0.7, 0.6]])
    assert float(labels[0, 0]) < 0.7
    assert StepLoss(ranking="pairwise", label_threshold=0.7).counts(labels).tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalization": "token"}, r"normalization must be one of \('step', 'solution'\), got 'token'"),
        ({"ranking": "listwise"}, r"ranking must be one of \('none', 'pairwise', 'pqm'\), got 'listwise'"),
        ({"step_weighting": "quadratic"}, r"step_weighting must be one of .* or a function, got 'quadratic'"),
        ({"pos_weight": 0.0}, "pos_weight must be above 0 .*got 0.0 and 0.0"),
        ({"pos_weight": math.inf}, "pos_weight must be above 0 .*got inf"),
        ({"pos_weight": math.nan}, "pos_weight must be above 0 .*got nan"),
        ({"label_smoothing": 1.0}, r"label_smoothing in \[0, 1\), got 1.0 and 1.0"),
        ({"label_smoothing": -0.1}, r"label_smoothing in \[0, 1\), got 1.0 and -0.1"),
        ({"ranking": "pqm", "margin": math.inf}, "margin must be a finite number .*got inf"),
        ({"label_threshold": 0.0}, "label_threshold above 0 and at most 1, got 4.0 and 0.0"),
        ({"bce_weight": 0.0}, "one of the two losses must count; got bce_weight=0.0, ranking='none'"),
        ({"bce_weight": -1.0, "ranking": "pqm"}, "must not be negative"),
        ({"bce_weight": math.nan}, "must not be negative.*bce_weight=nan"),
        ({"ranking": "pqm", "ranking_weight": -1.0}, "must not be negative"),
        ({"ranking": "pqm", "ranking_weight": math.nan}, "must not be negative"),
        ({"ranking": "pqm", "ranking_weight": 0.0, "bce_weight": 0.0}, "one of the two losses must count"),
        ({"num_labels": 3, "ranking": "pqm"}, "ranking and pos_weight are for one logit a step, the model has 3"),
        ({"num_labels": 3, "pos_weight": 2.0}, "ranking and pos_weight are for one logit a step, the model has 3"),
        ({"ranking_weight": 0.5}, "ranking_weight=0.5 changes nothing without a ranking loss"),
        ({"ranking": "pairwise", "margin": 2.0}, "margin=2.0 changes nothing without the ranking loss 'pqm'"),
        (
            {"ranking": "pqm", "bce_weight": 0.0, "pos_weight": 2.0},
            "pos_weight=2.0 changes nothing without the cross-entropy; turn that on, or leave pos_weight at 1.0",
        ),
        ({"ranking": "pqm", "bce_weight": 0.0, "label_smoothing": 0.1}, "label_smoothing=0.1 changes nothing"),
        ({"ranking": "pairwise", "bce_weight": 0.0, "step_weighting": "linear"}, "step_weighting='linear' changes"),
        (
            {"ranking": "pqm", "bce_weight": 0.0, "normalization": "solution"},
            "normalization='solution' changes nothing",
        ),
    ],
)
def test_values_outside_those_allowed_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepLoss(**options)


def test_labels_as_booleans_are_refused() -> None:
    with pytest.raises(TypeError, match="as booleans they have lost the -100 of ignored steps"):
        StepLoss()(torch.zeros(1, 2), torch.tensor([[True, False]]))
    with pytest.raises(TypeError, match="as booleans"):
        StepLoss(ranking="pqm").counts(torch.tensor([[True, False]]))


@pytest.mark.parametrize(
    "weights",
    [
        lambda rank, total: -rank.float(),
        lambda rank, total: rank / 0.0,
        lambda rank, total: rank * math.nan,
        lambda rank, total: total.float(),
    ],
    ids=["negative", "infinite", "nan", "shape"],
)
def test_own_weights_that_cannot_be_used_are_refused(weights: Any) -> None:
    message = re.escape("step_weighting must give weights of shape (8, 6) that are finite and not negative")
    with pytest.raises(ValueError, match=message):
        StepLoss(step_weighting=weights).counts(LABELS)


def test_a_loss_is_given_or_described() -> None:
    given = StepLoss(step_weighting=reciprocal)
    assert choose_step_loss(StepLoss(pos_weight=2.0), None) == StepLoss(pos_weight=2.0)
    assert choose_step_loss(StepLoss(label_threshold=0.3), given) is given
    with pytest.raises(TypeError, match=r"must be a trainer.losses.StepLoss, got function"):
        choose_step_loss(StepLoss(), reciprocal)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step_loss is for 1 logits a step, the model has 3; give it num_labels=3"):
        choose_step_loss(StepLoss(num_labels=3), given)
    with pytest.raises(ValueError, match=r"which describe one too: StepLoss\(.*pos_weight=2.0.*leave those options"):
        choose_step_loss(StepLoss(pos_weight=2.0), given)
