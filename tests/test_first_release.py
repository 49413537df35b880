"""What the first release saved loads today, with the same ids and scores.

`tests/fixtures/first_release/` was written once, by `tests/fixtures/make_first_release.py` at the first
release. It is never written again: if these tests fail, it is the code that must change, or people who
saved a checkpoint then would get other scores now.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from clean_process import run_clean
from transformers import AutoConfig, AutoModel, AutoProcessor

from modeling_prm import PRMForStepScoring, PRMProcessor

FOLDER = Path(__file__).resolve().parent / "fixtures" / "first_release"
EXPECTED: list[dict[str, Any]] = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))

# Alone and in one padded batch, in this process and in a clean one.
SCORE = """
def score(model, processor, rows):
    import torch

    scored = []
    for batch in [*[[row] for row in rows], rows]:
        inputs = processor([row["problem"] for row in batch], [row["steps"] for row in batch], return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs)
        for i in range(len(batch)):
            positions = [position for position in inputs["step_positions"][i].tolist() if position >= 0]
            scored.append({
                "input_ids": inputs["input_ids"][i][inputs["attention_mask"][i] == 1].tolist(),
                "step_positions": positions,
                "logits": outputs.logits[i][: len(positions)].tolist(),
                "step_probs": outputs.step_probs[i][: len(positions)].tolist(),
            })
    return scored
"""
LOAD = (
    SCORE
    + """
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(arguments["folder"], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(arguments["folder"], trust_remote_code=True)
result = {"scored": score(model, processor, arguments["rows"]), "module": type(model).__module__.split(".")[0]}
"""
)


def check(scored: list[dict[str, Any]]) -> None:
    """Compare each example's scores, alone and then in the batch, with those of the first release."""
    assert len(scored) == 2 * len(EXPECTED) == 4
    for got, expected in zip(scored, EXPECTED * 2, strict=True):
        assert got["input_ids"] == expected["input_ids"]
        assert got["step_positions"] == expected["step_positions"]
        assert got["logits"] == pytest.approx(expected["logits"], abs=1e-6, rel=0)
        assert got["step_probs"] == pytest.approx(expected["step_probs"], abs=1e-6, rel=0)


def test_the_package_gives_the_scores_of_the_first_release() -> None:
    model, processor = AutoModel.from_pretrained(FOLDER), AutoProcessor.from_pretrained(FOLDER)
    assert (type(model), type(processor)) == (PRMForStepScoring, PRMProcessor)
    names: dict[str, Any] = {}
    exec(SCORE, names)
    check(names["score"](model, processor, EXPECTED))


def test_the_code_saved_with_the_first_release_still_runs(tmp_path: Path) -> None:
    result = run_clean(LOAD, folder=tmp_path / "process", arguments={"folder": str(FOLDER), "rows": EXPECTED})
    assert result["module"] == "transformers_modules"
    check(result["scored"])


def test_options_of_the_first_release_are_read_as_they_were_saved() -> None:
    """By hand from its `config.json`, where a default that changes later would show."""
    layout = {
        "separator_token": "<|step_end|>",
        "separator_is_reserved": True,
        "score_offset": 0,
        "prompt_layout": "plain",
        "problem_template": "Problem: {problem}\n\n",
        "step_template": "Step {i}: {step}",
        "step_joiner": "\n",
        "max_length": 512,
        "layout_version": 1,
    }
    config, processor = AutoConfig.from_pretrained(FOLDER), AutoProcessor.from_pretrained(FOLDER)
    assert {name: getattr(config, name) for name in layout} == layout
    assert {name: getattr(processor, name) for name in layout} == layout
    assert (config.head_type, config.num_labels, config.aggregation) == ("linear", 1, "min")
    # It knew of neither.
    assert (config.temperature, config.error_threshold) == (1.0, 0.5)
    assert processor.separator_token_id == config.separator_token_id


def test_the_examples_tell_layouts_apart() -> None:
    """Scores that were all equal would hide a mistake, and so would texts that no tokenizer cuts differently."""
    logits = [logit for row in EXPECTED for logit in row["logits"]]
    assert [len(row["logits"]) for row in EXPECTED] == [len(row["steps"]) for row in EXPECTED] == [2, 3]
    assert min(abs(a - b) for i, a in enumerate(logits) for b in logits[:i]) > 1e-3
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 300_000
