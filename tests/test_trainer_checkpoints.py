"""Checkpoints: runs that are killed for real, half-written folders, a full disk, and what is deleted when."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_training import LABELS, make_arguments, make_dataset, make_rows, make_trainer
from training_with_faults import Trainings

from trainer import train
from trainer.checkpoints import (
    FILE_LIST,
    SAVING_FOLDER,
    CheckpointSaveError,
    check_whole,
    find_checkpoint,
    last_checkpoint,
    problem_of,
    rotate_checkpoints,
)

Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def trained(prm_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of four steps leaves: checkpoint-2 and checkpoint-4. Not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    trainer, _ = make_trainer(prm_folder("qwen2"), folder, max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train()
    return folder


@pytest.fixture(scope="module")
def trainings() -> Iterator[Trainings]:
    with Trainings() as run:
        yield run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of `trained`."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def options(backbone_folder: Folder, tmp_path: Path) -> list[str]:
    """Ten steps of GPT-2, with its dropout and shuffling, and a checkpoint every two."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(LABELS * 2)))
    words = ["--backbone", str(backbone_folder("gpt2")), "--train-data", str(tmp_path / "data.jsonl"), "--use-cpu"]
    words += ["--report-to", "none", "--disable-tqdm", "true", "--max-steps", "10", "--save-steps", "2"]
    return [*words, "--save-total-limit", "2", "--learning-rate", "1e-2", "--logging-steps", "1"]


@pytest.fixture(autouse=True)
def _keep_logging() -> Iterator[None]:
    """The command sets up logging for its process, which is ours here."""
    root, handlers = logging.getLogger(), list(logging.getLogger().handlers)
    levels = {name: logging.getLogger(name).level for name in ("trainer", "modeling_prm", "hub_card")}
    yield
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_killed_in_a_save_and_at_a_random_moment_the_end_is_that_of_an_uninterrupted_run(
    options: list[str], trainings: Trainings, tmp_path: Path
) -> None:
    layout, resume = ["--per-device-train-batch-size", "2"], ["--resume-from-checkpoint", "last"]
    train.main([*options, *layout, "--output-dir", str(tmp_path / "whole")])
    out = tmp_path / "out"
    options = [*options, *layout, "--output-dir", str(out)]

    killed = trainings("half-written:4", *options)
    assert killed.codes == [-signal.SIGKILL], killed.stderr[-3000:]
    assert names(out) == [SAVING_FOLDER, "checkpoint-2"]
    part = out / SAVING_FOLDER / "checkpoint-4"
    assert 0 < (part / "optimizer.pt").stat().st_size < 0.6 * (out / "checkpoint-2" / "optimizer.pt").stat().st_size

    # Batches take 50 ms and more, so that this falls anywhere in the eight steps that are left.
    moment = random.Random(7).uniform(0.05, 0.4)
    killed = trainings(f"after:{moment}", *options, *resume)
    assert killed.codes == [-signal.SIGKILL], killed.stderr[-3000:]
    said = [line for line in killed.stderr.splitlines() if "going on from" in line]
    assert said == ["WARNING trainer.checkpoints: checkpoint-4 was not saved to its end; going on from checkpoint-2"]
    assert not (out / "model.safetensors").exists()

    train.main([*options, *resume])
    assert same(weights(out), weights(tmp_path / "whole"))
    assert not same(weights(out), weights(out / "checkpoint-8"))
    assert names(out) == ["checkpoint-10", "checkpoint-8"]
    assert problem_of(out / "checkpoint-8") is problem_of(out / "checkpoint-10") is None


