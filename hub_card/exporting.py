"""A PRM as a checkpoint that others serve with no code of ours: what every export shares.

The layouts are a module each, `export_qwen2_prm` and `export_token_classification`; `convert.export_prm` is the way in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from modeling_prm import PRMProcessor
from modeling_prm.scoring import evaluating

from .errors import CheckpointError

# How problems and steps become ids, beside an exported checkpoint; `import_prm` reads it.
LAYOUT_FILE = "prm_layout.json"
LABELS = {0: "incorrect", 1: "correct"}

# Signs, special tokens as text, several scripts and line ends are where tokenizers differ.
PROBE_PROBLEMS = ["What is 2 + {x}, naïvely?", "Ann has 3 apples; how many are 4 times as many?"]
PROBE_SOLUTIONS = [
    ["2 + 2 = 4.", "So <|im_end|> it is 四.", "f(12) := {y_1}² ≠ -7"],
    ["3 * 4 = 12.", "The answer is\n\n\\boxed{12}."],
]


@dataclass(frozen=True, kw_only=True)
class TwoWayHead:
    """A value head whose two outputs are the logits of a wrong and a right step.

    Args:
        dense: weight (H, H) and bias (H,) of a first layer with ReLU, None for a linear head.
        weight: (2, H) float32, the row of a wrong step first.
        bias: (2,) float32.
    """

    dense: tuple[torch.Tensor, torch.Tensor] | None
    weight: torch.Tensor
    bias: torch.Tensor


def two_way_head(model: Any) -> TwoWayHead:
    """The head of a PRM as two logits whose softmax is the step's probability, at the config's temperature.

    One logit z becomes (0, z), since sigmoid(z) is the softmax of these.

    Raises:
        ValueError: the step's probability is no softmax of two logits.
    """
    config, head = model.config, model.value_head
    weight, bias = head.out.weight.detach().float().cpu(), head.out.bias.detach().float().cpu()
    if config.num_labels == 1:
        weight, bias = torch.cat([torch.zeros_like(weight), weight]), torch.cat([torch.zeros_like(bias), bias])
    elif config.num_labels > 2:
        raise ValueError(
            f"a PRM of {config.num_labels} classes cannot be exported: its step probability is a weighted sum over a "
            "softmax of more than two logits, which no two logits give; train it with num_labels=1"
        )
    elif list(config.class_weights) == [1.0, 0.0]:
        weight, bias = weight.flip(0), bias.flip(0)
    elif list(config.class_weights) != [0.0, 1.0]:
        raise ValueError(
            f"a PRM of two classes with class_weights={config.class_weights} cannot be exported: servers return the "
            "softmax itself, which is its step probability only for [0, 1] and [1, 0]"
        )
    dense = None
    if head.dense is not None:
        dense = (head.dense.weight.detach().float().cpu(), head.dense.bias.detach().float().cpu())
    return TwoWayHead(dense=dense, weight=weight / config.temperature, bias=bias / config.temperature)


def write_tokenizer(processor: Any, folder: Path) -> None:
    """Save the tokenizer beside an exported `config.json`, and check how it loads there.

    Raises:
        ValueError: `AutoTokenizer` makes one of it that gives other ids.
    """
    processor.tokenizer.save_pretrained(folder)
    # Beside a config Transformers may choose the tokenizer's class by the config, whatever was saved.
    loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    try:
        same = PRMProcessor(loaded, **processor_layout(processor), ids_probe=processor.ids_probe)
        ids = [processor.encode(PROBE_PROBLEMS, PROBE_SOLUTIONS), same.encode(PROBE_PROBLEMS, PROBE_SOLUTIONS)]
        problem = "" if ids[0] == ids[1] else "the ids of a probe differ"
    except ValueError as error:
        problem = str(error)
    if problem:
        raise ValueError(
            f"AutoTokenizer loads the exported tokenizer as {type(loaded).__name__}, with other ids than "
            f"{type(processor.tokenizer).__name__} gives, so texts would be scored wrongly: {problem} "
            "Export with tokenizer=False for a server that gets ids (vLLM: --skip-tokenizer-init), or to another layout"
        )


def processor_layout(processor: Any) -> dict[str, Any]:
    """The options that a processor like this one is made with."""
    names = (
        *("separator_token", "separator_is_reserved", "score_offset", "prompt_layout", "problem_template"),
        *("step_template", "step_joiner", "max_length", "layout_version"),
    )
    return {name: getattr(processor, name) for name in names}


def write_layout(model: Any, processor: Any, folder: Path, export_layout: str) -> None:
    """Save how problems and steps become ids as `prm_layout.json`, for people and for `import_prm`."""
    config = model.config
    layout = {
        "export_layout": export_layout,
        **processor_layout(processor),
        "separator_token_id": processor.separator_token_id,
        "ids_probe": processor.ids_probe,
        "aggregation": config.aggregation,
        "error_threshold": config.error_threshold,
    }
    (folder / LAYOUT_FILE).write_text(json.dumps(layout, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def labelled(config: Any, architecture: str) -> Any:
    """The config, changed to that of a two-way classifier with this architecture."""
    config.architectures = [architecture]
    config.id2label = dict(LABELS)
    config.label2id = {name: number for number, name in LABELS.items()}
    return config


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep Transformers from reporting keys that belong to a head, which is read from the files otherwise."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def check_weights_equal(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Check that what loads from the export is what was exported.

    Raises:
        CheckpointError: a weight is missing, or another one.
    """
    wrong = [name for name in expected if name not in found or not torch.equal(expected[name].cpu(), found[name].cpu())]
    if wrong:
        shown = ", ".join(wrong[:5]) + (", ..." if len(wrong) > 5 else "")
        raise CheckpointError(f"{folder} loads with other weights than were exported: {shown}")


def check_scores(
    model: Any, processor: Any, token_logits: Any, folder: Path, *, dtype: torch.dtype = torch.float32
) -> float:
    """Compare the PRM's step probabilities with those of the exported model on a probe.

    Args:
        token_logits: a function from `input_ids` and `attention_mask` (B, L) to logits (B, L, 2).
        dtype: of the exported model; in float32 they must agree to 1e-5, else to 2e-2, since a plain model computes
            its head in the dtype that it is loaded in.

    Returns:
        The largest difference.

    Raises:
        CheckpointError: they differ.
    """
    inputs = processor(PROBE_PROBLEMS, PROBE_SOLUTIONS, return_tensors="pt")
    with torch.inference_mode(), evaluating(model):
        expected = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}).step_probs.cpu()
        probs = token_logits(inputs["input_ids"], inputs["attention_mask"]).float().softmax(dim=-1)[..., 1]
    positions = inputs["step_positions"]
    found = probs.gather(1, positions.clamp(min=0))
    difference = float((found - expected)[positions >= 0].abs().max())
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    if not difference <= limit:
        raise CheckpointError(f"{folder} scores otherwise than the PRM it was made of: they differ by {difference:.3g}")
    return difference
