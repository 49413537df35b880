"""What a backbone allows beyond one padded sequence a row: the only place that knows.

    capabilities = find_capabilities(model)
    if not capabilities.packs:
        print(capabilities.reason)

Backbones that `_FAMILIES` names are taken at its word, which the tests check; of others the loaded weights are
asked, with sequences of a few tokens.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import PretrainedConfig

from .backbones import evaluating, input_device, is_bidirectional

MaskForm = Literal["one", "per_layer_type"]


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a backbone allows.

    Attributes:
        packs: several sequences in one row are kept apart by position ids that start again from 0, without an
            attention mask and without a cache.
        one_row: they are kept apart where the batch has one row only, as flash attention does.
        masks: `"one"`: a 4D float mask (B, 1, L, L) says for each token which others it sees;
            `"per_layer_type"`: such masks in a dictionary by layer type; None: neither is right.
        window: how many tokens a sliding layer sees, the token itself among them, or None.
        has_cache: the keys and values of a prefix may be computed once, for all that follow it.
        reason: why not all of it is allowed; None where it is.
    """

    packs: bool
    one_row: bool = False
    masks: MaskForm | None = None
    window: int | None = None
    has_cache: bool = False
    reason: str | None = None

    @property
    def shares_prefix(self) -> bool:
        """Whether sequences in one row may share the tokens with which they begin."""
        return self.masks is not None


_ONE = Capabilities(packs=True, masks="one", has_cache=True)
_PER_LAYER_TYPE = replace(_ONE, masks="per_layer_type")
# Their layers, or their position table, never see the position ids that tell packed rows apart.
_BY_MASK = replace(_ONE, packs=False, reason="it does not tell sequences in one row apart by their position ids")

