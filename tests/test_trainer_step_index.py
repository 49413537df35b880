"""The predictor that sees the step's number alone, against rates and metrics worked by hand."""

from __future__ import annotations

import math

import datasets
import numpy as np
import pytest

from trainer.labels import LabelRules
from trainer.metrics import step_metrics
from trainer.step_index import StepIndexGuard, StepIndexPredictor, labels_of, step_index_metrics

# Correct at index 0: 3 of 4, at 1: 1 of 3, at 2: 0 of 1.
KNOWN = np.array([[1, 1, 0], [1, 0, -100], [1, 0, -100], [0, -100, -100]], float)
OTHER = np.array([[1, 1, 0, 0], [1, 0, 1, -100], [1, -100, -100, -100]], float)


def test_rates_by_hand() -> None:
    predictor = StepIndexPredictor.fit(KNOWN)
    first = (3 + 4 / 8) / 5  # 0.7
    second = (1 + first) / 4
    third = (0 + second) / 2
    assert predictor.probs == pytest.approx((first, second, third), abs=1e-12)
    wide = predictor.predict(np.zeros((2, 5)))
    np.testing.assert_allclose(wide, [[first, second, third, third, third]] * 2)


def test_its_threshold_is_the_best_on_what_it_was_fitted_on() -> None:
    labels = np.array([[1, 0], [1, 0], [1, 0], [1, -100]], float)
    predictor = StepIndexPredictor.fit(labels)
    # p = 0.85 at index 0 and 0.2125 at index 1: any threshold between them finds every error, and no false one.
    assert predictor.probs[1] < predictor.threshold <= predictor.probs[0]
    assert step_metrics(predictor.predict(labels), labels, threshold=predictor.threshold)["processbench_f1"] == 1.0
    # Here p is 0.967 and 0.656: below 0.5 nothing would be called wrong. Between them the error is found, and of the
    # three correct solutions the longer one is called wrong: 2 * 1 * 2/3 / (5/3).
    labels = np.array([[1, 0], [1, 1], [1, -100], [1, -100]], float)
    predictor = StepIndexPredictor.fit(labels)
    found = step_index_metrics(labels, predictor)
    assert found["index_only_processbench_f1"] == pytest.approx(0.8)
    # With solutions of one kind only, there is none to choose.
    assert StepIndexPredictor.fit(KNOWN).threshold == 0.5
    assert StepIndexPredictor.fit(np.ones((2, 2))).threshold == 0.5


def test_metrics_of_a_predictor_fitted_elsewhere() -> None:
    predictor = StepIndexPredictor.fit(KNOWN)
    found = step_index_metrics(OTHER, predictor)
    # Index of correct steps: 0 1 0 2 0, of wrong ones: 2 3 1; indices 2 and 3 tie.
    # Above (2, 3, 1): from index 0 1 1 1, from 1 1 1 1/2, from 2 1/2 1/2 0.
    assert found["index_only_roc_auc"] == pytest.approx((3 * 3 + 2.5 + 1) / 15)
    probs = np.array([[*predictor.probs, predictor.probs[-1]]] * 3)
    expected = step_metrics(probs, OTHER, threshold=predictor.threshold)
    of_the_data = {"error_share", "majority_accuracy", "num_steps", "num_solutions"}
    assert found.keys() == {f"index_only_{name}" for name in expected.keys() - of_the_data}
    for name in expected.keys() - of_the_data:
        assert found[f"index_only_{name}"] == pytest.approx(expected[name], nan_ok=True), name


