"""Float32 products through oneDNN: the same results, only where they are meant to be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scoring_by_hand import PROBLEM, SOLUTIONS, by_hand

from modeling_prm import PRMForStepScoring, PRMProcessor
from modeling_prm.cpu_products import _OneDNNProducts, has_onednn_products, onednn_products

MakePRM = Callable[..., tuple[PRMForStepScoring, PRMProcessor]]

pytestmark = pytest.mark.skipif(not has_onednn_products(), reason="this PyTorch has no oneDNN")


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def products(function: Callable[[], torch.Tensor]) -> int:
    with onednn_products(), Calls() as calls:
        function()
    return sum("_linear_pointwise" in name for name in calls.names)


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_that_in_float64(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(70, 33, bias=bias)
    for shape in ((5, 70), (2, 3, 70), (70,), (1, 1, 70)):
        x = torch.randn(shape, generator=generator)
        exact = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0.0)
        with torch.no_grad(), onednn_products():
            result = linear(x)
        assert result.dtype == torch.float32
        assert result.shape == exact.shape
        assert (result - exact).abs().max() < 1e-6
    with torch.no_grad():
        assert products(lambda: linear(torch.randn(4, 70))) == 1
        # Also of inputs that do not lie one after the other.
        x = torch.randn(70, 6).T
        with onednn_products():
            assert (linear(x) - torch.nn.functional.linear(x, linear.weight, linear.bias)).abs().max() < 1e-6


def test_what_is_left_to_pytorch() -> None:
    linear, x = torch.nn.Linear(8, 4), torch.randn(3, 8)
    assert products(lambda: linear(x)) == 0  # with gradients
    with onednn_products():
        linear(x).sum().backward()
    assert linear.weight.grad is not None
    with torch.no_grad():
        assert products(lambda: linear.double()(x.double())) == 0
        assert products(lambda: linear.bfloat16()(x.bfloat16())) == 0
        assert products(lambda: linear.float()(x[:0])) == 0
        assert products(lambda: linear(x)) == 1
        with Calls() as calls:
            linear(x)
    assert not any("_linear_pointwise" in name for name in calls.names)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "gemma3"])
def test_scores_stay(family: str, make_prm: MakePRM) -> None:
    model, processor = make_prm(family)
    with onednn_products():
        scores = model.verifier(processor).score_solutions(PROBLEM, SOLUTIONS)
    for score, steps in zip(scores, SOLUTIONS, strict=True):
        assert score.step_probs == pytest.approx(by_hand(model, processor, PROBLEM, steps), abs=1e-5)


def test_without_onednn_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(_OneDNNProducts, "__enter__", lambda self: pytest.fail("was entered"))
    with onednn_products(), torch.no_grad():
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).shape == (1, 2)
