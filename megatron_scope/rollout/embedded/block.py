"""A block: B samples of one maximum length that decode together, in arrays whose shapes never vary."""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_scope.rollout.embedded.model import Prefill, ServedModel
from megatron_scope.rollout.embedded.options import ServeOptions
from megatron_scope.rollout.embedded.protocol import Sample, VersionSpan, close_span
from megatron_scope.rollout.embedded.sampling import draw, uniforms

MIN_BLOCK_LENGTH = 32
MAX_BLOCK_SLOTS = 64
BLOCKS_IN_BUDGET = 4  # a block takes at most this part of max_total_tokens


@dataclasses.dataclass
class Progress:
    """A sample on its way: what it has so far survives a retraction from its block."""

    sample: Sample
    stop_ids: frozenset[int]
    output_ids: list[int] = dataclasses.field(default_factory=list)
    output_logprobs: list[float] = dataclasses.field(default_factory=list)
    spans: list[VersionSpan] = dataclasses.field(default_factory=list)
    input_logprobs: list[float] | None = None

    def is_named(self, names: frozenset[str] | None) -> bool:
        """Whether the sample's id or rid is in `names`; None names all."""
        return names is None or self.sample.id in names or self.sample.rid in names

    @classmethod
    def start(cls, sample: Sample, eos_ids: frozenset[int]) -> Progress:
        settings = sample.sampling
        stop_ids = frozenset() if settings.ignore_eos else settings.stop_token_ids | eos_ids
        return cls(sample, stop_ids)


@dataclasses.dataclass(frozen=True)
class Stopped:
    """A sample that left its block, and SGLang's finish reason or the error that ended it."""

    progress: Progress
    reason: dict[str, object]
    error: str | None = None


