"""`PRMVerifier`: what cannot be scored, mistakes in a call, and what a call leaves as it was."""

from __future__ import annotations

import copy
import random
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scoring_by_hand import PROBLEM, SOLUTIONS, by_hand, shapes_seen

from modeling_prm import PRMForStepScoring, PRMProcessor, PRMVerifier, base_verifier
from modeling_prm.scoring import evaluating

MakePRM = Callable[..., tuple[PRMForStepScoring, PRMProcessor]]

NAN = float("nan")
LONG = ["12 + 30 = 42."] * 40

# What cannot be scored, with what is raised and its message; the index is that in the list.
BAD: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "no step": (PROBLEM, [], ValueError, "solution {i} has no step"),
    "no step in a text": (PROBLEM, " \n\n ", ValueError, "solution {i} has no step"),
    "empty step": (PROBLEM, ["a", ""], ValueError, "step 2 of solution {i} is empty"),
    "blank step": (PROBLEM, [" \n"], ValueError, "step 1 of solution {i} is empty"),
    "no string": (PROBLEM, ["a", 3], TypeError, "step 2 of solution {i} must be a string, got int"),
    "no list": (PROBLEM, 3, TypeError, "solution {i} must be a list of steps or a text, got int"),
    # Iterated, a dictionary gives its keys and a set its members in any order.
    "dictionary": (PROBLEM, {"steps": ["a"]}, TypeError, "solution {i} must be a list of steps or a text, got dict"),
    "set": (PROBLEM, {"a", "b"}, TypeError, "solution {i} must be a list of steps or a text, got set"),
    "half a pair in a step": (
        PROBLEM,
        ["a", "fine \ud83d"],
        ValueError,
        r"step 2 of solution {i} holds half of a surrogate pair, 'fine \\ud83d'; decode its source",
    ),
    "half a pair in a text": (PROBLEM, "a\n\nb \udc00", ValueError, "step 2 of solution {i} holds half of a surrogate"),
    "half a pair in a problem": ("What \ud83d?", ["a"], ValueError, "problem {i} holds half of a surrogate pair"),
    "None": (PROBLEM, None, TypeError, "solution {i} must be a list of steps or a text, got NoneType"),
    "empty problem": ("", ["a"], ValueError, "problem {i} is empty"),
    "blank problem": (" \n", ["a"], ValueError, "problem {i} is empty"),
    "problem of no string": (None, ["a"], TypeError, "problem {i} must be a string, got NoneType"),
    "a number": (7, ["a"], TypeError, "problem {i} must be a string, got int"),
    "too long": (
        PROBLEM,
        LONG,
        ValueError,
        "solution {i} is longer than max_length=256 tokens: only 20 of 40 steps",
    ),
    "problem too long": (PROBLEM * 99, ["a"], ValueError, "solution {i} is longer than max_length=256 tokens: only 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_scored_raises_or_is_recorded(name: str, make_prm: MakePRM) -> None:
    problem, solution, kind, message = BAD[name]
    verifier = PRMVerifier(*make_prm())
    with pytest.raises(kind, match=message.format(i=0)):
        verifier.score_solution(problem, solution)
    problems, solutions = [PROBLEM, problem, PROBLEM], [SOLUTIONS[0], solution, SOLUTIONS[1]]
    with pytest.raises(kind, match=message.format(i=1)):
        verifier.score_solutions(problems, solutions)
    first, bad, last = verifier.score_solutions(problems, solutions, on_error="record")
    good = verifier.score_solutions(PROBLEM, [SOLUTIONS[0], SOLUTIONS[1]])
    assert [(score.step_probs, score.error) for score in (first, last)] == [(score.step_probs, None) for score in good]
    assert (first.solution_idx, last.solution_idx) == (0, 2)
    assert re.search(message.format(i=1), bad.error)
    scores = [bad[field] for field in ("step_probs", "overall_score", "weakest_step", "weakest_prob", "first_error")]
    assert scores == [None] * 5
    assert (bad.solution_idx, bad.aggregation, bad.threshold) == (1, "min", 0.5)
    assert bad.problem == (problem if isinstance(problem, str) else None)
    if "long" in name:
        assert bad.steps == tuple(solution)


def test_a_score_is_no_solution(make_prm: MakePRM) -> None:
    verifier = PRMVerifier(*make_prm())
    score = verifier.score_solution(PROBLEM, SOLUTIONS[0])
    with pytest.raises(TypeError, match="solution 0 must be a list of steps or a text, got SolutionScore"):
        verifier.score_solution(PROBLEM, score)
    assert verifier.score_solution(PROBLEM, score.steps) == score


def test_all_can_be_errors(make_prm: MakePRM) -> None:
    model, processor = make_prm()
    verifier = model.verifier(processor)
    scores: list[Any] = []
    seen = shapes_seen(model, lambda: scores.extend(verifier.score_solutions("", [["a"], []], on_error="record")))
    assert seen == []
    assert [score.error for score in scores] == [f"problem {i} is empty; give its text" for i in range(2)]


def test_the_backbones_positions_limit_too(make_prm: MakePRM) -> None:
    """Also where the processor's own limit was taken away or raised after the verifier was made."""
    model, processor = make_prm("gpt2")
    verifier = model.verifier(processor)
    steps = ["12 + 30 = 42."] * 40
    for max_length in (None, 10_000):
        processor.max_length = max_length
        length = len(processor(PROBLEM, steps)["input_ids"][0])
        message = f"solution 1 has {length} tokens, the backbone reads 256; score a shorter one"
        with pytest.raises(ValueError, match=message):
            verifier.score_solutions(PROBLEM, [SOLUTIONS[0], steps])
        good, bad = verifier.score_solutions(PROBLEM, [SOLUTIONS[0], steps], on_error="record")
        assert good.step_probs == pytest.approx(by_hand(model, processor, PROBLEM, SOLUTIONS[0]), abs=1e-5)
        assert (bad.error, bad.step_probs) == (message, None)


def test_exactly_as_many_tokens_as_fit_are_scored(make_prm: MakePRM) -> None:
    model, processor = make_prm()
    verifier = model.verifier(processor)
    length = len(processor(PROBLEM, SOLUTIONS[0])["input_ids"][0])
    processor.max_length = length
    assert len(verifier.score_solution(PROBLEM, SOLUTIONS[0]).step_probs) == 2
    processor.max_length = length - 1
    with pytest.raises(ValueError, match=f"longer than max_length={length - 1} tokens: only 1 of 2 steps fit"):
        verifier.score_solution(PROBLEM, SOLUTIONS[0])


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_logits_that_are_not_finite(value: float, make_prm: MakePRM) -> None:
    model, processor = make_prm()
    verifier = model.verifier(processor)
    good = verifier.score_solutions(PROBLEM, SOLUTIONS)
    ids = [set(processor(PROBLEM, steps)["input_ids"][0]) for steps in SOLUTIONS]
    only_there = min(ids[3] - set().union(*ids[:3], *ids[4:]))
    with torch.no_grad():
        model.backbone.get_input_embeddings().weight[only_there] = value
    message = "the model gave NaN or infinite logits for solution 3; look for such values in its weights"
    with pytest.raises(ValueError, match=message):
        verifier.score_solutions(PROBLEM, SOLUTIONS)
    scores = verifier.score_solutions(PROBLEM, SOLUTIONS, on_error="record")
    for i, score in enumerate(scores):
        if i == 3:
            assert score.error.startswith(message)
            assert (score.step_probs, score.steps) == (None, tuple(SOLUTIONS[3]))
        else:
            assert (score.error, score.step_probs) == (None, good[i].step_probs)
    assert [score.solution_idx for score in verifier.rank_solutions(PROBLEM, SOLUTIONS, on_error="record")][-1] == 3
    with torch.no_grad():
        model.value_head.out.bias[0] = value
    assert all(score.error for score in verifier.score_solutions(PROBLEM, SOLUTIONS, on_error="record"))


def test_a_long_list_in_pieces(make_prm: MakePRM) -> None:
    verifier = PRMVerifier(*make_prm())
    scores = verifier.score_solutions(PROBLEM, [SOLUTIONS[0], [], LONG], on_error="record", first_idx=500)
    assert [score.solution_idx for score in scores] == [500, 501, 502]
    assert "solution 501 " in scores[1].error
    assert "solution 502 " in scores[2].error


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"on_error": "skip"}, ValueError, "on_error must be 'raise' or 'record', got 'skip'"),
        ({"batch_size": 0}, ValueError, "batch_size must be None or at least 1, got 0"),
        ({"max_tokens_per_batch": -1}, ValueError, "max_tokens_per_batch must be None or at least 1, got -1"),
        # A mistake of the call, not of a solution.
        ({"step_style": "lines", "on_error": "record"}, ValueError, "there is no style 'lines'"),
        ({"problems": [PROBLEM], "solutions": [["a"], ["b"]]}, ValueError, "got 1 problems and 2 solutions"),
        ({"solutions": "a\n\nb"}, TypeError, "solutions is one string"),
    ],
)
def test_mistakes_in_a_call(options: dict[str, Any], kind: type[Exception], message: str, make_prm: MakePRM) -> None:
    verifier = PRMVerifier(*make_prm())
    with pytest.raises(kind, match=message):
        verifier.score_solutions(**{"problems": PROBLEM, "solutions": [["a"]]} | options)
    if "problems" in options:
        with pytest.raises(TypeError, match="problem must be one string, that of all solutions, got list"):
            verifier.rank_solutions([PROBLEM], [["a"]])


