"""A tiny, untrained decoder and its tokenizer for the demo: everything is made here, nothing downloaded.

The decoder has Qwen2's architecture with attention heads of 64, which serving engines support. The
tokenizer is a byte-level BPE of `Qwen2Tokenizer`'s own shape: Transformers builds that class for every
folder whose config says `model_type: qwen2`, whatever the folder's tokenizer files say, so any other
pre-tokenization would change silently on loading. The merges make one token of each common word of the
demo's texts; the numbers up to 99 are added as tokens of their own, which gives every operand and result
a fixed place in its step; and bytes cover all other text, so that nothing is unknown. Text comes back as
it was, in Unicode's composed form (NFC), to which that class brings it.

The weights are random, with one help: some attention heads start out looking a fixed distance back, at
the places where a step's numbers are (see `_look_back`). A decoder as small as this one would otherwise
spend the demo's minutes on finding out where to look.

    python -c "from trainer.demo_backbone import build_demo_backbone as b; print(b('demo-backbone', seed=0))"
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import Qwen2Config, Qwen2Model, Qwen2Tokenizer
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from .demo_data import generate_arithmetic

HEAD_SIZE = 64
# For each layer and head the distance in tokens that it starts out looking back; None for no such help.
# "Step 2: 7 + 2 = 9.<|step_end|>" has its numbers 2, 5 and 8 tokens before the separator, the sign 7, and
# the result of the step before 9 tokens before its own first number.
LOOK_BACK = ((2, 5, 7, 8), (1, 2, 9, 17), (None, None, None, None))
LOOK_BACK_STRENGTH = 3.0


def build_demo_backbone(
    folder: str | Path,
    *,
    seed: int,
    look_back: Sequence[Sequence[int | None]] = LOOK_BACK,
) -> Path:
    """Write a randomly initialized decoder and its tokenizer, ready for `AutoModel.from_pretrained`.

    The same seed gives the same weights; the global random state is left as it was.

    Args:
        folder: Where to save; made if absent.
        seed: Seeds the weights. The tokenizer is always the same.
        look_back: For each layer and head the distance in tokens that it starts out looking back, or None.

    Returns:
        The folder as a `Path`.
    """
    folder = Path(folder)
    tokenizer = build_demo_tokenizer()
    num_heads = len(look_back[0])
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=HEAD_SIZE * num_heads,
        intermediate_size=256,
        num_hidden_layers=len(look_back),
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=1024,
        # Texts are short, so that no rotary frequency has to tell far places apart.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2Model(config)
    for layer, distances in zip(model.layers, look_back, strict=True):
        for head, distance in enumerate(distances):
            if distance is not None:
                _look_back(layer.self_attn, head, distance, config.rope_parameters["rope_theta"])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_demo_tokenizer() -> Qwen2Tokenizer:
    """Build the demo's tokenizer: a byte-level BPE whose merges come from generated problems."""
    rows = generate_arithmetic(2000, seed=0)
    texts = [f"Problem: {row['problem']}\n\n" for row in rows]
    texts += [f"Step 1: {step}" for row in rows[:500] for step in row["steps"]]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, vocab_size=600, show_progress=False)
    numbers = [AddedToken(str(number), single_word=True, normalized=False) for number in range(100)]
    tokenizer.add_tokens(numbers)
    return tokenizer


@torch.no_grad()
def _look_back(attention: Qwen2Attention, head: int, distance: int, theta: float) -> None:
    """Set the biases of a head so that each token attends most to the one `distance` tokens before it.

    Rotary embeddings turn the pair `(i, i + d / 2)` of a query at position n by `n theta^(-2 i / d)`, and
    of a key likewise, so biases that differ by the angle of `distance` make their product largest there.
    """
    half = HEAD_SIZE // 2
    angles = distance * theta ** (-torch.arange(half) / half)
    first = slice(head * HEAD_SIZE, head * HEAD_SIZE + half)
    second = slice(head * HEAD_SIZE + half, (head + 1) * HEAD_SIZE)
    attention.k_proj.bias[first] = LOOK_BACK_STRENGTH
    attention.q_proj.bias[first] = LOOK_BACK_STRENGTH * torch.cos(angles)
    attention.q_proj.bias[second] = -LOOK_BACK_STRENGTH * torch.sin(angles)
