"""Qwen2.5-Math-PRM and ReasonFlux-PRM: `<extra_0>` after each step of a chat, a head of linear, ReLU, linear to 2.

Both are `Qwen2ForProcessRewardModel`; the first is asked with a system prompt, the second without. The score is the
softmax's second value at `<extra_0>` (model cards of Qwen/Qwen2.5-Math-PRM-7B and Gen-Verse/ReasonFlux-PRM-7B).
"""

from __future__ import annotations

from typing import Any

from .import_layouts import ImportOptions, Parts, hidden_size, one_logit, tensor
from .import_source import Source

SEPARATOR = "<extra_0>"
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."


def qwen2_prm(source: Source, options: ImportOptions) -> Parts:
    """The layout with the system prompt."""
    return _parts(source, options, [{"role": "system", "content": SYSTEM}])


def reasonflux(source: Source, options: ImportOptions) -> Parts:
    """The layout without a system prompt of its own."""
    return _parts(source, options, [])


def _parts(source: Source, options: ImportOptions, system: list[dict[str, str]]) -> Parts:
    size = hidden_size(source)
    dense = tensor(source, "score.0.weight", (size, size)), tensor(source, "score.0.bias", (size,))
    out = tensor(source, "score.2.weight", (2, size)), tensor(source, "score.2.bias", (2,))
    weight, bias = one_logit(*out)
    separator = options.separator or SEPARATOR
    tokenizer: Any = source.tokenizer

    def render(problem: str, steps: list[str]) -> str:
        answer = "".join(step + separator for step in steps)
        messages = [*system, {"role": "user", "content": problem}, {"role": "assistant", "content": answer}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))

    template = options.problem_template
    if template is None:
        if not tokenizer.chat_template:
            raise ValueError(f"the tokenizer of {source.label} has no chat template; give problem_template yourself")
        text = render("PROBLEM-7f3a9c", ["STEP-7f3a9c"])
        template = text.partition("STEP-7f3a9c")[0].replace("PROBLEM-7f3a9c", "{problem}")
    return Parts(
        prefix="model.",
        dense=dense,
        weight=weight,
        bias=bias,
        used=("score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias"),
        # The published files carry the language model's output layer along, which their model has not.
        ignored=("lm_head.weight",),
        options={
            "separator_token": separator,
            "prompt_layout": "chat",
            "problem_template": template,
            "step_template": "{step}",
            "step_joiner": "",
            "layout_version": 2,
        },
        render=render if options.problem_template is None else None,
    )
