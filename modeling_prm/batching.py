"""Which tokens are computed in which forward pass: solutions that begin alike share it, passes hold similar lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from .processing_prm import EncodedSolution
from .shared_prefix import Piece, Segment, cut_path

# Fewer tokens in common are computed again: each branch costs a pass of its own at worst.
MIN_SHARED = 16


@dataclass(eq=False)
class Chunk:
    """Solutions that are computed together.

    Attributes:
        paths: for each row, the segments that hold it.
        levels: segments, each after those that it needs.
        ready: for each segment, the rows that are complete once it is computed.
    """

    paths: dict[int, tuple[Piece, ...]] = field(default_factory=dict)
    levels: list[list[Segment]] = field(default_factory=list)
    ready: dict[Segment, list[int]] = field(default_factory=dict)


def plan_chunks(
    encoded: Sequence[EncodedSolution | None], *, shares: bool, most_kept: int, most_tokens: int
) -> Iterator[Chunk]:
    """Every solution that is not None in segments; within a chunk tokens that solutions begin with are in one.

    Args:
        encoded: N solutions.
        shares: whether they may share them; otherwise each solution is a segment.
        most_kept: about how many tokens are kept for others at a time.
        most_tokens: about how many tokens a chunk has; more make batches of more similar length.
    """
    rows = [row for row, item in enumerate(encoded) if item is not None]
    if not shares:
        ids = [encoded[row].input_ids for row in rows]  # type: ignore[union-attr]
        yield plan_tree(encoded, rows, [0] * len(ids))
        return
    rows.sort(key=lambda row: encoded[row].input_ids)  # type: ignore[union-attr]
    ids = [encoded[row].input_ids for row in rows]  # type: ignore[union-attr]
    common = [0, *(common_length(*pair) for pair in pairwise(ids))]
    first, kept, depth, tokens, least = 0, 0, 0, 0, 0
    for place in range(len(rows)):
        # Where the chunk is large enough, it ends before a row that shares no more than all its rows do.
        fullness = max(kept / most_kept, tokens / most_tokens) if place > first else 0.0
        if fullness > 2.0 or (fullness > 1.0 and common[place] < least + MIN_SHARED):
            yield plan_tree(encoded, rows[first:place], common[first:place])
            first, kept, depth, tokens = place, 0, 0, 0
        if place > first:
            least = min(least, common[place]) if place > first + 1 else common[place]
            depth = min(depth, common[place])
            if common[place] - depth >= MIN_SHARED:
                kept, depth = kept + common[place] - depth, common[place]
        tokens += len(ids[place]) - depth
    if rows:
        yield plan_tree(encoded, rows[first:], common[first:])


def plan_tree(
    encoded: Sequence[EncodedSolution | None],
    rows: Sequence[int],
    common: Sequence[int],
    before: tuple[Piece, ...] = (),
) -> Chunk:
    """A chunk of some rows of a list of solutions.

    Args:
        encoded: the list.
        rows: some of it, in the order of their ids.
        common: with how many ids of the one before each of these begins; the first number is not looked at.
        before: computed tokens with which all of them begin.
    """
    chunk = Chunk()
    items: list[EncodedSolution] = [encoded[row] for row in rows]  # type: ignore[misc]
    _place(chunk, items[0], rows[0], before)
    # Rows from `first` to `end`, which share `shared` tokens; the first of them is placed.
    stack = [(0, len(rows), before[-1].stop if before else 0)]
    while stack:
        first, end, shared = stack.pop()
        if end - first < 2:
            continue
        least = min(common[first + 1 : end])
        if least - shared >= MIN_SHARED or least == len(items[first].input_ids):
            shared = least
        branches = [place for place in range(first + 1, end) if common[place] == least]
        path = cut_path(chunk.paths[rows[first]], shared)
        for start, stop in pairwise([first, *branches, end]):
            if start > first:
                _place(chunk, items[start], rows[start], path)
            stack.append((start, stop, shared))
    return chunk


def _place(chunk: Chunk, item: EncodedSolution, row: int, before: tuple[Piece, ...]) -> None:
    """Give a row a segment after the pieces before it, where they are not the whole of it."""
    start = before[-1].stop if before else 0
    path = before
    if start < len(item.input_ids):
        segment = Segment(ids=item.input_ids[start:], before=before)
        path = (*before, Piece(segment, len(item.input_ids)))
        for piece in before:
            piece.segment.keep = max(piece.segment.keep, piece.stop - piece.segment.start)
        # A segment with n pieces before it comes after one with n - 1.
        while len(before) >= len(chunk.levels):
            chunk.levels.append([])
        chunk.levels[len(before)].append(segment)
        chunk.ready[segment] = []
    chunk.paths[row] = path
    chunk.ready[path[-1].segment].append(row)
    for place in item.step_positions:
        owner(path, place).read_at(place)


def owner(path: Sequence[Piece], place: int) -> Segment:
    """The segment of a path that holds a place in the sequence."""
    return next(segment for segment, stop in path if place < stop)


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """With how many equal items two sequences begin."""
    low, high = 0, min(len(first), len(second))
    if first[:high] == second[:high]:
        return high
    # The first `low` are equal, the first `high` are not.
    while high - low > 1:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low


def plan_batches(lengths: Sequence[int], batch_size: int | None, max_tokens: int) -> list[list[int]]:
    """Rows grouped for forward passes, longest first; rows of length 0 are left out.

    A group holds at most `batch_size` rows, and `max_tokens` tokens when padded to its longest row; a longer
    row is alone.
    """
    order = sorted((row for row, length in enumerate(lengths) if length), key=lambda row: -lengths[row])
    batches: list[list[int]] = []
    for row in order:
        current = batches[-1] if batches else []
        fits = current and (len(current) + 1) * lengths[current[0]] <= max_tokens
        if fits and (batch_size is None or len(current) < batch_size):
            current.append(row)
        else:
            batches.append([row])
    return batches
