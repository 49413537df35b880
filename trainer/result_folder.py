"""The folder of a job that several processes write shards into: whose it is, and who writes; see `result_shards`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import datasets
import yaml

logger = logging.getLogger(__name__)

JOB_FILE = "job.yaml"
_KIND = "result shards"
# Hidden, so that nothing takes them for data. One of each a process, so that the next run writes over those of a
# process that was killed.
_OWN_FILE = re.compile(r"\.(process-\d{5}\.(lock|tmp)|job-\w+\.tmp)")


def open_job(folder: Path, settings: Mapping[str, Any], features: datasets.Features) -> dict[str, Any]:
    """The folder's job: the one there, which must be the same, or a new one."""
    wanted = {
        "kind": _KIND,
        "settings": json.loads(json.dumps(dict(settings), allow_nan=False)),
        "columns": {field.name: str(field.type) for field in features.arrow_schema},
    }
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder for the output")
    job = read_job(folder)
    if job is None:
        if folder.is_dir():
            others = sorted(entry.name for entry in folder.iterdir() if not _OWN_FILE.fullmatch(entry.name))
            # Another process may have written it meanwhile.
            if others and not (folder / JOB_FILE).exists():
                raise ValueError(
                    f"{folder} holds {others[0]} and no {JOB_FILE}, so it is not the output of an earlier run; name "
                    "another folder"
                )
        folder.mkdir(parents=True, exist_ok=True)
        write_job(folder, wanted)
        return wanted
    for part, what in (("settings", "was started with"), ("columns", "has the column")):
        before, now = job.get(part) or {}, wanted[part]
        for name in [*now, *before]:
            if before.get(name) != now.get(name) or (name in before) != (name in now):
                raise ValueError(
                    f"{folder} {what} {_shown(name, before)}, and now it is {_shown(name, now)}; give the same, or "
                    "another folder"
                )
    return job


def _shown(name: str, values: Mapping[str, Any]) -> str:
    return f"{name}={values[name]!r}" if name in values else f"no {name}"


def read_job(folder: Path) -> dict[str, Any] | None:
    file = folder / JOB_FILE
    if not file.is_file():
        return None
    try:
        job = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}; name another folder") from error
    if not isinstance(job, dict) or job.get("kind") != _KIND:
        raise ValueError(f"{file} is not of a job of this package; name another folder")
    return job


def write_job(folder: Path, job: Mapping[str, Any]) -> None:
    # All processes of a run write the same, so that it does not matter whose stays.
    temporary = folder / f".job-{secrets.token_hex(4)}.tmp"
    try:
        with temporary.open("w", encoding="utf-8") as file:
            yaml.safe_dump(dict(job), file, sort_keys=False, allow_unicode=True)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / JOB_FILE)
        sync_folder(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(f"{folder / JOB_FILE} cannot be written: {error}") from error


def lock_process(folder: Path, process_index: int, num_processes: int) -> IO[bytes] | None:
    """Hold this process's place, so that no other run, such as orphans of a killed one, writes at the same time.

    The system lets go of it when the process ends, however it does. The first process also looks whether a process
    with a number that this run does not have is still at work.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system: nothing is held
        return None
    mine = (folder / f".process-{process_index:05d}.lock").open("ab")
    others = [file for file in folder.glob(".process-*.lock") if int(file.name[9:14]) >= num_processes]
    try:
        fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for file in others if process_index == 0 else []:
            with file.open("ab") as other:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink(missing_ok=True)
            file.with_suffix(".tmp").unlink(missing_ok=True)
    except BlockingIOError:
        mine.close()
        raise ValueError(f"another run is writing into {folder}; wait for its end, or stop it") from None
    except OSError as error:
        logger.warning("%s: no lock can be held there (%s); see to it that one run at a time writes", folder, error)
    return mine


def sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