def test_without_training_labels_each_half_is_predicted_by_the_other() -> None:
    labels = np.array([[1, 1, 0, 0], [1, 1, 0, -100], [-100] * 4, [1, 0, 1, -100], [1, -100, 0, -100]], float)
    found = step_index_metrics(labels, None)
    # The row without a label goes; then every other one.
    halves = labels[[0, 3]], labels[[1, 4]]
    pairs = ((halves[0], halves[1]), (halves[1], halves[0]))
    both = [step_index_metrics(hidden, StepIndexPredictor.fit(known)) for known, hidden in pairs]
    assert {metrics["index_only_roc_auc"] for metrics in both} != {found["index_only_roc_auc"]}
    for name, value in found.items():
        values = [metrics[name] for metrics in both if not math.isnan(metrics[name])]
        expected = sum(values) / len(values) if values else math.nan
        assert value == pytest.approx(expected, nan_ok=True), name
    assert all(math.isnan(value) for value in step_index_metrics(labels[:1], None).values())
    with pytest.raises(ValueError, match="at least one labelled step"):
        step_index_metrics(labels[2:3], None)


def test_labels_that_do_not_hang_on_the_index_give_chance_and_others_do_not() -> None:
    rng = np.random.default_rng(0)
    even = (rng.random((2000, 8)) < 0.7).astype(float)
    # Correct with 0.95, 0.85, ..., 0.25.
    falling = (rng.random((2000, 8)) < 0.95 - 0.1 * np.arange(8)).astype(float)
    for predictor in (None, StepIndexPredictor.fit(even[:1000])):
        # Leaving out one solution at a time would give about 0.41 here: equal indices lie the wrong way round.
        assert step_index_metrics(even[1000:], predictor)["index_only_roc_auc"] == pytest.approx(0.5, abs=0.02)
    for predictor in (None, StepIndexPredictor.fit(falling[:1000])):
        assert step_index_metrics(falling[1000:], predictor)["index_only_roc_auc"] > 0.72


def test_training_labels_are_those_that_evaluation_takes() -> None:
    rows = [
        {"labels": [1.0, 0.6, 0.2, 1.0], "step_positions": [1, 2, 3]},
        {"labels": [-100.0, 0.0], "step_positions": [4, 5]},
    ]
    rules = LabelRules(after_first_error="mask").for_evaluation()
    found = labels_of(datasets.Dataset.from_list(rows), rules)
    # Hardened, without the step that did not fit, and with the steps that training masks.
    assert found.tolist() == [[1.0, 1.0, 0.0], [-100.0, 0.0, -100.0]]
    classes = [{"labels": [0.0, 2.0, 1.0], "step_positions": [1, 2, 3]}]
    rules = LabelRules(class_weights=(1.0, 0.5, 0.0)).for_evaluation()
    assert labels_of(datasets.Dataset.from_list(classes), rules, [1.0, 0.5, 0.0]).tolist() == [[1.0, 0.0, 0.5]]
    unlabelled = datasets.Dataset.from_list([{"labels": [-100.0], "step_positions": [1]}])
    for other in (None, unlabelled, datasets.Dataset.from_list(rows).remove_columns("labels")):
        assert labels_of(other, rules) is None
    assert labels_of(datasets.Dataset.from_list(rows).to_iterable_dataset(), rules) is None


def test_many_training_records_are_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.step_index._MOST_RECORDS", 3)
    rows = [{"labels": [number / 10], "step_positions": [1]} for number in range(7)]
    found = labels_of(datasets.Dataset.from_list(rows), LabelRules(soft_labels="keep"))
    np.testing.assert_allclose(found, [[0.0], [0.3], [0.6]], atol=1e-6)


def test_the_guard_reads_training_labels_once() -> None:
    calls = []

    def known() -> np.ndarray:
        calls.append(1)
        return KNOWN

    guard = StepIndexGuard(known)
    assert calls == []
    expected = step_index_metrics(OTHER, StepIndexPredictor.fit(KNOWN))
    assert guard(OTHER) == pytest.approx(expected, nan_ok=True)
    assert guard(OTHER) == pytest.approx(expected, nan_ok=True)
    assert calls == [1]
    alone = StepIndexGuard(lambda: None)
    assert alone(OTHER) == pytest.approx(step_index_metrics(OTHER, None), nan_ok=True)
