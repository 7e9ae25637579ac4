"""The pool on two real SGLang servers that are killed, suspended and started again; behind sglang-router."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_scope.errors import RolloutError
from megatron_scope.records import Prompt, Rollout, SamplingParams
from megatron_scope.rollout.addresses import AddressBook
from megatron_scope.rollout.client import ClientOptions, ServerClient, sample_seed
from megatron_scope.rollout.delivery import DiskDelivery
from megatron_scope.rollout.identity import Expectation
from megatron_scope.rollout.pool import PoolOptions, ServerPool, Servers
from megatron_scope.rollout.wire import RolloutRequest
from tests.helpers.models import VOCAB_SIZE, save_llama, save_qwen2
from tests.helpers.sglang import SglangServer, SglangServers, free_port

PARAMS = SamplingParams(temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=60, stop_token_ids=())
# A tenth of the defaults: a server with nothing to do takes a second for /health, and the machine is small.
CLIENT = ClientOptions(request_timeout_s=300, control_timeout_s=120, probe_timeout_s=15)
OPTIONS = PoolOptions(max_concurrent=8, health_interval_s=1, start_timeout_s=300)
PROMPTS = [Prompt(f"p{place}", (place, 2, 3), "", "math") for place in range(16)]
REQUESTS = [
    RolloutRequest(prompt, sample, sample_seed(1, 0, prompt.id, sample), f"0/{prompt.id}/{sample}")
    for prompt in PROMPTS
    for sample in range(4)
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three versions of one model."""
    root = tmp_path_factory.mktemp("weights")
    return [save_qwen2(root / f"v{version}", seed=version) for version in range(3)]


