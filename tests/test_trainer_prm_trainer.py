"""The trainer: one exact loss in every layout of batches, its options, checkpoints and resuming."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_training import (
    LABELS,
    exact_loss_and_gradients,
    make_arguments,
    make_dataset,
    make_rows,
    make_trainer,
    run_python,
    worst_difference,
)

from modeling_prm import PRMForStepScoring, PRMProcessor
from trainer.prm_trainer import PRMTrainer

MakePRM = Callable[..., tuple[PRMForStepScoring, PRMProcessor]]
Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def exact(prm_folder: Folder) -> tuple[float, dict[str, torch.Tensor]]:
    model = PRMForStepScoring.from_pretrained(prm_folder("qwen2"))
    return exact_loss_and_gradients(model, PRMProcessor.from_pretrained(prm_folder("qwen2")), make_rows())


@pytest.fixture(scope="module")
def two_processes(prm_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `train_in_two_processes` found in each process."""
    folder = tmp_path_factory.mktemp("two_processes")
    (folder / "prm").symlink_to(prm_folder("qwen2"))
    done = run_python("train_in_two_processes", folder, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def weights_of(model: PRMForStepScoring) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("batch", "accumulated"), [(8, 1), (2, 4), (1, 8), (3, 3), (5, 2)])
def test_loss_and_gradients_do_not_depend_on_micro_batches(
    prm_folder: Folder, exact: tuple[float, dict[str, torch.Tensor]], tmp_path: Path, batch: int, accumulated: int
) -> None:
    layout = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
    trainer, seen = make_trainer(prm_folder("qwen2"), tmp_path, sgd=True, **layout)
    before = weights_of(trainer.model)
    trainer.train()
    assert len(seen.steps) == 1
    assert trainer.state.log_history[0]["loss"] == pytest.approx(exact[0], rel=1e-5)
    assert worst_difference(seen.steps[0], exact[1]) < 1e-5
    # And the step that was taken is that gradient.
    after = weights_of(trainer.model)
    assert all(torch.equal(after[name], before[name] - grad) for name, grad in seen.steps[0].items())


def test_two_processes_give_the_same_loss_gradients_and_weights(
    prm_folder: Folder, exact: tuple[float, dict[str, torch.Tensor]], two_processes: list[dict[str, Any]]
) -> None:
    model = PRMForStepScoring.from_pretrained(prm_folder("qwen2"))
    processor = PRMProcessor.from_pretrained(prm_folder("qwen2"))
    seven = exact_loss_and_gradients(model, processor, make_rows(LABELS[:7]))
    for run in ("train", "evaluate_then_train", "uneven", "uneven_packed", "uneven_shared"):
        if run == "uneven":
            exact = seven
        for result in two_processes:
            assert result["world_size"] == 2
            assert result[run]["loss"] == pytest.approx(exact[0], rel=1e-5)
            assert len(result[run]["gradients"]) == 1
            assert worst_difference(result[run]["gradients"][0], exact[1]) < 1e-5
        assert torch.equal(two_processes[0][run]["weights"], two_processes[1][run]["weights"])


def test_evaluation_in_two_processes_equals_that_in_one(
    prm_folder: Folder, two_processes: list[dict[str, Any]], tmp_path: Path
) -> None:
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, eval_dataset=make_dataset(LABELS[:7]))
    alone = trainer.evaluate()
    assert alone["eval_num_steps"] == sum(label != -100.0 for row in LABELS[:7] for label in row)
    for result in two_processes:
        for name, value in alone.items():
            if "time" not in name and "per_second" not in name:
                assert result["evaluate_then_train"]["metrics"][name] == pytest.approx(value, rel=1e-6), name


def test_training_twice_goes_on_from_the_weights(prm_folder: Folder, tmp_path: Path) -> None:
    trainer, seen = make_trainer(prm_folder("qwen2"), tmp_path, sgd=True, per_device_train_batch_size=8)
    trainer.args.learning_rate = 1e-3
    trainer.train()
    loss, gradients = exact_loss_and_gradients(trainer.model, trainer.processing_class, make_rows())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert worst_difference(seen.steps[1], gradients) < 1e-5


