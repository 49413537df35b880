"""Monte Carlo counts read as soft and as hard labels."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.formats import READERS

ROW = {"problem": "?", "steps": ["a", "b", "c"], "successes": [4, 1, 0], "rollouts": [4, 4, 4]}


def labels(format: str, **changes: Any) -> list[float]:
    (record,) = READERS[format].read({**ROW, **changes})
    assert (record.problem, record.steps) == ("?", ("a", "b", "c"))
    return list(record.labels)


def test_soft_is_the_share_and_hard_is_any() -> None:
    assert labels("rollouts_soft") == [1.0, 0.25, 0.0]
    assert labels("rollouts_hard") == [1.0, 1.0, 0.0]


def test_a_step_without_a_rollout_has_no_label_and_labels_are_not_read() -> None:
    for format in ("rollouts_soft", "rollouts_hard"):
        assert labels(format, rollouts=[4, 4, 0], labels=["nonsense"])[2] == -100.0
        assert not READERS[format].found_by_columns


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"successes": [5, 1, 0]}, "successes must be from 0 to the rollouts: got 5 of 4"),
        ({"successes": [-1, 1, 0]}, "got -1 of 4"),
        ({"successes": [1, 0]}, "as many successes as rollouts are needed: got 2 and 3"),
        ({"successes": [1], "rollouts": [1]}, "as many labels as steps"),
        ({"successes": [True, 1, 0]}, "successes must be an integer"),
        ({"rollouts": None}, "rollouts must be a list"),
    ],
)
def test_counts_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        labels("rollouts_soft", **changes)
