"""The generation engine: one thread that admits samples, steps their blocks and changes weights in between.

A sample's answer is a function of the sample and the weights alone, bit for bit, whatever runs beside it: its
prompt is read alone at its exact length, and it decodes in a block whose shape follows from its own maximum
length and the server's options. Kernels then do the same arithmetic for a row wherever it stands.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Literal, TypeVar

import numpy as np
import torch

from megatron_scope.rollout.embedded.block import Progress, SlotBlock, Stopped, block_length, block_slots
from megatron_scope.rollout.embedded.model import Prefill, ServedModel, WeightsError, WeightSource
from megatron_scope.rollout.embedded.options import ServeOptions
from megatron_scope.rollout.embedded.prompt_cache import PromptCache
from megatron_scope.rollout.embedded.protocol import Answer, Limits, Sample, close_span

T = TypeVar("T")
PauseMode = Literal["abort", "retract", "in_place"]

PREFILL_TOKENS_PER_ROUND = 8192  # admitted between two decode steps, so that running samples go on

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EngineState:
    """A snapshot for the status endpoints; `failure` is set when the engine's thread has died."""

    num_running: int
    num_waiting: int
    paused: bool
    weight_version: str
    failure: str | None


@dataclasses.dataclass(frozen=True)
class _Update:
    """Weights to take as soon as nothing runs, or the engine is paused."""

    source: WeightSource
    version: str | None
    done: Future[int]


