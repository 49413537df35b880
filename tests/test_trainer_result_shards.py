"""Shards of a long job: nothing lost or doubled after a real kill, whoever goes on; and what is refused."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import pytest

from trainer import result_shards
from trainer.result_shards import ShardWriter, finished_rows, merge_shards, read_rows
from trainer.scoring_input import storable

FEATURES = datasets.Features(
    {
        "text": datasets.Value("string"),
        "numbers": datasets.List(datasets.Value("float32")),
        "n": datasets.Value("int64"),
    }
)
SETTINGS = {"model": "a", "options": {"k": 4, "rate": 1e-05}}
NUM_ROWS = 20
# A clean process that has imported what the children need, and forks them.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["trainer.result_shards"])


def record(row: int) -> dict[str, Any]:
    """Every third row has nothing but its number, so that some shards have columns of nulls only."""
    return (
        {"text": None, "numbers": None, "n": row} if row % 3 == 0 else {"text": f"r{row}", "numbers": [0.5], "n": row}
    )


def open_writer(folder: Path, **options: Any) -> ShardWriter:
    return ShardWriter(folder, **{"settings": SETTINGS, "features": FEATURES, "rows_per_shard": 3, **options})


def write(folder: Path, *, num_rows: int = NUM_ROWS, finish: bool = True, **options: Any) -> list[int]:
    """Write what is due; returns which rows that was."""
    rows = []
    with open_writer(folder, **options) as writer:
        for row in filter(writer.is_due, range(num_rows)):
            writer.add(row, record(row))
            rows.append(row)
        if finish:
            writer.finish(num_rows=num_rows)
    return rows


def check_whole(folder: Path, num_rows: int = NUM_ROWS) -> None:
    assert list(read_rows(folder)) == [{"row": row, **record(row)} for row in range(num_rows)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def run(target: Callable[..., None], *arguments: Any) -> int | None:
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    process.join(600)
    return process.exitcode


def test_processes_share_the_rows_by_number_and_another_number_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    assert write(folder, process_index=1, num_processes=3, num_rows=12) == [1, 4, 7, 10]
    assert write(folder, process_index=0, num_processes=3, num_rows=9, finish=False) == [0, 3, 6]
    assert sorted(finished_rows(folder)) == [0, 1, 3, 4, 6, 7, 10]
    assert write(folder) == [2, 5, 8, 9, *range(11, 20)]
    check_whole(folder)
    assert write(folder) == []
    shards = list(folder.glob("*.parquet"))
    assert {str(pyarrow.parquet.read_schema(shard).remove_metadata()) for shard in shards} == {
        "row: int64\ntext: string\nnumbers: list<element: float>\n  child 0, element: float\nn: int64"
    }


def test_datasets_read_the_shards_with_their_types(tmp_path: Path) -> None:
    write(tmp_path / "out")
    loaded = datasets.load_dataset(
        "parquet", data_files=f"{tmp_path}/out/*.parquet", split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.features == {"row": datasets.Value("int64"), **FEATURES}
    assert list(loaded.sort("row")) == [{"row": row, **record(row)} for row in range(NUM_ROWS)]


def _write_until(folder: Path, point: str, index: int, num_processes: int) -> None:
    """Write, and be killed at the second shard, or with two rows added since the first."""
    count = 0
    own_write, own_replace = pyarrow.parquet.write_table, os.replace

    def die_at(name: str) -> None:
        if name == point and count == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    def write_table(table: Any, file: Any) -> None:
        nonlocal count
        count += 1
        own_write(table, file)
        if point == "half a shard" and count == 2:
            file.truncate(file.tell() // 2)
            file.flush()
        die_at("half a shard")
        die_at("before its name")

    def replace(source: Any, target: Any) -> None:
        own_replace(source, target)
        if str(target).endswith(".parquet"):
            die_at("after its name")

    pyarrow.parquet.write_table, result_shards.os.replace = write_table, replace  # type: ignore[assignment]
    with open_writer(folder, process_index=index, num_processes=num_processes) as writer:
        for row in filter(writer.is_due, range(NUM_ROWS)):
            writer.add(row, record(row))
            if row == 4 and point == "between shards":
                os.kill(os.getpid(), signal.SIGKILL)


# By hand: with shards of three rows, process 0 of 2 writes 0 2 4, then 6 8 10; the second is there only if it has its
# name. Alone it writes 0 1 2, then 3 4 5.
@pytest.mark.parametrize(
    ("point", "num_processes", "left"),
    [
        ("half a shard", 1, [0, 1, 2]),
        ("before its name", 2, [0, 2, 4]),
        ("after its name", 2, [0, 2, 4, 6, 8, 10]),
        ("between shards", 1, [0, 1, 2]),
    ],
)
def test_a_killed_process_loses_and_doubles_nothing(
    point: str, num_processes: int, left: list[int], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    assert run(_write_until, folder, point, 0, num_processes) == -signal.SIGKILL
    assert list(finished_rows(folder)) == left
    temporary = list(folder.glob(".*.tmp"))
    assert bool(temporary) == (point in ("half a shard", "before its name")), "it is killed where it should be"
    with pytest.raises(ValueError, match=f"not at its end \\({len(left)} rows are there\\)"):
        list(read_rows(folder))
    assert write(folder) == [row for row in range(NUM_ROWS) if row not in left]
    check_whole(folder)
    assert not list(folder.glob(".*.tmp"))


def test_a_run_with_fewer_processes_takes_what_a_killed_one_left_lying(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert run(_write_until, folder, "before its name", 1, 2) == -signal.SIGKILL
    assert (folder / ".process-00001.tmp").exists()
    assert write(folder) == [row for row in range(NUM_ROWS) if row not in (1, 3, 5)]
    check_whole(folder)
    assert [file.name for file in folder.glob(".*")] == [".process-00000.lock"]


def _write_with_little_room(folder: Path) -> None:
    with open_writer(folder) as writer:
        writer.add(0, record(0))
        writer.flush()
        # More than this the system lets no file have, as if the disk were full.
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        noise = "".join(map(chr, range(0x4E00, 0x8E00)))
        try:
            for row in range(1, 4):
                writer.add(row, {**record(row), "text": noise})
        except OSError as error:
            (folder.parent / "said").write_text(str(error), encoding="utf-8")
            raise SystemExit(3) from error


def test_a_full_disk_leaves_what_was_finished(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert run(_write_with_little_room, folder) == 3
    said = (tmp_path / "said").read_text(encoding="utf-8")
    assert "cannot be written: " in said
    assert "File too large" in said
    assert "the 1 rows that were written before are whole; make room and start again with the same options" in said
    assert list(finished_rows(folder)) == [0]
    assert not list(folder.glob(".*.tmp"))
    assert write(folder) == list(range(1, NUM_ROWS))
    check_whole(folder)


def test_what_was_added_is_written_when_the_job_breaks_off(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="of the job"), open_writer(tmp_path / "out") as writer:  # noqa: PT012
        writer.add(5, record(5))
        raise RuntimeError("of the job")
    assert list(read_rows(tmp_path / "out", partial=True)) == [{"row": 5, **record(5)}]


def test_a_shard_is_written_when_its_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(result_shards.time, "monotonic", lambda: now)
    with open_writer(tmp_path / "out", rows_per_shard=100, seconds_per_shard=60) as writer:
        for row, now in enumerate((110.0, 159.0, 160.0, 219.0)):  # noqa: B007
            writer.add(row, record(row))
        assert list(finished_rows(tmp_path / "out")) == [0, 1, 2]
        assert writer.num_written == 3
        assert 2 in writer.finished
        assert 3 not in writer.finished


def test_rows_come_in_order_from_shards_that_overlap(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with open_writer(folder, rows_per_shard=4) as writer:
        for row in (7, 0, 5, 2, 1, 6, 9, 3, 4, 8):
            writer.add(row, record(row))
        writer.finish(num_rows=10)
    assert sorted(pyarrow.parquet.read_table(shard)["row"].to_pylist() for shard in folder.glob("*.parquet")) == [
        [0, 2, 5, 7],
        [1, 3, 6, 9],
        [4, 8],
    ]
    check_whole(folder, 10)
    assert merge_shards(folder, tmp_path / "whole.parquet") == 10
    assert pyarrow.parquet.read_table(tmp_path / "whole.parquet")["row"].to_pylist() == list(range(10))
    assert datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(tmp_path / "whole.parquet")) == {
        "row": datasets.Value("int64"),
        **FEATURES,
    }
    before = contents(tmp_path)
    for file in (tmp_path / "whole.parquet", folder / "new.parquet"):
        with pytest.raises(FileExistsError, match="name another file"):
            merge_shards(folder, file)
    assert contents(tmp_path) == before


def test_missing_doubled_and_damaged_rows_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write(folder)
    shards = sorted(folder.glob("*.parquet"))
    away = shards[2].rename(tmp_path / "away")
    with pytest.raises(ValueError, match="row 6 and 2 more of 20 are missing"):
        list(read_rows(folder))
    assert [row["row"] for row in read_rows(folder, partial=True)] == [*range(6), *range(9, 20)]
    away.rename(shards[2])
    double = shutil.copy(shards[0], folder / "rows-copy.parquet")
    with pytest.raises(ValueError, match=f"row 0 lies in {shards[0].name} and rows-copy.parquet; delete one"):
        write(folder)
    Path(double).unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"{shards[1].name} is no shard that can be read: .*delete it to do its rows"):
        finished_rows(folder)
    shards[1].unlink()
    assert write(folder) == [3, 4, 5]
    check_whole(folder)


def test_more_rows_than_the_job_has_are_noticed(tmp_path: Path) -> None:
    write(tmp_path / "out")
    with open_writer(tmp_path / "out") as writer:
        writer.finish(num_rows=19)
    with pytest.raises(ValueError, match="holds 20 rows, more than the 19 of the job"):
        list(read_rows(tmp_path / "out"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {**SETTINGS, "model": "b"}}, "was started with model='a', and now it is model='b'"),
        ({"settings": {"model": "a"}}, "options=.*, and now it is no options"),
        ({"settings": {**SETTINGS, "seed": None}}, "was started with no seed, and now it is seed=None"),
        ({"features": datasets.Features({**FEATURES, "n": datasets.Value("string")})}, "has the column n='int64'"),
        ({"features": datasets.Features({"n": datasets.Value("int64")})}, "has the column text='string'.* no text"),
    ],
)
def test_another_job_is_refused_without_harm(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "out", num_rows=4)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_writer(tmp_path / "out", **change)
    assert contents(tmp_path) == before


def test_settings_come_back_as_they_were(tmp_path: Path) -> None:
    settings = {"a": (1, 2), "b": "no", "c": 1e-05, "d": None, "e": "1e-05", "f": {"g": True}, "h": "ä\n'"}
    for _ in range(2):
        with open_writer(tmp_path / "out", settings=settings):
            pass


@pytest.mark.parametrize("name", ["notes.txt", "rows-000000000000-process-00000-abcdef01.parquet", ".hidden"])
def test_a_folder_of_others_is_refused_without_harm(name: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine", encoding="utf-8")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"holds {name} and no job.yaml"):
        open_writer(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"holds no job\.yaml"):
        list(read_rows(tmp_path / "out"))
    with pytest.raises(ValueError, match="is a file"):
        open_writer(tmp_path / "out" / name)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["kind: another\n", "- 1\n", "a: [\n"])
def test_a_job_file_of_others_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"(?s)job\.yaml .*name another folder"):
        open_writer(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["job.yaml"]


def test_one_run_at_a_time_writes(tmp_path: Path) -> None:
    first = open_writer(tmp_path / "out", process_index=1, num_processes=2)
    for options in ({"process_index": 1, "num_processes": 2}, {"process_index": 0, "num_processes": 1}):
        with pytest.raises(ValueError, match="another run is writing into"):
            open_writer(tmp_path / "out", **options)
    with open_writer(tmp_path / "out", process_index=0, num_processes=2):
        pass  # of the same run
    first.close()
    assert write(tmp_path / "out") == list(range(NUM_ROWS))


def test_rows_that_cannot_be_added(tmp_path: Path) -> None:
    with open_writer(tmp_path / "out") as writer:
        for row in range(4):  # three lie in a shard, one does not
            writer.add(row, record(row))
        for row in (0, 3, -1):
            with pytest.raises(ValueError, match=f"row {row} was added already"):
                writer.add(row, record(row))
        with pytest.raises(ValueError, match="row 9 has the columns n; needed are n, numbers, text"):
            writer.add(9, {"n": 1})
        for wrong in ({"n": "many"}, {"numbers": 0.5}, {"text": "\ud83d"}):
            with pytest.raises(ValueError, match="row 9 has a value that its column cannot hold"):
                writer.add(9, {**record(9), **wrong})
        writer.add(9, {**record(9), "text": storable("\ud83d")})
    rows = list(read_rows(tmp_path / "out", partial=True))
    assert [row["row"] for row in rows] == [0, 1, 2, 3, 9]
    assert rows[-1]["text"] == "\\ud83d"


@pytest.mark.parametrize(
    "change",
    [{"process_index": 1}, {"process_index": -1, "num_processes": 2}, {"rows_per_shard": 0}],
)
def test_options_that_cannot_be(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be"):
        open_writer(tmp_path / "out", **change)
    with pytest.raises(ValueError, match="'row' is the writer's own"):
        open_writer(tmp_path / "out", features=datasets.Features({"row": datasets.Value("int64")}))
    assert not (tmp_path / "out").exists()


def test_finished_rows_of_nothing(tmp_path: Path) -> None:
    finished = finished_rows(tmp_path / "nothing")
    assert (len(finished), list(finished), 0 in finished, "a" in finished) == (0, [], False, False)
