"""Formats of benchmarks: PRMBench, and those that say where the first error is."""

from __future__ import annotations

from .format_parts import Reader, ReaderOptions, Row, labels_up_to, strip_step_numbers, to_index, to_tuple
from .records import StepRecord


def read_prmbench(row: Row, options: ReaderOptions) -> list[StepRecord]:
    """PRMBench (arXiv 2501.03124): the solution with errors put in, and the one before, all correct.

    `modified_process` answers `modified_question`, and `error_steps` are the 1-based numbers of its wrong
    steps; `original_process` answers `original_question`. Many rows share one original, in other wordings too: `idx`,
    where it is there, tells which, and is the group of all. Step numbers are removed as `strip_step_numbers` says.
    """
    modified = strip_step_numbers(to_tuple("modified_process", row["modified_process"]))
    original = strip_step_numbers(to_tuple("original_process", row["original_process"]))
    errors = to_tuple("error_steps", row["error_steps"])
    for number in errors:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"error_steps must be integers: got {number!r}; correct the row")
        if not 1 <= number <= len(modified):
            raise ValueError(
                f"error_steps names a step that does not exist: got {number} where modified_process has "
                f"steps 1 to {len(modified)}; correct the row or pass on_bad_row='skip'"
            )
    labels = tuple(0.0 if number in errors else 1.0 for number in range(1, len(modified) + 1))
    question = row["original_question"]
    group = row["idx"] if isinstance(row.get("idx"), str) and row["idx"].strip() else question
    return [
        StepRecord(problem=row["modified_question"], steps=modified, labels=labels, problem_group=group),
        StepRecord(problem=question, steps=original, labels=(1.0,) * len(original), problem_group=group),
    ]


def read_processbench(row: Row, options: ReaderOptions) -> list[StepRecord]:
    """ProcessBench (arXiv 2412.06559): `problem`, `steps`, and `label`, the 0-based index of the first error or -1.

    Steps after the first error are without a label. Texts are taken as they are.
    """
    steps = to_tuple("steps", row["steps"])
    labels = labels_up_to(to_index("label", row["label"]), len(steps), name="label")
    return [StepRecord(problem=row["problem"], steps=steps, labels=labels)]


def read_bigbench_mistake(row: Row, options: ReaderOptions) -> list[StepRecord]:
    """BIG-Bench-Mistake (arXiv 2311.08516): `input`, `steps`, and `mistake_index`, 0-based, null for none.

    Steps after the mistake are without a label.
    """
    steps = to_tuple("steps", row["steps"])
    mistake = row["mistake_index"]
    if mistake is not None and to_index("mistake_index", mistake) < 0:
        raise ValueError(f"mistake_index must be null or at least 0: got {mistake!r}; write null for no mistake")
    first = -1 if mistake is None else to_index("mistake_index", mistake)
    labels = labels_up_to(first, len(steps), name="mistake_index")
    return [StepRecord(problem=row["input"], steps=steps, labels=labels)]


_FIRST_ERROR, _CORRECTNESS = "model_output_solution_first_error_step", "model_output_solution_correctness"


def read_mr_gsm8k(row: Row, options: ReaderOptions) -> list[StepRecord]:
    """MR-GSM8K (arXiv 2312.17080): `question`, `model_output_steps`, and the first error step, 1-based or "N/A".

    The number may be a string, as tables of one type a column make of it. `model_output_solution_correctness`, where
    it is given as "correct" or "wrong", must agree. Steps after the first error are without a label, and step
    numbers are removed as `strip_step_numbers` says.
    """
    steps = strip_step_numbers(to_tuple("model_output_steps", row["model_output_steps"]))
    given = row[_FIRST_ERROR]
    text = given.strip() if isinstance(given, str) else None
    if given is None or text == "N/A":
        first = 0
    else:
        # More digits than this are no step, and may be more than int() takes.
        is_number = text is not None and text.isascii() and text.isdecimal() and len(text) < 10
        first = int(text) if text is not None and is_number else to_index(_FIRST_ERROR, given)
        if first < 1:
            raise ValueError(f"{_FIRST_ERROR} must be 'N/A' or at least 1: got {given!r}; correct the row")
    verdict = row.get(_CORRECTNESS)
    if isinstance(verdict, str) and verdict.strip().lower() == ("wrong" if first == 0 else "correct"):
        raise ValueError(
            f"{_CORRECTNESS} contradicts the first error step: got {verdict!r} beside {given!r}; correct the row"
        )
    labels = labels_up_to(first, len(steps), name=_FIRST_ERROR, base=1)
    return [StepRecord(problem=row["question"], steps=steps, labels=labels)]


BENCHMARK_READERS = (
    Reader(
        name="prmbench",
        columns=(
            "original_question",
            "modified_question",
            "original_process",
            "modified_process",
            "error_steps",
        ),
        json_columns=("original_process", "modified_process", "error_steps"),
        read_row=read_prmbench,
        drop_duplicates=True,
    ),
    Reader(
        name="processbench",
        columns=("problem", "steps", "label"),
        json_columns=("steps", "label"),
        read_row=read_processbench,
    ),
    Reader(
        name="bigbench_mistake",
        columns=("input", "steps", "mistake_index"),
        json_columns=("steps", "mistake_index"),
        read_row=read_bigbench_mistake,
    ),
    Reader(
        name="mr_gsm8k",
        columns=("question", "model_output_steps", _FIRST_ERROR),
        json_columns=("model_output_steps",),
        read_row=read_mr_gsm8k,
    ),
)
"""The formats of this module."""
