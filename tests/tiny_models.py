"""Tiny random backbones and tokenizers of many families, made in code, for the tests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModel, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast

# Enough text that a tokenizer of a few hundred entries merges letters, signs and ".\n".
CORPUS = [
    "Problem: What is 12 + 30?\n\nStep 1: 12 + 30 = 42.\nStep 2: So the answer is 42.\n",
    "Problem: Ann has 3 apples.\n\nStep 1: 3 * 4 = 12.\n\nStep 2: It is (12) {x} [y].\n",
    "the quick brown fox jumps over the lazy dog, again and again.\n\n",
] * 20
ALPHABET = pre_tokenizers.ByteLevel.alphabet()

VOCABULARY = 400
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
DECODER = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": VOCABULARY}


def byte_level_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = special or {"eos_token": "<|endoftext|>"}
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=list(special.values()), initial_alphabet=ALPHABET, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def sentencepiece_bpe_tokenizer() -> PreTrainedTokenizerFast:
    """BPE over "▁" with byte fallback and BOS, as Llama 2, Mistral and Gemma have it."""
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=special + byte_tokens, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    # Bytes are entries of the vocabulary, not special tokens, so that text cannot name them.
    model = models.BPE(**_bpe_state(tokenizer), unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    rebuilt = Tokenizer(model)
    rebuilt.normalizer = tokenizer.normalizer
    rebuilt.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    rebuilt.add_special_tokens(special)
    rebuilt.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=rebuilt, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _bpe_state(tokenizer: Tokenizer) -> dict[str, Any]:
    import json

    state = json.loads(tokenizer.to_str())["model"]
    return {"vocab": state["vocab"], "merges": [tuple(merge) for merge in state["merges"]]}


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """Unigram sentencepiece with EOS and no BOS, as T5 has it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece in lower case between [CLS] and [SEP], as BERT has it."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(names, special, strict=True)))


def roberta_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE between <s> and </s>, with a padding id that positions are counted from."""
    tokenizer = byte_level_tokenizer(bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def qwen_tokenizer(folder: Path) -> Any:
    """A tokenizer that `AutoTokenizer` makes a Qwen2Tokenizer of, as beside a Qwen2 config."""
    tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(folder)
    transformers.Qwen2Config(**DECODER).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def _gpt2_config() -> PretrainedConfig:
    return transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, vocab_size=VOCABULARY)


# Family: its configuration and its tokenizer.
FAMILIES: dict[str, tuple[Callable[[], PretrainedConfig], Callable[[], Any]]] = {
    "qwen2": (lambda: transformers.Qwen2Config(**DECODER), byte_level_tokenizer),
    "qwen3": (lambda: transformers.Qwen3Config(**DECODER, head_dim=8), byte_level_tokenizer),
    "qwen3_moe": (
        lambda: transformers.Qwen3MoeConfig(
            **DECODER, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
        ),
        byte_level_tokenizer,
    ),
    "llama": (lambda: transformers.LlamaConfig(**DECODER), sentencepiece_bpe_tokenizer),
    "mistral": (lambda: transformers.MistralConfig(**DECODER, sliding_window=16), sentencepiece_bpe_tokenizer),
    "gemma3": (
        lambda: transformers.Gemma3TextConfig(**DECODER, head_dim=8, sliding_window=16),
        sentencepiece_bpe_tokenizer,
    ),
    "gpt2": (_gpt2_config, byte_level_tokenizer),
    "phi": (lambda: transformers.PhiConfig(**DECODER), byte_level_tokenizer),
    "gpt_neox": (
        lambda: transformers.GPTNeoXConfig(**SIZES, max_position_embeddings=256, vocab_size=VOCABULARY),
        byte_level_tokenizer,
    ),
    "opt": (
        lambda: transformers.OPTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=48,
            word_embed_proj_dim=32,
            max_position_embeddings=256,
            vocab_size=VOCABULARY,
        ),
        unigram_tokenizer,
    ),
    "bert": (
        lambda: transformers.BertConfig(**SIZES, max_position_embeddings=256, vocab_size=VOCABULARY),
        wordpiece_tokenizer,
    ),
    "roberta": (
        lambda: transformers.RobertaConfig(**SIZES, max_position_embeddings=258, vocab_size=VOCABULARY, pad_token_id=1),
        roberta_tokenizer,
    ),
    "modernbert": (
        lambda: transformers.ModernBertConfig(
            **SIZES, max_position_embeddings=256, vocab_size=VOCABULARY, pad_token_id=0, local_attention=16
        ),
        wordpiece_tokenizer,
    ),
}
BIDIRECTIONAL = ("bert", "roberta", "modernbert")
DECODERS = tuple(name for name in FAMILIES if name not in BIDIRECTIONAL)


@functools.cache
def cached_tokenizer_folder(builder: Callable[[], Any], root: Path) -> Path:
    folder = root / builder.__name__
    builder().save_pretrained(folder)
    return folder


def write_backbone(family: str, folder: Path, seed: int = 0) -> Path:
    """Save a tiny random backbone of a family with its tokenizer, as a folder that `from_backbone` takes."""
    config, tokenizer = FAMILIES[family]
    torch.manual_seed(seed)
    model = AutoModel.from_config(config())
    with torch.no_grad():
        for parameter in model.parameters():
            # The usual initialization is too small to tell a right score from a wrong one.
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
