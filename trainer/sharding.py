"""Models whose weights are sharded over processes (FSDP2): saved as plain checkpoints, which load anywhere."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, StateDictType


@contextlib.contextmanager
def whole_weights(trainer: Any) -> Iterator[None]:
    """Let `Trainer.save_model` gather sharded weights, also where the checkpoints of the engine stay sharded.

    With `SHARDED_STATE_DICT`, accelerate's default for FSDP2, it would save nothing.
    """
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is None:
        yield
        return
    own = plugin.state_dict_type
    plugin.state_dict_type = StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = own


@contextlib.contextmanager
def own_class(model: Any) -> Iterator[None]:
    """Give a model that `fully_shard` sharded its own class for a while.

    `fully_shard` puts a class of PyTorch's in its place, and `save_pretrained` would write the code of that one.
    """
    sharded: Any = type(model)
    if not isinstance(model, FSDPModule):
        yield
        return
    own: Any = next(base for base in sharded.__mro__ if not issubclass(base, FSDPModule))
    model.__class__ = own
    try:
        yield
    finally:
        model.__class__ = sharded


def keep_float32_outputs(trainer: Any) -> None:
    """Let a model in shards return logits and probabilities in float32, as it does elsewhere.

    With bf16 or fp16 accelerate's policy for FSDP2 rounds whatever the model returns. Called before the model is
    sharded.
    """
    if not trainer.is_fsdp_enabled:
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    policy = getattr(plugin, "mixed_precision_policy", None)
    if isinstance(policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)
