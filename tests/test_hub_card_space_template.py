"""The page of a Space ranks as the model does, shows what visitors write as text, and refuses what is too much."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from hub_card import space
from hub_card.space import EXAMPLE, write_space
from modeling_prm import PRMForStepScoring, PRMProcessor, SolutionScore
from modeling_prm.step_splitting import STEP_STYLES

ROOT = Path(__file__).resolve().parents[1]
Folder = Callable[..., Path]
HOSTILE = "<script>alert(1)</script> &lt; ${alert(2)} {{value}} `x` \"q\" 'q' </span></li>"


def load_ranking() -> ModuleType:
    spec = importlib.util.spec_from_file_location("space_ranking", ROOT / "hub_card/space_template/ranking.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_floors_and_limits_are_those_of_the_project() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    required = (ROOT / "hub_card/space_template/requirements.txt").read_text(encoding="utf-8").split()
    assert [re.split("[>=]", name)[0] for name in required] == ["torch", "transformers", "gradio"]
    assert all(f'"{name}"' in pyproject for name in required[:2])
    ranking = load_ranking()
    assert ranking.MAX_SOLUTIONS == space._MAX_SOLUTIONS
    assert tuple(ranking.STEP_STYLES) == space._STEP_STYLES
    assert set(ranking.STEP_STYLES) <= set(STEP_STYLES)


# ---- how it ranks and what it shows, without Gradio ---------------------------------------------------


@pytest.fixture(scope="module")
def ranking() -> ModuleType:
    return load_ranking()


@pytest.fixture(scope="module")
def tiny(make_prm: Callable[..., Any]) -> tuple[PRMForStepScoring, PRMProcessor]:
    return make_prm("llama", max_length=120)


class Page(HTMLParser):
    """Collects the tags, the text of each element of one class, and what classes the steps have."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.bands: list[str] = []
        self.all_text = ""
        self._in_text = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = (dict(attrs).get("class") or "").split()
        self.tags.append(tag)
        if "prm-step" in names:
            self.bands += [name for name in names if name != "prm-step"]
        if self._in_text:
            raise AssertionError(f"a <{tag}> inside a visitor's text")
        if "prm-text" in names:
            self._in_text = True
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_text = False

    def handle_data(self, data: str) -> None:
        self.all_text += data
        if self._in_text:
            self.texts[-1] += data


def score_of(**changes: Any) -> SolutionScore:
    fields: dict[str, Any] = {
        "steps": ("a", "b"),
        "step_probs": (0.9, 0.2),
        "overall_score": 0.2,
        "aggregation": "min",
        "weakest_step": 1,
        "weakest_prob": 0.2,
        "first_error": 1,
        "threshold": 0.5,
        "solution_idx": 0,
    }
    return SolutionScore(**{**fields, **changes})


def test_scores_are_those_of_the_model_best_first(ranking: ModuleType, tiny: Any) -> None:
    model, processor = tiny
    texts = ["2 + 2 = 4.\n\nSo 4.", "  \n", "2 + 2 = 5.\n\n5.\n\nSo 5."]
    scores = ranking.rank(model.verifier(processor), "2 + 2?", texts, "blank_lines")
    steps = {0: ["2 + 2 = 4.", "So 4."], 2: ["2 + 2 = 5.", "5.", "So 5."]}
    expected = {}
    for index, of_it in steps.items():
        with torch.inference_mode():
            output = model(**processor(["2 + 2?"], [of_it], return_tensors="pt"))
        expected[index] = output.step_probs[0].tolist()
    # The box of white space counts, but is not ranked.
    assert [score.solution_idx for score in scores] == sorted(steps, key=lambda index: -min(expected[index]))
    for score in scores:
        assert list(score.steps) == steps[score.solution_idx]
        assert score.step_probs == pytest.approx(expected[score.solution_idx], abs=1e-5)
        assert score.overall_score == pytest.approx(min(expected[score.solution_idx]), abs=1e-5)


