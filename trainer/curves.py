"""Pictures of a training: learning curves, and how far step probabilities can be taken at their word.

    trainer.add_callback(LearningCurves())  # output_dir/learning_curves.png, redrawn as the training goes on
    plot_learning_curves(trainer.state.log_history).savefig("curves.png")
    plot_reliability({"held-out": reliability_table(step_probs, labels)}).savefig("reliability.png")

Nothing is shown and no window system is needed: the functions return a `matplotlib.figure.Figure` that pyplot
knows nothing of.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from transformers import TrainerCallback

from hub_card.card import Picture
from modeling_prm.reports import import_optional

from .metrics import ReliabilityTable
from .model_calibration import reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

CURVES_FILE = "learning_curves.png"
# Told apart by readers who are colour-blind too.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b")
_GREY = "#5a6270"
_DPI = 120
# The metrics of each panel, with what is called by name there; dashed is what the step's index alone reaches.
_PANELS = (
    ("ROC AUC", "roc_auc"),
    ("F1 of the first error", "processbench_f1"),
    ("average precision of errors", "average_precision"),
    ("calibration error (ECE)", "ece"),
)
_INDEX_ONLY = "index_only_"


def plot_learning_curves(log_history: Sequence[Mapping[str, Any]], *, title: str | None = None) -> Figure:
    """Draw the loss, and the metrics of each evaluation set, against the optimizer step.

    The first panel holds the training loss and the loss of each evaluation set; the others ROC AUC, ProcessBench
    F1, average precision and expected calibration error of each set, with what the step's index alone reaches as
    a dashed line. A panel without a number is left out, and so is a number that is not finite.

    Args:
        log_history: `trainer.state.log_history`, or what `trainer_state.json` holds under this name.
        title: over the panels.

    Returns:
        The figure, an `Axes` a panel, named by its title.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the history holds neither a loss nor a metric.
    """
    figure_class = import_optional("matplotlib.figure", "drawing the curves", "matplotlib").Figure
    training = _points(log_history, "loss")
    sets = evaluation_sets(log_history)
    panels: list[tuple[str, str, list[tuple[str, str, list[tuple[int, float]]]]]] = []
    lines = [("training", _GREY, training)] if training else []
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(sets)}
    lines += [(name, colours[name], _points(log_history, f"{prefix}loss")) for name, prefix in sets.items()]
    panels.append(("loss", "loss", lines))
    for label, metric in _PANELS:
        panels.append(
            (
                label,
                metric,
                [(name, colours[name], _points(log_history, prefix + metric)) for name, prefix in sets.items()],
            )
        )
    panels = [(label, metric, [line for line in lines if line[2]]) for label, metric, lines in panels]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        raise ValueError("this history holds neither a loss nor a metric; train or evaluate first")
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = figure_class(figsize=(4.2 * columns, 3.2 * rows), dpi=_DPI, layout="constrained", facecolor="white")
    for number, (label, metric, lines) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        for name, colour, points in lines:
            _draw_line(axes, points, color=colour, label=name, marker="" if name == "training" else "o")
        for name, prefix in sets.items() if metric != "loss" else ():
            points = _points(log_history, f"{prefix}{_INDEX_ONLY}{metric}")
            _draw_line(axes, points, color=colours[name], label=f"{name}, step's index alone", linestyle="--")
        _style(axes, title=label, xlabel="optimizer step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        _legend(axes, 7)
    if title:
        figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def plot_reliability(tables: Mapping[str, ReliabilityTable], *, title: str | None = None) -> Figure:
    """Draw the share of correct steps against their mean probability, and below how many steps there are.

    On the diagonal, of the steps with probability p a share of p is correct; below it steps are rated too high.

    Args:
        tables: reliability tables of one set of steps by name, for example before and after calibration.
        title: over the diagram.

    Returns:
        The figure, of two `Axes`: the diagram, with a line a table, and the counts of the last table.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there is no table.
    """
    if not tables:
        raise ValueError("at least one reliability table is needed, got none")
    figure_class = import_optional("matplotlib.figure", "drawing reliability", "matplotlib").Figure
    figure = figure_class(figsize=(4.8, 5.6), dpi=_DPI, layout="constrained", facecolor="white")
    diagram, counts = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
    diagram.plot([0, 1], [0, 1], color=_GREY, linestyle=":", linewidth=1, label="perfect calibration")
    for index, (name, table) in enumerate(tables.items()):
        rows = zip(table.counts, table.mean_probs, table.mean_labels, strict=True)
        points = [(prob, label) for count, prob, label in rows if count]
        diagram.plot(
            [prob for prob, _ in points],
            [label for _, label in points],
            marker="o",
            markersize=4,
            color=_COLOURS[index % len(_COLOURS)],
            label=f"{name} (ECE {table.ece:.3f})",
        )
        last = table
    width = 1.0 / len(last.counts)
    counts.bar([(bin + 0.5) * width for bin in range(len(last.counts))], last.counts, width=0.9 * width, color=_GREY)
    _style(diagram, title=title, ylabel="share of correct steps")
    _style(counts, xlabel="probability that the step is correct", ylabel="steps")
    diagram.set(xlim=(0, 1), ylim=(0, 1))
    _legend(diagram, 8)
    return figure


class LearningCurves(TrainerCallback):
    """Draws `learning_curves.png` in the output folder as a training goes on, and at its end.

    Args:
        seconds: the least time between two drawings, so that frequent evaluations are not slowed down.
    """

    def __init__(self, *, seconds: float = 60.0) -> None:
        import_optional("matplotlib.figure", "LearningCurves", "matplotlib")
        self.seconds = seconds
        self._drawn_at = -math.inf

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() - self._drawn_at >= self.seconds:
            self._draw(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._draw(args, state)

    def _draw(self, args: Any, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        try:
            figure = plot_learning_curves(state.log_history)
        except ValueError:
            return  # nothing is logged yet
        _save(figure, Path(args.output_dir) / CURVES_FILE)
        self._drawn_at = time.monotonic()


def can_draw() -> bool:
    """Whether matplotlib is installed; one logged line says so where it is not."""
    try:
        import_optional("matplotlib.figure", "drawing learning curves", "matplotlib")
    except ImportError as error:
        logger.warning("no pictures of the training: %s", error)
        return False
    return True


def draw_pictures(trainer: Any) -> tuple[Picture, ...]:
    """Write learning curves and a reliability diagram of each evaluation set into the output folder, as PNG.

    The diagrams go to TensorBoard too, where the trainer reports to it. They show the last evaluation, before and
    after calibration where there was one.

    Args:
        trainer: a `PRMTrainer` after training or evaluation; only its main process draws.

    Returns:
        The pictures with captions for a model card; none on other processes.

    Raises:
        ImportError: matplotlib is missing.
    """
    if not trainer.is_world_process_zero():
        return ()
    folder = Path(trainer.args.output_dir)
    pictures = []
    try:
        curves = plot_learning_curves(trainer.state.log_history)
    except ValueError:
        pass  # neither trained nor evaluated
    else:
        caption = "Loss, and metrics of the evaluations, while training; dashed: what the step's index alone reaches."
        if _save(curves, folder / CURVES_FILE):
            pictures.append(Picture(path=str(folder / CURVES_FILE), caption=caption))
    for name, scores in trainer.scores.items():
        tables, caption = _reliability_tables(trainer, name, scores)
        shown = "held-out problems" if name == "eval" else name
        figure = plot_reliability(tables, title=f"Reliability on {shown}")
        file = folder / f"reliability_{re.sub(r'[^A-Za-z0-9_-]+', '-', name)}.png"
        _to_tensorboard(trainer, f"reliability/{name}", figure)
        if _save(figure, file):
            pictures.append(Picture(path=str(file), caption=f"Reliability of step probabilities on {shown}{caption}."))
    return tuple(pictures)


def evaluation_sets(log_history: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The evaluation sets that a history holds losses of, with the prefix of their metrics: `{"eval": "eval_"}`."""
    keys = dict.fromkeys(key for entry in log_history for key in entry)
    prefixes = [key.removesuffix("loss") for key in keys if key.startswith("eval_") and key.endswith("_loss")]
    return {prefix.removeprefix("eval_").removesuffix("_") or "eval": prefix for prefix in prefixes}


