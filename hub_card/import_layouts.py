"""Which layout a published checkpoint has, and what an imported PRM is put together from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import torch

from modeling_prm.processing_prm import separator_ids

from .import_source import Source, shown

# Hub id, in lower case: its layout and the options that its checkpoint does not hold.
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen/qwen2.5-math-prm-7b": ("qwen2_prm", {}),
    "qwen/qwen2.5-math-prm-72b": ("qwen2_prm", {}),
    "qwen/qwen2.5-math-7b-prm800k": ("qwen2_prm", {}),
    "gen-verse/reasonflux-prm-7b": ("reasonflux", {}),
    "peiyi9979/math-shepherd-mistral-7b-prm": ("math_shepherd", {}),
    "rlhflow/llama3.1-8b-prm-mistral-data": ("rlhflow", {}),
    "rlhflow/llama3.1-8b-prm-deepseek-data": ("rlhflow", {}),
    "skywork/skywork-o1-open-prm-qwen-2.5-1.5b": ("skywork", {}),
    "skywork/skywork-o1-open-prm-qwen-2.5-7b": ("skywork", {}),
    "huggingfaceh4/qwen2.5-math-1.5b-instruct-prm-0.2": ("token_classification", {"separator": "\n\n"}),
    "huggingfaceh4/qwen2.5-math-7b-instruct-prm-0.2": ("token_classification", {"separator": "\n\n"}),
    "jinachris/pure-prm-7b": ("token_classification", {"separator": "\n"}),
    "gair/reasoneval-7b": ("reasoneval", {}),
    "gair/reasoneval-34b": ("reasoneval", {}),
}
# Name, with wildcards: why it is not loaded.
REFUSED = {
    "*eurusprm*": "an implicit PRM: its score is the log-ratio of two language models, not a head on one",
    "*implicit*prm*": "an implicit PRM: its score is the log-ratio of two language models, not a head on one",
    "*thinkprm*": "a generative judge: it writes its verdict, there is no head to read",
    "*genprm*": "a generative judge: it writes its verdict, there is no head to read",
    "*r-prm*": "a generative judge: it writes its verdict, there is no head to read",
    "*actprm*": "an ensemble of heads whose probabilities are averaged, which no one head equals",
    "*openhands-critic*": "a critic of 26 outputs, of which none is the probability that a step is right",
}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What an imported PRM is made of.

    Args:
        prefix: what the names of the backbone's weights begin with.
        dense: names of weight (H, H) and bias (H,) of a first head layer with ReLU, None for a linear head.
        weight: (K, H), the rows of the head's logits.
        bias: (K,).
        class_weights: None for K = 1.
        options: separator and prompt, as `PRMConfig` names them.
        used: names of weights that are the head's.
        ignored: names of weights that the score does not need.
        render: a problem and steps as the text that the original's scoring tokenizes, where it tokenizes one text
            with special tokens in it.
    """

    prefix: str
    weight: torch.Tensor
    bias: torch.Tensor
    options: dict[str, Any]
    dense: tuple[torch.Tensor, torch.Tensor] | None = None
    class_weights: list[float] | None = None
    used: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    render: Callable[[str, list[str]], str] | None = field(default=None)


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What a user says about a checkpoint that it does not say itself."""

    separator: str | None = None
    problem_template: str | None = None
    class_weights: list[float] | None = None


def recognize(source: Source) -> tuple[str, dict[str, Any]]:
    """The layout of a checkpoint, by its own words, its name, or its weights' names.

    Returns:
        The layout's name, and options that go with a published model of this name.

    Raises:
        ValueError: it is none that is known; the message says what to do.
    """
    if source.config.get("model_type") == "prm":
        raise ValueError(
            f"{source.label} is a PRM of ours already; load it with PRMForStepScoring.from_pretrained(...)"
        )
    if source.layout:
        return str(source.layout.get("export_layout")), {}
    for name in source.names:
        for known, entry in KNOWN.items():
            if name in (known, known.split("/")[1]):
                return entry
        for pattern, reason in REFUSED.items():
            if fnmatch(name, pattern):
                raise ValueError(f"{source.label} cannot be imported: it is {reason}")
    keys = source.weights.keys()
    architecture = str((source.config.get("architectures") or ["?"])[0])
    if {"score.0.weight", "score.2.weight"} <= keys:
        return "qwen2_prm", {}
    if "v_head.summary.weight" in keys:
        return "skywork", {}
    if "score_head.weight" in keys:
        return "reasoneval", {}
    if architecture.endswith("ForTokenClassification"):
        return "token_classification", {}
    if architecture.endswith("ForSequenceClassification"):
        raise ValueError(
            f"{source.label} ({architecture}) scores a whole sequence once: an outcome reward model, not a PRM"
        )
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise ValueError(
            f"{source.label} is a causal language model ({architecture}), which does not say how steps are scored with "
            "it; name layout='math_shepherd' or 'rlhflow' if it is one of these PRMs (generative judges and implicit "
            "PRMs are not loaded), or start a new PRM with PRMForStepScoring.from_backbone(...)"
        )
    heads = sorted(key for key in keys if ".layers." not in key)
    raise ValueError(f"{source.label} ({architecture}) has no layout that is known; its other weights: {shown(heads)}")


def tensor(source: Source, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    """One of a checkpoint's weights in float32.

    Raises:
        ValueError: it is missing, or of another shape.
    """
    if name not in source.weights:
        others = sorted(key for key in source.weights if ".layers." not in key)
        raise ValueError(
            f"{source.label} is not a whole checkpoint of this layout: missing {name}; it has {shown(others)}"
        )
    value = source.weights[name]
    if shape is not None and tuple(value.shape) != shape:
        raise ValueError(f"{name} of {source.label} has shape {tuple(value.shape)}, this layout needs {shape}")
    return value.float()


def separator_name(source: Source, separator: str, ids: list[int]) -> str:
    """The separator's text, or its token's name where the text would be read as another token's name.

    Args:
        ids: what stands after a step.

    Raises:
        ValueError: neither gives these ids.
    """
    if source.layout:  # an export of ours names it as it is to be read
        return separator
    names = [separator, *(source.tokenizer.convert_ids_to_tokens(ids) if len(ids) == 1 else [])]
    for name in names:
        if separator_ids(source.tokenizer, name, is_reserved=False) == ids:
            return str(name)
    raise ValueError(
        f"the separator {separator!r} is {ids} to the tokenizer of {source.label}, whose vocabulary has it as another "
        "token too, so it cannot be written here"
    )


def hidden_size(source: Source) -> int:
    """The width of the backbone's hidden states, which heads are checked against."""
    size = source.config.get("hidden_size", source.config.get("n_embd"))
    if not isinstance(size, int):
        raise ValueError(f"config.json of {source.label} has no hidden_size")
    return size


def one_logit(weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two logits (wrong, right) as one: the softmax of two is the sigmoid of their difference."""
    return weight[1:] - weight[:1], bias[1:] - bias[:1]
