"""Scores step by step what grows step by step: a session computes each new step once, however many steps it follows.

with verifier.session("What is 2 + 3 - 1?") as session:
    first = session.extend(session.root, "2 + 3 = 5.")
    right, wrong = session.extend_many([first, first], ["5 - 1 = 4.", "5 - 1 = 3."])
    print(right.score.step_probs, wrong.score.step_probs)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import TracebackType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

from .backbones import evaluating, input_device
from .base_verifier import ScoredRows
from .batching import Chunk, common_length, owner, plan_tree
from .capabilities import why_no_shared_prefix
from .processing_prm import EncodedSolution
from .scoring import PRMVerifier, default_max_tokens, run_batches
from .shared_prefix import Piece, Segment, compute, cut_path
from .solution_score import SolutionScore

# Keys and values of so many tokens are kept.
MAX_CACHED_TOKENS = 65_536


class StepVerifier(Protocol):
    """What gives a session its scores: a `PRMVerifier`, or anything with this method of it."""

    def score_solutions(
        self, problems: Sequence[str], solutions: Sequence[Sequence[str]], *, on_error: str
    ) -> list[SolutionScore]: ...


class Beam:
    """A prefix of steps. What only it and its descendants need is freed with the last of them.

    Attributes:
        steps: the steps.
        score: their scores; None for the root, which has no step.
    """

    def __init__(self, steps: tuple[str, ...], score: SolutionScore | None) -> None:
        self.steps = steps
        self.score = score
        # The ids, the segments that hold them, and the step probability read at each place.
        self._ids: list[int] = []
        self._path: tuple[Piece, ...] = ()
        self._probs: dict[int, float] = {}


class Session:
    """Prefixes of solutions of one problem, scored by whole prefixes: what any verifier can do.

    Args:
        verifier: what scores them.
        problem: the problem.

    Raises:
        TypeError: the verifier has no `score_solutions`, or the problem is not a string.
        ValueError: the problem is empty.
    """

    def __init__(self, verifier: StepVerifier, problem: str) -> None:
        if not callable(getattr(verifier, "score_solutions", None)):
            raise TypeError(f"verifier must have score_solutions, as a PRMVerifier has, got {type(verifier).__name__}")
        if not isinstance(problem, str):
            raise TypeError(f"problem must be a string, got {type(problem).__name__}")
        if not problem.strip():
            raise ValueError("problem is empty; give its text")
        self.verifier = verifier
        self.problem = problem
        self.root = Beam((), None)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free what is kept; beams keep their scores."""

    def extend(self, beam: Beam, step: str) -> Beam:
        """The beam that follows with one more step. Arguments and errors are those of `extend_many`."""
        return self.extend_many([beam], [step])[0]

    def extend_many(self, beams: Sequence[Beam], steps: Sequence[str], *, on_error: str = "raise") -> list[Beam]:
        """Extend each of N beams, which may be the same more than once, by one step.

        Args:
            beams: beams of this session.
            steps: for each of them the step.
            on_error: `"raise"`, or `"record"`: a beam that cannot be scored has a `score` that says why, and no
                scores.

        Returns:
            N beams, whose scores are those of `score_solutions` for all their steps.

        Raises:
            TypeError, ValueError: as `PRMVerifier.score_solutions`; or the numbers of beams and steps differ.
        """
        if len(beams) != len(steps):
            raise ValueError(f"got {len(beams)} beams and {len(steps)} steps; give one step a beam")
        prefixes = [(*beam.steps, step) for beam, step in zip(beams, steps, strict=True)]
        return self._extend(beams, prefixes, on_error) if prefixes else []

    def _extend(self, beams: Sequence[Beam], prefixes: list[tuple[str, ...]], on_error: str) -> list[Beam]:
        scores = self.verifier.score_solutions([self.problem] * len(prefixes), prefixes, on_error=on_error)
        if len(scores) != len(prefixes):
            raise ValueError(
                f"the verifier returned {len(scores)} scores for {len(prefixes)} prefixes; it must score each"
            )
        return [Beam(prefix, score) for prefix, score in zip(prefixes, scores, strict=True)]


