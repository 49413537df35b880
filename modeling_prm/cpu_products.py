"""Float32 products on a CPU through oneDNN: `with onednn_products(): verifier.score_solutions(...)`.

PyTorch gives float32 products to MKL, which on processors that are not Intel's runs at less than half of what oneDNN
reaches there; it gives products to oneDNN only in lower precision. Both compute in float32 here, and differ as
different orders of summation do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def onednn_products() -> Iterator[None]:
    """Within it, linear layers of this thread take oneDNN for float32 on the CPU, where no gradient is wanted.

    Nothing is packed or copied, so it takes no memory; where PyTorch was built without oneDNN it changes nothing.
    """
    if not has_onednn_products():
        yield
        return
    with _OneDNNProducts():
        yield


def has_onednn_products() -> bool:
    """Whether this PyTorch has the operation that `onednn_products` takes."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class _OneDNNProducts(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear and not kwargs and not torch.is_grad_enabled():
            tensor, weight, *bias = args
            if (
                _is_plain(tensor)
                and _is_plain(weight)
                and weight.is_contiguous()
                and tensor.numel() > 0
                and (not bias or bias[0] is None or _is_plain(bias[0]))
            ):
                # The operation that compiled code calls, with the same arguments.
                return torch.ops.mkldnn._linear_pointwise(tensor, weight, bias[0] if bias else None, "none", [], "")
        return func(*args, **(kwargs or {}))


def _is_plain(tensor: Any) -> bool:
    kinds = (torch.Tensor, torch.nn.Parameter)
    return type(tensor) in kinds and tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.dim() > 0
