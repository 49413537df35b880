"""What both trainers of `train_vs_trl.py` are measured with; imports neither of them."""

from __future__ import annotations

import ctypes
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


class Meter(TrainerCallback):
    """Times an epoch from its first optimizer step to its last, and keeps losses and memory."""

    def __init__(self) -> None:
        self.started = self.ended = 0.0
        self.cpu_started = self.cpu_ended = 0.0
        self.steps = 0
        self.losses: list[float] = []
        self.start_memory_mib = self.peak_memory_mib = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if not self.started:
            self.start_memory_mib = reset_peak_memory()
            self.cpu_started = time.process_time()
            self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.ended = time.perf_counter()
        self.cpu_ended = time.process_time()
        self.steps += 1

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        # Before anything is scored, which is no part of training.
        self.peak_memory_mib = peak_memory_mib()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **rest: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def reset_peak_memory() -> float:
    """Forget the peak so far, that of loading the backbone, and return what is in use now, in MiB."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if sys.platform == "linux":
        # What is free already goes back first, so that it does not count as in use.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_memory_mib()


def peak_memory_mib() -> float:
    """The most memory of the process, or of the GPU where there is one, in MiB since `reset_peak_memory`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def training_options(job: dict[str, Any], output_dir: str) -> dict[str, Any]:
    """The options that both trainers get: the same records, batch, optimizer, precision and order."""
    return {
        "output_dir": output_dir,
        "per_device_train_batch_size": job["batch_size"],
        "num_train_epochs": 1,
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "seed": job["seed"],
        "use_cpu": job["device"] == "cpu",
        "bf16": job["dtype"] == "bfloat16",
        # On by default in TRL and off in Transformers: half the memory for a second forward pass.
        "gradient_checkpointing": job["gradient_checkpointing"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def warm_up(model: Any, backward: Callable[[], torch.Tensor]) -> None:
    """One forward and backward pass outside of the measurement, for allocators and kernels."""
    model.train()
    backward().backward()
    model.zero_grad(set_to_none=True)


def held_out_loss(step_probs: Sequence[Sequence[float]], labels: Sequence[Sequence[bool]]) -> float:
    """Mean binary cross-entropy of step probabilities."""
    losses = [
        -math.log(max(prob if label else 1.0 - prob, 1e-12))
        for probs, row in zip(step_probs, labels, strict=True)
        for prob, label in zip(probs, row, strict=True)
    ]
    return sum(losses) / len(losses)


def read_rows(path: str) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def report(meter: Meter, *, loss: float, versions: dict[str, str]) -> None:
    """Write what was measured as the last line of standard output."""
    result = {
        "seconds": meter.ended - meter.started,
        "cpu_seconds": meter.cpu_ended - meter.cpu_started,
        "optimizer_steps": meter.steps,
        "last_training_loss": meter.losses[-1],
        "held_out_loss": loss,
        "peak_memory_mib": meter.peak_memory_mib,
        "training_memory_mib": meter.peak_memory_mib - meter.start_memory_mib,
        "versions": versions,
    }
    sys.stdout.flush()
    print(json.dumps(result))
