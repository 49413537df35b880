"""Calibration of a trained model: fitted on its last evaluation, stored in its config.

    trainer.evaluate()
    calibration = calibrate(trainer)
    store_calibration("outputs/my-prm", calibration)

Temperature and threshold are fitted on steps that were held out from training, and stored in the model's config,
where `step_probs` and the verifier read them. What is then measured on those same steps is too good, so the
metrics from before stand in results and card, and those of sets that were not fitted on are computed anew.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from modeling_prm.step_loss import IGNORED_LABEL
from modeling_prm.step_loss import step_loss as masked_step_loss

from .adapters import ADAPTER_FOLDER
from .calibration import THRESHOLD_METRICS, choose_threshold, fit_temperature
from .metrics import FloatArray, ReliabilityTable, bce_from_logits, class_targets, reliability_table, step_metrics

logger = logging.getLogger(__name__)

CALIBRATION_FILE = "calibration.json"
# Fewer labelled steps say too little of either number.
MIN_STEPS = 100


@dataclass
class CalibrationArguments:
    """Options of the command line for the calibration after training, as in `calibrate`."""

    _argument_group_name = "calibration"

    calibrate: bool = field(
        default=True,
        metadata={
            "help": "After training, fit a temperature and an error threshold on the evaluation data, if any, and "
            "store both in the model's config."
        },
    )
    calibration_set: str | None = field(
        default=None, metadata={"help": "Name of the evaluation set to fit them on; all sets together if left out."}
    )
    threshold_metric: Literal["processbench_f1", "error_f1", "balanced_accuracy", "step_accuracy"] = field(
        default="processbench_f1", metadata={"help": "The metric that the error threshold is chosen by."}
    )


@dataclass(frozen=True, kw_only=True)
class EvaluatedScores:
    """What a model gave for an evaluation set of N solutions.

    Args:
        logits: Float (N, S), or (N, S, K).
        labels: Float (N, S), -100 where there is none; class indices where there are K logits.
        class_weights: K numbers, how much each class counts as correct.
    """

    logits: FloatArray
    labels: FloatArray
    class_weights: tuple[float, ...] | None = None

    @property
    def targets(self) -> FloatArray:
        """The labels (N, S) as probabilities to be correct."""
        return class_targets(self.labels, self.class_weights)

    def step_probs(self, temperature: float) -> FloatArray:
        """Float32 (N, S), as the model computes them at this temperature."""
        logits = torch.from_numpy(self.logits).float() / temperature
        if self.class_weights is None:
            return torch.sigmoid(logits).numpy()
        weights = torch.tensor(self.class_weights)
        return (logits.softmax(dim=-1) * weights).sum(dim=-1).clamp(max=1.0).numpy()

    def loss(self, temperature: float = 1.0) -> float:
        """Mean cross-entropy of the labelled steps, in nats."""
        if self.class_weights is None:
            return bce_from_logits(self.logits / temperature, self.labels)
        logits = torch.from_numpy(self.logits).float() / temperature
        return masked_step_loss(logits, torch.from_numpy(self.labels)).item()

    def metrics(self, temperature: float, threshold: float) -> dict[str, float]:
        """Those of `step_metrics`."""
        return step_metrics(self.step_probs(temperature), self.targets, threshold=threshold)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A temperature and a threshold, and what they were fitted on.

    Args:
        temperature, error_threshold: as `PRMConfig` takes them.
        temperature_before, threshold_before: those from before.
        fitted_on: names of the evaluation sets.
        num_steps: their labelled steps.
        loss_before, loss_after: their mean cross-entropy with the temperature from before and with this one.
        ece_before, ece_after: the expected calibration error likewise.
        threshold_metric: what the threshold was chosen by; None where it was left as it was.
        metric_before, metric_after: `threshold_metric` at this temperature with either threshold. The latter is
            the best that any threshold reaches on these steps, and so too good for others.
        measured_before: metrics of the sets that were fitted on, with temperature and threshold from before.
        held_out: metrics with both, of the evaluation sets that were not fitted on.
        step: the optimizer step of the model.
    """

    temperature: float
    error_threshold: float
    temperature_before: float
    threshold_before: float
    fitted_on: tuple[str, ...]
    num_steps: int
    loss_before: float
    loss_after: float
    ece_before: float
    ece_after: float
    threshold_metric: str | None
    metric_before: float | None
    metric_after: float | None
    measured_before: Mapping[str, Mapping[str, float]]
    held_out: Mapping[str, Mapping[str, float]]
    step: int

    def __str__(self) -> str:
        text = (
            f"on {self.num_steps} steps of {', '.join(self.fitted_on)}: temperature {self.temperature:.4g} (loss "
            f"{self.loss_before:.4g} to {self.loss_after:.4g}, ECE {self.ece_before:.4g} to {self.ece_after:.4g})"
        )
        if self.threshold_metric is None:
            return f"{text}, threshold left at {self.error_threshold:g}"
        return (
            f"{text}, threshold {self.error_threshold:.4g} ({self.threshold_metric} {self.metric_before:.4g} to "
            f"{self.metric_after:.4g}); the second of each pair is too good, as it was fitted on these steps"
        )

    def result(self, name: str, metrics: Mapping[str, float], step: int) -> tuple[Mapping[str, float], str]:
        """What to report of an evaluation set, and in a sentence how to read it.

        Args:
            name: the set's.
            metrics: of its last evaluation.
            step: the optimizer step of that.
        """
        if name not in self.fitted_on:
            where = ", ".join(self.fitted_on)
            return metrics, f"The config's temperature and threshold, used here, were fitted on other data: {where}."
        if name in self.measured_before and step == self.step:
            return self.measured_before[name], (
                f"At temperature {self.temperature_before:.4g} and threshold {self.threshold_before:.4g}; those of the "
                f"config, {self.temperature:.4g} and {self.error_threshold:.4g}, were fitted on these same steps "
                "afterwards."
            )
        return metrics, (
            "Temperature and threshold were fitted on these same steps, so that calibration, and all that depends on "
            "the threshold, look better here than elsewhere."
        )


