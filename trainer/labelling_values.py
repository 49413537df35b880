"""Values of arithmetic expressions, and whether two of them agree as people write them; for `labelling_arithmetic`.

Nothing is run: expressions are parsed with `ast`, computed as fractions, and refused where they are no plain
arithmetic or grow too large.
"""

from __future__ import annotations

import ast
import itertools
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

_LONGEST_EXPRESSION = 200
_LARGEST_EXPONENT = 64
_LARGEST_BITS = 512


@dataclass(frozen=True)
class FalseEquation:
    """An equation that does not hold: its text as it was read, and the values of its sides."""

    text: str
    left: float
    right: float


class Side(NamedTuple):
    """An expression beside an equals sign: its text for `ast`, whether it computes anything, and its first operand."""

    text: str
    has_operator: bool
    first: str


class _Range(NamedTuple):
    """The values that a rounded number may stand for, ends included."""

    low: Fraction
    high: Fraction


def compare(left: Side, right: Side, sign: str, *, loose: bool, running: bool) -> list[FalseEquation | None]:
    """One entry where both sides have a value, none otherwise."""
    values: list[tuple[_Range, _Range]] = []
    for left_percent, right_percent in itertools.product((True, False), repeat=2):
        if ("%" not in left.text and not left_percent) or ("%" not in right.text and not right_percent):
            continue
        first, second = _evaluate(left.text, left_percent), _evaluate(right.text, right_percent)
        if first is None or second is None:
            return []
        values.append((first, second))
        # In `3 * 4 = 12 + 5 = 17` what follows the sign is 12.
        if running and right.has_operator and (operand := _evaluate(right.first, right_percent)) is not None:
            values.append((first, operand))
    if any(_agree(first, second, left, right, loose) for first, second in values):
        return [None]
    first, second = values[0]
    middle = [float(value.low + value.high) / 2 for value in (first, second)]
    return [FalseEquation(f"{left.text} {sign} {right.text}", *middle)]


def _agree(first: _Range, second: _Range, left: Side, right: Side, loose: bool) -> bool:
    size = max(abs(first.low), abs(second.low))
    if max(first.low - second.high, second.low - first.high) <= size * Fraction(1, 10**9):
        return True
    if not left.has_operator and _stands_for(first, second, _last_place(left.text, loose)):
        return True
    if not right.has_operator:
        return _stands_for(second, first, _last_place(right.text, loose))
    return loose and max(first.low - second.high, second.low - first.high) <= size / 100


def _stands_for(shown: _Range, value: _Range, place: Fraction) -> bool:
    """Whether a number that is shown down to a place is the value, rounded or cut off there."""
    low, high = sorted((shown.low, shown.high)) if shown.low != shown.high else (shown.low, shown.low)
    down, up = (place / 2, place) if low >= 0 else (place, place / 2)
    return value.high >= low - down and value.low <= high + up and (place == 0 or value.low < high + place)


def _last_place(number: str, loose: bool) -> Fraction:
    """The unit of the last place of a decimal number; of a whole one, 1 where it is rounded and 0 otherwise."""
    _, _, decimals = number.strip("()-+ %").partition(".")
    if decimals:
        return Fraction(1, 10 ** len(decimals)) / (100 if "%" in number else 1)
    return Fraction(1) if loose else Fraction(0)


def _evaluate(text: str, percent_is_hundredth: bool) -> _Range | None:
    """The value of an expression, None where it has none or it is no plain arithmetic."""
    if percent_is_hundredth:
        text = re.sub(r"([\d.]+) %", r"(\1 * 0.01)", text).replace("%", "* 0.01")
    text = text.replace("%", "").replace("^", "**")
    if len(text) > _LONGEST_EXPRESSION:
        return None
    # Python reads 007 as a mistake.
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text.strip())
    try:
        return _value(ast.parse(text, mode="eval").body, text)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, text: str) -> _Range:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _number(ast.get_source_segment(text, node) or "")
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _value(node.operand, text)
        return _Range(-value.high, -value.low) if isinstance(node.op, ast.USub) else value
    if not isinstance(node, ast.BinOp):
        raise ValueError("no plain arithmetic")
    left, right = _value(node.left, text), _value(node.right, text)
    if isinstance(node.op, ast.Pow):
        return _power(left, right)
    compute = _COMPUTE.get(type(node.op))
    if compute is None:
        raise ValueError("no plain arithmetic")
    if isinstance(node.op, ast.Div) and right.low <= 0 <= right.high:
        raise ZeroDivisionError
    return _bounds(compute(a, b) for a in left for b in right)


_COMPUTE: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _power(base: _Range, exponent: _Range) -> _Range:
    power = exponent.low
    if power != exponent.high or power.denominator != 1 or abs(power) > _LARGEST_EXPONENT:
        raise ValueError("no plain arithmetic")
    if power < 0 and base.low <= 0 <= base.high:
        raise ZeroDivisionError
    return _bounds(value ** int(power) for value in base)


def _bounds(values: Iterable[Fraction]) -> _Range:
    found = list(values)
    if any(max(value.numerator.bit_length(), value.denominator.bit_length()) > _LARGEST_BITS for value in found):
        raise OverflowError
    return _Range(min(found), max(found))


def _number(text: str) -> _Range:
    """A number; one whose decimals look like a rounded fraction's (3.33, 0.143) as all that it may stand for."""
    value = Fraction(text)
    decimals = text.partition(".")[2]
    is_rounded = len(decimals) >= 2 and (decimals.endswith(("33", "66", "67")) or len(decimals) >= 3)
    spread = Fraction(1, 10 ** len(decimals)) if is_rounded else Fraction(0)
    return _Range(value - spread / 2, value + spread)
