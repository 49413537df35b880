"""A tiny, untrained decoder and its tokenizer for the demo: everything is made here, nothing downloaded.

The decoder has Qwen2's architecture with attention heads of 64, which serving engines support. The
tokenizer is a byte-level BPE of `Qwen2Tokenizer`'s own shape: Transformers builds that class for every
folder whose config says `model_type: qwen2`, whatever the folder's tokenizer files say, so any other
pre-tokenization would change silently on loading. The merges make one token of each common word of the
demo's texts; the numbers up to 999 are added as tokens of their own, which shortens the texts and gives
every operand and result a fixed place in its step; and bytes cover all other text, so that nothing is
unknown. Text comes back as it was, in Unicode's composed form (NFC), to which that class brings it.

    python -c "from trainer.demo_backbone import build_demo_backbone as b; print(b('demo-backbone', seed=0))"
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import Qwen2Config, Qwen2Model, Qwen2Tokenizer

from .demo_data import generate_arithmetic

HEAD_SIZE = 64


def build_demo_backbone(
    folder: str | Path,
    *,
    seed: int,
    num_heads: int = 2,
    num_layers: int = 4,
    intermediate_size: int = 256,
) -> Path:
    """Write a randomly initialized decoder and its tokenizer, ready for `AutoModel.from_pretrained`.

    The same seed gives the same weights; the global random state is left as it was.

    Args:
        folder: Where to save; made if absent.
        seed: Seeds the weights. The tokenizer is always the same.
        num_heads: Attention heads of 64: the hidden size is `64 * num_heads`.
        num_layers: Decoder layers.
        intermediate_size: Width of the feed-forward part.

    Returns:
        The folder as a `Path`.
    """
    folder = Path(folder)
    tokenizer = build_demo_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=HEAD_SIZE * num_heads,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        # Transformers' usual 0.02 leaves so narrow a model attending to everything alike for long.
        initializer_range=0.08,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2Model(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_demo_tokenizer() -> Qwen2Tokenizer:
    """Build the demo's tokenizer: a byte-level BPE whose merges come from generated problems."""
    rows = generate_arithmetic(2000, seed=0)
    texts = [f"Problem: {row['problem']}\n\n" for row in rows]
    texts += [f"Step 1: {step}" for row in rows[:500] for step in row["steps"]]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, vocab_size=600, show_progress=False)
    numbers = [AddedToken(str(number), single_word=True, normalized=False) for number in range(1000)]
    tokenizer.add_tokens(numbers)
    return tokenizer
