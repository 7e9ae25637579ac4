"""The commands as a user runs them, with the embedded server: whole processes, exit codes, messages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.settings import changed
from tests.integration.conftest import LEAST_GAIN, accuracy_gain, environment, learning, metrics, start

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_train.jsonl"


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """The only line on stderr."""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


def servers_of(config: dict[str, Any]) -> list[psutil.Process]:
    """Embedded servers of a run that are still alive."""
    wanted = config["run"]["output_dir"]
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "serve" in words and any(word.startswith(wanted) for word in words):
            found.append(process)
    return found


# ---- train


def test_the_same_seed_gives_the_same_run_bit_for_bit(run, write, train, config, tmp_path):
    path = write(config)
    first = run("train", path)
    assert first.returncode == 0, first.stderr
    again = run("train", path, f"run.output_dir={tmp_path / 'again'}")
    assert again.returncode == 0, again.stderr
    assert metrics(tmp_path / "run") == metrics(tmp_path / "again")
    for step in (1, 2):
        name = f"rollouts/step_{step:06d}.jsonl"
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    train(changed(config, run={"output_dir": str(tmp_path / "other"), "seed": 5, "steps": 1}))
    assert metrics(tmp_path / "other")[0] != metrics(tmp_path / "run")[0]


def test_a_run_leaves_what_the_contract_names_and_no_process(run, write, config, tmp_path):
    result = run("train", write(config))
    assert result.returncode == 0, result.stderr
    assert "step 2/2" in result.stdout
    folder = tmp_path / "run"
    assert (folder / "config.resolved.yaml").is_file()
    rows = [json.loads(line) for line in (folder / "rollouts/step_000002.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    assert {row["weight_version"] for row in rows} == {1}
    assert [(row["weight_version"], row["staleness"]) for row in metrics(folder)] == [(0, 0), (1, 0)]
    # The trainer and the engine agree on the tokens that the engine drew.
    assert all(row["logprob_gap_max"] < 1e-4 for row in metrics(folder))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(folder / "hf")
    assert AutoTokenizer.from_pretrained(folder / "hf")("1").input_ids == [1]
    assert servers_of(config) == []


@pytest.mark.parametrize(
    "words",
    [
        ("--nproc", "2", "parallel.tensor=2"),
        ("--nproc", "4", "parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"),
    ],
    ids=["tp2", "tp2-pp2-sp"],
)
def test_nproc_starts_the_ranks_itself_and_gives_the_same_first_step(
    run, write, train, config, tmp_path, words
):
    config = changed(config, run={"steps": 1})
    (one,) = train(config)
    many = run("train", write(config), f"run.output_dir={tmp_path / 'many'}", *words)
    assert many.returncode == 0, many.stderr
    (several,) = metrics(tmp_path / "many")
    for key in ("loss", "grad_norm", "accuracy", "nll_correct"):
        assert several[key] == pytest.approx(one[key], rel=1e-5), key
    # A difference of log-probs, here near 0: float32 holds it to about 1e-7 of the log-probs themselves.
    assert several["kl_incorrect"] == pytest.approx(one["kl_incorrect"], abs=1e-6)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"objective": {"name": "opd"}},
        {"objective": {"name": "grpo"}},
        {"objective": {"preset": "official"}},
        {"objective": {"ratio_clip": 0.2}, "train": {"updates_per_batch": 2}},
    ],
    ids=["scope", "opd", "grpo", "official", "two-updates"],
)
def test_each_method_lifts_a_weak_student(train, config, tmp_path, sections):
    train(changed(learning(config), **sections))
    assert accuracy_gain(tmp_path / "run") > LEAST_GAIN


def test_torchrun_gives_the_ranks(write, config, tmp_path):
    path = write(changed(config, run={"steps": 1}))
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megatron_scope"]
    result = subprocess.run(
        [sys.executable, *words, "train", path],
        capture_output=True,
        text=True,
        timeout=180,
        env=environment(),
    )
    assert result.returncode == 0, result.stderr
    assert len(metrics(tmp_path / "run")) == 1


def test_a_run_killed_in_mid_step_goes_on_to_the_same_numbers(run, write, train, config, tmp_path):
    config = changed(config, run={"steps": 5}, checkpoint={"every": 1})
    path = write(config)
    train(changed(config, run={"output_dir": str(tmp_path / "whole")}))
    process = start("train", path)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/5"):
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: servers_of(config) == [], "the embedded server outlived its trainer")
    assert (tmp_path / "run" / "hf").exists() is False
    resumed = run("train", path)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on after step" in resumed.stdout
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    finished = run("train", path)
    assert finished.returncode == 0
    assert "has its 5 steps already" in finished.stdout
    other = run("train", path, "run.seed=7", "run.steps=6")
    assert other.returncode == 1
    assert "belongs to another run: its run.seed is 1234, this run's 7" in one_line(other)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_ranks_end_with_their_launcher_and_nobody_else_writes_to_their_folder(run, write, config):
    path = write(changed(config, run={"steps": 5000}))
    process = start("train", path, "--nproc", "2")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    second = run("train", path)
    assert second.returncode == 2
    assert "another trainer is writing to" in one_line(second)
    process.kill()  # the launcher alone, with kill -9
    process.wait()
    wait_until(lambda: not processes_naming(path), "ranks outlived their launcher")
    wait_until(lambda: servers_of(config) == [], "the embedded server outlived its trainer")


def test_sigterm_ends_a_run_with_its_server(write, config):
    path = write(changed(config, run={"steps": 5000}))
    process = start("train", path)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert processes_naming(path) == [] and servers_of(config) == []


def processes_naming(path: str) -> list[psutil.Process]:
    """Processes with this path on their command line."""
    return [
        process for process in psutil.process_iter(["cmdline"]) if path in (process.info["cmdline"] or [])
    ]


def wait_until(condition: Any, message: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.1)


@pytest.mark.skipif(
    not GSM8K.exists(), reason=f"the folder with gsm8k_train.jsonl is absent ({GSM8K.parent})"
)
def test_real_prompts_run_and_their_rollouts_can_be_read(run, write, config, tmp_path):
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(config["student"]["hf"]).max_position_embeddings == 256
    config = changed(config, data={"train": str(GSM8K), "max_prompt_tokens": 200})
    result = run("train", write(config))
    assert result.returncode == 0, result.stderr
    rows = [
        json.loads(line) for line in (tmp_path / "run/rollouts/step_000001.jsonl").read_text().splitlines()
    ]
    assert all(row["prompt_id"].startswith("gsm8k_train/") for row in rows)
    assert [row["path"] for row in rows].count("incorrect") >= 20
    # Prompts that do not fit are left out and counted.
    assert metrics(tmp_path / "run")[1]["rollouts_skipped_prompts"] > 0


# ---- what goes wrong, each with one clear line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rollout.samples_per_prompt=1"], "rollout.samples_per_prompt is 1: SCOPE weights need a group"),
        (["parallel.context=2"], "parallel.context is 2: it needs Transformer Engine's attention"),
        (["rollout.temprature=1"], "did you mean rollout.temperature"),
        (["--nproc", "3", "parallel.tensor=2"], "there are 3 ranks"),
        (["--nproc", "4", "parallel.tensor=4"], "has 2 query groups"),
        (["--nproc", "2", "student.hf=/nowhere"], "/nowhere"),
        (["objective.name=dpo"], "objective.name is 'dpo': expected one of scope, opd, grpo, kd, sft"),
        (["objective.name=opd", "objective.preset=official"], "it is the authors' variant of SCOPE"),
        (["rollout.max_new_tokens=1000"], "the models have 256 positions at most"),
    ],
)
def test_wrong_settings_exit_with_2_before_any_rank_starts(run, write, config, words, message):
    result = run("train", write(config), *words)
    assert result.returncode == 2
    assert message in one_line(result)
    assert result.stdout == ""


def test_an_empty_dataset_exits_with_2(run, write, config, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    result = run("train", write(config), f"data.train={empty}")
    assert result.returncode == 2
    assert f"{empty} is empty" in one_line(result)


def test_a_broken_row_is_named_by_line_on_every_number_of_ranks(run, write, config, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"id": 1, "prompt": "1+1=", "answer": "2", "task": "math"}\n{"id": 2}\n')
    result = run("train", write(config), f"data.train={broken}", "--nproc", "2")
    assert result.returncode == 2
    assert f"{broken}:2: prompt is None" in one_line(result)


def test_prompts_that_are_all_over_the_limit_are_an_error(run, write, config):
    result = run("train", write(config), "data.max_prompt_tokens=3")
    assert result.returncode == 2
    assert "0 usable rows within data.max_prompt_tokens=3" in one_line(result)


def test_a_server_that_is_not_there_is_an_error_after_the_time_limit(run, write, config):
    servers = {"engine": "sglang", "servers": ["http://127.0.0.1:9"], "start_timeout_s": 2}
    result = run("train", write(changed(config, rollout=servers)))
    assert result.returncode == 1
    assert "http://127.0.0.1:9: not healthy after 2 s" in one_line(result)


def test_a_server_that_dies_in_the_run_is_one_clear_error_on_all_ranks(run, write, config):
    config = changed(config, run={"steps": 500})
    process = start("train", write(config), "--nproc", "2")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    (server,) = servers_of(config)
    server.kill()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert stderr.count("ended with exit code -9; the end of its log") == 1, stderr
    assert "Traceback" not in stderr


# ---- the other commands


def test_evaluate_reports_a_file_of_problems(run, write, config, tmp_path, models):
    words = [
        "--benchmarks",
        config["data"]["train"],
        "--samples",
        "4",
        "--k",
        "1,4",
        "evaluate.max_new_tokens=8",
    ]
    output, responses = tmp_path / "result.json", tmp_path / "responses.jsonl"
    result = run("evaluate", write(config), *words, "--output", str(output), "--responses", str(responses))
    assert result.returncode == 0, result.stderr
    assert "temperature 0.6" in result.stdout
    report = json.loads(output.read_text())
    (benchmark,) = report["benchmarks"].values()
    rows = [json.loads(line) for line in responses.read_text().splitlines()]
    assert len(rows) == 400
    share = sum(row["correct"] for row in rows) / 400
    assert benchmark["avg@4"]["value"] == pytest.approx(share)
    assert benchmark["pass@1"]["value"] == pytest.approx(share)
    assert sum(benchmark["num_correct"].values()) == sum(row["correct"] for row in rows)
    # All correct responses to a problem are the same here, "7$" or so.
    assert benchmark["diversity"]["distinct_responses"] == pytest.approx(0.25)


def test_kd_learns_the_teachers_own_responses_token_for_token(run, write, config, tmp_path, models):
    written = tmp_path / "kd.jsonl"
    sampled = run(
        *("evaluate", write(config), "--model", str(models["teacher"])),
        *("--benchmarks", config["data"]["train"], "--samples", "2", "--responses", str(written)),
        "evaluate.max_new_tokens=4",
    )
    assert sampled.returncode == 0, sampled.stderr
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    words = ("objective.name=kd", f"data.train={written}", f"rollout.prompts_per_step={len(rows)}")
    learnt = run("train", write(config), *words, "run.steps=3", "teacher.hf=null", "optimizer.lr=1e-3")
    assert learnt.returncode == 0, learnt.stderr
    steps = metrics(tmp_path / "run")
    assert steps[0]["response_tokens"] == sum(len(row["output_ids"]) for row in rows)
    assert steps[2]["nll_correct"] < steps[0]["nll_correct"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--benchmarks", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--benchmarks", "x.jsonl", "--k", "64"], "--k holds 64"),
    ],
)
def test_evaluate_refuses_what_cannot_be(run, write, config, words, message):
    result = run("evaluate", write(config), *words, "evaluate.max_new_tokens=8")
    assert result.returncode == 2
    assert message in one_line(result)


def test_verify_judges_a_file(run, tmp_path):
    rows = [
        {"id": 1, "task": "math", "answer": "6", "response": "9458=358=88=6$"},
        {"id": 2, "task": "math", "answer": "1/2", "response": "so \\boxed{0.5}"},
        {"id": 3, "task": "math", "answer": "7", "response": "the answer is 8"},
        {"id": 4, "task": "math", "answer": "7"},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("verify", "--input", str(source), "--output", str(target))
    assert result.returncode == 0, result.stderr
    judged = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["correct"] for row in judged] == [True, True, False, False]
    assert [row["error"] is None for row in judged] == [True, True, True, False]
