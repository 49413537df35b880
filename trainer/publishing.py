"""What a trainer knows about the model it trained, for the card, and its pushes to the Hub."""

from __future__ import annotations

import dataclasses
from typing import Any

from hub_card.card import CardData, EvaluationResult
from hub_card.publishing import Publication, publish
from modeling_prm import PRMForStepScoring, PRMProcessor

from .adapters import describe_adapters
from .data_files import is_hub_id
from .labels import LabelRules
from .losses import StepLoss
from .step_index import PREFIX as INDEX_ONLY

# What an evaluation reports about itself and not about the model.
_TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")

# The metrics that the card shows of the step's index alone too.
_SHOWN_OF_THE_INDEX = ("roc_auc", "average_precision", "error_f1", "processbench_f1")


def describe_training(trainer: Any) -> CardData:
    """The trainer's card, with the backbone, the hyperparameters and the last evaluations filled in.

    Local paths are left out; what the card holds already stays.
    """
    card: CardData = trainer.card
    base_model = getattr(trainer.model.config.text_config, "name_or_path", "") or ""
    return dataclasses.replace(
        card,
        base_model=card.base_model or (base_model if is_hub_id(base_model) else None),
        training={**hyperparameters(trainer), **card.training},
        results=(*card.results, *_results(trainer)),
        pictures=(*card.pictures, *trainer.pictures),
    )


def hyperparameters(trainer: Any) -> dict[str, str | int | float | bool]:
    """The options that the training depended on; those of loss and labels where they are not at their defaults."""
    args = trainer.args
    names = ("learning_rate", "head_learning_rate", "freeze_backbone", "weight_decay", "warmup_steps", "max_grad_norm")
    values: dict[str, Any] = {name: getattr(args, name) for name in names}
    values["lr_scheduler_type"] = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    values["optim"] = str(getattr(args.optim, "value", args.optim))
    values["batch_size"] = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    values["optimizer_steps"] = trainer.state.global_step
    values["epochs"] = round(trainer.state.epoch or 0.0, 2)
    values["precision"] = "bfloat16 autocast" if args.bf16 else "float16 autocast" if args.fp16 else "float32"
    values["seed"] = args.seed
    values |= _changed(trainer.step_loss, StepLoss()) | _changed(args.label_rules(), LabelRules())
    values |= describe_adapters(trainer.model)
    if "train" in trainer.reports:
        report = trainer.reports["train"]
        values["training_records"], values["training_steps_labelled"] = report.kept_records, report.labelled_steps
    return {name: value for name, value in values.items() if value is not None}


def _changed(options: Any, defaults: Any) -> dict[str, Any]:
    """The options of the loss, or of the labels, that are not at their defaults; a function by its name."""
    found = {name: value for name, value in vars(options).items() if value != vars(defaults)[name]}
    return {
        name: getattr(value, "__name__", "a function") if callable(value) else value for name, value in found.items()
    }


def publish_folder(trainer: Any, folder: str, **options: Any) -> Publication:
    """Publish what a trainer saved in a folder; options are those of `publish`."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not hasattr(model, "merge_and_unload"):
        # Read from the file: the model in training may be sharded or on its way. Of adapters the file holds no more.
        model = PRMForStepScoring.from_pretrained(folder, dtype="auto")
    processor = PRMProcessor.from_pretrained(folder)
    return publish(model, processor, trainer.hub_model_id, card=describe_training(trainer), **options)


def _results(trainer: Any) -> list[EvaluationResult]:
    results = []
    for name, values in trainer.evaluations.items():
        step = trainer.evaluation_steps[name]
        note = f"Measured at optimizer step {step}."
        if trainer.calibration is not None:
            values, how = trainer.calibration.result(name, values, step)
            note = f"{note} {how}"
        if values:
            shown = {metric: value for metric, value in values.items() if _is_shown(metric)}
            dataset = "held-out problems" if name == "eval" else name
            results.append(EvaluationResult(dataset=dataset, metrics=shown, note=note))
    return results


def _is_shown(metric: str) -> bool:
    return not metric.startswith(INDEX_ONLY) or metric.removeprefix(INDEX_ONLY) in _SHOWN_OF_THE_INDEX


def model_metrics(metrics: dict[str, Any], prefix: str) -> dict[str, float]:
    """The numbers of an evaluation that say something about the model, without the prefix."""
    plain = {name.removeprefix(f"{prefix}_"): value for name, value in metrics.items() if name.startswith(f"{prefix}_")}
    numbers = {name: value for name, value in plain.items() if isinstance(value, (int, float))}
    return {name: float(value) for name, value in numbers.items() if name not in _TIMINGS}
