"""`step_loss`: values and gradients worked by hand, and the same number whatever the micro-batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from modeling_prm.step_loss import step_loss


def bce(logit: float, label: float) -> float:
    p = 1.0 / (1.0 + math.exp(-logit))
    return -(label * math.log(p) + (1.0 - label) * math.log(1.0 - p))


def test_binary_values_by_hand() -> None:
    logits = torch.tensor([[0.0, 2.0, -1.0]])
    labels = torch.tensor([[1.0, 0.0, -100.0]])
    # log 2 = 0.693147; -log(1 - s(2)) = log(1 + e^2) = 2.126928.
    assert step_loss(logits, labels).item() == pytest.approx((0.693147 + 2.126928) / 2, abs=1e-6)


def test_soft_labels_are_exact() -> None:
    logits = torch.tensor([[1.5, -0.5], [0.25, 3.0]])
    labels = torch.tensor([[0.25, 0.8], [-100.0, 0.5]])
    expected = (bce(1.5, 0.25) + bce(-0.5, 0.8) + bce(3.0, 0.5)) / 3
    assert step_loss(logits, labels).item() == pytest.approx(expected, abs=1e-6)


def test_gradient_is_probability_minus_label_over_the_count() -> None:
    logits = torch.tensor([[1.0, -2.0, 4.0], [0.5, 0.0, 0.0]], requires_grad=True)
    labels = torch.tensor([[1.0, 0.3, -100.0], [0.0, -100.0, -100.0]])
    step_loss(logits, labels).backward()
    sigmoid = [1 / (1 + math.exp(-1.0)), 1 / (1 + math.exp(2.0)), 1 / (1 + math.exp(-0.5))]
    expected = [[(sigmoid[0] - 1.0) / 3, (sigmoid[1] - 0.3) / 3, 0.0], [sigmoid[2] / 3, 0.0, 0.0]]
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor(expected))


@pytest.mark.parametrize("classes", [None, 3])
def test_gradient_agrees_with_finite_differences(classes: int | None) -> None:
    shape = (2, 3) if classes is None else (2, 3, classes)
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = torch.tensor([[1.0, 0.3, -100.0], [0.0, 1.0, 0.9]] if classes is None else [[2.0, 0, -100], [1, 1, 0]])
    step_loss(logits, labels).backward()
    assert logits.grad is not None
    for index in np.ndindex(*shape):
        shift = torch.zeros(shape)
        shift[index] = 1e-2
        with torch.no_grad():
            slope = (step_loss(logits + shift, labels) - step_loss(logits - shift, labels)).item() / 2e-2
        assert logits.grad[index].item() == pytest.approx(slope, abs=1e-4), index


def test_classes_against_numpy() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 4, 3)).astype(np.float32)
    labels = np.array([[0, 1, 2, -100], [2, -100, -100, -100], [1, 1, 0, 2]], dtype=np.float32)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    terms = [-log_probs[b, s, int(labels[b, s])] for b in range(3) for s in range(4) if labels[b, s] >= 0]
    assert len(terms) == 8
    loss = step_loss(torch.from_numpy(logits), torch.from_numpy(labels))
    assert loss.item() == pytest.approx(sum(terms) / 8, abs=1e-6)
    as_integers = step_loss(torch.from_numpy(logits), torch.from_numpy(labels).long())
    assert as_integers.item() == loss.item()


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("num_items", [None, 0, 5, torch.tensor(0)])
def test_no_labelled_step_gives_zero_with_a_gradient_of_zero(classes: int | None, num_items: object) -> None:
    shape = (2, 3) if classes is None else (2, 3, classes)
    logits = torch.randn(shape).requires_grad_()
    loss = step_loss(logits, torch.full((2, 3), -100.0), num_items)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros(shape))


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_micro_batches_of_any_size_add_up_to_the_whole(classes: int | None, as_tensor: bool) -> None:
    shape = (6, 4) if classes is None else (6, 4, classes)
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(shape, generator=generator)
    labels = torch.randint(0, classes or 2, (6, 4), generator=generator).float()
    # Unequal numbers of steps, and one micro-batch below with none.
    labels[0, 1:] = labels[2] = labels[3] = labels[5, 2:] = -100.0
    whole = values.clone().requires_grad_()
    loss = step_loss(whole, labels)
    loss.backward()
    count = 1 + 4 + 4 + 2
    parts = values.clone().requires_grad_()
    total = 0.0
    for rows in (slice(0, 1), slice(1, 2), slice(2, 4), slice(4, 6)):
        part = step_loss(parts[rows], labels[rows], torch.tensor(count) if as_tensor else count)
        part.backward()
        total += part.item()
    assert total == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-5, atol=1e-8)


def test_loss_is_float32_for_logits_of_lower_precision() -> None:
    logits = torch.tensor([[0.3, -1.2]], dtype=torch.bfloat16)
    labels = torch.tensor([[0.7, 0.0]])
    loss = step_loss(logits, labels)
    expected = (bce(logits[0, 0].item(), 0.7) + bce(logits[0, 1].item(), 0.0)) / 2
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_huge_logits_stay_finite() -> None:
    logits = torch.tensor([[1000.0, -1000.0]], requires_grad=True)
    loss = step_loss(logits, torch.tensor([[0.0, 0.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(500.0)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5, 0.0]]))


def test_labels_as_booleans_are_refused() -> None:
    # A column that a tool re-cast to booleans has lost its -100.
    with pytest.raises(TypeError, match=r"labels must be numbers.*-100"):
        step_loss(torch.zeros(1, 2), torch.tensor([[True, False]]))
