"""A `transformers.Trainer` for process reward models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import datasets
import torch
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback

from modeling_prm import PRMProcessor

from .arguments import PRMTrainingArguments
from .collator import PRMDataCollator
from .metrics import bce_from_logits, step_metrics
from .preparation import TOKEN_COLUMNS, PreparationReport, tokenize_dataset


class PRMTrainer(Trainer):
    """Trains a `PRMForStepScoring` with the masked binary cross-entropy of all labelled steps.

    The loss of an optimizer step is the sum over its labelled steps divided by their number, whatever
    the micro-batch size, gradient accumulation, padding or number of processes. Datasets of records are
    tokenized once, at the start; evaluation reports the metrics of `trainer.metrics.step_metrics` and a
    loss over all labelled steps of the set.

    Args:
        model: the PRM.
        args: the options.
        train_dataset, eval_dataset: records (`problem`, `steps`, `labels`), or what `tokenize_dataset`
            makes of them. `eval_dataset` may be a dictionary of them by name.
        processing_class: the model's processor, saved with every checkpoint.
        data_collator, compute_metrics, callbacks, optimizers: as in `Trainer`, in place of ours.

    Attributes:
        reports: a `PreparationReport` for each dataset that was tokenized here, by name (`"train"`,
            `"eval"` or the name of the evaluation set).

    Raises:
        ValueError: model and processor do not belong together, or a dataset cannot be used.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: PRMTrainingArguments,
        *,
        processing_class: PRMProcessor,
        train_dataset: datasets.Dataset | None = None,
        eval_dataset: datasets.Dataset | dict[str, datasets.Dataset] | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        check_layouts(model, processing_class)
        self.reports: dict[str, PreparationReport] = {}
        self._error_threshold = args.error_threshold
        if args.freeze_backbone:
            model.base_model.requires_grad_(False)
        with args.main_process_first(desc="tokenizing"):
            train_dataset = self._tokenized(train_dataset, "train", processing_class, args)
            if isinstance(eval_dataset, Mapping):
                eval_dataset = {
                    name: self._tokenized(part, name, processing_class, args) for name, part in eval_dataset.items()
                }
            else:
                eval_dataset = self._tokenized(eval_dataset, "eval", processing_class, args)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or PRMDataCollator(processing_class),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics or self._compute_step_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of `Trainer`, with the value head's parameters at `head_learning_rate`."""
        optimizer = super().create_optimizer(model)
        learning_rate = self.args.head_learning_rate
        if learning_rate is None:
            return optimizer
        named = (self.model if model is None else model).named_parameters()
        head = {id(parameter) for name, parameter in named if "value_head." in name}
        for group in list(optimizer.param_groups):
            ours = [parameter for parameter in group["params"] if id(parameter) in head]
            if ours:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in head]
                optimizer.add_param_group({**group, "params": ours, "lr": learning_rate})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _tokenized(
        self, dataset: Any, name: str, processor: PRMProcessor, args: PRMTrainingArguments
    ) -> datasets.Dataset | None:
        if dataset is None:
            return None
        if not isinstance(dataset, datasets.Dataset):
            raise TypeError(
                f"the dataset {name!r} must be a datasets.Dataset, got {type(dataset).__name__}; choose one split of a "
                "DatasetDict, or make one with datasets.Dataset.from_list(rows)"
            )
        if all(column in dataset.column_names for column in TOKEN_COLUMNS):
            return dataset
        dataset, self.reports[name] = tokenize_dataset(
            dataset, processor, truncation=args.truncation, overlong_problems=args.overlong_problems
        )
        return dataset

    def _compute_step_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        logits, step_probs = prediction.predictions
        metrics = step_metrics(step_probs, prediction.label_ids, threshold=self._error_threshold)
        if logits.ndim == 2:
            # Takes the place of Trainer's mean over batches, which depends on how they were cut.
            metrics["loss"] = bce_from_logits(logits, prediction.label_ids)
        return metrics


def check_layouts(model: PreTrainedModel, processor: PRMProcessor) -> None:
    """Check that model and processor have the same layout of ids.

    Raises:
        ValueError: they differ; the message names where.
    """
    theirs = {name: getattr(processor, name) for name in model.config.layout}
    theirs["separator_token_id"] = processor.separator_token_id
    ours = {**model.config.layout, "separator_token_id": model.config.separator_token_id}
    # A shorter limit in the processor is a choice, not a mistake.
    different = [name for name in ours if ours[name] != theirs[name] and name != "max_length"]
    if different:
        shown = "; ".join(f"{name} is {ours[name]!r} and {theirs[name]!r}" for name in different)
        raise ValueError(f"model and processor do not belong together: {shown}. Load both from the same checkpoint")
