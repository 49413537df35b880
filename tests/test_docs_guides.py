"""The code of the guides in docs/ runs as it stands, with tiny models in the places that it names."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from clean_process import PROJECT
from pooling_stand_in import PoolingStandIn
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_prm import PRMForStepScoring, PRMProcessor, PRMVerifier
from modeling_prm.remote_verifier import RemoteVerifier

QUESTIONS = ["What is 12 + 30?", "Ann has 3 apples."]
OUTPUTS = [["12 + 30 = 42.\n\nSo the answer is 42.", "It is 7."], ["3 * 4 = 12.\n\n", ""]]


def code_of(guide: str, text: str, **replaced: str) -> str:
    """The block of a guide that holds a text, with some other texts replaced."""
    blocks = re.findall(r"^```python\n(.*?)^```", (PROJECT / "docs" / guide).read_text(), re.MULTILINE | re.DOTALL)
    (code,) = [block for block in blocks if text in block]
    for old, new in replaced.items():
        assert old in code
        code = code.replace(old, new)
    return code


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "guide"}
    exec(compile(code, "guide", "exec"), names)
    return names


@pytest.fixture
def demo(prm_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the demo's model, whose place a tiny one takes."""
    shutil.copytree(prm_folder("llama"), tmp_path / "outputs/demo/model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "outputs/demo/model"


def load(folder: Path) -> tuple[PRMForStepScoring, PRMProcessor]:
    return PRMForStepScoring.from_pretrained(folder), PRMProcessor.from_pretrained(folder)


def test_search_and_learn(demo: Path) -> None:
    (demo.parents[2] / "our_prm.py").write_text(code_of("search_and_learn.md", "class StepPRM"))
    model, processor = load(demo)
    prm = run(code_of("search_and_learn.md", "import PRMForStepScoring"))["prm"]
    with PoolingStandIn(model, processor) as server:
        there = run(code_of("search_and_learn.md", "import RemoteVerifier", **{"http://127.0.0.1:8000": server.url}))[
            "prm"
        ]
        scores = [prm.score(QUESTIONS, OUTPUTS), there.score(QUESTIONS, OUTPUTS)]
    here = PRMVerifier(model, processor)
    for found in scores:
        assert [[len(steps) for steps in texts] for texts in found] == [[2, 1], [1, 1]]
        for question, texts, steps in zip(QUESTIONS, OUTPUTS, found, strict=True):
            for text, values in zip(texts, steps, strict=True):
                expected = here.score_solution(question, text).step_probs if text else [0.0]
                assert values == pytest.approx(expected, abs=1e-5)
        assert isinstance(found[0][0], list)
    assert prm.score([], []) == []


def test_verl(demo: Path) -> None:
    model, processor = load(demo)
    compute_score = run(code_of("verl.md", "def compute_score"))["compute_score"]
    # As verl's reward workers call it: by name, from several threads, with the options of reward_kwargs.
    rows = [(question, text) for question, texts in zip(QUESTIONS, OUTPUTS, strict=True) for text in texts] * 3
    with PoolingStandIn(model, processor) as server, ThreadPoolExecutor(6) as pool:
        kwargs = {"server": server.url, "checkpoint": str(demo)}
        results = list(
            pool.map(
                lambda row: compute_score(
                    data_source="gsm8k",
                    solution_str=row[1],
                    ground_truth="42",
                    extra_info={"question": row[0], "num_turns": None},
                    **kwargs,
                ),
                rows,
            )
        )
    here = PRMVerifier(model, processor)
    for (question, text), result in zip(rows, results, strict=True):
        if text:
            score = here.score_solution(question, text)
            expected = (score.overall_score, len(score.steps), score.first_error, True)
        else:
            expected = (0.0, 0, -1, False)
        assert result["score"] == pytest.approx(expected[0], abs=1e-5)
        assert (result["num_steps"], result["first_error"], result["scored"]) == expected[1:]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_trl(demo: Path) -> None:
    pytest.importorskip("trl", reason='needs trl: pip install "modeling-prm[rl]"')
    tokenizer = tiny_models.byte_level_tokenizer(eos_token="<|endoftext|>", pad_token="<|pad|>")
    torch.manual_seed(0)
    policy = LlamaForCausalLM(LlamaConfig(**{**tiny_models.DECODER, "vocab_size": len(tokenizer)}))
    policy.save_pretrained("policy")
    tokenizer.save_pretrained("policy")
    small = 'max_completion_length=8, max_steps=1, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True'
    code = code_of(
        "trl.md",
        "GRPOTrainer",
        **{"Qwen/Qwen2.5-0.5B-Instruct": "policy", "max_completion_length=256, max_steps=100": small},
    )
    names = run(code)
    (logged,) = [line for line in names["trainer"].state.log_history if "reward" in line]
    assert 0.0 <= logged["reward"] <= 1.0
    model, processor = load(demo)
    with PoolingStandIn(model, processor) as server:
        reward = run(code_of("trl.md", "import RemoteVerifier", **{"http://127.0.0.1:8000": server.url}))["reward"]
        assert isinstance(reward.verifier, RemoteVerifier)
        prompts, completions = [QUESTIONS[0]] * 2, OUTPUTS[0]
        assert reward(prompts, completions) == pytest.approx(names["reward"](prompts, completions), abs=1e-5)
