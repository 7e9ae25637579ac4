"""The real ground truth answers, where a data folder lies beside the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_scope.data.jsonl import read_rows

DATA_FOLDER = Path(__file__).resolve().parents[3].parent / "shared" / "data"


@pytest.fixture(scope="session")
def gold_rows() -> dict[str, dict[str, str]]:
    """File name to the answer of each maths problem in it, by id; skips where there is no such folder."""
    if not DATA_FOLDER.is_dir():
        pytest.skip("no data folder ../shared/data beside the repository")
    files = {
        path.name: {row["id"]: row["answer"] for _, row in read_rows(path) if row.get("task") == "math"}
        for path in sorted(DATA_FOLDER.glob("*.jsonl"))
    }
    files = {name: rows for name, rows in files.items() if rows}
    if not files:
        pytest.skip("the data folder ../shared/data holds no maths problems")
    return files


@pytest.fixture(scope="session")
def gold_answers(gold_rows: dict[str, dict[str, str]]) -> dict[str, list[str]]:
    """File name to the distinct maths answers in it, in file order."""
    return {name: list(dict.fromkeys(rows.values())) for name, rows in gold_rows.items()}
