"""The demo's problems, their labels, and its backbone and tokenizer."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from trainer.demo_backbone import build_demo_backbone, build_demo_tokenizer
from trainer.demo_data import example_solutions, generate_arithmetic, problem_split

EQUATION = re.compile(r"^(\d+) ([-+]) (\d+) = (\d+)\.$")
CORRECTION = re.compile(r"^Wait, (\d+) ([-+]) (\d+) = (\d+)\.$")
ANSWER = re.compile(r"^The answer is (\d+)\.$")
ANSWER_CORRECTION = re.compile(r"^Wait, the answer is (\d+)\.$")
GAINS = ("add", "buys", "finds", "gets", "wins")
LOSSES = ("subtract", "gives away", "loses", "sells", "uses")
SIGNS = dict.fromkeys(GAINS, "+") | dict.fromkeys(LOSSES, "-")
SIGN_OF_WORDS = re.compile(rf"\b({'|'.join(SIGNS)}) (\d+)")


def calculate(left: int, sign: str, right: int) -> int:
    return {"+": left + right, "-": left - right}[sign]


def equations_of(problem: str) -> list[tuple[int, str, int, int]]:
    """What the text asks for, read from its words: (left, sign, right, result) of each operation."""
    start = re.search(r"\d+", problem)
    assert start is not None
    value, equations = int(start[0]), []
    for words, number in SIGN_OF_WORDS.findall(problem):
        sign, right = SIGNS[words], int(number)
        equations.append((value, sign, right, calculate(value, sign, right)))
        value = equations[-1][-1]
    return equations


def judge(problem: str, steps: list[str]) -> list[float]:
    """Labels worked out from the texts alone: the next step due, given the last value that stands."""
    equations = equations_of(problem)
    labels, index, sound = [], 0, True
    for step in steps:
        if match := EQUATION.match(step):
            left, sign, right, result = match.groups()
            sound = sound and (int(left), sign, int(right), int(result)) == equations[index]
            index += 1
        elif match := CORRECTION.match(step):
            left, sign, right, result = match.groups()
            stated = (int(left), sign, int(right), int(result))
            # Read as a correction of the last step where this equation was due.
            due = [number for number, equation in enumerate(equations[:index]) if equation == stated]
            sound = bool(due)
            if sound:
                index = due[-1] + 1
        else:
            match = ANSWER.match(step) or ANSWER_CORRECTION.match(step)
            assert match is not None, step
            given = int(match[1]) == equations[-1][-1]
            sound = given and (sound or step.startswith("Wait")) and index == len(equations)
        labels.append(float(sound))
    return labels


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return generate_arithmetic(1500, seed=3)


def test_the_same_seed_gives_the_same_rows_and_leaves_the_global_generator_alone():
    random.seed(5)
    state = random.getstate()
    first = generate_arithmetic(40, seed=7)
    assert first == generate_arithmetic(40, seed=7)
    assert first != generate_arithmetic(40, seed=8)
    assert random.getstate() == state


def test_every_label_agrees_with_an_evaluation_of_the_texts(rows):
    for row in rows:
        assert row["labels"] == judge(row["problem"], row["steps"]), row


def test_right_solutions_do_each_operation_once_and_end_with_the_answer():
    for row in generate_arithmetic(200, seed=1, wrong_share=0, corrected_share=0):
        equations = equations_of(row["problem"])
        expected = [f"{left} {sign} {right} = {result}." for left, sign, right, result in equations]
        assert row["steps"] == [*expected, f"The answer is {equations[-1][-1]}."]
        assert set(row["labels"]) == {1.0}


def test_columns_types_and_ranges(rows):
    for row in rows:
        assert set(row) == {"problem", "steps", "labels"}
        assert len(row["steps"]) == len(row["labels"]) >= 4
        assert all(type(label) is float for label in row["labels"])
        assert all(0 <= int(number) <= 10 for step in row["steps"] for number in re.findall(r"\d+", step))


def test_no_problem_is_on_both_sides_or_comes_twice():
    train = [row["problem"] for row in generate_arithmetic(2000, seed=0, split="train")]
    held_out = [row["problem"] for row in generate_arithmetic(500, seed=0, split="eval")]
    assert len(set(train)) == 2000
    assert len(set(held_out)) == 500
    assert not set(train) & set(held_out)
    assert {problem_split(problem) for problem in held_out} == {"eval"}


def test_shares_of_right_wrong_and_corrected_solutions(rows):
    right = sum(set(row["labels"]) == {1.0} for row in rows)
    corrected = sum(0.0 in row["labels"] and row["labels"][-1] == 1.0 for row in rows)
    wrong = len(rows) - right - corrected
    assert right / len(rows) == pytest.approx(0.30, abs=0.05)
    assert wrong / len(rows) == pytest.approx(0.35, abs=0.05)
    assert corrected / len(rows) == pytest.approx(0.35, abs=0.05)
    labels = [label for row in rows for label in row["labels"]]
    assert 0.2 < labels.count(0.0) / len(labels) < 0.45


def test_corrections_are_right_and_wrong_both(rows):
    labels = [label for row in rows for step, label in zip(row["steps"], row["labels"], strict=True) if "Wait" in step]
    assert 0.5 < sum(labels) / len(labels) < 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split"),
        ({"operations": (3, 2)}, "operations"),
        ({"wrong_share": 0.8, "corrected_share": 0.3}, "sum"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        generate_arithmetic(1, seed=0, **options)


def test_the_example_is_held_out_and_labelled_by_the_same_rule():
    problem, solutions = example_solutions()
    assert problem_split(problem) == "eval"
    assert list(solutions) == ["right", "wrong", "self-corrected"]
    for solution in solutions.values():
        assert solution["labels"] == judge(problem, solution["steps"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo_backbone(tmp_path_factory.mktemp("demo") / "backbone", seed=0)


TEXTS = [
    "Problem: Anna has 17 apples, buys 25 more and gives away 8. How many are left?\n\n",
    "Step 1: 17 + 25 = 42.",
    "Step 12: Wait, 120 - 7 is 113, not 1123.",
    "x² + ½ = 3,14 … “quoted” \t tab\r\n  two  spaces",
    "数学 задача سؤال 🍎👩‍🔬 ñ",
    "<think>17</think> 0042 1234567",
]


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_keeps_its_ids_on_loading_and_loses_no_text(folder, text):
    made, loaded = build_demo_tokenizer(), AutoTokenizer.from_pretrained(folder)
    ids = made(text)["input_ids"]
    assert loaded(text)["input_ids"] == ids
    assert loaded.decode(ids, clean_up_tokenization_spaces=False) == text
    assert loaded.eos_token_id not in ids


def test_heads_start_out_looking_back_at_the_numbers_of_a_step(folder):
    model = AutoModel.from_pretrained(folder, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Step 1: 4 + 3 = 7.\nStep 2: 7 - 5 = 2.", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        attentions = model(torch.tensor([[*ids, ids[-1]]]), output_attentions=True).attentions
    # The last token stands where the separator does: 2 tokens after the "2", 5 after the "5", 8 after the "7".
    distances = torch.arange(len(ids), -1, -1, dtype=torch.float32)
    seen = [float(distances @ attentions[0][0, head, -1]) for head in range(4)]
    assert seen == pytest.approx([2, 5, 7, 8], abs=1)


def test_the_seed_fixes_the_weights_and_heads_are_of_64(folder, tmp_path):
    state = torch.get_rng_state()
    same = AutoModel.from_pretrained(build_demo_backbone(tmp_path / "same", seed=0)).state_dict()
    other = AutoModel.from_pretrained(build_demo_backbone(tmp_path / "other", seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    loaded = AutoModel.from_pretrained(folder)
    assert all(torch.equal(weight, same[name]) for name, weight in loaded.state_dict().items())
    assert not torch.equal(loaded.embed_tokens.weight, other.embed_tokens.weight)
    assert loaded.config.hidden_size == 64 * loaded.config.num_attention_heads
    assert len(AutoTokenizer.from_pretrained(folder)) == loaded.config.vocab_size
