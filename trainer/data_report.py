"""What is in a file of labelled solutions: `python -m trainer.data_report FILE [--test FILE] [--output-dir DIR]`.

Prints counts, lengths of problems, steps and solutions, the share of errors by the step's number, duplicates, problems
shared with a test set, and what truncation would drop. Lengths are in characters, or in tokens with `--model` (a PRM)
or `--tokenizer` (a backbone's; as a new PRM with the default layout would have them). With `--output-dir` the same as
`data_report.json`, and `data_report.png` with histograms.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
from transformers import AddedToken, AutoTokenizer

from hub_card.errors import one_line_errors
from modeling_prm import PRMConfig, PRMProcessor
from modeling_prm.step_loss import IGNORED_LABEL

from .command_line import set_up_logging
from .conversation_data import encode_records
from .data_files import is_hub_id
from .data_report_view import draw, render
from .decontamination import (
    NGRAM_WORDS,
    OverlapIndex,
    near_duplicates,
    normalized,
    problem_texts,
    read_problem_texts,
)
from .metrics import CORRECT_FROM
from .readers import load_step_dataset

REPORT_FILE, PICTURE_FILE = "data_report.json", "data_report.png"
# Later steps are few, and come together.
LAST_POSITION = 10
_PERCENTILES = (0, 50, 90, 95, 99, 100)
_MOST_EXAMPLES = 5
_BATCH = 1_000

Lengths = dict[str, npt.NDArray[np.int64]]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Report as the options say; returns what `data_report.json` holds."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.model and options.tokenizer:
        parser.error("give --model or --tokenizer, not both")
    if options.max_length and not (options.model or options.tokenizer):
        parser.error("--max-length counts tokens; give --model or --tokenizer too")
    if options.format == "classes":
        parser.error("class indices do not say which step is wrong; give the data in another format")
    set_up_logging(main_process=True)
    with one_line_errors():
        dataset = _load(options)
        processor = load_processor(options.model, options.tokenizer)
        report, lengths = describe(dataset, processor, max_lengths=options.max_length)
        report = {"data": options.data, **report}
        if options.test:
            test = [text for path in options.test for text in read_problem_texts(path, split=_split(path, options))]
            report["shared"] = shared_problems(dataset, test, ngram=options.ngram, similarity=options.similarity)
        print(render(report))
        if options.output_dir is not None:
            folder = Path(options.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
            (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
            draw(report, lengths).savefig(folder / PICTURE_FILE)
            print(f"\nWritten to {folder}")
    return report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.data_report",
        description="Counts, lengths, errors, duplicates and shared problems of labelled solutions.",
        allow_abbrev=False,
    )
    parser.add_argument("data", nargs="+", metavar="FILE", help="files, folders or Hub ids of labelled solutions")
    parser.add_argument("--test", nargs="+", default=[], metavar="FILE", help="evaluation sets to look for problems of")
    parser.add_argument("--format", default="auto", help="format of the data, found by its columns by default")
    parser.add_argument("--on-bad-row", choices=("error", "skip"), default="error", help="default: %(default)s")
    parser.add_argument("--split", default="train", help="split of data on the Hub (default: %(default)s)")
    parser.add_argument("--test-split", default="test", help="split of tests on the Hub (default: %(default)s)")
    parser.add_argument("--model", help="a PRM to count tokens as: a folder or Hub id")
    parser.add_argument("--tokenizer", help="a backbone whose tokenizer to count with: a folder or Hub id")
    parser.add_argument("--max-length", nargs="+", type=int, default=[], metavar="N", help="say what N tokens cut off")
    parser.add_argument("--ngram", type=int, default=NGRAM_WORDS, help="shared words in a row (default: %(default)s)")
    parser.add_argument(
        "--similarity", type=float, default=0.8, help="least likeness of near-duplicates (default: %(default)s)"
    )
    parser.add_argument("--output-dir", metavar="DIR", help=f"a folder for {REPORT_FILE} and {PICTURE_FILE}")
    return parser


def _load(options: argparse.Namespace) -> datasets.Dataset:
    parts = [
        load_step_dataset(
            path, format=options.format, on_bad_row=options.on_bad_row, split=options.split if is_hub_id(path) else None
        )
        for path in options.data
    ]
    return datasets.concatenate_datasets(parts)


def _split(path: str, options: argparse.Namespace) -> str | None:
    return options.test_split if is_hub_id(path) else None


def load_processor(model: str | None, tokenizer: str | None) -> PRMProcessor | None:
    """The processor of a PRM, or the one that a new PRM on a backbone would have; without limit of length.

    Raises:
        OSError, ValueError: it cannot be loaded.
    """
    if model is not None:
        processor = PRMProcessor.from_pretrained(model)
    elif tokenizer is not None:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
        loaded.add_tokens([AddedToken(PRMConfig.separator_token, special=True, normalized=False)], special_tokens=True)
        processor = PRMProcessor(loaded)
    else:
        return None
    processor.max_length = None
    return processor


def describe(
    dataset: datasets.Dataset, processor: PRMProcessor | None = None, *, max_lengths: Sequence[int] = ()
) -> tuple[dict[str, Any], Lengths]:
    """Counts, lengths, errors by position, duplicates, and what each of `max_lengths` drops.

    Args:
        dataset: as `load_step_dataset` gives it.
        processor: what tokens are counted with, one without limit; without it lengths are in characters.
        max_lengths: in tokens; with a processor.

    Returns:
        The report as JSON has it, and the lengths that its percentiles are of: int64, by name.

    Raises:
        ValueError: `max_lengths` is given without a processor, or one is below 1.
    """
    if max_lengths and processor is None:
        raise ValueError("max_lengths counts tokens; give a processor too")
    if any(length < 1 for length in max_lengths):
        raise ValueError(f"max_lengths must be at least 1, got {list(max_lengths)}")
    steps, labels = dataset["steps"][:], dataset["labels"][:]
    lengths: Lengths = {"steps a solution": np.array([len(own) for own in steps], dtype=np.int64)}
    lengths |= _characters(dataset) if processor is None else _tokens(dataset, processor)
    report = {
        "counts": _counts(dataset, labels),
        "unit": "characters" if processor is None else "tokens",
        "lengths": {
            name: {str(share): int(np.percentile(values, share, method="lower")) for share in _PERCENTILES}
            for name, values in lengths.items()
        },
        "positions": error_positions(labels),
        "duplicates": _duplicates(dataset),
        "truncation": [truncated(dataset, processor, length) for length in max_lengths if processor is not None],
    }
    return report, lengths


def _counts(dataset: datasets.Dataset, labels: list[list[float]]) -> dict[str, int]:
    known = [[label for label in own if label != IGNORED_LABEL] for own in labels]
    wrong = [sum(label < CORRECT_FROM for label in own) for own in known]
    return {
        "solutions": len(dataset),
        "problems": len({normalized(problem) for problem in dataset["problem"]}),
        "steps": sum(map(len, labels)),
        "labelled_steps": sum(map(len, known)),
        "soft_labels": sum(label not in (0.0, 1.0) for own in known for label in own),
        "wrong_steps": sum(wrong),
        "solutions_with_error": sum(count > 0 for count in wrong),
        "solutions_without_label": sum(not own for own in known),
    }


def error_positions(labels: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """By the step's number: labelled steps, the share of wrong ones, and solutions whose first error is there.

    Steps after the tenth come together, as `"11+"`.
    """
    rows: dict[int, list[int]] = {}
    for own in labels:
        seen_error = False
        for index, label in enumerate(own):
            if label == IGNORED_LABEL:
                continue
            row = rows.setdefault(min(index, LAST_POSITION), [0, 0, 0])
            is_wrong = label < CORRECT_FROM
            row[0] += 1
            row[1] += is_wrong
            row[2] += is_wrong and not seen_error
            seen_error |= is_wrong
    return [
        {
            "position": f"{index + 1}+" if index == LAST_POSITION else str(index + 1),
            "labelled_steps": count,
            "error_share": wrong / count,
            "first_errors": first,
        }
        for index, (count, wrong, first) in sorted(rows.items())
    ]


def _characters(dataset: datasets.Dataset) -> Lengths:
    steps = dataset["steps"][:]
    problems = np.array([len(problem) for problem in dataset["problem"]], dtype=np.int64)
    return {
        "characters a problem": problems,
        "characters a step": np.array([len(step) for own in steps for step in own], dtype=np.int64),
        "characters a solution": problems + np.array([sum(map(len, own)) for own in steps], dtype=np.int64),
    }


def _tokens(dataset: datasets.Dataset, processor: PRMProcessor) -> Lengths:
    """Tokens of each whole input, and of each step but the first, with its separator and what joins it."""
    per_step: list[int] = []
    whole: list[int] = []
    for batch in dataset.iter(batch_size=_BATCH):
        for item in encode_records(processor, batch):
            whole.append(len(item.input_ids))
            per_step += np.diff(item.step_positions).tolist()
    found = {"tokens a later step": per_step, "tokens a solution": whole}
    return {name: np.array(values, dtype=np.int64) for name, values in found.items() if values}


def _duplicates(dataset: datasets.Dataset) -> dict[str, int]:
    """Solutions that are there already, with the same labels or with others."""
    seen: dict[tuple[str, ...], set[tuple[float, ...]]] = {}
    same = other = 0
    for problem, steps, labels in zip(dataset["problem"], dataset["steps"], dataset["labels"], strict=True):
        known = seen.setdefault((problem, *steps), set())
        if tuple(labels) in known:
            same += 1
        else:
            other += bool(known)
            known.add(tuple(labels))
    return {"same_labels": same, "other_labels": other}


def truncated(dataset: datasets.Dataset, processor: PRMProcessor, max_length: int) -> dict[str, int]:
    """What training with `--truncation drop` at this length would leave out: whole steps from the first that is over.

    Args:
        dataset: as `load_step_dataset` gives it.
        processor: left as it was.
        max_length: in tokens.
    """
    names = ("shortened_solutions", "lost_solutions", "dropped_steps", "dropped_labelled_steps", "dropped_wrong_steps")
    counts = dict.fromkeys(names, 0)
    before, processor.max_length = processor.max_length, max_length
    try:
        for batch in dataset.iter(batch_size=_BATCH):
            items = encode_records(processor, batch)
            for item, labels in zip(items, batch["labels"], strict=True):
                dropped = labels[len(item.step_positions) :]
                known = [label for label in dropped if label != IGNORED_LABEL]
                counts["shortened_solutions"] += 0 < len(dropped) < len(labels)
                counts["lost_solutions"] += len(dropped) == len(labels)
                counts["dropped_steps"] += len(dropped)
                counts["dropped_labelled_steps"] += len(known)
                counts["dropped_wrong_steps"] += sum(label < CORRECT_FROM for label in known)
    finally:
        processor.max_length = before
    return {"max_length": max_length, **counts}


def shared_problems(
    dataset: datasets.Dataset, test: Sequence[str], *, ngram: int = NGRAM_WORDS, similarity: float = 0.8
) -> dict[str, Any]:
    """Problems that a test set holds too: equal ones, those that share words in a row, and near-duplicates.

    A problem that is a version of another is shared if that one is. Each counts once, under the first that it is.

    Returns:
        `problems` and `test_problems` that are distinct, `equal`, `ngram`, `near_duplicates`, `solutions` of all these,
        the options, and `examples` of pairs.

    Raises:
        ValueError: an option is out of range.
    """
    versions: dict[str, dict[str, None]] = {}
    keys = []
    for problem, *groups in problem_texts(dataset):
        keys.append(normalized(problem))
        versions.setdefault(keys[-1], {}).update(dict.fromkeys([problem, *groups]))
    index = OverlapIndex(test, ngram=ngram)
    texts = list(dict.fromkeys(text for own in versions.values() for text in own))
    like = dict(zip(texts, near_duplicates(texts, test, similarity=similarity), strict=True))
    kinds: dict[str, str] = {}
    examples: list[dict[str, str]] = []
    for key, own in versions.items():
        overlaps = [overlap for text in own if (overlap := index.find(text)) is not None]
        likes = [pair for text in own if (pair := like[text]) is not None]
        if overlaps:
            kinds[key] = "equal" if any(overlap.words is None for overlap in overlaps) else "ngram"
            reference = overlaps[0].reference
        elif likes:
            kinds[key], reference = "near_duplicates", likes[0][0]
        else:
            continue
        if kinds[key] != "equal" and len(examples) < _MOST_EXAMPLES:
            examples.append({"kind": kinds[key], "problem": next(iter(own)), "test_problem": test[reference]})
    found = list(kinds.values())
    return {
        "problems": len(versions),
        "test_problems": len({normalized(text) for text in test}),
        **{kind: found.count(kind) for kind in ("equal", "ngram", "near_duplicates")},
        "solutions": sum(key in kinds for key in keys),
        "ngram_words": ngram,
        "similarity": similarity,
        "examples": examples,
    }


if __name__ == "__main__":
    main()
