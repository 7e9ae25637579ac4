"""Which servers are taken for what they should be."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from megatron_scope.errors import DataError, RolloutError
from megatron_scope.rollout.client import ServerClient
from megatron_scope.rollout.identity import Expectation, check_identity
from tests.unit.rollout.fake_server import FAST, Fake, answering
from tests.unit.rollout.pool_server import MODEL, write_model

SHAPE = {"vocab_size": 100, "hidden_size": 8, "num_hidden_layers": 2, "tie_word_embeddings": False}


def check(model: dict[str, Any], server: dict[str, Any], expected: Expectation) -> None:
    async def run() -> None:
        async with (
            Fake(model_info=answering(model), server_info=answering(server)) as fake,
            ServerClient(fake.url, vocab_size=10, options=FAST) as client,
        ):
            await check_identity(client, expected)

    asyncio.run(run())


def serving(path: Path | str, **changes: Any) -> dict[str, Any]:
    return {"is_generation": True, "model_path": str(path), **MODEL, **changes}


@pytest.mark.parametrize("version", ["0.5.23", "0.5.23.post1", "0.5.99", "megatron_scope 0.1"])
def test_accepted_software_is_taken(version: str) -> None:
    check(serving("/none"), {"version": version}, Expectation(MODEL))


@pytest.mark.parametrize("version", ["0.5.22", "0.6.0", "1.0", "main", "", None, 5])
def test_other_software_is_refused_unless_it_is_allowed(version: Any) -> None:
    with pytest.raises(
        RolloutError, match=r"expected SGLang from 0\.5\.23 to below 0\.6 \(.*any_sglang_version=true"
    ):
        check(serving("/none"), {"version": version}, Expectation(MODEL))
    check(serving("/none"), {"version": version}, Expectation(MODEL, any_sglang_version=True))


def test_any_model_will_do_where_none_is_expected() -> None:
    check(serving("/none", model_type="bert"), {"version": "0.5.23"}, Expectation())


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_another_shape_is_found_where_the_servers_folder_can_be_read(key: str, tmp_path: Path) -> None:
    expected = Expectation.of_model(write_model(tmp_path / "ours", **SHAPE), any_sglang_version=False)
    server = {"version": "0.5.23"}
    check(serving(write_model(tmp_path / "same", **SHAPE)), server, expected)
    theirs = write_model(tmp_path / "theirs", **{**SHAPE, key: 99})
    with pytest.raises(RolloutError, match=rf"another model, '{theirs}' \({key} 99, expected {SHAPE[key]}\)"):
        check(serving(theirs), server, expected)
    check(serving(tmp_path / "not here"), server, expected)


def test_the_vocabulary_is_compared_where_the_server_tells_it() -> None:
    expected = Expectation({**MODEL, **SHAPE})
    with pytest.raises(RolloutError, match="vocab_size 90, expected 100"):
        check(serving("/none"), {"version": "0.5.23", "vocab_size": 90}, expected)


def test_a_server_that_is_no_sglang_is_refused() -> None:
    with pytest.raises(RolloutError, match="generates nothing"):
        check({}, {"version": "0.5.23"}, Expectation())


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_model_folder_without_a_config_is_a_data_error(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(DataError, match=r"config\.json"):
        Expectation.of_model(tmp_path, any_sglang_version=False)