def calibrate(
    trainer: Any, *, fit_on: str | None = None, metric: str = "processbench_f1", keep_threshold: bool = False
) -> Calibration | None:
    """Fit temperature and threshold on the scores of a trainer's last evaluation, and set them in the model's config.

    The trainer's `calibration` is set too, and its `evaluations` of sets that were not fitted on are replaced by
    those with both numbers.

    Args:
        trainer: a `PRMTrainer` that has evaluated its `eval_dataset`.
        fit_on: the name of the evaluation set to fit on, where there are several; by default all of them.
        metric: one of `THRESHOLD_METRICS`, what the threshold is chosen by.
        keep_threshold: leave the threshold as it is.

    Returns:
        None where the data cannot tell; one logged line says why, and nothing is changed.

    Raises:
        ValueError: there is no such metric or evaluation set, or it was not evaluated.
    """
    if metric not in THRESHOLD_METRICS:
        raise ValueError(f"metric must be one of {THRESHOLD_METRICS}, got {metric!r}")
    fitted_on = check_evaluation_set(fit_on, trainer.eval_dataset)
    names = _names(trainer.eval_dataset)
    if not names:
        raise ValueError("there is no evaluation set to calibrate on; give the trainer an eval_dataset")
    if missing := [name for name in names if name not in trainer.scores]:
        raise ValueError(f"nothing was evaluated of {missing}; call trainer.evaluate() first, with the metrics of ours")
    scores = joined([trainer.scores[name] for name in fitted_on])
    num_steps = int((scores.labels != IGNORED_LABEL).sum())
    if num_steps < MIN_STEPS:
        logger.info("not calibrated: %d labelled steps for evaluation are fewer than %d", num_steps, MIN_STEPS)
        return None
    config = trainer.model.config
    before, threshold_before = config.temperature, config.error_threshold
    try:
        temperature = fit_temperature(scores.logits, scores.labels)
    except ValueError as error:
        logger.warning("not calibrated: %s", error)
        return None
    threshold, best = threshold_before, None
    if not keep_threshold:
        try:
            threshold, best = choose_threshold(scores.step_probs(temperature), scores.targets, metric=metric)
        except ValueError as error:
            logger.warning("the threshold stays at %g: %s", threshold, error)
    old, new = scores.metrics(before, threshold_before), scores.metrics(temperature, threshold_before)
    held_out = {
        name: {**trainer.evaluations[name], **trainer.scores[name].metrics(temperature, threshold)}
        for name in names
        if name not in fitted_on
    }
    config.temperature, config.error_threshold = temperature, threshold
    trainer.calibration = Calibration(
        temperature=temperature,
        error_threshold=threshold,
        temperature_before=before,
        threshold_before=threshold_before,
        fitted_on=tuple(fitted_on),
        num_steps=num_steps,
        loss_before=scores.loss(before),
        loss_after=scores.loss(temperature),
        ece_before=old["ece"],
        ece_after=new["ece"],
        threshold_metric=None if best is None else metric,
        metric_before=None if best is None else new[metric],
        metric_after=best,
        measured_before={name: dict(trainer.evaluations[name]) for name in fitted_on},
        held_out=held_out,
        step=trainer.state.global_step,
    )
    trainer.evaluations.update(held_out)
    logger.info("calibrated %s", trainer.calibration)
    return trainer.calibration


