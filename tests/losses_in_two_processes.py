"""What the tests of normalization run in each of two processes: `accelerate launch -m losses_in_two_processes DIR`.

`DIR/prm` is the checkpoint to train; each process writes `DIR/rank{R}.pt`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from small_training import LABELS, make_dataset, make_trainer

# By name, options of the loss for training through `PRMTrainer`.
OPTIONS: dict[str, dict[str, Any]] = {
    "all of the cross-entropy": {
        "pos_weight": 2.0,
        "label_smoothing": 0.2,
        "step_weighting": "linear",
        "loss_normalization": "solution",
    },
    "linear": {"step_weighting": "linear"},
    "pairwise": {"ranking_loss": "pairwise", "ranking_weight": 2.0},
    "pairwise by solution": {"ranking_loss": "pairwise", "loss_normalization": "solution", "bce_weight": 0.5},
    "pqm": {"ranking_loss": "pqm", "bce_weight": 0.0, "ranking_margin": 2.0},
    "last step": {"train_on_last_step_only": True},
    "mask, harden": {"after_first_error": "mask", "soft_labels": "harden", "label_threshold": 0.75},
}


# A number that no batch size divides.
RECORDS = LABELS[:7]


def train(checkpoint: Path, folder: Path, *, batch: int, accumulated: int, **options: Any) -> Any:
    """Loss and gradients of one optimizer step on all records."""
    layout = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated, "sgd": True}
    trainer, seen = make_trainer(checkpoint, folder, make_dataset(RECORDS), **layout, **options)
    trainer.train()
    assert len(seen.steps) == 1
    return trainer.state.log_history[0]["loss"], seen.steps[0]


def main(folder: Path) -> None:
    results = {
        name: train(folder / "prm", folder / "run", batch=2, accumulated=2, **options)
        for name, options in OPTIONS.items()
    }
    assert torch.distributed.get_world_size() == 2
    torch.save(results, folder / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
