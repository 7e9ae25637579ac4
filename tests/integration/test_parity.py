"""The parity gate: what a server draws must be what the trainer's own weights would draw."""

from __future__ import annotations

import json

import pytest

from megatron_scope.rollout.embedded.options import ServeOptions
from megatron_scope.rollout.process import EmbeddedServer
from tests.helpers.proxy import Proxy
from tests.helpers.settings import changed


@pytest.fixture(scope="module")
def servers(models, tmp_path_factory):
    """The URLs of two."""
    folder, options = tmp_path_factory.mktemp("servers"), ServeOptions(model=str(models["student"]))
    with (
        EmbeddedServer(options, log_path=folder / "one") as one,
        EmbeddedServer(options, log_path=folder / "other") as other,
    ):
        yield one.url, other.url


def shift_logprobs(path: str, answer: bytes) -> bytes:
    """An engine whose log-probs are half a nat too low."""
    if path != "/generate":
        return answer
    body = json.loads(answer)
    for entry in body.get("meta_info", {}).get("output_token_logprobs", []):  # an aborted one has none
        entry[0] -= 0.5
    return json.dumps(body).encode()


def test_servers_that_agree_pass_and_the_gap_is_a_metric(train, config, servers):
    rollout = {"engine": "sglang", "servers": list(servers), "logprob_gap_limit": 1e-3}
    rows = train(changed(config, rollout=rollout))
    assert len(rows) == 2
    for row in rows:
        assert row["parity_gap_mean"] <= row["parity_gap_max"] < 1e-4
        assert 0 <= row["parity_gap_kl"] < 1e-6


def test_a_server_that_is_off_is_named_before_the_first_step(run, write, config, servers, tmp_path):
    with Proxy(servers[1], change=shift_logprobs) as off:
        rollout = {"engine": "sglang", "servers": [servers[0], off.url], "logprob_gap_limit": 0.05}
        result = run("train", write(changed(config, rollout=rollout)), "--nproc", "2")
    assert result.returncode == 1
    (line,) = result.stderr.strip().splitlines()
    assert f"0.5 nats a token off those of rollout server {off.url} on average" in line
    assert "rollout.logprob_gap_limit=0.05" in line
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


def test_without_a_limit_the_gap_is_only_told(train, config, servers):
    with Proxy(servers[1], change=shift_logprobs) as off:
        rollout = {"engine": "sglang", "servers": [off.url]}
        (row,) = train(changed(config, run={"steps": 1}, rollout=rollout))
    assert row["parity_gap_mean"] == pytest.approx(0.5, abs=1e-4)
    assert row["logprob_gap_mean"] == pytest.approx(0.5, abs=1e-4)
