"""An engine in the test's own process, and requests for it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_scope.rollout.embedded.engine import Engine
from megatron_scope.rollout.embedded.model import ServedModel
from megatron_scope.rollout.embedded.options import ServeOptions
from megatron_scope.rollout.embedded.protocol import Answer, Sample, parse_call

EOS = 14  # of the models that `make_model` makes


class Bench:
    """An engine and the answers that it gave, by sample id."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.model = ServedModel(str(folder), options.pop("dtype", "float32"))
        self.answers: dict[str, Answer] = {}
        self._arrived = threading.Condition()
        self.engine = Engine(self.model, ServeOptions(model=str(folder), **options), self._deliver)

    def _deliver(self, finished: list[tuple[Sample, Answer]]) -> None:
        with self._arrived:
            self.answers.update({sample.id: answer for sample, answer in finished})
            self._arrived.notify_all()

    def samples(self, body: dict[str, Any]) -> tuple[Sample, ...]:
        return parse_call({"return_logprob": True, **body}, self.engine.limits).samples

    def wait(self, ids: Sequence[str]) -> list[Answer]:
        with self._arrived:
            assert self._arrived.wait_for(lambda: all(name in self.answers for name in ids), 30)
            return [self.answers.pop(name) for name in ids]

    def run(self, bodies: Sequence[dict[str, Any]]) -> list[Answer]:
        samples = [sample for body in bodies for sample in self.samples(body)]
        self.engine.submit(samples)
        return self.wait([sample.id for sample in samples])

    def forward(self, tokens: Sequence[int], temperature: float = 1.0) -> np.ndarray:
        """float64 log-probs [T, V] of transformers' own forward pass."""
        with torch.no_grad():
            logits = self.model._model(torch.tensor([list(tokens)])).logits[0].double()
        return torch.log_softmax(logits / temperature, -1).numpy()


def body(prompt: Sequence[int], seed: int = 0, **sampling: Any) -> dict[str, Any]:
    return {
        "input_ids": list(prompt),
        "sampling_params": {"sampling_seed": seed, "max_new_tokens": 12, **sampling},
    }


def mixed_bodies(count: int, seed: int = 3) -> list[dict[str, Any]]:
    """Requests of many lengths, temperatures and restrictions."""
    rng = random.Random(seed)
    return [
        body(
            [rng.randrange(14) for _ in range(rng.randint(1, 40))],
            seed=rng.randrange(2**31),
            max_new_tokens=rng.randint(1, 60),
            temperature=rng.choice([0, 0.6, 1.0, 1.7]),
            top_p=rng.choice([1.0, 0.8]),
            top_k=rng.choice([-1, 5]),
            ignore_eos=rng.random() < 0.5,
        )
        for _ in range(count)
    ]


def endless(it: Bench, rid: str, seed: int = 0) -> tuple[Sample, ...]:
    """A long request on its way, paused once it has made some tokens."""
    samples = it.samples({**body([1, 2, 3], seed=seed, max_new_tokens=120, ignore_eos=True), "rid": rid})
    it.engine.submit(samples)
    return samples


def paused_midway(it: Bench, monkeypatch: pytest.MonkeyPatch, mode: Any, after: int = 10) -> None:
    """Pauses in the engine's own thread, after a fixed number of rounds."""
    rounds, round_ = iter(range(after)), it.engine._round

    def counted() -> None:
        round_()
        if next(rounds, None) is None and it.engine._round is counted:
            monkeypatch.setattr(it.engine, "_round", round_)
            it.engine._pause(mode)

    monkeypatch.setattr(it.engine, "_round", counted)


def wait_paused(it: Bench) -> None:
    deadline = time.monotonic() + 30
    while not it.engine.state().paused and time.monotonic() < deadline:
        time.sleep(0.001)
    assert it.engine.state().num_running + it.engine.state().num_waiting > 0
