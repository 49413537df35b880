"""Step scores as a table in the terminal and as a web page in one file.

    print_scores(verifier.rank_solutions(problem, solutions))
    write_html_report("report.html", verifier.rank_solutions(problem, solutions))

The text of problems and steps is shown as it is, whatever markup it holds. The colours and the check of
what comes in serve `pictures` too.
"""

from __future__ import annotations

import importlib
import itertools
import unicodedata
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from rich.console import Console, ConsoleRenderable

    from .solution_score import SolutionScore

Band = Literal["good", "fair", "poor"]

BAND_COLORS: dict[Band, str] = {"good": "#35b597", "fair": "#fbb040", "poor": "#e5646e"}
"""Green, orange and red, as light as each other is dark enough to tell apart without seeing red or green,
and all light enough for text in `INK`."""
BAND_NAMES: dict[Band, str] = {"good": "green", "fair": "orange", "poor": "red"}
INK = "#16181d"

_BAR_CELLS = 10


def score_band(prob: float, *, good: float = 0.7, fair: float = 0.4) -> Band:
    """The band of a probability: "good" above `good`, "fair" above `fair`, else "poor".

    Args:
        prob: A probability in [0, 1]; one exactly on a bound belongs to the band below it.
        good: The upper bound of "fair".
        fair: The upper bound of "poor".

    Raises:
        ValueError: If not 0 <= fair <= good <= 1, or the probability is not in [0, 1].
    """
    check_bands(good, fair)
    check_prob("prob", prob)
    return "good" if prob > good else "fair" if prob > fair else "poor"


def check_bands(good: float, fair: float) -> None:
    """Raise a ValueError unless 0 <= fair <= good <= 1."""
    if not 0.0 <= fair <= good <= 1.0:
        raise ValueError(f"the bounds must be 0 <= fair <= good <= 1, got fair={fair} and good={good}")


def check_prob(name: str, prob: float) -> None:
    """Raise a ValueError unless the number is in [0, 1]."""
    if not 0.0 <= prob <= 1.0:
        raise ValueError(
            f"{name} must be in [0, 1], got {prob}; pass probabilities, not logits (NaN: the model has diverged)"
        )


def checked_scores(scores: SolutionScore | Iterable[SolutionScore]) -> list[SolutionScore]:
    """One score or several as a list, each seen to hold together.

    A score is told by its attributes, since that of a verifier loaded as remote code is of a class of its own.

    Raises:
        TypeError: If something else was given.
        ValueError: If there is none, one has no scores and no error, as many probabilities as steps are
            not there, or a number is not in [0, 1].
    """
    if hasattr(scores, "step_probs"):
        listed: list[Any] = [scores]
    elif isinstance(scores, Iterable) and not isinstance(scores, (str, bytes)):
        listed = list(scores)
    else:
        raise TypeError(f"scores must be a SolutionScore or several, got {type(scores).__name__}; {_HOW_TO_SCORE}")
    if not listed:
        raise ValueError("at least one SolutionScore is needed, got none")
    for score in listed:
        if not hasattr(score, "step_probs") or not hasattr(score, "solution_idx"):
            raise TypeError(f"scores must hold SolutionScore objects, got {type(score).__name__}; {_HOW_TO_SCORE}")
        _check_score(score)
    return listed


_HOW_TO_SCORE = "make them with PRMVerifier.score_solutions or rank_solutions"


def _check_score(score: SolutionScore) -> None:
    name = f"solution {score.solution_idx}"
    if score.error is not None:
        return
    if score.step_probs is None or score.overall_score is None:
        raise ValueError(f"{name} has neither scores nor an error; {_HOW_TO_SCORE}")
    if len(score.step_probs) != len(score.steps) or not score.steps:
        raise ValueError(
            f"{name} has {len(score.steps)} steps and {len(score.step_probs)} probabilities; one a step is needed"
        )
    _check_steps(f" of {name}", score.steps, score.step_probs)
    check_prob(f"the overall score of {name}", score.overall_score)


def _check_steps(of_what: str, steps: Sequence[str], probs: Sequence[float]) -> None:
    for number, (step, prob) in enumerate(zip(steps, probs, strict=True), start=1):
        if not isinstance(step, str):
            raise TypeError(f"step {number}{of_what} must be text, got {type(step).__name__}")
        check_prob(f"the probability of step {number}{of_what}", prob)


