"""SGLang's /generate as data: requests parsed and checked, answers built. No model, no HTTP, no torch."""

from __future__ import annotations

import dataclasses
import math
import uuid
from collections.abc import Callable, Sequence
from typing import Any

DEFAULT_MAX_NEW_TOKENS = 128  # SGLang's
CALL_FIELDS = {"input_ids", "sampling_params", "return_logprob", "logprob_start_len", "rid", "stream"}
SAMPLING_FIELDS = {
    "n",
    "temperature",
    "top_p",
    "top_k",
    "max_new_tokens",
    "stop_token_ids",
    "ignore_eos",
    "no_stop_trim",
    "skip_special_tokens",
    "sampling_seed",
}

VersionSpan = tuple[str, int, int]  # version, first output token, one past the last


class BadRequest(Exception):
    """A request that is answered with HTTP 400; `body` is the JSON to send."""

    def __init__(self, message: str, *, plain: bool = False) -> None:
        super().__init__(message)
        self.body: dict[str, Any] = {"error": message if plain else {"message": message}}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request must fit: token ids below `vocab_size`, prompt + new tokens within `context_length`."""

    vocab_size: int
    context_length: int


@dataclasses.dataclass(frozen=True)
class Sampling:
    """One request's sampling settings; `seed=None` draws from the system's entropy."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop_token_ids: frozenset[int]
    ignore_eos: bool
    no_stop_trim: bool
    skip_special_tokens: bool
    seed: int | None


@dataclasses.dataclass(frozen=True)
class Sample:
    """One response to make: `id` is unique on the server, `rid` the client's name; `index` counts n > 1."""

    id: str
    rid: str
    index: int
    prompt: tuple[int, ...]
    sampling: Sampling
    logprob_start: int | None

    @property
    def total_tokens(self) -> int:
        """Prompt and the most output tokens that it may grow to."""
        return len(self.prompt) + self.sampling.max_new_tokens


@dataclasses.dataclass(frozen=True)
class Call:
    """One POST /generate: its samples in answer order, and whether the answer is a list."""

    samples: tuple[Sample, ...]
    as_list: bool
    return_logprob: bool


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the engine made of a sample; log-probs in nats. `error` set: no answer, and why."""

    output_ids: list[int]
    output_logprobs: list[float]
    input_logprobs: list[float] | None
    finish_reason: dict[str, Any]
    spans: list[VersionSpan]
    weight_version: str
    error: str | None = None


def parse_call(body: Any, limits: Limits) -> Call:
    """Checks a /generate body; raises BadRequest, as SGLang answers 400, where a field cannot be taken."""
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    unknown = sorted(set(body) - CALL_FIELDS)
    if unknown:
        raise BadRequest(
            f"field {unknown[0]!r} is not supported here; expected {', '.join(sorted(CALL_FIELDS))}"
        )
    if body.get("stream"):
        raise BadRequest("stream=true is not supported here; leave it out")
    prompts, nested = _prompts(body.get("input_ids"), limits)
    count = len(prompts)
    sampling = [
        _sampling(entry) for entry in _per_prompt(body.get("sampling_params") or {}, count, "sampling_params")
    ]
    return_logprob = body.get("return_logprob", False)
    starts = _per_prompt(body.get("logprob_start_len", -1), count, "logprob_start_len")
    samples: list[Sample] = []
    for prompt, rid, (num, settings), start in zip(
        prompts, _rids(body.get("rid"), count), sampling, starts, strict=True
    ):
        first = _logprob_start(start, len(prompt)) if return_logprob else None
        for index in range(num):
            sample = Sample(rid if num == 1 else f"{rid}_{index}", rid, index, prompt, settings, first)
            _check_length(sample, limits)
            samples.append(sample)
    return Call(tuple(samples), nested or len(samples) > 1, bool(return_logprob))


def build_response(
    call: Call, answers: Sequence[Answer], decode: Callable[[Sequence[int], bool], str]
) -> Any:
    """The JSON value of a finished call; `decode(ids, skip_special_tokens)` gives text."""
    objects = [
        _response(sample, answer, call.return_logprob, decode)
        for sample, answer in zip(call.samples, answers, strict=True)
    ]
    return objects if call.as_list else objects[0]


def close_span(spans: list[VersionSpan], version: str, end: int) -> None:
    """Ends the current run of tokens at `end`: those since the last span were made by `version`."""
    start = spans[-1][2] if spans else 0
    if end <= start:
        return
    if spans and spans[-1][0] == version:
        spans[-1] = (version, spans[-1][1], end)
    else:
        spans.append((version, start, end))


def _response(
    sample: Sample, answer: Answer, return_logprob: bool, decode: Callable[[Sequence[int], bool], str]
) -> dict[str, Any]:
    text_ids = answer.output_ids
    if answer.finish_reason["type"] == "stop" and not sample.sampling.no_stop_trim:
        text_ids = text_ids[:-1]
    meta: dict[str, Any] = {
        "id": sample.id,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": len(sample.prompt),
        "completion_tokens": len(answer.output_ids),
        "weight_version": answer.weight_version,
        "weight_versions": [
            {"version": version, "start": start, "end": end} for version, start, end in answer.spans
        ],
    }
    if return_logprob:
        meta["input_token_logprobs"] = _input_entries(sample, answer)
        meta["output_token_logprobs"] = [
            [logprob, token, None]
            for logprob, token in zip(answer.output_logprobs, answer.output_ids, strict=True)
        ]
    text = decode(text_ids, sample.sampling.skip_special_tokens)
    return {"text": text, "output_ids": answer.output_ids, "meta_info": meta}


def _input_entries(sample: Sample, answer: Answer) -> list[list[Any]]:
    """The first entry has no log-prob: what is before it was not asked for. Empty if never read."""
    if sample.logprob_start is None or answer.input_logprobs is None:
        return []
    tokens = sample.prompt[sample.logprob_start :]
    return [
        [logprob, token, None] for logprob, token in zip([None, *answer.input_logprobs], tokens, strict=True)
    ]


def _prompts(value: Any, limits: Limits) -> tuple[list[tuple[int, ...]], bool]:
    if not isinstance(value, list) or not value:
        raise BadRequest("input_ids must be a non-empty list of token ids, or a list of such lists")
    nested = isinstance(value[0], list)
    prompts = value if nested else [value]
    for prompt in prompts:
        if not isinstance(prompt, list) or not prompt or not all(_is_int(token) for token in prompt):
            raise BadRequest("input_ids must be a non-empty list of token ids, or a list of such lists")
        if min(prompt) < 0 or max(prompt) >= limits.vocab_size:
            bad = next(token for token in prompt if not 0 <= token < limits.vocab_size)
            raise BadRequest(f"input_ids holds {bad}: token ids must be in 0..{limits.vocab_size - 1}")
    return [tuple(prompt) for prompt in prompts], nested


def _per_prompt(value: Any, count: int, name: str) -> list[Any]:
    """A list gives one value per prompt; anything else goes to all."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise BadRequest(f"{name} has {len(value)} entries for {count} prompts")
    return value


