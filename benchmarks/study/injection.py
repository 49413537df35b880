"""Errors put into GSM8K's own solutions and carried through the lines after them, so that every label is exact.

The solutions say in annotations what each line computes: `She has 48/2 = <<48/2=24>>24 clips`. One line is changed:
another number or another operator in its calculation; or it is left out, so that what it started from stands in the
place of its result in the calculations after it. Every later line that uses a changed result is computed anew. A line
is wrong where a number that it states is another than in the right solution; all others are right.

Changes are made only where they are exact: the calculation stands in the line's text as it does in the annotation,
and the number that changes means one thing in the whole solution.

    wrong = inject_error(question, parse_solution(answer), random.Random(0))
    wrong.lines, wrong.labels  # ('... 48+2 = 50 clips', ...), (0.0, ...)
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

KINDS = ("another number", "another operator", "a line left out")

_ANNOTATION = re.compile(r"<<([^<>]*)>>")
# The models' solutions break off where they were too long, some within an annotation.
_HIDDEN = re.compile(r"<<[^<>]*(?:>>|$)")
_NUMBER = re.compile(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d])|\d+(?:\.\d+)?|\.\d+")
_TOKEN = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+|[-+*/()])")
_OTHER_OPERATORS = {"+": "-*", "-": "+", "*": "+/", "/": "*-"}
_MOST_PLACES = 2
_LARGEST = 10_000_000


@dataclass(frozen=True, kw_only=True)
class AnnotatedLine:
    """A line of a solution.

    Args:
        text: what is read, without annotations.
        tokens: the calculation as numbers, operators and brackets; empty where the line computes nothing.
        result: what it gives, None where there is nothing.
    """

    text: str
    tokens: tuple[str, ...] = ()
    result: Fraction | None = None


@dataclass(frozen=True, kw_only=True)
class WrongSolution:
    """A solution with one error: which of `KINDS`, the lines that are read, and a label each."""

    kind: str
    lines: tuple[str, ...]
    labels: tuple[float, ...]


def visible(line: str) -> str:
    """A line without its annotations, and without white space around it."""
    return _HIDDEN.sub("", line).strip()


def parse_solution(text: str) -> tuple[AnnotatedLine, ...] | None:
    """The lines of a solution; None where one computes twice, or what cannot be read or is not as annotated."""
    lines = []
    for raw in text.splitlines():
        if not visible(raw):
            continue
        annotations = _ANNOTATION.findall(raw)
        if not annotations:
            lines.append(AnnotatedLine(text=visible(raw)))
            continue
        calculation, sign, stated = annotations[0].rpartition("=")
        tokens = tokenize(calculation)
        if len(annotations) > 1 or not sign or tokens is None:
            return None
        result = evaluate(tokens)
        if result is None or to_number(stated) != result:
            return None
        lines.append(AnnotatedLine(text=visible(raw), tokens=tokens, result=result))
    return tuple(lines)


def tokenize(calculation: str) -> tuple[str, ...] | None:
    """Numbers, operators and brackets of a calculation, None where there is anything else."""
    tokens, place = [], 0
    calculation = calculation.strip()
    while place < len(calculation):
        match = _TOKEN.match(calculation, place)
        if match is None:
            return None
        tokens.append(match[1])
        place = match.end()
    return tuple(tokens) or None


def evaluate(tokens: Sequence[str]) -> Fraction | None:
    """The value of a calculation, None where it is none or divides by 0."""
    rest = list(tokens)
    try:
        value = _sum(rest)
    except (ValueError, IndexError, ZeroDivisionError):
        return None
    return None if rest else value


def _sum(rest: list[str]) -> Fraction:
    value = _product(rest)
    while rest and rest[0] in "+-":
        sign = rest.pop(0)
        term = _product(rest)
        value = value + term if sign == "+" else value - term
    return value


def _product(rest: list[str]) -> Fraction:
    value = _atom(rest)
    while rest and rest[0] in "*/":
        sign = rest.pop(0)
        factor = _atom(rest)
        value = value * factor if sign == "*" else value / factor
    return value


def _atom(rest: list[str]) -> Fraction:
    token = rest.pop(0)
    if token == "-":
        return -_atom(rest)
    if token == "(":
        value = _sum(rest)
        if rest.pop(0) != ")":
            raise ValueError("a bracket is not closed")
        return value
    return Fraction(token)


def to_number(text: str) -> Fraction | None:
    """A number as text, with commas or a currency sign, None where it is none."""
    text = text.strip().strip("$").replace(",", "")
    return Fraction(text) if re.fullmatch(r"-?(\d+(\.\d*)?|\.\d+)", text) and not text.endswith(".") else None


def show_number(value: Fraction, *, commas: bool = False) -> str | None:
    """A positive number as a solution would write it; None for one that needs more than two decimal places."""
    scaled = value * 10**_MOST_PLACES
    if scaled.denominator != 1 or value <= 0 or value > _LARGEST:
        return None
    whole = value.denominator == 1
    places = 0 if whole else _MOST_PLACES if (scaled.numerator % 10) else 1
    return f"{float(value):,.{places}f}" if commas else f"{float(value):.{places}f}"


def inject_error(question: str, lines: Sequence[AnnotatedLine], rng: random.Random) -> WrongSolution | None:
    """One error in a solution, of a kind and at a place drawn by `rng`, which changes the last line.

    Returns:
        None where none of the changes that were tried is exact.
    """
    kinds = list(KINDS)
    rng.shuffle(kinds)
    for kind in kinds:
        places = [place for place, line in enumerate(lines) if line.tokens]
        rng.shuffle(places)
        for place in places:
            wrong = change(kind, question, lines, place, rng)
            if wrong is not None:
                return wrong
    return None


def change(
    kind: str, question: str, lines: Sequence[AnnotatedLine], place: int, rng: random.Random
) -> WrongSolution | None:
    """The solution with an error of this kind in the calculation at this place, None where that is not exact.

    Args:
        kind: one of `KINDS`.
        question: the problem's text, whose numbers stand for something of their own.
        lines: of the right solution.
        place: of a line that computes something.
        rng: chooses among the numbers or the operators that it may be changed to.
    """
    line = lines[place]
    if kind == "a line left out":
        operands = [token for token in line.tokens if _is_number(token)]
        before = Fraction(operands[0]) if operands else None
        later = {Fraction(token) for other in lines[place + 1 :] for token in other.tokens if _is_number(token)}
        if before is None or before == line.result or line.result not in later:
            return None
        if not _means_one_thing(question, lines, place):
            return None
        kept = [*lines[:place], *lines[place + 1 :]]
        return _carry(kind, kept, place, {line.result: before}, [None] * len(kept))
    tokens = _other_number(line.tokens, rng) if kind == "another number" else _other_operator(line.tokens, rng)
    if tokens is None or not _means_one_thing(question, lines, place):
        return None
    result = evaluate(tokens)
    if result is None or result == line.result:
        return None
    text = _rewritten(line, tokens, result)
    if text is None:
        return None
    texts: list[str | None] = [None] * len(lines)
    texts[place] = text
    return _carry(kind, lines, place + 1, {line.result: result}, texts)


def _carry(
    kind: str,
    lines: Sequence[AnnotatedLine],
    start: int,
    changed: Mapping[Fraction | None, Fraction],
    texts: list[str | None],
) -> WrongSolution | None:
    """Compute the lines from `start` on anew with the results that have changed; None where that is not exact."""
    changed = dict(changed)
    for place in range(start, len(lines)):
        line = lines[place]
        if not any(to_number(number) in changed for number in _NUMBER.findall(line.text)):
            if line.tokens and any(_is_number(token) and Fraction(token) in changed for token in line.tokens):
                return None  # used without being seen
            continue
        if not line.tokens:
            if len(_NUMBER.findall(line.text)) > 1:
                return None  # which may be computed from each other without an annotation
            texts[place] = _replaced(line.text, changed)
        else:
            tokens = [_changed_token(token, changed) for token in line.tokens]
            if None in tokens:
                return None
            result = evaluate([token for token in tokens if token is not None])
            if result is None or (result != line.result and line.result in changed):
                return None
            text = _rewritten(line, tuple(token for token in tokens if token is not None), result)
            if text is None:
                return None
            texts[place] = text
            if result != line.result:
                changed[line.result] = result
        if texts[place] is None:
            return None
    if texts[-1] is None or texts[-1] == lines[-1].text:
        return None  # the error does not reach the answer
    read = tuple(new if new is not None else line.text for new, line in zip(texts, lines, strict=True))
    labels = tuple(float(new is None) for new in texts)
    return WrongSolution(kind=kind, lines=read, labels=labels)


def _means_one_thing(question: str, lines: Sequence[AnnotatedLine], place: int) -> bool:
    """Whether a line's result, and those computed from it on, stand for nothing else in problem and solution."""
    results = [line.result for line in lines[place:] if line.result is not None]
    given = {to_number(number) for number in _NUMBER.findall(question)}
    before = {to_number(number) for line in lines[:place] for number in _NUMBER.findall(line.text)}
    before |= {to_number(number) for number in _NUMBER.findall(lines[place].text.rpartition("=")[0])}
    if len(set(results)) < len(results) or not given.isdisjoint(results):
        return False
    return lines[place].result not in before


