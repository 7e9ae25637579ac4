"""The embedded server over HTTP: SGLang's protocol, its errors, and the life of the process."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from megatron_scope.errors import ConfigError, DataError, RolloutError, SyncError
from megatron_scope.records import Prompt, Rollout, SamplingParams
from megatron_scope.rollout.addresses import AddressBook
from megatron_scope.rollout.client import ClientOptions, RolloutRequest, ServerClient, sample_seed
from megatron_scope.rollout.delivery import DiskDelivery
from megatron_scope.rollout.embedded.app import EmbeddedApp
from megatron_scope.rollout.embedded.model import ServedModel
from megatron_scope.rollout.embedded.options import ServeOptions, flags_of
from megatron_scope.rollout.embedded.protocol import Answer, parse_call
from megatron_scope.rollout.embedded.server import Parent, _until_stopped, serve
from megatron_scope.rollout.embedded.tokenizer import load_tokenizer
from megatron_scope.rollout.identity import Expectation
from megatron_scope.rollout.pool import PoolOptions, ServerPool, Servers
from megatron_scope.rollout.process import EmbeddedServer

Make = Callable[..., Path]
CLIENT = ClientOptions(request_timeout_s=120, control_timeout_s=120, probe_timeout_s=30)


class Server:
    """A running app and a session on it."""

    def __init__(self, url: str, app: EmbeddedApp, session: aiohttp.ClientSession) -> None:
        self.url, self.app, self.session = url, app, session

    async def post(self, path: str, body: Any, **more: Any) -> tuple[int, Any]:
        async with self.session.post(self.url + path, json=body, **more) as response:
            text = await response.text()
            return response.status, json.loads(text) if text.startswith(("{", "[")) else text

    async def get(self, path: str, **more: Any) -> tuple[int, Any]:
        async with self.session.get(self.url + path, **more) as response:
            text = await response.text()
            return response.status, json.loads(text) if text.startswith(("{", "[")) else text


def on_server(
    folder: Path, test: Callable[[Server], Awaitable[None]], *, api_key: str | None = None, **options: Any
) -> None:
    """Runs `test` against a server in this process."""

    async def run() -> None:
        decode, eos_ids = load_tokenizer(str(folder))
        model = ServedModel(str(folder), "float32")
        model.eos_ids |= eos_ids
        app = EmbeddedApp(ServeOptions(model=str(folder), **options), model, decode, api_key)
        runner = web.AppRunner(app.application(), handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        try:
            async with aiohttp.ClientSession() as session:
                await asyncio.wait_for(test(Server(f"http://{host}:{port}", app, session)), 30)
        finally:
            await runner.cleanup()
            app.close()

    asyncio.run(run())


def generation(prompt: Any = (1, 2, 3), **fields: Any) -> dict[str, Any]:
    sampling = {"temperature": 1.0, "max_new_tokens": 6, "sampling_seed": 5, "ignore_eos": True}
    sampling.update(fields.pop("sampling", {}))
    return {"input_ids": list(prompt), "sampling_params": sampling, "return_logprob": True, **fields}


# ---- /generate


def test_generate_answers_in_sglangs_form(make_model: Make) -> None:
    async def test(server: Server) -> None:
        status, answer = await server.post("/generate", generation(rid="mine", logprob_start_len=1))
        assert status == 200 and set(answer) == {"text", "output_ids", "meta_info"}
        meta, output_ids = answer["meta_info"], answer["output_ids"]
        assert len(output_ids) == 6 and meta["id"] == "mine"
        assert meta["finish_reason"] == {"type": "length", "length": 6}
        assert (meta["prompt_tokens"], meta["completion_tokens"]) == (3, 6)
        assert meta["weight_version"] == "default"
        assert meta["weight_versions"] == [{"version": "default", "start": 0, "end": 6}]
        assert [entry[1:] for entry in meta["output_token_logprobs"]] == [
            [token, None] for token in output_ids
        ]
        assert all(entry[0] < 0 for entry in meta["output_token_logprobs"])
        first, second = meta["input_token_logprobs"]
        assert first == [None, 2, None] and second[0] < 0 and second[1:] == [3, None]
        status, answer = await server.post("/generate", generation())
        assert answer["output_ids"] == output_ids and answer["meta_info"]["input_token_logprobs"] == []
        status, answer = await server.post("/generate", generation(return_logprob=False))
        assert answer["output_ids"] == output_ids and "output_token_logprobs" not in answer["meta_info"]

    on_server(make_model(), test)


def test_batches_and_groups_are_flat_lists_in_order(make_model: Make) -> None:
    async def test(server: Server) -> None:
        prompts = [[1, 2, 3], [4, 5], [6]]
        _, batch = await server.post("/generate", {**generation(), "input_ids": prompts})
        singles = [(await server.post("/generate", generation(prompt)))[1] for prompt in prompts]
        assert [one["output_ids"] for one in batch] == [one["output_ids"] for one in singles]
        _, listed = await server.post("/generate", generation([[1, 2, 3]]))
        assert isinstance(listed, list) and len(listed) == 1
        _, group = await server.post("/generate", generation(rid="g", sampling={"n": 3}))
        assert [one["meta_info"]["id"] for one in group] == ["g_0", "g_1", "g_2"]
        own = [{"max_new_tokens": 1}, {"max_new_tokens": 2, "n": 2}]
        body = {"input_ids": [[1], [2]], "sampling_params": own, "rid": ["x", "y"]}
        _, mixed = await server.post("/generate", body)
        assert [one["meta_info"]["id"] for one in mixed] == ["x", "y_0", "y_1"]

    on_server(make_model(), test)


def test_scoring_a_batch_keeps_its_order_and_starts(make_model: Make) -> None:
    async def test(server: Server) -> None:
        body = {
            "input_ids": [[1, 2, 3, 4], [5, 6, 7]],
            "sampling_params": {"temperature": 0, "max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": [1, 0],
        }
        status, answers = await server.post("/generate", body)
        assert status == 200 and [one["output_ids"] for one in answers] == [[], []]
        ids = [[entry[1] for entry in one["meta_info"]["input_token_logprobs"]] for one in answers]
        assert ids == [[2, 3, 4], [5, 6, 7]]
        assert all(one["meta_info"]["input_token_logprobs"][0][0] is None for one in answers)

    on_server(make_model(), test)


def test_text_follows_no_stop_trim_and_special_tokens(make_model: Make) -> None:
    async def test(server: Server) -> None:
        async def ask(**sampling: Any) -> dict[str, Any]:
            return (await server.post("/generate", generation(sampling={"max_new_tokens": 200, **sampling})))[
                1
            ]

        free = await ask()
        tokens = free["output_ids"]
        special = tokens.index(14)
        stop = next(token for token in tokens[1:special] if token != tokens[0])
        stopping = {"stop_token_ids": [stop], "ignore_eos": False}
        trimmed, whole = await ask(**stopping), await ask(**stopping, no_stop_trim=True)
        assert trimmed["output_ids"] == whole["output_ids"] == tokens[: tokens.index(stop) + 1]
        assert trimmed["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
        assert whole["text"] == trimmed["text"] + "0123456789+=-*"[stop]
        shown = await ask(skip_special_tokens=False)
        assert "<eos>" in shown["text"] and "<eos>" not in free["text"]

    on_server(make_model(), test)


BAD = {
    "input_ids must": [
        {},
        {"input_ids": []},
        {"input_ids": "12"},
        {"input_ids": [[1], []]},
        {"input_ids": [1.5]},
    ],
    "input_ids holds 16": [generation([1, 16])],
    "input_ids holds -1": [generation([-1])],
    "exceed": [generation(sampling={"max_new_tokens": 254})],
    "stream": [generation(stream=True)],
    "'text' is not supported": [{"text": "1+1="}],
    "temperature": [generation(sampling={"temperature": -1}), generation(sampling={"temperature": "hot"})],
    "top_p": [generation(sampling={"top_p": 0}), generation(sampling={"top_p": 1.1})],
    "top_k": [generation(sampling={"top_k": 0}), generation(sampling={"top_k": 1.5})],
    "max_new_tokens": [generation(sampling={"max_new_tokens": -1})],
    "n is": [generation(sampling={"n": 0})],
    "stop_token_ids": [generation(sampling={"stop_token_ids": 3})],
    "no_stop_trim": [generation(sampling={"no_stop_trim": 1})],
    "sampling_params": [
        {**generation(), "sampling_params": 3},
        {**generation(), "sampling_params": [{}, {}]},
    ],
    "logprob_start_len": [generation(logprob_start_len=3), generation(logprob_start_len=[0, 0])],
    "rid": [generation(rid=3), generation(rid=["a", "b"])],
    "must be a JSON object": [[1]],
}


def test_bad_requests_are_400_and_the_server_goes_on(make_model: Make) -> None:
    async def test(server: Server) -> None:
        for said, bodies in BAD.items():
            for body in bodies:
                status, answer = await server.post("/generate", body)
                assert status == 400 and said in answer["error"]["message"], (said, body, answer)
        status, answer = await server.post("/generate", generation(sampling={"min_p": 0.1}))
        assert status == 400 and answer["error"].startswith("unknown field 'min_p'")
        async with server.session.post(server.url + "/generate", data=b"{nope") as response:
            assert response.status == 400 and "JSON" in (await response.json())["error"]["message"]
        assert (await server.post("/generate", generation()))[0] == 200

    on_server(make_model(), test)


def test_a_rid_in_use_is_refused(make_model: Make) -> None:
    async def test(server: Server) -> None:
        await server.post("/pause_generation", {"mode": "in_place"})
        first = asyncio.ensure_future(server.post("/generate", generation(rid="a")))
        while server.app.engine.state().num_waiting < 1:
            await asyncio.sleep(0.005)
        status, answer = await server.post("/generate", generation(rid="a"))
        assert status == 400 and "'a'" in answer["error"]["message"]
        await server.post("/continue_generation", {})
        assert (await first)[0] == 200

    on_server(make_model(), test)


# ---- abort, pause, weights, cache


def test_abort_ends_a_request_with_its_partial_output(make_model: Make) -> None:
    async def test(server: Server) -> None:
        assert (await server.post("/abort_request", {"rid": "nobody"}))[0] == 200
        assert (await server.post("/abort_request", {}))[0] == 400
        await server.post("/pause_generation", {"mode": "in_place"})
        tasks = [asyncio.ensure_future(server.post("/generate", generation(rid=rid))) for rid in "ab"]
        while server.app.engine.state().num_waiting < 2:
            await asyncio.sleep(0.005)
        await server.post("/abort_request", {"rid": "a"})
        status, answer = await tasks[0]
        assert status == 200 and answer["meta_info"]["finish_reason"]["type"] == "abort"
        await server.post("/abort_request", {"abort_all": True})
        assert (await tasks[1])[1]["meta_info"]["finish_reason"]["type"] == "abort"

    on_server(make_model(), test)


def test_a_client_that_goes_away_takes_its_request_with_it(make_model: Make) -> None:
    async def test(server: Server) -> None:
        await server.post("/pause_generation", {"mode": "in_place"})
        task = asyncio.ensure_future(server.post("/generate", generation(rid="a")))
        while server.app.engine.state().num_waiting < 1:
            await asyncio.sleep(0.005)
        task.cancel()
        while server.app.engine.state().num_waiting > 0:
            await asyncio.sleep(0.005)
        await server.post("/continue_generation", {})
        assert (await server.post("/generate", generation(rid="a")))[0] == 200

    on_server(make_model(), test)


def test_a_late_answer_does_not_go_to_the_next_request_of_its_rid(make_model: Make) -> None:
    async def test(server: Server) -> None:
        await server.post("/pause_generation", {"mode": "in_place"})
        task = asyncio.ensure_future(server.post("/generate", generation(rid="a")))
        while server.app.engine.state().num_waiting < 1:
            await asyncio.sleep(0.005)
        earlier = parse_call(generation(rid="a"), server.app.engine.limits).samples[0]
        server.app._settle([(earlier, Answer([], [], None, {"type": "abort"}, [], "0"))])
        await server.post("/continue_generation", {})
        assert (await task)[1]["meta_info"]["finish_reason"]["type"] == "length"

    on_server(make_model(), test)


def test_pause_and_health(make_model: Make) -> None:
    async def test(server: Server) -> None:
        assert (await server.get("/health"))[0] == (await server.get("/health_generate"))[0] == 200
        for mode in ("in_place", "retract", "abort"):
            status, answer = await server.post("/pause_generation", {"mode": mode})
            assert status == 200 and set(answer) == {"message", "status"}
            assert (await server.get("/health"))[0] == (await server.get("/health_generate"))[0] == 503
            assert (await server.post("/continue_generation", {}))[0] == 200
            assert (await server.get("/health"))[0] == 200
        assert (await server.post("/pause_generation", {"mode": "nap"}))[0] == 400
        async with server.session.post(server.url + "/pause_generation") as response:
            assert response.status == 400  # a body is required

    on_server(make_model(), test)


def test_weight_updates_by_http(make_model: Make, tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        other = str(make_model(seed=1))
        _, before = await server.post("/generate", generation())
        status, answer = await server.post(
            "/update_weights_from_disk", {"model_path": str(tmp_path / "none")}
        )
        assert status == 400 and answer["success"] is False and "none" in answer["message"]
        assert (await server.post("/update_weights_from_disk", {}))[0] == 400
        assert (await server.post("/generate", generation()))[1]["output_ids"] == before["output_ids"]
        body = {"model_path": other, "weight_version": 7, "flush_cache": True, "abort_all_requests": False}
        status, answer = await server.post("/update_weights_from_disk", body)
        assert status == 200 and answer["success"] is True and answer["num_paused_requests"] == 0
        for path in ("/server_info", "/get_server_info", "/model_info", "/get_model_info"):
            info = (await server.get(path))[1]
            assert info["weight_version"] == "7" and info["model_path"] == other
        _, after = await server.post("/generate", generation())
        assert after["meta_info"]["weight_version"] == "7" and after["output_ids"] != before["output_ids"]
        assert (await server.post("/update_weights_from_disk", {"model_path": other}))[0] == 200
        assert (await server.get("/server_info"))[1]["weight_version"] == "7"  # kept where none is given

    on_server(make_model(), test)


def test_flush_cache_only_while_nothing_runs(make_model: Make) -> None:
    async def test(server: Server) -> None:
        assert (await server.post("/flush_cache", None))[0] == 200
        await server.post("/pause_generation", {"mode": "in_place"})
        task = asyncio.ensure_future(server.post("/generate", generation()))
        while server.app.engine.state().num_waiting < 1:
            await asyncio.sleep(0.005)
        assert (await server.post("/flush_cache", None))[0] == 400
        await server.post("/continue_generation", {})
        await task

    on_server(make_model(), test)


def test_the_api_key_guards_all_but_health(make_model: Make) -> None:
    async def test(server: Server) -> None:
        right, wrong = {"Authorization": "Bearer s3cret"}, {"Authorization": "Bearer other"}
        assert (await server.get("/health"))[0] == 200
        assert (await server.get("/server_info"))[0] == 401
        assert (await server.post("/generate", generation(), headers=wrong))[0] == 401
        assert (await server.post("/generate", generation(), headers=right))[0] == 200

    on_server(make_model(), test, api_key="s3cret")


# ---- the client on it


def test_client_and_server_agree(make_model: Make) -> None:
    params = SamplingParams(temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=30, stop_token_ids=(5,))
    prompts = [Prompt(str(index), (index, 2, 3), "", "math") for index in range(6)]
    requests = [
        RolloutRequest(prompt, sample, sample_seed(1, 2, prompt.id, sample), f"{prompt.id}-{sample}")
        for prompt in prompts
        for sample in range(4)
    ]

    def connect(url: str) -> ServerClient:
        return ServerClient(url, vocab_size=16, api_key="k", options=CLIENT)

    async def rollouts(pool: ServerPool, order: list[RolloutRequest]) -> dict[str, Rollout]:
        found: dict[str, Rollout] = {}

        async def take(rollout: Rollout) -> None:
            found[f"{rollout.prompt.id}-{rollout.sample}"] = rollout

        await pool.run(order, params, 3, take)
        return found

    async def test(server: Server) -> None:
        expected = Expectation.of_model(make_model(), any_sglang_version=False)
        pool = ServerPool(
            Servers(AddressBook([server.url]), connect, expected),
            PoolOptions(max_concurrent=7, health_interval_s=10, start_timeout_s=5),
        )
        async with connect(server.url) as client:
            await client.wait_healthy(5)
            with pytest.raises(RolloutError, match="'default'"):
                await client.generate(requests[0], params)
            await pool.publish(DiskDelivery(make_model(), 3))
            found = await rollouts(pool, requests)
            assert len(found) == 24 and {rollout.weight_version for rollout in found.values()} == {3}
            assert {rollout.finish_reason for rollout in found.values()} == {"stop", "length"}
            assert await rollouts(pool, requests[::-1]) == found
            await pool.close()
            assert await client.weight_version() == 3
            await client.pause("retract")
            await client.continue_()
            await client.abort_all()
            await client.flush()
            with pytest.raises(SyncError, match="none"):
                await client.update_weights_from_disk("none", 4)
            assert (await client.server_info())["weight_version"] == "3"

    on_server(make_model(), test, api_key="k")


# ---- the process


def test_bad_options_are_config_or_data_errors(make_model: Make, tmp_path: Path) -> None:
    model = str(make_model())
    with pytest.raises(DataError, match=r"config\.json"):
        serve(ServeOptions(model=str(tmp_path), port=0))
    with pytest.raises(ConfigError, match="--max-total-tokens is 0"):
        serve(ServeOptions(model=model, max_total_tokens=0))
    with pytest.raises(ConfigError, match="NO_SUCH_KEY"):
        serve(ServeOptions(model=model, port=0, api_key_env="NO_SUCH_KEY"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="in use"):
            serve(ServeOptions(model=model, port=taken.getsockname()[1]))


def test_the_server_ends_with_its_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    async def run() -> float:
        waiting = asyncio.ensure_future(_until_stopped(asyncio.Event(), Parent(parent.pid)))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        parent.kill()  # and left unreaped: a zombie is gone too
        begin = time.monotonic()
        await asyncio.wait_for(waiting, 10)
        return time.monotonic() - begin

    try:
        assert asyncio.run(run()) < 3
    finally:
        parent.kill()
        parent.wait()


def test_a_child_server_serves_and_ends_cleanly(make_model: Make, tmp_path: Path) -> None:
    options = ServeOptions(model=str(make_model()), weight_version="0")
    log = tmp_path / "logs" / "server.log"
    params = SamplingParams(temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=8, stop_token_ids=())

    async def one(url: str) -> Rollout:
        async with ServerClient(url, vocab_size=16, options=CLIENT) as client:
            request = RolloutRequest(Prompt("p", (1, 2), "", "math"), 0, 1, "r")
            return await client.generate(request, params)

    with EmbeddedServer(options, log_path=log) as server:
        assert server.pid is not None
        assert asyncio.run(one(server.url)).weight_version == 0
        server.check()
        os.kill(server.pid, signal.SIGTERM)
        begin = time.monotonic()
        with pytest.raises(RolloutError, match="exit code 0"):
            while time.monotonic() - begin < 60:  # far more than a busy machine needs
                server.check()
                time.sleep(0.01)
    assert "Traceback" not in log.read_text()


def test_a_child_takes_more_requests_than_its_limit_on_open_files_at_first(
    make_model: Make, tmp_path: Path
) -> None:
    few, num_requests = 64, 150
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    child = EmbeddedServer(ServeOptions(model=str(make_model("qwen2"))), log_path=tmp_path / "log")
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))  # the child inherits it
    try:
        child.start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    async def ask_at_once() -> list[int]:
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            ServerClient(child.url, vocab_size=16, options=CLIENT) as control,
        ):

            async def ask() -> int:
                async with session.post(f"{child.url}/generate", json=generation()) as response:
                    return response.status

            await control.pause("in_place")
            asking = [asyncio.create_task(ask()) for _ in range(num_requests)]
            while (await control.server_info())["num_waiting_requests"] < num_requests:
                await asyncio.sleep(0.02)
            await control.continue_()
            return await asyncio.gather(*asking)

    try:
        assert asyncio.run(asyncio.wait_for(ask_at_once(), 60)) == [200] * num_requests
    finally:
        child.stop()


def test_a_child_that_dies_early_is_reported_with_its_log(tmp_path: Path) -> None:
    server = EmbeddedServer(ServeOptions(model=str(tmp_path)), log_path=tmp_path / "log")
    with pytest.raises(RolloutError, match=r"(?s)exit code 2.*config\.json"):
        server.start()
    assert server.pid is None


def test_flags_give_the_options_back() -> None:
    import argparse

    from megatron_scope.rollout.embedded import add_serve_arguments, options_from

    parser = argparse.ArgumentParser()
    add_serve_arguments(parser)
    options = ServeOptions("m", "0.0.0.0", 1, "bfloat16", "dummy", 2, 3, 4, 5, "v", "KEY", "file", 6)
    assert options_from(parser.parse_args(flags_of(options))) == options
    assert options_from(parser.parse_args(["--model", "m"])) == ServeOptions("m")
