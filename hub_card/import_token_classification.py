"""Token classification PRMs, as TRL's PRMTrainer makes them (to 1.13.0), PURE, SCAN; and ReasonEval.

TRL: the tokenizer's first token if it has one, the problem, then each step with the separator's ids, all tokenized
alone; two labels, the second for a right step, read at the separator's last token. One label is read with a sigmoid.
The model cards of HuggingFaceH4's PRMs, and TRL's documentation, score otherwise than the models were trained: as one
text of problem and steps with the separator after each of them.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING

from .import_layouts import ImportOptions, Parts, hidden_size, one_logit, separator_name, tensor
from .import_source import Source

# Classes of ReasonEval: wrong, neutral, right; a step is valid in the last two (2404.05692).
VALIDITY = [0.0, 1.0, 1.0]


def token_classification(source: Source, options: ImportOptions) -> Parts:
    """A linear layer to any number of labels on a backbone that Transformers knows, with ids as in TRL's training."""
    begin = source.tokenizer.bos_token or ""
    return _classifier(source, options, {"prompt_layout": "chat", "problem_template": begin + "{problem}"})


def token_classification_text(source: Source, options: ImportOptions) -> Parts:
    """The same, with problem, steps and separators joined as one text, as model cards call the pipeline.

    There each step is a pass over the text up to it, whose last token is read; one pass over the whole gives the same
    where no step begins with white space.
    """
    template = "{problem}" + (options.separator or "")
    return _classifier(source, options, {"prompt_layout": "plain", "problem_template": template, "layout_version": 2})


def _classifier(source: Source, options: ImportOptions, layout: dict[str, Any]) -> Parts:
    if options.separator is None:
        raise ValueError(
            f"{source.label} is a token classification model, which does not say what ends a step; give separator= as "
            r"it was trained with (TRL's default is '\n', HuggingFaceH4's PRMs have '\n\n')"
        )
    config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    model_class = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING.get(type(config), None)
    if model_class is None:
        raise ValueError(f"Transformers has no token classification model for {source.config.get('model_type')!r}")
    head = "classifier" if "classifier.weight" in source.weights else "score"
    separator = options.separator
    if layout.get("layout_version", 1) == 1:
        ids = source.tokenizer(separator, add_special_tokens=False)["input_ids"]
        separator = separator_name(source, separator, ids)
    layout |= {
        "separator_token": separator,
        "separator_is_reserved": False,
        "step_template": "{step}",
        "step_joiner": "",
    }
    if options.problem_template is not None:
        layout["problem_template"] = options.problem_template
    return _parts(
        source,
        options,
        head,
        prefix=f"{model_class.base_model_prefix}.",
        class_weights=options.class_weights,
        layout=layout,
    )


def reasoneval(source: Source, options: ImportOptions) -> Parts:
    """ReasonEval's validity: nothing stands between steps, the score is read in the step itself.

    The published scoring splits at padding tokens, which it then takes out; for the 7B model (Mistral) the padding
    token is the first token too, and the position that it counts is the one before a step's last; for the 34B model
    (Llama) it is the last. Redundancy is the probability of the second class: class_weights=[0, 1, 0].
    """
    if options.separator is not None:
        raise ValueError("the layout 'reasoneval' has no separator: nothing stands between steps")
    template = "Question:\n{problem}\nAnswer:\nLet's think step by step.\n"
    return _parts(
        source,
        options,
        "score_head",
        prefix="model.",
        class_weights=options.class_weights or VALIDITY,
        layout={
            "separator_token": "",
            "separator_is_reserved": False,
            "score_offset": -1 if source.config.get("model_type") == "mistral" else 0,
            "prompt_layout": "plain",
            "problem_template": options.problem_template or template,
            "step_template": "{step}",
            "step_joiner": "",
        },
    )


def _parts(
    source: Source,
    options: ImportOptions,
    head: str,
    *,
    prefix: str,
    class_weights: list[float] | None,
    layout: dict[str, Any],
) -> Parts:
    weight = tensor(source, f"{head}.weight")
    if weight.dim() != 2 or weight.shape[1] != hidden_size(source):
        raise ValueError(
            f"{head}.weight of {source.label} has shape {tuple(weight.shape)}, this layout needs (labels, "
            f"{hidden_size(source)})"
        )
    count = weight.shape[0]
    has_bias = f"{head}.bias" in source.weights
    bias = tensor(source, f"{head}.bias", (count,)) if has_bias else torch.zeros(count)
    if count > 2 and class_weights is None:
        raise ValueError(
            f"{source.label} has {count} labels; give class_weights=, {count} numbers in [0, 1] that say how much each "
            "counts as right"
        )
    if class_weights is not None and count == 1:
        raise ValueError(f"{source.label} has 1 label, whose sigmoid is the score; leave class_weights out")
    if class_weights is not None and len(class_weights) != count:
        raise ValueError(f"{source.label} has {count} labels, class_weights are {len(class_weights)}")
    if count == 2 and class_weights in (None, [0.0, 1.0], [1.0, 0.0]):
        flipped = class_weights == [1.0, 0.0]
        weight, bias = one_logit(weight.flip(0), bias.flip(0)) if flipped else one_logit(weight, bias)
        class_weights = None
    return Parts(
        prefix=prefix,
        weight=weight,
        bias=bias,
        class_weights=class_weights if count > 1 else None,
        used=(f"{head}.weight", f"{head}.bias"),
        options=layout,
    )
