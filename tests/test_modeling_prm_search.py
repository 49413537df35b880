"""Guided search over trees that are written out here, with every choice worked by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import prod
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from modeling_prm.search import beam_search, diverse_verifier_tree_search
from modeling_prm.solution_score import SolutionScore
from modeling_prm.step_generation import ProposedStep

Steps = tuple[str, ...]
PROBLEM = "What is it?"


class TreeGenerator:
    """The likeliest next steps of a tree, written as {prefix: [(step, probability, tokens, final), ...]}."""

    def __init__(self, tree: dict[Steps, list[tuple[str, float, int, bool]]]) -> None:
        self.tree = tree
        self.calls: list[tuple[list[Steps], int]] = []

    def __call__(self, problem: str, prefixes: Sequence[Sequence[str]], n: int) -> list[list[ProposedStep]]:
        assert problem == PROBLEM
        self.calls.append(([tuple(prefix) for prefix in prefixes], n))
        return [
            [
                ProposedStep(text, tokens, final)
                for text, _, tokens, final in sorted(self.tree.get(tuple(prefix), []), key=lambda child: -child[1])[:n]
            ]
            for prefix in prefixes
        ]


class TableVerifier:
    """Scores of a table, with the probability of each step by its text; a prefix scores its lowest one."""

    def __init__(self, probs: dict[str, float], unscorable: Sequence[str] = ()) -> None:
        self.probs = probs
        self.unscorable = unscorable
        self.calls: list[list[Steps]] = []

    def score_solutions(
        self, problems: Sequence[str], solutions: Sequence[Sequence[str]], *, on_error: str = "raise"
    ) -> list[SolutionScore]:
        assert on_error == "record"
        assert list(problems) == [PROBLEM] * len(solutions)
        self.calls.append([tuple(steps) for steps in solutions])
        return [self.score(tuple(steps), index) for index, steps in enumerate(solutions)]

    def score(self, steps: Steps, index: int = 0) -> SolutionScore:
        failed = steps[-1] in self.unscorable
        probs = None if failed else tuple(self.probs[step] for step in steps)
        return SolutionScore(
            steps=steps,
            step_probs=probs,
            overall_score=None if probs is None else min(probs),
            aggregation="min",
            weakest_step=None if probs is None else probs.index(min(probs)),
            weakest_prob=None if probs is None else min(probs),
            first_error=None if probs is None else next((i for i, p in enumerate(probs) if p < 0.5), -1),
            threshold=0.5,
            solution_idx=index,
            problem=PROBLEM,
            error="too long" if failed else None,
        )


def leaf_paths(tree: dict[Steps, list[tuple[str, float, int, bool]]], prefix: Steps = ()) -> dict[Steps, float]:
    """The probability of each whole solution of a tree."""
    paths: dict[Steps, float] = {}
    for text, probability, _, final in tree[prefix]:
        below = {(*prefix, text): 1.0} if final else leaf_paths(tree, (*prefix, text))
        paths.update({path: probability * rest for path, rest in below.items()})
    return paths


# The only right solution, C C2 right, is what the generator writes in 6 of 1,000 solutions.
LIKELY_WRONG: dict[Steps, list[tuple[str, float, int, bool]]] = {
    (): [("A", 0.6, 1, False), ("B", 0.3, 1, False), ("C", 0.1, 1, False)],
    ("A",): [("A1", 0.6, 1, False), ("A2", 0.4, 1, False)],
    ("B",): [("B1", 0.5, 1, False), ("B2", 0.5, 1, False)],
    ("C",): [("C1", 0.7, 1, False), ("C2", 0.3, 1, False)],
    ("A", "A1"): [("a", 0.6, 1, True), ("b", 0.4, 1, True)],
    ("A", "A2"): [("c", 0.6, 1, True), ("d", 0.4, 1, True)],
    ("B", "B1"): [("e", 0.6, 1, True), ("f", 0.4, 1, True)],
    ("B", "B2"): [("g", 0.5, 1, True), ("h", 0.5, 1, True)],
    ("C", "C1"): [("i", 0.9, 1, True), ("j", 0.1, 1, True)],
    ("C", "C2"): [("k", 0.8, 1, True), ("right", 0.2, 1, True)],
}
VERDICTS = {
    "A": 0.6,
    "B": 0.5,
    "C": 0.9,
    "A1": 0.4,
    "A2": 0.3,
    "B1": 0.45,
    "B2": 0.2,
    "C1": 0.35,
    "C2": 0.85,
    **dict.fromkeys("abcdefghijk", 0.1),
    "right": 0.8,
}
RIGHT = ("C", "C2", "right")


def test_search_finds_what_greedy_and_best_of_four_miss() -> None:
    # Greedy takes the likeliest step: A, A1, a.
    greedy: Steps = ()
    generator = TreeGenerator(LIKELY_WRONG)
    while len(greedy) < 3:
        greedy += (generator(PROBLEM, [greedy], 1)[0][0].text,)
    assert greedy == ("A", "A1", "a")
    # The likeliest solutions are A A1 a 0.216, A A1 b and A A2 c 0.144, A A2 d 0.096 (then B B1 e 0.09).
    paths = leaf_paths(LIKELY_WRONG)
    four = sorted(paths, key=lambda path: -paths[path])[:4]
    assert [(path, pytest.approx(paths[path])) for path in four] == [
        (("A", "A1", "a"), 0.216),
        (("A", "A1", "b"), 0.144),
        (("A", "A2", "c"), 0.144),
        (("A", "A2", "d"), 0.096),
    ]
    verifier = TableVerifier(VERDICTS)
    assert max(verifier.score(path).overall_score or 0.0 for path in four) == 0.1
    assert paths[RIGHT] == pytest.approx(0.006)
    # Four drawn at random hold it with probability 1 - 0.994^4 = 0.024.
    assert 1 - prod([1 - paths[RIGHT]] * 4) == pytest.approx(0.024, abs=5e-4)

    beams = beam_search(PROBLEM, TreeGenerator(LIKELY_WRONG), verifier, num_beams=2, expansions=2)
    trees = diverse_verifier_tree_search(
        PROBLEM, TreeGenerator(LIKELY_WRONG), verifier, num_subtrees=3, beam_width=1, expansions=2
    )
    for result in (beams, trees):
        assert result.best is not None
        assert result.best.steps == RIGHT
        assert result.best.overall_score == 0.8
        assert result.best.problem == PROBLEM
        assert result.finished[0]
        assert result.stopped_by == "finished"


def test_rounds_of_a_beam_search_worked_by_hand() -> None:
    generator, verifier = TreeGenerator(LIKELY_WRONG), TableVerifier(VERDICTS)
    result = beam_search(PROBLEM, generator, verifier, num_beams=2, expansions=2)
    # Round 1: A 0.6, B 0.5, C 0.9: C and A go on. Round 2: C C1 0.35, C C2 0.85, A A1 0.4, A A2 0.3.
    # Round 3: k 0.1, right 0.8, a 0.1, b 0.1: the finished ones hold both places.
    assert generator.calls == [
        ([()], 4),
        ([("C",), ("A",)], 2),
        ([("C", "C2"), ("A", "A1")], 2),
    ]
    assert verifier.calls == [
        [("A",), ("B",), ("C",)],
        [("C", "C1"), ("C", "C2"), ("A", "A1"), ("A", "A2")],
        [("C", "C2", "k"), RIGHT, ("A", "A1", "a"), ("A", "A1", "b")],
    ]
    assert [score.steps for score in result.solutions] == [
        RIGHT,
        ("C", "C2", "k"),
        ("A", "A1", "a"),
        ("A", "A1", "b"),
    ]
    assert [score.solution_idx for score in result.solutions] == [0, 1, 2, 3]
    assert result.finished == (True,) * 4
    assert result.subtrees == (0,) * 4
    assert result.num_rounds == 3
    assert result.num_generated_tokens == 3 + 4 + 4
    assert result.num_scored_prefixes == 3 + 4 + 4
    assert result.num_scored_steps == 3 * 1 + 4 * 2 + 4 * 3
    assert (result.num_merged, result.num_blank, result.num_unscorable) == (0, 0, 0)


# All that follows A looks well until its last step; what follows B looks a little worse, and is right.
TEMPTING: dict[Steps, list[tuple[str, float, int, bool]]] = {
    (): [("A", 0.6, 1, False), ("B", 0.4, 1, False)],
    ("A",): [("A1", 0.5, 1, False), ("A2", 0.5, 1, False)],
    ("B",): [("B1", 0.5, 1, False), ("B2", 0.5, 1, False)],
    **{("A", f"A{i}"): [(f"a{i}", 0.5, 1, True), (f"b{i}", 0.5, 1, True)] for i in (1, 2)},
    **{("B", f"B{i}"): [(f"c{i}", 0.5, 1, True), (f"d{i}", 0.5, 1, True)] for i in (1, 2)},
}
TEMPTED = {
    "A": 0.9,
    "B": 0.8,
    "A1": 0.75,
    "A2": 0.7,
    "B1": 0.65,
    "B2": 0.4,
    **{f"{letter}{i}": 0.2 for letter, i in product("abcd", "12")},
    "d1": 0.64,
}


def test_subtrees_keep_what_a_beam_search_of_the_same_cost_loses() -> None:
    generator = TreeGenerator(TEMPTING)
    beams = beam_search(PROBLEM, generator, TableVerifier(TEMPTED), num_beams=2, expansions=2)
    # A A1 0.75 and A A2 0.7 take both places from B B1 0.65.
    assert [call[0] for call in generator.calls] == [[()], [("A",), ("B",)], [("A", "A1"), ("A", "A2")]]
    assert {score.steps[0] for score in beams.solutions} == {"A"}
    assert beams.best is not None
    assert beams.best.overall_score == 0.2

    generator, verifier = TreeGenerator(TEMPTING), TableVerifier(TEMPTED)
    trees = diverse_verifier_tree_search(PROBLEM, generator, verifier, num_subtrees=2, beam_width=1, expansions=2)
    assert generator.calls == [([()], 4), ([("A",), ("B",)], 2), ([("A", "A1"), ("B", "B1")], 2)]
    assert len(verifier.calls) == 3
    assert trees.num_generated_tokens == beams.num_generated_tokens == 10
    assert trees.best is not None
    assert trees.best.steps == ("B", "B1", "d1")
    assert trees.best.overall_score == 0.64
    assert [(score.steps, tree) for score, tree in zip(trees.solutions, trees.subtrees, strict=True)] == [
        (("B", "B1", "d1"), 1),
        (("A", "A1", "a1"), 0),
        (("A", "A1", "b1"), 0),
        (("B", "B1", "c1"), 1),
    ]


def test_first_steps_are_dealt_in_turn_and_wider_subtrees_keep_more() -> None:
    tree = {(): [(name, 1.0 - i / 10, 1, False) for i, name in enumerate("ABCDE")]}
    probs = dict(zip("ABCDE", (0.9, 0.8, 0.7, 0.6, 0.5), strict=True))
    # Dealt A C E and B D: of each hand the best two are beams.
    result = diverse_verifier_tree_search(
        PROBLEM, TreeGenerator(tree), TableVerifier(probs), num_subtrees=2, beam_width=2, expansions=2, max_steps=1
    )
    assert [(score.steps[0], tree) for score, tree in zip(result.solutions, result.subtrees, strict=True)] == [
        ("A", 0),
        ("B", 1),
        ("C", 0),
        ("D", 1),
    ]
    # Five first steps make five subtrees of seven.
    result = diverse_verifier_tree_search(
        PROBLEM, TreeGenerator(tree), TableVerifier(probs), num_subtrees=7, expansions=1, max_steps=1
    )
    assert result.subtrees == (0, 1, 2, 3, 4)


def listed(*rounds: list[list[ProposedStep]]) -> Callable[..., list[list[ProposedStep]]]:
    """A function that returns the given rounds, one a call."""
    remaining = iter(rounds)
    return lambda problem, prefixes, n: next(remaining)


def step(text: str, tokens: int = 1, *, final: bool = False) -> ProposedStep:
    return ProposedStep(text, tokens, final)


def test_equal_and_blank_proposals_are_counted_and_scored_once() -> None:
    verifier = TableVerifier({"A": 0.9, "B": 0.8})
    generator = listed(
        [[step("A", 3), step("A", 4), step(" \n", 5), step("B", 6), step("A", 7), step("", 8, final=True)]]
    )
    result = beam_search(PROBLEM, generator, verifier, num_beams=2, expansions=3, max_steps=1)
    assert verifier.calls == [[("A",), ("B",)]]
    assert result.num_merged == 2
    # The blank final one would end a solution without a step.
    assert result.num_blank == 2
    assert result.num_generated_tokens == 3 + 4 + 5 + 6 + 7 + 8
    assert [score.steps for score in result.solutions] == [("A",), ("B",)]
    assert result.finished == (False, False)
    assert result.stopped_by == "max_steps"


def test_the_same_step_as_end_and_as_middle_is_scored_once_and_both_go_on() -> None:
    verifier = TableVerifier({"A": 0.9, "B": 0.95})
    generator = listed([[step("A"), step("A", final=True)]], [[step("B", final=True)]])
    result = beam_search(PROBLEM, generator, verifier, num_beams=2, expansions=1)
    assert verifier.calls == [[("A",)], [("A", "B")]]
    assert result.num_merged == 0
    assert [score.steps for score in result.solutions] == [("A",), ("A", "B")]
    assert result.finished == (True, True)
    # Stopped before the middle could go on, it is not listed beside the end of the same steps.
    generator = listed([[step("A"), step("A", final=True)]])
    result = beam_search(PROBLEM, generator, verifier, num_beams=2, expansions=1, max_steps=1)
    assert [score.steps for score in result.solutions] == [("A",)]
    assert result.finished == (True,)


def test_a_blank_final_proposal_ends_the_solution_with_its_prefix() -> None:
    verifier = TableVerifier({"A": 0.9, "B": 0.6})
    generator = listed([[step("A")]], [[step("B"), step("", 2, final=True)]])
    result = beam_search(PROBLEM, generator, verifier, num_beams=1, expansions=2)
    assert verifier.calls == [[("A",)], [("A", "B")]]
    assert [score.steps for score in result.solutions] == [("A",)]
    assert result.finished == (True,)
    assert result.num_blank == 0
    assert result.num_generated_tokens == 4


def test_finished_solutions_compete_and_are_kept_when_they_lose_their_place() -> None:
    probs = {"A": 0.7, "B": 0.9, "C": 0.8, "D": 0.85, "E": 0.75, "F": 0.6}
    generator = listed([[step("A", final=True), step("B"), step("C")]], [[step("D"), step("E")], [step("F")]])
    # Round 1: B and C are before A. Round 2: B D 0.85 and B E 0.75 are before A 0.7 and C F 0.6.
    result = beam_search(PROBLEM, generator, TableVerifier(probs), num_beams=2, expansions=2, max_steps=2)
    assert [score.steps for score in result.solutions] == [("A",), ("B", "D"), ("B", "E")]
    assert result.finished == (True, False, False)
    # With A at 0.78, it holds a place against B E.
    generator = listed([[step("A", final=True), step("B"), step("C")]], [[step("D"), step("E")], [step("F")]])
    result = beam_search(
        PROBLEM, generator, TableVerifier({**probs, "A": 0.78}), num_beams=2, expansions=2, max_steps=2
    )
    assert [score.steps for score in result.solutions] == [("A",), ("B", "D")]
    # Two finished ones that hold both places end the search, with B unexpanded.
    generator = listed([[step("D", final=True), step("C", final=True), step("E")]])
    result = beam_search(PROBLEM, generator, TableVerifier(probs), num_beams=2, expansions=2)
    assert [score.steps for score in result.solutions] == [("D",), ("C",)]
    assert result.stopped_by == "finished"
    assert result.num_rounds == 1


class Endless:
    """Steps that never end a solution, `tokens` each."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.asked: list[int] = []

    def __call__(self, problem: str, prefixes: Sequence[Sequence[str]], n: int) -> list[list[ProposedStep]]:
        self.asked.append(n * len(prefixes))
        return [[step(f"{i}", self.tokens) for i in range(n)] for _ in prefixes]


