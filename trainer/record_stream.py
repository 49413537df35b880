"""Reading labelled solutions as they are needed, for data larger than memory or disk.

    dataset = load_step_dataset("folder_of_jsonl", streaming=True)    # a datasets.IterableDataset

Files of about equal size are shards, which processes of a training share out among each other; files of other
sizes come together in shards of about equal size.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from .conversation_data import CONVERSATION
from .data_files import SourceRow, is_hub_id, iter_file_rows, iter_stream, list_data_files
from .format_parts import Neutral, Paths, ReaderOptions
from .formats import READERS
from .preparation import RECORD_NUMBER
from .read_report import ReadReport
from .readers import STEP_FEATURES, OnBadRow, check_neutral, check_options, choose_reader, iter_records

logger = logging.getLogger(__name__)

SOURCE = "source"
# How far the largest shard may be above the smallest.
_EVEN = 1.1
_MOST_SHOWN = 5
_ROWS_A_FILE = 10**10

FEATURES = datasets.Features(
    {
        **STEP_FEATURES,
        CONVERSATION: datasets.Value("string"),
        SOURCE: datasets.Value("string"),
        RECORD_NUMBER: datasets.Value("int64"),
    }
)


@dataclass(frozen=True, kw_only=True)
class SourcePart:
    """A file, or a shard of a Hub dataset.

    Args:
        source: what it belongs to, as it was given.
        format: the reader's name.
        number: its place among all parts, from 0.
        path: the file; None for a part of a Hub dataset.
        split, shard, num_shards: of a Hub dataset.
    """

    source: str
    format: str
    number: int
    path: str | None = None
    split: str = ""
    shard: int = 0
    num_shards: int = 1

    def rows(self) -> Iterator[SourceRow]:
        """Its rows, with their places."""
        if self.path is not None:
            yield from iter_file_rows(Path(self.path))
            return
        rows = _hub_stream(self.source, self.split)
        where = f"{self.source}[{self.split}]"
        if self.num_shards > 1:
            rows = rows.shard(self.num_shards, self.shard)
            where = f"{where} shard {self.shard} of {self.num_shards}"
        for number, value in enumerate(iter_stream(rows), start=1):
            yield SourceRow(file=where, number=number, value=value)


def stream_step_dataset(
    sources: Sequence[str | os.PathLike[str]],
    *,
    format: str = "auto",
    on_bad_row: OnBadRow = "error",
    split: str | None = None,
    neutral: Neutral | None = None,
    paths: Paths = "all",
) -> datasets.IterableDataset:
    """Labelled solutions of one or several sources, read each time that the dataset is iterated.

    Args:
        sources, format, on_bad_row, split, neutral, paths: as in `trainer.readers.read_step_records`; `split` is for
            the Hub datasets among them. The format is found by the first rows of each source. What was skipped is
            counted and logged when a file has been read to its end. Labels of two codes are found among the rows that
            one process reads, see `trainer.formats_plain.plain_code`.

    Returns:
        The columns of `trainer.readers.load_step_dataset`, `source` (file and number of the row) and `record` (int64:
        the number of the row, plus 10^10 for each file before its own). For formats that repeat a solution in many
        rows it is one shard, and what was seen is kept in memory.

    Raises:
        FileNotFoundError, TypeError, ValueError: as `read_step_records`, for bad rows when they are reached.
    """
    check_options(format, on_bad_row)
    options = ReaderOptions(neutral=neutral, paths=paths)
    parts: list[SourcePart] = []
    for source in [os.fspath(path) for path in sources]:
        is_hub = is_hub_id(source)
        if is_hub and split is None:
            raise ValueError(f"{source} is not a local file or folder; to stream it as a Hub dataset pass split= too")
        if not is_hub and split is not None and len(sources) == 1:
            raise ValueError(f"split={split!r} is for Hub datasets, and {source} is local; leave split out")
        first = SourcePart(source=source, format=format, number=len(parts), split=split or "")
        files = [] if is_hub else [str(file) for file in list_data_files(Path(source))]
        found = _read_format(first, files, format, on_bad_row)
        count = _hub_stream(source, first.split).num_shards if is_hub else len(files)
        check_neutral(READERS[found], options, source)
        for index in range(count):
            place: dict[str, Any] = {"shard": index, "num_shards": count} if is_hub else {"path": files[index]}
            parts.append(
                SourcePart(source=source, format=found, number=len(parts), split=split or "" if is_hub else "", **place)
            )
    return datasets.IterableDataset.from_generator(
        _iter_shards,
        features=FEATURES,
        gen_kwargs={"shards": make_shards(parts), "on_bad_row": on_bad_row, "options": options},
    )


def make_shards(parts: Sequence[SourcePart]) -> list[tuple[SourcePart, ...]]:
    """As many shards as can be of about equal size: of files by their bytes; those of a Hub dataset as they are.

    Sizes stay within a tenth of each other. Sources whose records are compared with earlier ones are one shard.
    """
    if any(READERS[part.format].drop_duplicates for part in parts):
        return [tuple(parts)]
    if all(part.path is None for part in parts) and len({part.source for part in parts}) == 1:
        return [(part,) for part in parts]
    if any(part.path is None for part in parts):
        return [tuple(parts)]
    sizes = {part: Path(part.path or "").stat().st_size for part in parts}
    largest_first = sorted(parts, key=lambda part: -sizes[part])
    for count in range(len(parts), 1, -1):
        shards: list[list[SourcePart]] = [[] for _ in range(count)]
        totals = [0] * count
        for part in largest_first:
            smallest = totals.index(min(totals))
            shards[smallest].append(part)
            totals[smallest] += sizes[part]
        if max(totals) <= _EVEN * min(totals):
            return [tuple(sorted(shard, key=lambda part: part.number)) for shard in shards]
    return [tuple(parts)]


def _read_format(first: SourcePart, files: Sequence[str], format: str, on_bad_row: OnBadRow) -> str:
    """The name of the format, from the first rows."""
    if format != "auto":
        return format
    if files:
        rows = itertools.chain.from_iterable(iter_file_rows(Path(file)) for file in files)
    else:
        rows = itertools.chain.from_iterable([first.rows()])
    reader, _ = choose_reader(rows, format, on_bad_row, first.source)
    logger.info("%s: streamed as format %r, found by its columns", first.source, reader.name)
    return reader.name


def _hub_stream(dataset_id: str, split: str) -> datasets.IterableDataset:
    return datasets.load_dataset(dataset_id, split=split, streaming=True)


def _iter_shards(
    shards: list[tuple[SourcePart, ...]], on_bad_row: str, options: ReaderOptions
) -> Iterator[dict[str, Any]]:
    for shard in shards:
        # Duplicates are found among all parts of a source.
        for source, parts in itertools.groupby(shard, key=lambda part: part.source):
            yield from _iter_source(source, list(parts), on_bad_row, options)


def _iter_source(
    source: str, parts: list[SourcePart], on_bad_row: str, options: ReaderOptions
) -> Iterator[dict[str, Any]]:
    reader = READERS[parts[0].format]
    report = ReadReport(source=source, format=reader.name)
    current = parts[0]

    def rows() -> Iterator[SourceRow]:
        nonlocal current
        for current in parts:
            yield from current.rows()

    def reject(row: SourceRow, error: Exception) -> None:
        if report.rejected.total() <= _MOST_SHOWN:
            logger.warning("%s is left out: %s", row.place, error)

    for record in iter_records(rows(), reader, report, None if on_bad_row == "error" else reject, options):
        file, number = report.record_sources.pop()
        yield {
            "problem": record.problem,
            "steps": list(record.steps),
            "labels": list(record.labels),
            "problem_group": record.problem_group,
            CONVERSATION: record.conversation,
            SOURCE: f"{file}:{number}",
            RECORD_NUMBER: current.number * _ROWS_A_FILE + number,
        }
    lost = report.rejected or report.num_contradictory
    logger.log(logging.WARNING if lost else logging.DEBUG, "%s", report.summary())
