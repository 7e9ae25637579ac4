"""The verify command: judge every row of a JSON-lines file."""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from megatron_scope.data.jsonl import json_type, parse_row, read_lines, write_rows_atomically
from megatron_scope.errors import DataError
from megatron_scope.records import Verdict
from megatron_scope.verify.pool import VerifierPool

# Rows held in memory at once: enough that one answer at its time limit does not starve the workers.
MAX_ROWS_IN_FLIGHT = 256
TEXT_FIELDS = ("task", "answer", "response")


@dataclasses.dataclass(frozen=True)
class Summary:
    """Rows written, correct ones, and those with an error (bad rows, answers that could not be judged)."""

    num_rows: int
    num_correct: int
    num_errors: int


def verify_file(
    input_path: str | os.PathLike[str], output_path: str | os.PathLike[str], workers: int, timeout_s: float
) -> Summary:
    """Write each row {id, task, answer, response, ...} again with `correct`, `extracted` and `error` added.

    Rows keep their order. A row that is not JSON, lacks a field or holds a wrong type is written too, as
    incorrect with an error that names its line, and the rest is still judged. The output appears whole or not
    at all. Raises DataError for an input that cannot be read or an output that cannot be written, ConfigError
    as VerifierPool does.
    """
    counts = {"rows": 0, "correct": 0, "errors": 0}
    with VerifierPool(workers, timeout_s) as pool:
        write_rows_atomically(output_path, _counted(_judged_rows(input_path, pool), counts))
    return Summary(num_rows=counts["rows"], num_correct=counts["correct"], num_errors=counts["errors"])


def _judged_rows(input_path: str | os.PathLike[str], pool: VerifierPool) -> Iterator[dict[str, Any]]:
    in_flight: deque[tuple[dict[str, Any], Future[Verdict]]] = deque()
    for line_number, line in read_lines(input_path):
        in_flight.append(_submitted(line_number, line, pool))
        if len(in_flight) >= MAX_ROWS_IN_FLIGHT:
            yield _with_verdict(*in_flight.popleft())
    while in_flight:
        yield _with_verdict(*in_flight.popleft())


def _submitted(line_number: int, line: bytes, pool: VerifierPool) -> tuple[dict[str, Any], Future[Verdict]]:
    row: dict[str, Any] = {"id": None}
    where = f"line {line_number}"
    try:
        row = parse_row(line, where=where)
        _check_fields(row, where=where)
    except DataError as error:
        future: Future[Verdict] = Future()
        future.set_result(Verdict(False, error=str(error)))
        return row, future
    return row, pool.submit(row["task"], row["answer"], row["response"])


def _check_fields(row: dict[str, Any], *, where: str) -> None:
    missing = [name for name in ("id", *TEXT_FIELDS) if name not in row]
    if missing:
        raise DataError(
            f"{where}: no field {', '.join(map(repr, missing))}; a row is {{id, task, answer, response}}"
        )
    if not isinstance(row["id"], (str, int)) or isinstance(row["id"], bool):
        raise DataError(f"{where}: 'id' is {json_type(row['id'])}, expected text or a number")
    for name in TEXT_FIELDS:
        if not isinstance(row[name], str):
            raise DataError(f"{where}: {name!r} is {json_type(row[name])}, expected text in quotes")


def _with_verdict(row: dict[str, Any], future: Future[Verdict]) -> dict[str, Any]:
    return {**row, **dataclasses.asdict(future.result())}


def _counted(rows: Iterator[dict[str, Any]], counts: dict[str, int]) -> Iterator[dict[str, Any]]:
    for row in rows:
        counts["rows"] += 1
        counts["correct"] += row["correct"]
        counts["errors"] += row["error"] is not None
        yield row
