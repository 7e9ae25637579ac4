"""A real SGLang server on this machine's CPU against the trainer's scores, transformers, and a restart."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import os
import re
import subprocess
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_scope.config import parse_config
from megatron_scope.controller.core import summarise
from megatron_scope.errors import RolloutError, SyncError
from megatron_scope.records import JudgedRollout, Prompt, Rollout, SamplingParams, Verdict
from megatron_scope.rollout.client import ClientOptions, ServerClient
from megatron_scope.rollout.launch import LaunchOptions, launch_command
from megatron_scope.rollout.wire import RolloutRequest, StaleWeights, generate_body, parse_rollout
from tests.helpers.models import (
    CHARACTERS,
    END,
    VOCAB_SIZE,
    read_weights,
    save_llama,
    save_qwen2,
    save_qwen3,
)
from tests.helpers.sglang import SglangServer, SglangServers

FAMILIES = ("qwen2", "qwen3", "llama")
TOLERANCE = 1e-4  # nats, float32 on both sides
END_ID = CHARACTERS.index(END)
KEY = "a-key-of-this-test"
KEY_NAME = "SGLANG_TEST_KEY"
# Prompts of many lengths, so that neighbours in a batch and in a pack differ.
PROMPTS = [
    Prompt(f"p{place}", tuple((7 * place + step) % VOCAB_SIZE for step in range(1 + 9 * place)), "1", "math")
    for place in range(5)
]
LONG = 800  # tokens of a response that is met in mid-generation


@dataclasses.dataclass(frozen=True)
class Reached:
    """A server and how to speak with it."""

    server: SglangServer
    key: str | None = None

    def client(self) -> ServerClient:
        options = ClientOptions(request_timeout_s=600, control_timeout_s=600, probe_timeout_s=60)
        return ServerClient(self.server.url, vocab_size=VOCAB_SIZE, api_key=self.key, options=options)

    def publish(self, folder: Path, version: int) -> None:
        async def update() -> None:
            async with self.client() as client:
                await client.update_weights_from_disk(str(folder), version)

        asyncio.run(update())

    def http(self, method: str, path: str, body: Any = None) -> Any:
        """An exchange past the client; what comes back is not looked at."""
        request = urllib.request.Request(f"{self.server.url}{path}", method=method)
        request.add_header("Content-Type", "application/json")
        if self.key is not None:
            request.add_header("Authorization", f"Bearer {self.key}")
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(request, data, timeout=120) as response:
            return json.loads(response.read())

    def flush(self) -> None:
        """Empties the prefix cache; SGLang refuses while it still cleans up after the last response."""

        async def until_done() -> None:
            async with self.client() as client:
                for attempt in itertools.count():
                    try:
                        return await client.flush()
                    except RolloutError:
                        if attempt == 50:
                            raise
                    await asyncio.sleep(0.1)

        asyncio.run(until_done())

    def greedy(self) -> list[tuple[list[int], list[list[Any]]]]:
        """Output ids and log-prob entries of every prompt at temperature 0, one request at a time and with
        nothing cached: the last bits of a log-prob depend on what is computed together.
        """
        answers = []
        self.flush()
        for request in requests(1):
            body = self.http("POST", "/generate", generate_body(request, params(0.0)))
            answers.append((body["output_ids"], body["meta_info"]["output_token_logprobs"]))
        return answers


def params(temperature: float, max_new_tokens: int = 24) -> SamplingParams:
    return SamplingParams(temperature, 1.0, -1, max_new_tokens, (END_ID,))


def requests(num_samples: int) -> list[RolloutRequest]:
    return [
        RolloutRequest(prompt, sample, sample, f"{prompt.id}/{sample}")
        for prompt in PROMPTS
        for sample in range(num_samples)
    ]


async def sample_all(client: ServerClient, num_samples: int, temperature: float) -> list[Rollout]:
    """All requests at once, so that the server batches them."""
    drawn = (client.generate(request, params(temperature)) for request in requests(num_samples))
    return list(await asyncio.gather(*drawn))


# ---- models and servers


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each family, and other weights of the Qwen2, whose responses never end."""
    root = tmp_path_factory.mktemp("families")
    return {
        "qwen2": endless(root / "qwen2", seed=1),
        "qwen2_too": endless(root / "qwen2_too", seed=2),
        "qwen3": save_qwen3(root / "qwen3", seed=3),
        "llama": save_llama(root / "llama", seed=4),
    }


