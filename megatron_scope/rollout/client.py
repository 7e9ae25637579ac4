"""The asyncio client of one rollout server, SGLang or the embedded one, or of a router before several.

Every answer is checked before it becomes a `Rollout`; no torch and no transformers here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from typing import Any

from megatron_scope.errors import RolloutError, ScopeError, SyncError
from megatron_scope.records import Rollout, SamplingParams
from megatron_scope.rollout.http import CONNECTION_FAILURES, FAILURES, HttpServer, InvalidURL
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
    "RolloutRequest",
    "ServerClient",
    "ServerFailure",
    "TimedOut",
    "Unhealthy",
    "sample_seed",
]

HEALTH_POLL_S = 0.2


class ServerFailure(RolloutError):
    """The server failed, not the request: another server, or this one later, may answer it."""


class TimedOut(ServerFailure):
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

    request_timeout_s: float
    control_timeout_s: float
    probe_timeout_s: float
    num_retries: int = 4
    first_delay_s: float = 0.25  # doubles with each retry


class ServerClient:
    """One server with SGLang's HTTP protocol. Use it inside `async with`, or call `close`.

    Every failure is a RolloutError (SyncError for weights) of one line that names the server; a ServerFailure
    where the server, not the request, is at fault.
    """

    def __init__(
        self, url: str, *, vocab_size: int, options: ClientOptions, api_key: str | None = None
    ) -> None:
        self._http = HttpServer(url, api_key)
        self._vocab_size, self._options = vocab_size, options
        self._sendings = itertools.count()

    @property
    def url(self) -> str:
        """The server's address."""
        return self._http.url

    async def __aenter__(self) -> ServerClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections; the server aborts what was open on them."""
        await self._http.close()

    # ---- what a server says about itself

    async def health(self) -> Unhealthy | None:
        """None when GET /health gives 200, else what was seen."""
        limit_s = self._options.probe_timeout_s
        try:
            status, _ = await self._http.send("GET", "/health", limit_s=limit_s)
        except TimeoutError:
            return Unhealthy(f"no answer to GET /health within {limit_s:g} s", silent=True)
        except FAILURES as error:
            return Unhealthy(self._http.reason(error), silent=False)
        return None if status == 200 else Unhealthy(f"HTTP {status}", silent=False)

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
        # SGLang's /server_info goes on telling the version that the server was started with.
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
        """Has the server load `path` as `version`; SyncError where it says that it did not."""
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

    async def control(self, path: str, body: dict[str, Any], *, limit_s: float) -> dict[str, Any]:
        """The answer to one step of a weight update, which is asked once and never again; SyncError where it
        is refused or does not come within `limit_s`.
        """
        try:
            answer = await self._exchange("POST", path, body, SyncError, limit_s=limit_s, once=True)
        except CONNECTION_FAILURES as error:
            raise SyncError(
                f"{self._at(path)}: the connection broke ({self._http.reason(error)}); is the server up?"
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
                return await self._exchange(method, path, body, failure, parse=parse)
            except CONNECTION_FAILURES as error:
                if attempt >= num_retries:
                    tries = f" after {attempt + 1} attempts" if num_retries else ""
                    raise _of_server(failure)(
                        f"{self._at(path)}: no connection{tries} ({self._http.reason(error)}); is the server "
                        "up, and is rollout.servers right?"
                    ) from error
            await asyncio.sleep(delay)
            delay *= 2

    async def _exchange(
        self,
        method: str,
        path: str,
        body: Any,
        failure: type[ScopeError],
        *,
        parse: bool = True,
        limit_s: float | None = None,
        once: bool = False,
    ) -> Any:
        usual_s, setting = self._limit(method, path)
        limit_s = usual_s if limit_s is None else limit_s
        where = self._at(path)
        try:
            status, answer = await self._http.send(method, path, body, limit_s=limit_s, once=once)
        except TimeoutError as error:
            raise (TimedOut if failure is RolloutError else failure)(
                f"{where}: no answer within {limit_s:g} s; look at the server, or raise {setting}"
            ) from error
        except InvalidURL as error:
            raise failure(f"{where}: not a URL; expected http://HOST:PORT: mend rollout.servers") from error
        except CONNECTION_FAILURES:
            raise  # the caller tries again
        except FAILURES as error:
            raise failure(
                f"{where}: no HTTP answer ({self._http.reason(error)}); is this an SGLang server?"
            ) from error
        if status == 401:
            raise failure(f"{where}: HTTP 401, the API key is missing or wrong; mend rollout.api_key_env")
        if status != 200:
            kind = _of_server(failure) if status >= 500 or status in (408, 429) else failure
            raise kind(f"{where}: HTTP {status}: {self._http.message(answer)}")
        return self._http.parsed(answer, path, failure) if parse else None


def _of_server(failure: type[ScopeError]) -> type[ScopeError]:
    """The error that says that the server is at fault."""
    return ServerFailure if failure is RolloutError else failure
