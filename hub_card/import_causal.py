"""PRMs that are language models which say + or -: Math-Shepherd and those of RLHFlow.

The score is the softmax over the logits of the two tokens, so the head's one row is the difference of two rows of
the language model's output layer.
"""

from __future__ import annotations

from typing import Any

import torch

from .import_layouts import ImportOptions, Parts, hidden_size, tensor
from .import_source import Source

_MARKERS = ("PROBLEM-7f3a9c", "STEP-1-7f3a9c", "STEP-2-7f3a9c", "STEP-3-7f3a9c")


def math_shepherd(source: Source, options: ImportOptions) -> Parts:
    """`{problem} Step 1: {step} ки`, a line end, `Step 2: ...`; + against - at the tag ` ки` (2312.08935).

    The whole is one text, of which the tokens `+` and `-` are those of the text "+ -" (648 and 387 in the published
    model's vocabulary).
    """
    separator = options.separator or " ки"
    ids = source.tokenizer("+ -", add_special_tokens=False)["input_ids"]
    if len(ids) != 2:
        raise ValueError(f"'+' and '-' are not one token each for the tokenizer of {source.label}: {ids}")
    problem_template = options.problem_template or "{problem} "
    return _parts(
        source,
        (int(ids[0]), int(ids[1])),
        {
            "separator_token": separator,
            "prompt_layout": "plain",
            "problem_template": problem_template,
            "step_template": "Step {i}: {step}",
            "step_joiner": "\n",
            "separator_is_reserved": False,
            "layout_version": 2,
        },
    )


def rlhflow(source: Source, options: ImportOptions) -> Parts:
    """A chat in which each step is the user's turn, the first with the problem, and `+` the assistant's.

    The score is read where the assistant's token is predicted, one position before it (RLHFlow's math-rm). There each
    step is a pass over all turns before it; since these are always answered with +, one pass over the whole gives
    the same. As the chat template does, problem and steps are to be stripped of white space at their ends.
    """
    if options.separator is not None:
        raise ValueError("the layout 'rlhflow' has no separator of choice: a step ends where the assistant says +")
    tokenizer: Any = source.tokenizer
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {source.label} has no chat template, which this layout is written with")

    def render(problem: str, steps: list[str]) -> str:
        messages = []
        for number, step in enumerate(steps):
            content = f"{problem} {step}" if number == 0 else step
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": "+"}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False))

    problem, *steps = _MARKERS
    text = render(problem, steps)
    before, _, rest = text.partition(problem)
    between, _, rest = rest.partition(steps[0])
    turn, _, rest = rest.partition(steps[1])
    tail, _, joiner = turn.partition("+")
    if not joiner or not rest.startswith(turn + steps[2] + tail + "+"):
        raise ValueError(
            f"the chat template of {source.label} does not write one turn like the other, so its steps cannot be "
            f"scored in one pass. It wrote: {text!r}"
        )
    plus, minus = (int(tokenizer(sign, add_special_tokens=False)["input_ids"][-1]) for sign in "+-")
    return _parts(
        source,
        (plus, minus),
        {
            "separator_token": "+",
            "separator_is_reserved": False,
            "score_offset": -1,
            "prompt_layout": "chat",
            "problem_template": options.problem_template or f"{before}{{problem}}{between}",
            "step_template": f"{{step}}{tail}",
            "step_joiner": joiner,
            "layout_version": 2,
        },
        render,
    )


def _parts(source: Source, ids: tuple[int, int], layout: dict[str, Any], render: Any = None) -> Parts:
    """The head that reads the softmax over two tokens of a language model."""
    size = hidden_size(source)
    name = "lm_head.weight"
    if name not in source.weights and source.config.get("tie_word_embeddings", False):
        name = "model.embed_tokens.weight"
    rows = tensor(source, name)
    if rows.dim() != 2 or rows.shape[1] != size or rows.shape[0] <= max(ids):
        raise ValueError(
            f"{name} of {source.label} has shape {tuple(rows.shape)}, this layout needs one row of {size} for each "
            f"token up to {max(ids)}"
        )
    weight = rows[ids[0]] - rows[ids[1]]
    bias = torch.zeros(1)
    if "lm_head.bias" in source.weights:
        biases = tensor(source, "lm_head.bias", (rows.shape[0],))
        bias = (biases[ids[0]] - biases[ids[1]]).reshape(1)
    return Parts(
        prefix="model.",
        weight=weight.unsqueeze(0),
        bias=bias,
        used=("lm_head.weight", "lm_head.bias"),
        options=layout,
        render=render,
    )
