"""Going on from a PRM: its head, separator and layout are kept, and what would replace them is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_training import exact_loss_and_gradients, make_arguments, make_dataset, make_rows, run_python

from modeling_prm import PRMForStepScoring, PRMProcessor
from trainer import train
from trainer.adapters import AdapterArguments
from trainer.arguments import ModelArguments
from trainer.prm_trainer import PRMTrainer

MakePRM = Callable[..., tuple[PRMForStepScoring, PRMProcessor]]
Folder = Callable[..., Path]

# Each differs from the default.
UNUSUAL = {
    "head_type": "mlp",
    "separator_token": "<|end_of_step|>",
    "problem_template": "Q: {problem}\n",
    "step_template": "({i}) {step}",
    "step_joiner": " ",
    "max_length": 220,
    "aggregation": "product",
}


@pytest.fixture(scope="module")
def unusual(make_prm: MakePRM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a PRM all of whose options differ from the defaults."""
    folder = tmp_path_factory.mktemp("unusual")
    for part in make_prm("qwen2", **UNUSUAL):
        part.save_pretrained(folder)
    return folder


def scores(model: PRMForStepScoring, processor: PRMProcessor) -> torch.Tensor:
    rows = make_rows()
    batch = processor([row["problem"] for row in rows], [row["steps"] for row in rows], return_tensors="pt")
    with torch.inference_mode():
        return model.eval()(**batch).logits


def write_data(folder: Path) -> Path:
    path = folder / "steps.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    return path


def command(folder: Path, **options: Any) -> list[str]:
    """The words of a command that takes one step on the CPU, without moving a weight."""
    given = {"train_data": write_data(folder), "output_dir": folder / "out", "use_cpu": True, "report_to": "none"}
    given |= {"disable_tqdm": True, "max_steps": 1, "save_strategy": "no", "learning_rate": 0.0, **options}
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


@pytest.mark.parametrize("adapters", [False, True])
def test_head_and_layout_are_kept(unusual: Path, tmp_path: Path, adapters: bool) -> None:
    saved, saved_processor = PRMForStepScoring.from_pretrained(unusual), PRMProcessor.from_pretrained(unusual)
    model, processor = train.start_model(ModelArguments(model=str(unusual)))
    expected = saved.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(scores(model, processor), scores(saved, saved_processor))
    for name, value in UNUSUAL.items():
        assert getattr(model.config, name) == value
    assert model.config.layout == saved.config.layout
    # And the first step of training starts from those very scores.
    model.value_head.dropout.p = 0.0
    loss, _ = exact_loss_and_gradients(saved, saved_processor, make_rows())
    trainer = PRMTrainer(
        model,
        make_arguments(tmp_path, sgd=True, per_device_train_batch_size=8),
        processing_class=processor,
        train_dataset=make_dataset(),
        peft_config=AdapterArguments(lora_r=2) if adapters else None,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert not torch.equal(trainer.model.value_head.out.weight, saved.value_head.out.weight)


@pytest.mark.parametrize("adapters", [False, True])
def test_the_command_goes_on_from_a_prm(unusual: Path, tmp_path: Path, adapters: bool) -> None:
    lora = {"lora_r": 2, "lora_target_modules": "q_proj"} if adapters else {}
    train.main(command(tmp_path, model=unusual, **lora))
    out = tmp_path / "out"
    model, saved = PRMForStepScoring.from_pretrained(out), PRMForStepScoring.from_pretrained(unusual)
    # At a learning rate of 0 all of it is as it was.
    expected = saved.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model.config.layout == saved.config.layout
    assert (out / "adapter" / "adapter_config.json").is_file() == adapters
    card = json.loads((out / "card_data.json").read_text())
    assert card["training"].get("lora_r") == (2 if adapters else None)
    # A local path means nothing to others.
    assert card["base_model"] is None


def test_what_was_trained_with_adapters_is_gone_on_from(unusual: Path, tmp_path: Path) -> None:
    lora = {"lora_r": 2, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1}
    train.main(command(tmp_path, model=unusual, **lora))
    first = PRMForStepScoring.from_pretrained(tmp_path / "out")
    train.main(command(tmp_path, model=tmp_path / "out", output_dir=tmp_path / "second"))
    second = PRMForStepScoring.from_pretrained(tmp_path / "second").state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.state_dict().items())
    adapter_alone = tmp_path / "out" / "checkpoint-1"
    with pytest.raises(SystemExit, match="checkpoint-1 holds adapters alone; give --model the output folder"):
        train.main(command(tmp_path, model=adapter_alone, output_dir=tmp_path / "third"))
    # The run itself is resumed with its own options, and not with others.
    again = {"output_dir": tmp_path / "out", "resume_from_checkpoint": "last", "max_steps": 2}
    with pytest.raises(SystemExit, match="checkpoint-1 holds LoRA adapters; give --lora-r 2"):
        train.main(command(tmp_path, model=unusual, **again))
    train.main(command(tmp_path, model=unusual, **lora | again))
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"head_type": "linear"}, "head_type is 'mlp', not 'linear'"),
        ({"separator_token": "<|step_end|>"}, r"separator_token is '<|end_of_step|>', not '<|step_end|>'"),
        ({"prompt_layout": "chat"}, "prompt_layout is 'plain', not 'chat'"),
        ({"prompt_layout": "plain", "separator_token": "x"}, "separator_token is '<|end_of_step|>', not 'x'. Leave"),
    ],
)
def test_options_that_contradict_it_are_refused(unusual: Path, given: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match="was made with other options, which stay as they are") as error:
        train.start_model(ModelArguments(model=str(unusual), **given))
    assert message in str(error.value)


