"""Training problems that an evaluation set holds too: found by overlap of words, and left out.

    index = OverlapIndex(["A problem", "Another one"])
    index.find("A problem's text")  # None, or what it shares with which problem
    training_set, removed = decontaminate(training_set, read_problem_texts("test.jsonl"))

Two problems overlap if they are equal but for case and white space, or if they share 13 words in a row, the length
that GPT-3's evaluation used for most of its data (Brown et al., arXiv 2005.14165, appendix C). Unlike there, it is
problems that are compared, not documents, and n-grams that are frequent count too. A problem of fewer words overlaps
only where it is equal. What was reworded is not found.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from .data_files import is_hub_id, iter_file_rows, iter_hub_rows, list_data_files

logger = logging.getLogger(__name__)

NGRAM_WORDS = 13
_PROBLEM_COLUMNS = ("problem", "question", "prompt", "original_question", "modified_question", "problem_group")
# Written without spaces between words: each character counts as one.
_UNSPACED = "぀-ヿ㐀-䶿一-鿿가-힯"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What a text shares with one of the reference texts.

    Args:
        reference: the 0-based index of that one, the first where there are several.
        words: the words shared, or None where the texts are equal but for case and white space.
    """

    reference: int
    words: str | None


class OverlapIndex:
    """Finds texts that overlap with reference texts.

    Args:
        references: the texts.
        ngram: so many words in a row make an overlap, at least 1.

    Raises:
        ValueError: `ngram` is below 1.
    """

    def __init__(self, references: Iterable[str], *, ngram: int = NGRAM_WORDS) -> None:
        if ngram < 1:
            raise ValueError(f"ngram must be at least 1 word, got {ngram}; pass for example {NGRAM_WORDS}")
        self.ngram = ngram
        self._equal: dict[str, int] = {}
        self._ngrams: dict[str, int] = {}
        for number, text in enumerate(references):
            self._equal.setdefault(normalized(text), number)
            for words in word_ngrams(text, ngram):
                self._ngrams.setdefault(words, number)

    def find(self, text: str) -> Overlap | None:
        """The first overlap of a text, None where there is none."""
        number = self._equal.get(normalized(text))
        if number is not None:
            return Overlap(reference=number, words=None)
        for words in word_ngrams(text, self.ngram):
            number = self._ngrams.get(words)
            if number is not None:
                return Overlap(reference=number, words=words)
        return None


def read_problem_texts(path: str | os.PathLike[str], *, split: str | None = None) -> list[str]:
    """The problems of an evaluation set, whatever else its rows hold; those that one is a version of too.

    Args:
        path: a data file, a folder of them, or a Hub id. A row is an object with at least one of the columns
            `problem`, `question` (or one with a `problem` in it, as PRM800K has), `prompt`, `original_question`,
            `modified_question` and `problem_group`.
        split: of a Hub dataset.

    Raises:
        OSError, ValueError: it cannot be read, or a row has none of these columns, naming its place.
    """
    path = os.fspath(path)
    if is_hub_id(path):
        if split is None:
            raise ValueError(f"{path} is not a local file or folder; to read it as a Hub dataset give a split too")
        rows = iter_hub_rows(path, split)
    else:
        rows = itertools.chain.from_iterable(map(iter_file_rows, list_data_files(Path(path))))
    texts: dict[str, None] = {}
    for row in rows:
        if row.error is not None:
            raise ValueError(f"{row.place}: {row.error}") from row.error
        found = [row.value.get(name) for name in _PROBLEM_COLUMNS] if isinstance(row.value, dict) else []
        found = [value.get("problem") if isinstance(value, dict) else value for value in found]
        known = [value for value in found if isinstance(value, str)]
        if not known:
            raise ValueError(f"{row.place}: the row has no problem; it needs one of {', '.join(_PROBLEM_COLUMNS)}")
        texts |= dict.fromkeys(known)
    if not texts:
        raise ValueError(f"{path} holds no rows; check the path")
    return list(texts)


