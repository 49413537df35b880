"""Bulk scoring: the scores of each solution one by one, in its place, whatever ends a run and whoever goes on."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import psutil
import pytest
import torch
import yaml
from small_training import PROJECT, environment

from modeling_prm import PRMForStepScoring, PRMProcessor
from modeling_prm.scoring import PRMVerifier
from modeling_prm.solution_score import SolutionScore
from trainer import scoring_run
from trainer.result_shards import ShardWriter, finished_rows, read_rows
from trainer.score import ScoreArguments, hash_weights, job_settings, main, output_features
from trainer.scoring_input import Columns, SolutionRow, find_columns
from trainer.scoring_run import counting_tokens, plan_pieces, score_files, score_piece

Folder = Callable[[str], Path]

# A clean process that has imported the command, and forks those that are killed.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["trainer.score"])
# Different lengths and numbers of steps, and problems that come again.
SOLUTIONS: list[tuple[str, Any]] = [
    ("2 + 3?", ["2 + 3 = 5."]),
    ("2 + 3?", ["2 + 3 = 6.", "The answer is 6."]),
    ("What is 4 plus 4, and then 1 more?", ["4 + 4 = 8.", "8 + 1 = 9.", "The answer is 9."]),
    ("1 + 1?", "It is\n\n2."),
    ("2 + 3?", "5"),
]


@pytest.fixture(autouse=True)
def _keep_logging() -> Iterator[None]:
    """The command sets up logging for its process, which is ours here."""
    root, handlers = logging.getLogger(), list(logging.getLogger().handlers)
    levels = {name: logging.getLogger(name).level for name in ("trainer", "modeling_prm", "hub_card")}
    yield
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="module")
def expected(prm_folder: Folder) -> list[SolutionScore]:
    """The scores of `SOLUTIONS`, each scored alone."""
    folder = prm_folder("llama")
    verifier = PRMVerifier(PRMForStepScoring.from_pretrained(folder), PRMProcessor.from_pretrained(folder))
    return [verifier.score_solution(problem, solution) for problem, solution in SOLUTIONS]


def write_input(file: Path, count: int) -> Path:
    rows = [{"id": f"id{i}", "problem": SOLUTIONS[i % 5][0], "solution": SOLUTIONS[i % 5][1]} for i in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def check_scores(folder: Path, count: int, expected: list[SolutionScore]) -> None:
    """Every solution of `write_input` is there once, in order, with its own scores."""
    rows = list(read_rows(folder))
    assert [(row["row"], row["id"]) for row in rows] == [(i, f"id{i}") for i in range(count)]
    for row in rows:
        score = expected[row["row"] % 5]
        assert row["step_probs"] == pytest.approx(score.step_probs, abs=1e-5)
        assert row["overall_score"] == pytest.approx(score.overall_score, abs=1e-5)
        assert (row["first_error"], row["weakest_step"]) == (score.first_error, score.weakest_step)
        assert (row["solution_idx"], row["error"]) == (0, None)


def arguments(folder: Folder, source: Path, output: Path, *more: str) -> list[str]:
    return ["--model", str(folder("llama")), "--input", str(source), "--output", str(output), *more]


def test_scores_are_those_of_each_solution_alone(
    prm_folder: Folder, expected: list[SolutionScore], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_input(tmp_path / "in.jsonl", 23)
    options = arguments(prm_folder, source, tmp_path / "out", "--window", "6", "--rows-per-shard", "4")
    results = main([*options, "--with-problem", "--with-steps"])
    assert results is not None
    check_scores(tmp_path / "out", 23, expected)
    loaded = datasets.load_dataset(
        "parquet", data_files=f"{tmp_path}/out/*.parquet", split="train", cache_dir=str(tmp_path / "cache")
    )
    by_id = {row["id"]: row for row in loaded}
    assert len(by_id) == 23
    assert by_id["id3"]["steps"] == ["It is", "2."]
    assert by_id["id12"]["problem"] == SOLUTIONS[2][0]
    assert (results["num_solutions"], results["num_scored"], results["num_failed"]) == (23, 23, 0)
    assert results["solutions_per_second"] == pytest.approx(23 / results["seconds"])
    said = capsys.readouterr().out
    assert f"23 solutions in {tmp_path / 'out'}\nScored 23 in " in said
    speed = re.search(r"([\d.]+) solutions/s, ([\d,]+) tokens/s", said)
    assert speed is not None
    assert float(speed[1]) == pytest.approx(results["solutions_per_second"], abs=0.06)
    assert float(speed[2].replace(",", "")) == pytest.approx(results["tokens_per_second"], abs=0.6)
    # Once more there is nothing to do.
    again = main([*options, "--with-problem", "--with-steps"])
    assert again is not None
    assert (again["num_solutions"], again["num_scored"]) == (23, 0)
    assert f"23 solutions in {tmp_path / 'out'}, 23 of them from earlier runs\n" in capsys.readouterr().out


def test_what_cannot_be_scored_keeps_its_place_with_its_error(prm_folder: Folder, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    lines = [
        json.dumps({"id": 0, "problem": "2 + 3?", "steps": ["2 + 3 = 5."]}),
        '{"id": 1, "problem": "2 + 3?", "steps": [',
        json.dumps({"id": 2, "problem": "2 + 3?", "steps": ["far too long " * 2000]}),
        json.dumps({"id": 3, "problem": "2 + 3?", "steps": []}),
        json.dumps({"id": 4, "problem": "2 + \ud83d?", "steps": ["It is \ud83d."]}),
        json.dumps({"id": 5, "problem": " ", "steps": ["5"]}),
        json.dumps({"id": 6, "problem": "2 + 3?", "steps": ["2 + 3 = 5.", ""]}),
        json.dumps({"id": 7, "problem": "2 + 3?", "steps": ["2 + 3 = 5."]}),
    ]
    source.write_text("\n".join(lines), encoding="utf-8")
    options = arguments(prm_folder, source, tmp_path / "out", "--with-problem", "--with-steps")
    results = main(options)
    assert results is not None
    assert (results["num_scored"], results["num_failed"]) == (2, 6)
    rows = list(read_rows(tmp_path / "out"))
    assert [row["id"] for row in rows] == ["0", None, *"234567"]
    assert [row["row"] for row in rows if row["error"] is None] == [0, 7]
    assert rows[7]["step_probs"] == rows[0]["step_probs"]
    for row, reason in {
        1: "line is not JSON",
        2: "the solution ",
        3: "the solution has no step",
        4: "the problem holds half of a surrogate pair",
        5: "the problem is empty",
        6: "step 2 of the solution is empty",
    }.items():
        assert rows[row]["error"].startswith(f"{source}:{row + 1}: {reason}")
        scores = ("step_probs", "overall_score", "first_error", "weakest_step")
        assert [rows[row][name] for name in scores] == [None] * 4
    assert rows[4]["problem"] == "2 + \\ud83d?"
    with pytest.raises(SystemExit, match=rf"{source}:2: line is not JSON"):
        main(arguments(prm_folder, source, tmp_path / "strict", "--on-bad-row", "error"))
    source.write_text("\n".join(lines[2:4]), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"none of 2 solutions could be scored; the first: .*in.jsonl:"):
        main(arguments(prm_folder, source, tmp_path / "none"))
    assert len(list(read_rows(tmp_path / "none"))) == 2


def test_a_run_that_has_only_bad_rows_left_ends_well(prm_folder: Folder, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"problem": "2 + 3?", "steps": ["5"]}\nbroken\n', encoding="utf-8")
    options = arguments(prm_folder, source, tmp_path / "out", "--rows-per-shard", "1")
    main(options)
    bad = next(shard for shard in (tmp_path / "out").glob("rows-000000000001-*.parquet"))
    bad.unlink()
    results = main(options)
    assert results is not None
    assert (results["num_scored"], results["num_failed"]) == (0, 1)
    assert [row["error"] is None for row in read_rows(tmp_path / "out")] == [True, False]


def test_several_solutions_of_one_problem(prm_folder: Folder, expected: list[SolutionScore], tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    rows = [
        {"id": "a", "problem": "2 + 3?", "solutions": [SOLUTIONS[0][1], SOLUTIONS[1][1], SOLUTIONS[4][1]]},
        {"id": "b", "problem": SOLUTIONS[2][0], "solutions": [SOLUTIONS[2][1]]},
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    main(arguments(prm_folder, source, tmp_path / "out"))
    found = list(read_rows(tmp_path / "out"))
    assert [(row["id"], row["solution_idx"]) for row in found] == [("a", 0), ("a", 1), ("a", 2), ("b", 0)]
    for row, index in zip(found, (0, 1, 4, 2), strict=True):
        assert row["step_probs"] == pytest.approx(expected[index].step_probs, abs=1e-5)


def _score_until(argv: list[str], point: str) -> None:
    """Run the command, and be killed at the third shard or forward pass."""
    torch.set_num_threads(1)
    count = 0
    own_flush, own_replace, own_score = ShardWriter.flush, os.replace, PRMVerifier.score_solutions

    def passed(name: str) -> None:
        nonlocal count
        count += name == point
        if count == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    def flush(self: ShardWriter) -> None:
        passed("before a shard")
        own_flush(self)

    def replace(source: Any, target: Any) -> None:
        if str(target).endswith(".parquet"):
            passed("before its name")
        own_replace(source, target)
        if str(target).endswith(".parquet"):
            passed("after its name")

    def score(self: PRMVerifier, *problems: Any, **rest: Any) -> list[SolutionScore]:
        results = own_score(self, *problems, **rest)
        passed("while scoring")
        return results

    ShardWriter.flush, PRMVerifier.score_solutions = flush, score  # type: ignore[method-assign]
    os.replace = replace  # type: ignore[assignment]
    main(argv)


@pytest.mark.parametrize("point", ["before a shard", "before its name", "after its name", "while scoring"])
def test_a_killed_run_goes_on_where_it_was(
    point: str, prm_folder: Folder, expected: list[SolutionScore], tmp_path: Path
) -> None:
    source = write_input(tmp_path / "in.jsonl", 40)
    options = arguments(prm_folder, source, tmp_path / "out", "--window", "5", "--rows-per-shard", "4")
    process = CONTEXT.Process(target=_score_until, args=(options, point))
    process.start()
    process.join(600)
    assert process.exitcode == -signal.SIGKILL
    kept = len(finished_rows(tmp_path / "out"))
    # By hand: shards of four rows, windows of five that are one piece each. Two shards lie there before the third
    # gets its name; before the third piece is written there are ten rows, of which two shards hold eight.
    assert kept == {"after its name": 12}.get(point, 8)
    results = main(options)
    assert results is not None
    assert results["num_scored"] == 40 - kept
    check_scores(tmp_path / "out", 40, expected)


def test_two_processes_killed_and_one_goes_on(
    prm_folder: Folder, expected: list[SolutionScore], tmp_path: Path
) -> None:
    count = 1500
    source = write_input(tmp_path / "in.jsonl", count)
    options = arguments(prm_folder, source, tmp_path / "out", "--window", "50", "--rows-per-shard", "50")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    process = subprocess.Popen(
        [*launch, "-m", "trainer.score", *options],
        cwd=PROJECT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 600
        while {shard.name.split("-")[3] for shard in (tmp_path / "out").glob("*.parquet")} != {"00000", "00001"}:
            assert process.poll() is None, "it ended before both had written"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        # The launcher starts each process in a session of its own.
        everyone = [*psutil.Process(process.pid).children(recursive=True), process]
        for one in everyone:
            one.send_signal(signal.SIGKILL)
        process.wait()
        psutil.wait_procs(everyone[:-1], timeout=60)
    kept = sorted(finished_rows(tmp_path / "out"))
    assert 0 < len(kept) < count, "it is killed in the middle"
    assert {row % 2 for row in kept} == {0, 1}
    results = main(options)
    assert results is not None
    assert results["num_scored"] == count - len(kept)
    check_scores(tmp_path / "out", count, expected)


def test_two_processes_score_what_one_does(prm_folder: Folder, expected: list[SolutionScore], tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.jsonl", 31)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*launch, "-m", "trainer.score", *arguments(prm_folder, source, tmp_path / "out")],
        cwd=PROJECT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Scored 31 in ") == 1, "one process speaks for both"
    assert "on 2 process(es)" in done.stdout
    names = sorted(shard.name[:31] for shard in (tmp_path / "out").glob("*.parquet"))
    assert names == ["rows-000000000000-process-00000", "rows-000000000001-process-00001"]
    check_scores(tmp_path / "out", 31, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--aggregation", "last"], "was started with aggregation='min', and now it is aggregation='last'"),
        (["--dtype", "bfloat16"], "was started with dtype='float32', and now it is dtype='bfloat16'"),
        (["--threshold", "0.25"], "was started with threshold=0.5, and now it is threshold=0.25"),
        (["--step-style", "newlines"], "was started with step_style='blank_lines'"),
        (["--with-steps"], "has the column steps='list<item: string>'|no steps, and now"),
        (["--solution-column", "id"], "was started with solution_column='solution'"),
    ],
)
def test_other_options_are_not_mixed_in(change: list[str], message: str, prm_folder: Folder, tmp_path: Path) -> None:
    options = arguments(prm_folder, write_input(tmp_path / "in.jsonl", 2), tmp_path / "out")
    main(options)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(SystemExit, match=message):
        main([*options, *change])
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_another_input_or_model_is_not_mixed_in(
    prm_folder: Folder, make_prm: Callable[..., Any], tmp_path: Path
) -> None:
    options = arguments(prm_folder, write_input(tmp_path / "in.jsonl", 2), tmp_path / "out")
    main(options)
    settings = yaml.safe_load((tmp_path / "out" / "job.yaml").read_text(encoding="utf-8"))["settings"]
    assert (settings["dtype"], settings["id_column"]) == ("float32", "id")
    write_input(tmp_path / "in.jsonl", 3)
    with pytest.raises(SystemExit, match="was started with input="):
        main(options)
    model, _ = make_prm("llama")
    before = hash_weights(model)
    assert before == settings["model_weights"]
    with torch.no_grad():
        next(model.value_head.parameters()).flatten()[0].add_(1e-6)
    assert hash_weights(model) != before


@pytest.mark.parametrize("options", [{"step_template": "{i}) {step}"}, {"problem_template": "{problem}\n"}])
def test_another_layout_is_not_mixed_in(options: dict[str, str], make_prm: Callable[..., Any], tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.jsonl", 2)
    arguments = ScoreArguments(model="", input="", output="")
    columns = find_columns([source])
    found = [
        job_settings([source], columns, PRMVerifier(*make_prm("llama", **changes)), arguments)
        for changes in ({}, {}, options)
    ]
    assert found[0] == found[1]
    different = {name for name in found[0] if found[0][name] != found[2][name]}
    assert different == {"model_layout"}


def row(number: int, problem: str, solution: Any) -> SolutionRow:
    return SolutionRow(row=number, place=f"f:{number}", problem=problem, solution=solution)


def test_pieces_hold_one_problem_together_and_the_longest_first() -> None:
    rows = [row(0, "aa", "b" * 8), row(1, "c", ["d", "e"]), row(2, "aa", ["f"]), row(3, "gg", "h" * 30)]
    # Characters by hand: 3 has 32; problem aa 10 + 3, its longest 10; 1 has 3.
    assert [[item.row for item in piece] for piece in plan_pieces(rows, 30)] == [[3], [0, 2, 1]]
    assert [[item.row for item in piece] for piece in plan_pieces(rows, 13)] == [[3], [0, 2], [1]]
    assert [[item.row for item in piece] for piece in plan_pieces(rows, 1000)] == [[3, 0, 2, 1]]
    assert list(plan_pieces([], 10)) == []


class CountingVerifier:
    """Gives each solution the probability 0.5, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def score_solutions(self, problems: list[str], solutions: list[Any], **options: Any) -> list[SolutionScore]:
        self.asked.append(list(problems))
        return [
            SolutionScore(
                steps=("x",),
                step_probs=(0.5,),
                overall_score=0.5,
                aggregation="min",
                weakest_step=0,
                weakest_prob=0.5,
                first_error=-1,
                threshold=0.5,
                solution_idx=index,
            )
            for index in range(len(problems))
        ]


