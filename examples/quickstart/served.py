"""SCOPE with the responses of a real SGLang server on this machine's CPU, beside the embedded engine.

    python examples/quickstart/served.py                     # one seed
    python examples/quickstart/served.py --seeds 1234,1235

SGLang is installed by tools/install_sglang_cpu.py and started by `megatron-scope launch`. The student before
training and its embedded run are study.py's, made where they are not there yet. All models answer the
held-out problems on the embedded engine, with the same seeds. What is done is not done again: remove
RUNS/seedN/scope_sglang for another run.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scores import BASE, SERVED, TEMPERATURES, CompareError, Comparison, K, Result, read
from study import HERE, Seed, Settings, StudyError, environment, parse, run_study, run_task
from tables import each, table

from megatron_scope.data.jsonl import read_rows
from megatron_scope.errors import ScopeError

EMBEDDED = "scope"
INSTALLER = HERE.parents[1] / "tools" / "install_sglang_cpu.py"
START_TIMEOUT_S, STOP_TIMEOUT_S = 600.0, 20.0
POLL_S = 0.25
SET_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG
EDGE_STEPS = 10  # whose accuracy is shown, at the start and at the end of training


# ---- the server


def install() -> str:
    """The python of the cached environment with SGLang; StudyError where it cannot be made."""
    done = subprocess.run([sys.executable, str(INSTALLER)], stdout=subprocess.PIPE, text=True)
    if done.returncode:  # the reason stands on stderr already
        raise StudyError(f"{INSTALLER.name} ended with code {done.returncode}; SGLang is not installed")
    return done.stdout.strip()


@contextlib.contextmanager
def serving(python: str, config: str | Path, overrides: Sequence[str], log: Path) -> Iterator[str]:
    """The URL of a SGLang server with the student of `config`, on this machine's CPU; it ends with the block.

    `python` has SGLang; `log` takes what the server prints. StudyError where it does not become healthy.
    """
    port = _free_port()
    command = (
        *("megatron-scope", "launch", str(config), *overrides, "--role", "rollout", "--device", "cpu"),
        *("--python", python, "--port", str(port), "--run"),
    )
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,  # a Ctrl-C at the terminal is this script's to handle
            preexec_fn=_end_with_parent,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, url, log)
        yield url
    finally:
        _stop(process)


def _end_with_parent() -> None:
    """Where this script is killed outright, Linux asks the server to end."""
    ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGTERM)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _is_healthy(url):
        code = process.poll()
        if code is not None:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
            raise StudyError(f"the SGLang server ended with code {code}; {log} ends: {last}")
        if time.monotonic() > deadline:
            raise StudyError(f"the SGLang server is not healthy after {START_TIMEOUT_S:g} s; see {log}")
        time.sleep(POLL_S)


def _is_healthy(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=5.0) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the server, and SIGKILL to what is left of its processes."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- the runs


def train_served(settings: Settings, number: int) -> None:
    """Trains the seed's student with a server of its own and evaluates it, unless that is done already."""
    seed, started = Seed(settings, number), time.monotonic()
    with contextlib.ExitStack() as stack:
        changes = ["rollout.engine=sglang"]
        if not seed.is_trained(SERVED):
            student = (f"student.hf={seed.student}", f"run.seed={number}")
            log = seed.folder / "logs" / "sglang.log"
            url = stack.enter_context(serving(install(), HERE / "scope.yaml", student, log))
            print(f"{time.monotonic() - started:6.0f} s  seed {number}: SGLang serves at {url}", flush=True)
            changes.append(f'rollout.servers=["{url}"]')
        _, seconds = run_task(settings, seed.method(SERVED, changes))
    if seconds is not None:
        elapsed = time.monotonic() - started
        print(f"{elapsed:6.0f} s  seed {number}: {SERVED} ({seconds:.0f} s)", flush=True)


# ---- what came out


