"""A `transformers.Trainer` for process reward models."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import datasets
import torch
from transformers import EvalPrediction, PreTrainedModel, TrainerCallback

from hub_card.card import CardData, Picture
from modeling_prm import PRMProcessor
from modeling_prm.scoring import check_processor

from .adapters import add_adapters, check_adapters
from .arguments import PRMTrainingArguments
from .checkpoints import check_whole, last_checkpoint
from .collator import PRMDataCollator
from .guards import FiniteLossGuard, describe_records
from .labels import LabelRules, report_trained_steps
from .layer_checkpointing import KeepLastLayer
from .losses import StepLoss, choose_step_loss
from .metrics import import_sklearn_metrics, step_metrics
from .model_calibration import Calibration, EvaluatedScores
from .packing import STEP_INDEX, PackingCollator, choose_packing, unpack
from .preparation import RECORD_NUMBER
from .publishing import model_metrics
from .saving_trainer import SavingTrainer
from .sharding import keep_float32_outputs
from .step_data_trainer import StepDataTrainer
from .step_index import StepIndexGuard, labels_of
from .streaming import StepStream

logger = logging.getLogger(__name__)


class PRMTrainer(StepDataTrainer, SavingTrainer):
    """Trains a `PRMForStepScoring` with the masked binary cross-entropy of all labelled steps, or as `args` say.

    Each term of the loss is divided by its own count over the whole optimizer step, whatever the micro-batch
    size, gradient accumulation, padding or number of processes. Datasets of records are
    tokenized once, at the start; evaluation reports the metrics of `trainer.metrics.step_metrics` and a
    loss over all labelled steps of the set.

    Args:
        model: the PRM, also in adapters as `trainer.adapters.add_adapters` makes them.
        args: the options.
        train_dataset, eval_dataset: records (`problem`, `steps`, `labels`), or what `tokenize_dataset`
            makes of them. `train_dataset` may be a `datasets.IterableDataset` of records, see `trainer.streaming`,
            and `eval_dataset` a dictionary of datasets by name.
        processing_class: the model's processor, saved with every checkpoint.
        data_collator, callbacks, optimizers: as in `Trainer`, in place of ours.
        compute_metrics: as in `Trainer`, in place of ours; the evaluation loss is then Trainer's mean over
            batches. Predictions are logits (N, S) or (N, S, K), and step probabilities (N, S).
        step_loss: the training loss, where `args` leaves those options at their defaults.
        card: what the model card of pushes says beside what is known here: hyperparameters, evaluations and
            the backbone.
        peft_config: a `peft.LoraConfig` or `trainer.adapters.AdapterArguments`; the model is put into such adapters.

    Attributes:
        evaluations: the metrics of the last evaluation of each set, by name as in `reports`; once the best
            model is loaded at the end, those of that model.
        evaluation_steps: the optimizer step of each of them.
        scores: the logits and labels of the last evaluation of each set, where the metrics are ours.
        calibration: what `trainer.model_calibration.calibrate` fitted, None before.
        pictures: what `trainer.curves.draw_pictures` drew, for the model card.
        packing: how training lays solutions out in rows, None where each has a padded row.
        reports: a `PreparationReport` for each dataset that was tokenized here, by name (`"train"`,
            `"eval"` or the name of the evaluation set).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: model and processor do not belong together, or a dataset or an option cannot be used.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: PRMTrainingArguments,
        *,
        processing_class: PRMProcessor,
        train_dataset: datasets.Dataset | datasets.IterableDataset | None = None,
        eval_dataset: datasets.Dataset | dict[str, datasets.Dataset] | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        step_loss: StepLoss | None = None,
        card: CardData | None = None,
        peft_config: Any = None,
    ) -> None:
        if not isinstance(args, PRMTrainingArguments):
            raise TypeError(f"args must be trainer.arguments.PRMTrainingArguments, got {type(args).__name__}")
        check_arguments(args, compute_metrics, data_collator, optimizers)
        if compute_metrics is None and eval_dataset is not None:
            import_sklearn_metrics()  # before training, not after it
        check_processor(model, processing_class)
        model = prepare_model(model, args, peft_config)
        rules = args.label_rules(model.config.class_weights)
        self._num_labels = model.config.num_labels
        self.step_loss = choose_step_loss(args.step_loss(self._num_labels), step_loss)
        self._eval_collator = data_collator or PRMDataCollator(processing_class, rules.for_evaluation())
        self._start_records(model, rules)
        self.card = card or CardData()
        self.packing = None
        train_data = self._training_data(train_dataset, processing_class, args, rules)
        if isinstance(train_data, datasets.Dataset) and data_collator is None:
            plain = train_data.with_format(None)
            report_trained_steps(plain["labels"], plain["step_positions"], rules)
        eval_data = self._evaluation_data(eval_dataset, processing_class, args)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or PRMDataCollator(processing_class, rules, with_records=True),
            train_dataset=train_data,
            eval_dataset=eval_data,
            processing_class=processing_class,
            compute_loss_func=self._compute_step_loss,
            compute_metrics=compute_metrics or self._compute_step_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        keep_float32_outputs(self)
        describe = describe_records(self.train_dataset, processing_class)
        if isinstance(self.train_dataset, StepStream):
            describe = self.train_dataset.describe
        self._guard = FiniteLossGuard(self.accelerator, describe)
        self.add_callback(self._guard)
        self.add_callback(KeepLastLayer())
        if self.train_dataset is not None:
            self.packing = choose_packing(args.packing, self.model, processing_class.max_length)
        if self.packing is not None:
            if self.accelerator.dispatch_batches:
                raise ValueError("dispatch_batches=True cuts packed batches apart; leave it out, or packing at 'none'")
            self.data_collator = PackingCollator(processing_class, rules, with_records=True, packing=self.packing)

    def _start_records(self, model: PreTrainedModel, rules: LabelRules) -> None:
        """Nothing was tokenized, measured or drawn yet."""
        self.reports = {}
        self.evaluations: dict[str, dict[str, float]] = {}
        self.evaluation_steps: dict[str, int] = {}
        self._evaluations_at: dict[int, dict[str, dict[str, float]]] = {}
        self.scores: dict[str, EvaluatedScores] = {}
        self._last_scores: EvaluatedScores | None = None
        self.pictures: tuple[Picture, ...] = ()
        self.calibration: Calibration | None = None
        weights = model.config.class_weights
        self._class_weights: tuple[float, ...] | None = None if weights is None else tuple(weights)
        self._index_guard = StepIndexGuard(
            lambda: labels_of(self.train_dataset, rules.for_evaluation(), self._class_weights)
        )

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As in `Trainer`; True goes on from the last checkpoint in `args.output_dir` that is whole.

        Raises:
            NonFiniteLossError: the loss or gradient of an optimizer step is NaN or infinite.
            CheckpointSaveError: a checkpoint could not be saved.
            ValueError: there is no whole checkpoint to go on from.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir} holds no whole checkpoint to go on from")
        elif resume_from_checkpoint:
            check_whole(resume_from_checkpoint)
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if self.model_wrapped is self.model and getattr(self.model, "_is_accelerate_prepared", False) and not sharded:
            # An evaluation before training marks the model as prepared; accelerate would then take it as it is,
            # and several processes would each train a model of their own.
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.accelerator._models.clear()
            self.model._is_accelerate_prepared = False
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def training_step(
        self, model: torch.nn.Module, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """As in `Trainer`; the numbers of the records, if any, are for the guard and not for the model."""
        records = inputs.pop(RECORD_NUMBER, None)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._guard.observe(loss, records)
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor | None:
        """What each term of the loss is divided by, over all micro-batches and processes of an optimizer step."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        counts = torch.stack([self.step_loss.counts(batch["labels"]) for batch in batch_samples]).sum(dim=0)
        counts = self.accelerator.gather(counts.to(device).unsqueeze(0)).sum(dim=0)
        # With several GPUs in one process each gets a part of whatever the model is given.
        return counts if self.args.n_gpu <= 1 else counts.expand(self.args.n_gpu, -1)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._guard.observe_gradient_norm(norm)
        return norm

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """As in `Trainer`; the logits of packed rows are put into the order of the solutions before the loss."""
        if self.packing is not None and STEP_INDEX in inputs:
            model, inputs = unpack(model, inputs, self.packing, self.model.backbone.dtype)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _compute_step_loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        if num_items_in_batch is None:
            return self.step_loss(outputs["logits"], labels)
        counts = num_items_in_batch.view(-1, num_items_in_batch.shape[-1])[0]
        # For one process with several GPUs Trainer multiplies by their number, as if each had a loss of its own.
        return self.step_loss(outputs["logits"], labels, counts) / max(self.args.n_gpu, 1)

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

    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        """As in `Trainer`; keeps the metrics for the model card."""
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        name = metric_key_prefix.removeprefix("eval_")
        step = self.state.global_step
        self.evaluations[name] = model_metrics(output.metrics, metric_key_prefix)
        self.evaluation_steps[name] = step
        self._evaluations_at.setdefault(step, {})[name] = self.evaluations[name]
        if self._last_scores is not None:
            self.scores[name], self._last_scores = self._last_scores, None
        if self.calibration is not None and name in self.calibration.fitted_on:
            logger.warning(
                "temperature and threshold were fitted on %s, so its metrics look better than they are", name
            )
        return output

    def _load_best_model(self) -> None:
        """As in `Trainer`; the card then holds what was measured of this model."""
        super()._load_best_model()
        step = self.state.best_global_step
        self.evaluations = dict(self._evaluations_at.get(step, {}))
        self.evaluation_steps = dict.fromkeys(self.evaluations, step)

    def _compute_step_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        logits, step_probs = prediction.predictions
        scores = EvaluatedScores(logits=logits, labels=prediction.label_ids, class_weights=self._class_weights)
        metrics = step_metrics(step_probs, scores.targets, threshold=self.model.config.error_threshold)
        metrics |= self._index_guard(scores.targets)
        # Takes the place of Trainer's mean over batches, which depends on how they were cut.
        metrics["loss"] = scores.loss()
        self._last_scores = scores
        return metrics


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout of a model to 0, those that its layers keep as numbers too."""
    for module in model.modules():
        is_dropout = "dropout" in type(module).__name__.lower()
        for name, value in vars(module).items():
            # Layers name theirs attention_dropout, dropout_prob, layerdrop, resid_pdrop, ...
            if isinstance(value, float) and ("drop" in name or (is_dropout and name == "p")):
                setattr(module, name, 0.0)


def prepare_model(model: Any, args: PRMTrainingArguments, peft_config: Any) -> Any:
    """The model as it is trained: in adapters, without dropout, with a frozen backbone, as the options say."""
    if peft_config is not None:
        model = add_adapters(model, peft_config)
    check_adapters(model, freeze_backbone=args.freeze_backbone)
    if args.error_threshold is not None:
        model.config.error_threshold = args.error_threshold
    if args.disable_dropout:
        disable_dropout(model)
    if args.freeze_backbone:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("value_head." in name)
    return model


def check_arguments(
    args: PRMTrainingArguments, compute_metrics: Any, data_collator: Any, optimizers: tuple[Any, Any]
) -> None:
    """Check the options that do not go with what is given in the place of ours.

    Raises:
        ValueError: saying which.
    """
    whole = not args.prediction_loss_only and args.eval_do_concat_batches and not args.batch_eval_metrics
    if compute_metrics is None and not whole:
        raise ValueError(
            "prediction_loss_only=True, eval_do_concat_batches=False and batch_eval_metrics=True leave no whole "
            "set of scores to compute metrics and loss from; leave them at their defaults, or give compute_metrics"
        )
    if args.head_learning_rate is not None and optimizers[0] is not None:
        raise ValueError(
            "head_learning_rate is for the optimizer that is made here; give the one in optimizers its groups, and "
            "leave head_learning_rate out"
        )
    if data_collator is not None and args.label_rules() != LabelRules():
        raise ValueError(
            "soft_labels, label_threshold, after_first_error and train_on_last_step_only work in our collator; "
            "leave them at their defaults, or data_collator out"
        )
    if data_collator is not None and args.packing != "none":
        raise ValueError(f"packing={args.packing!r} works in our collator; leave it at 'none', or data_collator out")