def test_two_processes_killed_when_only_the_first_has_saved_its_part(
    options: list[str], trainings: Trainings, tmp_path: Path
) -> None:
    # Plain descent keeps rounding errors small.
    options = [*options, "--disable-dropout", "--optim", "sgd", "--max-steps", "6", "--learning-rate", "0.1"]
    train.main([*options, "--per-device-train-batch-size", "4", "--output-dir", str(tmp_path / "whole")])
    out = tmp_path / "out"
    options = [*options, "--per-device-train-batch-size", "2", "--output-dir", str(out)]
    killed = trainings("before-others:4", *options, processes=2)
    assert killed.codes == [-signal.SIGKILL] * 2, killed.stderr[-3000:]
    assert names(out) == [SAVING_FOLDER, "checkpoint-2"]
    assert (out / SAVING_FOLDER / "checkpoint-4" / "trainer_state.json").exists()
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in (out / "checkpoint-2").iterdir()}
    done = trainings("none", *options, "--resume-from-checkpoint", "last", processes=2)
    assert done.codes == [0, 0], done.stderr[-3000:]
    assert done.stderr.count("checkpoint-4 was not saved to its end; going on from checkpoint-2") == 1
    assert names(out) == ["checkpoint-4", "checkpoint-6"]
    expected, start = weights(tmp_path / "whole"), weights(out / "checkpoint-4")
    for name, tensor in weights(out).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
    assert max(float((tensor - start[name]).abs().max()) for name, tensor in expected.items()) > 1e-3


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut": (lambda folder: cut(folder / "model.safetensors"), r"model\.safetensors has \d+ of \d+ bytes"),
    "optimizer missing": (lambda folder: (folder / "optimizer.pt").unlink(), r"optimizer\.pt is missing"),
    "code missing": (lambda folder: (folder / "modeling_prm.py").unlink(), r"modeling_prm\.py is missing"),
    "state cut": (lambda folder: cut(folder / "trainer_state.json"), r"trainer_state\.json has \d+ of \d+ bytes"),
    "list cut": (lambda folder: cut(folder / FILE_LIST), r"a file of it cannot be read"),
    "list of another kind": (lambda folder: (folder / FILE_LIST).write_text("[]"), r"a file of it cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_half_written_checkpoint_is_passed_over(
    name: str, run: Path, prm_folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    damage, problem = DAMAGE[name]
    assert last_checkpoint(run) == str(run / "checkpoint-4")
    assert not caplog.messages
    damage(run / "checkpoint-4")
    assert re.fullmatch(problem + r"( \(.*\))?", problem_of(run / "checkpoint-4") or "")
    resume = make_arguments(run, resume_from_checkpoint="last")
    assert find_checkpoint(resume) == str(run / "checkpoint-2")
    assert len(caplog.messages) == 1
    assert re.fullmatch(rf"checkpoint-4 is not whole \({problem}.*\); going on from checkpoint-2", caplog.messages[0])
    with pytest.raises(
        ValueError, match=rf"checkpoint-4 is not whole: {problem}.*; give another checkpoint, or 'last'"
    ):
        find_checkpoint(make_arguments(run, resume_from_checkpoint=str(run / "checkpoint-4")))


def test_training_goes_on_from_the_last_whole_one_and_replaces_the_other(
    run: Path, trained: Path, prm_folder: Folder
) -> None:
    cut(run / "checkpoint-4" / "model.safetensors")
    trainer, _ = make_trainer(prm_folder("qwen2"), run, max_steps=4, save_strategy="steps", save_steps=2)
    with pytest.raises(ValueError, match="checkpoint-4 is not whole"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    trainer.train(resume_from_checkpoint=True)
    assert names(run) == ["checkpoint-2", "checkpoint-4"]
    assert problem_of(run / "checkpoint-4") is None
    assert same(weights(run / "checkpoint-4"), weights(trained / "checkpoint-4"))


FOREIGN: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "whole": (lambda folder: None, None),
    "no state": (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "state cut": (lambda folder: cut(folder / "trainer_state.json"), "a file of it cannot be read"),
    "weights cut": (lambda folder: cut(folder / "model.safetensors"), "bytes"),
    "weights nearly empty": (lambda folder: (folder / "model.safetensors").write_bytes(b"\1\0\0"), "bytes"),
    "optimizer cut": (lambda folder: cut(folder / "optimizer.pt"), "optimizer.pt is cut off"),
    "random numbers cut": (lambda folder: cut(folder / "rng_state.pth"), "rng_state.pth is cut off"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_checkpoints_without_a_list_are_looked_through(name: str, run: Path) -> None:
    damage, problem = FOREIGN[name]
    (run / "checkpoint-4" / FILE_LIST).unlink()
    damage(run / "checkpoint-4")
    found = problem_of(run / "checkpoint-4")
    assert found is None if problem is None else problem in (found or "")


def test_no_whole_checkpoint_is_said_with_the_reasons(run: Path, prm_folder: Folder) -> None:
    for step in (2, 4):
        (run / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"go on from \(checkpoint-2: optimizer.pt is missing; checkpoint-4: optim"):
        find_checkpoint(make_arguments(run, resume_from_checkpoint="last"))
    trainer, _ = make_trainer(prm_folder("qwen2"), run)
    with pytest.raises(ValueError, match="holds no whole checkpoint to go on from"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="holds checkpoint-4 of an earlier run"):
        find_checkpoint(make_arguments(run))
    with pytest.raises(ValueError, match=r"is no checkpoint of training, which holds trainer_state\.json"):
        check_whole(run)


def test_what_a_killed_first_save_left_does_not_stand_in_the_way(tmp_path: Path, prm_folder: Folder) -> None:
    left = tmp_path / SAVING_FOLDER / "checkpoint-1"
    left.mkdir(parents=True)
    (left / "rng_state_7.pth").write_bytes(b"half")
    assert find_checkpoint(make_arguments(tmp_path)) is None
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    assert names(tmp_path) == ["checkpoint-1"]
    assert not (tmp_path / "checkpoint-1" / "rng_state_7.pth").exists()


@pytest.fixture
def full_disk(tmp_path: Path, trained: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A file system with room for one checkpoint and a half, and a function that gives it more."""
    size = sum(path.stat().st_size for path in (trained / "checkpoint-2").rglob("*"))
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        yield folder, lambda: subprocess.run(["mount", "-o", f"remount,size={size * 4}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint_whole(
    full_disk: tuple[Path, Callable[[], None]], trained: Path, prm_folder: Folder
) -> None:
    disk, give_more = full_disk
    options: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    trainer, _ = make_trainer(prm_folder("qwen2"), disk, **options)
    said = (
        r"checkpoint-4 could not be saved in .*, where \d+\.\d MB were free then \(.*\); .*checkpoint-2 is whole, go on"
    )
    with pytest.raises(CheckpointSaveError, match=said):
        trainer.train()
    assert names(disk) == ["checkpoint-2"]
    assert problem_of(disk / "checkpoint-2") is None
    assert same(weights(disk / "checkpoint-2"), weights(trained / "checkpoint-2"))
    give_more()
    trainer, _ = make_trainer(prm_folder("qwen2"), disk, **options)
    trainer.train(resume_from_checkpoint=True)
    assert names(disk) == ["checkpoint-4"]
    assert same(weights(disk / "checkpoint-4"), weights(trained / "checkpoint-4"))


@pytest.mark.parametrize("full_for", ["optimizer.pt", "rng_state.pth", FILE_LIST])
def test_any_file_that_finds_no_room_ends_the_save(
    full_for: str, prm_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    save, write_text = torch.save, Path.write_text

    def refuse(path: Any, write: Callable[[], object]) -> Any:
        if Path(path).name == full_for and (tmp_path / "checkpoint-1").exists():
            raise full
        return write()

    monkeypatch.setattr(torch, "save", lambda value, path: refuse(path, lambda: save(value, path)))
    monkeypatch.setattr(Path, "write_text", lambda self, *a, **k: refuse(self, lambda: write_text(self, *a, **k)))
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, **options)
    with pytest.raises(CheckpointSaveError, match="No space left on device") as raised:
        trainer.train()
    assert raised.value.__cause__ is full
    assert names(tmp_path) == ["checkpoint-1"]
    assert problem_of(tmp_path / "checkpoint-1") is None


def test_the_command_says_in_one_line_that_the_disk_is_full(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:664]\nunexpected pos")

    # What torch says where a disk is full.
    monkeypatch.setattr(torch, "save", lambda value, path: full() if "optimizer" in str(path) else None)
    with pytest.raises(SystemExit) as stopped:
        train.main([*options, "--max-steps", "2", "--output-dir", str(tmp_path / "out")])
    said = str(stopped.value.code)
    assert said.startswith("error: checkpoint-2 could not be saved in ")
    assert said.endswith("unexpected pos); there is none before it")
    assert "\n" not in said


def test_older_checkpoints_stay_until_the_new_one_is_whole(
    prm_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    save = torch.save

    def look(value: Any, path: Any) -> None:
        if Path(path).name == "optimizer.pt":
            seen.append([name for name in names(tmp_path) if problem_of(tmp_path / name) is None])
        save(value, path)

    monkeypatch.setattr(torch, "save", look)
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, **options)
    trainer.train()
    assert seen == [[], ["checkpoint-1"], ["checkpoint-2"]]
    assert names(tmp_path) == ["checkpoint-3"]


def test_the_best_checkpoint_stays_under_its_own_name(
    prm_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 1e-2}
    options |= {"metric_for_best_model": "made", "greater_is_better": True}
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, eval_dataset=make_dataset(LABELS[:2]), **options)
    # The second step is the best.
    monkeypatch.setattr(
        trainer, "compute_metrics", lambda _: {"made": [0.1, 0.9, 0.2, 0.3][trainer.state.global_step - 1]}
    )
    states: list[dict[str, Any]] = []
    save_whole = trainer._save_checkpoint

    def save(model: Any, trial: Any) -> None:
        save_whole(model, trial)
        path = tmp_path / f"checkpoint-{trainer.state.global_step}"
        states.append(json.loads((path / "trainer_state.json").read_text()) | {"found": names(tmp_path)})

    monkeypatch.setattr(trainer, "_save_checkpoint", save)
    trainer.train()
    best = str(tmp_path / "checkpoint-2")
    assert [state["best_model_checkpoint"] for state in states] == [str(tmp_path / "checkpoint-1"), best, best, best]
    assert [state["found"] for state in states] == [
        ["checkpoint-1"],
        ["checkpoint-2"],
        ["checkpoint-2", "checkpoint-3"],
        ["checkpoint-2", "checkpoint-4"],
    ]
    assert trainer.state.best_model_checkpoint == best
    assert same(weights(Path(best)), dict(trainer.model.state_dict()))


def test_rotation_by_hand(tmp_path: Path) -> None:
    def make(step: int, time: float, *, whole: bool = True) -> Path:
        path = tmp_path / f"checkpoint-{step}"
        path.mkdir()
        if whole:
            (path / "trainer_state.json").write_text("{}")
        os.utime(path, (time, time))
        return path

    # 9 and 7 are of an earlier run, 7 is not whole, 2 is the best, 3 is new, 1 and 8 are of one moment.
    folders = {step: make(step, time) for step, time in ((9, 10.0), (2, 20.0), (1, 30.0), (8, 30.0), (3, 50.0))}
    make(7, 40.0, whole=False)
    (tmp_path / "checkpoint-x").mkdir()
    left = []
    for limit in (None, 0, -1, 6, 5, 4, 3, 2, 1):
        rotate_checkpoints(folders[3], limit, keep=[folders[2]])
        left.append([int(name[11:]) for name in names(tmp_path) if name[11:].isdigit()])
    everything = [1, 2, 3, 7, 8, 9]
    assert left == [everything] * 4 + [[1, 2, 3, 8, 9], [1, 2, 3, 8], [2, 3, 8], [2, 3], [2, 3]]
    assert (tmp_path / "checkpoint-x").exists()
