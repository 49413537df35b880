"""Exact normalization through the trainer: every option's loss and gradients in any cut of an optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from losses_in_two_processes import OPTIONS, RECORDS, train
from small_training import LABELS, Gradients, make_arguments, make_dataset, make_rows, make_trainer, run_python
from small_training import worst_difference as worst

from modeling_prm import PRMForStepScoring, PRMProcessor
from trainer.losses import StepLoss
from trainer.preparation import tokenize_dataset
from trainer.prm_trainer import PRMTrainer, disable_dropout

MakePRM = Callable[..., tuple[PRMForStepScoring, PRMProcessor]]
Folder = Callable[..., Path]
all_options = pytest.mark.parametrize("name", OPTIONS)


@pytest.fixture(scope="module")
def whole(prm_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Loss and gradients of one large batch, by the name of the options."""
    folder = tmp_path_factory.mktemp("whole")
    return {
        name: train(prm_folder("qwen2"), folder, batch=8, accumulated=1, **options) for name, options in OPTIONS.items()
    }


@pytest.fixture(scope="module")
def two_processes(prm_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two_processes")
    (folder / "prm").symlink_to(prm_folder("qwen2"))
    done = run_python("losses_in_two_processes", folder, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", ["all of the cross-entropy", "pairwise by solution", "pqm", "last step"])
@pytest.mark.parametrize(("batch", "accumulated"), [(1, 7), (2, 4), (4, 2)])
def test_micro_batches_give_the_loss_of_one_large_batch(
    prm_folder: Folder, whole: dict[str, Any], tmp_path: Path, name: str, batch: int, accumulated: int
) -> None:
    loss, gradients = train(prm_folder("qwen2"), tmp_path, batch=batch, accumulated=accumulated, **OPTIONS[name])
    expected, expected_gradients = whole[name]
    assert loss == pytest.approx(expected, rel=1e-5)
    assert worst(gradients, expected_gradients) < 1e-5


@all_options
def test_two_processes_give_the_loss_of_one_large_batch(
    two_processes: list[Any], whole: dict[str, Any], name: str
) -> None:
    expected, expected_gradients = whole[name]
    for result in two_processes:
        loss, gradients = result[name]
        assert loss == pytest.approx(expected, rel=1e-5)
        assert worst(gradients, expected_gradients) < 1e-5


def logits_one_by_one(model: PRMForStepScoring, processor: PRMProcessor, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Logits of each record, computed alone, padded with zeros to (B, S) or (B, S, K)."""
    logits = [model(**processor(row["problem"], row["steps"], return_tensors="pt")).logits[0] for row in rows]
    return torch.nn.utils.rnn.pad_sequence(logits, batch_first=True)


@all_options
def test_one_large_batch_gives_the_loss_of_its_logits(
    prm_folder: Folder, whole: dict[str, Any], tmp_path: Path, name: str
) -> None:
    options = OPTIONS[name]
    args = make_arguments(tmp_path, **options)
    model = PRMForStepScoring.from_pretrained(prm_folder("qwen2")).eval()
    logits = logits_one_by_one(model, PRMProcessor.from_pretrained(prm_folder("qwen2")), make_rows(RECORDS))
    rules, width = args.label_rules(), max(map(len, RECORDS))
    labels = torch.tensor([rules(row) + [-100.0] * (width - len(row)) for row in RECORDS])
    expected = args.step_loss()(logits, labels)
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    loss, found = whole[name]
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert worst(found, gradients) < 1e-5


def test_classes_and_a_loss_of_ones_own_too(make_prm: MakePRM, tmp_path: Path) -> None:
    rows = make_rows([[0.0, 2.0, 1.0], [1.0], [-100.0, 0.0, 2.0, 2.0], [2.0, 1.0], [-100.0]])
    loss = StepLoss(
        num_labels=3,
        label_smoothing=0.1,
        normalization="solution",
        step_weighting=lambda rank, total: rank.float() ** 2 / total,
    )
    found = []
    for batch, accumulated in ((5, 1), (2, 3), (1, 5)):
        model, processor = make_prm("qwen2", num_labels=3, class_weights=[1.0, 0.5, 0.0], head_dropout=0.0)
        labels = torch.full((5, 4), -100.0)
        for index, row in enumerate(rows):
            labels[index, : len(row["labels"])] = torch.tensor(row["labels"])
        expected = float(loss(logits_one_by_one(model, processor, rows).detach(), labels))
        layout = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        seen = Gradients()
        trainer = PRMTrainer(
            model,
            make_arguments(tmp_path, sgd=True, **layout),
            processing_class=processor,
            train_dataset=datasets.Dataset.from_list(rows),
            step_loss=loss,
            callbacks=[seen],
        )
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
        found.append(seen.steps[0])
    assert worst(found[1], found[0]) < 1e-5
    assert worst(found[2], found[0]) < 1e-5


def test_a_loss_is_given_or_described(prm_folder: Folder, make_prm: MakePRM, tmp_path: Path) -> None:
    checkpoint = prm_folder("qwen2")
    model, processor = PRMForStepScoring.from_pretrained(checkpoint), PRMProcessor.from_pretrained(checkpoint)
    given: dict[str, Any] = {"processing_class": processor, "train_dataset": make_dataset()}
    with pytest.raises(ValueError, match=r"which describe one too: StepLoss\(.*pos_weight=2.0"):
        PRMTrainer(model, make_arguments(tmp_path, pos_weight=2.0), step_loss=StepLoss(), **given)
    with pytest.raises(ValueError, match="step_loss is for 3 logits a step, the model has 1"):
        PRMTrainer(model, make_arguments(tmp_path), step_loss=StepLoss(num_labels=3), **given)
    model, processor = make_prm("qwen2", num_labels=3, class_weights=[1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match="ranking and pos_weight are for one logit a step, the model has 3 classes"):
        PRMTrainer(model, make_arguments(tmp_path, ranking_loss="pqm"), processing_class=processor)


def test_several_gpus_in_one_process_give_the_loss_of_one(
    prm_folder: Folder, whole: dict[str, Any], tmp_path: Path
) -> None:
    layout = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "sgd": True}
    trainer, seen = make_trainer(prm_folder("qwen2"), tmp_path, make_dataset(RECORDS), **layout, **OPTIONS["pairwise"])
    # Without GPUs DataParallel calls the model as it is, on batches for two of them.
    trainer.args._n_gpu = 2
    trainer._train_batch_size = trainer.args.train_batch_size
    assert trainer.args.train_batch_size == 4
    trainer.train()
    expected, gradients = whole["pairwise"]
    assert isinstance(trainer.model_wrapped, torch.nn.DataParallel)
    # Of what the model is given each GPU gets a part, so that there must be one for each.
    batch = next(iter(trainer.get_train_dataloader()))
    assert trainer._get_num_items_in_batch([batch], torch.device("cpu")).shape == (2, 2)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert worst(seen.steps[0], gradients) < 1e-5


# An option of its own in each, on rows with soft labels and errors before the last step.
CHANGES: list[dict[str, Any]] = [
    {"soft_labels": "keep"},
    {"label_threshold": 0.2},
    {"label_threshold": 0.9},
    {"after_first_error": "mask"},
    {"train_on_last_step_only": True},
    {"pos_weight": 2.0},
    {"label_smoothing": 0.1},
    {"step_weighting": "linear"},
    {"loss_normalization": "solution"},
    {"bce_weight": 0.5},
    {"ranking_loss": "pairwise"},
    {"ranking_loss": "pairwise", "ranking_weight": 0.5},
    {"ranking_loss": "pairwise", "loss_normalization": "solution"},
    {"ranking_loss": "pairwise", "bce_weight": 0.0},
    {"ranking_loss": "pairwise", "soft_labels": "keep"},
    {"ranking_loss": "pairwise", "soft_labels": "keep", "label_threshold": 0.2},
    {"ranking_loss": "pqm"},
    {"ranking_loss": "pqm", "ranking_weight": 0.5},
    {"ranking_loss": "pqm", "ranking_margin": 2.0},
]


def test_every_option_changes_the_loss_that_is_trained(prm_folder: Folder, tmp_path: Path) -> None:
    dataset, _ = tokenize_dataset(make_dataset(), PRMProcessor.from_pretrained(prm_folder("qwen2")))
    losses = {}
    for options in [{}, *CHANGES]:
        options = {"soft_labels": "harden", "per_device_train_batch_size": 8, "sgd": True} | options
        trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, dataset, **options)
        trainer.train()
        losses[str(options)] = round(trainer.state.log_history[0]["loss"], 5)
    assert len(set(losses.values())) == 1 + len(CHANGES), losses


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama", "opt"])
def test_without_dropout_training_computes_what_scoring_does(make_prm: MakePRM, family: str) -> None:
    model, processor = make_prm(family)
    # Some families have theirs off, or keep it as a number in their layers.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
        for name in ("attention_dropout", "dropout", "layerdrop", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.3)
    row = make_rows()[1]
    batch = processor(row["problem"], row["steps"], return_tensors="pt")
    model.train()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)
    disable_dropout(model)
    logits = model(**batch).logits
    assert model.training
    torch.testing.assert_close(logits, model.eval()(**batch).logits, rtol=0.0, atol=1e-6)


def test_the_option_turns_dropout_off(make_prm: MakePRM, tmp_path: Path) -> None:
    losses = []
    for disabled in (True, False):
        model, processor = make_prm("gpt2")
        args = make_arguments(tmp_path, sgd=True, per_device_train_batch_size=8, disable_dropout=disabled)
        labels = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in LABELS], True, -100.0)
        with torch.no_grad():
            expected = float(StepLoss()(logits_one_by_one(model.eval(), processor, make_rows()), labels))
        trainer = PRMTrainer(model, args, processing_class=processor, train_dataset=make_dataset())
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"] / expected)
    assert losses[0] == pytest.approx(1.0, rel=1e-5)
    assert abs(losses[1] - 1.0) > 1e-4
