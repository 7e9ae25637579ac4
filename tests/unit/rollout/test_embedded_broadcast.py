"""The embedded server takes weights by broadcast: SGLang's routes, all of the weights or none."""

from __future__ import annotations

import asyncio
import multiprocessing
import uuid
from collections.abc import Awaitable, Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
import torch.distributed as dist
from aiohttp import web
from safetensors.torch import load_file

from megatron_scope import weight_group
from megatron_scope.rollout.embedded.app import EmbeddedApp
from megatron_scope.rollout.embedded.model import ServedModel, WeightSource
from megatron_scope.rollout.embedded.options import ServeOptions
from tests.unit.rollout.bench import mixed_bodies

Make = Callable[..., Path]


def serve_sender(connection: Connection) -> None:
    """The sending rank, in a process of its own: a process knows each group once."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    connection.send(store.port)
    group: Any = None
    while (command := connection.recv()) is not None:
        name, argument = command
        if name == "join":
            settings: dict[str, Any] = {"world_size": 2, "backend": "gloo", "timeout_s": 20}
            group = weight_group.join(store, rank=weight_group.SENDER, name=argument, **settings)
        elif name == "send":
            weight_group.broadcast(group, argument).wait()
        elif group is not None:
            weight_group.leave(group)
            group = None
        connection.send("done")


class Sender:
    """Drives that process; one command at a time."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve_sender, args=(theirs,), daemon=True)
        self._process.start()
        self.port: int = self._connection.recv()

    def do(self, name: str, argument: Any = None) -> None:
        self._connection.send((name, argument))
        assert self._connection.poll(30) and self._connection.recv() == "done"

    def close(self) -> None:
        self._process.kill()
        self._process.join()


@pytest.fixture(scope="module")
def sender() -> Iterator[Sender]:
    sender = Sender()
    yield sender
    sender.close()


class Trainer:
    """The other side: a sending rank, and requests to the server."""

    def __init__(self, url: str, session: aiohttp.ClientSession, sender: Sender) -> None:
        self.group = f"group-{uuid.uuid4()}"
        self._url, self._session, self._sender = url, session, sender

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        async with self._session.post(self._url + path, json=body) as response:
            return response.status, await response.json()

    async def get(self, path: str) -> Any:
        async with self._session.get(self._url + path) as response:
            return await response.json()

    async def join(self, **changes: Any) -> tuple[int, Any]:
        body = {
            "master_address": "127.0.0.1",
            "master_port": self._sender.port,
            "rank_offset": 1,
            "world_size": 2,
            "group_name": self.group,
            "backend": "gloo",
            **changes,
        }
        posted = asyncio.create_task(self.post("/init_weights_update_group", body))
        if not changes:
            await asyncio.to_thread(self._sender.do, "join", self.group)
        return await posted

    def bucket(self, shapes: dict[str, list[int]]) -> dict[str, Any]:
        return {
            "names": list(shapes),
            "dtypes": ["float32"] * len(shapes),
            "shapes": list(shapes.values()),
            "group_name": self.group,
            "load_format": "flattened_bucket",
        }

    async def send(self, tensors: dict[str, torch.Tensor]) -> tuple[int, Any]:
        """One bucket with all of them."""
        body = self.bucket({name: list(value.shape) for name, value in tensors.items()})
        posted = asyncio.create_task(self.post("/update_weights_from_distributed", body))
        flat = torch.cat([value.contiguous().view(-1).view(torch.uint8) for value in tensors.values()])
        await asyncio.to_thread(self._sender.do, "send", flat)
        return await posted

    def leave(self) -> None:
        self._sender.do("leave")


@pytest.fixture
def on_server(sender: Sender) -> Callable[..., None]:
    """on_server(folder, test, load_format="auto") runs `test` against a server in this process."""

    def run(folder: Path, test: Callable[[Trainer], Awaitable[None]], load_format: Any = "auto") -> None:
        asyncio.run(against_server(folder, test, load_format, sender))

    return run


