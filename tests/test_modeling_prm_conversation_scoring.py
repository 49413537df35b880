"""Conversations scored by verifiers here and over a server, ranked, and by the pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pooling_stand_in import PoolingStandIn
from test_modeling_prm_agent_rewards import TALKS, probs_of
from test_modeling_prm_conversations import ADD, MESSAGES, assistant, call, chat_prm, tool, user

from modeling_prm.pipeline_prm import StepScoringPipeline
from modeling_prm.remote_verifier import RemoteVerifier


@pytest.fixture(scope="module")
def verifier() -> Any:
    model, processor = chat_prm()
    with torch.no_grad():
        model.value_head.out.weight.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(0))
    return model.verifier(processor)


def test_scores_are_the_models_own(verifier: Any) -> None:
    scores = verifier.score_conversations(TALKS, first_idx=3)
    for number, (score, messages) in enumerate(zip(scores, TALKS, strict=True)):
        expected = probs_of(verifier, messages)
        assert score.step_probs == pytest.approx(expected, abs=1e-5)
        assert (score.solution_idx, score.messages) == (3 + number, tuple(messages))
        assert score.overall_score == pytest.approx(min(expected), abs=1e-5)
    assert scores[0].step_messages == (2, 5, 7)
    assert scores[0].problem == "2 + 3?"
    ranked = verifier.rank_conversations(TALKS)
    assert [one.overall_score for one in ranked] == sorted((one.overall_score for one in scores), reverse=True)
    assert len(verifier.score_messages(MESSAGES, tools=[ADD], step_unit="call").step_probs) == 4


def test_a_server_gives_the_same(verifier: Any) -> None:
    with (
        PoolingStandIn(verifier.model, verifier.processor, rows="step", labels=1) as server,
        RemoteVerifier(server.url, verifier.processor) as there,
    ):
        for ours, theirs in zip(
            verifier.score_conversations(TALKS[1:]), there.score_conversations(TALKS[1:]), strict=True
        ):
            assert theirs.step_probs == pytest.approx(ours.step_probs, abs=1e-5)
            assert theirs.step_messages == ours.step_messages


def test_the_pipeline_takes_both_kinds(verifier: Any) -> None:
    pipe = StepScoringPipeline(model=verifier.model, processor=verifier.processor)
    inputs = [{"messages": MESSAGES}, {"problem": "1?", "steps": ["1."]}, {"messages": TALKS[1]}]
    results = pipe(inputs)
    assert [len(one["step_probs"]) for one in results] == [3, 1, 1]
    assert [one["solution_idx"] for one in results] == [0, 1, 2]
    assert results[0]["step_probs"] == pytest.approx(probs_of(verifier, MESSAGES), abs=1e-5)
    assert len(pipe({"messages": MESSAGES}, step_unit="call")["step_probs"]) == 4


def test_what_cannot_be_scored(verifier: Any) -> None:
    long = [user("2?"), assistant("", call("a")), tool("x" * 3000), assistant("4")]
    verifier.processor.max_length = 400
    try:
        with pytest.raises(ValueError, match=r"conversation 1 has .* tokens, and at most 400 are read"):
            verifier.score_conversations([TALKS[1], long])
        scores = verifier.score_conversations([TALKS[1], long, [user("a")]], on_error="record")
        assert [one.step_probs is None for one in scores] == [False, True, True]
        assert "no turn of the assistant" in scores[2].error
        kept = verifier.score_messages(long, truncation="drop_tool_results")
        assert (kept.dropped_tool_results, len(kept.step_probs)) == (1, 2)
        assert kept.messages == tuple(long)
        assert "1 tool results were left out" in str(kept)
    finally:
        verifier.processor.max_length = None
