"""What a PRM is worth for choosing among N solutions:
`python -m trainer.best_of_n --solutions F --model M --output-dir D`.

Scores candidate solutions, and prints and draws the accuracy of choosing one of n of them, against n. The file
has a line a problem, with a reference answer and at least as many candidates as the largest n:

    {"problem": "2 + 3?", "answer": "5", "solutions": ["2 + 3 = 5.", ["2 + 3 = 6.", "The answer is 6."]]}

A candidate is a text, which is cut into steps, a list of steps, or an object with `"text"` or `"steps"` and, where
it is not to be looked for in them, the final `"answer"`. One with `"step_probs"` is not scored again: the file
`scores.jsonl` that this command writes can be given to it, without a model. With `--server` a server scores, such as
vLLM's with what `hub_card.convert` exported of the model.

`python -m trainer.best_of_n --help` lists the options.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from hub_card.errors import one_line_errors
from modeling_prm import PRMForStepScoring, PRMProcessor
from modeling_prm.aggregation import aggregate, check_aggregation
from modeling_prm.base_verifier import BaseVerifier
from modeling_prm.remote_verifier import API_KEY_VARIABLE, RemoteVerifier
from modeling_prm.scoring import PRMVerifier

from .answers import answers_equal, describe_comparison, group_answers
from .candidates import Problem, count, read_problems, unscored, write_problems
from .command_line import choose_dtype, parse_options, set_up_logging
from .selection import bootstrap_interval, draw_subsets, expected_best_of_n, pass_at_n, vote

logger = logging.getLogger(__name__)

SCORES_FILE, RESULTS_FILE, CURVE_FILE = "scores.jsonl", "results.json", "curve.png"


@dataclass
class BestOfNArguments:
    """Options of the command line."""

    solutions: str = field(metadata={"help": "A file with a line a problem: problem, answer, solutions."})
    output_dir: str = field(metadata={"help": f"A folder for {SCORES_FILE}, {RESULTS_FILE} and {CURVE_FILE}."})
    model: str | None = field(
        default=None,
        metadata={"help": "The PRM: a folder or a Hub id. Not needed where all solutions hold step_probs."},
    )
    revision: str = field(default="main", metadata={"help": "Revision of a PRM on the Hub."})
    server: str | None = field(
        default=None,
        metadata={
            "help": "The URL of a server that scores in place of this machine, which holds the export of --model; of "
            f"that only tokenizer and layout are read. A key is taken from the variable {API_KEY_VARIABLE}."
        },
    )
    served_model: str | None = field(
        default=None, metadata={"help": "The PRM's name on the server; needed where that has several models."}
    )
    concurrency: int = field(default=32, metadata={"help": "Most requests to the server at a time."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata={"help": "Dtype of the backbone's weights; auto is bfloat16 where the device computes in it."},
    )
    device: str | None = field(default=None, metadata={"help": "Where to score, a GPU if there is one by default."})
    max_tokens_per_batch: int | None = field(
        default=None, metadata={"help": "Most tokens in one forward pass, padding included."}
    )
    step_style: Literal["blank_lines", "newlines", "step_markers", "thinking"] = field(
        default="blank_lines", metadata={"help": "Where a solution given as a text is cut into steps."}
    )
    aggregation: list[str] = field(
        default_factory=lambda: ["min", "product", "last"],
        metadata={"help": "How step probabilities become a score; each gives a best of n and a weighted vote."},
    )
    n: list[int] = field(
        default_factory=list,
        metadata={"help": "Numbers of candidates; by default powers of two up to the least that a problem has."},
    )
    comparison: Literal["auto", "math-verify", "string"] = field(
        default="auto", metadata={"help": "How answers are compared; auto is math-verify where it is installed."}
    )
    subsets: int = field(
        default=200,
        metadata={"help": "Random subsets of n candidates a problem that votes are averaged over, all if not more."},
    )
    bootstrap: int = field(default=2000, metadata={"help": "Resamples of the problems for the 95 %% intervals."})
    seed: int = field(default=0, metadata={"help": "Of subsets and resamples."})

    def __post_init__(self) -> None:
        self.aggregation = list(dict.fromkeys(map(check_aggregation, self.aggregation)))
        self.n = sorted(set(self.n))
        if not self.aggregation:
            raise ValueError("--aggregation needs at least one method, such as min")
        for name in ("subsets", "bootstrap", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The accuracy of one way to choose, for each n, with the ends of its 95 % interval; all in [0, 1]."""

    method: str
    aggregation: str | None
    n: list[int]
    accuracy: list[float]
    low: list[float]
    high: list[float]

    @property
    def label(self) -> str:
        return self.method if self.aggregation is None else f"{self.method}, {self.aggregation}"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Score, choose and report as the options say; returns what `results.json` holds."""
    (options,) = parse_options(
        (BestOfNArguments,),
        argv,
        prog="trainer.best_of_n",
        usage="%(prog)s --solutions FILE --model MODEL --output-dir DIR [options]",
        description="Accuracy of choosing one of n candidate solutions with a process reward model, against n.",
    )
    set_up_logging(main_process=True)
    with one_line_errors():
        figure_class = import_figure_class()
        compared = describe_comparison(options.comparison)
        folder = Path(options.output_dir)
        if earlier := [name for name in (SCORES_FILE, RESULTS_FILE) if (folder / name).exists()]:
            raise ValueError(f"{folder} holds {earlier[0]} of an earlier run; name another --output-dir")
        problems = read_problems(options.solutions)
        options.n = check_n(options.n, problems)
        verifier = load_verifier(options) if unscored(problems) else None
        folder.mkdir(parents=True, exist_ok=True)
        if verifier is not None:
            score_candidates(problems, verifier, options)
        report_errors(problems)
    write_problems(problems, folder / SCORES_FILE)  # now, so that what comes next cannot lose them
    judge_candidates(problems, options)
    curves = measure(problems, options)
    results = {
        **asdict(options),
        **count(problems),
        "answers_compared": compared,
        "curves": [asdict(curve) for curve in curves],
    }
    write_problems(problems, folder / SCORES_FILE)
    (folder / RESULTS_FILE).write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draw(curves, title=headline(problems), file=folder / CURVE_FILE, figure_class=figure_class)
    print(f"\n{headline(problems)}; answers compared {compared}\n\n{format_table(curves)}\n\nWritten to {folder}")
    return results


def check_n(wanted: Sequence[int], problems: Sequence[Problem]) -> list[int]:
    """The numbers of candidates to choose from: those wanted, or powers of two that every problem reaches.

    Raises:
        ValueError: one is below 1 or above the number of candidates of a problem, which the message names.
    """
    fewest = min(problems, key=lambda problem: len(problem.candidates))
    least = len(fewest.candidates)
    if bad := [n for n in wanted if not 1 <= n <= least]:
        raise ValueError(f"--n {bad[0]} cannot be: it must be from 1 to {least}, which {fewest.place} has of solutions")
    return list(wanted) or [2**power for power in range(least.bit_length())]


def load_verifier(options: BestOfNArguments) -> BaseVerifier:
    """The PRM that `--model` names, on its device or on `--server`.

    Raises:
        OSError, ValueError: it cannot be loaded, or none is named.
    """
    if options.model is None:
        raise ValueError(f"{options.solutions} holds solutions without step_probs; name a PRM with --model")
    if options.server is not None:
        return RemoteVerifier.from_pretrained(
            options.server,
            options.model,
            revision=options.revision,
            model=options.served_model,
            concurrency=options.concurrency,
        )
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = choose_dtype(options.dtype, device)
    model = PRMForStepScoring.from_pretrained(options.model, revision=options.revision, dtype=dtype)
    processor = PRMProcessor.from_pretrained(options.model, revision=options.revision)
    model.to(device)
    return PRMVerifier(model, processor)


def score_candidates(problems: Sequence[Problem], verifier: Any, options: BestOfNArguments) -> None:
    """Give each candidate that has none its step probabilities, or the reason why it cannot have them.

    Args:
        problems: changed in place; texts become steps.
        verifier: a `PRMVerifier`, a `RemoteVerifier`, or anything with their method `score_solutions`.
        options: those of batches and steps are read.
    """
    todo = unscored(problems)
    results = verifier.score_solutions(
        [problem.problem for problem, _ in todo],
        [problem.candidates[index].solution for problem, index in todo],
        step_style=options.step_style,
        max_tokens_per_batch=options.max_tokens_per_batch,
        on_error="record",
    )
    for row, ((problem, index), result) in enumerate(zip(todo, results, strict=True)):
        candidate = problem.candidates[index]
        if result.error is None:
            candidate.solution, candidate.step_probs = list(result.steps), list(result.step_probs)
        else:
            # The verifier counts through all problems.
            candidate.error = re.sub(rf"\bsolution {row}\b", f"solution {index + 1}", result.error)


def report_errors(problems: Sequence[Problem]) -> None:
    """Say how many candidates could not be scored, and why the first could not.

    Raises:
        ValueError: none could.
    """
    errors = [
        f"{problem.place}: {candidate.error}"
        for problem in problems
        for candidate in problem.candidates
        if candidate.error is not None
    ]
    total = sum(len(problem.candidates) for problem in problems)
    if len(errors) == total:
        raise ValueError(f"none of the {total} solutions could be scored; the first: {errors[0]}")
    if errors:
        logger.warning(
            "%d of %d solutions could not be scored, and are chosen only where none could; the first: %s",
            len(errors),
            total,
            errors[0],
        )


def judge_candidates(problems: Sequence[Problem], options: BestOfNArguments) -> None:
    """Give each candidate its scores, the group of its answer, and whether it is correct; in place."""
    for problem in transformers_logging.tqdm(problems, desc="Comparing answers", unit="problem", delay=2.0):
        candidates = problem.candidates
        groups = group_answers([candidate.answer for candidate in candidates], comparison=options.comparison)
        right: dict[int | None, bool] = {None: False}
        for candidate, group in zip(candidates, groups, strict=True):
            if group not in right:  # the group's first answer stands for all
                right[group] = answers_equal(problem.answer, candidate.answer, comparison=options.comparison)
            candidate.group, candidate.correct = group, right[group]
            if candidate.step_probs is not None:
                candidate.scores = {name: aggregate(candidate.step_probs, name) for name in options.aggregation}


def measure(problems: Sequence[Problem], options: BestOfNArguments) -> list[Curve]:
    """The accuracy at each n of each way to choose: the mean over problems of the chance to choose right.

    The chance is over the draw of n of the problem's candidates, without replacement. It is exact for the random
    choice, for the best of n and for the oracle. For votes it is the mean over `options.subsets` random subsets,
    the same for all votes, or over all subsets where there are not more.
    """
    methods: list[tuple[str, str | None]] = [("random choice", None), ("majority vote", None)]
    methods += [(name, method) for name in ("best of n", "weighted vote") for method in options.aggregation]
    methods.append(("oracle (pass@n)", None))
    values = np.array([_chances(problem, index, methods, options) for index, problem in enumerate(problems)])
    num_problems = len(problems)
    means = values.mean(axis=0)
    low, high = bootstrap_interval(values.reshape(num_problems, -1), resamples=options.bootstrap, seed=options.seed)
    low, high = low.reshape(means.shape), high.reshape(means.shape)
    return [
        Curve(
            method=name,
            aggregation=aggregation,
            n=list(options.n),
            accuracy=means[row].tolist(),
            low=low[row].tolist(),
            high=high[row].tolist(),
        )
        for row, (name, aggregation) in enumerate(methods)
    ]


def _chances(
    problem: Problem, index: int, methods: Sequence[tuple[str, str | None]], options: BestOfNArguments
) -> np.ndarray[Any, Any]:
    """The chance that each method chooses a correct candidate of each n: float (methods, n)."""
    candidates = problem.candidates
    groups = [candidate.group for candidate in candidates]
    correct = [candidate.correct for candidate in candidates]
    truth = np.array(correct, dtype=np.float64)
    chances = np.empty((len(methods), len(options.n)))
    for column, n in enumerate(options.n):
        subsets = draw_subsets(len(candidates), n, count=options.subsets, seed=(options.seed, index, n))
        for row, (name, aggregation) in enumerate(methods):
            scores = [candidate.scores.get(aggregation or "") for candidate in candidates]
            if name == "random choice":
                chance = truth.mean()
            elif name == "majority vote":
                chance = truth[vote(groups, subsets)].mean()
            elif name == "best of n":
                chance = expected_best_of_n(scores, correct, n)
            elif name == "weighted vote":
                chance = truth[vote(groups, subsets, scores=scores)].mean()
            else:
                chance = pass_at_n(len(candidates), sum(correct), n)
            chances[row, column] = chance
    return chances


def headline(problems: Sequence[Problem]) -> str:
    """The counts in words."""
    counts = count(problems)
    names = ("problem", "solution")
    text = ", ".join(f"{counts[f'num_{name}s']:,} {name}{'' if counts[f'num_{name}s'] == 1 else 's'}" for name in names)
    if counts["num_unscored"]:
        text += f", {counts['num_unscored']:,} not scored"
    if counts["num_without_answer"]:
        text += f", {counts['num_without_answer']:,} without an answer"
    return text


def format_table(curves: Sequence[Curve], *, columns: int = 4) -> str:
    """A row a way to choose, a column an n, wide tables in several parts; accuracy and interval in per cent."""
    width = max(len(curve.label) for curve in curves)
    lines = ["Accuracy in % [95 % bootstrap interval over problems], choosing one of n solutions"]
    numbers = curves[0].n
    for start in range(0, len(numbers), columns):
        part = range(start, min(start + columns, len(numbers)))
        lines.append(" ".join([f"\n{'':<{width}}", *(f"{f'n = {numbers[i]}':>21}" for i in part)]).rstrip())
        for curve in curves:
            cells = [
                f"{100 * curve.accuracy[i]:>7.1f} {f'[{100 * curve.low[i]:.1f}, {100 * curve.high[i]:.1f}]':>14}"
                for i in part
            ]
            lines.append("".join([f"{curve.label:<{width}}", *cells]))
    return "\n".join(lines)


def import_figure_class() -> Any:
    """matplotlib's `Figure`, or an ImportError that says how to install it."""
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise ImportError(
            'drawing the curve needs matplotlib, which is not installed: run `pip install "modeling-prm[train]"`'
        ) from error


