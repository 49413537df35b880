"""`trainer.label` as a command: each method on small files, killed and gone on with, and by several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import yaml
from completions_stand_in import CompletionsStandIn
from transformers import AutoModelForCausalLM

from trainer.label import main
from trainer.readers import load_step_dataset
from trainer.result_shards import finished_rows, read_rows

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
STEPS = ["2 + 3 = 5.", "5 * 2 = 11.", "The answer is 11."]


@pytest.fixture(autouse=True)
def _keep_logging() -> Iterator[None]:
    """The command sets up logging for its process, which is ours here."""
    import logging

    root, handlers = logging.getLogger(), list(logging.getLogger().handlers)
    yield
    root.handlers[:] = handlers


def write_lines(file: Path, rows: Sequence[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def problems(folder: Path, count: int = 1) -> Path:
    """Problems with a right solution of two steps and a wrong one of three each."""
    rows = [
        {"problem": f"({number}) 2 + 3, twice?", "answer": "10", "solutions": [STEPS, ["2 + 3 = 5.", "5 * 2 = 10."]]}
        for number in range(count)
    ]
    return write_lines(folder / "problems.jsonl", rows)


def write(body: dict[str, Any], index: int) -> str:
    """Half of the completions after one step are right, and none after more."""
    steps = body["prompt"].count("\n\n") - 1
    return "So it is 10." if steps == 0 or (steps == 1 and index % 2 == 0) else "So it is 11."


def label(method: str, source: Path, output: Path, *more: str) -> dict[str, Any]:
    result = main(["--method", method, "--input", str(source), "--output", str(output), *more])
    assert result is not None
    return result


def sampled(method: str, server: CompletionsStandIn, source: Path, output: Path, *more: str) -> dict[str, Any]:
    return label(method, source, output, "--server", server.url, "--rollouts", "4", *more)


def labels_of(folder: Path, **options: Any) -> list[list[float]]:
    return [list(row["labels"]) for row in load_step_dataset(folder, **options)]


def test_outcome(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = label("outcome", problems(tmp_path), tmp_path / "out")
    assert labels_of(tmp_path / "out") == [[0.0] * 3, [1.0] * 2]
    assert (result["steps_correct"], result["steps_incorrect"], result["solutions"]) == (2, 3, 2)
    assert "| steps: incorrect | 3 | 60.0 % |" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "out" / "report.yaml").read_text())["steps_incorrect"] == 3


def test_arithmetic_and_what_it_makes_of_given_labels(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "steps.jsonl", [{"problem": "?", "steps": STEPS, "labels": [1, 1, -1]}])
    result = label("arithmetic", source, tmp_path / "out")
    assert labels_of(tmp_path / "out") == [[1.0, 0.0, 1.0]]
    # Both wrong: the second step, given as correct, and the third, given as incorrect.
    assert result["against_given"] == {"correct/correct": 1, "correct/incorrect": 1, "incorrect/correct": 1}
    assert result["disagreement"] == pytest.approx(2 / 3)
    assert result["first_error_disagreement"] == 1.0
    label("arithmetic", source, tmp_path / "some", "--unchecked", "ignored")
    assert labels_of(tmp_path / "some") == [[1.0, 0.0, -100.0]]


def test_monte_carlo_keeps_both_counts(tmp_path: Path) -> None:
    with CompletionsStandIn(write) as server:
        hard = sampled("monte_carlo", server, problems(tmp_path), tmp_path / "hard")
        soft = sampled("monte_carlo", server, problems(tmp_path), tmp_path / "soft", "--labels", "soft")
    assert labels_of(tmp_path / "hard") == [[1.0, 0.0, 0.0], [1.0, 1.0]]
    assert labels_of(tmp_path / "soft") == [[0.5, 0.0, 0.0], [0.5, 1.0]]
    rows = list(read_rows(tmp_path / "hard"))
    assert [row["successes"] for row in rows] == [[2, 0, 0], [2, 1]]
    assert [row["rollouts"] for row in rows] == [[4, 4, 1], [4, 1]]
    # The counts can be read either way, whatever was written as labels.
    for folder in ("hard", "soft"):
        assert labels_of(tmp_path / folder, format="rollouts_soft") == [[0.5, 0.0, 0.0], [0.5, 1.0]]
        assert labels_of(tmp_path / folder, format="rollouts_hard") == [[1.0, 0.0, 0.0], [1.0, 1.0]]
    # Three beginnings of four completions; each of four words.
    assert hard["num_rollouts"] == soft["num_rollouts"] == 12
    assert hard["num_tokens"] == 48
    # Of five steps, three with a success; shares 1/2, 0, 0, 1/2, 1.
    assert hard["hard_share"] == pytest.approx(3 / 5)
    assert hard["soft_share"] == pytest.approx(2 / 5)


def test_first_error_and_consensus(tmp_path: Path) -> None:
    source = problems(tmp_path)
    with CompletionsStandIn(write) as server:
        result = sampled("first_error", server, source, tmp_path / "search")
        sampled("monte_carlo", server, source, tmp_path / "counts")
    assert labels_of(tmp_path / "search") == [[1.0, 0.0, -100.0], [1.0, 1.0]]
    # After step 1 (good) and step 2 (bad) of the wrong solution; of 2 + 1 beginnings.
    assert (result["num_rollouts"], result["num_linear"]) == (8, 12)
    label("outcome", source, tmp_path / "outcome")
    agreed = label("consensus", tmp_path / "counts", tmp_path / "kept", "--agree-with", str(tmp_path / "search"))
    assert labels_of(tmp_path / "kept") == [[1.0, 0.0, 0.0], [1.0, 1.0]]
    assert [row["successes"] for row in read_rows(tmp_path / "kept")] == [[2, 0, 0], [2, 1]]
    assert agreed["consensus"]["kept: both find an error at the same step"] == 1
    # Outcome calls the first step of the wrong solution wrong.
    agreed = label("consensus", tmp_path / "search", tmp_path / "few", "--agree-with", str(tmp_path / "outcome"))
    assert labels_of(tmp_path / "few") == [[1.0, 1.0]]
    assert agreed["consensus"]["left out: they disagree"] == 1
    assert [row["successes"] for row in read_rows(tmp_path / "few")] == [[0, 1]]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "trainer.label", *words]


@pytest.mark.parametrize("method", ["monte_carlo", "first_error"])
def test_a_run_that_is_killed_goes_on_without_losing_or_repeating_a_row(tmp_path: Path, method: str) -> None:
    source = problems(tmp_path, 12)
    with CompletionsStandIn(write) as server:
        sampled(method, server, source, tmp_path / "whole")
        asked = len(server.bodies)
        server.bodies.clear()
        server.work_seconds = 0.15
        words = ["--method", method, "--input", str(source), "--output", str(tmp_path / "killed")]
        words += ["--server", server.url, "--rollouts", "4", "--seconds-per-shard", "0", "--concurrency", "2"]
        seen: list[int] = []
        for _ in range(2):
            with subprocess.Popen(command(*words), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE) as process:
                deadline = time.monotonic() + 240
                while len(finished_rows(tmp_path / "killed")) < (seen[-1] if seen else 0) + 3:
                    assert process.poll() is None, process.stderr.read() if process.stderr else None
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
                process.send_signal(signal.SIGKILL)
            assert process.returncode == -signal.SIGKILL
            seen.append(len(finished_rows(tmp_path / "killed")))
        assert 3 <= seen[0] < seen[1] < 24
        server.work_seconds = 0.0
        # Of other options the folder is not the output.
        with pytest.raises(SystemExit, match="temperature"):
            main([*words, "--temperature", "0.6"])
        main(words)
        again = len(server.bodies)
    whole, killed = list(read_rows(tmp_path / "whole")), list(read_rows(tmp_path / "killed"))
    assert [row["row"] for row in killed] == list(range(24))
    assert killed == whole
    # What was under way when it was killed, and each start's first prompt, is asked for twice; nothing else.
    assert again <= asked + 2 * (2 * 2) + 4


def policy(folder: Path) -> Path:
    make_config, make_tokenizer = tiny_models.FAMILIES["qwen2"]
    torch.manual_seed(0)
    model, tokenizer = AutoModelForCausalLM.from_config(make_config()), make_tokenizer()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    source = problems(tmp_path, 3)
    words = ["--method", "monte_carlo", "--input", str(source), "--model", str(policy(tmp_path / "policy"))]
    words += ["--rollouts", "3", "--max-new-tokens", "6", "--temperature", "1"]
    main([*words, "--output", str(tmp_path / "one")])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "-m", "trainer.label"]
    done = subprocess.run(
        [*launch, *words, "--output", str(tmp_path / "two")],
        cwd=ROOT,
        env={**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Written to") == 1, "one process reports"
    one, two = list(read_rows(tmp_path / "one")), list(read_rows(tmp_path / "two"))
    assert one == two
    # As many tokens as completions came to, so that they were the same ones.
    assert len({row["num_tokens"] for row in one}) > 1
    assert len(list((tmp_path / "two").glob("*process-00001*.parquet"))) == 1


def test_a_server_that_dies_ends_the_run_and_keeps_what_is_finished(tmp_path: Path) -> None:
    source = problems(tmp_path, 2)
    words = ["--concurrency", "1", "--retries", "0"]
    with CompletionsStandIn(write) as server:

        def dies(body: dict[str, Any], index: int) -> str:
            if len(server.bodies) > 3:
                server.fault("cut")
            return write(body, index)

        server.write = dies
        with pytest.raises(SystemExit, match="failed 1 times"):
            sampled("monte_carlo", server, source, tmp_path / "out", *words)
        finished = list(finished_rows(tmp_path / "out"))
        assert finished
        assert len(finished) < 4
        server.write = write
        server.faults.clear()
        sampled("monte_carlo", server, source, tmp_path / "out", *words)
    assert labels_of(tmp_path / "out") == [[1.0, 0.0, 0.0], [1.0, 1.0]] * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "monte_carlo"], "needs either --model or --server"),
        (["--method", "consensus"], "--agree-with names the other labels"),
        (["--method", "outcome", "--agree-with", "x"], "is for nothing else"),
        (["--method", "outcome", "--model", "x"], "--model is for --method monte_carlo or first_error; leave it out"),
        (["--method", "first_error", "--model", "x", "--labels", "soft"], "--labels is for --method monte_carlo"),
        (["--method", "arithmetic", "--no_check_problem"], "--check-problem is for --method first_error"),
        (["--method", "outcome", "--rollouts", "0"], "--rollouts must be at least 1"),
        (["--method", "outcome", "--temperature", "0"], "--temperature must be above 0"),
        (["--method", "consensus", "--agree-with", "x", "--threshold", "7"], "--threshold must be above 0"),
    ],
)
def test_options_that_cannot_be_are_refused(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*words, "--input", str(problems(tmp_path)), "--output", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_input_without_answers_is_refused_before_any_work(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "steps.jsonl", [{"problem": "?", "steps": STEPS, "labels": [1, 1, -1]}])
    with pytest.raises(SystemExit, match="needs a reference answer"):
        label("outcome", source, tmp_path / "out")
    rows = [{"problem": "?", "solution": "It is 5."}, {"problem": "?", "solution": "It is 5.", "answer": 5}]
    write_lines(source, rows)
    with pytest.raises(SystemExit, match=r"solution 1 of .* has none; .*--on-bad-row skip"):
        label("outcome", source, tmp_path / "out")
    assert label("outcome", source, tmp_path / "out", "--on-bad-row", "skip")["solutions"] == 1
    assert labels_of(tmp_path / "out") == [[1.0]]
    assert "1 solutions left out: no reference answer" in (tmp_path / "out" / "report.md").read_text()


def test_without_math_verify_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(SystemExit, match=r"modeling-prm\[math\]"):
        label("outcome", problems(tmp_path), tmp_path / "out")
    label("outcome", problems(tmp_path), tmp_path / "out", "--comparison", "string")
    label("arithmetic", problems(tmp_path), tmp_path / "arithmetic")
