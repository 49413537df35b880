"""Reading labelled solutions from files and the Hub: nothing is lost without a word.

    dataset = load_step_dataset("steps.jsonl")
    records, report = read_step_records("folder_of_prmbench", on_bad_row="skip", rejected_file="bad.jsonl")

The formats are in `trainer.formats`, the files in `trainer.data_files`.
"""

import contextlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TextIO, overload

from datasets import Dataset, Features, IterableDataset, List, Value

from .conversation_data import CONVERSATION
from .data_files import (
    SUFFIXES,
    SourceRow,
    is_hub_id,
    iter_file_rows,
    iter_hub_rows,
    json_fault,
    list_data_files,
)
from .format_parts import DEFAULT_OPTIONS, Neutral, Paths, Reader, ReaderOptions, RowLeftOut
from .formats import READERS
from .read_report import ReadReport
from .records import StepRecord

logger = logging.getLogger(__name__)

OnBadRow = Literal["error", "skip"]
RejectedFile = str | os.PathLike[str] | TextIO

STEP_FEATURES = Features(
    {
        "problem": Value("string"),
        "steps": List(Value("string")),
        "labels": List(Value("float32")),
        "problem_group": Value("string"),
    }
)
"""Types of a step dataset's columns; explicit, so that no label column is ever inferred or re-cast."""


@overload
def load_step_dataset(
    path: str | os.PathLike[str],
    *,
    format: str = ...,
    on_bad_row: OnBadRow = ...,
    rejected_file: RejectedFile | None = ...,
    split: str | None = ...,
    neutral: Neutral | None = ...,
    paths: Paths = ...,
    streaming: Literal[False] = ...,
) -> Dataset: ...


@overload
def load_step_dataset(
    path: str | os.PathLike[str],
    *,
    format: str = ...,
    on_bad_row: OnBadRow = ...,
    rejected_file: RejectedFile | None = ...,
    split: str | None = ...,
    neutral: Neutral | None = ...,
    paths: Paths = ...,
    streaming: Literal[True],
) -> IterableDataset: ...


