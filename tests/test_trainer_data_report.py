"""The report on labelled solutions: counts, lengths, errors by position, duplicates, shared problems, truncation."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modeling_prm import PRMProcessor
from trainer.data_report import describe, error_positions, load_processor, main, shared_problems, truncated
from trainer.data_report_view import draw, render
from trainer.decontamination import near_duplicates
from trainer.readers import load_step_dataset

WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen"


@pytest.fixture(autouse=True)
def _keep_logging() -> Iterator[None]:
    """The command sets up logging for its process, which is ours here."""
    root, handlers = logging.getLogger(), list(logging.getLogger().handlers)
    levels = {name: logging.getLogger(name).level for name in ("trainer", "modeling_prm", "hub_card")}
    yield
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def write(file: Path, *rows: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def row(problem: str, steps: list[str], labels: list[float | None], **more: Any) -> dict[str, Any]:
    return {"problem": problem, "steps": steps, "labels": labels, **more}


ROWS = [
    row("2 + 3?", ["ab", "abcd", "abc"], [1, -1, -1]),
    row("2 +  3?", ["a"], [1]),
    row("4?", ["a", "b"], [None, 0.25]),
    row("4?", ["a", "b"], [None, 0.25]),
    row("4?", ["a", "b"], [1, None]),
    row("5?", ["a"], [None]),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "steps.jsonl", *ROWS)


def test_counts_and_lengths_by_hand(data: Path) -> None:
    report, lengths = describe(load_step_dataset(data))
    assert report["counts"] == {
        "solutions": 6,
        "problems": 3,  # white space tells none apart
        "steps": 11,
        "labelled_steps": 7,
        "soft_labels": 2,
        "wrong_steps": 4,
        "solutions_with_error": 3,
        "solutions_without_label": 1,
    }
    assert report["duplicates"] == {"same_labels": 1, "other_labels": 1}
    assert lengths["steps a solution"].tolist() == [3, 1, 2, 2, 2, 1]
    assert sorted(lengths["characters a step"].tolist()) == [1] * 8 + [2, 3, 4]
    assert lengths["characters a solution"].tolist() == [6 + 9, 7 + 1, 4, 4, 4, 3]
    # In order 3 4 4 4 8 15: the middle of six, taken down, is the third.
    assert report["lengths"]["characters a solution"] == {"0": 3, "50": 4, "90": 8, "95": 8, "99": 8, "100": 15}
    assert report["truncation"] == []


def test_errors_by_position_by_hand() -> None:
    ten = [1.0] * 10
    rows = error_positions([[1.0, 0.0, 0.0], [-100.0, 0.4], [*ten, 1.0, 0.0], [0.5]])
    assert rows[:2] == [
        {"position": "1", "labelled_steps": 3, "error_share": 0.0, "first_errors": 0},
        {"position": "2", "labelled_steps": 3, "error_share": pytest.approx(2 / 3), "first_errors": 2},
    ]
    assert rows[2] == {"position": "3", "labelled_steps": 2, "error_share": 0.5, "first_errors": 0}
    assert rows[-1] == {"position": "11+", "labelled_steps": 2, "error_share": 0.5, "first_errors": 1}


def test_tokens_and_truncation(
    data: Path, prm_folder: Callable[[str], Path], backbone_folder: Callable[[str], Path]
) -> None:
    dataset = load_step_dataset(data)
    processor = load_processor(str(prm_folder("llama")), None)
    assert processor is not None
    report, lengths = describe(dataset, processor)
    own = PRMProcessor.from_pretrained(prm_folder("llama"))
    inputs = [own(one["problem"], one["steps"])["input_ids"][0] for one in dataset]
    assert lengths["tokens a solution"].tolist() == list(map(len, inputs))
    assert len(lengths["tokens a later step"]) == 2 + 3
    assert (report["unit"], report["lengths"]["tokens a solution"]["100"]) == ("tokens", max(map(len, inputs)))
    # One token less than the first solution has drops its last step, which is wrong; all others are shorter.
    assert len(inputs[0]) == max(map(len, inputs))
    none = dict.fromkeys(("lost_solutions", "dropped_steps", "dropped_labelled_steps", "dropped_wrong_steps"), 0)
    assert truncated(dataset, processor, len(inputs[0])) == {
        "max_length": len(inputs[0]),
        "shortened_solutions": 0,
        **none,
    }
    assert truncated(dataset, processor, len(inputs[0]) - 1) == {
        "max_length": len(inputs[0]) - 1,
        "shortened_solutions": 1,
        "lost_solutions": 0,
        "dropped_steps": 1,
        "dropped_labelled_steps": 1,
        "dropped_wrong_steps": 1,
    }
    assert truncated(dataset, processor, 1) == {
        "max_length": 1,
        "shortened_solutions": 0,
        "lost_solutions": 6,
        "dropped_steps": 11,
        "dropped_labelled_steps": 7,
        "dropped_wrong_steps": 4,
    }
    assert processor.max_length is None
    new = load_processor(None, str(backbone_folder("llama")))
    assert describe(dataset, new)[1]["tokens a solution"].tolist() == list(map(len, inputs))
    with pytest.raises(ValueError, match="at least 1, got"):
        describe(dataset, processor, max_lengths=[0])
    with pytest.raises(ValueError, match="give a processor too"):
        describe(dataset, max_lengths=[5])


def test_near_duplicates_by_hand() -> None:
    # Runs of three words: abc bcd cde against abc bcd cdf, 2 of 4 shared; against abc bcd, 2 of 3.
    assert near_duplicates(["a b c d e"], ["x y z", "a b c d f", "a b c d"], similarity=0.6) == [
        (2, pytest.approx(2 / 3))
    ]
    assert near_duplicates(["a b c d e"], ["a b c d f"], similarity=0.5) == [(0, 0.5)]
    assert near_duplicates(["a b c d e"], ["a b c d f"], similarity=0.51) == [None]
    assert near_duplicates(["2 + 3?", "q"], ["2 - 3."], similarity=1.0) == [(0, 1.0), None]
    assert near_duplicates(["a"], []) == [None]
    for options in ({"similarity": 0.0}, {"similarity": 1.1}, {"length": 0}):
        with pytest.raises(ValueError, match="must be"):
            near_duplicates([], [], **options)


def test_near_duplicates_are_those_of_all_pairs() -> None:
    texts = [" ".join("abcdef"[(i * k + k * k) % 6] for k in range(4 + i % 5)) for i in range(40)]

    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return set(zip(words, words[1:], words[2:], strict=False))

    for similarity in (0.3, 0.5, 0.8):
        for text, found in zip(texts, near_duplicates(texts, texts[::3], similarity=similarity), strict=True):
            likeness = [len(runs(text) & runs(other)) / len(runs(text) | runs(other)) for other in texts[::3]]
            best = max(likeness)
            assert found == ((likeness.index(best), best) if best >= similarity else None)


def test_shared_problems_by_hand(tmp_path: Path) -> None:
    near = "a b c d e f g h i j"  # 8 runs; with the last word changed 7 of 9 are shared
    dataset = load_step_dataset(
        write(
            tmp_path / "steps.jsonl",
            row("P?", ["a"], [1]),
            row("p?", ["b"], [1]),
            row(f"{WORDS} and more", ["a"], [1]),
            row(near, ["a"], [1]),
            row("other", ["a"], [1], problem_group="q?"),
            row("alone", ["a"], [1]),
        )
    )
    test = ["p?", f"Again: {WORDS}", f"{near[:-1]}k", "q?", "Q?"]
    report = shared_problems(dataset, test, similarity=0.7)
    assert report["examples"] == [
        {"kind": "ngram", "problem": f"{WORDS} and more", "test_problem": test[1]},
        {"kind": "near_duplicates", "problem": near, "test_problem": test[2]},
    ]
    numbers = {name: value for name, value in report.items() if name != "examples"}
    assert numbers == {
        "problems": 5,
        "test_problems": 4,
        "equal": 2,
        "ngram": 1,
        "near_duplicates": 1,
        "solutions": 5,
        "ngram_words": 13,
        "similarity": 0.7,
    }
    assert shared_problems(dataset, test, similarity=0.8)["near_duplicates"] == 0
    assert shared_problems(dataset, test, ngram=14, similarity=0.8)["ngram"] == 0


def test_the_command(
    data: Path, prm_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = write(tmp_path / "test.jsonl", {"question": "5?", "answer": "#### 5"})
    out = tmp_path / "out"
    arguments = [str(data), "--test", str(test), "--model", str(prm_folder("llama")), "--max-length", "1", "1000"]
    report = main([*arguments, "--output-dir", str(out)])
    text = capsys.readouterr().out
    assert "6 solutions of 3 problems, 3 with a wrong step, 1 without a label" in text
    assert "11 steps, 7 labelled, 4 of them wrong (57.1%), 2 soft labels" in text
    assert "at 1 tokens: 0 solutions shortened, 6 lost; 11 steps dropped, 7 of them labelled, 4 wrong" in text
    assert "problems that the test set has too: 1 equal, 0 share 13 words in a row" in text
    assert render(report) in text
    assert json.loads((out / "data_report.json").read_text(encoding="utf-8")) == report
    assert (out / "data_report.png").read_bytes().startswith(b"\x89PNG")
    for wrong, message in (
        ([str(data), "--max-length", "5"], "--max-length counts tokens"),
        ([str(data), "--model", "a", "--tokenizer", "b"], "not both"),
        ([str(data), "--format", "classes"], "class indices do not say"),
    ):
        with pytest.raises(SystemExit):
            main(wrong)
        assert message in capsys.readouterr().err


def test_the_picture(data: Path) -> None:
    report, lengths = describe(load_step_dataset(data))
    figure = draw(report, lengths)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [*lengths, "wrong steps by the step's number, %"]
    bars = figure.axes[0].patches  # solutions with 1, 2, and 3 steps; the last bar holds what is above the 99th part
    assert sum(bar.get_height() for bar in bars) == 6
    # Position 1: none of three is wrong; position 2: all three that have a label; position 3: the one there is.
    assert [bar.get_height() for bar in figure.axes[-1].patches] == [0.0, 100.0, 100.0]