def draw(curves: Sequence[Curve], *, title: str, file: Path, figure_class: Any) -> None:
    """Draw accuracy against n, with the 95 % intervals as bands, and write it as a PNG."""
    # One for each aggregation there is, chosen for readers who are colour-blind too.
    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b")
    order = list(dict.fromkeys(curve.aggregation for curve in curves if curve.aggregation is not None))
    colour_of: dict[str | None, str] = {name: colours[i % len(colours)] for i, name in enumerate(order)}
    styles = {"random choice": ("0.5", ":"), "majority vote": ("black", "-"), "oracle (pass@n)": ("0.5", "--")}
    figure = figure_class(figsize=(8.0, 5.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for curve in curves:
        line = "--" if curve.method == "weighted vote" else "-"
        colour, line = styles.get(curve.method) or (colour_of[curve.aggregation], line)
        low, high, mean = ([100 * value for value in values] for values in (curve.low, curve.high, curve.accuracy))
        axes.plot(curve.n, mean, line, color=colour, marker="o", markersize=3.5, label=curve.label)
        axes.fill_between(curve.n, low, high, color=colour, alpha=0.08, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(curves[0].n, labels=[str(n) for n in curves[0].n])
    axes.minorticks_off()
    axes.set_xlabel("solutions to choose from, n")
    axes.set_ylabel("accuracy (%), band: 95 % interval")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, handlelength=3.5)
    figure.savefig(file)


if __name__ == "__main__":
    main()
