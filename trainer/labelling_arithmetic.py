"""Equations in the text of a step, evaluated: a step with a false one is marked wrong.

    false_equations("She has 3 + 4 = 8 eggs.")  # [FalseEquation(text='3 + 4 = 8', left=7.0, right=8.0)]
    arithmetic_labels(["10 / 3 = 3.33", "3.33 * 2 = 7"])  # [1.0, 0.0]

What is judged: `a = b` between two numeric expressions of which at least one has an operator. What is not sure to be
one is left alone: variables, functions, words that change a value (`5 squared`, `2 dozen`). So a step without a mark
may still be wrong: this reads arithmetic, not reasoning.

Read as people write: thousands' commas, currencies, units, `<<48/2=24>>` (GSM8K), `\\frac{1}{2}`, `\\times`, `×`, `÷`,
`x` between numbers, `2(3 + 4)`, `1 1/2`, `20% of 50`, a percent sign as a hundredth or as a unit, chains
`a = b = c`, and a running `3 * 4 = 12 + 5 = 17`. A decimal number stands for what rounds, or is cut off, to it; so does
a whole one behind `≈` or where the step speaks of rounding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .labelling_values import FalseEquation, Side, compare

_MOST_UNIT_WORDS = 3
# Far above a line of a solution: what is longer is damaged, and some patterns take its square in time.
_LONGEST_LINE = 5_000

_ANNOTATION = re.compile(r"<<([^<>\n]*)>>")
_LINE_HEAD = re.compile(r"^\s*(?:(?:[-*•+>#]+|\d{1,3}[.)])\s+|step\s+\d+\s*[:.)\-–—]+\s*)+", re.IGNORECASE)
_ROUNDS = re.compile(
    r"\b(?:round|rounded|rounding|about|approximately|approx|roughly|nearly|almost|remainder|remaining)\b|≈",
    re.IGNORECASE,
)


def _mixed_number(match: re.Match[str]) -> str:
    whole, upper, lower = match.groups()
    return f"({whole}+{upper}/{lower})" if len(lower) < 3 and int(upper) < int(lower) else match[0]


_REWRITES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = tuple(
    (re.compile(pattern), by)
    for pattern, by in (
        (r"(?<![\d.^])(\d+)\s*\\[dtc]?frac\s*\{(\d+)\}\s*\{(\d+)\}", r"(\1+\2/\3)"),
        (r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))"),
        (r"\\(?:times|cdot|ast)(?![A-Za-z])|[×·∗⋅]", "*"),
        (r"\\div(?![A-Za-z])|÷", "/"),
        (r"\\approx(?![A-Za-z])|≃|≅", "≈"),
        (r"\\(?:left|right)(?![A-Za-z])|\\[()\[\],;!: ]|\\?\$|[€£¥`]", " "),
        (r"\\%", "%"),
        (r"[−–—]", "-"),
        (r"<=|>=|!=|=>|->|~=|:=|≠|\\(?:neq?|leq?|geq?)(?![A-Za-z])", " ≠ "),
        (r"={2,}", "="),
        (r"(?<=\d)\{,\}(?=\d)|(?<=\d),(?=\d{3}(?!\d))", ""),
        (r"(?<=\d)\*\*(?=[-(\d])", "^"),
        (r"\*\*|__", " "),
        (r"(?<=[\d)%])(?:\s+[xX]\s*(?=[(.\d])|[xX]\s*(?=[.\d])|\s+[xX]\s+(?=-\d))", " * "),
        (r"\b(\d+)\s+(?:and\s+)?(\d+)/(\d+)(?![\d.])", _mixed_number),
        (r"/\s+(\d+/\d+)(?![\d./])", r"/ (\1)"),
        (r"\bdivided by\b", "/"),
        (r"(?<=[\d)])\s*\bpercent\b", "%"),
        (r"(?<=[\d)%])\s+times\s+(?=[-(.\d])", " * "),
        (r"(?<=[\d)%])\s+plus\s+(?=[-(.\d])", " + "),
        (r"(?<=[\d)%])\s+minus\s+(?=[-(.\d])", " - "),
        (r"(?<=%)\s+of\s+(?:the\s+)?(?=[(.\d])", " * "),
        (r"\b(\d+/\d+)\s+of\s+(?:the\s+)?(?=[(.\d])", r"(\1) * "),
    )
)
_TOKEN = re.compile(r"(?P<number>\d+(?:\.\d+)?|\.\d+)|(?P<word>[A-Za-z\\_'’]+)|(?P<sign>[-+*/^()=≈%])|(?P<other>\S)")
# A single letter is a variable, unless it stands apart and is the sign of a unit.
_UNIT_LETTERS = frozenset("mgslhLkKdC")
# Words that are no units: they join sentences, compute, or change what stands beside them.
_CONNECTING = frozenset(
    {"and", "or", "if", "then", "so", "but", "because", "since", "is", "are", "was", "were", "as", "at", "when"}
    | {"where", "that", "which"}
)
_PREPOSITIONS = frozenset(("of", "to", "from", "than", "by", "over", "plus", "minus", "times", "sum"))
_FUNCTIONS = frozenset(
    {"squared", "cubed", "factorial", "twice", "double", "triple", "mod", "modulo", "sqrt", "log", "ln", "sin", "cos"}
    | {"tan", "exp", "gcd", "lcm", "max", "min", "choose", "power", "square", "cube", "root", "remainder", "thrice"}
    | {"dozen", "dozens", "hundred", "thousand", "million", "billion", "trillion", "half", "halves", "third", "quarter"}
    | {"pi", "e", "i", "\\pi", "\\sqrt"}
)
_NO_UNITS = _CONNECTING | _PREPOSITIONS | _FUNCTIONS
_OPERATORS = "+-*/^"
_MARKS = ".,;:?\"'“”‘|&~[{}]!"


class _Token(NamedTuple):
    kind: str
    text: str
    glued: bool  # to the token before


def arithmetic_labels(steps: Sequence[str], *, unchecked: float = 1.0) -> list[float]:
    """A label a step: 0 where an equation in it is false, 1 where all that could be judged hold.

    Args:
        steps: the steps of a solution.
        unchecked: the label of a step in which no equation could be judged, such as -100 for none.
    """
    labels = []
    for step in steps:
        judged = _judge(step)
        labels.append(unchecked if not judged else 1.0 if all(fault is None for fault in judged) else 0.0)
    return labels


def false_equations(text: str) -> list[FalseEquation]:
    """The equations of a text that do not hold, in order."""
    return [fault for fault in _judge(text) if fault is not None]


def count_equations(text: str) -> int:
    """How many equations of a text can be judged."""
    return len(_judge(text))


def _judge(text: str) -> list[FalseEquation | None]:
    """An entry for each equation that can be judged: what is wrong with it, or None."""
    rounds = _ROUNDS.search(text) is not None
    judged: list[FalseEquation | None] = []
    for line in text.splitlines():
        for inner in _ANNOTATION.findall(line):
            judged += _judge_line(inner, rounds)
        judged += _judge_line(_LINE_HEAD.sub("", _ANNOTATION.sub("", line)), rounds)
    return judged


def _judge_line(line: str, rounds: bool) -> list[FalseEquation | None]:
    if len(line) > _LONGEST_LINE:
        return []
    for pattern, by in _REWRITES:
        line = pattern.sub(by, line)
    segments: list[list[_Token]] = [[]]
    signs: list[str] = []
    for match in _TOKEN.finditer(line):
        token = _Token(match.lastgroup or "", match[0], match.start() > 0 and not line[match.start() - 1].isspace())
        if token.text in ("=", "≈"):
            signs.append(token.text)
            segments.append([])
        else:
            segments[-1].append(token)
    judged: list[FalseEquation | None] = []
    for index, sign in enumerate(signs):
        left, right = _last_expression(segments[index]), _first_expression(segments[index + 1])
        # In `week 4 = 3 + 4` the first 4 is a name; between two equals signs a number is a value.
        is_value = index > 0 and all(token.kind != "word" for token in segments[index])
        if left is None or right is None or not (left.has_operator or (is_value and right.has_operator)):
            continue
        goes_on = index + 1 < len(signs)
        judged += compare(left, right, sign, loose=rounds or sign == "≈", running=goes_on)
    return judged


def _last_expression(tokens: Sequence[_Token]) -> Side | None:
    """The expression at the end of what stands left of an equals sign, None where it cannot be told."""
    end = _without_units(tokens, len(tokens))
    parts: list[str] = []
    position = end
    while True:
        start = _operand_start(tokens, position)
        if start is None:
            return None
        parts.append(_as_python(tokens[start:position]))
        before = tokens[start - 1] if start else None
        if before is None or before.text not in _OPERATORS:
            # `2 (3 + 4)` and `(1 + 2)(3 + 4)`
            if before is not None and tokens[start].text == "(" and (before.kind == "number" or before.text in ")%"):
                parts.append("*")
                position = start
                continue
            return _side(parts[::-1]) if _is_clean(before, tokens[start]) else None
        parts.append(before.text)
        # Of a power, no word stands for the base.
        position = _without_units(tokens, start - 1) if before.text != "^" else start - 1
        if position == 0 or tokens[position - 1].text in ("(", *_OPERATORS):
            # A sign, not an operation: `3 * -4`, or `-4` at the beginning.
            if before.text not in "+-":
                return None
            if position == 0 or tokens[position - 1].text == "(":
                return _side(parts[::-1])
            if tokens[position - 1].text not in "*/^+-":
                return None
            parts[-2:] = [f"({before.text}{parts[-2]})", tokens[position - 1].text]
            position = _without_units(tokens, position - 1)


def _operand_start(tokens: Sequence[_Token], end: int) -> int | None:
    """Where the number or bracket starts that ends before `end`."""
    position = end
    while position and tokens[position - 1].text == "%":
        position -= 1
    if not position:
        return None
    token = tokens[position - 1]
    if token.kind == "number":
        return position - 1
    if token.text != ")":
        return None
    depth = 0
    for index in range(position - 1, -1, -1):
        if tokens[index].text in "()":
            depth += 1 if tokens[index].text == ")" else -1
            if depth == 0:
                return index
    return None


def _without_units(tokens: Sequence[_Token], end: int) -> int:
    """Where what ends before `end` ends without the unit behind it; `end` where there is no unit that is sure."""
    position = end
    for _ in range(_MOST_UNIT_WORDS):
        if position == 0 or tokens[position - 1].kind != "word" or not _is_unit(tokens[position - 1]):
            break
        position -= 1
        if position > 1 and tokens[position - 1].text == "/" and tokens[position - 2].kind in ("number", "word"):
            position -= 1  # 5 km/h, $5/hour
    if position and (tokens[position - 1].kind == "number" or tokens[position - 1].text in ")%"):
        return position
    return end


def _is_unit(token: _Token) -> bool:
    if token.text.lower() in _NO_UNITS or token.text.startswith("\\"):
        return False
    return len(token.text) > 1 or (token.text in _UNIT_LETTERS and not token.glued)


def _is_clean(before: _Token | None, first: _Token) -> bool:
    """Whether an expression may begin behind this token."""
    if before is None or before.text == "(":
        return True
    if before.kind == "word":
        if first.glued or before.text.lower() in _FUNCTIONS - {"i"} | {"plus", "minus", "sum"}:
            return False  # f(2), x2, log 5
        return len(before.text) > 1 or before.text in "aAI"
    # 5:30 and 3.x are no sentences' ends.
    return before.kind == "other" and before.text in _MARKS and not (first.glued and before.text in ".:|!")


def _first_expression(tokens: Sequence[_Token]) -> Side | None:
    """The expression at the beginning of what stands right of an equals sign, None where it cannot be told."""
    parts: list[str] = []
    position = 0
    while True:
        sign = ""
        if position < len(tokens) and tokens[position].text in ("-", "+"):
            sign, position = tokens[position].text, position + 1
        end = _operand_end(tokens, position)
        if end is None:
            return None
        operand = _as_python(tokens[position:end])
        parts.append(f"({sign}{operand})" if sign else operand)
        behind_units = _behind_units(tokens, end)
        if behind_units is None:
            return None
        position = behind_units
        after = tokens[position] if position < len(tokens) else None
        if after is not None and after.text == "(" and position == end and _operand_end(tokens, position) is not None:
            if any(token.kind == "word" for token in tokens[position : _operand_end(tokens, position)]):
                return None if tokens[position].glued else _side(parts)  # 24 (since ...)
            parts.append("*")
            continue
        if after is None or after.text not in _OPERATORS:
            if after is None or after.kind == "word" or after.text in '.,;)("”’]}&|≠':
                return _side(parts)
            is_end = after.text in ":!" and not (position + 1 < len(tokens) and tokens[position + 1].glued)
            return _side(parts) if is_end else None
        behind = tokens[position + 1] if position + 1 < len(tokens) else None
        if after.text == "-" and behind is not None and behind.kind == "word" and _is_unit(behind):
            return _side(parts)  # 24 - that is all
        parts.append(after.text)
        position += 1


def _operand_end(tokens: Sequence[_Token], start: int) -> int | None:
    if start >= len(tokens):
        return None
    position = start + 1
    if tokens[start].text == "(":
        depth = 1
        while position < len(tokens) and depth:
            depth += {"(": 1, ")": -1}.get(tokens[position].text, 0)
            position += 1
        if depth:
            return None
    elif tokens[start].kind != "number":
        return None
    while position < len(tokens) and tokens[position].text == "%":
        position += 1
    return position


def _behind_units(tokens: Sequence[_Token], start: int) -> int | None:
    """Where what follows an operand goes on behind its unit; None where what follows may change its value."""
    position = start
    for count in range(_MOST_UNIT_WORDS + 1):
        if position >= len(tokens) or tokens[position].kind != "word":
            break
        word = tokens[position]
        if not _is_unit(word):
            if word.text.lower() in _CONNECTING:
                return start
            return start if count and word.text.lower() in _PREPOSITIONS else None
        position += 1
    following = tokens[position] if position < len(tokens) else None
    if position > start and following is not None and following.text == "/":
        is_rate = position + 1 < len(tokens) and tokens[position + 1].kind == "word"
        return len(tokens) if is_rate else position
    # Behind more words than a unit has, what follows is a sentence.
    return position if following is None or following.text in _OPERATORS else start


def _as_python(tokens: Sequence[_Token]) -> str:
    """An operand's tokens as text; words in brackets, where they are no units, are kept and refused later."""
    kept: list[str] = []
    for index, token in enumerate(tokens):
        behind_number = index > 0 and (tokens[index - 1].kind in ("number", "word") or tokens[index - 1].text in ")%")
        if token.kind == "word" and behind_number and _is_unit(token):
            continue
        if token.text == "(" and index and (tokens[index - 1].kind == "number" or tokens[index - 1].text in ")%"):
            kept.append("*")
        kept.append(token.text)
    return " ".join(kept)


def _side(parts: Sequence[str]) -> Side:
    text = " ".join(parts)
    return Side(text, any(sign in text.strip(" (-+)") for sign in _OPERATORS), parts[0])
