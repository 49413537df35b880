"""Reading files: every file type, finding the format, bad rows and the report."""

import csv
import gzip
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest

from modeling_prm.step_loss import IGNORED_LABEL
from trainer.formats import READERS
from trainer.readers import load_step_dataset, read_step_records
from trainer.records import StepRecord

PLAIN = {"problem": "1 + 1?", "steps": ["1 + 1 = 2.", "So 3."], "labels": [1, -1]}
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

TAGGED = "1 + 1? Step 1: 1 + 1 = 2. ки\nStep 2: So 3. ки"
NODE = {"text": "1 + 1?", "mc_value": 0.5, "children": [{"text": "So 3.", "mc_value": 0.25, "children": []}]}
CONVERSATION = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2."}]
ROWS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "trl": TRL,
    "prmbench": PRMBENCH,
    "prm800k": {
        "question": {"problem": "1 + 1?", "ground_truth_answer": "2"},
        "label": {
            "steps": [
                {
                    "completions": [{"text": "It is 2.", "rating": 1, "flagged": False}],
                    "human_completion": None,
                    "chosen_completion": 0,
                }
            ],
            "finish_reason": "solution",
        },
    },
    "processbench": {"id": "a", "problem": "1 + 1?", "steps": ["1 + 1 = 2.", "So 3."], "label": 1},
    "bigbench_mistake": {"input": "1 + 1?", "steps": ["1 + 1 = 2.", "So 3."], "target": "2", "mistake_index": None},
    "mr_gsm8k": {
        "question": "1 + 1?",
        "model_output_steps": ["1 + 1 = 2.", "So 3."],
        "model_output_solution_first_error_step": "2",
    },
    "math_shepherd": {"input": TAGGED, "label": TAGGED.replace("ки", "+"), "task": "GSM8K"},
    "openrlhf": {"input": TAGGED, "value": ["+", "-"]},
    "er_prm": {"text": TAGGED, "value": [0.75, 0.25]},
    "rlhflow": {
        "conversations": [{"role": "user", "content": "1 + 1? Step 1: 2."}, {"role": "assistant", "content": "+"}]
    },
    "math_aps": {"question": "1 + 1?", "reasoning_steps": [{"solution_prefix": "So 3.", "mc_value": 0.25}]},
    "math_aps_tree": NODE,
    "messages": {"messages": CONVERSATION, "labels": [1]},
    "agentprocessbench": {"messages": CONVERSATION, "step_labels": {"1": 1}},
}


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --- files -------------------------------------------------------------------------------------------


def test_dataset_has_explicit_types(tmp_path: Path) -> None:
    rows = [PLAIN, {"problem": "p", "steps": ["a", "b"], "labels": [True, None], "problem_group": "g"}]
    dataset = load_step_dataset(write_jsonl(tmp_path / "a.jsonl", rows))
    assert str(dataset.features["labels"].feature.dtype) == "float32"
    assert dataset.features["steps"].feature.dtype == dataset.features["problem"].dtype == "string"
    assert dataset[:] == {
        "problem": ["1 + 1?", "p"],
        "steps": [["1 + 1 = 2.", "So 3."], ["a", "b"]],
        "labels": [[1.0, 0.0], [1.0, -100.0]],
        "problem_group": [None, "g"],
    }
    # A map that rewrites the column keeps -100 as it is.
    assert dataset.map(lambda row: {"labels": row["labels"]})[1]["labels"] == [1.0, -100.0]


def test_plain_reads_what_a_record_writes(tmp_path: Path) -> None:
    records = [
        StepRecord(problem="p", steps=("1. a", "2. b", " c "), labels=(0.125, IGNORED_LABEL, 1.0)),
        StepRecord(problem="q\u2028r", steps=("a\nb",), labels=(0.0,)),
    ]
    path = write_jsonl(tmp_path / "a.jsonl", (record.to_dict() for record in records))
    assert read_step_records(path)[0] == records


