"""Scores, and ranks, solutions with a PRM: `model.verifier(processor).score_solution(problem, steps)`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers.utils import logging

from .backbones import evaluating, input_device
from .base_verifier import BaseVerifier, ScoredRows
from .batching import Chunk, owner, plan_batches, plan_chunks
from .capabilities import why_no_shared_prefix
from .processing_prm import EncodedSolution
from .shared_prefix import Piece, Segment, compute, read_probs

__all__ = ["PRMVerifier", "check_processor", "evaluating", "input_device"]

logger = logging.get_logger(__name__)

# Padded tokens in one forward pass. On 2 CPU cores 512 and 1,024 were about equally fast, and 2,048 took up to a tenth
# longer (5 layers of SmolLM2-135M's shape); the other number is not tuned.
MAX_TOKENS_ON_CPU = 1_024
MAX_TOKENS = 16_384
# So many times as many are planned together, and of them this many times as many kept for others.
_CHUNK, _KEPT = 32, 2


class PRMVerifier(BaseVerifier):
    """Scores solutions with a PRM, whichever way its model and processor were loaded.

    Calls leave the model in the mode it was in (dropout is off meanwhile), and touch neither the random
    state nor the tokenizer.

    Args:
        model: a `PRMForStepScoring`.
        processor: its `PRMProcessor`.
        aggregation: how step probabilities become one score, a method of `aggregate`; by default the config's.
        threshold: a step is called wrong where its probability is below this; by default the config's
            `error_threshold`.

    Raises:
        TypeError: model or processor is of another kind.
        ValueError: they do not belong together, there is no such aggregation, or the threshold is not in [0, 1].
    """

    def __init__(
        self, model: Any, processor: Any, aggregation: str | None = None, *, threshold: float | None = None
    ) -> None:
        check_processor(model, processor)
        super().__init__(
            processor,
            model.config.aggregation if aggregation is None else aggregation,
            model.config.error_threshold if threshold is None else threshold,
        )
        self.model = model

    @property
    def max_positions(self) -> int | None:
        """How many tokens the backbone reads."""
        limit: int | None = self.model.config.max_positions
        return limit

    def _score_encoded(
        self,
        encoded: list[EncodedSolution | None],
        first_idx: int,
        *,
        batch_size: int | None,
        max_tokens_per_batch: int | None,
    ) -> Generator[ScoredRows, None, None]:
        """Forward passes over solutions of similar length, the longest first."""
        device = input_device(self.model)
        max_tokens = max_tokens_per_batch or default_max_tokens(device)
        reason = why_no_shared_prefix(self.model)
        if reason is not None and len(encoded) > 1:
            name = self.model.config.text_config.model_type
            logger.warning_once(f"solutions of one problem are computed each in full with {name}: {reason}")
        chunks = plan_chunks(
            encoded, shares=reason is None, most_kept=_KEPT * max_tokens, most_tokens=_CHUNK * max_tokens
        )
        run = compute if reason is None else self._compute_whole
        with evaluating(self.model):
            for chunk in chunks:
                for segments in run_batches(run, self.model, chunk.levels, batch_size, max_tokens, device):
                    rows = [row for segment in segments for row in chunk.ready[segment]]
                    if rows:
                        yield ScoredRows(rows, _step_probs(chunk, rows, encoded))

    @torch.inference_mode()
    def _compute_whole(self, model: Any, segments: Sequence[Segment], device: torch.device) -> None:
        """What `compute` does, for any backbone: sequences that share nothing."""
        items = [EncodedSolution(list(segment.ids), list(segment.reads), len(segment.reads)) for segment in segments]
        batch = self.processor.pad(items, return_tensors="pt")
        output = model(**{name: tensor.to(device) for name, tensor in batch.items()})
        read_probs(output, segments)


def check_processor(model: Any, processor: Any) -> None:
    """Check that model and processor have the same layout of ids.

    Raises:
        TypeError: one of them is of the wrong type.
        ValueError: they differ, the message names where; or the processor's `max_length` is more than the
            backbone reads.
    """
    if not hasattr(getattr(model, "config", None), "layout") or not hasattr(processor, "separator_token_id"):
        raise TypeError(
            "a PRMForStepScoring and its PRMProcessor are needed, got "
            f"{type(model).__name__} and {type(processor).__name__}; PRMForStepScoring.from_backbone(...) makes both"
        )
    theirs = {name: getattr(processor, name) for name in model.config.layout}
    theirs["separator_token_id"] = processor.separator_token_id
    ours = {**model.config.layout, "separator_token_id": model.config.separator_token_id}
    # A shorter limit in the processor is a choice, not a mistake.
    different = [name for name in ours if ours[name] != theirs[name] and name != "max_length"]
    if different:
        shown = "; ".join(f"{name} is {ours[name]!r} and {theirs[name]!r}" for name in different)
        raise ValueError(f"model and processor do not belong together: {shown}. Load both from the same checkpoint")
    probe = getattr(model.config, "ids_probe", None)
    if probe is not None and probe != processor.ids_probe:
        raise ValueError(
            "model and processor do not belong together: the tokenizer gives other ids than the one that the model was "
            "made with. Load both from the same checkpoint"
        )
    limit = model.config.max_positions
    if limit is not None and (processor.max_length is None or processor.max_length > limit):
        raise ValueError(
            f"the processor's max_length={processor.max_length} is more than the {limit} tokens that the backbone "
            f"reads; set it to at most {limit}"
        )


def default_max_tokens(device: torch.device) -> int:
    """Most tokens in a forward pass, padding included, where nothing else is said."""
    return MAX_TOKENS_ON_CPU if device.type == "cpu" else MAX_TOKENS


def run_batches(
    run: Callable[..., None],
    model: Any,
    levels: Iterable[Sequence[Segment]],
    batch_size: int | None,
    max_tokens: int,
    device: torch.device,
) -> Iterator[list[Segment]]:
    """Compute segments level by level, and yield those of each pass; where memory runs out, passes get smaller."""
    for level in levels:
        # Those that come after many tokens are apart from those that come after few, whose rows would be filled up.
        groups: dict[int, list[Segment]] = {}
        for segment in level:
            groups.setdefault(segment.start.bit_length() // 2, []).append(segment)
        for group in groups.values():
            waiting = plan_batches([len(segment.ids) for segment in group], batch_size, max_tokens)[::-1]
            while waiting:
                rows = waiting.pop()
                segments = _side_by_side([group[row] for row in rows])
                size = len(rows) * max(len(segment.ids) for segment in segments)
                # Memory may have run out since this pass was planned.
                if len(rows) == 1 or size <= max_tokens:
                    if _fits(run, model, segments, device):
                        yield segments
                        continue
                    max_tokens = size // 2
                half = len(rows) // 2
                waiting += [rows[half:], rows[:half]]


def _side_by_side(segments: list[Segment]) -> list[Segment]:
    """Segments with those that come after the same tokens next to each other, where they are filled in together."""
    groups: dict[tuple[Piece, ...], list[Segment]] = {}
    for segment in segments:
        groups.setdefault(segment.before, []).append(segment)
    return [segment for group in groups.values() for segment in group]


def _fits(run: Callable[..., None], model: Any, segments: list[Segment], device: torch.device) -> bool:
    """Compute segments in one pass; False where several are too many for the memory.

    Raises:
        RuntimeError: one alone is too much.
    """
    try:
        run(model, segments, device)
        return True
    except RuntimeError as error:
        text = str(error)
        if len(segments) == 1 or not ("out of memory" in text or "can't allocate memory" in text):
            raise
    logger.warning_once("memory ran out, so that forward passes get smaller; give a smaller max_tokens_per_batch")
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
    return False


def _step_probs(chunk: Chunk, rows: list[int], encoded: Sequence[EncodedSolution | None]) -> torch.Tensor:
    """Step probabilities (rows, S) float64 of rows that are complete."""
    probs = []
    for row in rows:
        places = encoded[row].step_positions  # type: ignore[union-attr]
        owners = [owner(chunk.paths[row], place) for place in places]
        probs.append([segment.probs[segment.reads[place]] for segment, place in zip(owners, places, strict=True)])
    width = max(map(len, probs))
    return torch.tensor([row + [0.0] * (width - len(row)) for row in probs], dtype=torch.float64)
