"""Evaluate a PRM on a benchmark: `accelerate launch -m trainer.evaluate --model M --benchmark processbench
--output-dir D`.

Writes `predictions.jsonl` (step probabilities; `--predictions` reads them again, without a model), `results.json`,
`results.md`, and `evaluation_results.json`, the entries for a model card, which `--card-data` puts into one. With
several processes each scores a share. `python -m trainer.evaluate --help` lists the options.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env

from hub_card.errors import one_line_errors
from modeling_prm import PRMForStepScoring, PRMProcessor
from modeling_prm.scoring import PRMVerifier

from .benchmark_report import add_to_card, card_results, markdown
from .benchmark_results import (
    FROM_MODEL,
    Prediction,
    evaluate_predictions,
    problem_hash,
    read_predictions,
    write_predictions,
)
from .benchmarks import HUB_IDS, PRMBENCH, PROCESSBENCH, BenchmarkItem, read_benchmark
from .command_line import choose_dtype, parse_options, set_up_logging
from .conversation_data import score_records
from .data_files import is_hub_id

logger = logging.getLogger(__name__)

PREDICTIONS_FILE, RESULTS_FILE, TABLE_FILE = "predictions.jsonl", "results.json", "results.md"
CARD_RESULTS_FILE = "evaluation_results.json"


@dataclass
class EvaluateArguments:
    """Options of the command line."""

    benchmark: str = field(
        metadata={"help": "processbench, prmbench, or a file, folder or Hub id of labelled solutions."}
    )
    output_dir: str = field(metadata={"help": "A folder for predictions and results."})
    model: str | None = field(default=None, metadata={"help": "The PRM: a folder or a Hub id."})
    predictions: str | None = field(
        default=None, metadata={"help": f"A {PREDICTIONS_FILE} of an earlier run, in place of --model."}
    )
    revision: str = field(default="main", metadata={"help": "Revision of a PRM on the Hub."})
    data: str | None = field(
        default=None,
        metadata={"help": f"Where it is: a file, folder or Hub id; by default {', '.join(HUB_IDS.values())}."},
    )
    split: str | None = field(
        default=None, metadata={"help": "A split of data on the Hub; by default all subsets of ProcessBench."}
    )
    threshold_from: str | None = field(
        default=None,
        metadata={
            "help": "Where the threshold is chosen: a subset, 'held-out' for a part of the problems (either is left "
            "out of the results), or 'model' for that of its config. By default gsm8k for processbench, else model."
        },
    )
    threshold: float | None = field(default=None, metadata={"help": "A threshold, in place of --threshold-from."})
    threshold_metric: Literal["processbench_f1", "error_f1", "balanced_accuracy", "step_accuracy"] | None = field(
        default=None, metadata={"help": "What it is chosen by; error_f1 for prmbench, else processbench_f1."}
    )
    held_out_fraction: float = field(default=0.2, metadata={"help": "Share of the problems that is held out."})
    seed: int = field(default=0, metadata={"help": "Chooses the problems that are held out."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata={"help": "Dtype of the backbone's weights; auto is bfloat16 where the device computes in it."},
    )
    max_tokens_per_batch: int | None = field(
        default=None, metadata={"help": "Most tokens in one forward pass, padding included."}
    )
    card_data: str | None = field(
        default=None,
        metadata={"help": "A card_data.json to put the results into, such as that in the model's folder."},
    )

    def __post_init__(self) -> None:
        if (self.model is None) == (self.predictions is None):
            raise ValueError("give --model to score with, or --predictions of an earlier run, and not both")
        if self.threshold is not None and self.threshold_from is not None:
            raise ValueError("give --threshold or --threshold-from, not both")

    @property
    def threshold_source(self) -> str | float:
        """Where the threshold is from, as `choose` takes it."""
        if self.threshold is not None:
            return self.threshold
        return self.threshold_from or ("gsm8k" if self.benchmark == PROCESSBENCH else FROM_MODEL)


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Evaluate as the options say; returns what `results.json` holds, on the main process."""
    (options,) = parse_options(
        (EvaluateArguments,),
        argv,
        prog="trainer.evaluate",
        usage="%(prog)s --model MODEL --benchmark processbench|prmbench|DATA --output-dir DIR [options]",
        description="Evaluate a process reward model on a benchmark. Start it with `accelerate launch -m "
        "trainer.evaluate` for several processes.",
    )
    # Without saying so, processes on CPUs would not find each other, and each would score all.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    set_up_logging(main_process=state.is_main_process)
    folder = Path(options.output_dir)
    with one_line_errors():
        if options.predictions is not None:
            predictions = read_predictions(options.predictions)
        else:
            _check_new(folder)
            items = read_benchmark(options.benchmark, options.data, split=options.split)
            check_subset(options.threshold_source, items)
            predictions = score_items(items, load_verifier(options, state.device), options.max_tokens_per_batch)
        if not state.is_main_process:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        if options.predictions is None:
            write_predictions(predictions, folder / PREDICTIONS_FILE)  # now, so that what comes next cannot lose them
        results = report(predictions, options)
    return results


