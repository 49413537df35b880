"""LoRA adapters: what is trained, its exact gradients, what is saved, and that it merges into a plain PRM."""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from small_training import (
    Gradients,
    exact_loss_and_gradients,
    make_arguments,
    make_dataset,
    make_rows,
    worst_difference,
)

from hub_card.publishing import plain_model
from modeling_prm import PRMConfig, PRMForStepScoring, PRMProcessor
from trainer.adapters import (
    AdapterArguments,
    add_adapters,
    check_same_adapters,
    describe_adapters,
    has_adapters,
    load_adapters,
)
from trainer.model_calibration import Calibration, store_calibration
from trainer.prm_trainer import PRMTrainer
from trainer.publishing import publish_folder

MakePRM = Callable[..., tuple[PRMForStepScoring, PRMProcessor]]
Folder = Callable[..., Path]

LORA = AdapterArguments(lora_r=2, lora_alpha=6)
PREFIX = "base_model.model."


def logits_of(model: Any, processor: PRMProcessor) -> torch.Tensor:
    rows = make_rows()
    batch = processor([row["problem"] for row in rows], [row["steps"] for row in rows], return_tensors="pt")
    with torch.inference_mode():
        return model.eval()(**batch).logits


def trained_parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def shake(model: Any) -> None:
    """Move all that is trained, so that adapters, head and separator row all count."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.normal_(0.0, 0.3, generator=generator)


def make_trainer(
    checkpoint: Path, output_dir: Path, options: Any = LORA, *, eval_dataset: Any = None, **arguments: Any
) -> tuple[PRMTrainer, Gradients]:
    """A trainer of a saved PRM in adapters, or without for None, with its head's dropout off."""
    model = PRMForStepScoring.from_pretrained(checkpoint)
    model.value_head.dropout.p = 0.0
    torch.manual_seed(0)
    gradients = Gradients()
    trainer = PRMTrainer(
        model,
        make_arguments(output_dir, **arguments),
        processing_class=PRMProcessor.from_pretrained(checkpoint),
        train_dataset=make_dataset(),
        eval_dataset=eval_dataset,
        callbacks=[gradients],
        peft_config=options,
    )
    return trainer, gradients


@pytest.mark.parametrize(("family", "head"), [("llama", "linear"), ("gpt2", "mlp"), ("bert", "linear")])
def test_adapters_head_and_separator_row_are_trained_and_nothing_else(
    make_prm: MakePRM, family: str, head: str
) -> None:
    model, processor = make_prm(family, head_type=head)
    plain, before = copy.deepcopy(model), logits_of(model, processor)
    linear = {
        name
        for name, module in model.backbone.named_modules()
        if isinstance(module, (torch.nn.Linear, transformers.pytorch_utils.Conv1D))
    }
    adapted = add_adapters(model, LORA)
    assert has_adapters(adapted)
    assert not has_adapters(plain)
    torch.testing.assert_close(logits_of(adapted, processor), before, rtol=0, atol=0)
    shapes = {name.removeprefix(PREFIX): tuple(p.shape) for name, p in trained_parameters(adapted).items()}
    size = plain.config.text_config.hidden_size
    head_shapes = {
        f"value_head.modules_to_save.default.{n}": tuple(p.shape) for n, p in plain.value_head.named_parameters()
    }
    (row,) = [name for name in shapes if "trainable_tokens_delta" in name]
    assert shapes.pop(row) == (1, size)
    assert {name: shapes.pop(name) for name in head_shapes} == head_shapes
    expected = {f"backbone.{name}.lora_{side}.default.weight" for name in linear for side in "AB"}
    assert shapes.keys() == expected
    assert all(2 in shape for shape in shapes.values()), "rank 2"
    assert describe_adapters(adapted) == {"lora_r": 2, "lora_alpha": 6, "lora_dropout": 0.0}
    assert describe_adapters(plain) == {}


@pytest.mark.parametrize(("family", "head"), [("qwen2", "mlp"), ("gpt2", "linear"), ("gemma3", "linear")])
def test_merged_it_is_a_plain_model_that_scores_the_same(make_prm: MakePRM, family: str, head: str) -> None:
    model, processor = make_prm(family, head_type=head)
    plain, before = copy.deepcopy(model), logits_of(model, processor)
    adapted = add_adapters(model, AdapterArguments(lora_r=4, lora_dropout=0.5))
    shake(adapted)
    expected = logits_of(adapted, processor)
    assert (expected - before).abs().max() > 0.1
    merged = plain_model(adapted)
    assert type(merged) is PRMForStepScoring
    torch.testing.assert_close(logits_of(merged, processor), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(adapted, processor), expected, rtol=0, atol=0)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    changed = (merged.get_input_embeddings().weight != plain.get_input_embeddings().weight).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [processor.separator_token_id]


