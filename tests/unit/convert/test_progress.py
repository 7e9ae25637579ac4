"""Progress in bytes, on a terminal and in a log."""

import pytest

from megatron_scope.convert import progress
from megatron_scope.convert.progress import ByteProgress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_tenth_and_two_seconds_at_most(clock, capsys):
    with ByteProgress("out", 4_000_000_000) as shown:
        for _ in range(40):
            clock[0] += 1.0
            shown.advance(100_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"out  {tenth * 0.4:.2f} of 4.00 GB  100 MB/s" for tenth in range(1, 11)]
    assert shown.done == 4_000_000_000 and shown.seconds == 40.0


def test_what_is_soon_done_says_nothing(clock, capsys):
    with ByteProgress("out", 100) as shown:
        for _ in range(10):
            clock[0] += 0.1
            shown.advance(10)
    assert capsys.readouterr() == ("", "")


def test_nothing_to_do_is_no_error(clock, capsys):
    with ByteProgress("out", 0) as shown:
        clock[0] += 5.0
        shown.advance(0)
    assert shown.done == 0 and capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_with_the_bytes(monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with ByteProgress("out", 2_000_000) as shown:
        shown.advance(1_000_000)
    assert "out" in (text := capsys.readouterr().err) and "1.0/2.0 MB" in text
