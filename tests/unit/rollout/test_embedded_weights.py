"""Aborts, pauses and weight updates of the engine, in the middle of a response."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_scope.errors import DataError
from megatron_scope.rollout.embedded.model import ServedModel, WeightsError
from tests.unit.rollout.bench import body, endless, mixed_bodies, paused_midway, wait_paused

Make = Callable[..., Path]


def test_abort_keeps_the_partial_output(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    it = bench(max_running_requests=8)
    paused_midway(it, monkeypatch, "in_place")
    first, second = endless(it, "a"), endless(it, "b")
    wait_paused(it)
    it.engine.abort(frozenset(("a",)))
    (answer,) = it.wait([first[0].id])
    assert answer.finish_reason["type"] == "abort" and 0 < len(answer.output_ids) < 120
    assert len(answer.output_logprobs) == len(answer.output_ids)
    assert it.engine.state().num_running == 1
    it.engine.abort(None)
    (other,) = it.wait([second[0].id])
    assert other.finish_reason["type"] == "abort"


def test_abort_reaches_a_waiting_request(bench: Any) -> None:
    it = bench(max_running_requests=8)
    it.engine.pause("in_place").result(5)
    samples = endless(it, "a")
    it.engine.abort(frozenset(("a",)))
    (answer,) = it.wait([samples[0].id])
    assert answer.finish_reason["type"] == "abort" and answer.output_ids == [] and answer.spans == []


# ---- weights


def test_new_weights_answer_as_a_server_started_on_them(bench: Any, make_model: Make) -> None:
    for family in ("qwen2", "qwen3", "qwen3_moe", "mixtral"):
        other = make_model(family, seed=1)
        it, fresh = (
            bench(make_model(family), max_running_requests=8),
            bench(other, weight_version="7", max_running_requests=8),
        )
        old = it.run(mixed_bodies(6))
        assert it.engine.update_weights(str(other), "7", abort_all=False).result(10) == 0
        assert it.run(mixed_bodies(6)) == fresh.run(mixed_bodies(6)) != old


def test_weights_are_a_copy_of_the_file(bench: Any, make_model: Make, tmp_path: Path) -> None:

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
    it = bench(weight_version="1", max_running_requests=8)
    (whole,) = it.run([body([1, 2, 3], seed=2, max_new_tokens=120, ignore_eos=True)])
    paused_midway(it, monkeypatch, mode)
    samples = endless(it, "a", seed=2)
    wait_paused(it)
    assert it.engine.update_weights(str(make_model(seed=1)), "2", abort_all=False).result(10) == 1
    it.engine.resume().result(5)
    (answer,) = it.wait([samples[0].id])
    cut = answer.spans[0][2]
    assert answer.spans == [("1", 0, cut), ("2", cut, 120)] and 0 < cut < 120
    assert answer.output_ids[:cut] == whole.output_ids[:cut] and answer.output_ids != whole.output_ids
    assert answer.weight_version == "2"


def test_a_pause_alone_does_not_change_an_answer(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    it = bench(max_running_requests=8)
    request = body([1, 2, 3], seed=2, max_new_tokens=120, ignore_eos=True)
    (whole,) = it.run([request])
    paused_midway(it, monkeypatch, "in_place")
    samples = endless(it, "a", seed=2)
    wait_paused(it)
    it.engine.resume().result(5)
    assert it.wait([samples[0].id]) == [whole]


def test_an_update_waits_for_earlier_requests_and_holds_later_ones(bench: Any, make_model: Make) -> None:
    it = bench(weight_version="1", max_running_requests=8)
    samples = it.samples({**body([1, 2, 3], max_new_tokens=100, ignore_eos=True), "rid": "a"})
    it.engine.submit(samples)
    update = it.engine.update_weights(str(make_model(seed=1)), "2", abort_all=False)
    late = it.samples({**body([1, 2, 3]), "rid": "b"})
    it.engine.submit(late)
    update.result(20)
    (answer,), (after,) = it.wait([samples[0].id]), it.wait([late[0].id])
    assert answer.spans == [("1", 0, 100)]
    assert after.weight_version == "2"


def test_wrong_weights_are_refused_and_the_old_ones_stay(
    bench: Any, make_model: Make, tmp_path: Path
) -> None:
    it = bench(max_running_requests=8)
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
    (tmp_path / "nonsense").mkdir()
    (tmp_path / "nonsense" / "config.json").write_text("[]")
    cases[str(tmp_path / "nonsense")] = "nonsense"
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
    it = bench(max_running_requests=8)
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
