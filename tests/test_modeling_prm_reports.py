"""What the terminal table and the HTML report show, and that no text in them acts as markup."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from modeling_prm import SolutionScore
from modeling_prm.reports import (
    BAND_COLORS,
    INK,
    html_report,
    print_scores,
    score_band,
    terminal_table,
    visible_text,
    write_html_report,
)

GREEN, ORANGE, RED = "#35b597", "#fbb040", "#e5646e"
GREEN_ON_TERMINAL, RED_ON_TERMINAL = "48;2;53;181;151", "48;2;229;100;110"

SCORE = SolutionScore(
    steps=("First.", "Second.", "Third."),
    step_probs=(0.91234567, 0.45, 0.05),
    overall_score=0.05,
    aggregation="min",
    weakest_step=2,
    weakest_prob=0.05,
    first_error=1,
    threshold=0.5,
    solution_idx=4,
    problem="What is 1 + 1?",
)
FAILED = replace(
    SCORE,
    step_probs=None,
    overall_score=None,
    weakest_step=None,
    weakest_prob=None,
    first_error=None,
    solution_idx=5,
    error="too long by 7 <tokens>",
)
NASTY = (
    "<script>alert('x')</script>",
    "<img src=x onerror=alert(1)> &amp; \"quoted\" 'too'",
    "[red]not red[/red] :smile: {{ 7 * 7 }} {% raw %}",
)


def with_steps(*steps: str, **fields: Any) -> SolutionScore:
    return replace(
        SCORE, steps=steps, step_probs=(0.8,) * len(steps), overall_score=0.8, first_error=-1, weakest_step=0, **fields
    )


def printed(scores: Any, *, width: int = 80, color: bool = False, **options: float) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=color, color_system="truecolor" if color else None)
    print_scores(scores, console=console, **options)
    return file.getvalue()


class Page(HTMLParser):
    """The elements of a page with their attributes, and the texts of the elements of each class."""

    VOID = ("meta", "link", "img", "br", "input")

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, str]] = []
        self.text_of: dict[str, list[str]] = {}
        self.feed(page)
        assert not self.open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            names = dict(attrs).get("class") or tag
            self.open.append((tag, names))
            self.text_of.setdefault(names, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text_of[self.open[-1][1]][-1] += data

    def steps(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == "li"]


@pytest.mark.parametrize(
    ("prob", "band"),
    [(1.0, "good"), (0.7001, "good"), (0.7, "fair"), (0.4001, "fair"), (0.4, "poor"), (0.0, "poor")],
)
def test_band_lies_strictly_above_its_bound(prob: float, band: str) -> None:
    assert score_band(prob) == band


def test_bounds_of_bands_are_options() -> None:
    assert [score_band(prob, good=0.9, fair=0.1) for prob in (0.95, 0.9, 0.1)] == ["good", "fair", "poor"]
    with pytest.raises(ValueError, match=r"fair=0.8 and good=0.7"):
        score_band(0.5, fair=0.8)
    with pytest.raises(ValueError, match=r"got 1\.5"):
        score_band(1.5)


def test_text_is_legible_on_every_band() -> None:
    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    # WCAG 2.2 asks for a contrast of 4.5 for text of this size.
    for color in BAND_COLORS.values():
        assert (luminance(color) + 0.05) / (luminance(INK) + 0.05) >= 4.5
    assert BAND_COLORS == {"good": GREEN, "fair": ORANGE, "poor": RED}


def test_visible_text_shows_what_would_act() -> None:
    assert visible_text("a\x1b[31mb\x07\x7f") == "a␛[31mb␇␡"
    assert visible_text("a\u202eb\u2066c\x9bd\ud800e") == "a\ufffdb\ufffdc\ufffdd\ufffde"
    assert visible_text("a\r\nb\tc 中 é 👍🏽") == "a\nb\tc 中 é 👍🏽"


def test_terminal_table_shows_every_step_with_its_probability() -> None:
    lines = printed(SCORE, width=100).splitlines()
    assert lines[0] == "Problem: What is 1 + 1?"
    facts = "Solution 4   0.050   min of 3 steps, first error (below 0.5): step 2, weakest: step 3"
    assert lines[2].rstrip() == facts
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert rows == [
        ["1", "0.912", "", "First."],
        ["2", "0.450", "first error", "Second."],
        ["3", "0.050", "", "Third."],
    ]
    assert "first error " not in printed(with_steps("a")).replace("first error (below", "")


def test_terminal_table_colours_as_many_tenths_as_the_probability_has() -> None:
    output = printed(with_steps("a"), color=True)
    # 0.8 of ten cells, of which the number takes five.
    assert re.search(rf"\x1b\[38;2;22;24;29;{GREEN_ON_TERMINAL}m0\.800   \x1b\[0m", output)
    assert RED_ON_TERMINAL not in output
    assert RED_ON_TERMINAL in printed(with_steps("a"), color=True, good=0.95, fair=0.9)
    assert re.search(
        rf";{RED_ON_TERMINAL}m0\x1b\[0m\.000 ", printed(replace(SCORE, step_probs=(0.9, 0.8, 0.0)), color=True)
    )


def test_markup_is_text_in_the_terminal() -> None:
    output = printed(with_steps(*NASTY, "\x1b[2Jgone", problem="[bold]p[/bold]"), width=120)
    for step in NASTY:
        assert step in output
    assert "[bold]p[/bold]" in output
    assert "␛[2Jgone" in output
    assert "\x1b" not in output


@pytest.mark.parametrize("width", [40, 60, 100])
def test_wide_characters_are_wrapped_within_the_terminal(width: int) -> None:
    chinese = "首先计算面积,底为六,高为四,所以面积等于十二。" * 6
    lines = printed(with_steps(chinese, "Short.", "x" * 200), width=width).splitlines()
    table = [line for line in lines if line.startswith("│")]
    assert {cell_len(line) for line in table} == {width}
    cells = [line.split("│")[3].strip() for line in table]
    assert "".join(cells) == chinese + "Short." + "x" * 200


def test_several_solutions_share_their_problem_and_end_in_a_table() -> None:
    output = printed([SCORE, with_steps("a", solution_idx=0), FAILED], width=100)
    assert output.count("What is 1 + 1?") == 1
    assert [output.index(f"Solution {idx} ") for idx in (4, 0, 5)] == sorted(
        output.index(f"Solution {idx} ") for idx in (4, 0, 5)
    )
    last = output[output.index("Solutions") :]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in last.splitlines() if line.startswith("│")]
    assert [row[:2] for row in rows] == [["4", "0.050"], ["0", "0.800"], ["5", "-"]]
    assert rows[2][2] == "not scored: too long by 7 <tokens>"
    assert "Solutions" not in printed(SCORE)


def test_failure_shows_its_steps_and_reason_in_the_terminal() -> None:
    output = printed(FAILED)
    assert "Solution 5  not scored: too long by 7 <tokens>" in output
    assert re.search(r"│ +2 │ - +│ Second\. +│", output)


def test_print_scores_writes_to_standard_output_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    print_scores(SCORE)
    assert "Second." in capsys.readouterr().out


def test_report_shows_every_step_coloured_with_its_probability() -> None:
    page = Page(html_report(SCORE))
    assert [step["class"] for step in page.steps()] == ["step good", "step fair first-error", "step poor"]
    assert page.steps()[0]["title"] == "Step 1: correct with probability 0.912346"
    assert page.text_of["score"] == ["0.912", "0.450", "0.050"]
    assert page.text_of["text"] == ["First.", "Second.", "Third."]
    assert page.text_of["mark"] == ["first error"]
    assert page.text_of["score poor"] == ["0.050"]
    assert page.text_of["facts"] == ["min of 3 steps, first error (below 0.5): step 2, weakest: step 3"]
    assert page.text_of["problem"] == ["What is 1 + 1?"]
    assert page.text_of["h3"] == ["Solution 4"]
    style = page.text_of["style"][0]
    assert f"--good: {GREEN}; --fair: {ORANGE}; --poor: {RED}" in style


def test_bounds_of_the_report_are_options() -> None:
    page = Page(html_report(SCORE, good=0.95, fair=0.02))
    assert [step["class"] for step in page.steps()] == ["step fair", "step fair first-error", "step fair"]
    assert page.text_of["key good"] == ["above 0.95"]
    assert page.text_of["key poor"] == ["up to 0.02"]


def test_markup_is_text_in_the_report() -> None:
    error = replace(FAILED, error=NASTY[0], problem=NASTY[1])
    html = html_report([with_steps(*NASTY, problem=NASTY[1]), error], title=NASTY[0])
    page = Page(html)
    assert page.text_of["text"][:3] == list(NASTY)
    assert page.text_of["problem"] == [NASTY[1]]
    assert page.text_of["title"] == [NASTY[0]]
    assert page.text_of["h1"] == [NASTY[0]]
    assert page.text_of["error"] == [f"Not scored: {NASTY[0]}"]
    assert not {"script", "img", "b"} & {tag for tag, _ in page.elements}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_report_needs_no_other_file_script_or_network() -> None:
    html = html_report([SCORE, FAILED])
    page = Page(html)
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html
    assert "@import" not in html
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert not {name for _, attributes in page.elements for name in attributes} & {"src", "href", "srcset", "action"}
    policy = [attributes["content"] for _, attributes in page.elements if "http-equiv" in attributes]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_report_is_made_for_light_dark_and_paper() -> None:
    style = Page(html_report(SCORE)).text_of["style"][0]
    assert "@media screen and (prefers-color-scheme: dark)" in style
    assert "@media print" in style


def test_report_says_each_problem_once_over_its_solutions() -> None:
    other = with_steps("a", problem="Another?", solution_idx=0)
    page = Page(html_report([SCORE, replace(SCORE, solution_idx=2), other, with_steps("b", problem=None)]))
    assert page.text_of["problem"] == ["What is 1 + 1?", "Another?"]
    assert page.text_of["h3"] == ["Solution 4", "Solution 2", "Solution 0", "Solution 4"]


def test_failure_shows_its_steps_and_reason_in_the_report() -> None:
    page = Page(html_report(FAILED))
    assert page.text_of["error"] == ["Not scored: too long by 7 <tokens>"]
    assert [step["class"] for step in page.steps()] == ["step unscored"] * 3
    assert page.text_of["text"] == ["First.", "Second.", "Third."]
    assert "mark" not in page.text_of


def test_report_is_written_as_utf8_whatever_the_text_holds(tmp_path: Path) -> None:
    path = write_html_report(tmp_path / "report.html", with_steps("中文 \ud800", "é"), title="Ω")
    page = Page(path.read_bytes().decode("utf-8"))
    assert page.text_of["text"] == ["中文 \ufffd", "é"]
    assert page.text_of["title"] == ["Ω"]


def test_score_of_a_verifier_that_came_with_a_checkpoint_is_taken_too() -> None:
    foreign: Any = SimpleNamespace(**dict(SCORE.items()))
    assert html_report(foreign) == html_report([SCORE])
    assert printed(foreign) == printed(SCORE)


@pytest.mark.parametrize("show", [html_report, terminal_table], ids=["html", "terminal"])
@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        ([], ValueError, "at least one SolutionScore"),
        (0.5, TypeError, "got float; make them with PRMVerifier"),
        ("text", TypeError, "got str"),
        ([0.5], TypeError, "must hold SolutionScore objects, got float"),
        (replace(SCORE, step_probs=(0.5,)), ValueError, "solution 4 has 3 steps and 1 probabilities"),
        (replace(SCORE, steps=(), step_probs=()), ValueError, "solution 4 has 0 steps"),
        (replace(SCORE, step_probs=(0.5, 3.0, 0.5)), ValueError, r"step 2 of solution 4 must be in \[0, 1\], got 3.0"),
        (replace(SCORE, overall_score=float("nan")), ValueError, "overall score of solution 4 .* got nan"),
        (replace(FAILED, error=None), ValueError, "solution 5 has neither scores nor an error"),
        (replace(SCORE, steps=("a", None, "b")), TypeError, "step 2 of solution 4 must be text, got NoneType"),
    ],
)
def test_bad_scores_are_refused_with_a_reason(
    show: Callable[[Any], Any], scores: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        show(scores)


@pytest.mark.parametrize("show", [html_report, terminal_table], ids=["html", "terminal"])
def test_bad_bounds_are_refused(show: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"fair=0\.9 and good=0\.7"):
        show(SCORE, fair=0.9)


@pytest.mark.parametrize(("module", "show"), [("jinja2", html_report), ("rich.console", terminal_table)])
def test_missing_package_names_the_extra(
    module: str, show: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"modeling-prm\[train\]"):
        show(SCORE)
