"""Checkpoints of training: written whole or not at all, and found again after whatever ended a run.

A checkpoint is written under `.saving/` and gets its name, `checkpoint-STEP`, once every process has written its
part and all of it is on the disk; older ones are deleted only then. So a run may be killed or the disk may fill up
at any moment: a folder of that name is whole, and its list of files shows whether it still is.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME

from modeling_prm import PRMConfig, PRMForStepScoring

from .arguments import PRMTrainingArguments

logger = logging.getLogger(__name__)

SAVING_FOLDER = ".saving"
FILE_LIST = "checkpoint_files.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_LONGEST_HEADER = 100_000_000  # as safetensors has it


class CheckpointSaveError(OSError):
    """A checkpoint could not be written; the ones before it are as they were."""


def find_checkpoint(args: PRMTrainingArguments) -> str | None:
    """The checkpoint to go on from: the one named, or the last whole one in `output_dir` for `last`.

    Raises:
        ValueError: there is none, the one named is none or not whole, or there are some and the options do not
            say to go on from one.
    """
    folder = Path(args.output_dir)
    wanted = args.resume_from_checkpoint
    if wanted is None:
        if found := _checkpoints(folder):
            raise ValueError(
                f"{folder} holds {found[-1].name} of an earlier run; go on from it with --resume-from-checkpoint last, "
                "or name another --output-dir"
            )
        return None
    if wanted in ("last", "True", "true"):
        last = last_checkpoint(folder)
        if last is None:
            raise ValueError(
                f"{folder} holds no checkpoint to go on from{_shown_problems(folder)}; leave out "
                "--resume-from-checkpoint"
            )
        return last
    check_whole(wanted)
    return wanted


def last_checkpoint(folder: str | Path) -> str | None:
    """The checkpoint of the highest step in a folder that is whole; a logged line says what it passes over."""
    skipped: list[str] = []
    for path in reversed(_checkpoints(Path(folder))):
        if problem := problem_of(path):
            skipped.append(f"{path.name} is not whole ({problem})")
            continue
        unfinished = [part for part in _checkpoints(Path(folder) / SAVING_FOLDER) if _step(part) > _step(path)]
        skipped = [f"{part.name} was not saved to its end" for part in reversed(unfinished)] + skipped
        if skipped:
            logger.warning("%s; going on from %s", ", ".join(skipped), path.name)
        return str(path)
    return None


def check_whole(checkpoint: str | Path) -> None:
    """Check that a folder is a checkpoint of training of which nothing is missing.

    Raises:
        ValueError: it is not; the message says why.
    """
    path = Path(checkpoint)
    if not (path / TRAINER_STATE_NAME).is_file():
        raise ValueError(
            f"{checkpoint} is no checkpoint of training, which holds {TRAINER_STATE_NAME}; give a folder such as "
            f"{path.parent / 'checkpoint-100'}, or 'last'"
        )
    if problem := problem_of(path):
        raise ValueError(f"{checkpoint} is not whole: {problem}; give another checkpoint, or 'last' for one that is")


def check_same_model(model: PRMForStepScoring, checkpoint: str) -> None:
    """Check that a checkpoint was trained with the layout of ids and the head of this model.

    Raises:
        ValueError: it was not; the message names the options.
    """
    saved = PRMConfig.from_pretrained(checkpoint)
    names = [*model.config.layout, "head_type", "num_labels", "class_weights"]
    different = [name for name in names if getattr(saved, name) != getattr(model.config, name)]
    if different:
        shown = "; ".join(f"{name} was {getattr(saved, name)!r}" for name in different)
        raise ValueError(f"{checkpoint} was trained with other options: {shown}. Give the same ones to go on from it")


def problem_of(checkpoint: Path) -> str | None:
    """What is missing from a checkpoint, or cut off; None where it is whole.

    A checkpoint is compared with the list of files written with it. One without a list, of other trainers, is whole if
    the state, which they write last, is there and no file of weights or states is cut off.
    """
    try:
        if (checkpoint / FILE_LIST).is_file():
            sizes = json.loads((checkpoint / FILE_LIST).read_text(encoding="utf-8"))["files"]
            return next(filter(None, (_size_problem(checkpoint / name, size) for name, size in sizes.items())), None)
        if not (checkpoint / TRAINER_STATE_NAME).is_file():
            return f"{TRAINER_STATE_NAME} is missing"
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"a file of it cannot be read ({error})"
    for path in sorted(checkpoint.rglob("*")):
        if path.suffix == ".safetensors" and (problem := _size_problem(path, _safetensors_size(path))):
            return problem
        if path.suffix in (".pt", ".pth", ".bin") and path.name != "training_args.bin" and not zipfile.is_zipfile(path):
            return f"{path.name} is cut off"
    return None


@contextlib.contextmanager
def save_errors(name: str, run_folder: str, clean_up: Callable[[], object] | None = None) -> Iterator[None]:
    """Say what went wrong where `name` is written, and which checkpoint in `run_folder` is whole.

    Raises:
        CheckpointSaveError: from the error of what was tried, once `clean_up` has been called.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(
            Path(run_folder).absolute().anchor if not Path(run_folder).exists() else run_folder
        ).free
        if clean_up is not None:
            clean_up()
        raise CheckpointSaveError(_save_message(name, Path(run_folder), error, free)) from error