async def against_server(
    folder: Path, test: Callable[[Trainer], Awaitable[None]], load_format: Any, sender: Sender
) -> None:
    model = ServedModel(str(folder), "float32", load_format)
    options = ServeOptions(model=str(folder), max_running_requests=8)
    app = EmbeddedApp(options, model, lambda ids, skip: "", None)
    runner = web.AppRunner(app.application(), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = "http://{}:{}".format(*runner.addresses[0][:2])
    async with aiohttp.ClientSession() as session:
        trainer = Trainer(url, session, sender)
        try:
            await asyncio.wait_for(test(trainer), 60)
        finally:
            await asyncio.to_thread(trainer.leave)
            await runner.cleanup()
            app.close()


async def answers(trainer: Trainer) -> list[Any]:
    found = []
    for body in mixed_bodies(4):
        status, answer = await trainer.post("/generate", {**body, "return_logprob": True})
        assert status == 200, answer
        found.append((answer["output_ids"], answer["meta_info"]["output_token_logprobs"]))
    return found


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def halves(weights: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    names = list(weights)
    for part in (names[: len(names) // 2], names[len(names) // 2 :]):
        yield {name: weights[name] for name in part}


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3_moe"])
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_broadcast_weights_answer_as_those_from_disk(
    family: str, load_format: str, make_model: Make, on_server: Any
) -> None:
    new = make_model(family, seed=1)

    async def by_broadcast(trainer: Trainer) -> None:
        before = await answers(trainer)
        assert (await trainer.join())[0] == 200
        assert (await trainer.post("/begin_weight_update", {}))[0] == 200
        for part in halves(weights_of(new)):
            assert (await trainer.send(part))[0] == 200
            assert await answers(trainer) == before  # nothing changes on the way
        assert (await trainer.post("/end_weight_update", {}))[0] == 200
        found.append(await answers(trainer))
        assert found[0] != before
        assert (await trainer.post("/destroy_weights_update_group", {"group_name": trainer.group}))[0] == 200

    async def by_disk(trainer: Trainer) -> None:
        assert (await trainer.post("/update_weights_from_disk", {"model_path": str(new)}))[0] == 200
        found.append(await answers(trainer))

    found: list[Any] = []
    on_server(make_model(family), by_broadcast, load_format)
    on_server(make_model(family), by_disk)
    assert found[0] == found[1]


@torch.inference_mode()
def test_bfloat16_arrives_as_its_float32_values(make_model: Make) -> None:
    weights = {name: value.bfloat16() for name, value in weights_of(make_model(seed=1)).items()}
    model = ServedModel(str(make_model()), "float32")
    source: WeightSource = {name: value.float() for name, value in weights.items()}
    model.reload(source)
    expected = model.prefill((1, 2, 3), None).logits
    model.reload(weights_of(make_model()))
    model.reload(weights)
    assert (model.prefill((1, 2, 3), None).logits == expected).all()


def test_the_version_is_named_apart_from_the_weights(make_model: Make, on_server: Any) -> None:
    async def test(trainer: Trainer) -> None:
        body = {"new_version": "incomplete-3", "abort_all_requests": False}
        assert (await trainer.post("/update_weight_version", body))[0] == 200
        assert (await trainer.get("/model_info"))["weight_version"] == "incomplete-3"
        status, answer = await trainer.post("/generate", {"input_ids": [1, 2]})
        assert answer["meta_info"]["weight_version"] == "incomplete-3"
        status, answer = await trainer.post("/update_weight_version", {})
        assert status == 400 and "new_version" in str(answer)

    on_server(make_model(), test)


def test_weights_that_are_not_whole_are_refused_at_the_end_and_the_old_ones_stay(
    make_model: Make, on_server: Any
) -> None:
    good = weights_of(make_model(seed=1))
    name = "model.layers.0.mlp.up_proj.weight"
    wrong: dict[str, dict[str, torch.Tensor]] = {
        "missing keys": next(halves(good)),
        "unexpected keys unheard.of": {**good, "unheard.of": torch.zeros(2)},
        "mismatched keys": {**good, name: torch.zeros(5, 48)},
    }

    async def test(trainer: Trainer) -> None:
        before = await answers(trainer)
        await trainer.join()
        for said, weights in wrong.items():
            assert (await trainer.post("/begin_weight_update", {}))[0] == 200
            assert (await trainer.send(weights))[0] == 200
            status, answer = await trainer.post("/end_weight_update", {})
            assert status == 400 and answer["success"] is False and said in answer["message"]
        assert await answers(trainer) == before

    on_server(make_model(), test)


def test_what_is_out_of_order_is_refused_as_by_sglang(make_model: Make, on_server: Any) -> None:
    async def test(trainer: Trainer) -> None:
        update, shapes = "/update_weights_from_distributed", {"a": [2]}
        status, answer = await trainer.post(update, trainer.bucket(shapes))
        assert status == 400 and "begin_weight_update" in answer["message"]
        status, answer = await trainer.post("/end_weight_update", {})
        assert status == 400 and "no weight-update session is open" in answer["message"]
        assert (await trainer.post("/begin_weight_update", {}))[0] == 200
        status, answer = await trainer.post("/begin_weight_update", {})
        assert status == 400 and "already open" in answer["message"]
        status, answer = await trainer.post(update, trainer.bucket(shapes))
        assert status == 400 and "there is no group" in answer["message"]
        for change in ({"load_format": None}, {"names": []}, {"shapes": [[1], [2]]}, {"dtypes": "float32"}):
            status, answer = await trainer.post(update, {**trainer.bucket(shapes), **change})
            assert status == 400, change
        status, answer = await trainer.post("/destroy_weights_update_group", {"group_name": trainer.group})
        assert status == 400 and "does not exist" in answer["message"]
        status, answer = await trainer.join(backend="nccl")
        assert status == 400 and "takes gloo" in answer["message"]
        status, answer = await trainer.join(world_size="2")
        assert status == 400 and "world_size is '2': expected an integer" in str(answer)

    on_server(make_model(), test)


def test_a_trainer_that_goes_away_in_mid_transfer_changes_nothing(make_model: Make, on_server: Any) -> None:
    weights = weights_of(make_model(seed=1))

    async def test(trainer: Trainer) -> None:
        before = await answers(trainer)
        await trainer.join()
        await trainer.post("/begin_weight_update", {})
        await trainer.send(next(halves(weights)))
        body = trainer.bucket({name: list(value.shape) for name, value in weights.items()})
        waiting = asyncio.create_task(trainer.post("/update_weights_from_distributed", body))
        await asyncio.sleep(0.2)
        trainer.leave()
        status, answer = await waiting
        assert status == 400 and "the broadcast in the group" in answer["message"]
        assert "\n" not in answer["message"]
        assert (await trainer.post("/end_weight_update", {}))[0] == 400
        assert await answers(trainer) == before

    on_server(make_model(), test)
