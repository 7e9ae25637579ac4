"""The generation engine: its numbers against a plain forward pass, and that no request sees another."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_scope.rollout.embedded import engine as engine_module
from megatron_scope.rollout.embedded.block import block_length, block_slots
from megatron_scope.rollout.embedded.model import ServedModel
from megatron_scope.rollout.embedded.options import ServeOptions
from tests.unit.rollout.bench import EOS, body, mixed_bodies

FAMILIES = ("qwen2", "qwen2_window", "llama", "qwen3", "mistral_window", "qwen3_moe", "mixtral")
Make = Callable[..., Path]


# ---- numbers


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_a_plain_forward_pass(family: str, bench: Any, make_model: Make) -> None:
    it = bench(make_model(family))
    for temperature in (1.0, 0.7):
        prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5]
        request = body(prompt, seed=5, temperature=temperature, max_new_tokens=20, ignore_eos=True)
        (answer,) = it.run([{**request, "logprob_start_len": 2}])
        tokens = prompt + answer.output_ids
        assert len(answer.output_ids) == 20 and answer.finish_reason == {"type": "length", "length": 20}
        tempered = it.forward(tokens, temperature)
        expected = [tempered[len(prompt) - 1 + i, token] for i, token in enumerate(answer.output_ids)]
        np.testing.assert_allclose(answer.output_logprobs, expected, atol=1e-5)
        plain = it.forward(prompt)
        assert answer.input_logprobs is not None
        np.testing.assert_allclose(
            answer.input_logprobs, [plain[i - 1, prompt[i]] for i in range(3, 9)], atol=1e-5
        )


def test_greedy_takes_the_likeliest_token_and_reports_temperature_one(bench: Any) -> None:
    it = bench()
    (answer,) = it.run([body([1, 2, 3], temperature=0, max_new_tokens=8, ignore_eos=True)])
    logprobs = it.forward([1, 2, 3, *answer.output_ids])
    assert answer.output_ids == [int(logprobs[2 + i].argmax()) for i in range(8)]
    np.testing.assert_allclose(answer.output_logprobs, [logprobs[2 + i].max() for i in range(8)], atol=1e-5)


def test_scoring_without_new_tokens(bench: Any) -> None:
    it = bench()
    prompt = [5, 6, 7, 8, 9]
    (answer,) = it.run([{**body(prompt, max_new_tokens=0, temperature=0), "logprob_start_len": 0}])
    plain = it.forward(prompt)
    assert answer.output_ids == [] and answer.finish_reason == {"type": "length", "length": 0}
    np.testing.assert_allclose(
        answer.input_logprobs, [plain[i - 1, prompt[i]] for i in range(1, 5)], atol=1e-5
    )


def test_bfloat16_is_close_to_float32(bench: Any) -> None:
    request = body([1, 2, 3, 4], temperature=0, max_new_tokens=4, ignore_eos=True)
    (exact,), (rough,) = bench().run([request]), bench(dtype="bfloat16").run([request])
    np.testing.assert_allclose(rough.output_logprobs[:1], exact.output_logprobs[:1], atol=0.2)


# ---- batch invariance


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3", "qwen2_window", "qwen3_moe", "mixtral"])
def test_an_answer_does_not_depend_on_what_else_runs(family: str, bench: Any, make_model: Make) -> None:
    folder = make_model(family)
    bodies = mixed_bodies(20 if family in ("qwen3_moe", "mixtral") else 108)  # experts decode row by row
    alone = bench(folder)
    expected = [alone.run([one])[0] for one in bodies[:8]]
    for order in range(3):
        it = bench(folder)
        places = list(range(len(bodies)))
        random.Random(order).shuffle(places)
        together = it.run([bodies[place] for place in places])
        by_place = dict(zip(places, together, strict=True))
        assert [by_place[place] for place in range(8)] == expected
    assert len({tuple(answer.output_ids) for answer in expected}) == 8


def test_an_answer_does_not_depend_on_who_had_the_slot_before(bench: Any) -> None:
    it = bench()
    request = body([1, 2, 3], seed=9, temperature=1.3)
    before = it.run([request])
    it.run(mixed_bodies(80))
    it.engine.flush().result(5)
    assert it.run([request]) == before


def test_samples_of_a_group_equal_single_requests(bench: Any) -> None:
    it = bench()
    group = it.run([body([1, 2, 3], seed=9, n=4)])
    assert group[0] == it.run([body([1, 2, 3], seed=9)])[0]
    assert len({tuple(answer.output_ids) for answer in group}) > 1


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rows_of_a_block_are_independent(family: str, threads: int, dtype: Any, make_model: Make) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = ServedModel(str(make_model(family, hidden_size=64, vocab_size=1000)), dtype)
        with torch.inference_mode():
            assert model.rows_are_independent(64, 32)
            assert model.rows_are_independent(6, 256)
    finally:
        torch.set_num_threads(before)


def test_rows_that_depend_on_each_other_decode_alone(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    it = bench()
    decode = ServedModel.decode

    def leaky(self: ServedModel, *arguments: Any) -> np.ndarray:
        logits = decode(self, *arguments)
        return logits + np.arange(len(logits), dtype=np.float32)[:, None] * np.float32(1e-3)

    monkeypatch.setattr(ServedModel, "decode", leaky)
    with torch.inference_mode():
        assert not it.model.rows_are_independent(8, 32)
    it.run([body([1, 2, 3])])
    assert it.engine._blocks[0].slots == 1


def test_a_broken_request_leaves_its_neighbours_alone(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    it = bench()
    expected = it.run([body([1, 2, 3], seed=1)])
    prefill = ServedModel.prefill

    def poisoned(self: ServedModel, prompt: tuple[int, ...], start: int | None) -> Any:
        result = prefill(self, prompt, start)
        if prompt == (7,) * 9:
            for part in result.keys + result.values:
                part.fill_(float("nan"))
        return result

    monkeypatch.setattr(ServedModel, "prefill", poisoned)
    it.engine.flush().result(5)
    bad, good = it.run([body([7] * 9, ignore_eos=True), body([1, 2, 3], seed=1)])
    assert bad.error is not None and "not finite" in bad.error
    assert [good] == expected
    monkeypatch.setattr(ServedModel, "prefill", prefill)
    assert it.run([body([1, 2, 3], seed=1) for _ in range(64)]) == expected * 64


def test_blocks_follow_from_length_and_options_only() -> None:
    options = ServeOptions(model="", max_running_requests=48, max_total_tokens=4096)
    assert [block_length(n, 200) for n in (1, 32, 33, 64, 65, 190)] == [32, 32, 64, 64, 128, 200]
    assert [block_slots(n, options) for n in (16, 32, 64, 512, 1024, 4096)] == [48, 32, 16, 2, 1, 1]


def test_requests_wait_when_memory_or_slots_are_short(bench: Any) -> None:
    bodies = mixed_bodies(40)
    small = bench(max_total_tokens=128, max_running_requests=3, context_length=128)
    large = bench(context_length=128)
    assert [a.finish_reason for a in small.run(bodies)] == [a.finish_reason for a in large.run(bodies)]
    assert sum(block.slots * block.length for block in small.engine._blocks) <= 128


# ---- sampling


def test_a_waiting_request_holds_no_memory_for_the_response_that_it_may_get(
    bench: Any, make_model: Make
) -> None:
    num_tokens, num_requests = 8000, 50
    it = bench(make_model("qwen2", max_position_embeddings=num_tokens + 100))
    it.engine.pause("in_place").result(30)
    samples = [
        sample
        for seed in range(num_requests)
        for sample in it.samples(body([1, 2, 3], seed=seed, max_new_tokens=num_tokens))
    ]
    tracemalloc.start()
    try:
        it.engine.submit(samples)
        assert it.engine.flush().result(30) is False  # by then they wait
        held_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert it.engine.state().num_waiting == num_requests
    assert held_bytes < num_requests * num_tokens  # not even a byte a token


def test_sampling_frequencies_follow_the_distribution(bench: Any) -> None:
    it = bench()
    prompt = [2, 7, 1]
    for temperature in (1.0, 0.6):
        answers = it.run(
            [body(prompt, seed=seed, max_new_tokens=1, temperature=temperature, n=50) for seed in range(80)]
        )
        seen = np.bincount([answer.output_ids[0] for answer in answers], minlength=16)
        expected = np.exp(it.forward(prompt, temperature)[-1]) * len(answers)
        kept = expected > 5
        chi_square = (((seen - expected) ** 2) / expected)[kept].sum()
        assert chi_square < 40  # 15 degrees of freedom at most: p < 0.0005, and the seeds are fixed


# ---- endings


def test_stop_tokens_end_a_response_and_stay_in_it(bench: Any) -> None:
    it = bench()
    (free,) = it.run([body([1, 2, 3], seed=4, max_new_tokens=40, ignore_eos=True)])
    stop = free.output_ids[5]
    first = free.output_ids.index(stop)
    (stopped,) = it.run([body([1, 2, 3], seed=4, max_new_tokens=40, stop_token_ids=[stop, 99])])
    cut = min([first, *[i for i, token in enumerate(free.output_ids) if token == EOS]])
    assert stopped.output_ids == free.output_ids[: cut + 1]
    assert stopped.finish_reason == {"type": "stop", "matched": free.output_ids[cut]}


def test_the_models_end_of_text_stops_unless_ignored(bench: Any) -> None:
    it = bench()
    answers = it.run([body([1, 2, 3], seed=seed, max_new_tokens=60) for seed in range(30)])
    stopped = [answer for answer in answers if answer.finish_reason["type"] == "stop"]
    assert stopped and all(answer.output_ids[-1] == EOS for answer in stopped)
    assert all(EOS not in answer.output_ids[:-1] for answer in answers)


def test_a_stop_token_in_the_last_place_counts_as_length(bench: Any) -> None:
    it = bench()
    (free,) = it.run([body([1, 2, 3], seed=4, max_new_tokens=1, ignore_eos=True)])
    (same,) = it.run([body([1, 2, 3], seed=4, max_new_tokens=1, stop_token_ids=free.output_ids)])
    assert same.finish_reason == {"type": "length", "length": 1}


def test_a_dead_engine_answers_with_its_error(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    it = bench()
    monkeypatch.setattr(engine_module.SlotBlock, "step", lambda self: 1 / 0)
    (answer,) = it.run([body([1, 2, 3])])
    assert answer.error is not None and "ZeroDivisionError" in answer.error
    (later,) = it.run([body([1, 2, 3])])
    assert later.error == answer.error and it.engine.state().failure == answer.error
