"""Draws the pictures of the documentation from scores that a saved PRM gives.

    python docs/make_pictures.py --model outputs/demo/model

The model is the one that `make demo` trains, since the example is of its kind: arithmetic within ten.
Screenshots of the report and of the terminal table need a headless Chromium, and are left out without one.
"""

from __future__ import annotations

import argparse
import io
import logging
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from modeling_prm import PRMForStepScoring, PRMProcessor, PRMVerifier, SolutionScore
from modeling_prm.pictures import plot_ranked_solutions, plot_step_scores
from modeling_prm.reports import print_scores, write_html_report
from trainer.demo_data import example_solutions

logger = logging.getLogger("make_pictures")

DPI = 150
# More solutions of the demo's example problem, each with another error: in the last operation, in the answer,
# in a number copied from the problem.
MORE_SOLUTIONS = (
    ("5 + 3 = 8.", "8 - 2 = 6.", "6 + 1 = 8.", "The answer is 8."),
    ("5 + 3 = 8.", "8 - 2 = 6.", "6 + 1 = 7.", "The answer is 6."),
    ("5 + 2 = 7.", "7 - 2 = 5.", "5 + 1 = 6.", "The answer is 6."),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures of the documentation.")
    parser.add_argument("--model", default="outputs/demo/model", help="a saved PRM (default: %(default)s)")
    parser.add_argument("--output-dir", default=str(Path(__file__).parent), help="default: %(default)s")
    parser.add_argument(
        "--chromium",
        default=shutil.which("chromium") or shutil.which("google-chrome"),
        help="the browser's command, '' for none (default: found on PATH)",
    )
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = Path(options.output_dir)

    ranked = score_example(options.model)
    self_corrected = max(ranked, key=lambda score: len(score.steps))
    for name, figure in (
        ("step_scores.png", plot_step_scores(self_corrected)),
        ("ranked_solutions.png", plot_ranked_solutions(ranked)),
    ):
        figure.savefig(folder / name, dpi=DPI)
        logger.info("wrote %s", folder / name)
    report = write_html_report(folder / "step_report.html", ranked)
    logger.info("wrote %s", report)

    if not options.chromium:
        logger.warning("without Chromium, step_report.png and terminal_table.png are left out")
        return
    with tempfile.TemporaryDirectory() as scratch:
        terminal = Path(scratch, "terminal.html")
        terminal.write_text(terminal_page(ranked), encoding="utf-8")
        for page, name in ((report, "step_report.png"), (terminal, "terminal_table.png")):
            take_screenshot(options.chromium, page, folder / name)
            logger.info("wrote %s", folder / name)


def score_example(model_folder: str) -> list[SolutionScore]:
    """The demo's example problem with six solutions, best first."""
    verifier = PRMVerifier(PRMForStepScoring.from_pretrained(model_folder), PRMProcessor.from_pretrained(model_folder))
    problem, solutions = example_solutions()
    return verifier.rank_solutions(problem, [*(s["steps"] for s in solutions.values()), *MORE_SOLUTIONS])


def terminal_page(scores: Sequence[SolutionScore]) -> str:
    """What `print_scores` writes for the best and the worst solution, as a web page."""
    from rich.console import Console

    console = Console(record=True, width=88, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    print_scores([scores[0], scores[-1]], console=console)
    return console.export_html(inline_styles=True)


def take_screenshot(chromium: str, page: Path, picture: Path) -> None:
    """Photograph a page in light mode, without the empty rows below it."""
    from PIL import Image, ImageChops

    with tempfile.TemporaryDirectory() as profile:
        command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={profile}", "--window-size=860,4000", f"--screenshot={picture.resolve()}"]
        subprocess.run([*command, page.resolve().as_uri()], check=True, capture_output=True, timeout=120)
    with Image.open(picture) as loaded:
        image = loaded.convert("RGB")
    background = Image.new("RGB", image.size, image.getpixel((0, image.height - 1)))
    box = ImageChops.difference(image, background).getbbox()
    bottom = image.height if box is None else min(image.height, box[3] + 16)
    image.crop((0, 0, image.width, bottom)).save(picture, optimize=True)


if __name__ == "__main__":
    main()
