"""Several solutions in one row of a batch, without padding between them.

The solutions of a micro-batch stay the same, and so do loss and gradients: only their layout changes, from N
padded rows to the R rows that cost least, and the logits that the model gives for these are put back into the N
solutions' order before the loss. With `"share"` solutions of one problem have the tokens with which they begin
in common, the problem's and those of equal first steps.

    R rows of L tokens:   [ problem 1 | solution a | solution b ] [ problem 2 | solution c ] [ padding ]

Letters: N solutions, S steps, R rows, L tokens, T steps of a row.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Sampler

from modeling_prm.capabilities import Capabilities, find_capabilities

from .collator import PRMDataCollator
from .preparation import PROBLEM_ID

logger = logging.getLogger(__name__)

PACKING = ("none", "pack", "share")

# In a batch: where in the R x T logits each solution's steps are, and where each token's readers end.
STEP_INDEX, READERS_END = "step_index", "readers_end"


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How solutions are laid out in rows.

    Args:
        capabilities: what the backbone allows.
        shares: solutions of one problem share the tokens with which they begin.
        by_masks: sequences are kept apart by masks, otherwise by position ids.
        max_length: most tokens in a row, or None; a longer solution has a row of its own.
        hidden_size: of the backbone, to weigh long rows against many.
    """

    capabilities: Capabilities
    shares: bool
    by_masks: bool
    max_length: int | None
    hidden_size: int

    def cost(self, rows: int, length: int) -> int:
        """Work of a layer on so many rows of so many tokens, up to a factor.

        A token takes 24 H^2 operations in the layer's products and 4 H L in its attention over L tokens.
        """
        return rows * length * (6 * self.hidden_size + length)


def choose_packing(wanted: str, model: Any, max_length: int | None) -> Packing | None:
    """The layout for a model that comes closest to what is wanted; a warning says where it is less.

    Args:
        wanted: `"none"`, `"pack"` or `"share"`.
        model: the PRM.
        max_length: most tokens in a row.

    Returns:
        None where every solution is to have a padded row of its own.
    """
    if wanted == "none":
        return None
    can = find_capabilities(model)
    name = model.config.text_config.model_type
    shares = wanted == "share" and can.shares_prefix
    if not can.packs and not can.shares_prefix:
        logger.warning("packing=%r is not possible with %s, rows are padded: %s", wanted, name, can.reason)
        return None
    if wanted == "share" and not shares:
        logger.warning("packing='share' is not possible with %s, rows are packed without: %s", name, can.reason)
    return Packing(
        capabilities=can,
        shares=shares,
        by_masks=shares or not can.packs,
        max_length=max_length,
        hidden_size=model.config.text_config.hidden_size,
    )


@dataclass(frozen=True)
class PackingCollator(PRMDataCollator):
    """Lays N tokenized records out in R rows.

    Returns what `PRMDataCollator` does, and where some solutions share a row, other inputs of the model:
        `input_ids` and `position_ids` (R, L) int64, the latter from 0 at each sequence's start;
        `step_positions` (R, T) int64, padded with -1;
        `step_index` (N, S) int64, each step's place in the model's logits (R * T), -1 where there is none;
        `readers_end` (R, L) int64, with masks: the first later token that does not see this one.
    `labels` stay (N, S), a row a solution.

    Args:
        packing: the layout.
    """

    packing: Packing | None = None

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(features)
        if self.packing is None:
            return batch
        rows = plan_rows(_groups(features, shares=self.packing.shares), self.packing)
        if len(rows) == len(features):
            # Nothing shares a row; backbones are faster without the masks that keep solutions apart.
            return batch
        for name in ("input_ids", "attention_mask", "step_positions"):
            del batch[name]
        packed = _lay_out(features, rows, tuple(batch["labels"].shape), self.processor.pad_token_id)
        if not self.packing.by_masks:
            del packed[READERS_END]
        return {**batch, **packed}


