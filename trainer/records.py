"""The one record type that every dataset reader produces and every consumer of labelled steps takes."""

from dataclasses import dataclass

from modeling_prm.step_loss import IGNORED_LABEL

MAX_CHARACTERS = 1_000_000
"""The longest problem or step: far more than a backbone reads, and what a damaged file easily holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One solution to one problem, cut into steps, with a label for each step.

    The record checks itself when it is made. Its error messages open with the kind of fault in
    general words, then a colon and the particulars, so that faults can be counted by kind.

    Attributes:
        problem: The problem's text, not empty.
        steps: The solution's steps in order, at least one, none empty or only whitespace.
        labels: One number a step: 1.0 correct, 0.0 incorrect, a number between them a soft label
            (an estimate of the probability that the step is correct), -100.0 (`IGNORED_LABEL`) no label.
            With `classes`, class indices 0, 1, 2, ... in their place.
        problem_group: The text, or the name, of the problem that this one is a version of, where it is one. Records
            of one group, like those of one problem, stay on one side of a split.
        conversation: The conversation of an agent that the steps are turns of, as `trainer.conversation_data` writes
            it; then the model reads it in place of problem and steps.
        classes: Whether labels are class indices, for models of several classes a step.

    Raises:
        TypeError: If a field or an entry of it has the wrong type. Labels are ints or floats; a bool is
            refused, since `True` and `1.0` meet silently in one column and are then re-cast together.
        ValueError: If a text is empty, longer than `MAX_CHARACTERS`, or cannot be stored (a NUL byte, half of a
            surrogate pair), the
            numbers of steps and labels differ, or a label is neither in [0, 1] (or a class index) nor -100.
    """

    problem: str
    steps: tuple[str, ...]
    labels: tuple[float, ...]
    problem_group: str | None = None
    classes: bool = False
    conversation: str | None = None

    def __post_init__(self) -> None:
        _check_text("problem", self.problem)
        if self.problem_group is not None:
            _check_text("problem_group", self.problem_group)
        if not isinstance(self.steps, tuple):
            raise TypeError(f"steps must be a tuple of strings: got {type(self.steps).__name__}; pass tuple(steps)")
        if not isinstance(self.labels, tuple):
            raise TypeError(f"labels must be a tuple of numbers: got {type(self.labels).__name__}; pass tuple(labels)")
        if not self.steps:
            raise ValueError("a solution needs at least one step: got none; drop the record or cut its text into steps")
        for number, step in enumerate(self.steps, start=1):
            _check_text("step", step, where=f" at step {number} of {len(self.steps)}")
        if len(self.labels) != len(self.steps):
            raise ValueError(
                f"as many labels as steps are needed: got {len(self.labels)} labels for "
                f"{len(self.steps)} steps; label a step that has none with {IGNORED_LABEL:g}"
            )
        for number, label in enumerate(self.labels, start=1):
            _check_label(label, self.classes, where=f" at step {number} of {len(self.labels)}")

    def to_dict(self) -> dict[str, str | list[str] | list[float]]:
        """The record as `{"problem": str, "steps": list[str], "labels": list[float]}`, and its group if any.

        A JSON line of it is a row of the `plain` format of `trainer.readers`, or with `classes` of that name.
        """
        group = {} if self.problem_group is None else {"problem_group": self.problem_group}
        return {
            "problem": self.problem,
            "steps": list(self.steps),
            "labels": [float(label) for label in self.labels],
            **group,
        }


def _check_text(name: str, text: object, *, where: str = "") -> None:
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a string: got {type(text).__name__}{where}; convert it, or drop the record")
    if not text.strip():
        raise ValueError(f"{name} must not be empty: got {text!r}{where}; fill it in, or drop the record")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"{name} must not be longer than {MAX_CHARACTERS} characters: got {len(text)}{where}; cut it, or drop the "
            "record"
        )
    if "\0" in text:
        raise ValueError(
            f"{name} must not hold NUL bytes: got one at character {text.index(chr(0))}{where}; "
            "remove it, or drop the record"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be valid Unicode: got a lone surrogate at character {error.start}{where}; "
            "decode the source with the right encoding, or drop the record"
        ) from error


def _check_label(label: object, classes: bool, *, where: str) -> None:
    if isinstance(label, bool) or not isinstance(label, (int, float)):
        raise TypeError(
            f"labels must be ints or floats: got {label!r} ({type(label).__name__}){where}; "
            f"convert it to 1.0 (correct), 0.0 (incorrect) or {IGNORED_LABEL:g} (no label)"
        )
    if classes:
        if not (label == IGNORED_LABEL or (label >= 0 and float(label).is_integer())):
            raise ValueError(
                f"labels must be class indices 0, 1, 2, ... or {IGNORED_LABEL:g}: got {label!r}{where}; write the "
                "index of the step's class"
            )
        return
    # NaN fails both comparisons.
    if not (0.0 <= label <= 1.0 or label == IGNORED_LABEL):
        raise ValueError(
            f"labels must be in [0, 1] or {IGNORED_LABEL:g}: got {label!r}{where}; convert the dataset's own code first"
        )