@dataclasses.dataclass(frozen=True)
class Training:
    """What a run's metrics.jsonl says. `first` and `last` are the accuracy of the responses it drew in its
    EDGE_STEPS first and last steps, in percent; `step_s` and `rollout_s` medians over its steps; `gap` the
    largest |trainer - engine| log-prob of all tokens, in nats.
    """

    first: float
    last: float
    step_s: float
    rollout_s: float
    gap: float


def read_training(run: Path) -> Training:
    """CompareError where the run left no steps."""
    rows: list[dict[str, Any]] = [row for _, row in read_rows(run / "metrics.jsonl")]
    if not rows:
        raise CompareError(f"{run / 'metrics.jsonl'}: empty; remove {run} and start served.py again")
    accuracy = [100 * row["accuracy"] for row in rows]
    return Training(
        first=statistics.mean(accuracy[:EDGE_STEPS]),
        last=statistics.mean(accuracy[-EDGE_STEPS:]),
        step_s=statistics.median(row["seconds"]["total"] for row in rows),
        rollout_s=statistics.median(row["seconds"]["rollout"] for row in rows),
        gap=max(row["logprob_gap_max"] for row in rows),
    )


def markdown(comparison: Comparison, training: dict[str, list[Training]]) -> str:
    """One table: what training saw, what the models score, and what a step took."""
    runs = (EMBEDDED, SERVED)

    def trained(name: str, measure: Callable[[Training], float], digits: int) -> list[str]:
        return [name, "", *(each([measure(of_seed) for of_seed in training[run]], digits) for run in runs)]

    def scored(name: str, temperature: str, measure: Callable[[Result], float]) -> list[str]:
        cells = [
            each([measure(result) for result in comparison.results[method][temperature]], 1)
            for method in (BASE, *runs)
        ]
        return [f"{name} at temperature {temperature}, %", *cells]

    rows = [
        trained(f"accuracy of the first {EDGE_STEPS} steps' responses, %", lambda run: run.first, 1),
        trained(f"accuracy of the last {EDGE_STEPS} steps' responses, %", lambda run: run.last, 1),
        *(
            scored(name, temperature, measure)
            for temperature in TEMPERATURES
            for name, measure in (
                (f"avg@{K}", lambda result: result.average.value),
                (f"pass@{K}", lambda result: result.passed.value),
            )
        ),
        trained("seconds a step (median)", lambda run: run.step_s, 2),
        trained("of them waiting for responses (median)", lambda run: run.rollout_s, 2),
        trained("largest log-prob gap of any token, nats x 1e-6", lambda run: 1e6 * run.gap, 1),
    ]
    seeds = ", ".join(map(str, comparison.seeds))
    several = "; means of the seeds, and each seed's value in brackets" if len(comparison.seeds) > 1 else ""
    return "\n\n".join(
        (
            f"SCOPE, {comparison.steps} steps, seed {seeds}; {comparison.num_problems} held-out problems x "
            f"{comparison.num_samples} samples{several}.",
            table(["", "before training", "embedded engine", "SGLang"], rows),
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server ends with this script
    try:
        settings, results, name = parse(
            arguments, seeds="1234", methods=EMBEDDED, results="runs/quickstart", name="served"
        )
        settings = dataclasses.replace(settings, methods=(BASE, EMBEDDED))
        run_study(settings)
        for seed in settings.seeds:
            train_served(settings, seed)
        folders = [settings.runs / f"seed{seed}" for seed in settings.seeds]
        training = {run: [read_training(folder / run) for folder in folders] for run in (EMBEDDED, SERVED)}
        text = markdown(read(settings.runs, settings.seeds, (BASE, EMBEDDED, SERVED)), training)
        results.mkdir(parents=True, exist_ok=True)
        (results / f"{name}.md").write_text(f"{text}\n", encoding="utf-8")
        print(text)
    except ScopeError as error:
        print(f"served: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
