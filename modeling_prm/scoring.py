"""Scores, and ranks, solutions with a PRM: `model.verifier(processor).score_solution(problem, steps)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils import logging

from .aggregation import aggregate, check_aggregation, first_error
from .processing_prm import EncodedSolution, check_solution
from .solution_score import SolutionScore
from .step_splitting import check_step_style, split_steps

# Padded tokens in one forward pass: enough to share the weights' reading, little enough to fit. Not tuned.
MAX_TOKENS_ON_CPU = 2_048
MAX_TOKENS = 16_384
# Work that lasts longer gets a progress bar.
_SECONDS_BEFORE_PROGRESS = 2.0

StepStyle = str | Callable[[str], list[str]]
Solution = Sequence[str] | str


class PRMVerifier:
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
        threshold = model.config.error_threshold if threshold is None else threshold
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold must be in [0, 1], got {threshold}")
        self.model = model
        self.processor = processor
        self.aggregation = check_aggregation(model.config.aggregation if aggregation is None else aggregation)
        self.threshold = threshold

    def score_solution(self, problem: str, steps: Solution, *, step_style: StepStyle = "blank_lines") -> SolutionScore:
        """Score one solution.

        Args:
            problem: the problem.
            steps: the steps, or the solution's whole text.
            step_style: how `split_steps` cuts a text.

        Raises:
            TypeError, ValueError: as `score_solutions`.
        """
        return self.score_solutions([problem], [steps], step_style=step_style)[0]

    def rank_solutions(
        self,
        problem: str,
        solutions: Iterable[Solution],
        *,
        step_style: StepStyle = "blank_lines",
        batch_size: int | None = None,
        max_tokens_per_batch: int | None = None,
        on_error: str = "raise",
        show_progress: bool | None = None,
    ) -> list[SolutionScore]:
        """Score solutions of one problem and return them best first; `solution_idx` is their place as given.

        Equal scores keep the order in which they were given; what could not be scored comes last. Arguments
        and errors are those of `score_solutions`.
        """
        if not isinstance(problem, str):
            raise TypeError(f"problem must be one string, that of all solutions, got {type(problem).__name__}")
        scores = self.score_solutions(
            problem,
            solutions,
            step_style=step_style,
            batch_size=batch_size,
            max_tokens_per_batch=max_tokens_per_batch,
            on_error=on_error,
            show_progress=show_progress,
        )
        return sorted(scores, key=lambda score: float("inf") if score.overall_score is None else -score.overall_score)

    def score_solutions(
        self,
        problems: str | Iterable[str],
        solutions: Iterable[Solution],
        *,
        step_style: StepStyle = "blank_lines",
        batch_size: int | None = None,
        max_tokens_per_batch: int | None = None,
        on_error: str = "raise",
        show_progress: bool | None = None,
        first_idx: int = 0,
    ) -> list[SolutionScore]:
        """Score N solutions, batched by length; the results are in the order of the input.

        Args:
            problems: N problems, or one that all solutions belong to.
            solutions: N lists of steps, or N texts that are cut into steps.
            step_style: how `split_steps` cuts a text.
            batch_size: most solutions in one forward pass; by default only `max_tokens_per_batch` limits it.
            max_tokens_per_batch: most tokens in one forward pass, padding included; a longer solution goes
                alone. By default 2,048 on a CPU and 16,384 otherwise.
            on_error: `"raise"`, or `"record"`: a solution that cannot be scored (too long, no step, ...) gives a
                result with `error` and without scores.
            show_progress: a progress bar; by default where the work takes longer than two seconds.
            first_idx: the 0-based index of the first solution in results and messages, for a long list that is
                scored in pieces.

        Returns:
            N results with as many step probabilities as the solution has steps, always.

        Raises:
            TypeError: a problem or a step is not a string, or a solution has no order (a dictionary, a set) or is
                scored already.
            ValueError: an empty problem or step, no step, half of a surrogate pair in a text, a solution longer
                than `max_length` or than the backbone's positions, NaN or infinite logits; or an option that
                cannot be.
        """
        if on_error not in ("raise", "record"):
            raise ValueError(f"on_error must be 'raise' or 'record', got {on_error!r}")
        for name, value in (("batch_size", batch_size), ("max_tokens_per_batch", max_tokens_per_batch)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be None or at least 1, got {value}")
        check_step_style(step_style)
        if isinstance(solutions, str):
            raise TypeError("solutions is one string; give a list of them, or call score_solution")
        solutions = list(solutions)
        texts = [problems] * len(solutions) if isinstance(problems, str) else list(problems)
        if len(texts) != len(solutions):
            raise ValueError(f"got {len(texts)} problems and {len(solutions)} solutions; give one solution a problem")
        steps, encoded, errors = self._encode(texts, solutions, step_style, first_idx, raises=on_error == "raise")
        results = [self._result(first_idx + row, texts[row], steps[row], errors[row]) for row in range(len(texts))]
        device = input_device(self.model)
        max_tokens = max_tokens_per_batch or (MAX_TOKENS_ON_CPU if device.type == "cpu" else MAX_TOKENS)
        batches = plan_batches([len(item.input_ids) if item else 0 for item in encoded], batch_size, max_tokens)
        with _progress(sum(map(len, batches)), show_progress) as progress, evaluating(self.model):
            for rows in batches:
                step_probs, mask = self._forward([encoded[row] for row in rows], device)  # type: ignore[misc]
                for row, result in zip(rows, self._read(rows, texts, steps, step_probs, mask, first_idx), strict=True):
                    if result.error is not None and on_error == "raise":
                        raise ValueError(result.error)
                    results[row] = result
                progress.update(len(rows))
        return results

    def _encode(
        self, problems: list[Any], solutions: list[Any], step_style: StepStyle, first_idx: int, *, raises: bool
    ) -> tuple[list[list[str]], list[EncodedSolution | None], list[str | None]]:
        """Steps, ids and what is wrong, for each solution; only one of the last two is not None."""
        steps: list[list[str]] = [[] for _ in problems]
        encoded: list[EncodedSolution | None] = [None] * len(problems)
        errors: list[str | None] = [None] * len(problems)
        for row, (problem, solution) in enumerate(zip(problems, solutions, strict=True)):
            try:
                solution = self._split(solution, step_style) if isinstance(solution, str) else solution
                steps[row] = check_solution(problem, solution, first_idx + row)
            except (TypeError, ValueError) as error:
                if raises:
                    raise
                errors[row] = str(error)
        rows = [row for row, error in enumerate(errors) if error is None]
        for row, item in zip(rows, self._encode_rows(rows, problems, steps, raises=raises), strict=True):
            problem_with_it = item if isinstance(item, str) else self._too_long(first_idx + row, item)
            if problem_with_it is None:
                encoded[row] = item  # type: ignore[assignment]
            elif raises:
                raise ValueError(problem_with_it)
            else:
                errors[row] = problem_with_it
        return steps, encoded, errors

    def _split(self, text: str, step_style: StepStyle) -> list[str]:
        # A template that numbers the steps would write the marker a second time.
        strip = step_style == "step_markers" and "{i}" in self.processor.step_template
        return split_steps(text, step_style, strip_markers=strip)

    def _encode_rows(
        self, rows: list[int], problems: list[str], steps: list[list[str]], *, raises: bool
    ) -> list[EncodedSolution | str]:
        """Ids of each row, or what the processor has against it."""
        try:
            whole = self.processor.encode(
                [problems[row] for row in rows], [steps[row] for row in rows], truncation="drop"
            )
            return list(whole)
        except ValueError:
            if raises:
                raise
        encoded: list[EncodedSolution | str] = []
        for row in rows:
            try:
                encoded += self.processor.encode([problems[row]], [steps[row]], truncation="drop")
            except ValueError as error:
                encoded.append(str(error))
        return encoded

    def _too_long(self, index: int, item: EncodedSolution) -> str | None:
        if len(item.step_positions) < item.num_steps:
            return (
                f"solution {index} is longer than max_length={self.processor.max_length} tokens: only "
                f"{len(item.step_positions)} of {item.num_steps} steps fit; raise max_length if the backbone reads "
                "more, or score a shorter solution"
            )
        limit = self.model.config.max_positions
        if limit is not None and len(item.input_ids) > limit:
            return f"solution {index} has {len(item.input_ids)} tokens, the backbone reads {limit}; score a shorter one"
        return None

    @torch.inference_mode()
    def _forward(self, items: list[EncodedSolution], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Step probabilities (B, S) in float64, NaN in rows with a logit that is not finite, and the mask."""
        batch = self.processor.pad(items, return_tensors="pt")
        output = self.model(**{name: tensor.to(device) for name, tensor in batch.items()})
        is_finite = output.logits.isfinite().reshape(len(items), -1).all(dim=1, keepdim=True)
        step_probs = output.step_probs.masked_fill(~is_finite, float("nan"))
        return step_probs.to("cpu", torch.float64), batch["step_positions"] >= 0

    def _read(
        self,
        rows: list[int],
        problems: list[str],
        steps: list[list[str]],
        step_probs: torch.Tensor,
        mask: torch.Tensor,
        first_idx: int,
    ) -> Iterator[SolutionScore]:
        """The results of one forward pass."""
        is_nan = step_probs.isnan().any(dim=1)
        probs = step_probs.masked_fill(is_nan.unsqueeze(1), 0.0)
        overall = aggregate(probs, self.aggregation, mask=mask).tolist()
        wrong = first_error(probs, self.threshold, mask=mask).tolist()
        weakest = probs.masked_fill(~mask, 2.0).argmin(dim=1).tolist()
        for i, row in enumerate(rows):
            if is_nan[i]:
                error = (
                    f"the model gave NaN or infinite logits for solution {first_idx + row}; look for such values in "
                    "its weights, or load it in another dtype (float16 overflows where bfloat16 and float32 do not)"
                )
                yield self._result(first_idx + row, problems[row], steps[row], error)
                continue
            values = tuple(probs[i, : len(steps[row])].tolist())
            yield SolutionScore(
                steps=tuple(steps[row]),
                step_probs=values,
                overall_score=overall[i],
                aggregation=self.aggregation,
                weakest_step=weakest[i],
                weakest_prob=values[weakest[i]],
                first_error=wrong[i],
                threshold=self.threshold,
                solution_idx=first_idx + row,
                problem=problems[row],
            )

    def _result(self, index: int, problem: Any, steps: list[str], error: str | None) -> SolutionScore:
        """A result without scores."""
        return SolutionScore(
            steps=tuple(steps),
            step_probs=None,
            overall_score=None,
            aggregation=self.aggregation,
            weakest_step=None,
            weakest_prob=None,
            first_error=None,
            threshold=self.threshold,
            solution_idx=index,
            problem=problem if isinstance(problem, str) else None,
            error=error,
        )


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


def _progress(total: int, show: bool | None) -> Any:
    delay = _SECONDS_BEFORE_PROGRESS if show is None else 0.0
    return logging.tqdm(total=total, desc="Scoring", unit="solution", disable=show is False, delay=delay)
