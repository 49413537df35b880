"""Evaluation in the trainer, and what it refuses to take."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from small_training import LABELS, make_arguments, make_dataset, make_rows, make_trainer

from modeling_prm import PRMForStepScoring, PRMProcessor
from modeling_prm.scoring import check_processor
from trainer.metrics import step_metrics
from trainer.preparation import PreparationReport, tokenize_dataset
from trainer.prm_trainer import PRMTrainer

MakePRM = Callable[..., tuple[PRMForStepScoring, PRMProcessor]]
Folder = Callable[..., Path]


def scores_by_hand(trainer: PRMTrainer, rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, probabilities and labels (N, S), a record at a time; NaN where there is no step."""
    model, processor = trainer.model.eval(), trainer.processing_class
    logits, probs = (np.full((len(rows), 9), np.nan, dtype=np.float32) for _ in range(2))
    labels = np.full((len(rows), 9), -100.0, dtype=np.float32)
    for index, row in enumerate(rows):
        with torch.no_grad():
            output = model(**processor(row["problem"], row["steps"], return_tensors="pt"))
        count = len(row["steps"])
        logits[index, :count], probs[index, :count] = output.logits[0].numpy(), output.step_probs[0].numpy()
        labels[index, :count] = row["labels"]
    return logits, probs, labels


def loss_by_hand(logits: np.ndarray, labels: np.ndarray) -> float:
    mask = labels != -100.0
    right = 1.0 / (1.0 + np.exp(-logits[mask].astype(np.float64)))
    return float(-(labels[mask] * np.log(right) + (1.0 - labels[mask]) * np.log(1.0 - right)).mean())


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_metrics_are_those_of_the_models_own_scores(prm_folder: Folder, tmp_path: Path, threshold: float) -> None:
    found = []
    for batch in (1, 3, 8):
        trainer, _ = make_trainer(
            prm_folder("qwen2"),
            tmp_path,
            eval_dataset=make_dataset(),
            per_device_eval_batch_size=batch,
            error_threshold=threshold,
        )
        found.append(trainer.evaluate())
    logits, probs, labels = scores_by_hand(trainer, make_rows())
    expected = step_metrics(probs, labels, threshold=threshold)
    for metrics in found:
        for name, value in expected.items():
            assert metrics[f"eval_{name}"] == pytest.approx(value, abs=1e-6), name
        assert metrics["eval_loss"] == pytest.approx(loss_by_hand(logits, labels), rel=1e-5)
    other = step_metrics(probs, labels, threshold=1.4 - threshold)
    assert other["error_recall"] != expected["error_recall"]


def test_swapped_labels_turn_the_metrics_around(prm_folder: Folder, tmp_path: Path) -> None:
    """A trained model is right where its labels are, and wrong by as much where they are swapped."""
    options = {"max_steps": 25, "learning_rate": 1e-2, "per_device_train_batch_size": 8}
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, soft_labels="harden", **options)
    trainer.train()
    hard = [[label if label == -100.0 else float(label >= 0.5) for label in row] for row in LABELS]
    swapped = [[label if label == -100.0 else 1.0 - label for label in row] for row in hard]
    found, other = trainer.evaluate(make_dataset(hard)), trainer.evaluate(make_dataset(swapped))
    assert found["eval_roc_auc"] > 0.9
    assert other["eval_roc_auc"] == pytest.approx(1.0 - found["eval_roc_auc"], abs=1e-9)
    assert other["eval_step_accuracy"] == pytest.approx(1.0 - found["eval_step_accuracy"], abs=1e-9)
    assert other["eval_loss"] > found["eval_loss"]
    # What the index alone knows comes from the training labels, and turns around likewise.
    name = "eval_index_only_roc_auc"
    assert other[name] == pytest.approx(1.0 - found[name], abs=1e-9)
    assert found[name] != 0.5


