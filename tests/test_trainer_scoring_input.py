"""Solutions to score in bulk: every form of input, and rows that cannot be read in their place."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from trainer.scoring_input import Columns, count_input_rows, describe_files, find_columns, read_solutions

FLAT = Columns(problem="problem", solution="steps", solutions=None, id="id")
NESTED = Columns(problem="problem", solution=None, solutions="solutions", id="id")
ROWS: list[dict[str, Any]] = [
    {"id": "a", "problem": "p", "steps": ["x", "y"]},
    {"id": "b", "problem": "q", "steps": ["z"]},
]


def write_lines(file: Path, *rows: Any) -> Path:
    text = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text, encoding="utf-8")
    return file


def read(files: list[Path], columns: Columns) -> list[tuple[Any, ...]]:
    """Number, id, place among the row's, problem, solution of what can be read; number, id, error of what cannot."""
    rows = [row for rows in read_solutions(files, columns) for row in rows]
    return [
        (row.row, row.id, row.solution_idx, row.problem, row.solution)
        if row.error is None
        else (row.row, row.id, row.solution_idx, row.error)
        for row in rows
    ]


@pytest.mark.parametrize("name", ["f.jsonl", "f.jsonl.gz", "f.json", "f.csv", "f.parquet"])
def test_every_type_of_file_gives_the_same(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if name.endswith(".csv"):
        with file.open("w", encoding="utf-8", newline="") as lines:
            writer = csv.writer(lines)
            writer.writerow(ROWS[0])
            writer.writerows([row["id"], row["problem"], json.dumps(row["steps"])] for row in ROWS)
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    elif name.endswith(".json"):
        file.write_text(json.dumps(ROWS), encoding="utf-8")
    else:
        write_lines(file, *ROWS)
    assert find_columns([file]) == FLAT
    assert read([file], FLAT) == [(0, "a", 0, "p", ["x", "y"]), (1, "b", 0, "q", ["z"])]


def test_texts_and_several_solutions_are_numbered_through_all_files(tmp_path: Path) -> None:
    first = write_lines(
        tmp_path / "1.jsonl",
        {"id": 7, "problem": "p", "solutions": ["one\n\ntwo", ["x"], {"text": "t"}, {"steps": ["s"], "answer": "5"}]},
        "",
    )
    second = write_lines(tmp_path / "2.jsonl", {"problem": "q", "solutions": [["y"]]})
    assert find_columns([first, second]) == NESTED
    assert read([first, second], NESTED) == [
        (0, "7", 0, "p", "one\n\ntwo"),
        (1, "7", 1, "p", ["x"]),
        (2, "7", 2, "p", "t"),
        (3, "7", 3, "p", ["s"]),
        (4, None, 0, "q", ["y"]),
    ]
    text = write_lines(tmp_path / "3.jsonl", {"question": "p", "solution": "one\n\ntwo"})
    assert read([text], find_columns([text])) == [(0, None, 0, "p", "one\n\ntwo")]


def test_csv_cells_are_texts_unless_they_are_lists_of_texts(tmp_path: Path) -> None:
    file = tmp_path / "f.csv"
    with file.open("w", encoding="utf-8", newline="") as lines:
        csv.writer(lines).writerows(
            [["problem", "solution"], ["p", "[1, 2]"], ["p", '["a", "b"]'], ["p", "[a"], ["p", ""]]
        )
    columns = find_columns([file])
    assert [row[4] for row in read([file], columns)] == ["[1, 2]", ["a", "b"], "[a", ""]
    with file.open("w", encoding="utf-8", newline="") as lines:
        csv.writer(lines).writerows([["problem", "solutions"], ["p", '["a", ["b"]]'], ["p", "a"]])
    rows = read([file], find_columns([file]))
    assert [row[4] for row in rows[:2]] == ["a", ["b"]]
    assert rows[2][3].startswith(f"{file}:3: solutions must be a list as JSON text in a CSV file")


def test_rows_that_cannot_be_read_keep_their_place(tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "f.jsonl",
        {"id": "a", "problem": "p", "steps": ["x"]},
        '{"id": "b", "problem": }',
        [1],
        {"id": "c", "steps": ["x"]},
        {"id": "d", "problem": 5, "steps": ["x"]},
        {"id": ["e"], "problem": "p", "steps": None},
        {"id": "f", "problem": "p", "steps": [1]},
        {"id": "g", "problem": "p", "steps": "y" * 1_000_001},
        {"id": 1.5, "problem": "p" * 1_000_001, "steps": ["x"]},
        {"id": "\ud83d", "problem": "p", "steps": ["z"]},
    )
    rows = read([file], FLAT)
    assert [row[0] for row in rows] == list(range(10))
    assert rows[0] == (0, "a", 0, "p", ["x"])
    assert rows[9] == (9, "\\ud83d", 0, "p", ["z"]), "an id that cannot be stored is spelled out"
    assert [(row[1], row[3].removeprefix(f"{file}:{row[0] + 1}: ").split("; ")[0]) for row in rows[1:9]] == [
        (None, "line is not JSON: Expecting value at column 24"),
        (None, "a row must be an object, got list"),
        ("c", "problem must be a text, got None"),
        ("d", "problem must be a text, got 5"),
        ('["e"]', "steps must be a text, a list of steps, or an object with either text or steps"),
        ("f", "steps: steps must be a list of strings, got [1]"),
        ("g", "steps has 1,000,001 characters, more than the 1,000,000 that are read"),
        ("1.5", "problem has 1,000,001 characters, more than the 1,000,000 that are read"),
    ]


def test_one_bad_solution_among_several(tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "f.jsonl",
        {"id": "a", "problem": "p", "solutions": ["x", 5, "y"]},
        {"id": "b", "problem": "p", "solutions": []},
        {"id": "c", "problem": "p", "solutions": ["z"]},
    )
    rows = read([file], NESTED)
    assert [row[:3] for row in rows] == [(0, "a", 0), (1, "a", 1), (2, "a", 2), (3, "b", 0), (4, "c", 0)]
    assert rows[1][3] == f"{file}:1: solution 2: steps must be a list of strings, got 5"
    assert rows[3][3] == f"{file}:2: solutions must be a list with at least one solution, got []"
    assert [rows[index][4] for index in (0, 2, 4)] == ["x", "y", "z"]


def test_columns_are_named_or_found(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "f.jsonl", "broken", {"question": "p", "steps": ["x"], "solution": "x", "key": 1})
    with pytest.raises(ValueError, match=r"f.jsonl:2 has several columns that may hold the solution: steps, solution;"):
        find_columns([file])
    assert find_columns([file], solution="solution", id="key") == Columns(
        problem="question", solution="solution", solutions=None, id="key"
    )
    assert find_columns([file], solutions="steps", problem="key") == Columns(
        problem="key", solution=None, solutions="steps", id=None
    )
    with pytest.raises(ValueError, match="no column 'answer', which --solution-column names; it has question, steps"):
        find_columns([file], solution="answer")
    other = write_lines(tmp_path / "g.jsonl", {"task": "p", "steps": ["x"]})
    with pytest.raises(ValueError, match="has no column problem or question or prompt; name it with --problem-column"):
        find_columns([other])
    with pytest.raises(ValueError, match="no row can be parsed"):
        find_columns([write_lines(tmp_path / "h.jsonl", "broken", [1])])


def test_a_first_row_without_a_column_is_a_bad_row_and_no_reason_to_stop(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "f.jsonl", {"id": "a", "problem": "p"}, {}, *ROWS[1:])
    assert find_columns([file]) == find_columns([file], solution="steps", id="id") == FLAT
    rows = read([file], FLAT)
    assert [row[:2] for row in rows] == [(0, "a"), (1, None), (2, "b")]
    assert rows[0][3].startswith(f"{file}:1: steps must be")
    assert rows[2] == (2, "b", 0, "q", ["z"])
    # Where the columns are in no row, the first one is named, and not all of a long file is read for it.
    many = write_lines(tmp_path / "g.jsonl", *[{"id": "a", "problem": "p"}] * 1000, *ROWS)
    with pytest.raises(ValueError, match=r"g.jsonl:1 has no column steps or solution"):
        find_columns([many])


def test_a_file_that_breaks_off_stops(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "f.jsonl.gz", *ROWS * 500)
    file.write_bytes(file.read_bytes()[:-30])
    rows = read_solutions([file], FLAT)
    assert next(rows)[0].id == "a"
    with pytest.raises(ValueError, match="cannot be read as what its name says"):
        list(rows)


def test_input_rows_are_counted_where_that_is_cheap(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "f.jsonl", *ROWS, "", "broken")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "g.parquet")
    assert count_input_rows([lines, tmp_path / "g.parquet"]) == 5
    assert count_input_rows([lines, write_lines(tmp_path / "h.jsonl.gz", *ROWS)]) is None


def test_other_content_is_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    same, seen = b"a" * (3 << 20), set()
    # The first byte, one within the first MiB, one within the last, and another length.
    for content in (same, b"b" + same[1:], same[:9] + b"b" + same[10:], same[:-9] + b"b" + same[-8:], same + b"a"):
        file.write_bytes(content)
        seen.add(*describe_files([file]))
    assert len(seen) == 5
    moved = tmp_path / "folder" / "f.jsonl"
    moved.parent.mkdir()
    moved.write_bytes(same)
    assert describe_files([moved])[0] in seen
