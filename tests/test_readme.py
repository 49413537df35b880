"""The README's code runs as it stands, with a tiny backbone in the place of one from the Hub."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_prm import PRMForStepScoring
from trainer.demo_backbone import build_demo_backbone
from trainer.readers import load_step_dataset

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [code for language, code in BLOCKS if language == "bash"]
CANDIDATES, RECORD = [code for language, code in BLOCKS if language == "json"]
HUB_BACKBONE = "Qwen/Qwen2.5-0.5B"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder as the README supposes it: a backbone, a file of solutions, and the demo's model."""
    folder = tmp_path_factory.mktemp("readme")
    backbone = build_demo_backbone(folder / "backbone", seed=0)
    rows = [
        {
            "problem": f"{i} + 1?",
            "steps": [f"{i} + 1 = {i + 1 + i % 2}.", f"So {i + 1}."],
            "labels": [1 - 2 * (i % 2), 1],
        }
        for i in range(30)
    ]
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "candidates.jsonl").write_text(CANDIDATES)
    (folder / "solutions.jsonl").write_text('{"id": "a", "problem": "2 + 3?", "solution": "2 + 3 = 5.\\nSo 5."}\n' * 2)
    model, processor = PRMForStepScoring.from_backbone(backbone)
    model.save_pretrained(folder / "outputs/demo/model")
    processor.save_pretrained(folder / "outputs/demo/model")
    return folder


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def localized(code: str) -> str:
    return code.replace(HUB_BACKBONE, "backbone")


def command_of(module: str) -> list[str]:
    """The words of the README's command that runs a module."""
    (command,) = [code for code in SHELL if f"-m {module} " in code]
    return shlex.split(localized(command).replace("\\\n", " "))


@pytest.fixture(scope="module")
def scored(folder: Path) -> Path:
    """What the scoring command writes."""
    words = command_of("trainer.score")
    assert words[:3] == ["accelerate", "launch", "-m"]
    printed = run([sys.executable, "-m", "accelerate.commands.launch", *words[2:]], folder)
    assert "2 solutions in scored" in printed
    return folder / "scored"


@pytest.fixture(scope="module")
def outputs(folder: Path, scored: Path) -> list[str]:
    """What the Python blocks print, run in their order."""
    return [run([sys.executable, "-c", localized(code)], folder) for code in PYTHON]


def test_python_blocks_run_in_their_order(folder: Path, outputs: list[str]) -> None:
    printed = dict(zip(PYTHON, outputs, strict=True))

    def output_of(text: str) -> str:
        (found,) = [output for code, output in printed.items() if text in code]
        return found

    assert output_of("verifier.score_solution(").count("The answer is 7.") == 1
    assert "'step_probs': [" in output_of("pipeline(")
    # Two steps and one, as the comment beside it says.
    assert output_of("output.step_mask").count("False") == 1
    assert output_of("output.step_mask").count("True") == 3
    assert output_of('aggregate([0.95, 0.90, 0.30, 0.85], "min")').endswith("0.3\n")
    assert [line.split()[:2] for line in output_of("merge_shards(").splitlines()] == [["0", "a"], ["1", "a"]]
    assert output_of("verifier.session(").count("(") == 2
    assert output_of("weighted_majority_vote(").strip() == "0 1 0"
    assert "eval_error_f1" in output_of("trainer.evaluate()")
    assert "'model.safetensors'" in output_of("publish(")
    assert {"report.html", "steps.png", "ranked.png"} <= {path.name for path in folder.iterdir()}


def test_training_command_runs_and_writes_a_model_that_the_publishing_command_takes(folder: Path) -> None:
    words = command_of("trainer.train")
    assert words[:3] == ["accelerate", "launch", "-m"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *words[2:]]
    run([*launcher, "--max-steps", "2", "--use-cpu", "--report-to", "none"], folder)
    model = PRMForStepScoring.from_pretrained(folder / "outputs/my-prm")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert "model.safetensors" in run([sys.executable, *command_of("hub_card")[1:]], folder)


def test_best_of_n_command_runs(folder: Path) -> None:
    assert "oracle" in run([sys.executable, *command_of("trainer.best_of_n")[1:]], folder)
    assert (folder / "outputs/best-of-n/curve.png").is_file()


def test_space_command_runs(folder: Path) -> None:
    run([sys.executable, *command_of("hub_card.space")[1:]], folder)
    assert (folder / "outputs/space/app.py").is_file()


def test_json_block_is_a_line_of_the_plain_format(tmp_path: Path) -> None:
    (tmp_path / "steps.jsonl").write_text(RECORD)
    assert load_step_dataset(tmp_path / "steps.jsonl")["labels"][:] == [[1.0, 0.0]]


def test_make_targets_that_the_readme_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {target for code in SHELL for target in re.findall(r"^make ([\w-]+)", code, re.MULTILINE)}
    assert {"demo", "test"} <= named
    for target in named:
        assert re.search(rf"^[\w -]*\b{target}\b[\w -]*:", makefile, re.MULTILINE), target


def test_paths_that_the_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"\]\(((?!http|#)[^)]+)\)", text):
        assert (ROOT / path).exists(), path


def test_demo_runs_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from trainer import demo

    options = ["--output-dir", str(tmp_path), "--train-problems", "64", "--eval-problems", "20"]
    metrics = demo.main(options)
    printed = capsys.readouterr().out
    assert metrics["eval_num_solutions"] == 20
    # Three tables with as many rows as the solutions have steps, each probability between 0 and 1.
    rows = re.findall(r"^ +(\d+) +([01]\.\d{3}) #* +(right|wrong)  ", printed, re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 5, 6]
    assert f"{metrics['eval_error_f1']:.3f}" in printed
