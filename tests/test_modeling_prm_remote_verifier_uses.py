"""Everything that takes a verifier takes one over a server, with the same outcome."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pooling_stand_in import PoolingStandIn
from test_modeling_prm_search import TreeGenerator

from modeling_prm import PRMForStepScoring, PRMProcessor, PRMVerifier
from modeling_prm.remote_verifier import API_KEY_VARIABLE, RemoteVerifier
from modeling_prm.rewards import PRMReward
from modeling_prm.search import beam_search, diverse_verifier_tree_search
from trainer.benchmarks import BenchmarkItem
from trainer.best_of_n import main
from trainer.evaluate import score_items

PROBLEM = "What is it?"
TREE: dict[tuple[str, ...], list[tuple[str, float, int, bool]]] = {
    (): [("12 + 30 = 42.", 0.6, 1, False), ("It is 7.", 0.4, 1, False)],
    ("12 + 30 = 42.",): [("So the answer is 42.", 0.5, 1, True), ("the quick", 0.5, 1, True)],
    ("It is 7.",): [("So the answer is 7.", 0.5, 1, True), ("brown fox", 0.5, 1, True)],
}


@pytest.fixture
def both(
    make_prm: Callable[..., tuple[PRMForStepScoring, PRMProcessor]],
) -> Iterator[tuple[PRMVerifier, RemoteVerifier]]:
    model, processor = make_prm()
    # The product has no ties, as the minimum has between prefixes with the same weakest step.
    with PoolingStandIn(model, processor) as server, RemoteVerifier(server.url, processor, "product") as there:
        yield PRMVerifier(model, processor, "product"), there


@pytest.mark.parametrize("search", [beam_search, diverse_verifier_tree_search])
def test_searches(search: Callable[..., Any], both: tuple[PRMVerifier, RemoteVerifier]) -> None:
    options: dict[str, Any] = (
        {"num_beams": 2, "expansions": 2}
        if search is beam_search
        else {"num_subtrees": 2, "beam_width": 1, "expansions": 2}
    )
    found = [search(PROBLEM, TreeGenerator(TREE), verifier, max_steps=3, **options) for verifier in both]
    here, there = ([(solution.steps, solution.overall_score) for solution in result.solutions] for result in found)
    assert [steps for steps, _ in there] == [steps for steps, _ in here]
    assert len(here) > 1
    assert [score for _, score in there] == pytest.approx([score for _, score in here], abs=1e-5)


def test_rewards(both: tuple[PRMVerifier, RemoteVerifier]) -> None:
    completions = ["12 + 30 = 42.\n\nSo the answer is 42.", "It is 7.", "the quick\n\nbrown fox\n\njumps"]
    here, there = (PRMReward(verifier, credit="min_form")([PROBLEM] * 3, completions) for verifier in both)
    assert there == pytest.approx(here, abs=1e-5)
    assert len(set(here)) == 3


def test_evaluation(both: tuple[PRMVerifier, RemoteVerifier]) -> None:
    items = [
        BenchmarkItem(id=f"i{i}", subset="s", problem=PROBLEM, steps=steps, labels=(1.0,) * len(steps))
        for i, steps in enumerate([("12 + 30 = 42.", "So the answer is 42."), ("It is 7.",)])
    ]
    here, there = (score_items(items, verifier) for verifier in both)
    assert [item.id for item in there] == ["i0", "i1"]
    for ours, theirs in zip(here, there, strict=True):
        assert theirs.step_probs == pytest.approx(ours.step_probs, abs=1e-5)


@pytest.fixture
def _keep_logging() -> Iterator[None]:
    """The command sets up logging for its process, which is ours here."""
    root, handlers = logging.getLogger(), list(logging.getLogger().handlers)
    levels = {name: logging.getLogger(name).level for name in ("trainer", "modeling_prm", "hub_card")}
    yield
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.usefixtures("_keep_logging")
def test_best_of_n_over_a_server(
    prm_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "sk-of-the-test")
    folder = prm_folder("llama")
    model, processor = PRMForStepScoring.from_pretrained(folder), PRMProcessor.from_pretrained(folder)
    candidates = tmp_path / "candidates.jsonl"
    row = {"problem": PROBLEM, "answer": "42", "solutions": ["It is 42.", "So\n\n42.", ["the answer", "7."], ""]}
    candidates.write_text(json.dumps(row) + "\n", encoding="utf-8")
    command = ["--solutions", str(candidates), "--model", str(folder), "--comparison", "string"]
    here = main([*command, "--device", "cpu", "--output-dir", str(tmp_path / "here")])
    with PoolingStandIn(model, processor, models=("a", "b"), api_key="sk-of-the-test", work_seconds=0.05) as server:
        remote = [*command, "--server", server.url, "--concurrency", "2"]
        there = main([*remote, "--served-model", "b", "--output-dir", str(tmp_path / "there")])
        assert (server.bodies[0]["model"], server.most_at_once) == ("b", 2)
        with pytest.raises(SystemExit) as stopped:
            main([*remote, "--output-dir", str(tmp_path / "unnamed")])
        assert str(stopped.value.code).startswith("error: no model is named, and http://127.0.0.1")
    assert there["curves"] == here["curves"]
    ours, theirs = (
        json.loads((tmp_path / name / "scores.jsonl").read_text(encoding="utf-8"))["solutions"]
        for name in ("here", "there")
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert other.pop("step_probs", None) == pytest.approx(mine.pop("step_probs", None), abs=1e-5)
        assert other.pop("scores", None) == pytest.approx(mine.pop("scores", None), abs=1e-5)
        assert other == mine
    assert "no step" in theirs[3]["error"]
    for file in (tmp_path / "there").iterdir():
        assert b"sk-of-the-test" not in file.read_bytes()
    assert "sk-of-the-test" not in "".join(capsys.readouterr())
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--server", "http://127.0.0.1:8000", "--concurrency", "0", "--output-dir", str(tmp_path / "x")])
    assert stopped.value.code == 2
