"""What a server's answers to `GET /v1/models` and `POST /pooling` say; for `RemoteVerifier`."""

from __future__ import annotations

import math
from typing import Any

from .processing_prm import EncodedSolution

# By how much a row's probabilities may miss a sum of 1: float16 and bfloat16 do by less.
_SUM_TOLERANCE = 0.02

Rows = list[list[float | None]]


class NotFiniteError(ValueError):
    """A row with NaN or an infinite number."""


class RowsError(ValueError):
    """Rows that do not belong to the solution that was sent."""


def read_models(answer: Any) -> dict[str, int | None]:
    """The names of the models in an answer to `/v1/models`, with the most tokens they take."""
    models: dict[str, int | None] = {}
    for model in answer["data"]:
        name, limit = model["id"], model.get("max_model_len")
        if not isinstance(name, str) or not isinstance(limit, int | None):
            raise TypeError("a model's id must be a string, and its max_model_len a number")
        models[name] = limit
    return models


def read_rows(answer: Any) -> Rows:
    """The rows in an answer to `/pooling` about one input."""
    (item,) = answer["data"]
    rows = item["data"]
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise TypeError("data must be a list of rows")
    for row in rows:
        for value in row:
            # NaN, which JSON lacks, comes as null from some servers.
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise TypeError(f"a row must hold numbers, got {value!r:.40}")
    return rows


def rows_of_steps(rows: Rows, item: EncodedSolution, separator_token_id: int | None, score_offset: int) -> Rows:
    """The S rows of the steps, out of a row a token, a row a separator or a row a step.

    Raises:
        RowsError: there are not as many rows as any of these.
    """
    if len(rows) == len(item.input_ids):
        return [rows[position] for position in item.step_positions]
    if len(rows) == len(item.step_positions):
        return rows
    if score_offset == 0:
        # A separator that is ordinary text may stand within steps too.
        marks = [index for index, token_id in enumerate(item.input_ids) if token_id == separator_token_id]
        by_position = dict(zip(marks, rows, strict=False))
        if len(rows) == len(marks) and by_position.keys() >= set(item.step_positions):
            return [by_position[position] for position in item.step_positions]
    raise RowsError(
        f"got {len(rows)} rows for {len(item.step_positions)} steps of {len(item.input_ids)} tokens, and a row a step "
        f"or a row a token is needed; serve with step_tag_id {separator_token_id} in the pooler's config, or without "
        "any, and the checkpoint that this processor belongs to"
    )


def read_probability(row: list[float | None]) -> float:
    """P(correct) of one row: `[p_wrong, p_right]`, or `[p_right]`.

    Raises:
        NotFiniteError: a number is not finite.
        RowsError: the row holds no probabilities.
    """
    values = [float("nan") if value is None else float(value) for value in row]
    if not all(map(math.isfinite, values)):
        raise NotFiniteError
    total_is_one = len(values) == 1 or abs(sum(values) - 1.0) <= _SUM_TOLERANCE
    if len(values) not in (1, 2) or not total_is_one or not all(0.0 <= value <= 1.0 for value in values):
        raise RowsError(
            f"a row of {len(values)} starts with {[round(value, 4) for value in values[:4]]}, and "
            "[p_wrong, p_right] or [p_right] is needed; serve a PRM, with the activation of its pooler on"
        )
    return values[-1]
