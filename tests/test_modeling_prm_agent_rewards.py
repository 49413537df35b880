"""`AgentReward`: turns and trajectories by hand, what cannot be scored, and a GRPO step of TRL in an environment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_modeling_prm_conversations import MESSAGES, assistant, call, chat_prm, tool, user

from modeling_prm.agent_rewards import AgentReward
from modeling_prm.conversations import check_conversation

TALKS = [MESSAGES, [user("1?"), assistant("1")], [user("2?"), assistant("", call("f")), tool("3"), assistant("4")]]


@pytest.fixture(scope="module")
def verifier() -> Any:
    model, processor = chat_prm()
    with torch.no_grad():
        model.value_head.out.weight.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(0))
    return model.verifier(processor, "product")


def probs_of(verifier: Any, messages: Any) -> list[float]:
    """Step probabilities by the model alone, at the separators of one row."""
    ((item, _),) = verifier.processor.encode_conversations([check_conversation(messages)])
    with torch.inference_mode():
        output = verifier.model(torch.tensor([item.input_ids]), step_positions=torch.tensor([item.step_positions]))
    return list(output.step_probs[0].tolist())


def test_turns_and_trajectories(verifier: Any) -> None:
    reward = AgentReward(verifier)
    turns = reward.turn_rewards(TALKS)
    assert [len(own or ()) for own in turns] == [3, 1, 2]
    for own, messages in zip(turns, TALKS, strict=True):
        assert own == pytest.approx(probs_of(verifier, messages), abs=1e-5)
    products = [torch.tensor(own).prod().item() for own in turns]
    assert reward.trajectory_rewards(TALKS) == pytest.approx(products, abs=1e-5)
    # TRL gives the completion apart; turns of the prompt do not count.
    (last,) = reward([MESSAGES[:7]], [MESSAGES[7:]])
    assert last == pytest.approx(probs_of(verifier, MESSAGES)[2], abs=1e-5)
    given = reward.areal_reward("", "Yes.", [], [], messages=MESSAGES[:7], answer="x")
    assert given == pytest.approx(last, abs=1e-6)


def test_what_cannot_be_scored(verifier: Any) -> None:
    bad = [user("1?"), tool("2"), assistant("3")]
    with pytest.raises(ValueError, match="message 1 of conversation 1 is of a tool"):
        AgentReward(verifier).turn_rewards([TALKS[1], bad])
    assert AgentReward(verifier, on_error="skip").turn_rewards([bad, TALKS[1]])[0] is None
    assert AgentReward(verifier, on_error="skip").trajectory_rewards([bad])[0] is None
    assert AgentReward(verifier, on_error=0.25).turn_rewards([bad]) == [[0.25]]
    assert AgentReward(verifier, on_error=0.25)([TALKS[1]], [[tool("x")]]) == [0.25]
    assert AgentReward(verifier, on_error=0.25)([MESSAGES[:6]], [[user("x")]]) == [0.25]
    with pytest.raises(ValueError, match="completion of conversation 0 has no turn"):
        AgentReward(verifier)([MESSAGES[:6]], [[user("x")]])
    with pytest.raises(ValueError, match="of a tool"):
        AgentReward(verifier, on_error="skip").areal_reward("", "3", [], [], messages=bad[:2])
    with pytest.raises(TypeError, match="must be lists of messages"):
        AgentReward(verifier)(["a"], ["b"])
    for option in ("zero", float("nan"), True):
        with pytest.raises(ValueError, match="on_error must be"):
            AgentReward(verifier, on_error=option)
