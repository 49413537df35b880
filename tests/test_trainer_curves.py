"""Learning curves and reliability diagrams: what they show of numbers given, and what a training writes."""

from __future__ import annotations

import io
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text
from small_training import LABELS, make_dataset, make_trainer

from hub_card.card import CardData
from modeling_prm import PRMForStepScoring, PRMProcessor
from trainer import train
from trainer.curves import LearningCurves, can_draw, draw_pictures, evaluation_sets, plot_learning_curves
from trainer.curves import plot_reliability as plot
from trainer.metrics import ReliabilityTable

Folder = Callable[..., Path]
PNG = b"\x89PNG\r\n\x1a\n"
HISTORY = [
    {"loss": 0.7, "learning_rate": 1e-5, "epoch": 0.1, "step": 10},
    {"eval_math_loss": 0.6, "eval_math_roc_auc": 0.7, "eval_math_index_only_roc_auc": 0.65, "step": 10},
    {"eval_b_c_loss": 0.5, "eval_b_c_roc_auc": math.nan, "eval_b_c_ece": 0.2, "step": 10},
    {"loss": math.inf, "epoch": 0.2, "step": 20},
    {"loss": 0.4, "epoch": 0.3, "step": 30},
    {"eval_math_loss": 0.3, "eval_math_roc_auc": 0.9, "eval_math_index_only_roc_auc": 0.65, "step": 30},
    {"eval_math_loss": 0.25, "eval_math_roc_auc": 0.95, "step": 30},
    {"train_runtime": 1.0, "train_loss": 0.5, "step": 30},
]


def lines_of(axes: Any) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [tuple(map(float, point)) for point in line.get_xydata()] for line in axes.lines}


def test_curves_show_what_was_logged() -> None:
    figure = plot_learning_curves(HISTORY, title="of $x_1$ & $")
    panels = {axes.get_title(): lines_of(axes) for axes in figure.axes}
    assert panels == {
        # What is not finite is left out, and of two evaluations at a step the later one counts.
        "loss": {
            "training": [(10, 0.7), (30, 0.4)],
            "math": [(10, 0.6), (30, 0.25)],
            "b_c": [(10, 0.5)],
        },
        "ROC AUC": {
            "math": [(10, 0.7), (30, 0.95)],
            "math, step's index alone": [(10, 0.65), (30, 0.65)],
        },
        "calibration error (ECE)": {"b_c": [(10, 0.2)]},
    }
    colours = {line.get_label(): line.get_color() for axes in figure.axes for line in axes.lines}
    assert colours["math"] == colours["math, step's index alone"] != colours["b_c"]
    styles = {line.get_label(): line.get_linestyle() for axes in figure.axes for line in axes.lines}
    assert (styles["math"], styles["math, step's index alone"]) == ("-", "--")


def test_names_with_the_signs_of_formulas_are_drawn_as_they_are() -> None:
    history = [{"eval_$\\bad$_loss": 0.5, "eval_$\\bad$_ece": 0.5, "step": 1}]
    table = ReliabilityTable(counts=(1,), mean_probs=(0.5,), mean_labels=(1.0,))
    for figure in (plot_learning_curves(history, title="$\\x$"), plot({"$\\bad$": table}, title="$\\x$")):
        picture = io.BytesIO()
        figure.savefig(picture)  # raises where a name is read as a formula, which these are not
        assert picture.getvalue().startswith(b"\x89PNG")
        drawn = [text.get_text() for text in figure.findobj(Text)]
        assert any("$\\x$" in text for text in drawn)
        assert any("$\\bad$" in text for text in drawn)


def test_evaluation_sets_are_found_by_their_losses() -> None:
    assert evaluation_sets(HISTORY) == {"math": "eval_math_", "b_c": "eval_b_c_"}
    assert evaluation_sets([{"eval_loss": 1.0, "eval_roc_auc": 0.5, "step": 1}]) == {"eval": "eval_"}
    assert evaluation_sets([{"loss": 1.0, "step": 1}]) == {}
    with pytest.raises(ValueError, match="holds neither a loss nor a metric"):
        plot_learning_curves([{"epoch": 1.0, "step": 3}, {"loss": math.nan, "step": 4}])


