"""Tokenizing once: what is taken from the cache the next time, what is not, and several processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from small_training import PROJECT, make_trainer

from modeling_prm import PRMForStepScoring, PRMProcessor
from trainer import token_cache
from trainer.preparation import tokenize_dataset
from trainer.readers import load_step_dataset

MakePRM = Callable[..., tuple[PRMForStepScoring, PRMProcessor]]
Folder = Callable[..., Path]

ROWS = [
    {
        "problem": f"What is {n % 5} + 1?",
        "steps": [f"It is {n % 5 + 1}.", "Done."][: n % 2 + 1],
        "labels": [1, -1][: n % 2 + 1],
    }
    for n in range(20)
]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(token_cache, "MIN_RECORDS", 10)
    return tmp_path / "cache" / "modeling_prm"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "steps.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return file


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many records each call of the processor encodes, in this process."""
    counts: list[int] = []
    encode = PRMProcessor.encode

    def counting(self: PRMProcessor, problems: Any, solutions: Any, **options: Any) -> Any:
        counts.append(len(problems))
        return encode(self, problems, solutions, **options)

    monkeypatch.setattr(PRMProcessor, "encode", counting)
    return counts


def test_data_from_files_is_tokenized_once(data: Path, cache: Path, prm_folder: Folder, encoded: list[int]) -> None:
    first, report = tokenize_dataset(load_step_dataset(data), PRMProcessor.from_pretrained(prm_folder("qwen2")))
    assert sum(encoded) == 20
    (file,) = cache.iterdir()
    encoded.clear()
    # Read and loaded anew, as in the next run, and with a tokenizer that was used.
    processor = PRMProcessor.from_pretrained(prm_folder("qwen2"))
    processor("a", ["b"])
    encoded.clear()
    second, same = tokenize_dataset(load_step_dataset(data), processor)
    assert encoded == []
    assert (second.to_list(), same) == (first.to_list(), report)
    assert [entry["filename"] for entry in second.cache_files] == [str(file)]


