"""Training with weights sharded over two processes (FSDP2): the same step, and checkpoints that load anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_training import exact_loss_and_gradients, make_dataset, make_rows, make_trainer, run_python, worst_difference

from hub_card.checks import check_clean_load
from modeling_prm import PRMForStepScoring, PRMProcessor

Folder = Callable[..., Path]
KINDS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")


@pytest.fixture(scope="module")
def sharded(prm_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `train_sharded` leaves."""
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "prm").symlink_to(prm_folder("qwen2"))
    done = run_python("train_sharded", folder, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def exact(prm_folder: Folder) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss before one step of gradient descent at a learning rate of 1, and the weights after it."""
    model = PRMForStepScoring.from_pretrained(prm_folder("qwen2"))
    processor = PRMProcessor.from_pretrained(prm_folder("qwen2"))
    loss, gradients = exact_loss_and_gradients(model, processor, make_rows())
    weights = {name: tensor.detach() - gradients.get(name, 0.0) for name, tensor in model.named_parameters()}
    return loss, weights


@pytest.mark.parametrize("saved", ["raw", *KINDS])
def test_a_sharded_step_saves_the_weights_of_an_unsharded_one(
    prm_folder: Folder, sharded: Path, exact: tuple[float, dict[str, torch.Tensor]], saved: str
) -> None:
    weights = load_file(sharded / saved / "model.safetensors")
    before = dict(PRMForStepScoring.from_pretrained(prm_folder("qwen2")).named_parameters())
    assert weights.keys() == before.keys() == exact[1].keys()
    found = {name: before[name].detach() - tensor for name, tensor in weights.items()}
    expected = {name: before[name].detach() - tensor for name, tensor in exact[1].items()}
    assert worst_difference(found, expected) < 1e-5
    assert float(found["value_head.out.bias"].abs()) > 1e-3


@pytest.mark.parametrize("saved", ["raw", *KINDS])
def test_what_was_saved_loads(sharded: Path, exact: Any, saved: str) -> None:
    model = transformers.AutoModel.from_pretrained(sharded / saved).eval()
    assert type(model) is PRMForStepScoring
    processor = transformers.AutoProcessor.from_pretrained(sharded / saved)
    row = make_rows()[1]
    expected = PRMForStepScoring.from_pretrained(sharded / "prm").eval()
    expected.load_state_dict(exact[1])
    batch = processor(row["problem"], row["steps"], return_tensors="pt")
    with torch.inference_mode():
        torch.testing.assert_close(model(**batch).logits, expected(**batch).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("saved", ["raw", "SHARDED_STATE_DICT", "SHARDED_STATE_DICT-whole/checkpoint-1"])
def test_what_was_saved_has_the_code_of_a_prm(sharded: Path, saved: str) -> None:
    found = {path.name for path in (sharded / saved).iterdir()}
    assert {"modeling_prm.py", "configuration_prm.py", "processing_prm.py", "step_loss.py", "backbones.py"} <= found
    assert not [name for name in found if "fsdp" in name and name.endswith(".py")]
    config = json.loads((sharded / saved / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_prm.PRMForStepScoring"
    assert config["architectures"] == ["PRMForStepScoring"]


def test_a_sharded_checkpoint_loads_where_nothing_of_ours_is_installed(sharded: Path) -> None:
    folder = sharded / "SHARDED_STATE_DICT-whole" / "checkpoint-1"
    model, processor = PRMForStepScoring.from_pretrained(folder), PRMProcessor.from_pretrained(folder)
    assert check_clean_load(model, processor, folder) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_training_reports_what_one_process_does(
    prm_folder: Folder, sharded: Path, exact: tuple[float, dict[str, torch.Tensor]], tmp_path: Path, kind: str
) -> None:
    result = torch.load(sharded / "results.pt", weights_only=False)[kind]
    assert (result["engine"], result["parameters"]) == ("DistributedType.FSDP", {"DTensor"})
    assert result["losses"] == [pytest.approx(exact[0], rel=1e-5)]
    trainer, _ = make_trainer(sharded / kind, tmp_path, eval_dataset=make_dataset())
    for name, value in trainer.evaluate().items():
        if "time" not in name and "per_second" not in name and name != "epoch":
            assert result["metrics"][name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_training_goes_on_from_a_checkpoint(sharded: Path, kind: str) -> None:
    first, whole, resumed = (
        load_file(sharded / folder / "model.safetensors")
        for folder in (f"{kind}-whole/checkpoint-1", f"{kind}-whole/checkpoint-2", f"{kind}-resumed/checkpoint-2")
    )
    assert not torch.equal(first["value_head.out.weight"], whole["value_head.out.weight"])
    for name, tensor in whole.items():
        torch.testing.assert_close(
            resumed[name], tensor, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_with_bf16_logits_and_probabilities_stay_float32(sharded: Path) -> None:
    found = torch.load(sharded / "results.pt", weights_only=False)["BF16"]
    assert "param_dtype=torch.bfloat16" in found["policy"]
    model, processor = (
        PRMForStepScoring.from_pretrained(sharded / "BF16"),
        PRMProcessor.from_pretrained(sharded / "BF16"),
    )
    rows = make_rows()[:2]
    batch = processor([row["problem"] for row in rows], [row["steps"] for row in rows], return_tensors="pt")
    with torch.no_grad():
        expected = model.eval()(**batch)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    # The layers computed in bfloat16, and what the head made of it was not rounded again.
    assert 1e-3 < float((found["logits"] - expected.logits).abs().max()) < 0.5
    for name in ("logits", "step_probs"):
        assert found[name].dtype == torch.float32
        assert not torch.equal(found[name], found[name].bfloat16().float())
