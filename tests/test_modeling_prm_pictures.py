"""Bars, colours, texts and sizes of the pictures, read from the figures' artists."""

from __future__ import annotations

import io
import itertools
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra train")

from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from modeling_prm import SolutionScore, picture_text
from modeling_prm.pictures import plot_ranked_solutions, plot_step_scores

GREEN, ORANGE, RED = "#35b597", "#fbb040", "#e5646e"
CHINESE = "首先计算面积,底为六,高为四,所以面积等于十二。"
LONG = "The sum over all i splits into two parts, one for even and one for odd indices. " * 12
BROKEN_LATEX = r"So $\frac{1}{2 and \begin{align} x &= 1 $$ _^{}"


def make_score(
    steps: Sequence[str], probs: Sequence[float], overall: float, first_error: int, **fields: Any
) -> SolutionScore:
    weakest = min(range(len(probs)), key=lambda i: probs[i])
    return SolutionScore(
        **{
            "steps": tuple(steps),
            "step_probs": tuple(probs),
            "overall_score": overall,
            "aggregation": "min",
            "weakest_step": weakest,
            "weakest_prob": probs[weakest],
            "first_error": first_error,
            "threshold": 0.5,
            "solution_idx": 0,
            **fields,
        }
    )


def make_failure(steps: Sequence[str] = ("One.", "Two."), error: str = "too long by 7 tokens", **fields: Any) -> Any:
    nothing = dict.fromkeys(("step_probs", "overall_score", "weakest_step", "weakest_prob", "first_error"))
    rest = {"steps": tuple(steps), "error": error, "aggregation": "min", "threshold": 0.5, "solution_idx": 0}
    return SolutionScore(**{**nothing, **rest, **fields})


def bars(axes: Axes) -> list[tuple[float, str]]:
    """The width and colour of each bar, from the top of the picture down."""
    from_above = sorted(axes.patches, key=lambda bar: -axes.transData.transform((0, bar.get_y()))[1])
    return [(round(bar.get_width(), 6), to_hex(bar.get_facecolor())) for bar in from_above]


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def heading(figure: Figure) -> str:
    return figure.texts[0].get_text()


