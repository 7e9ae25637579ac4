"""`train` on two servers of which one fails in mid-step: nothing of it reaches the numbers."""

from __future__ import annotations

import contextlib
import json
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_scope.rollout.embedded.options import ServeOptions
from megatron_scope.rollout.process import EmbeddedServer
from tests.helpers.settings import changed
from tests.integration.conftest import metrics, start

# Scores are summed in the order of arrival where they come before all responses do: off, for equal numbers.
ROLLOUT = {"prompts_per_step": 40, "samples_per_prompt": 8, "overlap_scoring": False}
SMALL = 10  # requests that a server has at once when it is struck: it is in the middle of a step


@contextlib.contextmanager
def two_servers(model: Path, folder: Path) -> Iterator[list[EmbeddedServer]]:
    """Two that answer one request at a time, so that many wait."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                EmbeddedServer(
                    ServeOptions(model=str(model), max_running_requests=1), log_path=folder / f"{number}.log"
                )
            )
            for number in range(2)
        ]


def num_waiting(server: EmbeddedServer) -> int:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{server.url}/server_info", timeout=60) as response:
        return json.load(response)["num_waiting_requests"]


def strike_in_mid_step(server: EmbeddedServer, number: signal.Signals) -> None:
    """Sends the signal once the server has much to do."""
    deadline = time.monotonic() + 300
    while num_waiting(server) < SMALL:
        assert time.monotonic() < deadline, "the step never came to the server"
        time.sleep(0.01)
    assert server.pid is not None
    psutil.Process(server.pid).send_signal(number)


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run gives when no server fails; made by the first test that asks."""
    return {}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_a_server_that_fails_in_mid_step_changes_nothing_of_the_run(
    number: signal.Signals, train, write, config, models, tmp_path, unharmed
) -> None:
    settings = {**ROLLOUT, "health_interval_s": 1.0, "health_timeout_s": 15.0}
    embedded = changed(config, rollout=settings)
    if not unharmed:
        train(embedded)
        unharmed["learnt"], unharmed["rows"] = learnt(tmp_path / "run"), rows(tmp_path / "run")
    with two_servers(models["student"], tmp_path) as servers:
        urls = [server.url for server in servers]
        on_two = {"engine": "sglang", "servers": urls}
        other = {"output_dir": str(tmp_path / "on_two")}
        process = start("train", write(changed(embedded, rollout=on_two, run=other)))
        try:
            strike_in_mid_step(servers[0], number)
            _, stderr = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 0, stderr
    assert f"warning: rollout server {urls[0]} is taken out: " in stderr
    for row, expected in zip(learnt(tmp_path / "on_two"), unharmed["learnt"], strict=True):
        assert row.keys() == expected.keys()
        assert {key: (row[key], expected[key]) for key in row if row[key] != expected[key]} == {}
    found = rows(tmp_path / "on_two")
    assert [row for row, _ in found] == [row for row, _ in unharmed["rows"]]
    # A server of one request at a time decodes in blocks of another shape, which are rounded otherwise.
    for (_, logprobs), (_, expected) in zip(found, unharmed["rows"], strict=True):
        assert logprobs == pytest.approx(expected, abs=1e-5)


def learnt(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock or on the engine's rounding."""
    beside = ("logprob_gap", "parity_gap", "scoring_hidden_share")
    return [
        {key: value for key, value in row.items() if not key.startswith(beside)} for row in metrics(run_dir)
    ]


def rows(run_dir: Path) -> list[tuple[dict[str, Any], list[float]]]:
    """Every recorded response, in the order of the files, with the engine's log-probs apart."""
    files = sorted((run_dir / "rollouts").glob("*.jsonl"))
    found = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [(row, row.pop("engine_logprobs")) for row in found]