class EndlessWithMost(Endless):
    max_step_tokens = 5


def test_the_budget_of_tokens_is_never_exceeded_by_a_generator_with_a_most() -> None:
    verifier = TableVerifier({str(i): 0.9 for i in range(8)})
    # At 5 for each, 4 proposals cost at most 20, and take 12. That leaves 38, 26 and 14, of which two beams can be
    # given 2, 26 // 10 = 2 and 14 // 10 = 1 proposals each, then 8 // 10 = 0.
    generator = EndlessWithMost(3)
    result = beam_search(PROBLEM, generator, verifier, num_beams=2, expansions=2, max_tokens=50)
    assert generator.asked == [4, 4, 4, 2]
    assert result.num_generated_tokens == 42
    assert result.stopped_by == "max_tokens"
    assert result.finished == (False, False)
    # Exactly paid for is paid for; one token less is not.
    generator = EndlessWithMost(5)
    assert (
        beam_search(PROBLEM, generator, verifier, num_beams=1, expansions=2, max_tokens=20).num_generated_tokens == 20
    )
    generator = EndlessWithMost(5)
    result = beam_search(PROBLEM, generator, verifier, num_beams=1, expansions=2, max_tokens=19)
    assert generator.asked == [2, 1]
    # A budget below one proposal asks for none.
    generator = EndlessWithMost(5)
    result = beam_search(PROBLEM, generator, verifier, max_tokens=4)
    assert (generator.asked, result.solutions, result.best, result.stopped_by) == ([], (), None, "max_tokens")


