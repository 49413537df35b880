"""Calibration of a model by its trainer: what is fitted on which evaluation set, stored, and reported how."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from small_training import make_arguments, make_rows, make_trainer

from modeling_prm import PRMForStepScoring, PRMProcessor
from trainer.metrics import step_metrics
from trainer.model_calibration import EvaluatedScores, calibrate, joined, store_calibration
from trainer.prm_trainer import PRMTrainer
from trainer.publishing import describe_training

MakePRM = Callable[..., tuple[PRMForStepScoring, PRMProcessor]]


@torch.no_grad()
def logits_of(model: PRMForStepScoring, processor: PRMProcessor, row: dict[str, Any]) -> torch.Tensor:
    return model(**processor(row["problem"], row["steps"], return_tensors="pt")).logits[0].double()


def centre(model: PRMForStepScoring, processor: PRMProcessor) -> None:
    """Move the head's biases so that the logits of the rows used here lie on both sides of 0."""
    rows = make_rows([[1.0] * 8 for _ in range(40)])
    logits = torch.cat([logits_of(model, processor, row) for row in rows])
    with torch.no_grad():
        model.value_head.out.bias -= logits.median(dim=0).values.float()


@pytest.fixture(scope="module")
def folder(make_prm: MakePRM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved PRM whose steps are right by half."""
    model, processor = make_prm("qwen2")
    centre(model, processor)
    path = tmp_path_factory.mktemp("centred")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def rows_whose_truth_is(
    model: PRMForStepScoring, processor: PRMProcessor, temperature: float, *, first: int = 0, count: int = 20
) -> list[dict[str, Any]]:
    """Solutions of eight steps labelled with the model's own probabilities at another temperature."""
    rows = make_rows([[1.0] * 8 for _ in range(first + count)])[first:]
    for row in rows:
        logits = logits_of(model, processor, row)
        row["labels"] = (1.0 / (1.0 + torch.exp(-logits / temperature))).tolist()
    return rows


def make_case(folder: Path, output_dir: Path, *temperatures: float, **options: Any) -> PRMTrainer:
    """A trainer with an evaluation set for each true temperature, `t0`, `t1` ...; one alone is `eval`."""
    model, processor = PRMForStepScoring.from_pretrained(folder), PRMProcessor.from_pretrained(folder)
    sets = {
        f"t{i}": datasets.Dataset.from_list(rows_whose_truth_is(model, processor, temperature, first=20 * i))
        for i, temperature in enumerate(temperatures)
    }
    given = sets["t0"] if len(sets) == 1 else sets
    return make_trainer(folder, output_dir, eval_dataset=given, **options)[0]


def test_the_temperature_of_the_labels_is_found_and_set(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_case(folder, tmp_path, 2.5)
    before = trainer.evaluate()
    logits, labels = trainer.scores["eval"].logits.astype(np.float64), trainer.scores["eval"].labels
    with caplog.at_level(logging.INFO, logger="trainer"):
        found = calibrate(trainer)
    assert found is trainer.calibration
    assert found.temperature == pytest.approx(2.5, rel=1e-4)
    config = trainer.model.config
    assert (config.temperature, config.error_threshold) == (found.temperature, found.error_threshold)
    assert (found.temperature_before, found.threshold_before) == (1.0, 0.5)
    assert (found.fitted_on, found.num_steps) == (("eval",), 160)
    # The labels are the calibrated probabilities, so that nothing of ECE is left, and of the loss their entropy.
    assert found.ece_before == before["eval_ece"] > 0.01
    assert found.ece_after < 1e-5
    assert found.loss_before == pytest.approx(before["eval_loss"])
    entropy = -(labels * np.log(labels) + (1 - labels) * np.log(1 - labels)).mean()
    assert found.loss_after == pytest.approx(entropy, rel=1e-5)
    assert found.loss_after < found.loss_before
    # A step is wrong where its label is below 1/2, and right above: with that very order, every error is found.
    assert found.threshold_metric == "processbench_f1"
    assert found.metric_after == 1.0
    probs = 1 / (1 + np.exp(-logits / 2.5))
    assert step_metrics(probs, labels, threshold=found.error_threshold)["processbench_f1"] == 1.0
    assert any("calibrated on 160 steps of eval: temperature 2.5" in line for line in caplog.messages)
    # From then on the model's probabilities are those, and an evaluation of the same steps is marked.
    caplog.clear()
    after = trainer.evaluate()
    assert [line for line in caplog.messages if "were fitted on eval, so its metrics look better" in line]
    assert after["eval_ece"] < 1e-5
    assert after["eval_processbench_f1"] == 1.0
    assert after["eval_loss"] == pytest.approx(before["eval_loss"])
    assert after["eval_roc_auc"] == pytest.approx(before["eval_roc_auc"])


def test_a_second_calibration_starts_from_the_first(folder: Path, tmp_path: Path) -> None:
    trainer = make_case(folder, tmp_path, 2.5)
    trainer.model.config.temperature, trainer.model.config.error_threshold = 4.0, 0.3
    trainer.evaluate()
    found = calibrate(trainer)
    assert found.temperature == pytest.approx(2.5, rel=1e-4)
    assert (found.temperature_before, found.threshold_before) == (4.0, 0.3)
    probs, labels = 1 / (1 + np.exp(-trainer.scores["eval"].logits / 4.0)), trainer.scores["eval"].labels
    at_four = -(labels * np.log(probs) + (1 - labels) * np.log(1 - probs)).mean()
    assert found.loss_before == pytest.approx(at_four, rel=1e-5)
    assert found.loss_after < found.loss_before


def test_sets_that_were_not_fitted_on_are_measured_with_both_numbers(folder: Path, tmp_path: Path) -> None:
    trainer = make_case(folder, tmp_path, 2.0, 0.7)
    before = trainer.evaluate()
    found = calibrate(trainer, fit_on="t1")
    assert found.temperature == pytest.approx(0.7, rel=1e-4)
    assert (found.fitted_on, list(found.held_out), list(found.measured_before)) == (("t1",), ["t0"], ["t1"])
    card = describe_training(trainer)
    after = trainer.evaluate()
    for name in ("brier", "ece", "step_accuracy", "processbench_f1", "roc_auc", "loss", "index_only_roc_auc"):
        assert found.held_out["t0"][name] == pytest.approx(after[f"eval_t0_{name}"], abs=1e-6), name
        assert found.measured_before["t1"][name] == before[f"eval_t1_{name}"], name
    assert found.held_out["t0"]["brier"] != before["eval_t0_brier"]
    held_out, fitted = card.results
    assert held_out.dataset == "t0"
    assert held_out.note.endswith("temperature and threshold, used here, were fitted on other data: t1.")
    assert held_out.metrics["ece"] == found.held_out["t0"]["ece"]
    assert fitted.metrics["ece"] == before["eval_t1_ece"]
    assert "At temperature 1 and threshold 0.5; those of the config, 0.7 and" in fitted.note
    assert fitted.note.endswith("were fitted on these same steps afterwards.")
    shown = {name for name in fitted.metrics if name.startswith("index_only")}
    assert shown == {f"index_only_{name}" for name in ("roc_auc", "average_precision", "error_f1", "processbench_f1")}
    # What is evaluated once more on the steps of the fit says so in the card.
    trainer.state.global_step += 1
    trainer.evaluate()
    assert "look better here than elsewhere" in describe_training(trainer).results[1].note


def test_several_sets_are_fitted_on_together(folder: Path, tmp_path: Path) -> None:
    trainer = make_case(folder, tmp_path, 1.0, 3.0)
    trainer.evaluate()
    found = calibrate(trainer)
    assert (found.fitted_on, found.num_steps, found.held_out) == (("t0", "t1"), 320, {})
    assert 1.1 < found.temperature < 2.9


def test_a_threshold_that_was_given_stays(folder: Path, tmp_path: Path) -> None:
    trainer = make_case(folder, tmp_path, 2.0, error_threshold=0.25)
    trainer.evaluate()
    found = calibrate(trainer, keep_threshold=True)
    assert found.temperature == pytest.approx(2.0, rel=1e-4)
    assert (found.error_threshold, found.threshold_metric, found.metric_after) == (0.25, None, None)
    assert trainer.model.config.error_threshold == 0.25
    assert "threshold left at 0.25" in str(found)


def test_data_that_cannot_tell_leave_the_model_as_it_was(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="trainer")
    few = datasets.Dataset.from_list(make_rows([[1.0, 0.0] * 5] * 9 + [[1.0] * 9]))
    trainer, _ = make_trainer(folder, tmp_path, eval_dataset=few)
    trainer.evaluate()
    assert calibrate(trainer) is None
    assert "not calibrated: 99 labelled steps for evaluation are fewer than 100" in caplog.messages[-1]
    # Labels that say the opposite of the model's logits, which are not all of one sign.
    trainer = make_case(folder, tmp_path, -1.0)
    trainer.evaluate()
    assert calibrate(trainer) is None
    assert "not calibrated: these labels want the logits divided by 20 or more" in caplog.messages[-1]
    assert trainer.calibration is None
    assert (trainer.model.config.temperature, trainer.model.config.error_threshold) == (1.0, 0.5)


def test_solutions_of_one_kind_leave_the_threshold(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_case(folder, tmp_path, 2.0)
    trainer.evaluate()
    scores = trainer.scores["eval"]
    # Every solution starts with a wrong step.
    labels = scores.labels.copy()
    labels[:, 0] = 0.0
    trainer.scores["eval"] = EvaluatedScores(logits=scores.logits, labels=labels)
    found = calibrate(trainer)
    assert (found.error_threshold, found.threshold_metric) == (0.5, None)
    assert found.temperature != 1.0
    assert "the threshold stays at 0.5: ProcessBench F1 needs" in caplog.text
    assert calibrate(trainer, metric="error_f1").threshold_metric == "error_f1"


def test_mistakes(folder: Path, tmp_path: Path) -> None:
    trainer = make_case(folder, tmp_path, 1.0, 2.0)
    with pytest.raises(ValueError, match=r"nothing was evaluated of \['t0', 't1'\]; call trainer.evaluate\(\) first"):
        calibrate(trainer)
    with pytest.raises(ValueError, match=r"no evaluation set 'dev' to calibrate on, there are \['t0', 't1'\]"):
        calibrate(trainer, fit_on="dev")
    with pytest.raises(ValueError, match="metric must be one of"):
        calibrate(trainer, metric="brier")
    alone, _ = make_trainer(folder, tmp_path)
    with pytest.raises(ValueError, match="there is no evaluation set to calibrate on"):
        calibrate(alone)


def test_classes(make_prm: MakePRM, tmp_path: Path) -> None:
    model, processor = make_prm("qwen2", num_labels=3, class_weights=[1.0, 0.5, 0.0])
    centre(model, processor)
    rows, rng = make_rows([[0.0] * 8] * 40), np.random.default_rng(0)
    for row in rows:
        probs = (logits_of(model, processor, row) / 0.5).softmax(-1).numpy()
        row["labels"] = [float(rng.choice(3, p=p)) for p in probs]
    args = make_arguments(tmp_path)
    trainer = PRMTrainer(model, args, processing_class=processor, eval_dataset=datasets.Dataset.from_list(rows))
    trainer.evaluate()
    found = calibrate(trainer, metric="balanced_accuracy")
    # 320 steps know it to about a tenth.
    assert found.temperature == pytest.approx(0.5, rel=0.3)
    after = trainer.evaluate()
    # The model's own probabilities, as the fit computed them.
    assert after["eval_brier"] == pytest.approx(
        trainer.scores["eval"].metrics(found.temperature, found.error_threshold)["brier"], abs=1e-6
    )
    assert after["eval_balanced_accuracy"] == pytest.approx(found.metric_after, abs=1e-6)
    assert found.metric_after >= found.metric_before


def test_sets_of_different_lengths_are_joined() -> None:
    first = EvaluatedScores(logits=np.ones((1, 2), np.float32), labels=np.zeros((1, 2), np.float32))
    second = EvaluatedScores(logits=np.full((2, 3), 2.0, np.float32), labels=np.ones((2, 3), np.float32))
    both = joined([first, second])
    assert both.labels.tolist() == [[0.0, 0.0, -100.0], [1.0] * 3, [1.0] * 3]
    assert both.logits.tolist() == [[1.0, 1.0, 0.0], [2.0] * 3, [2.0] * 3]
    parts = [EvaluatedScores(logits=np.ones((1, n, 3), np.float32), labels=np.ones((1, n), np.float32)) for n in (1, 2)]
    assert joined(parts).logits.shape == (2, 2, 3)


def test_both_numbers_are_stored_and_nothing_else_is_changed(folder: Path, tmp_path: Path) -> None:
    trainer = make_case(folder, tmp_path / "run", 2.0)
    trainer.evaluate()
    trainer.save_model(str(tmp_path / "saved"))
    before = json.loads((tmp_path / "saved" / "config.json").read_text())
    found = calibrate(trainer)
    # Metrics can be NaN, which JSON does not know.
    found.measured_before["eval"]["roc_auc"] = math.nan
    store_calibration(tmp_path / "saved", found)
    after = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert after == before | {"temperature": found.temperature, "error_threshold": found.error_threshold}
    model = PRMForStepScoring.from_pretrained(tmp_path / "saved")
    verifier = model.verifier(PRMProcessor.from_pretrained(tmp_path / "saved"))
    row = make_rows()[1]
    score = verifier.score_solution(row["problem"], row["steps"])
    logits = model(**trainer.processing_class(row["problem"], row["steps"], return_tensors="pt")).logits[0].double()
    assert score.threshold == found.error_threshold
    assert score.step_probs == pytest.approx(torch.sigmoid(logits / found.temperature).tolist(), abs=1e-6)
    stored = json.loads(
        (tmp_path / "saved" / "calibration.json").read_text(),
        parse_constant=lambda name: pytest.fail(f"{name} is no JSON"),
    )
    assert stored["temperature"] == found.temperature
    assert stored["fitted_on"] == ["eval"]
    assert stored["measured_before"]["eval"]["roc_auc"] is None
    assert not list((tmp_path / "saved").glob("*.part"))
