"""Formats of Monte Carlo estimates: MATH-APS and OmegaPRM (arXiv 2406.06592), as prefixes and as trees."""

from __future__ import annotations

from typing import Any

from modeling_prm.step_loss import IGNORED_LABEL

from .format_parts import Reader, ReaderOptions, Row, RowLeftOut, to_object, to_text, to_tuple
from .records import StepRecord

# What there is to go on with: a node, the number of its ancestors that are steps, and whether it is a step itself.
_Solution = list[tuple[str, Any]]


def read_math_aps(row: Row, options: ReaderOptions) -> list[StepRecord]:
    """MATH-APS: `question` and `reasoning_steps`, prefixes of solutions, each with its `mc_value`.

    A prefix that goes on from another one is that one's next step; the text between them is the step, and the value of
    the longer one its soft label. Each prefix that nothing goes on from is a solution. A prefix's value is the label of
    one solution alone, -100 in the others that share it. The question may stand at the head of each prefix, and alone
    as one without steps. `reasoning_steps` may also be a tree, as in `read_math_aps_tree`, with the question as its
    root.
    """
    question = to_text("question", row["question"])
    if isinstance(row["reasoning_steps"], dict):
        return _tree_records(question, row["reasoning_steps"])
    values: dict[str, Any] = {}
    for entry in to_tuple("reasoning_steps", row["reasoning_steps"]):
        fields = to_object("reasoning_steps entry", entry, "solution_prefix", "mc_value")
        prefix = to_text("solution_prefix", fields["solution_prefix"]).strip()
        prefix = prefix.removeprefix(question.strip()).strip()
        value = IGNORED_LABEL if fields["mc_value"] is None else fields["mc_value"]
        if prefix and values.setdefault(prefix, value) != value:
            raise ValueError(
                f"a prefix has several values: got {values[prefix]!r} and {value!r}; correct the row or pass "
                "on_bad_row='skip'"
            )
    # In this order a prefix stands before all that go on from it, and these before anything else.
    solutions: list[_Solution] = []
    chain: list[str] = []
    for prefix in sorted(values, key=lambda text: text.split()):
        depth = len(chain)
        while chain and not _goes_on(prefix, chain[-1]):
            chain.pop()
        chain.append(prefix)
        if len(chain) <= depth or not solutions:
            solutions.append([(step, IGNORED_LABEL) for step in _cut(chain[:-1])])
        solutions[-1].append((_cut(chain)[-1], values[prefix]))
    return _make_records(question, solutions)


def _goes_on(text: str, prefix: str) -> bool:
    return text.startswith(prefix) and text[len(prefix) : len(prefix) + 1].isspace()


def _cut(chain: list[str]) -> list[str]:
    """The steps between prefixes of which each goes on from the one before."""
    starts = [0, *map(len, chain)]
    return [text[start:].strip() for text, start in zip(chain, starts, strict=False)]


def read_math_aps_tree(row: Row, options: ReaderOptions) -> list[StepRecord]:
    """OmegaPRM's tree: `text`, the problem, and `children`, nodes of `text`, `mc_value` and `children`.

    Each node is a step, its value the soft label; each path from the root to a leaf is a solution. A node's value is
    the label of one solution alone, -100 in the others that share it.
    """
    return _tree_records(to_text("text", row["text"]), row)


def _tree_records(problem: str, root: Any) -> list[StepRecord]:
    solutions: list[_Solution] = []
    path: _Solution = []
    fields = to_object("tree node", root, "text", "mc_value", "children")
    text = to_text("tree node's text", fields["text"]).strip()
    # The root is the problem, or else the first step.
    is_problem = text in ("", problem.strip())
    children = list(to_tuple("children", fields["children"]))
    # Not recursive: a tree of a data file may be deeper than Python's stack.
    waiting: list[tuple[Any, int]] = [(child, 0) for child in reversed(children)] if is_problem else [(root, 0)]
    while waiting:
        node, depth = waiting.pop()
        fields = to_object("tree node", node, "text", "mc_value")
        is_new = depth < len(path) or not solutions
        del path[depth:]
        if is_new:
            solutions.append([(step, IGNORED_LABEL) for step, _ in path])
        value = IGNORED_LABEL if fields["mc_value"] is None else fields["mc_value"]
        path.append((to_text("tree node's text", fields["text"]).strip(), value))
        solutions[-1].append(path[-1])
        given = fields.get("children")
        below = () if given is None else to_tuple("children", given)
        waiting += [(child, depth + 1) for child in reversed(below)]
    return _make_records(problem, solutions)


def _make_records(problem: str, solutions: list[_Solution]) -> list[StepRecord]:
    if not solutions:
        raise RowLeftOut("there is no step with a value")
    return [
        StepRecord(
            problem=problem, steps=tuple(step for step, _ in solution), labels=tuple(value for _, value in solution)
        )
        for solution in solutions
    ]


MONTE_CARLO_READERS = (
    Reader(
        name="math_aps",
        columns=("question", "reasoning_steps"),
        json_columns=("reasoning_steps",),
        read_row=read_math_aps,
    ),
    Reader(
        name="math_aps_tree",
        columns=("text", "mc_value", "children"),
        json_columns=("mc_value", "children"),
        read_row=read_math_aps_tree,
    ),
)
"""The formats of this module."""