@pytest.mark.parametrize(("batch", "accumulated"), [(8, 1), (1, 8), (3, 3)])
def test_loss_and_gradients_are_those_of_the_plain_model(
    prm_folder: Folder, tmp_path: Path, batch: int, accumulated: int
) -> None:
    plain = PRMForStepScoring.from_pretrained(prm_folder("qwen2"))
    processor = PRMProcessor.from_pretrained(prm_folder("qwen2"))
    loss, full = exact_loss_and_gradients(plain, processor, make_rows())
    layout = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
    trainer, seen = make_trainer(prm_folder("qwen2"), tmp_path, sgd=True, **layout)
    matrices = {
        n.removeprefix(PREFIX): p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_A" in n
    }
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    found = {name.removeprefix(PREFIX): grad for name, grad in seen.steps[0].items()}
    expected = {
        "value_head.modules_to_save.default.out.weight": full["value_head.out.weight"],
        "value_head.modules_to_save.default.out.bias": full["value_head.out.bias"],
        "backbone.embed_tokens.token_adapter.trainable_tokens_delta.default": full["backbone.embed_tokens.weight"][
            processor.separator_token_id
        ].unsqueeze(0),
    }
    for name, a in matrices.items():
        # y = W x + s B A x with B = 0 at first: the gradient of B is s dW A', that of A is 0.
        layer = name.removesuffix(".lora_A.default.weight")
        expected[name] = torch.zeros_like(a)
        expected[f"{layer}.lora_B.default.weight"] = 6 / 2 * full[f"{layer}.weight"] @ a.T
    assert worst_difference(found, expected) < 1e-5


def test_head_learning_rate_reaches_the_head_in_adapters(prm_folder: Folder, tmp_path: Path) -> None:
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, head_learning_rate=0.5, learning_rate=0.25)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    assert rates.keys() == trained_parameters(trainer.model).keys()
    assert all(rate == (0.5 if "value_head" in name else 0.25) for name, rate in rates.items())


@pytest.fixture(scope="module")
def trained(prm_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> tuple[PRMTrainer, Path]:
    """A trainer with adapters after two steps with checkpoints, and the folder in which it saved its model."""
    folder = tmp_path_factory.mktemp("adapters")
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 3e-2}
    trainer, _ = make_trainer(prm_folder("qwen2"), folder, **options)
    trainer.train()
    trainer.save_model()
    return trainer, folder


def test_the_output_folder_holds_the_merged_model(trained: tuple[PRMTrainer, Path], prm_folder: Folder) -> None:
    trainer, folder = trained
    processor = PRMProcessor.from_pretrained(folder)
    expected = logits_of(trainer.model, processor)
    model = transformers.AutoModel.from_pretrained(folder)
    assert type(model) is PRMForStepScoring
    torch.testing.assert_close(logits_of(model, processor), expected, rtol=1e-5, atol=1e-5)
    start = logits_of(PRMForStepScoring.from_pretrained(prm_folder("qwen2")), processor)
    assert (expected - start).abs().max() > 0.05
    # Transformers would follow adapters in the folder itself to their base model.
    assert not list(folder.glob("adapter_*"))
    assert (folder / "modeling_prm.py").is_file()


@pytest.mark.parametrize("place", ["adapter", "checkpoint-2"])
def test_adapters_alone_load_onto_their_prm(trained: tuple[PRMTrainer, Path], prm_folder: Folder, place: str) -> None:
    trainer, folder = trained
    names = {path.name for path in (folder / place).iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "config.json", "processor_config.json"}
    assert not names & {"model.safetensors", "modeling_prm.py"}
    assert ("optimizer.pt" in names) == (place == "checkpoint-2")
    processor = PRMProcessor.from_pretrained(folder / place)
    loaded = load_adapters(PRMForStepScoring.from_pretrained(prm_folder("qwen2")), folder / place)
    torch.testing.assert_close(logits_of(loaded, processor), logits_of(trainer.model, processor), rtol=0, atol=0)
    assert not trained_parameters(loaded)
    again = load_adapters(PRMForStepScoring.from_pretrained(prm_folder("qwen2")), folder / place, trainable=True)
    assert trained_parameters(again).keys() == trained_parameters(trainer.model).keys()