def _rids(value: Any, count: int) -> list[str]:
    if value is None:
        return [uuid.uuid4().hex for _ in range(count)]
    if isinstance(value, str):
        return [value] if count == 1 else [f"{value}_{index}" for index in range(count)]
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise BadRequest("rid must be a string, or a list of strings")
    return _per_prompt(value, count, "rid")


def _logprob_start(value: Any, prompt_tokens: int) -> int | None:
    if value is None or value == -1:
        return None
    if not _is_int(value) or not 0 <= value < prompt_tokens:
        raise BadRequest(
            f"logprob_start_len is {value!r}: expected -1, or 0..{prompt_tokens - 1} for this prompt"
        )
    return value


def _check_length(sample: Sample, limits: Limits) -> None:
    if sample.total_tokens > limits.context_length:
        raise BadRequest(
            f"{len(sample.prompt)} prompt tokens + max_new_tokens {sample.sampling.max_new_tokens} exceed "
            f"the context length {limits.context_length}; lower max_new_tokens, or raise the server's "
            "--context-length and --max-total-tokens"
        )


def _sampling(value: Any) -> tuple[int, Sampling]:
    """(n, settings) of one sampling_params object."""
    if not isinstance(value, dict):
        raise BadRequest("sampling_params must be an object, or a list of one object per prompt")
    unknown = sorted(set(value) - SAMPLING_FIELDS)
    if unknown:
        raise BadRequest(f"unknown field {unknown[0]!r} in sampling_params", plain=True)
    given = {name: entry for name, entry in value.items() if entry is not None}
    stop = given.get("stop_token_ids", [])
    if not isinstance(stop, list) or not all(_is_int(token) for token in stop):
        raise BadRequest("sampling_params.stop_token_ids must be a list of token ids")
    flags = {name: given.get(name, default) for name, default in _FLAGS.items()}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise BadRequest(f"sampling_params.{name} must be true or false; got {flag!r}")
    top_k = _number(given, "top_k", -1, lambda v: _is_int(v) and (v == -1 or v >= 1), "-1 or an integer >= 1")
    settings = Sampling(
        temperature=float(_number(given, "temperature", 1.0, lambda v: v >= 0, "a number >= 0")),
        top_p=float(_number(given, "top_p", 1.0, lambda v: 0 < v <= 1, "a number in (0, 1]")),
        top_k=int(top_k),
        max_new_tokens=_count(given, "max_new_tokens", DEFAULT_MAX_NEW_TOKENS, 0),
        stop_token_ids=frozenset(stop),
        seed=_count(given, "sampling_seed", 0, 0) if "sampling_seed" in given else None,
        **flags,
    )
    return _count(given, "n", 1, 1), settings


_FLAGS = {"ignore_eos": False, "no_stop_trim": False, "skip_special_tokens": True}


def _count(given: dict[str, Any], name: str, default: int, least: int) -> int:
    return int(_number(given, name, default, lambda v: _is_int(v) and v >= least, f"an integer >= {least}"))


def _number(
    given: dict[str, Any], name: str, default: float, valid: Callable[[Any], bool], expected: str
) -> int | float:
    value = given.get(name, default)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not valid(value)
    ):
        raise BadRequest(f"sampling_params.{name} is {value!r}: expected {expected}")
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