def test_reliability_shows_the_bins_that_hold_something() -> None:
    table = ReliabilityTable(counts=(3, 0, 1), mean_probs=(0.2, math.nan, 0.9), mean_labels=(0.1, math.nan, 1.0))
    sharp = ReliabilityTable(counts=(2, 0, 2), mean_probs=(0.1, math.nan, 0.8), mean_labels=(0.1, math.nan, 1.0))
    diagram, counts = plot({"before": table, "after": sharp}, title="$a_b").axes
    assert diagram.get_title() == "$a_b"
    assert lines_of(diagram) == {
        "perfect calibration": [(0, 0), (1, 1)],
        "before (ECE 0.100)": [(0.2, 0.1), (0.9, 1.0)],  # (3 * 0.1 + 0.1) / 4
        "after (ECE 0.100)": [(0.1, 0.1), (0.8, 1.0)],  # 2 * 0.2 / 4
    }
    assert [bar.get_height() for bar in counts.patches] == [2, 0, 2]
    assert [bar.get_x() + bar.get_width() / 2 for bar in counts.patches] == pytest.approx([1 / 6, 1 / 2, 5 / 6])
    with pytest.raises(ValueError, match="at least one reliability table"):
        plot({})


def test_curves_are_redrawn_as_training_goes_on(prm_folder: Folder, tmp_path: Path) -> None:
    seen = []

    class Watch(LearningCurves):
        def _draw(self, args: Any, state: Any) -> None:
            super()._draw(args, state)
            seen.append((state.global_step, (tmp_path / "learning_curves.png").read_bytes()))

    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, eval_dataset=make_dataset(), **options)
    trainer.add_callback(Watch(seconds=0.0))
    trainer.train()
    assert [step for step, _ in seen] == [1, 2, 2]
    assert all(png.startswith(PNG) for _, png in seen)
    assert len({png for _, png in seen[:2]}) == 2
    # Within a minute of the last one, only the end draws.
    seen.clear()
    trainer.remove_callback(Watch)
    trainer.add_callback(Watch())
    trainer.train()
    assert [step for step, _ in seen] == [1, 2]


def test_other_processes_and_an_empty_history_draw_nothing(tmp_path: Path) -> None:
    callback, args = LearningCurves(), SimpleNamespace(output_dir=str(tmp_path))
    callback.on_train_end(args, SimpleNamespace(is_world_process_zero=False, log_history=HISTORY), None)
    callback.on_evaluate(args, SimpleNamespace(is_world_process_zero=True, log_history=[]), None)
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_written_ends_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    args = SimpleNamespace(output_dir=str(tmp_path / "file"))
    LearningCurves().on_train_end(args, SimpleNamespace(is_world_process_zero=True, log_history=HISTORY), None)
    assert "learning_curves.png could not be written" in caplog.text


def test_pictures_for_the_card_before_and_after_calibration(
    prm_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []
    monkeypatch.setattr("trainer.curves.plot_reliability", lambda tables, title: shown.append(tables) or plot(tables))
    sets = {"a b/c": make_dataset(), "second": make_dataset(LABELS[:3])}
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, eval_dataset=sets)
    trainer.evaluate()
    pictures = draw_pictures(trainer)
    files = ["learning_curves.png", "reliability_a-b-c.png", "reliability_second.png"]
    assert [picture.path for picture in pictures] == [str(tmp_path / file) for file in files]
    assert all((tmp_path / file).read_bytes().startswith(PNG) for file in files)
    assert pictures[1].caption == "Reliability of step probabilities on a b/c."
    before = (tmp_path / files[1]).read_bytes()
    trainer.model.config.temperature = 3.0
    trainer.calibration = SimpleNamespace(temperature=3.0, temperature_before=1.0, fitted_on=("second",))
    pictures = draw_pictures(trainer)
    assert pictures[1].caption.endswith("on a b/c, before and after the temperature was fitted on second.")
    assert pictures[2].caption.endswith("on second, before and after the temperature was fitted on these same steps.")
    assert (tmp_path / files[1]).read_bytes() != before
    assert [list(tables) for tables in shown] == [["temperature 1"]] * 2 + [["temperature 1", "temperature 3"]] * 2
    assert shown[2]["temperature 1"].ece == shown[0]["temperature 1"].ece != shown[2]["temperature 3"].ece


def test_without_matplotlib_a_line_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert can_draw()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not can_draw()
    assert "no pictures of the training: drawing learning curves needs matplotlib" in caplog.text
    with pytest.raises(ImportError, match=r'pip install "modeling-prm\[train\]"'):
        LearningCurves()


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _keep_logging() -> Iterator[None]:
    """The command sets up logging for its process, which is ours here."""
    root, handlers = logging.getLogger(), list(logging.getLogger().handlers)
    levels = {name: logging.getLogger(name).level for name in ("trainer", "modeling_prm", "hub_card")}
    yield
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def write_noisy_rows(path: Path, count: int, seed: int) -> Path:
    """Solutions of five steps that are right or wrong by their words, with one label in six turned around."""
    rng = np.random.default_rng(seed)
    lines = []
    for number in range(count):
        right = rng.random(5) < 0.7
        labels = right ^ (rng.random(5) < 1 / 6)
        steps = [f"{number} + {i} = {'so it is right' if ok else 'no, wrong'}." for i, ok in enumerate(right)]
        row = {"problem": f"What is {number + 1000 * seed}?", "steps": steps, "labels": [int(ok) for ok in labels]}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture
