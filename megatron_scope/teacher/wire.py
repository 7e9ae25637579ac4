"""The wire format of a teacher's scores on the client's side: requests written, answers checked; no HTTP
here.

A server that is asked for no new token gives the log-probs of the input from `logprob_start_len` on, at
temperature 1: first an entry without one, then one for each response token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_scope.errors import ScoringError
from megatron_scope.rollout.wire import as_object, one_line


@dataclasses.dataclass(frozen=True)
class ScoringRequest:
    """One response to score: the log-prob of each of `target_ids` [R], given `prompt_ids` [P > 0] and those
    before it. `name` stands for it in messages.
    """

    name: str
    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """What the server reads."""
        return len(self.prompt_ids) + len(self.target_ids)


class NoAnswer(Exception):
    """A server gave none, which another server or a later try may do; the message says what happened."""

    def __init__(self, message: str, *, timed_out: bool = False) -> None:
        super().__init__(message)
        self.timed_out = timed_out


def scoring_body(requests: Sequence[ScoringRequest]) -> dict[str, Any]:
    """The /generate body that scores several responses, answered in their order."""
    return {
        "input_ids": [[*request.prompt_ids, *request.target_ids] for request in requests],
        "sampling_params": {"temperature": 0, "max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": [len(request.prompt_ids) - 1 for request in requests],
    }


def parse_scores(
    body: Any,
    requests: Sequence[ScoringRequest],
    *,
    server: str,
    weight_version: str | None,
    last_id: int | None,
) -> list[np.ndarray]:
    """Each request's log-probs, float32 [R] in nats. `last_id` is the greatest id that is ever sent.

    NoAnswer for one that the server aborted. ScoringError, naming server and response, for log-probs that are
    missing, of other tokens, not finite, or of weights other than `weight_version` (None takes any).
    """
    if not isinstance(body, list) or len(body) != len(requests):
        got = f"{len(body)} answers" if isinstance(body, list) else one_line(body)
        raise ScoringError(
            f"{server}: got {got} to {len(requests)} scoring requests; is this an SGLang server?"
        )
    places = [f"{server}: the teacher's answer to {request.name}" for request in requests]
    return [
        _logprobs(_entries(answer, where, weight_version), request, where, last_id)
        for answer, request, where in zip(body, requests, places, strict=True)
    ]


def _entries(answer: Any, where: str, weight_version: str | None) -> Any:
    meta = as_object(as_object(answer, where, ScoringError).get("meta_info"), where, ScoringError)
    reason = meta.get("finish_reason")
    if isinstance(reason, dict) and reason.get("type") == "abort":
        raise NoAnswer(f"{where} was aborted ({one_line(reason.get('message'))})")
    version = str(meta.get("weight_version"))
    if weight_version is not None and version != weight_version:
        raise ScoringError(
            f"{where} comes from weight version {version!r}, not {weight_version!r} as at the start; a "
            "teacher's weights stay as they are: does a trainer publish to this server?"
        )
    return meta.get("input_token_logprobs")


def _logprobs(entries: Any, request: ScoringRequest, where: str, last_id: int | None) -> np.ndarray:
    expected = [request.prompt_ids[-1], *request.target_ids]
    if not isinstance(entries, list) or len(entries) != len(expected):
        got = max(len(entries) - 1, 0) if isinstance(entries, list) else "no"
        raise ScoringError(
            f"{where} has {got} log-probs for {len(request.target_ids)} response tokens; expected one for "
            "each"
        )
    # Column by column, since a step has millions of entries [log-prob, token id, text].
    try:
        token_ids = [entry[1] for entry in entries]
        logprobs = np.array([entry[0] for entry in entries[1:]], dtype=np.float32)
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise ScoringError(
            f"{where} has entries that are not [log-prob, token id] ({one_line(error)}); is this an SGLang "
            "server?"
        ) from None
    place = None if token_ids == expected else _first_wrong(token_ids, expected, last_id)
    if place is not None:
        raise ScoringError(
            f"{where}: entry {place} of its log-probs is of token {token_ids[place]!r}; expected "
            f"{expected[place]}"
        )
    bad = np.flatnonzero(~np.isfinite(logprobs))
    if len(bad):
        raise ScoringError(
            f"{where}: the log-prob of response token {bad[0]} is {entries[bad[0] + 1][0]}; expected a "
            "finite number: are the teacher's weights and its precision sound?"
        )
    return logprobs


def _first_wrong(told: list[Any], sent: list[int], last_id: int | None) -> int | None:
    """Where the ids first differ. SGLang 0.5.23 scores the last id of its table rightly but tells it as 0: it
    takes it for one of the ids that stand for images.
    """
    for place, (got, expected) in enumerate(zip(told, sent, strict=True)):
        if got != expected and not (got == 0 and expected == last_id):
            return place
    return None
