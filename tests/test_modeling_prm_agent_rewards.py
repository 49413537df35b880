"""`AgentReward`: turns and trajectories by hand, what cannot be scored, and a GRPO step of TRL in an environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from datasets import Dataset
from test_modeling_prm_conversations import MESSAGES, assistant, call, chat_prm, tool, user
from transformers import LlamaConfig, LlamaForCausalLM

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


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_grpo_in_an_environment_of_several_turns(
    verifier: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy is random, so what its first turn says is read as a call; tool, second turn and update are TRL's."""
    trl = pytest.importorskip("trl", reason='needs trl: pip install "modeling-prm[rl]"')
    from trl.trainer import grpo_trainer

    read = grpo_trainer.parse_response

    def parse(tokenizer: Any, ids: Any, *rest: Any, **options: Any) -> dict[str, Any]:
        message = read(tokenizer, ids, *rest, **options)
        parse.turns += 1  # type: ignore[attr-defined]
        return {**message, "tool_calls": [call("add", x=2)]} if parse.turns <= 4 else message  # type: ignore[attr-defined]

    parse.turns = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(grpo_trainer, "parse_response", parse)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    class Adder:
        def reset(self, **columns: Any) -> None:
            self.calls = 0

        def add(self, x: int) -> str:
            """Add 3.

            Args:
                x: A number.
            """
            return str(x + 3)

    seen: list[Any] = []

    class Recorder(AgentReward):
        def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
            rewards = super().__call__(prompts, completions, **columns)
            seen.append((prompts, completions, rewards))
            return rewards

    tokenizer = tiny_models.byte_level_tokenizer(eos_token="<|im_end|>", pad_token="<|pad|>")
    folder = Path(trl.__file__).parent / "chat_templates"
    tokenizer.chat_template = (folder / "qwen3.jinja").read_text()
    torch.manual_seed(0)
    sizes = {**tiny_models.DECODER, "max_position_embeddings": 4096, "vocab_size": len(tokenizer)}
    policy = LlamaForCausalLM(LlamaConfig(**sizes))
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    config = trl.GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=400,
        max_tool_calling_iterations=2,
        max_steps=1,
        learning_rate=1e-2,
        generation_kwargs={"max_new_tokens": 8},
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trl.GRPOTrainer(
        model=policy,
        reward_funcs=Recorder(verifier),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [[user("2 + 3?")]] * 4}),
        processing_class=tokenizer,
        environment_factory=Adder,
    )
    trainer.train()
    ((prompts, completions, rewards),) = seen
    assert [[message["role"] for message in one] for one in completions] == [["assistant", "tool", "assistant"]] * 4
    assert {one[1]["content"] for one in completions} == {"5"}
    for prompt, completion, reward in zip(prompts, completions, rewards, strict=True):
        product = torch.tensor(probs_of(verifier, [*prompt, *completion])).prod().item()
        assert reward == pytest.approx(product, abs=1e-5)
    assert any(not torch.equal(old, new) for old, new in zip(before, policy.parameters(), strict=True))
