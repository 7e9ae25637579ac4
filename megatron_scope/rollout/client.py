"""The asyncio client of a rollout server, SGLang or the embedded one, and the streaming of a step's rollouts.

Every answer is checked before it becomes a `Rollout`; no torch and no transformers here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp

from megatron_scope.errors import RolloutError, ScopeError, SyncError
from megatron_scope.records import Prompt, Rollout, SamplingParams
from megatron_scope.rollout.wire import (
    RolloutRequest,
    as_object,
    check_ids,
    generate_body,
    one_line,
    parse_rollout,
    sample_seed,
)

__all__ = ["ClientOptions", "RolloutRequest", "ServerClient", "collect", "sample_seed"]

HEALTH_POLL_S = 0.2


@dataclasses.dataclass(frozen=True)
class ClientOptions:
    """Time limits in seconds, and how often a connection that failed (never an answer) is tried again."""

    request_timeout_s: float = 3600.0
    control_timeout_s: float = 600.0
    num_retries: int = 4
    first_delay_s: float = 0.25  # doubles with each retry


class ServerClient:
    """One server with SGLang's HTTP protocol. Use it inside `async with`, or call `close`.

    Every failure is a RolloutError (SyncError for weights) of one line that names the server.
    """

    def __init__(
        self, url: str, *, vocab_size: int, api_key: str | None = None, options: ClientOptions | None = None
    ) -> None:
        self.url = url.rstrip("/")
        self.outstanding_tokens = 0  # prompt and most new tokens of the requests in flight
        self._vocab_size, self._api_key = vocab_size, api_key
        self._options = options or ClientOptions()
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> ServerClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections; the server aborts what was open on them."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def wait_healthy(self, timeout_s: float) -> None:
        """Returns once GET /health gives 200; RolloutError after `timeout_s`."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            seen = await self._probe()
            if seen is None:
                return
            if asyncio.get_running_loop().time() > deadline:
                raise RolloutError(
                    f"{self.url}: not healthy after {timeout_s:g} s ({seen}); start the server, mend "
                    "rollout.servers, or raise rollout.start_timeout_s"
                )
            await asyncio.sleep(HEALTH_POLL_S)

    async def server_info(self) -> dict[str, Any]:
        """The server's settings, `weight_version` among them."""
        return as_object(
            await self._request("GET", "/server_info", None, RolloutError), self._at("/server_info")
        )

    async def generate(
        self, prompt: Prompt, sample: int, params: SamplingParams, *, seed: int, rid: str
    ) -> Rollout:
        """One response to `prompt`; RolloutError where none comes or it does not hold together."""
        request = RolloutRequest(prompt, sample, seed, rid)
        check_ids(prompt, self._vocab_size)
        size = len(prompt.token_ids) + params.max_new_tokens
        self.outstanding_tokens += size
        try:
            body = await self._request("POST", "/generate", generate_body(request, params), RolloutError)
        finally:
            self.outstanding_tokens -= size
        return parse_rollout(body, request, params, vocab_size=self._vocab_size, server=self.url)

    async def update_weights_from_disk(self, path: str, version: int, *, abort_running: bool = False) -> None:
        """Has the server load `path` as `version` and reads that back; SyncError where it differs."""
        body = {
            "model_path": path,
            "weight_version": str(version),
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
        path = "/model_info"
        info = as_object(await self._request("GET", path, None, SyncError), self._at(path), SyncError)
        got = info.get("weight_version")
        if str(got) != str(version):
            raise SyncError(
                f"{self.url}: weight version is {got!r} after an update to {version}; does another "
                "trainer use this server?"
            )

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
            self._session = aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0))
        return self._session

    async def _probe(self) -> str | None:
        """None when healthy, else what was seen."""
        limit = aiohttp.ClientTimeout(total=10.0)
        try:
            async with self._open_session().get(self._at("/health"), timeout=limit) as response:
                return None if response.status == 200 else f"HTTP {response.status}"
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return one_line(error) or type(error).__name__

    async def _request(
        self, method: str, path: str, body: Any, failure: type[ScopeError], *, parse: bool = True
    ) -> Any:
        """The parsed JSON answer. A failed connection is tried again, under another request id."""
        delay = self._options.first_delay_s
        for attempt in itertools.count():
            try:
                return await self._exchange(method, path, _for_attempt(body, attempt), failure, parse)
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError) as error:
                if attempt >= self._options.num_retries:
                    raise failure(
                        f"{self._at(path)}: no connection after {attempt + 1} attempts "
                        f"({self._clean(error) or type(error).__name__}); is the server up, and is "
                        "rollout.servers right?"
                    ) from error
            await asyncio.sleep(delay)
            delay *= 2

    async def _exchange(
        self, method: str, path: str, body: Any, failure: type[ScopeError], parse: bool
    ) -> Any:
        generating = path == "/generate"
        limit_s = self._options.request_timeout_s if generating else self._options.control_timeout_s
        timeout = aiohttp.ClientTimeout(total=limit_s)
        where = self._at(path)
        try:
            async with self._open_session().request(method, where, json=body, timeout=timeout) as response:
                status, text = response.status, await response.text(errors="replace")
        except TimeoutError as error:
            setting = "rollout.request_timeout_s" if generating else "sync.timeout_s"
            raise failure(
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
            raise failure(f"{where}: HTTP {status}: {self._clean(_server_message(text))}")
        if not parse:
            return None
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise failure(
                f"{where}: the answer is not JSON: {self._clean(text)!r}; is this an SGLang server?"
            ) from error

    def _clean(self, message: object) -> str:
        text = one_line(message)
        return text if not self._api_key else text.replace(self._api_key, "***")


async def collect(
    clients: Sequence[ServerClient],
    requests: Sequence[RolloutRequest],
    params: SamplingParams,
    *,
    max_concurrent: int,
    on_rollout: Callable[[Rollout], None],
) -> None:
    """Runs all requests and hands each Rollout to `on_rollout` as it arrives, in whatever order they finish.

    At most `max_concurrent` requests run on one server. Requests of one prompt go to one server, which then
    reads their prompt once; a new prompt goes to the server with the fewest outstanding tokens. The first
    request that finally fails cancels the others, and its error is raised.
    """
    slots = {client: asyncio.Semaphore(max_concurrent) for client in clients}
    home: dict[str, ServerClient] = {}

    async def run(client: ServerClient, request: RolloutRequest) -> None:
        try:
            rollout = await client.generate(
                request.prompt, request.sample, params, seed=request.seed, rid=request.rid
            )
        finally:
            slots[client].release()
        on_rollout(rollout)

    try:
        async with asyncio.TaskGroup() as group:
            for request in requests:
                client = home.get(request.prompt.id) or min(
                    clients, key=lambda client: client.outstanding_tokens
                )
                home[request.prompt.id] = client
                await slots[client].acquire()
                group.create_task(run(client, request))
                await asyncio.sleep(0)  # lets the request count as outstanding before the next one is placed
    except BaseExceptionGroup as failures:
        raise _first(failures) from None


def _for_attempt(body: Any, attempt: int) -> Any:
    """A retry must not collide with what the server may still hold under the first attempt's id."""
    if attempt == 0 or not isinstance(body, dict) or "rid" not in body:
        return body
    return {**body, "rid": f"{body['rid']}-retry{attempt}"}


def _server_message(text: str) -> str:
    """What an error body says: SGLang writes error.message, error, or message."""
    try:
        body = json.loads(text)
    except json.JSONDecodeError:
        return text
    if not isinstance(body, dict):
        return text
    error = body.get("error", body.get("message", text))
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _first(failures: BaseExceptionGroup) -> BaseException:
    """The earliest leaf of a task group's failures; the others only follow from it."""
    first = failures.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
