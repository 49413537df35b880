"""Options of training, beyond those of `transformers.TrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from modeling_prm import PRMConfig

from .labels import LabelRules
from .losses import StepLoss
from .packing import PACKING
from .trl_names import explain_trl_names


@dataclass
class ModelArguments:
    """Options of the command line for the PRM: a new one on a backbone, or one to go on from.

    What is left out is as in `PRMForStepScoring.from_backbone`, or as the PRM to go on from has it.

    Raises:
        ValueError: not exactly one of `backbone` and `model` is given, or the revision of the other.
    """

    _argument_group_name = "model"

    backbone: str | None = field(
        default=None, metadata={"help": "The backbone of a new PRM: a Hub id, a folder, or a GGUF file."}
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": "A PRM to go on from, in place of --backbone: a Hub id or a folder. Its head, separator and layout "
            "stay as they are."
        },
    )
    head_type: Literal["linear", "mlp"] | None = field(
        default=None, metadata={"help": "The value head of a new PRM; linear if left out."}
    )
    num_labels: int | None = field(
        default=None,
        metadata={
            "help": "Classes of a step, trained on --data-format classes or --neutral class; if left out, a new PRM "
            "has one logit a step."
        },
    )
    class_weights: list[float] | None = field(
        default=None,
        metadata={"help": "How much each class counts as correct, in [0, 1], such as 1 1 0."},
    )
    head_dropout: float | None = field(
        default=None, metadata={"help": "Dropout before the linear head; 0.1 for a new PRM if left out."}
    )
    separator_token: str | None = field(
        default=None,
        metadata={"help": f"The token that closes each step; {PRMConfig.separator_token} for a new PRM if left out."},
    )
    prompt_layout: Literal["plain", "chat"] | None = field(
        default=None,
        metadata={"help": "Plain text, or the backbone's chat template; plain for a new PRM if left out."},
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Most tokens in one input; as many as the backbone reads if left out."}
    )
    aggregation: str | None = field(
        default=None,
        metadata={"help": "How step probabilities become one score by default; min for a new PRM if left out."},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of the backbone: eager, sdpa, flash_attention_2, ..."}
    )
    backbone_dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Dtype of the backbone's weights; train with --bf16 for autocast."}
    )
    backbone_revision: str | None = field(
        default=None, metadata={"help": "Revision of a backbone on the Hub; main if left out."}
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Revision of a PRM on the Hub; main if left out."}
    )

    def __post_init__(self) -> None:
        if (self.backbone is None) == (self.model is None):
            got = "both" if self.model is not None else "none"
            raise ValueError(
                f"give --backbone for a new PRM, or --model for one to go on from, and not both; got {got}"
            )
        for name, other in (("backbone", self.backbone), ("model", self.model)):
            if other is None and getattr(self, f"{name}_revision") is not None:
                raise ValueError(f"{name}_revision is given and {name} is not; leave it out")


@dataclass
class DataArguments:
    """Options of the command line for the data."""

    _argument_group_name = "data"

    train_data: list[str] = field(
        metadata={"help": "Files, folders or Hub ids of labelled solutions, read by trainer.readers."}
    )
    eval_data: list[str] = field(
        default_factory=list,
        metadata={"help": "The same for evaluation; name=path gives a set of its own with metrics under its name."},
    )
    eval_fraction: float = field(
        default=0.0,
        metadata={"help": "Share of the training problems to hold out for evaluation, all solutions of one together."},
    )
    train_split: str = field(default="train", metadata={"help": "The split to train on, where data is from the Hub."})
    eval_split: str = field(default="test", metadata={"help": "The split to evaluate, where data is from the Hub."})
    data_format: str = field(
        default="auto",
        metadata={"help": "Format of the data, found by its columns if 'auto'; 'classes' for class indices."},
    )
    on_bad_row: Literal["error", "skip"] = field(
        default="error",
        metadata={"help": "Stop at a row that cannot be read, or skip and count it."},
    )
    rejected_file: str | None = field(
        default=None,
        metadata={
            "help": "With --on-bad-row skip, a JSONL file for the rows that were left out, each with file, line and "
            "reason; rejected_rows.jsonl in the output folder if left out."
        },
    )
    neutral: Literal["correct", "incorrect", "ignored", "class"] | None = field(
        default=None,
        metadata={
            "help": "What a neutral rating counts as; 'class' makes class indices (right, neutral, wrong) for "
            "--num-labels 3. If left out, correct in PRM800K, and refused beside +1/-1."
        },
    )
    paths: Literal["all", "chosen"] = field(
        default="all", metadata={"help": "Of PRM800K, every rated solution or the chosen path alone."}
    )

    decontaminate_against: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Files, folders or Hub ids (--eval-split) of evaluation problems; training solutions of problems "
            "that are equal, or share 13 words in a row, are left out."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the training data as they are needed, for more than the disk holds; with --max-steps."},
    )

    def __post_init__(self) -> None:
        if self.eval_data and self.eval_fraction:
            raise ValueError("give --eval-data or --eval-fraction, not both")
        if self.streaming and self.eval_fraction:
            raise ValueError("--eval-fraction needs all training data at hand; give --eval-data with --streaming")
        if self.rejected_file is not None and (self.on_bad_row != "skip" or self.streaming):
            raise ValueError(
                "--rejected-file is written with --on-bad-row skip and without --streaming, which logs bad rows; "
                "leave it out"
            )
        if self.streaming and self.decontaminate_against:
            raise ValueError("--decontaminate-against needs all training data at hand; leave --streaming out")


@explain_trl_names
@dataclass
class PRMTrainingArguments(TrainingArguments):
    """Options of `PRMTrainer`.

    Everything that `transformers.TrainingArguments` takes, with `learning_rate` 1e-5 and
    `logging_steps` 10 where Transformers has 5e-5 and 500, and the options below.

    Args:
        head_learning_rate: learning rate of the value head; that of the backbone where left out. A new
            head beside a pretrained backbone usually learns better with 10 to 100 times the backbone's.
        freeze_backbone: train the value head alone.
        truncation: what happens to a solution longer than the processor's `max_length`: `"drop"` leaves
            out whole steps with their labels, from the first that does not fit on; `"error"` stops.
        overlong_problems: what happens to a record whose problem leaves room for no step: `"error"` stops
            and names it, `"skip"` leaves it out. Either way what was left out is counted and logged.
        error_threshold: probability under which a step counts as wrong, in [0, 1]; it is set in the model's config,
            which metrics and verifier read. By default the config's own.
        soft_labels, label_threshold, after_first_error: as in `trainer.labels.LabelRules`.
        train_on_last_step_only: train on the last step of each solution alone, as an outcome reward model.
        pos_weight, label_smoothing, step_weighting, bce_weight, ranking_weight: as in `trainer.losses.StepLoss`.
        loss_normalization, ranking_loss, ranking_margin: its `normalization`, `ranking` and `margin`.
        disable_dropout: set every dropout of backbone and head to 0.
        packing: how the solutions of a micro-batch are laid out: `"none"`, each in a padded row; `"pack"`, in the
            rows of at most `max_length` tokens that cost least; `"share"`, so too, and those of one problem come one
            after the other and share its tokens. `per_device_train_batch_size` counts solutions all the same, so
            `"pack"` changes neither what a step learns from nor its loss, only its speed. What the backbone cannot do
            is left out with a warning (`modeling_prm.capabilities`).
        dataset_num_proc: how many processes tokenize.
        shuffle_buffer_size: of a stream, the next record is drawn from so many; with
            `train_sampling_strategy="sequential"` its order stays as it is.

    Raises:
        ValueError: an option has a value outside those allowed; or `label_smoothing_factor` is set, which
            smooths a softmax that one logit a step does not have; or `average_tokens_across_devices` is
            off, with which the loss would depend on the number of processes; or `hub_strategy` is one that
            pushes optimizer states.
    """

    _argument_group_name = "training"

    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of the backbone."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the value head; that of the backbone if left out."}
    )
    freeze_backbone: bool = field(default=False, metadata={"help": "Train the value head alone."})
    truncation: Literal["drop", "error"] = field(
        default="drop",
        metadata={
            "help": "For solutions longer than max_length: 'drop' leaves out whole steps from the first that does "
            "not fit on, 'error' stops.",
        },
    )
    overlong_problems: Literal["error", "skip"] = field(
        default="error",
        metadata={"help": "For records whose problem leaves room for no step: 'error' stops, 'skip' leaves them out."},
    )
    error_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Probability under which a step counts as wrong, in the metrics and in the saved model; by default "
            "the model's own, 0.5 in a new one."
        },
    )

    soft_labels: Literal["harden", "keep"] = field(
        default="harden", metadata={"help": "Labels between 0 and 1: 'harden' at --label-threshold, or 'keep'."}
    )
    label_threshold: float = field(default=0.5, metadata={"help": "A label counts as correct from here on."})
    after_first_error: Literal["keep", "mask"] = field(
        default="keep", metadata={"help": "Train on the steps after a solution's first error, or 'mask' them."}
    )
    train_on_last_step_only: bool = field(
        default=False, metadata={"help": "Train on each solution's last step alone: an outcome reward model."}
    )
    pos_weight: float = field(default=1.0, metadata={"help": "Factor on the loss of correct steps."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Move labels so far towards the middle, in [0, 1)."})
    step_weighting: Literal["uniform", "linear"] = field(
        default="uniform", metadata={"help": "'linear' lets later steps weigh more."}
    )
    loss_normalization: Literal["step", "solution"] = field(
        default="step", metadata={"help": "Mean over all steps, or over solutions of each one's mean."}
    )
    ranking_loss: Literal["none", "pairwise", "pqm"] = field(
        default="none",
        metadata={"help": "A loss that compares correct and wrong steps, beside the other."},
    )
    ranking_weight: float = field(default=1.0, metadata={"help": "Factor on the ranking loss."})
    ranking_margin: float = field(default=4.0, metadata={"help": "Margin of the ranking loss 'pqm'."})
    bce_weight: float = field(default=1.0, metadata={"help": "Factor on the cross-entropy; 0 trains on ranking alone."})
    disable_dropout: bool = field(default=False, metadata={"help": "Set every dropout to 0."})
    packing: Literal["none", "pack", "share"] = field(
        default="none",
        metadata={
            "help": "'pack' puts the solutions of a batch into rows without padding, which changes the speed alone; "
            "'share' also lets those of one problem come together and compute its tokens once.",
        },
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize the data."})
    shuffle_buffer_size: int = field(
        default=10_000, metadata={"help": "With --streaming, the next record is drawn from so many."}
    )

    def __post_init__(self) -> None:
        if self.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} smooths the targets of a softmax, which a PRM "
                "with one logit a step does not have; leave it at 0 and give label_smoothing"
            )
        if getattr(self, "greater_is_better", None) is None and (self.metric_for_best_model or "").endswith(
            ("brier", "ece")
        ):
            self.greater_is_better = False
        if not self.average_tokens_across_devices:
            raise ValueError(
                "average_tokens_across_devices=False divides the loss of each process by its own number of labelled "
                "steps, so that it depends on the number of processes; leave it at True"
            )
        if self.head_learning_rate is not None and not self.head_learning_rate >= 0.0:
            raise ValueError(f"head_learning_rate must be None or at least 0, got {self.head_learning_rate}")
        for name, allowed in (
            ("truncation", ("drop", "error")),
            ("overlong_problems", ("error", "skip")),
            ("packing", PACKING),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.dataset_num_proc is not None and self.dataset_num_proc < 1:
            raise ValueError(f"dataset_num_proc must be None or at least 1, got {self.dataset_num_proc}")
        if self.shuffle_buffer_size < 1:
            raise ValueError(
                f"shuffle_buffer_size must be at least 1, got {self.shuffle_buffer_size}; to leave the order as it is, "
                "pass train_sampling_strategy='sequential'"
            )
        if self.error_threshold is not None and not 0.0 <= self.error_threshold <= 1.0:
            raise ValueError(f"error_threshold must be in [0, 1], got {self.error_threshold}")
        self.step_loss()
        self.label_rules()
        if self.train_on_last_step_only and self.ranking_loss == "pairwise":
            raise ValueError(
                "ranking_loss='pairwise' finds no pair of steps where train_on_last_step_only leaves one; leave one of "
                "them out"
            )
        super().__post_init__()
        if self.push_to_hub and self.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
            raise ValueError(
                f"hub_strategy={self.hub_strategy.value!r} would push optimizer states; choose 'end' or 'every_save', "
                "which push the model"
            )

    def step_loss(self, num_labels: int = 1) -> StepLoss:
        """The loss that these options describe, for a model of so many logits a step."""
        return StepLoss(
            num_labels=num_labels,
            pos_weight=self.pos_weight,
            label_smoothing=self.label_smoothing,
            step_weighting=self.step_weighting,
            normalization=self.loss_normalization,
            ranking=self.ranking_loss,
            ranking_weight=self.ranking_weight,
            bce_weight=self.bce_weight,
            margin=self.ranking_margin,
            label_threshold=self.label_threshold,
        )

    def label_rules(self, class_weights: list[float] | None = None) -> LabelRules:
        """What these options do to the labels of a solution."""
        return LabelRules(
            soft_labels=self.soft_labels,
            label_threshold=self.label_threshold,
            after_first_error=self.after_first_error,
            last_step_only=self.train_on_last_step_only,
            class_weights=None if class_weights is None else tuple(class_weights),
        )