def decontaminate(dataset: Dataset, against: Iterable[str], *, ngram: int = NGRAM_WORDS) -> tuple[Dataset, list[int]]:
    """Leave out the solutions whose problem is in an evaluation set, and log how many.

    Where a problem is a version of another (the column `problem_group`), both texts count, and one version that is in
    the evaluation set takes all others with it.

    Args:
        dataset: the training set, with a column `problem`.
        against: the problems of the evaluation set.
        ngram: as in `OverlapIndex`.

    Returns:
        What is left, in its order, and the row numbers of what was left out.

    Raises:
        ValueError: nothing is left, or `ngram` is below 1.
    """
    index = OverlapIndex(against, ngram=ngram)
    rows = list(problem_texts(dataset))
    found = {text: index.find(text) for text in dict.fromkeys(itertools.chain.from_iterable(rows))}
    groups = {texts[1:] for texts in rows if len(texts) > 1 and any(found[text] is not None for text in texts)}
    removed = [
        row for row, texts in enumerate(rows) if texts[1:] in groups or any(found[text] is not None for text in texts)
    ]
    problems = {rows[row] for row in removed}
    equal = sum(any((overlap := found[text]) and overlap.words is None for text in texts) for texts in problems)
    if len(removed) == len(dataset):
        raise ValueError(f"all {len(dataset)} solutions are of problems that the evaluation set holds; give other data")
    logger.log(
        logging.WARNING if removed else logging.INFO,
        "decontamination: left out %d of %d solutions, of %d problems that are also in the evaluation set (%d equal, "
        "the others share %d words in a row)",
        len(removed),
        len(dataset),
        len(problems),
        equal,
        ngram,
    )
    if not removed:
        return dataset, []
    gone = set(removed)
    return dataset.select([row for row in range(len(dataset)) if row not in gone]), removed


def normalized(text: str) -> str:
    """A text with compatibility characters (NFKC), case and white space made equal; punctuation stays."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def word_ngrams(text: str, length: int) -> Iterator[str]:
    """All runs of so many words of a text, each as one string; words are letters and digits in lower case."""
    words = _WORD.findall(normalized(text))
    return (" ".join(words[start : start + length]) for start in range(len(words) - length + 1))


def problem_texts(dataset: Dataset) -> Iterator[tuple[str, ...]]:
    """The problem of each row, and what it is a version of, where it is one."""
    groups = dataset["problem_group"] if "problem_group" in dataset.column_names else [None] * len(dataset)
    for problem, group in zip(dataset["problem"], groups, strict=True):
        yield (problem,) if group is None else (problem, group)


def near_duplicates(
    texts: Sequence[str], references: Sequence[str], *, similarity: float = 0.8, length: int = 3
) -> list[tuple[int, float] | None]:
    """For each text the reference text that is most like it, where one is like it enough.

    Likeness is the Jaccard similarity of the sets of runs of `length` words (of all words as one run where a text has
    fewer): shared runs divided by all runs. Exact: two sets of similarity t or more share one of their
    |A| - ceil(t |A|) + 1 first runs in any common order (Chaudhuri et al., ICDE 2006), and with the rarest runs first
    few pairs do.

    Args:
        texts: N texts.
        references: those that they are compared with.
        similarity: the least, in (0, 1].
        length: words in a run, at least 1.

    Returns:
        N pairs of the 0-based index of a reference (the first of equally like ones) and the similarity, or None.

    Raises:
        ValueError: `similarity` or `length` is out of range.
    """
    if not 0.0 < similarity <= 1.0:
        raise ValueError(f"similarity must be in (0, 1], got {similarity}")
    if length < 1:
        raise ValueError(f"length must be at least 1 word, got {length}")
    ours, theirs = ([_runs(text, length) for text in part] for part in (texts, references))
    frequency = Counter(itertools.chain.from_iterable(itertools.chain(ours, theirs)))

    def first(runs: frozenset[str]) -> list[str]:
        order = sorted(runs, key=lambda run: (frequency[run], run))
        # The last bit of a product must not lose a pair.
        return order[: len(order) - math.ceil(similarity * len(order) - 1e-9) + 1]

    index: dict[str, list[int]] = {}
    for number, runs in enumerate(theirs):
        for run in first(runs):
            index.setdefault(run, []).append(number)
    found: list[tuple[int, float] | None] = []
    for runs in ours:
        candidates = sorted({number for run in first(runs) for number in index.get(run, ())})
        likeness = [(len(runs & theirs[number]) / len(runs | theirs[number]), -number) for number in candidates]
        best = max(likeness, default=(0.0, 0))
        found.append((-best[1], best[0]) if best[0] >= similarity else None)
    return found


def _runs(text: str, length: int) -> frozenset[str]:
    return frozenset(word_ngrams(text, length)) or frozenset([" ".join(_WORD.findall(normalized(text)))])