@pytest.mark.parametrize(
    ("style", "steps"),
    [
        ("blank_lines", ["Step 1: a\nb", "Step 2: c"]),
        ("newlines", ["Step 1: a", "b", "Step 2: c"]),
        ("step_markers", ["a\nb", "c"]),  # the model's template writes the markers itself
    ],
)
def test_steps_are_cut_as_asked(ranking: ModuleType, tiny: Any, style: str, steps: list[str]) -> None:
    model, processor = tiny
    (score,) = ranking.rank(model.verifier(processor), "x?", ["Step 1: a\nb\n\nStep 2: c"], style)
    assert list(score.steps) == steps


def test_text_of_visitors_is_shown_as_it_reads(ranking: ModuleType, tiny: Any) -> None:
    model, processor = tiny
    scores = ranking.rank(model.verifier(processor), "x?", [f"{HOSTILE}\n\nb\ud800"], "blank_lines")
    page = ranking.ranking_html(scores)
    assert Page(page).texts == [HOSTILE, "b?"]  # half a surrogate pair is no character
    assert "script" not in Page(page).tags
    # Gradio fills the page into a template, where these would be run.
    assert not re.search(r"[${}`]", page)
    message = ranking.message_html(HOSTILE)
    assert Page(message).all_text == HOSTILE
    assert Page(message).tags == ["div", "p"]


def test_colours_numbers_and_first_error(ranking: ModuleType) -> None:
    probs = (0.71, 0.7, 0.41, 0.4, 0.0)
    score = score_of(steps=tuple("abcde"), step_probs=probs, overall_score=0.0, first_error=2, solution_idx=1)
    page = Page(ranking.ranking_html([score, score_of(solution_idx=0, aggregation="last")]))
    assert page.bands == ["prm-good", "prm-fair", "prm-fair", "prm-poor", "prm-poor", "prm-good", "prm-poor"]
    assert "1. Solution 2 0.000 the lowest step · first step below 0.5: 3" in page.all_text
    assert "2. Solution 1 0.200 the last step · first step below 0.5: 2" in page.all_text
    assert "10.710a20.700b3" in page.all_text
    assert "30.410first error c" in page.all_text
    alone = Page(ranking.ranking_html([score_of(first_error=-1)]))
    assert "Solution 1 0.200 the lowest step · no step below 0.5" in alone.all_text
    assert "1. Solution" not in alone.all_text
    assert "first error" not in alone.all_text


def test_solution_that_is_too_long_is_named_as_its_box(ranking: ModuleType, tiny: Any) -> None:
    model, processor = tiny
    scores = ranking.rank(model.verifier(processor), "x?", ["", "1. " * 400, "ok"], "blank_lines")
    assert [score.solution_idx for score in scores] == [2, 1]
    assert scores[1].error.startswith("solution 1 is longer than max_length=120")
    page = Page(ranking.ranking_html(scores))
    assert "2. Solution 2Not scored: solution 2 is longer than max_length=120 tokens" in page.all_text
    assert page.texts == ["ok"]


@pytest.mark.parametrize(
    ("problem", "solutions", "style", "message"),
    [
        (" \n", ["a"], "newlines", "Write a problem first"),
        ("x?", ["", " "], "newlines", "at least one solution"),
        ("x?", [], "newlines", "at least one solution"),
        ("x?", ["a"] * 9, "newlines", "At most 8 solutions can be ranked at once, you sent 9"),
        ("x" * 10_000, ["a" * 10_001], "newlines", "20,000 characters together, yours have 20,001"),
        ("x?", ["a"], "words", "'words' is none of these"),
        (None, ["a"], "newlines", "as a text"),
        ("x?", ["a", 1], "newlines", "as a text"),
        ("x?", "abc", "newlines", "list of texts"),
    ],
)
def test_requests_are_checked(ranking: ModuleType, problem: Any, solutions: Any, style: str, message: str) -> None:
    with pytest.raises(ranking.RequestError, match=message):
        ranking.rank(None, problem, solutions, style)


# ---- the page itself ---------------------------------------------------------------------------------


@pytest.fixture
def needs_gradio() -> None:
    pytest.importorskip("gradio", reason="needs gradio: pip install modeling-prm[space]")


