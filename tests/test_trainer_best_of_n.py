"""The command that chooses among candidate solutions: its file, its numbers, and what it writes and says."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modeling_prm import PRMForStepScoring, PRMProcessor
from modeling_prm.scoring import PRMVerifier
from modeling_prm.solution_score import SolutionScore
from trainer.best_of_n import (
    BestOfNArguments,
    check_n,
    judge_candidates,
    main,
    measure,
    report_errors,
    score_candidates,
)
from trainer.candidates import read_problems, write_problems

Folder = Callable[..., Path]


@pytest.fixture(autouse=True)
def _keep_logging() -> Iterator[None]:
    """The command sets up logging for its process, which is ours here."""
    root, handlers = logging.getLogger(), list(logging.getLogger().handlers)
    levels = {name: logging.getLogger(name).level for name in ("trainer", "modeling_prm", "hub_card")}
    yield
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(*rows: Any, name: str = "candidates.jsonl") -> str:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return str(tmp_path / name)

    return write


def scored(answer: str, *step_probs: float) -> dict[str, Any]:
    return {"steps": [f"step {i}" for i in range(len(step_probs))], "answer": answer, "step_probs": list(step_probs)}


# min:     0.2  0.6  0.5  not scored; the best is 7, which is right; 8 has two of three answers.
FIRST = {
    "problem": "First?",
    "answer": "7",
    "solutions": [
        scored("8", 0.9, 0.2),
        scored("7.0", 0.6, 0.7),
        scored("8", 0.5, 0.5),
        {"text": "", "error": "solution 4 has no step"},
    ],
}
# min:     0.3  0.8  0.4  0.1; the best is 1, which is wrong; the right 2 has two votes, 0.3 + 0.4 = 0.7 together.
SECOND = {
    "problem": "Second?",
    "answer": 2,
    "solutions": [scored("2", 0.3), scored("1", 0.8), scored("2", 0.4, 0.9), scored("3", 0.1)],
}


def curves_of(path: str, **options: Any) -> dict[str, Any]:
    arguments = BestOfNArguments(solutions=path, output_dir="", aggregation=["min"], comparison="string", **options)
    problems = read_problems(path)
    arguments.n = check_n(arguments.n, problems)
    judge_candidates(problems, arguments)
    return {curve.label: curve for curve in measure(problems, arguments)}


def test_accuracy_by_hand(write: Callable[..., str]) -> None:
    curves = curves_of(write(FIRST, SECOND))
    assert {tuple(curve.n) for curve in curves.values()} == {(1, 2, 4)}
    by_hand = {
        # One of four is right in the first problem, two of four in the second.
        "random choice": [3 / 8, 3 / 8, 3 / 8],
        # First: of the six pairs 01 02 03 12 13 23 those whose first answer is 7, 12 and 13; all: 8 has most.
        # Second: those that start with 2, 01 02 03 and 23; all: 2 has most.
        "majority vote": [3 / 8, (2 / 6 + 4 / 6) / 2, (0 + 1) / 2],
        # First: candidate 1 is best, then 2, 0, 3: right where 1 is drawn, 1/4, 3/6, 1. Second: 1, 2, 0, 3: right in
        # 2/4 alone, in the pairs 02 03 23, and not in all.
        "best of n, min": [3 / 8, (3 / 6 + 3 / 6) / 2, (1 + 0) / 2],
        # First: pairs with 1 as above; all: 8 has 0.2 + 0.5 = 0.7 against 0.6. Second: pairs as above; all: 2 has
        # 0.3 + 0.4 = 0.7 against 0.8.
        "weighted vote, min": [3 / 8, (3 / 6 + 3 / 6) / 2, 0.0],
        # First: the three pairs with 1. Second: all pairs but 13.
        "oracle (pass@n)": [3 / 8, (3 / 6 + 5 / 6) / 2, 1.0],
    }
    assert {label: curve.accuracy for label, curve in curves.items()} == {
        label: pytest.approx(values) for label, values in by_hand.items()
    }


def test_intervals_are_over_problems(write: Callable[..., str]) -> None:
    curve = curves_of(write(FIRST, SECOND))["best of n, min"]
    # The first problem has 1, the second 0 at n = 4; half of the resamples of two hold both, a quarter one twice.
    assert (curve.low[2], curve.high[2]) == (0.0, 1.0)
    # At n = 2 both have 1/2, whatever is drawn.
    assert (curve.low[1], curve.high[1]) == (0.5, 0.5)
    alone = curves_of(write(FIRST))["best of n, min"]
    assert (alone.low, alone.high) == (alone.accuracy, alone.accuracy)


def test_votes_over_random_subsets_come_close_to_those_over_all(write: Callable[..., str]) -> None:
    row = {
        "problem": "p",
        "answer": "1",
        "solutions": [scored(str(i % 5 % 3), 0.05 + 0.09 * (7 * i % 10)) for i in range(10)],
    }
    path = write(row)
    every = curves_of(path, n=[4], subsets=210)  # C(10, 4) = 210
    some = curves_of(path, n=[4], subsets=209)
    assert every["majority vote"].accuracy[0] * 210 == pytest.approx(round(every["majority vote"].accuracy[0] * 210))
    for name in ("majority vote", "weighted vote, min"):
        # Of 209 draws a deviation of 0.14 is four sigma.
        assert abs(every[name].accuracy[0] - some[name].accuracy[0]) < 0.14
    other = curves_of(path, n=[4], subsets=209, seed=1)
    assert any(some[name].accuracy != other[name].accuracy for name in some)
    assert some["best of n, min"].accuracy == every["best of n, min"].accuracy


def test_what_is_written_is_read_again(write: Callable[..., str], tmp_path: Path) -> None:
    path = write(FIRST, SECOND)
    before = curves_of(path)
    problems = read_problems(path)
    write_problems(problems, tmp_path / "again.jsonl")
    assert read_problems(path) == problems
    assert curves_of(str(tmp_path / "again.jsonl")) == before


def test_numbers_of_candidates(write: Callable[..., str]) -> None:
    many = {"problem": "m", "answer": "1", "solutions": ["1"] * 9}
    path = write(many, {"problem": "n", "answer": "1", "solutions": ["1"] * 7})
    problems = read_problems(path)
    assert check_n([], problems) == [1, 2, 4]
    assert check_n([], problems[:1]) == [1, 2, 4, 8]
    assert check_n([3, 7], problems) == [3, 7]
    with pytest.raises(ValueError, match=rf"--n 8 cannot be: it must be from 1 to 7, which {path}:2 has"):
        check_n([3, 8], problems)


class FakeVerifier:
    """Scores a solution by its number of steps; one of `bad` steps cannot be scored."""

    def score_solutions(self, problems: list[str], solutions: list[Any], **options: Any) -> list[SolutionScore]:
        self.problems, self.options = problems, options
        return [self.score(row, solution) for row, solution in enumerate(solutions)]

    def score(self, row: int, solution: Any) -> SolutionScore:
        steps = tuple(solution.split("\n\n") if isinstance(solution, str) else solution)
        is_bad = "bad" in steps
        return SolutionScore(
            steps=steps,
            step_probs=None if is_bad else (1 / len(steps),) * len(steps),
            overall_score=None if is_bad else 1 / len(steps),
            aggregation="min",
            weakest_step=None if is_bad else 0,
            weakest_prob=None if is_bad else 1 / len(steps),
            first_error=None if is_bad else -1,
            threshold=0.5,
            solution_idx=row,
            error=f"solution {row} is bad" if is_bad else None,
        )


def test_only_what_has_no_scores_is_scored(write: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"problem": "p", "answer": "1", "solutions": [scored("1", 0.9), "a\n\nb", ["c"]]},
        {"problem": "q", "answer": "1", "solutions": [["bad"], "d\n\ne\n\nf\n\ng"]},
    ]
    path = write(*rows)
    problems, verifier = read_problems(path), FakeVerifier()
    options = BestOfNArguments(solutions=path, output_dir="", step_style="newlines", max_tokens_per_batch=99)
    score_candidates(problems, verifier, options)
    assert verifier.problems == ["p", "p", "q", "q"]
    assert verifier.options == {"step_style": "newlines", "max_tokens_per_batch": 99, "on_error": "record"}
    assert [candidate.step_probs for problem in problems for candidate in problem.candidates] == [
        [0.9],
        [0.5, 0.5],
        [1.0],
        None,
        [0.25] * 4,
    ]
    assert problems[0].candidates[1].solution == ["a", "b"]
    assert problems[1].candidates[0].error == "solution 1 is bad"  # counted in its own problem
    with caplog.at_level(logging.WARNING, logger="trainer"):
        report_errors(problems)
    counts = "1 of 5 solutions could not be scored, and are chosen only where none could"
    assert f"{counts}; the first: {path}:2: solution 1 is bad" in " ".join(caplog.text.split())
    problems[1].candidates[1].error = "too"
    with pytest.raises(ValueError, match=r"none of the 2 solutions could be scored; the first: .*:2: solution 1 is"):
        report_errors(problems[1:])


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Three problems with four candidates each, one of them too long for the tiny model."""
    solutions = [
        "2 + 3 = 5.\n\nThe answer is 5.",
        ["2 + 3 = 6.", "The answer is 6."],
        {"text": "It is\n\nfive.", "answer": "10/2"},
        ["I do not know."],
    ]
    rows = [{"problem": f"What is 2 + 3? Version {i}", "answer": "5", "solutions": list(solutions)} for i in range(3)]
    rows[1]["solutions"][1] = "word " * 5000
    return rows


