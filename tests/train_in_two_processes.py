"""What the tests of training run in each of two processes: `accelerate launch -m train_in_two_processes DIR`.

`DIR/prm` is the checkpoint to train; each process writes `DIR/rank{R}.pt`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from small_training import LABELS, make_dataset, make_trainer

LAYOUT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "sgd": True}


def train(folder: Path, *, records: int = 8, evaluate_first: bool = False, **options: Any) -> dict[str, Any]:
    # Seven records in batches of three: the two processes get 3 and 3, then 1 and what fills a batch up.
    evaluation = {"eval_dataset": make_dataset(LABELS[:7]), "per_device_eval_batch_size": 3}
    options = {**evaluation, **LAYOUT, **options}
    trainer, seen = make_trainer(folder / "prm", folder / "run", make_dataset(LABELS[:records]), **options)
    metrics = trainer.evaluate() if evaluate_first else None
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    return {"loss": loss, "gradients": seen.steps, "metrics": metrics, "weights": weights}


def main(folder: Path) -> None:
    result: dict[str, Any] = {
        "train": train(folder),
        "evaluate_then_train": train(folder, evaluate_first=True),
        # One record is missing for whole batches.
        "uneven": train(folder, records=7),
        "uneven_packed": train(folder, records=7, packing="pack"),
        "uneven_shared": train(folder, records=7, packing="share"),
    }
    result["world_size"] = torch.distributed.get_world_size()
    torch.save(result, folder / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