@pytest.fixture
def app(needs_gradio: None, prm_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module `app` of a Space for the tiny PRM."""
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    folder = write_space(tmp_path / "space", str(prm_folder("llama")), title="Tiny")
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module("app")
    for name in ("app", "ranking"):
        sys.modules.pop(name, None)


def test_page_shows_the_example_scored_and_answers(app: Any, prm_folder: Folder) -> None:
    settings = app.read_settings()
    verifier = app.load_verifier(settings)
    blocks = app.build_app(verifier, settings)
    functions = {function.name: function.fn for function in blocks.fns.values()}
    (html,) = [block for block in blocks.blocks.values() if type(block).__name__ == "HTML"]
    expected = PRMForStepScoring.from_pretrained(prm_folder("llama")).verifier(
        PRMProcessor.from_pretrained(prm_folder("llama"))
    )
    best = expected.rank_solutions(EXAMPLE["problem"], EXAMPLE["solutions"])
    shown = Page(html.value)
    assert shown.texts == [step for score in best for step in score.steps]
    for score in best:
        assert f"Solution {score.solution_idx + 1} {score.overall_score:.3f}" in shown.all_text

    hostile = Page(functions["show"]("x?", "newlines", HOSTILE, *[""] * 7))
    assert hostile.texts == [HOSTILE]
    assert f"{expected.score_solution('x?', [HOSTILE]).overall_score:.3f}" in hostile.all_text
    assert Page(functions["show"]("", "newlines", "a")).all_text == "Write a problem first."
    answer = functions["rank_solutions"]("x?", ["", "a\nb"], "newlines")
    assert json.loads(json.dumps(answer)) == answer
    assert [(score["solution_idx"], score["steps"]) for score in answer] == [(1, ["a", "b"])]
    with pytest.raises(importlib.import_module("gradio").Error, match="Write a problem first"):
        functions["rank_solutions"]("", ["a"])
    public = {name for name, about in blocks.get_api_info()["named_endpoints"].items()}
    assert public == {"/rank"}


def test_boxes_appear_and_go(app: Any) -> None:
    shown, button, *boxes = app._add_box(2)
    assert shown == 3
    assert button["interactive"]
    assert [box["visible"] for box in boxes] == [True] * 3 + [False] * 5
    shown, button, *_ = app._add_box(7)
    assert shown == 8
    assert not button["interactive"]
    assert app._add_box(8)[0] == 8
    problem, shown, button, *boxes, result = app._clear()
    assert (problem, shown, result) == ("", 1, "")
    assert [(box["value"], box["visible"]) for box in boxes] == [("", True)] + [("", False)] * 7


@pytest.mark.slow
def test_server_answers(needs_gradio: None, prm_folder: Folder, tmp_path: Path) -> None:
    client = pytest.importorskip("gradio_client", reason="needs gradio_client, which comes with gradio")
    folder = write_space(tmp_path / "space", str(prm_folder("llama")))
    environment = {**os.environ, "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_ANALYTICS_ENABLED": "False"}
    environment |= {"HF_HOME": str(tmp_path / "hf_home"), "NO_PROXY": "127.0.0.1", "PYTHONUNBUFFERED": "1"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        url = wait_for_url(tmp_path / "log", server)
        page = client.Client(url, verbose=False)
        answer = page.predict(
            problem="2 + 2?", solutions=["4.\n\nSo 4.", "5."], step_style="blank_lines", api_name="/rank"
        )
        assert sorted((score["solution_idx"], len(score["step_probs"])) for score in answer) == [(0, 2), (1, 1)]
        with pytest.raises(Exception, match="Write a problem first"):
            page.predict(problem="", solutions=["4."], step_style="blank_lines", api_name="/rank")
    finally:
        server.terminate()
        server.wait(30)


def wait_for_url(log: Path, server: subprocess.Popen[bytes]) -> str:
    for _ in range(240):
        if found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text()):
            return found[0]
        if server.poll() is not None:
            break
        time.sleep(0.5)
    raise AssertionError(log.read_text())