def test_mistakes_in_making_one(make_prm: MakePRM) -> None:
    model, processor = make_prm()
    with pytest.raises(ValueError, match="there is no aggregation 'median'"):
        PRMVerifier(model, processor, "median")
    for threshold in (-0.1, 1.1, NAN):
        with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got"):
            PRMVerifier(model, processor, threshold=threshold)
    for pair in ((processor, model), (model, processor.tokenizer), (model.backbone, processor), (None, None)):
        with pytest.raises(TypeError, match="a PRMForStepScoring and its PRMProcessor are needed, got"):
            PRMVerifier(*pair)
    with pytest.raises(ValueError, match=r"do not belong together: .*separator_token_id is \d+ and \d+"):
        model.verifier(make_prm("gpt2")[1])
    with pytest.raises(ValueError, match="do not belong together: step_joiner"):
        model.verifier(make_prm(step_joiner="\n\n")[1])


def state(model: PRMForStepScoring, processor: PRMProcessor) -> dict[str, Any]:
    """Everything that a call must leave as it was."""
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "gradients": [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()],
        "config": copy.deepcopy(model.config.to_dict()),
        "tokenizer": processor.tokenizer.backend_tokenizer.to_str(),
        "sides": (processor.tokenizer.padding_side, processor.tokenizer.truncation_side),
        "splits": processor.tokenizer.backend_tokenizer.encode_special_tokens,
        "processor": processor.to_dict(),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
        "random": random.getstate(),
        "grad": torch.is_grad_enabled(),
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    tensors = all(torch.equal(one["weights"][name], other["weights"][name]) for name in one["weights"])
    rest = [name for name in one if name not in ("weights", "torch")]
    return tensors and torch.equal(one["torch"], other["torch"]) and all(one[name] == other[name] for name in rest)