@pytest.mark.parametrize("trained", [True, False])
def test_every_evaluation_has_the_metrics_of_the_index_alone(prm_folder: Folder, tmp_path: Path, trained: bool) -> None:
    # The training set's steps are right at index 0 and wrong at index 1.
    rules = {"soft_labels": "harden", "after_first_error": "mask"}
    known = [[1.0, 0.4, 1.0], [0.6, 0.0], [1.0, 0.0]]
    sets = {"same": make_dataset([[1.0, 0.0]] * 4), "other": make_dataset([[0.0, 1.0]] * 4)}
    model = PRMForStepScoring.from_pretrained(prm_folder("qwen2"))
    trainer = PRMTrainer(
        model,
        make_arguments(tmp_path, **rules),
        processing_class=PRMProcessor.from_pretrained(prm_folder("qwen2")),
        train_dataset=make_dataset(known) if trained else None,
        eval_dataset=sets,
    )
    metrics = trainer.evaluate()
    # Without training labels each half of a set is predicted by the other half of the same set.
    assert metrics["eval_same_index_only_roc_auc"] == 1.0
    assert metrics["eval_other_index_only_roc_auc"] == (0.0 if trained else 1.0)
    # By hand: s / n over all training labels is 4 / 7 (the third step counts too, as in evaluation).
    first = (3 + 4 / 7) / 4
    second = (0 + first) / 4
    if trained:
        expected = ((1 - first) ** 2 + second**2) / 2
        assert metrics["eval_same_index_only_brier"] == pytest.approx(expected, abs=1e-6)
    assert {name for name in metrics if name.startswith("eval_same_index_only")} >= {
        f"eval_same_index_only_{name}" for name in ("ece", "error_f1", "processbench_f1", "average_precision")
    }


def test_the_threshold_is_the_configs_unless_one_is_given(prm_folder: Folder, tmp_path: Path) -> None:
    _, probs, labels = scores_by_hand(make_trainer(prm_folder("qwen2"), tmp_path)[0], make_rows())
    for stored, given in ((0.9, None), (0.1, 0.9)):
        model = PRMForStepScoring.from_pretrained(prm_folder("qwen2"))
        model.config.error_threshold = stored
        trainer = PRMTrainer(
            model,
            make_arguments(tmp_path, error_threshold=given),
            processing_class=PRMProcessor.from_pretrained(prm_folder("qwen2")),
            eval_dataset=make_dataset(),
        )
        expected = step_metrics(probs, labels, threshold=0.9)["error_recall"]
        assert expected != step_metrics(probs, labels, threshold=0.1)["error_recall"]
        assert trainer.evaluate()["eval_error_recall"] == pytest.approx(expected)
        assert model.config.error_threshold == 0.9


def test_sets_by_name_have_metrics_of_their_own(prm_folder: Folder, tmp_path: Path) -> None:
    sets = {"math": make_dataset(LABELS[:3]), "code": make_dataset(LABELS[4:])}
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, eval_dataset=sets)
    metrics = trainer.evaluate()
    for name, rows in (("math", make_rows(LABELS[:3])), ("code", make_rows(LABELS[4:]))):
        logits, probs, labels = scores_by_hand(trainer, rows)
        assert metrics[f"eval_{name}_loss"] == pytest.approx(loss_by_hand(logits, labels), rel=1e-5)
        assert metrics[f"eval_{name}_brier"] == pytest.approx(step_metrics(probs, labels)["brier"], abs=1e-6)
    assert set(trainer.reports) == {"train", "math", "code"}
    assert trainer.reports["math"] == PreparationReport(
        records=3, kept_records=3, steps=12, kept_steps=12, labelled_steps=9, soft_labels=1
    )


def test_records_can_be_evaluated_and_predicted_after_the_start(prm_folder: Folder, tmp_path: Path) -> None:
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path)
    logits, probs, labels = scores_by_hand(trainer, make_rows())
    assert trainer.evaluate(make_dataset())["eval_loss"] == pytest.approx(loss_by_hand(logits, labels), rel=1e-5)
    named = trainer.evaluate({"a": make_dataset(), "b": make_dataset(LABELS[:2])})
    assert named["eval_a_loss"] == pytest.approx(loss_by_hand(logits, labels), rel=1e-5)
    predicted = trainer.predict(make_dataset())
    mask = labels != -100.0
    np.testing.assert_allclose(predicted.predictions[0][mask], logits[mask], atol=1e-5)
    np.testing.assert_allclose(predicted.predictions[1][mask], probs[mask], atol=1e-5)
    assert predicted.metrics["test_loss"] == pytest.approx(loss_by_hand(logits, labels), rel=1e-5)


