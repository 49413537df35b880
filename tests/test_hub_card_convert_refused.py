from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import published_prms as pub
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch import nn
from transformers import AutoModelForSequenceClassification, Qwen2Config

from hub_card.convert import import_prm


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("model.layers.1.mlp.up_proj.weight"),
            r"not a whole checkpoint of the layout 'qwen2_prm': missing 1 \(model\.layers\.1\.mlp\.up_proj\.weight\); "
            r"surprising 0 \(none\); of another shape 0",
        ),
        (
            lambda state: state.update({"model.extra.weight": torch.zeros(2), "other.weight": torch.zeros(2)}),
            r"missing 0 \(none\); surprising 2 \(other\.weight, model\.extra\.weight\)",
        ),
        (
            lambda state: state.update({"model.norm.weight": torch.zeros(31)}),
            r"of another shape 1 \(model\.norm\.weight \(31,\) for \(32,\)\)",
        ),
        (lambda state: state.pop("score.0.bias"), r"missing score\.0\.bias; it has .*score\.0\.weight"),
        (
            lambda state: state.update({"score.2.weight": torch.zeros(1, 32)}),
            r"score\.2\.weight of .* has shape \(1, 32\), this layout needs \(2, 32\)",
        ),
        (
            lambda state: state.update({"score.0.weight": torch.zeros(16, 32)}),
            r"score\.0\.weight of .* has shape \(16, 32\), this layout needs \(32, 32\)",
        ),
        (
            lambda state: [state.pop(name) for name in list(state) if name.startswith("score")],
            "no layout that is known",
        ),
    ],
)
def test_wrong_and_partial_weights(
    change: Callable[[dict[str, torch.Tensor]], Any], message: str, tmp_path: Path
) -> None:
    pub.write_qwen2_prm(tmp_path)
    change_weights(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        import_prm(tmp_path)


def test_rows_of_the_vocabulary_are_missing(tmp_path: Path) -> None:
    pub.write_causal(tmp_path, "mistral")
    change_weights(tmp_path, lambda state: state.update({"lm_head.weight": torch.zeros(12, 32)}))
    with pytest.raises(
        ValueError, match=r"lm_head\.weight of .* has shape \(12, 32\), this layout needs one row of 32"
    ):
        import_prm(tmp_path, layout="math_shepherd")


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (2, {}, "does not say what ends a step; give separator="),
        (3, {"separator": "\n"}, r"has 3 labels; give class_weights=, 3 numbers in \[0, 1\]"),
        (2, {"separator": "\n", "class_weights": [1, 0, 0]}, "has 2 labels, class_weights are 3"),
        (1, {"separator": "\n", "class_weights": [1]}, "has 1 label, whose sigmoid is the score"),
        (2, {"separator": "\n", "layout": "qwen2_prm"}, r"missing score\.0\.weight; it has .*score\.weight"),
        (2, {"separator": "\n", "layout": "other"}, "layout must be 'auto' or one of 'qwen2_prm'"),
        (2, {"separator": "\n", "problem_template": "Q:"}, r"problem_template must hold \{problem\} exactly once"),
    ],
)
def test_what_a_token_classification_model_does_not_say(
    labels: int, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    pub.write_token_classification(tmp_path, labels, pub.qwen_tokenizer())
    with pytest.raises(ValueError, match=message):
        import_prm(tmp_path, **options)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("EurusPRM-Stage2", "an implicit PRM: its score is the log-ratio of two language models"),
        ("ThinkPRM-7B", "a generative judge: it writes its verdict"),
        ("ActPRM", "an ensemble of heads whose probabilities are averaged"),
    ],
)
def test_kinds_that_are_not_loaded(name: str, reason: str, tmp_path: Path) -> None:
    pub.write_causal(tmp_path / name, "llama")
    with pytest.raises(ValueError, match=f"cannot be imported: it is {reason}"):
        import_prm(tmp_path / name)