def test_the_budget_of_tokens_is_exceeded_by_at_most_a_round_of_another_generator() -> None:
    verifier = TableVerifier({str(i): 0.9 for i in range(8)})
    # 12 a round: after 24 there is 1 left, so a third round is asked.
    generator = Endless(3)
    result = beam_search(PROBLEM, generator, verifier, num_beams=2, expansions=2, max_tokens=25)
    assert generator.asked == [4, 4, 4]
    assert result.num_generated_tokens == 36
    generator = Endless(3)
    result = beam_search(PROBLEM, generator, verifier, num_beams=2, expansions=2, max_tokens=24)
    assert generator.asked == [4, 4]
    assert result.stopped_by == "max_tokens"


def test_the_budget_of_steps() -> None:
    result = beam_search(
        PROBLEM, Endless(1), TableVerifier({str(i): 0.9 for i in range(4)}), num_beams=1, expansions=2, max_steps=3
    )
    assert (result.num_rounds, result.stopped_by) == (3, "max_steps")
    assert [score.steps for score in result.solutions] == [("0", "0", "0")]


def test_what_the_verifier_cannot_score_is_dropped_and_counted() -> None:
    verifier = TableVerifier({"A": 0.9, "B": 0.8, "C": 0.7}, unscorable=["long"])
    generator = listed([[step("long"), step("A"), step("B")]], [[step("long")], [step("C", final=True)]])
    result = beam_search(PROBLEM, generator, verifier, num_beams=2, expansions=2)
    assert result.num_unscorable == 2
    assert result.num_scored_prefixes == 5
    # A could not be expanded: it comes back, unfinished, after the finished one in spite of its score.
    assert [score.steps for score in result.solutions] == [("B", "C"), ("A",)]
    assert result.finished == (True, False)
    assert result.stopped_by == "finished"


