"""`trainer.train` with a fault, in processes that may be killed.

with Trainings() as run:
    done = run("half-written:4", "--backbone", ...)
    done.codes, done.stderr

A fault is one of
    none                nothing is wrong
    half-written:STEP   killed when half the optimizer's state of that step's checkpoint is on the disk
    after:SECONDS       killed so long after the first batch, at whatever is done then; batches take 50 ms more
    before-others:STEP  both processes killed when the first has written its part of that step's checkpoint
    nan:TOKEN           the embedding of that token is NaN wherever it is looked up

Killed is: by SIGKILL, so that no handler and no `finally` runs. The processes are forked from one that has imported the
trainer and done nothing else, which saves most of the time that a new one takes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from small_training import PROJECT, environment

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


def train_with(fault: str, options: list[str]) -> None:
    name, _, value = fault.partition(":")
    {
        "half-written": lambda: half_written(int(value)),
        "after": lambda: after(float(value)),
        "before-others": lambda: before_others(int(value)),
        "nan": lambda: nan(int(value)),
        "none": lambda: None,
    }[name]()
    train.main(options)


@dataclass(frozen=True)
class Done:
    """How processes ended (the signal as a negative number), and what they wrote to their error streams."""

    codes: list[int]
    stderr: str


class Trainings:
    """Runs `trainer.train` with a fault, in one process or several."""

    def __enter__(self) -> Trainings:
        words = [sys.executable, "-m", "training_with_faults"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._server = subprocess.Popen(words, cwd=PROJECT, env=environment(), **pipes)
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.kill()
        self._server.communicate()

    def __call__(self, fault: str, *options: Any, processes: int = 1) -> Done:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps([fault, list(map(str, options)), processes]) + "\n")
        self._server.stdin.flush()
        return Done(**json.loads(self._server.stdout.readline()))


def run_forked(fault: str, options: list[str], processes: int) -> Done:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with contextlib.ExitStack() as stack:
        children, errors = [], [stack.enter_context(tempfile.TemporaryFile()) for _ in range(processes)]
        for rank, file in enumerate(errors):
            child = os.fork()
            if child == 0:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                if processes > 1:
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                    os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
                    os.environ["MASTER_PORT"] = str(port)
                _run_and_exit(fault, options)
            children.append(child)
        alarm = threading.Timer(200, lambda: [os.kill(child, signal.SIGKILL) for child in children])
        alarm.start()
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        alarm.cancel()
        for file in errors:
            file.seek(0)
        return Done(codes, "".join(file.read().decode() for file in errors))


def _run_and_exit(fault: str, options: list[str]) -> None:
    code = 1
    try:
        train_with(fault, options)
        code = 0
    except SystemExit as stopped:
        print(stopped.code, file=sys.stderr, flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    for line in sys.stdin:
        done = run_forked(*json.loads(line))
        print(json.dumps(asdict(done)), flush=True)


if __name__ == "__main__":
    main()
