import json
import os

import pytest

from megatron_scope.data.jsonl import read_rows, without_nan, write_rows_atomically
from megatron_scope.errors import DataError


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"id": 1, "text": "größer\n\u2028 \x85 \ud800"}, {}, {"nested": [None, True, 1.5, {"a": "b"}]}]
    assert write_rows_atomically(path, rows) == 3
    assert list(read_rows(path)) == [(1, rows[0]), (2, rows[1]), (3, rows[2])]
    assert "größer" not in path.read_text() and json.loads(path.read_text().split("\n")[0]) == rows[0]


def test_plain_text_is_written_as_utf8(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows_atomically(path, [{"text": "größer"}])
    assert path.read_bytes() == '{"text": "größer"}\n'.encode()


def test_blank_lines_are_skipped_and_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert list(read_rows(path)) == [(1, {"a": 1}), (4, {"a": 2})]


def test_an_empty_file_has_no_rows(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    assert list(read_rows(tmp_path / "rows.jsonl")) == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"a": }', "not JSON: Expecting value at column 7"),
        (b'{"a": 1} {"a": 2}', "not JSON: Extra data at column 10"),
        (b"3", "expected a JSON object {...}, got a number"),
        (b"null", "expected a JSON object {...}, got null"),
        (b'{"a": Infinity}', "not JSON: Infinity is no JSON value; write null"),
        (b'{"a": "\xe4"}', "not UTF-8 text (byte 8 of the line)"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, problem):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b'\n{"a": 3}\n')
    rows = read_rows(path)
    assert next(rows) == (1, {"a": 1})
    with pytest.raises(DataError) as error:
        next(rows)
    assert str(error.value).startswith(f"{path}:3: {problem}")


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_an_unreadable_file_is_a_data_error(tmp_path, name):
    with pytest.raises(DataError, match="cannot be read: "):
        next(read_rows(tmp_path / name))


def failing_rows():
    yield {"a": 1}
    raise KeyError("source")


def nan_rows():
    yield {"a": 1}
    yield {"a": float("nan")}


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (failing_rows, KeyError, "source"),
        (nan_rows, DataError, "row 2 cannot be written as JSON"),
        (lambda: [{"a": {1, 2}}], DataError, "row 1 cannot be written as JSON"),
    ],
)
def test_a_failure_leaves_the_old_file_and_no_other(tmp_path, rows, error, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"old": 1}\n')
    with pytest.raises(error, match=message):
        write_rows_atomically(path, rows())
    assert path.read_text() == '{"old": 1}\n'
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_nothing_shows_before_the_last_row(tmp_path):
    path = tmp_path / "rows.jsonl"

    def rows():
        for number in range(3):
            assert not path.exists()
            yield {"number": number}

    write_rows_atomically(path, rows())
    assert len(list(read_rows(path))) == 3


def test_the_file_gets_ordinary_permissions(tmp_path):
    (tmp_path / "ordinary").touch()
    write_rows_atomically(tmp_path / "rows.jsonl", [])
    assert (tmp_path / "rows.jsonl").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_is_a_data_error(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.open", lambda path, mode, real=open: real("/dev/full", "wb"))
    with pytest.raises(DataError, match=r"rows\.jsonl: cannot be written: No space left"):
        write_rows_atomically(tmp_path / "rows.jsonl", [{"a": "x" * 100_000}] * 3)


def test_a_missing_folder_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"rows\.jsonl: cannot be written: No such file"):
        write_rows_atomically(tmp_path / "missing" / "rows.jsonl", [])


def test_a_number_that_no_float_holds_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1e308}\n{"a": [-1e309]}\n')
    with pytest.raises(DataError) as raised:
        list(read_rows(path))
    assert str(raised.value) == f"{path}:2: not JSON: -1e309 is beyond 1.8e308; write it as text in quotes"


def test_without_nan_puts_null_for_what_json_does_not_have():
    nan, infinity = float("nan"), float("inf")
    assert without_nan({"a": nan, "b": [1, (infinity, 2.5)], "c": {"d": -infinity}, "e": "nan"}) == {
        "a": None,
        "b": [1, [None, 2.5]],
        "c": {"d": None},
        "e": "nan",
    }
