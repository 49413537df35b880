"""Formats: each on rows in its exact schema, what it refuses, and the real PRMBench files."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from trainer.formats import READERS, strip_step_numbers
from trainer.readers import load_step_dataset, read_step_records
from trainer.records import StepRecord
from trainer.splits import split_by_problem

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"

TRL = {"prompt": "1 + 1?", "completions": ["1 + 1 = 2.", "So 3."], "labels": [True, False]}
PRMBENCH = {
    "original_question": "1 + 1 + 1?",
    "modified_question": "1 + 1 + 1, roughly?",
    "original_process": ["1 + 1 = 2.", "2 + 1 = 3."],
    "modified_process": ["1 + 1 = 2.", "2 + 1 = 4.", "So 4."],
    "modified_steps": [2, 3],
    "error_steps": [2, 3],
    "reason": "Steps 2 and 3 add wrongly.",
    "idx": "p_0",
    "question": "1 + 1 + 1?",
    "classification": "circular",
}


def plain_labels(labels: Any) -> tuple[float, ...]:
    steps = [f"step {index}" for index in range(len(labels))]
    return READERS["plain"].read({"problem": "p", "steps": steps, "labels": labels})[0].labels


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1, -1, 1], (1.0, 0.0, 1.0)),
        ([1.0, -1.0, None], (1.0, 0.0, -100.0)),
        ([-1, -100], (0.0, -100.0)),
        ([True, False, None], (1.0, 0.0, -100.0)),
        ([True, -100], (1.0, -100.0)),
        ([1, 0, 1], (1.0, 0.0, 1.0)),
        ([0.25, 1, 0, None, -100.0], (0.25, 1.0, 0.0, -100.0, -100.0)),
        ([None, None], (-100.0, -100.0)),
    ],
)
def test_plain_label_codes(labels: list[Any], expected: tuple[float, ...]) -> None:
    got = plain_labels(labels)
    assert got == expected
    assert all(type(label) is float for label in got)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([1, 0, -1], ValueError, "both -1 and 0: .*neutral.*is a choice"),
        ([1, 0.5, -1], ValueError, "must be of one code: got 0.5 beside -1"),
        ([True, 0], ValueError, "must be of one code: got 0 beside booleans"),
        ([True, -1], ValueError, "must be of one code: got -1 beside booleans"),
        ([2, 1], ValueError, r"labels must be in \[0, 1\] or -100: got 2 at step 1"),
        ([10**400], ValueError, "labels must be in"),
        ([float("nan")], ValueError, "got nan"),
        (["1"], TypeError, "labels must be ints or floats: got '1'"),
        ("11", TypeError, "labels must be a list: got str"),
    ],
)
def test_plain_labels_refused(labels: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plain_labels(labels)


def test_trl() -> None:
    (record,) = READERS["trl"].read(TRL)
    assert record == StepRecord(problem="1 + 1?", steps=("1 + 1 = 2.", "So 3."), labels=(1.0, 0.0))
    assert READERS["trl"].read(TRL | {"labels": [0.9, None]})[0].labels == (0.9, -100.0)
    numbered = READERS["trl"].read(TRL | {"completions": ["Step 1: 1 + 1 = 2.", "Step 2: So 3."]})
    assert numbered == [record]
    with pytest.raises(ValueError, match=r"labels must be in \[0, 1\] or -100: got -1 at step 2"):
        READERS["trl"].read(TRL | {"labels": [1, -1]})


def test_prmbench_gives_the_modified_and_the_original_solution() -> None:
    assert READERS["prmbench"].read(PRMBENCH) == [
        StepRecord(
            problem="1 + 1 + 1, roughly?",
            steps=("1 + 1 = 2.", "2 + 1 = 4.", "So 4."),
            labels=(1.0, 0.0, 0.0),
            problem_group="p_0",
        ),
        StepRecord(
            problem="1 + 1 + 1?",
            steps=("1 + 1 = 2.", "2 + 1 = 3."),
            labels=(1.0, 1.0),
            problem_group="p_0",
        ),
    ]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"error_steps": [4]}, ValueError, "does not exist: got 4 where modified_process has steps 1 to 3"),
        ({"error_steps": [0]}, ValueError, "does not exist: got 0"),
        ({"error_steps": ["2"]}, TypeError, "error_steps must be integers: got '2'"),
        ({"error_steps": [True]}, TypeError, "error_steps must be integers: got True"),
        ({"error_steps": None}, TypeError, "error_steps must be a list: got NoneType"),
        ({"modified_process": ["a", "", "c"]}, ValueError, "step must not be empty: got '' at step 2 of 3"),
        ({"original_process": ["a", " "]}, ValueError, "step must not be empty: got ' ' at step 2 of 2"),
    ],
)
def test_prmbench_bad_rows(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        READERS["prmbench"].read(PRMBENCH | changes)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (["1. a", "2. b"], ("a", "b")),
        (["Step 1. a", "Step 2. b"], ("a", "b")),
        (["Step 1: a", "step 2:\nb"], ("a", "b")),
        # Not every step carries its own number: nothing is removed.
        (["1. a", "b"], ("1. a", "b")),
        (["1. a", "3. b"], ("1. a", "3. b")),
        (["7.8 minutes", "2. b"], ("7.8 minutes", "2. b")),
        (["1.", "2."], ("1.", "2.")),
        (["1.5 is more", "2.5 too"], ("1.5 is more", "2.5 too")),
        (["1: 2 is the ratio"], ("1: 2 is the ratio",)),
    ],
)
def test_step_numbers_go_only_where_every_step_has_its_own(steps: list[str], expected: tuple[str, ...]) -> None:
    assert strip_step_numbers(steps) == expected


def test_prmbench_strips_each_process_by_itself() -> None:
    row = PRMBENCH | {"original_process": ["1. a", "2. b"], "modified_process": ["1. a", "b", "64."]}
    modified, original = READERS["prmbench"].read(row)
    assert (modified.steps, original.steps) == (("1. a", "b", "64."), ("a", "b"))


@pytest.fixture(scope="module")
def prmbench_folder() -> Path:
    folder = REAL_DATA / "prmbench"
    if not folder.is_dir():
        pytest.skip(f"the real PRMBench files are not at {folder}")
    return folder


def test_real_prmbench_counts(prmbench_folder: Path, tmp_path: Path) -> None:
    rejected_file = tmp_path / "rejected.jsonl"
    records, report = read_step_records(prmbench_folder, on_bad_row="skip", rejected_file=rejected_file)
    assert report.format == "prmbench"
    # 57 rows name a step beyond the last and another one has an empty step: none has both.
    assert report.rejected == {
        "error_steps names a step that does not exist": 57,
        "step must not be empty": 1,
    }
    assert (report.num_rows, report.num_kept) == (3203, 3203 - 57 - 1)
    assert report.num_records + report.num_duplicates == 2 * 3145
    assert len(records) == len(set(records)) == report.num_records == 4645
    assert report.num_contradictory == 8
    assert len(rejected_file.read_text(encoding="utf-8").splitlines()) == 58


def test_prmbench_rows_without_a_number_are_grouped_by_the_original_question() -> None:
    without = {name: value for name, value in PRMBENCH.items() if name != "idx"}
    assert {record.problem_group for record in READERS["prmbench"].read(without)} == {"1 + 1 + 1?"}


def test_real_prmbench_labels_agree_with_the_files(prmbench_folder: Path) -> None:
    records, report = read_step_records(prmbench_folder, on_bad_row="skip")
    rows = {
        (str(file), number): json.loads(line)
        for file in sorted(prmbench_folder.glob("*.jsonl"))
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1)
        if line
    }
    assert len(rows) == 3203
    for record, source in zip(records, report.record_sources, strict=True):
        row = rows[source]
        wrong = [number for number, label in enumerate(record.labels, start=1) if label == 0.0]
        is_original = not wrong
        assert record.problem == row["original_question" if is_original else "modified_question"]
        steps = row["original_process" if is_original else "modified_process"]
        assert len(record.steps) == len(steps)
        assert all(step.endswith(bare) for step, bare in zip(steps, record.steps, strict=True))
        assert is_original or wrong == sorted(row["error_steps"])


def test_real_prmbench_problems_stay_on_one_side_however_they_are_worded(prmbench_folder: Path) -> None:
    dataset = load_step_dataset(prmbench_folder, on_bad_row="skip")
    problems: dict[str, set[str]] = {}
    for file in prmbench_folder.glob("*.jsonl"):
        for line in filter(None, file.read_text(encoding="utf-8").split("\n")):
            row = json.loads(line)
            problems.setdefault(row["original_question"], set()).add(row["idx"])
            problems.setdefault(row["modified_question"], set()).add(row["idx"])
    assert all(len(found) == 1 for found in problems.values())
    train, held_out = split_by_problem(dataset, 0.1, seed=0)
    sides = [{idx for problem in part["problem"] for idx in problems[problem]} for part in (train, held_out)]
    assert len(sides[0] | sides[1]) > 390
    assert not sides[0] & sides[1]


def test_real_prmbench_stops_at_its_first_bad_row(prmbench_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"\.jsonl:\d+: error_steps names a step that does not exist: got \d+"):
        load_step_dataset(prmbench_folder)


def test_real_prmbench_numbers_are_removed_only_where_all_steps_have_them(prmbench_folder: Path) -> None:
    rows = [
        json.loads(line)
        for file in sorted(prmbench_folder.glob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").split("\n")
        if line
    ]
    changed = Counter(
        name
        for row in rows
        for name in ("modified_process", "original_process")
        if strip_step_numbers(row[name]) != tuple(row[name])
    )
    # "Step 1. " all through; others begin with a figure of their own ("64.") and keep it.
    assert changed == {"modified_process": 14, "original_process": 13}
