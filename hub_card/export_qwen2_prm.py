"""Export as `Qwen2ForProcessRewardModel`, the layout of Qwen2.5-Math-PRM, which vLLM serves natively.

Its head is a linear layer H to H, ReLU, and a linear layer to the logits of a wrong and a right step, read at a
separator token (vLLM: `--pooler-config '{"pooling_type": "STEP", "step_tag_id": ID}'`).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import nn
from transformers import AutoModel

from .exporting import TwoWayHead, check_scores, check_weights_equal, labelled, quiet_loading, two_way_head

ARCHITECTURE = "Qwen2ForProcessRewardModel"


def check_exportable(model: Any, processor: Any) -> None:
    """Check what this layout can hold.

    Raises:
        ValueError: it cannot hold this PRM; the message says why.
    """
    config = model.config
    instead = "; use layout='token_classification'"
    if config.text_config.model_type != "qwen2":
        raise ValueError(
            f"{ARCHITECTURE} has a qwen2 backbone, this PRM a {config.text_config.model_type} one" + instead
        )
    if not processor.separator_is_reserved:
        raise ValueError(
            f"the separator {processor.separator_token!r} can stand in a problem or a step too, where a server that "
            "looks for its id would return more rows than there are steps" + instead
        )
    if processor.score_offset != 0:
        raise ValueError("a server reads at the separator, this PRM one token before it (score_offset=-1)" + instead)
    two_way_head(model)


def write(model: Any, processor: Any, folder: Path) -> float:
    """Write weights and config, load them again and compare; returns the largest difference of a probability."""
    head = relu_layers(two_way_head(model))
    state = {f"model.{name}": tensor for name, tensor in model.backbone.state_dict().items()}
    state |= {f"score.{name}": tensor for name, tensor in head.state_dict().items()}
    config = labelled(copy.deepcopy(model.config.text_config), ARCHITECTURE)
    config.dtype = model.backbone.dtype
    config.save_pretrained(folder)
    save_torch_state_dict(state, folder)
    with quiet_loading():
        loaded, info = AutoModel.from_pretrained(
            folder, dtype="auto", output_loading_info=True, trust_remote_code=False
        )
    check_weights_equal(model.backbone.state_dict(), {} if info["missing_keys"] else loaded.state_dict(), folder)

    def token_logits(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = loaded(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        logits: torch.Tensor = head(hidden.float())
        return logits

    return check_scores(model, processor, token_logits, folder, dtype=loaded.dtype)


def relu_layers(head: TwoWayHead) -> nn.Sequential:
    """The head as linear, ReLU, linear.

    A linear head fits exactly: a row w of it becomes the rows w and -w of the first layer, since
    relu(z) - relu(-z) = z.
    """
    size = head.weight.shape[1]
    first, last = nn.Linear(size, size), nn.Linear(size, 2)
    layers = nn.Sequential(first, nn.ReLU(), last)
    with torch.no_grad():
        if head.dense is not None:
            first.weight.copy_(head.dense[0])
            first.bias.copy_(head.dense[1])
            last.weight.copy_(head.weight)
            last.bias.copy_(head.bias)
            return layers.requires_grad_(False)
        for parameter in layers.parameters():
            parameter.zero_()
        # A row of zeros needs no place in the first layer.
        rows = [row for row in range(2) if head.weight[row].any() or head.bias[row]]
        if 2 * len(rows) > size:
            raise ValueError(f"{2 * len(rows)} rows of a linear head do not fit into a first layer of {size}")
        for place, row in enumerate(rows):
            for sign, index in ((1.0, 2 * place), (-1.0, 2 * place + 1)):
                first.weight[index] = sign * head.weight[row]
                first.bias[index] = sign * head.bias[row]
                last.weight[row, index] = sign
    return layers.requires_grad_(False)
