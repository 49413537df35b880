"""A study of two tiny models from training to tables, broken off and gone on with."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are in the repository and not installed

from benchmarks.study import __main__ as command
from benchmarks.study import tables, training
from benchmarks.study.plan import DETECTION_SETS, Run
from benchmarks.study.predictions import read_scored, write_logits

TINY_RUNS = {
    "default-0": Run(name="default-0", title="ours", tokens=600),
    "textbook-0": Run(name="textbook-0", title="textbook", kind="textbook", tokens=600),
    "outcome-0": Run(name="outcome-0", title="outcome", outcome=True, tokens=600),
}


def _write_prmbench(folder: Path) -> None:
    folder.mkdir(parents=True)
    rows = []
    for number in range(60):
        steps = [f"{number} + {i} = {number + i}." for i in range(1, 4)]
        wrong = [*steps[:1], f"{number} + 2 = {number + 3}.", steps[2]]
        question = f"What is {number} plus one, two and three?"
        rows.append(
            {
                "idx": f"p{number}",
                "original_question": question,
                "modified_question": question,
                "original_process": steps,
                "modified_process": wrong,
                "error_steps": [2],
            }
        )
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone_folder: Callable[[str], Path]
) -> Callable[[str], Path]:
    """Runs the tiny trainings of the study with results of this name, and returns their folder."""
    _write_prmbench(tmp_path / "data" / "prmbench")
    backbone = str(backbone_folder("gpt2"))  # now, since making it draws random numbers
    monkeypatch.setattr(training, "find_backbone", lambda: backbone)
    monkeypatch.setattr(training, "QUEUE", tuple((name, DETECTION_SETS) for name in TINY_RUNS))
    monkeypatch.setattr(training, "run_named", TINY_RUNS.__getitem__)

    def run(name: str) -> Path:
        results = tmp_path / name / "results"
        training.train_all(list(TINY_RUNS), data=tmp_path / "data", runs=tmp_path / name / "runs", results=results)
        return results

    return run


def test_a_study_from_training_to_tables(
    study: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = study("whole")
    described = {name: json.loads((results / name / "training.json").read_text()) for name in TINY_RUNS}
    # The same records in as many steps, whatever the model; the outcome model has one label a record.
    assert len({(row["records"], row["optimizer_steps"]) for row in described.values()}) == 1
    assert described["outcome-0"]["labelled_steps"] == described["outcome-0"]["records"]
    assert described["default-0"]["labelled_steps"] == 3 * described["default-0"]["records"]
    ours, textbook = (read_scored(results, name, "prmbench-test") for name in ("default-0", "textbook-0"))
    assert ours.targets == textbook.targets
    assert (ours.logits != textbook.logits).all()
    assert ours.logits.shape == (24, 3)  # 12 of 60 problems, each with a wrong solution and a right one

    written = {file: file.stat().st_mtime_ns for file in results.rglob("*.jsonl")}
    study("whole")
    assert {file: file.stat().st_mtime_ns for file in results.rglob("*.jsonl")} == written

    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "write_logits", fail)
    with pytest.raises(KeyboardInterrupt):
        study("broken-off")
    monkeypatch.setattr(training, "write_logits", write_logits)
    resumed = study("broken-off")
    for name in TINY_RUNS:
        assert (
            read_scored(resumed, name, "prmbench-test").logits == read_scored(results, name, "prmbench-test").logits
        ).all()

    command.main(["--results", str(results), "detection"])
    printed = capsys.readouterr().out
    for row in ("every step right", "step's index alone", "this library's default, seed 0", "textbook PRM, seed 0"):
        assert f"\n| {row} | " in printed
    assert (
        "24 solutions of 12 problems, 12 of them with a wrong step; 72 labelled steps, 16.7 % of them wrong" in printed
    )
    assert "Not there yet: default-1, textbook-1, outcome-1" in printed
    command.main(["--results", str(results), "tables"])
    saved = json.loads((results / "tables.json").read_text())
    assert set(saved) == set(tables.TABLES)
    assert saved["detection"]["rows"]["every step right"]["error_f1"]["value"] == 0.0
    assert [row["num_steps"] for row in saved["positions"]["rows"]["default-0"]] == [24, 24, 24]
    assert saved["best-of-n"]["missing"] == ["best-of-outcome", "best-of-steps"]


def test_tables_without_a_single_run_say_what_is_missing(tmp_path: Path) -> None:
    for table in tables.TABLES.values():
        text, _ = table(tmp_path)
        assert "Not there yet: " in text
        assert "python -m benchmarks.study train " in text