def test_adapters_bring_their_calibration(trained: tuple[PRMTrainer, Path], prm_folder: Folder, tmp_path: Path) -> None:
    _, folder = trained
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    shutil.copy(folder / "config.json", tmp_path)
    numbers = Calibration(
        **{field.name: () for field in fields(Calibration)} | {"temperature": 2.5, "error_threshold": 0.3}
    )
    store_calibration(tmp_path, numbers)
    for loaded in (
        PRMConfig.from_pretrained(tmp_path),
        load_adapters(PRMForStepScoring.from_pretrained(prm_folder("qwen2")), tmp_path / "adapter").config,
    ):
        assert (loaded.temperature, loaded.error_threshold) == (2.5, 0.3)


@pytest.mark.parametrize("packing", ["pack", "share"])
def test_packed_rows_train_adapters_alike(prm_folder: Folder, tmp_path: Path, packing: str) -> None:
    found = []
    for choice in ("none", packing):
        trainer, seen = make_trainer(prm_folder("qwen2"), tmp_path, sgd=True, packing=choice)
        assert (trainer.packing is None) == (choice == "none")
        trainer.train()
        found.append(seen.steps[0])
    assert worst_difference(found[1], found[0]) < 1e-5


def test_adapters_of_another_prm_or_none_are_refused(
    trained: tuple[PRMTrainer, Path], make_prm: MakePRM, prm_folder: Folder
) -> None:
    _, folder = trained
    other, _ = make_prm("qwen2", separator_token="<other>")
    with pytest.raises(ValueError, match=r"of another PRM: separator_token is '<\|step_end\|>' there"):
        load_adapters(other, folder / "adapter")
    with pytest.raises(ValueError, match="holds no adapters; give a folder with adapter_config"):
        load_adapters(other, prm_folder("qwen2"))


def test_resuming_with_adapters_is_bit_exact(
    prm_folder: Folder, trained: tuple[PRMTrainer, Path], tmp_path: Path
) -> None:
    trainer, folder = trained
    options = {"max_steps": 2, "save_strategy": "no", "learning_rate": 3e-2}
    resumed, _ = make_trainer(prm_folder("qwen2"), tmp_path, **options)
    shake(resumed.model)  # all of which the checkpoint has to bring
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert resumed.state.global_step == 2
    expected = trained_parameters(trainer.model)
    assert trained_parameters(resumed.model).keys() == expected.keys()
    assert all(torch.equal(p, expected[name]) for name, p in trained_parameters(resumed.model).items())


def test_the_best_adapters_are_loaded_at_the_end(prm_folder: Folder, tmp_path: Path) -> None:
    # The loss falls, so that the highest is that of an earlier step.
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"learning_rate": 3e-2, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    options |= {"greater_is_better": True}
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, eval_dataset=make_dataset(), **options)
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = max(losses, key=lambda step: losses[step])
    assert best != 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)
    trainer.save_model()
    processor = PRMProcessor.from_pretrained(tmp_path)
    base = PRMForStepScoring.from_pretrained(prm_folder("qwen2"))
    expected = logits_of(load_adapters(base, tmp_path / f"checkpoint-{best}"), processor)
    torch.testing.assert_close(
        logits_of(PRMForStepScoring.from_pretrained(tmp_path), processor), expected, rtol=1e-5, atol=1e-5
    )


def test_published_it_is_a_plain_checkpoint(trained: tuple[PRMTrainer, Path]) -> None:
    trainer, folder = trained
    trainer.hub_model_id = "user/prm"
    # Loads in a clean process and compares the logits with those of the merged model in memory.
    publication = publish_folder(trainer, str(folder), dry_run=True)
    assert "model.safetensors" in publication.files
    assert not any("adapter" in name for name in publication.files)
    assert publication.card.replace("\\", "").count("| lora_r | 2 |") == 1
    assert has_adapters(trainer.model), "training goes on with the adapters"


