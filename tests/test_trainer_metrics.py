"""Metrics over step probabilities, against numbers worked by hand."""

import math
import sys
import warnings
from typing import Any

import numpy as np
import pytest

from trainer.metrics import bce_from_logits, class_targets, reliability_table, step_metrics

# Six solutions. 0: first wrong step 1, found. 1: correct, judged so. 2: first wrong step 1, step 0 called.
# 3: correct, step 0 called. 4: first wrong step 0, found. 5: no label at all, left out.
LABELS = np.array([[1, 0, 0], [1, 1, -100], [1, 0, -100], [1, 1, -100], [0, 1, -100], [-100, -100, -100]], float)
PROBS = np.array([[0.9, 0.4, 0.8], [0.7, 0.6, -100], [0.3, 0.2, 0], [0.1, 0.9, np.nan], [0.2, 0.9, 7], [0.1, 0.1, 0.1]])

# 11 labelled steps, 4 wrong (p = 0.4, 0.8, 0.2, 0.2). Called wrong: 0.4, 0.3, 0.2, 0.1, 0.2, so
# TP 3, FP 2, FN 1, TN 5.
EXPECTED = {
    "step_accuracy": 8 / 11,
    "balanced_accuracy": (3 / 4 + 5 / 7) / 2,
    "error_precision": 3 / 5,
    "error_recall": 3 / 4,
    "error_f1": 2 / 3,  # 2 * 0.6 * 0.75 / 1.35
    # Correct steps: .9 .7 .6 .3 .1 .9 .9. Above the wrong one of .4: 5, of .8: 3, of .2: 6, of .2: 6.
    "roc_auc": 20 / 28,
    # From the lowest p: .1 | .2w .2w | .3 | .4w | .6 .7 .8w: precision 2/3 at recall 2/4 (the tie is one
    # point), 3/5 at 3/4, 4/8 at 1.
    "average_precision": 2 / 4 * 2 / 3 + 1 / 4 * 3 / 5 + 1 / 4 * 4 / 8,
    # .01 + .16 + .64 + .09 + .16 + .49 + .04 + .81 + .01 + .04 + .01
    "brier": 2.46 / 11,
    # In fifteenths: .1 .2.2 .3 .4 .6 .7 .8 .9.9.9, each bin's |sum of p - number correct|:
    # .9 + |.4 - 0| + .7 + .4 + .4 + .3 + .8 + |2.7 - 3|
    "ece": 4.2 / 11,
    "processbench_acc_error": 2 / 3,  # solutions 0 and 4 of 0, 2, 4
    "processbench_acc_correct": 1 / 2,  # solution 1 of 1, 3
    "processbench_f1": 4 / 7,  # 2 * 2/3 * 1/2 / (7/6)
    "error_share": 4 / 11,
    "majority_accuracy": 7 / 11,
    "num_steps": 11.0,
    "num_solutions": 5.0,
}


def test_step_metrics_match_the_numbers_worked_by_hand() -> None:
    got = step_metrics(PROBS, LABELS)
    assert got == pytest.approx(EXPECTED, abs=1e-12)
    assert all(type(value) is float for value in got.values())


def test_padding_row_order_and_dtype_change_nothing() -> None:
    wide = np.full((6, 5), -100.0)
    probs, labels = wide.copy(), wide.copy()
    probs[:, :3], labels[:, :3] = PROBS[::-1], LABELS[::-1]
    got = step_metrics(probs.astype(np.float32), labels.astype(np.float32))
    assert got == pytest.approx(EXPECTED, abs=1e-6)


def test_arguments_are_left_as_they_were() -> None:
    probs, labels = PROBS.copy(), LABELS.copy()
    step_metrics(probs, labels)
    np.testing.assert_array_equal(probs, PROBS)
    np.testing.assert_array_equal(labels, LABELS)


def test_threshold_moves_what_is_called_wrong_and_nothing_else() -> None:
    got = step_metrics(PROBS, LABELS, threshold=0.25)
    # Called wrong: 0.2, 0.1, 0.2: TP 2, FP 1. First called: none, none, 1, 0, 0, so solution 0 is missed
    # and 2 and 4 are found.
    assert got["error_precision"] == pytest.approx(2 / 3)
    assert got["error_recall"] == pytest.approx(2 / 4)
    assert got["processbench_acc_error"] == pytest.approx(2 / 3)
    assert got["processbench_acc_correct"] == pytest.approx(1 / 2)
    for key in ("roc_auc", "average_precision", "brier", "ece", "error_share"):
        assert got[key] == pytest.approx(EXPECTED[key])