def _other_number(tokens: Sequence[str], rng: random.Random) -> tuple[str, ...] | None:
    """The calculation with one of its numbers a little larger or smaller, or a digit longer or shorter."""
    places = [place for place, token in enumerate(tokens) if _is_number(token)]
    if not places:
        return None
    place = rng.choice(places)
    value = Fraction(tokens[place])
    others = [value + step for step in (-2, -1, 1, 2)] + [value * 10, value / 10, value * 2]
    shown = [show_number(other) for other in others]
    candidates = [text for text in shown if text is not None and ("." in tokens[place] or "." not in text)]
    if not candidates:
        return None
    return (*tokens[:place], rng.choice(candidates), *tokens[place + 1 :])


def _other_operator(tokens: Sequence[str], rng: random.Random) -> tuple[str, ...] | None:
    """The calculation with one of its operators another."""
    # A sign in front of a number is no operator.
    places = [
        place
        for place, token in enumerate(tokens)
        if token in _OTHER_OPERATORS and place > 0 and (_is_number(tokens[place - 1]) or tokens[place - 1] == ")")
    ]
    if not places:
        return None
    place = rng.choice(places)
    return (*tokens[:place], rng.choice(_OTHER_OPERATORS[tokens[place]]), *tokens[place + 1 :])


def _rewritten(line: AnnotatedLine, tokens: Sequence[str], result: Fraction) -> str | None:
    """The line's text with another calculation and result.

    None where the calculation does not stand once in the text with an equals sign and the result behind it, or the
    result cannot be written.
    """
    calculation = r"\s*".join(rf"\$?{_as_pattern(token)}" for token in line.tokens)
    found = list(re.finditer(rf"(?<![\d.,])({calculation})(\s*=\s*)(\$?)({_NUMBER.pattern})", line.text))
    if len(found) != 1 or to_number(found[0][4]) != line.result:
        return None
    match = found[0]
    shown = show_number(result, commas="," in match[4])
    if shown is None:
        return None
    outside = line.text[: match.start()] + " " + line.text[match.end() :]
    used = {line.result, *(Fraction(token) for token in line.tokens if _is_number(token))}
    if any(to_number(number) in used for number in _NUMBER.findall(outside)):
        return None  # stated a second time, which may mean the same or not
    written = iter(tokens)
    pieces = re.split(f"({'|'.join([_NUMBER.pattern, '[-+*/()x×]'])})", match[1])
    rebuilt = []
    for piece, old in _pair_tokens(pieces, line.tokens):
        new = next(written) if old is not None else None
        rebuilt.append(piece if new is None or new == old else new)
    return line.text[: match.start()] + "".join(rebuilt) + match[2] + match[3] + shown + line.text[match.end() :]


