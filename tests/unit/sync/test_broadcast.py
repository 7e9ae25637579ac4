"""What the servers are told of a broadcast, in which order, and what follows when one fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from megatron_scope.errors import RolloutError, ScopeError, SyncError
from megatron_scope.records import StageTransfer, WeightBucket, WeightTransfer
from megatron_scope.sync import broadcast
from megatron_scope.sync.broadcast import BroadcastDelivery, Groups

BUCKETS = (
    WeightBucket(("a", "b"), ("float32", "float32"), ((2, 3), (4,)), 40),
    WeightBucket(("c",), ("float32",), ((5,),), 20),
)
STAGES = (StageTransfer("g0", BUCKETS), StageTransfer("g1", BUCKETS[1:]))
UPDATE = "/update_weights_from_distributed"


class Scripted:
    """A server that remembers what it was asked, and refuses what it is told to."""

    def __init__(self, url: str, log: list[tuple[str, str, Any]], **info: Any) -> None:
        self.url = url
        self.info = {"tp_size": 1, "pp_size": 1, "dp_size": 1, **info}
        self.model = {"weight_version": "7", "model_path": "/m", "architectures": ["A"]}
        self.refuses: dict[str, int] = {}  # path: times that it is refused
        self.flushes_refused = 0
        self.hangs_at: str | None = None
        self._log = log

    async def server_info(self, failure: type[ScopeError]) -> dict[str, Any]:
        del failure
        return self.info

    async def model_info(self, failure: type[ScopeError]) -> dict[str, Any]:
        del failure
        return self.model

    async def flush(self) -> None:
        self._log.append((self.url, "flush", None))
        if self.flushes_refused:
            self.flushes_refused -= 1
            raise RolloutError("requests are running")

    async def control(self, path: str, body: dict[str, Any], *, limit_s: float) -> dict[str, Any]:
        self._log.append((self.url, path, body))
        if path == self.hangs_at:
            await asyncio.sleep(limit_s)
            raise SyncError(f"{self.url}{path}: no answer within {limit_s:g} s")
        if self.refuses.get(path):
            self.refuses[path] -= 1
            raise SyncError(f"{self.url}{path}: HTTP 400: refused")
        if path == "/update_weight_version":
            self.model["weight_version"] = body["new_version"]
        return {"success": True}


@pytest.fixture
def log() -> list[tuple[str, str, Any]]:
    return []


@pytest.fixture
def servers(log: list[tuple[str, str, Any]]) -> list[Scripted]:
    return [Scripted("http://one", log), Scripted("http://two", log, tp_size=2)]


def transfer(version: int = 8, **changes: Any) -> WeightTransfer:
    fields: dict[str, Any] = {
        "stages": STAGES,
        "rank_offsets": {"http://one": 1, "http://two": 2},
        "world_size": 4,
        "backend": "gloo",
        "master_address": "10.0.0.1",
        "master_port": 1234,
        "new": True,
    }
    return WeightTransfer(version=version, **{**fields, **changes})


def deliver(
    servers: Sequence[Scripted],
    *transfers: WeightTransfer,
    timeout_s: float = 30.0,
    then: Callable[[Groups], Any] | None = None,
) -> dict[str, ScopeError]:
    """Delivers one after another; the failures of the last."""

    async def run() -> dict[str, ScopeError]:
        groups, failures = Groups(), {}
        for one in transfers:
            delivery = BroadcastDelivery(one.version, groups, timeout_s=timeout_s)
            work: asyncio.Task[Any] = asyncio.create_task(delivery.to_all(servers))
            await delivery.meet(work)
            delivery.send(one)
            failures = await work
        if then is not None:
            await then(groups)
        return failures

    return asyncio.run(run())


def paths(log: list[tuple[str, str, Any]], url: str) -> list[str]:
    return [path for server, path, _ in log if server == url]


def test_the_steps_come_in_order_on_every_server(servers, log):
    assert deliver(servers, transfer()) == {}
    expected = [
        *["/init_weights_update_group"] * 2,
        *["/update_weight_version", "/begin_weight_update"],
        *[UPDATE] * 3,
        *["/end_weight_update", "flush", "/update_weight_version"],
    ]
    assert paths(log, "http://one") == paths(log, "http://two") == expected
    bodies = [body for server, path, body in log if server == "http://two" and path != "flush"]
    assert bodies[0] == {
        "master_address": "10.0.0.1",
        "master_port": 1234,
        "rank_offset": 2,
        "world_size": 4,
        "group_name": "g0",
        "backend": "gloo",
    }
    assert bodies[4] == {
        "names": ["a", "b"],
        "dtypes": ["float32", "float32"],
        "shapes": [[2, 3], [4]],
        "group_name": "g0",
        "load_format": "flattened_bucket",
        "flush_cache": False,
    }
    assert [body["group_name"] for body in bodies if "names" in body] == ["g0", "g0", "g1"]
    versions = [body["new_version"] for body in bodies if "new_version" in body]
    assert versions == ["incomplete-8", "8"]


def test_no_server_is_ahead_of_the_others_by_a_bucket(servers, log):
    deliver(servers, transfer())
    updates = [server for server, path, _ in log if path == UPDATE]
    assert all(set(updates[place : place + 2]) == {"http://one", "http://two"} for place in (0, 2, 4))


def test_a_group_lives_until_the_servers_change(servers, log):
    deliver(servers, transfer(8), transfer(9, new=False))
    assert paths(log, "http://one").count("/init_weights_update_group") == 2
    assert "/destroy_weights_update_group" not in paths(log, "http://one")
    log.clear()
    others = (StageTransfer("h0", BUCKETS),)
    deliver(servers, transfer(8), transfer(9, stages=others))
    destroyed = [body["group_name"] for _, path, body in log if path == "/destroy_weights_update_group"]
    assert sorted(destroyed) == ["g0", "g0", "g1", "g1"]


def test_a_failure_leaves_a_version_that_is_neither_the_old_nor_the_new(servers, log):
    servers[1].refuses[UPDATE] = 1
    with pytest.raises(SyncError, match="http://two/update_weights_from_distributed: HTTP 400: refused"):
        deliver(servers, transfer())
    assert {server.model["weight_version"] for server in servers} == {"incomplete-8"}
    for server in servers:
        assert paths(log, server.url)[-3:] == [
            "/destroy_weights_update_group",
            "/destroy_weights_update_group",
            "/end_weight_update",
        ]


def test_a_hung_server_costs_no_more_than_the_time_limit(servers, log, monkeypatch):
    monkeypatch.setattr(broadcast, "CLEAN_UP_S", 0.05)
    servers[0].hangs_at = UPDATE
    with pytest.raises(SyncError, match=r"http://one/update.* no answer within 0\.\d+ s"):
        deliver(servers, transfer(), timeout_s=0.2)


def test_what_is_left_of_the_time_is_the_limit_of_each_step(servers, log):
    with pytest.raises(SyncError, match=r"did not arrive within 0 s; .*raise sync.timeout_s"):
        deliver(servers, transfer(), timeout_s=0.0)


def test_a_session_that_a_dead_trainer_left_open_is_closed_first(servers, log):
    servers[0].refuses["/begin_weight_update"] = 1
    servers[0].refuses["/end_weight_update"] = 1  # it may be refused: what it brought is not whole
    assert deliver(servers, transfer()) == {}
    begun = [
        path for path in paths(log, "http://one") if path in ("/begin_weight_update", "/end_weight_update")
    ]
    assert begun == [
        "/begin_weight_update",
        "/end_weight_update",
        "/begin_weight_update",
        "/end_weight_update",
    ]


def test_a_flush_that_is_refused_for_a_moment_is_asked_again(servers, log, monkeypatch):
    monkeypatch.setattr(broadcast, "FLUSH_POLL_S", 0.0)
    servers[0].flushes_refused = 3
    assert deliver(servers, transfer()) == {}
    assert paths(log, "http://one").count("flush") == 4
    servers[0].flushes_refused = 10**9
    monkeypatch.setattr(broadcast, "FLUSH_S", 0.01)
    with pytest.raises(SyncError, match="requests are running"):
        deliver(servers, transfer())


@pytest.mark.parametrize("info", [{"pp_size": 2}, {"dp_size": 2}, {"tp_size": None}])
def test_a_server_that_cannot_take_part_is_told_apart(servers, log, info):
    servers[1].info.update(info)
    failures = deliver(servers, transfer())
    assert list(failures) == ["http://two"] and "need pp_size 1 and dp_size 1" in str(failures["http://two"])
    assert paths(log, "http://two") == [] and paths(log, "http://one")[-1] == "/update_weight_version"


def test_without_any_server_that_can_the_trainer_hears_why(servers):
    for server in servers:
        server.info["pp_size"] = 2

    async def run() -> None:
        async def publish() -> None:
            failures = await delivery.to_all(servers)
            raise next(iter(failures.values()))

        delivery = BroadcastDelivery(8, Groups(), timeout_s=1.0)
        await delivery.meet(asyncio.create_task(publish()))

    with pytest.raises(SyncError, match="http://one: runs with tp_size 1, pp_size 2"):
        asyncio.run(run())


def test_a_returning_server_waits_for_the_next_version(servers):
    async def run() -> bool:
        delivery = BroadcastDelivery(8, Groups(), timeout_s=1.0)
        assert delivery.can_reach_later is False
        return await delivery.to_one(servers[0])

    assert asyncio.run(run()) is False


def test_the_end_of_a_run_leaves_no_group(servers, log):
    deliver(servers, transfer(), then=lambda groups: groups.destroy())
    assert paths(log, "http://one")[-2:] == ["/destroy_weights_update_group"] * 2


def test_servers_that_also_hang_while_tidying_up_do_not_replace_the_error(servers, monkeypatch):
    """One that is hung answers nothing at all, so its update and each clean-up run into their limits."""
    monkeypatch.setattr(broadcast, "CLEAN_UP_S", 0.1)
    for server in servers:
        server.refuses[UPDATE] = 1
        server.hangs_at = "/destroy_weights_update_group"
    with pytest.raises(SyncError, match="HTTP 400: refused"):
        deliver(servers, transfer())