def test_a_probability_on_the_threshold_counts_as_correct_in_float32_too() -> None:
    probs = np.array([[0.7, 0.7]], np.float32)  # float32(0.7) is 0.69999999
    got = step_metrics(probs, np.array([[1.0, 1.0]], np.float32), threshold=0.7)
    assert got["step_accuracy"] == 1.0


def test_soft_labels_count_as_correct_from_one_half_and_enter_brier_as_they_are() -> None:
    got = step_metrics(np.array([[0.8, 0.3]]), np.array([[0.5, 0.4]]))
    assert got["step_accuracy"] == 1.0
    assert got["error_share"] == 0.5
    assert got["brier"] == pytest.approx((0.3**2 + 0.1**2) / 2)


def test_unlabelled_steps_before_the_first_error_are_passed_over() -> None:
    # Step 0 has no label: its low probability is no prediction, so step 1 is found.
    got = step_metrics(np.array([[0.1, 0.2]]), np.array([[-100.0, 0.0]]))
    assert got["processbench_acc_error"] == 1.0


def test_one_class_only_gives_nan_where_a_number_would_mislead_and_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        correct = step_metrics(np.array([[0.9, 0.2]]), np.array([[1.0, 1.0]]))
        wrong = step_metrics(np.array([[0.9, 0.2]]), np.array([[0.0, 0.0]]))
    nan_when_correct = ("roc_auc", "average_precision", "processbench_acc_error", "processbench_f1")
    assert {key for key, value in correct.items() if math.isnan(value)} == set(nan_when_correct)
    assert correct["balanced_accuracy"] == 0.5
    assert (correct["error_precision"], correct["error_recall"], correct["error_f1"]) == (0.0, 0.0, 0.0)
    nan_when_wrong = ("roc_auc", "processbench_acc_correct", "processbench_f1")
    assert {key for key, value in wrong.items() if math.isnan(value)} == set(nan_when_wrong)
    assert wrong["majority_accuracy"] == 1.0


def test_processbench_f1_is_zero_where_both_are() -> None:
    got = step_metrics(np.array([[0.9], [0.1]]), np.array([[0.0], [1.0]]))
    assert (got["processbench_acc_error"], got["processbench_acc_correct"]) == (0.0, 0.0)
    assert got["processbench_f1"] == 0.0


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match=r'pip install "modeling-prm\[train\]"'):
        step_metrics(PROBS, LABELS)


ONE = np.ones((1, 2))


