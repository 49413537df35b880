"""Rows of local data files and of Hub datasets, each with its place, so that a bad one can be named."""

import csv
import glob
import gzip
import io
import json
import logging
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import datasets
import pyarrow

logger = logging.getLogger(__name__)

_COMPRESSED = (".gz", ".zst")
_TEXT_SUFFIXES = tuple(f"{name}{end}" for name in (".jsonl", ".json", ".csv") for end in ("", *_COMPRESSED))
SUFFIXES = (*_TEXT_SUFFIXES, ".parquet")
# Far above csv's own limit of 131,072 characters: a cell may hold a whole labelled tree.
_MOST_CSV_CHARACTERS = 1 << 26

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRow:
    """One row as it was read.

    Attributes:
        file: The file's path, or the Hub dataset and its split.
        number: The row's place, from 1: the line in JSONL and CSV (for a CSV row of several lines the
            last of them), else the row's number.
        value: The row, or the raw text if it could not be parsed.
        error: Why it could not be parsed, or None.
        is_text: True if every cell is text, so that lists and numbers are still JSON text (CSV).
    """

    file: str
    number: int
    value: Any
    error: ValueError | None = None
    is_text: bool = False

    @property
    def place(self) -> str:
        """`file:number`."""
        return f"{self.file}:{self.number}"


def list_data_files(path: Path) -> list[Path]:
    """The data files that a path stands for: itself, or those directly in the folder, sorted by name.

    Raises:
        FileNotFoundError: If the path does not exist or the folder holds no data file.
        ValueError: If it is a file of another type.
    """
    known = ", ".join(SUFFIXES)
    if path.is_dir():
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
        files = [entry for entry in entries if entry.is_file() and entry.name.endswith(SUFFIXES)]
        if not files:
            raise FileNotFoundError(f"the folder {path} holds no data file; put {known} files directly in it")
        others = [entry.name for entry in entries if entry not in files]
        if others:
            logger.info("%s: not read, since not data files: %s", path, ", ".join(others))
        return files
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; pass a {known} file or a folder of them")
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path} is not a data file: its name must end in one of {known}; convert or rename it")
    return [path]


def is_hub_id(path: str) -> bool:
    """Whether a path is nothing local and has the form of a Hub dataset's name, `name` or `owner/name`."""
    return not Path(path).exists() and not path.endswith(SUFFIXES) and _HUB_ID.fullmatch(path) is not None


def iter_file_rows(file: Path) -> Iterator[SourceRow]:
    """Yield the rows of one data file; a line that cannot be parsed is a row with an `error`.

    Raises:
        ValueError: If the file as a whole cannot be read as what its name says.
    """
    name = file.name.removesuffix(".gz").removesuffix(".zst")
    try:
        if name.endswith(".jsonl"):
            yield from _iter_jsonl(file)
        elif name.endswith(".csv"):
            yield from _iter_csv(file)
        elif name.endswith(".json"):
            for number, value in enumerate(_load_json_list(file), start=1):
                yield SourceRow(file=str(file), number=number, value=value)
        else:
            yield from _iter_parquet(file)
    except (EOFError, zlib.error, OSError, pyarrow.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the system, and no fault of what the file holds
        raise ValueError(f"{file} cannot be read as what its name says: {error}; write or fetch it again") from error


def _iter_parquet(file: Path) -> Iterator[SourceRow]:
    # Streaming reads the file where it is, without a copy in the datasets cache; data_files is a glob pattern.
    rows = datasets.load_dataset("parquet", data_files=glob.escape(str(file)), split="train", streaming=True)
    for number, value in enumerate(iter_stream(rows), start=1):
        yield SourceRow(file=str(file), number=number, value=value)


def _open_bytes(file: Path) -> BinaryIO:
    """The file's content, decompressed if its name says that it is compressed."""
    if file.suffix == ".gz":
        return cast(BinaryIO, gzip.open(file))
    if file.suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd")))
    return file.open("rb")


def iter_stream(rows: datasets.IterableDataset) -> Iterator[dict[str, Any]]:
    """Yield all rows of a streamed dataset.

    Iterating it in a worker process of a DataLoader would leave out what it takes for the part of other workers.
    """
    for batch in rows.iter(batch_size=100):
        names = list(batch)
        yield from (dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True))


def json_fault(error: Exception) -> str:
    """What is wrong with one line or cell of JSON text, with its column, in words for an error message."""
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def iter_hub_rows(dataset_id: str, split: str) -> Iterator[SourceRow]:
    """Yield the rows of one split of a Hub dataset, through the cache of `datasets`.

    Raises whatever `datasets.load_dataset` raises, for example for a dataset or split that is not there.
    """
    rows = datasets.load_dataset(dataset_id, split=split)
    for number, value in enumerate(rows, start=1):
        yield SourceRow(file=f"{dataset_id}[{split}]", number=number, value=value)


def _iter_jsonl(file: Path) -> Iterator[SourceRow]:
    with _open_bytes(file) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            value: Any = line.decode("utf-8", errors="backslashreplace")
            fault = None
            try:
                value = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                fault = ValueError(f"line is not UTF-8: {error.reason} at byte {error.start}; convert the file")
            except (ValueError, RecursionError) as error:
                fault = ValueError(f"line is not JSON: {json_fault(error)}; write one object a line")
            yield SourceRow(file=str(file), number=number, value=value, error=fault)


def _iter_csv(file: Path) -> Iterator[SourceRow]:
    # The limit is the process's, and only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), _MOST_CSV_CHARACTERS))
    with io.TextIOWrapper(_open_bytes(file), encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            for value in reader:
                fault = None
                if None in value or None in value.values():
                    fault = ValueError(
                        "number of fields is not the header's: got "
                        f"{'more' if None in value else 'fewer'} than {len(reader.fieldnames or ())}; "
                        "quote fields that hold commas or line breaks"
                    )
                yield SourceRow(file=str(file), number=reader.line_num, value=value, error=fault, is_text=True)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8: {error.reason}; convert the file") from error
        except csv.Error as error:
            raise ValueError(
                f"{file}:{reader.reader.line_num}: line is not CSV: {error}; correct it, or write the data as .jsonl"
            ) from error


def _load_json_list(file: Path) -> list[Any]:
    try:
        with _open_bytes(file) as stream:
            content = json.loads(stream.read().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is not JSON in UTF-8: {error}; a file of one object a line must be named .jsonl"
        ) from error
    if not isinstance(content, list):
        raise ValueError(
            f"{file} must hold a list of objects: got {type(content).__name__}; "
            "put the rows in a list, or write them one a line in a .jsonl file"
        )
    return content
