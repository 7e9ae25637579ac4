"""The generation engine: its numbers against a plain forward pass, and that no request sees another."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from megatron_scope.errors import DataError  # noqa: E402
from megatron_scope.rollout.embedded import engine as engine_module  # noqa: E402
from megatron_scope.rollout.embedded.block import block_length, block_slots  # noqa: E402
from megatron_scope.rollout.embedded.engine import Engine  # noqa: E402
from megatron_scope.rollout.embedded.model import ServedModel, WeightsError  # noqa: E402
from megatron_scope.rollout.embedded.options import ServeOptions  # noqa: E402
from megatron_scope.rollout.embedded.protocol import Answer, Sample, parse_call  # noqa: E402
from megatron_scope.rollout.embedded.sampling import draw, uniforms  # noqa: E402

EOS = 14
FAMILIES = ("qwen2", "qwen2_window", "llama", "qwen3", "mistral_window", "qwen3_moe")
Make = Callable[..., Path]


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


@pytest.fixture
def bench(make_model: Make) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def build(folder: Path | None = None, **options: Any) -> Bench:
        made.append(Bench(folder or make_model(), **options))
        return made[-1]

    yield build
    for one in made:
        one.engine.close(5)


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


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen2_window", "qwen3_moe"])
def test_an_answer_does_not_depend_on_what_else_runs(family: str, bench: Any, make_model: Make) -> None:
    folder = make_model(family)
    bodies = mixed_bodies(20 if family == "qwen3_moe" else 108)  # experts decode row by row
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
def test_rows_of_a_block_are_independent(threads: int, dtype: Any, make_model: Make) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = ServedModel(str(make_model("llama", hidden_size=64, vocab_size=1000)), dtype)
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
        if prompt == (7, 7):
            for part in result.keys + result.values:
                part.fill_(float("nan"))
        return result

    monkeypatch.setattr(ServedModel, "prefill", poisoned)
    it.engine.flush().result(5)
    bad, good = it.run([body([7, 7], ignore_eos=True), body([1, 2, 3], seed=1)])
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


def test_restrictions_keep_the_support_and_the_reported_logprobs() -> None:
    rng = np.random.default_rng(0)
    logits = np.repeat(rng.normal(size=(1, 20)).astype(np.float32) * 2, 4000, 0)
    probs = np.exp(logits[0].astype(float))
    probs /= probs.sum()
    order = np.argsort(-probs)
    rows = len(logits)
    for top_p, top_k, support in ((0.5, -1, None), (1.0, 3, 3), (0.9, 2, 2), (1.0, -1, 20)):
        drawn = draw(
            logits,
            temperature=np.ones(rows),
            top_p=np.full(rows, top_p),
            top_k=np.full(rows, top_k),
            uniform=rng.random(rows),
        )
        size = support or int(np.searchsorted(np.cumsum(probs[order]), top_p) + 1)
        assert set(drawn.ids) <= set(order[:size])
        assert len(set(drawn.ids)) == min(size, len(set(drawn.ids))) and drawn.finite.all()
        np.testing.assert_allclose(drawn.logprobs, np.log(probs[drawn.ids]), atol=1e-12)
        restricted = probs[order[:size]] / probs[order[:size]].sum()
        share = np.array([(drawn.ids == token).mean() for token in order[:size]])
        np.testing.assert_allclose(share, restricted, atol=0.04)


def test_a_draw_never_takes_an_impossible_token() -> None:
    logits = np.array([[-np.inf, 0.0, -np.inf, 1.0, -np.inf]], dtype=np.float32)
    for uniform in (0.0, 1.0 - 2.0**-53):
        drawn = draw(
            logits,
            temperature=np.ones(1),
            top_p=np.ones(1),
            top_k=np.array([-1]),
            uniform=np.array([uniform]),
        )
        assert drawn.ids[0] == (1 if uniform == 0.0 else 3) and drawn.finite.all()


def test_draws_of_a_row_do_not_depend_on_the_rows_beside_it() -> None:
    rng = np.random.default_rng(1)
    for vocab in (3, 16, 17, 1001):
        logits = rng.normal(size=(64, vocab)).astype(np.float32)
        settings = {
            "temperature": rng.choice([0.0, 0.6, 1.0], 64),
            "top_p": rng.choice([1.0, 0.7], 64),
            "top_k": rng.choice([-1, 2], 64),
            "uniform": rng.random(64),
        }
        whole = draw(logits, **settings)
        for row in range(64):
            one = draw(
                logits[row : row + 1], **{name: value[row : row + 1] for name, value in settings.items()}
            )
            assert one.ids[0] == whole.ids[row] and one.logprobs[0] == whole.logprobs[row]


def test_uniforms_repeat_by_seed_and_sample() -> None:
    assert (uniforms(7, 0, 5) == uniforms(7, 0, 9)[:5]).all()
    assert not (uniforms(7, 0, 5) == uniforms(7, 1, 5)).any()
    assert not (uniforms(None, 0, 5) == uniforms(None, 0, 5)).any()


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


def endless(it: Bench, rid: str, seed: int = 0) -> tuple[Sample, ...]:
    """A long request on its way, paused once it has made some tokens."""
    samples = it.samples({**body([1, 2, 3], seed=seed, max_new_tokens=240, ignore_eos=True), "rid": rid})
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


def test_abort_keeps_the_partial_output(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    it = bench()
    paused_midway(it, monkeypatch, "in_place")
    first, second = endless(it, "a"), endless(it, "b")
    wait_paused(it)
    it.engine.abort(frozenset(("a",)))
    (answer,) = it.wait([first[0].id])
    assert answer.finish_reason["type"] == "abort" and 0 < len(answer.output_ids) < 240
    assert len(answer.output_logprobs) == len(answer.output_ids)
    assert it.engine.state().num_running == 1
    it.engine.abort(None)
    (other,) = it.wait([second[0].id])
    assert other.finish_reason["type"] == "abort"


def test_abort_reaches_a_waiting_request(bench: Any) -> None:
    it = bench()
    it.engine.pause("in_place").result(5)
    samples = endless(it, "a")
    it.engine.abort(frozenset(("a",)))
    (answer,) = it.wait([samples[0].id])
    assert answer.finish_reason["type"] == "abort" and answer.output_ids == [] and answer.spans == []


# ---- weights


def test_new_weights_answer_as_a_server_started_on_them(bench: Any, make_model: Make) -> None:
    for family in ("qwen2", "qwen3_moe"):
        other = make_model(family, seed=1)
        it, fresh = bench(make_model(family)), bench(other, weight_version="7")
        old = it.run(mixed_bodies(6))
        assert it.engine.update_weights(str(other), "7", abort_all=False).result(10) == 0
        assert it.run(mixed_bodies(6)) == fresh.run(mixed_bodies(6)) != old


def test_weights_are_a_copy_of_the_file(bench: Any, make_model: Make, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(make_model(), folder)
    it = bench(folder)
    before = it.run(mixed_bodies(4))
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(2000)
        file.write(b"\0" * (file.seek(0, 2) - 2000))
    it.engine.flush().result(5)
    assert it.run(mixed_bodies(4)) == before
    assert all(parameter.data_ptr() % 64 == 0 for parameter in it.model._model.parameters())


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_paused_request_goes_on_over_a_weight_update(
    mode: Any, bench: Any, make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = bench(weight_version="1")
    (whole,) = it.run([body([1, 2, 3], seed=2, max_new_tokens=240, ignore_eos=True)])
    paused_midway(it, monkeypatch, mode)
    samples = endless(it, "a", seed=2)
    wait_paused(it)
    assert it.engine.update_weights(str(make_model(seed=1)), "2", abort_all=False).result(10) == 1
    it.engine.resume().result(5)
    (answer,) = it.wait([samples[0].id])
    cut = answer.spans[0][2]
    assert answer.spans == [("1", 0, cut), ("2", cut, 240)] and 0 < cut < 240
    assert answer.output_ids[:cut] == whole.output_ids[:cut] and answer.output_ids != whole.output_ids
    assert answer.weight_version == "2"


def test_a_pause_alone_does_not_change_an_answer(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    it = bench()
    request = body([1, 2, 3], seed=2, max_new_tokens=240, ignore_eos=True)
    (whole,) = it.run([request])
    paused_midway(it, monkeypatch, "in_place")
    samples = endless(it, "a", seed=2)
    wait_paused(it)
    it.engine.resume().result(5)
    assert it.wait([samples[0].id]) == [whole]


def test_an_update_waits_for_running_requests(bench: Any, make_model: Make) -> None:
    it = bench(weight_version="1")
    samples = it.samples({**body([1, 2, 3], max_new_tokens=200, ignore_eos=True), "rid": "a"})
    it.engine.submit(samples)
    update = it.engine.update_weights(str(make_model(seed=1)), "2", abort_all=False)
    late = it.samples({**body([1, 2, 3]), "rid": "b"})
    it.engine.submit(late)
    update.result(20)
    (answer,), (after,) = it.wait([samples[0].id]), it.wait([late[0].id])
    assert answer.spans in (
        [("1", 0, 200)],
        [("2", 0, 200)],
    )  # begun before the update, or after it: never mixed
    assert after.weight_version == "2"


def test_wrong_weights_are_refused_and_the_old_ones_stay(
    bench: Any, make_model: Make, tmp_path: Path
) -> None:
    it = bench()
    before = it.run(mixed_bodies(4))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes((make_model() / "model.safetensors").read_bytes()[:3000])
    cases = {
        str(tmp_path / "none"): "not a folder",
        str(make_model("llama")): "model_type",
        str(make_model(hidden_size=64)): "hidden_size",
        str(make_model(num_hidden_layers=3)): "num_hidden_layers",
        str(make_model(tie_word_embeddings=False)): "tie_word_embeddings",
        str(make_model(rope_parameters={"rope_type": "default", "rope_theta": 500.0})): "rope_parameters",
        str(broken): "metadata",
        str(tmp_path): "safetensors",
    }
    for folder, said in cases.items():
        with pytest.raises(WeightsError, match=said):
            it.engine.update_weights(folder, "2", abort_all=False).result(10)
    assert it.run(mixed_bodies(4)) == before


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"num_hidden_layers": 3}, "unexpected keys"),
        ({"num_hidden_layers": 1}, "missing keys"),
        ({"intermediate_size": 80}, "mismatched keys"),
        ({"tie_word_embeddings": False}, "tied"),
    ],
)
def test_weights_without_a_config_are_compared_by_name_and_shape(
    source: dict[str, Any], said: str, bench: Any, make_model: Make, tmp_path: Path
) -> None:
    it = bench()
    before = it.run(mixed_bodies(2))
    (tmp_path / "model.safetensors").write_bytes((make_model(**source) / "model.safetensors").read_bytes())
    with pytest.raises(WeightsError, match=said):
        it.engine.update_weights(str(tmp_path), "2", abort_all=False).result(10)
    assert it.run(mixed_bodies(2)) == before


def test_folders_that_hold_no_model_are_data_errors(make_model: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config\.json"):
        ServedModel(str(tmp_path), "float32")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(DataError, match="gpt2"):
        ServedModel(str(tmp_path), "float32")
    (tmp_path / "config.json").write_bytes((make_model() / "config.json").read_bytes())
    with pytest.raises(DataError, match="cannot load"):
        ServedModel(str(tmp_path), "float32")


def test_a_dead_engine_answers_with_its_error(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    it = bench()
    monkeypatch.setattr(engine_module.SlotBlock, "step", lambda self: 1 / 0)
    (answer,) = it.run([body([1, 2, 3])])
    assert answer.error is not None and "ZeroDivisionError" in answer.error
    (later,) = it.run([body([1, 2, 3])])
    assert later.error == answer.error and it.engine.state().failure == answer.error
