"""Streaming: every record once a pass by one process, tokens and loss of data in memory, and what is refused."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from small_training import (
    LABELS,
    exact_loss_and_gradients,
    make_arguments,
    make_dataset,
    make_rows,
    make_trainer,
    run_python,
    worst_difference,
)

from modeling_prm import PRMForStepScoring, PRMProcessor
from trainer import train
from trainer.arguments import DataArguments
from trainer.guards import NonFiniteLossError
from trainer.labels import LabelRules
from trainer.preparation import tokenize_dataset
from trainer.prm_trainer import PRMTrainer
from trainer.readers import load_step_dataset
from trainer.record_stream import SourcePart, make_shards, stream_step_dataset
from trainer.streaming import StepStream

Folder = Callable[..., Path]
MakePRM = Callable[..., tuple[PRMForStepScoring, PRMProcessor]]


def write(file: Path, rows: list[Any]) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return file


def numbered(start: int, count: int) -> list[dict[str, Any]]:
    """Rows of one length."""
    return [
        {"problem": f"Problem {number:03}", "steps": ["a", "b"], "labels": [1, 0]} for number in range(start, count)
    ]


@pytest.fixture(scope="module")
def processor(prm_folder: Folder) -> PRMProcessor:
    return PRMProcessor.from_pretrained(prm_folder("qwen2"))


@pytest.fixture
def one_file(tmp_path: Path) -> Path:
    return write(tmp_path / "one.jsonl", numbered(0, 50))


@pytest.fixture
def four_files(tmp_path: Path) -> Path:
    for index in range(4):
        write(tmp_path / "four" / f"{index}.jsonl", numbered(10 * index, 10 * index + 10))
    return tmp_path / "four"


def make_stream(data: Any, processor: PRMProcessor, **options: Any) -> StepStream:
    records = load_step_dataset(data, streaming=True) if isinstance(data, Path) else data
    return StepStream(records=records, processor=processor, **options)


def numbers(rows: Iterator[dict[str, Any]]) -> list[int]:
    return [row["record"] for row in rows]


def test_a_pass_has_every_record_once_in_an_order_of_its_own(one_file: Path, processor: PRMProcessor) -> None:
    lines = list(range(1, 51))
    stream = make_stream(one_file, processor, shuffle_buffer_size=1000)
    first = numbers(stream.one_pass(0))
    assert first != lines
    assert sorted(first) == lines
    assert numbers(stream.one_pass(0)) == first
    second = numbers(stream.one_pass(1))
    assert sorted(second) == lines
    assert second != first
    assert numbers(make_stream(one_file, processor, shuffle_buffer_size=1000, seed=1).one_pass(0)) != first
    # A buffer of 2 can bring no record forward by more than one place.
    near = numbers(make_stream(one_file, processor, shuffle_buffer_size=2).one_pass(0))
    assert near != lines
    assert all(place >= line - 2 for place, line in enumerate(near))
    assert numbers(make_stream(one_file, processor, shuffle_buffer_size=0).one_pass(1)) == lines
    # And the stream is one pass after the other.
    endless = iter(stream)
    assert [next(endless)["record"] for _ in range(100)] == first + second


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_rows_of_a_file(one_file: Path, processor: PRMProcessor, processes: int) -> None:
    parts = [
        numbers(make_stream(one_file, processor, process_index=index, num_processes=processes).one_pass(0))
        for index in range(processes)
    ]
    assert sorted(itertools.chain.from_iterable(parts)) == list(range(1, 51))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_share_files_where_each_has_as_many(
    four_files: Path, processor: PRMProcessor, processes: int
) -> None:
    parts = [
        numbers(make_stream(four_files, processor, process_index=index, num_processes=processes).one_pass(1))
        for index in range(processes)
    ]
    # 10^10 for each file before, plus the line.
    assert sorted(itertools.chain.from_iterable(parts)) == [
        file * 10**10 + line for file in range(4) for line in range(1, 11)
    ]
    files = [{number // 10**10 for number in part} for part in parts]
    assert [len(found) for found in files] == ([4 // processes] * processes if processes != 3 else [4, 4, 4])
    assert sum(map(len, parts)) == 40


@pytest.mark.parametrize("kind", ["one", "four", "parquet"])
def test_workers_of_a_loader_share_too(one_file: Path, four_files: Path, processor: PRMProcessor, kind: str) -> None:
    source = {"one": one_file, "four": four_files, "parquet": one_file.with_suffix(".parquet")}[kind]
    if kind == "parquet":
        datasets.Dataset.from_list(numbered(0, 50)).to_parquet(source)
    found = []
    for index in (0, 1):
        stream = make_stream(source, processor, process_index=index, num_processes=2)
        loader = torch.utils.data.DataLoader(OnePass(stream), batch_size=None, num_workers=2)
        found += [row["record"] for row in loader]
    assert len(found) == len(set(found)) == (40 if kind == "four" else 50)


class OnePass(torch.utils.data.IterableDataset[dict[str, Any]]):
    def __init__(self, stream: StepStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.stream.one_pass(0)


def test_shards_are_of_about_equal_size(tmp_path: Path) -> None:
    def shards(*sizes: int, format: str = "plain") -> list[list[int]]:
        parts = []
        for number, size in enumerate(sizes):
            file = tmp_path / f"{number}.jsonl"
            file.write_bytes(b"x" * size)
            parts.append(SourcePart(source=str(tmp_path), format=format, number=number, path=str(file)))
        return sorted([part.number for part in shard] for shard in make_shards(parts))

    assert shards(100, 105, 109) == [[0], [1], [2]]
    # 111 is more than a tenth above 100, and no two shards come closer.
    assert shards(100, 111, 100) == [[0, 1, 2]]
    # 100 + 10 against 110.
    assert shards(100, 10, 110) == [[0, 1], [2]]
    assert shards(100, 1) == [[0, 1]]
    # PRMBench repeats a solution in many rows, which are compared.
    assert shards(100, 100, format="prmbench") == [[0, 1]]


def test_the_tokens_are_those_of_data_in_memory(tmp_path: Path, prm_folder: Folder) -> None:
    processor = PRMProcessor.from_pretrained(prm_folder("qwen2"))
    processor.max_length = 60
    file = write(tmp_path / "a.jsonl", make_rows())
    stream = make_stream(file, processor, shuffle_buffer_size=0)
    expected, report = tokenize_dataset(load_step_dataset(file), processor)
    found = list(stream.one_pass(0))
    assert report.kept_steps < report.steps
    assert len(found) == len(expected)
    for row, other in zip(found, expected, strict=True):
        assert {name: row[name] for name in ("input_ids", "step_positions", "labels", "problem_id")} == {
            name: other[name] for name in ("input_ids", "step_positions", "labels", "problem_id")
        }


def test_what_is_lost_is_counted_and_named(
    tmp_path: Path, prm_folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    good = numbered(0, 2)
    long = {"problem": "What is it? " * 40, "steps": ["a"], "labels": [1]}
    cut = {"problem": "Cut", "steps": ["a", "b " * 60, "c"], "labels": [1, 0, 1]}
    file = write(tmp_path / "a.jsonl", [good[0], "{not JSON\n", {**good[1], "labels": [1]}, long, cut, good[1]])
    processor = PRMProcessor.from_pretrained(prm_folder("qwen2"))
    processor.max_length = 60
    with pytest.raises(ValueError, match=r"a\.jsonl:2: line is not JSON"):
        list(make_stream(file, processor).one_pass(0))
    records = load_step_dataset(file, streaming=True, on_bad_row="skip")
    with pytest.raises(
        ValueError, match=r"a\.jsonl:4 has a problem that leaves room for no step at max_length=60; raise"
    ):
        list(make_stream(records, processor).one_pass(0))
    options = {"overlong_problems": "skip", "shuffle_buffer_size": 0}
    with pytest.raises(ValueError, match=r"a\.jsonl:5 keeps 1 of 3 steps at max_length=60; raise max_length or pass"):
        list(make_stream(records, processor, truncation="error", **options).one_pass(0))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        rows = list(make_stream(records, processor, **options).one_pass(0))
    assert numbers(iter(rows)) == [1, 5, 6]
    assert [len(row["step_positions"]) for row in rows] == [2, 1, 2]
    said = {record.levelname: record.getMessage() for record in caplog.records}
    assert "kept 4 of 6 rows: 4 records; 1 rejected: line is not JSON; 1 rejected: as many labels" in caplog.text
    assert "a.jsonl:2 is left out: line is not JSON" in caplog.text
    assert "a.jsonl:3 is left out: as many labels as steps are needed" in caplog.text
    assert said["WARNING"] == (
        "pass 1 of the stream: at max_length=60 kept 3 of 4 records and 5 of 8 steps; 5 steps have a label"
    )


def test_nothing_to_train_on_ends_the_stream(tmp_path: Path, processor: PRMProcessor) -> None:
    file = write(tmp_path / "a.jsonl", make_rows([[-100.0, -100.0], [1.0, -100.0]]))
    assert len(list(make_stream(file, processor).one_pass(0))) == 2
    with pytest.raises(ValueError, match="pass 1 of the stream has no labelled step to train on"):
        list(make_stream(file, processor, label_rules=LabelRules(last_step_only=True)).one_pass(0))
    with pytest.raises(ValueError, match=r"part 3 of 3 has no labelled step to train on \(kept 0 of 0 records"):
        list(make_stream(file, processor, process_index=2, num_processes=3).one_pass(0))


def test_rows_of_other_datasets(processor: PRMProcessor) -> None:
    records = datasets.Dataset.from_list(
        [{"prompt": "What is 1 + 1?", "completions": ["1 + 1 = 2.", "So 3."], "labels": [True, False]}]
    )
    (row,) = make_stream(records.to_iterable_dataset(), processor).one_pass(0)
    assert row["labels"] == [1.0, 0.0]
    (encoded,) = processor.encode(["What is 1 + 1?"], [["1 + 1 = 2.", "So 3."]])
    assert row["input_ids"] == encoded.input_ids
    with pytest.raises(
        ValueError, match=r"record of the stream: columns are missing: \['steps'\], got .*load_step_dataset"
    ):
        list(make_stream(records.rename_columns({"prompt": "problem"}).to_iterable_dataset(), processor).one_pass(0))
    bad = datasets.Dataset.from_list([{"problem": "a", "steps": ["b"], "labels": [2.0]}]).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"record of the stream: labels must be in \[0, 1\] or -100: got 2.0"):
        list(make_stream(bad, processor).one_pass(0))


def test_a_hub_dataset_is_streamed_by_its_shards(monkeypatch: pytest.MonkeyPatch, processor: PRMProcessor) -> None:
    whole = datasets.Dataset.from_list([*numbered(0, 5), {"problem": "", "steps": ["a"], "labels": [1]}])
    asked = []

    def load(name: str, *, split: str, streaming: bool) -> datasets.IterableDataset:
        asked.append((name, split, streaming))
        return whole.to_iterable_dataset(num_shards=2)

    monkeypatch.setattr(datasets, "load_dataset", load)
    records = load_step_dataset("owner/steps", split="train", streaming=True)
    assert records.num_shards == 2
    assert [row["source"] for row in records.take(4)] == [
        "owner/steps[train] shard 0 of 2:1",
        "owner/steps[train] shard 0 of 2:2",
        "owner/steps[train] shard 0 of 2:3",
        "owner/steps[train] shard 1 of 2:1",
    ]
    with pytest.raises(ValueError, match=r"owner/steps\[train\] shard 1 of 2:3: problem must not be empty"):
        list(records)
    assert set(asked) == {("owner/steps", "train", True)}
    with pytest.raises(ValueError, match="to stream it as a Hub dataset pass split= too"):
        load_step_dataset("owner/steps", streaming=True)


def test_what_cannot_be_read_is_refused_at_once(tmp_path: Path, one_file: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_step_dataset(tmp_path / "none.jsonl", streaming=True)
    with pytest.raises(ValueError, match="no format is named 'other'"):
        load_step_dataset(one_file, streaming=True, format="other")
    with pytest.raises(ValueError, match="no format has these columns: got a"):
        load_step_dataset(write(tmp_path / "b.jsonl", [{"a": 1}]), streaming=True)
    with pytest.raises(ValueError, match="rejected_file is not written while streaming"):
        load_step_dataset(one_file, streaming=True, rejected_file=tmp_path / "bad")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="split='train' is for Hub datasets"):
        load_step_dataset(one_file, streaming=True, split="train")


def test_several_sources_of_several_formats(tmp_path: Path, one_file: Path) -> None:
    trl = write(tmp_path / "trl.jsonl", [{"prompt": "a", "completions": ["b"], "labels": [True]}])
    records = stream_step_dataset([one_file, trl])
    rows = list(records)
    assert len(rows) == 51
    assert rows[-1] == {
        "problem": "a",
        "steps": ["b"],
        "labels": [1.0],
        "problem_group": None,
        "conversation": None,
        "source": f"{trl}:1",
        "record": 10**10 + 1,
    }


@pytest.fixture(scope="module")
def two_processes(prm_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two_processes")
    (folder / "prm").symlink_to(prm_folder("qwen2"))
    write(folder / "rows" / "a.jsonl", make_rows())
    rows = [json.dumps(row) for row in make_rows()]
    # Shards of one size, each of four rows: spaces between rows make up for what is missing.
    halves = ["\n".join(rows[:4]) + "\n", "\n".join(rows[4:]) + "\n"]
    for index, half in enumerate(halves):
        write(folder / "shards" / f"{index}.jsonl", [half, " " * (max(map(len, halves)) - len(half))])
    done = run_python("stream_in_two_processes", folder, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("data", ["rows", "shards"])
def test_two_processes_train_on_every_record_once_with_the_exact_loss(
    prm_folder: Folder, processor: PRMProcessor, two_processes: list[dict[str, Any]], data: str
) -> None:
    model = PRMForStepScoring.from_pretrained(prm_folder("qwen2"))
    loss, gradients = exact_loss_and_gradients(model, processor, make_rows())
    seen = [result[data]["records"] for result in two_processes]
    assert [len(part) for part in seen] == [4, 4]
    if data == "rows":
        assert sorted(seen[0] + seen[1]) == list(range(1, 9))
    else:
        assert sorted(map(sorted, seen)) == [[1, 2, 3, 4], [10**10 + line for line in (1, 2, 3, 4)]]
    for result in two_processes:
        assert result[data]["loss"] == pytest.approx(loss, rel=1e-5)
        assert worst_difference(result[data]["gradients"], gradients) < 1e-5


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_a_stream_is_bit_exact(make_prm: MakePRM, one_file: Path, tmp_path: Path, workers: int) -> None:
    def run(folder: Path, max_steps: int, resume: str | None = None) -> PRMTrainer:
        model, processor = make_prm("gpt2")
        # 50 records, 3 x 2 x 4 seen before the checkpoint and 30 more after it: the second pass begins between.
        options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "shuffle_buffer_size": 20}
        args = make_arguments(
            folder,
            max_steps=max_steps,
            save_strategy="steps",
            save_steps=3,
            logging_steps=1,
            lr_scheduler_type="constant",
            learning_rate=1e-2,
            dataloader_num_workers=workers,
            **options,
        )
        trainer = PRMTrainer(
            model, args, processing_class=processor, train_dataset=load_step_dataset(one_file, streaming=True)
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole", 8)
    parts = run(tmp_path / "parts", 8, resume=str(tmp_path / "whole" / "checkpoint-3"))
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (whole, parts)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8
    weights = dict(whole.model.named_parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in parts.model.named_parameters())


def test_packed_rows_of_a_stream_give_the_exact_gradients(prm_folder: Folder, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", make_rows())
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "packing": "pack", "sgd": True}
    trainer, seen = make_trainer(prm_folder("qwen2"), tmp_path, load_step_dataset(file, streaming=True), **options)
    loss, gradients = exact_loss_and_gradients(trainer.model, trainer.processing_class, make_rows())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert worst_difference(seen.steps[0], gradients) < 1e-5


def test_sequential_keeps_the_order_and_the_buffer_is_an_option(
    prm_folder: Folder, one_file: Path, tmp_path: Path
) -> None:
    def first_batch(**options: Any) -> list[int]:
        records = load_step_dataset(one_file, streaming=True)
        trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, records, max_steps=1, **options)
        found: list[int] = next(iter(trainer.get_train_dataloader()))["record"].tolist()
        return found

    assert first_batch(train_sampling_strategy="sequential") == list(range(1, 9))
    assert first_batch(shuffle_buffer_size=1) == list(range(1, 9))
    assert first_batch() != list(range(1, 9))
    assert first_batch(data_seed=1) != first_batch()


def test_records_of_a_loss_that_is_not_finite_are_named(prm_folder: Folder, one_file: Path, tmp_path: Path) -> None:
    options = {"max_steps": 3, "per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}
    records = load_step_dataset(one_file, streaming=True)
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, records, learning_rate=1e-30, **options)
    calls = []
    forward = trainer.model.forward

    def broken(*given: Any, **inputs: Any) -> Any:
        calls.append(None)
        output = forward(*given, **inputs)
        if len(calls) == 2:
            output["logits"] = output["logits"] * torch.nan
        return output

    trainer.model.forward = broken
    with pytest.raises(NonFiniteLossError, match=r"records in the training data \(from 0\): 3, 4;") as caught:
        trainer.train()
    assert caught.value.records == [3, 4]
    saved = json.loads((tmp_path / "non_finite_loss.json").read_text())
    assert saved["texts"]["3"] == f"{one_file}:3\nProblem 002\na\nb"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": -1}, r"streaming needs max_steps \(--max-steps\)"),
        ({"train_sampling_strategy": "group_by_length"}, "'group_by_length' needs the lengths of all records"),
        (
            {"accelerator_config": {"dispatch_batches": True}},
            "in a stream each reads a part of its own: leave them out",
        ),
        ({"accelerator_config": {"split_batches": True}}, "in a stream each reads a part of its own: leave them out"),
    ],
)
def test_options_that_do_not_go_with_a_stream(
    prm_folder: Folder, one_file: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    records = load_step_dataset(one_file, streaming=True)
    make_trainer(prm_folder("qwen2"), tmp_path, records, max_steps=1)
    with pytest.raises(ValueError, match=message):
        make_trainer(prm_folder("qwen2"), tmp_path, records, **{"max_steps": 1, **options})


def test_datasets_that_are_refused(prm_folder: Folder, one_file: Path, tmp_path: Path) -> None:
    records = load_step_dataset(one_file, streaming=True)
    with pytest.raises(ValueError, match=r"split by node already; give the whole one"):
        make_trainer(prm_folder("qwen2"), tmp_path, split_dataset_by_node(records, 0, 2), max_steps=1)
    with pytest.raises(TypeError, match=r"'eval' must be a datasets\.Dataset, got IterableDataset"):
        make_trainer(prm_folder("qwen2"), tmp_path, records, max_steps=1, eval_dataset=records)


def test_the_command_line_streams(
    backbone_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "a.jsonl", make_rows(LABELS * 2))
    options = ["--backbone", str(backbone_folder("qwen2")), "--train-data", str(data), "--streaming", "--use-cpu"]
    options += ["--report-to", "none", "--eval-data", str(data), "--output-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        train.main(options)
    assert "streaming needs max_steps (--max-steps)" in str(stopped.value) + capsys.readouterr().err
    metrics = train.main([*options, "--max-steps", "3", "--save-strategy", "no"])
    assert metrics["eval_num_steps"] == 2 * sum(label != -100.0 for row in LABELS for label in row)
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_evaluation_sets_stay_in_memory(one_file: Path) -> None:
    train_set, eval_set = train.load_data(
        DataArguments(train_data=[str(one_file)], eval_data=[str(one_file)], streaming=True), seed=0
    )
    assert isinstance(train_set, datasets.IterableDataset)
    assert isinstance(eval_set, datasets.Dataset)
    in_memory, _ = train.load_data(DataArguments(train_data=[str(one_file)]), seed=0)
    assert isinstance(in_memory, datasets.Dataset)
    assert in_memory["problem"] == [row["problem"] for row in train_set]
    assert make_dataset().column_names == ["problem", "steps", "labels"]