def saving_folder(run_folder: str) -> str:
    """The folder where the checkpoints of a run are written."""
    return str(Path(run_folder, SAVING_FOLDER))


def save_whole(trainer: Any, run_folder: str, save: Callable[[], object]) -> str:
    """Let `save` write the checkpoint of this step into `.saving/`, and give it its name once it is whole.

    Called in every process. Older checkpoints are then deleted as `save_total_limit` says, except the best one.

    Args:
        trainer: the `Trainer`.
        run_folder: the folder of checkpoints.
        save: writes `RUN_FOLDER/.saving/checkpoint-STEP`.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointSaveError: it could not be written, for want of space for example; what was written of it is
            deleted and the older checkpoints are untouched.
    """
    name = f"checkpoint-{trainer.state.global_step}"
    saving = Path(run_folder, SAVING_FOLDER)
    part, whole = saving / name, Path(run_folder, name)
    args = trainer.args
    with save_errors(name, run_folder, partial(_delete, saving) if args.should_save else None):
        if args.local_process_index == 0:
            _delete(saving)
        trainer.accelerator.wait_for_everyone()
        save()
        if trainer.state.best_model_checkpoint == str(part):
            trainer.state.best_model_checkpoint = str(whole)
            if args.should_save:
                trainer.state.save_to_json(str(part / TRAINER_STATE_NAME))
        # The other processes write files of their own, such as the states of their random numbers.
        trainer.accelerator.wait_for_everyone()
        if args.should_save:
            _name_whole(part, whole)
    if args.should_save:
        best = trainer.state.best_model_checkpoint
        rotate_checkpoints(whole, args.save_total_limit, keep=[Path(best)] if best else [])
        _delete(saving)
    trainer.accelerator.wait_for_everyone()
    return str(whole)


def rotate_checkpoints(newest: Path, limit: int | None, *, keep: Iterable[Path] = ()) -> None:
    """Delete the oldest checkpoints beside `newest` until `limit` are left; those that are not whole go first.

    Args:
        newest: a whole checkpoint, which stays.
        limit: how many may stay; None and 0 for all.
        keep: others that stay.
    """
    if not limit or limit < 0:
        return
    kept = {path.resolve() for path in (newest, *keep)}
    found = _checkpoints(newest.parent)
    others = [path for path in found if path.resolve() not in kept]
    others.sort(key=lambda path: (problem_of(path) is None, path.stat().st_mtime, _step(path)))
    for path in others[: max(len(found) - limit, 0)]:
        # Renamed first, so that no half of one is left under its name.
        aside = newest.parent / SAVING_FOLDER / f"deleted-{path.name}"
        aside.parent.mkdir(exist_ok=True)
        path.rename(aside)
        _delete(aside)


def _name_whole(part: Path, whole: Path) -> None:
    """Write everything to the disk with a list of its files, then give it its name."""
    files = sorted(path for path in part.rglob("*") if path.is_file())
    sizes = {path.relative_to(part).as_posix(): path.stat().st_size for path in files}
    listed = part / FILE_LIST
    listed.write_text(json.dumps({"files": sizes}, indent=1), encoding="utf-8")
    for path in (*files, listed):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    if whole.exists():
        # An earlier run's; a folder is not replaced in one go.
        whole.rename(part.parent / f"replaced-{whole.name}")
    part.rename(whole)
    with contextlib.suppress(OSError):  # not every system can do this for a folder
        descriptor = os.open(whole.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _save_message(name: str, folder: Path, error: Exception, free: int) -> str:
    last = next((path for path in reversed(_checkpoints(folder)) if problem_of(path) is None), None)
    kept = f"{last} is whole, go on from it with --resume-from-checkpoint last" if last else "there is none before it"
    return f"{name} could not be saved in {folder}, where {free / 1e6:,.1f} MB were free then ({error}); {kept}"


def _shown_problems(folder: Path) -> str:
    problems = [f"{path.name}: {problem_of(path)}" for path in _checkpoints(folder)]
    return f" ({'; '.join(problems)})" if problems else ""


def _size_problem(path: Path, size: int) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    found = path.stat().st_size
    return None if found == size else f"{path.name} has {found} of {size} bytes"


def _safetensors_size(path: Path) -> int:
    """The size in bytes that the header of a file of weights announces."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, _LONGEST_HEADER))
    try:
        tensors = json.loads(header)
    except ValueError:
        return 8 + length
    ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
    return 8 + length + max(ends, default=0)


def _checkpoints(folder: Path) -> list[Path]:
    """The folders named as checkpoints, by step."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()), key=_step)


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def _delete(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
