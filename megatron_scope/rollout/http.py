"""HTTP with one server: status and body of an answer, within a time limit; what they mean is the caller's."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import aiohttp

from megatron_scope.errors import ScopeError
from megatron_scope.rollout.wire import one_line

# Below the 5 s after which SGLang's HTTP server closes an idle connection, so that few are met closed.
KEEP_ALIVE_S = 2.0
# What `send` raises, beside TimeoutError, where there is no answer; the other two are among them.
FAILURES = (aiohttp.ClientError, OSError)
CONNECTION_FAILURES = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError)
InvalidURL = aiohttp.InvalidURL


class HttpServer:
    """The connections to one server. `close` ends them, and the server aborts what was open on them."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = url.rstrip("/")
        self._api_key = api_key
        self._session: aiohttp.ClientSession | None = None
        self._once_session: aiohttp.ClientSession | None = None  # each request on a connection of its own

    async def close(self) -> None:
        """Closes the connections; a later request opens new ones."""
        for session in (self._session, self._once_session):
            if session is not None:
                await session.close()
        self._session = self._once_session = None

    async def send(
        self,
        method: str,
        path: str,
        body: Any | Callable[[], Any] = None,
        *,
        limit_s: float,
        once: bool = False,
    ) -> tuple[int, bytes]:
        """Status and body of the answer; TimeoutError or one of FAILURES where there is none.

        A connection from an earlier exchange may have been closed by the server meanwhile, which says nothing
        about the server: the request is sent again at once, in the end on a new connection. A `body` that is
        to be another each time is a function. `once`: on a new connection, and never again.
        """
        session = self._open_once_session() if once else self._open_session()
        async with asyncio.timeout(limit_s):
            while True:
                connection = _Connection()
                try:
                    async with session.request(
                        method,
                        f"{self.url}{path}",
                        json=body() if callable(body) else body,
                        timeout=aiohttp.ClientTimeout(),
                        trace_request_ctx=connection,
                    ) as response:
                        connection.has_answered = True
                        return response.status, await response.read()
                except CONNECTION_FAILURES:
                    if once or connection.has_answered or not connection.is_reused:
                        raise

    def reason(self, error: BaseException) -> str:
        """What an exception says, or else its type."""
        return self._line(error) or type(error).__name__

    def parsed(self, answer: bytes, path: str, failure: type[ScopeError]) -> Any:
        """The JSON of a body; `failure` where it is none."""
        try:
            return json.loads(answer)
        except ValueError as error:
            raise failure(
                f"{self.url}{path}: the answer is not JSON: {self._line(answer)!r}; is this an SGLang server?"
            ) from error

    def message(self, answer: bytes) -> str:
        """What the body of an error says: SGLang writes error.message, error, or message."""
        told: object = answer
        with contextlib.suppress(ValueError):
            body = json.loads(answer)
            if isinstance(body, dict):
                told = body.get("error", body.get("message", answer))
                told = told.get("message", told) if isinstance(told, dict) else told
        return self._line(told)

    def _line(self, told: object) -> str:
        """What was told, on one line and without the key."""
        line = one_line(told.decode(errors="replace") if isinstance(told, bytes) else told)
        return line if not self._api_key else line.replace(self._api_key, "***")

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            tracing = aiohttp.TraceConfig()
            tracing.on_connection_reuseconn.append(_note_reuse)
            self._session = aiohttp.ClientSession(
                headers=self._headers(),
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
                trace_configs=[tracing],
            )
        return self._session

    def _open_once_session(self) -> aiohttp.ClientSession:
        """For requests that must not be sent twice: on a new connection none is lost to a stale one."""
        if self._once_session is None:
            self._once_session = aiohttp.ClientSession(
                headers=self._headers(), connector=aiohttp.TCPConnector(limit=0, force_close=True)
            )
        return self._once_session

    def _headers(self) -> dict[str, str]:
        return {} if self._api_key is None else {"Authorization": f"Bearer {self._api_key}"}


@dataclasses.dataclass
class _Connection:
    """What is known of the connection that carried a request."""

    is_reused: bool = False
    has_answered: bool = False


async def _note_reuse(session: aiohttp.ClientSession, context: Any, params: Any) -> None:
    del session, params
    if context.trace_request_ctx is not None:
        context.trace_request_ctx.is_reused = True