_BY_ONE_MASK = frozenset(
    {"arcee", "codegen", "cohere", "deepseek_v3", "ernie4_5", "gemma", "glm", "glm4", "gpt2", "gpt_bigcode"}
    | {"gpt_neox", "gptj", "granite", "helium", "llama", "mistral", "mixtral", "nemotron", "olmo", "olmo2"}
    | {"persimmon", "phi", "phi3", "qwen3_moe", "seed_oss", "stablelm", "starcoder2"}
)
_BY_LAYER_TYPE = frozenset(
    {"cohere2", "exaone4", "gemma2", "gemma3_text", "olmo3", "qwen2", "qwen2_moe", "qwen3", "smollm3"}
)
_FAMILIES: dict[str, Capabilities] = {
    **dict.fromkeys(_BY_ONE_MASK, _ONE),
    **dict.fromkeys(_BY_LAYER_TYPE, _PER_LAYER_TYPE),
    **dict.fromkeys(("biogpt", "falcon", "opt", "xglm"), _BY_MASK),
    "gpt_oss": replace(_BY_MASK, masks="per_layer_type"),
    "gpt_neo": replace(_ONE, masks=None, reason="its local layers make their own masks"),
    "llama4_text": Capabilities(
        packs=False, has_cache=True, reason="its chunks are counted from the row's start in some versions"
    ),
}
# Of these no short probe could tell, or their state runs through the row.
_RECURRENT = frozenset(
    {"bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "lfm2", "lfm2_moe", "mamba", "mamba2"}
    | {"minimax", "nemotron_h", "olmo_hybrid", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm"}
    | {"zamba", "zamba2"}
)
# Their layers give flash attention no position ids.
_MIXED_BY_FLASH = frozenset({"gpt_bigcode", "gpt_neo", "gptj", "persimmon"})
_TAKE_MASKS = ("eager", "sdpa")
_KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}


def find_capabilities(model: Any) -> Capabilities:
    """What the backbone of a PRM allows, with the attention implementation that it is loaded with.

    Args:
        model: a `PRMForStepScoring`, perhaps with adapters. Nothing in it is changed.
    """
    config = model.config.text_config
    found = known_capabilities(config)
    return _limit_to_attention(config, _probe(model.backbone) if found is None else found)


def why_no_shared_prefix(model: Any) -> str | None:
    """Why sequences of a PRM may not begin with keys and values computed once; None where they may.

    Families that the table does not name are not asked: the whole sequence is right for all.
    """
    config = model.config.text_config
    found = known_capabilities(config)
    if found is None:
        return "it is not known here"
    if not found.has_cache:
        return found.reason
    attention = getattr(config, "_attn_implementation", None) or "eager"
    if attention not in _TAKE_MASKS:
        return f"the attention implementation {attention!r} is not known to take a cache that is put together"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [part.get("rope_type") for part in [rope, *rope.values()] if isinstance(part, dict)]
    if any(kind is not None and ("dynamic" in kind or kind == "longrope") for kind in kinds):
        return "its rotary frequencies change with the length"
    return None


def known_capabilities(config: PretrainedConfig) -> Capabilities | None:
    """What a backbone of this configuration allows in eager attention, or None where that is not known."""
    nothing = Capabilities(packs=False)
    bidirectional = not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", None)
    if bidirectional or is_bidirectional(config):
        return replace(nothing, reason="its tokens see later ones")
    layer_types = set(getattr(config, "layer_types", None) or ())
    recurrent = {name for name in layer_types if name.split("_")[-1] != "attention" or "linear" in name}
    if config.model_type in _RECURRENT or recurrent:
        return replace(nothing, reason="it has recurrent or convolutional layers, which run through a whole row")
    if getattr(config, "alibi", False):
        return replace(nothing, reason="its attention counts positions from the row's start (ALiBi)")
    window = getattr(config, "sliding_window", None)
    found = _FAMILIES.get(config.model_type)
    if found is None:
        slides = window is not None or layer_types - {"full_attention"}
        return replace(nothing, reason="its sliding or chunked layers are not known here") if slides else None
    if layer_types - _KNOWN_LAYER_TYPES:
        return replace(nothing, has_cache=found.has_cache, reason="it has layers of a type that is not known here")
    return replace(found, window=window)


def _limit_to_attention(config: PretrainedConfig, found: Capabilities) -> Capabilities:
    """What is left of it with the configuration's attention implementation."""
    attention = getattr(config, "_attn_implementation", None) or "eager"
    if attention in _TAKE_MASKS:
        return found
    if "flash" in attention and config.model_type in _MIXED_BY_FLASH:
        return Capabilities(packs=False, has_cache=found.has_cache, reason=f"{attention} mixes those of one row")
    if attention == "flex_attention" or "flash" in attention:
        reason = found.reason or f"{attention} takes no 4D float mask"
        return replace(found, masks=None, one_row="flash" in attention, reason=reason)
    return Capabilities(packs=False, reason=f"the attention implementation {attention!r} is not known here")


def _probe(backbone: Any) -> Capabilities:
    """Ask a loaded backbone with short sequences what it keeps apart."""
    parameters = inspect.signature(backbone.forward).parameters
    if "position_ids" not in parameters:
        return Capabilities(packs=False, reason="it takes no position ids")
    options = {"use_cache": False} if "use_cache" in parameters else {}
    try:
        with torch.inference_mode(), evaluating(backbone):
            packs = _is_kept_apart(backbone, options, shared=0, by_mask=False)
            takes_masks = (getattr(backbone.config, "_attn_implementation", None) or "eager") in _TAKE_MASKS
            masks = takes_masks and _is_kept_apart(backbone, options, shared=5, by_mask=True)
    except Exception as error:  # Whatever code this is, training can go on without.
        return Capabilities(packs=False, reason=f"it was asked with short sequences and raised {error!r}"[:200])
    reason = None if packs and masks else "asked with short sequences, it mixes those of one row"
    return Capabilities(packs=packs, masks="one" if masks else None, reason=reason)


def _is_kept_apart(backbone: Any, options: dict[str, Any], *, shared: int, by_mask: bool) -> bool:
    """Whether two sequences in one row, the second after `shared` tokens of the first, give what they give alone."""
    device = input_device(backbone)
    first = (torch.arange(12, device=device) * 101 + 7) % backbone.config.vocab_size
    second = torch.cat([first[:shared], (torch.arange(9, device=device) * 103 + 11) % backbone.config.vocab_size])

    def states(ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        hidden: torch.Tensor = backbone(input_ids=ids.unsqueeze(0), **inputs, **options).last_hidden_state[0]
        return hidden.float()

    row = torch.cat([first, second[shared:]])
    index = torch.arange(len(row), device=device)
    position_ids = torch.cat([index[: len(first)], index[shared : len(second)]]).unsqueeze(0)
    mask = None
    if by_mask:
        sees = (index <= index.unsqueeze(1)) & ~((index.unsqueeze(1) >= 12) & (index >= shared) & (index < 12))
        dtype = backbone.dtype
        mask = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill(~sees, torch.finfo(dtype).min)
        mask = mask.reshape(1, 1, *mask.shape)
    together = states(row, position_ids=position_ids, attention_mask=mask)
    alone = torch.cat([states(first), states(second)[shared:]])
    # How far the states move where nothing keeps the sequences apart.
    mixed = (states(row) - alone).abs().max()
    tolerance = 1e-2 if backbone.dtype == torch.float32 else 0.1
    return bool(mixed > 0) and bool((together - alone).abs().max() <= tolerance * mixed)