def steps_and_probs(
    score: SolutionScore | Sequence[float], steps: Sequence[str] | None
) -> tuple[list[str], list[float] | None, SolutionScore | None]:
    """What a picture of one solution takes: the S steps, their probabilities, and the score if it is one.

    Raises:
        TypeError: If it is neither a SolutionScore nor probabilities with their steps.
        ValueError: If the steps are not as many as the probabilities or none, or a probability is not in [0, 1].
    """
    if hasattr(score, "step_probs"):
        if steps is not None:
            raise TypeError("steps are given twice; a SolutionScore brings its own, so leave steps out")
        (solution,) = checked_scores(cast("SolutionScore", score))
        probs = None if solution.step_probs is None or solution.error is not None else list(solution.step_probs)
        return list(solution.steps), probs, solution
    try:
        probs = [float(prob) for prob in score]
    except (TypeError, ValueError):
        probs = None
    if probs is None or steps is None or isinstance(steps, str):
        raise TypeError(
            "one SolutionScore, or probabilities and the list of their steps, are needed, got "
            f"{type(score).__name__} and {type(steps).__name__}"
        )
    if len(probs) != len(steps) or not probs:
        raise ValueError(f"got {len(steps)} steps and {len(probs)} probabilities; one a step is needed")
    _check_steps("", steps, probs)
    return list(steps), probs, None


def ranked_scores(scores: Iterable[SolutionScore]) -> list[SolutionScore]:
    """Scores that can be compared, the best first, equal ones as they come, those with an error last.

    Raises:
        TypeError, ValueError: As `checked_scores`, and a ValueError if they are not of one problem, one
            aggregation and one threshold.
    """
    listed = checked_scores(scores)
    for name in ("problem", "aggregation", "threshold"):
        different = list(dict.fromkeys(getattr(score, name) for score in listed))
        if len(different) > 1:
            raise ValueError(
                f"solutions are compared within one {name}, got {len(different)}: {different[0]!r}, {different[1]!r}"
                f"{', ...' if len(different) > 2 else ''}; draw a picture for each"
            )
    return sorted(listed, key=lambda score: float("inf") if score.overall_score is None else -score.overall_score)


def visible_text(text: str) -> str:
    """The text with what would act instead of being seen made visible, line breaks and tabs left as they are.

    Control characters (an escape sequence changes a terminal's state) become their pictures, the signs that
    reorder the text around them and halves of surrogate pairs (which no file can hold) become U+FFFD.
    """
    return "".join(map(_visible_character, text.replace("\r\n", "\n")))


def _visible_character(character: str) -> str:
    code, category = ord(character), unicodedata.category(character)
    if category == "Cc" and character not in "\n\t":
        return (
            chr(0x2400 + code)
            if code < 0x20
            else "\N{SYMBOL FOR DELETE}"
            if code == 0x7F
            else "\N{REPLACEMENT CHARACTER}"
        )
    if category == "Cs" or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069:
        return "\N{REPLACEMENT CHARACTER}"
    return character


def describe(score: SolutionScore) -> str:
    """One line on a solution: where it breaks, after what its overall score is of; or why it was not scored."""
    if score.error is not None:
        return f"not scored: {visible_text(score.error)}"
    parts = [f"{score.aggregation} of {len(score.steps)} step{'s' if len(score.steps) > 1 else ''}"]
    if score.first_error is not None:
        place = "none" if score.first_error < 0 else f"step {score.first_error + 1}"
        parts.append(f"first error (below {score.threshold:g}): {place}")
    if score.weakest_step is not None:
        parts.append(f"weakest: step {score.weakest_step + 1}")
    return ", ".join(parts)


def terminal_table(
    scores: SolutionScore | Iterable[SolutionScore], *, good: float = 0.7, fair: float = 0.4
) -> ConsoleRenderable:
    """The scores as something that `rich` prints: a table of steps a solution, and one of the solutions below them.

    Every step has its number, its probability as figures on a coloured bar, and its whole text, wrapped.
    Solutions come in the order given; a single one needs no table of solutions. One with an `error` shows it.

    Args:
        scores: What a `PRMVerifier` gave, one or several.
        good: Probabilities above this are green.
        fair: Those above this are orange, the others red.

    Raises:
        ImportError: If rich is missing.
        TypeError: If `scores` are something else.
        ValueError: If there is none, one does not hold together, or not 0 <= fair <= good <= 1.
    """
    rich_console = import_optional("rich.console", "terminal_table", "rich")
    rich_text = importlib.import_module("rich.text")
    listed = checked_scores(scores)
    check_bands(good, fair)
    parts: list[Any] = []
    problem: str | None = None
    for score in listed:
        if score.problem is not None and score.problem != problem:
            problem = score.problem
            parts += [rich_text.Text("Problem: ", style="bold").append(visible_text(problem), style="not bold"), ""]
        parts += [_steps_table(score, good, fair), ""]
    if len(listed) > 1:
        parts += [_solutions_table(listed, good, fair), ""]
    return rich_console.Group(*parts[:-1])


def print_scores(
    scores: SolutionScore | Iterable[SolutionScore],
    *,
    good: float = 0.7,
    fair: float = 0.4,
    console: Console | None = None,
) -> None:
    """Print `terminal_table` of the scores.

    Args:
        scores, good, fair: As in `terminal_table`, with the same errors.
        console: Where to; a new `rich.console.Console()` on standard output by default, which leaves the
            colours out where that is no terminal.
    """
    table = terminal_table(scores, good=good, fair=fair)
    (importlib.import_module("rich.console").Console() if console is None else console).print(table)