class Engine:
    """Runs samples on a model in a thread of its own. Every public method may be called from any thread.

    `deliver` is called from the engine's thread with the samples that a round finished and their answers.
    """

    def __init__(
        self,
        model: ServedModel,
        options: ServeOptions,
        deliver: Callable[[list[tuple[Sample, Answer]]], None],
    ) -> None:
        self.limits = engine_limits(model, options)
        self._model, self._options, self._deliver = model, options, deliver
        self._condition = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._waiting: deque[Progress] = deque()
        self._held: deque[Progress] = deque()  # what came after a queued update waits for its weights
        self._updates: deque[_Update] = deque()
        self._blocks: list[SlotBlock] = []
        self._slots: dict[int, int] = {}
        self._prompts = PromptCache(options.max_total_tokens)
        self._finished: list[tuple[Sample, Answer]] = []
        self._version = options.weight_version
        self._paused = self._closed = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="embedded-engine", daemon=True)
        self._thread.start()

    # ---- called from other threads

    def submit(self, samples: Sequence[Sample]) -> None:
        """Queues samples; their answers come through `deliver`."""
        self._post(lambda: self._enqueue(samples))

    def abort(self, rids: frozenset[str] | None) -> None:
        """Ends the samples whose id or rid is in `rids` (None: all), answering each with what it has."""
        self._post(lambda: self._abort(rids))

    def pause(self, mode: PauseMode) -> Future[None]:
        """Stops stepping: `in_place` keeps running samples as they are, `retract` reads them anew later."""
        return self._call(lambda: self._pause(mode))

    def resume(self) -> Future[None]:
        """Goes on after a pause."""
        return self._call(self._resume)

    def update_weights(self, source: WeightSource, version: str | None, *, abort_all: bool) -> Future[int]:
        """Takes new weights once nothing runs (at once when paused); gives the number of paused samples.

        Cached prefills are always forgotten. The future raises WeightsError where the source does not hold
        this model's weights; the old ones then stay.
        """
        update = _Update(source, version, Future())
        self._post(lambda: self._queue_update(update, abort_all))
        return update.done

    def set_version(self, version: str, *, abort_all: bool) -> Future[None]:
        """Gives the weights another version; what runs carries both."""
        return self._call(lambda: self._set_version(version, abort_all))

    def flush(self) -> Future[bool]:
        """Forgets cached prefills; False, and nothing done, while samples run or wait."""
        return self._call(self._flush)

    def state(self) -> EngineState:
        """What the engine is doing; counts may be one round old."""
        return EngineState(
            self._num_running(),
            len(self._waiting) + len(self._held),
            self._paused,
            self._version,
            self._failure,
        )

    def close(self, timeout_s: float) -> None:
        """Ends the thread after its current step, without answering what is open."""
        self._closed = True
        self._post(lambda: None)
        self._thread.join(timeout_s)

    def _call(self, command: Callable[[], T]) -> Future[T]:
        done: Future[T] = Future()
        self._post(lambda: done.set_result(command()))
        return done

    def _post(self, command: Callable[[], None]) -> None:
        with self._condition:
            self._inbox.append(command)
            self._condition.notify()

    # ---- the engine's thread

    def _run(self) -> None:
        torch.set_num_threads(self._options.threads)
        try:
            with torch.inference_mode():
                while not self._closed:
                    self._take_commands()
                    self._round()
        except Exception as error:  # whatever it is, open requests must hear of it
            _log.exception("the generation engine stopped")
            self._failure = f"the generation engine stopped: {type(error).__name__}: {error}"
        while not self._closed:
            self._fail_all()
            self._take_commands()

    def _take_commands(self) -> None:
        """Runs what other threads asked for; sleeps while there is nothing else to do."""
        with self._condition:
            while not self._inbox and not self._has_work() and not self._closed:
                self._condition.wait()
            commands, self._inbox = self._inbox, deque()
        for command in commands:
            command()

    def _has_work(self) -> bool:
        if self._failure is not None:
            return False
        can_step = not self._paused and (self._num_running() > 0 or len(self._waiting) > 0)
        return can_step or self._can_update() or len(self._finished) > 0

    def _round(self) -> None:
        while self._can_update():
            self._apply(self._updates.popleft())
        if self._held and not self._updates:
            self._waiting.extend(self._held)
            self._held.clear()
        if not self._paused:
            self._admit()
            for block in self._blocks:
                if block.num_active:
                    for stopped in block.step():
                        self._finish(stopped)
        if self._finished:
            finished, self._finished = self._finished, []
            self._deliver(finished)

    def _num_running(self) -> int:
        return sum(block.num_active for block in self._blocks)

    # ---- admission

    def _enqueue(self, samples: Sequence[Sample]) -> None:
        queue = self._held if self._updates else self._waiting
        queue.extend(Progress.start(sample, self._model.eos_ids) for sample in samples)

    def _admit(self) -> None:
        """First come, first served."""
        budget = PREFILL_TOKENS_PER_ROUND
        while self._waiting and budget > 0:
            progress = self._waiting[0]
            scoring_only = progress.sample.sampling.max_new_tokens == 0
            block = None if scoring_only else self._block_for(progress.sample)
            if block is None and not scoring_only:
                return
            self._waiting.popleft()
            prefill = self._prefill(progress)
            budget -= len(progress.sample.prompt)
            scores = prefill.input_logprobs
            if scores is not None:
                progress.input_logprobs = scores.tolist()
            if scores is not None and not np.isfinite(scores).all():
                self._finish(Stopped(progress, {}, "the prompt's log-probs are not finite"))
            elif block is None:
                self._finish(Stopped(progress, {"type": "length", "length": 0}))
            else:
                block.place(progress, prefill)

    def _prefill(self, progress: Progress) -> Prefill:
        """Reads the prompt, or takes it from the cache; a retracted sample's output is read with it."""
        sample = progress.sample
        if progress.output_ids:
            return self._model.prefill(sample.prompt + tuple(progress.output_ids), None)
        known = self._prompts.get(sample.prompt) if sample.logprob_start is None else None
        if known is not None:
            return known
        prefill = self._model.prefill(sample.prompt, sample.logprob_start)
        if sample.sampling.max_new_tokens > 0:
            self._prompts.add(sample.prompt, prefill)
        return prefill

    def _block_for(self, sample: Sample) -> SlotBlock | None:
        """A block of the sample's length with a free slot, a new one if memory allows, else None."""
        if self._num_running() >= self._options.max_running_requests:
            return None
        length = block_length(sample.total_tokens, self.limits.context_length)
        for block in self._blocks:
            if block.length == length and block.num_active < block.slots:
                return block
        slots = self._slots_of(length)
        allocated = sum(block.slots * block.length for block in self._blocks)
        for block in [block for block in self._blocks if not block.num_active]:
            if allocated + slots * length > self._options.max_total_tokens:
                self._blocks.remove(block)
                allocated -= block.slots * block.length
        if self._blocks and allocated + slots * length > self._options.max_total_tokens:
            return None
        self._blocks.append(SlotBlock(self._model, slots, length))
        return self._blocks[-1]

    def _slots_of(self, length: int) -> int:
        """Slots of a block: fixed by its length, the options and one trial of this machine's kernels."""
        if length not in self._slots:
            slots = block_slots(length, self._options)
            if self._model.is_mixture:
                slots = 1  # an expert's share of a batch varies, and with it the shape of its product
            elif slots > 1 and not self._model.rows_are_independent(slots, length):
                _log.warning(
                    "kernels here mix %d rows of %d positions: decoding one at a time", slots, length
                )
                slots = 1
            self._slots[length] = slots
        return self._slots[length]

    # ---- endings

    def _finish(self, stopped: Stopped) -> None:
        progress = stopped.progress
        close_span(progress.spans, self._version, len(progress.output_ids))
        answer = Answer(
            output_ids=progress.output_ids,
            output_logprobs=progress.output_logprobs,
            input_logprobs=progress.input_logprobs,
            finish_reason=stopped.reason,
            spans=progress.spans,
            weight_version=self._version,
            error=stopped.error,
        )
        self._finished.append((progress.sample, answer))

    def _take_out(self, rids: frozenset[str] | None) -> list[Progress]:
        """Removes running and waiting samples (None: all), the running ones first."""
        taken = [progress for block in self._blocks for progress in block.remove(rids)]
        for queue in (self._waiting, self._held):
            everything = list(queue)
            queue.clear()
            for progress in everything:
                (taken if progress.is_named(rids) else queue).append(progress)
        return taken

    def _abort(self, rids: frozenset[str] | None) -> None:
        for progress in self._take_out(rids):
            self._finish(Stopped(progress, {"type": "abort", "message": "aborted on request"}))

    def _fail_all(self) -> None:
        for progress in self._take_out(None):
            self._finish(Stopped(progress, {}, self._failure))
        for update in self._updates:
            update.done.set_exception(WeightsError(self._failure))
        self._updates.clear()
        finished, self._finished = self._finished, []
        self._deliver(finished)

    # ---- pause, weights, cache

    def _pause(self, mode: PauseMode) -> None:
        self._paused = True
        if mode == "abort":
            self._abort(None)
        elif mode == "retract":
            for progress in reversed([progress for block in self._blocks for progress in block.remove()]):
                self._waiting.appendleft(progress)

    def _resume(self) -> None:
        self._paused = False

    def _queue_update(self, update: _Update, abort_all: bool) -> None:
        if abort_all:
            self._abort(None)
        self._updates.append(update)

    def _can_update(self) -> bool:
        idle = self._num_running() == 0 and not self._waiting
        return len(self._updates) > 0 and (self._paused or idle)

    def _apply(self, update: _Update) -> None:
        try:
            self._model.reload(update.source)
        except WeightsError as error:
            update.done.set_exception(error)
            return
        self._close_spans()
        if update.version is not None:
            self._version = update.version
        self._prompts.clear()
        update.done.set_result(self._num_running() + len(self._waiting) if self._paused else 0)

    def _set_version(self, version: str, abort_all: bool) -> None:
        if abort_all:
            self._abort(None)
        self._close_spans()
        self._version = version

    def _close_spans(self) -> None:
        """What has been sampled so far is of the version until now."""
        for block in self._blocks:
            block.note_version(self._version)
        for progress in (*self._waiting, *self._held):
            close_span(progress.spans, self._version, len(progress.output_ids))

    def _flush(self) -> bool:
        if self._num_running() or self._waiting or self._held:
            return False
        self._prompts.clear()
        return True


def engine_limits(model: ServedModel, options: ServeOptions) -> Limits:
    """What requests may ask of this model under these options."""
    longest = model.max_positions if options.context_length is None else options.context_length
    return Limits(model.vocab_size, min(longest, options.max_total_tokens))
