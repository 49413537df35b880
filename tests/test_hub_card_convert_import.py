from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import published_prms as pub
import pytest
import torch

from hub_card.convert import import_prm
from modeling_prm import PRMForStepScoring, PRMProcessor

PROBLEMS, SOLUTIONS = pub.PROBLEMS, pub.SOLUTIONS
QWEN_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."

# What to write, what its documentation computes, and what to say when importing it.
Scores = Callable[[pub.Published, str, list[str]], tuple[list[int], list[float]]]
CASES: dict[str, tuple[Callable[[Path], pub.Published], Scores, dict[str, Any]]] = {
    "qwen2_prm": (
        pub.write_qwen2_prm,
        lambda prm, problem, steps: pub.qwen2_prm_scores(prm, problem, steps, QWEN_SYSTEM),
        {},
    ),
    "reasonflux": (
        pub.write_qwen2_prm,
        lambda prm, problem, steps: pub.qwen2_prm_scores(prm, problem, steps, None),
        {"layout": "reasonflux"},
    ),
    "math_shepherd": (
        lambda folder: pub.write_causal(folder, "mistral"),
        pub.math_shepherd_scores,
        {"layout": "math_shepherd"},
    ),
    "rlhflow": (lambda folder: pub.write_causal(folder, "llama"), pub.rlhflow_scores, {"layout": "rlhflow"}),
    "skywork": (pub.write_skywork, pub.skywork_scores, {}),
    "trl": (
        lambda folder: pub.write_token_classification(folder, 2, pub.qwen_tokenizer()),
        lambda prm, problem, steps: pub.trl_scores(prm, problem, steps, "\n\n"),
        {"separator": "\n\n"},
    ),
    # The line end is two tokens of this tokenizer, and it has a first token.
    "trl_llama": (
        lambda folder: pub.write_token_classification(folder, 2, pub.mistral_tokenizer(), "llama"),
        lambda prm, problem, steps: pub.trl_scores(prm, problem, steps, "\n"),
        {"separator": "\n"},
    ),
    "pure": (
        lambda folder: pub.write_token_classification(folder, 2, pub.qwen_tokenizer()),
        lambda prm, problem, steps: pub.trl_scores(prm, problem, steps, "\n"),
        {"separator": "\n"},
    ),
    "scan": (
        lambda folder: pub.write_token_classification(folder, 1, pub.qwen_tokenizer()),
        lambda prm, problem, steps: pub.trl_scores(prm, problem + "\n\n", steps, "\n\n"),
        {"separator": "\n\n", "problem_template": "{problem}\n\n"},
    ),
    **{
        f"reasoneval_{family}": (
            lambda folder, family=family: pub.write_reasoneval(folder, family),
            lambda prm, problem, steps, family=family: _validity(prm, problem, steps, family),
            {},
        )
        for family in ("mistral", "llama")
    },
}


def _validity(prm: pub.Published, problem: str, steps: list[str], family: str) -> tuple[list[int], list[float]]:
    ids, classes = pub.reasoneval_scores(prm, problem, steps, family)
    return ids, [neutral + right for _, neutral, right in classes]


@pytest.mark.parametrize("case", CASES)
def test_ids_and_scores_are_the_published_ones(case: str, tmp_path: Path) -> None:
    write, scores, options = CASES[case]
    published = write(tmp_path / "published")
    import_prm(tmp_path / "published", tmp_path / "ours", **options)
    model = PRMForStepScoring.from_pretrained(tmp_path / "ours")
    processor = PRMProcessor.from_pretrained(tmp_path / "ours")
    assert model.dtype == torch.float32

    expected = [scores(published, *pair) for pair in zip(PROBLEMS, SOLUTIONS, strict=True)]
    assert [len(probs) for _, probs in expected] == [2, 4, 1]
    spread = max(max(probs) for _, probs in expected) - min(min(probs) for _, probs in expected)
    assert spread > 0.05  # else any score would do

    for (ids, _), item in zip(expected, processor.encode(PROBLEMS, SOLUTIONS), strict=True):
        assert item.input_ids == ids[: len(item.input_ids)]
        # What the original's template writes after the last step is read by no score.
        assert processor.tokenizer.decode(ids[len(item.input_ids) :]).strip() in ("", "<|im_end|>", "<|eot_id|>")
    verifier = model.verifier(processor)
    batched = verifier.score_solutions(PROBLEMS, SOLUTIONS)
    for problem, steps, (_, probs), together in zip(PROBLEMS, SOLUTIONS, expected, batched, strict=True):
        assert together.step_probs == pytest.approx(probs, abs=1e-5)
        assert verifier.score_solution(problem, steps).step_probs == pytest.approx(probs, abs=1e-5)
