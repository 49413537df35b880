"""What a backbone must be, what it can do, and how it becomes a part of a PRM."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING, MODEL_MAPPING
from transformers.utils import logging

from .configuration_prm import PRMConfig
from .processing_prm import separator_id

logger = logging.get_logger(__name__)

_PROBLEM_MARKER = "PROBLEM-7f3a9c"


def is_bidirectional(backbone_config: PretrainedConfig) -> bool:
    """Whether tokens attend to later ones, so that a step's score depends on the steps after it."""
    return type(backbone_config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(backbone_config, "is_decoder", False)


def input_device(model: Any) -> torch.device:
    """Where a model's inputs go; modules that are spread over devices move them on by themselves."""
    device = model.device
    return torch.device("cpu") if device.type == "meta" else device


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Dropout off, then every module back in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def backbone_init_options(backbone_config: PretrainedConfig) -> dict[str, Any]:
    """Arguments for the backbone's class: no pooler, which would be trained by nothing."""
    if type(backbone_config) not in MODEL_MAPPING:
        raise ValueError(
            f"AutoModel has no model for the configuration {type(backbone_config).__name__}; give a backbone that "
            "Transformers knows (one of custom code is not supported)"
        )
    model_class = MODEL_MAPPING[type(backbone_config)]
    takes_it = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if takes_it else {}


def load_backbone(
    backbone: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    dtype: torch.dtype | str | None,
    attn_implementation: str | None,
    gguf_file: str | None,
    revision: str,
    token: str | bool | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a backbone and its tokenizer, or check those given; see `PRMForStepScoring.from_backbone`."""
    if isinstance(backbone, PreTrainedModel):
        model, tokenizer = _loaded_backbone(backbone, tokenizer, dtype)
    elif isinstance(backbone, (str, Path)):
        name, gguf_file = _find_gguf(str(backbone), gguf_file)
        source = {"revision": revision, "token": token, "gguf_file": gguf_file}
        model = _load_model(name, dtype or torch.float32, attn_implementation, source)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **source)
        else:
            tokenizer = copy.deepcopy(tokenizer)
    else:
        raise TypeError(
            f"backbone must be a Hub id, a folder, a GGUF file or a loaded model, got {type(backbone).__name__}"
        )
    if Path(model.config.name_or_path).exists():
        model.config.name_or_path = ""  # saved with the PRM, where a local path means nothing
    if is_bidirectional(model.config):
        logger.warning(
            f"{model.config.model_type} is bidirectional: the score of a step depends on the steps after it, so a "
            "solution must be complete when it is scored, and scores may change as steps are added"
        )
    return model, tokenizer


def add_separator(
    backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, separator_token: str
) -> tuple[int, bool]:
    """Give tokenizer and backbone the separator.

    A token that is new to the tokenizer is added as special. One that is new to it or to the backbone gets
    the mean of the embeddings of the vocabulary; one that both have, or text that is one token, keeps its own.

    Returns:
        The separator's id, and whether it is reserved, so that no text of a user gives it.
    """
    vocabulary = len(tokenizer)
    try:
        token_id = separator_id(tokenizer, separator_token)
        is_new = False
    except ValueError:
        is_new = True
    if is_reserved := is_new or token_id in tokenizer.added_tokens_decoder:
        special = AddedToken(separator_token, special=True, normalized=False)
        tokenizer.add_tokens([special], special_tokens=True)
        token_id = separator_id(tokenizer, separator_token)
    rows = backbone.get_input_embeddings().weight.shape[0]
    if token_id >= rows:
        backbone.resize_token_embeddings(token_id + 1, mean_resizing=False)
    if is_new or token_id >= rows:
        weight = backbone.get_input_embeddings().weight
        with torch.no_grad():
            weight[token_id] = weight[: min(vocabulary, rows)].float().mean(dim=0).to(weight.dtype)
    if not is_reserved:
        # The name of a token may be other than its text, as "Ċ" is for a line end.
        texts = [separator_token, tokenizer.decode([token_id])]
        as_text = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        is_reserved = all(token_id not in ids for ids in as_text)
    return token_id, is_reserved


def chat_problem_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template around one user's message, with `{problem}` for its text.

    Raises:
        ValueError: there is no chat template, or it changes the message.
    """
    if not tokenizer.chat_template:
        raise ValueError("prompt_layout='chat' needs a tokenizer with a chat template; use prompt_layout='plain'")
    messages = [{"role": "user", "content": _PROBLEM_MARKER}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if text.count(_PROBLEM_MARKER) != 1:
        raise ValueError(
            "the chat template does not write the user's message exactly once, as it stands; give problem_template "
            f"yourself. It wrote: {text!r}"
        )
    return text.replace(_PROBLEM_MARKER, "{problem}")


def _find_gguf(name: str, gguf_file: str | None) -> tuple[str, str | None]:
    """The folder and the GGUF file in it, for a GGUF file or a folder that holds nothing else to load."""
    path = Path(name)
    if not path.exists() and (path.is_absolute() or name.count("/") > 1 or name.startswith(".")):
        raise FileNotFoundError(f"{name} is neither a folder, nor a GGUF file, nor a Hub id such as 'Qwen/Qwen3-0.6B'")
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), path.name
    if gguf_file is not None or not path.is_dir() or (path / "config.json").exists():
        return name, gguf_file
    found = sorted(file.name for file in path.glob("*.gguf"))
    if len(found) > 1:
        raise ValueError(f"{name} holds {len(found)} GGUF files; name one with gguf_file: {', '.join(found)}")
    return name, found[0] if found else None


def _load_model(
    name: str, dtype: torch.dtype | str, attn_implementation: str | None, source: dict[str, Any]
) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **source)
    except ValueError as error:
        if "trust_remote_code" not in str(error) and "custom code" not in str(error):
            raise
        raise ValueError(
            f"{name} is a backbone of custom code, which a saved PRM could not bring along; use one that "
            "Transformers knows"
        ) from error
    _check_backbone(config, name)
    options = backbone_init_options(config)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    model, info = AutoModel.from_pretrained(
        name, dtype=dtype, output_loading_info=True, trust_remote_code=False, **options, **source
    )
    if missing := sorted(map(str, info["missing_keys"])):
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(f"{name} lacks {len(missing)} weights of its backbone ({shown}), which would be random")
    if source["gguf_file"] is not None:
        _forget_gguf(model)
    return model


def _check_backbone(config: PretrainedConfig, name: str) -> None:
    """Refuse what cannot be a backbone before its weights are read."""
    if config.model_type == PRMConfig.model_type:
        raise ValueError(
            f"{name} is a PRM already, whose head would be lost; load it with PRMForStepScoring.from_pretrained(...)"
        )
    PRMConfig(text_config=config)


def _loaded_backbone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, dtype: torch.dtype | str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if tokenizer is None:
        raise ValueError("a loaded backbone needs its tokenizer: from_backbone(model, tokenizer=...)")
    _check_backbone(model.config, type(model).__name__)
    backbone = model.base_model
    _check_backbone(backbone.config, type(model).__name__)
    backbone_init_options(backbone.config)
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None
    if dtype not in (None, "auto"):
        backbone = backbone.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return backbone, copy.deepcopy(tokenizer)


def _forget_gguf(model: PreTrainedModel) -> None:
    """Make a model whose weights were read from GGUF, and are plain tensors now, a plain model."""
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
