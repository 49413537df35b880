"""The results of a benchmark in words: a Markdown text, and entries for a model card."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hub_card.card import CardData, EvaluationResult

from .benchmark_results import FROM_HELD_OUT, FROM_MODEL, FROM_NUMBER
from .benchmarks import PRMBENCH, PROCESSBENCH
from .step_index import PREFIX

NAMES = {PROCESSBENCH: "ProcessBench", PRMBENCH: "PRMBench"}
_STEPS_SHOWN = ("roc_auc", "average_precision", "step_accuracy", "balanced_accuracy", "error_f1", "brier", "ece")


def describe_threshold(threshold: Mapping[str, Any]) -> str:
    """The threshold and where it is from, in a sentence."""
    value, chosen_on = threshold["value"], threshold["chosen_on"]
    if chosen_on == FROM_MODEL:
        return f"The threshold is {value:.4g}, that of the model's config."
    if chosen_on == FROM_NUMBER:
        return f"The threshold is {value:.4g}, as given."
    where = "a held-out part of the problems" if chosen_on == FROM_HELD_OUT else chosen_on
    return (
        f"The threshold {value:.4g} was chosen by {threshold['metric']} on {where} ({threshold['num_solutions']} "
        f"solutions, {threshold['metric_there']:.3f} there), which is left out of all numbers here."
    )


def markdown(results: Mapping[str, Any], *, model: str | None = None) -> str:
    """Results as `evaluate_predictions` gives them, as a Markdown text with tables; scores in per cent."""
    name = NAMES.get(results["benchmark"], results["benchmark"])
    head = f"{results['num_solutions']:,} solutions, {results['num_unscored']:,} of them could not be scored."
    lines = [f"# {name}{f' of {model}' if model else ''}", "", f"{head} {describe_threshold(results['threshold'])}", ""]
    if results["benchmark"] == PRMBENCH:
        columns = ("prm_score", "f1", "negative_f1", f"{PREFIX}prm_score")
        titles = ("PRMScore", "F1 (correct)", "F1 (wrong)", "PRMScore of the index alone")
        rows = {**results["subsets"], "**overall**": results["overall"]}
        lines += _table("category", titles, columns, rows)
    else:
        columns = ("f1", "acc_error", "acc_correct", f"{PREFIX}f1")
        titles = ("F1", "error", "correct", "F1 of the index alone")
        rows = {**results["subsets"], "**average**": results["average"]}
        lines += _table("subset", titles, columns, rows)
    if "generators" in results:
        subsets = [*results["subsets"], "average"]
        rows = {
            generator: {subset: part[subset]["f1"] for subset in part}
            for generator, part in results["generators"].items()
        }
        lines += ["", "F1 by the model that wrote the solutions:", "", *_table("generator", subsets, subsets, rows)]
    rows = {"this model": results["steps"], "step's index alone": results["index_only"]}
    lines += ["", "All labelled steps:", "", *_table("", _STEPS_SHOWN, _STEPS_SHOWN, rows)]
    lines += ["", "By the step's number:", "", "| step | steps | wrong | accuracy | mean probability |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    lines += [
        f"| {row['position']} | {row['num_steps']:,} | {_percent(row['error_share'])} | {_percent(row['accuracy'])} | "
        f"{row['mean_prob']:.3f} |"
        for row in results["positions"]
    ]
    return "\n".join(lines) + "\n"


def card_results(
    results: Mapping[str, Any], *, dataset_id: str | None = None, note: str = ""
) -> list[EvaluationResult]:
    """Entries for a model card: one a subset of ProcessBench and one for all of it, one for other benchmarks.

    Args:
        results: as `evaluate_predictions` gives them.
        dataset_id: Hub id of the data, where it was read from there.
        note: what to add to how it was measured.
    """
    benchmark = results["benchmark"]
    name = NAMES.get(benchmark, benchmark)
    note = " ".join(part for part in (describe_threshold(results["threshold"]), note) if part)
    if results["num_unscored"]:
        note += f" {results['num_unscored']} of {results['num_solutions']} solutions could not be scored."
    metrics: dict[str, float | None] = {}
    entries = []
    if benchmark == PRMBENCH:
        metrics["prm_score"] = results["overall"]["prm_score"]
        metrics[f"{PREFIX}prm_score"] = results["overall"][f"{PREFIX}prm_score"]
        metrics |= {f"prm_score_{category}": part["prm_score"] for category, part in results["subsets"].items()}
    else:
        metrics |= _first_error_metrics(results["average"])
        if benchmark == PROCESSBENCH:
            note += f" F1 and accuracies are the mean of {', '.join(results['subsets'])}."
            entries = [
                EvaluationResult(
                    dataset=name,
                    dataset_id=dataset_id,
                    split=subset,
                    metrics=_known(_first_error_metrics(part)),
                    note=describe_threshold(results["threshold"]),
                )
                for subset, part in results["subsets"].items()
            ]
    metrics |= {metric: results["steps"][metric] for metric in (*_STEPS_SHOWN, "num_steps", "num_solutions")}
    metrics[f"{PREFIX}roc_auc"] = results["index_only"]["roc_auc"]
    whole = EvaluationResult(dataset=name, dataset_id=dataset_id, metrics=_known(metrics), note=note)
    return [whole, *entries]


def add_to_card(file: Path, entries: Sequence[EvaluationResult]) -> None:
    """Put entries into a `card_data.json`, in place of those of the same datasets; it is made where there is none.

    Raises:
        ValueError: the file is not the data of a model card.
    """
    card = CardData.from_json(file.read_text(encoding="utf-8")) if file.is_file() else CardData()
    measured = {entry.dataset for entry in entries}
    kept = [result for result in card.results if result.dataset not in measured]
    card = dataclasses.replace(card, results=(*kept, *entries))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(card.to_json(), encoding="utf-8")


def _first_error_metrics(part: Mapping[str, float]) -> dict[str, float | None]:
    return {
        "processbench_f1": part["f1"],
        "processbench_acc_error": part["acc_error"],
        "processbench_acc_correct": part["acc_correct"],
        f"{PREFIX}processbench_f1": part[f"{PREFIX}f1"],
    }


def _known(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if value is not None}


def _table(
    first: str, titles: Sequence[str], columns: Sequence[str], rows: Mapping[str, Mapping[str, float]]
) -> list[str]:
    lines = [f"| {first} | {' | '.join(titles)} |", f"| --- |{' ---: |' * len(titles)}"]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(_percent(row.get(column)) for column in columns)} |")
    return lines


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
