"""What a verifier says about one solution."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

_BAR_WIDTH = 20
_TEXT_WIDTH = 70


@dataclass(frozen=True, kw_only=True)
class SolutionScore:
    """The scores of one solution, readable as attributes and by name like a dictionary (`score["step_probs"]`).

    Printed, it is a table of the steps.

    Args:
        steps: the S steps as they were scored.
        step_probs: S probabilities that the steps are correct; None where the solution could not be scored.
        overall_score: the aggregation of `step_probs`.
        aggregation: its method.
        weakest_step: 0-based index of the step with the lowest probability, the first of equal ones.
        weakest_prob: its probability.
        first_error: 0-based index of the first step with a probability below `threshold`, -1 where there is none.
        threshold: a step is called wrong below this.
        solution_idx: 0-based index in the list that was scored.
        problem: the problem.
        error: why the solution could not be scored; then all scores are None.
    """

    steps: tuple[str, ...]
    step_probs: tuple[float, ...] | None
    overall_score: float | None
    aggregation: str
    weakest_step: int | None
    weakest_prob: float | None
    first_error: int | None
    threshold: float
    solution_idx: int
    problem: str | None = None
    error: str | None = None

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(f"{name!r}; a SolutionScore has {', '.join(self.keys())}")
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(fields(self))

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def keys(self) -> tuple[str, ...]:
        return tuple(field.name for field in fields(self))

    def values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.keys())

    def items(self) -> tuple[tuple[str, Any], ...]:
        return tuple(zip(self.keys(), self.values(), strict=True))

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name) if name in self.keys() else default

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary of JSON's types."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self.items()}

    def __str__(self) -> str:
        head = f"Solution {self.solution_idx}"
        if self.step_probs is None:
            return f"{head}: not scored, {self.error}"
        wrong = "none" if self.first_error == -1 else f"step {self.first_error + 1}"  # type: ignore[operator]
        lines = [
            f"{head}: {self.aggregation} {self.overall_score:.3f}, first error (below {self.threshold:g}): {wrong}",
            f"  step  P(correct) {'':<{_BAR_WIDTH}}  text",
        ]
        for index, (step, prob) in enumerate(zip(self.steps, self.step_probs, strict=True)):
            text = " ".join(step.split())
            if len(text) > _TEXT_WIDTH:
                # By characters, since formulas and some scripts have no spaces to break at.
                text = text[: _TEXT_WIDTH - 4].rstrip() + " ..."
            mark = "  <- weakest" if index == self.weakest_step else ""
            lines.append(
                f"  {index + 1:>4}  {prob:>10.3f} {'#' * round(prob * _BAR_WIDTH):<{_BAR_WIDTH}}  {text}{mark}"
            )
        return "\n".join(lines)
