"""The trainings of the study, in the order of their worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Data = Literal["prmbench", "gsm8k-models", "gsm8k-errors"]
Kind = Literal["ours", "textbook"]

DETECTION_SETS = ("prmbench-validation", "prmbench-test")
SHIFTED_SETS = ("multistep-arithmetic", "logical-deduction")
BEST_OF_SETS = ("gsm8k-test",)

FULL_TOKENS, VARIANT_TOKENS = 400_000, 200_000


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training, and what its model scores afterwards.

    Args:
        name: of its folder and in the tables.
        title: what it is, for readers of the tables.
        data: what it trains on.
        kind: this library's PRM, or the textbook's.
        outcome: whether only the last step of a solution has a label: whether the whole solution is right.
        seed: of the split of records into batches, the head's weights and dropout. Runs of one seed see the same
            records in the same order.
        tokens: about how many it trains on.
        model_options: of `PRMForStepScoring.from_backbone`.
        training_options: of `PRMTrainingArguments`.
        sets: what is scored.
    """

    name: str
    title: str
    data: Data = "prmbench"
    kind: Kind = "ours"
    outcome: bool = False
    seed: int = 0
    tokens: int = FULL_TOKENS
    model_options: Mapping[str, Any] = field(default_factory=dict)
    training_options: Mapping[str, Any] = field(default_factory=dict)
    sets: tuple[str, ...] = DETECTION_SETS

    def __post_init__(self) -> None:
        if self.kind == "textbook" and (self.model_options or self.training_options):
            raise ValueError(f"{self.name}: the textbook PRM has no options")


def _main_runs(seed: int) -> list[Run]:
    sets = (*DETECTION_SETS, *SHIFTED_SETS)
    return [
        Run(name=f"default-{seed}", title="this library's default", seed=seed, sets=sets),
        Run(name=f"textbook-{seed}", title="textbook PRM", kind="textbook", seed=seed, sets=sets),
        Run(name=f"outcome-{seed}", title="outcome model", outcome=True, seed=seed, sets=sets),
    ]


def _variant(name: str, title: str, *, model: Mapping[str, Any] | None = None, **training: Any) -> Run:
    return Run(
        name=f"short-{name}",
        title=title,
        tokens=VARIANT_TOKENS,
        model_options=model or {},
        training_options=training,
    )


RUNS = (
    *_main_runs(0),
    Run(
        name="best-of-outcome",
        title="PRM trained on outcomes",
        data="gsm8k-models",
        outcome=True,
        sets=BEST_OF_SETS,
    ),
    Run(name="best-of-steps", title="PRM trained on injected errors", data="gsm8k-errors", sets=BEST_OF_SETS),
    *_main_runs(1),
    _variant("default", "default"),
    _variant("head-rate", "head's rate 1e-3, 10 times the backbone's", head_learning_rate=1e-3),
    _variant("mask", "steps after the first error left out", after_first_error="mask"),
    _variant("pairwise", "pairwise ranking beside it", ranking_loss="pairwise"),
    _variant("mlp", "mlp head", model={"head_type": "mlp"}),
    _variant("chat", "chat layout", model={"prompt_layout": "chat"}),
    _variant("weighted", "later steps weigh more", step_weighting="linear"),
    _variant("comparative", "comparative ranking (PQM) beside it", ranking_loss="pqm"),
)
"""All trainings, in the order of their worth."""

QUEUE: tuple[tuple[str, tuple[str, ...]], ...] = (
    *((run.name, tuple(n for n in run.sets if n not in SHIFTED_SETS)) for run in RUNS[:5]),
    *((run.name, SHIFTED_SETS) for run in RUNS[:3]),
    *((run.name, run.sets) for run in RUNS[5:]),
)
"""What `train --all` does in which order: a run, which is trained where it is not yet, and what it scores then."""

TRAINING_OPTIONS: Mapping[str, Any] = {
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    # Eight records an optimizer step; two at a time take half of the memory of four.
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_train_epochs": 1,
    "bf16": True,
    "use_cpu": True,
    # The order of records is a part of the data, the same for all models of a seed.
    "train_sampling_strategy": "sequential",
    "logging_steps": 5,
    "save_steps": 20,
    "save_total_limit": 1,
    "report_to": "none",
}
"""What all trainings share."""


def run_named(name: str) -> Run:
    """The training of this name.

    Raises:
        ValueError: there is none.
    """
    for run in RUNS:
        if run.name == name:
            return run
    raise ValueError(f"there is no run {name!r}; choose one of {', '.join(run.name for run in RUNS)}")