@pytest.mark.parametrize(
    ("error", "message", "probs", "labels", "options"),
    [
        (TypeError, "step_probs must be a NumPy array of floats, got list", [[0.5]], ONE, {}),
        (
            TypeError,
            "labels must be a NumPy array of floats, got an array of int64",
            ONE,
            ONE.astype(int),
            {},
        ),
        (ValueError, r"got \(1, 2\) and \(1, 3\)", ONE, np.ones((1, 3)), {}),
        (ValueError, r"one shape \(N, S\)", np.ones(2), np.ones(2), {}),
        (ValueError, "with S > 0", np.ones((1, 0)), np.ones((1, 0)), {}),
        (ValueError, "at least one labelled step", ONE, np.full((1, 2), -100.0), {}),
        (ValueError, "labels must be in .* got -1.0 and in all 2", ONE, -ONE, {}),
        (ValueError, "got nan and in all 2", ONE, ONE * np.nan, {}),
        (ValueError, "step_probs of labelled steps must be in .* got 3.0", 3 * ONE, ONE, {}),
        (ValueError, "got nan and in all 2 such; .*diverged", ONE * np.nan, ONE, {}),
        (ValueError, "threshold must be a probability", ONE, ONE, {"threshold": 1.5}),
        (ValueError, "threshold must be a probability", ONE, ONE, {"threshold": math.nan}),
    ],
)
def test_bad_arguments(error: type[Exception], message: str, probs: Any, labels: Any, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        step_metrics(probs, labels, **options)


def test_reliability_by_hand_in_four_bins() -> None:
    probs = np.array([[0.0, 0.1, 0.25], [0.3, 1.0, 0.9]], np.float32)
    labels = np.array([[0.0, 1.0, 0.5], [1.0, 1.0, -100.0]], np.float32)
    table = reliability_table(probs, labels, bins=4)
    # [0, .25): .0 and .1, one of two correct. [.25, .5): .25 and .3, labels .5 and 1. [.75, 1]: 1.
    assert table.counts == (2, 2, 0, 1)
    assert table.mean_probs == pytest.approx((0.05, 0.275, math.nan, 1.0), nan_ok=True)
    assert table.mean_labels == pytest.approx((0.5, 0.75, math.nan, 1.0), nan_ok=True)
    assert table.ece == pytest.approx((2 * 0.45 + 2 * 0.475) / 5)
    assert reliability_table(probs, labels, bins=1).ece == pytest.approx(abs(1.65 / 5 - 3.5 / 5))
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        reliability_table(probs, labels, bins=0)
    with pytest.raises(ValueError, match="got nan and in all 6 such"):
        reliability_table(np.full((2, 3), np.nan), np.ones((2, 3)))


def test_probabilities_that_hold_have_almost_no_calibration_error() -> None:
    rng = np.random.default_rng(0)
    probs = rng.random((400, 100))
    labels = (rng.random((400, 100)) < probs).astype(float)
    # By chance, a bin of 40,000 / 15 steps is off by about sqrt(p (1 - p) / 2667) < 0.01.
    assert step_metrics(probs, labels)["ece"] < 0.01
    # Too sure: 0.5 + 1.5 (p - 0.5) is off by half its distance from 0.5.
    sharp = np.clip(0.5 + 1.5 * (probs - 0.5), 0.0, 1.0)
    assert step_metrics(sharp, labels)["ece"] == pytest.approx(np.abs(sharp - probs).mean(), abs=0.01)


def test_classes_become_how_much_they_count() -> None:
    labels = np.array([[0.0, 1.0, 2.0, -100.0]], np.float32)
    assert class_targets(labels, (1.0, 0.25, 0.0)).tolist() == [[1.0, 0.25, 0.0, -100.0]]
    assert class_targets(labels, None) is labels


def test_bce_of_known_logits() -> None:
    logits = np.array([[0.0, math.log(3.0), -100.0], [math.log(3.0), np.nan, np.inf]])
    labels = np.array([[1.0, 1.0, -100.0], [0.5, -100.0, -100.0]])
    # sigmoid: 1/2, 3/4, 3/4. Losses: ln 2, ln(4/3), and (ln(4/3) + ln 4) / 2.
    expected = (math.log(2) + math.log(4 / 3) + (math.log(4 / 3) + math.log(4)) / 2) / 3
    assert bce_from_logits(logits, labels) == pytest.approx(expected, rel=1e-15)


def test_bce_is_stable_for_large_logits() -> None:
    # A logit of 1000 for a correct step costs exp(-1000) = 0, for a wrong one 1000.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bce_from_logits(np.array([[1000.0, -1000.0]]), np.array([[1.0, 0.0]])) == 0.0
        assert bce_from_logits(np.array([[1000.0, -1000.0]]), np.array([[0.0, 1.0]])) == 1000.0


def test_bce_does_not_depend_on_the_layout_and_is_computed_in_float64() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, 7)).astype(np.float32)
    labels = np.where(rng.random((50, 7)) < 0.3, -100.0, rng.random((50, 7))).astype(np.float32)
    padded = np.pad(logits, ((0, 0), (0, 3)), constant_values=9.0)
    padded_labels = np.pad(labels, ((0, 0), (0, 3)), constant_values=-100.0)
    order = rng.permutation(50)
    expected = bce_from_logits(logits, labels)
    assert bce_from_logits(padded[order], padded_labels[order]) == pytest.approx(expected, rel=1e-14)


def test_bce_of_a_diverged_model_is_nan_and_bad_arguments_are_refused() -> None:
    assert math.isnan(bce_from_logits(np.array([[np.nan, 0.0]]), np.array([[1.0, 1.0]])))
    with pytest.raises(ValueError, match=r"logits and labels must have one shape \(N, S\)"):
        bce_from_logits(np.zeros((1, 2, 3)), np.ones((1, 2)))
    with pytest.raises(ValueError, match="at least one labelled step"):
        bce_from_logits(np.zeros((1, 2)), np.full((1, 2), -100.0))


def test_swapped_labels_turn_the_metrics_around() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (20, 6)).astype(float)
    probs = np.clip(0.5 + (labels - 0.5) * 0.6 + rng.normal(0, 0.2, labels.shape), 0, 1)
    right, swapped = step_metrics(probs, labels), step_metrics(probs, 1 - labels)
    assert right["roc_auc"] > 0.9
    assert swapped["roc_auc"] == pytest.approx(1 - right["roc_auc"])
    assert swapped["step_accuracy"] == pytest.approx(1 - right["step_accuracy"])
