"""Checks what a visitor sends, ranks the solutions with the checkpoint's verifier, and writes the result as HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

# How the checkpoint's verifier cuts a solution into steps, and what visitors read there.
STEP_STYLES = {"blank_lines": "at blank lines", "newlines": "at every line", "step_markers": 'at "Step 1:"'}
MAX_SOLUTIONS = 8
# Characters of a problem and its solutions together, so that nobody keeps the others waiting for long.
MAX_CHARS = 20_000
# Probabilities above GOOD are green, those above FAIR orange, the others red.
GOOD, FAIR = 0.7, 0.4

_AGGREGATIONS = {
    "min": "the lowest step",
    "product": "the product of the steps",
    "last": "the last step",
    "mean": "the mean of the steps",
    "weighted_mean": "the weighted mean of the steps",
    "max": "the highest step",
    "geometric_mean": "the geometric mean of the steps",
}


class RequestError(ValueError):
    """What a visitor has to change; the message is for them."""


def rank(verifier: Any, problem: Any, solutions: Any, step_style: Any) -> list[Any]:
    """Rank up to `MAX_SOLUTIONS` solutions of one problem; those of white space are left out.

    Args:
        verifier: what `model.verifier(processor)` gives.
        problem: a text.
        solutions: N texts.
        step_style: a key of `STEP_STYLES`.

    Returns:
        At most N `SolutionScore`, best first; `solution_idx` is the 0-based index in `solutions`, and those with
        an `error` come last.

    Raises:
        RequestError: the request is empty, too long, or not made of texts.
    """
    problem, texts = _checked(problem, solutions, step_style)
    given = [index for index, text in enumerate(texts) if text.strip()]
    scores = verifier.rank_solutions(
        problem, [texts[index] for index in given], step_style=step_style, on_error="record", show_progress=False
    )
    return [_at(score, given[score.solution_idx]) for score in scores]


def _checked(problem: Any, solutions: Any, step_style: Any) -> tuple[str, list[str]]:
    if not isinstance(solutions, (list, tuple)) or not all(isinstance(text, str) for text in (problem, *solutions)):
        raise RequestError("Send the problem as a text and the solutions as a list of texts.")
    if step_style not in STEP_STYLES:
        raise RequestError(f"Steps can be cut by {', '.join(STEP_STYLES)}; {step_style!r} is none of these.")
    if len(solutions) > MAX_SOLUTIONS:
        raise RequestError(f"At most {MAX_SOLUTIONS} solutions can be ranked at once, you sent {len(solutions)}.")
    size = len(problem) + sum(map(len, solutions))
    if size > MAX_CHARS:
        raise RequestError(
            f"Problem and solutions may have {MAX_CHARS:,} characters together, yours have {size:,}. Shorten them, "
            "or send fewer solutions."
        )
    if not problem.strip():
        raise RequestError("Write a problem first.")
    if not any(text.strip() for text in solutions):
        raise RequestError("Write at least one solution.")
    return _encodable(problem), [_encodable(text) for text in solutions]


def _encodable(text: str) -> str:
    # Halves of surrogate pairs, which JSON can hold, are no characters that a tokenizer or a browser takes.
    return text.encode("utf-8", "replace").decode("utf-8")


def _at(score: Any, index: int) -> Any:
    """The score with this place among the solutions, in its error too."""
    error = None if score.error is None else _renumbered(score.error, score.solution_idx, index)
    return replace(score, solution_idx=index, error=error)


def _renumbered(error: str, old: int, new: int) -> str:
    return re.sub(rf"\bsolution {old}\b", f"solution {new}", error)


def ranking_html(scores: Sequence[Any]) -> str:
    """What `rank` returned, as HTML in which every text of a visitor is escaped."""
    cards = [_card(score, place if len(scores) > 1 else None) for place, score in enumerate(scores, start=1)]
    legend = (
        '<p class="prm-legend">How likely each step is to be correct: '
        f'<span class="prm-key prm-good">above {GOOD:g}</span> <span class="prm-key prm-fair">above {FAIR:g}</span> '
        f'<span class="prm-key prm-poor">up to {FAIR:g}</span></p>'
    )
    return f'<div class="prm">{legend}{"".join(cards)}</div>'


def message_html(text: str) -> str:
    """A message to the visitor, in the place of a result."""
    return f'<div class="prm"><p class="prm-message" role="alert">{escape(text)}</p></div>'


def escape(text: str) -> str:
    """The text as it reads, in HTML that Gradio fills into a template of `${...}` and `{{...}}`."""
    return html.escape(text).replace("$", "&#36;").replace("{", "&#123;").replace("}", "&#125;").replace("`", "&#96;")


def band(prob: float) -> str:
    """The class of a probability: `prm-good`, `prm-fair` or `prm-poor`."""
    return "prm-good" if prob > GOOD else "prm-fair" if prob > FAIR else "prm-poor"


def _card(score: Any, place: int | None) -> str:
    number = score.solution_idx + 1
    title = ("" if place is None else f"{place}. ") + f"Solution {number}"
    if score.error is not None:
        # Visitors count from 1; what a developer could do stands after the semicolon.
        reason = _renumbered(score.error, score.solution_idx, number).partition(";")[0]
        body = f'<p class="prm-message">Not scored: {escape(reason)}.</p>'
        return f'<section class="prm-solution"><h3>{title}</h3>{body}</section>'
    overall = f'<span class="prm-score {band(score.overall_score)}">{score.overall_score:.3f}</span>'
    steps = [
        _step(number, text, prob, number - 1 == score.first_error)
        for number, (text, prob) in enumerate(zip(score.steps, score.step_probs, strict=True), start=1)
    ]
    return (
        f'<section class="prm-solution"><h3>{title} {overall} <small>{_facts(score)}</small></h3>'
        f'<ol class="prm-steps">{"".join(steps)}</ol></section>'
    )


def _facts(score: Any) -> str:
    overall = escape(_AGGREGATIONS.get(score.aggregation, score.aggregation))
    below = f"below {score.threshold:g}"
    wrong = f"no step {below}" if score.first_error == -1 else f"first step {below}: {score.first_error + 1}"
    return f"{overall} · {wrong}"


def _step(number: int, text: str, prob: float, is_first_error: bool) -> str:
    mark = '<b class="prm-mark">first error</b> ' if is_first_error else ""
    return (
        f'<li class="prm-step {band(prob)}"><span class="prm-number">{number}</span>'
        f'<span class="prm-score" title="{prob:.6f}">{prob:.3f}</span>'
        f'<span>{mark}<span class="prm-text" dir="auto">{escape(text)}</span></span></li>'
    )


# Dark ink on light bands is legible whatever the page's colours are; all else takes Gradio's own.
CSS = """
.prm {
  --ink: #16181d; --soft: color-mix(in srgb, var(--body-text-color) 72%, transparent);
  color: var(--body-text-color);
}
.prm-good { --band: #35b597; }
.prm-fair { --band: #fbb040; }
.prm-poor { --band: #e5646e; }
.prm .prm-legend { color: var(--soft); font-size: .875rem; margin: 0 0 .5rem; }
.prm .prm-key { margin-left: .75rem; white-space: nowrap; }
.prm .prm-key::before {
  content: ""; display: inline-block; width: .8em; height: .8em; margin-right: .35em; border-radius: 2px;
  background: var(--band);
}
.prm .prm-solution {
  border: 1px solid var(--border-color-primary); border-radius: 8px; background: var(--background-fill-primary);
  padding: .75rem; margin: 0 0 .75rem;
}
.prm h3 { font-size: 1rem; margin: 0; color: var(--body-text-color); }
.prm h3 small { font-weight: 400; margin-left: .25rem; color: var(--soft); }
.prm .prm-score {
  background: var(--band); color: var(--ink); border-radius: 4px; padding: 0 .4rem;
  font-weight: 600; font-variant-numeric: tabular-nums; text-align: center;
}
.prm .prm-steps { list-style: none; margin: .5rem 0 0; padding: 0; }
.prm .prm-step {
  display: grid; grid-template-columns: 1.5rem 3.5rem minmax(0, 1fr); gap: 0 .6rem; align-items: baseline;
  margin: .2rem 0; padding: .25rem .5rem; border-left: 5px solid var(--band);
  border-radius: 4px; background: color-mix(in srgb, var(--band) 18%, transparent);
}
.prm .prm-number { color: var(--soft); text-align: right; font-variant-numeric: tabular-nums; }
.prm .prm-text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; }
.prm .prm-message {
  border: 1px solid #e5646e; border-radius: 4px; padding: .5rem .75rem; margin: .5rem 0 0; overflow-wrap: anywhere;
}
"""
