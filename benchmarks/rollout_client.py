"""A client process of `rollout.py`: draws responses from one server and says what that took on both sides.

It reads a `Plan` as JSON from stdin and prints a result as JSON. It imports what the controller's side of a
run imports to draw responses, and no torch: a client's memory and the passes of its garbage collector are
those of such a process.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import resource
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import aiohttp  # noqa: E402  (needs the path)
import process_memory  # noqa: E402
import psutil  # noqa: E402

from megatron_scope.config.schema import RolloutConfig  # noqa: E402
from megatron_scope.records import Prompt, Rollout, SamplingParams  # noqa: E402
from megatron_scope.rollout.addresses import AddressBook  # noqa: E402
from megatron_scope.rollout.client import ClientOptions, RolloutRequest, ServerClient  # noqa: E402
from megatron_scope.rollout.delivery import DiskDelivery  # noqa: E402
from megatron_scope.rollout.http import KEEP_ALIVE_S  # noqa: E402
from megatron_scope.rollout.identity import Expectation  # noqa: E402
from megatron_scope.rollout.pool import PoolOptions, ServerPool, Servers  # noqa: E402
from megatron_scope.rollout.wire import generate_body, sample_seed  # noqa: E402

VERSION = 1
POLL_S = 0.1
# A server that is paused on purpose calls itself unhealthy; the pool is not to look meanwhile.
NEVER_S = 3600.0

LIMITS = ClientOptions(request_timeout_s=3600, control_timeout_s=600, probe_timeout_s=30)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to draw, where and how. `kind` names the client: `pool` is ours, `lean` posts the same bodies over
    one session and parses the JSON, no more.

    `holds`: the server is paused until all requests are in it, and responses are dropped as they come.
    """

    kind: str
    url: str
    server_pid: int
    model: str
    vocab: int
    num_prompts: int
    num_samples: int
    prompt_tokens: int
    max_new_tokens: int
    concurrency: int
    holds: bool = False

    def requests(self) -> list[RolloutRequest]:
        """The same ones for the same sizes."""
        rng = random.Random(0)
        prompts = [
            Prompt(
                f"p{place}", tuple(rng.randrange(self.vocab) for _ in range(self.prompt_tokens)), "", "math"
            )
            for place in range(self.num_prompts)
        ]
        return [
            RolloutRequest(prompt, sample, sample_seed(0, 1, prompt.id, sample), f"1/{prompt.id}/{sample}")
            for prompt in prompts
            for sample in range(self.num_samples)
        ]

    def params(self) -> SamplingParams:
        return SamplingParams(1.0, 1.0, -1, self.max_new_tokens, ())