def unpack(
    model: Any, batch: dict[str, Any], packing: Packing, dtype: torch.dtype
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A packed batch as inputs, and the model as a function of them that gives logits (N, S), or (N, S, K).

    Args:
        model: the PRM, perhaps wrapped for several processes.
        batch: from `PackingCollator`.
        packing: its layout.
        dtype: of the backbone.
    """
    inputs = {name: value for name, value in batch.items() if name not in (STEP_INDEX, READERS_END)}
    if READERS_END in batch:
        inputs["attention_mask"] = _masks(batch[READERS_END], batch["position_ids"], packing.capabilities, dtype)

    def run(**inputs: Any) -> Any:
        outputs = model(**inputs)
        outputs["logits"] = logits_of_solutions(outputs["logits"], batch[STEP_INDEX])
        return outputs

    return run, inputs


def logits_of_solutions(logits: torch.Tensor, step_index: torch.Tensor) -> torch.Tensor:
    """Logits (R, T) or (R, T, K) in the order of the solutions: (N, S) or (N, S, K), 0 where there is no step."""
    found = logits.flatten(0, 1)[step_index.clamp(min=0)]
    is_step = (step_index >= 0).reshape(*step_index.shape, *[1] * (found.dim() - 2))
    return torch.where(is_step, found, 0.0)


class ProblemSampler(Sampler[int]):
    """Problems in random order, each with all its solutions one after the other, so that a batch can share them.

    Args:
        problem_ids: for each record the number of its problem.
        seed: seed of the order; each epoch has its own.
        epoch: gives the number of the epoch that begins.
    """

    def __init__(self, problem_ids: Sequence[int], *, seed: int, epoch: Callable[[], int]) -> None:
        self.seed = seed
        self.epoch = epoch
        self._solutions: dict[int, list[int]] = {}
        for record, problem in enumerate(problem_ids):
            self._solutions.setdefault(problem, []).append(record)

    def __len__(self) -> int:
        return sum(map(len, self._solutions.values()))

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        problems = list(self._solutions.values())
        for number in torch.randperm(len(problems), generator=generator).tolist():
            records = problems[number]
            for place in torch.randperm(len(records), generator=generator).tolist():
                yield records[place]


def problem_sampler(dataset: Any, *, seed: int, epoch: Callable[[], int]) -> ProblemSampler | None:
    """A `ProblemSampler` of a tokenized dataset, or None, with a warning, where it does not tell problems apart."""
    if PROBLEM_ID not in (getattr(dataset, "column_names", None) or ()):
        logger.warning(
            "the training set has no column %r, as tokenize_dataset of this release writes it, so that no solutions "
            "share their problem",
            PROBLEM_ID,
        )
        return None
    return ProblemSampler(dataset.with_format(None)[PROBLEM_ID], seed=seed, epoch=epoch)


@dataclass(frozen=True)
class Group:
    """Records in the order of their ids, and how many first ids each has in common with the one before it."""

    records: tuple[int, ...]
    lengths: tuple[int, ...]
    common: tuple[int, ...]

    def trees(self, capacity: float) -> Iterator[Tree]:
        """The group in pieces of at most so many tokens, or of one record."""
        start, size = 0, self.lengths[0]
        for i in range(1, len(self.records)):
            if size + self.lengths[i] - self.common[i] > capacity:
                yield Tree(self.records[start:i], self.common[start:i], size)
                start, size = i, self.lengths[i]
            else:
                size += self.lengths[i] - self.common[i]
        yield Tree(self.records[start:], self.common[start:], size)


@dataclass(frozen=True)
class Tree:
    """Records that stand in one row and share what they have in common with the one before; `size` in tokens."""

    records: tuple[int, ...]
    common: tuple[int, ...]
    size: int


def plan_rows(groups: Sequence[Group], packing: Packing) -> list[list[Tree]]:
    """Which records share a row: the cheapest of some lengths of rows, filled by first fit decreasing.

    The rows are never more work than one padded row a record, and the plan depends on nothing but its arguments.
    """
    longest = max(length for group in groups for length in group.lengths)
    total = sum(length for group in groups for length in group.lengths)
    if packing.capabilities.one_row and not packing.by_masks:
        return [[tree for group in groups for tree in group.trees(math.inf)]]
    limit = max(longest, min(total, packing.max_length or total))
    capacities, capacity = [limit], float(longest)
    while capacity < limit:
        capacities.append(int(capacity))
        capacity *= 1.2
    plans = [_first_fit_decreasing([t for group in groups for t in group.trees(c)], c) for c in capacities]
    return min(plans, key=lambda rows: packing.cost(len(rows), max(sum(tree.size for tree in row) for row in rows)))


def _first_fit_decreasing(trees: list[Tree], capacity: int) -> list[list[Tree]]:
    rows: list[list[Tree]] = []
    room: list[int] = []
    for tree in sorted(trees, key=lambda tree: (-tree.size, tree.records)):
        row = next((i for i, left in enumerate(room) if left >= tree.size), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(tree)
        room[row] -= tree.size
    return rows


def _groups(features: Sequence[dict[str, Any]], *, shares: bool) -> list[Group]:
    """The records of each problem, or each record alone."""
    by_problem: dict[Any, list[int]] = {}
    for record, row in enumerate(features):
        key = row.get(PROBLEM_ID) if shares else None
        by_problem.setdefault(("record", record) if key is None else key, []).append(record)
    groups = []
    for records in by_problem.values():
        records.sort(key=lambda record: features[record]["input_ids"])
        ids = [features[record]["input_ids"] for record in records]
        common = [0] + [_common_length(before, after) for before, after in itertools.pairwise(ids)]
        groups.append(Group(tuple(records), tuple(map(len, ids)), tuple(common)))
    return groups


def _common_length(first: list[int], second: list[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(first), len(second)))


def _lay_out(
    features: Sequence[dict[str, Any]], rows: list[list[Tree]], shape: tuple[int, ...], pad_token_id: int
) -> dict[str, torch.Tensor]:
    """The tensors of a plan; `shape` is (N, S)."""
    laid_out = [_Row(row, features) for row in rows]
    length = max(len(row.input_ids) for row in laid_out)
    width = max(len(row.step_positions) for row in laid_out)
    step_index = torch.full(shape, -1)
    for number, row in enumerate(laid_out):
        missing = length - len(row.input_ids)
        filled = len(row.input_ids)
        row.input_ids += [pad_token_id] * missing
        row.position_ids += range(missing)
        # Padding sees itself, as a row of the attention must see something.
        row.readers_end += range(filled + 1, length + 1)
        row.step_positions += [-1] * (width - len(row.step_positions))
        for record, first, steps in row.steps:
            step_index[record, :steps] = torch.arange(steps) + (number * width + first)
    return {
        "input_ids": torch.tensor([row.input_ids for row in laid_out]),
        "position_ids": torch.tensor([row.position_ids for row in laid_out]),
        "step_positions": torch.tensor([row.step_positions for row in laid_out]),
        STEP_INDEX: step_index,
        READERS_END: torch.tensor([row.readers_end for row in laid_out]),
    }


class _Row:
    """One row in the making; `steps` holds record, first place in `step_positions` and number of steps."""

    def __init__(self, trees: Sequence[Tree], features: Sequence[dict[str, Any]]) -> None:
        self.input_ids: list[int] = []
        self.position_ids: list[int] = []
        self.readers_end: list[int] = []
        self.step_positions: list[int] = []
        self.steps: list[tuple[int, int, int]] = []
        for tree in trees:
            self._add(tree, features)

    def _add(self, tree: Tree, features: Sequence[dict[str, Any]]) -> None:
        path: list[int] = []
        for record, common in zip(tree.records, (0, *tree.common[1:]), strict=True):
            ids, positions = features[record]["input_ids"], features[record]["step_positions"]
            end = len(self.input_ids)
            # What this record does not begin with is seen by no token from here on.
            for token in path[common:]:
                self.readers_end[token] = end
            path = path[:common] + list(range(end, end + len(ids) - common))
            self.input_ids += ids[common:]
            self.position_ids += range(common, len(ids))
            self.readers_end += [0] * (len(ids) - common)
            self.steps.append((record, len(self.step_positions), len(positions)))
            self.step_positions += [path[position] for position in positions]
        for token in path:
            self.readers_end[token] = len(self.input_ids)


def _masks(
    readers_end: torch.Tensor, position_ids: torch.Tensor, capabilities: Capabilities, dtype: torch.dtype
) -> torch.Tensor | dict[str, torch.Tensor]:
    """The masks (R, 1, L, L) that the backbone takes: 0 where a token sees another, else the lowest number."""
    index = torch.arange(readers_end.shape[1], device=readers_end.device)
    sees = (index <= index.unsqueeze(1)) & (index.unsqueeze(1) < readers_end.unsqueeze(1))

    def as_float(allowed: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return mask.masked_fill(~allowed, torch.finfo(dtype).min).unsqueeze(1)

    near = sees
    if capabilities.window is not None:
        near = sees & (position_ids.unsqueeze(2) - position_ids.unsqueeze(1) < capabilities.window)
    if capabilities.masks == "one":
        return as_float(near)
    return {"full_attention": as_float(sees), "sliding_attention": as_float(near)}