def test_a_round_in_which_nothing_can_be_scored_ends_the_search() -> None:
    verifier = TableVerifier({"A": 0.9, "B": 0.8}, unscorable=["long"])
    generator = listed([[step("A"), step("B")]], [[step("long")], [step("long")]])
    result = beam_search(PROBLEM, generator, verifier, num_beams=2, expansions=1)
    assert result.stopped_by == "no_proposals"
    assert result.num_unscorable == 2
    assert [score.steps for score in result.solutions] == [("A",), ("B",)]
    with pytest.raises(ValueError, match="none of 1 first steps; the first: too long"):
        beam_search(PROBLEM, listed([[step("long")]]), verifier)


def test_no_proposal_at_all_gives_no_solution() -> None:
    verifier = TableVerifier({})
    result = beam_search(PROBLEM, listed([[]]), verifier)
    assert (result.solutions, result.stopped_by, result.num_rounds) == ((), "no_proposals", 1)
    assert verifier.calls == []


def test_equal_scores_keep_the_order_in_which_they_were_proposed() -> None:
    verifier = TableVerifier(dict.fromkeys("ABCD", 0.5))
    generator = listed([[step(name) for name in "ABCD"]])
    result = beam_search(PROBLEM, generator, verifier, num_beams=2, expansions=2, max_steps=1)
    assert [score.steps for score in result.solutions] == [("A",), ("B",)]
    # A finished one is before an unfinished one that was proposed before it.
    generator = listed([[step("A"), step("B", final=True)]])
    result = beam_search(PROBLEM, generator, verifier, num_beams=1, expansions=2)
    assert [score.steps for score in result.solutions] == [("B",)]
    assert result.stopped_by == "finished"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_beams": 0}, ValueError, "num_beams must be at least 1, got 0"),
        ({"expansions": 0}, ValueError, "expansions must be at least 1"),
        ({"max_steps": 0}, ValueError, "max_steps must be at least 1"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1"),
        ({"num_beams": 2.0}, TypeError, "num_beams must be an integer, got float"),
        ({"max_steps": None}, TypeError, "max_steps must be an integer, got NoneType"),
        ({"problem": " "}, ValueError, "problem is empty"),
        ({"problem": 3}, TypeError, "problem must be a string, got int"),
        ({"generator": "llama"}, TypeError, "generator must be callable"),
        ({"verifier": len}, TypeError, "must have score_solutions"),
    ],
)
def test_bad_arguments(options: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"problem": PROBLEM, "generator": Endless(1), "verifier": TableVerifier({"0": 1.0}), **options}
    with pytest.raises(error, match=message):
        beam_search(**arguments)  # type: ignore[arg-type]