@pytest.mark.parametrize("words", ["CUDA out of memory. Tried", "DefaultCPUAllocator: can't allocate memory: you"])
def test_a_solution_too_large_for_the_memory_keeps_its_place(words: str) -> None:
    class SmallVerifier(CountingVerifier):
        def score_solutions(self, problems: list[str], solutions: list[Any], **options: Any) -> list[SolutionScore]:
            if "huge" in problems:
                raise RuntimeError(words if "bug" not in solutions else "index out of range")
            return super().score_solutions(problems, solutions, **options)

    options = ScoreArguments(model="", input="", output="")
    rows = [row(0, "small", ["x"]), row(1, "huge", ["x"]), row(2, "small", ["x"])]
    found = dict(score_piece(rows, SmallVerifier(), options))
    assert [found[number]["overall_score"] for number in range(3)] == [0.5, None, 0.5]
    assert [found[number]["error"] for number in (0, 2)] == [None, None]
    assert found[1]["error"].startswith("f:1: the solution alone needs more memory than there is")
    with pytest.raises(RuntimeError, match="index out of range"):
        dict(score_piece([row(0, "huge", "bug")], SmallVerifier(), options))


def test_the_input_is_read_a_window_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0

    def rows(files: Any, columns: Any) -> Iterator[list[SolutionRow]]:
        nonlocal read
        for number in range(1000):
            read += 1
            yield [row(number, f"problem {number}", ["x"])]

    verifier = CountingVerifier()
    behind: list[int] = []
    score = verifier.score_solutions

    def noting(problems: list[str], solutions: list[Any], **options: Any) -> list[SolutionScore]:
        behind.append(read - sum(map(len, verifier.asked)))
        return score(problems, solutions, **options)

    verifier.score_solutions = noting  # type: ignore[method-assign]
    monkeypatch.setattr(scoring_run, "read_solutions", rows)
    options = ScoreArguments(model="", input="", output="", window=10)
    columns = Columns(problem="problem", solution="steps", solutions=None, id=None)
    with ShardWriter(tmp_path / "out", settings={}, features=output_features(options)) as writer:
        num_rows, counts = score_files([], columns, verifier, writer, options, show=False)
        writer.finish(num_rows=num_rows)
    assert (num_rows, counts.scored, counts.failed) == (1000, 1000, 0)
    assert set(behind) == {10}
    assert len(list(read_rows(tmp_path / "out"))) == 1000


