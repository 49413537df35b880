"""Labelled solutions, options and independent sums for the tests of training.

trainer, seen = make_trainer(folder, per_device_train_batch_size=2, gradient_accumulation_steps=4)
trainer.train()
seen.gradients[0]["value_head.out.weight"]
"""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import TrainerCallback

from modeling_prm import PRMForStepScoring, PRMProcessor
from trainer.arguments import PRMTrainingArguments
from trainer.prm_trainer import PRMTrainer

PROJECT = Path(__file__).resolve().parent.parent

# Numbers of steps from 1 to 9, hard, soft and ignored labels, an ignored first step, a row without a label.
LABELS: list[list[float]] = [
    [1.0],
    [1.0, 0.0, -100.0, 1.0, 0.25, -100.0, 0.0, 1.0, 1.0],
    [-100.0, 0.0],
    [-100.0, -100.0, -100.0],
    [0.0],
    [1.0, 1.0, 1.0, 1.0, 0.0],
    [0.75, -100.0],
    [-100.0, 1.0, 1.0, 0.0, -100.0, -100.0],
]


def make_rows(labels: list[list[float]] | None = None) -> list[dict[str, Any]]:
    """A record for each list of labels, with steps of different lengths."""
    return [
        {
            "problem": f"What is {number} + {number * 7}?",
            "steps": [
                f"{number} + {step} is {'so ' * ((number + step) % 4)}{number + step}." for step in range(len(row))
            ],
            "labels": row,
        }
        for number, row in enumerate(LABELS if labels is None else labels)
    ]


def make_dataset(labels: list[list[float]] | None = None) -> datasets.Dataset:
    return datasets.Dataset.from_list(make_rows(labels))


def make_arguments(output_dir: Any, **options: Any) -> PRMTrainingArguments:
    """Quiet options; `sgd=True` takes one plain step of gradient descent at a learning rate of 1."""
    defaults: dict[str, Any] = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    # The rows have soft labels, and what is worked out by hand takes them as they are.
    defaults |= {"soft_labels": "keep"}
    if options.pop("sgd", False):
        defaults |= {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "max_steps": 1, "logging_steps": 1}
        defaults |= {"lr_scheduler_type": "constant"}
    return PRMTrainingArguments(output_dir=str(output_dir), **(defaults | options))


class Gradients(TrainerCallback):
    """Copies the gradients of each optimizer step, by the parameters' names."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
        self.steps.append({name: grad.clone() for name, grad in grads.items() if grad is not None})


def exact_loss_and_gradients(
    model: PRMForStepScoring, processor: PRMProcessor, rows: list[dict[str, Any]]
) -> tuple[float, dict[str, torch.Tensor]]:
    """The sum of the cross-entropies of all labelled steps over their number, a record at a time, in float64."""
    model = copy.deepcopy(model).eval()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        logits = model(**processor(row["problem"], row["steps"], return_tensors="pt")).logits[0].double()
        for logit, label in zip(logits, row["labels"], strict=True):
            if label != -100.0:
                right = 1.0 / (1.0 + torch.exp(-logit))
                total = total - label * torch.log(right) - (1.0 - label) * torch.log(1.0 - right)
                count += 1
    loss = total / count
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def worst_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative difference in norm of any gradient; infinity where one is missing."""
    if found.keys() != expected.keys():
        return math.inf
    # A gradient that vanishes has no relative error, so each is measured beside a small part of the whole.
    floor = 1e-2 * max(float(grad.norm()) for grad in expected.values())
    return max(float((found[n] - expected[n]).norm()) / max(float(expected[n].norm()), floor) for n in expected)


def make_trainer(
    checkpoint: Path, output_dir: Any, rows: Any = None, *, eval_dataset: Any = None, **options: Any
) -> tuple[PRMTrainer, Gradients]:
    """A trainer of the PRM saved in `checkpoint`, with its head's dropout off, and what gradients it sees."""
    model = PRMForStepScoring.from_pretrained(checkpoint)
    model.value_head.dropout.p = 0.0
    gradients = Gradients()
    trainer = PRMTrainer(
        model,
        make_arguments(output_dir, **options),
        processing_class=PRMProcessor.from_pretrained(checkpoint),
        train_dataset=make_dataset() if rows is None else rows,
        eval_dataset=eval_dataset,
        callbacks=[gradients],
    )
    return trainer, gradients


def run_python(*words: Any, processes: int = 0, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    """Run `python -m ...` words in the project's folder, under accelerate with `processes` of them if not 0."""
    command = [sys.executable, "-m"]
    if processes:
        # A port of its own, so that runs side by side do not meet.
        command += ["accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
        command += ["--dynamo_backend", "no", "--num_processes", str(processes)]
        command += ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else []
        command += ["-m"]
    return subprocess.run(
        [*command, *map(str, words)], cwd=PROJECT, env=environment(), capture_output=True, text=True, timeout=timeout
    )


def environment() -> dict[str, str]:
    """The environment of other processes: offline, quiet, one thread, on CPUs, and the tests' modules on the path."""
    path = os.pathsep.join([str(PROJECT), str(PROJECT / "tests")])
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **quiet, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