def options(backbone_folder: Folder, tmp_path: Path) -> list[str]:
    words = ["--backbone", backbone_folder("qwen2"), "--output-dir", tmp_path / "out", "--save-strategy", "no"]
    words += ["--train-data", write_noisy_rows(tmp_path / "train.jsonl", 64, seed=1)]
    words += ["--eval-data", write_noisy_rows(tmp_path / "eval.jsonl", 40, seed=2)]
    words += ["--max-steps", "12", "--learning-rate", "1e-2", "--per-device-eval-batch-size", "40"]
    return [*map(str, words), "--use-cpu", "--disable-tqdm", "true"]


def test_the_command_calibrates_draws_and_logs(options: list[str], tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    more = ["--report-to", "tensorboard", "--logging-steps", "2", "--eval-strategy", "steps", "--eval-steps", "6"]
    metrics = train.main([*options, *more])
    out = tmp_path / "out"
    stored = json.loads((out / "calibration.json").read_text())
    config = PRMForStepScoring.from_pretrained(out).config
    assert config.temperature == stored["temperature"] != 1.0
    assert config.error_threshold == stored["error_threshold"] != 0.5
    assert (stored["fitted_on"], stored["num_steps"], stored["step"]) == (["eval"], 200, 12)
    assert stored["loss_after"] < stored["loss_before"] == pytest.approx(metrics["eval_loss"])
    # What is reported was measured before.
    assert (
        metrics["eval_ece"] == stored["ece_before"] == json.loads((out / "eval_results.json").read_text())["eval_ece"]
    )
    assert metrics["eval_roc_auc"] > 0.7 > metrics["eval_index_only_roc_auc"]
    card = CardData.from_json((out / "card_data.json").read_text())
    assert card.results[0].metrics["ece"] == stored["ece_before"]
    assert card.results[0].note.endswith("were fitted on these same steps afterwards.")
    assert [Path(picture.path).name for picture in card.pictures] == ["learning_curves.png", "reliability_eval.png"]
    assert all(Path(picture.path).read_bytes().startswith(PNG) for picture in card.pictures)

    events = event_accumulator.EventAccumulator(str(next(out.rglob("*tfevents*")).parent))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "train/grad_norm", "train/learning_rate"} <= scalars
    names = ("loss", "roc_auc", "ece", "brier", "processbench_f1", "error_f1", "index_only_roc_auc")
    assert {f"eval/{name}" for name in names} <= scalars
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8, 10, 12]
    assert {event.step for event in events.Scalars("eval/roc_auc")} == {6, 12}
    assert [event.step for event in events.Images("reliability/eval")] == [12]


def test_the_command_without_calibration(options: list[str], tmp_path: Path) -> None:
    train.main([*options, "--report-to", "none", "--no-calibrate", "--max-steps", "1"])
    config = PRMForStepScoring.from_pretrained(tmp_path / "out").config
    assert (config.temperature, config.error_threshold) == (1.0, 0.5)
    assert not (tmp_path / "out" / "calibration.json").exists()
    assert (tmp_path / "out" / "learning_curves.png").exists()


def test_a_threshold_of_the_command_is_stored_and_kept(options: list[str], tmp_path: Path) -> None:
    named = [f"a={tmp_path / 'train.jsonl'}", f"b={tmp_path / 'eval.jsonl'}"]
    more = ["--report-to", "none", "--error-threshold", "0.3", "--calibration-set", "b"]
    train.main([*options, *more, "--eval-data", *named])
    folder = tmp_path / "out"
    stored = json.loads((folder / "calibration.json").read_text())
    model = PRMForStepScoring.from_pretrained(folder)
    assert model.config.temperature == stored["temperature"] != 1.0
    assert model.verifier(PRMProcessor.from_pretrained(folder)).threshold == 0.3
    assert (stored["fitted_on"], stored["threshold_metric"], list(stored["held_out"])) == (["b"], None, ["a"])


def test_a_calibration_set_that_is_not_there_stops_before_training(options: list[str], tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match=r"error: there is no evaluation set 'dev' to calibrate on, there are \['eval'\]"
    ):
        train.main([*options, "--report-to", "none", "--calibration-set", "dev"])
    assert not (tmp_path / "out" / "config.json").exists()