def test_batches_without_a_label_change_nothing(prm_folder: Folder, tmp_path: Path) -> None:
    # One optimizer step on a record without a label, beside one that has some.
    rows = make_dataset([[-100.0, -100.0], [1.0, 0.0]])
    options = {"per_device_train_batch_size": 1, "sgd": True, "train_sampling_strategy": "sequential"}
    trainer, seen = make_trainer(prm_folder("qwen2"), tmp_path, rows, **options)
    before = weights_of(trainer.model)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0.0
    assert all(not grad.any() for grad in seen.steps[0].values())
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(trainer.model).items())
    trainer, seen = make_trainer(prm_folder("qwen2"), tmp_path, rows, gradient_accumulation_steps=2, **options)
    expected = exact_loss_and_gradients(trainer.model, trainer.processing_class, make_rows([[-100.0] * 2, [1.0, 0.0]]))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected[0], rel=1e-5)
    assert worst_difference(seen.steps[0], expected[1]) < 1e-5


def test_head_has_a_learning_rate_of_its_own(prm_folder: Folder, tmp_path: Path) -> None:
    options = {"learning_rate": 1e-4, "weight_decay": 0.1, "max_steps": 2, "lr_scheduler_type": "constant"}
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, head_learning_rate=1e-2, **options)
    before = weights_of(trainer.model)
    groups = trainer.create_optimizer().param_groups
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    seen = {
        names[id(parameter)]: (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]
    }
    assert seen.keys() == before.keys()
    assert sum(len(group["params"]) for group in groups) == len(before)
    plain, _ = make_trainer(prm_folder("qwen2"), tmp_path, **options)
    plain_names = {id(parameter): name for name, parameter in plain.model.named_parameters()}
    for group in plain.create_optimizer().param_groups:
        for parameter in group["params"]:
            name = plain_names[id(parameter)]
            assert group["lr"] == 1e-4
            expected = 1e-2 if name.startswith("value_head.") else 1e-4
            assert seen[name] == (expected, group["weight_decay"]), name
    assert {decay for _, decay in seen.values()} == {0.0, 0.1}
    assert seen["value_head.out.bias"][1] == 0.0
    assert seen["value_head.out.weight"][1] == 0.1
    trainer.train()
    after = weights_of(trainer.model)
    # Adam moves each weight by about its learning rate a step.
    assert 5e-3 < (after["value_head.out.weight"] - before["value_head.out.weight"]).abs().max() < 4e-2
    assert (after["backbone.norm.weight"] - before["backbone.norm.weight"]).abs().max() < 4e-4


def test_freeze_backbone_changes_only_the_head(prm_folder: Folder, tmp_path: Path) -> None:
    for frozen in (True, False):
        trainer, _ = make_trainer(
            prm_folder("qwen2"),
            tmp_path,
            freeze_backbone=frozen,
            max_steps=2,
            learning_rate=1e-2,
            head_learning_rate=0.1,
        )
        before = weights_of(trainer.model)
        trainer.train()
        changed = {name for name, tensor in weights_of(trainer.model).items() if not torch.equal(tensor, before[name])}
        assert {name for name in changed if name.startswith("value_head.")} == {
            "value_head.out.weight",
            "value_head.out.bias",
        }
        assert any(name.startswith("backbone.") for name in changed) is not frozen


