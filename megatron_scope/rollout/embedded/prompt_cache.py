"""Prefills kept by prompt, so that the samples of a group read their prompt once."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict

from megatron_scope.rollout.embedded.model import Prefill


class PromptCache:
    """The latest prefills by prompt, least recently used first, within a bound in tokens."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens, self._num_tokens = max_tokens, 0
        self._entries: OrderedDict[tuple[int, ...], Prefill] = OrderedDict()

    def get(self, prompt: tuple[int, ...]) -> Prefill | None:
        if prompt in self._entries:
            self._entries.move_to_end(prompt)
        return self._entries.get(prompt)

    def add(self, prompt: tuple[int, ...], prefill: Prefill) -> None:
        if prompt in self._entries or len(prompt) > self._max_tokens:
            return
        self._entries[prompt] = dataclasses.replace(prefill, input_logprobs=None)
        self._num_tokens += len(prompt)
        while self._num_tokens > self._max_tokens:
            oldest, _ = self._entries.popitem(last=False)
            self._num_tokens -= len(oldest)

    def clear(self) -> None:
        self._entries.clear()
        self._num_tokens = 0
