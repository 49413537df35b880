"""The tables of the study, from saved predictions alone; a run that is missing is named and the others are shown."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modeling_prm.configuration_prm import AGGREGATIONS
from modeling_prm.step_loss import IGNORED_LABEL
from trainer.benchmark_results import Prediction, positions
from trainer.selection import bootstrap_interval

from . import best_of
from .measures import METRICS, RESAMPLES, Fitted, Measured, all_right, fit, index_alone, interval, measure, sigmoid
from .plan import BEST_OF_SETS, DETECTION_SETS, RUNS, SHIFTED_SETS, Run
from .predictions import TRAIN_SET, Scored, has_logits, padded, read_scored, read_targets

FloatArray = npt.NDArray[np.float64]

VALIDATION, TEST = DETECTION_SETS
MAIN_RUNS = tuple(run for run in RUNS if run.data == "prmbench" and not run.name.startswith("short-"))
VARIANT_RUNS = tuple(run for run in RUNS if run.name.startswith("short-"))
BEST_OF_RUNS = tuple(run for run in RUNS if run.data != "prmbench")
COLUMNS = ("error F1", "balanced accuracy", "ROC AUC", "ProcessBench F1", "ECE", "ECE, scaled")
# Metrics of which lower is better have no place among the differences.
COMPARED = ("roc_auc", "error_f1", "balanced_accuracy", "processbench_f1")


def detection(results: Path) -> tuple[str, dict[str, Any]]:
    """Error detection on PRMBench's test part, the two rows that cost nothing first."""
    return _detection_table(results, MAIN_RUNS, TEST, baseline=None, title="Error detection, PRMBench's test part")


def variants(results: Path) -> tuple[str, dict[str, Any]]:
    """The variants on PRMBench's test part, with differences from the default that was trained as long."""
    title = "Variants, half as many tokens, PRMBench's test part"
    return _detection_table(results, VARIANT_RUNS, TEST, baseline="short-default", title=title)


def out_of_distribution(results: Path) -> tuple[str, dict[str, Any]]:
    """The main models on BIG-Bench-Mistake; thresholds and temperature are those of PRMBench's validation part."""
    texts, found = [], {}
    for name in SHIFTED_SETS:
        title = f"Out of distribution, {name.replace('-', ' ')}"
        text, values = _detection_table(results, MAIN_RUNS, name, baseline=None, title=title)
        texts.append(text)
        found[name] = values
    return "\n\n".join(texts), found


def _detection_table(
    results: Path, runs: Sequence[Run], name: str, *, baseline: str | None, title: str
) -> tuple[str, dict[str, Any]]:
    there, missing = _split(results, runs, (VALIDATION, name))
    if not there:
        return f"## {title}\n\n{_missing(missing)}", {"missing": missing}
    scored = {
        run.name: (read_scored(results, run.name, VALIDATION), read_scored(results, run.name, name)) for run in there
    }
    rows: dict[str, Measured] = {}
    known, hidden = scored[there[0].name]
    train = padded([target.labels for target in read_targets(results, TRAIN_SET)], IGNORED_LABEL)
    groups = [target.group for target in hidden.targets]
    free = {
        "every step right": (all_right(known.labels), all_right(hidden.labels)),
        "step's index alone": (index_alone(train, known.labels), index_alone(train, hidden.labels)),
    }
    for title_of, (validation, test) in free.items():
        rows[title_of] = measure(test, hidden.labels, groups, _fit_free(title_of, validation, known))
    for run in there:
        known, hidden = scored[run.name]
        fitted = fit(sigmoid(known.logits), known.labels, known.logits)
        rows[run.name] = measure(sigmoid(hidden.logits), hidden.labels, groups, fitted, logits=hidden.logits)
    lines = [f"## {title}", "", _facts(hidden), "", _header(("model", *COLUMNS))]
    for key, measured in rows.items():
        lines.append(_row([_title(key), *(_cell(measured, metric) for metric in METRICS)]))
    lines += ["", *_differences(rows, there, baseline)]
    if missing:
        lines += ["", _missing(missing)]
    return "\n".join(lines), {
        "rows": {key: _json(measured) for key, measured in rows.items()},
        "missing": missing,
    }


