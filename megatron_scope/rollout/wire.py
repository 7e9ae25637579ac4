"""The wire format of /generate on the client's side: requests written, answers checked; no HTTP here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import Any, cast

from megatron_scope.errors import RolloutError, ScopeError
from megatron_scope.records import FinishReason, Prompt, Rollout, SamplingParams

MAX_MESSAGE_CHARS = 500  # of what a server says, in an error


@dataclasses.dataclass(frozen=True)
class RolloutRequest:
    """One single-sample request; `rid` and `seed` are its own, so that a retry gives the same sample."""

    prompt: Prompt
    sample: int
    seed: int
    rid: str


def sample_seed(run_seed: int, step: int, prompt_id: str, sample: int) -> int:
    """The sampling seed of one response: 31 bits that depend on nothing but these four."""
    text = json.dumps([run_seed, step, prompt_id, sample])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1


def generate_body(request: RolloutRequest, params: SamplingParams) -> dict[str, Any]:
    """The /generate body of one single-sample request, in SGLang's fields only."""
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
        "rid": request.rid,
    }


def parse_rollout(
    body: Any, request: RolloutRequest, params: SamplingParams, *, vocab_size: int, server: str
) -> Rollout:
    """Checks a /generate answer and makes it a Rollout; RolloutError names server, prompt and sample.

    A response that spans a weight update carries its oldest version.
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
        weight_version=_weight_version(meta, where),
    )


def _output_ids(value: Any, params: SamplingParams, vocab_size: int, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(_is_id(token, vocab_size) for token in value):
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
    for place, (entry, token) in enumerate(zip(entries, output_ids, strict=True)):
        if not isinstance(entry, list) or len(entry) < 2 or entry[1] != token:
            raise RolloutError(f"{where}: log-prob {place} is {entry!r}; expected one of token {token}")
        if not isinstance(entry[0], int | float) or not math.isfinite(entry[0]):
            raise RolloutError(
                f"{where}: the log-prob of token {place} is {entry[0]!r}; expected a finite number: are "
                "the weights sound?"
            )
    return tuple(float(entry[0]) for entry in entries)


def _finish_reason(meta: dict[str, Any], where: str) -> FinishReason:
    reason = meta.get("finish_reason")
    kind = reason.get("type") if isinstance(reason, dict) else None
    if kind not in ("stop", "length", "abort"):
        raise RolloutError(f"{where}: finish_reason is {reason!r}; expected type stop, length or abort")
    return cast(FinishReason, kind)


def _weight_version(meta: dict[str, Any], where: str) -> int:
    """The oldest version of the response's spans, or the server's own where it gives none."""
    spans = meta.get("weight_versions") or []
    if not isinstance(spans, list) or not all(isinstance(span, dict) for span in spans):
        raise RolloutError(f"{where}: weight_versions is {spans!r}; expected a list of spans")
    found = [span.get("version") for span in spans] or [meta.get("weight_version")]
    versions = [_integral(version) for version in found]
    if None in versions:
        raise RolloutError(
            f"{where}: weight version is {found[versions.index(None)]!r}; expected an integer: publish "
            "weights to the server before the first rollout"
        )
    return min(version for version in versions if version is not None)


def _integral(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    try:
        return int(value)
    except ValueError:
        return None


def check_ids(prompt: Prompt, vocab_size: int) -> None:
    """An id outside of the vocabulary would end the whole server."""
    bad = next((token for token in prompt.token_ids if not _is_id(token, vocab_size)), None)
    if bad is not None or not prompt.token_ids:
        got = "no tokens" if bad is None else f"token id {bad}"
        raise RolloutError(
            f"prompt {prompt.id!r} has {got}; expected ids in 0..{vocab_size - 1}: same tokenizer?"
        )


def _is_id(value: Any, vocab_size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size


def as_object(value: Any, where: str, failure: type[ScopeError] = RolloutError) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise failure(f"{where} is {one_line(value)}; expected a JSON object: is this an SGLang server?")
    return value


def one_line(message: object) -> str:
    text = " ".join(str(message).split())
    return text if len(text) <= MAX_MESSAGE_CHARS else text[:MAX_MESSAGE_CHARS] + "..."