@pytest.mark.parametrize("head_learning_rate", [None, 3e-2])
def test_resuming_is_bit_exact_with_dropout_and_shuffling(
    make_prm: MakePRM, tmp_path: Path, head_learning_rate: float | None
) -> None:
    def run(folder: Path, max_steps: int, resume: str | None = None) -> PRMTrainer:
        # GPT-2 has dropout in its layers; the head has 0.1.
        model, processor = make_prm("gpt2")
        assert model.backbone.config.resid_pdrop > 0
        assert model.value_head.dropout.p > 0
        args = make_arguments(
            folder,
            max_steps=max_steps,
            save_strategy="steps",
            save_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            head_learning_rate=head_learning_rate,
            logging_steps=1,
        )
        trainer = PRMTrainer(model, args, processing_class=processor, train_dataset=make_dataset())
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 3)
    parts = run(tmp_path / "parts", 6, resume=str(tmp_path / "parts" / "checkpoint-3"))
    assert parts.state.global_step == 6
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (whole, parts)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
    expected = weights_of(whole.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(parts.model).items())
    rates = [[group["lr"] for group in run.optimizer.param_groups] for run in (whole, parts)]
    assert rates[0] == rates[1]
    assert set(rates[0]) == {1e-2, head_learning_rate or 1e-2}


@pytest.mark.parametrize("step", [1, 2])
def test_every_checkpoint_holds_model_code_and_processor(prm_folder: Folder, tmp_path: Path, step: int) -> None:
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, **options)
    start = weights_of(trainer.model)
    trainer.train()
    folder = tmp_path / f"checkpoint-{step}"
    code = {"configuration_prm.py", "modeling_prm.py", "processing_prm.py", "step_loss.py", "backbones.py"}
    files = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "trainer_state.json"}
    assert code | files <= {path.name for path in folder.iterdir()}
    model = transformers.AutoModel.from_pretrained(folder)
    assert isinstance(model, PRMForStepScoring)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    row = make_rows()[1]
    batch = processor(row["problem"], row["steps"], return_tensors="pt")
    same = trainer.processing_class(row["problem"], row["steps"], return_tensors="pt")
    assert all(torch.equal(batch[name], same[name]) for name in same)
    saved, last = weights_of(model), weights_of(trainer.model)
    assert all(torch.equal(saved[name], last[name]) for name in last) == (step == 2)
    assert not torch.equal(saved["value_head.out.weight"], start["value_head.out.weight"])


def test_bf16_autocast_trains_and_keeps_weights_and_head_in_float32(prm_folder: Folder, tmp_path: Path) -> None:
    options = {"bf16": True, "max_steps": 30, "learning_rate": 3e-3, "per_device_train_batch_size": 8}
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, logging_steps=1, **options)
    seen: dict[str, set[torch.dtype]] = {"head_in": set(), "head_out": set(), "layer": set()}
    trainer.model.value_head.register_forward_hook(
        lambda _, args, out: (seen["head_in"].add(args[0].dtype), seen["head_out"].add(out.dtype))[0]
    )
    layer = trainer.model.backbone.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda _, args, out: seen["layer"].add(out.dtype))
    trainer.train()
    assert seen["layer"] == {torch.bfloat16}
    assert seen["head_out"] == {torch.float32}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]


def test_after_bf16_the_model_can_be_unwrapped(prm_folder: Folder, tmp_path: Path) -> None:
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, bf16=True, max_steps=1)
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    row = make_rows()[1]
    batch = trainer.processing_class(row["problem"], row["steps"], return_tensors="pt")
    model.save_pretrained(tmp_path / "saved")
    with torch.inference_mode():
        logits = model(**batch).logits
        plain = PRMForStepScoring.from_pretrained(tmp_path / "saved")(**batch).logits
    # Autocast in bfloat16 would differ by about 1e-2.
    torch.testing.assert_close(logits, plain, rtol=0, atol=1e-5)


def test_grouping_by_length_saves_padding(prm_folder: Folder, tmp_path: Path) -> None:
    rows = make_dataset(LABELS * 16)
    padding = {}
    for strategy in ("group_by_length", "random"):
        options = {"train_sampling_strategy": strategy, "per_device_train_batch_size": 4, "max_steps": 2}
        trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, rows, **options)
        masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
        padding[strategy] = sum(int((1 - mask).sum()) for mask in masks) / sum(mask.numel() for mask in masks)
        trainer.train()
        assert trainer.state.global_step == 2
    # The sampler sorts groups of 8 batches.
    assert padding["group_by_length"] < 0.2 < 0.3 < padding["random"]