def endless(folder: Path, seed: int) -> Path:
    """A Qwen2 whose end token is out of reach: one unit is large in every state and counts for all tokens
    alike, but against the end.
    """
    save_qwen2(folder, seed=seed, max_position_embeddings=1024)
    weights = read_weights(folder)
    table = weights["model.embed_tokens.weight"]  # the output table too
    table[:, 0] = 4.0
    table[END_ID, 0] = -20.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def servers(
    sglang_servers: SglangServers, folders: dict[str, Path], monkeymodule: pytest.MonkeyPatch
) -> Iterator[dict[str, Reached]]:
    """A server of each family, and `restarted`, which was started with the other weights of the Qwen2."""
    monkeymodule.setenv(KEY_NAME, KEY)
    options: dict[str, dict[str, Any]] = {
        "qwen2": {"settings": {"rollout": {"max_new_tokens": LONG}}},
        "qwen3": {},
        # Its weights are published only, as a student's in a Megatron checkpoint are.
        "llama": {"extra": ("--load-format", "dummy")},
        "restarted": {"settings": {"rollout": {"max_new_tokens": LONG, "api_key_env": KEY_NAME}}},
    }
    with ThreadPoolExecutor(len(options)) as threads:
        starts = {
            name: threads.submit(sglang_servers.own, folders.get(name, folders["qwen2_too"]), **own)
            for name, own in options.items()
        }
        try:
            yield {
                name: Reached(start.result(), KEY if name == "restarted" else None)
                for name, start in starts.items()
            }
        finally:
            wait(starts.values())
            started = [start.result() for start in starts.values() if start.exception() is None]
            list(threads.map(SglangServer.close, started))


@pytest.fixture(scope="module")
def monkeymodule() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


# ---- the command line


def test_every_flag_of_launch_is_one_of_this_sglang(sglang_python, folders):
    """Those of GPU servers too."""
    words = [sglang_python, "-m", "sglang.launch_server", "--help"]
    environment = {**os.environ, "SGLANG_USE_CPU_ENGINE": "1"}
    shown = subprocess.run(words, env=environment, capture_output=True, text=True, check=True, timeout=300)
    known = set(re.findall(r"(?<![\w-])--[a-z0-9-]+", shown.stdout))
    folder = {"hf": str(folders["qwen2"])}
    lengths = {"data": {"max_prompt_tokens": 9}, "rollout": {"max_new_tokens": 9, "api_key_env": KEY_NAME}}
    teacher = {**folder, "api_key_env": KEY_NAME}
    config = parse_config({"student": folder, "teacher": teacher, **lengths}, "test")
    for role, device in itertools.product(("rollout", "teacher"), ("cuda", "cpu")):
        line = launch_command(config, LaunchOptions(role=role, device=device, tp=2)).as_shell()
        flags = {word for word in line.split() if word.startswith("--")}
        assert {"--model-path", "--context-length", "--tp-size", "--api-key"} <= flags
        assert flags <= known


# ---- the engine and the trainer


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trainer_gives_every_token_the_engines_logprob(family, servers, folders, pool):
    reached, folder = servers[family], folders[family]
    reached.publish(folder, 3)

    async def draw() -> dict[float, list[Rollout]]:
        async with reached.client() as client:
            return {temperature: await sample_all(client, 3, temperature) for temperature in (1.0, 0.7)}

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for temperature, rollouts in asyncio.run(draw()).items():
        assert {rollout.weight_version for rollout in rollouts} == {3}
        sequences = [(rollout.prompt.token_ids, rollout.output_ids) for rollout in rollouts]
        (scores,) = pool(1).run("tests.helpers.jobs:response_logprobs", str(folder), sequences, temperature)
        for rollout, ours in zip(rollouts, scores, strict=True):
            np.testing.assert_allclose(ours, rollout.engine_logprobs, rtol=0, atol=TOLERANCE)
            assert rollout.text == tokenizer.decode(rollout.output_ids, skip_special_tokens=True)
            ended = rollout.output_ids[-1] == END_ID
            assert rollout.finish_reason == ("stop" if ended else "length")
            assert ended or len(rollout.output_ids) == 24
    other = pool(1).run("tests.helpers.jobs:response_logprobs", str(folder), sequences, 1.0)[0]
    gap = max(
        np.abs(ours - np.array(rollout.engine_logprobs)).max()
        for ours, rollout in zip(other, rollouts, strict=True)
    )
    assert gap > 100 * TOLERANCE  # the temperature counts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_greedy_response_is_that_of_transformers(family, servers, folders):
    reached, folder = servers[family], folders[family]
    reached.publish(folder, 4)
    model = AutoModelForCausalLM.from_pretrained(folder).float()
    for prompt, (output_ids, _) in zip(PROMPTS, reached.greedy(), strict=True):
        inputs = torch.tensor([prompt.token_ids])
        with torch.no_grad():
            expected = model.generate(
                inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=24
            )
        assert output_ids == expected[0, len(prompt.token_ids) :].tolist()


# ---- weights from disk


def test_new_weights_answer_as_a_server_started_with_them(servers, folders):
    """Bit for bit; the weights of before come back the same way."""
    reached = servers["qwen2"]
    reached.publish(folders["qwen2"], 1)
    before = reached.greedy()
    reached.publish(folders["qwen2_too"], 2)
    after = reached.greedy()
    assert after == servers["restarted"].greedy()
    assert all(ours != theirs for ours, theirs in zip(before, after, strict=True))

    async def draw() -> list[Rollout]:
        async with reached.client() as client:
            return await sample_all(client, 2, 1.0)

    assert {rollout.weight_version for rollout in asyncio.run(draw())} == {2}
    reached.publish(folders["qwen2"], 3)
    assert reached.greedy() == before


