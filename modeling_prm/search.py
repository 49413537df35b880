"""Searches for a solution step by step, guided by a verifier: beam search and diverse verifier tree search.

generator = CausalLMStepGenerator(language_model, tokenizer)
result = beam_search("What is 2 + 3 - 1?", generator, PRMVerifier(model, processor), num_beams=4, expansions=4)
print(result.best, result.stopped_by)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .sessions import Beam, Session, StepVerifier, open_session
from .solution_score import SolutionScore
from .step_generation import ProposedStep, StepGenerator

Steps = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found, and what it took.

    Args:
        solutions: the finished solutions by score, best first, then what was still unfinished when the search
            stopped, by score; `solution_idx` is the place in this order. Unfinished are the beams that would have
            been expanded next, and those that could not be.
        finished: for each of the solutions, whether it is finished.
        subtrees: for each of the solutions, the 0-based number of its subtree; 0 in a beam search.
        stopped_by: `"finished"`: no beam was left to expand; `"max_steps"`; `"max_tokens"`: the budget did not
            pay for another round; `"no_proposals"`: no beam got a proposal that is a step and could be scored.
        num_rounds: how often the generator was asked.
        num_generated_tokens: the tokens of all proposals, those dropped and merged too.
        num_scored_prefixes: how many prefixes the verifier was given, each one once.
        num_scored_steps: the steps of these prefixes, each prefix counted whole.
        num_merged: proposals that were exactly another one of the same prefix.
        num_blank: proposals that were no step.
        num_unscorable: prefixes that the verifier could not score, which were dropped.
    """

    solutions: tuple[SolutionScore, ...]
    finished: tuple[bool, ...]
    subtrees: tuple[int, ...]
    stopped_by: str
    num_rounds: int
    num_generated_tokens: int
    num_scored_prefixes: int
    num_scored_steps: int
    num_merged: int
    num_blank: int
    num_unscorable: int

    @property
    def best(self) -> SolutionScore | None:
        """The first of the solutions; None where there is none at all."""
        return self.solutions[0] if self.solutions else None


def beam_search(
    problem: str,
    generator: StepGenerator,
    verifier: StepVerifier,
    *,
    num_beams: int = 4,
    expansions: int = 4,
    max_steps: int = 20,
    max_tokens: int | None = None,
) -> SearchResult:
    """Beam search over steps (2305.00633, 2408.03314): the `num_beams` best prefixes by the verifier go on.

    A round asks the generator once and the verifier once: `expansions` proposals for each beam (the first
    round `num_beams * expansions` first steps), of which equal ones are merged, and a score for each prefix that
    is new. Then the finished solutions found so far and the new prefixes are put in order by `overall_score`
    (equal ones finished first, then as proposed), and those of the best `num_beams` that are unfinished are the
    next beams: where finished solutions hold all places, the search is over. A finished solution is kept
    even where it holds no place.

    Args:
        problem: the problem.
        generator: a `CausalLMStepGenerator`, or any callable `generator(problem, prefixes, n)` that returns for
            each prefix of steps at most `n` `ProposedStep`.
        verifier: a `PRMVerifier`, or what has its `score_solutions`; its aggregation says what a prefix is worth.
        num_beams: how many prefixes go on.
        expansions: proposals for each of them.
        max_steps: most rounds, and so most steps of a solution.
        max_tokens: budget of generated tokens. Where the generator has `max_step_tokens`, it is never exceeded: a
            round asks for as many proposals a beam (at most `expansions`) as could be paid for if each took
            `max_step_tokens`, and with none the search stops. Other generators are asked as long as the budget is
            not used up, so that the last round may exceed it.

    Raises:
        TypeError: an argument of the wrong type, or the generator returns something else than lists of
            `ProposedStep`.
        ValueError: an empty problem, an option below 1, a generator that returns another number of lists than
            there are prefixes or more than `n` proposals in one, a verifier that returns another number of scores
            than there are prefixes or can score no first step at all.
    """
    _check_counts(num_beams=num_beams, expansions=expansions, max_steps=max_steps, max_tokens=max_tokens)
    return _Search(problem, generator, verifier, 1, num_beams, expansions, max_steps, max_tokens).run()


def diverse_verifier_tree_search(
    problem: str,
    generator: StepGenerator,
    verifier: StepVerifier,
    *,
    num_subtrees: int = 4,
    beam_width: int = 1,
    expansions: int = 4,
    max_steps: int = 20,
    max_tokens: int | None = None,
) -> SearchResult:
    """Independent beam searches in `num_subtrees` subtrees (Beeching et al., 2024, "Scaling test-time compute").

    Where one beam search soon goes on from a single first step, each subtree here keeps its own, and no subtree
    takes a place from another. The first round asks for `num_subtrees * beam_width * expansions` first steps, and
    those that differ are dealt to the subtrees in turn, so no two subtrees share a prefix; with fewer first steps
    than subtrees there are fewer subtrees. From then on each is a beam search with `beam_width` beams, with 1 as in
    the paper the best step in each round; all are expanded by one call of the generator and scored by one of the
    verifier a round. `max_tokens` is for all of them together.

    Arguments and errors are otherwise those of `beam_search`, which is this with one subtree.
    """
    _check_counts(num_subtrees=num_subtrees, beam_width=beam_width, expansions=expansions)
    _check_counts(max_steps=max_steps, max_tokens=max_tokens)
    return _Search(problem, generator, verifier, num_subtrees, beam_width, expansions, max_steps, max_tokens).run()


