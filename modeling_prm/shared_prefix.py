"""Forward passes over tokens that come after tokens already computed, so that what sequences share is computed once.

A sequence is a path through segments, each of which was computed in one pass:

    solution a:  [ problem, its steps                  ]    a segment that begins a sequence
    solution b:  [ problem ][ its steps                ]    the first part of a's segment, then one of its own
    solution c:  [ problem ][ b's steps ][ its steps   ]

Letters: B segments in a pass, P tokens before them at most, L tokens in them at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import Cache


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
    attention_mask = None
    if min(starts) < most:
        attention_mask = (torch.arange(most + length) >= most - torch.tensor(starts).unsqueeze(1)).long().to(device)
    steps = max(1, *(len(segment.reads) for segment in segments))
    step_positions = [
        [place - segment.start for place in segment.reads] + [-1] * (steps - len(segment.reads)) for segment in segments
    ]
    cache = _PassCache(segments, most)
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
        self._segments = segments
        self._most = most
        self._keeps = any(segment.keep for segment in segments)
        self._computed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # Neighbours that come after the same tokens are filled at once.
        self._groups: list[tuple[int, int, tuple[Piece, ...]]] = []
        for row, segment in enumerate(segments):
            if self._groups and self._groups[-1][2] == segment.before:
                self._groups[-1] = (self._groups[-1][0], row + 1, segment.before)
            else:
                self._groups.append((row, row + 1, segment.before))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, heads, P + L, head size) of a layer, from those of the L tokens of this pass."""
        if self._keeps:
            self._computed[layer_idx] = (key_states, value_states)
        if not self._most:
            return key_states, value_states
        return self._join(key_states, layer_idx, 0), self._join(value_states, layer_idx, 1)

    def _join(self, states: torch.Tensor, layer: int, which: int) -> torch.Tensor:
        rows, heads, length, size = states.shape
        joined = states.new_empty(rows, heads, self._most + length, size)
        joined[:, :, self._most :] = states
        for first, end, before in self._groups:
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
