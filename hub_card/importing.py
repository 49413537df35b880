"""From the parts of a published checkpoint to a PRM of ours."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from transformers import AddedToken, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from modeling_prm import PRMConfig, PRMForStepScoring, PRMProcessor
from modeling_prm.backbones import backbone_init_options

from .exporting import PROBE_PROBLEMS, PROBE_SOLUTIONS
from .import_layouts import Parts
from .import_source import Source, shown


def assemble(
    source: Source, layout: str, parts: Parts, dtype: torch.dtype | None
) -> tuple[PRMForStepScoring, PRMProcessor]:
    """A PRM with the backbone, head and layout of ids of a published one.

    Args:
        layout: the layout's name, for messages.
        dtype: of the backbone; None keeps that of the file.

    Raises:
        ValueError: weights are missing, surprising, or of another shape; or the ids are not the original's.
    """
    tokenizer = copy.deepcopy(source.tokenizer)
    num_labels = parts.weight.shape[0]
    config = PRMConfig(
        text_config=_backbone_config(source),
        head_type="linear" if parts.dense is None else "mlp",
        num_labels=num_labels,
        class_weights=parts.class_weights,
        **parts.options,
    )
    if config.separator_is_reserved:
        separator = AddedToken(config.separator_token, special=True, normalized=False)
        if tokenizer.convert_tokens_to_ids(config.separator_token) in (None, tokenizer.unk_token_id):
            raise ValueError(f"the tokenizer of {source.label} has no token {config.separator_token!r}")
        tokenizer.add_tokens([separator], special_tokens=True)
    config.max_length = config.max_length or config.max_positions
    processor = PRMProcessor(tokenizer, **config.layout)
    config.separator_token_id, config.ids_probe = processor.separator_token_id, processor.ids_probe
    if parts.render is not None:
        _check_ids(source, processor, parts.render)
    backbone = _backbone(source, layout, parts, config.text_config, dtype)
    config.dtype = backbone.dtype
    model = PRMForStepScoring._around(backbone, config)
    head = model.value_head
    with torch.no_grad():
        head.out.weight.copy_(parts.weight)
        head.out.bias.copy_(parts.bias)
        if parts.dense is not None and head.dense is not None:
            head.dense.weight.copy_(parts.dense[0])
            head.dense.bias.copy_(parts.dense[1])
    return model, processor


def _backbone_config(source: Source) -> PretrainedConfig:
    """The backbone's config, without what belongs to the published head and its code."""
    config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    known = type(config)(
        **{
            name: value
            for name, value in config.to_dict().items()
            if name not in ("auto_map", "architectures", "id2label", "label2id", "problem_type", "_name_or_path")
        }
    )
    known.name_or_path = ""
    return known


def _backbone(
    source: Source, layout: str, parts: Parts, config: PretrainedConfig | None, dtype: torch.dtype | None
) -> PreTrainedModel:
    """The backbone with the weights of the source.

    Raises:
        ValueError: it is not exactly the source's weights that it needs.
    """
    prefix = parts.prefix
    others = source.weights.keys() - {*parts.used, *parts.ignored}
    state = {name.removeprefix(prefix): source.weights[name] for name in others if name.startswith(prefix)}
    surprising = sorted(name for name in others if not name.startswith(prefix))
    model_class = MODEL_MAPPING[type(config)]
    if dtype is None:
        dtype = next((value.dtype for value in state.values() if value.is_floating_point()), torch.float32)
    model, info = model_class.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **backbone_init_options(config),
    )
    missing = sorted(prefix + str(name) for name in info["missing_keys"])
    surprising += sorted(prefix + str(name) for name in info["unexpected_keys"])
    other = sorted(f"{prefix}{name} {tuple(got)} for {tuple(need)}" for name, got, need in info["mismatched_keys"])
    if missing or surprising or other:
        raise ValueError(
            f"{source.label} is not a whole checkpoint of the layout {layout!r}: missing {len(missing)} "
            f"({shown(missing)}); surprising {len(surprising)} ({shown(surprising)}); of another shape {len(other)} "
            f"({shown(other)})"
        )
    return model


def _check_ids(source: Source, processor: PRMProcessor, render: Callable[[str, list[str]], str]) -> None:
    """Check that the processor gives the ids that the original's scoring gives, up to the last step's end."""
    problems, solutions = list(PROBE_PROBLEMS), [list(steps) for steps in PROBE_SOLUTIONS]
    # Special tokens in a text are ids to the original and plain text to us.
    solutions[0] = [steps.replace("<|im_end|>", "thus") for steps in solutions[0]]
    for problem, steps, item in zip(problems, solutions, processor.encode(problems, solutions), strict=True):
        expected = processor.tokenizer(render(problem, steps), add_special_tokens=False)["input_ids"]
        if item.input_ids != expected[: len(item.input_ids)]:
            raise ValueError(
                f"the ids of {source.label} cannot be written here as its chat template writes them, so scores would "
                "be off; give problem_template yourself"
            )
