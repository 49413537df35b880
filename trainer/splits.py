"""Splitting labelled solutions so that no problem is on both sides."""

import hashlib
import logging

from datasets import Dataset

logger = logging.getLogger(__name__)


def split_by_problem(dataset: Dataset, fraction: float, *, seed: int) -> tuple[Dataset, Dataset]:
    """Split a dataset into a training and a held-out part, every solution of a problem on one side.

    Two problems are the same if they are equal after runs of whitespace are made one space and case is
    folded, or if the column `problem_group` says that they are versions of one. The problems are ordered
    by a SHA-256 hash of seed and problem and the first ones are held out, so the split depends neither on
    the order of the rows, nor on how many solutions a problem has, nor on the platform. Rows keep their
    order on each side.

    Beyond that only equal texts are recognised: a problem that was reworded counts as another problem.

    Args:
        dataset: A dataset with a string column `problem`, and perhaps a column `problem_group` of strings
            or nulls.
        fraction: The share of the distinct problems (not of the rows) to hold out, between 0 and 1,
            both excluded; rounded to the nearest number of problems, a half up.
        seed: Chooses the split; the same seed gives the same split.

    Returns:
        `(train, held_out)`.

    Raises:
        TypeError: If `dataset` is not a `datasets.Dataset` or `seed` not an int.
        ValueError: If there is no column `problem`, `fraction` is not between 0 and 1, or one side
            would be empty.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"dataset must be a datasets.Dataset, got {type(dataset).__name__}; choose one split of it first"
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}; pass for example seed=0")
    if "problem" not in dataset.column_names:
        raise ValueError(
            f"a column 'problem' is needed, got {dataset.column_names}; "
            "read the data with trainer.readers.load_step_dataset or rename the column"
        )
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction must be between 0 and 1, both excluded, got {fraction}; pass for example 0.05")

    keys = _problem_keys(dataset)
    distinct = sorted(set(keys), key=lambda key: _hash(seed, key))
    num_held_out = int(fraction * len(distinct) + 0.5)
    if not 0 < num_held_out < len(distinct):
        raise ValueError(
            f"fraction={fraction} of {len(distinct)} distinct problems holds out {num_held_out} and trains "
            f"on {len(distinct) - num_held_out}; each side needs at least one: change fraction or add problems"
        )

    held_out_keys = set(distinct[:num_held_out])
    train = [index for index, key in enumerate(keys) if key not in held_out_keys]
    held_out = [index for index, key in enumerate(keys) if key in held_out_keys]
    logger.info(
        "split %d problems: %d (%d solutions) to train on, %d (%d solutions) held out",
        len(distinct),
        len(distinct) - num_held_out,
        len(train),
        num_held_out,
        len(held_out),
    )
    return dataset.select(train), dataset.select(held_out)


def _problem_keys(dataset: Dataset) -> list[str]:
    """One text a row, the same for all rows that problems or groups link, directly or through others."""
    parents: dict[str, str] = {}

    def root(key: str) -> str:
        while parents.setdefault(key, key) != key:
            parents[key] = key = parents[parents[key]]
        return key

    problems = [_normalized(problem) for problem in dataset["problem"]]
    groups = dataset["problem_group"] if "problem_group" in dataset.column_names else [None] * len(problems)
    for problem, group in zip(problems, groups, strict=True):
        if group is not None:
            low, high = sorted((root(problem), root(_normalized(group))))
            parents[high] = low
    return [root(problem) for problem in problems]


def _normalized(problem: str) -> str:
    return " ".join(problem.split()).casefold()


def _hash(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed}\n{key}".encode()).digest()
