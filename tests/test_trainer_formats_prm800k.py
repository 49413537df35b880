"""PRM800K: rows in its exact schema of both phases, neutral ratings, branches, and rows that say to leave them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.formats import READERS, ReaderOptions, RowLeftOut
from trainer.readers import load_step_dataset, read_step_records

READ = READERS["prm800k"].read


def completion(text: str, rating: int | None) -> dict[str, Any]:
    return {"text": text, "rating": rating, "flagged": None if rating is None else False}


def step(*completions: dict[str, Any], chosen: int | None = 0, human: Any = None) -> dict[str, Any]:
    return {"completions": list(completions), "human_completion": human, "chosen_completion": chosen}


def row(*steps: dict[str, Any], finish_reason: str = "solution", generation: int | None = None) -> dict[str, Any]:
    return {
        "labeler": "340d89bc",
        "timestamp": "2022-07-30T14:22:32.597731",
        "generation": generation,
        "is_quality_control_question": False,
        "is_initial_screening_question": False,
        "question": {"problem": "1 + 1 + 1?", "ground_truth_solution": "It is 3.", "ground_truth_answer": "3"},
        "label": {"steps": list(steps), "total_time": 1234, "finish_reason": finish_reason},
    }


# Phase 1: alternatives at each step; the labeller wrote the third step, since none offered was good.
PHASE_1 = row(
    step(completion("Add.", 0), completion("Multiply.", -1), completion("Hm.", None)),
    step(completion("1 + 1 = 3", -1), completion("1 + 1 = 2", 1), chosen=1),
    step(
        completion("2 + 1 = 4", -1),
        chosen=None,
        human={"text": "2 + 1 = 3", "rating": None, "source": "human", "flagged": False},
    ),
)
# Phase 2: one completion a step, up to the first error, at which nothing is chosen.
PHASE_2 = row(
    step(completion("1 + 1 = 2", 1)),
    step(completion("So 3", 0)),
    step(completion("No, 4", -1), chosen=None),
    finish_reason="found_error",
    generation=9,
)


def solutions(given: dict[str, Any], **options: Any) -> list[tuple[tuple[str, ...], tuple[float, ...]]]:
    return [(record.steps, record.labels) for record in READ(given, ReaderOptions(**options))]


def test_phase_1_gives_the_chosen_path_and_each_rated_alternative() -> None:
    assert solutions(PHASE_1) == [
        (("Add.", "1 + 1 = 2", "2 + 1 = 3"), (1.0, 1.0, 1.0)),
        (("Multiply.",), (0.0,)),
        (("Add.", "1 + 1 = 3"), (-100.0, 0.0)),
        (("Add.", "1 + 1 = 2", "2 + 1 = 4"), (-100.0, -100.0, 0.0)),
    ]
    assert {record.problem for record in READ(PHASE_1)} == {"1 + 1 + 1?"}
    assert solutions(PHASE_1, paths="chosen") == [(("Add.", "1 + 1 = 2", "2 + 1 = 3"), (1.0, 1.0, 1.0))]


def test_each_rating_is_counted_once() -> None:
    labels = [label for _, given in solutions(PHASE_1) for label in given if label != -100.0]
    # Five of the six completions are rated, and the labeller's own step counts as correct: 0, 1 and it; three wrong.
    assert (labels.count(1.0), labels.count(0.0)) == (3, 3)


def test_phase_2_ends_with_the_error_that_was_found() -> None:
    expected = [(("1 + 1 = 2", "So 3", "No, 4"), (1.0, 1.0, 0.0))]
    assert solutions(PHASE_2) == solutions(PHASE_2, paths="chosen") == expected


@pytest.mark.parametrize(
    ("neutral", "labels"),
    [
        (None, (1.0, 1.0, 0.0)),
        ("correct", (1.0, 1.0, 0.0)),
        ("incorrect", (1.0, 0.0, 0.0)),
        ("ignored", (1.0, -100.0, 0.0)),
        ("class", (0.0, 1.0, 2.0)),
    ],
)
def test_neutral_counts_as_the_option_says(neutral: Any, labels: tuple[float, ...]) -> None:
    (record,) = READ(PHASE_2, ReaderOptions(neutral=neutral))
    assert (record.labels, record.classes) == (labels, neutral == "class")


def test_an_ignored_neutral_alternative_gives_no_solution() -> None:
    given = row(step(completion("a", 1), completion("b", 0)))
    assert solutions(given, neutral="ignored") == [(("a",), (1.0,))]
    assert solutions(given, neutral="incorrect") == [(("a",), (1.0,)), (("b",), (0.0,))]


def test_chosen_without_a_rating_has_no_label_and_a_human_step_may_be_a_string() -> None:
    given = row(step(completion("a", None)), step(chosen=None, human="b") | {"completions": None})
    assert solutions(given) == [(("a", "b"), (-100.0, 1.0))]


def test_the_path_ends_where_nothing_is_chosen() -> None:
    empty = {"completions": None, "human_completion": None, "chosen_completion": None}
    assert solutions(row(step(completion("a", 1)), empty, step(completion("c", 1)))) == [(("a",), (1.0,))]
    # Several wrong ones at the end: the first ends the path, the other is a branch.
    two = row(step(completion("a", 1)), step(completion("b", -1), completion("c", -1), chosen=None))
    assert solutions(two) == [(("a", "b"), (1.0, 0.0)), (("a", "c"), (-100.0, 0.0))]


def test_give_up_keeps_its_ratings_and_a_bad_problem_is_left_out(tmp_path: Path) -> None:
    give_up = row(step(completion("a", 1)), step(completion("b", None), chosen=None), finish_reason="give_up")
    assert solutions(give_up) == [(("a",), (1.0,))]
    bad = row(step(completion("a", -1)), finish_reason="bad_problem")
    with pytest.raises(RowLeftOut, match=r"^finish_reason is bad_problem$"):
        READ(bad)
    unrated = row(step(completion("a", None), chosen=None), finish_reason="give_up")
    with pytest.raises(RowLeftOut, match=r"^no step is rated$"):
        READ(unrated)
    path = tmp_path / "phase1_train.jsonl"
    path.write_text("".join(json.dumps(given) + "\n" for given in (bad, PHASE_1, bad, unrated)), encoding="utf-8")
    # Such rows are no bad rows: they do not stop the reading, and are counted.
    records, report = read_step_records(path)
    assert (len(records), report.format) == (4, "prm800k")
    assert report.left_out == {"finish_reason is bad_problem": 2, "no step is rated": 1}
    assert (
        "kept 1 of 4 rows: 4 records; 2 left out: finish_reason is bad_problem; 1 left out: no step is rated"
        in report.summary()
    )


def test_options_reach_the_reader_from_a_file_and_a_stream(tmp_path: Path) -> None:
    path = tmp_path / "phase2_train.jsonl"
    path.write_text(json.dumps(PHASE_1) + "\n" + json.dumps(PHASE_2) + "\n", encoding="utf-8")
    chosen = [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]
    assert load_step_dataset(path, neutral="incorrect", paths="chosen")["labels"][:] == chosen
    stream = load_step_dataset(path, neutral="incorrect", paths="chosen", streaming=True)
    assert [entry["labels"] for entry in stream] == chosen
    with pytest.raises(ValueError, match=r"neutral must be None or one of .*'class'.*, got 'wrong'"):
        load_step_dataset(path, neutral="wrong")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"paths must be one of \('all', 'chosen'\), got 'best'"):
        load_step_dataset(path, paths="best")  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (row(step(completion("a", 2))), ValueError, "rating must be -1, 0, 1 or null: got 2 at step 1"),
        (row(step(completion("a", True))), ValueError, "rating must be -1, 0, 1 or null: got True"),
        (row(step(completion("a", 1), chosen=1)), ValueError, "completion that does not exist: got 1 of 1 at step 1"),
        (row(step(completion("a", 1), chosen=-1)), ValueError, "completion that does not exist: got -1"),
        (row(step(completion("", 1))), ValueError, "step must not be empty"),
        (row(step({"text": "a"})), ValueError, "completion lacks a field: rating"),
        (row({"completions": []}), ValueError, "label.steps entry lacks a field: chosen_completion"),
        (row(step(completion("a", 1), chosen="0")), TypeError, "chosen_completion must be an integer or null"),  # type: ignore[arg-type]
        (row(step(human=3, chosen=None)), TypeError, "human_completion must be a string: got int"),
        (PHASE_1 | {"question": "1 + 1?"}, TypeError, "question must be an object: got str"),
        (PHASE_1 | {"question": {}}, ValueError, "question lacks a field: problem"),
        (PHASE_1 | {"label": 1}, TypeError, "label must be an object: got int"),
    ],
)
def test_bad_rows(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        READ(given)
