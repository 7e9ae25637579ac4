"""A step's rollouts in whatever order they finish: taken in parts, kept in order, errors passed on."""

from __future__ import annotations

import asyncio

import pytest

from megatron_scope.controller.arrivals import Arrivals, Arrive, Placed
from megatron_scope.errors import RolloutError
from tests.unit.controller.judged import judged


class Script:
    """A source whose rollouts a test lets go one after another; each has three response tokens."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[int | Exception | None] = asyncio.Queue()
        self.has_ended = False

    def say(self, *places: int | Exception | None) -> None:
        for place in places:
            self.queue.put_nowait(place)

    async def produce(self, arrive: Arrive) -> None:
        try:
            while (place := await self.queue.get()) is not None:
                if isinstance(place, Exception):
                    raise place
                arrive(place, judged("p", place))
        finally:
            self.has_ended = True


def places(taken: tuple[list[Placed], bool]) -> tuple[list[int], bool]:
    return [place for place, _ in taken[0]], taken[1]


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_what_has_arrived_is_taken_once_in_order_and_before_the_rest_is_there():
    async def run() -> None:
        script = Script()
        arrivals = Arrivals(script.produce)
        script.say(4, 0, 2)
        await settle()
        assert places(await arrivals.take(1)) == ([0, 2, 4], False)
        waiting = asyncio.create_task(arrivals.take(5))
        script.say(3)
        await settle()
        assert not waiting.done()  # three tokens of five
        script.say(1)
        assert places(await waiting) == ([1, 3], False)
        script.say(None)
        assert places(await arrivals.take(1)) == ([], True)
        assert [item.rollout.sample for item in arrivals.judged()] == [0, 1, 2, 3, 4]

    asyncio.run(run())


def test_without_a_number_of_tokens_the_step_is_one_part():
    async def run() -> None:
        script = Script()
        arrivals = Arrivals(script.produce)
        waiting = asyncio.create_task(arrivals.take(None))
        for place in (2, 0, 1):
            script.say(place)
            await settle()
            assert not waiting.done()
        script.say(None)
        assert places(await waiting) == ([0, 1, 2], True)

    asyncio.run(run())


def test_an_error_of_the_source_reaches_who_waits_and_who_asks_later():
    async def run() -> None:
        script = Script()
        arrivals = Arrivals(script.produce)
        waiting = asyncio.create_task(arrivals.take(100))
        script.say(0, RolloutError("all servers are gone"))
        with pytest.raises(RolloutError, match="all servers are gone"):
            await waiting
        with pytest.raises(RolloutError, match="all servers are gone"):
            await arrivals.take(None)
        await arrivals.stop()

    asyncio.run(run())


def test_stopping_ends_the_source():
    async def run() -> None:
        script = Script()
        arrivals = Arrivals(script.produce)
        script.say(0)
        await settle()
        await arrivals.stop()
        assert script.has_ended

    asyncio.run(run())
