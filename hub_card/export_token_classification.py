"""Export as the token classification model of the backbone's family, which plain Transformers loads.

Its head is one linear layer to two logits a token, those of a wrong and a right step (0 and z for a PRM of one
logit); the rows that count are those at the step positions.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForTokenClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING

from modeling_prm.backbones import backbone_init_options

from .exporting import TwoWayHead, check_scores, check_weights_equal, labelled, two_way_head


def check_exportable(model: Any, processor: Any) -> None:
    """Check what this layout can hold.

    Raises:
        ValueError: it cannot hold this PRM; the message says why.
    """
    if two_way_head(model).dense is not None:
        instead = " or with layout='qwen2_prm'" if model.config.text_config.model_type == "qwen2" else ""
        raise ValueError(
            "a token classification model has one linear layer for a head, this PRM an mlp one (head_type='mlp'), "
            f"which no single layer equals; export a PRM with a linear head{instead}"
        )
    _empty_classifier(model)


def write(model: Any, processor: Any, folder: Path) -> float:
    """Write weights and config, load them again and compare; returns the largest difference of a probability."""
    classifier, head_name = _empty_classifier(model)
    setattr(classifier, classifier.base_model_prefix, model.backbone)
    setattr(classifier, head_name, _linear(two_way_head(model)))
    classifier.save_pretrained(folder)
    loaded, info = AutoModelForTokenClassification.from_pretrained(
        folder, dtype="auto", output_loading_info=True, trust_remote_code=False
    )
    backbone = {} if info["missing_keys"] or info["unexpected_keys"] else loaded.base_model.state_dict()
    check_weights_equal(model.backbone.state_dict(), backbone, folder)

    def token_logits(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = loaded(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits

    return check_scores(model, processor, token_logits, folder, dtype=loaded.dtype)


def _empty_classifier(model: Any) -> tuple[PreTrainedModel, str]:
    """The family's token classification model without weights, and the name of its linear head."""
    text_config = model.config.text_config
    model_class = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING.get(type(text_config), None)
    if model_class is None:
        raise ValueError(
            f"Transformers has no token classification model for a {text_config.model_type} backbone; serve this PRM "
            "with its own code"
        )
    config = labelled(copy.deepcopy(text_config), model_class.__name__)
    config.dtype = model.backbone.dtype
    with torch.device("meta"):
        classifier = model_class(config)
    backbone_class = type(classifier.base_model)
    own = [name for name, _ in classifier.named_parameters() if not name.startswith(classifier.base_model_prefix + ".")]
    heads = [name for name, module in classifier.named_children() if isinstance(module, nn.Linear)]
    if len(heads) != 1 or sorted(own) != [f"{heads[0]}.bias", f"{heads[0]}.weight"]:
        raise ValueError(
            f"{model_class.__name__} has weights between backbone and logits ({', '.join(own)}) that a PRM has not; "
            "serve this PRM with its own code"
        )
    if backbone_class is not type(model.backbone) or set(classifier.base_model.state_dict()) != set(
        model.backbone.state_dict()
    ):
        raise ValueError(
            f"{model_class.__name__} has another backbone ({backbone_class.__name__}) than this PRM "
            f"({type(model.backbone).__name__}, options {backbone_init_options(text_config)})"
        )
    return classifier, heads[0]


def _linear(head: TwoWayHead) -> nn.Linear:
    linear = nn.Linear(head.weight.shape[1], 2)
    with torch.no_grad():
        linear.weight.copy_(head.weight)
        linear.bias.copy_(head.bias)
    return linear.requires_grad_(False)