def load_step_dataset(
    path: str | os.PathLike[str],
    *,
    format: str = "auto",
    on_bad_row: OnBadRow = "error",
    rejected_file: RejectedFile | None = None,
    split: str | None = None,
    neutral: Neutral | None = None,
    paths: Paths = "all",
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Read labelled solutions as a dataset and log what was kept, as a warning if anything was not.

    Takes and raises what `read_step_records` does. With `streaming` nothing but the first rows is read now, and the
    rest as it is needed, see `trainer.record_stream`; there is no `rejected_file` then.

    Returns:
        A dataset with the columns `problem` (string), `steps` (list of string), `labels` (list of
        float32: 1 correct, 0 incorrect, between them soft, -100 no label; class indices with the format
        `classes`) and `problem_group` (string or null), and where there are conversations of agents `conversation`
        (string or null); one row a record.
    """
    if streaming:
        from .record_stream import stream_step_dataset  # which builds on this module

        if rejected_file is not None:
            raise ValueError("rejected_file is not written while streaming, bad rows are logged; leave it out")
        return stream_step_dataset(
            [path], format=format, on_bad_row=on_bad_row, split=split, neutral=neutral, paths=paths
        )
    records, report = read_step_records(
        path,
        format=format,
        on_bad_row=on_bad_row,
        rejected_file=rejected_file,
        split=split,
        neutral=neutral,
        paths=paths,
    )
    if format == "auto":
        logger.info("%s: read as format %r, found by its columns", report.source, report.format)
    logger.log(logging.WARNING if report.rejected or report.num_contradictory else logging.INFO, report.summary())
    features = Features(STEP_FEATURES)
    columns: dict[str, list[Any]] = {
        "problem": [record.problem for record in records],
        "steps": [list(record.steps) for record in records],
        "labels": [list(record.labels) for record in records],
        "problem_group": [record.problem_group for record in records],
    }
    if any(record.conversation is not None for record in records):
        columns[CONVERSATION] = [record.conversation for record in records]
        features[CONVERSATION] = Value("string")
    return Dataset.from_dict(columns, features=features)


def read_step_records(
    path: str | os.PathLike[str],
    *,
    format: str = "auto",
    on_bad_row: OnBadRow = "error",
    rejected_file: RejectedFile | None = None,
    split: str | None = None,
    neutral: Neutral | None = None,
    paths: Paths = "all",
) -> tuple[list[StepRecord], ReadReport]:
    """Read labelled solutions from local files or the Hub.

    Args:
        path: A .jsonl, .json, .csv or .parquet file, the first three also with .gz or .zst after it, a folder with
            such files directly in it (read in the order of their names), or else a Hub dataset's name. A .json file
            holds one list of rows; in a .csv file columns that are no strings hold JSON text.
        format: A name in `READERS`, or "auto" to find it by the columns of the first readable row.
        on_bad_row: "error" stops at the first bad row; "skip" leaves bad rows out and counts them.
        rejected_file: With "skip", a JSONL file to (over)write with a line for each bad row:
            `{"file", "number", "reason", "row"}`, where reason is the whole message; or a text file that is open.
        split: The split to read of a Hub dataset; for nothing else.
        neutral: What a neutral rating counts as, in formats that have one: "correct", "incorrect", "ignored", or
            "class", with which labels are class indices, 0 right, 1 neutral and 2 wrong. Without it PRM800K's count
            as correct and those of the plain format are refused.
        paths: Of PRM800K, all solutions or the "chosen" path alone.

    Returns:
        The records in the order of the rows, and a report.

    Raises:
        FileNotFoundError: If there is nothing at a local path.
        TypeError, ValueError: If a row is bad and `on_bad_row` is "error", naming file, number and reason;
            ValueError too if an argument does not fit, a file cannot be read, the format cannot be told,
            or no row is kept.
    """
    check_options(format, on_bad_row)
    options = ReaderOptions(neutral=neutral, paths=paths)
    rows = _open_rows(os.fspath(path), split)
    with _open_rejected_file(rejected_file, on_bad_row, Path(path)) as rejected:
        reader, rows = choose_reader(rows, format, on_bad_row, os.fspath(path))
        report = ReadReport(source=os.fspath(path), format=reader.name)

        def reject(row: SourceRow, error: Exception) -> None:
            if rejected is not None:
                entry = {"file": row.file, "number": row.number, "reason": str(error), "row": row.value}
                rejected.write(json.dumps(entry, default=str) + "\n")

        records = list(iter_records(rows, reader, report, None if on_bad_row == "error" else reject, options))
    if neutral is not None and report.label_codes.keys() == {"0/1"}:
        raise ValueError(
            f"{report.label_codes['0/1']}: labels hold a 0, and no row of {report.source} a -1: with "
            f"neutral={neutral!r} every incorrect step of a 0/1 file would be read as neutral; leave neutral= out, or "
            "write booleans where other sources need it"
        )
    if not report.num_kept:
        raise ValueError(f"no row is left, {report.summary()}; check the format and the data")
    return records, report


def check_options(format: str, on_bad_row: str) -> None:
    """Check the names of a format and of what happens to bad rows."""
    if format != "auto" and format not in READERS:
        raise ValueError(f"no format is named {format!r}; pass 'auto' or one of {', '.join(READERS)}")
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row must be 'error' or 'skip', got {on_bad_row!r}")


def check_neutral(reader: Reader, options: ReaderOptions, source: str) -> None:
    """Check that labels which are to be class indices can be."""
    if options.neutral == "class" and not reader.has_neutral:
        raise ValueError(
            f"{source}: neutral='class' makes labels class indices, and the format {reader.name!r} has no "
            "neutral label; leave it out, or convert the data to class indices"
        )


def _open_rows(path: str, split: str | None) -> Iterator[SourceRow]:
    if is_hub_id(path):
        if split is None:
            raise ValueError(
                f"{path} is not a local file or folder; to read it as a Hub dataset pass split= too, "
                "such as split='train'"
            )
        return iter_hub_rows(path, split)
    files = list_data_files(Path(path))
    if split is not None:
        raise ValueError(f"split={split!r} is for Hub datasets, and {path} is local; leave split out")
    return itertools.chain.from_iterable(map(iter_file_rows, files))


def check_rejected_file(target: Path, source: Path) -> None:
    """Check that a file to write is none of the data files that are read.

    Raises:
        ValueError: If it is.
    """
    is_source = target.resolve() == source.resolve()
    if is_source or (target.resolve().parent == source.resolve() and target.name.endswith(SUFFIXES)):
        raise ValueError(f"rejected_file {target} would be among the data that is read; put it elsewhere")


@contextlib.contextmanager
def _open_rejected_file(given: RejectedFile | None, on_bad_row: OnBadRow, source: Path) -> Iterator[TextIO | None]:
    if given is not None and on_bad_row != "skip":
        raise ValueError("rejected_file is written with on_bad_row='skip' only; pass that, or leave it out")
    if given is None or not isinstance(given, (str, os.PathLike)):
        yield given
        return
    target = Path(given)
    check_rejected_file(target, source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", encoding="utf-8") as file:
        yield file


def choose_reader(
    rows: Iterator[SourceRow], format: str, on_bad_row: OnBadRow, source: str
) -> tuple[Reader, Iterator[SourceRow]]:
    """The reader for these rows of `source`, and the rows again with those that were looked at."""
    if format != "auto":
        return READERS[format], rows
    seen: list[SourceRow] = []
    for row in rows:
        seen.append(row)
        try:
            columns = set(_to_object(row))
        except (TypeError, ValueError) as error:
            if on_bad_row == "error":
                raise _at(row, error) from error
            continue
        return _find_reader(columns, row.place), itertools.chain(seen, rows)
    if not seen:
        raise ValueError(f"{source} holds no rows; check the path")
    raise ValueError(
        f"{source}: the format cannot be told since none of {len(seen)} rows is an object; the first is {seen[0].place}"
    )


def _find_reader(columns: set[str], place: str) -> Reader:
    readers = [reader for reader in READERS.values() if reader.found_by_columns]
    found = [reader for reader in readers if columns.issuperset(reader.columns)]
    if len(found) == 1:
        return found[0]
    got = ", ".join(sorted(map(str, columns)))
    if found:
        names = " or ".join(repr(reader.name) for reader in found)
        raise ValueError(f"{place}: the columns fit more than one format ({got}); pass format={names}")
    needed = "; ".join(f"{reader.name} needs {', '.join(reader.columns)}" for reader in readers)
    raise ValueError(
        f"{place}: no format has these columns: got {got}; {needed}; rename the columns, or pass format= "
        "if only this row lacks some"
    )


def iter_records(
    rows: Iterator[SourceRow],
    reader: Reader,
    report: ReadReport,
    reject: Callable[[SourceRow, Exception], None] | None,
    options: ReaderOptions = DEFAULT_OPTIONS,
) -> Iterator[StepRecord]:
    """Yield records and keep the report up to date; `reject` is called with bad rows, or they raise if it is None.

    Labels of two codes raise either way, since what they mean in rows before is in doubt then.
    """
    check_neutral(reader, options, report.source)
    seen: dict[tuple[str, tuple[str, ...]], set[tuple[float, ...]]] = {}
    for row in rows:
        report.num_rows += 1
        try:
            value = _to_reader_row(row, reader)
            code = None if reader.label_code is None else reader.label_code(value)
            if code is not None and report.label_codes.setdefault(code, row.place) == row.place:
                _check_one_code(report, options)
            records = reader.read(value, options)
        except MixedLabelsError:
            raise
        except RowLeftOut as reason:
            report.left_out[str(reason)] += 1
            continue
        except (TypeError, ValueError) as error:
            if reject is None:
                raise _at(row, error) from error
            report.rejected[str(error).partition(": ")[0]] += 1
            reject(row, error)
            continue
        report.num_kept += 1
        for record in records:
            if reader.drop_duplicates:
                earlier = seen.setdefault((record.problem, record.steps), set())
                if record.labels in earlier:
                    report.num_duplicates += 1
                    continue
                report.num_contradictory += bool(earlier)
                earlier.add(record.labels)
            report.num_records += 1
            report.record_sources.append((row.file, row.number))
            yield record


class MixedLabelsError(ValueError):
    """The rows of a source have labels of two codes, in which a 0 means different things."""


def _check_one_code(report: ReadReport, options: ReaderOptions) -> None:
    if options.neutral is None and len(report.label_codes) > 1:
        (first, where), (second, place) = report.label_codes.items()
        raise MixedLabelsError(
            f"{place}: labels are of two codes: this row is in {second} and {where} in {first}, and a 0 is incorrect "
            "in 0/1 and neutral beside -1; pass neutral= (--neutral) to say what a 0 counts as in +1/-1, or write all "
            "rows in one code"
        )


def _at(row: SourceRow, error: TypeError | ValueError) -> TypeError | ValueError:
    """The same fault, with the row's place before it."""
    kind = TypeError if isinstance(error, TypeError) else ValueError
    return kind(f"{row.place}: {error}")


def _to_object(row: SourceRow) -> dict[str, Any]:
    if row.error is not None:
        raise row.error
    if not isinstance(row.value, dict):
        raise TypeError(f"row must be an object: got {type(row.value).__name__}; write {{...}} for each row")
    return row.value


def _to_reader_row(row: SourceRow, reader: Reader) -> dict[str, Any]:
    """The row as the reader takes it, with all its columns, JSON text decoded."""
    value = _to_object(row)
    missing = [name for name in reader.columns if name not in value]
    if missing:
        raise ValueError(
            f"row lacks columns of the format {reader.name!r}: {', '.join(missing)}; "
            "add them, or pass the right format="
        )
    if not row.is_text:
        return value
    return {name: _decode_json(name, cell) if name in reader.json_columns else cell for name, cell in value.items()}


def _decode_json(name: str, cell: str) -> Any:
    if not cell.strip():
        return None
    try:
        return json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f'{name} must be JSON text in a CSV file: {json_fault(error)}; write a list as [1, 0] or ["a", "b"]'
        ) from error
