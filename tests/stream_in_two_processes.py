"""What the tests of streaming run in each of two processes: `accelerate launch -m stream_in_two_processes DIR`.

`DIR/prm` is the checkpoint to train, `DIR/rows` and `DIR/shards` hold the data, the latter in files of one size; each
process writes `DIR/rank{R}.pt`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from small_training import make_trainer

from trainer.preparation import RECORD_NUMBER
from trainer.prm_trainer import PRMTrainer
from trainer.readers import load_step_dataset

LAYOUT: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "sgd": True}


def train(folder: Path, data: str) -> dict[str, Any]:
    trainer, seen = make_trainer(
        folder / "prm", folder / "run", load_step_dataset(folder / data, streaming=True), **LAYOUT
    )
    records: list[int] = []
    step = PRMTrainer.training_step

    def noting(self: PRMTrainer, model: Any, inputs: Any, *rest: Any) -> torch.Tensor:
        records.extend(inputs[RECORD_NUMBER].tolist())
        return step(self, model, inputs, *rest)

    PRMTrainer.training_step = noting  # type: ignore[method-assign]
    try:
        trainer.train()
    finally:
        PRMTrainer.training_step = step  # type: ignore[method-assign]
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return {"loss": loss, "gradients": seen.steps[0], "records": records}


def main(folder: Path) -> None:
    result = {data: train(folder, data) for data in ("rows", "shards")}
    torch.save(result, folder / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
