"""Rewards of a PRM for trainers of agents: a number a trajectory, or a number a turn.

    reward = AgentReward(verifier, on_error="skip")
    trl.GRPOTrainer(..., reward_funcs=reward, tools=[...])        # or environment_factory=...
    reward.turn_rewards(conversations)                            # a list for each, one number a turn

All conversations of a call are scored together. TRL's convention was read in TRL 1.16.0 and is run in the tests;
AReaL's in the guide to rewards of its repository, and it is called there by signature alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .aggregation import aggregate
from .conversation_scoring import ConversationScore


class AgentReward:
    """A PRM's scores of conversations as rewards.

    Args:
        verifier: a `PRMVerifier` or `RemoteVerifier` of a PRM that reads conversations.
        tools: JSON schemas of the tools of all conversations.
        step_unit, truncation: as in `PRMVerifier.score_messages`.
        on_error: what a conversation gets that cannot be scored (too long, no turn, ...): `"raise"`; `"skip"`, None,
            which TRL leaves out; or a finite number, by explicit choice. A failure of the verifier itself, such as a
            server that is gone, is always raised.
        max_tokens_per_batch: as in `score_conversations`.
        name: what TRL logs the reward by.

    Raises:
        TypeError: the verifier cannot score conversations.
        ValueError: an option that cannot be.
    """

    def __init__(
        self,
        verifier: Any,
        *,
        tools: Sequence[Any] | None = None,
        step_unit: str = "turn",
        truncation: str = "error",
        on_error: str | float = "raise",
        max_tokens_per_batch: int | None = None,
        name: str = "agent_reward",
    ) -> None:
        if not callable(getattr(verifier, "score_conversations", None)):
            raise TypeError(
                f"a verifier with score_conversations is needed, such as a PRMVerifier, got {verifier!r:.80}"
            )
        is_number = isinstance(on_error, (int, float)) and not isinstance(on_error, bool) and math.isfinite(on_error)
        if on_error not in ("raise", "skip") and not is_number:
            raise ValueError(f"on_error must be 'raise', 'skip' or a finite number, got {on_error!r}")
        self.verifier = verifier
        self.tools = tools
        self.step_unit = step_unit
        self.truncation = truncation
        self.on_error = on_error
        self.max_tokens_per_batch = max_tokens_per_batch
        self.__name__ = name

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """TRL's convention: N prompts and N completions, both lists of messages; a number or None a completion.

        Turns of the assistant in a prompt are context of the completion's, and do not count.

        Raises:
            TypeError: prompts or completions are texts; TRL gives messages where the dataset's prompts are messages.
            ValueError: a conversation cannot be scored, with `on_error="raise"`.
        """
        if any(isinstance(one, str) for one in (*prompts, *completions)):
            raise TypeError(
                "prompts and completions must be lists of messages; make the dataset's prompts such lists, "
                'as in [{"role": "user", "content": ...}]'
            )
        conversations = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
        scores = self._score(conversations)
        rewards: list[float | None] = []
        for prompt, score in zip(prompts, scores, strict=True):
            own = [] if score.step_probs is None else _probs_from(score, len(prompt))
            if score.step_probs is not None and not own:
                score = self._failed(f"the completion of conversation {score.solution_idx} has no turn", score)
            rewards.append(self._aggregate(own) if own else self._instead(score.error))
        return rewards

    def turn_rewards(self, conversations: Sequence[Any]) -> list[list[float] | None]:
        """For each conversation the probability that each turn (or call) is right; None where it is skipped.

        With a number as `on_error` a conversation that cannot be scored has a list of that number alone.

        Raises:
            ValueError: a conversation cannot be scored, with `on_error="raise"`.
        """
        rewards: list[list[float] | None] = []
        for score in self._score(conversations):
            instead = None if score.step_probs is not None else self._instead(score.error)
            rewards.append(
                list(score.step_probs) if score.step_probs is not None else None if instead is None else [instead]
            )
        return rewards

    def trajectory_rewards(self, conversations: Sequence[Any]) -> list[float | None]:
        """For each conversation the aggregated score of its turns; None where it is skipped.

        Raises:
            ValueError: a conversation cannot be scored, with `on_error="raise"`.
        """
        scores = self._score(conversations)
        return [self._instead(one.error) if one.overall_score is None else one.overall_score for one in scores]

    def areal_reward(
        self, prompt: str, completions: str, prompt_ids: Any, completion_ids: Any, *, messages: Any, **columns: Any
    ) -> float:
        """AReaL's reward function: the completion, a text, is the assistant's turn after the row's `messages`.

        Returns:
            The probability that the turn is right.

        Raises:
            ValueError: it cannot be scored, with `on_error="raise"` or `"skip"`: AReaL takes a number alone.
        """
        (score,) = self._score([[*messages, {"role": "assistant", "content": completions}]])
        if score.step_probs is not None:
            return score.step_probs[-1]
        if isinstance(self.on_error, str):
            raise ValueError(score.error)
        return float(self.on_error)

    def _score(self, conversations: Sequence[Any]) -> list[ConversationScore]:
        scores: list[ConversationScore] = self.verifier.score_conversations(
            conversations,
            tools=self.tools,
            step_unit=self.step_unit,
            truncation=self.truncation,
            max_tokens_per_batch=self.max_tokens_per_batch,
            on_error="raise" if self.on_error == "raise" else "record",
            show_progress=False,
        )
        return scores

    def _aggregate(self, probs: Sequence[float]) -> float:
        return float(aggregate(list(probs), self.verifier.aggregation))

    def _failed(self, error: str, score: ConversationScore) -> Any:
        return replace(score, error=error, step_probs=None, overall_score=None)

    def _instead(self, error: str | None) -> float | None:
        if self.on_error == "raise":
            raise ValueError(error)
        return None if isinstance(self.on_error, str) else float(self.on_error)


def _probs_from(score: ConversationScore, first_message: int) -> list[float]:
    """The probabilities of the steps from a message on."""
    pairs = zip(score.step_messages, score.step_probs or (), strict=True)
    return [prob for message, prob in pairs if message >= first_message]
