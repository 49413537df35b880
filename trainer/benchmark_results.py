"""What a benchmark says of a PRM: step probabilities in a file, the threshold, and the results.

    predictions = read_predictions("predictions.jsonl")
    results = evaluate_predictions(predictions, benchmark="processbench", threshold_from="gsm8k")
    print(markdown(results))

The threshold is never chosen on what is reported: the subset, or the held-out part of the problems, that it is chosen
on is left out of every number.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modeling_prm.step_loss import IGNORED_LABEL

from .benchmarks import PRMBENCH, Judgement, first_error_of, prmbench_scores, processbench_scores
from .calibration import choose_threshold
from .metrics import CORRECT_FROM, FloatArray, reliability_table, step_metrics
from .step_index import PREFIX, StepIndexPredictor, step_index_metrics

FROM_MODEL, FROM_HELD_OUT, FROM_NUMBER = "model", "held-out", "given"
# Later steps are few, and come together in the table of positions.
LAST_POSITION = 10
_SUBSET_AVERAGE = "average"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Step probabilities of one solution of a benchmark; all that results are computed from.

    Args:
        id, subset, generator: as in `BenchmarkItem`.
        problem_hash: SHA-256 of the problem, for telling problems apart.
        labels: S labels.
        step_probs: S probabilities, None where the solution could not be scored.
        error: why it could not.
        model_threshold: below it, the model calls a step wrong by itself.
    """

    id: str
    subset: str
    generator: str | None
    problem_hash: str
    labels: tuple[float, ...]
    step_probs: tuple[float, ...] | None
    error: str | None
    model_threshold: float

    def __post_init__(self) -> None:
        if self.step_probs is not None:
            if len(self.step_probs) != len(self.labels):
                raise ValueError(
                    f"{len(self.step_probs)} step_probs for {len(self.labels)} labels; one a step is needed"
                )
            if any(isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1 for p in self.step_probs):
                raise ValueError(f"step_probs must be in [0, 1], got {self.step_probs}")
        if not all(isinstance(y, (int, float)) and (0 <= y <= 1 or y == IGNORED_LABEL) for y in self.labels):
            raise ValueError(f"labels must be in [0, 1] or {IGNORED_LABEL:g}, got {self.labels}")

    def judgement(self, threshold: float) -> Judgement:
        """For each step whether it is called wrong, None where the solution was not scored."""
        return None if self.step_probs is None else [prob < threshold for prob in self.step_probs]


def problem_hash(problem: str) -> str:
    """Of a problem's text, with white space and case made equal."""
    return hashlib.sha256(" ".join(problem.split()).casefold().encode()).hexdigest()


def write_predictions(predictions: Sequence[Prediction], file: str | os.PathLike[str]) -> None:
    """A JSON line each; the texts of the benchmark are not in it."""
    lines = (json.dumps(asdict(prediction), allow_nan=False) + "\n" for prediction in predictions)
    Path(file).write_text("".join(lines), encoding="utf-8")


def read_predictions(file: str | os.PathLike[str]) -> list[Prediction]:
    """What `write_predictions` wrote.

    Raises:
        OSError, ValueError: it cannot be read, naming line and reason.
    """
    predictions = []
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            for name in ("labels", "step_probs"):
                if row[name] is not None:
                    row[name] = tuple(row[name])
            predictions.append(Prediction(**row))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file}:{number} is no prediction ({error}); write it with trainer.evaluate") from error
    if not predictions:
        raise ValueError(f"{file} holds no prediction; write it with trainer.evaluate")
    return predictions


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """A threshold and where it is from.

    Args:
        value: below it, a step is called wrong.
        chosen_on: `"model"` (its config), `"given"`, `"held-out"`, or a subset's name.
        num_solutions: scored solutions it was chosen on, 0 where it was not chosen.
        metric: what it was chosen by, None where it was not chosen.
        metric_there: that metric's value on those solutions, which is too good for others.
    """

    value: float
    chosen_on: str
    num_solutions: int = 0
    metric: str | None = None
    metric_there: float | None = None


