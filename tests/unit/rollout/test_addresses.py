"""The servers' addresses from a file that changes."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest

from megatron_scope.errors import ConfigError
from megatron_scope.records import Rollout
from megatron_scope.rollout.addresses import AddressBook
from tests.unit.rollout.pool_server import OPTIONS, Collected, PoolServer, group_requests, staged


def test_a_file_has_a_url_a_line_and_comments(tmp_path: Path) -> None:
    file = tmp_path / "servers"
    file.write_text("# rack 1\nhttp://a:1/\n\nhttps://b:2  # slow\nhttp://a:1\n")
    assert AddressBook(file=file).urls == ("http://a:1", "https://b:2")
    assert AddressBook(["http://a:1/"]).urls == ("http://a:1",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("", "has no address"),
        ("# none yet\n", "has no address"),
        ("http://a:1\nb:2\n", "has 'b:2'; expected one server URL a line"),
    ],
)
def test_a_bad_file_is_refused_at_the_start(text: str | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "servers"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=rf"rollout.servers_file {file} .*{said}"):
        AddressBook(file=file)


def test_a_change_counts_when_it_was_seen_twice(tmp_path: Path) -> None:
    file = tmp_path / "servers"
    file.write_text("http://a:1\nhttp://b:2\n")
    book = AddressBook(file=file)
    file.write_text("http://a:1\nhttp://c:3")  # as it might be caught in the middle of being written
    assert book.look() is None and book.urls == ("http://a:1", "http://b:2")
    file.write_text("http://a:1\nhttp://c:30\n")
    assert book.look() is None and book.urls == ("http://a:1", "http://b:2")
    assert book.look() is None and book.urls == ("http://a:1", "http://c:30")


@pytest.mark.parametrize("text", ["", "http://a:1\nhtt", None])
def test_an_empty_or_broken_file_changes_nothing_and_is_told_once(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "servers"
    file.write_text("http://a:1\n")
    book = AddressBook(file=file)
    file.unlink() if text is None else file.write_text(text)
    trouble = book.look()
    assert trouble is not None and trouble.endswith("the servers stay as they were")
    assert book.look() is None and book.look() is None and book.urls == ("http://a:1",)
    file.write_text("http://b:2\n")
    assert book.look() is None and book.look() is None and book.urls == ("http://b:2",)


def test_a_new_server_joins_in_mid_step_with_current_weights_and_a_removed_one_is_drained(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        file = tmp_path / "servers"
        removed, kept, new = (PoolServer(delay_s=0.02) for _ in range(3))
        async with staged(removed, kept, file=file) as stage:
            await new.start()
            requests, collected = group_requests(100, 2), Collected()
            asked_at_the_end: list[int] = []

            async def take(rollout: Rollout) -> None:
                await collected.take(rollout)
                if len(collected) == 8:
                    file.write_text(f"{kept.url}\n{new.url}\n")
                if new.asked and not asked_at_the_end:
                    asked_at_the_end.append(len(removed.asked))

            await stage.run(requests, take)
            collected.check(requests)
            assert new.updates == ["1"] and new.asked
            # What it had been asked it answered, and little was sent before the change was seen.
            assert removed.now == 0 and len(removed.asked) <= asked_at_the_end[0] + OPTIONS.max_concurrent
            await stage.publish(2)
            assert removed.updates == ["1"] and new.updates == ["1", "2"] and kept.updates == ["1", "2"]
            assert [member.url for member in stage.pool._roster.members] == [kept.url, new.url]
            await new.kill()

    asyncio.run(run())


def test_a_server_that_is_removed_while_it_hangs_holds_nothing_up(tmp_path: Path) -> None:
    async def run() -> None:
        file = tmp_path / "servers"
        async with staged(PoolServer(delay_s=0.02), PoolServer(delay_s=0.02), file=file) as stage:
            hung, kept = stage.servers
            requests, collected = group_requests(20, 2), Collected()

            async def take(rollout: Rollout) -> None:
                await collected.take(rollout)
                if len(collected) == 4:
                    hung.hang()
                    file.write_text(f"{kept.url}\n")

            await stage.run(requests, take)
            collected.check(requests)

    asyncio.run(run())


def test_a_file_that_is_emptied_in_mid_step_takes_no_server_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def run() -> None:
        file = tmp_path / "servers"
        options = dataclasses.replace(OPTIONS, health_interval_s=0.02)
        async with staged(PoolServer(delay_s=0.02), file=file, options=options) as stage:
            file.write_text("")
            await stage.collect(group_requests(20, 2))

    asyncio.run(run())
    assert capsys.readouterr().err.count("has no address") == 1
