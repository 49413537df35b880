"""Scores, and ranks, conversations of agents: `verifier.score_messages(messages)`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .conversations import Conversation, check_conversation
from .processing_prm import EncodedSolution
from .solution_score import SolutionScore


@dataclass(frozen=True, kw_only=True)
class ConversationScore(SolutionScore):
    """The scores of a conversation; a step is an assistant's turn, or a tool call.

    Args:
        messages: the messages as they were given.
        step_messages: for each step, the 0-based index of its message.
        dropped_tool_results: how many of the oldest tool results were left out, so that the rest fits.

    The others are those of `SolutionScore`; `problem` is what the user asks first.
    """

    messages: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    step_messages: tuple[int, ...] = ()
    dropped_tool_results: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary of JSON's types; the messages as they were given."""
        return {**super().to_dict(), "messages": list(self.messages)}

    def __str__(self) -> str:
        text = super().__str__()
        if self.dropped_tool_results:
            text += f"\n  {self.dropped_tool_results} tool results were left out, the oldest, to make it fit"
        return text


class ConversationScoring:
    """What verifiers do with conversations; the forward passes are those of solutions."""

    processor: Any

    def score_messages(
        self, messages: Any, *, tools: Any = None, step_unit: str = "turn", truncation: str = "error"
    ) -> ConversationScore:
        """Score the assistant's turns of one conversation, in one pass.

        Args:
            messages: as `check_conversation` takes them: roles system, user, assistant and tool.
            tools: JSON schemas of the tools.
            step_unit: `"turn"`, or `"call"`: each tool call is a step of its own.
            truncation: `"error"` raises where it is too long; `"drop_tool_results"` leaves out the oldest tool
                results, as many as needed, and says in the result how many.

        Raises:
            TypeError, ValueError: as `score_conversations`.
        """
        return self.score_conversations([messages], tools=tools, step_unit=step_unit, truncation=truncation)[0]

    def rank_conversations(
        self,
        conversations: Iterable[Any],
        *,
        tools: Any = None,
        step_unit: str = "turn",
        truncation: str = "error",
        batch_size: int | None = None,
        max_tokens_per_batch: int | None = None,
        on_error: str = "raise",
        show_progress: bool | None = None,
    ) -> list[ConversationScore]:
        """Score conversations, such as trajectories of one task, and return them best first.

        `solution_idx` is a conversation's place as given; equal scores keep their order, and what could not be scored
        comes last. Arguments and errors are those of `score_conversations`.
        """
        scores = self.score_conversations(
            conversations,
            tools=tools,
            step_unit=step_unit,
            truncation=truncation,
            batch_size=batch_size,
            max_tokens_per_batch=max_tokens_per_batch,
            on_error=on_error,
            show_progress=show_progress,
        )
        return sorted(scores, key=lambda score: float("inf") if score.overall_score is None else -score.overall_score)

    def score_conversations(
        self,
        conversations: Iterable[Any],
        *,
        tools: Any = None,
        step_unit: str = "turn",
        truncation: str = "error",
        batch_size: int | None = None,
        max_tokens_per_batch: int | None = None,
        on_error: str = "raise",
        show_progress: bool | None = None,
        first_idx: int = 0,
    ) -> list[ConversationScore]:
        """Score N conversations, batched by length; the results are in the order of the input.

        Args:
            conversations: lists of messages, or dictionaries of `messages` and, where they have their own, `tools`.
            tools: JSON schemas of the tools of those that have none of their own.
            step_unit, truncation: as in `score_messages`.
            batch_size, max_tokens_per_batch, on_error, show_progress, first_idx: as in `score_solutions`.

        Returns:
            N results with as many step probabilities as the conversation has turns of the assistant (or tool calls),
            always.

        Raises:
            TypeError: messages or parts of them are of the wrong type.
            ValueError: messages that are not as they must be, too many tokens, a PRM without a layout for
                conversations, NaN or infinite logits, or an option that cannot be.
        """
        check_scoring_options(on_error, batch_size, max_tokens_per_batch)
        if truncation not in ("error", "drop_tool_results"):
            raise ValueError(f"truncation must be 'error' or 'drop_tool_results', got {truncation!r}")
        if isinstance(conversations, (str, Mapping)):
            raise TypeError("conversations must be a list of conversations; for one, call score_messages")
        given = [_as_pair(one, tools, first_idx + index) for index, one in enumerate(conversations)]
        rows = [
            self._encode_conversation(messages, own_tools, first_idx + index, step_unit, truncation, on_error)
            for index, (messages, own_tools) in enumerate(given)
        ]
        scores: list[SolutionScore] = self._score_rows(  # type: ignore[attr-defined]
            [row.conversation.task if row.conversation else None for row in rows],
            [row.conversation.steps if row.conversation else [] for row in rows],
            [row.encoded for row in rows],
            [row.error for row in rows],
            first_idx,
            batch_size=batch_size,
            max_tokens_per_batch=max_tokens_per_batch,
            on_error=on_error,
            show_progress=show_progress,
        )
        return [
            ConversationScore(
                **dict(score.items()),
                messages=tuple(messages) if row.conversation else (),
                step_messages=tuple(row.conversation.step_messages) if row.conversation else (),
                dropped_tool_results=row.dropped,
            )
            for score, row, (messages, _) in zip(scores, rows, given, strict=True)
        ]

    def _encode_conversation(
        self, messages: Any, tools: Any, index: int, step_unit: str, truncation: str, on_error: str
    ) -> _Row:
        conversation = None
        try:
            conversation = check_conversation(messages, tools, step_unit=step_unit, name=f"conversation {index}")
            ((item, dropped),) = self.processor.encode_conversations(
                [conversation],
                truncation=truncation,
                limit=self.max_positions,  # type: ignore[attr-defined]
            )
        except (TypeError, ValueError) as error:
            # The processor numbers what it is given in one call.
            text = str(error).replace("conversation 0 ", f"conversation {index} ", 1)
            if on_error == "raise":
                raise type(error)(text) from error
            return _Row(conversation, error=text)
        return _Row(conversation, item, dropped)


@dataclass(frozen=True)
class _Row:
    conversation: Conversation | None
    encoded: EncodedSolution | None = None
    dropped: int = 0
    error: str | None = None


def _as_pair(conversation: Any, tools: Any, index: int) -> tuple[Any, Any]:
    """Messages and tools of one conversation."""
    if not isinstance(conversation, Mapping):
        return conversation, tools
    if not {"messages"} <= conversation.keys() <= {"messages", "tools"}:
        raise ValueError(
            f"conversation {index} must have the keys messages and, if any, tools; got "
            f"{', '.join(sorted(map(str, conversation)))}"
        )
    own = conversation.get("tools")
    return conversation["messages"], tools if own is None else own


def check_scoring_options(on_error: str, batch_size: int | None, max_tokens_per_batch: int | None) -> None:
    """Check what all scoring takes.

    Raises:
        ValueError: an option has a value outside those allowed.
    """
    if on_error not in ("raise", "record"):
        raise ValueError(f"on_error must be 'raise' or 'record', got {on_error!r}")
    for name, value in (("batch_size", batch_size), ("max_tokens_per_batch", max_tokens_per_batch)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be None or at least 1, got {value}")
