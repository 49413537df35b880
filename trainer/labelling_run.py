"""Labelling many solutions: what each asks for is completed, and each completion judged by its final answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from modeling_prm.step_loss import IGNORED_LABEL

from .answers import Comparison, answers_equal, extract_answer, normalize_answer
from .labelling_items import LabelItem
from .labelling_methods import Plan, StepLabels
from .labelling_rollouts import Rollout, RolloutGenerator


@dataclass(kw_only=True)
class Labelled:
    """A solution with its labels, and what they cost.

    Attributes:
        row: its number in the input.
        item: the solution.
        result: the labels.
        num_rollouts: completions that were generated.
        num_tokens: tokens that they took.
        num_cut: completions that ended before they reached a final answer.
    """

    row: int
    item: LabelItem
    result: StepLabels
    num_rollouts: int = 0
    num_tokens: int = 0
    num_cut: int = 0


@dataclass
class _Job:
    row: int
    item: LabelItem
    plan: Plan
    wanted: list[int] = field(default_factory=list)
    num_rollouts: int = 0
    num_tokens: int = 0
    num_cut: int = 0
    verdicts: dict[str, bool] = field(default_factory=dict)


def label_solutions(
    items: Iterable[tuple[int, LabelItem]],
    start: Callable[[LabelItem, bool], Plan],
    generator: RolloutGenerator,
    *,
    rollouts: int,
    comparison: Comparison = "auto",
    instruction: str | None = None,
    concurrency: int = 1,
) -> Iterator[Labelled]:
    """Label solutions with completions; as they are finished, which with a concurrency above 1 is in no certain order.

    A completion is right where its final answer equals the reference: the answer that it states, or where it holds
    none the one that the whole solution states. A completion that was cut off is wrong.

    Args:
        items: solutions with their numbers, each with a reference answer.
        start: the plan for a solution, of which it is said whether its own final answer is right.
        generator: where completions come from.
        rollouts: completions of each beginning that a plan asks for.
        comparison: how answers are compared, as in `trainer.answers`.
        instruction: text after each problem, behind a blank line, that the generator reads and nothing else.
        concurrency: how many solutions are under way at a time; above 1 the generator is called from as many threads.

    Raises:
        ConnectionError: of a server, which ends it. (ValueError of the generator is the solution's error.)
    """

    def complete(job: _Job) -> Sequence[Sequence[Rollout]]:
        problem = job.item.problem if instruction is None else f"{job.item.problem}\n\n{instruction}"
        return generator(problem, [job.item.steps[:count] for count in job.wanted], rollouts)

    def advance(job: _Job, found: Sequence[Sequence[Rollout]] | None) -> Labelled | None:
        """Tell a plan what was found; its labels where that ends it. On this thread, on which timeouts work."""
        try:
            if found is None:
                job.wanted = next(job.plan)
            else:
                job.wanted = job.plan.send(_judge(job, found, comparison))
        except StopIteration as end:
            return _finish(job, end.value)
        return None

    pool: Executor
    waiting: dict[Future[Sequence[Sequence[Rollout]]], _Job] = {}
    source = iter(items)
    pool = _Here() if concurrency == 1 else ThreadPoolExecutor(concurrency, thread_name_prefix="rollouts")
    with pool:
        try:
            while True:
                while len(waiting) < concurrency and (entry := next(source, None)) is not None:
                    row, item = entry
                    job = _Job(row, item, start(item, answer_is_right(item, comparison)))
                    if (labelled := advance(job, None)) is not None:
                        yield labelled
                        continue
                    waiting[pool.submit(complete, job)] = job
                if not waiting:
                    return
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    job = waiting.pop(future)
                    try:
                        completions = future.result()
                    except ValueError as error:
                        yield _finish(job, _failed(job.item, str(error)))
                        continue
                    labelled = advance(job, completions)
                    if labelled is None:
                        waiting[pool.submit(complete, job)] = job
                    else:
                        yield labelled
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Here(Executor):
    """Runs what is submitted at once, on the same thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def answer_is_right(item: LabelItem, comparison: Comparison = "auto") -> bool:
    """Whether the final answer of a solution equals its reference.

    Raises:
        ValueError: there is no reference.
    """
    if item.answer is None:
        raise ValueError("the solution has no reference answer")
    return answers_equal(item.answer, item.solution_answer, comparison=comparison)


def _judge(job: _Job, found: Sequence[Sequence[Rollout]], comparison: Comparison) -> list[list[bool]]:
    judged: list[list[bool]] = []
    for count, completions in zip(job.wanted, found, strict=True):
        judged.append([_is_right(job, count, rollout, comparison) for rollout in completions])
        job.num_rollouts += len(completions)
        job.num_tokens += sum(rollout.num_tokens for rollout in completions)
        job.num_cut += sum(rollout.is_cut for rollout in completions)
    return judged


def _is_right(job: _Job, count: int, rollout: Rollout, comparison: Comparison) -> bool:
    if rollout.is_cut:
        return False
    answer = extract_answer(rollout.text)
    if answer is None:
        answer = extract_answer("\n".join([*job.item.steps[:count], rollout.text]))
    if answer is None:
        return False
    # 50% may equal 0.5 where 50 does not, and their normalized forms are the same.
    key = normalize_answer(answer) + "%" * ("%" in answer)
    if key not in job.verdicts:
        job.verdicts[key] = answers_equal(job.item.answer or "", answer, comparison=comparison)
    return job.verdicts[key]


def _finish(job: _Job, result: StepLabels) -> Labelled:
    return Labelled(
        row=job.row,
        item=job.item,
        result=result,
        num_rollouts=job.num_rollouts,
        num_tokens=job.num_tokens,
        num_cut=job.num_cut,
    )


def _failed(item: LabelItem, error: str) -> StepLabels:
    nothing = (0,) * len(item.steps)
    return StepLabels(
        labels=(IGNORED_LABEL,) * len(item.steps), successes=nothing, rollouts=nothing, error=error or "no completion"
    )
