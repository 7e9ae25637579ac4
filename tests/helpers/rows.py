"""Rows of metrics.jsonl, to be compared."""

from __future__ import annotations

import math
from typing import Any

TIMED = ("seconds", "tokens_per_second")


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without what depends on the clock."""
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """What does not depend on the clock; NaN for what a step has not (pytest.approx takes no None)."""
    timed = (*TIMED, "scoring_hidden_share")
    return {key: math.nan if value is None else value for key, value in row.items() if key not in timed}