def _points(log_history: Iterable[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Optimizer step and value of each finite number logged under a key; a step logged twice has its last one."""
    found = {
        int(entry["step"]): float(entry[key])
        for entry in log_history
        if "step" in entry and isinstance(entry.get(key), (int, float)) and math.isfinite(entry[key])
    }
    return sorted(found.items())


def _reliability_tables(trainer: Any, name: str, scores: Any) -> tuple[dict[str, ReliabilityTable], str]:
    calibration = trainer.calibration
    temperature = trainer.model.config.temperature
    now = {f"temperature {temperature:.3g}": reliability(scores, temperature)}
    if calibration is None or calibration.temperature != temperature:
        return now, ""
    before = {f"temperature {calibration.temperature_before:.3g}": reliability(scores, calibration.temperature_before)}
    where = "these same steps" if name in calibration.fitted_on else ", ".join(calibration.fitted_on)
    return before | now, f", before and after the temperature was fitted on {where}"


def _draw_line(axes: Axes, points: Sequence[tuple[int, float]], **style: Any) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), linewidth=1.3, markersize=3, **style)


def _legend(axes: Axes, size: int) -> None:
    for text in axes.legend(fontsize=size, frameon=False).get_texts():
        # Names of data are the user's, and no formula.
        text.set_parse_math(False)


def _style(axes: Axes, *, title: str | None = None, xlabel: str = "", ylabel: str = "") -> None:
    axes.set_xlabel(xlabel, fontsize=8, color=_GREY)
    axes.set_ylabel(ylabel, fontsize=8, color=_GREY)
    axes.set_title(title or "", fontsize=9, parse_math=False)
    axes.tick_params(labelsize=8, colors=_GREY)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, file: Path) -> bool:
    """Write a picture; a disk that is full ends no training."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)
    except OSError as error:
        logger.warning("%s could not be written: %s", file, error)
        return False
    return True


def _pixels(figure: Figure) -> npt.NDArray[np.uint8]:
    """The drawn figure, (height, width, 3)."""
    canvas = import_optional("matplotlib.backends.backend_agg", "drawing", "matplotlib").FigureCanvasAgg(figure)
    canvas.draw()
    pixels: npt.NDArray[np.uint8] = np.asarray(canvas.buffer_rgba())[..., :3]
    return pixels


def _to_tensorboard(trainer: Any, tag: str, figure: Figure) -> None:
    for callback in trainer.callback_handler.callbacks:
        writer = getattr(callback, "tb_writer", None)
        if writer is not None:
            writer.add_image(tag, _pixels(figure), trainer.state.global_step, dataformats="HWC")
            writer.flush()
