"""What became of the rows of a data source."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class ReadReport:
    """What became of the rows that were read.

    Attributes:
        source: What was read: the path or the Hub dataset.
        format: The format's name.
        num_rows: Rows read; blank lines are none.
        num_kept: Rows that gave their records, dropped duplicates included.
        left_out: Number of rows by reason that were read well and say themselves that they are not to be used.
        num_records: Records returned. A row can give more than one.
        num_duplicates: Records dropped since an equal one came before.
        num_contradictory: Records kept although an earlier one labels the same solution otherwise;
            counted for formats with `drop_duplicates`.
        rejected: Number of rejected rows by reason.
        record_sources: File and number of the row that each record came from, in the records' order;
            numbers as in `trainer.data_files.SourceRow`.
        label_codes: For a format of several label codes, those that were found, each with the first row's place.
    """

    source: str
    format: str
    num_rows: int = 0
    num_kept: int = 0
    num_records: int = 0
    num_duplicates: int = 0
    num_contradictory: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    record_sources: list[tuple[str, int]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    label_codes: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """One line: `kept K of N rows: ...`, with the reasons."""
        parts = [f"{self.num_records} records"]
        parts += [f"{count} rejected: {reason}" for reason, count in self.rejected.most_common()]
        parts += [f"{count} left out: {reason}" for reason, count in self.left_out.most_common()]
        if self.num_duplicates:
            parts.append(f"{self.num_duplicates} duplicate records dropped")
        if self.num_contradictory:
            parts.append(f"{self.num_contradictory} records label an earlier solution otherwise")
        details = "; ".join(parts)
        return f"{self.source} ({self.format}): kept {self.num_kept} of {self.num_rows} rows: {details}"
