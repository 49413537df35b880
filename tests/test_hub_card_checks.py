"""What is refused before publishing, with its reason."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hub_card import checks
from hub_card.checks import PROBE_PROBLEMS, PROBE_SOLUTIONS, check_clean_load, check_nothing_private, check_weights
from hub_card.clean_process import CleanScores
from hub_card.errors import CheckpointError
from modeling_prm import PRMForStepScoring

MakePRM = Callable[..., tuple[Any, Any]]


def change(model: Any, name: str, value: float) -> None:
    """Set the first number of a weight."""
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[0] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["value_head.out.weight", "backbone.layers.1.mlp.down_proj.weight"])
def test_one_number_that_is_not_finite_is_refused(make_prm: MakePRM, name: str, value: float) -> None:
    model, _ = make_prm()
    check_weights(model)
    change(model, name, value)
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinite values"):
        check_weights(model)


@pytest.mark.parametrize("options", [{}, {"head_type": "mlp"}, {"num_labels": 3, "class_weights": [1.0, 0.5, 0.0]}])
def test_a_head_as_it_was_initialized_is_refused_and_one_step_of_training_is_enough(
    backbone_folder: Callable[[str], Path], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model, processor = PRMForStepScoring.from_backbone(backbone_folder("llama"), **options)
    with pytest.raises(CheckpointError, match=r"the value head looks as it was initialized .* train it first"):
        check_weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    batch = processor("1 + 1?", ["2.", "So 2."], return_tensors="pt")
    model(**batch, labels=torch.tensor([[1.0, 0.0 if model.config.num_labels == 1 else 2.0]])).loss.backward()
    optimizer.step()
    check_weights(model)


def test_a_head_of_zeros_is_refused(make_prm: MakePRM) -> None:
    model, _ = make_prm()
    torch.nn.init.zeros_(model.value_head.out.weight)
    with pytest.raises(CheckpointError, match="the value head's weights are all 0, so every step scores the same"):
        check_weights(model)


def test_what_looks_trained_by_its_spread_is_taken_with_a_bias_of_zero(make_prm: MakePRM) -> None:
    """Converted heads may have none; theirs is as wide as training made it."""
    model, _ = make_prm()
    torch.nn.init.zeros_(model.value_head.out.bias)
    assert model.value_head.out.weight.std().item() > 0.2  # initialized at 0.02
    check_weights(model)


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets the clean process answer with ids and logits of the test's choice."""

    def answer(ids: torch.Tensor, logits: torch.Tensor) -> None:
        def score(folder: Path, problems: Any, solutions: Any) -> CleanScores:
            assert (problems, solutions) == (PROBE_PROBLEMS, PROBE_SOLUTIONS)
            return CleanScores(input_ids=ids, logits=logits, step_probs=logits.sigmoid(), model_module="x")

        monkeypatch.setattr(checks, "score_in_clean_process", score)

    return answer