def test_the_command(
    prm_folder: Folder, write: Callable[..., str], rows: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, folder = tmp_path / "out", prm_folder()
    words = ["--model", str(folder), "--output-dir", str(out), "--device", "cpu", "--comparison", "string"]
    (tmp_path / "options.yaml").write_text("aggregation: [prod, last, product]\nbootstrap: 50\n", encoding="utf-8")
    path = write(*rows)
    results = main(["--solutions", path, *words, "--config", str(tmp_path / "options.yaml"), "--n", "4", "1"])

    printed = capsys.readouterr().out
    head, caption, heads, *lines = [line for line in printed.splitlines() if line]
    assert head == (
        "3 problems, 12 solutions, 1 not scored, 4 without an answer; answers compared by normalized strings"
    )
    assert "95 % bootstrap interval over problems" in caption
    assert heads.split() == ["n", "=", "1", "n", "=", "4"]
    labels = [
        curve["method"] + (f", {curve['aggregation']}" if curve["aggregation"] else "") for curve in results["curves"]
    ]
    assert labels == [
        "random choice",
        "majority vote",
        "best of n, product",
        "best of n, last",
        "weighted vote, product",
        "weighted vote, last",
        "oracle (pass@n)",
    ]
    assert [line[: len(label)] for line, label in zip(lines, labels, strict=False)] == labels
    # 5 is right, 10/2 is not by strings: one of four everywhere. The same candidates in every draw of four.
    assert lines[0].split() == ["random", "choice", *["25.0", "[25.0,", "25.0]"] * 2]
    assert lines[6].split() == ["oracle", "(pass@n)", "25.0", "[25.0,", "25.0]", "100.0", "[100.0,", "100.0]"]
    assert lines[-1] == f"Written to {out}"

    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == results
    assert results["num_unscored"] == 1
    assert results["n"] == [1, 4]
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")

    # The step probabilities are the verifier's, the choice at n = 4 the one that they ask for.
    verifier = PRMVerifier(PRMForStepScoring.from_pretrained(folder), PRMProcessor.from_pretrained(folder))
    written = [json.loads(line) for line in (out / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    right = 0
    for row in written:
        last = []
        for solution in row["solutions"]:
            if "error" in solution:
                assert solution["error"].startswith("solution 2 is longer than max_length")
                assert solution["step_probs"] is None
                assert solution["scores"] == {}
                continue
            score = verifier.score_solution(row["problem"], solution["steps"])
            assert solution["step_probs"] == pytest.approx(score.step_probs, abs=1e-5)
            last.append((solution["scores"]["last"], solution["correct"]))
            assert last[-1][0] == solution["step_probs"][-1]
        right += max(last)[1]
        assert [solution["correct"] for solution in row["solutions"]] == [True, False, False, False]
    assert results["curves"][3]["accuracy"][1] == pytest.approx(right / 3)

    # Without a model from its own file, to the same numbers.
    again = main(
        [
            "--solutions",
            str(out / "scores.jsonl"),
            "--output-dir",
            str(tmp_path / "again"),
            *words[4:],
            "--n",
            "1",
            "4",
            "--aggregation",
            "product",
            "last",
            "--bootstrap",
            "50",
        ]
    )
    assert again["curves"] == results["curves"]
    assert again["model"] is None


def test_many_columns_are_printed_in_parts(
    write: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"problem": "p", "answer": "1", "solutions": [scored("1", 0.5)] * 6}
    out = str(tmp_path / "out")
    main(
        [
            "--solutions",
            write(row),
            "--output-dir",
            out,
            "--n",
            *"123456",
            "--aggregation",
            "min",
            "--comparison",
            "string",
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    heads = [line.split("n = ")[1:] for line in lines if "n = " in line]
    assert [[part.strip() for part in head] for head in heads] == [["1", "2", "3", "4"], ["5", "6"]]
    assert sum(line.startswith("majority vote") for line in lines) == 2
    assert max(map(len, lines)) <= 120


def error_of(*argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert isinstance(stopped.value.code, str)
    return stopped.value.code


def test_mistakes_are_one_line(
    prm_folder: Folder, write: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    bad = write(FIRST, {"problem": "p", "answer": "1", "solutions": []}, name="bad.jsonl")
    unscored = write({"problem": "p", "answer": "1", "solutions": ["x"]})
    assert error_of("--solutions", bad, "--output-dir", out).startswith(f"error: {bad}:2: solutions must be a list")
    assert "name a PRM with --model" in error_of("--solutions", unscored, "--output-dir", out)
    assert "does not exist" in error_of("--solutions", str(tmp_path / "no.jsonl"), "--output-dir", out)
    assert "--n 2 cannot be" in error_of("--solutions", unscored, "--output-dir", out, "--n", "2")
    too_long = write({"problem": "p", "answer": "1", "solutions": ["word " * 5000]}, name="long.jsonl")
    message = error_of("--solutions", too_long, "--output-dir", out, "--model", str(prm_folder()), "--device", "cpu")
    assert message.startswith(f"error: none of the 1 solutions could be scored; the first: {too_long}:1: solution 1 is")
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "scores.jsonl").write_text("")
    assert "holds scores.jsonl of an earlier run; name another" in error_of(
        "--solutions", unscored, "--output-dir", out
    )
    for words in (["--aggregation", "median"], ["--subsets", "0"], ["--bootstrap", "0"]):
        with pytest.raises(SystemExit) as stopped:
            main(["--solutions", unscored, "--output-dir", out, *words])
        assert stopped.value.code == 2
        assert words[1] in capsys.readouterr().err


def test_needs_of_extras_are_said_before_anything_is_scored(
    write: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--solutions", write(FIRST), "--output-dir", str(tmp_path / "out")]
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert "modeling-prm[math]" in error_of(*words, "--comparison", "math-verify")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "modeling-prm[train]" in error_of(*words)


def test_without_math_verify_the_table_says_so(
    write: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    results = main(["--solutions", write(FIRST), "--output-dir", str(tmp_path / "out")])
    assert "answers compared by normalized strings only, since math-verify is not installed" in capsys.readouterr().out
    assert "normalized strings only" in results["answers_compared"]


def test_math_verify_counts_equal_values_as_right(write: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("math_verify", reason="needs the extra math")
    row = {"problem": "p", "answer": "0.5", "solutions": [scored("1/2", 0.9), scored("7", 0.1)]}
    results = main(["--solutions", write(row), "--output-dir", str(tmp_path / "out"), "--aggregation", "min"])
    assert {curve["method"]: curve["accuracy"] for curve in results["curves"]} == {
        "random choice": [0.5, 0.5],
        "majority vote": [0.5, 1.0],
        "best of n": [0.5, 1.0],
        "weighted vote": [0.5, 1.0],
        "oracle (pass@n)": [0.5, 1.0],
    }
