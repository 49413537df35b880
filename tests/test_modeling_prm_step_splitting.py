"""Cutting texts into steps: every style by hand, markers and what only looks like one, and that nothing is lost."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from modeling_prm.step_splitting import MIN_CHARS, STEP_STYLES, check_step_style, split_steps


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n\nb", ["a", "b"]),
        ("a\n \t\n\n\nb\n", ["a", "b"]),
        ("a\nb\n\n  c d\n", ["a\nb", "c d"]),
        ("a\r\nb\r\n\r\nc", ["a\nb", "c"]),
        ("甲。\n乙。\n\u3000\n丙。", ["甲。\n乙。", "丙。"]),
        ("one", ["one"]),
        (" \n\n\t\n", []),
        ("", []),
    ],
)
def test_blank_lines(text: str, expected: list[str]) -> None:
    assert split_steps(text) == split_steps(text, "blank_lines") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb\n\n c\n", ["a", "b", "c"]),
        ("a\r\nb\r\n", ["a", "b"]),
        ("\n  \n甲\n乙", ["甲", "乙"]),
        ("a b", ["a b"]),
        ("\n", []),
    ],
)
def test_newlines(text: str, expected: list[str]) -> None:
    assert split_steps(text, "newlines") == expected


# Each line is a marker with what it leaves of itself without it.
MARKERS = {
    "Step 1: add 2": "add 2",
    "Step 1:add 2": "add 2",
    "step 10) add 2": "add 2",
    "STEP 3. Add 2": "Add 2",
    "Step 3": "",
    "Step 3  ": "",
    "  Step 2 : add 2": "add 2",
    "Step2: add 2": "add 2",
    "Step #2: add 2": "add 2",
    "Step 1.2: add 2": "add 2",
    "Step 2a: add 2": "add 2",
    "**Step 1.** Add 2": "Add 2",
    "**Step 1:** add 2": "add 2",
    "**Step 1**: add 2": "add 2",
    "**Step 1** add 2": "add 2",
    "**Step 1** - add 2": "add 2",
    "**Step 1**—add 2": "add 2",
    "**Step 1** –5 + 2": "–5 + 2",
    "__Step 1__ add 2": "add 2",
    "*Step 1:* add 2": "add 2",
    "Step 1: **2** is added": "**2** is added",
    "### Step 2 - add 2": "add 2",
    "## Step 2 Add 2": "Add 2",
    "### **Step 2**": "",
    "- Step 1: add 2": "add 2",
    "* **Step 1:** add 2": "add 2",
    "> Step 1. Add 2": "Add 2",
    "Step 2 - add 2": "add 2",
    "Step 2- add 2": "add 2",
    "Step 2 — add 2": "add 2",
    "Step 2—add 2": "add 2",
    "Step 1：加 2": "加 2",
    "Step 1: -5 + 2": "-5 + 2",
    "Step 1. 5 + 2": "5 + 2",
}
NO_MARKERS = [
    "Step 3 times the value is 4.",
    "Step 2's result is 4.",
    "Step 2, then 3.",
    "Step 1.5 is half way.",
    "Step 2-3 of the recipe: stir.",
    "Step 2–5 are alike.",
    "Step 3rd from the left: this one.",
    "### Step 3rd from the left",
    "Steps 1: and 2: follow.",
    "Step one: add.",
    "step by step: 3",
    "As in Step 3: add.",
    "Footstep 3: add.",
    "1. Step: add.",
    "Step",
]


@pytest.mark.parametrize("line", MARKERS)
def test_markers(line: str) -> None:
    text = f"So:\n{line}\n= 4\nStep 77: done"
    assert split_steps(text, "step_markers") == ["So:", f"{line}\n= 4".strip(), "Step 77: done"]
    rest = f"{MARKERS[line]}\n= 4".strip()
    assert split_steps(text, "step_markers", strip_markers=True) == ["So:", rest, "done"]


@pytest.mark.parametrize("line", NO_MARKERS)
def test_what_only_looks_like_a_marker(line: str) -> None:
    text = f"Step 1: So\n{line}\nStep 2: done"
    assert split_steps(text, "step_markers") == [f"Step 1: So\n{line}", "Step 2: done"]


def test_markers_in_a_whole_solution() -> None:
    text = "Let x be 3.\r\n\r\n**Step 1.** x + 1 = 4.\r\nStep 3 times 4 is 12.\r\n\r\n**Step 2.** So 12.\r\n"
    assert split_steps(text, "step_markers") == [
        *("Let x be 3.", "**Step 1.** x + 1 = 4.\nStep 3 times 4 is 12.", "**Step 2.** So 12.")
    ]
    assert split_steps(text, "step_markers", strip_markers=True) == [
        *("Let x be 3.", "x + 1 = 4.\nStep 3 times 4 is 12.", "So 12.")
    ]
    # Without a marker the text is one step; a marker alone is a step only where markers stay.
    assert split_steps("x = 3.\n\nx = 4.", "step_markers") == ["x = 3.\n\nx = 4."]
    assert split_steps("Step 1:\nStep 2: b", "step_markers") == ["Step 1:", "Step 2: b"]
    assert split_steps("Step 1:\nStep 2: b", "step_markers", strip_markers=True) == ["b"]


def test_thinking_joins_fragments_with_the_text_between_them() -> None:
    long_1, long_2 = "First " + "a" * 50, "Then " + "b" * 50
    text = f"{long_1}\n\nWait.\n \n\nHmm, no.\n\n{long_2}\n\nDone."
    assert split_steps(text, "thinking") == [f"{long_1}\n\nWait.\n \n\nHmm, no.", f"{long_2}\n\nDone."]
    # At the start they stay with the piece after them.
    assert split_steps(f"Okay.\n\nSo.\n\n{long_1}\n\n{long_2}", "thinking") == [f"Okay.\n\nSo.\n\n{long_1}", long_2]
    assert split_steps("\n\nOkay.\n\nSo.\n", "thinking") == ["Okay.\n\nSo."]
    assert split_steps(f"\n\n{long_1}\n\n{long_2}\n\n", "thinking") == [long_1, long_2]
    assert split_steps(" \n\n", "thinking") == []


def test_thinking_counts_characters_without_white_space_around() -> None:
    exactly, below = "a" * MIN_CHARS, "b" * (MIN_CHARS - 1) + "   "
    assert split_steps(f"{exactly}\n\n{exactly}", "thinking") == [exactly, exactly]
    assert split_steps(f"{exactly}\n\n{below}", "thinking") == [f"{exactly}\n\n{below}".strip()]
    assert split_steps("abc\n\ndef\n\ngh", "thinking", min_chars=3) == ["abc", "def\n\ngh"]
    assert split_steps("abc\n\nd", "thinking", min_chars=0) == ["abc", "d"]
    # CJK characters count one each.
    assert split_steps("甲" * 40 + "\n\n" + "乙" * 40, "thinking") == ["甲" * 40, "乙" * 40]


def test_a_function_gets_the_text_as_it_is() -> None:
    assert split_steps("a\r\n; b;", lambda text: text.split(";")) == ["a\r\n", " b", ""]
    assert split_steps("ab", tuple) == ["a", "b"]


# Line ends, markers, decorations and letters, in any order.
PARTS = [
    "\n",
    "\n",
    "\r\n",
    "\n\n",
    " ",
    "\t",
    "\u3000",
    "Step 1:",
    "step 2",
    "**",
    "#",
    "-",
    "3.",
    "a",
    "甲",
    "😀",
    "é",
]


@pytest.mark.parametrize("style", STEP_STYLES)
def test_nothing_is_lost_but_white_space_at_cuts(style: str) -> None:
    generator = random.Random(0)
    several = 0
    for _ in range(2000):
        text = "".join(generator.choices(PARTS, k=generator.randint(0, 30)))
        steps = split_steps(text, style, **({"min_chars": 4} if style == "thinking" else {}))
        assert "".join("".join(steps).split()) == "".join(text.split()), text
        assert all(step and step == step.strip() for step in steps), text
        # Each step is a part of the text, after the one before it, with only white space between.
        plain, end = text.replace("\r\n", "\n"), 0
        for step in steps:
            start = plain.index(step, end)
            assert not plain[end:start].strip(), text
            end = start + len(step)
        several += len(steps) > 1
    assert several > 500


def test_without_markers_each_step_is_the_end_of_one_with_them() -> None:
    generator = random.Random(1)
    for _ in range(1000):
        text = "".join(generator.choices([*PARTS, "\nStep 3: "], k=generator.randint(0, 20)))
        remaining = iter(split_steps(text, "step_markers"))
        for step in split_steps(text, "step_markers", strip_markers=True):
            assert any(piece.endswith(step) for piece in remaining), text


@pytest.mark.parametrize("style", STEP_STYLES)
def test_time_grows_with_the_text_and_no_faster(style: str) -> None:
    """Runs of one character are where a regular expression may try every place against every other."""
    runs = ["*", "_", "#", "-", " ", "\n", "\n ", ">", "1.", ":", "_*", "step", "Step 1 ", "a\n\n"]
    start = time.perf_counter()
    for run in runs:
        for before, after in (("", ""), ("Step 1", "x"), ("**Step 1", "x"), ("", "Step")):
            split_steps(before + run * 50_000 + after, style)
    # Linear takes well under a second here; quadratic takes minutes.
    assert time.perf_counter() - start < 20


def test_mistakes() -> None:
    with pytest.raises(
        ValueError, match=r"there is no style 'lines'; choose one of 'blank_lines', .*or give a function"
    ):
        split_steps("a", "lines")
    with pytest.raises(ValueError, match="there is no style 3;"):
        check_step_style(3)
    for style in (*STEP_STYLES, str.split):
        check_step_style(style)
    for style in ("blank_lines", str.split):
        with pytest.raises(ValueError, match="strip_markers belongs to style='step_markers'"):
            split_steps("a", style, strip_markers=True)
        with pytest.raises(ValueError, match="min_chars belongs to style='thinking'"):
            split_steps("a", style, min_chars=7)
    for text in (None, ["a"], b"a"):
        with pytest.raises(TypeError, match="the text of a solution must be a string, got"):
            split_steps(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("returned", [None, "ab", [1], ["a", None], {"a": 1}])
def test_functions_that_return_something_else(returned: Any) -> None:
    with pytest.raises(TypeError, match="that cuts steps must return a list of strings, got"):
        split_steps("a", lambda text: returned)