class Server:
    """The process tree of the server, seen from outside."""

    def __init__(self, pid: int) -> None:
        first = psutil.Process(pid)
        self._processes = [first, *first.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """User and system time of all its processes since their start."""
        times = [process.cpu_times() for process in self._processes]
        return sum(one.user + one.system for one in times)

    def reset_peaks(self) -> int:
        """Starts new peaks of memory; returns what is resident now, of all processes."""
        for process in self._processes:
            process_memory.reset_peak(process.pid)
        return self.resident_bytes("VmRSS")

    def resident_bytes(self, field: str) -> int:
        return sum(process_memory.resident_bytes(field, process.pid) for process in self._processes)


class Tally:
    """What came back. Ours keeps the records, as a step does."""

    def __init__(self, *, keeps: bool) -> None:
        self.num_responses = self.num_tokens = 0
        self._kept: list[Rollout] | None = [] if keeps else None

    async def take(self, rollout: Rollout) -> None:
        self.count(len(rollout.output_ids))
        if self._kept is not None:
            self._kept.append(rollout)

    def count(self, num_tokens: int) -> None:
        self.num_responses += 1
        self.num_tokens += num_tokens


Measured = Callable[[Awaitable[None]], Awaitable[None]]


async def draw_by_pool(plan: Plan, requests: list[RolloutRequest], tally: Tally, measured: Measured) -> None:
    """The pool of a run with its own settings."""
    options = PoolOptions(
        max_concurrent=plan.concurrency,
        health_interval_s=NEVER_S if plan.holds else RolloutConfig().health_interval_s,
        start_timeout_s=60.0,
    )
    servers = Servers(
        AddressBook([plan.url]),
        lambda url: ServerClient(url, vocab_size=plan.vocab, options=LIMITS),
        Expectation.of_model(Path(plan.model), any_sglang_version=False),
    )
    pool = ServerPool(servers, options)
    try:
        await pool.publish(DiskDelivery(Path(plan.model), VERSION))
        await measured(pool.run(requests, plan.params(), VERSION, tally.take))
    finally:
        await pool.close()


async def draw_leanly(plan: Plan, requests: list[RolloutRequest], tally: Tally, measured: Measured) -> None:
    """As many open requests as the pool has, no check, no record, no second try."""
    async with ServerClient(plan.url, vocab_size=plan.vocab, options=LIMITS) as client:
        # The pool's publish drops the server's prefix cache too.
        await client.update_weights_from_disk(str(Path(plan.model).absolute()), VERSION)
    # A connection that SGLang has closed in the meantime would end this client, which tries nothing again.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
    async with aiohttp.ClientSession(connector=connector) as session:
        bodies = iter([generate_body(request, plan.params()) for request in requests])

        async def work() -> None:
            for body in bodies:
                async with session.post(f"{plan.url}/generate", json=body) as response:
                    tally.count(len(json.loads(await response.read())["output_ids"]))

        async def run() -> None:
            await asyncio.gather(*(work() for _ in range(plan.concurrency)))

        await measured(run())


DRAW = {"pool": draw_by_pool, "lean": draw_leanly}


async def time_it(plan: Plan) -> dict[str, Any]:
    """Seconds of the wall clock, and of the processors on either side."""
    server, tally, found = Server(plan.server_pid), Tally(keeps=True), {}

    async def measured(work: Awaitable[None]) -> None:
        of_server, of_client, started = server.cpu_seconds(), time.process_time(), time.perf_counter()
        await work
        found["seconds"] = time.perf_counter() - started
        found["client_cpu_seconds"] = time.process_time() - of_client
        found["server_cpu_seconds"] = server.cpu_seconds() - of_server

    await DRAW[plan.kind](plan, plan.requests(), tally, measured)
    return {**found, "num_responses": tally.num_responses, "num_tokens": tally.num_tokens}


async def hold_them(plan: Plan) -> dict[str, Any]:
    """The memory of both sides while all requests are in flight, and at its highest."""
    requests, tally, found = plan.requests(), Tally(keeps=False), {}
    async with ServerClient(plan.url, vocab_size=plan.vocab, options=LIMITS) as control:

        async def watch(client_before: int, server: Server, server_before: int) -> None:
            while True:
                info = await control.server_info()
                if info["num_running_requests"] + info["num_waiting_requests"] == len(requests):
                    break
                await asyncio.sleep(POLL_S)
            found["client_waiting_bytes"] = process_memory.resident_bytes() - client_before
            found["server_waiting_bytes"] = server.resident_bytes("VmRSS") - server_before
            await control.continue_()

        async def measured(work: Awaitable[None]) -> None:
            server = Server(plan.server_pid)
            await control.pause("in_place")
            client_before, server_before = process_memory.begin(), server.reset_peaks()
            await asyncio.gather(work, watch(client_before, server, server_before))
            found["client_peak_bytes"] = process_memory.resident_bytes("VmHWM") - client_before
            found["server_peak_bytes"] = server.resident_bytes("VmHWM") - server_before

        await DRAW[plan.kind](plan, requests, tally, measured)
    return {**found, "num_responses": tally.num_responses, "num_tokens": tally.num_tokens}


def main() -> None:
    plan = Plan(**json.load(sys.stdin))
    # A connection for each request in flight.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    print(json.dumps(asyncio.run(hold_them(plan) if plan.holds else time_it(plan))))


if __name__ == "__main__":
    main()
