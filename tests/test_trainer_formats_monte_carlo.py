"""MATH-APS and OmegaPRM: prefixes and trees with values, each value used once."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.formats import READERS, RowLeftOut

QUESTION = "1 + 1 + 1?"


def prefixes(*entries: tuple[str, Any], question: str = QUESTION) -> list[tuple[tuple[str, ...], tuple[float, ...]]]:
    row = {
        "question_id": "q1",
        "question": question,
        "final_answer": "3",
        "reasoning_steps": [{"solution_prefix": text, "mc_value": value} for text, value in entries],
    }
    records = READERS["math_aps"].read(row)
    assert {record.problem for record in records} == {question}
    return [(record.steps, record.labels) for record in records]


def node(text: str, value: Any, *children: Any) -> dict[str, Any]:
    return {"node_id": 7, "text": text, "mc_value": value, "children": list(children)}


TREE = node(QUESTION, 0.5, node("Add.", 0.75, node("2", 1.0, node("3", 1)), node("4", 0.0)), node("Hm.", 0.25))
# Each path from the root to a leaf; the value of "Add." labels the first of the two that share it.
SOLUTIONS = [
    (("Add.", "2", "3"), (0.75, 1.0, 1.0)),
    (("Add.", "4"), (-100.0, 0.0)),
    (("Hm.",), (0.25,)),
]


def test_prefixes_are_cut_where_another_one_ends() -> None:
    # In any order; the one that is a part of "1 + 10" as text alone is no prefix of it.
    assert prefixes(("1 + 10", 0.0), ("Start.\n1 + 1\nSo 2", 1.0), ("1 + 1", 0.5), ("Start.", 0.25)) == [
        (("1 + 1",), (0.5,)),
        (("1 + 10",), (0.0,)),
        (("Start.", "1 + 1\nSo 2"), (0.25, 1.0)),
    ]


def test_values_of_shared_prefixes_are_used_once() -> None:
    entries = [("Add.", 0.75), ("Add. 2", 1.0), ("Add. 4", 0.0), ("Add. 2 3", 1), ("Hm.", 0.25)]
    assert prefixes(*entries) == prefixes(*reversed(entries)) == SOLUTIONS


def test_the_question_may_head_each_prefix() -> None:
    assert prefixes((QUESTION, 0.5), (f"{QUESTION}\n\nAdd.", 0.75), (f"{QUESTION}\n\nAdd.\n2", None)) == [
        (("Add.", "2"), (0.75, -100.0))
    ]


def test_a_tree_alone_and_in_place_of_the_prefixes() -> None:
    alone = READERS["math_aps_tree"].read(TREE)
    inside = READERS["math_aps"].read({"question": QUESTION, "reasoning_steps": TREE})
    assert alone == inside
    assert [(record.steps, record.labels) for record in alone] == SOLUTIONS
    assert {record.problem for record in alone} == {QUESTION}
    # A root that is not the question is the first step of every solution.
    first = READERS["math_aps"].read({"question": "Other?", "reasoning_steps": TREE["children"][0]})
    assert [(record.steps, record.labels) for record in first] == SOLUTIONS[:2]


def test_a_tree_deeper_than_the_stack() -> None:
    tree = node("leaf", 1.0)
    for _ in range(3000):
        tree = node("step", 1.0, tree)
    (record,) = READERS["math_aps_tree"].read(node("P?", 1.0, tree))
    assert len(record.steps) == 3001


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"question": "P", "reasoning_steps": []}, RowLeftOut, "there is no step with a value"),
        ({"question": "P", "reasoning_steps": "a"}, TypeError, "reasoning_steps must be a list: got str"),
        ({"question": 1, "reasoning_steps": []}, TypeError, "question must be a string: got int"),
        ({"question": "P", "reasoning_steps": [{"mc_value": 1}]}, ValueError, "lacks a field: solution_prefix"),
        (
            {"question": "P", "reasoning_steps": [{"solution_prefix": "a", "mc_value": 1.5}]},
            ValueError,
            r"labels must be in \[0, 1\] or -100: got 1.5",
        ),
        (
            {"question": "P", "reasoning_steps": [{"solution_prefix": "a", "mc_value": v} for v in (0.5, 1.0)]},
            ValueError,
            "a prefix has several values: got 0.5 and 1.0",
        ),
        ({"question": "P", "reasoning_steps": {"text": "P"}}, ValueError, "tree node lacks a field: mc_value, child"),
        ({"question": "P", "reasoning_steps": node("P", 1, node("", 1))}, ValueError, "step must not be empty"),
        ({"question": "P", "reasoning_steps": node("P", 1, "a")}, TypeError, "tree node must be an object: got str"),
    ],
)
def test_bad_rows(row: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        READERS["math_aps"].read(row)
