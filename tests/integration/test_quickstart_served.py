"""The quickstart on a real SGLang server, at the size of a test: tiny models, 25 steps."""

from __future__ import annotations

import json

from tests.helpers.quickstart import load, server_processes, survivors
from tests.integration.conftest import LEAST_GAIN, accuracy_gain, learning, metrics

serving = load("served").serving


def test_sglang_lifts_a_weak_student_as_the_embedded_engine_does(run, write, config, sglang_python, tmp_path):
    """As `test_each_method_lifts_a_weak_student`, by the same measure."""
    path = write(learning(config))
    with serving(sglang_python, path, (), tmp_path / "sglang.log") as url:
        server = server_processes(url)
        result = run("train", path, "rollout.engine=sglang", f'rollout.servers=["{url}"]')
    assert result.returncode == 0, result.stderr
    assert len(server) > 1 and survivors(server) == []

    assert accuracy_gain(tmp_path / "run") > LEAST_GAIN
    steps = metrics(tmp_path / "run")
    # Each step's responses are of the weights that the step before it made, on both sides.
    assert [(row["weight_version"], row["staleness"]) for row in steps] == [(n, 0) for n in range(25)]
    assert max(row["logprob_gap_max"] for row in steps) < 1e-4
    for number in range(25):
        lines = (tmp_path / f"run/rollouts/step_{number + 1:06d}.jsonl").read_text().splitlines()
        assert [json.loads(line)["weight_version"] for line in lines] == [number] * 256