class SlotBlock:
    """B slots of L positions. A step reads every row's last token, draws its next one, and drops those done.

    Idle rows run along on token 0. A row just placed already has its logits from the prefill; what the step's
    forward pass writes at its first free position is overwritten by the next one.
    """

    def __init__(self, model: ServedModel, slots: int, length: int) -> None:
        self.slots, self.length = slots, length
        self.num_active = 0
        self._model = model
        self._cache = model.new_cache(slots, length)
        self._progress: list[Progress | None] = [None] * slots
        self._fresh: dict[int, np.ndarray] = {}
        self._active = np.zeros(slots, dtype=bool)
        self._token = np.zeros(slots, dtype=np.int64)
        self._position = np.zeros(slots, dtype=np.int64)  # where the next forward pass writes `_token`
        self._prompt_tokens = np.zeros(slots, dtype=np.int64)
        self._count = np.zeros(slots, dtype=np.int64)
        self._max_new = np.ones(slots, dtype=np.int64)
        self._temperature, self._top_p = np.ones(slots), np.ones(slots)
        self._top_k = np.full(slots, -1, dtype=np.int64)
        self._stop_ids = np.full((slots, 1), -1, dtype=np.int64)
        self._uniform = np.zeros((slots, length))
        self._output_ids = np.zeros((slots, length), dtype=np.int64)
        self._output_logprobs = np.zeros((slots, length), dtype=np.float32)
        self._rows = np.arange(slots)

    def place(self, progress: Progress, prefill: Prefill) -> None:
        """Takes a free slot for a sample whose prompt (and output, if it was retracted) was just read."""
        row = int(np.flatnonzero(~self._active)[0])
        settings, done = progress.sample.sampling, len(progress.output_ids)
        self._cache.fill(row, prefill)
        self._fresh[row] = prefill.logits
        self._progress[row] = progress
        self._active[row] = True
        self.num_active += 1
        self._prompt_tokens[row] = prompt_tokens = len(progress.sample.prompt)
        self._token[row], self._position[row], self._count[row] = 0, prompt_tokens + done, done
        self._max_new[row] = settings.max_new_tokens
        self._temperature[row], self._top_p[row], self._top_k[row] = (
            settings.temperature,
            settings.top_p,
            settings.top_k,
        )
        self._set_stop_ids(row, sorted(progress.stop_ids))
        # Only now: thousands of samples may wait, and each has as many as it may get tokens.
        self._uniform[row, : settings.max_new_tokens] = uniforms(
            settings.seed, progress.sample.index, settings.max_new_tokens
        )
        self._output_ids[row, :done] = progress.output_ids
        self._output_logprobs[row, :done] = progress.output_logprobs

    def step(self) -> list[Stopped]:
        """Gives every active sample one token and returns those that this ended."""
        logits_BV = self._logits()
        ids, logprobs, finite = draw(
            logits_BV,
            temperature=self._temperature,
            top_p=self._top_p,
            top_k=self._top_k,
            uniform=self._uniform[self._rows, np.minimum(self._count, self.length - 1)],
        )
        rows = np.flatnonzero(self._active & finite)
        self._output_ids[rows, self._count[rows]] = ids[rows]
        self._output_logprobs[rows, self._count[rows]] = logprobs[rows]
        self._token[rows] = ids[rows]
        self._position[rows] = self._prompt_tokens[rows] + self._count[rows]
        self._count[rows] += 1
        full = self._count >= self._max_new
        stop = (self._stop_ids == ids[:, None]).any(axis=1)
        ended = np.flatnonzero(self._active & (full | stop | ~finite))
        return [self._end(int(row), bool(finite[row]), bool(full[row])) for row in ended]

    def remove(self, wanted: frozenset[str] | None = None) -> list[Progress]:
        """Takes out the samples whose id or rid is in `wanted` (None: all), with their output so far."""
        rows = [row for row, progress in enumerate(self._progress) if progress and progress.is_named(wanted)]
        return [self._release(row) for row in rows]

    def note_version(self, version: str) -> None:
        """Records that the tokens made so far are of `version`; called just before the weights change."""
        for row, progress in enumerate(self._progress):
            if progress is not None:
                close_span(progress.spans, version, int(self._count[row]))

    def _logits(self) -> np.ndarray:
        """float32 [B, V]; no forward pass where every active row is fresh."""
        if len(self._fresh) == self.num_active:
            logits_BV = np.zeros((self.slots, self._model.vocab_size), dtype=np.float32)
        else:
            logits_BV = self._model.decode(self._cache, self._token, self._position)
        for row, logits_V in self._fresh.items():
            logits_BV[row] = logits_V
        self._fresh.clear()
        return logits_BV

    def _set_stop_ids(self, row: int, stop_ids: list[int]) -> None:
        missing = len(stop_ids) - self._stop_ids.shape[1]
        if missing > 0:
            self._stop_ids = np.pad(self._stop_ids, ((0, 0), (0, missing)), constant_values=-1)
        self._stop_ids[row] = -1
        self._stop_ids[row, : len(stop_ids)] = stop_ids

    def _end(self, row: int, finite: bool, full: bool) -> Stopped:
        progress = self._release(row)
        count = len(progress.output_ids)
        if not finite:
            return Stopped(progress, {}, f"the model's logits after {count} output tokens are not finite")
        if full:  # SGLang looks at the length first: a stop token in the last place counts as truncation
            return Stopped(progress, {"type": "length", "length": count})
        return Stopped(progress, {"type": "stop", "matched": progress.output_ids[-1]})

    def _release(self, row: int) -> Progress:
        progress = self._progress[row]
        assert progress is not None
        count = int(self._count[row])
        progress.output_ids = self._output_ids[row, :count].tolist()
        progress.output_logprobs = self._output_logprobs[row, :count].tolist()
        self._progress[row] = None
        self._fresh.pop(row, None)
        self._active[row] = False
        self.num_active -= 1
        self._token[row], self._position[row], self._count[row], self._max_new[row] = 0, 0, 0, 1
        self._temperature[row], self._top_p[row], self._top_k[row], self._stop_ids[row] = 1.0, 1.0, -1, -1
        return progress


def block_length(total_tokens: int, context_length: int) -> int:
    """The positions of a slot: the next power of two, at least 32, at most the context length."""
    return min(max(MIN_BLOCK_LENGTH, 1 << (total_tokens - 1).bit_length()), context_length)


def block_slots(length: int, options: ServeOptions) -> int:
    """The rows of a block of this length: a function of the options alone."""
    by_memory = options.max_total_tokens // (BLOCKS_IN_BUDGET * length)
    return max(1, min(MAX_BLOCK_SLOTS, options.max_running_requests, by_memory))