def _steps_table(score: SolutionScore, good: float, fair: float) -> Any:
    text = importlib.import_module("rich.text").Text
    head = text(f"Solution {score.solution_idx}  ", style="bold")
    if score.error is None and score.overall_score is not None:
        color = BAND_COLORS[score_band(score.overall_score, good=good, fair=fair)]
        head.append(f" {score.overall_score:.3f} ", style=f"{INK} on {color}").append("  ")
    head.append(describe(score), style="not bold")
    table = importlib.import_module("rich.table").Table(title=head, title_justify="left", title_style="", expand=True)
    table.add_column("step", justify="right")
    table.add_column("P(correct)", min_width=_BAR_CELLS)
    has_error_step = score.first_error is not None and score.first_error >= 0
    if has_error_step:
        table.add_column("")
    table.add_column("text", ratio=1, overflow="fold")
    for index, step in enumerate(score.steps):
        prob = None if score.error is not None or score.step_probs is None else score.step_probs[index]
        mark = [text("first error" if index == score.first_error else "", style="bold")] if has_error_step else []
        table.add_row(str(index + 1), _bar(prob, good, fair), *mark, text(visible_text(step)))
    return table


def _solutions_table(scores: Sequence[SolutionScore], good: float, fair: float) -> Any:
    text = importlib.import_module("rich.text").Text
    table = importlib.import_module("rich.table").Table(title="Solutions", title_justify="left", title_style="bold")
    table.add_column("solution", justify="right")
    table.add_column("overall", min_width=_BAR_CELLS)
    table.add_column("", overflow="fold")
    for score in scores:
        overall = None if score.error is not None else score.overall_score
        table.add_row(str(score.solution_idx), _bar(overall, good, fair), text(describe(score)))
    return table


def _bar(prob: float | None, good: float, fair: float) -> Any:
    """The probability in figures, on a bar of as many tenths of the cell's width, at least one."""
    text = importlib.import_module("rich.text").Text
    if prob is None:
        return text("-")
    bar = text(f"{prob:.3f}".ljust(_BAR_CELLS))
    color = BAND_COLORS[score_band(prob, good=good, fair=fair)]
    bar.stylize(f"{INK} on {color}", 0, max(1, round(prob * _BAR_CELLS)))
    return bar


def html_report(
    scores: SolutionScore | Iterable[SolutionScore],
    *,
    title: str = "Step scores",
    good: float = 0.7,
    fair: float = 0.4,
) -> str:
    """The scores as a web page that needs no other file, no script and no network.

    The problem stands above its solutions, which come in the order given, each with its overall score, its
    first error and its steps; steps are coloured, show their probability, and tell it to more places when
    pointed at. A solution with an `error` shows it. Light or dark is as the reader's system has it.

    Args:
        scores: What a `PRMVerifier` gave, one or several, of one problem or several.
        title: Of the page.
        good: Probabilities above this are green.
        fair: Those above this are orange, the others red.

    Returns:
        HTML, to be written as UTF-8.

    Raises:
        ImportError: If Jinja2 is missing.
        TypeError: If `scores` are something else.
        ValueError: If there is none, one does not hold together, or not 0 <= fair <= good <= 1.
    """
    jinja2 = import_optional("jinja2", "html_report", "Jinja2")
    listed = checked_scores(scores)
    check_bands(good, fair)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["visible"] = visible_text
    template = environment.from_string(resources.files(__package__).joinpath("step_report.html").read_text("utf-8"))
    return str(
        template.render(
            title=title,
            groups=[(problem, list(group)) for problem, group in itertools.groupby(listed, lambda s: s.problem)],
            band=lambda prob: score_band(prob, good=good, fair=fair),
            describe=describe,
            colors=BAND_COLORS,
            ink=INK,
            good=good,
            fair=fair,
        )
    )


def write_html_report(
    path: str | Path,
    scores: SolutionScore | Iterable[SolutionScore],
    *,
    title: str = "Step scores",
    good: float = 0.7,
    fair: float = 0.4,
) -> Path:
    """Write `html_report` of the scores to a file, whose folder must be there, and return its path.

    Args:
        path: The file, which is overwritten.
        scores, title, good, fair: As in `html_report`, with the same errors.

    Raises:
        OSError: If the file cannot be written.
    """
    page = html_report(scores, title=title, good=good, fair=fair)
    Path(path).write_text(page, encoding="utf-8", newline="\n")
    return Path(path)


def import_optional(module: str, user: str, package: str) -> ModuleType:
    """A module of an optional package, or an ImportError that says who needs it and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{user} needs {package}, which is not installed: run `pip install "modeling-prm[train]"`'
        ) from error
