"""What a labelling came to: labels, their share, agreement with given labels, and what the completions cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from modeling_prm.step_loss import IGNORED_LABEL

from .labelling_consensus import find_first_error
from .metrics import CORRECT_FROM


def measure(rows: Iterable[Mapping[str, Any]], *, rollouts: int | None = None) -> dict[str, Any]:
    """Numbers over the rows of an output folder of `trainer.label`.

    Args:
        rows: as `trainer.result_shards.read_rows` gives them.
        rollouts: completions a step, where labels come from completions: what each step but the last would take.

    Returns:
        Counts (int), shares in [0, 1] (float, None where there is nothing to divide by), and `errors` by reason. Where
        rows hold given labels, `against_given` counts the steps that both label by `(given, label)` as words.
    """
    counts: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    against: Counter[str] = Counter()
    total_share, shares = 0.0, 0
    for row in rows:
        labels = row["labels"]
        counts["solutions"] += 1
        counts["steps"] += len(labels)
        for label in labels:
            counts[f"steps_{_kind(label)}"] += 1
        known = [label for label in labels if label != IGNORED_LABEL]
        wrong = any(label < CORRECT_FROM for label in known)
        counts["solutions_wrong" if wrong else "solutions_right" if known else "solutions_unlabelled"] += 1
        for name in ("num_rollouts", "num_tokens", "num_cut"):
            counts[name] += row.get(name) or 0
        counts["num_linear"] += (rollouts or 0) * (len(labels) - 1)
        for hits, count in zip(row["successes"] or (), row["rollouts"] or (), strict=True):
            if count:
                counts["steps_with_rollouts"] += 1
                counts["steps_with_success"] += hits > 0
                total_share, shares = total_share + hits / count, shares + 1
        if row.get("error"):
            errors[row["error"]] += 1
        if row.get("given_labels") is not None:
            _compare(labels, row["given_labels"], against, counts)
    result: dict[str, Any] = dict(counts)
    result["hard_share"] = _share(counts["steps_with_success"], counts["steps_with_rollouts"])
    result["soft_share"] = _share(total_share, shares)
    result["errors"] = dict(errors)
    if against:
        result["against_given"] = dict(against)
        differing = sum(number for key, number in against.items() if len(set(key.split("/"))) > 1)
        result["disagreement"] = _share(differing, sum(against.values()))
        result["first_error_disagreement"] = _share(counts["first_errors_other"], counts["first_errors_compared"])
    return result


def describe(result: Mapping[str, Any], *, method: str, left_out: Mapping[str, int]) -> str:
    """The numbers as Markdown."""

    def count(name: str) -> int:
        return int(result.get(name, 0))

    lines = [f"# Labels by {method}", "", "| | number | share |", "| --- | --- | --- |"]
    for name, text in (
        ("right", "no step incorrect"),
        ("wrong", "a step incorrect"),
        ("unlabelled", "no label"),
    ):
        number = count(f"solutions_{name}")
        lines.append(f"| solutions: {text} | {number:,} | {_percent(_share(number, count('solutions')))} |")
    for kind in ("correct", "incorrect", "soft", "unlabelled"):
        if kind != "soft" or count("steps_soft"):
            number = count(f"steps_{kind}")
            lines.append(f"| steps: {kind} | {number:,} | {_percent(_share(number, count('steps')))} |")
    if count("steps_with_rollouts"):
        lines.append(
            f"| steps after which any completion succeeded | {count('steps_with_success'):,} of "
            f"{count('steps_with_rollouts'):,} | {_percent(result['hard_share'])} |"
        )
        lines.append(f"| mean share of completions that succeeded | | {_percent(result['soft_share'])} |")
    if count("num_linear"):
        saved = f" of {count('num_linear'):,} after every step but the last" if method == "first_error" else ""
        lines += [
            "",
            f"{count('num_rollouts'):,} completions{saved}, with {count('num_tokens'):,} tokens; "
            f"{count('num_cut'):,} were cut off and counted as wrong.",
        ]
    if "against_given" in result:
        lines += _describe_comparison(result)
    for title, reasons in (("without labels", result["errors"]), ("left out", left_out)):
        lines += [f"\n{number:,} solutions {title}: {reason}" for reason, number in sorted(reasons.items())]
    return "\n".join(lines) + "\n"


def _describe_comparison(result: Mapping[str, Any]) -> list[str]:
    against = result["against_given"]
    lines = [
        "",
        "Steps, against the labels given:",
        "",
        "| | labelled correct | labelled incorrect |",
        "| --- | --- | --- |",
    ]
    for given in ("correct", "incorrect"):
        lines.append(
            f"| given {given} | {against.get(f'{given}/correct', 0):,} | {against.get(f'{given}/incorrect', 0):,} |"
        )
    lines += [
        "",
        f"They disagree on {_percent(result['disagreement'])} of these steps, and on the first error of "
        f"{_percent(result['first_error_disagreement'])} of the solutions where both know it.",
    ]
    return lines


def _compare(labels: list[float], given: list[float], against: Counter[str], counts: Counter[str]) -> None:
    for label, other in zip(labels, given, strict=True):
        if IGNORED_LABEL not in (label, other):
            against[f"{_word(other)}/{_word(label)}"] += 1
    first, theirs = find_first_error(labels), find_first_error(given)
    if first is not None and theirs is not None:
        counts["first_errors_compared"] += 1
        counts["first_errors_other"] += first != theirs


def _kind(label: float) -> str:
    return {1.0: "correct", 0.0: "incorrect", IGNORED_LABEL: "unlabelled"}.get(label, "soft")


def _word(label: float) -> str:
    return "correct" if label >= CORRECT_FROM else "incorrect"


def _share(part: float, total: float) -> float | None:
    return part / total if total else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
