"""The real ground truth answers, where a data folder lies beside the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_scope.data.jsonl import read_rows

DATA_FOLDER = Path(__file__).resolve().parents[3].parent / "shared" / "data"


@pytest.fixture(scope="session")
def gold_answers() -> dict[str, list[str]]:
    """File name to the distinct maths answers in it, in file order; skips where there is no such folder."""
    if not DATA_FOLDER.is_dir():
        pytest.skip("no data folder ../shared/data beside the repository")
    answers: dict[str, list[str]] = {}
    for path in sorted(DATA_FOLDER.glob("*.jsonl")):
        rows = (row for _, row in read_rows(path))
        found = list(dict.fromkeys(row["answer"] for row in rows if row.get("task") == "math"))
        if found:
            answers[path.name] = found
    if not answers:
        pytest.skip("the data folder ../shared/data holds no maths problems")
    return answers