def probe(model: Any, processor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch = processor(list(PROBE_PROBLEMS), [list(steps) for steps in PROBE_SOLUTIONS], return_tensors="pt")
    with torch.no_grad():
        return batch["input_ids"], model(**batch).logits


@pytest.mark.parametrize(("dtype", "below", "above"), [(torch.float32, 5e-4, 2e-3), (torch.bfloat16, 0.05, 0.2)])
def test_logits_may_differ_by_rounding_alone(
    make_prm: MakePRM, clean: Callable[..., None], tmp_path: Path, dtype: torch.dtype, below: float, above: float
) -> None:
    model, processor = make_prm(dtype=dtype)
    ids, logits = probe(model, processor)
    model.train()
    one = torch.zeros_like(logits)
    one[1, 0] = 1.0
    clean(ids, logits + below * one)
    assert check_clean_load(model, processor, tmp_path) == pytest.approx(below, rel=1e-2)
    assert model.training
    clean(ids, logits - above * one)
    with pytest.raises(CheckpointError) as raised:
        check_clean_load(model, processor, tmp_path)
    shown = [round(value, 4) for value in logits.flatten().tolist()]
    assert f"logits differ by up to {above:.3g}" in str(raised.value)
    assert f"rounding in {'float32' if dtype == torch.float32 else 'bfloat16'}" in str(raised.value)
    assert f"in memory {shown}, saved [{shown[0]}, {shown[1]}, " in str(raised.value)


def test_numbers_that_are_not_finite_differ_from_those_that_are(
    make_prm: MakePRM, clean: Callable[..., None], tmp_path: Path
) -> None:
    model, processor = make_prm()
    ids, logits = probe(model, processor)
    broken = logits.clone()
    broken[0, 1] = float("nan")
    clean(ids, broken)
    with pytest.raises(CheckpointError, match="logits differ by up to nan"):
        check_clean_load(model, processor, tmp_path)
    torch.nn.init.constant_(model.value_head.out.bias, float("nan"))
    clean(ids, logits)
    with pytest.raises(CheckpointError, match="logits differ by up to nan"):
        check_clean_load(model, processor, tmp_path)
    clean(ids, probe(model, processor)[1])
    assert check_clean_load(model, processor, tmp_path) == 0.0


def test_other_ids_are_refused(make_prm: MakePRM, clean: Callable[..., None], tmp_path: Path) -> None:
    model, processor = make_prm()
    ids, logits = probe(model, processor)
    other = ids.clone()
    other[0, 2] += 1
    clean(other, logits)
    with pytest.raises(
        CheckpointError, match=r"gives other ids in a clean process than in memory.*got \[\d+, .*\], in"
    ):
        check_clean_load(model, processor, tmp_path)


HOME, CWD, TEMPORARY, HOST = "/home/a_person", "/srv/data", "/scratch", "gpu-box-7"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path(HOME))
    monkeypatch.setattr(os, "getcwd", lambda: CWD)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: TEMPORARY)
    monkeypatch.setattr(checks.platform, "node", lambda: HOST)
    monkeypatch.setattr(checks, "get_token", lambda: "hf_in_use")


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("file", "text", "what"),
    [
        ("README.md", "I use hf_in_use.", "the Hub token"),
        ("README.md", r"I use hf\_in\_use.", "the Hub token"),
        ("README.md", "with hf_given", "the Hub token"),
        ("config.json", json.dumps({"note": ["hf_in_use"]}), "the Hub token"),
        ("README.md", "trained in /home/a_person/runs", "the local path /home/a_person"),
        ("README.md", r"trained in /home/a\_person", "the local path /home/a_person"),
        ("config.json", json.dumps({"x": {"_name_or_path": "/home/a_person"}}), "the local path /home/a_person"),
        ("config.json", json.dumps({"x": "first\n/srv/data/run"}), "the local path /srv/data"),
        ("evaluation_results.json", json.dumps([{"note": "file:///scratch/x"}]), "the local path /scratch"),
        ("README.md", "on gpu-box-7 with", "the name of this machine"),
        ("chat_template.jinja", "{{ 'gpu-box-7' }}", "the name of this machine"),
    ],
)
def test_what_is_private_is_found(tmp_path: Path, file: str, text: str, what: str) -> None:
    (tmp_path / "README.md").write_text("# fine\n")
    (tmp_path / file).write_text(text)
    with pytest.raises(CheckpointError, match=f"{file} would publish {what}; take it out") as raised:
        check_nothing_private(tmp_path, token="hf_given")
    assert "hf_" not in str(raised.value)
    if what == "the Hub token":
        with pytest.raises(CheckpointError, match=what):
            check_nothing_private(tmp_path, token="hf_given", only_token=True)
    else:
        check_nothing_private(tmp_path, token="hf_given", only_token=True)


@pytest.mark.usefixtures("machine")
def test_a_path_outside_ascii_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/zoë"))
    (tmp_path / "config.json").write_text(json.dumps({"x": "/home/zoë/x"}))
    with pytest.raises(CheckpointError, match="would publish the local path /home/zoë"):
        check_nothing_private(tmp_path)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("text", ["from {}.", "- {}/", "from: `{}`", "file://{}", "a\n{}\nb"])
def test_a_path_anywhere_that_exists_here_is_found(tmp_path: Path, text: str) -> None:
    """Such as a base model on a disk of its own; `machine` moves the places that are known by themselves away."""
    (model := tmp_path / "models" / "my_base-1.5").mkdir(parents=True)
    (folder := tmp_path / "out").mkdir()
    for name in (str(model), str(model).replace("_", r"\_")):
        (folder / "README.md").write_text(text.format(name))
        with pytest.raises(CheckpointError, match=f"README.md would publish the local path {model}"):
            check_nothing_private(folder)
    check_nothing_private(folder, only_token=True)
    (folder / "README.md").write_text(text.format(f"{model}-other") + f" see https://x.org{model} and {'/a' * 3000}")
    check_nothing_private(folder)


@pytest.mark.usefixtures("machine")
def test_words_that_hold_others_are_no_find(tmp_path: Path) -> None:
    """A data set `them/srv/data` or `x/scratch` is no path of this machine, nor is `gpu-box-77` this machine."""
    text = "them/srv/data us/scratch https://x.org/scratch /scratchy /srv/data-2 gpu-box-77 my-gpu-box-7 hf_in_us"
    (tmp_path / "README.md").write_text(text)
    (tmp_path / "config.json").write_text(json.dumps({"x": text}))
    # Vocabularies and weights are not text of ours.
    (tmp_path / "tokenizer.json").write_text('{"/scratch": 1}')
    (tmp_path / "model.safetensors").write_bytes(b"/scratch")
    check_nothing_private(tmp_path)


def test_an_empty_token_and_the_root_folder_are_in_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getcwd", lambda: "/")
    monkeypatch.setattr(checks.platform, "node", lambda: "")
    (tmp_path / "README.md").write_text("a / b\n")
    check_nothing_private(tmp_path, token="")
