"""The quickstart on a real SGLang server, at the size of a test: tiny models and thirty steps."""

from __future__ import annotations

import json

from tests.helpers.quickstart import load, server_processes, survivors
from tests.helpers.settings import changed
from tests.integration.conftest import LEAST_GAIN, PAIRS, accuracy_gain, learning, metrics

serving = load("served").serving


STEPS = 30
# All prompts in every step: SGLang draws other responses in each run, so that chance must not decide.
SIZES = {"prompts_per_step": len(PAIRS), "samples_per_prompt": 4}


def test_sglang_lifts_a_weak_student_as_the_embedded_engine_does(run, write, config, sglang_python, tmp_path):
    """By the measure and threshold of `test_each_method_lifts_a_weak_student`."""
    path = write(changed(learning(config), run={"steps": STEPS}, rollout=SIZES))
    with serving(sglang_python, path, (), tmp_path / "sglang.log") as url:
        server = server_processes(url)
        result = run("train", path, "rollout.engine=sglang", f'rollout.servers=["{url}"]')
    assert result.returncode == 0, result.stderr
    assert len(server) > 1 and survivors(server) == []

    assert accuracy_gain(tmp_path / "run") > LEAST_GAIN
    steps = metrics(tmp_path / "run")
    assert max(row["logprob_gap_max"] for row in steps) < 1e-4
    # Each step's responses are by the weights of the step before it.
    assert [(row["weight_version"], row["staleness"]) for row in steps] == [(n, 0) for n in range(STEPS)]
    for number in range(STEPS):
        lines = (tmp_path / f"run/rollouts/step_{number + 1:06d}.jsonl").read_text().splitlines()
        assert [json.loads(line)["weight_version"] for line in lines] == [number] * 4 * len(PAIRS)
