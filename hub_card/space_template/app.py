"""A page that scores the steps of solutions with a process reward model, and ranks the solutions.

python app.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from ranking import CSS, MAX_SOLUTIONS, STEP_STYLES, RequestError, message_html, rank, ranking_html
from transformers import AutoModel, AutoProcessor

FOLDER = Path(__file__).resolve().parent
# Visitors who wait; more are told to come back.
MAX_WAITING = 32


def read_settings(path: Path = FOLDER / "space.json") -> dict[str, Any]:
    """Title, model and first example of this Space."""
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return settings


def load_verifier(settings: dict[str, Any]) -> Any:
    """The checkpoint's own verifier.

    Loading runs the code saved with the model, so the revision is a commit, which nobody can change.
    """
    if settings["repo"] is None:
        source, revision = str(FOLDER / "model"), "main"
    else:
        source, revision = settings["repo"], settings["revision"]
    model = AutoModel.from_pretrained(source, revision=revision, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(source, revision=revision, trust_remote_code=True)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return model.verifier(processor)


def build_app(verifier: Any, settings: dict[str, Any]) -> gr.Blocks:
    """The page, with the example scored already."""
    example = settings["example"]
    solutions = [*example["solutions"], *[""] * (MAX_SOLUTIONS - len(example["solutions"]))]

    def show(problem: str, step_style: str, *texts: str) -> str:
        try:
            return ranking_html(rank(verifier, problem, texts, step_style))
        except RequestError as error:
            return message_html(str(error))

    def rank_solutions(problem: str, solutions: list[str], step_style: str = "blank_lines") -> list[dict[str, Any]]:
        """Score solutions of one problem, best first; step_style is blank_lines, newlines or step_markers."""
        try:
            return [score.to_dict() for score in rank(verifier, problem, solutions, step_style)]
        except RequestError as error:
            raise gr.Error(str(error)) from error

    with gr.Blocks(title=settings["title"], analytics_enabled=False) as app:
        shown = gr.State(len(example["solutions"]))
        gr.Markdown(_head(settings))
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                problem = gr.Textbox(example["problem"], label="Problem", lines=2, max_lines=10)
                styles = [(label, style) for style, label in STEP_STYLES.items()]
                step_style = gr.Radio(styles, value=example["step_style"], label="A new step starts")
                boxes = [
                    gr.Textbox(
                        text, label=f"Solution {i + 1}", lines=4, max_lines=16, visible=i < len(example["solutions"])
                    )
                    for i, text in enumerate(solutions)
                ]
                with gr.Row():
                    add = gr.Button("Add a solution", min_width=120)
                    clear = gr.Button("Clear", min_width=80)
                score = gr.Button("Score", variant="primary")
            with gr.Column(scale=3, min_width=320):
                result = gr.HTML(show(example["problem"], example["step_style"], *solutions))
        inputs = [problem, step_style, *boxes]
        # One at a time: scoring takes the whole machine.
        limits: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "scoring"}
        score.click(show, inputs, result, api_visibility="private", **limits)
        add.click(_add_box, shown, [shown, add, *boxes], api_visibility="private", queue=False)
        clear.click(_clear, None, [problem, shown, add, *boxes, result], api_visibility="private", queue=False)
        gr.api(rank_solutions, api_name="rank", **limits)
    return app.queue(max_size=MAX_WAITING)


def _add_box(shown: int) -> list[Any]:
    shown = min(shown + 1, MAX_SOLUTIONS)
    return [shown, _add_button(shown), *[gr.update(visible=i < shown) for i in range(MAX_SOLUTIONS)]]


def _clear() -> list[Any]:
    return ["", 1, _add_button(1), *[gr.update(value="", visible=i < 1) for i in range(MAX_SOLUTIONS)], ""]


def _add_button(shown: int) -> Any:
    return gr.update(interactive=shown < MAX_SOLUTIONS)


def _head(settings: dict[str, Any]) -> str:
    repo, revision = settings["repo"], settings["revision"]
    if repo is None:
        model = "the model in this Space's own folder"
    else:
        model = f"[{repo}](https://huggingface.co/{repo}/tree/{revision}) at `{revision[:7]}`"
    return f"# {settings['title']}\n\nScores every step of a solution, and ranks several, with {model}."


def main() -> None:
    """Load the model and serve the page."""
    settings = read_settings()
    build_app(load_verifier(settings), settings).launch(css=CSS)


if __name__ == "__main__":
    main()
