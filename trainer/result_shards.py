"""What a long job over many rows writes: Parquet shards from several processes, gone on with after any end.

    features = datasets.Features({"id": datasets.Value("string"), "score": datasets.Value("float64")})
    with ShardWriter(folder, settings={"model": ...}, features=features, process_index=0, num_processes=1) as writer:
        for row, item in enumerate(items):
            if writer.is_due(row):  # this process's, and not written by this run or an earlier one
                writer.add(row, {"id": item.id, "score": ...})
        writer.finish(num_rows=len(items))  # the whole job's, the same on all processes
    for record in read_rows(folder):  # {"row": 0, "id": ..., "score": ...}, in the order of the rows
        ...

Every shard holds the column `row` (int64: the 0-based number of the row in the job's input) before those of
`features`, so that what is done is read from the shards themselves, whatever number of processes wrote them. A shard
gets its name when all of it is on the disk. A process that is killed loses what it added since its last shard, and the
next run, which `is_due` tells, does that again. `job.yaml` beside them holds the settings; a run with others is
refused.

Rows are shared out by their number, `row % num_processes`. A job that shares them out in another way (all solutions of
one problem to one process) asks `row in writer.finished` in place of `is_due`; its way must give each row to one
process only, and not depend on what is finished, which processes that start later see more of.

`datasets.load_dataset("parquet", data_files=f"{folder}/*.parquet")` and `trainer.readers` read the shards as they are.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet

from .result_folder import JOB_FILE, lock_process, open_job, read_job, sync_folder, write_job

ROW = "row"
_ROWS_READ = 1_024


class FinishedRows:
    """Numbers of rows, 8 bytes each: `row in finished`, `len(finished)`, and iteration in order.

    Args:
        rows: int64 (N,), sorted, without doubles.
    """

    def __init__(self, rows: np.ndarray[Any, Any]) -> None:
        self._rows = rows

    def __contains__(self, row: object) -> bool:
        if not isinstance(row, int):
            return False
        place = int(np.searchsorted(self._rows, row))
        return place < len(self._rows) and int(self._rows[place]) == row

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[int]:
        return map(int, self._rows)

    def with_rows(self, rows: Iterable[int]) -> FinishedRows:
        """These and others."""
        return FinishedRows(np.union1d(self._rows, np.fromiter(rows, dtype=np.int64)))


class ShardWriter:
    """Writes the rows of one process; see the module for its use.

    Args:
        folder: for the shards of all processes: a new one, an empty one, or that of an earlier run of the job.
        settings: what would make rows differ (model, input, options), as values that JSON has. What only changes
            the speed does not belong in it.
        features: the columns, with their types, without `row`.
        process_index: the number of this process, from 0.
        num_processes: how many there are.
        rows_per_shard: a shard is written when so many rows were added,
        seconds_per_shard: or when a row is added so long after the last shard was written.

    Attributes:
        finished: the rows that lie in shards, of all earlier runs and of this process.
        num_written: how many rows this process wrote.

    Raises:
        ValueError: the folder holds something else, or rows of other settings or columns (the message names the
            difference), or another run is writing into it; or an option that cannot be.
        OSError: the folder cannot be made or written to.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        settings: Mapping[str, Any],
        features: datasets.Features,
        process_index: int = 0,
        num_processes: int = 1,
        rows_per_shard: int = 10_000,
        seconds_per_shard: float = 300.0,
    ) -> None:
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index must be from 0 to {num_processes - 1}, got {process_index}")
        if rows_per_shard < 1:
            raise ValueError(f"rows_per_shard must be at least 1, got {rows_per_shard}")
        if ROW in features:
            raise ValueError(f"the column {ROW!r} is the writer's own; give the other column another name")
        self.folder = Path(folder)
        self.features = datasets.Features({ROW: datasets.Value("int64"), **features})
        self.process_index = process_index
        self.num_processes = num_processes
        self.rows_per_shard = rows_per_shard
        self.seconds_per_shard = seconds_per_shard
        self.num_written = 0
        self._job = open_job(self.folder, settings, self.features)
        self._lock = lock_process(self.folder, process_index, num_processes)
        self.finished = finished_rows(self.folder)
        self._buffer: dict[int, Mapping[str, Any]] = {}
        self._last_shard = time.monotonic()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        # What was added is finished, whatever ends the job.
        try:
            self.flush()
        except OSError:
            if error is None:
                raise
        finally:
            self.close()

    def is_due(self, row: int) -> bool:
        """Whether a row is this process's (`row % num_processes == process_index`) and not written yet."""
        return row % self.num_processes == self.process_index and row not in self.finished

    def add(self, row: int, record: Mapping[str, Any]) -> None:
        """Add one finished row, and write a shard where it is time.

        Args:
            row: its 0-based number in the job's input.
            record: a value for each column, `row` left out.

        Raises:
            ValueError: the row was added already, has other columns, or a value that its column cannot hold.
            OSError: as `flush`.
        """
        if row < 0 or row in self._buffer or row in self.finished:
            raise ValueError(f"row {row} was added already, or is below 0; ask is_due, or `in finished`, before")
        if record.keys() != self.features.keys() - {ROW}:
            raise ValueError(
                f"row {row} has the columns {', '.join(sorted(record))}; needed are "
                f"{', '.join(sorted(self.features.keys() - {ROW}))}"
            )
        added = {ROW: row, **record}
        _to_table([added], self.features.arrow_schema)  # now, so that a shard never fails for one row
        self._buffer[row] = added
        late = time.monotonic() - self._last_shard >= self.seconds_per_shard
        if late or len(self._buffer) >= self.rows_per_shard:
            self.flush()

    def flush(self) -> None:
        """Write what was added as a shard.

        Raises:
            OSError: it cannot be written, such as for want of space. Earlier shards stay as they are, what was
                added stays in memory.
        """
        self._last_shard = time.monotonic()
        if not self._buffer:
            return
        rows = sorted(self._buffer)
        table = _to_table([self._buffer[row] for row in rows], self.features.arrow_schema)
        name = f"rows-{rows[0]:012d}-process-{self.process_index:05d}-{secrets.token_hex(4)}.parquet"
        temporary = self.folder / f".process-{self.process_index:05d}.tmp"
        try:
            with temporary.open("wb") as file:
                pyarrow.parquet.write_table(table, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / name)
            sync_folder(self.folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise OSError(
                f"{self.folder / name} cannot be written: {error}; the {len(self.finished):,} rows that were written "
                "before are whole; make room and start again with the same options"
            ) from error
        self.finished = self.finished.with_rows(rows)
        self.num_written += len(rows)
        self._buffer.clear()

    def finish(self, *, num_rows: int) -> None:
        """Write what is left, and note how many rows the whole job has, which `read_rows` checks.

        Args:
            num_rows: of all processes together; the same on each.

        Raises:
            OSError: as `flush`.
        """
        self.flush()
        if self.process_index == 0:
            self._job = {**self._job, "num_rows": num_rows}
            write_job(self.folder, self._job)

    def close(self) -> None:
        """Let another run write into the folder; what was not flushed is gone."""
        self._buffer.clear()
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def finished_rows(folder: str | os.PathLike[str]) -> FinishedRows:
    """The numbers of the rows in a folder's shards; none where there is no folder.

    Raises:
        ValueError: a shard cannot be read, or a row lies in two of them; the message names the files.
    """
    shards = _shards(Path(folder))
    rows = [np.zeros(0, dtype=np.int64), *(_read_numbers(shard) for shard in shards)]
    merged = np.concatenate(rows)
    unique, counts = np.unique(merged, return_counts=True)
    if len(unique) < len(merged):
        double = int(unique[counts > 1][0])
        names = [shard.name for shard, numbers in zip(shards, rows[1:], strict=True) if double in numbers]
        raise ValueError(f"{folder}: row {double} lies in {' and '.join(names)}; delete one of them and start again")
    return FinishedRows(unique)


def read_rows(folder: str | os.PathLike[str], *, partial: bool = False) -> Iterator[dict[str, Any]]:
    """All rows of a job, in the order of their numbers; the shards are read as they are needed.

    Args:
        folder: the folder of a `ShardWriter`.
        partial: whether rows may be missing, as in a job that is not at its end.

    Yields:
        A row with its number as `row`.

    Raises:
        FileNotFoundError: it is no such folder.
        ValueError: a row is missing or is there twice, the job is not at its end, or a shard cannot be read.
    """
    folder = Path(folder)
    job = read_job(folder)
    if job is None:
        raise FileNotFoundError(f"{folder} holds no {JOB_FILE}, so it is not the output of such a job")
    finished = finished_rows(folder)
    if not partial:
        _check_whole(folder, finished, job.get("num_rows"))
    yield from _merge(_shards(folder))


def merge_shards(folder: str | os.PathLike[str], file: str | os.PathLike[str], *, partial: bool = False) -> int:
    """Write the rows of a job as one Parquet file in the order of their numbers; returns how many there are.

    Args:
        folder, partial: as in `read_rows`.
        file: what to write; not there yet.

    Raises:
        FileExistsError: the file is there, or would lie among the shards.
        FileNotFoundError, OSError, ValueError: as `read_rows` and `ShardWriter.flush`.
    """
    target, folder = Path(file), Path(folder)
    if target.exists() or target.parent.resolve() == folder.resolve():
        raise FileExistsError(f"{target} exists, or lies among the shards; name another file")
    rows = read_rows(folder, partial=partial)
    shards = _shards(folder)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{folder} holds no rows")
    schema = pyarrow.parquet.read_schema(shards[0])
    temporary = target.with_name(f".{target.name}-{secrets.token_hex(4)}.tmp")
    count, batch = 0, [first]
    try:
        with pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
            while batch:
                count += len(batch)
                writer.write_table(_to_table(batch, schema))
                batch = [row for _, row in zip(range(_ROWS_READ), rows, strict=False)]
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _shards(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.parquet") if not file.name.startswith("."))


def _read_numbers(shard: Path) -> np.ndarray[Any, Any]:
    """The column `row` of a shard: int64 (N,)."""
    try:
        column = pyarrow.parquet.read_table(shard, columns=[ROW]).column(ROW)
        return column.to_numpy().astype(np.int64)
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        raise ValueError(f"{shard} is no shard that can be read: {error}; delete it to do its rows again") from error


def _check_whole(folder: Path, finished: FinishedRows, num_rows: int | None) -> None:
    if num_rows is None:
        raise ValueError(
            f"{folder}: the job is not at its end ({len(finished):,} rows are there); start it again to go on, or pass "
            "partial=True"
        )
    missing = (row for row in range(num_rows) if row not in finished)
    if (first := next(missing, None)) is not None:
        raise ValueError(
            f"{folder}: row {first} and {sum(1 for _ in missing):,} more of {num_rows:,} are missing; start the job "
            "again to go on, or pass partial=True"
        )
    if len(finished) > num_rows:
        raise ValueError(f"{folder} holds {len(finished):,} rows, more than the {num_rows:,} of the job")


def _merge(shards: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The rows of sorted shards in order; a shard is opened when its first row is next."""
    starts = sorted((int(_read_numbers(shard)[0]), str(shard)) for shard in shards)
    heap: list[tuple[int, str, dict[str, Any], Iterator[dict[str, Any]]]] = []
    while heap or starts:
        while starts and (not heap or starts[0][0] <= heap[0][0]):
            _, shard = starts.pop(0)
            rows = _iter_shard(Path(shard))
            row = next(rows)
            heapq.heappush(heap, (row[ROW], shard, row, rows))
        _, shard, row, rows = heapq.heappop(heap)
        yield row
        if (row_after := next(rows, None)) is not None:
            heapq.heappush(heap, (row_after[ROW], shard, row_after, rows))


def _iter_shard(shard: Path) -> Iterator[dict[str, Any]]:
    with pyarrow.parquet.ParquetFile(shard) as file:
        for batch in file.iter_batches(batch_size=_ROWS_READ):
            yield from batch.to_pylist()


def _to_table(records: Sequence[Mapping[str, Any]], schema: pyarrow.Schema) -> pyarrow.Table:
    try:
        return pyarrow.Table.from_pylist(records, schema=schema)
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
        kinds = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise ValueError(
            f"row {records[0][ROW]} has a value that its column cannot hold: {error}; got {dict(records[0])!r:.400}, "
            f"needed are {kinds}"
        ) from error
