"""The report on labelled solutions as text and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from modeling_prm.reports import import_optional

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def render(report: Mapping[str, Any]) -> str:
    """The report as plain text."""
    counts = report["counts"]
    share = counts["wrong_steps"] / counts["labelled_steps"] if counts["labelled_steps"] else 0.0
    without = counts["solutions_without_label"]
    lines = [
        f"{counts['solutions']:,} solutions of {counts['problems']:,} problems, "
        f"{counts['solutions_with_error']:,} with a wrong step{f', {without:,} without a label' if without else ''}",
        f"{counts['steps']:,} steps, {counts['labelled_steps']:,} labelled, {counts['wrong_steps']:,} of them wrong "
        f"({share:.1%}), {counts['soft_labels']:,} soft labels",
        "",
        f"{'lengths':<22}" + "".join(f"{title:>8}" for title in ("least", "50 %", "90 %", "95 %", "99 %", "most")),
    ]
    lines += [f"{name:<22}" + "".join(f"{v:>8,}" for v in row.values()) for name, row in report["lengths"].items()]
    lines += ["", f"{'step':<6}{'labelled':>10}{'wrong':>8}{'first errors':>14}"]
    lines += [
        f"{row['position']:<6}{row['labelled_steps']:>10,}{row['error_share']:>8.1%}{row['first_errors']:>14,}"
        for row in report["positions"]
    ]
    duplicates = report["duplicates"]
    lines += [
        "",
        f"duplicate solutions: {duplicates['same_labels']:,}, and {duplicates['other_labels']:,} with other labels",
    ]
    lines += [
        f"at {cut['max_length']:,} tokens: {cut['shortened_solutions']:,} solutions shortened, "
        f"{cut['lost_solutions']:,} lost; {cut['dropped_steps']:,} steps dropped, "
        f"{cut['dropped_labelled_steps']:,} of them labelled, {cut['dropped_wrong_steps']:,} wrong"
        for cut in report["truncation"]
    ]
    if (shared := report.get("shared")) is not None:
        lines.append(
            f"problems that the test set has too: {shared['equal']:,} equal, {shared['ngram']:,} share "
            f"{shared['ngram_words']} words in a row, {shared['near_duplicates']:,} near-duplicates (likeness "
            f"{shared['similarity']:g} or more), of {shared['problems']:,} and {shared['test_problems']:,} in the "
            f"test; {shared['solutions']:,} solutions"
        )
        lines += [
            f"  {example['kind']}: {_short(example['problem'])} | {_short(example['test_problem'])}"
            for example in shared["examples"]
        ]
    return "\n".join(lines)


def draw(report: Mapping[str, Any], lengths: Mapping[str, npt.NDArray[np.int64]]) -> Figure:
    """Histograms of the lengths, up to their 99th percentile and the rest in the last bar, and errors by position.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure_class = import_optional("matplotlib.figure", "drawing the report", "matplotlib").Figure
    panels = len(lengths) + 1
    figure = figure_class(figsize=(8.4, 3.0 * ((panels + 1) // 2)), dpi=120, layout="constrained", facecolor="white")
    for number, (name, values) in enumerate(lengths.items(), start=1):
        axes = figure.add_subplot((panels + 1) // 2, 2, number)
        most = max(int(np.percentile(values, 99, method="lower")), 1)
        axes.hist(np.minimum(values, most), bins=min(most + 1, 40), color="#0072b2")
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3)
    axes = figure.add_subplot((panels + 1) // 2, 2, panels)
    rows = report["positions"]
    axes.bar([row["position"] for row in rows], [100 * row["error_share"] for row in rows], color="#d55e00")
    axes.set_title("wrong steps by the step's number, %", fontsize=9)
    axes.grid(alpha=0.3)
    return figure


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57].rstrip()}..."
