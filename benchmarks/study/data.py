"""The data of the study: who trains on what, in which order, and what is scored.

PRMBench's problems are split 70/10/20, BIG-Bench-Mistake is scored as it stands, and GSM8K's problems with four models'
solutions are split in halves. A problem is on one side only, which `check_apart` makes sure of.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets

from modeling_prm.step_loss import IGNORED_LABEL
from trainer.data_files import iter_file_rows, list_data_files
from trainer.readers import load_step_dataset
from trainer.splits import split_by_problem

from . import gsm8k
from .plan import Run

VALIDATION_SHARE, TEST_SHARE = 0.1, 0.2
# In characters, problem and steps. A quarter of PRMBench's solutions is longer, and has half of its tokens.
LONGEST = 1_500
BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A solution to train on or to score.

    Args:
        id: unique in its set.
        group: the same for all solutions of a problem and of its versions.
        problem, steps: texts.
        labels: one a step: 1 correct, 0 wrong, -100 not known.
        right: whether the final answer is right, None where that is not known.
        answer: a number for the final answer among the problem's, None where there is none.
    """

    id: str
    group: str
    problem: str
    steps: tuple[str, ...]
    labels: tuple[float, ...]
    right: bool | None = None
    answer: int | None = None


def prmbench(folder: Path) -> dict[str, list[Solution]]:
    """PRMBench's training-split part as `train`, `validation` and `test`, 70/10/20 by problem.

    The solutions with errors put in, and the originals, each once. All versions of a problem are on one side: those of
    one `idx`, which often have other words for the same question, and whatever shares a question or a solution with
    them. Rows that name a step which does not exist are left out, and so are solutions longer than `LONGEST`.
    """
    dataset = load_step_dataset(folder, on_bad_row="skip")
    versions = prmbench_versions(folder)
    groups = [versions[_normalized(problem)] for problem in dataset["problem"]]
    columns = {"problem_group": groups, "number": list(range(len(dataset)))}
    dataset = dataset.remove_columns("problem_group")
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    rest, test = split_by_problem(dataset, TEST_SHARE, seed=0)
    train, validation = split_by_problem(rest, VALIDATION_SHARE / (1.0 - TEST_SHARE), seed=1)
    parts = {"train": train, "validation": validation, "test": test}
    return {name: [s for s in _solutions(part, "p") if _size(s) <= LONGEST] for name, part in parts.items()}


def prmbench_versions(folder: Path) -> dict[str, str]:
    """For each question of PRMBench's files, normalized, the name of the problem that it is a version of."""
    parents: dict[str, str] = {}

    def root(key: str) -> str:
        while parents.setdefault(key, key) != key:
            parents[key] = key = parents[parents[key]]
        return key

    questions = set()
    for file in list_data_files(folder):
        for line in iter_file_rows(file):
            row: Any = line.value
            asked = [_normalized(row[name]) for name in ("original_question", "modified_question")]
            solved = ["solution " + _normalized(" ".join(row[f"{name}_process"])) for name in ("original", "modified")]
            questions.update(asked)
            for key in (*asked, *solved):
                low, high = sorted((root(row["idx"]), root(key)))
                parents[high] = low
    return {question: root(question) for question in questions}


def bigbench(file: Path) -> list[Solution]:
    """One task of BIG-Bench-Mistake; steps after the mistake have no label."""
    dataset = load_step_dataset(file)
    dataset = dataset.remove_columns("problem_group").add_column("problem_group", dataset["problem"][:])
    return _solutions(dataset.add_column("number", list(range(len(dataset)))), "b")


def scored_set(name: str, data: Path) -> list[Solution]:
    """A set to score by its name in `plan`.

    Args:
        name: of the set.
        data: the folder with `prmbench`, `bigbench_mistake` and `gsm8k`.

    Raises:
        ValueError: there is no such set.
    """
    task, _, part = name.partition("-")
    if task == "prmbench":
        return prmbench(data / task)[part]
    if name in ("multistep-arithmetic", "logical-deduction"):
        return bigbench(data / "bigbench_mistake" / f"{name.replace('-', '_')}.jsonl")
    if name == "gsm8k-test":
        return gsm8k_models(data / "gsm8k")["test"]
    raise ValueError(f"there is no set {name!r}; see the plan for their names")


