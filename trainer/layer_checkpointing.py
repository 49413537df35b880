"""Gradient checkpointing without the recomputation that saves nothing."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer


class KeepLastLayer(TrainerCallback):
    """With gradient checkpointing, keeps the activations of the backbone's last layer.

    The backward pass begins with that layer: what the checkpoint lets go is computed again at once, at the very moment
    when memory is at its peak. Keeping it takes no more memory, and saves one layer's forward pass.
    """

    def on_train_begin(self, *args: Any, model: nn.Module, **rest: Any) -> None:
        """Let the last layer run as it would without gradient checkpointing."""
        keep_last_layer(model)


def keep_last_layer(model: nn.Module) -> None:
    """Turn gradient checkpointing off in the last of a model's layers; the others stay as they are."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if layers:
        layers[-1].gradient_checkpointing = False
