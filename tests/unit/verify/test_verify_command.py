import json

import pytest

from megatron_scope.errors import DataError
from megatron_scope.verify import command
from megatron_scope.verify.command import Summary, verify_file


def run(tmp_path, lines, workers=1):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    )
    summary = verify_file(source, target, workers, 10.0)
    return summary, [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]


def row(number, answer="5", response="so \\boxed{5}", **others):
    return {"id": f"p/{number}", "task": "math", "answer": answer, "response": response, **others}


def test_rows_keep_order_and_fields(tmp_path):
    rows = [
        row(0, note="größer", tokens=[1, 2]),
        row(1, response="\\boxed{4}"),
        row(2, answer="x+1", response="\\boxed{1+x}"),
    ]
    rows += [row(3, response=""), row(4, correct="old", error="old")]
    summary, written = run(tmp_path, rows)
    assert summary == Summary(num_rows=5, num_correct=3, num_errors=0)
    assert [r["id"] for r in written] == [r["id"] for r in rows]
    assert [r["correct"] for r in written] == [True, False, True, False, True]
    assert [r["extracted"] for r in written] == ["5", "4", "1+x", None, "5"]
    assert all(r["error"] is None for r in written)
    assert written[0] == {**rows[0], "correct": True, "extracted": "5", "error": None}


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (b'{"id": "p/1", "task": ', "line 3: not JSON: Expecting value at column 22"),
        (b"\xff\xfe", "line 3: not UTF-8 text (byte 1 of the line)"),
        (["p/1"], "line 3: expected a JSON object {...}, got a list"),
        (b'{"id": NaN}', "line 3: not JSON: NaN is no JSON value; write null"),
        (b"[" * 100_000, "line 3: nested too deeply to be read"),
        (
            {"id": "p/1", "task": "math"},
            "line 3: no field 'answer', 'response'; a row is {id, task, answer, response}",
        ),
        (row(1, answer=5), "line 3: 'answer' is a number, expected text in quotes"),
        (row(1, response=None), "line 3: 'response' is null, expected text in quotes"),
        (row(1) | {"id": []}, "line 3: 'id' is a list, expected text or a number"),
        (row(1) | {"task": "poetry"}, "unknown task 'poetry'; known: math"),
        (row(1) | {"task": "code"}, "task 'code' is not built yet; known: math"),
    ],
)
def test_a_bad_row_is_reported_and_the_rest_still_judged(tmp_path, bad, error):
    summary, written = run(tmp_path, [row(0), b"  ", bad, row(2)])
    assert summary == Summary(num_rows=3, num_correct=2, num_errors=1)
    assert [r["correct"] for r in written] == [True, False, True]
    assert written[1]["error"] == error and written[1]["extracted"] is None
    if isinstance(bad, dict):
        assert written[1] == bad | {"correct": False, "extracted": None, "error": error}


def test_text_that_is_no_unicode_passes_through(tmp_path):
    _, written = run(tmp_path, [row(0, response="\ud800 \\boxed{5}", note="\u2028")])
    assert written[0]["response"] == "\ud800 \\boxed{5}" and written[0]["correct"]


def test_only_a_bounded_number_of_rows_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "MAX_ROWS_IN_FLIGHT", 3)
    summary, written = run(tmp_path, [row(i, answer="x+1", response=f"\\boxed{{{i}+x}}") for i in range(20)])
    assert [r["correct"] for r in written] == [i == 1 for i in range(20)] and summary.num_correct == 1


def test_empty_input_gives_empty_output(tmp_path):
    assert run(tmp_path, []) == (Summary(0, 0, 0), [])


def test_missing_input_leaves_no_output(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl: cannot be read: No such file"):
        verify_file(tmp_path / "nowhere.jsonl", tmp_path / "out.jsonl", 1, 10.0)
    assert list(tmp_path.iterdir()) == []


def test_input_may_be_the_output(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row(0)))
    assert verify_file(path, path, 1, 10.0).num_correct == 1
    assert verify_file(str(path), str(path), 1, 10.0) == Summary(1, 1, 0)


def test_a_file_of_mostly_bad_rows_is_judged_line_by_line(tmp_path):
    lines = [
        row(0),
        bytes(range(1, 10)) + bytes(range(11, 256)),
        b"\x00" * 1000,
        row(1, answer="x+1", response="\\boxed{1+x}"),
        b"{" * 5000,
        b'"' + b"a" * 3_000_000,
        row(2, response="7 " * 1_000_000 + "\\boxed{5}"),
        b'{"id": "p/3", "task": "math", "answer": 1e999, "response": "5"}',
        b'{"id": -Infinity}',
        row(0, response="\\boxed{4}"),
        b"null",
        row(4, response="\\boxed{" * 100_000),
        row(5),
    ]
    summary, written = run(tmp_path, lines)
    good = {1, 4, 7, 10, 12, 13}
    assert [number for number, r in enumerate(written, start=1) if r["error"] is None] == sorted(good)
    for number, r in enumerate(written, start=1):
        assert number in good or r["error"].startswith(f"line {number}: "), r["error"]
    assert [number for number, r in enumerate(written, start=1) if r["correct"]] == [1, 4, 7, 13]
    assert summary == Summary(num_rows=13, num_correct=4, num_errors=7)


def test_samples_of_one_problem_may_share_its_id(tmp_path):
    summary, written = run(tmp_path, [row(0), row(0, response="\\boxed{4}"), row(0)])
    assert [r["correct"] for r in written] == [True, False, True] and summary.num_errors == 0
