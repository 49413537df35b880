"""Credit and rewards: values worked by hand, one batched call, and rewards on the right tokens."""

from __future__ import annotations

import functools
import math
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch

from modeling_prm import rewards
from modeling_prm.credit import (
    find_steps,
    first_error_credit,
    mean_credit,
    min_form_credit,
    place_on_sampled_tokens,
    place_on_tokens,
    sum_credit,
)
from modeling_prm.rewards import PRMReward, completion_text, prompt_problem
from modeling_prm.scoring import PRMVerifier
from modeling_prm.solution_score import SolutionScore
from modeling_prm.step_splitting import split_steps


class Reader:
    """A verifier that reads a step's probability off its end, "... 0.9", and cannot score a step "broken"."""

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = threshold
        self.calls: list[dict[str, Any]] = []

    def score_solutions(self, problems: Any, solutions: Any, *, step_style: Any, **options: Any) -> list[SolutionScore]:
        self.calls.append({"problems": problems, "solutions": solutions, "step_style": step_style, **options})
        assert len(problems) == len(solutions)
        results = []
        for index, (problem, text) in enumerate(zip(problems, solutions, strict=True)):
            steps = tuple(split_steps(text, step_style))
            is_broken = "broken" in text
            probs = None if is_broken else tuple(float(step.split()[-1]) for step in steps)
            result = SolutionScore(
                steps=steps,
                step_probs=probs,
                overall_score=None,
                aggregation="min",
                weakest_step=None,
                weakest_prob=None,
                first_error=None,
                threshold=self.threshold,
                solution_idx=index,
                problem=problem,
                error="it is broken" if is_broken else None,
            )
            results.append(result)
        return results


def text(*probs: float) -> str:
    return "\n\n".join(f"step {prob}" for prob in probs)


def test_sum_and_mean() -> None:
    assert sum_credit([0.9, 0.2, 0.7]) == [0.9, 0.2, 0.7]
    assert mean_credit([0.9, 0.3, 0.6]) == pytest.approx([0.3, 0.1, 0.2], abs=1e-15)


def test_min_form_by_hand() -> None:
    # e^(-0.5 / 0.5) and e^(-1 / 0.5) are 0.3678794 and 0.1353353; the weights are 0.7310586 and 0.2689414.
    assert min_form_credit([0.5, 1.0], temperature=0.5) == pytest.approx([0.7310586 * 0.5, 0.2689414], abs=1e-7)


def test_min_form_goes_from_the_minimum_to_the_mean() -> None:
    probs = [0.9, 0.2, 0.7, 0.95]
    assert sum(min_form_credit(probs, temperature=1e-3)) == pytest.approx(0.2, abs=1e-9)
    assert min_form_credit(probs, temperature=1e-3)[1] == pytest.approx(0.2, abs=1e-9)
    assert min_form_credit(probs, temperature=1e6) == pytest.approx([prob / 4 for prob in probs], abs=1e-6)
    # Two lowest steps share the minimum.
    assert min_form_credit([0.4, 0.4, 0.9], temperature=1e-3) == pytest.approx([0.2, 0.2, 0.0], abs=1e-9)


def test_min_form_of_pure_is_twice_ours_at_half_the_temperature_minus_one() -> None:
    probs = [0.97, 0.6, 0.66, 0.9]
    # PURE's own form: v = p - (1 - p), weights softmax(-v / 0.1).
    values = [prob - (1 - prob) for prob in probs]
    powers = [math.exp(-value / 0.1) for value in values]
    pure = [power / sum(powers) * value for power, value in zip(powers, values, strict=True)]
    assert min_form_credit(values, temperature=0.1) == pytest.approx(pure, abs=1e-12)
    assert 2 * sum(min_form_credit(probs, temperature=0.05)) - 1 == pytest.approx(sum(pure), abs=1e-12)


