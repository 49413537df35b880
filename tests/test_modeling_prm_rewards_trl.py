"""A PRM as the reward of a real GRPO training of a tiny model with TRL (extra `rl`)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_prm.credit import place_on_sampled_tokens
from modeling_prm.rewards import PRMReward
from modeling_prm.scoring import PRMVerifier

trl = pytest.importorskip("trl", reason='needs trl: pip install "modeling-prm[rl]"')

# TRL 1.16 calls Transformers 5.23 by old names.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

PROBLEMS = ["What is 12 + 30?", "Ann has 3 apples. What is 3 * 4?"]
GENERATIONS, BATCH, STEPS = 4, 8, 2
TEMPERATURE = 0.2


class Recorder(PRMReward):
    """Keeps what TRL handed over and what it got back."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.calls: list[tuple[dict[str, Any], list[float | None]]] = []

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        rewards = super().__call__(prompts, completions, **columns)
        self.calls.append(({"prompts": prompts, "completions": completions, **columns}, rewards))
        return rewards


def policy() -> tuple[LlamaForCausalLM, Any]:
    tokenizer = tiny_models.byte_level_tokenizer(eos_token="<|endoftext|>", pad_token="<|pad|>")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**tiny_models.DECODER, "vocab_size": len(tokenizer)}))
    return model, tokenizer


def train(reward: Callable[..., Any], prompts: list[Any], folder: Path) -> Any:
    """Two GRPO steps whose completions have blank lines, so that they are several steps."""
    model, tokenizer = policy()
    (blank_line,) = tokenizer("\n\n", add_special_tokens=False)["input_ids"][-1:]
    config = trl.GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        num_generations=GENERATIONS,
        max_completion_length=24,
        max_steps=STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        # Without this a random model hardly ever ends a step.
        generation_kwargs={"sequence_bias": [[[blank_line], 3.0]], "min_new_tokens": 12},
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    data = Dataset.from_dict({"prompt": prompts, "question": PROBLEMS, "answer": ["42", "12"]})
    trainer = trl.GRPOTrainer(
        model=model, reward_funcs=reward, args=config, train_dataset=data, processing_class=tokenizer
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    assert any(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    return trainer


def alone(model: Any, processor: Any, problem: str, completion: str) -> float:
    """The min-form reward of one completion, with nothing of ours but model and processor."""
    steps = [piece.strip() for piece in re.split(r"\n[^\S\n]*\n\s*", completion) if piece.strip()]
    with torch.inference_mode():
        logits = model(**processor(problem, steps, return_tensors="pt")).logits[0].tolist()
    probs = [1 / (1 + math.exp(-logit)) for logit in logits]
    powers = [math.exp(-prob / TEMPERATURE) for prob in probs]
    return sum(power * prob for power, prob in zip(powers, probs, strict=True)) / sum(powers)


@pytest.mark.parametrize("kind", ["texts", "conversations", "column"])
def test_grpo_with_a_prm(kind: str, make_prm: Callable[..., Any], tmp_path: Path) -> None:
    prm, processor = make_prm("llama")
    passes: list[int] = []
    prm.register_forward_hook(lambda module, args, output: passes.append(output.logits.shape[0]))
    verifier = PRMVerifier(prm, processor)
    scored: list[int] = []
    score_solutions = verifier.score_solutions

    def counted(problems: Any, solutions: Any, **options: Any) -> Any:
        scored.append(len(solutions))
        return score_solutions(problems, solutions, **options)

    verifier.score_solutions = counted  # type: ignore[method-assign]
    reward = Recorder(
        verifier,
        temperature=TEMPERATURE,
        empty_reward=0.0,
        problem_key="question" if kind == "column" else None,
    )
    prompts: list[Any] = PROBLEMS if kind == "texts" else [f"Think step by step. {problem}" for problem in PROBLEMS]
    if kind == "conversations":
        prompts = [
            [{"role": "system", "content": "Think."}, {"role": "user", "content": problem}] for problem in PROBLEMS
        ]
    trainer = train(reward, prompts, tmp_path)

    assert len(reward.calls) == STEPS
    # All completions of a step went through the PRM together: the problems in one pass, what follows in another.
    assert len(passes) == 2 * STEPS
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert len(logs) == STEPS
    several_steps = 0
    for (given, rewards), log, rows in zip(reward.calls, logs, list(scored), strict=True):
        assert {"prompts", "completions", "completion_ids", "question", "answer", "trainer_state"} <= given.keys()
        assert sorted(given["question"]) == sorted(PROBLEMS * GENERATIONS)
        completions = given["completions"]
        if kind == "conversations":
            assert all([message["role"] for message in completion] == ["assistant"] for completion in completions)
            completions = [completion[0]["content"] for completion in completions]
        pairs = list(zip(given["question"], completions, strict=True))
        assert rows == len({pair for pair in pairs if pair[1].strip()})
        expected = [alone(prm, processor, *pair) for pair in pairs]
        assert rewards == pytest.approx(expected, abs=1e-5)
        assert len({round(value, 4) for value in expected}) > 2
        assert log["rewards/prm_reward/mean"] == pytest.approx(sum(expected) / BATCH, abs=1e-5)
        assert log["reward"] == pytest.approx(sum(expected) / BATCH, abs=1e-5)
        assert log["grad_norm"] > 0
        items = reward.step_rewards(**given)
        for item, ids, value in zip(items, given["completion_ids"], rewards, strict=True):
            on_tokens = place_on_sampled_tokens(item, ids, trainer.processing_class)
            assert sum(on_tokens) == pytest.approx(value)
            assert sum(token != 0 for token in on_tokens) == len(item.steps)
            several_steps += len(item.steps) > 1
    assert several_steps > BATCH


def test_a_reward_of_none_is_left_out_of_the_mean(make_prm: Callable[..., Any], tmp_path: Path) -> None:
    prm, processor = make_prm("llama")

    def empty_half(text: str) -> list[str]:
        return [text.strip() or "-"] if len(text) % 2 else []

    reward = Recorder(PRMVerifier(prm, processor), step_style=empty_half, empty_reward=None, name="prm_or_none")
    trainer = train(reward, PROBLEMS, tmp_path)
    logs = [log for log in trainer.state.log_history if "reward" in log]
    for (_, rewards), log in zip(reward.calls, logs, strict=True):
        applied = [value for value in rewards if value is not None]
        assert 0 < len(applied) < BATCH
        assert log["rewards/prm_or_none/mean"] == pytest.approx(sum(applied) / len(applied), abs=1e-5)


def test_the_answer_as_the_outcome_of_the_first_error_credit(make_prm: Callable[..., Any], tmp_path: Path) -> None:
    prm, processor = make_prm("llama")

    def has_even_length(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        assert set(answer) == {"42", "12"}
        return [float(len(completion) % 2 == 0) for completion in completions]

    reward = Recorder(PRMVerifier(prm, processor), credit="first_error", outcome_func=has_even_length, empty_reward=0.0)
    train(reward, PROBLEMS, tmp_path)
    for given, rewards in reward.calls:
        assert {0.0, 0.5, 1.0} >= set(rewards)
        outcomes = [len(completion) % 2 == 0 for completion in given["completions"]]
        assert [value == 1.0 for value in rewards] == outcomes
        assert 0 < sum(outcomes) < BATCH