def test_other_models(tmp_path: Path, prm_folder: Callable[[str], Path]) -> None:
    pub.write_causal(tmp_path / "causal", "llama")
    with pytest.raises(ValueError, match=r"causal language model \(LlamaForCausalLM\).*layout='math_shepherd'"):
        import_prm(tmp_path / "causal")
    with pytest.raises(ValueError, match="is a PRM of ours already"):
        import_prm(prm_folder("llama"))
    config = Qwen2Config(**pub.SIZES, vocab_size=512, num_labels=1, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "outcome")
    pub.qwen_tokenizer().save_pretrained(tmp_path / "outcome")
    with pytest.raises(ValueError, match="an outcome reward model, not a PRM"):
        import_prm(tmp_path / "outcome")
    (tmp_path / "causal" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter; merge it"):
        import_prm(tmp_path / "causal")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub id"):
        import_prm(tmp_path / "nowhere")


def test_damaged_files(tmp_path: Path) -> None:
    pub.write_skywork(tmp_path)
    shard = tmp_path / "pytorch_model-00002-of-00002.bin"
    whole = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of 2 shards: pytorch_model-00002-of-00002\.bin"):
        import_prm(tmp_path)
    torch.save({"v_head.summary.weight": torch.zeros(1, 32)}, shard)
    with pytest.raises(ValueError, match=r"missing v_head\.summary\.bias; surprising none"):
        import_prm(tmp_path)
    shard.write_bytes(whole[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        import_prm(tmp_path)
    # A pickle that would run code is refused, not run.
    torch.save({"v_head": nn.Linear(2, 2)}, shard)
    with pytest.raises(ValueError, match="cannot be read"):
        import_prm(tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        import_prm(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        import_prm(tmp_path)


def test_prompts_that_cannot_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "rlhflow"
    prm = pub.write_causal(folder, "llama")
    # The last turn is closed otherwise than the ones before it.
    prm.tokenizer.chat_template = pub.LLAMA3_CHAT.replace(
        "'<|eot_id|>' }}{% endfor %}", "(loop.index | string) }}{% endfor %}"
    )
    prm.tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="does not write one turn like the other"):
        import_prm(folder, layout="rlhflow")
    prm.tokenizer.chat_template = None
    prm.tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="has no chat template"):
        import_prm(folder, layout="rlhflow")
    with pytest.raises(ValueError, match="has no separator of choice"):
        import_prm(folder, layout="rlhflow", separator="-")


def test_separator_of_two_tokens_that_is_the_name_of_another(tmp_path: Path) -> None:
    tokenizer = tiny_models.sentencepiece_bpe_tokenizer()
    assert tokenizer.tokenize("\n") == ["▁", "\n"]
    pub.write_token_classification(tmp_path, 2, tokenizer, "llama")
    with pytest.raises(ValueError, match="whose vocabulary has it as another token too"):
        import_prm(tmp_path, separator="\n")


def test_special_token_that_takes_the_line_end_after_it(tmp_path: Path) -> None:
    """Then the chat as one text has other ids than its pieces, which an import must notice."""
    prm = pub.write_qwen2_prm(tmp_path)
    stripping = AddedToken("<|im_end|>", special=True, normalized=False, rstrip=True)
    prm.tokenizer.add_tokens([stripping], special_tokens=True)
    assert len(prm.tokenizer("<|im_end|>\nx")["input_ids"]) == 2
    prm.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be written here as its chat template writes them"):
        import_prm(tmp_path)


def test_nothing_is_left_of_a_failed_import(tmp_path: Path) -> None:
    pub.write_token_classification(tmp_path / "published", 2, pub.qwen_tokenizer())
    with pytest.raises(ValueError, match="give separator="):
        import_prm(tmp_path / "published", tmp_path / "ours")
    assert not (tmp_path / "ours").exists() or not list((tmp_path / "ours").iterdir())