def choose(
    predictions: Sequence[Prediction],
    threshold_from: str | float,
    *,
    metric: str,
    held_out_fraction: float = 0.2,
    seed: int = 0,
) -> tuple[Threshold, list[Prediction]]:
    """The threshold, and the predictions that may be reported with it.

    Args:
        predictions: all of a benchmark.
        threshold_from: a number; `"model"` for that of its config; `"held-out"` for a part of the problems, all
            solutions of one together; or the name of a subset.
        metric: one of `THRESHOLD_METRICS`.
        held_out_fraction: share of the problems to hold out, strictly between 0 and 1.
        seed: chooses them.

    Raises:
        ValueError: there is no such subset, nothing is left to report, or the solutions chosen on cannot tell.
    """
    if not isinstance(threshold_from, str):
        if not 0.0 <= threshold_from <= 1.0:
            raise ValueError(f"the threshold must be in [0, 1], got {threshold_from}")
        return Threshold(value=float(threshold_from), chosen_on=FROM_NUMBER), list(predictions)
    if threshold_from == FROM_MODEL:
        values = sorted({prediction.model_threshold for prediction in predictions})
        if len(values) > 1:
            raise ValueError(f"the predictions are of models with other thresholds, {values}; give a number")
        return Threshold(value=values[0], chosen_on=FROM_MODEL), list(predictions)
    if threshold_from == FROM_HELD_OUT:
        if not 0.0 < held_out_fraction < 1.0:
            raise ValueError(f"the held-out share must be between 0 and 1, both excluded, got {held_out_fraction}")
        order = sorted(
            {p.problem_hash for p in predictions}, key=lambda h: hashlib.sha256(f"{seed}\n{h}".encode()).digest()
        )
        held_out = set(order[: round(held_out_fraction * len(order))])
        chosen = [prediction.problem_hash in held_out for prediction in predictions]
    else:
        subsets = sorted({prediction.subset for prediction in predictions})
        if threshold_from not in subsets:
            raise ValueError(
                f"the threshold cannot be chosen on {threshold_from!r}: the subsets are {', '.join(subsets)}; name one "
                "of them, or 'held-out' for a part of the problems, 'model' for that of its config, or a number"
            )
        chosen = [prediction.subset == threshold_from for prediction in predictions]
    known = [p for p, is_known in zip(predictions, chosen, strict=True) if is_known and p.step_probs is not None]
    reported = [p for p, is_known in zip(predictions, chosen, strict=True) if not is_known]
    if not known or not reported:
        raise ValueError(
            f"the threshold chosen on {threshold_from!r} leaves {len(known)} solutions to choose on and "
            f"{len(reported)} to report; take another part, 'model', or a number"
        )
    value, best = choose_threshold(*arrays(known), metric=metric)
    return (
        Threshold(value=value, chosen_on=threshold_from, num_solutions=len(known), metric=metric, metric_there=best),
        reported,
    )


def arrays(predictions: Sequence[Prediction]) -> tuple[FloatArray, FloatArray]:
    """Step probabilities and labels of scored solutions, (N, S), padded with 0 and -100."""
    shape = len(predictions), max(len(prediction.labels) for prediction in predictions)
    probs, labels = np.zeros(shape), np.full(shape, IGNORED_LABEL)
    for row, prediction in enumerate(predictions):
        probs[row, : len(prediction.labels)] = prediction.step_probs
        labels[row, : len(prediction.labels)] = prediction.labels
    return probs, labels


def index_only_judgements(predictions: Sequence[Prediction], metric: str) -> list[Judgement]:
    """What is called wrong by whoever sees the step's number alone.

    Each half of the solutions (every other one of the scored) is judged by the shares of wrong steps at each number
    in the other half, with the threshold that is best there.
    """
    judgements: list[Judgement] = [None] * len(predictions)
    rows = [row for row, prediction in enumerate(predictions) if _is_usable(prediction)]
    for known, hidden in ((rows[::2], rows[1::2]), (rows[1::2], rows[::2])):
        if not known or not hidden:
            continue
        _, labels = arrays([predictions[row] for row in known])
        predictor = StepIndexPredictor.fit(labels)
        threshold = predictor.threshold
        with contextlib.suppress(ValueError):  # of one kind of solutions only, for which every threshold is as good
            threshold, _ = choose_threshold(predictor.predict(labels), labels, metric=metric)
        for row in hidden:
            last = len(predictor.probs) - 1
            judgements[row] = [predictor.probs[min(i, last)] < threshold for i in range(len(predictions[row].labels))]
    return judgements


