"""Splits, orders and labels of the study's data, and the textbook PRM's places and loss."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are in the repository and not installed

from benchmarks.study import gsm8k, textbook
from benchmarks.study.data import (
    BATCH,
    Solution,
    as_outcome,
    bigbench,
    check_apart,
    gsm8k_errors,
    gsm8k_models,
    prmbench,
    prmbench_versions,
    scored_set,
    training_order,
    training_solutions,
)
from benchmarks.study.plan import QUEUE, RUNS, run_named

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"the data sets are not in {DATA}")


def _solution(name: str, steps: int = 3, *, wrong: tuple[int, ...] = (), right: bool | None = None) -> Solution:
    return Solution(
        id=name,
        group=name,
        problem=f"problem {name}",
        steps=tuple(f"step {i} of {name}" for i in range(steps)),
        labels=tuple(float(i not in wrong) for i in range(steps)),
        right=right,
    )


def test_an_outcome_is_a_label_on_the_last_step_alone() -> None:
    assert as_outcome(_solution("a")).labels == (-100.0, -100.0, 1.0)
    # An error before the last step makes the whole solution wrong.
    assert as_outcome(_solution("a", wrong=(1,))).labels == (-100.0, -100.0, 0.0)
    # Where it is known whether the answer is right, that counts.
    assert as_outcome(_solution("a", wrong=(1,), right=True)).labels == (-100.0, -100.0, 1.0)


def test_a_shorter_training_sees_a_part_of_a_longer_one() -> None:
    solutions = [_solution(str(index), steps=1 + index % 7) for index in range(200)]

    def lengths(these: list[Solution]) -> list[int]:
        return [10 * len(solution.steps) for solution in these]

    long = training_order(solutions, lengths, tokens=4000, seed=0)
    short = training_order(solutions, lengths, tokens=2000, seed=0)
    assert 4000 <= sum(lengths(long)) < 4070
    assert {solution.id for solution in short} < {solution.id for solution in long}
    assert [s.id for s in long] == [s.id for s in training_order(solutions, lengths, tokens=4000, seed=0)]
    assert [s.id for s in long] != [s.id for s in training_order(solutions, lengths, tokens=4000, seed=1)]
    whole = len(long) - len(long) % BATCH
    for start in range(0, whole, BATCH):
        sizes = lengths(long[start : start + BATCH])
        assert max(sizes) - min(sizes) <= 10
    with pytest.raises(ValueError, match="fewer than 100000"):
        training_order(solutions, lengths, tokens=100_000, seed=0)


def test_a_problem_or_a_solution_on_both_sides_is_found() -> None:
    train, test = [_solution("a"), _solution("b")], [_solution("c")]
    check_apart(train, test, "test")
    again = Solution(id="x", group="x", problem="PROBLEM  b", steps=("other",), labels=(1.0,))
    with pytest.raises(ValueError, match="1 problems are trained on and in test too"):
        check_apart(train, [*test, again], "test")
    again = Solution(id="x", group="x", problem="other words", steps=train[0].steps, labels=(1.0,) * 3)
    with pytest.raises(ValueError, match="1 solutions are trained on and in test too"):
        check_apart(train, [*test, again], "test")


def test_versions_of_a_prmbench_problem_are_known_by_their_number_question_or_solution(tmp_path: Path) -> None:
    def row(idx: str, original: str, modified: str, solved: str, spoilt: str) -> dict[str, object]:
        return {
            "idx": idx,
            "original_question": original,
            "modified_question": modified,
            "original_process": [solved],
            "modified_process": [spoilt],
            "error_steps": [1],
        }

    rows = [
        row("1", "q one", "q one again", "s1", "w1"),
        row("1", "in other words", "q two", "s2", "w2"),
        row("2", "Q  ONE", "q three", "s3", "w3"),
        row("3", "q four", "q five", "s3", "w4"),
        row("4", "q six", "q seven", "s4", "w5"),
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    versions = prmbench_versions(tmp_path)
    # 1 by its number, 2 by its question, 3 by its solution; 4 has nothing in common with them.
    one = {"q one", "q one again", "in other words", "q two", "q three", "q four", "q five"}
    assert len({versions[question] for question in one}) == 1
    assert versions["q six"] == versions["q seven"] != versions["q one"]


@needs_data
def test_no_problem_of_prmbench_is_on_two_sides() -> None:
    parts = prmbench(DATA / "prmbench")
    groups = {name: {solution.group for solution in part} for name, part in parts.items()}
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert groups[first].isdisjoint(groups[second])
        check_apart(parts[first], parts[second], second)
    total = sum(map(len, groups.values()))
    assert [round(len(groups[name]) / total, 1) for name in ("train", "validation", "test")] == [0.7, 0.1, 0.2]
    assert len({solution.id for part in parts.values() for solution in part}) == sum(map(len, parts.values()))
    originals = [s for s in parts["test"] if 0.0 not in s.labels]
    assert len({(s.problem, s.steps) for s in originals}) == len(originals)
    rows = [json.loads(line) for file in (DATA / "prmbench").glob("*.jsonl") for line in file.open()]
    side = {solution.problem: name for name, part in parts.items() for solution in part}
    sides: dict[str, set[str]] = {}
    for row in rows:
        asked = {side.get(row["original_question"]), side.get(row["modified_question"])} - {None}
        sides.setdefault(row["idx"], set()).update(asked)
    assert all(len(found) <= 1 for found in sides.values())


@needs_data
def test_no_run_trains_on_what_it_scores() -> None:
    for name in ("default-0", "best-of-outcome", "best-of-steps"):
        run = run_named(name)
        solutions = training_solutions(run, DATA)
        assert len({solution.id for solution in solutions}) == len(solutions)
        for scored in run.sets:
            check_apart(solutions, scored_set(scored, DATA), scored)


@needs_data
def test_the_four_models_are_right_as_often_as_published() -> None:
    parts = gsm8k_models(DATA / "gsm8k")
    assert {name: len({s.group for s in part}) for name, part in parts.items()} == {"train": 660, "test": 659}
    assert {s.group for s in parts["train"]}.isdisjoint(s.group for s in parts["test"])
    everything = parts["train"] + parts["test"]
    shares = [
        round(100 * sum(bool(s.right) for s in everything if s.id.endswith(model)) / 1319, 1) for model in gsm8k.MODELS
    ]
    assert shares == [21.7, 39.0, 34.7, 56.3]
    assert not any("<<" in step for solution in everything for step in solution.steps)
    file = DATA / "gsm8k" / "example_model_solutions.jsonl"
    assert gsm8k.disagreements(file) < 20


@needs_data
def test_injected_errors_come_in_pairs() -> None:
    solutions = gsm8k_errors(DATA / "gsm8k", seed=0)
    assert len(solutions) == 2 * len({solution.group for solution in solutions}) > 6000
    assert sum(0.0 in solution.labels for solution in solutions) == len(solutions) / 2
    assert solutions == gsm8k_errors(DATA / "gsm8k", seed=0)
    assert len(bigbench(DATA / "bigbench_mistake" / "logical_deduction.jsonl")) == 300


def test_the_plan_scores_everything_once() -> None:
    names = [run.name for run in RUNS]
    assert len(set(names)) == len(names)
    queued = [(name, scored) for name, sets in QUEUE for scored in sets]
    assert sorted(queued) == sorted((run.name, scored) for run in RUNS for scored in run.sets)
    with pytest.raises(ValueError, match="there is no run 'x'"):
        run_named("x")


def test_the_textbook_reads_the_first_step_before_it_is_there(backbone_folder: Callable[[str], Path]) -> None:
    _, tokenizer = textbook.load_textbook(str(backbone_folder("gpt2")))
    ids, places = textbook.encode(tokenizer, "2 + 3?", ["2 + 3 = 5", "It is 5"])
    line_end = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    ends = [place for place, token in enumerate(ids) if token == line_end]
    # Line ends stand behind the problem and the first step; for the last token, a third place, no label is left.
    assert len(ends) == 2
    assert places == ends
    problem_ids = tokenizer("2 + 3?")["input_ids"]
    assert places[0] == len(problem_ids)
    row = textbook.tokenize(tokenizer, "2 + 3?", ["2 + 3 = 5", "It is 5"], [1.0, 0.0])
    assert (row["step_positions"], row["labels"]) == (ends, [1.0, 0.0])
    # A line end within the problem moves every label one step further to the front.
    _, moved = textbook.encode(tokenizer, "2 +\n3?", ["2 + 3 = 5", "It is 5"])
    assert moved[1] == len(tokenizer("2 +\n3?")["input_ids"])


def test_the_textbooks_loss_is_a_mean_of_means() -> None:
    logits = torch.tensor([[0.0, 2.0], [1.0, 7.0]])
    labels = torch.tensor([[1.0, 0.0], [0.0, -100.0]])
    first = (math.log(2) + math.log(1 + math.exp(2))) / 2
    second = math.log(1 + math.exp(1))
    assert textbook.textbook_loss(logits, labels).item() == pytest.approx((first + second) / 2)
    assert textbook.textbook_loss(logits, torch.full((2, 2), -100.0)).item() == 0.0


def test_the_textbooks_scores_are_read_at_the_places(backbone_folder: Callable[[str], Path]) -> None:
    model, tokenizer = textbook.load_textbook(str(backbone_folder("gpt2")))
    model.eval()
    rows = [
        textbook.tokenize(tokenizer, "2 + 3?", ["2 + 3 = 5", "It is 5"], [1.0, 0.0]),
        textbook.tokenize(tokenizer, "1 + 1?", ["1 + 1 = 2"], [1.0]),
    ]
    batch = textbook.collate(rows, 0)
    assert batch["labels"].tolist() == [[1.0, 0.0], [1.0, -100.0]]
    assert batch["step_positions"][1, 1] == -1
    output = model(**batch)
    assert output.loss.item() == pytest.approx(textbook.textbook_loss(output.logits, batch["labels"]).item())
    alone = model(
        **{name: values[:, : len(rows[1]["input_ids"])] for name, values in textbook.collate(rows[1:], 0).items()}
    )
    assert output.logits[1, 0].item() == pytest.approx(alone.logits[0, 0].item(), abs=1e-5)
    hidden = model.backbone(torch.tensor([rows[1]["input_ids"]])).last_hidden_state[0, rows[1]["step_positions"][0]]
    assert alone.logits[0, 0].item() == pytest.approx(model.score(hidden).item(), abs=1e-5)