def test_options_that_agree_or_may_change_are_taken(unusual: Path) -> None:
    same = {"head_type": "mlp", "separator_token": "<|end_of_step|>", "prompt_layout": "plain"}
    changes = {"max_length": 100, "aggregation": "mean", "attn_implementation": "eager"}
    model, processor = train.start_model(
        ModelArguments(model=str(unusual), backbone_dtype="bfloat16", **same, **changes)
    )
    assert (model.config.max_length, processor.max_length) == (100, 100)
    assert model.config.aggregation == "mean"
    assert model.backbone.config._attn_implementation == "eager"
    assert (model.backbone.dtype, model.value_head.out.weight.dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match="max_length=300 is more than the 256 tokens"):
        train.start_model(ModelArguments(model=str(unusual), max_length=300))


def test_dropout_of_the_head_may_change(prm_folder: Folder) -> None:
    for given, expected in ((None, 0.1), (0.3, 0.3)):
        model, _ = train.start_model(ModelArguments(model=str(prm_folder("qwen2")), head_dropout=given))
        assert (model.config.head_dropout, model.value_head.dropout.p) == (expected, expected)


def test_a_prm_is_no_backbone(unusual: Path) -> None:
    with pytest.raises(ValueError, match="is a PRM already, whose head would be lost; go on from it with --model"):
        train.start_model(ModelArguments(backbone=str(unusual)))
    load = r"load it with PRMForStepScoring.from_pretrained\(...\)"
    with pytest.raises(ValueError, match=f"is a PRM already, whose head would be lost; {load}"):
        PRMForStepScoring.from_backbone(unusual)
    model = PRMForStepScoring.from_pretrained(unusual)
    with pytest.raises(ValueError, match=f"is a PRM already, whose head would be lost; {load}"):
        PRMForStepScoring.from_backbone(model, tokenizer=PRMProcessor.from_pretrained(unusual).tokenizer)


def test_a_language_model_is_no_prm(backbone_folder: Folder) -> None:
    with pytest.raises(ValueError, match="is a 'qwen2' model and no PRM; start a new PRM on it with --backbone"):
        train.start_model(ModelArguments(model=str(backbone_folder("qwen2"))))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give --backbone for a new PRM, or --model for one to go on from, and not both; got none"),
        ({"backbone": "b", "model": "m"}, "and not both; got both"),
        ({"backbone": "b", "model_revision": "v"}, "model_revision is given and model is not"),
        ({"model": "m", "backbone_revision": "v"}, "backbone_revision is given and backbone is not"),
    ],
)
def test_exactly_one_start_is_given(
    given: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=message):
        ModelArguments(**given)
    with pytest.raises(SystemExit) as stopped:
        train.main(command(tmp_path, **given))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_prm_of_the_hub_is_read_at_its_revision_and_named_in_the_card(
    unusual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[type, str, str]] = []

    def from_the_hub(kind: type) -> Any:
        real = kind.from_pretrained

        def load(name: str, *, revision: str, **rest: Any) -> Any:
            seen.append((kind, name, revision))
            return real(unusual, **rest)

        return load

    for kind in (PRMForStepScoring, PRMProcessor, train.PRMConfig):
        monkeypatch.setattr(kind, "from_pretrained", from_the_hub(kind))
    monkeypatch.setattr(train, "_model_type", lambda name, revision: "prm")
    (tmp_path / "options.yaml").write_text(yaml.safe_dump({"model": "user/prm", "model_revision": "v2"}))
    train.main([*command(tmp_path), f"--config={tmp_path / 'options.yaml'}"])
    kinds = [kind for kind, name, revision in seen if (name, revision) == ("user/prm", "v2")]
    assert kinds == [train.PRMConfig, PRMForStepScoring, PRMProcessor]
    assert json.loads((tmp_path / "out" / "card_data.json").read_text())["base_model"] == "user/prm"


@pytest.mark.slow
def test_two_processes_train_adapters_alike(unusual: Path, tmp_path: Path) -> None:
    lora = {"lora_r": 2, "learning_rate": 1e-2, "max_steps": 2, "per_device_train_batch_size": 2, "seed": 3}
    lora |= {"train_sampling_strategy": "sequential", "disable_dropout": True}
    done = run_python("trainer.train", *command(tmp_path, model=unusual, **lora), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = {"per_device_train_batch_size": 4, "output_dir": tmp_path / "alone"}
    train.main(command(tmp_path, model=unusual, **lora | alone))
    first, second = (PRMForStepScoring.from_pretrained(tmp_path / name).state_dict() for name in ("out", "alone"))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-4, atol=1e-5)
