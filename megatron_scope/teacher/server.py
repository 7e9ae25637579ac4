"""One server of a teacher over HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scope.errors import ConfigError, ScoringError
from megatron_scope.rollout.http import FAILURES, HttpServer, InvalidURL
from megatron_scope.rollout.wire import as_object, one_line
from megatron_scope.teacher.wire import NoAnswer, ScoringRequest, parse_scores, scoring_body

HEALTH_POLL_S = 0.2
CONTROL_TIMEOUT_S = 60.0  # for what needs no model


@dataclasses.dataclass(frozen=True)
class TeacherOptions:
    """Time limits in seconds, and the bounds of what is sent at a time (config section `teacher`)."""

    start_timeout_s: float
    request_timeout_s: float
    request_tokens: int
    max_concurrent_requests: int
    canary_tolerance: float


@dataclasses.dataclass(frozen=True)
class ServerFacts:
    """What a server tells of itself; None where it does not."""

    model_path: str
    tokenizer_path: str | None
    weight_version: str
    max_input_tokens: int | None
    vocab_rows: int | None


class TeacherServer:
    """The HTTP exchanges with one server.

    Failures that another try may not have are NoAnswer, all others a ScopeError of one line that names the
    server.
    """

    def __init__(self, url: str, *, api_key: str | None, options: TeacherOptions) -> None:
        self._http = HttpServer(url, api_key)
        self.weight_version: str | None = None  # that its answers must carry; None takes any
        self.last_id: int | None = None  # the greatest that is sent to it
        self._options = options

    @property
    def url(self) -> str:
        """The server's address."""
        return self._http.url

    async def close(self) -> None:
        """Closes the connections; the server aborts what was open on them."""
        await self._http.close()

    async def wait_healthy(self, timeout_s: float) -> None:
        """Returns once GET /health gives 200; ScoringError after `timeout_s`."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            try:
                await self._request("GET", "/health", None, 10.0, parse=False)
                return
            except NoAnswer as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise ScoringError(
                        f"{error}: the teacher is not healthy after {timeout_s:g} s; start the server, mend "
                        "teacher.server, or raise teacher.start_timeout_s"
                    ) from None
            await asyncio.sleep(HEALTH_POLL_S)

    async def facts(self) -> ServerFacts:
        """What the server tells of itself; ConfigError when it serves no generation model."""
        model = await self._get("/model_info")
        if model.get("is_generation") is not True:
            raise ConfigError(
                f"{self.url}: {model.get('model_path')} is not served as a generation model (is_generation "
                f"is {model.get('is_generation')!r}); start the teacher without --is-embedding"
            )
        server = await self._get("/server_info")
        longest = server.get("max_req_input_len")  # SGLang takes less than this, the embedded server all of
        if isinstance(longest, int):
            longest -= 1
        else:
            longest = server.get("context_length")
        tokenizer_path = model.get("tokenizer_path")
        return ServerFacts(
            model_path=str(model.get("model_path")),
            tokenizer_path=tokenizer_path if isinstance(tokenizer_path, str) else None,
            weight_version=str(model.get("weight_version")),
            max_input_tokens=longest if isinstance(longest, int) else None,
            vocab_rows=_vocab_rows(server.get("vocab_size"), str(model.get("model_path"))),
        )

    async def texts_of(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token by the server's tokenizer, special ones included."""
        body = {"tokens": [[token_id] for token_id in token_ids], "skip_special_tokens": False}
        path = "/detokenize"
        answer = as_object(
            await self._request("POST", path, body, CONTROL_TIMEOUT_S), f"{self.url}{path}", ScoringError
        )
        texts = answer.get("text")
        if not isinstance(texts, list) or len(texts) != len(token_ids):
            raise ScoringError(f"{self.url}{path}: got {one_line(texts)}; expected {len(token_ids)} texts")
        return texts

    async def score(self, requests: Sequence[ScoringRequest]) -> list[np.ndarray]:
        """Each request's log-probs, float32 [R] in nats at temperature 1, in the requests' order."""
        body = await self._request(
            "POST", "/generate", scoring_body(requests), self._options.request_timeout_s, requests
        )
        return parse_scores(
            body,
            requests,
            server=self.url,
            weight_version=self.weight_version,
            last_id=self.last_id,
        )

    # ---- one HTTP exchange

    async def _get(self, path: str) -> dict[str, Any]:
        answer = await self._request("GET", path, None, CONTROL_TIMEOUT_S)
        return as_object(answer, f"{self.url}{path}", ScoringError)

    async def _request(
        self,
        method: str,
        path: str,
        body: Any,
        timeout_s: float,
        scored: Sequence[ScoringRequest] = (),
        *,
        parse: bool = True,
    ) -> Any:
        """The parsed JSON answer; `scored` is named where the server refuses it."""
        where = f"{self.url}{path}"
        try:
            # A kept connection may have been closed by the server meanwhile, which would look like its death;
            # beside seconds of scoring a new one costs nothing.
            status, answer = await self._http.send(method, path, body, limit_s=timeout_s, once=True)
        except TimeoutError:
            raise NoAnswer(f"{where}: no answer within {timeout_s:g} s", timed_out=True) from None
        except InvalidURL:
            raise ConfigError(f"{where}: not a URL; expected http://HOST:PORT: mend teacher.server") from None
        except FAILURES as error:
            raise NoAnswer(f"{where}: {self._http.reason(error)}") from None
        if status == 401:
            raise ConfigError(f"{where}: HTTP 401, the API key is missing or wrong; mend teacher.api_key_env")
        if status >= 500:
            raise NoAnswer(f"{where}: HTTP {status}: {self._http.message(answer)}")
        if status != 200:
            what = f" to {names_of(scored)}" if scored else ""
            raise ScoringError(f"{where}: HTTP {status}{what}: {self._http.message(answer)}")
        return self._http.parsed(answer, path, ScoringError) if parse else None


def names_of(requests: Sequence[ScoringRequest]) -> str:
    """The first one's name, and how many others there are."""
    others = len(requests) - 1
    return requests[0].name + (f" and {others} other{'s' * (others > 1)} in one request" if others else "")


def _vocab_rows(told: Any, model_path: str) -> int | None:
    """The rows of a server's table: SGLang does not tell, but its model folder does where one can read it."""
    if told is None:
        try:
            config = json.loads((Path(model_path) / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        told = config.get("vocab_size")
    return told if isinstance(told, int) else None
