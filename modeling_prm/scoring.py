"""Scores, and ranks, solutions with a PRM: `model.verifier(processor).score_solution(problem, steps)`."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .base_verifier import BaseVerifier, ScoredRows
from .processing_prm import EncodedSolution

# Padded tokens in one forward pass: enough to share the weights' reading, little enough to fit. Not tuned.
MAX_TOKENS_ON_CPU = 2_048
MAX_TOKENS = 16_384


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
        max_tokens = max_tokens_per_batch or (MAX_TOKENS_ON_CPU if device.type == "cpu" else MAX_TOKENS)
        batches = plan_batches([len(item.input_ids) if item else 0 for item in encoded], batch_size, max_tokens)
        with evaluating(self.model):
            for rows in batches:
                yield ScoredRows(rows, self._forward([encoded[row] for row in rows], device))  # type: ignore[misc]

    @torch.inference_mode()
    def _forward(self, items: list[EncodedSolution], device: torch.device) -> torch.Tensor:
        """Step probabilities (B, S) in float64, NaN in rows with a logit that is not finite."""
        batch = self.processor.pad(items, return_tensors="pt")
        output = self.model(**{name: tensor.to(device) for name, tensor in batch.items()})
        is_finite = output.logits.isfinite().reshape(len(items), -1).all(dim=1, keepdim=True)
        step_probs = output.step_probs.masked_fill(~is_finite, float("nan"))
        return step_probs.to("cpu", torch.float64)


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


def plan_batches(lengths: Sequence[int], batch_size: int | None, max_tokens: int) -> list[list[int]]:
    """Rows grouped for forward passes, longest first; rows of length 0 are left out.

    A group holds at most `batch_size` rows, and `max_tokens` tokens when padded to its longest row; a longer
    row is alone.
    """
    order = sorted((row for row, length in enumerate(lengths) if length), key=lambda row: -lengths[row])
    batches: list[list[int]] = []
    for row in order:
        current = batches[-1] if batches else []
        fits = current and (len(current) + 1) * lengths[current[0]] <= max_tokens
        if fits and (batch_size is None or len(current) < batch_size):
            current.append(row)
        else:
            batches.append([row])
    return batches


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