def _fit_free(title: str, probs: FloatArray, known: Scored) -> Fitted:
    """Whoever calls every step right has no threshold to choose."""
    if title == "every step right":
        return Fitted(
            thresholds=dict.fromkeys(("error_f1", "balanced_accuracy", "processbench_f1"), 0.5), temperature=None
        )
    return fit(probs, known.labels)


def _differences(rows: Mapping[str, Measured], there: Iterable[Run], baseline: str | None) -> list[str]:
    """Differences of models on the same resamples: from a baseline, or of the default from the others of its seed."""
    pairs = []
    for run in there:
        if baseline is not None:
            if run.name != baseline and baseline in rows:
                pairs.append((run.name, baseline))
        elif not run.name.startswith("default-"):
            own = f"default-{run.seed}"
            if own in rows:
                pairs.append((own, run.name))
        else:
            pairs.append((run.name, "step's index alone"))
    if not pairs:
        return []
    lines = [_header(("difference", *(COLUMNS[METRICS.index(metric)] for metric in COMPARED)))]
    for first, second in pairs:
        cells = []
        for metric in COMPARED:
            gap = rows[first].values[metric] - rows[second].values[metric]
            low, high = interval(rows[first].resampled[metric] - rows[second].resampled[metric])
            cells.append(f"{gap:+.3f} [{low:+.3f}, {high:+.3f}]")
        lines.append(_row([f"{_title(first)} minus {_title(second)}", *cells]))
    return lines


def step_positions(results: Path) -> tuple[str, dict[str, Any]]:
    """Accuracy on PRMBench's test part by the step's number, at the threshold of the best error F1."""
    there, missing = _split(results, MAIN_RUNS, DETECTION_SETS)
    title = "## Accuracy by the step's number, PRMBench's test part"
    if not there:
        return f"{title}\n\n{_missing(missing)}", {"missing": missing}
    found = {run.name: _positions(results, run.name) for run in there}
    first = found[there[0].name]
    lines = [title, "", _header(("step", "steps", "wrong", "every step right", *(_title(name) for name in found)))]
    for index, row in enumerate(first):
        cells = [f"{rows[index]['accuracy']:.3f}" for rows in found.values()]
        share = row["error_share"]
        lines.append(_row([row["position"], f"{row['num_steps']}", f"{share:.3f}", f"{1 - share:.3f}", *cells]))
    if missing:
        lines += ["", _missing(missing)]
    return "\n".join(lines), {"rows": found, "missing": missing}


def _positions(results: Path, name: str) -> list[dict[str, Any]]:
    known, hidden = read_scored(results, name, VALIDATION), read_scored(results, name, TEST)
    threshold = fit(sigmoid(known.logits), known.labels).thresholds["error_f1"]
    probs = sigmoid(hidden.logits)
    predictions = [
        Prediction(
            id=target.id,
            subset=TEST,
            generator=None,
            problem_hash=target.group,
            labels=target.labels,
            step_probs=tuple(row[: len(target.labels)].tolist()),
            error=None,
            model_threshold=threshold,
        )
        for target, row in zip(hidden.targets, probs, strict=True)
    ]
    return positions(predictions, threshold)


def best_of_n(results: Path) -> tuple[str, dict[str, Any]]:
    """Best of 4 on half of GSM8K's test problems, with differences from the majority and the best single model."""
    (name,) = BEST_OF_SETS
    there, missing = _split(results, BEST_OF_RUNS, BEST_OF_SETS)
    title = "## Best of 4, half of GSM8K's test problems"
    if not there:
        return f"{title}\n\n{_missing(missing)}", {"missing": missing}
    problems = best_of.by_problem(read_scored(results, there[0].name, name))
    values = best_of.free_choices(problems)
    free = list(values)
    for run in there:
        candidates = best_of.by_problem(read_scored(results, run.name, name))
        for aggregation in AGGREGATIONS:
            values[f"{run.title}: best by {aggregation}"] = best_of.chosen_by_score(candidates, aggregation)
        for aggregation in ("min", "product", "last"):
            values[f"{run.title}: vote weighted by {aggregation}"] = best_of.chosen_by_vote(candidates, aggregation)
    best_single = max((key for key in free if key.startswith("always ")), key=lambda key: values[key].mean())
    compared = ("majority vote", best_single)
    columns = [values[key] for key in values]
    columns += [values[key] - values[other] for other in compared for key in values]
    low, high = bootstrap_interval(np.stack(columns, axis=1), resamples=RESAMPLES, seed=0)
    lines = [title, "", f"{len(problems)} problems, {sum(len(p.targets) for p in problems)} solutions.", ""]
    lines.append(_header(("choice", "right, %", *(f"minus {other}" for other in compared))))
    found = {}
    for index, key in enumerate(values):
        cells = [f"{100 * values[key].mean():.1f} [{100 * low[index]:.1f}, {100 * high[index]:.1f}]"]
        for offset, other in enumerate(compared, start=1):
            place = index + offset * len(values)
            gap = (values[key] - values[other]).mean()
            cells.append(
                f"{100 * gap:+.1f} [{100 * low[place]:+.1f}, {100 * high[place]:+.1f}]" if gap or key != other else ""
            )
        lines.append(_row([key, *cells]))
        found[key] = {"right": float(values[key].mean()), "low": float(low[index]), "high": float(high[index])}
    if missing:
        lines += ["", _missing(missing)]
    return "\n".join(lines), {"rows": found, "missing": missing}


