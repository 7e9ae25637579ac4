"""A teacher behind servers in whole runs: real SGLang equal to the teacher on the ranks, servers that die,
and servers that are not what they should be.
"""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from megatron_scope.rollout.embedded.options import ServeOptions
from megatron_scope.rollout.process import EmbeddedServer
from megatron_scope.teacher.pool import TeacherPool
from megatron_scope.teacher.server import TeacherOptions
from megatron_scope.teacher.wire import ScoringRequest
from tests.helpers.models import CHARACTERS, save_llama, save_qwen2
from tests.helpers.rollouts import random_rows, write_rows
from tests.helpers.rows import numbers
from tests.helpers.settings import changed
from tests.integration.conftest import metrics, start

VOCAB = len(CHARACTERS)
STEPS = 40
STALLED_S = 1.5  # without a step, where one takes a tenth of that


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose heads have widths that SGLang takes; `renamed` has another tokenizer, `other` other
    weights.
    """
    root = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 32}
    found = {
        "student": save_qwen2(root / "student", seed=1, **sizes),
        "teacher": save_llama(root / "teacher", seed=2, **sizes),
        "other": save_llama(root / "other", seed=3, **sizes),
        "renamed": save_llama(root / "renamed", seed=2, **sizes),
    }
    tokens = found["renamed"] / "tokenizer.json"
    tokens.write_text(tokens.read_text().replace('"8": 8', '"8": 9', 1).replace('"9": 9', '"9": 8', 1))
    return found


@pytest.fixture(scope="module")
def embedded(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., EmbeddedServer]]:
    """`embedded(name)` gives a server of that model, shared by the tests; fresh=True gives another."""
    logs, servers = tmp_path_factory.mktemp("logs"), {}

    def get(name: str, *, fresh: bool = False) -> EmbeddedServer:
        key = f"{name}-{len(servers)}" if fresh else name
        if key not in servers:
            options = ServeOptions(model=str(folders[name]))
            servers[key] = EmbeddedServer(options, log_path=logs / f"{key}.log")
            servers[key].start()
        return servers[key]

    yield get
    for server in servers.values():
        server.stop()


@pytest.fixture
def settings(folders: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    rows = [
        row
        for step in range(1, STEPS + 1)
        for row in random_rows(num_prompts=6, num_samples=4, vocab_size=VOCAB, seed=step, step=step)
    ]
    return {
        "run": {"output_dir": str(tmp_path / "run"), "steps": STEPS},
        "student": {"hf": str(folders["student"])},
        # Small requests, so that each server gets some of every step.
        "teacher": {"request_tokens": 32},
        "rollout": {"engine": "replay", "file": str(write_rows(tmp_path / "rows.jsonl", rows))},
        "train": {"precision": "float32"},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 0},
    }


def served_by(settings: dict[str, Any], *urls: str, **teacher: Any) -> dict[str, Any]:
    return changed(settings, teacher={"server": list(urls), **teacher})


# ---- the same numbers


def test_real_sglang_scores_every_token_as_the_teacher_on_the_ranks_does(
    pool, folders, sglang_servers, settings
) -> None:
    url = sglang_servers.shared(folders["teacher"]).url
    on_ranks = changed(settings, teacher={"hf": str(folders["teacher"])})
    expected = pool(1).run("tests.helpers.jobs:token_logprobs", on_ranks)[0]["teacher"]
    rows = random_rows(num_prompts=6, num_samples=4, vocab_size=VOCAB, seed=1)
    requests = [
        ScoringRequest(str(index), tuple(row["prompt_ids"]), tuple(row["output_ids"]))
        for index, row in enumerate(rows)
    ]

    async def score() -> list[np.ndarray]:
        teacher = TeacherPool([url], TeacherOptions(60.0, 60.0, 64, 4, 0.05))
        try:
            (facts,) = await teacher.connect()
            assert facts.vocab_rows == VOCAB and facts.max_input_tokens is not None
            assert await teacher.servers[0].texts_of(range(VOCAB)) == list(CHARACTERS)
            await teacher.compare([facts], VOCAB)
            # As long as it may be, and the longest that the server says it takes.
            longest = ScoringRequest("longest", (1,), (2,) * (facts.max_input_tokens - 1))
            assert len(await teacher.score(longest)) == facts.max_input_tokens - 1
            return await asyncio.gather(*map(teacher.score, requests))
        finally:
            await teacher.close()

    scores = asyncio.run(score())
    assert len(scores) == len(expected) == 24
    for index, values in enumerate(scores):
        np.testing.assert_allclose(values, expected[index], rtol=0, atol=1e-4)


@pytest.mark.parametrize("objective", ["scope", "opd"])
def test_a_step_with_real_sglang_is_that_of_the_teacher_on_the_ranks(
    train, folders, sglang_servers, settings, tmp_path, objective
) -> None:
    settings = changed(settings, run={"steps": 2}, objective={"name": objective})
    on_ranks = changed(
        settings,
        run={"output_dir": str(tmp_path / "ranks")},
        teacher={"hf": str(folders["teacher"])},
    )
    served = served_by(settings, sglang_servers.shared(folders["teacher"]).url)
    expected, found = train(on_ranks), train(served)
    for row, other in zip(found, expected, strict=True):
        assert numbers(row) == pytest.approx(numbers(other), rel=1e-4, abs=1e-4, nan_ok=True)


# ---- servers that die


def test_a_step_whose_teacher_is_killed_is_finished_by_another_of_its_servers(
    folders, sglang_servers, embedded, settings, write, train, tmp_path
) -> None:
    lasting = embedded("teacher").url
    undisturbed = changed(served_by(settings, lasting), run={"output_dir": str(tmp_path / "undisturbed")})
    train(undisturbed)
    with sglang_servers.own(folders["teacher"]) as mortal:
        disturbed = served_by(settings, mortal.url, lasting)
        process = start("train", write(disturbed))
        _wait_for_steps(process, tmp_path / "run", 2)
        mortal.suspend()  # so that the run stands still with requests under way there
        _wait_for_a_stall(process, tmp_path / "run")
        mortal.kill()
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert f"warning: a teacher server is taken out: {mortal.url}" in stderr
    rows, expected = (metrics(tmp_path / name) for name in ("run", "undisturbed"))
    assert len(rows) == STEPS
    for row, other in zip(rows, expected, strict=True):
        assert numbers(row) == pytest.approx(numbers(other), rel=1e-3, abs=1e-3, nan_ok=True)


def test_a_run_whose_only_teacher_is_killed_ends_in_one_error_and_goes_on_with_another(
    embedded, settings, write, train, tmp_path
) -> None:
    settings = changed(settings, checkpoint={"every": 1})
    mortal = embedded("teacher", fresh=True)
    assert mortal.pid is not None
    process = start("train", write(served_by(settings, mortal.url, start_timeout_s=3)))
    _wait_for_steps(process, tmp_path / "run", 2)
    psutil.Process(mortal.pid).kill()
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 1
    warning, error = stderr.strip().splitlines()
    assert warning.startswith(f"warning: a teacher server is taken out: {mortal.url}/generate: ")
    assert "the teacher did not score prompt p" in error and "--resume auto" in error
    assert f"came back within teacher.start_timeout_s=3 ({mortal.url}/" in error
    done = len(metrics(tmp_path / "run"))
    assert 2 <= done < STEPS
    again = served_by(settings, embedded("teacher").url)
    rows = train(changed(again, run={"steps": done + 1}))
    assert [row["step"] for row in rows] == list(range(1, done + 2))


def _wait_for_steps(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while _num_steps(folder) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def _wait_for_a_stall(process: subprocess.Popen[str], folder: Path) -> None:
    seen, since = _num_steps(folder), time.monotonic()
    while time.monotonic() - since < STALLED_S:
        assert process.poll() is None, process.communicate()
        if (now := _num_steps(folder)) != seen:
            seen, since = now, time.monotonic()
        time.sleep(0.05)


def _num_steps(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


# ---- servers that are not what they should be


def test_two_servers_of_different_models_are_refused_before_the_run(
    embedded, settings, write, run, folders, tmp_path
) -> None:
    urls = embedded("teacher").url, embedded("other").url
    result = run("train", write(served_by(settings, *urls)))
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert f"{urls[1]} ({folders['other']}) and {urls[0]} ({folders['teacher']}) give the same tokens" in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_teacher_with_another_tokenizer_is_refused_before_the_run(
    embedded, settings, write, run, folders
) -> None:
    result = run("train", write(served_by(settings, embedded("renamed").url)))
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert f"the tokenizers of {folders['student']} and {folders['renamed']} differ in 2 tokens" in line