@pytest.mark.parametrize("mode", ["eval", "train", "mixed"])
def test_a_call_leaves_everything_as_it_was(mode: str, make_prm: MakePRM) -> None:
    model, processor = make_prm("gpt2", head_dropout=0.5)
    processor.tokenizer.padding_side = "left"
    expected = model.verifier(processor).score_solutions(PROBLEM, SOLUTIONS)
    model.train(mode != "eval")
    if mode == "mixed":
        model.backbone.h[1].eval()
    verifier = model.verifier(processor, "mean")
    before = state(model, processor)
    scores = verifier.score_solutions(PROBLEM, SOLUTIONS, batch_size=2)
    # Dropout was off meanwhile.
    for score, other in zip(scores, expected, strict=True):
        assert score.step_probs == pytest.approx(other.step_probs, abs=1e-5)
    verifier.rank_solutions(PROBLEM, [*SOLUTIONS, [], LONG], on_error="record")
    assert same(state(model, processor), before)
    assert len(set(before["modes"].values())) == (2 if mode == "mixed" else 1)


def test_an_exception_in_the_middle_leaves_everything_as_it_was(make_prm: MakePRM) -> None:
    model, processor = make_prm("gpt2", head_dropout=0.5)
    model.train()
    model.backbone.h[1].eval()
    verifier = model.verifier(processor)
    before = state(model, processor)
    calls = []

    def fail(module: Any, args: Any) -> None:
        calls.append(module.training)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    hook = model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        verifier.score_solutions(PROBLEM, SOLUTIONS, batch_size=1)
    hook.remove()
    assert calls == [False, False]
    assert same(state(model, processor), before)
    with torch.no_grad():
        model.value_head.out.bias[0] = NAN
    with pytest.raises(ValueError, match="NaN or infinite"):
        verifier.score_solution(PROBLEM, SOLUTIONS[0])
    assert {name: module.training for name, module in model.named_modules()} == before["modes"]


def test_modes_come_back(make_prm: MakePRM) -> None:
    model, _ = make_prm()
    model.train()
    model.value_head.eval()
    modes = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes


def test_scores_carry_no_graph(make_prm: MakePRM) -> None:
    model, processor = make_prm()
    outputs: list[Any] = []
    hook = model.register_forward_hook(lambda module, args, output: outputs.append(output.logits))
    model.verifier(processor).score_solution(PROBLEM, SOLUTIONS[0])
    hook.remove()
    assert [logits.requires_grad for logits in outputs] == [False]


def test_the_progress_bar_shows_long_work(
    make_prm: MakePRM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = make_prm()
    verifier = model.verifier(processor)
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", True)
    hook = model.register_forward_pre_hook(lambda module, args: time.sleep(0.15))

    def written(**options: Any) -> str:
        verifier.score_solutions(PROBLEM, SOLUTIONS[:3], batch_size=1, **options)
        return capsys.readouterr().err

    assert written() == ""
    assert "3/3" in written(show_progress=True)
    monkeypatch.setattr(base_verifier, "_SECONDS_BEFORE_PROGRESS", 0.05)
    shown = written()
    assert "Scoring" in shown
    assert "3/3" in shown
    assert written(show_progress=False) == ""
    hook.remove()
    # Whoever turned off the bars of Transformers sees none of ours.
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", False)
    assert written(show_progress=True) == ""


def test_a_processor_with_another_tokenizer_is_refused_where_even_the_separator_has_the_same_id(
    make_prm: Callable[..., Any],
) -> None:
    model, processor = make_prm("qwen2")
    _, other = make_prm("roberta")
    assert other.separator_token_id == processor.separator_token_id
    with pytest.raises(ValueError, match="do not belong together: the tokenizer gives other ids"):
        PRMVerifier(model, other)
    # A checkpoint from before the hash was kept is taken at its word.
    model.config.ids_probe = None
    PRMVerifier(model, other)
