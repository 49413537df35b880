"""The raw format of PRM800K (arXiv 2305.20050), phases 1 and 2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from modeling_prm.step_loss import IGNORED_LABEL

from .format_parts import (
    Neutral,
    Reader,
    ReaderOptions,
    Row,
    RowLeftOut,
    label_of_rating,
    to_object,
    to_text,
    to_tuple,
)
from .records import StepRecord


@dataclass(frozen=True, slots=True)
class _Rated:
    text: str
    label: float


def read_prm800k(row: Row, options: ReaderOptions) -> list[StepRecord]:
    """PRM800K: `question.problem` and `label.steps`, each with rated completions of which one may be chosen.

    The first record is the chosen path: at each step the chosen completion, or what the labeller wrote in its place,
    which counts as correct. Where nothing is chosen the path ends, with the first rated completion if there is one:
    in phase 2 that is the solution's own step and its first error. Every other rated completion is the end of a
    solution of its own, whose steps before it are without a label, so that none is counted twice; `paths="chosen"`
    leaves these out. A chosen completion without a rating has no label.

    A rating of 0 counts as correct unless `neutral` says otherwise, as OpenAI and Qwen count it.

    Rows whose `finish_reason` is bad_problem are left out. Those with give_up keep the ratings made before.
    """
    problem = to_text("question.problem", to_object("question", row["question"], "problem")["problem"])
    label = to_object("label", row["label"], "steps")
    if label.get("finish_reason") == "bad_problem":
        raise RowLeftOut("finish_reason is bad_problem")
    neutral: Neutral = options.neutral or "correct"
    path: list[_Rated] = []
    branches: list[list[_Rated]] = []
    for number, step in enumerate(to_tuple("label.steps", label["steps"]), start=1):
        name = f"step {number}"
        step = to_object("label.steps entry", step, "completions", "chosen_completion")
        chosen, others = _read_step(step, neutral, name)
        is_end = chosen is None
        if is_end and others:
            chosen = others.pop(0)
        prefix = [_Rated(done.text, IGNORED_LABEL) for done in path]
        branches += [[*prefix, other] for other in others]
        if chosen is not None:
            path.append(chosen)
        if is_end:
            break
    solutions = [path, *(branches if options.paths == "all" else [])]
    rated = [steps for steps in solutions if any(step.label != IGNORED_LABEL for step in steps)]
    if not rated:
        raise RowLeftOut("no step is rated")
    return [
        StepRecord(
            problem=problem,
            steps=tuple(step.text for step in steps),
            labels=tuple(step.label for step in steps),
            classes=neutral == "class",
        )
        for steps in rated
    ]


def _read_step(step: Row, neutral: Neutral, name: str) -> tuple[_Rated | None, list[_Rated]]:
    """The step that the path goes on with, if any, and the other rated completions."""
    given = step["completions"]
    completions = [
        _read_completion(completion, neutral, name)
        for completion in (() if given is None else to_tuple("completions", given))
    ]
    index = step["chosen_completion"]
    chosen: _Rated | None = None
    if index is not None:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"chosen_completion must be an integer or null: got {index!r} at {name}; correct the row")
        if not 0 <= index < len(completions):
            raise ValueError(
                f"chosen_completion names a completion that does not exist: got {index} of {len(completions)} at "
                f"{name}; correct the row or pass on_bad_row='skip'"
            )
        chosen = completions[index]
    elif (human := _human_text(step.get("human_completion"))) is not None:
        chosen = _Rated(human, label_of_rating(1, neutral))
    others = [
        completion
        for place, completion in enumerate(completions)
        if place != index and completion.label != IGNORED_LABEL
    ]
    return chosen, others


def _read_completion(completion: object, neutral: Neutral, name: str) -> _Rated:
    fields = to_object("completion", completion, "text", "rating")
    rating = fields["rating"]
    if rating is None:
        return _Rated(to_text("completion text", fields["text"]), IGNORED_LABEL)
    if isinstance(rating, bool) or not isinstance(rating, (int, float)) or rating not in (-1, 0, 1):
        raise ValueError(f"rating must be -1, 0, 1 or null: got {rating!r} at {name}; correct the row")
    return _Rated(to_text("completion text", fields["text"]), label_of_rating(int(rating), neutral))


def _human_text(given: object) -> str | None:
    if isinstance(given, Mapping):
        given = to_object("human_completion", given, "text")["text"]
    return None if given is None else to_text("human_completion", given)


PRM800K_READERS = (
    Reader(
        name="prm800k",
        columns=("question", "label"),
        json_columns=("question", "label"),
        read_row=read_prm800k,
        has_neutral=True,
    ),
)
"""The format of this module."""