def calibrate_saved(trainer: Any, options: CalibrationArguments) -> Calibration | None:
    """`calibrate` as the options say, and store the result with the model saved in the trainer's output folder.

    A threshold that was given to the trainer stays.
    """
    calibration = calibrate(
        trainer,
        fit_on=options.calibration_set,
        metric=options.threshold_metric,
        keep_threshold=trainer.args.error_threshold is not None,
    )
    if calibration is not None and trainer.is_world_process_zero():
        store_calibration(trainer.args.output_dir, calibration)
    return calibration


def check_evaluation_set(name: str | None, eval_dataset: Any) -> list[str]:
    """The names of the evaluation sets to fit on: the one named, or all.

    Raises:
        ValueError: there is none of this name.
    """
    names = _names(eval_dataset)
    if name is not None and name not in names:
        raise ValueError(f"there is no evaluation set {name!r} to calibrate on, there are {names}; name one of them")
    return names if name is None else [name]


def _names(eval_dataset: Any) -> list[str]:
    if eval_dataset is None:
        return []
    return list(eval_dataset) if isinstance(eval_dataset, Mapping) else ["eval"]


def store_calibration(folder: str | Path, calibration: Calibration) -> None:
    """Write both numbers into the `config.json` of a saved model and of the adapters beside it, if any.

    All of it goes into `calibration.json`.

    Raises:
        OSError: the folder holds no `config.json`, or cannot be written to.
    """
    folder = Path(folder)
    beside = folder / ADAPTER_FOLDER / "config.json"
    for path in (folder / "config.json", *([beside] if beside.is_file() else [])):
        config = json.loads(path.read_text(encoding="utf-8"))
        config |= {"temperature": calibration.temperature, "error_threshold": calibration.error_threshold}
        _write_json(path, config)
    _write_json(folder / CALIBRATION_FILE, asdict(calibration))


def joined(parts: Sequence[EvaluatedScores]) -> EvaluatedScores:
    """The solutions of several sets as one, padded to the longest."""
    length = max(part.labels.shape[1] for part in parts)

    def pad(array: FloatArray, value: float) -> FloatArray:
        missing = [(0, 0), (0, length - array.shape[1])] + [(0, 0)] * (array.ndim - 2)
        return np.pad(array, missing, constant_values=value)

    return EvaluatedScores(
        logits=np.concatenate([pad(part.logits, 0.0) for part in parts]),
        labels=np.concatenate([pad(part.labels, IGNORED_LABEL) for part in parts]),
        class_weights=parts[0].class_weights,
    )


def reliability(scores: EvaluatedScores, temperature: float) -> ReliabilityTable:
    """The reliability table of an evaluation at a temperature."""
    return reliability_table(scores.step_probs(temperature), scores.targets)


def _finite(value: Any) -> Any:
    """Data as JSON has them, which knows no NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    # In one move, so that no half file is ever there.
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(_finite(data), indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)