def test_input_rows_go_whole_to_one_process_and_what_is_written_is_left_out(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    lines = [{"problem": f"p{i}", "solutions": ["x"] * (i + 1)} for i in range(4)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    options = ScoreArguments(model="", input="", output="")
    columns = find_columns([source])

    def run(index: int, num_processes: int) -> tuple[list[list[str]], int]:
        verifier = CountingVerifier()
        with ShardWriter(
            tmp_path / "out",
            settings={},
            features=output_features(options),
            process_index=index,
            num_processes=num_processes,
        ) as writer:
            num_rows, counts = score_files([source], columns, verifier, writer, options, show=False)
            assert num_rows == 10
            writer.finish(num_rows=num_rows)
        return [sorted(problems) for problems in verifier.asked], counts.scored

    # By hand: rows 0; 1 2; 3 4 5; 6 7 8 9. Row 4 is written already, by whichever run.
    with ShardWriter(tmp_path / "out", settings={}, features=output_features(options)) as writer:
        record = dict.fromkeys(output_features(options)) | {"error": "of before"}
        writer.add(4, record)
    assert run(1, 2) == ([["p1"] * 2 + ["p3"] * 4], 6)
    assert run(0, 1) == ([["p0"] + ["p2"] * 2], 3)
    assert [item["error"] for item in read_rows(tmp_path / "out")] == [None] * 4 + ["of before"] + [None] * 5


def test_tokens_are_counted_without_padding(make_prm: Callable[..., Any]) -> None:
    model, processor = make_prm("llama")
    verifier = PRMVerifier(model, processor)
    batch = processor(["2 + 3?", "1 + 1?"], [["5", "It is 5."], ["2"]], return_tensors="pt")
    assert not batch["attention_mask"].all(), "there is padding"
    with torch.inference_mode(), counting_tokens(verifier) as count:
        model(**batch)
        model(**batch)
        assert count() == 2 * int(batch["attention_mask"].sum())
        model(input_ids=batch["input_ids"][:1, :5], step_positions=torch.tensor([[4]]))
        assert count() == 2 * int(batch["attention_mask"].sum()) + 5
    model(**batch)
    assert count() == 2 * int(batch["attention_mask"].sum()) + 5, "nothing is left on the model"
    with counting_tokens(CountingVerifier()) as count:
        assert count() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "--window must be at least 1"),
        ({"max_tokens_per_batch": 0}, "--max_tokens_per_batch must be at least 1"),
        ({"solution_column": "a", "solutions_column": "b"}, "not both"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoreArguments(model="m", input="i", output="o", **options)
