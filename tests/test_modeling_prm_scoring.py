"""`PRMVerifier`: values against the bare backbone, batches, cutting of texts and ranking."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scoring_by_hand import PROBLEM, SOLUTIONS, by_hand, shapes_seen
from tiny_models import byte_level_tokenizer

from modeling_prm import PRMForStepScoring, PRMProcessor, PRMVerifier
from modeling_prm.batching import plan_batches

MakePRM = Callable[..., tuple[PRMForStepScoring, PRMProcessor]]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mistral", "qwen2", "modernbert"])
def test_scores_are_those_by_hand_alone_and_batched(family: str, make_prm: MakePRM) -> None:
    model, processor = make_prm(family)
    verifier = model.verifier(processor)
    assert type(verifier) is PRMVerifier
    expected = [by_hand(model, processor, PROBLEM, steps) for steps in SOLUTIONS]
    assert len({round(prob, 4) for probs in expected for prob in probs}) > 8
    batched = verifier.score_solutions(PROBLEM, SOLUTIONS)
    assert len(shapes_seen(model, lambda: verifier.score_solutions(PROBLEM, SOLUTIONS))) <= 2
    for index, (score, steps, probs) in enumerate(zip(batched, SOLUTIONS, expected, strict=True)):
        assert score.step_probs == pytest.approx(probs, abs=1e-5)
        assert score.steps == tuple(steps)
        assert score.overall_score == min(score.step_probs)
        assert score.weakest_prob == min(score.step_probs) == score.step_probs[score.weakest_step]
        assert (score.aggregation, score.threshold, score.solution_idx) == ("min", 0.5, index)
        assert (score.problem, score.error) == (PROBLEM, None)
        below = [i for i, prob in enumerate(score.step_probs) if prob < 0.5]
        assert score.first_error == (below[0] if below else -1)
        alone = verifier.score_solution(PROBLEM, steps)
        assert alone.step_probs == pytest.approx(score.step_probs, abs=1e-5)
        assert alone.solution_idx == 0


def test_the_result_is_made_of_plain_python(make_prm: MakePRM) -> None:
    score = PRMVerifier(*make_prm()).score_solution(PROBLEM, SOLUTIONS[0])
    assert [type(prob) for prob in score.step_probs] == [float, float]
    assert [type(score[name]) for name in ("overall_score", "weakest_step", "weakest_prob", "first_error")] == [
        *(float, int, float, int)
    ]


def test_aggregation_and_threshold(make_prm: MakePRM) -> None:
    model, processor = make_prm("llama", aggregation="mean")
    probs = by_hand(model, processor, PROBLEM, SOLUTIONS[1])
    middle = sorted(probs)[1]
    verifier = model.verifier(processor, threshold=middle + 1e-4)
    score = verifier.score_solution(PROBLEM, SOLUTIONS[1])
    assert (verifier.aggregation, score.aggregation) == ("mean", "mean")
    assert score.overall_score == pytest.approx(sum(probs) / 6, abs=1e-5)
    assert score.threshold == middle + 1e-4
    assert score.first_error == min(probs.index(sorted(probs)[0]), probs.index(middle))
    score = model.verifier(processor, "prod").score_solution(PROBLEM, SOLUTIONS[1])
    assert score.aggregation == "product"
    assert score.overall_score == pytest.approx(math.prod(probs), rel=1e-4)


def test_the_threshold_is_the_configs_where_none_is_named(make_prm: MakePRM) -> None:
    model, processor = make_prm("llama")
    for stored, given, expected in ((1.0, None, 0), (0.0, None, -1), (0.0, 1.0, 0), (1.0, 0.0, -1)):
        model.config.error_threshold = stored
        score = model.verifier(processor, threshold=given).score_solution(PROBLEM, SOLUTIONS[1])
        assert (score.threshold, score.first_error) == (stored if given is None else given, expected)
        assert PRMVerifier(model, processor, threshold=given).threshold == score.threshold


def test_classes(make_prm: MakePRM) -> None:
    model, processor = make_prm("llama", num_labels=3, class_weights=[1.0, 0.5, 0.0])
    scores = model.verifier(processor).score_solutions(PROBLEM, SOLUTIONS)
    weight, bias = model.value_head.out.weight.detach(), model.value_head.out.bias.detach()
    for score, steps in zip(scores, SOLUTIONS, strict=True):
        inputs = processor(PROBLEM, steps)
        with torch.no_grad():
            hidden = model.backbone(input_ids=torch.tensor(inputs["input_ids"])).last_hidden_state[0]
        expected = []
        for position in inputs["step_positions"][0]:
            right, neutral, wrong = (math.exp(float(logit)) for logit in weight @ hidden[position] + bias)
            expected.append((right + 0.5 * neutral) / (right + neutral + wrong))
        assert score.step_probs == pytest.approx(expected, abs=1e-5)


def test_classes_that_sum_to_one_and_an_ulp_are_scored(make_prm: MakePRM) -> None:
    model, processor = make_prm("llama", num_labels=3, class_weights=[1.0, 1.0, 0.0])
    with torch.no_grad():
        model.value_head.out.bias[2] = -100.0
    steps = [f"It is {i}." for i in range(12)]
    inputs = processor([PROBLEM] * 20, [[f"{j}", *steps] for j in range(20)], return_tensors="pt")
    with torch.no_grad():
        probs = model(**inputs).logits.softmax(dim=-1)
    # It does happen here.
    assert bool((probs[..., 0] + probs[..., 1] > 1.0).any())
    scores = model.verifier(processor).score_solutions(PROBLEM, [[f"{j}", *steps] for j in range(20)])
    assert max(max(score.step_probs) for score in scores) == 1.0


def test_bfloat16(make_prm: MakePRM) -> None:
    model, processor = make_prm("llama", dtype=torch.bfloat16)
    scores = model.verifier(processor).score_solutions(PROBLEM, SOLUTIONS)
    for score, steps in zip(scores, SOLUTIONS, strict=True):
        assert score.step_probs == pytest.approx(by_hand(model, processor, PROBLEM, steps), abs=3e-2)
    assert model.backbone.dtype == torch.bfloat16
    # The head is in float32, so that scores are finer than steps of bfloat16 (1/256 just below 1).
    assert any(float(torch.tensor(p).bfloat16()) != p for score in scores for p in score.step_probs)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tokenizer_without_padding_token(family: str, make_prm: MakePRM, backbone_folder: Any) -> None:
    model, processor = make_prm(family)
    assert processor.tokenizer.pad_token is None
    bare = PRMForStepScoring.from_backbone(backbone_folder("gpt2"), tokenizer=byte_level_tokenizer(unk_token="<unk>"))
    for prm, its_processor in ((model, processor), bare):
        scores = prm.verifier(its_processor).score_solutions(PROBLEM, SOLUTIONS)
        for score, steps in zip(scores, SOLUTIONS, strict=True):
            assert score.step_probs == pytest.approx(by_hand(prm, its_processor, PROBLEM, steps), abs=1e-5)
        assert its_processor.tokenizer.pad_token is None


def test_problems_of_their_own_and_any_iterable(make_prm: MakePRM) -> None:
    model, processor = make_prm()
    verifier = model.verifier(processor)
    problems = [f"What is {i}?" for i in range(len(SOLUTIONS))]
    expected = [by_hand(model, processor, *pair) for pair in zip(problems, SOLUTIONS, strict=True)]
    for scores in (
        verifier.score_solutions(problems, SOLUTIONS),
        verifier.score_solutions(tuple(problems), tuple(map(tuple, SOLUTIONS))),
        verifier.score_solutions(iter(problems), (iter(steps) for steps in SOLUTIONS)),
    ):
        assert [score.problem for score in scores] == problems
        for score, probs in zip(scores, expected, strict=True):
            assert score.step_probs == pytest.approx(probs, abs=1e-5)
    assert verifier.score_solutions(PROBLEM, []) == verifier.rank_solutions(PROBLEM, iter([])) == []


def test_texts_are_cut(make_prm: MakePRM) -> None:
    verifier = PRMVerifier(*make_prm())
    score = verifier.score_solution(PROBLEM, "12 + 30 = 42.\n\nSo 42.")
    assert score == verifier.score_solution(PROBLEM, ["12 + 30 = 42.", "So 42."])
    assert verifier.score_solution(PROBLEM, "a\nb", step_style="newlines").steps == ("a", "b")
    assert verifier.score_solution(PROBLEM, "a;b", step_style=lambda text: text.split(";")).steps == ("a", "b")
    # Texts and lists of steps may stand together.
    both = verifier.score_solutions(PROBLEM, ["a\n\nb", ["a\n\nb"]])
    assert [score.steps for score in both] == [("a", "b"), ("a\n\nb",)]


def test_markers_go_where_the_template_numbers_the_steps(make_prm: MakePRM) -> None:
    text = "Step 1: 12 + 30\n**Step 2.** So 42."
    for template, steps in (
        ("Step {i}: {step}", ("12 + 30", "So 42.")),
        ("{step}", ("Step 1: 12 + 30", "**Step 2.** So 42.")),
    ):
        verifier = PRMVerifier(*make_prm("llama", step_template=template))
        assert verifier.score_solution(PROBLEM, text, step_style="step_markers").steps == steps


def test_as_many_scores_as_steps_whatever_they_say(make_prm: MakePRM) -> None:
    """The separator, special tokens and templates in a text are text."""
    steps = ["a <|step_end|> b", "<|step_end|>", "<s></s>", "Step 2: {step}\n\n", "[SEP] <|endoftext|>", "\\1 %s é 四"]
    for family in ("llama", "gpt2", "bert"):
        model, processor = make_prm(family)
        score = model.verifier(processor).score_solution("<|step_end|> {problem}", steps)
        assert score.steps == tuple(steps)
        assert score.step_probs == pytest.approx(by_hand(model, processor, "<|step_end|> {problem}", steps), abs=1e-5)


def many_solutions(count: int) -> list[list[str]]:
    generator = random.Random(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "again", "12", "30", "42", "is"]
    return [
        [" ".join(generator.choices(words, k=generator.randint(1, 6))) for _ in range(generator.randint(1, 4))]
        for _ in range(count)
    ]


def problems_of_their_own(count: int) -> list[str]:
    """Problems that soon differ, so that no solution begins as another one does."""
    return [f"{10 + index} + 30 = ?" for index in range(count)]


@pytest.mark.parametrize("batch_size", [1, 4, 23])
def test_a_batch_size_is_kept_and_changes_no_score(batch_size: int, make_prm: MakePRM) -> None:
    model, processor = make_prm()
    solutions = many_solutions(23)
    lengths = sorted(
        (len(processor(*pair)["input_ids"][0]) for pair in zip(problems_of_their_own(23), solutions, strict=True)),
        reverse=True,
    )
    assert lengths[0] > 2 * lengths[-1]
    seen = check_limited(model, processor, solutions, batch_size=batch_size, max_tokens_per_batch=4096)
    # Nothing but the number of rows limits a batch here: 23 = 5 · 4 + 3.
    assert [rows for rows, _ in seen] == {1: [1] * 23, 4: [4, 4, 4, 4, 4, 3], 23: [23]}[batch_size]
    # Longest first, so that each pass is padded as little as can be.
    assert [length for _, length in seen] == lengths[::batch_size]


@pytest.mark.parametrize(("max_tokens", "passes_of_one"), [(200, False), (1, True)])
def test_a_limit_of_tokens_is_kept_and_changes_no_score(
    max_tokens: int, passes_of_one: bool, make_prm: MakePRM
) -> None:
    model, processor = make_prm()
    seen = check_limited(model, processor, many_solutions(23), max_tokens_per_batch=max_tokens)
    assert all(rows * length <= max_tokens or rows == 1 for rows, length in seen)
    assert (len(seen) == 23) == passes_of_one


def check_limited(
    model: PRMForStepScoring, processor: PRMProcessor, solutions: list[list[str]], **limits: int
) -> list[tuple[int, int]]:
    """Scores are those by hand in the order given; return the shapes of the passes."""
    scores: list[Any] = []
    verifier = model.verifier(processor)
    problems = problems_of_their_own(len(solutions))
    seen = shapes_seen(model, lambda: scores.extend(verifier.score_solutions(problems, solutions, **limits)))
    assert [score.solution_idx for score in scores] == list(range(len(solutions)))
    for score, problem, steps in zip(scores, problems, solutions, strict=True):
        assert score.step_probs == pytest.approx(by_hand(model, processor, problem, steps), abs=1e-5)
    assert sum(rows for rows, _ in seen) == len(solutions)
    return seen


def test_by_default_a_pass_holds_1024_tokens(make_prm: MakePRM) -> None:
    model, processor = make_prm()
    problems, verifier = problems_of_their_own(80), model.verifier(processor)
    seen = shapes_seen(model, lambda: verifier.score_solutions(problems, many_solutions(80)))
    assert len(seen) > 1
    assert all(count * length <= 1024 for count, length in seen)
    # No pass but the last could take one row more.
    assert all((count + 1) * length > 1024 for count, length in seen[:-1])


def test_batches_by_hand() -> None:
    lengths = [5, 3, 0, 4, 2]
    assert plan_batches(lengths, None, 100) == [[0, 3, 1, 4]]
    assert plan_batches(lengths, None, 10) == [[0, 3], [1, 4]]
    assert plan_batches(lengths, None, 9) == [[0], [3, 1], [4]]
    assert plan_batches(lengths, None, 1) == [[0], [3], [1], [4]]
    assert plan_batches(lengths, 3, 100) == [[0, 3, 1], [4]]
    assert plan_batches([2, 2, 2], 2, 100) == [[0, 1], [2]]
    assert plan_batches([0, 0], None, 10) == plan_batches([], None, 10) == []


def test_ranking(make_prm: MakePRM) -> None:
    model, processor = make_prm()
    verifier = model.verifier(processor)
    scores = verifier.score_solutions(PROBLEM, SOLUTIONS)
    order = sorted(range(5), key=lambda i: scores[i].overall_score, reverse=True)
    assert order != list(range(5))
    ranked = verifier.rank_solutions(PROBLEM, SOLUTIONS)
    assert [score.solution_idx for score in ranked] == order
    assert ranked == [scores[i] for i in order]


def test_equal_scores_keep_their_order_and_errors_come_last(make_prm: MakePRM) -> None:
    verifier = PRMVerifier(*make_prm())
    same, other = SOLUTIONS[0], SOLUTIONS[2]
    given = [[], same, other, same, [" "], other, same]
    ranked = verifier.rank_solutions(PROBLEM, given, on_error="record", batch_size=1)
    best, worst = ([1, 3, 6], [2, 5])
    if ranked[0].solution_idx == 2:
        best, worst = worst, best
    assert [score.solution_idx for score in ranked] == [*best, *worst, 0, 4]
    assert ranked[0].overall_score > ranked[4].overall_score
    assert [score.overall_score for score in ranked[5:]] == [None, None]
    assert ranked[-1].error == "step 1 of solution 4 is empty; leave it out or give its text"


def test_a_saved_model_scores_alike(prm_folder: Callable[..., Path]) -> None:
    folder = prm_folder("gpt2")
    model, processor = PRMForStepScoring.from_pretrained(folder), PRMProcessor.from_pretrained(folder)
    for score, steps in zip(model.verifier(processor).score_solutions(PROBLEM, SOLUTIONS), SOLUTIONS, strict=True):
        assert score.step_probs == pytest.approx(by_hand(model, processor, PROBLEM, steps), abs=1e-5)