def _pair_tokens(pieces: Sequence[str], tokens: Sequence[str]) -> list[tuple[str, str | None]]:
    """Each piece of a calculation's text with its token, None for what lies between them."""
    paired: list[tuple[str, str | None]] = []
    rest = list(tokens)
    for piece in pieces:
        is_token = bool(rest) and re.fullmatch(_as_pattern(rest[0]), piece) is not None
        paired.append((piece, rest.pop(0) if is_token else None))
    return paired


def _as_pattern(token: str) -> str:
    """A regular expression for a token as a text writes it."""
    if token == "*":
        return r"[*x×]"
    if not _is_number(token):
        return re.escape(token)
    value = Fraction(token)
    spellings = {token, token.removeprefix("0")} if token.startswith("0.") else {token}
    if value.denominator == 1:
        spellings.add(f"{value.numerator:,}")
    return f"(?:{'|'.join(map(re.escape, sorted(spellings, key=len, reverse=True)))})"


def _replaced(text: str, changed: Mapping[Fraction | None, Fraction]) -> str | None:
    """A text that computes nothing with its changed numbers; None where one cannot be written."""
    failed = False

    def new(match: re.Match[str]) -> str:
        nonlocal failed
        value = to_number(match[0])
        if value not in changed:
            return match[0]
        shown = show_number(changed[value], commas="," in match[0])
        failed = failed or shown is None
        return shown or match[0]

    result = _NUMBER.sub(new, text)
    return None if failed else result


def _changed_token(token: str, changed: Mapping[Fraction | None, Fraction]) -> str | None:
    """The token in place of this one, None where it cannot be written."""
    if not _is_number(token) or Fraction(token) not in changed:
        return token
    return show_number(changed[Fraction(token)])


def _is_number(token: str) -> bool:
    return token[0].isdigit() or token[0] == "."
