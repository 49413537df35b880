from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import published_prms as pub
import pytest
import tiny_models
import torch
from clean_process import run_clean
from test_hub_card_convert_import import CASES
from torch import nn
from transformers import AutoTokenizer

from hub_card.convert import export_prm, import_prm
from hub_card.errors import CheckpointError
from modeling_prm import PRMForStepScoring, PRMProcessor

MakePRM = Callable[..., tuple[PRMForStepScoring, PRMProcessor]]
PROBLEMS = ["What is 12 + 30?", "Ann has {x} apples, naïvely."]
SOLUTIONS = [["12 + 30 = 42.", "So <|im_end|> it is 四."], ["3 * 4 = 12."]]
TOKEN_CLASSIFIERS = (
    *("qwen2", "qwen3", "qwen3_moe", "llama", "mistral", "gpt2", "phi", "gpt_neox", "bert", "roberta"),
)


def token_probs(prm: pub.Published, processor: PRMProcessor) -> list[list[float]]:
    """What a client reads from a served export: the second of two probabilities at each step's position."""
    found = []
    for item in processor.encode(PROBLEMS, SOLUTIONS):
        logits = prm.logits(item.input_ids) if prm.head is None else prm.head(prm.hidden(item.input_ids))
        found.append(logits.softmax(dim=-1)[item.step_positions, 1].tolist())
    return found


def our_probs(model: PRMForStepScoring, processor: PRMProcessor) -> list[Any]:
    scores = model.verifier(processor).score_solutions(PROBLEMS, SOLUTIONS)
    return [pytest.approx(list(score.step_probs), abs=1e-5) for score in scores]


@pytest.mark.parametrize("family", TOKEN_CLASSIFIERS)
def test_token_classification_of_every_family(family: str, make_prm: MakePRM, tmp_path: Path) -> None:
    model, processor = make_prm(family)
    model.config.temperature = 1.7
    folder = export_prm(model, tmp_path / "export", layout="token_classification", processor=processor)
    assert folder == tmp_path / "export"
    assert not list(folder.glob("*.py"))
    config = json.loads((folder / "config.json").read_text())
    assert "auto_map" not in config
    assert config["id2label"] == {"0": "incorrect", "1": "correct"}
    plain = pub.load_token_classification(folder)
    assert type(plain.model).__name__ == config["architectures"][0]
    assert token_probs(plain, processor) == our_probs(model, processor)
    again = PRMProcessor(plain.tokenizer, **{**model.config.layout, "max_length": 256})
    assert again.encode(PROBLEMS, SOLUTIONS) == processor.encode(PROBLEMS, SOLUTIONS)
    # The logits are 0 and z.
    assert plain.logits(processor.encode(PROBLEMS, SOLUTIONS)[0].input_ids)[:, 0].abs().max() == 0


@pytest.mark.parametrize("head_type", ["linear", "mlp"])
@pytest.mark.parametrize("classes", [{}, {"num_labels": 2, "class_weights": [1.0, 0.0]}])
def test_qwen2_prm(head_type: str, classes: dict[str, Any], make_prm: MakePRM, tmp_path: Path) -> None:
    model, processor = make_prm("qwen2", head_type=head_type, **classes)
    model.config.temperature = 0.6
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    folder = export_prm(tmp_path / "ours", tmp_path / "export", layout="qwen2_prm")
    assert sorted(file.name for file in folder.iterdir()) == [
        *("config.json", "model.safetensors", "prm_layout.json", "tokenizer.json", "tokenizer_config.json"),
    ]
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["Qwen2ForProcessRewardModel"], "qwen2")
    assert "auto_map" not in config
    plain = pub.load_qwen2_prm(folder)
    assert token_probs(plain, processor) == our_probs(model, processor)
    again = PRMProcessor(plain.tokenizer, **model.config.layout)
    assert again.encode(PROBLEMS, SOLUTIONS) == processor.encode(PROBLEMS, SOLUTIONS)
    # What a server is told: the separator's id.
    assert json.loads((folder / "prm_layout.json").read_text())["separator_token_id"] == processor.separator_token_id


