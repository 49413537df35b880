"""Dataset formats: for each, one function that makes `StepRecord`s of one row, and a line in `READERS`.

A function raises ValueError or TypeError for a row that it cannot take. The message opens with the kind of
fault in general words, then a colon and the particulars: rejected rows are counted by what stands before
the colon. It raises RowLeftOut for a row that says itself that it is not to be used.
"""

from __future__ import annotations

from .format_parts import Reader, ReaderOptions, Row, RowLeftOut, strip_step_numbers
from .formats_benchmarks import BENCHMARK_READERS
from .formats_messages import MESSAGE_READERS
from .formats_monte_carlo import MONTE_CARLO_READERS
from .formats_plain import PLAIN_READERS
from .formats_prm800k import PRM800K_READERS
from .formats_rollouts import ROLLOUT_READERS
from .formats_tagged import TAGGED_READERS

__all__ = ["READERS", "Reader", "ReaderOptions", "Row", "RowLeftOut", "strip_step_numbers"]

READERS: dict[str, Reader] = {
    reader.name: reader
    for readers in (
        PLAIN_READERS,
        PRM800K_READERS,
        BENCHMARK_READERS,
        TAGGED_READERS,
        MONTE_CARLO_READERS,
        ROLLOUT_READERS,
        MESSAGE_READERS,
    )
    for reader in readers
}
"""All formats by name."""
