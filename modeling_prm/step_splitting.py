"""The text of a solution, cut into steps."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

STEP_STYLES = ("blank_lines", "newlines", "step_markers", "thinking")
# A fragment of a thinking trace below this many characters ("Wait.", "Hmm, no.") is no step of its own.
MIN_CHARS = 40

_BLANK_LINES = re.compile(r"\n[^\S\n]*(?:\n[^\S\n]*)+")
_NEWLINES = re.compile(r"\n+")
# "Step 3:", "**Step 3.**", "## Step 3 - ..." at the start of a line. What follows the number tells a marker from
# "Step 3 times the value"; in a heading nothing need follow.
_MARKER = re.compile(
    r"""^(?P<lead>[ \t\u3000#>+*_-]*?)(?P<emphasis>[*_]{1,3})?
    step[^\S\n]*\#?\d+(?:\.\d+)*[a-z]?(?![^\W_])
    (?P<end>
        [^\S\n]*[:：.)]+(?(emphasis)[*_]*[:：.)]*)
        | (?(emphasis)[*_]+[:：.)]*|(?!))(?:[^\S\n]*(?:-+(?=\s)|[–—]+(?!\d)))?
        | [^\S\n]*(?:-+(?=\s)|[–—]+(?!\d))
        | [^\S\n]*$
    )?
    [^\S\n]*""",
    re.I | re.M | re.X,
)


def split_steps(
    text: str,
    style: str | Callable[[str], list[str]] = "blank_lines",
    *,
    min_chars: int = MIN_CHARS,
    strip_markers: bool = False,
) -> list[str]:
    """Cut the text of a solution into its steps.

    Nothing but white space at the cuts is lost, with `strip_markers` the markers too. Line ends become `\\n`.

    Args:
        text: a whole solution.
        style: where to cut.
            `"blank_lines"`: at blank lines.
            `"newlines"`: at every line end.
            `"step_markers"`: before each line that starts with `Step N`, where a colon, a full stop, a bracket,
            a dash, the end of emphasis or the end of the line follows the number, as in `Step 1:`,
            `**Step 1.**` or `- Step 1 - ...`, or that is a heading, `### Step 1 ...`. So a line such as
            `Step 3 times 4` is not cut. Text before the first marker is a step of its own.
            `"thinking"`: at blank lines, where a piece of fewer than `min_chars` characters stays with the
            piece before it (at the start, with the one after it), as long thinking traces need.
            Or a function from the text as it is to a list of steps.
        min_chars: for `"thinking"`.
        strip_markers: for `"step_markers"`: leave the markers out, for a model whose step template writes the
            numbers itself (`PRMVerifier` sees to that by itself). A step that is a marker and nothing else is lost.

    Returns:
        The steps, each without white space around it; empty for a text of white space.

    Raises:
        TypeError: the text is no string, or a function returned something else than a list of strings.
        ValueError: an unknown style, or an option of another style.
    """
    if not isinstance(text, str):
        raise TypeError(f"the text of a solution must be a string, got {type(text).__name__}")
    check_step_style(style)
    if strip_markers and style != "step_markers":
        raise ValueError(f"strip_markers belongs to style='step_markers', got style={style!r}; leave it out")
    if min_chars != MIN_CHARS and style != "thinking":
        raise ValueError(f"min_chars belongs to style='thinking', got style={style!r}; leave it out")
    if callable(style):
        return _checked(style(text), style)
    text = text.replace("\r\n", "\n")
    if style == "step_markers":
        markers = [match for match in _MARKER.finditer(text) if match["end"] is not None or "#" in match["lead"]]
        cuts = [match.start() for match in markers]
        starts = [match.end() for match in markers] if strip_markers else cuts
        pieces = [text[start:end] for start, end in zip([0, *starts], [*cuts, len(text)], strict=True)]
    elif style == "newlines":
        pieces = _NEWLINES.split(text)
    else:
        pieces = _joined_fragments(text, min_chars) if style == "thinking" else _BLANK_LINES.split(text)
    return [piece.strip() for piece in pieces if piece.strip()]


def check_step_style(style: Any) -> None:
    """Check a style of `split_steps`.

    Raises:
        ValueError: there is no such style.
    """
    if not callable(style) and style not in STEP_STYLES:
        raise ValueError(
            f"there is no style {style!r}; choose one of {', '.join(map(repr, STEP_STYLES))}, or give a function"
        )


def _joined_fragments(text: str, min_chars: int) -> list[str]:
    """Pieces between blank lines, where short ones stay with a neighbour, with the text between them as it is."""
    starts, ends = [0], []
    for match in _BLANK_LINES.finditer(text):
        ends.append(match.start())
        starts.append(match.end())
    ends.append(len(text))

    def is_short(start: int, end: int) -> bool:
        return len(text[start:end].strip()) < min_chars

    spans: list[tuple[int, int]] = []
    for start, end in zip(starts, ends, strict=True):
        if spans and (is_short(start, end) or (len(spans) == 1 and is_short(*spans[0]))):
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return [text[start:end] for start, end in spans]


def _checked(steps: Any, style: Callable[[str], list[str]]) -> list[str]:
    if not isinstance(steps, (list, tuple)) or not all(isinstance(step, str) for step in steps):
        raise TypeError(f"the function {style!r} that cuts steps must return a list of strings, got {steps!r:.80}")
    return list(steps)