FIRST_ERRORS = [
    # probabilities, options, rewards
    ([0.9, 0.8, 0.7], {}, [0.0, 0.0, 1.0]),
    ([0.9, 0.8, 0.2, 0.9], {}, [0.0, 0.5, 0.0, 0.0]),
    ([0.9, 0.8, 0.2, 0.1], {"prefix_reward": 0.3, "penalty": -1.0}, [0.0, 0.3, -1.0, 0.0]),
    ([0.1, 0.9], {}, [0.0, 0.0]),
    ([0.1, 0.9], {"penalty": -0.5}, [-0.5, 0.0]),
    ([0.9, 0.5], {}, [0.0, 1.0]),
    ([0.9, 0.5], {"threshold": 0.8}, [0.5, 0.0]),
    ([0.9, 0.8, 0.2, 0.9], {"spread": True}, [0.125, 0.125, 0.0, 0.0]),
    ([0.9, 0.8], {"spread": True}, [0.5, 0.5]),
    # The final answer decides, where it is known.
    ([0.9, 0.8], {"is_correct": False, "penalty": -1.0}, [0.0, 0.5]),
    ([0.9, 0.2, 0.9], {"is_correct": True, "penalty": -1.0}, [0.0, 0.0, 1.0]),
    ([0.9, 0.2, 0.9, 0.9], {"is_correct": True, "spread": True}, [0.25, 0.25, 0.25, 0.25]),
    ([0.9, 0.2, 0.9], {"is_correct": False}, [0.5, 0.0, 0.0]),
]


@pytest.mark.parametrize(("probs", "options", "expected"), FIRST_ERRORS)
def test_credit_up_to_the_first_error(probs: list[float], options: dict[str, Any], expected: list[float]) -> None:
    assert first_error_credit(probs, **options) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "credit",
    [
        sum_credit,
        mean_credit,
        functools.partial(min_form_credit, temperature=0.3),
        functools.partial(first_error_credit, penalty=-1.0),
        functools.partial(first_error_credit, spread=True),
    ],
)
def test_a_batch_is_its_rows_wherever_the_padding_is(credit: Callable[..., Any]) -> None:
    rows = [[0.9, 0.3, 0.8, 0.6], [0.7], [0.2, 0.95], [0.8, 0.9, 0.1], [0.8, 0.1, 0.9], [0.9, 0.8, 0.7]]
    nan = float("nan")
    padded = [rows[0], [0.7, nan, nan, nan], [nan, 0.2, nan, 0.95], [0.8, nan, 0.9, 0.1]]
    probs = torch.tensor([*padded, [0.8, nan, 0.1, 0.9], [nan, 0.9, 0.8, 0.7]])
    mask = ~probs.isnan()
    result = credit(probs, mask=mask)
    assert result.dtype == torch.float32
    assert result[~mask].eq(0).all()
    for row, expected in enumerate(rows):
        assert result[row][mask[row]].tolist() == pytest.approx(credit(expected), abs=1e-6)
        assert credit(torch.tensor(expected)).tolist() == pytest.approx(credit(expected), abs=1e-6)


