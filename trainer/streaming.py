"""Training on a `datasets.IterableDataset` of records: tokenized as they come, each by one process.

A stream never ends, so that every process has as many batches as the others: when its records are through, the
next pass over them begins in another order. Its order depends on the seed, the pass and the number of processes
alone, so that a training that goes on from a checkpoint passes over what it has seen and sees the same again.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from modeling_prm import PRMProcessor
from modeling_prm.step_loss import IGNORED_LABEL

from .conversation_data import CONVERSATION, encode_records
from .data_files import iter_stream
from .formats import READERS
from .labels import LabelRules
from .preparation import PROBLEM_ID, RECORD_COLUMNS, RECORD_NUMBER, PreparationReport, check_record, problem_id
from .record_stream import SOURCE

logger = logging.getLogger(__name__)

_TRL = READERS["trl"]
# Tokenized together.
_CHUNK = 32
_MOST_CHARACTERS = 500
_MOST_SECONDS = 60


@dataclass(frozen=True, kw_only=True, eq=False)
class StepStream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """An endless stream of tokenized records, those of one process.

    Shards of the dataset are shared out where each process, and each of its workers, gets as many; otherwise every
    one of them reads all rows and takes its share of them. Either way a record is seen once in a pass.

    Args:
        records: `problem`, `steps` and `labels`, or TRL's columns; `source` and `record` as `trainer.record_stream`
            gives them.
        processor, truncation, overlong_problems, num_labels: as in `tokenize_dataset`.
        label_rules: what training does to the labels.
        shuffle_buffer_size: the next record is drawn from so many, and shards come in another order in each pass; 0
            leaves the order as it is.
        seed: of the order.
        process_index, num_processes: whose part it is.
    """

    records: datasets.IterableDataset
    processor: PRMProcessor
    truncation: str = "drop"
    overlong_problems: str = "error"
    num_labels: int = 1
    label_rules: LabelRules = dataclasses.field(default_factory=LabelRules)
    shuffle_buffer_size: int = 10_000
    seed: int = 0
    process_index: int = 0
    num_processes: int = 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in itertools.count():
            yield from self.one_pass(number)

    def one_pass(self, number: int) -> Iterator[dict[str, Any]]:
        """The tokenized records of pass `number`, from 0, as `tokenize_dataset` gives them.

        Raises:
            ValueError: a record is not valid or does not fit, or the pass gave nothing to train on.
        """
        counts: Counter[str] = Counter()
        rows = self._rows(number)
        while chunk := list(itertools.islice(rows, _CHUNK)):
            yield from self._tokenize(chunk, counts)
        names = [field.name for field in dataclasses.fields(PreparationReport)]
        report = PreparationReport(**{name: counts[name] for name in names})
        part, parts = self._part()
        who = f"pass {number + 1} of the stream" + (f", part {part + 1} of {parts}" if parts > 1 else "")
        if counts["trained"] == 0:
            raise ValueError(
                f"{who} has no labelled step to train on ({report}); give more data or fewer processes, and look at "
                "max_length and the options that leave labels out"
            )
        lost = report.kept_steps < report.steps or report.kept_records < report.records
        logger.log(
            logging.WARNING if lost else logging.INFO, "%s: at max_length=%s %s", who, self.processor.max_length, report
        )

    def describe(self, numbers: list[int]) -> dict[int, str]:
        """Where the records of these numbers are and how they begin; those that a minute of reading finds."""
        found: dict[int, str] = {}
        until = time.monotonic() + _MOST_SECONDS
        for row in iter_stream(self.records):
            if len(found) == len(set(numbers)) or RECORD_NUMBER not in row or time.monotonic() > until:
                break
            if row[RECORD_NUMBER] in numbers:
                text = "\n".join([str(row["problem"]), *map(str, row["steps"])])
                found[row[RECORD_NUMBER]] = f"{row.get(SOURCE, '')}\n{text}".strip()[:_MOST_CHARACTERS]
        return found

    def _part(self) -> tuple[int, int]:
        """The number of this part and how many there are, over processes and workers of their loaders."""
        worker = torch.utils.data.get_worker_info()
        workers = 1 if worker is None else worker.num_workers
        index = 0 if worker is None else worker.id
        return self.process_index * workers + index, self.num_processes * workers

    def _rows(self, number: int) -> Iterator[dict[str, Any]]:
        part, parts = self._part()
        records = self.records
        by_shards = parts > 1 and records.num_shards % parts == 0
        if by_shards:
            records = records.shard(parts, part, contiguous=False)
            if number == 0:
                # What is wrong with these rows no other process says.
                logging.getLogger("trainer.record_stream").setLevel(logging.INFO)
        if self.shuffle_buffer_size:
            records = records.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer_size)
            records.set_epoch(number)
        rows = iter_stream(records)
        return rows if by_shards else itertools.islice(rows, part, None, parts)

    def _tokenize(self, rows: Sequence[dict[str, Any]], counts: Counter[str]) -> Iterator[dict[str, Any]]:
        rows = [self._check(row) for row in rows]
        names = ("problem", "steps", CONVERSATION)
        encoded = encode_records(self.processor, {name: [row.get(name) for row in rows] for name in names})
        for row, item in zip(rows, encoded, strict=True):
            kept = len(item.step_positions)
            counts["records"] += 1
            counts["steps"] += item.num_steps
            if kept == 0 and self.overlong_problems == "error":
                raise ValueError(
                    f"{_place(row)} has a problem that leaves room for no step at max_length="
                    f"{self.processor.max_length}; raise max_length or pass overlong_problems='skip'"
                )
            if kept == 0:
                continue
            if self.truncation == "error" and kept < item.num_steps:
                raise ValueError(
                    f"{_place(row)} keeps {kept} of {item.num_steps} steps at max_length={self.processor.max_length}; "
                    "raise max_length or pass truncation='drop'"
                )
            labels = row["labels"]
            counts["kept_records"] += 1
            counts["kept_steps"] += kept
            counts["labelled_steps"] += sum(label != IGNORED_LABEL for label in labels[:kept])
            counts["soft_labels"] += sum(0 < label < 1 for label in labels[:kept])
            counts["trained"] += sum(label != IGNORED_LABEL for label in self.label_rules(labels)[:kept])
            number = {RECORD_NUMBER: row[RECORD_NUMBER]} if isinstance(row.get(RECORD_NUMBER), int) else {}
            yield {
                "input_ids": item.input_ids,
                "step_positions": item.step_positions,
                "labels": labels,
                PROBLEM_ID: problem_id(row["problem"]),
                **number,
            }

    def _check(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            if "problem" not in row and row.keys() >= set(_TRL.columns):
                row = {**row, **_TRL.read(row)[0].to_dict()}
            if missing := [name for name in RECORD_COLUMNS if name not in row]:
                raise ValueError(
                    f"columns are missing: {missing}, got {list(row)}; rename the columns, or read the data "
                    "with trainer.readers.load_step_dataset(..., streaming=True)"
                )
            check_record(row["problem"], row["steps"] or [], row["labels"] or [], self.num_labels)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{_place(row)}: {error}") from error
        return row


def make_stream(
    records: datasets.IterableDataset, processor: PRMProcessor, args: Any, rules: LabelRules, num_labels: int
) -> StepStream:
    """The stream that training with these options reads.

    Raises:
        ValueError: an option does not go with a stream, or the dataset is a part of itself already.
    """
    check_stream_options(args)
    if getattr(records, "_distributed", None) is not None:
        raise ValueError(
            "the dataset is split by node already; give the whole one, it is shared out among processes here"
        )
    return StepStream(
        records=records,
        processor=processor,
        truncation=args.truncation,
        overlong_problems=args.overlong_problems,
        num_labels=num_labels,
        label_rules=rules,
        shuffle_buffer_size=0 if args.train_sampling_strategy == "sequential" else args.shuffle_buffer_size,
        seed=args.seed if args.data_seed is None else args.data_seed,
    )


def check_stream_options(args: Any) -> None:
    """Check that options of training go with a stream.

    Raises:
        ValueError: one does not.
    """
    if args.max_steps <= 0:
        raise ValueError(
            "streaming needs max_steps (--max-steps), since how many records come is not known before; give it"
        )
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} needs the lengths of all records, which a "
            "stream has not; choose 'random', which draws from shuffle_buffer_size records, or 'sequential'"
        )
    if args.accelerator_config.dispatch_batches or args.accelerator_config.split_batches:
        raise ValueError(
            "dispatch_batches and split_batches let one process read for all; in a stream each reads a part of its "
            "own: leave them out"
        )


def stream_dataloader(
    stream: StepStream,
    collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
    accelerator: Accelerator,
    args: Any,
    batch_size: int,
) -> Any:
    """Batches of a process's part of a stream, on its device.

    Accelerate would let the main process read everything and send the others their batches, which must then all have
    one length; or, with as many shards as processes, let those with fewer records end before the others. So the stream
    is cut here, and accelerate takes it for that of a single process.
    """
    mesh = getattr(accelerator, "torch_device_mesh", None)
    if mesh is not None and any(mesh[name].size() > 1 for name in mesh.mesh_dim_names if name in ("tp", "cp", "sp")):
        raise ValueError(
            "streaming gives each process other records, and processes with parts of one layer or one row need the "
            "same; train with data parallelism or FSDP alone, or without streaming"
        )
    part = dataclasses.replace(stream, process_index=accelerator.process_index, num_processes=accelerator.num_processes)
    if accelerator.num_processes > 1:
        logger.setLevel(logging.INFO)  # what is left out of its part no other process says
    loader = DataLoader(
        part,
        batch_size=batch_size,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    return prepare_data_loader(
        loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    )


def _place(row: dict[str, Any]) -> str:
    return str(row.get(SOURCE) or f"record {row.get(RECORD_NUMBER, '')} of the stream".replace("  ", " "))
