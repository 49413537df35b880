"""What backbones allow: the table against the models themselves, and what unknown ones are asked against the table."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
import transformers
import transformers.integrations.flash_attention as flash_integration
from transformers import AutoModel, PretrainedConfig

from modeling_prm import PRMForStepScoring, PRMProcessor, capabilities
from modeling_prm.capabilities import Capabilities, find_capabilities, known_capabilities

MakePRM = Callable[..., tuple[PRMForStepScoring, PRMProcessor]]

SIZES, DECODER = tiny_models.SIZES, tiny_models.DECODER
WINDOW = 16
HEADS = {**DECODER, "head_dim": 8}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": tiny_models.VOCABULARY}
PAD = {"pad_token_id": 0}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
T = transformers

# Configurations of families beyond those of `tiny_models`, by a name of the test.
MORE: dict[str, Callable[[], PretrainedConfig]] = {
    "arcee": lambda: T.ArceeConfig(**DECODER),
    "codegen": lambda: T.CodeGenConfig(**GPT, rotary_dim=4, n_ctx=256),
    "cohere": lambda: T.CohereConfig(**DECODER, **PAD),
    "cohere2": lambda: T.Cohere2Config(**DECODER, **PAD, sliding_window=WINDOW),
    "deepseek_v3": lambda: T.DeepseekV3Config(
        **{**DECODER, "num_key_value_heads": 4},
        **LATENT,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
    ),
    "ernie4_5": lambda: T.Ernie4_5Config(**DECODER),
    "exaone4": lambda: T.Exaone4Config(**DECODER, sliding_window=WINDOW, sliding_window_pattern=2),
    "falcon": lambda: T.FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=tiny_models.VOCABULARY
    ),
    "gemma": lambda: T.GemmaConfig(**HEADS),
    "gemma2": lambda: T.Gemma2Config(**HEADS, sliding_window=WINDOW),
    "glm": lambda: T.GlmConfig(**HEADS, **PAD),
    "glm4": lambda: T.Glm4Config(**HEADS, **PAD),
    "gpt_bigcode": lambda: T.GPTBigCodeConfig(**GPT),
    "gpt_neo": lambda: T.GPTNeoConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
        vocab_size=tiny_models.VOCABULARY,
        max_position_embeddings=256,
    ),
    "gpt_oss": lambda: T.GptOssConfig(**HEADS, num_local_experts=4, sliding_window=WINDOW),
    "gptj": lambda: T.GPTJConfig(**GPT, rotary_dim=4),
    "granite": lambda: T.GraniteConfig(**DECODER),
    "helium": lambda: T.HeliumConfig(**HEADS, **PAD),
    "mistral without a window": lambda: T.MistralConfig(**DECODER, sliding_window=None),
    "mixtral": lambda: T.MixtralConfig(**DECODER, num_local_experts=4, sliding_window=None),
    "nemotron": lambda: T.NemotronConfig(**DECODER),
    "olmo": lambda: T.OlmoConfig(**DECODER, **PAD),
    "olmo2": lambda: T.Olmo2Config(**DECODER, **PAD),
    "olmo3": lambda: T.Olmo3Config(**DECODER, **PAD, sliding_window=WINDOW),
    "persimmon": lambda: T.PersimmonConfig(**SIZES, vocab_size=tiny_models.VOCABULARY, max_position_embeddings=256),
    "phi3": lambda: T.Phi3Config(**DECODER, **PAD),
    "phi3 with a window": lambda: T.Phi3Config(**DECODER, **PAD, sliding_window=WINDOW),
    "qwen2 with a window": lambda: T.Qwen2Config(
        **DECODER, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen2_moe": lambda: T.Qwen2MoeConfig(**DECODER, **MOE, shared_expert_intermediate_size=24),
    "seed_oss": lambda: T.SeedOssConfig(**HEADS),
    "smollm3": lambda: T.SmolLM3Config(**DECODER, **PAD),
    "stablelm": lambda: T.StableLmConfig(**DECODER),
    "starcoder2": lambda: T.Starcoder2Config(**DECODER, sliding_window=WINDOW),
    "biogpt": lambda: T.BioGptConfig(**SIZES, vocab_size=tiny_models.VOCABULARY, max_position_embeddings=256),
    "xglm": lambda: T.XGLMConfig(
        d_model=32,
        num_layers=2,
        attention_heads=4,
        ffn_dim=48,
        vocab_size=tiny_models.VOCABULARY,
        max_position_embeddings=256,
    ),
}
CONFIGS = {name: config for name, (config, _) in tiny_models.FAMILIES.items()} | MORE

# "a" has 37 ids, "b" has 25, and "c" begins with 20 of "a" and goes on as "b" begins.
A = torch.randint(10, 300, (37,), generator=torch.Generator().manual_seed(1))
B = torch.randint(10, 300, (25,), generator=torch.Generator().manual_seed(2))
SHARED = 20
C = torch.cat([A[:SHARED], B])


def make_backbone(name: str, attention: str = "eager") -> Any:
    torch.manual_seed(0)
    backbone = AutoModel.from_config(CONFIGS[name](), attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    return backbone


def as_prm(backbone: Any) -> Any:
    """What `find_capabilities` reads of a PRM, for backbones that no tokenizer is at hand for."""
    return SimpleNamespace(config=SimpleNamespace(text_config=backbone.config), backbone=backbone)


@torch.no_grad()
def states(backbone: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    return backbone(input_ids=ids[None], use_cache=False, **inputs).last_hidden_state[0]


def packed_states(backbone: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """States of A and B in one row, told apart by position ids, and alone."""
    position_ids = torch.cat([torch.arange(len(A)), torch.arange(len(B))])[None]
    together = states(backbone, torch.cat([A, B]), position_ids=position_ids)
    return together, torch.cat([states(backbone, A), states(backbone, B)])


def shared_states(backbone: Any, can: Capabilities) -> tuple[torch.Tensor, torch.Tensor]:
    """States of A and, after its first tokens, the rest of C in one row by masks, and alone."""
    # Token by token: its sequence's earlier tokens, and itself.
    of_a, of_c = list(range(len(A))), [*range(SHARED), *range(len(A), len(A) + len(B))]
    position_ids = torch.tensor([*range(len(A)), *range(SHARED, SHARED + len(B))])
    masks = {"full_attention": torch.full((62, 62), -1e30), "sliding_attention": torch.full((62, 62), -1e30)}
    for sequence in (of_a, of_c):
        for place, token in enumerate(sequence):
            masks["full_attention"][token, sequence[: place + 1]] = 0.0
            first = 0 if can.window is None else max(place + 1 - can.window, 0)
            masks["sliding_attention"][token, sequence[first : place + 1]] = 0.0
    by_type = {name: mask[None, None] for name, mask in masks.items()}
    mask = by_type["sliding_attention"] if can.masks == "one" else by_type
    together = states(backbone, torch.cat([A, B]), position_ids=position_ids[None], attention_mask=mask)
    return together, torch.cat([states(backbone, A), states(backbone, C)[SHARED:]])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_says_what_the_models_do(name: str) -> None:
    backbone = make_backbone(name)
    can = find_capabilities(as_prm(backbone))
    assert backbone.config.model_type in capabilities._FAMILIES or name in tiny_models.BIDIRECTIONAL
    for attention in ("eager", "sdpa"):
        if attention == "sdpa":
            try:
                backbone.set_attn_implementation("sdpa")
            except ValueError:
                break
            assert find_capabilities(as_prm(backbone)) == can
        together, alone = packed_states(backbone)
        # What is not kept apart is off by tenths and more, as the states are of the size of 1.
        assert ((together - alone).abs().max() < 1e-5) == can.packs
        assert (together - alone).abs().max() < 1e-5 or (together - alone).abs().max() > 0.1
        if can.masks is not None:
            together, alone = shared_states(backbone, can)
            assert (together - alone).abs().max() < 1e-5
    assert (can.reason is None) == (can.packs and can.masks is not None)


def test_the_table_names_no_family_that_is_not_tested() -> None:
    tested = {config().model_type for config in CONFIGS.values()}
    assert set(capabilities._FAMILIES) - tested == {"llama4_text"}


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **rest: Any,
) -> torch.Tensor:
    """What flash attention computes of (B, L, heads, D), written out: rows are cut where positions start again, if
    the batch has one row, and no mask of ours is looked at.
    """
    length, heads, index = query.shape[1], query.shape[2], torch.arange(query.shape[1])
    key, value = (states.repeat_interleave(heads // states.shape[2], dim=2) for states in (key, value))
    sees = index <= index[:, None]
    if len(query) == 1 and position_ids is not None:
        sequence = (position_ids.reshape(-1) == position_ids.min()).cumsum(0)
        sees = sees & (sequence == sequence[:, None])
    if sliding_window is not None:
        sees = sees & (index[:, None] - index < sliding_window)
    scores = torch.einsum("blhd,bmhd->bhlm", query, key) * (softmax_scale or query.shape[-1] ** -0.5)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    assert scores.shape[-2:] == (length, length)
    return torch.einsum("bhlm,bmhd->blhd", scores.masked_fill(~sees, -1e30).softmax(-1), value)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in tiny_models.BIDIRECTIONAL])
def test_with_flash_attention_one_row_is_kept_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernels need a GPU; what the models hand to them does not.
    backbone = make_backbone(name)
    if not backbone._supports_flash_attn:
        pytest.skip("has no flash attention")
    monkeypatch.setattr(flash_integration, "_flash_attention_forward", flash_attention)
    monkeypatch.setattr(flash_integration, "get_target_dtype", lambda query, module: None)
    backbone.config._attn_implementation_internal = "flash_attention_2"
    can = find_capabilities(as_prm(backbone))
    assert can.masks is None
    if can.packs:
        assert can.one_row
        together, alone = packed_states(backbone)
        assert (together - alone).abs().max() < 1e-5
    else:
        assert name in ("opt", "falcon", "biogpt", "gpt_oss", "gpt_bigcode", "gpt_neo", "gptj", "persimmon")


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in tiny_models.BIDIRECTIONAL])
def test_a_cached_prefix_gives_what_the_whole_sequence_gives(name: str) -> None:
    backbone = make_backbone(name)
    assert find_capabilities(as_prm(backbone)).has_cache
    with torch.no_grad():
        cache = backbone(input_ids=C[None, :SHARED], use_cache=True).past_key_values
        rest = backbone(input_ids=C[None, SHARED:], past_key_values=copy.deepcopy(cache), use_cache=True)
    assert (rest.last_hidden_state[0] - states(backbone, C)[SHARED:]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T.BertConfig(), "its tokens see later ones"),
        (T.Gemma3TextConfig(use_bidirectional_attention=True), "its tokens see later ones"),
        (T.MambaConfig(), "recurrent or convolutional layers"),
        (T.Mamba2Config(), "recurrent or convolutional layers"),
        (T.RwkvConfig(), "recurrent or convolutional layers"),
        (T.Qwen3NextConfig(), "recurrent or convolutional layers"),
        (T.Lfm2Config(), "recurrent or convolutional layers"),
        (T.FalconConfig(alibi=True), "ALiBi"),
        (T.Llama4TextConfig(), "not known here|some versions"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PretrainedConfig) else "",
)
def test_what_runs_through_a_row_or_sees_later_tokens_stays_alone(config: PretrainedConfig, reason: str) -> None:
    can = known_capabilities(config)
    assert can is not None
    assert (can.packs, can.masks) == (False, None)
    assert re.search(reason, can.reason or "")


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "phi", "gpt_neox", "gemma", "opt", "falcon", "xglm"])
def test_unknown_backbones_are_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = make_backbone(name)
    known = find_capabilities(as_prm(backbone))
    monkeypatch.setattr(capabilities, "_FAMILIES", {})
    backbone.train()
    state = torch.random.get_rng_state()
    asked = find_capabilities(as_prm(backbone))
    assert (asked.packs, asked.shares_prefix) == (known.packs, known.shares_prefix)
    assert asked.masks in (None, "one")
    assert (asked.reason is None) == known.packs
    # Nothing is left of the question.
    assert all(module.training for module in backbone.modules())
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in backbone.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_unknown_backbones_that_mix_a_row_are_found_out(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "is_bidirectional", lambda config: False)
    for name in tiny_models.BIDIRECTIONAL[:2]:
        can = find_capabilities(as_prm(make_backbone(name).to(dtype)))
        assert (can.packs, can.masks) == (False, None)
        assert "it mixes those of one row" in (can.reason or "")
    monkeypatch.setattr(capabilities, "_FAMILIES", {})
    can = find_capabilities(as_prm(make_backbone("llama").to(dtype)))
    assert (can.packs, can.masks, can.reason) == (True, "one", None)


def test_unknown_backbones_that_no_short_question_can_tell_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "_FAMILIES", {})
    assert "sliding" in (find_capabilities(as_prm(make_backbone("mistral"))).reason or "")
    assert "no position ids" in (find_capabilities(as_prm(AutoModel.from_config(bloom()))).reason or "")
    backbone = make_backbone("llama").to("meta")
    can = find_capabilities(as_prm(backbone))
    assert (can.packs, can.masks) == (False, None)
    assert "raised" in (can.reason or "")


def bloom() -> PretrainedConfig:
    return T.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=tiny_models.VOCABULARY)


@pytest.mark.parametrize(
    ("attention", "packs", "one_row"),
    [
        ("flash_attention_2", True, True),
        ("kernels-community/flash-attn3", True, True),
        ("flex_attention", True, False),
        ("paged|sdpa", False, False),
    ],
)
def test_other_attention_takes_no_masks(attention: str, packs: bool, one_row: bool) -> None:
    backbone = make_backbone("llama")
    backbone.config._attn_implementation_internal = attention
    can = find_capabilities(as_prm(backbone))
    assert (can.packs, can.one_row, can.masks) == (packs, one_row, None)
    assert attention in (can.reason or "")
    backbone = make_backbone("opt")
    backbone.config._attn_implementation_internal = attention
    can = find_capabilities(as_prm(backbone))
    assert (can.packs, can.masks) == (False, None)


def test_a_prm_is_asked_for_its_backbone(make_prm: MakePRM) -> None:
    assert find_capabilities(make_prm("gemma3")[0]).window == WINDOW
    assert find_capabilities(make_prm("qwen2")[0]) == Capabilities(packs=True, masks="per_layer_type", has_cache=True)