def test_correctness_goes_by_rows() -> None:
    probs = torch.tensor([[0.9, 0.2], [0.9, 0.8]])
    assert first_error_credit(probs, is_correct=[True, False]).tolist() == [[0.0, 1.0], [0.0, 0.5]]
    with pytest.raises(ValueError, match="a bool for each of 2"):
        first_error_credit(probs, is_correct=[True])
    with pytest.raises(ValueError, match=r"got 2 of torch.float32"):
        first_error_credit(probs, is_correct=[1.0, 0.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sum_credit([]), "solution 0 has no step"),
        (lambda: mean_credit(torch.ones(2, 2), mask=torch.tensor([[True, True], [False, False]])), "solution 1"),
        (lambda: sum_credit([0.5, float("nan")]), "step 2 of solution 0 has the value nan"),
        (lambda: sum_credit(torch.ones(1, 2, 3)), "shape"),
        (lambda: sum_credit(torch.ones(2), mask=torch.ones(2)), "bool"),
        (lambda: min_form_credit([0.5], temperature=0.0), "above 0"),
        (lambda: min_form_credit([0.5], temperature=float("inf")), "finite"),
        (lambda: first_error_credit([1.5]), r"\[0, 1\]"),
        (lambda: first_error_credit([0.5], prefix_reward=1.5), "prefix_reward"),
        (lambda: first_error_credit([0.5], penalty=0.1), "penalty"),
    ],
)
def test_credit_refuses(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


CREDITS = [
    # credit, options, the reward of steps 0.9, 0.2, 0.7
    ("sum", {}, 1.8),
    ("mean", {}, 0.6),
    # e^-2 / (e^-9 + e^-2 + e^-7) and so on: weights 0.0009050, 0.9924085, 0.0066866.
    ("min_form", {}, 0.0009050 * 0.9 + 0.9924085 * 0.2 + 0.0066866 * 0.7),
    ("min_form", {"temperature": 1e-3}, 0.2),
    ("first_error", {}, 0.5),
    ("first_error", {"threshold": 0.1}, 1.0),
    (functools.partial(first_error_credit, spread=True, prefix_reward=0.6), {}, 0.2),
]


@pytest.mark.parametrize(("credit", "options", "expected"), CREDITS)
def test_the_reward_is_the_sum_of_the_steps(credit: Any, options: dict[str, Any], expected: float) -> None:
    reward = PRMReward(Reader(), credit=credit, **options)
    (value,) = reward(prompts=["2 + 2?"], completions=[text(0.9, 0.2, 0.7)])
    assert value == pytest.approx(expected, abs=1e-6)
    (item,) = reward.step_rewards(["2 + 2?"], [text(0.9, 0.2, 0.7)])
    assert len(item.rewards) == 3
    longer = reward.step_rewards(["2 + 2?"] * 2, [text(0.9, 0.2, 0.7), text(0.9, 0.2, 0.7, 0.6)])
    assert [len(other.rewards) for other in longer] == [3, 4]
    assert longer[0] == item
    assert item.step_probs == (0.9, 0.2, 0.7)
    assert sum(item.rewards) == pytest.approx(expected, abs=1e-6)
    assert item.reward == value


def test_the_threshold_is_the_verifiers_by_default() -> None:
    completion = [text(0.9, 0.6)]
    assert PRMReward(Reader(threshold=0.5), credit="first_error")(["q"], completion) == [1.0]
    assert PRMReward(Reader(threshold=0.7), credit="first_error")(["q"], completion) == [0.5]


def test_the_final_answer_decides_where_it_is_known() -> None:
    def outcome(prompts: Any, completions: Any, answer: list[str], **columns: Any) -> list[float | None]:
        known = {"right": 1.0, "wrong": 0.0, "unknown": None}
        return [known[value] for value in answer]

    reward = PRMReward(Reader(), credit="first_error", outcome_func=outcome)
    good, bad = text(0.9, 0.9), text(0.9, 0.1)
    completions = [good, good, good, "", bad, bad, bad]
    answers = ["right", "wrong", "unknown", "right", "right", "wrong", "unknown"]
    reward.empty_reward = None
    assert reward(["q"] * 7, completions, answer=answers) == [1.0, 0.5, 1.0, None, 1.0, 0.5, 0.5]
    with pytest.raises(ValueError, match="1 values for 2 completions"):
        PRMReward(Reader(), credit="first_error", outcome_func=lambda **columns: [1.0])(["q"] * 2, [good, good])


def test_one_call_and_equal_completions_once() -> None:
    verifier = Reader()
    reward = PRMReward(verifier, credit="mean", batch_size=7, max_tokens_per_batch=99, empty_reward=-1.0)
    completions = [text(0.5), text(0.7), "", text(0.5), text(0.5)]
    columns = {"completion_ids": [[1]] * 5, "trainer_state": object()}
    assert reward(["one", "one", "one", "one", "two"], completions, **columns) == pytest.approx(
        [0.5, 0.7, -1.0, 0.5, 0.5]
    )
    assert verifier.calls == [
        {
            "problems": ["one", "one", "two"],
            "solutions": [text(0.5), text(0.7), text(0.5)],
            "step_style": "blank_lines",
            "batch_size": 7,
            "max_tokens_per_batch": 99,
            "on_error": "record",
            "show_progress": False,
        }
    ]
    assert reward([], []) == []
    assert reward(["one"], [" \n\n "]) == [-1.0]
    assert len(verifier.calls) == 1


def test_a_completion_without_a_step() -> None:
    with pytest.raises(ValueError, match="completion 1 has no step; say with empty_reward"):
        PRMReward(Reader())(["q", "q"], [text(0.5), " \n "])
    for empty in (0.25, None):
        reward = PRMReward(Reader(), empty_reward=empty)
        assert reward(["q", "q"], [text(0.5), ""]) == [pytest.approx(0.5), empty]
        item = reward.step_rewards(["q"], [""])[0]
        assert (item.steps, item.rewards, item.spans, item.reward, item.error) == ((), (), (), empty, "it has no step")


def test_a_completion_that_cannot_be_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    completions = [text(0.5), "broken", "", text(0.25)]
    with pytest.raises(ValueError, match="completion 1 could not be scored: it is broken; say with error_reward"):
        PRMReward(Reader(), empty_reward=0.0)(["q"] * 4, completions)
    reward = PRMReward(Reader(), empty_reward=0.0, error_reward=None)
    assert reward(["q"] * 4, completions) == [pytest.approx(0.5), None, 0.0, pytest.approx(0.25)]
    item = reward.step_rewards(["q"] * 4, completions)[1]
    assert (item.steps, item.step_probs, item.rewards, item.reward) == (("broken",), (), (), None)
    assert item.error == "it is broken"
    said: list[str] = []
    monkeypatch.setattr(rewards.logger, "warning", said.append)
    reward(["q"] * 2, [text(0.5), text(0.7)])
    assert said == []
    reward(["q"] * 4, completions)
    assert said == [
        "prm_reward: scored 2 of 4 completions; 1 have no step, 1 could not be scored, the first since: it is broken"
    ]
    reward([*"qq"], [text(0.5), ""])
    assert said[1:] == ["prm_reward: scored 1 of 2 completions; 1 have no step, 0 could not be scored"]


def test_a_failure_of_the_verifier_is_raised() -> None:
    class Gone(Reader):
        def score_solutions(self, *args: Any, **options: Any) -> Any:
            raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        PRMReward(Gone(), error_reward=None)(["q"], [text(0.5)])


def test_conversations() -> None:
    verifier = Reader()
    reward = PRMReward(verifier, credit="mean")
    prompt = [
        {"role": "system", "content": "Think."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]},
    ]
    completion = [{"role": "assistant", "content": text(0.5, 0.7)}]
    assert reward([prompt], [completion]) == pytest.approx([0.6])
    assert verifier.calls[0]["problems"] == ["2 + 2?"]
    assert verifier.calls[0]["solutions"] == [text(0.5, 0.7)]
    assert completion_text([*completion, *completion]) == text(0.5, 0.7, 0.5, 0.7)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: prompt_problem([{"role": "system", "content": "x"}]), ValueError, "problem_key"),
        (lambda: prompt_problem(3), TypeError, "got 3"),  # type: ignore[arg-type]
        (lambda: prompt_problem([{"content": "x"}]), TypeError, "role and content"),
        (lambda: prompt_problem([{"role": "user", "content": [{"type": "image"}]}]), TypeError, "parts of text"),
        (lambda: prompt_problem([{"role": "user", "content": None}]), TypeError, "got None"),
        (lambda: completion_text([{"role": "tool", "content": "x"}]), ValueError, "got one of 'tool'"),
    ],
)
def test_what_is_no_text_is_refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_problems_from_a_column() -> None:
    verifier = Reader()
    reward = PRMReward(verifier, problem_key="question")
    reward(["few-shot ... 2 + 2?"], [text(0.5)], question=["2 + 2?"], answer=["4"])
    assert verifier.calls[0]["problems"] == ["2 + 2?"]
    reward(["x", "y"], [text(0.5), text(0.7)], question=["one", "two"])
    assert verifier.calls[1]["problems"] == ["one", "two"]
    with pytest.raises(ValueError, match=r"'question' is no column that came along; there are \['answer'\]"):
        reward(["q"], [text(0.5)], answer=["4"])
    with pytest.raises(ValueError, match="2 values for 1 prompts"):
        reward(["q"], [text(0.5)], question=["a", "b"])
    with pytest.raises(TypeError, match="must hold texts, got int"):
        reward(["q"], [text(0.5)], question=[4])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"credit": "max"}, ValueError, "'sum', 'mean', 'min_form', 'first_error'"),
        ({"credit": 3}, TypeError, "got int"),
        ({"credit": "sum", "temperature": 0.1}, ValueError, "temperature belongs to credit='min_form'"),
        ({"threshold": 0.5}, ValueError, "threshold belongs to credit='first_error'"),
        ({"outcome_func": len}, ValueError, "outcome_func belongs"),
        ({"temperature": -1.0}, ValueError, "above 0"),
        ({"credit": "first_error", "threshold": 1.5}, ValueError, r"in \[0, 1\]"),
        ({"credit": "first_error", "outcome_func": "accuracy"}, TypeError, "a function, got str"),
        ({"step_style": "lines"}, ValueError, "there is no style 'lines'"),
        ({"empty_reward": "zero"}, ValueError, "empty_reward must be"),
        ({"error_reward": float("nan")}, ValueError, "error_reward must be"),
    ],
)
def test_options_are_checked_before_training(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PRMReward(Reader(), **options)


def test_other_wrong_input() -> None:
    with pytest.raises(TypeError, match="score_solutions is needed"):
        PRMReward(len)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 prompts and 1 completions"):
        PRMReward(Reader())(["q", "q"], [text(0.5)])
    with pytest.raises(ValueError, match=r"shape \(1, 2\), got \(1, 1\)"):
        PRMReward(Reader(), credit=lambda probs, mask: probs[:, :1])(["q"], [text(0.5, 0.5)])
    with pytest.raises(ValueError, match="not finite"):
        PRMReward(Reader(), credit=lambda probs, mask: probs / 0)(["q"], [text(0.5)])


def test_name_and_pickling() -> None:
    assert PRMReward(Reader()).__name__ == "prm_reward"
    copy = pickle.loads(pickle.dumps(PRMReward(Reader(), name="steps", credit="sum")))
    assert copy.__name__ == "steps"
    assert copy(["q"], [text(0.5, 0.25)]) == [0.75]


def reward_of(completion: str, step_style: Any = "blank_lines") -> Any:
    return PRMReward(Reader(), credit="sum", step_style=step_style).step_rewards(["q"], [completion])[0]


@pytest.mark.parametrize(
    ("completion", "step_style", "expected"),
    [
        ("a 0.5\n\nb 0.7\n", "blank_lines", ["a 0.5", "b 0.7"]),
        ("  a 0.5 \n \n\n a 0.5", "blank_lines", ["a 0.5", "a 0.5"]),
        ("a 0.5\r\nb 0.25\r\n\r\nc 0.7\r\n", "blank_lines", ["a 0.5\r\nb 0.25", "c 0.7"]),
        ("a 0.5\r\nb 0.25", "newlines", ["a 0.5", "b 0.25"]),
        ("Step 1: 0.5\nStep 2: 0.25", "step_markers", ["Step 1: 0.5", "Step 2: 0.25"]),
        ("x 0.5; y\r\n 0.5; x 0.5", lambda text: text.split("; "), ["x 0.5", "y\r\n 0.5", "x 0.5"]),
    ],
)
def test_spans_are_the_steps(completion: str, step_style: Any, expected: list[str]) -> None:
    item = reward_of(completion, step_style)
    assert [completion[start:end] for start, end in item.spans] == expected


def test_spans_take_in_a_marker_that_the_model_is_not_shown() -> None:
    completion = "Step 1: 2\n\nStep 2:\n\nStep 3: 3"
    steps = split_steps(completion, "step_markers", strip_markers=True)
    assert steps == ["2", "3"]
    assert find_steps(completion, steps, "step_markers") == ((0, 9), (20, 29))


def test_steps_that_do_not_stand_in_the_text() -> None:
    with pytest.raises(ValueError, match=r"step 1, 'A 0\.5', does not stand in the completion"):
        reward_of("a 0.5", lambda text: [text.upper()])
    # A call needs no places.
    assert PRMReward(Reader(), credit="sum", step_style=lambda text: [text.upper()])(["q"], ["a 0.5"]) == [0.5]


def test_rewards_on_tokens_by_hand() -> None:
    item = reward_of("ab 0.5\n\ncd 0.25")
    #          special  "ab"    " 0.5\n\n"  "cd"     " 0."      "25"
    offsets = [(0, 0), (0, 2), (2, 8), (8, 10), (10, 13), (13, 15)]
    assert place_on_tokens(item, offsets) == [0.0, 0.0, 0.5, 0.0, 0.0, 0.25]
    # One token that holds the end of both steps.
    assert place_on_tokens(item, [(0, 1), (1, 15)]) == [0.0, 0.75]
    with pytest.raises(ValueError, match="ends at character 15, the tokens at 13"):
        place_on_tokens(item, offsets[:-1])
    with pytest.raises(ValueError, match="the tokens at 0"):
        place_on_tokens(item, [])
    assert place_on_tokens(PRMReward(Reader(), empty_reward=0.0).step_rewards(["q"], [""])[0], [(0, 1)]) == [0.0]


@pytest.mark.parametrize("builder", [tiny_models.byte_level_tokenizer, tiny_models.sentencepiece_bpe_tokenizer])
def test_both_ways_agree_on_the_tokenizers_own_ids(builder: Callable[[], Any]) -> None:
    tokenizer = builder()
    completion = "So 12 + 30 = 42.\nthen é ∑ 0.5\n\nthe answer is (12) 0.25\n\n  It is 0.125"
    encoding = tokenizer(completion, return_offsets_mapping=True, add_special_tokens=False)
    item = reward_of(completion)
    by_offsets = place_on_tokens(item, encoding["offset_mapping"])
    assert [reward for reward in by_offsets if reward] == [0.5, 0.25, 0.125]
    assert by_offsets[-1] == 0.125
    assert place_on_sampled_tokens(item, encoding["input_ids"], tokenizer) == by_offsets
    # The end of the sequence is no part of the last step.
    with_eos = [*encoding["input_ids"], tokenizer.eos_token_id]
    assert place_on_sampled_tokens(item, with_eos, tokenizer) == [*by_offsets, 0.0]


def test_sampled_tokens_need_not_be_the_tokenizers_own() -> None:
    tokenizer = tiny_models.byte_level_tokenizer()
    completion = "é 0.5\n\nthe answer is 0.25"
    own = tokenizer(completion)["input_ids"]
    single = [tokenizer.convert_tokens_to_ids(token) for token in "".join(tokenizer.convert_ids_to_tokens(own))]
    assert len(single) > len(own)
    # A byte is a token: é takes two, so the first step's "5" is the sixth.
    expected = [0.0] * len(single)
    expected[5], expected[-1] = 0.5, 0.25
    assert place_on_sampled_tokens(reward_of(completion), single, tokenizer) == expected
    with pytest.raises(ValueError, match="not to the text scored"):
        place_on_sampled_tokens(reward_of(completion), single[:-1], tokenizer)


def test_random_ids_get_each_reward_where_the_step_is_first_complete() -> None:
    tokenizer = tiny_models.byte_level_tokenizer()
    generator = random.Random(0)
    placed = 0
    for _ in range(50):
        ids = [generator.randrange(1, len(tokenizer)) for _ in range(20)]
        completion = tokenizer.decode(ids, skip_special_tokens=True)
        steps = [completion[start : start + 7] for start in range(0, len(completion), 7)]

        def cut(text: str, steps: list[str] = steps) -> list[str]:
            return steps

        class Fixed(Reader):
            def score_solutions(self, problems: Any, solutions: Any, *, step_style: Any, **options: Any) -> Any:
                numbered = ["\n\n".join(f"s {index / 10}" for index in range(1, len(steps) + 1))]  # noqa: B023
                (score,) = super().score_solutions(problems, numbered, step_style="blank_lines")
                return [type(score)(**{**score.to_dict(), "steps": tuple(steps)})]  # noqa: B023

        (item,) = PRMReward(Fixed(), credit="sum", step_style=cut).step_rewards(["q"], [completion])
        expected = [0.0] * len(ids)
        for index, (_, end) in enumerate(item.spans):
            decoded = [tokenizer.decode(ids[:count], skip_special_tokens=True)[:end] for count in range(1, 21)]
            expected[decoded.index(completion[:end])] += (index + 1) / 10
        assert place_on_sampled_tokens(item, ids, tokenizer) == pytest.approx(expected)
        placed += len(steps)
    assert placed > 100


def test_a_real_verifier_in_few_passes(make_prm: Callable[..., Any]) -> None:
    model, processor = make_prm("llama")
    passes: list[int] = []
    model.register_forward_hook(
        lambda module, args, kwargs, output: passes.append(output.logits.shape[0]), with_kwargs=True
    )
    texts = ["2 + 2 = 4.\n\nSo it is 4.", "2 + 2 = 5.\n\nIt is 5.\n\nYes, 5.", "4", "2 + 2 = 4.\n\nSo it is 4."]
    values = PRMReward(PRMVerifier(model, processor), temperature=0.2)(["2 + 2?"] * 4, texts)
    assert passes == [3]
    for completion, value in zip(texts, values, strict=True):
        with torch.inference_mode():
            probs = model(**processor("2 + 2?", completion.split("\n\n"), return_tensors="pt")).step_probs[0].tolist()
        powers = [math.exp(-prob / 0.2) for prob in probs]
        expected = sum(power * prob for power, prob in zip(powers, probs, strict=True)) / sum(powers)
        assert value == pytest.approx(expected, abs=1e-5)


def test_a_completion_too_long_for_the_model(make_prm: Callable[..., Any]) -> None:
    model, processor = make_prm("llama")
    reward = PRMReward(PRMVerifier(model, processor), error_reward=-1.0)
    long = "and so on " * 200
    short, failed = reward(["2 + 2?"] * 2, ["4", long])
    assert failed == -1.0
    assert 0.0 < short < 1.0  # type: ignore[operator]
    reward.error_reward = "raise"
    with pytest.raises(ValueError, match=r"completion 1 could not be scored: .*error_reward"):
        reward(["2 + 2?"] * 2, ["4", long])