def test_a_checkpoint_of_other_adapters_is_not_gone_on_from(
    trained: tuple[PRMTrainer, Path], make_prm: MakePRM, tmp_path: Path
) -> None:
    trainer, folder = trained
    checkpoint = str(folder / "checkpoint-1")
    check_same_adapters(trainer.model, checkpoint)
    plain, _ = make_prm("qwen2")
    check_same_adapters(plain, str(tmp_path))
    with pytest.raises(ValueError, match="checkpoint-1 holds LoRA adapters; give --lora-r 2 and"):
        check_same_adapters(plain, checkpoint)
    for options, message in (
        (AdapterArguments(lora_r=3, lora_alpha=6), "r was 2"),
        (AdapterArguments(lora_r=2), "lora_alpha was 6"),
        (AdapterArguments(lora_r=2, lora_alpha=6, lora_target_modules=["q_proj"]), "target_modules was"),
    ):
        with pytest.raises(ValueError, match=f"trained with other adapters: {message}"):
            check_same_adapters(add_adapters(make_prm("qwen2")[0], options), checkpoint)
    with pytest.raises(ValueError, match="was trained without adapters; leave out --lora-r"):
        check_same_adapters(add_adapters(plain, LORA), str(tmp_path))


def test_a_config_of_peft_is_completed(make_prm: MakePRM) -> None:
    model, _ = make_prm("qwen2", head_type="mlp")
    given = peft.LoraConfig(
        r=3, target_modules=["q_proj", "dense"], task_type="TOKEN_CLS", exclude_modules=["1.self_attn.q_proj"]
    )
    unchanged = copy.deepcopy(given)
    adapted = add_adapters(model, given)
    assert type(adapted) is peft.PeftModel
    assert given == unchanged
    layers = {
        name.partition(".lora_")[0].removeprefix(PREFIX) for name in trained_parameters(adapted) if ".lora_" in name
    }
    assert layers == {"backbone.layers.0.self_attn.q_proj"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"separator"}),
        ({"trainable_token_indices": [5, 7]}, {5, 7, "separator"}),
        ({"trainable_token_indices": {"embed_tokens": [5]}}, {5, "separator"}),
        # All rows are trained, once.
        ({"modules_to_save": ["embed_tokens"]}, set(range(400))),
    ],
)
def test_the_separators_row_is_trained_beside_those_of_a_config(
    make_prm: MakePRM, given: dict[str, Any], expected: set[Any]
) -> None:
    model, processor = make_prm("qwen2")
    before = model.get_input_embeddings().weight.detach().clone()
    assert len(before) == 400
    adapted = add_adapters(model, peft.LoraConfig(r=2, target_modules=["q_proj"], **given))
    shake(adapted)
    logits = logits_of(adapted, processor)
    merged = plain_model(adapted)
    changed = (merged.get_input_embeddings().weight != before).any(dim=1).nonzero().flatten().tolist()
    assert set(changed) == {processor.separator_token_id if row == "separator" else row for row in expected}
    torch.testing.assert_close(logits_of(merged, processor), logits, rtol=0.0, atol=1e-5)


def test_chosen_layers_have_adapters(make_prm: MakePRM) -> None:
    adapted = add_adapters(
        make_prm("qwen2")[0], AdapterArguments(lora_r=2, lora_dropout=0.25, lora_target_modules=["v_proj", "up_proj"])
    )
    layers = {
        name.partition(".lora_")[0].rpartition(".")[2] for name in trained_parameters(adapted) if ".lora_" in name
    }
    assert layers == {"v_proj", "up_proj"}
    assert describe_adapters(adapted) == {"lora_r": 2, "lora_alpha": 4, "lora_dropout": 0.25}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_r": 0}, "lora_r must be at least 1"),
        ({"lora_r": 1, "lora_dropout": 1.0}, r"lora_dropout in \[0, 1\), got 1 and 1.0"),
        ({"lora_r": 1, "lora_alpha": 0}, "lora_alpha must be above 0"),
        ({"lora_r": 1, "lora_target_modules": []}, "lora_target_modules must not be empty"),
        ({"lora_alpha": 8}, "give --lora-r, or leave them out"),
        ({"lora_dropout": 0.1}, "give --lora-r, or leave them out"),
        ({"lora_target_modules": ["q_proj"]}, "give --lora-r, or leave them out"),
    ],
)
def test_values_outside_those_allowed_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterArguments(**options)