def report(predictions: Sequence[Prediction], options: EvaluateArguments) -> dict[str, Any]:
    """Compute the results, write them into the output folder and the card, and print the table."""
    _warn_of_errors(predictions)
    named = options.benchmark in (PROCESSBENCH, PRMBENCH)
    results = evaluate_predictions(
        predictions,
        benchmark=options.benchmark if named else predictions[0].subset,
        threshold_from=options.threshold_source,
        metric=options.threshold_metric,
        held_out_fraction=options.held_out_fraction,
        seed=options.seed,
    )
    source = options.data or HUB_IDS.get(options.benchmark, options.benchmark)
    on_hub = options.predictions is None and is_hub_id(source)
    note = "" if on_hub or not named else f"Read from a file or folder, {Path(options.predictions or source).name}."
    entries = card_results(results, dataset_id=source if on_hub else None, note=note)
    folder = Path(options.output_dir)
    # A local path says nothing to others.
    table = markdown(results, model=options.model if options.model and is_hub_id(options.model) else None)
    _write_json(folder / RESULTS_FILE, {"options": dataclasses.asdict(options), **results})
    _write_json(folder / CARD_RESULTS_FILE, [dataclasses.asdict(entry) for entry in entries])
    (folder / TABLE_FILE).write_text(table, encoding="utf-8")
    if options.card_data is not None:
        add_to_card(Path(options.card_data), entries)
    print(f"{table}\nWritten to {folder}")
    return results


def check_subset(threshold_from: str | float, items: Sequence[BenchmarkItem]) -> None:
    """Refuse a subset that is not there before anything is scored.

    Raises:
        ValueError: it is not there, or all there is.
    """
    subsets = {item.subset for item in items}
    if not isinstance(threshold_from, str) or threshold_from in (FROM_MODEL, "held-out"):
        return
    if threshold_from not in subsets or len(subsets) == 1:
        raise ValueError(
            f"--threshold-from {threshold_from}: it must be one of several subsets, which are "
            f"{', '.join(sorted(subsets))}; give another, held-out, model, or a --threshold"
        )


def load_verifier(options: EvaluateArguments, device: torch.device) -> PRMVerifier:
    """The PRM that `--model` names, on a device."""
    dtype = choose_dtype(options.dtype, device)
    model = PRMForStepScoring.from_pretrained(options.model, revision=options.revision, dtype=dtype)
    processor = PRMProcessor.from_pretrained(options.model, revision=options.revision)
    return PRMVerifier(model.to(device), processor)


def score_items(
    items: Sequence[BenchmarkItem], verifier: Any, max_tokens_per_batch: int | None = None
) -> list[Prediction]:
    """Score all solutions; each process a share of about the same length, and all get all of them in order.

    Args:
        items: N solutions.
        verifier: a `PRMVerifier`, or anything with its `score_solutions` and `threshold`.
        max_tokens_per_batch: as `score_solutions` takes it.
    """
    state = PartialState()
    order = sorted(range(len(items)), key=lambda i: (-len(items[i].problem) - sum(map(len, items[i].steps)), i))
    mine = order[state.process_index :: state.num_processes]
    results = score_records(
        verifier,
        [items[row].problem for row in mine],
        [list(items[row].steps) for row in mine],
        [items[row].conversation for row in mine],
        max_tokens_per_batch=max_tokens_per_batch,
        on_error="record",
        show_progress=None if state.is_main_process else False,
    )
    scored = []
    for place, (row, result) in enumerate(zip(mine, results, strict=True)):
        item = items[row]
        # The verifier counts through the share.
        error = (
            None if result.error is None else re.sub(rf"\b(?:solution|conversation) {place}\b", item.id, result.error)
        )
        scored.append(
            (
                row,
                Prediction(
                    id=item.id,
                    subset=item.subset,
                    generator=item.generator,
                    problem_hash=problem_hash(item.problem),
                    labels=item.labels,
                    step_probs=None if result.step_probs is None else tuple(result.step_probs),
                    error=error,
                    model_threshold=verifier.threshold,
                ),
            )
        )
    gathered = dict(gather_object(scored))
    return [gathered[row] for row in range(len(items))]


def _check_new(folder: Path) -> None:
    if (folder / PREDICTIONS_FILE).exists():
        raise ValueError(
            f"{folder} holds {PREDICTIONS_FILE} of an earlier run; give it as --predictions, or another --output-dir"
        )


def _warn_of_errors(predictions: Sequence[Prediction]) -> None:
    errors = [prediction for prediction in predictions if prediction.error is not None]
    if errors:
        logger.warning(
            "%d of %d solutions could not be scored; the first, %s: %s",
            len(errors),
            len(predictions),
            errors[0].id,
            errors[0].error,
        )


def _write_json(file: Path, data: Any) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