def gsm8k_models(folder: Path) -> dict[str, list[Solution]]:
    """Four models' solutions to GSM8K's test problems as `train` and `test`, half of the problems each."""
    solutions = [
        Solution(
            id=f"{number}-{candidate.model}",
            group=str(number),
            problem=problem.question,
            steps=candidate.steps,
            labels=(IGNORED_LABEL,) * len(candidate.steps),
            right=candidate.is_correct,
            answer=candidate.answer_group,
        )
        for number, problem in enumerate(gsm8k.read_model_solutions(folder / "example_model_solutions.jsonl"))
        for candidate in problem.candidates
    ]
    groups = sorted({solution.group for solution in solutions}, key=lambda group: _hash("gsm8k", group))
    held_out = set(groups[: len(groups) // 2])
    return {
        "train": [solution for solution in solutions if solution.group not in held_out],
        "test": [solution for solution in solutions if solution.group in held_out],
    }


def gsm8k_errors(folder: Path, seed: int) -> list[Solution]:
    """GSM8K's own training solutions that an error can be put into, each right as it is and once with one."""
    solutions = []
    for number, problem in enumerate(gsm8k.read_train_problems(folder / "train.jsonl")):
        pair = gsm8k.right_and_wrong(problem, random.Random(f"{seed} {number}"))
        for name, lines, labels in pair if len(pair) == 2 else ():
            solutions.append(
                Solution(id=f"{number}-{name}", group=str(number), problem=problem.question, steps=lines, labels=labels)
            )
    return solutions


def training_solutions(run: Run, data: Path) -> list[Solution]:
    """All solutions that a run may train on, with the labels that it trains on.

    Raises:
        ValueError: one of their problems is scored too.
    """
    if run.data == "prmbench":
        solutions = prmbench(data / "prmbench")["train"]
    elif run.data == "gsm8k-models":
        solutions = gsm8k_models(data / "gsm8k")["train"]
    else:
        solutions = gsm8k_errors(data / "gsm8k", run.seed)
    for name in run.sets:
        check_apart(solutions, scored_set(name, data), name)
    return [as_outcome(solution) for solution in solutions] if run.outcome else solutions


def as_outcome(solution: Solution) -> Solution:
    """The solution with a label on its last step alone: whether it is right.

    It is where its answer is, and where that is not known, where none of its steps is wrong.
    """
    right = solution.right if solution.right is not None else 0.0 not in solution.labels
    return replace(solution, labels=(IGNORED_LABEL,) * (len(solution.steps) - 1) + (float(right),))


def check_apart(train: Iterable[Solution], scored: Iterable[Solution], name: str) -> None:
    """Check that no problem, by its text, and no version of one is on both sides.

    Raises:
        ValueError: one is.
    """
    train, scored = list(train), list(scored)
    shared = {_normalized(s.problem) for s in train} & {_normalized(s.problem) for s in scored}
    if shared:
        raise ValueError(f"{len(shared)} problems are trained on and in {name} too, the first: {min(shared)[:80]!r}")
    shared = {_normalized(" ".join(s.steps)) for s in train} & {_normalized(" ".join(s.steps)) for s in scored}
    if shared:
        raise ValueError(f"{len(shared)} solutions are trained on and in {name} too, the first: {min(shared)[:80]!r}")


def training_order(
    solutions: Sequence[Solution], lengths: Callable[[Sequence[Solution]], Sequence[int]], *, tokens: int, seed: int
) -> list[Solution]:
    """Solutions in the order of training, of about so many tokens; batches of eight are of about one length.

    Which solutions come in depends on the seed and the tokens, and a shorter training sees a part of what a longer one
    of the same seed does.

    Args:
        solutions: to draw from.
        lengths: their lengths in tokens.
        tokens: how many to take.
        seed: of draw and order.

    Raises:
        ValueError: there are not as many.
    """
    rng = random.Random(seed)
    order = sorted(range(len(solutions)), key=lambda i: _hash(f"order {seed}", solutions[i].id))
    sizes = lengths(solutions)
    chosen, total = [], 0
    for index in order:
        if total < tokens:
            chosen.append(index)
            total += sizes[index]
    if total < tokens:
        raise ValueError(f"there are {total} tokens to train on, fewer than {tokens}; ask for less")
    chosen.sort(key=lambda index: sizes[index])
    batches = [chosen[start : start + BATCH] for start in range(0, len(chosen), BATCH)]
    rng.shuffle(batches)
    # A batch that is not whole in the middle would shift all that come after it.
    batches.sort(key=lambda batch: len(batch) < BATCH)
    return [solutions[index] for batch in batches for index in batch]


def as_dataset(solutions: Sequence[Solution]) -> datasets.Dataset:
    """Columns `problem`, `steps` and `labels`, as `PRMTrainer` takes them."""
    return datasets.Dataset.from_dict(
        {
            "problem": [solution.problem for solution in solutions],
            "steps": [list(solution.steps) for solution in solutions],
            "labels": [list(solution.labels) for solution in solutions],
        },
        features=datasets.Features(
            {
                "problem": datasets.Value("string"),
                "steps": datasets.List(datasets.Value("string")),
                "labels": datasets.List(datasets.Value("float32")),
            }
        ),
    )


def _solutions(part: datasets.Dataset, prefix: str) -> list[Solution]:
    return [
        Solution(
            id=f"{prefix}{row['number']}",
            group=hashlib.sha256(row["problem_group"].encode()).hexdigest()[:10],
            problem=row["problem"],
            steps=tuple(row["steps"]),
            labels=tuple(row["labels"]),
        )
        for row in part
    ]


def _size(solution: Solution) -> int:
    return len(solution.problem) + sum(map(len, solution.steps))


def _normalized(text: str) -> str:
    return " ".join(text.split()).casefold()


def _hash(seed: str, key: str) -> bytes:
    return hashlib.sha256(f"{seed}\n{key}".encode()).digest()