def test_models_and_configs_that_would_not_train_a_prm_are_refused(
    make_prm: MakePRM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = make_prm("qwen2")
    with pytest.raises(ValueError, match="asks for no adapters"):
        add_adapters(model, AdapterArguments())
    with pytest.raises(TypeError, match=r"must be AdapterArguments or peft\.LoraConfig, got IA3Config"):
        add_adapters(model, peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    for targets in (["no_such", "q_proj"], ["value_head.out"]):
        message = f"no layer of the backbone is named {targets[0]}; its linear layers are down_proj, gate_proj, k_proj"
        with pytest.raises(ValueError, match=message):
            add_adapters(copy.deepcopy(model), AdapterArguments(lora_r=2, lora_target_modules=targets))
    data = {"processing_class": processor, "train_dataset": make_dataset()}
    with pytest.raises(ValueError, match="freeze_backbone trains the head alone"):
        PRMTrainer(copy.deepcopy(model), make_arguments(tmp_path, freeze_backbone=True), **data, peft_config=LORA)
    headless = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"the value head .* would stay as it is; make it with trainer.adapters"):
        PRMTrainer(headless, make_arguments(tmp_path), **data)
    with pytest.raises(ValueError, match="has adapters already"):
        PRMTrainer(add_adapters(model, LORA), make_arguments(tmp_path), **data, peft_config=LORA)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'pip install "modeling-prm\[train\]"'):
        add_adapters(make_prm("qwen2")[0], LORA)


@pytest.mark.parametrize("options", [LORA, None], ids=["adapters", "all weights"])
def test_bf16_autocast_trains_in_float32_weights(prm_folder: Folder, tmp_path: Path, options: Any) -> None:
    arguments = {"bf16": True, "max_steps": 12, "learning_rate": 1e-2, "per_device_train_batch_size": 8}
    trainer, _ = make_trainer(prm_folder("qwen2"), tmp_path, options, logging_steps=1, **arguments)
    seen = set()
    layer = next(module for name, module in trainer.model.named_modules() if name.endswith("1.mlp.down_proj"))
    layer.register_forward_hook(lambda _, args, out: seen.add(out.dtype))
    trainer.train()
    assert seen == {torch.bfloat16}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("options", [LORA, None], ids=["adapters", "all weights"])
def test_gradient_checkpointing_computes_the_same(prm_folder: Folder, tmp_path: Path, options: Any) -> None:
    found, calls = [], []
    for checkpointing in (False, True):
        folder = tmp_path / str(checkpointing)
        trainer, seen = make_trainer(
            prm_folder("qwen2"), folder, options, sgd=True, gradient_checkpointing=checkpointing
        )
        layers = dict(trainer.model.named_modules())
        count = {"layers.0.mlp": 0, "layers.1.mlp": 0}
        for end in count:
            layer = next(module for name, module in layers.items() if name.endswith(end))
            layer.register_forward_pre_hook(lambda *_, count=count, end=end: count.update({end: count[end] + 1}))
        trainer.train()
        found.append(seen.steps[0])
        calls.append(count)
    assert not any(name.endswith("layers.2") for name in layers)
    assert calls[1]["layers.0.mlp"] == 2 * calls[0]["layers.0.mlp"], "it must run again for the gradients"
    assert calls[1]["layers.1.mlp"] == calls[0]["layers.1.mlp"], "the last layer's activations are needed at once"
    assert worst_difference(found[1], found[0]) < 1e-6


@pytest.mark.parametrize(
    "options",
    [AdapterArguments(lora_r=2, lora_target_modules=["down_proj"]), None],
    ids=["adapters", "all weights"],
)
def test_compiled_it_computes_the_same(prm_folder: Folder, tmp_path: Path, options: Any) -> None:
    runs = []
    for compiled in (False, True):
        # This backend traces forward and backward as the others do, and needs no compiler of C++.
        choice = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        folder = tmp_path / str(compiled)
        trainer, seen = make_trainer(prm_folder("qwen2"), folder, options, sgd=True, **choice)
        before = torch._dynamo.utils.counters["frames"]["ok"]
        trainer.train()
        assert (torch._dynamo.utils.counters["frames"]["ok"] > before) == compiled
        trainer.save_model()
        grads = {name.replace("_orig_mod.", ""): grad for name, grad in seen.steps[0].items()}
        runs.append((grads, PRMForStepScoring.from_pretrained(folder), trainer.processing_class))
    (grads, model, processor), (compiled_grads, compiled_model, _) = runs
    assert worst_difference(compiled_grads, grads) < 1e-5
    torch.testing.assert_close(logits_of(compiled_model, processor), logits_of(model, processor), rtol=1e-4, atol=1e-4)
