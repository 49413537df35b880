"""Layout version 2: all that stands between two special tokens is tokenized as one text."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

# A text, or the id of a special token.
Piece = str | int
# The ids of a text, and the first and last character of each.
TokenizedText = tuple[list[int], list[tuple[int, int]]]


class JoinedTemplates(NamedTuple):
    """The texts around a problem and its steps, each cut at its special tokens."""

    before_problem: list[Piece]
    after_problem: list[Piece]
    before_step: list[Piece]
    after_step: list[Piece]
    separator: list[Piece]
    joiner: list[Piece]


def joined_templates(
    tokenizer: PreTrainedTokenizerBase,
    special_tokens: re.Pattern[str],
    bos_ids: Sequence[int],
    before_problem: str,
    after_problem: str,
    before_step: str,
    after_step: str,
    separator: str,
    joiner: str,
) -> JoinedTemplates:
    """The texts of the templates cut at the special tokens that they hold.

    Raises:
        ValueError: the tokenizer does not tell where its tokens are, or the separator has no end of its own.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"layout_version=2 needs a tokenizer that tells where its tokens are, which {type(tokenizer).__name__} "
            "does not; load one from a tokenizer.json"
        )
    if separator.endswith(" "):
        raise ValueError(
            f"the separator {separator!r} ends with a space, which joins the text that follows; with layout_version=2 "
            "put the space into step_joiner"
        )

    def cut(text: str) -> list[Piece]:
        return cut_at_specials(tokenizer, special_tokens, text)

    return JoinedTemplates(
        before_problem=[*bos_ids, *cut(before_problem)],
        after_problem=cut(after_problem),
        before_step=cut(before_step),
        after_step=cut(after_step),
        separator=cut(separator),
        joiner=cut(joiner),
    )


def cut_at_specials(tokenizer: PreTrainedTokenizerBase, special_tokens: re.Pattern[str], text: str) -> list[Piece]:
    """A template's text cut at its special tokens, which are given as ids."""
    pieces: list[Piece] = []
    end = 0
    for match in special_tokens.finditer(text):
        token_id = tokenizer.convert_tokens_to_ids(match[0])
        pieces += [text[end : match.start()], int(token_id)]
        end = match.end()
    return [piece for piece in [*pieces, text[end:]] if piece != ""]


class _Writer:
    """Pieces in a row, of which two texts side by side become one."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        # For each step, the piece in which its separator ends, and after how many of its characters.
        self.ends: list[tuple[int, int]] = []
        self._is_cut = False

    def add(self, parts: Sequence[Piece], number: int = 0) -> None:
        for part in parts:
            if isinstance(part, str):
                part = part.replace("{i}", str(number)) if number else part
                if self.pieces and isinstance(last := self.pieces[-1], str) and not self._is_cut:
                    self.pieces[-1] = last + part
                    continue
            self.pieces.append(part)
            self._is_cut = False

    def end_step(self, *, cut: bool) -> None:
        last = self.pieces[-1]
        self.ends.append((len(self.pieces) - 1, len(last) if isinstance(last, str) else 0))
        self._is_cut = cut


def write_pieces(
    templates: JoinedTemplates, problem: str, steps: Sequence[str], cuts: Collection[int] = ()
) -> tuple[list[Piece], list[tuple[int, int]]]:
    """One problem with its steps as texts and special ids.

    Args:
        templates: what stands around them.
        problem, steps: their texts.
        cuts: 0-based steps after whose separator a new text begins.

    Returns:
        The pieces, and for each step the index of the piece in which its separator ends with the number of that
        text's characters up to there.
    """
    writer = _Writer()
    writer.add(templates.before_problem)
    writer.add([problem])
    writer.add(templates.after_problem)
    for index, step in enumerate(steps):
        if index:
            writer.add(templates.joiner)
        writer.add(templates.before_step, index + 1)
        writer.add([step])
        writer.add(templates.after_step, index + 1)
        writer.add(templates.separator)
        writer.end_step(cut=index in cuts)
    return writer.pieces, writer.ends


def join_ids(
    pieces: Sequence[Piece], ends: Sequence[tuple[int, int]], tokenized: Mapping[str, TokenizedText]
) -> tuple[list[int], list[int], set[int]]:
    """The ids of the pieces, and where each step's separator ends.

    Args:
        pieces, ends: as `write_pieces` returns them.
        tokenized: for each text its ids and their first and last character.

    Returns:
        The ids, for each step the position of its separator's last token, and the 0-based steps whose separator is
        one token with the text that follows, as white space may be.
    """
    ids: list[int] = []
    starts: list[int] = []
    for piece in pieces:
        starts.append(len(ids))
        ids += [piece] if isinstance(piece, int) else tokenized[piece][0]
    positions, merged = [], set()
    for step, (number, end) in enumerate(ends):
        piece, token = pieces[number], 0
        if isinstance(piece, str):
            offsets = tokenized[piece][1]
            token = bisect_left(offsets, end, key=_first_character) - 1
            if token < 0 or offsets[token][1] != end:
                merged.add(step)
        positions.append(starts[number] + token)
    return ids, positions, merged


def _first_character(offset: tuple[int, int]) -> int:
    return offset[0]