def trainings(results: Path) -> tuple[str, dict[str, Any]]:
    """What each run trained on, and how its loss fell: means over the first, the middle and the last fifth."""
    lines = ["## Trainings", "", _header(("run", "records", "tokens", "steps", "wrong", "optimizer steps", "loss"))]
    missing, found = [], {}
    for run in RUNS:
        file = results / run.name / "training.json"
        if not file.is_file():
            missing.append(run.name)
            continue
        row = found[run.name] = json.loads(file.read_text(encoding="utf-8"))
        losses = np.array([loss for _, loss in row["loss"]] or [math.nan])
        fifth = max(len(losses) // 5, 1)
        middle = len(losses) // 2 - fifth // 2
        shown = ", ".join(
            f"{part.mean():.3f}" for part in (losses[:fifth], losses[middle : middle + fifth], losses[-fifth:])
        )
        share = row["wrong_steps"] / row["labelled_steps"]
        numbers = [f"{row[key]:,}" for key in ("records", "tokens", "steps_of_solutions")]
        lines.append(_row([run.name, *numbers, f"{share:.3f}", str(row["optimizer_steps"]), shown]))
    if missing:
        lines += ["", _missing(missing)]
    return "\n".join(lines), {"rows": found, "missing": missing}


TABLES = {
    "detection": detection,
    "variants": variants,
    "out-of-distribution": out_of_distribution,
    "best-of-n": best_of_n,
    "positions": step_positions,
    "trainings": trainings,
}


def _split(results: Path, runs: Iterable[Run], sets: Sequence[str]) -> tuple[list[Run], list[str]]:
    """The runs that have scored all of these sets, and the names of the others."""
    there, missing = [], []
    for run in runs:
        if all(has_logits(results, run.name, name) for name in sets):
            there.append(run)
        else:
            missing.append(run.name)
    return there, missing


def _missing(names: Sequence[str]) -> str:
    return f"Not there yet: {', '.join(names)} (`python -m benchmarks.study train {' '.join(names)}`)."


def _facts(scored: Scored) -> str:
    labelled = scored.labels != IGNORED_LABEL
    wrong = (scored.labels == 0).sum() / labelled.sum()
    problems = len({target.group for target in scored.targets})
    has_error = (scored.labels == 0).any(axis=1).sum()
    return (
        f"{len(scored.targets)} solutions of {problems} problems, {has_error} of them with a wrong step; "
        f"{labelled.sum():,} labelled steps, {100 * wrong:.1f} % of them wrong. In brackets 95 % bootstrap intervals "
        "over problems."
    )


def _title(key: str) -> str:
    for run in RUNS:
        if run.name == key:
            return run.title if key.startswith("short-") else f"{run.title}, seed {run.seed}"
    return key


def _cell(measured: Measured, metric: str) -> str:
    value = measured.values[metric]
    if math.isnan(value):
        return ""
    low, high = measured.interval(metric)
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _json(measured: Measured) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for metric, value in measured.values.items():
        low, high = measured.interval(metric)
        numbers = {"value": value, "low": low, "high": high}
        found[metric] = {name: None if math.isnan(number) else round(number, 5) for name, number in numbers.items()}
    found["thresholds"] = dict(measured.fitted.thresholds)
    found["temperature"] = measured.fitted.temperature
    return found


def _header(names: Sequence[str]) -> str:
    return f"{_row(names)}\n|{' --- |' * len(names)}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
