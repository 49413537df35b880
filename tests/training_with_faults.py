"""`trainer.train` with a fault, for the tests: `python -m training_with_faults FAULT OPTIONS`.

FAULT is one of
    half-written:STEP   killed when half the optimizer's state of that step's checkpoint is on the disk
    after:SECONDS       killed so long after the first batch, at whatever is done then; batches take 50 ms more
    before-others:STEP  both processes killed when the first has written its part of that step's checkpoint
    nan:TOKEN           the embedding of that token is NaN wherever it is looked up

Killed is: by SIGKILL, so that no handler and no `finally` runs.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from trainer import train
from trainer.prm_trainer import PRMTrainer


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_written(step: int) -> None:
    save = torch.save

    def save_half(values: Any, path: Any, *rest: Any, **more: Any) -> None:
        if Path(path).name != "optimizer.pt" or Path(path).parent.name != f"checkpoint-{step}":
            save(values, path, *rest, **more)
            return
        whole = io.BytesIO()
        save(values, whole)
        Path(path).write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
        kill()

    torch.save = save_half


def after(seconds: float) -> None:
    training_step = PRMTrainer.training_step

    def slow_step(self: PRMTrainer, *given: Any) -> torch.Tensor:
        if not started:
            started.append(threading.Timer(seconds, kill))
            started[0].start()
        time.sleep(0.05)
        return training_step(self, *given)

    started: list[threading.Timer] = []
    PRMTrainer.training_step = slow_step  # type: ignore[method-assign]


def before_others(step: int) -> None:
    save_rng_state = PRMTrainer._save_rng_state

    def save_or_die(self: PRMTrainer, folder: str) -> None:
        if self.state.global_step == step and self.args.process_index == 0:
            Path(folder, "main_process").write_text(str(os.getpid()))
        if self.state.global_step == step and self.args.process_index == 1:
            # The main process has time to write all of its own.
            while not Path(folder, "trainer_state.json").exists():
                time.sleep(0.01)
            os.kill(int(Path(folder, "main_process").read_text()), signal.SIGKILL)
            kill()
        save_rng_state(self, folder)

    PRMTrainer._save_rng_state = save_or_die  # type: ignore[method-assign]


def make_nan(model: Any, token: int) -> None:
    """Make the embedding of a token NaN wherever a model looks it up."""
    model.backbone.get_input_embeddings().register_forward_hook(
        lambda _, given, out: out.masked_fill((given[0] == token).unsqueeze(-1), float("nan"))
    )


def nan(token: int) -> None:
    start_model = train.start_model

    def start(options: Any) -> Any:
        model, processor = start_model(options)
        make_nan(model, token)
        return model, processor

    train.start_model = start


def main(fault: str, options: list[str]) -> None:
    name, _, value = fault.partition(":")
    {
        "half-written": lambda: half_written(int(value)),
        "after": lambda: after(float(value)),
        "before-others": lambda: before_others(int(value)),
        "nan": lambda: nan(int(value)),
        "none": lambda: None,
    }[name]()
    train.main(options)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
