"""What the tests of sharded training run in each of two processes: `accelerate launch -m train_sharded DIR`.

`DIR/prm` is the checkpoint to train. Process 0 leaves its results in `DIR/results.pt` and what was saved in
`DIR/raw`, `DIR/FULL_STATE_DICT` and `DIR/SHARDED_STATE_DICT`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from small_training import make_dataset, make_rows, make_trainer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from modeling_prm import PRMForStepScoring, PRMProcessor
from modeling_prm.step_loss import IGNORED_LABEL
from trainer.collator import PRMDataCollator
from trainer.preparation import tokenize_dataset
from trainer.sharding import own_class

ENGINE = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
ONE_STEP: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "sgd": True}
TWO_STEPS: dict[str, Any] = {"per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 0.01, "seed": 3}
TWO_STEPS |= {"save_strategy": "steps", "save_steps": 1}


def step_by_hand(folder: Path) -> None:
    """One step of gradient descent on all records, half of them here, sharded by PyTorch alone."""
    rank = torch.distributed.get_rank()
    model = PRMForStepScoring.from_pretrained(folder / "prm").eval()
    processor = PRMProcessor.from_pretrained(folder / "prm")
    for layer in model.backbone.layers:
        fully_shard(layer)
    fully_shard(model)
    tokens, _ = tokenize_dataset(make_dataset(), processor)
    batch = PRMDataCollator(processor)([tokens[index] for index in range(rank, len(tokens), 2)])
    labelled = sum(label != IGNORED_LABEL for row in make_rows() for label in row["labels"])
    # FSDP takes the mean of the processes' gradients.
    (2 * model(**batch, num_items_in_batch=labelled).loss).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        with own_class(model):
            model.save_pretrained(folder / "raw", state_dict=weights)
        processor.save_pretrained(folder / "raw")


def use_fsdp_on_cpu() -> None:
    """Let accelerate shard on CPUs, where it takes plain DDP without a word."""
    init = AcceleratorState.__init__

    def start(self: Any, *given: Any, fsdp_plugin: Any = None, **rest: Any) -> None:
        init(self, *given, fsdp_plugin=fsdp_plugin, **rest)
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
        if "fsdp_plugin" in self.__dict__:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = start
    os.environ.update(ENGINE)


def train(folder: Path, kind: str) -> dict[str, Any]:
    """One exact step; then two steps, and the second of them again from the checkpoint after the first."""
    os.environ["FSDP_STATE_DICT_TYPE"] = kind
    trainer, _ = make_trainer(folder / "prm", folder / "run", eval_dataset=make_dataset(), **ONE_STEP)
    trainer.train()
    result = {
        "engine": str(trainer.accelerator.distributed_type),
        "parameters": {type(parameter).__name__ for parameter in trainer.model.parameters()},
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "metrics": trainer.evaluate(),
    }
    trainer.save_model(str(folder / kind))
    trainer, _ = make_trainer(folder / "prm", folder / f"{kind}-whole", **TWO_STEPS)
    trainer.train()
    trainer, _ = make_trainer(folder / "prm", folder / f"{kind}-resumed", **TWO_STEPS)
    trainer.train(resume_from_checkpoint=str(folder / f"{kind}-whole" / "checkpoint-1"))
    return result


def train_in_bf16(folder: Path) -> dict[str, Any]:
    """What a model that was trained with bf16 returns, still in shards, for the first two records."""
    trainer, _ = make_trainer(folder / "prm", folder / "bf16", bf16=True, **ONE_STEP)
    trainer.train()
    trainer.save_model(str(folder / "BF16"))
    rows = make_rows()[:2]
    problems, solutions = [row["problem"] for row in rows], [row["steps"] for row in rows]
    with torch.no_grad():
        output = trainer.model.eval()(**trainer.processing_class(problems, solutions, return_tensors="pt"))
    policy = str(trainer.accelerator.state.fsdp_plugin.mixed_precision_policy)
    return {"policy": policy, "logits": output.logits, "step_probs": output.step_probs}


def main(folder: Path) -> None:
    use_fsdp_on_cpu()
    results = {kind: train(folder, kind) for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT")}
    results["BF16"] = train_in_bf16(folder)
    step_by_hand(folder)
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
