"""A PRM as a reward for RL trainers: a number for each completion, or for each of its steps.

    reward = PRMReward(verifier, credit="min_form")
    trainer = trl.GRPOTrainer(model, reward_funcs=reward, train_dataset=prompts, args=config)

and for a trainer that rewards tokens, with `place_on_sampled_tokens` of `credit.py`,

    for item, ids in zip(reward.step_rewards(prompts, completions), completion_ids):
        token_rewards = place_on_sampled_tokens(item, ids, tokenizer)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from transformers.utils import logging

from .credit import StepRewards, StepStyle, find_steps, first_error_credit, mean_credit, min_form_credit, sum_credit
from .solution_score import SolutionScore
from .step_splitting import split_steps

logger = logging.get_logger(__name__)

CREDITS = ("sum", "mean", "min_form", "first_error")

Prompt = str | Sequence[Mapping[str, Any]]
Unscored = float | None | Literal["raise"]


class SolutionScorer(Protocol):
    """What a reward needs of a verifier; `PRMVerifier` has it."""

    def score_solutions(
        self,
        problems: Sequence[str],
        solutions: Sequence[str],
        *,
        step_style: StepStyle,
        batch_size: int | None,
        max_tokens_per_batch: int | None,
        on_error: str,
        show_progress: bool | None,
    ) -> list[SolutionScore]: ...


class _Rated(NamedTuple):
    """One completion's text, its score (None without a step) and its steps' rewards (None where not scored)."""

    text: str
    score: SolutionScore | None
    rewards: list[float] | None
    reward: float | None


class PRMReward:
    """A reward function in TRL's convention: `reward(prompts, completions, **columns) -> list[float | None]`.

    All completions of a call are scored together, equal ones to the same problem once. Needs no TRL.

    Args:
        verifier: a `PRMVerifier`, or an object with its `score_solutions`.
        credit: how the steps' probabilities become rewards: `"sum"`, `"mean"`, `"min_form"`, `"first_error"` (see
            `credit.py`), or a function such as `functools.partial(first_error_credit, spread=True)`, called with
            the probabilities, float64 (B, S), and `mask=`, bool (B, S), that returns rewards (B, S).
        temperature: of `"min_form"`, by default 0.1.
        threshold: of `"first_error"`: a step is called wrong below it, by default the verifier's.
        outcome_func: for `"first_error"`: a reward function in the same convention that says by the final answer
            which completions are correct, those with a value above 0. Where it says None, and without it,
            a completion is correct where no step is called wrong.
        step_style: how `split_steps` cuts a completion into steps.
        problem_key: the column of the dataset that holds the problems as the PRM reads them. By default the
            problem is the prompt, of a conversation the text of its last user message.
        empty_reward: for a completion without a step: a number, None (TRL: this reward does not apply), or
            `"raise"`.
        error_reward: for one that cannot be scored, as when it is too long: likewise. A failure of the verifier
            itself is always raised.
        batch_size: most solutions in a forward pass, as in `score_solutions`.
        max_tokens_per_batch: most tokens in a forward pass, as in `score_solutions`.
        name: the name that TRL logs the reward by; give each of two rewards its own.

    Raises:
        TypeError: the verifier cannot score, or credit or outcome_func is of the wrong type.
        ValueError: an option that cannot be, or that belongs to another credit.
    """

    def __init__(
        self,
        verifier: SolutionScorer,
        *,
        credit: str | Callable[..., torch.Tensor] = "min_form",
        temperature: float | None = None,
        threshold: float | None = None,
        outcome_func: Callable[..., Sequence[float | None]] | None = None,
        step_style: StepStyle = "blank_lines",
        problem_key: str | None = None,
        empty_reward: Unscored = "raise",
        error_reward: Unscored = "raise",
        batch_size: int | None = None,
        max_tokens_per_batch: int | None = None,
        name: str = "prm_reward",
    ) -> None:
        if not callable(getattr(verifier, "score_solutions", None)):
            raise TypeError(f"a verifier with score_solutions is needed, such as a PRMVerifier, got {verifier!r:.80}")
        _check_credit(credit, temperature, threshold, outcome_func)
        if not callable(step_style):
            split_steps("", step_style)  # An unknown style raises here, not in the middle of a training.
        for option, value in (("empty_reward", empty_reward), ("error_reward", error_reward)):
            if value not in (None, "raise") and not (isinstance(value, (int, float)) and math.isfinite(value)):
                raise ValueError(f"{option} must be a finite number, None or 'raise', got {value!r}")
        self.verifier = verifier
        self.credit = credit
        self.temperature = 0.1 if temperature is None else temperature
        self.threshold = threshold
        self.outcome_func = outcome_func
        self.step_style = step_style
        self.problem_key = problem_key
        self.empty_reward = empty_reward
        self.error_reward = error_reward
        self.batch_size = batch_size
        self.max_tokens_per_batch = max_tokens_per_batch
        # TRL logs a reward function by this name.
        self.__name__ = name

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Prompt], **columns: Any) -> list[float | None]:
        """The reward of each completion, the sum of its steps' rewards.

        Args:
            prompts: N texts, or N conversations as lists of messages `{"role": ..., "content": ...}`.
            completions: N texts, or N lists of the assistant's messages.
            columns: columns of the dataset, N values each, and whatever else a trainer hands over; read are
                the one named by `problem_key` and those that `outcome_func` takes.

        Returns:
            N rewards; None only where `empty_reward` or `error_reward` is None.

        Raises:
            TypeError: a prompt, completion or problem is not made of text.
            ValueError: lengths that do not match, a missing column, a conversation without what is needed, or, with
                `"raise"`, a completion that has no step or cannot be scored.
        """
        return [rated.reward for rated in self._rate(prompts, completions, columns)]

    def step_rewards(
        self, prompts: Sequence[Prompt], completions: Sequence[Prompt], **columns: Any
    ) -> list[StepRewards]:
        """The rewards of each completion's steps, and where the steps stand in its text.

        Arguments and errors are those of a call; also a ValueError where a function as `step_style` gives steps
        that do not stand in the text.
        """
        results = []
        for text, score, rewards, reward in self._rate(prompts, completions, columns):
            steps = () if score is None else score.steps
            results.append(
                StepRewards(
                    text=text,
                    steps=steps,
                    step_probs=(score.step_probs or ()) if score is not None else (),
                    rewards=tuple(rewards or ()),
                    spans=find_steps(text, steps, self.step_style) if rewards else (),
                    reward=reward,
                    error="it has no step" if score is None else score.error,
                )
            )
        return results

    def _rate(self, prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any]) -> list[_Rated]:
        if len(prompts) != len(completions):
            raise ValueError(f"got {len(prompts)} prompts and {len(completions)} completions; give one each")
        texts = [completion_text(completion) for completion in completions]
        scores = self._scores(self._problems(prompts, columns), texts)
        rows = [row for row, score in enumerate(scores) if score is not None and score.step_probs is not None]
        credits = self._credits(rows, scores, prompts, completions, columns) if rows else []
        rewards: list[list[float] | None] = [None] * len(texts)
        for row, credit in zip(rows, credits, strict=True):
            rewards[row] = credit
        if len(rows) < len(texts):
            empty = sum(score is None for score in scores)
            failed = [score.error for score in scores if score is not None and score.step_probs is None]
            logger.warning(
                f"{self.__name__}: scored {len(rows)} of {len(texts)} completions; {empty} have no step, {len(failed)} "
                f"could not be scored{f', the first since: {failed[0]}' if failed else ''}"
            )
        return [
            _Rated(text, score, credit, self._without_score(row, score) if credit is None else math.fsum(credit))
            for row, (text, score, credit) in enumerate(zip(texts, scores, rewards, strict=True))
        ]

    def _problems(self, prompts: Sequence[Any], columns: dict[str, Any]) -> list[str]:
        if self.problem_key is None:
            return [prompt_problem(prompt) for prompt in prompts]
        if self.problem_key not in columns:
            raise ValueError(
                f"problem_key={self.problem_key!r} is no column that came along; there are {sorted(columns)}"
            )
        problems = list(columns[self.problem_key])
        if len(problems) != len(prompts):
            raise ValueError(f"column {self.problem_key!r} has {len(problems)} values for {len(prompts)} prompts")
        wrong = next((problem for problem in problems if not isinstance(problem, str)), None)
        if wrong is not None:
            raise TypeError(f"column {self.problem_key!r} must hold texts, got {type(wrong).__name__}")
        return problems

    def _scores(self, problems: list[str], texts: list[str]) -> list[SolutionScore | None]:
        """The score of each completion, None where it has no step; the verifier is called once."""
        has_step = {text: bool(split_steps(text, self.step_style)) for text in dict.fromkeys(texts)}
        pairs = list(zip(problems, texts, strict=True))
        distinct = [pair for pair in dict.fromkeys(pairs) if has_step[pair[1]]]
        if not distinct:
            return [None] * len(pairs)
        scores = self.verifier.score_solutions(
            [problem for problem, _ in distinct],
            [text for _, text in distinct],
            step_style=self.step_style,
            batch_size=self.batch_size,
            max_tokens_per_batch=self.max_tokens_per_batch,
            on_error="record",
            show_progress=False,
        )
        by_pair = dict(zip(distinct, scores, strict=True))
        return [by_pair.get(pair) for pair in pairs]

    def _credits(
        self,
        rows: list[int],
        scores: list[SolutionScore | None],
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: dict[str, Any],
    ) -> list[list[float]]:
        """The rewards of the steps of each scored completion."""
        scored = [score for score in (scores[row] for row in rows) if score is not None and score.step_probs]
        counts = [len(score.steps) for score in scored]
        mask = torch.arange(max(counts)) < torch.tensor(counts).unsqueeze(1)
        probs = torch.zeros(mask.shape, dtype=torch.float64)
        probs[mask] = torch.tensor([prob for score in scored for prob in score.step_probs or ()], dtype=torch.float64)
        if callable(self.credit):
            credit = _checked(self.credit(probs, mask=mask), mask)
        elif self.credit == "min_form":
            credit = min_form_credit(probs, temperature=self.temperature, mask=mask)
        elif self.credit == "first_error":
            threshold = scored[0].threshold if self.threshold is None else self.threshold
            is_correct = ((probs >= threshold) | ~mask).all(dim=1)
            if self.outcome_func is not None:
                outcomes = self.outcome_func(prompts=prompts, completions=completions, **columns)
                is_correct = _with_outcomes(is_correct, rows, list(outcomes), len(completions))
            credit = first_error_credit(probs, threshold=threshold, is_correct=is_correct, mask=mask)
        else:
            credit = (sum_credit if self.credit == "sum" else mean_credit)(probs, mask=mask)
        return [row[:count] for row, count in zip(credit.tolist(), counts, strict=True)]

    def _without_score(self, row: int, score: SolutionScore | None) -> float | None:
        """The reward of a completion that was not scored."""
        option, value = ("empty_reward", self.empty_reward) if score is None else ("error_reward", self.error_reward)
        if value != "raise":
            return None if value is None else float(value)
        reason = "has no step" if score is None else f"could not be scored: {score.error}"
        raise ValueError(
            f"completion {row} {reason}; say with {option} what it gets: a number, or None to leave it out"
        )


def prompt_problem(prompt: Prompt) -> str:
    """The problem in a prompt: the whole text, or the text of a conversation's last user message.

    Raises:
        TypeError: the prompt, or the message, is not made of text.
        ValueError: no message is the user's.
    """
    if isinstance(prompt, str):
        return prompt
    messages = _messages(prompt)
    for message in reversed(messages):
        if message["role"] == "user":
            return _message_text(message)
    roles = [message["role"] for message in messages]
    raise ValueError(f"no message of the prompt is the user's (roles: {roles}); name the problems' column: problem_key")


def completion_text(completion: Prompt) -> str:
    """What a policy wrote: the text itself, or that of its messages, with a blank line between them.

    Raises:
        TypeError: the completion, or a message, is not made of text.
        ValueError: a message is not the assistant's.
    """
    if isinstance(completion, str):
        return completion
    messages = _messages(completion)
    other = next((message["role"] for message in messages if message["role"] != "assistant"), None)
    if other is not None:
        raise ValueError(f"a completion must hold messages of the assistant only, got one of {other!r}")
    return "\n\n".join(_message_text(message) for message in messages)


def _messages(conversation: Any) -> Sequence[Mapping[str, Any]]:
    if not isinstance(conversation, (list, tuple)) or not all(
        isinstance(message, Mapping) and "role" in message for message in conversation
    ):
        raise TypeError(f"a text or a list of messages with role and content is needed, got {conversation!r:.80}")
    return conversation


def _message_text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, (list, tuple)) else [None]
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    if None in texts:
        raise TypeError(f"the content of a message must be text, or parts of text, got {content!r:.80}")
    return "".join(map(str, texts))


def _check_credit(credit: Any, temperature: float | None, threshold: float | None, outcome_func: Any) -> None:
    if not isinstance(credit, str) and not callable(credit):
        raise TypeError(f"credit must be a name or a function, got {type(credit).__name__}")
    if isinstance(credit, str) and credit not in CREDITS:
        raise ValueError(f"there is no credit {credit!r}; choose one of {', '.join(map(repr, CREDITS))}")
    for option, value, owner in (
        ("temperature", temperature, "min_form"),
        ("threshold", threshold, "first_error"),
        ("outcome_func", outcome_func, "first_error"),
    ):
        if value is not None and credit != owner:
            raise ValueError(f"{option} belongs to credit={owner!r}, got credit={credit!r}; leave it out")
    if temperature is not None and not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
    if threshold is not None and not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    if outcome_func is not None and not callable(outcome_func):
        raise TypeError(f"outcome_func must be a function, got {type(outcome_func).__name__}")


def _checked(credit: Any, mask: torch.Tensor) -> torch.Tensor:
    """What a user's function returned, if it can be used."""
    if not isinstance(credit, torch.Tensor) or credit.shape != mask.shape:
        shape = tuple(credit.shape) if isinstance(credit, torch.Tensor) else type(credit).__name__
        raise ValueError(f"the function credit must return a tensor of shape {tuple(mask.shape)}, got {shape}")
    if not bool(credit[mask].isfinite().all()):
        raise ValueError("the function credit returned a reward that is not finite")
    return credit


def _with_outcomes(by_prm: torch.Tensor, rows: list[int], outcomes: list[Any], total: int) -> torch.Tensor:
    """Which of the rows are correct, by their outcomes where there are any, otherwise as the PRM says; bool."""
    if len(outcomes) != total:
        raise ValueError(f"outcome_func returned {len(outcomes)} values for {total} completions; give one each")
    said = [outcomes[row] for row in rows]
    return torch.tensor([prm if out is None else out > 0 for out, prm in zip(said, by_prm.tolist(), strict=True)])
