"""Losses that are not finite stop training and name their records; a best model that is never chosen is said."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from small_training import LABELS, make_dataset, make_rows, make_trainer
from torch.utils._python_dispatch import TorchDispatchMode
from training_with_faults import Trainings, make_nan

from modeling_prm import PRMProcessor
from trainer import train
from trainer.checkpoints import problem_of
from trainer.guards import NON_FINITE_FILE, NonFiniteLossError, _largest, check_finite_weights
from trainer.losses import StepLoss

Folder = Callable[..., Path]

# One optimizer step on records 0 to 3, one on 4 to 7.
LAYOUT = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "train_sampling_strategy": "sequential",
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
}


def mark(checkpoint: Path, record: int, rows: list[dict[str, Any]]) -> int:
    """Put a token into a record that stands in no other, and return it."""
    rows[record]["problem"] += " @"
    processor = PRMProcessor.from_pretrained(checkpoint)
    ids = [set(processor(row["problem"], row["steps"])["input_ids"][0]) for row in rows]
    return min(ids[record].difference(*(others for number, others in enumerate(ids) if number != record)))


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class Weights:
    """The weights after the first optimizer step."""

    def __init__(self, trainer: Any) -> None:
        self.seen: dict[str, torch.Tensor] = {}
        trainer.optimizer = trainer.create_optimizer()
        trainer.optimizer.register_step_post_hook(lambda *_: self.seen.update(weights_of(trainer.model)))


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"max_grad_norm": 0.0}, {"max_grad_norm": 1e-3}])
def test_a_nan_stops_before_its_step_and_names_its_records(
    prm_folder: Folder, tmp_path: Path, options: dict[str, Any]
) -> None:
    rows = make_rows()
    token, dataset = mark(prm_folder("gpt2"), 7, rows), datasets.Dataset.from_list(rows)
    trainer, _ = make_trainer(prm_folder("gpt2"), tmp_path, dataset, save_total_limit=1, **LAYOUT, **options)
    make_nan(trainer.model, token)
    after_first = Weights(trainer)
    with pytest.raises(NonFiniteLossError) as stopped:
        trainer.train()
    assert stopped.value.records == [6, 7]
    path, last = tmp_path / NON_FINITE_FILE, tmp_path / "checkpoint-1"
    assert str(stopped.value).startswith(
        "the loss of optimizer step 2 is nan, so training stopped before it. Numbers of the batch's records in the "
        f"training data (from 0): 6, 7; more in {path}. {last} is the last checkpoint. "
    )
    found = json.loads(path.read_text())
    assert found["batches"] == [{"process": 0, "loss": "nan", "records": [6, 7]}]
    assert (found["optimizer_step"], found["not_finite"], found["records"]) == (2, "loss", [6, 7])
    assert found["last_checkpoint"] == str(last)
    assert found["texts"].keys() == {"6", "7"}
    assert rows[7]["problem"] in found["texts"]["7"]
    assert problem_of(last) is None
    assert after_first.seen
    assert all(torch.equal(after_first.seen[name], tensor) for name, tensor in weights_of(trainer.model).items())


def test_packed_records_are_named_too(prm_folder: Folder, tmp_path: Path) -> None:
    rows = make_rows()
    token = mark(prm_folder("qwen2"), 5, rows)
    options = LAYOUT | {"packing": "pack", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, datasets.Dataset.from_list(rows), **options)
    make_nan(trainer.model, token)
    with pytest.raises(NonFiniteLossError, match="loss of optimizer step 2") as stopped:
        trainer.train()
    assert stopped.value.records == [4, 5, 6, 7]


class Infinite(StepLoss):
    """A loss that is infinite for solutions of nine steps, with a gradient that is finite."""

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor | None = None) -> torch.Tensor:
        return super().__call__(logits, labels, counts) + (math.inf if labels.shape[1] == 9 else 0.0)


def test_an_infinite_loss_stops_too(prm_folder: Folder, tmp_path: Path) -> None:
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, **LAYOUT)
    trainer.step_loss = Infinite()
    with pytest.raises(NonFiniteLossError, match=r"step 1 is inf, .*: 0, 1; .* there is no checkpoint yet") as stopped:
        trainer.train()
    assert stopped.value.records == [0, 1]
    assert json.loads((tmp_path / NON_FINITE_FILE).read_text())["last_checkpoint"] is None


def test_a_gradient_that_is_not_finite_stops_and_names_the_whole_step(prm_folder: Folder, tmp_path: Path) -> None:
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, **LAYOUT)
    parameter = trainer.model.get_parameter("backbone.norm.weight")

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return gradient if trainer.state.global_step == 0 else gradient / 0.0

    parameter.register_hook(spoil)
    with pytest.raises(NonFiniteLossError, match="the gradient of optimizer step 2 is not finite") as stopped:
        trainer.train()
    assert stopped.value.records == [4, 5, 6, 7]
    found = json.loads((tmp_path / NON_FINITE_FILE).read_text())
    assert [batch["records"] for batch in found["batches"]] == [[4, 5], [6, 7]]
    assert all(math.isfinite(float(batch["loss"])) for batch in found["batches"])
    assert all(torch.isfinite(tensor).all() for tensor in trainer.model.parameters())


def test_with_the_scaler_of_float16_an_overflown_gradient_is_left_to_it(prm_folder: Folder, tmp_path: Path) -> None:
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, **(LAYOUT | {"save_strategy": "no"}))
    for parameter in trainer.model.parameters():
        parameter.register_hook(lambda gradient: gradient / 0.0)
    before = weights_of(trainer.model)
    # float16 itself needs a GPU; the scaler, which leaves the steps out, does not.
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    trainer.train()
    assert trainer.state.global_step == 2
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(trainer.model).items())
    trainer.step_loss = Infinite()
    with pytest.raises(NonFiniteLossError, match="the loss of optimizer step 1 is inf"):
        trainer.train()


def test_records_keep_the_numbers_that_they_have_in_the_data(prm_folder: Folder, tmp_path: Path) -> None:
    # Record 1 is too long and left out; the others keep their numbers.
    rows = make_rows()
    token = mark(prm_folder("gpt2"), 5, rows)
    rows[1]["problem"] = "so " * 400
    options = LAYOUT | {"overlong_problems": "skip", "per_device_train_batch_size": 1, "max_steps": 4}
    dataset = datasets.Dataset.from_list(rows)
    for numbers, expected in ((None, 5), ([10 * number for number in range(8)], 50), (list("abcdefgh"), 5)):
        given = dataset if numbers is None else dataset.add_column("record", numbers)
        trainer, _ = make_trainer(prm_folder("gpt2"), tmp_path / "run", given, **options)
        make_nan(trainer.model, token)
        with pytest.raises(NonFiniteLossError) as stopped:
            trainer.train()
        assert stopped.value.records == [expected]


def test_records_held_out_by_the_command_do_not_shift_the_numbers(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    train_set, _ = train.load_data(train.DataArguments([str(path)], eval_fraction=0.4), seed=0)
    problems = [row["problem"] for row in make_rows()]
    assert 0 < len(train_set) < 8
    assert [problems[number] for number in train_set["record"]] == list(train_set["problem"])
    assert list(train_set["record"]) != list(range(len(train_set)))


def test_two_processes_stop_together_and_name_the_records_of_both(
    backbone_folder: Folder, prm_folder: Folder, tmp_path: Path
) -> None:
    rows = make_rows(LABELS * 2)
    # Of the third optimizer step the main process has records 8 and 9, the other 10 and 11.
    token = mark(prm_folder("gpt2"), 10, rows)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    words = ["--backbone", backbone_folder("gpt2"), "--train-data", tmp_path / "data.jsonl", "--output-dir", out]
    words += ["--use-cpu", "--report-to", "none", "--max-steps", "4", "--save-steps", "1", "--disable-tqdm", "true"]
    words += ["--per-device-train-batch-size", "2", "--train-sampling-strategy", "sequential"]
    with Trainings() as run:
        done = run(f"nan:{token}", *words, processes=2)
    assert done.codes == [1, 1], done.stderr[-3000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("error: the loss of optimizer step 3 is nan")
        assert "(from 0): 10, 11; more in" in line
    found = json.loads((out / NON_FINITE_FILE).read_text())
    assert found["batches"] == [{"process": 1, "loss": "nan", "records": [10, 11]}]
    assert found["last_checkpoint"] == str(out / "checkpoint-2")
    assert problem_of(out / "checkpoint-2") is None
    assert not (out / "checkpoint-3").exists()


def test_the_model_and_evaluation_do_not_see_the_numbers(prm_folder: Folder, tmp_path: Path) -> None:
    seen: list[set[str]] = []
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, eval_dataset=make_dataset(), **LAYOUT)
    trainer.model.register_forward_pre_hook(lambda _, args, given: seen.append(set(given)), with_kwargs=True)
    trainer.train()
    trainer.evaluate()
    trainer.predict(make_dataset())
    assert len(seen) == 4 + 1 + 1
    assert all("record" not in names for names in seen)


def test_the_guard_waits_for_the_device_once_a_step(prm_folder: Folder, tmp_path: Path) -> None:
    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            # What `item`, `bool` and `float` of a tensor come down to.
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    counts: list[int] = []
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, **(LAYOUT | {"gradient_accumulation_steps": 4}))
    guard = trainer._guard
    observe, check = guard.observe, guard.on_pre_optimizer_step

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with Waits() as waits:
                call(*args, **kwargs)
            counts.append(waits.count)

        return wrapper

    guard.observe, guard.on_pre_optimizer_step = counted(observe), counted(check)
    trainer.train()
    assert counts == [0, 0, 0, 0, 1] * 2


def test_the_trainers_own_norm_spares_reading_all_gradients_again(
    prm_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def largest(tensors: Iterable[torch.Tensor | None]) -> torch.Tensor:
        raise AssertionError("all gradients were read a second time")

    monkeypatch.setattr("trainer.guards._largest", largest)
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, **(LAYOUT | {"save_strategy": "no"}))
    trainer.train()
    # The squares of 1e25 are beyond float32: clipping by such a norm makes every gradient 0.
    trainer.model.value_head.out.bias.register_hook(lambda gradient: gradient * 0 + 1e25)
    with pytest.raises(NonFiniteLossError, match="the gradient of optimizer step 1 is not finite"):
        trainer.train()


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_stops_with_and_without_clipping(
    prm_folder: Folder, tmp_path: Path, max_grad_norm: float
) -> None:
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, **(LAYOUT | {"max_grad_norm": max_grad_norm}))
    trainer.model.value_head.out.bias.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteLossError, match="the gradient of optimizer step 1 is not finite"):
        trainer.train()


def test_magnitudes_by_hand() -> None:
    # 1e30 squared is beyond float32, yet nothing is wrong with it.
    assert _largest([torch.tensor([1e30, -2e30]), None, torch.tensor([7], dtype=torch.int64)]) == torch.tensor(2e30)
    assert _largest([torch.ones(2), torch.tensor([1.0, math.nan])]).isnan()
    assert _largest([torch.ones(2), torch.tensor([-math.inf], dtype=torch.bfloat16)]) == math.inf
    assert _largest([torch.ones(0), torch.tensor(-3.0)]) == 3.0
    assert _largest([]) == 0.0


def test_weights_that_are_not_finite_take_no_checkpoints_place(prm_folder: Folder, tmp_path: Path) -> None:
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, save_total_limit=1, **LAYOUT)
    trainer.optimizer = trainer.create_optimizer()

    def spoil(*_: Any) -> None:
        if trainer.state.global_step == 1:
            trainer.model.value_head.out.bias.data.fill_(math.inf)

    trainer.optimizer.register_step_post_hook(spoil)
    with pytest.raises(NonFiniteLossError, match="the weights are not finite after optimizer step 2"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["checkpoint-1"]
    check_finite_weights(torch.nn.Linear(2, 2), 1)


def test_a_best_metric_that_is_nan_is_said(
    prm_folder: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = LAYOUT | {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}

    def run(name: str, labels: list[list[float]]) -> list[str]:
        caplog.clear()
        given = options | {"metric_for_best_model": name, "greater_is_better": True}
        trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path / name, eval_dataset=make_dataset(labels), **given)
        with caplog.at_level(logging.WARNING, "trainer.guards"):
            trainer.train()
        assert (trainer.state.best_model_checkpoint is None) == (labels == only_correct)
        return [record.getMessage() for record in caplog.records if record.name == "trainer.guards"]

    only_correct = [[1.0], [1.0, 1.0]]
    said = run("roc_auc", only_correct)
    assert [line[:43] for line in said[:2]] == [f"eval_roc_auc is NaN at optimizer step {step}, so" for step in (1, 2)]
    assert said[2:] == [
        "no checkpoint was chosen by metric_for_best_model='roc_auc', so the model is that of the last step, 2"
    ]
    assert run("eval_roc_auc", LABELS) == []
