"""What every verifier does around the forward pass: from texts to ids, and from step probabilities to results."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from .aggregation import aggregate, check_aggregation, first_error
from .conversation_scoring import ConversationScoring, check_scoring_options
from .processing_prm import EncodedSolution, check_solution
from .solution_score import SolutionScore
from .step_splitting import check_step_style, split_steps

# Work that lasts longer gets a progress bar.
_SECONDS_BEFORE_PROGRESS = 2.0

StepStyle = str | Callable[[str], list[str]]
Solution = Sequence[str] | str


class ScoredRows(NamedTuple):
    """What is known of some rows of a list of solutions.

    `step_probs` (rows, S) float64 holds their step probabilities, in rows with fewer steps anything after the
    last, and NaN somewhere in a row whose logits are not finite. With `error` none of the rows has a score.
    """

    rows: list[int]
    step_probs: torch.Tensor | None
    error: str | None = None


class BaseVerifier(ConversationScoring):
    """Scores and ranks solutions; a subclass says in `_score_encoded` how ids become step probabilities.

    Args:
        processor: the PRM's `PRMProcessor`.
        aggregation: how step probabilities become one score, a method of `aggregate`.
        threshold: a step is called wrong where its probability is below this.

    Raises:
        ValueError: there is no such aggregation, or the threshold is not in [0, 1].
    """

    # Who reads the ids, in messages about what is too long for it.
    _reader = "the backbone"

    def __init__(self, processor: Any, aggregation: str, threshold: float) -> None:
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold must be in [0, 1], got {threshold}")
        self.processor = processor
        self.aggregation = check_aggregation(aggregation)
        self.threshold = threshold

    @property
    def max_positions(self) -> int | None:
        """The most tokens that one solution may have with its problem, or None where nothing limits it."""
        raise NotImplementedError

    def _score_encoded(
        self,
        encoded: list[EncodedSolution | None],
        first_idx: int,
        *,
        batch_size: int | None,
        max_tokens_per_batch: int | None,
    ) -> Generator[ScoredRows, None, None]:
        """Yield the scores of every row that is not None, once, in any order.

        Args:
            encoded: ids and step positions of each solution.
            first_idx: what messages add to a row to number a solution.
            batch_size, max_tokens_per_batch: as in `score_solutions`.
        """
        raise NotImplementedError

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
                alone. By default 1,024 on a CPU and 16,384 otherwise.
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
        check_scoring_options(on_error, batch_size, max_tokens_per_batch)
        check_step_style(step_style)
        if isinstance(solutions, str):
            raise TypeError("solutions is one string; give a list of them, or call score_solution")
        solutions = list(solutions)
        texts = [problems] * len(solutions) if isinstance(problems, str) else list(problems)
        if len(texts) != len(solutions):
            raise ValueError(f"got {len(texts)} problems and {len(solutions)} solutions; give one solution a problem")
        steps, encoded, errors = self._encode(texts, solutions, step_style, first_idx, raises=on_error == "raise")
        return self._score_rows(
            texts,
            steps,
            encoded,
            errors,
            first_idx,
            batch_size=batch_size,
            max_tokens_per_batch=max_tokens_per_batch,
            on_error=on_error,
            show_progress=show_progress,
        )

    def _score_rows(
        self,
        problems: list[Any],
        steps: list[list[str]],
        encoded: list[EncodedSolution | None],
        errors: list[str | None],
        first_idx: int,
        *,
        batch_size: int | None,
        max_tokens_per_batch: int | None,
        on_error: str,
        show_progress: bool | None,
    ) -> list[SolutionScore]:
        """Results of rows that are ids, or errors, in their order; options as in `score_solutions`."""
        results = [self._result(first_idx + row, problems[row], steps[row], errors[row]) for row in range(len(steps))]
        scored = self._score_encoded(
            encoded, first_idx, batch_size=batch_size, max_tokens_per_batch=max_tokens_per_batch
        )
        # Closed at once where something raises, so that it undoes what it did to the model.
        with _progress(sum(item is not None for item in encoded), show_progress) as progress, closing(scored):
            for part in scored:
                for row, result in zip(part.rows, self._read(part, problems, steps, first_idx), strict=True):
                    if result.error is not None and on_error == "raise":
                        raise ValueError(result.error)
                    results[row] = result
                progress.update(len(part.rows))
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
        limit = self.max_positions
        if limit is not None and len(item.input_ids) > limit:
            return (
                f"solution {index} has {len(item.input_ids)} tokens, {self._reader} reads {limit}; score a shorter one"
            )
        return None

    def _read(
        self, part: ScoredRows, problems: list[str], steps: list[list[str]], first_idx: int
    ) -> Iterator[SolutionScore]:
        """The results of some rows."""
        if part.step_probs is None:
            yield from (self._result(first_idx + row, problems[row], steps[row], part.error) for row in part.rows)
            return
        counts = torch.tensor([len(steps[row]) for row in part.rows])
        mask = torch.arange(part.step_probs.shape[1]) < counts.unsqueeze(1)
        is_nan = (part.step_probs.isnan() & mask).any(dim=1)
        probs = part.step_probs.masked_fill(is_nan.unsqueeze(1), 0.0)
        overall = aggregate(probs, self.aggregation, mask=mask).tolist()
        wrong = first_error(probs, self.threshold, mask=mask).tolist()
        weakest = probs.masked_fill(~mask, 2.0).argmin(dim=1).tolist()
        for i, row in enumerate(part.rows):
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


def _progress(total: int, show: bool | None) -> Any:
    delay = _SECONDS_BEFORE_PROGRESS if show is None else 0.0
    return logging.tqdm(total=total, desc="Scoring", unit="solution", disable=show is False, delay=delay)
