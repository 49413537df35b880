"""The check that a checkpoint loads by its own code, in a process without this project."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from clean_process import PROBLEMS, SOLUTIONS

from hub_card.clean_process import score_in_clean_process
from modeling_prm import PRMForStepScoring, PRMProcessor

Folder = Callable[..., Path]


def test_scores_are_those_of_the_model_in_memory(prm_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prm_folder("qwen2")
    monkeypatch.chdir(folder.parent)
    # A path relative to where this process is, and variables that would let the other one find the project.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent.parent))
    clean = score_in_clean_process(folder.name, PROBLEMS, SOLUTIONS)
    model, processor = PRMForStepScoring.from_pretrained(folder), PRMProcessor.from_pretrained(folder)
    batch = processor(PROBLEMS, SOLUTIONS, return_tensors="pt")
    with torch.inference_mode():
        output = model(**batch)
    assert torch.equal(clean.input_ids, batch["input_ids"])
    # Weights mapped from a file can round differently from copies, by a bit.
    torch.testing.assert_close(clean.logits, output.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(clean.step_probs, output.step_probs, rtol=0, atol=1e-6)
    assert clean.logits.shape == (2, 3)
    assert clean.model_module.startswith("transformers_modules.")
    assert not clean.model_module.startswith("modeling_prm")


def copy_with(folder: Path, to: Path, line: str) -> Path:
    """The checkpoint with one more line at the end of its model's code."""
    shutil.copytree(folder, to)
    with (to / "modeling_prm.py").open("a") as file:
        file.write(f"\n{line}\n")
    return to


def test_it_is_the_checkpoints_own_code_that_runs(prm_folder: Folder, tmp_path: Path) -> None:
    line = "PRMForStepScoring.forward = lambda self, **batch: StepScoringOutput(*[torch.full((1, 1), 0.25)] * 3)"
    changed = copy_with(prm_folder("qwen2"), tmp_path / "changed", line)
    clean = score_in_clean_process(changed, ["1 + 1?"], [["2."]])
    assert clean.logits.tolist() == [[0.25]]


def test_the_project_cannot_be_imported_there(prm_folder: Folder, tmp_path: Path) -> None:
    code = """
import importlib
refused = []
for name in ("modeling_prm", "trainer", "hub_card", "trainer.records"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        refused.append(str(error))
raise RuntimeError("; ".join(refused))
"""
    changed = copy_with(prm_folder("qwen2"), tmp_path / "changed", code)
    with pytest.raises(RuntimeError) as raised:
        score_in_clean_process(changed, ["1 + 1?"], [["2."]])
    assert f"{changed} does not load and score in a clean process" in str(raised.value)
    refusals = "modeling_prm is hidden; trainer is hidden; hub_card is hidden; trainer is hidden"
    assert f"RuntimeError: {refusals}" in str(raised.value)


def test_a_checkpoint_that_lacks_its_code_fails(prm_folder: Folder, tmp_path: Path) -> None:
    shutil.copytree(prm_folder("qwen2"), tmp_path / "bare")
    (tmp_path / "bare" / "step_loss.py").unlink()
    with pytest.raises(RuntimeError, match=r"does not load and score in a clean process; it ended with:(\n.*)*step_lo"):
        score_in_clean_process(tmp_path / "bare", ["1 + 1?"], [["2."]])