def test_relu_of_a_row_and_of_its_negative(make_prm: MakePRM, tmp_path: Path) -> None:
    model, processor = make_prm("qwen2")
    head = pub.load_qwen2_prm(export_prm(model, tmp_path, layout="qwen2_prm", processor=processor)).head
    row, bias = model.value_head.out.weight[0].detach(), model.value_head.out.bias[0].detach()
    torch.testing.assert_close(head[0].weight[:2], torch.stack([row, -row]))
    torch.testing.assert_close(head[0].bias[:2], torch.stack([bias, -bias]))
    assert head[2].weight[:, :2].tolist() == [[0.0, 0.0], [1.0, -1.0]]
    for rest in (head[0].weight[2:], head[0].bias[2:], head[2].weight[:, 2:], head[2].bias):
        assert rest.abs().max() == 0


def test_bfloat16_keeps_the_head_exact(make_prm: MakePRM, tmp_path: Path) -> None:
    model, processor = make_prm("llama")
    model.backbone.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "ours")
    model = PRMForStepScoring.from_pretrained(tmp_path / "ours", dtype="bfloat16")
    folder = export_prm(model, tmp_path / "export", layout="token_classification", processor=processor)
    plain = pub.load_token_classification(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    # Loaded in float32 both are the same model.
    model = PRMForStepScoring.from_pretrained(tmp_path / "ours", dtype="float32")
    assert token_probs(plain, processor) == our_probs(model, processor)


@pytest.mark.parametrize("case", CASES)
def test_a_published_prm_imported_and_exported_scores_as_before(case: str, tmp_path: Path) -> None:
    write, scores, options = CASES[case]
    published = write(tmp_path / "published")
    import_prm(tmp_path / "published", tmp_path / "ours", **options)
    if case.startswith("reasoneval"):
        with pytest.raises(ValueError, match="a PRM of 3 classes cannot be exported"):
            export_prm(tmp_path / "ours", tmp_path / "export", layout="token_classification")
        return
    layout = "qwen2_prm" if case in ("qwen2_prm", "reasonflux") else "token_classification"
    export_prm(tmp_path / "ours", tmp_path / "export", layout=layout)
    processor = PRMProcessor.from_pretrained(tmp_path / "ours")
    plain = (pub.load_qwen2_prm if layout == "qwen2_prm" else pub.load_token_classification)(tmp_path / "export")
    again_model, again_processor = import_prm(tmp_path / "export")
    again = again_model.verifier(again_processor)
    for problem, steps in zip(pub.PROBLEMS, pub.SOLUTIONS, strict=True):
        ids, probs = scores(published, problem, steps)
        item = processor.encode([problem], [steps])[0]
        logits = plain.logits(ids) if plain.head is None else plain.head(plain.hidden(ids))
        assert logits.softmax(dim=-1)[item.step_positions, 1].tolist() == pytest.approx(probs, abs=1e-5)
        assert again_processor.encode([problem], [steps])[0] == item
        assert again.score_solution(problem, steps).step_probs == pytest.approx(probs, abs=1e-5)


def test_plain_transformers_in_a_clean_process(make_prm: MakePRM, tmp_path: Path) -> None:
    model, processor = make_prm("qwen3")
    folder = export_prm(model, tmp_path / "export", layout="token_classification", processor=processor)
    code = """
import torch
from transformers import pipeline
classify = pipeline("token-classification", model=arguments["folder"])
ids = torch.tensor([arguments["ids"]])
result = classify.model(ids).logits[0].softmax(dim=-1)[:, 1].tolist()
"""
    item = processor.encode(PROBLEMS, SOLUTIONS)[0]
    found = run_clean(code, folder=tmp_path / "process", arguments={"folder": str(folder), "ids": item.input_ids})
    assert [found[position] for position in item.step_positions] == our_probs(model, processor)[0]


@pytest.mark.parametrize(
    ("family", "options", "layout", "message"),
    [
        ("llama", {}, "qwen2_prm", "has a qwen2 backbone, this PRM a llama one; use layout='token_classification'"),
        ("llama", {"head_type": "mlp"}, "token_classification", r"this PRM an mlp one \(head_type='mlp'\)"),
        ("qwen2", {"head_type": "mlp"}, "token_classification", "or with layout='qwen2_prm'"),
        (
            "qwen2",
            {"num_labels": 3, "class_weights": [0.0, 1.0, 1.0]},
            "qwen2_prm",
            "a PRM of 3 classes cannot be exported",
        ),
        (
            "llama",
            {"num_labels": 2, "class_weights": [0.5, 1.0]},
            "token_classification",
            r"class_weights=\[0.5, 1.0\] cannot be exported",
        ),
        ("gemma3", {}, "token_classification", "no token classification model for a gemma3_text backbone"),
        ("modernbert", {}, "token_classification", r"has weights between backbone and logits \(head\.dense\.weight"),
        ("qwen2", {"separator_token": "x"}, "qwen2_prm", "can stand in a problem or a step too"),
        ("llama", {}, "gguf", "layout must be one of 'qwen2_prm', 'token_classification', got 'gguf'"),
    ],
)
def test_what_cannot_be_represented(
    family: str, options: dict[str, Any], layout: str, message: str, make_prm: MakePRM, tmp_path: Path
) -> None:
    model, processor = make_prm(family, **options)
    with pytest.raises(ValueError, match=message):
        export_prm(model, tmp_path / "export", layout=layout, processor=processor)
    assert not (tmp_path / "export").exists()


def test_score_beside_the_separator_needs_a_row_a_token(make_prm: MakePRM, tmp_path: Path) -> None:
    model, processor = make_prm("qwen2")
    model.config.score_offset = -1
    processor = PRMProcessor(processor.tokenizer, **model.config.layout)
    with pytest.raises(ValueError, match=r"one token before it \(score_offset=-1\); use layout='token_classification'"):
        export_prm(model, tmp_path / "export", layout="qwen2_prm", processor=processor)
    folder = export_prm(model, tmp_path / "export", layout="token_classification", processor=processor)
    assert token_probs(pub.load_token_classification(folder), processor) == our_probs(model, processor)


@pytest.mark.parametrize("layout", ["qwen2_prm", "token_classification"])
def test_tokenizer_that_would_load_with_other_ids(layout: str, tmp_path: Path) -> None:
    """Beside a Qwen2 config AutoTokenizer makes a Qwen2Tokenizer, which cuts text in another way."""
    tokenizer = tiny_models.byte_level_tokenizer()
    backbone = tiny_models.write_backbone("qwen2", tmp_path / "backbone")
    assert AutoTokenizer.from_pretrained(backbone)("12 + 30")["input_ids"] != tokenizer("12 + 30")["input_ids"]
    model, processor = PRMForStepScoring.from_backbone(backbone, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"loads the exported tokenizer as Qwen2Tokenizer.*tokenizer=False"):
        export_prm(model, tmp_path / "export", layout=layout, processor=processor)
    assert not (tmp_path / "export").exists()
    folder = export_prm(model, tmp_path / "export", layout=layout, processor=processor, tokenizer=False)
    assert not list(folder.glob("tokenizer*"))


def test_arguments(make_prm: MakePRM, tmp_path: Path) -> None:
    model, processor = make_prm("llama")
    with pytest.raises(TypeError, match="needs its processor"):
        export_prm(model, tmp_path / "export", layout="token_classification")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old.safetensors").touch()
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        export_prm(model, tmp_path / "full", layout="token_classification", processor=processor)
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["old.safetensors"]


def test_an_export_that_scores_otherwise_is_not_left(
    make_prm: MakePRM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = make_prm("llama")
    mode = model.train().training

    def wrong(head: Any) -> nn.Linear:
        return nn.Linear(head.weight.shape[1], 2)

    monkeypatch.setattr("hub_card.export_token_classification._linear", wrong)
    with pytest.raises(CheckpointError, match="scores otherwise than the PRM it was made of"):
        export_prm(model, tmp_path / "export", layout="token_classification", processor=processor)
    assert not (tmp_path / "export").exists()
    assert model.training is mode
