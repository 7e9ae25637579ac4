"""The wire format of /generate on the client's side: requests written, answers checked; no HTTP here."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any, cast

from megatron_scope.errors import RolloutError, ScopeError
from megatron_scope.records import FinishReason, Prompt, Rollout, SamplingParams

MAX_MESSAGE_CHARS = 500  # of what a server says, in an error


class StaleWeights(RolloutError):
    """A response was drawn, in whole or in part, from other weights than were asked for."""


@dataclasses.dataclass(frozen=True)
class RolloutRequest:
    """One single-sample request; its `seed` is its own, so that a retry draws the same way. What the server
    sees as request id begins with `rid`.
    """

    prompt: Prompt
    sample: int
    seed: int
    rid: str


def sample_seed(run_seed: int, step: int, prompt_id: str, sample: int) -> int:
    """The sampling seed of one response: 31 bits that depend on nothing but these four."""
    text = json.dumps([run_seed, step, prompt_id, sample])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1


def generate_body(request: RolloutRequest, params: SamplingParams, *, sending: int = 0) -> dict[str, Any]:
    """The /generate body of one single-sample request, in SGLang's fields only.

    `sending` sets its request id apart from earlier ones: a server may still hold the request under those.
    SGLang ends every request whose id begins with that of an aborted one, so no id is another's beginning.
    """
    return {
        "input_ids": list(request.prompt.token_ids),
        "sampling_params": {
            "n": 1,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "max_new_tokens": params.max_new_tokens,
            "stop_token_ids": list(params.stop_token_ids),
            "no_stop_trim": True,
            "skip_special_tokens": True,
            "sampling_seed": request.seed,
        },
        "return_logprob": True,
        "rid": f"{request.rid}-{sending}.",
    }


def parse_rollout(
    body: Any,
    request: RolloutRequest,
    params: SamplingParams,
    *,
    vocab_size: int,
    server: str,
    version: int | None = None,
) -> Rollout:
    """Checks a /generate answer and makes it a Rollout; RolloutError names server, prompt and sample.

    A response that spans a weight update carries its oldest version; with a `version`, StaleWeights unless
    every token comes from it.
    """
    where = f"{server}: the answer to prompt {request.prompt.id!r} sample {request.sample}"
    answer = as_object(body, where)
    meta = as_object(answer.get("meta_info"), f"{where}: meta_info")
    output_ids = _output_ids(answer.get("output_ids"), params, vocab_size, where)
    logprobs = _logprobs(meta.get("output_token_logprobs"), output_ids, where)
    text = answer.get("text")
    if not isinstance(text, str):
        raise RolloutError(f"{where} has no text; expected an SGLang server with its tokenizer")
    return Rollout(
        prompt=request.prompt,
        sample=request.sample,
        output_ids=output_ids,
        text=text,
        engine_logprobs=logprobs,
        finish_reason=_finish_reason(meta, where),
        weight_version=_weight_version(meta, version, where),
    )


def _output_ids(value: Any, params: SamplingParams, vocab_size: int, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not _are_ids(value, vocab_size):
        raise RolloutError(
            f"{where} has output_ids that are not token ids in 0..{vocab_size - 1}; same tokenizer?"
        )
    if len(value) > params.max_new_tokens:
        raise RolloutError(f"{where} has {len(value)} tokens; max_new_tokens is {params.max_new_tokens}")
    return tuple(value)


def _logprobs(entries: Any, output_ids: tuple[int, ...], where: str) -> tuple[float, ...]:
    """The log-probs of entries [logprob, token id, ...], one for each output id."""
    if not isinstance(entries, list) or len(entries) != len(output_ids):
        got = len(entries) if isinstance(entries, list) else "no"
        raise RolloutError(
            f"{where} has {got} log-probs for {len(output_ids)} output ids; expected one for each"
        )
    if not entries:
        return ()
    # By column: a step has millions of entries, and this runs in the one thread that feeds all servers.
    try:
        logprobs, tokens = itertools.islice(zip(*entries, strict=False), 2)
        if tokens == output_ids and all(map(math.isfinite, logprobs)):
            return tuple(map(float, logprobs))
    except (TypeError, ValueError):  # not rows of numbers; which is not is said below
        pass
    place = next(i for i, token in enumerate(output_ids) if not _is_logprob_of(entries[i], token))
    entry = entries[place]
    if _is_of(entry, output_ids[place]):
        raise RolloutError(
            f"{where}: the log-prob of token {place} is {entry[0]!r}; expected a finite number: are "
            "the weights sound?"
        )
    raise RolloutError(f"{where}: log-prob {place} is {entry!r}; expected one of token {output_ids[place]}")


def _is_of(entry: Any, token: int) -> bool:
    return isinstance(entry, list) and len(entry) >= 2 and entry[1] == token


def _is_logprob_of(entry: Any, token: int) -> bool:
    return _is_of(entry, token) and isinstance(entry[0], int | float) and math.isfinite(entry[0])


def _finish_reason(meta: dict[str, Any], where: str) -> FinishReason:
    reason = meta.get("finish_reason")
    kind = reason.get("type") if isinstance(reason, dict) else None
    if kind not in ("stop", "length", "abort"):
        raise RolloutError(f"{where}: finish_reason is {reason!r}; expected type stop, length or abort")
    return cast(FinishReason, kind)


def _weight_version(meta: dict[str, Any], expected: int | None, where: str) -> int:
    """The oldest version of the response's spans, or the server's own where it gives none."""
    spans = meta.get("weight_versions") or []
    if not isinstance(spans, list) or not all(isinstance(span, dict) for span in spans):
        raise RolloutError(f"{where}: weight_versions is {spans!r}; expected a list of spans")
    found = [span.get("version") for span in spans] or [meta.get("weight_version")]
    versions = [as_version(version) for version in found]
    if expected is not None and any(version != expected for version in versions):
        shown = ", ".join(str(version) for version in found)
        raise StaleWeights(
            f"{where} comes from weight version {shown}; expected {expected}: was the server started again, "
            "or does another trainer use it?"
        )
    if None in versions:
        raise RolloutError(
            f"{where}: weight version is {found[versions.index(None)]!r}; expected an integer: publish "
            "weights to the server before the first rollout"
        )
    return min(version for version in versions if version is not None)


def as_version(value: Any) -> int | None:
    """The number of a weight version as a server tells it; None for what no trainer has set ("default")."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    try:
        return int(value)
    except ValueError:
        return None


def check_ids(prompt: Prompt, vocab_size: int) -> None:
    """RolloutError for an id outside of the vocabulary, which would end the whole server."""
    ids = prompt.token_ids
    if ids and _are_ids(ids, vocab_size):
        return
    bad = [token for token in ids if not _are_ids((token,), vocab_size)]
    got = f"token id {bad[0]}" if bad else "no tokens"
    raise RolloutError(
        f"prompt {prompt.id!r} has {got}; expected ids in 0..{vocab_size - 1}: same tokenizer?"
    )


def _are_ids(values: Sequence[Any], vocab_size: int) -> bool:
    """Whether all are integers in 0..vocab_size - 1; a bool is none."""
    return set(map(type, values)) <= {int} and (not values or (min(values) >= 0 and max(values) < vocab_size))


def as_object(value: Any, where: str, failure: type[ScopeError] = RolloutError) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise failure(f"{where} is {one_line(value)}; expected a JSON object: is this an SGLang server?")
    return value


def one_line(message: object) -> str:
    text = " ".join(str(message).split())
    return text if len(text) <= MAX_MESSAGE_CHARS else text[:MAX_MESSAGE_CHARS] + "..."
