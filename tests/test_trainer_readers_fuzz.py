"""Every reader on rows that are damaged at random: it gives valid records, or says what is wrong as documented."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
from test_trainer_readers import ROWS

from trainer.formats import READERS, ReaderOptions, RowLeftOut
from trainer.readers import read_step_records
from trainer.records import StepRecord

hypothesis = pytest.importorskip("hypothesis", reason="the fuzz test needs hypothesis, of the extra 'dev'")
st = pytest.importorskip("hypothesis.strategies")

TEXTS = [
    "",
    " ",
    "a",
    "\0",
    "\ud800",
    "N/A",
    "+",
    "-",
    "0.5",
    "²",
    "9" * 5000,
    "Step 1: a ки",
    "ки",
    "P Step 1:",
    "nan",
]
NUMBERS = [0, 1, -1, 2, -100, 0.5, 1.0, 1e308, float("nan"), float("inf"), 10**400, -(10**20), True, False, None]

scalars = st.one_of(st.sampled_from(TEXTS), st.sampled_from(NUMBERS), st.integers(), st.floats(), st.text(max_size=5))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["text", "mc_value", "children", "role", "content", "steps", "problem", "rating"]),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)
options = st.builds(
    ReaderOptions,
    neutral=st.sampled_from([None, "correct", "incorrect", "ignored", "class"]),
    paths=st.sampled_from(["all", "chosen"]),
)
quick = hypothesis.settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
FORMATS = [*ROWS, "classes"]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container with every key of it, all the way down."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in [(value, key), *places(value[key])]]


@st.composite
def damaged(draw: Any, name: str) -> dict[str, Any]:
    """A good row of which some parts, at any depth, are other values, gone, or doubled."""
    row = copy.deepcopy(ROWS["plain" if name == "classes" else name])
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(places(row)))
        if isinstance(container, list) and key >= len(container):
            continue
        match draw(st.sampled_from(["replace", "replace", "replace", "delete", "double"])):
            case "replace":
                container[key] = draw(values)
            case "delete" if isinstance(container, list):
                del container[key]
            case "double" if isinstance(container, list):
                container.insert(key, container[key])
    return row


def read(name: str, row: dict[str, Any], given: ReaderOptions) -> None:
    """Read a row and check what comes back; what is raised must be documented."""
    fault: Exception
    try:
        records = READERS[name].read(row, given)
    except RowLeftOut as reason:
        fault = reason
    except (TypeError, ValueError) as error:
        fault = error
    else:
        check_records(name, records, given)
        return
    assert type(fault) in (RowLeftOut, TypeError, ValueError)
    if not isinstance(fault, RowLeftOut):
        # Rejected rows are counted by the words before the colon, so these are few and hold nothing of the row.
        words, colon, particulars = str(fault).partition(": ")
        assert colon == ": "
        assert particulars
        assert len(words) < 90


def check_records(name: str, records: list[StepRecord], given: ReaderOptions) -> None:
    assert records
    for record in records:
        assert isinstance(record, StepRecord)  # and so has checked itself
        assert record.classes == (name == "classes" or (given.neutral == "class" and READERS[name].has_neutral))


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_rows(name: str) -> None:
    @quick
    @hypothesis.given(damaged(name), options)
    def check(row: dict[str, Any], given: ReaderOptions) -> None:
        read(name, row, given)

    check()


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_anything(name: str) -> None:
    columns = READERS[name].columns

    @quick
    @hypothesis.given(st.fixed_dictionaries(dict.fromkeys(columns, values)), options)
    def check(row: dict[str, Any], given: ReaderOptions) -> None:
        read(name, row, given)

    check()


@pytest.mark.parametrize("name", FORMATS)
def test_lines_with_changed_bytes(name: str, tmp_path: Path) -> None:
    good = json.dumps(ROWS["plain" if name == "classes" else name], ensure_ascii=False).encode()
    path, rejected_file = tmp_path / "a.jsonl", tmp_path / "rejected.log"

    @hypothesis.settings(quick, max_examples=30)
    @hypothesis.given(st.integers(0, len(good) - 1), st.binary(max_size=3), st.integers(0, 5))
    def check(start: int, new: bytes, length: int) -> None:
        path.write_bytes(good[:start] + new + good[start + length :] + b"\n")
        kept = 0
        with contextlib.suppress(ValueError):  # no row is left
            _, report = read_step_records(path, format=name, on_bad_row="skip", rejected_file=rejected_file)
            kept = report.num_kept + report.left_out.total()
        # A line break may come into the line: each part of it is a row.
        lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
        assert kept + len(rejected_file.read_text(encoding="utf-8").splitlines()) in (len(lines), len(lines) - 1)

    check()