def evaluate_predictions(
    predictions: Sequence[Prediction],
    *,
    benchmark: str,
    threshold_from: str | float,
    metric: str | None = None,
    held_out_fraction: float = 0.2,
    seed: int = 0,
) -> dict[str, Any]:
    """All results of a benchmark, as JSON has them (NaN is None).

    Args:
        predictions: of all solutions.
        benchmark: `"processbench"`, `"prmbench"`, or the data's name.
        threshold_from, held_out_fraction, seed: as in `choose`.
        metric: what the threshold is chosen by; by default the F1 of the error class for PRMBench, whose solutions all
            have one but in one category, and ProcessBench's F1 otherwise.

    Returns:
        `benchmark`, `threshold`, `num_solutions`, `num_unscored` (of those reported), `subsets` (scores by subset, with
        `index_only_*`), `average` (plain mean of the subsets reported; for PRMBench `overall`, pooled), `generators`
        (the same by generator, `average` among them, where they are known), `steps` (`step_metrics` of the scored
        solutions pooled, calibration among them), `index_only`, `positions` and `reliability`.

    Raises:
        ValueError: as `choose`; or no solution that may be reported has a score and a label.
    """
    metric = metric or ("error_f1" if benchmark == PRMBENCH else "processbench_f1")
    threshold, reported = choose(
        predictions, threshold_from, metric=metric, held_out_fraction=held_out_fraction, seed=seed
    )
    usable = [prediction for prediction in reported if _is_usable(prediction)]
    if not usable:
        raise ValueError("no solution that may be reported has a score and a label; look at the errors in predictions")
    by_index = dict(zip(map(id, reported), index_only_judgements(reported, metric), strict=True))
    protocol = prmbench_scores if benchmark == PRMBENCH else processbench_scores

    def scores(part: Sequence[Prediction]) -> dict[str, float]:
        labels = [prediction.labels for prediction in part]
        own = protocol([prediction.judgement(threshold.value) for prediction in part], labels)
        index = protocol([by_index[id(prediction)] for prediction in part], labels)
        # A solution that could not be scored has no baseline either: both see the same solutions.
        counted = {name: value for name, value in index.items() if not name.startswith("num_")}
        return {**own, **{PREFIX + name: value for name, value in counted.items()}}

    results: dict[str, Any] = {
        "benchmark": benchmark,
        "threshold": asdict(threshold),
        "num_solutions": len(reported),
        "num_unscored": sum(prediction.step_probs is None for prediction in reported),
        "subsets": _by(reported, lambda prediction: prediction.subset, scores),
    }
    if benchmark == PRMBENCH:
        results["overall"] = scores(reported)
    else:
        results["average"] = _average(results["subsets"])
    if any(prediction.generator for prediction in reported):
        results["generators"] = {
            name: {**parts, _SUBSET_AVERAGE: _average(parts)}
            for name, parts in _by(
                reported,
                lambda prediction: prediction.generator or "unknown",
                lambda part: _by(part, lambda prediction: prediction.subset, scores),
            ).items()
        }
    probs, labels = arrays(usable)
    results["steps"] = step_metrics(probs, labels, threshold=threshold.value)
    results["index_only"] = _index_only_ranking(labels)
    results["positions"] = positions(usable, threshold.value)
    results["reliability"] = asdict(reliability_table(probs, labels))
    finite: dict[str, Any] = _finite(results)
    return finite


def positions(predictions: Sequence[Prediction], threshold: float) -> list[dict[str, Any]]:
    """By the step's number: labelled steps, share of wrong ones, accuracy, and mean probability to be correct.

    Steps after the tenth come together, as `"11+"`.
    """
    rows: dict[int, list[tuple[float, float]]] = {}
    for prediction in predictions:
        for index, (prob, label) in enumerate(zip(prediction.step_probs or (), prediction.labels, strict=True)):
            if label != IGNORED_LABEL:
                rows.setdefault(min(index, LAST_POSITION), []).append((prob, label))
    return [
        {
            "position": f"{index + 1}+" if index == LAST_POSITION else str(index + 1),
            "num_steps": len(steps),
            "error_share": sum(label < CORRECT_FROM for _, label in steps) / len(steps),
            "accuracy": sum((prob < threshold) == (label < CORRECT_FROM) for prob, label in steps) / len(steps),
            "mean_prob": sum(prob for prob, _ in steps) / len(steps),
        }
        for index, steps in sorted(rows.items())
    ]


def _index_only_ranking(labels: FloatArray) -> dict[str, float]:
    metrics = step_index_metrics(labels, None)
    return {name.removeprefix(PREFIX): value for name, value in metrics.items()}


def _is_usable(prediction: Prediction) -> bool:
    return prediction.step_probs is not None and first_error_of(prediction.labels) is not None


def _by(
    predictions: Sequence[Prediction], key: Callable[[Prediction], str], measure: Callable[[list[Prediction]], Any]
) -> dict[str, Any]:
    parts: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        parts.setdefault(key(prediction), []).append(prediction)
    return {name: measure(part) for name, part in parts.items()}


def _average(parts: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Plain means over parts, each counting as much; NaN where one of them is."""
    names = [name for name in next(iter(parts.values())) if not name.startswith("num_")]
    return {name: sum(part[name] for part in parts.values()) / len(parts) for name in names}


def _finite(value: Any) -> Any:
    """Data as JSON has them, which knows no NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
