"""From a problem and its steps to token ids: the only place that knows the layout of a PRM's input."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

from transformers import BatchEncoding, PreTrainedTokenizerBase, ProcessorMixin

from .configuration_prm import LAYOUT_OPTIONS, PRMConfig, check_options
from .conversation_ids import conversation_ids
from .conversation_layout import ConversationLayout
from .conversations import Conversation
from .joined_text import Piece, TokenizedText, cut_at_specials, join_ids, joined_templates, write_pieces

# Text with digits, code, spaces, line ends and several scripts. Its ids are saved with a processor, so
# that a tokenizer which loads as another class, and then cuts text differently, is noticed.
_PROBE = "Step 12: 3.14 × 2 = 6.28,  so\n\n\tf(x) := {x_1}² ≠ -7; it's naïve — 第三步, шаг 4.  "


class EncodedSolution(NamedTuple):
    """One problem with its steps as ids, not padded.

    `input_ids` holds L ids and `step_positions` the 0-based index at which each kept step's score is
    read; `num_steps` counts the steps given, so `num_steps - len(step_positions)` did not fit.
    """

    input_ids: list[int]
    step_positions: list[int]
    num_steps: int


class PRMProcessor(ProcessorMixin):
    """Turns problems and steps into the inputs of `PRMForStepScoring`.

    The ids are `[BOS if the tokenizer adds one] + ids(problem_template)`, then for each step
    `ids(step_template) + [separator id] + ids(step_joiner)`, without the joiner after the last. Every
    piece is tokenized alone, so nothing merges a separator into a step, and in the text of problems and
    steps special tokens and the separator are plain text. With `layout_version=2` the same texts are joined
    first, and what stands between two special tokens is tokenized at once; only where a separator would be
    one token with the text after it does a new text begin there.

    Args:
        tokenizer: the backbone's tokenizer, with the separator in its vocabulary.
        separator_token, separator_is_reserved, score_offset, prompt_layout, problem_template,
        step_template, step_joiner, max_length, layout_version, conversation_layout: as in `PRMConfig`; with
            `max_length=None` only the model limits the length. All but `max_length` are fixed then.
        ids_probe: SHA-256 of the ids of a fixed text, saved with a processor to check the tokenizer
            that loads.

    Raises:
        ValueError: a reserved separator is not one token of the vocabulary, the tokenizer gives other ids
            than the one that was saved, or it does not tell where its tokens are, which `layout_version=2` needs.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        separator_token: str = PRMConfig.separator_token,
        separator_is_reserved: bool = PRMConfig.separator_is_reserved,
        score_offset: int = PRMConfig.score_offset,
        prompt_layout: str = PRMConfig.prompt_layout,
        problem_template: str = PRMConfig.problem_template,
        step_template: str = PRMConfig.step_template,
        step_joiner: str = PRMConfig.step_joiner,
        max_length: int | None = None,
        layout_version: int = PRMConfig.layout_version,
        ids_probe: str | None = None,
        conversation_layout: dict[str, Any] | None = None,
    ) -> None:
        options = {name: value for name, value in locals().items() if name in LAYOUT_OPTIONS}
        check_options(options)
        super().__init__(tokenizer)
        for name, value in options.items():
            setattr(self, name, value)
        self.separator_ids = separator_ids(tokenizer, separator_token, is_reserved=separator_is_reserved)
        self.separator_token_id = self.separator_ids[-1] if self.separator_ids else None
        self.ids_probe = self._probe()
        if ids_probe is not None and ids_probe != self.ids_probe:
            raise ValueError(
                f"the tokenizer loaded as {type(tokenizer).__name__} and gives other ids than the one that was saved "
                "with this processor, so every score would be off; load it with the versions of transformers and "
                "tokenizers that saved it"
            )
        self._prepare_pieces()

    def _prepare_pieces(self) -> None:
        """Tokenize what stays the same in every input."""
        before, after = self.problem_template.split("{problem}")
        head, self._before_problem = _split_after_last_special(self.tokenizer, before)
        self._after_problem, tail = _split_before_first_special(self.tokenizer, after)
        bos_ids = [] if self.prompt_layout == "chat" else _bos_ids(self.tokenizer)
        self._head_ids = bos_ids + self._template_ids(head)
        self._tail_ids = self._template_ids(tail)
        self._joiner_ids = self._template_ids(self.step_joiner)
        if self.separator_is_reserved and self.separator_token_id in self._head_ids + self._tail_ids + self._joiner_ids:
            raise ValueError(
                f"problem_template or step_joiner holds the separator {self.separator_token!r}, which may only end "
                "steps: change the template, or choose another separator"
            )
        self._before_step, self._after_step = self.step_template.split("{step}")
        if self.layout_version == 2:
            texts = (before, after, self._before_step, self._after_step, self.separator_token, self.step_joiner)
            self._joined = joined_templates(self.tokenizer, _special_pattern(self.tokenizer), bos_ids, *texts)
        elif found := _special_pattern(self.tokenizer).search(self.step_template):
            raise ValueError(
                f"step_template holds the special token {found[0]!r}, which would be plain text there; put it into "
                "problem_template or step_joiner"
            )
        self._prepare_conversations()
        self._spelled = self._spell_specials()

    def _prepare_conversations(self) -> None:
        self._conversation_layout = None
        if self.conversation_layout is None:
            return
        self._conversation_layout = layout = ConversationLayout.from_dict(self.conversation_layout)
        self._cut_texts: dict[str, list[Piece]] = {}
        self._conversation_bos = _bos_ids(self.tokenizer) if layout.adds_bos else []
        texts = (*layout.between.values(), *layout.between_with_tools.values(), layout.thinking)
        if self.separator_token and self.separator_is_reserved and self.separator_token in "".join(texts):
            raise ValueError(
                f"conversation_layout holds the separator {self.separator_token!r}, which may only end steps; choose "
                "another separator"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in LAYOUT_OPTIONS and name != "max_length" and hasattr(self, "_spelled"):
            raise AttributeError(f"{name} is fixed when a processor is made; make one with the other {name}")
        super().__setattr__(name, value)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "step_positions"]

    @property
    def pad_token_id(self) -> int:
        """The id that fills padding; any but the separator will do, since padding is masked."""
        for token_id in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0):
            if token_id is not None and token_id != self.separator_token_id:
                return int(token_id)
        return 1

    def __call__(
        self,
        problem: str | Sequence[str],
        steps: str | Sequence[str] | Sequence[Sequence[str]],
        *,
        step_delimiter: str | None = None,
        truncation: str = "error",
        padding_side: str = "right",
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Encode one problem with its steps, or a batch of both.

        Args:
            problem: one problem, or B of them.
            steps: the steps of one solution, or B lists of steps. With `step_delimiter`, the whole text
                of one solution or of B solutions, which is cut there (blank pieces are left out).
            step_delimiter: where to cut whole texts, such as `"\\n\\n"`.
            truncation: `"error"` raises where an input is longer than `max_length`; `"drop"` leaves out
                whole steps from the first that does not fit on.
            padding_side: `"right"` or `"left"`.
            return_tensors: `"pt"`, `"np"`, or None for lists.

        Returns:
            `input_ids` (B, L) int64, `attention_mask` (B, L) int64 and `step_positions` (B, S) int64,
            padded with -1. B is 1 for a single problem.

        Raises:
            TypeError: problems or steps of the wrong type.
            ValueError: no step, an empty step, lists of unequal length, or an input that is too long.
        """
        problems, solutions = _as_batch(problem, steps, step_delimiter)
        encoded = self.encode(problems, solutions, truncation=truncation)
        for index, item in enumerate(encoded):
            if not item.step_positions:
                raise ValueError(
                    f"solution {index} keeps 0 of {item.num_steps} steps at max_length={self.max_length}: problem and "
                    "first step alone are longer; raise max_length or leave it out"
                )
        return self.pad(encoded, padding_side=padding_side, return_tensors=return_tensors)

    def encode(
        self, problems: Sequence[str], solutions: Sequence[Sequence[str]], *, truncation: str = "error"
    ) -> list[EncodedSolution]:
        """Encode B problems with B lists of steps, without padding.

        With `truncation="drop"` a solution keeps the steps that fit, which may be none.

        Raises:
            ValueError: with `truncation="error"`, an input is longer than `max_length`.
        """
        if truncation not in ("error", "drop"):
            raise ValueError(f"truncation must be 'error' or 'drop', got {truncation!r}")
        if not problems:
            return []
        alone = self.layout_version == 1
        encoded = self._encode_alone(problems, solutions) if alone else self._encode_joined(problems, solutions)
        for index, item in enumerate(encoded):
            if truncation == "error" and len(item.step_positions) < item.num_steps:
                raise ValueError(
                    f"solution {index} keeps {len(item.step_positions)} of {item.num_steps} steps at "
                    f"max_length={self.max_length}; raise max_length or pass truncation='drop'"
                )
        return encoded

    def encode_conversations(
        self, conversations: Sequence[Conversation], *, truncation: str = "error", limit: int | None = None
    ) -> list[tuple[EncodedSolution, int]]:
        """Encode conversations in the PRM's `conversation_layout`, each as one input.

        A separator stands after each scored turn, or tool call, before the white space that follows it. What
        follows the last scored turn is not read.

        Args:
            conversations: B of them, as `check_conversation` makes them.
            truncation: `"error"` raises where an input is longer than the limit; `"drop"` leaves out whole steps
                from the first that does not fit on, with what follows it; `"drop_tool_results"` replaces the oldest
                tool results by a marker, as many as needed, and raises where that is not enough.
            limit: most tokens of an input beside `max_length`.

        Returns:
            For each the ids and step positions, and how many tool results were replaced.

        Raises:
            ValueError: the PRM has no layout for conversations, its chat template has no place for something, or an
                input is too long.
        """
        if truncation not in ("error", "drop", "drop_tool_results"):
            raise ValueError(f"truncation must be 'error', 'drop' or 'drop_tool_results', got {truncation!r}")
        limits = [number for number in (self.max_length, limit) if number is not None]
        most = min(limits) if limits else None
        results = []
        for index, (one, item) in enumerate(zip(conversations, self._conversation_rows(conversations), strict=True)):
            dropped, total = 0, len(item.input_ids)
            if truncation == "drop_tool_results" and most is not None and total > most:
                dropped, item = self._drop_results(one, most)
            if most is not None and len(item.input_ids) > most:
                kept = [position for position in item.step_positions if position - self.score_offset < most]
                if truncation != "drop":
                    without = f", and {len(item.input_ids)} without any tool result" if dropped else ""
                    raise ValueError(
                        f"conversation {index} has {total} tokens{without}, and at most {most} are read: only "
                        f"{len(kept)} of {item.num_steps} steps fit; raise max_length if the backbone reads more, or "
                        f"{'shorten it' if dropped else 'pass truncation=' + repr('drop_tool_results')}"
                    )
                ids = item.input_ids[: kept[-1] - self.score_offset + 1 if kept else most]
                item = EncodedSolution(ids, kept, item.num_steps)
            results.append((item, dropped))
        return results

    def _conversation_rows(self, conversations: Sequence[Conversation]) -> list[EncodedSolution]:
        """Ids of whole conversations, however long."""
        if self._conversation_layout is None:
            raise ValueError(
                "this PRM was made without a layout for conversations, so that it cannot read messages; make one with "
                "PRMForStepScoring.from_backbone(..., conversations='auto')"
            )
        rows = conversation_ids(
            conversations,
            self._conversation_layout,
            cut=self._cut,
            tokenize=self._text_ids,
            bos_ids=self._conversation_bos,
            separator_ids=self.separator_ids,
        )
        return [EncodedSolution(ids, [end + self.score_offset for end in ends], len(ends)) for ids, ends in rows]

    def _drop_results(self, conversation: Conversation, most: int) -> tuple[int, EncodedSolution]:
        """As few of the oldest tool results replaced as needed to have so many tokens, or all."""
        few, many = 1, len(conversation.tool_results)
        best = self._conversation_rows([conversation.without_results(many)])[0]
        while few < many:
            middle = (few + many) // 2
            item = self._conversation_rows([conversation.without_results(middle)])[0]
            if len(item.input_ids) <= most:
                many, best = middle, item
            else:
                few = middle + 1
        return many, best

    def _cut(self, text: str) -> list[Piece]:
        """A template's text, cut at its special tokens."""
        if text not in self._cut_texts:
            self._cut_texts[text] = cut_at_specials(self.tokenizer, _special_pattern(self.tokenizer), text)
        return self._cut_texts[text]

    def _encode_alone(self, problems: Sequence[str], solutions: Sequence[Sequence[str]]) -> list[EncodedSolution]:
        """Ids of layout version 1, in which every piece is tokenized alone."""
        texts = [self._before_problem + problem + self._after_problem for problem in problems]
        for steps in solutions:
            texts += [
                self._before_step.replace("{i}", str(i)) + step + self._after_step.replace("{i}", str(i))
                for i, step in enumerate(steps, start=1)
            ]
        ids = self._text_ids(texts)
        encoded, start = [], len(problems)
        for index, steps in enumerate(solutions):
            prompt_ids = self._head_ids + ids[index] + self._tail_ids
            encoded.append(self._join(prompt_ids, ids[start : start + len(steps)]))
            start += len(steps)
        return encoded

    def _encode_joined(self, problems: Sequence[str], solutions: Sequence[Sequence[str]]) -> list[EncodedSolution]:
        """Ids of layout version 2, in which the texts are joined before they are tokenized."""
        written = [write_pieces(self._joined, *pair) for pair in zip(problems, solutions, strict=True)]
        tokenized = self._tokenized([piece for pieces, _ in written for piece in pieces])
        encoded = []
        for index, (problem, steps, (pieces, ends)) in enumerate(zip(problems, solutions, written, strict=True)):
            ids, positions, merged = join_ids(pieces, ends, tokenized)
            cuts: set[int] = set()
            while not merged <= cuts:
                # The separator must be a token of its own: the text after it is tokenized apart.
                cuts |= merged
                pieces, ends = write_pieces(self._joined, problem, steps, cuts)
                ids, positions, merged = join_ids(pieces, ends, self._tokenized(pieces))
            if merged:
                raise ValueError(
                    f"the tokenizer has no token that ends where the separator {self.separator_token!r} ends after "
                    f"step {min(merged) + 1} of solution {index}; choose a separator that it keeps"
                )
            kept = [position for position in positions if self.max_length is None or position < self.max_length]
            ids = ids[: kept[-1] + 1 if kept else self.max_length]
            encoded.append(EncodedSolution(ids, [position + self.score_offset for position in kept], len(ends)))
        return encoded

    def _tokenized(self, pieces: Sequence[Piece]) -> dict[str, TokenizedText]:
        """The texts among the pieces, with their ids and these ids' characters."""
        texts = list(dict.fromkeys(piece for piece in pieces if isinstance(piece, str)))
        offsets: list[list[tuple[int, int]]] = []
        ids = self._text_ids(texts, offsets) if texts else []
        return dict(zip(texts, zip(ids, offsets, strict=True), strict=True))

    def pad(
        self,
        encoded: Sequence[EncodedSolution],
        *,
        padding_side: str = "right",
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Pad B encoded solutions to the arrays that `__call__` returns."""
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side must be 'right' or 'left', got {padding_side!r}")
        length = max(len(item.input_ids) for item in encoded)
        most_steps = max(len(item.step_positions) for item in encoded)
        columns: dict[str, list[list[int]]] = {name: [] for name in self.model_input_names}
        for item in encoded:
            missing = length - len(item.input_ids)
            padding, mask = [self.pad_token_id] * missing, [1] * len(item.input_ids)
            if padding_side == "right":
                columns["input_ids"].append(item.input_ids + padding)
                columns["attention_mask"].append(mask + [0] * missing)
                positions = item.step_positions
            else:
                columns["input_ids"].append(padding + item.input_ids)
                columns["attention_mask"].append([0] * missing + mask)
                positions = [position + missing for position in item.step_positions]
            columns["step_positions"].append(positions + [-1] * (most_steps - len(positions)))
        return BatchEncoding(columns, tensor_type=return_tensors)

    def to_dict(self) -> dict[str, Any]:
        output: dict[str, Any] = super().to_dict()
        output["ids_probe"] = self.ids_probe
        return output

    def _join(self, prompt_ids: list[int], steps_ids: Sequence[list[int]]) -> EncodedSolution:
        input_ids, positions = list(prompt_ids), []
        for index, step_ids in enumerate(steps_ids):
            addition = (self._joiner_ids if index else []) + step_ids + self.separator_ids
            if self.max_length is not None and len(input_ids) + len(addition) > self.max_length:
                break
            input_ids += addition
            positions.append(len(input_ids) - 1 + self.score_offset)
        return EncodedSolution(input_ids, positions, len(steps_ids))

    def _text_ids(self, texts: list[str], offsets: list[list[tuple[int, int]]] | None = None) -> list[list[int]]:
        """Ids of texts of users, in which special tokens are plain text.

        The list `offsets` is filled with the first and last character of each token.
        """
        ids = self._ids_without_specials(texts, offsets)
        for row, text_ids in enumerate(ids):
            if not self._spelled.keys().isdisjoint(text_ids):
                spelled = [self._spelled.get(token_id, [token_id]) for token_id in text_ids]
                ids[row] = [piece for pieces in spelled for piece in pieces]
                if offsets is not None:
                    pairs = zip(spelled, offsets[row], strict=True)
                    offsets[row] = [offset for pieces, offset in pairs for _ in pieces]
        if self.separator_is_reserved:
            for text, text_ids in zip(texts, ids, strict=True):
                if self.separator_token_id in text_ids:
                    raise ValueError(
                        f"the separator {self.separator_token!r} came out of the text {text[:80]!r}, so it is not "
                        "reserved for step ends; choose a separator that is a special token of its own"
                    )
        return ids

    def _ids_without_specials(
        self, texts: list[str], offsets: list[list[tuple[int, int]]] | None = None
    ) -> list[list[int]]:
        """Ids of texts in which the tokenizer looks for no special token."""
        encoding = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=offsets is not None,
            verbose=False,
        )
        ids: list[list[int]] = encoding["input_ids"]
        if offsets is not None:
            offsets += encoding["offset_mapping"]
        if (backend := getattr(self.tokenizer, "backend_tokenizer", None)) is not None:
            # The call above leaves its choice there.
            backend.encode_special_tokens = self.tokenizer.split_special_tokens
        return ids

    def _spell_specials(self) -> dict[int, list[int]]:
        """Special ids, each with the ids of its name in two pieces.

        The names are entries of most Unigram vocabularies, where text gives the special id by itself.
        """
        names = sorted(_special_tokens(self.tokenizer) - {self.tokenizer.unk_token})
        pieces = (
            self._ids_without_specials([piece for name in names for piece in (name[:1], name[1:])]) if names else []
        )
        name_ids = self.tokenizer.convert_tokens_to_ids(names)
        return {name_ids[i]: pieces[2 * i] + pieces[2 * i + 1] for i in range(len(names))}

    def _template_ids(self, text: str) -> list[int]:
        """Ids of template text, in which special tokens are themselves."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _probe(self) -> str:
        ids = self._template_ids(_PROBE + self.separator_token)
        return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()


def separator_id(tokenizer: PreTrainedTokenizerBase, separator_token: str) -> int:
    """The one id of the separator.

    Raises:
        ValueError: the separator is not in the vocabulary and not one token as text either.
    """
    token_id = tokenizer.convert_tokens_to_ids(separator_token)
    if token_id is not None and (token_id != tokenizer.unk_token_id or separator_token == tokenizer.unk_token):
        return int(token_id)
    ids = tokenizer(separator_token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ValueError(
            f"the separator {separator_token!r} is not one token of this tokenizer's vocabulary (it gives {ids}); "
            "PRMForStepScoring.from_backbone adds it to tokenizer and backbone together"
        )
    return int(ids[0])


def separator_ids(tokenizer: PreTrainedTokenizerBase, separator_token: str, *, is_reserved: bool) -> list[int]:
    """The ids of a separator that is written as it stands.

    Raises:
        ValueError: a reserved separator is not one token.
    """
    if not separator_token:
        return []
    try:
        return [separator_id(tokenizer, separator_token)]
    except ValueError:
        ids = tokenizer(separator_token, add_special_tokens=False)["input_ids"]
        if is_reserved or tokenizer.unk_token_id in ids:
            raise
        return list(ids)


def _as_batch(problem: Any, steps: Any, step_delimiter: str | None) -> tuple[list[str], list[list[str]]]:
    """Check and bring single and batched arguments to B problems and B lists of steps."""
    single = isinstance(problem, str)
    problems = [problem] if single else list(problem)
    solutions = [steps] if single else list(steps)
    if len(problems) != len(solutions):
        raise ValueError(f"got {len(problems)} problems and {len(solutions)} solutions; give one solution a problem")
    if not problems:
        raise ValueError("got an empty batch; give at least one problem with its steps")
    batch = []
    for index, (text, solution) in enumerate(zip(problems, solutions, strict=True)):
        if isinstance(solution, str) and step_delimiter is not None:
            solution = [piece for piece in solution.split(step_delimiter) if piece.strip()]
        batch.append(check_solution(text, solution, index))
    return problems, batch


def check_solution(problem: Any, steps: Any, index: int) -> list[str]:
    """The steps of the solution with this 0-based index as a list.

    Raises:
        TypeError: the problem or a step is not a string, or the steps are one.
        ValueError: the problem or a step is empty, or there is no step.
    """
    if not isinstance(problem, str):
        raise TypeError(f"problem {index} must be a string, got {type(problem).__name__}")
    if not problem.strip():
        raise ValueError(f"problem {index} is empty; give its text")
    if isinstance(steps, str):
        raise TypeError(
            f"solution {index} is one string; give a list of steps, or say where to cut it with step_delimiter"
        )
    # A dictionary, a set or a result can be iterated too, but not to the steps.
    if not isinstance(steps, Iterable) or isinstance(steps, (Mapping, Set)) or hasattr(steps, "step_probs"):
        raise TypeError(
            f"solution {index} must be a list of steps or a text, got {type(steps).__name__}; give its steps, in order"
        )
    steps = list(steps)
    for number, step in enumerate(steps, start=1):
        if not isinstance(step, str):
            raise TypeError(f"step {number} of solution {index} must be a string, got {type(step).__name__}")
        if not step.strip():
            raise ValueError(f"step {number} of solution {index} is empty; leave it out or give its text")
    if not steps:
        raise ValueError(f"solution {index} has no step; give at least one")
    _check_characters(problem, steps, index)
    return steps


def _check_characters(problem: str, steps: Sequence[str], index: int) -> None:
    """Refuse halves of surrogate pairs, which a text cut within an escaped emoji holds and no tokenizer reads."""
    for number, text in enumerate((problem, *steps)):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            name = f"step {number} of solution {index}" if number else f"problem {index}"
            raise ValueError(
                f"{name} holds half of a surrogate pair, {text!r:.80}; decode its source with the right encoding"
            ) from None


def _bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts before any text."""
    bare = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    full = tokenizer(_PROBE)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start])
    return []


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return {token for token in [*added, *tokenizer.all_special_tokens] if token}


def _special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    tokens = sorted(_special_tokens(tokenizer), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def _split_after_last_special(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, str]:
    end = max((match.end() for match in _special_pattern(tokenizer).finditer(text)), default=0)
    return text[:end], text[end:]


def _split_before_first_special(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, str]:
    match = _special_pattern(tokenizer).search(text)
    start = match.start() if match else len(text)
    return text[:start], text[start:]
