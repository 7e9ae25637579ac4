"""Writing in the background: in order, bounded, and every error is seen."""

import os
import threading

import pytest

from megatron_scope.convert import background
from megatron_scope.convert.background import BackgroundWriter


@pytest.fixture
def file(tmp_path):
    with open(tmp_path / "file", "wb", buffering=0) as file:
        yield file


def test_writes_are_made_in_order_and_are_there_at_the_end(file, tmp_path):
    with BackgroundWriter() as writer:
        for number in range(50):
            writer.write(file, lambda data=bytes([number]): file.write(data), 1)
        writer.finish(file)
    assert file.closed and (tmp_path / "file").read_bytes() == bytes(range(50))


def test_at_most_one_write_waits(file):
    """So that memory holds no more than a block or two."""
    go, started = threading.Event(), []

    def slow():
        started.append(threading.get_ident())
        go.wait(60)

    with BackgroundWriter() as writer:
        writer.write(file, slow, 1)  # returns while it is written
        caller = threading.Thread(target=writer.write, args=(file, slow, 1))
        caller.start()
        caller.join(0.05)
        assert caller.is_alive()  # the second one waits for the first
        go.set()
        caller.join(60)
        writer.finish(file)
    assert len(started) == 2 and threading.get_ident() not in started


@pytest.mark.parametrize("where", ["write", "finish"])
def test_an_error_is_raised_by_the_next_call(file, where):
    def fail():
        raise OSError(28, os.strerror(28))

    with BackgroundWriter() as writer:
        writer.write(file, fail, 1)
        with pytest.raises(OSError, match=r"No space left on device: '.*/file'"):
            if where == "write":
                writer.write(file, lambda: None, 1)
            else:
                writer.finish(file)


def test_an_error_that_names_a_file_keeps_it(file):
    def fail():
        raise OSError(28, os.strerror(28), "another")

    with BackgroundWriter() as writer:
        writer.write(file, fail, 1)
        with pytest.raises(OSError, match="'another'"):
            writer.finish(file)


def test_an_error_of_the_disk_is_raised_at_the_end(file, monkeypatch):
    def fail(descriptor):
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(background, "_FLUSH_BYTES", 10)
    monkeypatch.setattr(background.os, "fdatasync", fail)
    with BackgroundWriter() as writer:
        writer.write(file, lambda: file.write(b"x" * 10), 10)
        with pytest.raises(OSError, match=r"Input/output error: '.*/file'"):
            writer.finish(file)


def test_long_files_reach_the_disk_while_they_are_written(file, monkeypatch):
    flushed = []
    monkeypatch.setattr(background, "_FLUSH_BYTES", 10)
    monkeypatch.setattr(background.os, "fdatasync", flushed.append)
    with BackgroundWriter() as writer:
        for _ in range(10):
            writer.write(file, lambda: file.write(b"12345"), 5)
        writer.finish(file)
    assert len(flushed) == 5


def test_a_finished_file_is_on_the_disk(file, monkeypatch):
    flushed = []
    monkeypatch.setattr(background.os, "fsync", flushed.append)
    descriptor = file.fileno()
    with BackgroundWriter() as writer:
        writer.write(file, lambda: file.write(b"x"), 1)
        writer.finish(file)
    assert flushed == [descriptor]


def test_leaving_waits_for_the_write_at_hand(file, tmp_path):
    go = threading.Event()

    def slow():
        go.wait(60)
        file.write(b"whole")

    threading.Timer(0.05, go.set).start()
    with pytest.raises(ZeroDivisionError), BackgroundWriter() as writer:
        writer.write(file, slow, 5)
        raise ZeroDivisionError
    assert (tmp_path / "file").read_bytes() == b"whole"
