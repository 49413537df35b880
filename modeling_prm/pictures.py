"""Pictures of step scores: one solution as bars, and the ranked solutions of one problem beside each other.

    figure = plot_step_scores(verifier.score_solution(problem, steps))
    figure.savefig("steps.png")

Nothing is shown and no window system is needed: the functions return a `matplotlib.figure.Figure` that
pyplot knows nothing of, so it is freed like any other object. In a notebook, `%matplotlib inline` makes
a returned figure appear.

Text is drawn as it is, LaTeX as its source. Axes are measured in inches downwards, so that rows can be as
high as their text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from transformers.utils import logging

from .picture_text import FONT_SIZE, Letters, import_matplotlib
from .reports import (
    BAND_COLORS,
    BAND_NAMES,
    INK,
    check_bands,
    check_prob,
    describe,
    ranked_scores,
    score_band,
    steps_and_probs,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .solution_score import SolutionScore

logger = logging.get_logger(__name__)

# Inches, but for the font size, which is in points.
_LINE_HEIGHT = 0.165
_PADDING = 0.1
_GAP = 0.08
_BOTTOM = 0.85
_MARGIN = 0.15

# In points.
_EDGE = 4.0
# A column this wide has room for its number.
_NUMBER_WIDTH = 0.42

_STEP_SCALE = "probability that the step is correct"
_SOFT_INK = "#5a6270"
_GRID = "#d9dde3"


def plot_step_scores(
    score: SolutionScore | Sequence[float],
    steps: Sequence[str] | None = None,
    *,
    good: float = 0.7,
    fair: float = 0.4,
    line: float | None = None,
    title: str | None = None,
    width: float = 9.0,
    max_lines: int = 3,
) -> Figure:
    """Draw the steps of one solution as horizontal bars, step 1 on top, each with its text inside.

    A bar is as long as its step's probability, which also stands beside it as a number, and green above
    `good`, orange above `fair`, else red. A text too long for its rows ends in an ellipsis. The figure is
    as high as the steps need: about 0.35 inch for each, and 0.17 for each further row of text. A solution
    with an `error` shows its steps without bars, and the error.

    Args:
        score: What a `PRMVerifier` gave for one solution; or S probabilities, with `steps`.
        steps: The S steps where `score` is probabilities; else left out.
        good: Probabilities above this are green.
        fair: Those above this are orange, the others red.
        line: Where the dashed line stands; by default at the score's threshold, at 0.5 for probabilities.
        title: Over the bars; by default the score's problem.
        width: Of the figure, in inches, at least 4.
        max_lines: The most rows of text that a step gets, at least 1.

    Returns:
        The figure, of one `Axes` whose `patches` are the bars in the order of the steps.

    Raises:
        ImportError: If matplotlib is missing.
        TypeError: If `score` is neither, or `steps` are missing or there twice.
        ValueError: If the steps are not as many as the probabilities or none, or a number is out of bounds.
    """
    figure_class = import_matplotlib("figure").Figure
    check_bands(good, fair)
    texts, probs, solution = steps_and_probs(score, steps)
    if line is None:
        line = 0.5 if solution is None else solution.threshold
    _check_sizes(line, width, max_lines)
    first_error = -1 if solution is None or solution.first_error is None else solution.first_error
    letters = Letters()

    left, right = 0.75, 0.7 if first_error < 0 else 1.4
    inside = width - left - right
    rows = [letters.wrap(text, inside - 2 * _PADDING, max_lines) for text in texts]
    heights = [_PADDING + _LINE_HEIGHT * max(1, len(lines)) for lines in rows]
    centres, total = _stack(heights)
    figure, top = _new_figure(figure_class, letters, _heading(letters, title, solution, width), width, total)
    axes = _add_axes(figure, left, top, inside, total)
    labels = [f"Step {i + 1}" for i in range(len(texts))]
    _set_scale(axes, letters, centres, labels, line if probs else None, _STEP_SCALE)
    if probs:
        _draw_bars(axes, centres, heights, probs, good, fair)
        _add_legend(figure, letters, good, fair)
    for i, lines in enumerate(rows):
        number = "" if not probs else f"{probs[i]:.3f}" + ("  first error" if i == first_error else "")
        _write_row(axes, letters, inside, centres[i], lines, number, bold=i == first_error)
    return figure


def plot_ranked_solutions(
    scores: Iterable[SolutionScore],
    *,
    good: float = 0.7,
    fair: float = 0.4,
    line: float | None = None,
    title: str | None = None,
    width: float = 11.0,
) -> Figure:
    """Draw the solutions of one problem beside each other, the best on top.

    On the left a bar for each solution's overall score with its last step inside; on the right a small
    column for each of its steps, as high as the step's probability, with the first error outlined. Equal
    scores stay in the order given; a solution with an `error` comes last and shows it.

    Args:
        scores: What a `PRMVerifier` gave for one problem, in any order.
        good: Probabilities above this are green.
        fair: Those above this are orange, the others red.
        line: Where the dashed lines stand; by default at the scores' threshold.
        title: Over the bars; by default the scores' problem.
        width: Of the figure, in inches, at least 4.

    Returns:
        The figure, of two `Axes`: the overall scores, whose `patches` are the bars of the solutions that
        have one, from the top down; and the steps, with a patch a step in the same order.

    Raises:
        ImportError: If matplotlib is missing.
        TypeError: If `scores` are something else.
        ValueError: If there is none, one does not hold together, they are not of one problem, one
            aggregation and one threshold, or a number is out of bounds.
    """
    figure_class = import_matplotlib("figure").Figure
    check_bands(good, fair)
    listed = ranked_scores(scores)
    line = listed[0].threshold if line is None else line
    _check_sizes(line, width, max_lines=1)
    letters = Letters()

    left, between, row = 1.25, 0.85, 0.55
    inside = 0.45 * (width - left - between - _MARGIN)
    total = row * len(listed)
    centres = [row * (i + 0.5) for i in range(len(listed))]
    heading = _heading(letters, listed[0].problem if title is None else title, None, width)
    figure, top = _new_figure(figure_class, letters, heading, width, total)

    axes = _add_axes(figure, left, top, inside, total)
    scored = [(score, score.overall_score) for score in listed if score.overall_score is not None]
    _draw_bars(axes, centres, [0.8 * row] * len(scored), [overall for _, overall in scored], good, fair)
    labels = [f"{i + 1}. Solution {score.solution_idx}" for i, score in enumerate(listed)]
    _set_scale(axes, letters, centres, labels, line, f"overall score ({listed[0].aggregation})")
    for centre, score in zip(centres, listed, strict=True):
        text = score.steps[-1] if score.error is None else describe(score)
        lines = letters.wrap(text, inside - 2 * _PADDING, 2)
        number = "" if score.overall_score is None else f"{score.overall_score:.3f}"
        _write_row(axes, letters, inside, centre, lines, number, bold=True)

    strip = width - left - between - inside - _MARGIN
    columns = _add_axes(figure, left + inside + between, top, strip, total)
    _draw_columns(columns, letters, [score for score, _ in scored], strip, row, line, bounds=(good, fair))
    _add_legend(figure, letters, good, fair)
    return figure


def _check_sizes(line: float, width: float, max_lines: int) -> None:
    check_prob("line", line)
    if not 4.0 <= width <= 100.0:
        raise ValueError(f"width is in inches and must be in [4, 100], got {width}")
    if max_lines < 1:
        raise ValueError(f"max_lines must be at least 1, got {max_lines}")


def _stack(heights: Sequence[float]) -> tuple[list[float], float]:
    """The centres of rows that lie below each other, and the height of all, in inches."""
    centres, edge = [], _GAP / 2
    for height in heights:
        centres.append(edge + height / 2)
        edge += height + _GAP
    return centres, max(edge - _GAP / 2, _LINE_HEIGHT)


def _heading(letters: Letters, title: str | None, solution: SolutionScore | None, width: float) -> list[str]:
    """The lines over a picture: the title, else the problem; and what is to say on the whole solution."""
    room = width - 2 * _MARGIN
    title = solution.problem if title is None and solution is not None else title
    lines = [] if title is None else letters.wrap(title, room, 3)
    if solution is not None:
        overall = "" if solution.overall_score is None else f"{solution.overall_score:.3f}: "
        lines += letters.wrap(overall + describe(solution), room, 3)
    return lines


def _new_figure(
    figure_class: type[Figure], letters: Letters, heading: list[str], width: float, height: float
) -> tuple[Figure, float]:
    """A figure with its heading and room for axes of this height; and how far down, in inches, the room starts."""
    top = 2 * _MARGIN + _LINE_HEIGHT * len(heading)
    total = top + height + _BOTTOM
    figure = figure_class(figsize=(width, total), facecolor="white")
    text = "\n".join(heading)
    figure.text(_MARGIN / width, 1 - _MARGIN / total, text, va="top", ha="left", color=INK, **letters.style())
    return figure, top


def _add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in inches from the figure's upper left corner, with inches downwards as their y."""
    all_width, all_height = figure.get_size_inches()
    box = (left / all_width, 1 - (top + height) / all_height, width / all_width, height / all_height)
    axes = figure.add_axes(box, facecolor="white")
    axes.set_ylim(height, 0.0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_SOFT_INK)
    axes.tick_params(colors=_SOFT_INK, labelsize=FONT_SIZE)
    axes.tick_params(axis="y", length=0)
    return axes