def test_the_best_checkpoint_by_a_metric_of_ours_is_loaded(prm_folder: Folder, tmp_path: Path) -> None:
    # Step by step the learning rate is far too high, so the metric goes up and down.
    trainer, _ = make_trainer(
        prm_folder("qwen2"),
        tmp_path,
        eval_dataset=make_dataset(),
        metric_for_best_model="error_f1",
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=8,
        learning_rate=0.01,
        per_device_train_batch_size=2,
        seed=1,
    )
    trainer.train()
    values = [entry["eval_error_f1"] for entry in trainer.state.log_history if "eval_error_f1" in entry]
    assert len(values) == 8
    assert values[-1] < max(values), "the last checkpoint must not be the best, or nothing is shown"
    assert trainer.state.best_metric == max(values)
    assert trainer.state.best_global_step == 1 + values.index(max(values))
    best = PRMForStepScoring.from_pretrained(tmp_path / f"checkpoint-{trainer.state.best_global_step}").state_dict()
    assert all(torch.equal(tensor, best[name]) for name, tensor in trainer.model.state_dict().items())
    assert trainer.evaluate()["eval_error_f1"] == pytest.approx(max(values))


def test_classes_are_evaluated_by_how_much_they_count_as_correct(make_prm: MakePRM, tmp_path: Path) -> None:
    # Class 0 counts as correct, class 1 for the most part, class 2 not at all, unlike their indices.
    model, processor = make_prm("qwen2", num_labels=3, class_weights=[1.0, 0.75, 0.0])
    rows = make_rows([[0.0, 2.0, 1.0], [-100.0, 0.0], [2.0]])
    args = make_arguments(tmp_path, max_steps=40, learning_rate=1e-2, per_device_eval_batch_size=2)
    dataset = datasets.Dataset.from_list(rows)
    trainer = PRMTrainer(model, args, processing_class=processor, train_dataset=dataset, eval_dataset=dataset)
    before, losses, targets = trainer.evaluate(), [], {0.0: 1.0, 1.0: 0.75, 2.0: 0.0}
    squares = []
    for row in rows:
        with torch.no_grad():
            logits = model(**processor(row["problem"], row["steps"], return_tensors="pt")).logits[0].double()
        for probs, label in zip(logits.softmax(-1), row["labels"], strict=True):
            if label != -100.0:
                losses.append(-float(probs[int(label)].log()))
                squares.append(float(probs[0] + 0.75 * probs[1] - targets[label]) ** 2)
    assert before["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert before["eval_brier"] == pytest.approx(np.mean(squares), rel=1e-5)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.1 * before["eval_loss"]
    assert after["eval_step_accuracy"] == 1.0


def test_other_metrics_take_the_place_of_ours(prm_folder: Folder, tmp_path: Path) -> None:
    model = PRMForStepScoring.from_pretrained(prm_folder("qwen2"))
    trainer = PRMTrainer(
        model,
        make_arguments(tmp_path),
        processing_class=PRMProcessor.from_pretrained(prm_folder("qwen2")),
        eval_dataset=make_dataset(),
        compute_metrics=lambda prediction: {"shape": prediction.predictions[0].shape},
    )
    metrics = trainer.evaluate()
    assert metrics["eval_shape"] == (8, 9)
    assert "eval_error_f1" not in metrics


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"separator_token": "<|other|>"}, r"separator_token is '<\|step_end\|>' and '<\|other\|>'"),
        ({"step_template": "{step}"}, r"step_template is 'Step \{i\}: \{step\}' and '\{step\}'"),
        ({"problem_template": "{problem}\n"}, "problem_template is"),
        ({"step_joiner": "\n\n"}, "step_joiner is"),
    ],
)
def test_a_processor_of_another_layout_is_refused(
    make_prm: MakePRM, tmp_path: Path, options: dict[str, Any], difference: str
) -> None:
    model, processor = make_prm("qwen2")
    _, other = make_prm("qwen2", **options)
    check_processor(model, processor)
    with pytest.raises(ValueError, match=f"do not belong together: .*{difference}"):
        PRMTrainer(model, make_arguments(tmp_path), processing_class=other, train_dataset=make_dataset())


def test_a_processor_of_another_vocabulary_is_refused(make_prm: MakePRM) -> None:
    with pytest.raises(ValueError, match=r"separator_token_id is \d+ and \d+"):
        check_processor(make_prm("qwen2")[0], make_prm("llama")[1])