def write_csv(path: Path, row: dict[str, Any]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(row)
        writer.writerow(value if isinstance(value, str) else json.dumps(value) for value in row.values())
    return path


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_every_file_type_gives_the_same_records(tmp_path: Path, row: dict[str, Any]) -> None:
    text = json.dumps(row)
    (tmp_path / "a.jsonl").write_text(f"\ufeff{text}\r\n\n", encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(text)
    (tmp_path / "c.json").write_text(f"[{text}]", encoding="utf-8")
    write_csv(tmp_path / "d.csv", row)
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "e [1].parquet")
    for name in ("a.jsonl", "c.json", "d.csv"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        with pyarrow.output_stream(str(tmp_path / f"{name}.zst"), compression="zstd") as stream:
            stream.write(content)

    reports = []
    for path in sorted(tmp_path.iterdir()):
        records, report = read_step_records(path)
        assert records == READERS[report.format].read(row), path.name
        reports.append(report)
    assert {(report.format, report.num_rows) for report in reports} == {(reports[0].format, 1)}
    # A CSV row is counted by the line it ends on, after the header.
    last = 2 + sum(value.count("\n") for value in row.values() if isinstance(value, str))
    assert [report.record_sources[0][1] for report in reports] == [1, 1, 1, 1, 1, 1, 1, last, last, last, 1]
    streamed = list(load_step_dataset(tmp_path, streaming=True))
    assert len(streamed) == len(reports) * len(records) or READERS[reports[0].format].drop_duplicates
    assert {(entry["problem"], *entry["steps"]) for entry in streamed} == {
        (record.problem, *record.steps) for record in records
    }


def test_csv_text_that_looks_like_json_stays_text(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", PLAIN | {"problem": "[1, 2]"})
    assert read_step_records(path)[0][0].problem == "[1, 2]"


def test_csv_faults(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('problem,steps,labels\np,"[""a""]",1;0\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a.csv:2: labels must be JSON text in a CSV file: Extra data"):
        read_step_records(path)
    path.write_text('problem,steps,labels\np,"[""a""]"\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a.csv:2: number of fields is not the header's: got fewer than 3"):
        read_step_records(path)
    path.write_text('problem,steps,labels\np,"[""a""]",[1],x\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a.csv:2: number of fields is not the header's: got more than 3"):
        read_step_records(path)
    path.write_text('problem,steps,labels\np,"[""a"n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a.csv:2: line is not CSV: .* expected after"):
        read_step_records(path)
    path.write_bytes(b"problem,steps,labels\np\xff,[],[]\n")
    with pytest.raises(ValueError, match=r"a.csv is not UTF-8: invalid start byte"):
        read_step_records(path)


def test_folder_is_read_in_the_order_of_names_and_other_files_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        write_jsonl(tmp_path / name, [PLAIN | {"problem": name}])
    (tmp_path / "README.md").write_text("notes")
    (tmp_path / ".hidden.jsonl").write_text("{")
    (tmp_path / "more").mkdir()
    with caplog.at_level(logging.INFO):
        records, report = read_step_records(tmp_path)
    assert [record.problem for record in records] == ["a.jsonl", "b.jsonl"]
    assert report.record_sources == [(str(tmp_path / "a.jsonl"), 1), (str(tmp_path / "b.jsonl"), 1)]
    assert "not read, since not data files: README.md, more" in caplog.text


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl does not exist"):
        read_step_records("missing.jsonl")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_step_records(tmp_path / "missing" / "folder")
    with pytest.raises(FileNotFoundError, match="holds no data file"):
        read_step_records(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="is not a data file: its name must end in"):
        read_step_records(tmp_path / "a.txt")


def test_json_files_that_hold_no_list(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(PLAIN))
    with pytest.raises(ValueError, match="must hold a list of objects: got dict"):
        read_step_records(path)
    path.write_text(f"{json.dumps(PLAIN)}\n{json.dumps(PLAIN)}")
    with pytest.raises(ValueError, match=r"is not JSON in UTF-8: .*must be named \.jsonl"):
        read_step_records(path)


def test_hub_dataset_is_loaded_with_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(path: str, *, split: str) -> datasets.Dataset:
        calls.append((path, split))
        return datasets.Dataset.from_list([TRL, TRL | {"labels": [True, True]}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records, report = read_step_records("owner/steps", split="test")
    assert calls == [("owner/steps", "test")]
    assert [record.labels for record in records] == [(1.0, 0.0), (1.0, 1.0)]
    assert report.record_sources == [("owner/steps[test]", 1), ("owner/steps[test]", 2)]
    with pytest.raises(ValueError, match="pass split= too"):
        read_step_records("owner/steps")


def test_split_is_refused_for_local_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is for Hub datasets"):
        read_step_records(write_jsonl(tmp_path / "a.jsonl", [PLAIN]), split="train")


# --- finding the format ------------------------------------------------------------------------------


def test_auto_says_which_format_it_took(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [TRL])
    with caplog.at_level(logging.INFO):
        load_step_dataset(path)
    assert "read as format 'trl', found by its columns" in caplog.text
    assert f"{path} (trl): kept 1 of 1 rows: 1 records" in caplog.text
    assert {record.levelname for record in caplog.records} == {"INFO"}


def test_auto_refuses_ambiguous_columns_and_a_name_settles_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [PLAIN | TRL | {"problem": "other"}])
    with pytest.raises(ValueError, match=r"fit more than one format .*pass format='plain' or 'trl'"):
        read_step_records(path)
    assert read_step_records(path, format="plain")[0][0].problem == "other"
    assert read_step_records(path, format="trl")[0][0].problem == "1 + 1?"


def test_auto_finds_every_format(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert set(ROWS) == {reader.name for reader in READERS.values() if reader.found_by_columns}
    for name, row in ROWS.items():
        with caplog.at_level(logging.INFO):
            load_step_dataset(write_jsonl(tmp_path / f"{name}.jsonl", [row]))
        assert f"read as format {name!r}, found by its columns" in caplog.text


def test_auto_names_all_candidates(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [ROWS["openrlhf"] | ROWS["math_shepherd"] | ROWS["er_prm"]])
    with pytest.raises(ValueError, match="pass format='math_shepherd' or 'openrlhf' or 'er_prm'"):
        read_step_records(path)


def test_auto_lists_what_it_got_and_what_each_format_needs(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": 1}])
    with pytest.raises(ValueError, match="got label, text; plain needs problem, steps, labels; trl needs") as got:
        read_step_records(path)
    shown = [reader for reader in READERS.values() if reader.found_by_columns]
    assert all(column in str(got.value) for reader in shown for column in reader.columns)


def test_unknown_options_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [PLAIN])
    with pytest.raises(ValueError, match="no format is named 'plian'; pass 'auto' or one of plain, trl"):
        read_step_records(path, format="plian")
    with pytest.raises(ValueError, match="on_bad_row must be 'error' or 'skip', got 'warn'"):
        read_step_records(path, on_bad_row="warn")  # type: ignore[arg-type]


# --- bad rows ----------------------------------------------------------------------------------------

BAD_LINES = [
    b'{"problem": "p", "steps": ["a"], "labels": [1]\n',  # line 1: cut off
    json.dumps(PLAIN).encode() + b"\n",  # line 2: good
    b"\n",  # line 3: blank, no row
    b'["p"]\n',  # line 4: no object
    b'{"problem": "p", "steps": ["a"]}\n',  # line 5: no labels
    b'{"problem": "p", "steps": ["a", ""], "labels": [1, 1]}\n',  # line 6: empty step
    b'{"problem": "p", "steps": [" "], "labels": [1]}\n',  # line 7: empty step
    b'{"problem": "\xff", "steps": ["a"], "labels": [1]}\n',  # line 8: no UTF-8
    json.dumps(PLAIN | {"labels": [True, False]}).encode(),  # line 9: good
]


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        (0, ValueError, "line is not JSON: Expecting ',' delimiter at column"),
        (3, TypeError, "row must be an object: got list"),
        (4, ValueError, "row lacks columns of the format 'plain': labels"),
        (5, ValueError, "step must not be empty: got '' at step 2 of 2"),
        (7, ValueError, "line is not UTF-8: invalid start byte at byte 13"),
    ],
)
@pytest.mark.parametrize("format", ["auto", "plain"])
def test_a_bad_row_stops_with_file_line_and_reason(
    tmp_path: Path, format: str, line: int, error: type[Exception], message: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(BAD_LINES[1] + BAD_LINES[2] + BAD_LINES[line])
    with pytest.raises(error, match=rf"a\.jsonl:3: {message}"):
        read_step_records(path, format=format)


@pytest.mark.parametrize("format", ["auto", "plain"])
def test_a_bad_first_row_stops_too(tmp_path: Path, format: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(BAD_LINES[0] + BAD_LINES[1])
    with pytest.raises(ValueError, match=r"a\.jsonl:1: line is not JSON"):
        read_step_records(path, format=format)


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 100_000], ids=["long number", "deep nesting"])
def test_lines_that_the_parser_gives_up_on_are_bad_rows(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(PLAIN)}\n{text}\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:2: line is not JSON: "):
        read_step_records(path)


def test_skipped_rows_are_counted_by_reason_and_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, rejected_file = tmp_path / "a.jsonl", tmp_path / "new" / "rejected.jsonl"
    path.write_bytes(b"".join(BAD_LINES))
    records, report = read_step_records(path, on_bad_row="skip", rejected_file=rejected_file)
    assert [record.labels for record in records] == [(1.0, 0.0), (1.0, 0.0)]
    assert [number for _, number in report.record_sources] == [2, 9]
    assert (report.num_rows, report.num_kept, report.num_records) == (8, 2, 2)
    assert report.rejected == Counter(
        {
            "step must not be empty": 2,
            "line is not JSON": 1,
            "row must be an object": 1,
            "row lacks columns of the format 'plain'": 1,
            "line is not UTF-8": 1,
        }
    )

    entries = [json.loads(line) for line in rejected_file.read_text(encoding="utf-8").splitlines()]
    assert [entry["number"] for entry in entries] == [1, 4, 5, 6, 7, 8]
    assert {entry["file"] for entry in entries} == {str(path)}
    assert entries[0]["row"] == BAD_LINES[0].decode()
    assert entries[3]["row"] == {"problem": "p", "steps": ["a", ""], "labels": [1, 1]}
    assert entries[3]["reason"].startswith("step must not be empty: got '' at step 2 of 2")

    load_step_dataset(path, on_bad_row="skip")
    assert "kept 2 of 8 rows: 2 records; 2 rejected: step must not be empty; 1 rejected:" in caplog.text
    assert caplog.records[-1].levelname == "WARNING"


def test_rejected_file_is_emptied_where_nothing_is_rejected(tmp_path: Path) -> None:
    rejected_file = tmp_path / "rejected.log"
    rejected_file.write_text("from an earlier run")
    path = write_jsonl(tmp_path / "a.jsonl", [PLAIN])
    read_step_records(path, on_bad_row="skip", rejected_file=rejected_file)
    assert rejected_file.read_text() == ""


def test_rejected_file_never_lands_among_the_data(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [PLAIN])
    for source, target in ((path, path), (tmp_path, path), (tmp_path, tmp_path / "bad.jsonl")):
        with pytest.raises(ValueError, match="would be among the data that is read"):
            read_step_records(source, on_bad_row="skip", rejected_file=target)
    with pytest.raises(ValueError, match="with on_bad_row='skip' only"):
        read_step_records(path, rejected_file=tmp_path / "bad.log")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [PLAIN | {"steps": []}, PLAIN | {"labels": [1]}])
    rejected_file = tmp_path / "rejected.log"
    with pytest.raises(ValueError, match=r"no row is left, .* kept 0 of 2 rows"):
        read_step_records(path, on_bad_row="skip", rejected_file=rejected_file)
    assert len(rejected_file.read_text().splitlines()) == 2
    path.write_text("[]\n1\n")
    with pytest.raises(ValueError, match="the format cannot be told since none of 2 rows is an object"):
        read_step_records(path, on_bad_row="skip")
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no rows"):
        read_step_records(path)
    with pytest.raises(ValueError, match="kept 0 of 0 rows"):
        read_step_records(path, format="plain")


def test_prmbench_drops_duplicates_over_all_files_and_counts_contradictions(tmp_path: Path) -> None:
    # Rows: the first; another error in the same original; the same again in a second file; and one whose
    # modified solution is the original, with a label that contradicts it.
    other = PRMBENCH | {"modified_process": ["1 + 1 = 3.", "3 + 1 = 4."], "error_steps": [1, 2]}
    unchanged = PRMBENCH | {
        "modified_question": "1 + 1 + 1?",
        "modified_process": PRMBENCH["original_process"],
        "error_steps": [2],
    }
    write_jsonl(tmp_path / "a.jsonl", [PRMBENCH, other])
    write_jsonl(tmp_path / "b.jsonl", [PRMBENCH, unchanged])
    records, report = read_step_records(tmp_path)
    # 8 records: modified, original | other, (original) | (modified), (original) | contradiction, (original)
    assert (report.num_rows, report.num_kept) == (4, 4)
    assert (report.num_records, report.num_duplicates, report.num_contradictory) == (4, 4, 1)
    assert len(records) == len(set(records)) == 4
    assert [(Path(file).name, number) for file, number in report.record_sources] == [
        ("a.jsonl", 1),
        ("a.jsonl", 1),
        ("a.jsonl", 2),
        ("b.jsonl", 2),
    ]


def test_other_formats_keep_repeated_records(tmp_path: Path) -> None:
    records, report = read_step_records(write_jsonl(tmp_path / "a.jsonl", [PLAIN, PLAIN]))
    assert (len(records), report.num_duplicates) == (2, 0)


# --- what a 0 means ----------------------------------------------------------------------------------


def rows_of(*labels: list[Any]) -> list[dict[str, Any]]:
    return [{"problem": "p", "steps": [f"step {i}" for i in range(len(given))], "labels": given} for given in labels]


@pytest.mark.parametrize("labels", [([1, 0], [1, 1], [1, -1]), ([1, -1], [1, 1], [1, 0])])
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_two_codes_are_refused_and_both_lines_named(
    tmp_path: Path, labels: tuple[list[int], ...], on_bad_row: Any, streaming: bool
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows_of(*labels))
    with pytest.raises(ValueError, match=r"a\.jsonl:3: labels are of two codes: .*a\.jsonl:1 in "):
        list(load_step_dataset(path, on_bad_row=on_bad_row, streaming=streaming))


def test_codes_are_compared_over_the_files_of_a_folder(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", rows_of([1, 0]))
    write_jsonl(tmp_path / "b.jsonl", rows_of([-1]))
    with pytest.raises(ValueError, match=r"b\.jsonl:1: labels are of two codes: .*a\.jsonl:1 in 0/1"):
        read_step_records(tmp_path)


@pytest.mark.parametrize(
    ("neutral", "expected"),
    [
        ("correct", [(1.0, 1.0), (1.0, 0.0), (0.0, -100.0)]),
        ("incorrect", [(1.0, 0.0), (1.0, 0.0), (0.0, -100.0)]),
        ("ignored", [(1.0, -100.0), (1.0, 0.0), (0.0, -100.0)]),
        ("class", [(0.0, 1.0), (0.0, 2.0), (2.0, -100.0)]),
    ],
)
def test_neutral_says_what_a_zero_is_in_every_row(tmp_path: Path, neutral: Any, expected: list[Any]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows_of([1, 0], [True, False], [-1, None]))
    assert [record.labels for record in read_step_records(path, neutral=neutral)[0]] == expected


def test_neutral_is_refused_where_it_would_be_wrong(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows_of([1, 1], [1, 0]))
    with pytest.raises(ValueError, match=r"a\.jsonl:2: labels hold a 0, and no row of .*a\.jsonl a -1"):
        read_step_records(path, neutral="ignored")
    write_jsonl(path, rows_of([1, 0.5]))
    with pytest.raises(ValueError, match=r"a\.jsonl:1: labels must be \+1, 0 or -1 where neutral= is given: got 0.5"):
        read_step_records(path, neutral="ignored")
    write_jsonl(path, [TRL])
    for streaming in (False, True):
        with pytest.raises(ValueError, match="the format 'trl' has no neutral label"):
            load_step_dataset(path, neutral="class", streaming=streaming)
    assert read_step_records(path, neutral="ignored")[0][0].labels == (1.0, 0.0)


# --- damaged files -----------------------------------------------------------------------------------


def test_enormous_strings_are_bad_rows(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [PLAIN, PLAIN | {"problem": "x" * 1_000_001}, PLAIN])
    with pytest.raises(
        ValueError, match=r"a\.jsonl:2: problem must not be longer than 1000000 characters: got 1000001"
    ):
        read_step_records(path)
    _, report = read_step_records(path, on_bad_row="skip")
    assert report.rejected == {"problem must not be longer than 1000000 characters": 1}
    # Longer than the limit that the csv module has by itself.
    csv_path = write_csv(tmp_path / "b.csv", PLAIN | {"problem": "x" * 200_000})
    assert len(read_step_records(csv_path)[0][0].problem) == 200_000


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.json.gz", "a.csv.zst", "a.parquet"])
@pytest.mark.parametrize("content", [b"no such file", b""], ids=["other", "empty"])
def test_files_that_are_not_what_their_name_says(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(name)):
        read_step_records(tmp_path / name)


def test_a_compressed_file_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(PLAIN | {"problem": str(i)}) for i in range(99)).encode())[:-40])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz cannot be read as what its name says: Compressed file ended"):
        read_step_records(path)


def test_rejected_rows_go_into_an_open_file_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(BAD_LINES))
    with (tmp_path / "rejected.log").open("w") as file:
        for _ in range(2):
            read_step_records(path, on_bad_row="skip", rejected_file=file)
    numbers = [json.loads(line)["number"] for line in (tmp_path / "rejected.log").read_text().splitlines()]
    assert numbers == [1, 4, 5, 6, 7, 8] * 2