def _set_scale(
    axes: Axes, letters: Letters, centres: list[float], labels: list[str], line: float | None, name: str
) -> None:
    axes.set_xlim(0.0, 1.0)
    axes.set_yticks(centres, labels, color=INK, **letters.style())
    axes.xaxis.set_visible(line is not None)
    if line is not None:
        axes.set_xlabel(f"{name}; dashed: {line:g}", color=_SOFT_INK, **letters.style())
        axes.axvline(line, color=_SOFT_INK, linestyle="--", linewidth=1.0)


def _write_row(
    axes: Axes, letters: Letters, width: float, y: float, lines: list[str], number: str, *, bold: bool
) -> None:
    """Write text inside axes of this width in inches, and a number to the right of them."""
    style = {"va": "center", "color": INK, **letters.style()}
    axes.text(_PADDING / width, y, "\n".join(lines), clip_on=True, **style)
    axes.text(1 + _PADDING / width, y, number, weight="bold" if bold else "normal", **style)


def _draw_bars(
    axes: Axes, centres: list[float], heights: list[float], probs: list[float], good: float, fair: float
) -> None:
    """Bars from the top down, each with a coloured edge at 0, so that the shortest still has a colour."""
    colors = [BAND_COLORS[score_band(prob, good=good, fair=fair)] for prob in probs]
    rows = list(zip(centres, heights, strict=False))[: len(probs)]
    axes.barh([centre for centre, _ in rows], probs, height=[height for _, height in rows], color=colors)
    edges = [(centre - height / 2, centre + height / 2) for centre, height in rows]
    axes.vlines(
        [0.0] * len(rows),
        [low for low, _ in edges],
        [high for _, high in edges],
        colors,
        linewidth=_EDGE,
        clip_on=False,
    )
    axes.spines["left"].set_visible(False)


