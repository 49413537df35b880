"""Sessions: the scores of whole prefixes, at the cost of the new steps, in bounded memory."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from scoring_by_hand import PROBLEM, by_hand
from test_modeling_prm_token_count import Count, distinct_tokens, text
from tiny_models import BIDIRECTIONAL, DECODERS, FAMILIES

from modeling_prm import PRMForStepScoring, PRMProcessor, PRMVerifier
from modeling_prm.search import beam_search, diverse_verifier_tree_search
from modeling_prm.sessions import Beam, CachedSession, Session, open_session
from modeling_prm.step_generation import ProposedStep

MakePRM = Callable[..., tuple[PRMForStepScoring, PRMProcessor]]


def grow(session: Session, rounds: int, seed: int = 0) -> list[Beam]:
    """Beams of a search: in each round up to four of the last beams, some twice, are extended; all that were made."""
    generator = random.Random(seed)
    last, made = [session.root], []
    for _ in range(rounds):
        chosen = [generator.choice(last) for _ in range(4)]
        last = session.extend_many(chosen, [text(generator, generator.randint(1, 6)) for _ in chosen])
        made += last
    return made


def check(beams: list[Beam], model: PRMForStepScoring, processor: PRMProcessor, abs: float = 1e-5) -> None:
    for beam in beams:
        assert beam.score is not None
        assert beam.score.steps == beam.steps
        expected = by_hand(model, processor, PROBLEM, list(beam.steps))
        assert beam.score.step_probs == pytest.approx(expected, abs=abs)
        assert beam.score.overall_score == min(beam.score.step_probs)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_whole_prefixes(family: str, make_prm: MakePRM) -> None:
    model, processor = make_prm(family)
    with model.verifier(processor).session(PROBLEM) as session:
        assert isinstance(session, CachedSession) == (family in DECODERS)
        check(grow(session, 5), model, processor)
        # From the problem once more, after others.
        again = session.extend(session.root, "It is 7.")
        check([again, session.extend(again, "So the answer is 42.")], model, processor)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt2", {"separator_token": "\n"}),
        ("llama", {"num_labels": 1, "step_template": "{step}", "step_joiner": " "}),
        ("qwen2", {"problem_template": "<|endoftext|>{problem} ?"}),
    ],
)
def test_other_layouts(family: str, options: dict[str, Any], make_prm: MakePRM) -> None:
    model, processor = make_prm(family, **options)
    with open_session(model.verifier(processor), PROBLEM) as session:
        check(grow(session, 4), model, processor)


@pytest.mark.parametrize("score_offset", [0, -1])
def test_texts_that_are_joined_before_they_are_tokenized(score_offset: int, make_prm: MakePRM) -> None:
    """The ids of a step may change with the one after it, and the score may stand one token earlier."""
    model, processor = make_prm("gpt2", separator_token="\n", step_joiner="", step_template="{step}")
    for name, value in (("layout_version", 2), ("score_offset", score_offset)):
        setattr(model.config, name, value)
    model.config.ids_probe = None
    processor = PRMProcessor(processor.tokenizer, **model.config.layout)
    with open_session(model.verifier(processor), PROBLEM) as session:
        check(grow(session, 4), model, processor)


def test_each_step_is_computed_once(make_prm: MakePRM) -> None:
    model, processor = make_prm("llama")
    counted = Count(model)
    session = open_session(model.verifier(processor), PROBLEM)
    beams = grow(session, 6)
    ideal = 0
    for beam in beams:
        own, parent = processor.encode([PROBLEM] * 2, [list(beam.steps), list(beam.steps[:-1]) or ["x"]])
        ideal += len(own.input_ids) - (len(parent.input_ids) if beam.steps[:-1] else 0)
    # The problem is not computed for each of the four first steps.
    assert distinct_tokens(processor, [PROBLEM] * 4, [list(beam.steps) for beam in beams[:4]]) + 4 < sum(
        len(item.input_ids) for item in processor.encode([PROBLEM] * 4, [list(beam.steps) for beam in beams[:4]])
    )
    assert counted.tokens < ideal
    # One pass a round; the first problem and its steps may take two.
    assert counted.passes <= 7
    # A step costs as much after many steps as after one.
    beam, costs = session.root, []
    for _ in range(11):
        before = counted.tokens
        beam = session.extend(beam, "the quick brown fox")
        costs.append(counted.tokens - before)
    lengths = [len(processor(PROBLEM, ["the quick brown fox"] * n)["input_ids"][0]) for n in range(1, 12)]
    assert costs[1:] == [after - before for before, after in pairwise(lengths)]
    assert max(costs[1:]) <= min(costs[1:]) + 2


def test_what_is_dropped_is_freed(make_prm: MakePRM) -> None:
    model, processor = make_prm("llama")
    session = open_session(model.verifier(processor), PROBLEM)
    assert isinstance(session, CachedSession)
    first, second = session.extend_many([session.root] * 2, ["12 + 30 = 42.", "the quick brown fox"])
    before = session.num_cached_tokens
    children = session.extend_many([first, second, second], ["It is 7.", "jumps over", "the lazy dog"])
    lengths = [len(item.input_ids) for item in processor.encode([PROBLEM] * 3, [list(c.steps) for c in children])]
    parents = [len(item.input_ids) for item in processor.encode([PROBLEM] * 2, [list(first.steps), list(second.steps)])]
    assert session.num_cached_tokens - before == sum(lengths) - parents[0] - 2 * parents[1]
    gc.disable()
    try:
        kept, children = children[0], []
        assert session.num_cached_tokens == before + lengths[0] - parents[0]
        # A beam needs its parent's tokens, whoever holds the parent.
        del first
        assert session.num_cached_tokens == before + lengths[0] - parents[0]
        check([session.extend(kept, "So the answer is 42.")], model, processor)
    finally:
        gc.enable()
    session.close()
    assert session.num_cached_tokens == 0
    check([kept], model, processor)


@pytest.mark.parametrize("most", [1, 60, 150])
def test_past_the_bound_tokens_are_computed_again(most: int, make_prm: MakePRM) -> None:
    model, processor = make_prm("llama")
    session = open_session(model.verifier(processor), PROBLEM, max_cached_tokens=most)
    assert isinstance(session, CachedSession)
    counted = Count(model)
    generator = random.Random(3)
    last, made = [session.root], []
    for _ in range(6):
        last = session.extend_many([generator.choice(last) for _ in range(3)], [text(generator, 4) for _ in range(3)])
        made += last
        assert session.num_cached_tokens <= most
    check(made, model, processor)
    made += session.extend_many([made[0], made[-1], made[-1]], ["It is 7.", "It is 7.", "jumps"])
    check(made[-3:], model, processor)
    assert counted.tokens > distinct_tokens(processor, [PROBLEM] * len(made), [list(beam.steps) for beam in made])


def test_small_batches(make_prm: MakePRM) -> None:
    model, processor = make_prm("qwen2")
    session = open_session(model.verifier(processor), PROBLEM, max_tokens_per_batch=20)
    check(grow(session, 4), model, processor)


def test_modes_and_errors(make_prm: MakePRM) -> None:
    model, processor = make_prm("llama")
    verifier = model.verifier(processor)
    model.train()
    with verifier.session(PROBLEM) as session:
        beam = session.extend(session.root, "It is 7.")
        assert model.training
        model.eval()
        check([beam], model, processor)
        assert session.extend_many([], []) == []
        with pytest.raises(ValueError, match="got 1 beams and 2 steps"):
            session.extend_many([beam], ["a", "b"])
        with pytest.raises(ValueError, match="step 2 of solution 0 is empty"):
            session.extend(beam, " ")
        with pytest.raises(ValueError, match="on_error must be"):
            session.extend_many([beam], ["a"], on_error="ignore")
        long = "the quick brown fox " * 100
        fine, blank, too_long = session.extend_many([beam] * 3, ["So 42.", "", long], on_error="record")
        check([fine], model, processor)
        assert [blank.score.error, blank.score.step_probs] == [
            "step 2 of solution 1 is empty; leave it out or give its text",
            None,
        ]
        assert "is longer than max_length=256" in too_long.score.error
        # What could not be scored has no tokens, and can still be asked for more.
        assert session.extend_many([too_long], ["a"], on_error="record")[0].score.error is not None
    for options, message in (({"max_cached_tokens": 0}, "max_cached_tokens"), ({"max_tokens_per_batch": -1}, "_batch")):
        with pytest.raises(ValueError, match=message):
            verifier.session(PROBLEM, **options)
    for problem, error in ((3, TypeError), (" ", ValueError)):
        with pytest.raises(error, match="problem"):
            verifier.session(problem)
    with pytest.raises(TypeError, match="score_solutions"):
        open_session(model, PROBLEM)


def test_logits_that_are_not_finite(make_prm: MakePRM) -> None:
    model, processor = make_prm("llama")
    session = open_session(model.verifier(processor), PROBLEM)
    beam = session.extend(session.root, "It is 7.")
    model.value_head.out.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        session.extend(beam, "It is 7.")
    (bad,) = session.extend_many([beam], ["It is 8."], on_error="record")
    assert "NaN or infinite logits for solution 0" in bad.score.error


class OnlyScores:
    """A verifier that has nothing but the method that a search needs."""

    def __init__(self, verifier: PRMVerifier) -> None:
        self.verifier = verifier

    def score_solutions(self, problems: Any, solutions: Any, *, on_error: str) -> Any:
        return self.verifier.score_solutions(problems, solutions, on_error=on_error)


def propose(problem: str, prefixes: Sequence[Sequence[str]], n: int) -> list[list[ProposedStep]]:
    """Steps that follow from the prefix alone; some end the solution."""
    proposals = []
    for prefix in prefixes:
        generator = random.Random("|".join(prefix))
        proposals.append(
            [ProposedStep(text(generator, generator.randint(3, 8)), 5, generator.random() < 0.05) for _ in range(n)]
        )
    return proposals


@pytest.mark.parametrize("family", ["llama", *BIDIRECTIONAL[:1]])
def test_searches_find_the_same_with_fewer_tokens(family: str, make_prm: MakePRM) -> None:
    model, processor = make_prm(family)
    verifier = model.verifier(processor)
    counted = Count(model) if family == "llama" else None
    for search, options in (
        (beam_search, {"num_beams": 3}),
        (diverse_verifier_tree_search, {"num_subtrees": 2, "beam_width": 2}),
    ):
        results, tokens = [], []
        for given in (verifier, OnlyScores(verifier)):
            start = counted.tokens if counted else 0
            results.append(search(PROBLEM, propose, given, expansions=3, max_steps=8, **options))
            tokens.append(counted.tokens - start if counted else 0)
        ours, theirs = results
        assert [score.steps for score in ours.solutions] == [score.steps for score in theirs.solutions]
        assert (ours.finished, ours.subtrees, ours.stopped_by) == (theirs.finished, theirs.subtrees, theirs.stopped_by)
        assert (ours.num_scored_steps, ours.num_merged) == (theirs.num_scored_steps, theirs.num_merged)
        for own, other in zip(ours.solutions, theirs.solutions, strict=True):
            assert own.step_probs == pytest.approx(other.step_probs, abs=1e-5)
        assert counted is None or tokens[0] < 0.7 * tokens[1]
