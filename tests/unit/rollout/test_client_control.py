"""Health, weights and other control requests of the client, against a scripted server."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from megatron_scope.errors import RolloutError, SyncError
from megatron_scope.rollout.client import ServerClient, Unhealthy
from tests.unit.rollout.fake_server import FAST, Fake, Handler, answering, dropping, hanging


def on_fake(test: Callable[[ServerClient], Awaitable[Any]], **handlers: Handler) -> Fake:
    async def run() -> Fake:
        async with Fake(**handlers) as fake, ServerClient(fake.url, vocab_size=10, options=FAST) as client:
            await test(client)
            return fake

    return asyncio.run(run())


def test_waiting_for_health() -> None:
    states = iter([503, 503, 200])

    async def starting(request: web.Request) -> web.Response:
        return web.Response(status=next(states))

    on_fake(lambda client: client.wait_healthy(5), health=starting)
    with pytest.raises(RolloutError, match=r"not healthy after 0\.1 s \(HTTP 503\)"):
        on_fake(lambda client: client.wait_healthy(0.1), health=answering("", 503))


def test_new_weights_are_told_by_folder_and_version() -> None:
    done = answering({"success": True, "message": "ok", "num_paused_requests": 0})
    fake = on_fake(
        lambda client: client.update_weights_from_disk("/w", 4),
        update_weights_from_disk=done,
    )
    assert fake.bodies[0]["model_path"] == "/w" and fake.bodies[0]["weight_version"] == "4"


@pytest.mark.parametrize(
    ("update", "said"),
    [
        ({"success": False, "message": "shape"}, "did not take /w: shape"),
        ({}, "did not take /w"),
        (3, "expected a JSON object"),
    ],
)
def test_weights_that_did_not_arrive_are_a_sync_error(update: Any, said: str) -> None:
    with pytest.raises(SyncError, match=said):
        on_fake(
            lambda client: client.update_weights_from_disk("/w", 4),
            update_weights_from_disk=answering(update),
        )


@pytest.mark.parametrize(
    ("handler", "said"),
    [
        (answering({"success": False, "message": "gone"}, 400), "gone"),
        (dropping, "no connection after 3 attempts"),
        (answering("", 503), "HTTP 503: $"),
    ],
)
def test_a_failed_update_is_a_sync_error(handler: Handler, said: str) -> None:
    with pytest.raises(SyncError, match=said):
        on_fake(lambda client: client.update_weights_from_disk("/w", 4), update_weights_from_disk=handler)


def test_a_control_request_whose_connection_failed_is_tried_again() -> None:
    calls: list[int] = []

    async def flaky(request: web.Request) -> web.StreamResponse:
        calls.append(1)
        return await (dropping if len(calls) < 3 else answering(""))(request)

    on_fake(lambda client: client.abort_all(), abort_request=flaky)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("handler", "reason", "silent"),
    [
        (answering("", 503), "HTTP 503", False),
        (dropping, "Server disconnected", False),
        (hanging, "no answer to GET /health within 0.1 s", True),
    ],
)
def test_a_hung_server_is_told_from_a_dead_one(handler: Handler, reason: str, silent: bool) -> None:
    async def run() -> Unhealthy | None:
        options = dataclasses.replace(FAST, probe_timeout_s=0.1)
        async with (
            Fake(health=handler) as fake,
            ServerClient(fake.url, vocab_size=10, options=options) as client,
        ):
            return await client.health()

    assert asyncio.run(run()) == Unhealthy(reason, silent=silent)


# ---- a step of a weight update


def step(client: ServerClient, limit_s: float = 5.0) -> Awaitable[Any]:
    return client.control("/begin_weight_update", {"a": 1}, limit_s=limit_s)


@pytest.mark.parametrize("before", ["health", "step"])
def test_a_step_is_not_sent_again_after_an_exchange_on_a_connection_that_stays_open(before: str) -> None:
    """A server may close such a connection after it has read the request, and done what it says."""
    bodies: list[Any] = []

    async def first_only(request: web.Request) -> web.StreamResponse:
        bodies.append(await request.json())
        is_first = before == "step" and len(bodies) == 1
        return await (answering({}) if is_first else dropping)(request)

    async def two_exchanges(client: ServerClient) -> None:
        assert await (client.health() if before == "health" else step(client)) in (None, {})
        await step(client)

    with pytest.raises(SyncError, match="the connection broke"):
        on_fake(two_exchanges, begin_weight_update=first_only, health=answering(""))
    assert len(bodies) == (1 if before == "health" else 2)


def test_a_step_of_an_update_is_sent_as_it_is() -> None:
    fake = on_fake(step, begin_weight_update=answering({"success": True, "message": "ok"}))
    assert fake.bodies == [{"a": 1}]


@pytest.mark.parametrize(
    ("handler", "limit_s", "said"),
    [
        (answering({"success": False, "message": "no session"}, 400), 5.0, "HTTP 400: no session"),
        (answering("nothing"), 5.0, "not JSON"),
        (dropping, 5.0, "the connection broke"),
        (hanging, 0.1, r"no answer within 0\.1 s; look at the server, or raise sync\.timeout_s"),
    ],
)
def test_a_step_that_fails_is_a_sync_error_and_is_not_tried_again(
    handler: Handler, limit_s: float, said: str
) -> None:
    bodies: list[Any] = []

    async def counted(request: web.Request) -> web.StreamResponse:
        bodies.append(await request.json())
        return await handler(request)

    with pytest.raises(SyncError, match=rf"/begin_weight_update: .*{said}") as caught:
        on_fake(lambda client: step(client, limit_s), begin_weight_update=counted)
    assert "\n" not in str(caught.value) and len(bodies) == 1