def _draw_columns(
    axes: Axes,
    letters: Letters,
    scores: list[SolutionScore],
    width: float,
    row: float,
    line: float,
    *,
    bounds: tuple[float, float],
) -> None:
    """A column for each step, as high in its row as its probability, numbered where there is room."""
    longest = max((len(score.steps) for score in scores), default=1)
    axes.set_xlim(0.5, longest + 0.5)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(import_matplotlib("ticker").MaxNLocator(integer=True))
    axes.set_xlabel("step; outlined: first error", color=_SOFT_INK, **letters.style())
    full = 0.8 * row
    for i, score in enumerate(scores):
        probs = score.step_probs or ()
        base = row * i + 0.9 * row
        colors = [BAND_COLORS[score_band(prob, good=bounds[0], fair=bounds[1])] for prob in probs]
        places = range(1, len(probs) + 1)
        axes.bar(places, [-full * prob for prob in probs], bottom=base, width=0.85, color=colors)
        left, right = [x - 0.425 for x in places], [x + 0.425 for x in places]
        axes.hlines([base] * len(probs), left, right, colors, linewidth=_EDGE)
        axes.hlines(base - full, 0.5, len(probs) + 0.5, color=_GRID, linewidth=0.8)
        axes.hlines(base - line * full, 0.5, len(probs) + 0.5, color=_SOFT_INK, linewidth=0.8, linestyle="--", zorder=3)
        if score.first_error is not None and score.first_error >= 0:
            x, up = score.first_error + 1, base - full
            box = ([x - 0.46, x + 0.46, x + 0.46, x - 0.46, x - 0.46], [base, base, up, up, base])
            axes.plot(*box, color=INK, linewidth=1.4, clip_on=False)
        if width / longest >= _NUMBER_WIDTH:
            for x, prob in zip(places, probs, strict=True):
                axes.text(x, base - 0.13, f"{prob:.2f}", va="center", ha="center", color=INK, **letters.style())


def _add_legend(figure: Figure, letters: Letters, good: float, fair: float) -> None:
    patch = import_matplotlib("patches").Patch
    bounds = {"good": f"above {good:g}", "fair": f"above {fair:g}", "poor": f"up to {fair:g}"}
    handles = [patch(color=color, label=f"{BAND_NAMES[band]}: {bounds[band]}") for band, color in BAND_COLORS.items()]
    place = (_MARGIN / figure.get_size_inches()[0], 0.5 * _MARGIN / figure.get_size_inches()[1])
    legend = figure.legend(
        handles=handles, loc="lower left", bbox_to_anchor=place, borderaxespad=0.0, ncols=3, handlelength=1.0
    )
    legend.set(frame_on=False)
    for text in legend.get_texts():
        text.set(color=INK, **letters.style())
