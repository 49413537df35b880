"""`PRMConfig`: what it accepts, what it refuses and with which words, and what a saved one keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_models import FAMILIES
from transformers import AutoConfig

from modeling_prm import PRMConfig


def llama(**options: Any) -> transformers.LlamaConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return transformers.LlamaConfig(**{**sizes, "max_position_embeddings": 256, "vocab_size": 400, **options})


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_lenght", "max_length"),
        ("seperator_token", "separator_token"),
        ("head_typ", "head_type"),
        ("class_weight", "class_weights"),
        ("text_confg", "text_config"),
        ("num_label", "num_labels"),
    ],
)
def test_mistyped_option_is_refused_with_the_right_one(name: str, hint: str) -> None:
    with pytest.raises(TypeError, match=rf"^PRMConfig has no option '{name}'; did you mean '{hint}'\?$"):
        PRMConfig(text_config=llama(), **{name: 1})


def test_unknown_option_is_refused_without_a_wrong_hint() -> None:
    with pytest.raises(TypeError, match=r"^PRMConfig has no option 'colour'$"):
        PRMConfig(colour="red")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_type": 1}, r"head_type must be str, got 1 \(int\)"),
        ({"head_dropout": "0.1"}, "head_dropout must be float or int, got '0.1'"),
        ({"head_dropout": True}, "head_dropout must be float or int, got True"),
        ({"class_weights": 1.0}, "class_weights must be list or tuple or None, got 1.0"),
        ({"separator_token": None}, "separator_token must be str, got None"),
        ({"separator_token_id": "5"}, "separator_token_id must be int or None, got '5'"),
        ({"separator_token_id": True}, "separator_token_id must be int or None, got True"),
        ({"separator_is_reserved": 1}, "separator_is_reserved must be bool, got 1"),
        ({"score_offset": 0.0}, "score_offset must be int, got 0.0"),
        ({"prompt_layout": ["chat"]}, "prompt_layout must be str"),
        ({"problem_template": 3}, "problem_template must be str"),
        ({"step_template": None}, "step_template must be str"),
        ({"step_joiner": 0}, "step_joiner must be str"),
        ({"max_length": "512"}, "max_length must be int or None, got '512'"),
        ({"max_length": 512.0}, r"max_length must be int or None, got 512.0 \(float\)"),
        ({"aggregation": None}, "aggregation must be str, got None"),
        ({"layout_version": "1"}, "layout_version must be int, got '1'"),
        ({"temperature": "1"}, "temperature must be float or int, got '1'"),
        ({"temperature": None}, "temperature must be float or int, got None"),
        ({"error_threshold": True}, "error_threshold must be float or int, got True"),
        ({"text_config": "llama"}, "text_config must be a config or its dictionary, got str"),
    ],
)
def test_wrong_types_are_type_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        PRMConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_type": "conv"}, "head_type must be one of 'linear', 'mlp', got 'conv'"),
        ({"prompt_layout": "qwen"}, "prompt_layout must be one of 'plain', 'chat', got 'qwen'"),
        ({"aggregation": "median"}, "aggregation must be one of 'min', 'product', .*got 'median'"),
        ({"score_offset": 1}, "score_offset must be one of 0, -1, got 1"),
        ({"score_offset": -2}, "score_offset must be one of 0, -1, got -2"),
        ({"head_dropout": 1.0}, "head_dropout must be at least 0 and below 1, got 1.0"),
        ({"head_dropout": -0.1}, "head_dropout must be at least 0 and below 1, got -0.1"),
        ({"head_dropout": float("nan")}, "head_dropout must be at least 0 and below 1, got nan"),
        ({"temperature": 0}, "temperature must be above 0 and finite, got 0"),
        ({"temperature": -1.0}, "temperature must be above 0 and finite, got -1.0"),
        ({"temperature": float("inf")}, "temperature must be above 0 and finite, got inf"),
        ({"temperature": float("nan")}, "temperature must be above 0 and finite, got nan"),
        ({"error_threshold": 1.01}, r"error_threshold must be in \[0, 1\], got 1.01"),
        ({"error_threshold": -0.01}, r"error_threshold must be in \[0, 1\], got -0.01"),
        ({"error_threshold": float("nan")}, r"error_threshold must be in \[0, 1\], got nan"),
        ({"separator_token": ""}, "separator_token must not be empty"),
        ({"max_length": 0}, "max_length must be None or at least 1, got 0"),
        ({"separator_token_id": -1}, "separator_token_id must be None or at least 0, got -1"),
        ({"problem_template": "Problem:"}, r"problem_template must hold \{problem\} exactly once, got 'Problem:'"),
        ({"problem_template": "{problem} {problem}"}, r"problem_template must hold \{problem\} exactly once"),
        ({"step_template": "Step {i}"}, r"step_template must hold \{step\} exactly once"),
        ({"step_template": "{step}{step}"}, r"step_template must hold \{step\} exactly once"),
        ({"layout_version": 0}, "layout_version 0 is not known here"),
        ({"layout_version": 3}, "layout_version 3 is not known here, .*written by a newer release: upgrade"),
        ({"num_labels": 0}, "num_labels must be an integer of at least 1, got 0"),
        ({"num_labels": 2.0}, "num_labels must be an integer of at least 1, got 2.0"),
        ({"num_labels": True}, "num_labels must be an integer of at least 1, got True"),
        ({"class_weights": [1.0]}, "class_weights belong to num_labels of 2 or more"),
        ({"num_labels": 2}, r"num_labels=2 needs class_weights, 2 numbers in \[0, 1\].*got None"),
        ({"num_labels": 3, "class_weights": [1.0, 0.0]}, r"num_labels=3 needs class_weights.*got \[1.0, 0.0\]"),
        ({"num_labels": 2, "class_weights": [1.5, 0.0]}, r"needs class_weights.*got \[1.5, 0.0\]"),
        ({"num_labels": 2, "class_weights": [float("nan"), 0.0]}, "needs class_weights"),
    ],
)
def test_values_outside_those_allowed_are_value_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PRMConfig(text_config=llama(), **options)


def test_class_weights_that_are_no_numbers_are_a_type_error() -> None:
    with pytest.raises(TypeError, match="class_weights"):
        PRMConfig(text_config=llama(), num_labels=2, class_weights=["1", "0"])


def test_max_length_may_be_as_long_as_the_backbone_reads_and_no_longer() -> None:
    assert PRMConfig(text_config=llama(), max_length=256).max_length == 256
    with pytest.raises(
        ValueError, match=r"max_length=257 is more than the 256 tokens that the backbone \(llama\) can read"
    ):
        PRMConfig(text_config=llama(), max_length=257)


def test_calibration_is_saved_and_a_config_without_it_has_the_defaults(tmp_path: Path) -> None:
    for threshold in (0, 0.35, 1):
        config = PRMConfig(text_config=llama(), temperature=2, error_threshold=threshold)
        config.save_pretrained(tmp_path)
        loaded = AutoConfig.from_pretrained(tmp_path)
        assert (loaded.temperature, loaded.error_threshold) == (2, threshold)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["temperature"], saved["error_threshold"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert (loaded.temperature, loaded.error_threshold, loaded.layout_version) == (1.0, 0.5, 1)


def test_options_that_were_changed_after_construction_are_checked_when_saved(tmp_path: Path) -> None:
    config = PRMConfig(text_config=llama())
    config.max_length = 300
    with pytest.raises(ValueError, match="max_length=300 is more than the 256"):
        config.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("backbone", "positions"),
    [
        (llama(max_position_embeddings=64), 64),
        # YaRN stretches 64 trained positions by 4, whether or not the config counts that already.
        (llama(max_position_embeddings=64, rope_parameters=YARN), 256),
        (llama(max_position_embeddings=256, rope_parameters=YARN), 256),
        # Linear scaling is counted in max_position_embeddings already.
        (llama(max_position_embeddings=64, rope_parameters={"rope_type": "linear", "factor": 2.0}), 64),
        # RoBERTa numbers its tokens from pad_token_id + 1 = 2 on: rows 2 to 513 of 514 are for tokens.
        (transformers.RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (transformers.XLMRobertaConfig(max_position_embeddings=20, pad_token_id=3), 16),
        (transformers.BertConfig(max_position_embeddings=512), 512),
        (transformers.GPT2Config(n_positions=128), 128),
        # BLOOM has no table of positions and no trained length in its config.
        (transformers.BloomConfig(), None),
    ],
)
def test_positions_that_a_backbone_reads(backbone: transformers.PretrainedConfig, positions: int | None) -> None:
    assert PRMConfig(text_config=backbone).max_positions == positions


def test_max_positions_without_a_backbone_is_not_known() -> None:
    assert PRMConfig().max_positions is None


def test_encoder_decoder_backbone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'t5' is an encoder-decoder backbone.*use a decoder"):
        PRMConfig(text_config=transformers.T5Config())


@pytest.mark.parametrize("backbone", [transformers.LlavaConfig, transformers.Gemma3Config, transformers.Qwen2VLConfig])
def test_multimodal_backbone_is_refused(backbone: type[transformers.PretrainedConfig]) -> None:
    with pytest.raises(ValueError, match=f"'{backbone.model_type}' has no hidden_size of its own, as multimodal"):
        PRMConfig(text_config=backbone())


def test_unknown_backbone_type_is_refused() -> None:
    with pytest.raises(ValueError, match="text_config has model_type 'lama', which this version of Transformers does"):
        PRMConfig(text_config={"model_type": "lama"})
    with pytest.raises(ValueError, match="text_config has model_type None"):
        PRMConfig(text_config={"hidden_size": 32})


@pytest.mark.parametrize("family", FAMILIES)
def test_backbone_of_every_family_survives_saving(family: str, tmp_path: Path) -> None:
    backbone = FAMILIES[family][0]()
    PRMConfig(text_config=backbone).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is PRMConfig
    assert type(loaded.text_config) is type(backbone)
    assert loaded.text_config.to_dict() == backbone.to_dict()
    assert loaded.get_text_config() is loaded.text_config


@pytest.mark.parametrize(
    "labels",
    [{}, {"num_labels": 2, "class_weights": [0.0, 1.0]}, {"num_labels": 3, "class_weights": [1.0, 0.5, 0.0]}],
)
def test_every_option_survives_saving(labels: dict[str, Any], tmp_path: Path) -> None:
    options = {
        "head_type": "mlp",
        "head_dropout": 0.0,
        "separator_token": "<sep>",
        "separator_token_id": 7,
        "separator_is_reserved": False,
        "score_offset": -1,
        "prompt_layout": "chat",
        "problem_template": "<s>[INST] {problem} [/INST]",
        "step_template": "({i}) {step}",
        "step_joiner": "\n\n",
        "max_length": 99,
        "aggregation": "product",
        "layout_version": 1,
        "conversation_layout": None,
    }
    PRMConfig(text_config=llama(), **options, **labels).save_pretrained(tmp_path)
    loaded = PRMConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in options} == options
    assert loaded.num_labels == labels.get("num_labels", 1)
    assert loaded.class_weights == labels.get("class_weights")
    assert loaded.text_config.hidden_size == 32
    # Saving once more writes the same file.
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()


def test_defaults_and_labels_of_one_logit() -> None:
    config = PRMConfig(text_config=llama())
    assert (config.num_labels, config.id2label, config.class_weights) == (1, {0: "correct"}, None)
    assert config.layout == {
        "separator_token": "<|step_end|>",
        "separator_is_reserved": True,
        "score_offset": 0,
        "prompt_layout": "plain",
        "problem_template": "Problem: {problem}\n\n",
        "step_template": "Step {i}: {step}",
        "step_joiner": "\n",
        "max_length": None,
        "layout_version": 1,
        "conversation_layout": None,
    }
    assert (config.head_type, config.head_dropout, config.aggregation) == ("linear", 0.1, "min")


def test_label_names_of_the_user_are_kept(tmp_path: Path) -> None:
    names = {0: "right", 1: "neutral", 2: "wrong"}
    config = PRMConfig(text_config=llama(), id2label=names, class_weights=[1.0, 0.5, 0.0])
    config.save_pretrained(tmp_path)
    assert PRMConfig.from_pretrained(tmp_path).id2label == names


def test_keys_that_tools_write_into_a_saved_config_survive(tmp_path: Path) -> None:
    PRMConfig(text_config=llama(), separator_token_id=5).save_pretrained(tmp_path)
    foreign = {
        "_commit_hash": "abc",
        "custom_pipelines": {"step-scoring": {"impl": "pipeline_prm.StepScoring", "pt": ["AutoModel"]}},
        "unsloth_version": "2026.9",
        "model_max_length": 128,
        "max_seq_length": 128,
        "my_tool": {"a": [1, 2]},
    }
    edit_json(tmp_path / "config.json", **foreign, pad_token_id=3)
    loaded = PRMConfig.from_pretrained(tmp_path)
    assert loaded.my_tool == {"a": [1, 2]}
    assert (loaded.pad_token_id, loaded.max_length) == (3, None)
    loaded.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    for name in foreign.keys() - {"_commit_hash"}:  # which belongs to where it was loaded from
        assert saved[name] == foreign[name]
    assert saved["separator_token_id"] == 5


def test_mistyped_key_in_a_saved_config_is_refused(tmp_path: Path) -> None:
    PRMConfig(text_config=llama()).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", max_lenght=64)
    with pytest.raises(TypeError, match="PRMConfig has no option 'max_lenght'; did you mean 'max_length'"):
        PRMConfig.from_pretrained(tmp_path)


def test_mistyped_option_of_from_pretrained_is_refused(tmp_path: Path) -> None:
    PRMConfig(text_config=llama()).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="PRMConfig has no option 'max_lenght'; did you mean 'max_length'"):
        PRMConfig.from_pretrained(tmp_path, max_lenght=64)
    assert PRMConfig.from_pretrained(tmp_path, max_length=64).max_length == 64


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"score_offset": 5}, ValueError, "score_offset must be one of"),
        ({"max_length": "64"}, TypeError, "max_length must be int or None"),
        ({"max_length": 10_000}, ValueError, "max_length=10000 is more than the 256"),
        ({"layout_version": 9}, ValueError, "layout_version 9 is not known here.*newer release"),
        ({"class_weights": [1.0]}, ValueError, "class_weights belong to num_labels of 2"),
    ],
)
def test_bad_value_in_a_saved_config_is_refused(
    change: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    PRMConfig(text_config=llama()).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **change)
    with pytest.raises(error, match=message):
        PRMConfig.from_pretrained(tmp_path)


def test_config_of_a_plain_language_model_is_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"this is a 'llama' checkpoint.*from_backbone"):
        PRMConfig.from_pretrained(tmp_path)


def test_options_given_to_from_pretrained_are_checked(tmp_path: Path) -> None:
    PRMConfig(text_config=llama()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="max_length=300 is more than the 256"):
        PRMConfig.from_pretrained(tmp_path, max_length=300)


def test_the_backbone_keeps_its_attention_implementation() -> None:
    backbone = llama(attn_implementation="eager")
    config = PRMConfig(text_config=backbone)
    assert (backbone._attn_implementation, config._attn_implementation) == ("eager", "eager")
