"""Many requests over several servers: bounds, groups, failures."""

from __future__ import annotations

import asyncio
import copy

import pytest
from aiohttp import web

from megatron_scope.errors import RolloutError
from megatron_scope.records import Prompt, Rollout
from megatron_scope.rollout.client import RolloutRequest, ServerClient, collect
from tests.unit.rollout.fake_server import FAST, GOOD, PARAMS, Fake


class Echo(Fake):
    """Answers with the prompt's last id, after `delay_s`; counts who is inside."""

    def __init__(self, delay_s: float = 0.01) -> None:
        super().__init__(generate=self._echo)
        self.now = self.most = 0
        self._delay_s = delay_s

    async def _echo(self, request: web.Request) -> web.Response:
        ids = (await request.json())["input_ids"]
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(self._delay_s)
        finally:
            self.now -= 1
        if ids[-1] == 9:
            return web.json_response({"error": {"message": "nine"}}, status=400)
        body = copy.deepcopy(GOOD)
        body["output_ids"], body["meta_info"]["output_token_logprobs"] = [ids[-1]], [[-1.0, ids[-1], None]]
        return web.json_response(body)


def group_requests(last_ids: list[int], samples: int = 3) -> list[RolloutRequest]:
    prompts = [
        Prompt(str(place), (0,) * (place + 1) + (last,), "", "math") for place, last in enumerate(last_ids)
    ]
    return [
        RolloutRequest(prompt, sample, sample, f"{prompt.id}/{sample}")
        for prompt in prompts
        for sample in range(samples)
    ]


def gather(fakes: list[Echo], requests: list[RolloutRequest], max_concurrent: int) -> list[Rollout]:
    rollouts: list[Rollout] = []

    async def run() -> None:
        for fake in fakes:
            await fake.__aenter__()
        clients = [ServerClient(fake.url, vocab_size=10, options=FAST) for fake in fakes]
        try:
            await collect(
                clients, requests, PARAMS, max_concurrent=max_concurrent, on_rollout=rollouts.append
            )
            assert all(client.outstanding_tokens == 0 for client in clients)
        finally:
            for client in clients:
                await client.close()
            for fake in fakes:
                await fake.__aexit__()

    asyncio.run(run())
    return rollouts


def test_collect_gives_every_rollout_and_bounds_concurrency() -> None:
    fakes, requests = [Echo(), Echo()], group_requests([1, 2, 3, 4, 5, 6, 7, 8])
    rollouts = gather(fakes, requests, 4)
    assert sorted((r.prompt.id, r.sample) for r in rollouts) == sorted(
        (r.prompt.id, r.sample) for r in requests
    )
    assert all(rollout.output_ids == (rollout.prompt.token_ids[-1],) for rollout in rollouts)
    assert [fake.most for fake in fakes] == [4, 4]


def test_collect_keeps_a_group_on_one_server() -> None:
    fakes = [Echo(), Echo()]
    gather(fakes, group_requests([1, 2, 3, 4, 5, 6]), 100)
    prompts = [{tuple(body["input_ids"]) for body in fake.bodies} for fake in fakes]
    assert not prompts[0] & prompts[1] and [len(one) for one in prompts] == [3, 3]


def test_a_request_that_fails_cancels_the_rest() -> None:
    fake = Echo(delay_s=0.05)
    with pytest.raises(RolloutError, match="HTTP 400: nine"):
        gather([fake], group_requests([9, *[1] * 40]), 3)
    assert len(fake.bodies) <= 12


def test_an_error_of_the_callback_is_raised() -> None:
    def refuse(rollout: Rollout) -> None:
        raise ValueError("full")

    async def run() -> None:
        async with Echo() as fake, ServerClient(fake.url, vocab_size=10) as client:
            await collect([client], group_requests([1, 2]), PARAMS, max_concurrent=2, on_rollout=refuse)

    with pytest.raises(ValueError, match="full"):
        asyncio.run(run())
