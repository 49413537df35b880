"""Skywork-o1-Open-PRM: a language model in a wrapper, `v_head.summary` = linear to 1 with a sigmoid, line ends.

The ids are those of the first token, the problem and a line end as one text, then of each step alone with the id of
a line end after it (skywork-o1-prm-inference).
"""

from __future__ import annotations

from .import_layouts import ImportOptions, Parts, hidden_size, separator_name, tensor
from .import_source import Source


def skywork(source: Source, options: ImportOptions) -> Parts:
    """The layout's parts."""
    size = hidden_size(source)
    tokenizer = source.tokenizer
    if not isinstance(tokenizer.bos_token, str):
        raise ValueError(f"the tokenizer of {source.label} has no bos_token, which this layout begins with")
    if len(tokenizer("x")["input_ids"]) != len(tokenizer("x", add_special_tokens=False)["input_ids"]):
        raise ValueError(
            f"the tokenizer of {source.label} adds special tokens to every text, so this layout would have them in "
            "each step, which cannot be written here"
        )
    separator = options.separator or "\n"
    return Parts(
        prefix="pretrained_model.model.",
        weight=tensor(source, "v_head.summary.weight", (1, size)),
        bias=tensor(source, "v_head.summary.bias", (1,)),
        used=("v_head.summary.weight", "v_head.summary.bias"),
        ignored=("pretrained_model.lm_head.weight",),
        options={
            "separator_token": separator_name(source, separator, tokenizer(separator)["input_ids"][-1:]),
            "separator_is_reserved": False,
            "prompt_layout": "chat",
            "problem_template": options.problem_template or tokenizer.bos_token + "{problem}\n",
            "step_template": "{step}",
            "step_joiner": "",
        },
    )