@pytest.fixture(scope="module")
def two(sglang_servers: SglangServers, weights: list[Path]) -> Iterator[list[SglangServer]]:
    """Two servers, started side by side; a test that ends one starts it again."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(2) as threads:
        starts = [threads.submit(stack.enter_context, sglang_servers.own(weights[0])) for _ in range(2)]
        yield [start.result() for start in starts]


class Step:
    """A pool on the servers with the weights of a version, and a set of requests on it."""

    def __init__(
        self, servers: Sequence[SglangServer], weights: list[Path], router: str | None = None
    ) -> None:
        self.weights = weights
        self.pool = ServerPool(
            Servers(
                AddressBook([server.url for server in servers]),
                lambda url: ServerClient(url, vocab_size=VOCAB_SIZE, options=CLIENT),
                Expectation.of_model(weights[0], any_sglang_version=False),
                router=router,
            ),
            OPTIONS,
        )

    async def __aenter__(self) -> Step:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.pool.close()

    async def publish(self, version: int) -> None:
        await self.pool.publish(DiskDelivery(self.weights[version], version))

    async def run(
        self, version: int, fault: Callable[[], Awaitable[None]] | None = None, after: int = 8
    ) -> list[Rollout]:
        """All samples, each checked to have come once and from `version`; `fault` comes after so many."""
        rollouts: list[Rollout] = []

        async def take(rollout: Rollout) -> None:
            rollouts.append(rollout)
            if fault is not None and len(rollouts) == after:
                await fault()

        await self.pool.run(REQUESTS, PARAMS, version, take)
        got = sorted((rollout.prompt.id, rollout.sample) for rollout in rollouts)
        assert got == sorted((request.prompt.id, request.sample) for request in REQUESTS)
        assert {rollout.weight_version for rollout in rollouts} == {version}
        assert {rollout.finish_reason for rollout in rollouts} <= {"stop", "length"}
        return rollouts


async def comes_back(step: Step, server: SglangServer, version: int) -> None:
    """Starts a killed server, with the weights of its start, and a run that lasts until it has `version`."""
    await asyncio.to_thread(server.start)
    async with ServerClient(server.url, vocab_size=VOCAB_SIZE, options=CLIENT) as client:
        assert await client.weight_version() is None

        async def until_current() -> None:
            while await client.weight_version() != version:
                await asyncio.sleep(0.1)

        await step.run(version, until_current)


def greedy(server: SglangServer) -> tuple[int, ...]:
    """What the server answers at temperature 0."""

    async def ask() -> tuple[int, ...]:
        async with ServerClient(server.url, vocab_size=VOCAB_SIZE, options=CLIENT) as client:
            params = SamplingParams(0.0, 1.0, -1, 40, ())
            return (await client.generate(REQUESTS[0], params)).output_ids

    return asyncio.run(ask())


def test_a_killed_server_loses_no_sample_and_comes_back_on_its_port_with_current_weights(
    two: list[SglangServer], weights: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    killed, other = two

    async def kill() -> None:
        await asyncio.to_thread(killed.kill)

    async def run() -> None:
        async with Step(two, weights) as step:
            await step.publish(1)
            await step.run(1, kill)
            await step.publish(2)  # the other alone
            await step.run(2)
            await comes_back(step, killed, 2)
            await step.run(2)

    asyncio.run(run())
    assert greedy(killed) == greedy(other)
    said = capfd.readouterr().err
    assert said.count(f"warning: rollout server {killed.url} is taken out") == 1
    assert f"rollout server {killed.url} is in" in said and other.url not in said


def test_a_suspended_server_loses_no_sample_and_comes_back_when_it_goes_on(
    two: list[SglangServer], weights: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    hung = two[1]

    async def suspend() -> None:
        hung.suspend()

    async def run() -> None:
        async with Step(two, weights) as step:
            await step.publish(1)
            try:
                await step.run(1, suspend)
                await step.publish(2)
            finally:
                hung.resume()
            await step.publish(1)
            await step.run(1)

    asyncio.run(run())
    assert greedy(two[0]) == greedy(two[1])
    said = capfd.readouterr().err
    assert f"warning: rollout server {hung.url} is taken out" in said and two[0].url not in said


def test_requests_of_a_step_come_from_both_servers_and_new_weights_change_them(
    two: list[SglangServer], weights: list[Path]
) -> None:
    async def run() -> None:
        async with Step(two, weights) as step:
            await step.publish(0)
            before = {(r.prompt.id, r.sample): r for r in await step.run(0)}
            await step.publish(1)
            after = {(r.prompt.id, r.sample): r for r in await step.run(1)}
            assert sum(before[key].output_ids != after[key].output_ids for key in before) > len(before) / 2

    asyncio.run(run())


def test_another_model_behind_an_address_is_one_clear_error_before_any_weights_are_sent(
    two: list[SglangServer], weights: list[Path], tmp_path: Path
) -> None:
    async def run(model: Path) -> None:
        async with Step(two, [model]) as step:
            await step.publish(0)

    async def publish_ours() -> None:
        async with Step(two, weights) as step:
            await step.publish(0)

    asyncio.run(publish_ours())
    told = greedy(two[0])
    with pytest.raises(RolloutError, match=r"another model, .*model_type qwen2, expected llama"):
        asyncio.run(run(save_llama(tmp_path / "llama")))
    with pytest.raises(RolloutError, match=r"another model, .*num_hidden_layers 2, expected 4"):
        asyncio.run(run(save_qwen2(tmp_path / "deep", num_hidden_layers=4)))
    assert greedy(two[0]) == told


# ---- behind a router


@contextlib.contextmanager
def sglang_router(python: str, servers: Sequence[SglangServer], log: Path) -> Iterator[str]:
    """sglang-router before the servers; its URL."""
    port = free_port()
    words = [python, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--policy", "round_robin", "--prometheus-port", str(free_port())]
    words += ["--worker-urls", *(server.url for server in servers)]
    with log.open("wb") as file:
        router = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_ready(url, router, log)
        yield url
    finally:
        router.kill()
        router.wait()


def _wait_ready(url: str, router: subprocess.Popen[bytes], log: Path) -> None:
    """Until the router has workers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    pause = threading.Event()
    for _ in range(600):
        assert router.poll() is None, log.read_text(errors="replace")
        with contextlib.suppress(urllib.error.URLError, OSError), opener.open(f"{url}/readiness", timeout=5):
            return
        pause.wait(0.2)
    raise AssertionError(f"the router is not ready:\n{log.read_text(errors='replace')}")


def test_behind_sglang_router_a_killed_server_loses_no_sample_and_what_is_stale_is_never_handed_on(
    two: list[SglangServer], weights: list[Path], sglang_python: str, tmp_path: Path
) -> None:
    """The router retries by itself, and knows nothing of weights."""
    victim = two[0]

    async def kill() -> None:
        await asyncio.to_thread(victim.kill)

    async def run(url: str) -> None:
        async with Step(two, weights, router=url) as step:
            await step.publish(1)
            await step.run(1)
            await step.run(1, kill)
            await comes_back(step, victim, 1)
            await step.publish(2)
            await step.run(2)

    with sglang_router(sglang_python, two, tmp_path / "router.log") as url:
        asyncio.run(run(url))
    assert greedy(two[0]) == greedy(two[1])
