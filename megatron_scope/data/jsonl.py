"""JSON lines, read with line numbers in every complaint and written so that no half file ever shows."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from megatron_scope.errors import DataError

UTF8_MARK = b"\xef\xbb\xbf"


def read_rows(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, row) of a JSON-lines file in UTF-8, blank lines skipped, one line in memory.

    Raises DataError (`path:line: what is wrong`) for a file that cannot be read and at the first line that is
    not a JSON object.
    """
    for line_number, line in read_lines(path):
        yield line_number, parse_row(line, where=f"{path}:{line_number}")


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, undecoded line) of the lines that are not blank; DataError if unreadable."""
    try:
        with open(path, "rb") as file:
            # Bytes, because text mode fails for the whole file at the first byte that is not UTF-8.
            for line_number, line in enumerate(file, start=1):
                content = (line.removeprefix(UTF8_MARK) if line_number == 1 else line).strip()
                if content:
                    yield line_number, content
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def parse_row(line: bytes, *, where: str) -> dict[str, Any]:
    """The JSON object in `line`; DataError if it is none, with a message that `where` (path, line) opens."""
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite_float)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    except RecursionError:
        raise DataError(f"{where}: nested too deeply to be read") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object {{...}}, got {json_type(row)}")
    return row


def write_rows_atomically(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object a line (UTF-8) beside `path`, then rename; returns the number of rows.

    Whatever fails, an error raised by `rows` included, the old file (or none) is left as it was. Raises
    DataError for a row that JSON cannot hold (NaN and infinity are not JSON: write null) and if the disk
    refuses.
    """
    path = Path(path)
    # A name of its own beside the target: a rename is atomic only inside one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    num_rows = 0
    with _blamed_on(path):
        file = open(temporary, "xb")  # noqa: SIM115 (closed below, where its failure is told apart)
    try:
        try:
            for row in rows:
                num_rows += 1
                line = _encode_row(row, where=f"{path}: row {num_rows}")
                with _blamed_on(path):
                    file.write(line)
            with _blamed_on(path):
                file.flush()
                os.fsync(file.fileno())
        finally:
            # On a full disk closing fails once more, and would hide the error that names the file.
            with contextlib.suppress(OSError):
                file.close()
        with _blamed_on(path):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return num_rows


def without_nan(value: Any) -> Any:
    """`value` with null for every NaN and infinity inside of mappings, lists and tuples: JSON has none."""
    if isinstance(value, Mapping):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_type(value: Any) -> str:
    """What JSON calls a value, for messages."""
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _encode_row(row: Mapping[str, Any], *, where: str) -> bytes:
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{where} cannot be written as JSON: {error}") from error
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:
        # A lone surrogate, as a broken byte-level detokenisation leaves it: only its escape is valid UTF-8.
        return json.dumps(row, ensure_ascii=True, allow_nan=False).encode() + b"\n"


@contextlib.contextmanager
def _blamed_on(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error


def _finite_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits[:40]} is beyond 1.8e308; write it as text in quotes")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value; write null")
