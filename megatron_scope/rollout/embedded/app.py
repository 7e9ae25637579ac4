"""SGLang's HTTP routes over one embedded engine."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from aiohttp import web

import megatron_scope
from megatron_scope.rollout.embedded.engine import Engine
from megatron_scope.rollout.embedded.model import ServedModel, WeightsError
from megatron_scope.rollout.embedded.options import ServeOptions
from megatron_scope.rollout.embedded.protocol import (
    Answer,
    BadRequest,
    Call,
    Sample,
    build_response,
    parse_call,
)
from megatron_scope.rollout.embedded.weights import WeightReceiver

MAX_BODY_BYTES = 2**28
OPEN_PATHS = ("/health", "/ready")  # no API key needed, as in SGLang
HEALTH_PROBE_S = 20.0

T = TypeVar("T")
Decode = Callable[[Sequence[int], bool], str]


class EmbeddedApp:
    """The HTTP side of one engine: parses, waits for the engine's answers and builds responses."""

    def __init__(
        self, options: ServeOptions, model: ServedModel, decode: Decode, api_key: str | None
    ) -> None:
        self._options, self._model, self._decode, self._api_key = options, model, decode, api_key
        self._model_path = options.model
        self._open: dict[str, tuple[Sample, asyncio.Future[Answer]]] = {}
        self._loop = asyncio.get_running_loop()
        self._weights = WeightReceiver()
        self.engine = Engine(model, options, self._deliver)

    def application(self) -> web.Application:
        """The aiohttp application with SGLang's routes."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._guard])
        gets = {
            "/health": self._health,
            "/ready": self._health,
            "/health_generate": self._health_generate,
            "/server_info": self._server_info,
            "/get_server_info": self._server_info,
            "/model_info": self._model_info,
            "/get_model_info": self._model_info,
        }
        posts = {
            "/generate": self._generate,
            "/update_weights_from_disk": self._update_weights,
            "/update_weight_version": self._update_version,
            "/init_weights_update_group": self._init_group,
            "/destroy_weights_update_group": self._destroy_group,
            "/begin_weight_update": self._begin_update,
            "/update_weights_from_distributed": self._receive,
            "/end_weight_update": self._end_update,
            "/pause_generation": self._pause,
            "/continue_generation": self._continue,
            "/flush_cache": self._flush,
            "/abort_request": self._abort,
        }
        app.router.add_routes([web.get(path, handler) for path, handler in gets.items()])
        app.router.add_routes([web.post(path, handler) for path, handler in posts.items()])
        return app

    def close(self) -> None:
        """Ends the engine; what is still open is never answered."""
        self.engine.close(timeout_s=1.0)

    def _deliver(self, finished: list[tuple[Sample, Answer]]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._settle, finished)

    def _settle(self, finished: list[tuple[Sample, Answer]]) -> None:
        for sample, answer in finished:
            expected, future = self._open.get(sample.id, (None, None))
            # A request that was given up may have left its rid to another before its own answer came.
            if expected is sample and future is not None and not future.done():
                future.set_result(answer)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
        """Checks the API key and turns refusals into SGLang's 400."""
        if self._api_key is not None and request.path not in OPEN_PATHS:
            expected = f"Bearer {self._api_key}".encode()
            if not hmac.compare_digest(request.headers.get("Authorization", "").encode(), expected):
                return web.json_response({"error": "Unauthorized"}, status=401)
        try:
            return await handler(request)
        except BadRequest as error:
            return web.json_response(error.body, status=400)
        except WeightsError as error:
            return web.json_response({"success": False, "message": str(error)}, status=400)

    # ---- generation

    async def _generate(self, request: web.Request) -> web.Response:
        call = parse_call(await _json(request), self.engine.limits)
        answers = await self._run(call)
        failed = next((answer.error for answer in answers if answer.error is not None), None)
        if failed is not None:
            return web.json_response({"error": {"message": failed}}, status=500)
        return web.json_response(build_response(call, answers, self._decode))

    async def _run(self, call: Call) -> list[Answer]:
        """The engine's answers; a client that goes away takes its samples with it."""
        ids = [sample.id for sample in call.samples]
        doubled = next(
            (name for index, name in enumerate(ids) if name in self._open or name in ids[:index]), None
        )
        if doubled is not None:
            raise BadRequest(f"rid {doubled!r} is already in use: give every open request a rid of its own")
        futures = [self._loop.create_future() for _ in ids]
        self._open.update(zip(ids, zip(call.samples, futures, strict=True), strict=True))
        try:
            self.engine.submit(call.samples)
            return await asyncio.gather(*futures)
        except asyncio.CancelledError:
            self.engine.abort(frozenset(ids))
            raise
        finally:
            for name in ids:
                del self._open[name]

    async def _abort(self, request: web.Request) -> web.Response:
        body = await _object(request)
        rid, everything = body.get("rid"), body.get("abort_all", False)
        if not everything and not isinstance(rid, str):
            raise BadRequest("give rid (a string), or abort_all: true")
        self.engine.abort(None if everything else frozenset((str(rid),)))
        return web.Response()

    # ---- weights, pause, cache

    async def _update_weights(self, request: web.Request) -> web.Response:
        body = await _object(request)
        folder, version = body.get("model_path"), body.get("weight_version")
        if not isinstance(folder, str):
            raise BadRequest("model_path must be the path of a model folder")
        update = self.engine.update_weights(
            folder,
            None if version is None else str(version),
            abort_all=bool(body.get("abort_all_requests", False)),
        )
        num_paused = await _settled(update)
        self._model_path = folder
        message = "Succeeded to update model weights."
        return web.json_response({"success": True, "message": message, "num_paused_requests": num_paused})

    async def _update_version(self, request: web.Request) -> web.Response:
        body = await _object(request)
        version = str(_field(body, "new_version", str))
        await _settled(self.engine.set_version(version, abort_all=bool(body.get("abort_all_requests", True))))
        return _succeeded(f"Weight version updated to {version}", new_version=version)

    async def _init_group(self, request: web.Request) -> web.Response:
        body = await _object(request)
        await self._weights.join(
            master_address=_field(body, "master_address", str),
            master_port=_field(body, "master_port", int),
            rank=_field(body, "rank_offset", int),
            world_size=_field(body, "world_size", int),
            name=_field(body, "group_name", str),
            backend=_field(body, "backend", str),
        )
        return _succeeded("Succeeded to initialize custom process group.")

    async def _destroy_group(self, request: web.Request) -> web.Response:
        self._weights.leave(_field(await _object(request), "group_name", str))
        return _succeeded("Succeeded to destroy custom process group.")

    async def _begin_update(self, request: web.Request) -> web.Response:
        await _object(request)
        self._weights.begin()
        return _succeeded("Success")

    async def _receive(self, request: web.Request) -> web.Response:
        """One bucket of weights, which are taken into use at the end only."""
        body = await _object(request)
        if body.get("load_format") != "flattened_bucket":
            raise BadRequest(f"load_format is {body.get('load_format')!r}: expected flattened_bucket")
        names, dtypes, shapes = (_field(body, name, list) for name in ("names", "dtypes", "shapes"))
        if not len(names) == len(dtypes) == len(shapes) > 0:
            raise BadRequest("names, dtypes and shapes must be lists of one length, 1 or more")
        await self._weights.receive(names, dtypes, shapes, _field(body, "group_name", str))
        return _succeeded("Succeeded to update parameter online.")

    async def _end_update(self, request: web.Request) -> web.Response:
        await _object(request)
        received = self._weights.end()
        if received:
            await _settled(self.engine.update_weights(received, None, abort_all=False))
        return _succeeded("Success")

    async def _pause(self, request: web.Request) -> web.Response:
        mode = (await _object(request)).get("mode", "abort")
        if mode not in ("abort", "retract", "in_place"):
            raise BadRequest(f"mode is {mode!r}: expected abort, retract or in_place")
        await _settled(self.engine.pause(mode))
        return web.json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def _continue(self, request: web.Request) -> web.Response:
        await _object(request)
        await _settled(self.engine.resume())
        return web.json_response({"message": "Generation continued successfully.", "status": "ok"})

    async def _flush(self, request: web.Request) -> web.Response:
        if await _settled(self.engine.flush()):
            return web.Response(text="Cache flushed.\n")
        return web.Response(text="Cache not flushed: requests are running or waiting.\n", status=400)

    # ---- status

    async def _health(self, request: web.Request) -> web.Response:
        state = self.engine.state()
        return web.Response(status=503 if state.paused or state.failure is not None else 200)

    async def _health_generate(self, request: web.Request) -> web.Response:
        """200 when one token comes out of the model."""
        state = self.engine.state()
        if state.paused or state.failure is not None:
            return web.Response(status=503)
        body = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
        try:
            answers = await asyncio.wait_for(self._run(parse_call(body, self.engine.limits)), HEALTH_PROBE_S)
        except TimeoutError:
            return web.Response(status=503)
        return web.Response(status=200 if answers[0].error is None else 503)

    async def _server_info(self, request: web.Request) -> web.Response:
        state, options = self.engine.state(), self._options
        info = {
            "model_path": self._model_path,
            "host": options.host,
            "dtype": options.dtype,
            "tp_size": 1,
            "pp_size": 1,
            "dp_size": 1,
            "context_length": self.engine.limits.context_length,
            "max_running_requests": options.max_running_requests,
            "max_total_num_tokens": options.max_total_tokens,
            "vocab_size": self.engine.limits.vocab_size,
            "num_running_requests": state.num_running,
            "num_waiting_requests": state.num_waiting,
            "paused": state.paused,
            "weight_version": state.weight_version,
            "version": f"megatron_scope {megatron_scope.__version__}",
        }
        return web.json_response(info)

    async def _model_info(self, request: web.Request) -> web.Response:
        info = {
            "model_path": self._model_path,
            "tokenizer_path": self._options.model,
            "is_generation": True,
            "weight_version": self.engine.state().weight_version,
            "model_type": self._model.config.model_type,
            "architectures": self._model.config.architectures,
        }
        return web.json_response(info)


async def _json(request: web.Request) -> Any:
    try:
        return await request.json()
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from error


async def _object(request: web.Request) -> dict[str, Any]:
    body = await _json(request)
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    return body


def _field(body: dict[str, Any], name: str, kind: type[T]) -> T:
    value = body.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise BadRequest(f"{name} is {value!r}: expected {_KINDS[kind]}")
    return value


_KINDS: dict[type, str] = {str: "a string", int: "an integer", list: "a list"}


def _succeeded(message: str, **more: str) -> web.Response:
    return web.json_response({"success": True, "message": message, **more})


async def _settled(future: Future[T]) -> T:
    """The engine's result; a client that goes away does not cancel what the engine is about to do."""
    return await asyncio.shield(asyncio.wrap_future(future))