def test_the_processor_may_read_less_than_the_backbone_but_not_more(make_prm: MakePRM) -> None:
    model, processor = make_prm("qwen2")
    for length in (40, 256):
        processor.max_length = length
        check_processor(model, processor)
    for too_long in (257, None):
        processor.max_length = too_long
        with pytest.raises(ValueError, match=f"max_length={too_long} is more than the 256 tokens"):
            check_processor(model, processor)


def test_truncation_options_reach_the_data(make_prm: MakePRM, tmp_path: Path) -> None:
    model, processor = make_prm("qwen2")
    processor.max_length = 40
    rows = make_rows([[1.0] * 9, [1.0]])
    rows[1]["problem"] = "x" * 200
    dataset = datasets.Dataset.from_list(rows)

    def report(**options: Any) -> PreparationReport:
        args = make_arguments(tmp_path, **options)
        return PRMTrainer(model, args, processing_class=processor, train_dataset=dataset).reports["train"]

    with pytest.raises(ValueError, match=r"1 records have a problem that leaves room for no step"):
        report()
    with pytest.raises(ValueError, match=r"record 0 \(from 0\) keeps \d of 9 steps"):
        report(truncation="error", overlong_problems="skip")
    kept = report(overlong_problems="skip")
    assert (kept.records, kept.kept_records, kept.steps) == (2, 1, 10)
    assert 0 < kept.kept_steps < 9


def test_tokenized_datasets_are_taken_as_they_are(make_prm: MakePRM, tmp_path: Path) -> None:
    model, processor = make_prm("qwen2")
    tokenized, _ = tokenize_dataset(make_dataset(), processor)
    trainer = PRMTrainer(model, make_arguments(tmp_path), processing_class=processor, train_dataset=tokenized)
    assert trainer.train_dataset is tokenized
    assert trainer.reports == {}


@pytest.mark.parametrize(
    ("name", "dataset", "got"),
    [
        ("train", datasets.DatasetDict({"train": make_dataset()}), "DatasetDict"),
        ("train", make_rows(), "list"),
        # A stream can be trained on; evaluation needs all of its set.
        ("eval", make_dataset().to_iterable_dataset(), "IterableDataset"),
    ],
)
def test_datasets_of_other_types_are_refused(
    make_prm: MakePRM, tmp_path: Path, name: str, dataset: Any, got: str
) -> None:
    model, processor = make_prm("qwen2")
    given: dict[str, Any] = {f"{name}_dataset": dataset}
    with pytest.raises(TypeError, match=f"'{name}' must be a datasets.Dataset, got {got}"):
        PRMTrainer(model, make_arguments(tmp_path), processing_class=processor, **given)


def test_other_wrong_arguments_are_refused(make_prm: MakePRM, tmp_path: Path) -> None:
    from transformers import TrainingArguments

    model, processor = make_prm("qwen2")
    plain = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(TypeError, match=r"must be trainer\.arguments\.PRMTrainingArguments, got TrainingArguments"):
        PRMTrainer(model, plain, processing_class=processor, train_dataset=make_dataset())
    with pytest.raises(TypeError, match="and its PRMProcessor are needed, got PRMForStepScoring and Qwen2Tokenizer"):
        PRMTrainer(model, make_arguments(tmp_path), processing_class=processor.tokenizer)
    with pytest.raises(TypeError, match="are needed, got Qwen2Model and PRMProcessor"):
        PRMTrainer(model.backbone, make_arguments(tmp_path), processing_class=processor)
    for option in ({"prediction_loss_only": True}, {"eval_do_concat_batches": False}):
        with pytest.raises(ValueError, match="leave no whole set of scores"):
            PRMTrainer(model, make_arguments(tmp_path, **option), processing_class=processor)


def test_a_head_learning_rate_beside_a_given_optimizer_is_refused(make_prm: MakePRM, tmp_path: Path) -> None:
    model, processor = make_prm("llama")
    args = make_arguments(tmp_path, head_learning_rate=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="head_learning_rate is for the optimizer that is made here"):
        PRMTrainer(model, args, processing_class=processor, optimizers=(optimizer, None))


def test_missing_scikit_learn_shows_before_training(
    make_prm: MakePRM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    model, processor = make_prm("llama")
    with pytest.raises(ImportError, match="pip install"):
        PRMTrainer(model, make_arguments(tmp_path), processing_class=processor, eval_dataset=make_dataset())