def dashed_at(axes: Axes) -> list[float]:
    return [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"]


def draw(figure: Figure, dpi: float = 100) -> None:
    figure.savefig(io.BytesIO(), format="png", dpi=dpi)


def test_bars_are_as_long_as_the_probabilities_with_step_one_on_top() -> None:
    (axes,) = plot_step_scores([0.95, 0.7, 0.41, 0.4, 0.0], ["a", "b", "c", "d", "e"]).axes
    assert bars(axes) == [(0.95, GREEN), (0.7, ORANGE), (0.41, ORANGE), (0.4, RED), (0.0, RED)]
    assert axes.get_xlim() == (0.0, 1.0)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Step 1", "Step 2", "Step 3", "Step 4", "Step 5"]
    for bar, tick in zip(axes.patches, axes.get_yticks(), strict=True):
        assert bar.get_y() + bar.get_height() / 2 == pytest.approx(tick)
    # A bar of no length still shows its colour, at 0.
    (edges,) = axes.collections
    assert [to_hex(color) for color in edges.get_colors()] == [GREEN, ORANGE, ORANGE, RED, RED]


def test_each_step_has_its_text_inside_and_its_number_beside_its_bar() -> None:
    (axes,) = plot_step_scores([0.95, 0.123], ["First step.", "Second step."]).axes
    places = {text.get_text(): text.get_position() for text in axes.texts}
    for step, number, bar in zip(("First step.", "Second step."), ("0.950", "0.123"), axes.patches, strict=True):
        for text in (step, number):
            assert bar.get_y() < places[text][1] < bar.get_y() + bar.get_height()
        assert 0.0 < places[step][0] < 0.05
        assert places[number][0] > 1.0


def test_bounds_and_line_are_options() -> None:
    (axes,) = plot_step_scores([0.85, 0.6, 0.3], ["a", "b", "c"], good=0.9, fair=0.5, line=0.25).axes
    assert [color for _, color in bars(axes)] == [ORANGE, ORANGE, RED]
    assert dashed_at(axes) == [0.25]


def test_line_stands_at_the_threshold_of_the_score() -> None:
    (axes,) = plot_step_scores([0.9], ["a"]).axes
    assert dashed_at(axes) == [0.5]
    (axes,) = plot_step_scores(make_score(["a"], [0.9], 0.9, -1, threshold=0.3)).axes
    assert dashed_at(axes) == [0.3]


def test_score_brings_problem_overall_score_and_first_error() -> None:
    score = make_score(["a", "b", "c"], [0.9, 0.2, 0.1], 0.1, 1, problem="What is 1 + 1?")
    figure = plot_step_scores(score)
    assert heading(figure) == "What is 1 + 1?\n0.100: min of 3 steps, first error (below 0.5): step 2, weakest: step 3"
    assert texts(figure.axes[0]) == ["a", "0.900", "b", "0.200  first error", "c", "0.100"]
    assert heading(plot_step_scores(score, title="Mine")).startswith("Mine\n0.100: min")


@pytest.mark.parametrize("to_array", [torch.tensor, np.array], ids=["tensor", "array"])
def test_probabilities_may_be_an_array(to_array: Callable[[list[float]], Any]) -> None:
    (axes,) = plot_step_scores(to_array([0.75, 0.25]), ["a", "b"]).axes
    assert bars(axes) == [(0.75, GREEN), (0.25, RED)]


def test_score_of_a_verifier_that_came_with_a_checkpoint_is_taken_too() -> None:
    foreign = SimpleNamespace(**dict(make_score(["a"], [0.75], 0.75, -1).items()))
    assert bars(plot_step_scores(foreign).axes[0]) == [(0.75, GREEN)]


@pytest.mark.parametrize("width", [4.0, 9.0])
@pytest.mark.parametrize("dpi", [72, 100, 150, 200, 300])
def test_texts_stay_inside_axes_and_bars_stay_apart(width: float, dpi: float) -> None:
    steps = [LONG, "x" * 400, "W" * 300, BROKEN_LATEX, "short", "i " * 300]
    figure = plot_step_scores(make_score(steps, [0.5] * 6, 0.5, -1, problem=LONG), width=width)
    figure.set_dpi(dpi)
    renderer = FigureCanvasAgg(figure).get_renderer()
    (axes,) = figure.axes
    inside = axes.get_window_extent(renderer)
    boxes = [bar.get_window_extent(renderer) for bar in axes.patches]
    for text, box in zip([t for t in axes.texts if t.get_position()[0] < 1], boxes, strict=True):
        extent = text.get_window_extent(renderer)
        assert inside.x0 < extent.x0
        assert extent.x1 < inside.x1
        assert box.y0 <= extent.y0
        assert extent.y1 <= box.y1
    assert all(below.y1 < above.y0 for above, below in itertools.pairwise(boxes))
    assert figure.texts[0].get_window_extent(renderer).x1 < figure.bbox.x1
    assert figure.texts[0].get_window_extent(renderer).y0 > inside.y1


def test_long_text_ends_in_an_ellipsis_after_its_rows() -> None:
    for max_lines in (1, 2, 3):
        text = texts(plot_step_scores([0.5], [LONG], max_lines=max_lines).axes[0])[0]
        assert text.count("\n") == max_lines - 1
        assert text.endswith("…")
        assert LONG.startswith(text.replace("\n", " ").removesuffix("…"))
    whole = " ".join(LONG.split())
    assert texts(plot_step_scores([0.5], [LONG], max_lines=99).axes[0])[0].replace("\n", " ") == whole


def test_line_breaks_of_a_step_do_not_make_rows() -> None:
    assert texts(plot_step_scores([0.5], ["a\n\n  b\tc"]).axes[0])[0] == "a b c"


def test_height_grows_by_a_row_for_each_step() -> None:
    def height(steps: list[str]) -> float:
        return plot_step_scores([0.5] * len(steps), steps).get_size_inches()[1]

    # A row: 0.165 of text, 0.1 around it, 0.08 to the next.
    assert height(["short"]) < 2.0
    assert height(["short"] * 60) - height(["short"]) == pytest.approx(59 * 0.345)
    assert height([LONG]) - height(["short"]) == pytest.approx(2 * 0.165)


def test_sixty_steps_each_have_a_bar_a_label_and_a_number() -> None:
    figure = plot_step_scores([(i + 1) / 100 for i in range(60)], [f"step text {i}" for i in range(60)])
    draw(figure)
    (axes,) = figure.axes
    assert [width for width, _ in bars(axes)] == pytest.approx([(i + 1) / 100 for i in range(60)])
    assert [color for _, color in bars(axes)] == [RED] * 40 + [ORANGE] * 20
    assert texts(axes)[-2:] == ["step text 59", "0.600"]


def test_broken_latex_is_drawn_as_its_source() -> None:
    figure = plot_step_scores(make_score([BROKEN_LATEX], [0.9], 0.9, -1, problem=BROKEN_LATEX))
    draw(figure)
    assert texts(figure.axes[0])[0] == BROKEN_LATEX
    assert heading(figure).startswith(BROKEN_LATEX)
    draw(plot_ranked_solutions([make_score([BROKEN_LATEX], [0.9], 0.9, -1, problem=BROKEN_LATEX)]))


def only_the_own_font(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(font_manager.fontManager, "get_font_names", lambda: ["DejaVu Sans"])


def test_characters_without_a_font_are_squares_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    only_the_own_font(monkeypatch)
    picture_text.logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    with warnings.catch_warnings(), caplog.at_level("WARNING", logger=picture_text.logger.name):
        warnings.simplefilter("error")
        for _ in range(2):
            figure = plot_step_scores([0.9, 0.8], ["面积 = 12", "高"])
            draw(figure)
            assert texts(figure.axes[0])[::2] == ["□□ = 12", "□"]
    (record,) = caplog.records
    assert "install Noto Sans CJK" in record.getMessage()


def test_chinese_is_drawn_and_broken_between_its_characters() -> None:
    installed = set(font_manager.fontManager.get_font_names())
    if not installed & {name for name in picture_text._MORE_FONTS if "CJK" in name or "WenQuanYi" in name}:
        pytest.skip("needs a font with Chinese characters, such as Noto Sans CJK")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plot_step_scores([0.9], [CHINESE * 5], max_lines=9, width=5.0)
        draw(figure)
    lines = texts(figure.axes[0])[0].split("\n")
    assert "".join(lines) == CHINESE * 5
    assert len(lines) > 2
    assert not [line for line in lines if line.startswith("。")]


def test_solution_that_was_not_scored_shows_its_steps_and_why() -> None:
    figure = plot_step_scores(make_failure())
    draw(figure)
    assert heading(figure) == "not scored: too long by 7 tokens"
    assert not figure.axes[0].patches
    assert dashed_at(figure.axes[0]) == []
    assert [text for text in texts(figure.axes[0]) if text] == ["One.", "Two."]
    draw(plot_step_scores(make_failure(steps=())))


def test_ranked_solutions_stand_best_first_equal_ones_in_order_and_failures_last() -> None:
    figure = plot_ranked_solutions(
        [
            make_failure(solution_idx=0),
            make_score(["Answer 1."], [0.3], 0.3, 0, solution_idx=1),
            make_score(["So.", "Answer 2."], [0.9, 0.6], 0.6, -1, solution_idx=2),
            make_score(["Answer 3."], [0.3], 0.3, 0, solution_idx=3),
            make_score(["Answer 4."], [0.8], 0.8, -1, solution_idx=4),
        ]
    )
    draw(figure)
    overall = figure.axes[0]
    labels = [label.get_text() for label in overall.get_yticklabels()]
    assert labels == ["1. Solution 4", "2. Solution 2", "3. Solution 1", "4. Solution 3", "5. Solution 0"]
    assert bars(overall) == [(0.8, GREEN), (0.6, ORANGE), (0.3, RED), (0.3, RED)]
    shown = [text for text in texts(overall) if text]
    assert shown[:4] == ["Answer 4.", "0.800", "Answer 2.", "0.600"]
    assert shown[-1] == "not scored: too long by 7 tokens"
    assert dashed_at(overall) == [0.5]
    assert overall.get_ylim() == pytest.approx((5 * 0.55, 0.0))


def test_columns_of_steps_are_as_high_as_their_probabilities() -> None:
    scores = [
        make_score(["a", "b", "c"], [0.9, 0.45, 0.1], 0.1, 1, solution_idx=1),
        make_score(["a", "b"], [0.8, 0.7], 0.7, -1, solution_idx=0),
    ]
    figure = plot_ranked_solutions(scores)
    columns = figure.axes[1]
    # Best first; a row is 0.55 inch, of which a probability of 1 fills 0.8; y runs downwards.
    upwards = [-bar.get_height() / (0.8 * 0.55) for bar in columns.patches]
    assert upwards == pytest.approx([0.8, 0.7, 0.9, 0.45, 0.1])
    assert [to_hex(bar.get_facecolor()) for bar in columns.patches] == [GREEN, ORANGE, GREEN, ORANGE, RED]
    assert [round(bar.get_x() + bar.get_width() / 2) for bar in columns.patches] == [1, 2, 1, 2, 3]
    assert [bar.get_y() for bar in columns.patches] == pytest.approx([0.9 * 0.55] * 2 + [1.9 * 0.55] * 3)
    assert columns.get_xlim() == (0.5, 3.5)
    assert texts(columns) == ["0.80", "0.70", "0.90", "0.45", "0.10"]
    (outline,) = columns.lines
    assert np.mean(outline.get_xdata()[:4]) == pytest.approx(2.0)
    assert np.mean(outline.get_ydata()[:4]) == pytest.approx(1.5 * 0.55)


def test_many_columns_go_without_numbers() -> None:
    score = make_score(["a"] * 60, [0.6] * 60, 0.6, -1)
    figure = plot_ranked_solutions([score])
    draw(figure)
    assert len(figure.axes[1].patches) == 60
    assert texts(figure.axes[1]) == []


def test_ranking_of_failures_alone_can_be_drawn() -> None:
    figure = plot_ranked_solutions([make_failure(steps=(), problem="p"), make_failure(solution_idx=1, problem="p")])
    draw(figure)
    assert heading(figure) == "p"
    assert not figure.axes[0].patches


GOOD = make_score(["a"], [0.9], 0.9, -1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plot_step_scores([0.9]), TypeError, "one SolutionScore, or probabilities and the list of their steps"),
        (lambda: plot_step_scores([0.9], "one text"), TypeError, "probabilities and the list of their steps"),
        (lambda: plot_step_scores("text", ["a"]), TypeError, "probabilities and the list of their steps"),
        (lambda: plot_step_scores([0.9], [None]), TypeError, "step 1 must be text, got NoneType"),
        (lambda: plot_step_scores([GOOD], ["a"]), TypeError, "probabilities and the list of their steps"),
        (lambda: plot_step_scores(GOOD, ["a"]), TypeError, "leave steps out"),
        (lambda: plot_step_scores([0.9, 0.8], ["a"]), ValueError, "got 1 steps and 2 probabilities"),
        (lambda: plot_step_scores([], []), ValueError, "got 0 steps and 0 probabilities"),
        (lambda: plot_step_scores([0.5, 2.5], ["a", "b"]), ValueError, r"step 2 must be in \[0, 1\], got 2.5"),
        (lambda: plot_step_scores([float("nan")], ["a"]), ValueError, "got nan"),
        (lambda: plot_step_scores([0.5], ["a"], good=0.3), ValueError, "fair=0.4 and good=0.3"),
        (lambda: plot_step_scores([0.5], ["a"], line=1.5), ValueError, "line must be in"),
        (lambda: plot_step_scores([0.5], ["a"], width=1.0), ValueError, "width is in inches"),
        (lambda: plot_step_scores([0.5], ["a"], max_lines=0), ValueError, "max_lines must be at least 1, got 0"),
        (lambda: plot_ranked_solutions([]), ValueError, "at least one SolutionScore"),
        (lambda: plot_ranked_solutions([0.5]), TypeError, "got float"),
        (
            lambda: plot_ranked_solutions([GOOD, make_score(["a"], [0.9], 0.9, -1, aggregation="mean")]),
            ValueError,
            "within one aggregation, got 2: 'min', 'mean'",
        ),
        (
            lambda: plot_ranked_solutions([GOOD, make_score(["a"], [0.9], 0.9, -1, problem="p")]),
            ValueError,
            "within one problem, got 2: None, 'p'",
        ),
    ],
)
def test_bad_input_is_refused_with_a_reason(call: Callable[[], Figure], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


CLEAN = """
import sys
from modeling_prm.pictures import plot_step_scores
assert not [name for name in sys.modules if name.split(".")[0] == "matplotlib"], "imported too early"
figure = plot_step_scores([0.9, 0.2], ["a", "b"])
figure.savefig(sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
"""


def test_nothing_is_imported_early_and_pyplot_never(tmp_path: Path) -> None:
    picture = tmp_path / "steps.png"
    done = subprocess.run([sys.executable, "-c", CLEAN, picture], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"modeling-prm\[train\]"):
        plot_step_scores([0.9], ["a"])


def test_pictures_and_reports_are_not_shipped_with_a_checkpoint(prm_folder: Callable[[str], Path]) -> None:
    names = {path.name for path in prm_folder("llama").iterdir()}
    assert "modeling_prm.py" in names
    assert not names & {"picture_text.py", "pictures.py", "reports.py", "step_report.html"}


def test_pictures_of_the_documentation_are_drawn_from_a_saved_model(
    prm_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    script = Path(__file__).parents[1] / "docs" / "make_pictures.py"
    main = runpy.run_path(str(script))["main"]
    main(["--model", str(prm_folder("llama")), "--output-dir", str(tmp_path), "--chromium", ""])
    assert {path.name for path in tmp_path.iterdir()} == {"step_scores.png", "ranked_solutions.png", "step_report.html"}
    assert "Wait, 8 - 2 = 6." in (tmp_path / "step_report.html").read_text(encoding="utf-8")