def test_another_process_finds_it(data: Path, cache: Path, prm_folder: Folder, encoded: list[int]) -> None:
    script = f"""
import datasets
from trainer import token_cache
token_cache.MIN_RECORDS = 10
from modeling_prm import PRMProcessor
from trainer.preparation import tokenize_dataset
from trainer.readers import load_step_dataset
tokenize_dataset(load_step_dataset({str(data)!r}), PRMProcessor.from_pretrained({str(prm_folder("qwen2"))!r}))
"""
    environment = {"HF_DATASETS_CACHE": str(cache.parent), "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list(cache.iterdir())) == 1
    tokenize_dataset(load_step_dataset(data), PRMProcessor.from_pretrained(prm_folder("qwen2")))
    assert encoded == []


@pytest.mark.parametrize("changed", ["max_length", "template", "tokenizer", "option", "data", "code"])
def test_what_changes_the_tokens_misses(
    data: Path,
    cache: Path,
    make_prm: MakePRM,
    encoded: list[int],
    changed: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    processor = make_prm("qwen2")[1]
    options: dict[str, Any] = {}
    tokenize_dataset(load_step_dataset(data), processor)
    encoded.clear()
    if changed == "max_length":
        processor.max_length = 64
    elif changed == "template":
        processor = make_prm("qwen2", problem_template="Q: {problem}\n")[1]
    elif changed == "tokenizer":
        processor = make_prm("llama")[1]
    elif changed == "option":
        options = {"truncation": "error"}
    elif changed == "data":
        data.write_text(data.read_text(encoding="utf-8").replace("Done.", "Done!"), encoding="utf-8")
    else:
        other = tmp_path / "code.py"
        other.write_text("# another release\n", encoding="utf-8")
        monkeypatch.setattr(token_cache.inspect, "getfile", lambda item: str(other))
    tokens, _ = tokenize_dataset(load_step_dataset(data), processor, **options)
    assert sum(encoded) == 20
    assert len(list(cache.iterdir())) == 2
    # And what was found is what that processor gives.
    encoded.clear()
    plain = processor.encode(
        [row["problem"] for row in load_step_dataset(data)], [r["steps"] for r in load_step_dataset(data)]
    )
    assert tokens["input_ids"][:] == [item.input_ids for item in plain]


def test_data_of_the_datasets_cache_has_its_tokens_beside_it(
    data: Path, cache: Path, prm_folder: Folder, encoded: list[int], tmp_path: Path
) -> None:
    def load() -> datasets.Dataset:
        loaded = datasets.load_dataset("json", data_files=str(data), split="train", cache_dir=str(tmp_path / "own"))
        return loaded.map(lambda row: {"labels": [float(label == 1) for label in row["labels"]]})

    tokenize_dataset(load(), PRMProcessor.from_pretrained(prm_folder("qwen2")))
    assert sum(encoded) == 20
    encoded.clear()
    tokens, _ = tokenize_dataset(load(), PRMProcessor.from_pretrained(prm_folder("qwen2")))
    assert encoded == []
    assert tokens.cache_files[0]["filename"].startswith(str(tmp_path / "own"))
    assert not cache.exists()


def test_nothing_is_kept_of_a_few_records_or_where_caching_is_off(
    data: Path, cache: Path, prm_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = PRMProcessor.from_pretrained(prm_folder("qwen2"))
    dataset = load_step_dataset(data)
    tokenize_dataset(dataset.select(range(9)), processor)
    assert not cache.exists()
    datasets.disable_caching()
    try:
        tokenize_dataset(dataset, processor)
    finally:
        datasets.enable_caching()
    assert not cache.exists()
    cache.parent.write_text("a file where the folder would be", encoding="utf-8")
    assert len(tokenize_dataset(dataset, processor)[0]) == 20


def test_several_processes_give_the_same_tokens(
    data: Path, cache: Path, prm_folder: Folder, encoded: list[int]
) -> None:
    processor = PRMProcessor.from_pretrained(prm_folder("qwen2"))
    alone, report = tokenize_dataset(load_step_dataset(data), processor)
    for file in cache.iterdir():
        file.unlink()
    encoded.clear()
    together, same = tokenize_dataset(load_step_dataset(data), processor, num_proc=2)
    # Not in this process, and in two files.
    assert encoded == []
    assert (together.to_list(), same) == (alone.to_list(), report)
    assert len(list(cache.iterdir())) == 2
    # Records are still named by their number in the whole set.
    bad = datasets.Dataset.from_list([*load_step_dataset(data).to_list()[:17], {**ROWS[17], "labels": [1.0, 2.0]}])
    with pytest.raises(ValueError, match=r"record 17 \(from 0\)"):
        tokenize_dataset(bad, processor, num_proc=2)


def test_records_carry_the_number_of_their_problem(data: Path, cache: Path, prm_folder: Folder) -> None:
    tokens, _ = tokenize_dataset(load_step_dataset(data), PRMProcessor.from_pretrained(prm_folder("qwen2")))
    numbers = tokens["problem_id"][:]
    # Five problems in turn.
    assert len(set(numbers[:5])) == 5
    assert numbers == numbers[:5] * 4


def test_the_trainer_tokenizes_in_as_many_processes_as_asked(
    prm_folder: Folder, cache: Path, tmp_path: Path, encoded: list[int]
) -> None:
    rows = datasets.Dataset.from_list([{**row, "labels": [1.0, 0.0][: len(row["labels"])]} for row in ROWS])
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path / "run", rows, dataset_num_proc=2)
    assert encoded == []
    assert len(trainer.train_dataset.cache_files) == 2
    make_trainer(prm_folder("qwen2"), tmp_path / "run", rows.select(range(19)))
    assert sum(encoded) == 19
