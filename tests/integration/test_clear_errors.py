"""What can be wrong with rollout servers and the disk between them and the trainer: one clear line each, and
nothing is lost.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_scope.rollout.embedded.options import ServeOptions
from megatron_scope.rollout.process import EmbeddedServer
from tests.helpers.models import save_qwen2
from tests.helpers.proxy import Proxy
from tests.helpers.settings import changed
from tests.integration.conftest import metrics

KEY = "SCOPE_TEST_KEY"


def one_line(result) -> str:
    """The only line on stderr of a command that failed."""
    assert result.returncode == 1, result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("megatron-scope: ")
    return line


@pytest.mark.parametrize("stages", [1, 2])
def test_a_disk_that_is_full_when_weights_are_written_loses_nothing(
    run, write, train, config, tmp_path, small_disk: Callable[[int], Path], stages
):
    disk = small_disk(32)
    folder = disk / "run"
    config = changed(config, checkpoint={"every": 1}, parallel={"pipeline": stages})
    whole = changed(config, run={"output_dir": str(tmp_path / "whole"), "steps": 3})
    train(whole, stages)
    train(changed(config, run={"output_dir": str(folder), "steps": 1}), stages)
    fill(disk, leave=size_of(folder / "hf") // 2)
    config = changed(config, run={"output_dir": str(folder), "steps": 3})
    said = one_line(run("train", write(config), "--nproc", str(stages)))
    assert f"No space left on device: '{folder / 'weights'}/.v00000001.partial/" in said
    assert list((folder / "weights").glob(".*")) == []
    (disk / "ballast").unlink()
    train(config, stages)
    assert metrics(folder) == metrics(tmp_path / "whole")


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*"))


def fill(disk: Path, *, leave: int) -> None:
    free = shutil.disk_usage(disk).free
    assert free > leave
    with open(disk / "ballast", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - leave)


def test_a_wrong_key_is_one_line_that_does_not_tell_it(run, write, config, models, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, "the-right-one")
    options = ServeOptions(model=str(models["student"]), api_key_env=KEY)
    with EmbeddedServer(options, log_path=tmp_path / "log") as server:
        rollout = {"engine": "sglang", "servers": [server.url], "api_key_env": KEY}
        path = write(changed(config, run={"steps": 1}, rollout=rollout))
        monkeypatch.setenv(KEY, "a-wrong-one")
        said = one_line(run("train", path))
        assert f"{server.url}/" in said and "the API key is missing or wrong" in said
        assert "rollout.api_key_env" in said and "-one" not in said
        monkeypatch.setenv(KEY, "the-right-one")
        assert run("train", path).returncode == 0


def test_another_model_behind_the_address_is_one_line(run, write, config, tmp_path):
    other = save_qwen2(tmp_path / "other", hidden_size=48)
    with EmbeddedServer(ServeOptions(model=str(other)), log_path=tmp_path / "log") as server:
        rollout = {"engine": "sglang", "servers": [server.url]}
        said = one_line(run("train", write(changed(config, rollout=rollout))))
        assert server.url in said and "hidden_size" in said


def test_another_version_of_sglang_is_one_line_unless_it_is_allowed(
    run, write, train, config, models, tmp_path
):
    def rename(path: str, answer: bytes) -> bytes:
        if path != "/server_info":
            return answer
        return json.dumps({**json.loads(answer), "version": "0.4.9"}).encode()

    options = ServeOptions(model=str(models["student"]))
    with (
        EmbeddedServer(options, log_path=tmp_path / "log") as server,
        Proxy(server.url, change=rename) as old,
    ):
        config = changed(config, run={"steps": 1}, rollout={"engine": "sglang", "servers": [old.url]})
        said = one_line(run("train", write(config)))
        assert old.url in said and "0.4.9" in said and "rollout.any_sglang_version" in said
        assert len(train(changed(config, rollout={"any_sglang_version": True}))) == 1
