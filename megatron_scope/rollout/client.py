"""The asyncio client of one rollout server, SGLang or the embedded one, or of a router before several.

Every answer is checked before it becomes a `Rollout`; no torch and no transformers here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
from typing import Any

import aiohttp

from megatron_scope.errors import RolloutError, ScopeError, SyncError
from megatron_scope.records import Rollout, SamplingParams
from megatron_scope.rollout.wire import (
    RolloutRequest,
    as_object,
    as_version,
    check_ids,
    generate_body,
    one_line,
    parse_rollout,
    sample_seed,
)

__all__ = [
    "ClientOptions",
    "NoAnswer",
    "RolloutRequest",
    "ServerClient",
    "ServerFailure",
    "Unhealthy",
    "sample_seed",
]

HEALTH_POLL_S = 0.2
# Below the 5 s after which SGLang's HTTP server closes an idle connection, so that few are met closed.
KEEP_ALIVE_S = 2.0


class ServerFailure(RolloutError):
    """The server failed, not the request: another server, or this one later, may answer it."""


class NoAnswer(ServerFailure):
    """Nothing came within the time limit: the server hangs, or is too slow."""


@dataclasses.dataclass(frozen=True)
class Unhealthy:
    """Why a server is not healthy; `silent` when nothing came within the time limit, as of a hung one."""

    reason: str
    silent: bool


@dataclasses.dataclass(frozen=True)
class ClientOptions:
    """Time limits in seconds, and how often a connection that failed (never an answer) is tried again.

    `probe_timeout_s` is that of health and of what a server says about itself. Requests for responses are not
    tried again here: whether another server shall answer is for the pool to say.
    """

    request_timeout_s: float = 3600.0
    control_timeout_s: float = 600.0
    probe_timeout_s: float = 30.0
    num_retries: int = 4
    first_delay_s: float = 0.25  # doubles with each retry


class ServerClient:
    """One server with SGLang's HTTP protocol. Use it inside `async with`, or call `close`.

    Every failure is a RolloutError (SyncError for weights) of one line that names the server; a ServerFailure
    where the server, not the request, is at fault.
    """

    def __init__(
        self, url: str, *, vocab_size: int, api_key: str | None = None, options: ClientOptions | None = None
    ) -> None:
        self.url = url.rstrip("/")
        self._vocab_size, self._api_key = vocab_size, api_key
        self._options = options or ClientOptions()
        self._session: aiohttp.ClientSession | None = None
        self._sendings = itertools.count()

    async def __aenter__(self) -> ServerClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections; the server aborts what was open on them."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    # ---- what a server says about itself

    async def health(self) -> Unhealthy | None:
        """None when GET /health gives 200, else what was seen."""
        limit_s = self._options.probe_timeout_s
        try:
            async with self._open_session().get(
                self._at("/health"), timeout=aiohttp.ClientTimeout(total=limit_s)
            ) as response:
                return None if response.status == 200 else Unhealthy(f"HTTP {response.status}", silent=False)
        except TimeoutError:
            return Unhealthy(f"no answer to GET /health within {limit_s:g} s", silent=True)
        except (aiohttp.ClientError, OSError) as error:
            return Unhealthy(self._clean(error) or type(error).__name__, silent=False)

    async def wait_healthy(self, timeout_s: float) -> None:
        """Returns once GET /health gives 200; RolloutError after `timeout_s`."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while (seen := await self.health()) is not None:
            if asyncio.get_running_loop().time() > deadline:
                raise RolloutError(
                    f"{self.url}: not healthy after {timeout_s:g} s ({seen.reason}); start the server, mend "
                    "rollout.servers, or raise rollout.start_timeout_s"
                )
            await asyncio.sleep(HEALTH_POLL_S)

    async def server_info(self, failure: type[ScopeError] = RolloutError) -> dict[str, Any]:
        """The settings that the server was started with, and its `version`."""
        return as_object(
            await self._request("GET", "/server_info", None, failure), self._at("/server_info"), failure
        )

    async def model_info(self, failure: type[ScopeError] = RolloutError) -> dict[str, Any]:
        """The model that the server serves now, its `weight_version` among the rest."""
        return as_object(
            await self._request("GET", "/model_info", None, failure), self._at("/model_info"), failure
        )

    async def weight_version(self) -> int | None:
        """The version of the weights that the server serves now; None where no trainer has set one."""
        return as_version((await self.model_info()).get("weight_version"))

    # ---- work

    async def generate(
        self, request: RolloutRequest, params: SamplingParams, *, version: int | None = None
    ) -> Rollout:
        """One response; RolloutError where none comes or it does not hold together.

        With a `version`, StaleWeights where any of its tokens comes from other weights.
        """
        check_ids(request.prompt, self._vocab_size)

        def body() -> dict[str, Any]:
            return generate_body(request, params, sending=next(self._sendings))

        answer = await self._request("POST", "/generate", body, RolloutError)
        return parse_rollout(
            answer, request, params, vocab_size=self._vocab_size, server=self.url, version=version
        )

    async def update_weights_from_disk(self, path: str, version: int, *, abort_running: bool = False) -> None:
        """Has the server load `path` as `version` and reads that back; SyncError where it differs."""
        body = {
            "model_path": path,
            "weight_version": str(version),
            "load_format": "auto",  # a server that began with dummy weights would go on with them
            "abort_all_requests": abort_running,
            "flush_cache": True,
        }
        where = self._at("/update_weights_from_disk")
        answer = as_object(
            await self._request("POST", "/update_weights_from_disk", body, SyncError), where, SyncError
        )
        if answer.get("success") is not True:
            raise SyncError(f"{where}: the server did not take {path}: {one_line(answer.get('message'))}")
        # SGLang's /server_info goes on telling the version that the server was started with.
        got = (await self.model_info(SyncError)).get("weight_version")
        if str(got) != str(version):
            raise SyncError(
                f"{self.url}: weight version is {got!r} after an update to {version}; does another "
                "trainer use this server?"
            )

    async def control(self, path: str, body: dict[str, Any], *, limit_s: float) -> dict[str, Any]:
        """The answer to one step of a weight update, which is asked once and never again; SyncError where it
        is refused or does not come within `limit_s`.
        """
        try:
            answer = await self._exchange("POST", path, body, SyncError, True, limit_s)
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError) as error:
            raise SyncError(
                f"{self._at(path)}: the connection broke ({self._clean(error) or type(error).__name__}); is "
                "the server up?"
            ) from error
        return as_object(answer, self._at(path), SyncError)

    async def pause(self, mode: str) -> None:
        """Pauses generation: abort, retract or in_place."""
        await self._request("POST", "/pause_generation", {"mode": mode}, RolloutError)

    async def continue_(self) -> None:
        """Goes on after a pause."""
        await self._request("POST", "/continue_generation", {}, RolloutError)

    async def flush(self) -> None:
        """Drops the server's prefix cache; RolloutError while requests run."""
        await self._request("POST", "/flush_cache", {}, RolloutError, parse=False)

    async def abort_all(self) -> None:
        """Ends every request on the server; each is answered with what it has so far."""
        await self._request("POST", "/abort_request", {"abort_all": True}, RolloutError, parse=False)

    # ---- one HTTP exchange

    def _at(self, path: str) -> str:
        return f"{self.url}{path}"

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            headers = {} if self._api_key is None else {"Authorization": f"Bearer {self._api_key}"}
            tracing = aiohttp.TraceConfig()
            tracing.on_connection_reuseconn.append(_note_reuse)
            self._session = aiohttp.ClientSession(
                headers=headers,
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
                trace_configs=[tracing],
            )
        return self._session

    def _limit(self, method: str, path: str) -> tuple[float, str]:
        """The time limit of an exchange, and the setting that gives it."""
        if path == "/generate":
            return self._options.request_timeout_s, "rollout.request_timeout_s"
        if method == "GET":
            return self._options.probe_timeout_s, "rollout.health_timeout_s"
        return self._options.control_timeout_s, "sync.timeout_s"

    async def _request(
        self, method: str, path: str, body: Any, failure: type[ScopeError], *, parse: bool = True
    ) -> Any:
        """The parsed JSON answer. A failed connection is tried again, but not a request for a response."""
        num_retries = 0 if path == "/generate" else self._options.num_retries
        delay = self._options.first_delay_s
        for attempt in itertools.count():
            try:
                return await self._exchange(method, path, body, failure, parse)
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError) as error:
                if attempt >= num_retries:
                    tries = f" after {attempt + 1} attempts" if num_retries else ""
                    raise _of_server(failure)(
                        f"{self._at(path)}: no connection{tries} "
                        f"({self._clean(error) or type(error).__name__}); is the server up, and is "
                        "rollout.servers right?"
                    ) from error
            await asyncio.sleep(delay)
            delay *= 2

    async def _exchange(
        self,
        method: str,
        path: str,
        body: Any,
        failure: type[ScopeError],
        parse: bool,
        limit_s: float | None = None,
    ) -> Any:
        usual_s, setting = self._limit(method, path)
        limit_s = usual_s if limit_s is None else limit_s
        where = self._at(path)
        try:
            status, answer = await self._send(method, path, body, limit_s)
        except TimeoutError as error:
            raise (NoAnswer if failure is RolloutError else failure)(
                f"{where}: no answer within {limit_s:g} s; look at the server, or raise {setting}"
            ) from error
        except aiohttp.InvalidURL as error:
            raise failure(f"{where}: not a URL; expected http://HOST:PORT: mend rollout.servers") from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError):
            raise  # a failed connection: the caller tries again
        except aiohttp.ClientError as error:
            raise failure(
                f"{where}: no HTTP answer ({self._clean(error)}); is this an SGLang server?"
            ) from error
        if status == 401:
            raise failure(f"{where}: HTTP 401, the API key is missing or wrong; mend rollout.api_key_env")
        if status != 200:
            kind = _of_server(failure) if status >= 500 or status in (408, 429) else failure
            raise kind(f"{where}: HTTP {status}: {self._clean(_server_message(answer))}")
        if not parse:
            return None
        try:
            return json.loads(answer)
        except ValueError as error:
            raise failure(
                f"{where}: the answer is not JSON: {self._clean(_text(answer))!r}; is this an SGLang server?"
            ) from error

    async def _send(self, method: str, path: str, body: Any, limit_s: float) -> tuple[int, bytes]:
        """Status and body of the answer.

        A connection from an earlier exchange may have been closed by the server meanwhile, which says nothing
        about the server: the request is sent again at once, in the end on a new connection. A `body` that is
        to be another each time is a function.
        """
        async with asyncio.timeout(limit_s):
            while True:
                connection = _Connection()
                try:
                    async with self._open_session().request(
                        method,
                        self._at(path),
                        json=body() if callable(body) else body,
                        timeout=aiohttp.ClientTimeout(),
                        trace_request_ctx=connection,
                    ) as response:
                        connection.has_answered = True
                        return response.status, await response.read()
                except (aiohttp.ClientConnectionError, ConnectionError):
                    if connection.has_answered or not connection.is_reused:
                        raise

    def _clean(self, message: object) -> str:
        text = one_line(message)
        return text if not self._api_key else text.replace(self._api_key, "***")


@dataclasses.dataclass
class _Connection:
    """What is known of the connection that carried a request."""

    is_reused: bool = False
    has_answered: bool = False


async def _note_reuse(session: aiohttp.ClientSession, context: Any, params: Any) -> None:
    del session, params
    if context.trace_request_ctx is not None:
        context.trace_request_ctx.is_reused = True


def _of_server(failure: type[ScopeError]) -> type[ScopeError]:
    """The error that says that the server is at fault."""
    return ServerFailure if failure is RolloutError else failure


def _text(answer: bytes) -> str:
    return answer.decode(errors="replace")


def _server_message(answer: bytes) -> str:
    """What an error body says: SGLang writes error.message, error, or message."""
    try:
        body = json.loads(answer)
    except ValueError:
        return _text(answer)
    if not isinstance(body, dict):
        return _text(answer)
    error = body.get("error", body.get("message", _text(answer)))
    return str(error.get("message", error) if isinstance(error, dict) else error)