def test_a_language_model_is_no_generator(backbone_folder: Callable[[str], Path]) -> None:
    """Though it can be called."""
    model = AutoModelForCausalLM.from_pretrained(backbone_folder("llama"))
    with pytest.raises(TypeError, match=r"got LlamaForCausalLM; for a language model make a CausalLMStepGenerator"):
        beam_search(PROBLEM, model, TableVerifier({}))


@pytest.mark.parametrize("name", ["num_subtrees", "beam_width", "expansions", "max_steps", "max_tokens"])
def test_bad_arguments_of_the_tree_search(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        diverse_verifier_tree_search(PROBLEM, Endless(1), TableVerifier({}), **{name: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ([], ValueError, "0 lists for 1 prefixes"),
        ([[], []], ValueError, "2 lists for 1 prefixes"),
        (None, TypeError, "list of lists of ProposedStep, got NoneType"),
        (["A"], TypeError, "result 0 must be a list of ProposedStep, got str"),
        ([["A"]], TypeError, "list 0 must hold ProposedStep, got str"),
        ([[step("A"), step("B"), step("C")]], ValueError, "3 proposals where at most 2"),
    ],
)
def test_a_generator_that_returns_something_else(returned: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        beam_search(
            PROBLEM,
            lambda problem, prefixes, n: returned,  # type: ignore[arg-type, return-value]
            TableVerifier({"A": 1.0, "B": 1.0, "C": 1.0}),
            num_beams=1,
            expansions=2,
            max_steps=1,
        )


def test_a_generator_with_a_most_that_is_no_count() -> None:
    generator = EndlessWithMost(1)
    generator.max_step_tokens = 0
    with pytest.raises(ValueError, match="the generator's max_step_tokens must be at least 1, got 0"):
        beam_search(PROBLEM, generator, TableVerifier({}))


def test_a_verifier_that_returns_too_few_scores() -> None:
    class Short(TableVerifier):
        def score_solutions(self, *args: object, **options: object) -> list[SolutionScore]:
            return super().score_solutions(*args, **options)[:-1]  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="1 scores for 2 prefixes"):
        beam_search(PROBLEM, listed([[step("A"), step("B")]]), Short({"A": 1.0, "B": 1.0}))