class CachedSession(Session):
    """A session that computes the tokens of each new step only.

    Args:
        verifier: the verifier, of a backbone whose prefixes may be cached.
        problem: the problem.
        max_cached_tokens: of how many tokens keys and values are kept. Past it those used least recently are freed,
            and computed anew where a beam needs them again.
        max_tokens_per_batch: as in `score_solutions`.
    """

    def __init__(
        self,
        verifier: PRMVerifier,
        problem: str,
        *,
        max_cached_tokens: int = MAX_CACHED_TOKENS,
        max_tokens_per_batch: int | None = None,
    ) -> None:
        super().__init__(verifier, problem)
        for name, value in (
            ("max_cached_tokens", max_cached_tokens),
            ("max_tokens_per_batch", max_tokens_per_batch or 1),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.max_cached_tokens = max_cached_tokens
        self.max_tokens_per_batch = max_tokens_per_batch
        self._scorer = verifier
        # Segments that some beam holds, each with the round that used it last.
        self._used: WeakKeyDictionary[Segment, int] = WeakKeyDictionary()
        self._round = 0

    @property
    def num_cached_tokens(self) -> int:
        """Of how many tokens keys and values are kept now."""
        return sum(segment.keep for segment in self._used if segment.states is not None)

    def close(self) -> None:
        for segment in list(self._used):
            segment.states = None

    def _extend(self, beams: Sequence[Beam], prefixes: list[tuple[str, ...]], on_error: str) -> list[Beam]:
        if on_error not in ("raise", "record"):
            raise ValueError(f"on_error must be 'raise' or 'record', got {on_error!r}")
        problems = [self.problem] * len(prefixes)
        steps, encoded, errors = self._scorer._encode(
            problems, list(prefixes), "blank_lines", 0, raises=on_error == "raise"
        )
        results = [self._scorer._result(row, self.problem, steps[row], errors[row]) for row in range(len(prefixes))]
        extended = [Beam(prefix, None) for prefix in prefixes]
        rows = [row for row, item in enumerate(encoded) if item is not None]
        if rows:
            self._compute(beams, extended, encoded, rows)
            scored = ScoredRows(rows, _as_tensor([list(extended[row]._probs.values()) for row in rows]))
            for row, result in zip(rows, self._scorer._read(scored, problems, steps, 0), strict=True):
                if result.error is not None and on_error == "raise":
                    raise ValueError(result.error)
                results[row] = result
        for beam, result in zip(extended, results, strict=True):
            beam.score = result
        return extended

    def _compute(
        self, beams: Sequence[Beam], extended: list[Beam], encoded: list[EncodedSolution | None], rows: list[int]
    ) -> None:
        """Give beams their ids, segments and step probabilities."""
        self._round += 1
        groups: dict[tuple[Piece, ...], list[int]] = {}
        for row in rows:
            item: EncodedSolution = encoded[row]  # type: ignore[assignment]
            path = _usable(beams[row], item)
            self._use(path)
            groups.setdefault(path, []).append(row)
        chunks = [_plan_group(encoded, group, path) for path, group in groups.items()]
        levels: list[list[Segment]] = []
        for path, chunk in zip(groups, chunks, strict=True):
            # Of each group only what is new has levels.
            for depth, level in enumerate(chunk.levels[len(path) :]):
                if depth == len(levels):
                    levels.append([])
                levels[depth] += level
        for level in levels:
            for segment in level:
                segment.keep = len(segment.ids)
        model = self._scorer.model
        device = input_device(model)
        max_tokens = self.max_tokens_per_batch or default_max_tokens(device)
        with evaluating(model):
            for _ in run_batches(compute, model, levels, None, max_tokens, device):
                pass
        for chunk in chunks:
            for row, path in chunk.paths.items():
                self._finish(beams[row], extended[row], encoded[row], path)  # type: ignore[arg-type]
        self._free()

    def _finish(self, parent: Beam, beam: Beam, item: EncodedSolution, path: tuple[Piece, ...]) -> None:
        beam._ids, beam._path = item.input_ids, path
        for place in item.step_positions:
            segment = owner(path, place)
            beam._probs[place] = segment.probs[segment.reads[place]]
        if not parent._ids:
            # The root: what its first extension begins with is what later ones have in common with it.
            parent._ids, parent._path = beam._ids, path
        elif not _is_computed(parent._path) and beam._ids[: len(parent._ids)] == parent._ids:
            parent._path = cut_path(path, len(parent._ids))
        self._use(path)

    def _use(self, path: tuple[Piece, ...]) -> None:
        for segment, _ in path:
            self._used[segment] = self._round

    def _free(self) -> None:
        """Free what was used least recently, later tokens first, until few enough are kept."""
        kept = [segment for segment in self._used if segment.states is not None]
        excess = sum(segment.keep for segment in kept) - self.max_cached_tokens
        for segment in sorted(kept, key=lambda segment: (self._used[segment], -segment.start)):
            if excess <= 0:
                break
            segment.states = None
            excess -= segment.keep


def open_session(verifier: StepVerifier, problem: str, **options: Any) -> Session:
    """A session of a verifier: one that computes new steps only where the backbone allows it.

    Args:
        verifier: a `PRMVerifier`, or anything with its `score_solutions`, which is then given whole prefixes.
        problem: the problem.
        **options: those of `CachedSession`, which have no effect where whole prefixes are computed.

    Raises:
        TypeError, ValueError: as `Session` and `CachedSession`.
    """
    if isinstance(verifier, PRMVerifier) and why_no_shared_prefix(verifier.model) is None:
        return CachedSession(verifier, problem, **options)
    return Session(verifier, problem)


def _plan_group(encoded: list[EncodedSolution | None], rows: list[int], path: tuple[Piece, ...]) -> Chunk:
    """New segments for rows that begin with the same computed tokens."""
    rows = sorted(rows, key=lambda row: encoded[row].input_ids)  # type: ignore[union-attr]
    ids = [encoded[row].input_ids for row in rows]  # type: ignore[union-attr]
    return plan_tree(encoded, rows, [0, *(common_length(*pair) for pair in pairwise(ids))], path)


def _usable(parent: Beam, item: EncodedSolution) -> tuple[Piece, ...]:
    """The parent's computed tokens that an extension begins with, and whose scores are known."""
    length = common_length(parent._ids, item.input_ids)
    new = [place for place in item.step_positions if place < length and place not in parent._probs]
    path = cut_path(parent._path, min([length, *new]))
    missing = next((i for i, (segment, _) in enumerate(path) if segment.states is None), len(path))
    return path[:missing]


def _is_computed(path: tuple[Piece, ...]) -> bool:
    return all(segment.states is not None for segment, _ in path)


def _as_tensor(probs: list[list[float]]) -> torch.Tensor:
    width = max(map(len, probs))
    return torch.tensor([row + [0.0] * (width - len(row)) for row in probs], dtype=torch.float64)