@dataclass(frozen=True)
class _Node:
    """A prefix with its score, which the root, without a step, does not have; `beam` while it may go on."""

    steps: Steps
    score: SolutionScore | None
    is_final: bool
    beam: Beam | None = None

    @property
    def rank(self) -> float:
        """What sorts nodes, best first."""
        return 0.0 if self.score is None or self.score.overall_score is None else -self.score.overall_score


class _Subtree:
    """The beams of one subtree, and what it put aside."""

    def __init__(self, nodes: list[_Node], width: int) -> None:
        self.active: list[_Node] = []
        self.finished: list[_Node] = []
        self.stuck: list[_Node] = []
        self.select(nodes, width)

    def select(self, nodes: list[_Node], width: int) -> None:
        self.finished += [node for node in nodes if node.is_final]
        unfinished = [node for node in nodes if not node.is_final]
        best = sorted(self.finished + unfinished, key=lambda node: node.rank)[:width]
        self.active = [node for node in best if not node.is_final]


class _Search:
    """One run of a search: its subtrees and its counts."""

    def __init__(
        self,
        problem: str,
        generator: StepGenerator,
        verifier: StepVerifier,
        num_subtrees: int,
        width: int,
        expansions: int,
        max_steps: int,
        max_tokens: int | None,
    ) -> None:
        _check_problem(problem, generator)
        self.problem, self.generator = problem, generator
        self.session: Session = open_session(verifier, problem)
        self.num_subtrees, self.width, self.expansions = num_subtrees, width, expansions
        self.max_steps, self.max_tokens = max_steps, max_tokens
        self.max_step_tokens = getattr(generator, "max_step_tokens", None)
        _check_counts(**{"the generator's max_step_tokens": self.max_step_tokens})
        self.trees = [_Subtree([_Node((), None, False, self.session.root)], 1)]
        self.counts = {field.name: 0 for field in dataclasses.fields(SearchResult) if field.name.startswith("num_")}

    def run(self) -> SearchResult:
        with self.session:
            return self._run()

    def _run(self) -> SearchResult:
        while True:
            parents = [node for tree in self.trees for node in tree.active]
            if not parents:
                return self._result("finished")
            if self.counts["num_rounds"] == self.max_steps:
                return self._result("max_steps")
            num_proposals = self._num_proposals(len(parents))
            if num_proposals < 1:
                return self._result("max_tokens")
            children = self._expand(parents, num_proposals)
            if not any(children):
                return self._result("no_proposals")
            self._select(children)

    def _num_proposals(self, num_parents: int) -> int:
        """How many proposals for each prefix the budget pays for."""
        is_first = self.counts["num_rounds"] == 0
        wanted = self.expansions * (self.num_subtrees * self.width if is_first else 1)
        if self.max_tokens is None:
            return wanted
        left = self.max_tokens - self.counts["num_generated_tokens"]
        if self.max_step_tokens is None:
            return wanted if left > 0 else 0
        return min(wanted, left // (num_parents * self.max_step_tokens))

    def _expand(self, parents: list[_Node], num_proposals: int) -> list[list[_Node]]:
        """For each parent the nodes that follow it: distinct, scored, in the order in which they were proposed."""
        self.counts["num_rounds"] += 1
        proposals = self.generator(self.problem, [parent.steps for parent in parents], num_proposals)
        _check_proposals(proposals, len(parents), num_proposals)
        endings = [self._distinct(parent, own) for parent, own in zip(parents, proposals, strict=True)]
        known = {parent.steps: (parent.beam, parent.score) for parent in parents}
        new = list(dict.fromkeys(steps for own in endings for steps, _ in own if steps not in known))
        known.update(self._score({parent.steps: parent.beam for parent in parents}, new))
        # A beam that will not go on is let go, which frees what was kept for it.
        return [
            [
                _Node(steps, known[steps][1], final, None if final else known[steps][0])
                for steps, final in own
                if steps in known
            ]
            for own in endings
        ]

    def _distinct(self, parent: _Node, proposals: Sequence[ProposedStep]) -> list[tuple[Steps, bool]]:
        """Proposals as prefixes, with whether they are final; equal ones once.

        A blank final proposal ends the solution with the parent as it is. Prefixes that different parents lead
        to are never equal, since the parents differ.
        """
        endings = []
        for proposal in proposals:
            self.counts["num_generated_tokens"] += proposal.num_tokens
            if proposal.text.strip():
                endings.append(((*parent.steps, proposal.text), proposal.is_final))
            elif proposal.is_final and parent.steps:
                endings.append((parent.steps, True))
            else:
                self.counts["num_blank"] += 1
        distinct = list(dict.fromkeys(endings))
        self.counts["num_merged"] += len(endings) - len(distinct)
        return distinct

    def _score(
        self, parents: dict[Steps, Beam | None], prefixes: list[Steps]
    ) -> dict[Steps, tuple[Beam | None, SolutionScore | None]]:
        """Beams and scores of those prefixes, each a parent and one step, that the verifier can score."""
        if not prefixes:
            return {}
        self.counts["num_scored_prefixes"] += len(prefixes)
        self.counts["num_scored_steps"] += sum(map(len, prefixes))
        before: list[Beam] = [parents[steps[:-1]] for steps in prefixes]  # type: ignore[misc]
        beams = self.session.extend_many(before, [steps[-1] for steps in prefixes], on_error="record")
        scored: dict[Steps, tuple[Beam | None, SolutionScore | None]] = {
            beam.steps: (beam, beam.score)
            for beam in beams
            if beam.score is not None and beam.score.overall_score is not None
        }
        self.counts["num_unscorable"] += len(prefixes) - len(scored)
        if not scored and self.counts["num_rounds"] == 1:
            error = beams[0].score.error if beams[0].score is not None else None
            raise ValueError(f"the verifier can score none of {len(prefixes)} first steps; the first: {error}")
        return scored

    def _select(self, children: list[list[_Node]]) -> None:
        """Choose each subtree's next beams; the first round's children make the subtrees."""
        if self.counts["num_rounds"] == 1:
            firsts = list(dict.fromkeys(node.steps for node in children[0]))
            dealt = [set(firsts[start :: self.num_subtrees]) for start in range(self.num_subtrees)]
            groups = [[node for node in children[0] if node.steps in hand] for hand in dealt if hand]
            self.trees = [_Subtree(group, self.width) for group in groups]
            return
        following = iter(children)
        for tree in self.trees:
            nodes = []
            for parent in tree.active:
                own = next(following)
                nodes += own
                if not own:
                    tree.stuck.append(dataclasses.replace(parent, beam=None))
            tree.select(nodes, self.width)

    def _result(self, stopped_by: str) -> SearchResult:
        finished, unfinished = [], []
        for index, tree in enumerate(self.trees):
            ended = {node.steps for node in tree.finished}
            finished += [(node, index) for node in tree.finished]
            # What is finished as it is need not be there as unfinished too, nor the root.
            unfinished += [(node, index) for node in tree.active + tree.stuck if node.steps and node.steps not in ended]
        found = [
            *sorted(finished, key=lambda item: item[0].rank),
            *sorted(unfinished, key=lambda item: item[0].rank),
        ]
        scores = [node.score for node, _ in found if node.score is not None]
        return SearchResult(
            solutions=tuple(dataclasses.replace(score, solution_idx=place) for place, score in enumerate(scores)),
            finished=tuple(node.is_final for node, _ in found),
            subtrees=tuple(index for _, index in found),
            stopped_by=stopped_by,
            **self.counts,
        )


def _check_problem(problem: Any, generator: Any) -> None:
    if not isinstance(problem, str):
        raise TypeError(f"problem must be a string, got {type(problem).__name__}")
    if not problem.strip():
        raise ValueError("problem is empty; give its text")
    # A language model can be called too, but not with a problem and prefixes.
    if not callable(generator) or hasattr(generator, "can_generate"):
        raise TypeError(
            f"generator must be callable as generator(problem, prefixes, n), got {type(generator).__name__}; for a "
            "language model make a CausalLMStepGenerator(model, tokenizer)"
        )


def _check_counts(**counts: Any) -> None:
    """Check that each is an integer of at least 1, or, where there is a limit or none, None."""
    for name, value in counts.items():
        if value is None and name.endswith("_tokens"):
            continue
        if type(value) is not int:
            raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _check_proposals(proposals: Any, num_prefixes: int, most: int) -> None:
    if not isinstance(proposals, (list, tuple)):
        raise TypeError(f"the generator must return a list of lists of ProposedStep, got {type(proposals).__name__}")
    if len(proposals) != num_prefixes:
        raise ValueError(
            f"the generator returned {len(proposals)} lists for {num_prefixes} prefixes; it must return one for each"
        )
    for index, own in enumerate(proposals):
        if not isinstance(own, (list, tuple)):
            raise TypeError(f"the generator's result {index} must be a list of ProposedStep, got {type(own).__name__}")
        if wrong := [step for step in own if not isinstance(step, ProposedStep)]:
            raise TypeError(f"the generator's list {index} must hold ProposedStep, got {type(wrong[0]).__name__}")
        if len(own) > most:
            raise ValueError(
                f"the generator's list {index} has {len(own)} proposals where at most {most} were asked for"
            )