def test_weights_that_cannot_be_read_change_nothing(servers, folders, tmp_path):
    reached = servers["qwen2"]
    reached.publish(folders["qwen2"], 5)
    before = reached.greedy()
    with pytest.raises(SyncError, match=r"/update_weights_from_disk: HTTP 400: ") as caught:
        reached.publish(tmp_path / "missing", 6)
    assert "\n" not in str(caught.value)
    assert reached.greedy() == before
    assert reached.http("GET", "/model_info")["weight_version"] == "5"


def test_a_response_of_weights_that_nobody_published_is_an_error(servers):
    """`restarted` has those that it was started with."""

    async def draw() -> None:
        async with servers["restarted"].client() as client:
            await client.generate(requests(1)[0], params(1.0))

    with pytest.raises(RolloutError, match=r"weight version is 'default'.*publish weights to the server"):
        asyncio.run(draw())


@pytest.mark.parametrize("key", [None, "wrong"])
def test_a_wrong_key_is_one_clear_error(servers, key):
    async def draw() -> None:
        async with Reached(servers["restarted"].server, key).client() as client:
            await client.wait_healthy(30)  # open to all
            await client.generate(requests(1)[0], params(1.0))

    with pytest.raises(RolloutError, match=r"HTTP 401.*rollout\.api_key_env") as caught:
        asyncio.run(draw())
    assert KEY not in str(caught.value)


# ---- in mid-generation

LONG_REQUEST = RolloutRequest(PROMPTS[0], 0, 1, "long")
LONG_PARAMS = params(1.0, LONG)


async def met_in_mid_generation(
    reached: Reached, work: Awaitable[Any], meet: Callable[[], Awaitable[None]]
) -> Any:
    """What `work`, a long response of `reached`, comes to when it is met after its first tokens."""
    task = asyncio.ensure_future(work)
    while await asyncio.to_thread(tokens_in_use, reached) < 2 + len(LONG_REQUEST.prompt.token_ids):
        await asyncio.sleep(0)
    await meet()
    return await task


def tokens_in_use(reached: Reached) -> int:
    """Tokens of running requests that the server holds now."""
    (load,) = reached.http("GET", "/v1/loads")["loads"]
    return load["num_used_tokens"] if load["num_running_reqs"] else 0


def test_a_response_paused_in_place_goes_on_with_new_weights_and_tells_of_both(servers, folders):
    reached = servers["qwen2"]
    reached.publish(folders["qwen2"], 7)

    async def run() -> dict[str, Any]:
        async with reached.client() as client:
            body = generate_body(LONG_REQUEST, LONG_PARAMS)
            work = asyncio.to_thread(reached.http, "POST", "/generate", body)

            async def update() -> None:
                await client.pause("in_place")
                # Its cache stays, so that it can go on; the client's own update would drop it.
                new = {
                    "model_path": str(folders["qwen2_too"]),
                    "weight_version": "8",
                    "flush_cache": False,
                }
                done = await asyncio.to_thread(reached.http, "POST", "/update_weights_from_disk", new)
                assert done["success"] and done["num_paused_requests"] == 0
                await client.continue_()

            return await met_in_mid_generation(reached, work, update)

    body = asyncio.run(run())
    spans = body["meta_info"]["weight_versions"]
    assert [span["version"] for span in spans] == ["7", "8"]
    (first, second) = [(span["start"], span["end"]) for span in spans]
    assert first[0] == 0 < first[1] == second[0] < second[1] == LONG
    where = {"vocab_size": VOCAB_SIZE, "server": reached.server.url}
    rollout = parse_rollout(body, LONG_REQUEST, LONG_PARAMS, **where)
    assert rollout.weight_version == 7 and len(rollout.output_ids) == LONG
    with pytest.raises(StaleWeights, match="comes from weight version 7, 8; expected 8"):
        parse_rollout(body, LONG_REQUEST, LONG_PARAMS, **where, version=8)


def test_an_aborted_response_is_partial_and_is_counted_but_not_learnt_from(servers, folders):
    reached = servers["qwen2"]
    reached.publish(folders["qwen2"], 9)

    async def run() -> Sequence[Rollout]:
        async with reached.client() as client:
            whole = await client.generate(requests(1)[1], params(1.0))
            cut = await met_in_mid_generation(
                reached, client.generate(LONG_REQUEST, LONG_PARAMS), client.abort_all
            )
            return whole, cut

    whole, cut = asyncio.run(run())
    assert cut.finish_reason == "abort" and 0 < len(cut.output_ids) < LONG
    assert len(cut.engine_logprobs) == len(cut.output_ids)
    judged = [JudgedRollout(rollout, Verdict(correct=True)) for rollout in (cut, whole)]
    summary = summarise(judged, parse_config({}, "test"), skipped=0, last_arrival_s=0.0)
    assert (summary.counts.sampled, summary.counts.aborted) == (2, 1)
    assert summary.places.tolist() == [1] and summary.table.num_tokens.tolist() == [24]
