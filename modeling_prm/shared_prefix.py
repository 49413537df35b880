"""Forward passes over tokens that come after tokens already computed, so that what sequences share is computed once.

A sequence is a path through segments, each of which was computed in one pass:

    solution a:  [ problem, its steps                  ]    a segment that begins a sequence
    solution b:  [ problem ][ its steps                ]    the first part of a's segment, then one of its own
    solution c:  [ problem ][ b's steps ][ its steps   ]

Letters: B segments in a pass, P tokens before them at most, L tokens in them at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import Cache

# Keys and values of unequal size, and chunks, which the split does not know.
_NOT_SPLIT = frozenset({"deepseek_v3", "llama4_text"})


class Piece(NamedTuple):
    """The tokens of a segment up to the place `stop` in the sequence."""

    segment: Segment
    stop: int


@dataclass(eq=False, kw_only=True)
class Segment:
    """Tokens of a sequence that are computed in one pass.

    Args:
        ids: its tokens.
        before: what comes before them in the sequence.
        keep: how many of its tokens others begin with, whose keys and values are kept.

    Attributes:
        reads: the places in the sequence at which a score is read, each with its index in `probs`.
        probs: once computed, the step probabilities there, NaN where a logit is not finite.
        states: once computed, keys and values (heads, keep, head size) of each layer.
    """

    ids: Sequence[int]
    before: tuple[Piece, ...] = ()
    keep: int = 0
    reads: dict[int, int] = field(default_factory=dict)
    probs: list[float] = field(default_factory=list)
    states: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    @property
    def start(self) -> int:
        """The place of its first token in the sequence."""
        return self.before[-1].stop if self.before else 0

    def read_at(self, place: int) -> int:
        """Have a score read at a place in the sequence; return its index in `probs`."""
        return self.reads.setdefault(place, len(self.reads))


def cut_path(path: Sequence[Piece], stop: int) -> tuple[Piece, ...]:
    """The first `stop` tokens of a path."""
    pieces: list[Piece] = []
    for segment, end in path:
        if segment.start >= stop:
            break
        pieces.append(Piece(segment, min(end, stop)))
    return tuple(pieces)


def splits_attention(model: Any, device: torch.device, length: int) -> bool:
    """Whether attention over what comes before is computed apart, as the fused one for CPUs allows.

    Every family of the table but those named here computes attention once a layer, right after the layer has told the
    cache its keys; the tests try them all.
    """
    config = model.config.text_config
    window = getattr(config, "sliding_window", None)
    return (
        device.type == "cpu"
        and config.model_type not in _NOT_SPLIT
        and getattr(config, "_attn_implementation", None) == "sdpa"
        and model.backbone.dtype in (torch.float32, torch.bfloat16)
        and (window is None or length <= window)
        and hasattr(torch, "_scaled_dot_product_flash_attention_for_cpu")
    )


@torch.inference_mode()
def compute(model: Any, segments: Sequence[Segment], device: torch.device) -> None:
    """Compute segments in one pass: their `probs`, and their `states` where some are to be kept.

    Args:
        model: a PRM of which a cached prefix may be used. Padding stands on the right of each segment, where no
            token that counts sees it, so that it needs no mask; another padding stands on the left of shorter prefixes.
        segments: with the segments before them computed.
        device: of the model's inputs.
    """
    lengths = [len(segment.ids) for segment in segments]
    starts = [segment.start for segment in segments]
    length, most = max(lengths), max(starts)
    # Any id does for padding; places stay within what the backbone reads.
    input_ids = [[*segment.ids] + [0] * (length - len(segment.ids)) for segment in segments]
    offsets = torch.arange(length)
    last = torch.tensor(lengths).unsqueeze(1) - 1
    position_ids = torch.tensor(starts).unsqueeze(1) + torch.minimum(offsets, last)
    splits = most > 0 and splits_attention(model, device, most + length)
    attention_mask = None
    if min(starts) < most and not splits:
        attention_mask = (torch.arange(most + length) >= most - torch.tensor(starts).unsqueeze(1)).long().to(device)
    steps = max(1, *(len(segment.reads) for segment in segments))
    step_positions = [
        [place - segment.start for place in segment.reads] + [-1] * (steps - len(segment.reads)) for segment in segments
    ]
    cache = _PassCache(segments, 0 if splits else most)
    with _SplitAttention(cache) if splits else nullcontext():
        output = model(
            input_ids=torch.tensor(input_ids).to(device),
            attention_mask=attention_mask,
            position_ids=position_ids.to(device),
            step_positions=torch.tensor(step_positions).to(device),
            past_key_values=cache,
            use_cache=True,
        )
    read_probs(output, segments)
    for row, segment in enumerate(segments):
        if segment.keep:
            # Copies, so that a row does not keep its whole batch.
            segment.states = [
                (keys[row, :, : segment.keep].clone(), values[row, :, : segment.keep].clone())
                for keys, values in cache.computed()
            ]


def read_probs(output: Any, segments: Sequence[Segment]) -> None:
    """Give segments the step probabilities of a pass, NaN where a logit is not finite."""
    finite = output.logits.isfinite()
    if finite.dim() == 3:
        finite = finite.all(dim=-1)
    # The one wait for the device in a pass.
    probs = output.step_probs.masked_fill(~finite, float("nan")).to("cpu", torch.float64).tolist()
    for row, segment in enumerate(segments):
        segment.probs = probs[row][: len(segment.reads)]


class _PassCache(Cache):
    """What the backbone takes for a cache during one pass. It grows by nothing and holds no copy for each row:
    a layer's keys and values are put together when the layer asks for them.
    """

    def __init__(self, segments: Sequence[Segment], most: int) -> None:
        super().__init__(layers=[])
        self._most = most
        self.layer: int | None = None
        self._keeps = any(segment.keep for segment in segments)
        self._computed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # Neighbours that come after the same tokens are filled at once.
        self.groups: list[tuple[int, int, tuple[Piece, ...]]] = []
        for row, segment in enumerate(segments):
            if self.groups and self.groups[-1][2] == segment.before:
                self.groups[-1] = (self.groups[-1][0], row + 1, segment.before)
            else:
                self.groups.append((row, row + 1, segment.before))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, heads, P + L, head size) of a layer, from those of the L tokens of this pass."""
        self.layer = layer_idx
        if self._keeps:
            self._computed[layer_idx] = (key_states, value_states)
        if not self._most:
            return key_states, value_states
        return self._join(key_states, layer_idx, 0), self._join(value_states, layer_idx, 1)

    def _join(self, states: torch.Tensor, layer: int, which: int) -> torch.Tensor:
        rows, heads, length, size = states.shape
        joined = states.new_empty(rows, heads, self._most + length, size)
        joined[:, :, self._most :] = states
        for first, end, before in self.groups:
            at = self._most - (before[-1].stop if before else 0)
            # Masked, but what is masked must be a number.
            joined[first:end, :, :at] = 0
            for segment, stop in before:
                part = segment.states[layer][which][:, : stop - segment.start]  # type: ignore[index]
                joined[first:end, :, at : at + part.shape[1]] = part
                at += part.shape[1]
        return joined

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._most

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._most + query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._most

    def computed(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values (B, heads, L, head size) of the tokens of this pass, layer by layer."""
        return [self._computed[layer] for layer in sorted(self._computed)]


class _SplitAttention(torch.overrides.TorchFunctionMode):
    """During one pass of this thread, attention over what comes before each row is computed apart, and the two are
    merged by the sums of their exponentials (2402.05099).

    So nothing that comes before is copied for each row or each head, rows need no mask and no padding on the left,
    and rows that come after the same tokens are one product with them.
    """

    def __init__(self, cache: _PassCache) -> None:
        super().__init__()
        self._cache = cache

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention and self._cache.layer is not None:
            layer, self._cache.layer = self._cache.layer, None
            return self._attend(layer, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Attention of query (B, heads, L, D) over keys and values (B, key heads, L, D), and over those before."""
        rows, heads, length, size = query.shape
        repeats = heads // key.shape[1]
        # As the layer will read it.
        joined = query.new_empty(rows, length, heads, size).transpose(1, 2)
        # The fused attention is faster in float32 than in bfloat16.
        query, key, value = query.float(), key.float(), value.float()
        own, own_sum = _fused(
            query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), length > 1, scale
        )
        for first, end, before in self._cache.groups:
            if not before:
                joined[first:end] = own[first:end]
                continue
            states = [
                (keys[:, : stop - segment.start], values[:, : stop - segment.start])
                for segment, stop in before
                for keys, values in [segment.states[layer]]  # type: ignore[index]
            ]
            keys, values = (torch.cat(parts, dim=1).float().unsqueeze(0) for parts in zip(*states, strict=True))
            # Rows, and heads that share keys, are more queries of one head.
            some = end - first
            folded = query[first:end].unflatten(1, (-1, repeats)).permute(1, 2, 0, 3, 4)
            shape = folded.shape
            theirs, their_sum = _fused(folded.reshape(1, shape[0], -1, size), keys, values, False, scale)
            theirs = theirs.reshape(shape).permute(2, 0, 1, 3, 4).reshape(some, heads, length, size)
            their_sum = their_sum.reshape(shape[:-1]).permute(2, 0, 1, 3).reshape(some, heads, length)
            share = torch.sigmoid(their_sum - own_sum[first:end]).unsqueeze(-1)
            joined[first:end] = torch.lerp(own[first:end], theirs, share)
        return joined


def _fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention (B, heads, L, D), and the logarithms (B, heads, L) of its sums of exponentials."""
    found: tuple[torch.Tensor, torch.Tensor] = torch._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, scale=scale
    )
    return found
