"""The quickstart on SGLang: a server that ends with its block, what is run on it, and what is told of it."""

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_scope.config import load_config
from megatron_scope.config.check import check_config
from megatron_scope.evaluate.diversity import Diversity
from megatron_scope.evaluate.metrics import Estimate
from tests.helpers.quickstart import QUICKSTART, Commands, load, server_processes, survivors

study, scores, served = map(load, ("study", "scores", "served"))

# Stands in for `megatron-scope launch`: answers /health, and has a child that hears no SIGTERM, as a
# scheduler that hangs.
SERVER = f"""#!{sys.executable}
import http.server, pathlib, subprocess, sys

pathlib.Path(__file__).with_name("words").write_text("\\n".join(sys.argv[1:]))
if "student.hf=absent" in sys.argv:
    sys.exit("megatron-scope: no such model")
child = "from signal import *; signal(SIGTERM, SIG_IGN); print(flush=True); import time; time.sleep(600)"
deaf = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
deaf.stdout.readline()


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()


port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
"""
# A script that is in the middle of its training.
SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from served import serving
with serving("python", "scope.yaml", (), Path(sys.argv[2])) as url:
    print(url, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Puts the stand-in first on PATH; gives the words that it was started with."""
    folder = tmp_path / "bin"
    folder.mkdir()
    command = folder / "megatron-scope"
    command.write_text(SERVER)
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return lambda: (folder / "words").read_text().splitlines()


# ---- the server


def test_a_server_is_launched_for_the_student_and_leaves_no_process(launch, tmp_path, monkeypatch):
    monkeypatch.setattr(served, "STOP_TIMEOUT_S", 5.0)
    log = tmp_path / "logs" / "sglang.log"
    with served.serving("/there/python", "scope.yaml", ["student.hf=model"], log) as url:
        processes = server_processes(url)
        assert len(processes) == 2
    assert survivors(processes) == []
    words = launch()
    assert words[:3] == ["launch", "scope.yaml", "student.hf=model"]
    assert words[3:] == [
        *("--role", "rollout", "--device", "cpu", "--python", "/there/python"),
        *("--port", url.rsplit(":", 1)[1], "--run"),
    ]
    assert log.read_text().startswith("$ megatron-scope launch scope.yaml student.hf=model --role rollout")


def test_a_server_ends_when_its_block_fails(launch, tmp_path):
    with pytest.raises(ZeroDivisionError), served.serving("python", "c.yaml", (), tmp_path / "log") as url:
        processes = server_processes(url)
        raise ZeroDivisionError
    assert len(processes) == 2 and survivors(processes) == []


def test_a_server_that_cannot_start_is_one_line_with_the_reason(launch, tmp_path):
    log = tmp_path / "sglang.log"
    with (
        pytest.raises(study.StudyError) as error,
        served.serving("python", "c.yaml", ["student.hf=absent"], log),
    ):
        pass
    said = "the SGLang server ended with code 1"
    assert str(error.value) == f"{said}; {log} ends: megatron-scope: no such model"


def test_a_server_that_stays_unhealthy_is_given_up(launch, tmp_path, monkeypatch):
    monkeypatch.setattr(served, "START_TIMEOUT_S", 0.0)
    monkeypatch.setattr(served, "_is_healthy", lambda url: False)
    with (
        pytest.raises(study.StudyError, match="not healthy after 0 s; see"),
        served.serving("python", "c.yaml", (), tmp_path / "log"),
    ):
        pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_server_ends_with_its_script_however_that_ends(launch, tmp_path, number):
    words = [sys.executable, "-c", SCRIPT, str(QUICKSTART), str(tmp_path / "log")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as script:
        assert script.stdout is not None
        server, *children = server_processes(script.stdout.readline().strip())
        script.send_signal(number)
        script.wait()
    assert survivors([server]) == []
    for child in children:  # SGLang's own end with its first process; the stand-in's does not
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def test_an_installation_that_fails_is_one_line(tmp_path, monkeypatch):
    script = tmp_path / "install.py"
    script.write_text("raise SystemExit(1)")
    monkeypatch.setattr(served, "INSTALLER", script)
    with pytest.raises(study.StudyError, match=r"install.py ended with code 1; SGLang is not installed"):
        served.install()
    script.write_text("print('/cache/bin/python')")
    assert served.install() == "/cache/bin/python"


# ---- what is run


class Servers:
    """Stands in for SGLang: remembers what it served and when it ended."""

    def __init__(self, commands):
        self.commands = commands
        self.served, self.is_open = [], False

    @contextlib.contextmanager
    def serving(self, python, config, overrides, log):
        self.served.append((python, config, tuple(overrides)))
        self.is_open = True
        try:
            yield "http://127.0.0.1:31000"
        finally:
            self.is_open = False


@pytest.fixture
def commands(monkeypatch):
    stand_in = Commands()
    monkeypatch.setattr(study.subprocess, "run", stand_in.run)
    return stand_in


@pytest.fixture
def servers(monkeypatch, commands):
    stand_in = Servers(commands)
    monkeypatch.setattr(served, "serving", stand_in.serving)
    monkeypatch.setattr(served, "install", lambda: "/cache/bin/python")
    return stand_in


@pytest.fixture
def start(tmp_path, monkeypatch, commands, servers):
    monkeypatch.setattr(served, "read", lambda *arguments: arguments)
    monkeypatch.setattr(served, "read_training", lambda run: run)
    monkeypatch.setattr(served, "markdown", lambda comparison, training: f"{comparison} {training}")

    def run(*words):
        commands.ran.clear()
        paths = ("--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results"))
        return served.main([*paths, "--jobs", "1", *words])

    return run


def trainings(commands):
    """The configs that were trained, by the names of their runs."""
    configs = {}
    for words in commands.ran:
        if words[1] == "train" and words[2] == str(QUICKSTART / "scope.yaml"):
            config = load_config(words[2], words[3:])
            check_config(config, world_size=1)
            configs[Path(config.run.output_dir).name] = config
    return configs


def test_both_runs_differ_in_the_engine_alone(start, commands):
    assert start("--seeds", "5") == 0
    configs = trainings(commands)
    assert list(configs) == ["scope", "scope_sglang"]
    embedded, sglang = configs.values()
    assert (embedded.rollout.engine, sglang.rollout.engine) == ("embedded", "sglang")
    assert sglang.rollout.servers == ("http://127.0.0.1:31000",)
    rollout = dataclasses.replace(sglang.rollout, engine="embedded", servers=())
    run = dataclasses.replace(sglang.run, output_dir=embedded.run.output_dir)
    assert dataclasses.replace(sglang, rollout=rollout, run=run) == embedded


def test_all_models_are_evaluated_alike_on_the_embedded_engine(start, commands):
    assert start("--seeds", "5") == 0
    models = ("base", "scope", "scope_sglang")
    assert commands.evaluated() == [f"{model}-t{t}" for model in models for t in ("1.0", "0.6")]
    for words in commands.ran:
        assert words[1] != "evaluate" or not any(word.startswith("rollout.") for word in words)


def test_each_seed_has_a_server_of_its_student_while_it_trains(start, commands, servers, tmp_path):
    seen = []
    commands.fails = lambda words: bool(seen.append((words[1], servers.is_open)))
    assert start("--seeds", "5,6") == 0
    assert [overrides for _, _, overrides in servers.served] == [
        (f"student.hf={tmp_path / f'runs/seed{seed}/student/hf'}", f"run.seed={seed}") for seed in (5, 6)
    ]
    assert {python for python, _, _ in servers.served} == {"/cache/bin/python"}
    # Teacher, student and SCOPE of each seed by study.py first, and then each seed's run on its server.
    assert [is_open for command, is_open in seen if command == "train"] == [False] * 6 + [True] * 2
    assert not servers.is_open


def test_what_is_trained_needs_no_server(start, commands, servers):
    assert start("--seeds", "5") == 0
    servers.served.clear()
    assert start("--seeds", "5") == 0
    assert (commands.ran, servers.served) == ([], [])


def test_a_training_that_fails_ends_its_server_and_is_one_line(start, commands, servers, capsys, tmp_path):
    commands.fails = lambda words: "rollout.engine=sglang" in words
    assert start("--seeds", "5") == 1
    assert servers.served and not servers.is_open
    log = tmp_path / "runs/seed5/logs/scope_sglang.0.log"
    said = "megatron-scope train ended with code 3"
    assert capsys.readouterr().err == f"served: {said}; {log} ends: megatron-scope: no space left\n"


def test_its_table_goes_into_the_results(start, tmp_path, capsys):
    assert start("--seeds", "5", "--name", "mine") == 0
    text = (tmp_path / "results" / "mine.md").read_text()
    assert "('base', 'scope', 'scope_sglang')" in text
    assert capsys.readouterr().out.endswith(text)


# ---- what is told


def write_metrics(run, *, accuracy, seconds):
    rows = [
        {"accuracy": a, "seconds": {"rollout": s / 2, "total": s}, "logprob_gap_max": 1e-6 * s}
        for a, s in zip(accuracy, seconds, strict=True)
    ]
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def result(average, passed):
    """With nothing but the two figures that are shown."""
    average, passed = (Estimate(value, value, value) for value in (average, passed))
    return scores.Result(average, passed, None, None, average, Diversity(0, 0, 0.0, {}, 0.0))


def test_training_is_told_by_the_edges_of_its_accuracy_and_the_medians_of_its_seconds(tmp_path):
    accuracy = [0.25] * 10 + [0.9] * 5 + [0.5] * 10
    run = write_metrics(tmp_path / "run", accuracy=accuracy, seconds=[9.0, *[1.0] * 20, *[2.0] * 4])
    training = served.read_training(run)
    assert (training.first, training.last) == (25.0, 50.0)
    assert (training.step_s, training.rollout_s) == (1.0, 0.5)
    assert training.gap == pytest.approx(9e-6)


def test_a_run_without_steps_is_one_line(tmp_path):
    run = write_metrics(tmp_path / "run", accuracy=[], seconds=[])
    with pytest.raises(scores.CompareError, match=rf"empty; remove {run} and start served.py again"):
        served.read_training(run)


def test_the_table_sets_the_engines_side_by_side():
    results = {
        "base": {"1.0": [result(30, 90)], "0.6": [result(50, 98)]},
        "scope": {"1.0": [result(57, 95)], "0.6": [result(66, 97)]},
        "scope_sglang": {"1.0": [result(58, 96)], "0.6": [result(67, 99)]},
    }
    comparison = scores.Comparison((7,), 256, 32, 120, results, {})
    training = {
        "scope": [served.Training(first=31, last=55, step_s=0.3, rollout_s=0.1, gap=2e-6)],
        "scope_sglang": [served.Training(first=32, last=56, step_s=0.9, rollout_s=0.7, gap=3e-6)],
    }
    heading, text = served.markdown(comparison, training).split("\n\n")
    assert heading == "SCOPE, 120 steps, seed 7; 256 held-out problems x 32 samples."
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert header == ["", "before training", "embedded engine", "SGLang"]
    assert rows == [
        ["accuracy of the first 10 steps' responses, %", "", "31.0", "32.0"],
        ["accuracy of the last 10 steps' responses, %", "", "55.0", "56.0"],
        ["avg@8 at temperature 1.0, %", "30.0", "57.0", "58.0"],
        ["pass@8 at temperature 1.0, %", "90.0", "95.0", "96.0"],
        ["avg@8 at temperature 0.6, %", "50.0", "66.0", "67.0"],
        ["pass@8 at temperature 0.6, %", "98.0", "97.0", "99.0"],
        ["seconds a step (median)", "", "0.30", "0.90"],
        ["of them waiting for responses (median)", "", "0.10", "0.70"],
        ["largest log-prob gap of any token, nats x 1e-6", "", "2.0", "3.0"],
    ]


def test_several_seeds_show_their_mean_and_each_value():
    of_seeds = [result(20, 80), result(40, 90)]
    results = {name: {"1.0": of_seeds, "0.6": of_seeds} for name in ("base", "scope", "scope_sglang")}
    run = [served.Training(10, 30, 1.0, 0.5, 1e-6), served.Training(20, 60, 2.0, 1.0, 3e-6)]
    comparison = scores.Comparison((7, 8), 256, 32, 120, results, {})
    text = served.markdown(comparison, {"scope": run, "scope_sglang": run})
    assert "seed 7, 8; 256 held-out problems x 32 samples; means of the seeds, and each" in text
    assert "30.0 (20.0, 40.0)" in text and "1.50 (1.00, 2.00)" in text and "2.0 (1.0, 3.0)" in text
