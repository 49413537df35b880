r"""Final answers of solutions: found in a text, brought to one form, compared and grouped.

    extract_answer("So it is half, \\boxed{\\frac12}.")  # '\\frac12'
    answers_equal("1/2", "\\frac12")  # True
    group_answers(["0.5", "7", None, "\\frac12"])  # [0, 1, None, 0] with math-verify

Two answers are equal where their normalized strings are, and otherwise where `math-verify` (extra `math`)
finds them equal. Where it is not installed only the first holds: `describe_comparison` says which is in use.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import re
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, get_args

Comparison = Literal["auto", "math-verify", "string"]

_TIMEOUT_SECONDS = 5
_INSTALL = 'run `pip install "modeling-prm[math]"`'

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_HASHES = re.compile(r"####[^\S\n]*(\S.*)")
_STATED = re.compile(r"\banswer(?:\s+is\b\s*:?|\s*[:=])[\s*_]*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?=\s|$)")

_PLAIN_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# A minus right behind a number or a bracket takes away; elsewhere it belongs to the number.
_LAST_NUMBER = re.compile(
    rf"(?:(?<![\w)\]}}])-)?\$?(?:\\[dt]?frac\{{\d+\}}\{{\d+\}}|(?:{_PLAIN_NUMBER})(?:/\d+)?(?:\\?%)?)"
)
_NUMBER = re.compile(rf"([-+]?)({_PLAIN_NUMBER}|\d+\.)")
_INTEGER = re.compile(r"-?\d+")

_WRAPPERS = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (r"\$\$(.+)\$\$", r"\$([^$]+)\$", r"\\\((.+)\\\)", r"\\\[(.+)\\\]", r"\*\*([^*]+)\*\*", r"`([^`]+)`")
)
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_UNIT_IN_TEXT = re.compile(r"(?<=[\d}])\s*\\(?:text|textrm|mathrm|mbox)\s*\{([^{}]*)\}(?:\^\{?\d\}?)?$")
_UNIT_IN_WORDS = re.compile(rf"([-+]?(?:{_PLAIN_NUMBER})%?)\s+([A-Za-z]{{2,}}(?:[ /][A-Za-z]+)*)")
# Words behind a number that change its value or tell two answers with that number apart.
_NO_UNIT = re.compile(
    r"\b(?:am|pm|and|or|to|of|by|with|more|less|than|not|half|quarter|third|dozen|hundred|thousand|million|billion|"
    r"trillion|percent|squared|cubed|factorial|plus|minus|times|over|remainder|pi|sqrt|sin|cos|tan|log|ln|exp)\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[A-Za-z*]+\}")


def extract_answer(text: str) -> str | None:
    r"""The final answer that a solution states, None where it states none.

    The first of these that is found, the last of its kind where there are several:

    1. what stands in `\boxed{...}` (or `\fbox{...}`), braces balanced, empty ones left out;
    2. the rest of the line behind `####` (GSM8K);
    3. the sentence's rest behind "the answer is", "answer:" or "answer =";
    4. the last number or fraction.

    Raises:
        TypeError: the text is no string.
    """
    if not isinstance(text, str):
        raise TypeError(f"the text of a solution must be a string, got {type(text).__name__}")
    for start in reversed([match.end() for match in _BOX.finditer(text)]):
        content = _balanced(text, start)
        if content and content.strip():
            return content.strip()
    if hashes := _HASHES.findall(text):
        return hashes[-1].strip()
    for start in reversed([match.end() for match in _STATED.finditer(text)]):
        line = text[start:].partition("\n")[0]
        answer = _SENTENCE_END.split(line, maxsplit=1)[0].strip().rstrip(",;*_").strip()
        if answer.endswith(")") and "(" not in answer:
            answer = answer[:-1].rstrip()
        if answer:
            return answer
    numbers = _LAST_NUMBER.findall(text)
    return numbers[-1] if numbers else None


def normalize_answer(answer: str) -> str:
    r"""One string for the spellings of an answer that differ in form only.

    Taken away: white space, delimiters of mathematics (`$`, `\(`, `\boxed`) and markdown, `\left` and
    `\right`, currency, degree and percent signs, commas of thousands, needless zeros and plus signs, the unit
    behind a number, a leading `x =`, a full stop. `\dfrac12` and `1/2` become `\frac{1}{2}`; text of words is
    folded to lower case. It decides on form alone: `0.5` and `1/2` stay two answers. In the manner of the
    normalization of MATH (2103.03874).
    """
    text = _cleaned(answer).removesuffix("%").rstrip()
    if _is_words(text):
        return text.casefold()
    text = re.sub(r"\s+", "", text)
    text = re.sub(r"^[A-Za-z]=(?=[^=]+$)", "", text)
    text = re.sub(r"^\(([A-Za-z])\)$", r"\1", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"^([-+]?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"\\sqrt(\d)(?!\d)", r"\\sqrt{\1}", text)
    if number := _NUMBER.fullmatch(text):
        return _plain_number(*number.groups())
    return text


def answers_equal(reference: str, answer: str | None, *, comparison: Comparison = "auto") -> bool:
    """Whether an answer equals the reference; no answer (None) equals nothing.

    Args:
        reference: the answer that counts as right; math-verify's comparison is not quite symmetric.
        answer: the answer that is compared with it.
        comparison: `"math-verify"`; `"string"`, by normalized strings only; `"auto"`, the first where it is
            installed. What is words (`Tuesday`) is compared as a string always: as mathematics it would be a
            product of letters, equal to each of its anagrams.

    Raises:
        ImportError: math-verify is asked for and not installed.
        ValueError: there is no such comparison.
    """
    by_math = resolve_comparison(comparison) == "math-verify"
    if answer is None:
        return False
    first, second = normalize_answer(reference), normalize_answer(answer)
    if first == second:
        return first != ""
    if not by_math:
        return False
    cleaned = _cleaned(reference), _cleaned(answer)
    if any(not text or _is_words(text) for text in cleaned):
        return False
    if _INTEGER.fullmatch(first) and _INTEGER.fullmatch(second) and not any("%" in text for text in cleaned):
        return False  # which math-verify would say too, a thousand times slower
    return _equal_by_math(*cleaned)


def group_answers(answers: Sequence[str | None], *, comparison: Comparison = "auto") -> list[int | None]:
    """Groups of equal answers, numbered from 0 in the order in which they are seen first.

    An answer joins the first group whose first answer equals it, whichever of the two is taken as the
    reference. (Rounding makes math-verify's comparison intransitive, so the order can matter.)

    Args:
        answers: N answers, None where a solution has none.
        comparison: as in `answers_equal`.

    Returns:
        N group numbers, None where there is no answer or an empty one.

    Raises:
        ImportError, ValueError: as `answers_equal`.
    """
    comparison = resolve_comparison(comparison)
    first_of_group: list[str] = []
    known: dict[str, int] = {}
    groups: list[int | None] = []
    for answer in answers:
        # The percent sign is lost in the normalized form, but not on math-verify.
        key = "" if answer is None else normalize_answer(answer) + "%" * _cleaned(answer).endswith("%")
        if answer is None or not key:
            groups.append(None)
            continue
        if key not in known:
            equal = (
                number
                for number, first in enumerate(first_of_group)
                if answers_equal(first, answer, comparison=comparison)
                or answers_equal(answer, first, comparison=comparison)
            )
            known[key] = next(equal, len(first_of_group))
            if known[key] == len(first_of_group):
                first_of_group.append(answer)
        groups.append(known[key])
    return groups


def resolve_comparison(comparison: Comparison) -> Literal["math-verify", "string"]:
    """The comparison that is in use, after `"auto"` has looked for math-verify.

    Raises:
        ImportError: math-verify is asked for and not installed.
        ValueError: there is no such comparison.
    """
    if comparison not in get_args(Comparison):
        raise ValueError(f"there is no comparison {comparison!r}; choose one of {', '.join(get_args(Comparison))}")
    if comparison == "string":
        return "string"
    try:
        import_math_verify()
    except ImportError:
        if comparison == "math-verify":
            raise
        return "string"
    return "math-verify"


def describe_comparison(comparison: Comparison) -> str:
    """The comparison in use in words, for reports: with its version, or why it is the lesser one.

    Raises:
        ImportError, ValueError: as `resolve_comparison`.
    """
    if resolve_comparison(comparison) == "math-verify":
        return f"by math-verify {importlib.metadata.version('math-verify')}"
    if comparison == "string":
        return "by normalized strings"
    return f"by normalized strings only, since math-verify is not installed ({_INSTALL})"


def import_math_verify() -> ModuleType:
    """The module `math_verify`, or an ImportError that says how to install it."""
    try:
        return importlib.import_module("math_verify")
    except ImportError as error:
        raise ImportError(f"comparing answers as mathematics needs math-verify, not installed: {_INSTALL}") from error


def _balanced(text: str, start: int) -> str | None:
    """What stands before the brace that closes one opened before `start`, None where none does."""
    depth, position = 1, start
    while position < len(text):
        sign = text[position]
        if sign == "\\":
            position += 1  # an escaped brace is text
        elif sign in "{}":
            depth += 1 if sign == "{" else -1
            if depth == 0:
                return text[start:position]
        position += 1
    return None


def _cleaned(answer: str) -> str:
    """The answer without what has no meaning in it; white space stays where it may part words."""
    text = _unwrapped(answer)
    text = re.sub(r"(?<!\\)\\[!,;:\s]|\\q?quad(?![A-Za-z])|~", " ", text)
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])", "", text)
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|°|\\degree(?![A-Za-z])", "", text)
    text = text.replace("\\%", "%").replace("{,}", ",").replace("−", "-").replace("\\$", "").replace("π", r"\pi ")
    text = re.sub(r"[$€£]", "", text)
    text = _UNIT_IN_TEXT.sub(lambda unit: "" if _is_unit(unit[1]) else unit[0], text.strip())
    text = " ".join(_TEXT.sub(r"\1", text).split())
    if (unit := _UNIT_IN_WORDS.fullmatch(text)) and _is_unit(unit[2]):
        text = unit[1]
    text = re.sub(r"(?<![\\A-Za-z])sqrt\s*\(([^()]+)\)", r"\\sqrt{\1}", text)
    return re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi", text)


def _unwrapped(answer: str) -> str:
    """The answer without delimiters around the whole and the full stop of its sentence."""
    text = before = answer.strip()
    while True:
        for wrapper in _WRAPPERS:
            if match := wrapper.fullmatch(text):
                text = match[1].strip()
        box = _BOX.match(text)
        if box and (content := _balanced(text, box.end())) is not None and box.end() + len(content) + 1 == len(text):
            text = content.strip()
        text = text.rstrip(".,;").rstrip() if not text.endswith("\\,") else text[:-2].rstrip()
        if text == before:
            return text
        before = text


def _is_unit(words: str) -> bool:
    return _NO_UNIT.search(words) is None


def _is_words(text: str) -> bool:
    """Whether a cleaned answer is language, not mathematics."""
    letters_only = re.fullmatch(r"[A-Za-z]{2,}", text) is not None
    return letters_only or _WORD.search(_ENVIRONMENT.sub("", text)) is not None


def _plain_number(sign: str, digits: str) -> str:
    whole, _, fraction = digits.replace(",", "").partition(".")
    number = whole.lstrip("0") or "0"
    if fraction := fraction.rstrip("0"):
        number += f".{fraction}"
    return number if sign != "-" or number == "0" else f"-{number}"


def _equal_by_math(reference: str, answer: str) -> bool:
    # Its timeouts are signals, which only the main thread can set.
    timeout = _TIMEOUT_SECONDS if threading.current_thread() is threading.main_thread() else None
    parsed = _parsed(reference, timeout), _parsed(answer, timeout)
    return bool(import_math_verify().verify(*parsed, timeout_seconds=timeout))


@functools.lru_cache(maxsize=4096)
def _parsed(cleaned: str, timeout: int | None) -> list[Any]:
    return import_math_verify().parse(f"${cleaned}$", parsing_timeout=timeout)
