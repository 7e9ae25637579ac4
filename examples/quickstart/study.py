"""Trains by several methods from the same student, samples the held-out problems, and compares.

    python examples/quickstart/study.py                                   # three seeds, every method
    python examples/quickstart/study.py --seeds 1234 --methods opd,scope  # some of it

Each seed has its own problems, teacher and student in RUNS/seedN; all methods of a seed start from that
student, take equally many steps and see the same prompts. Two commands run at a time. What is done already is
skipped, so a study that was stopped goes on when it is started again. RUNS/seedN/logs holds each command with
what it printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from compare import compare
from scores import BASE, TEMPERATURES, K, evaluation_file, responses_file

from megatron_scope.errors import ScopeError

HERE = Path(__file__).resolve().parent

# What each method changes in scope.yaml.
METHODS: dict[str, tuple[str, ...]] = {
    BASE: (),  # the student before it is trained
    "opd": ("objective.name=opd",),
    "grpo": ("objective.name=grpo",),
    "scope": (),
    "reverse_kl": ("objective.divergence=reverse_kl",),
    "student_0": ("objective.student_exponent=0",),
    "student_reversed": ("objective.student_exponent=-1",),
    "teacher_0": ("objective.teacher_exponent=0",),
    "teacher_reversed": ("objective.teacher_exponent=1",),
    "both_0": ("objective.student_exponent=0", "objective.teacher_exponent=0"),
}


class StudyError(ScopeError):
    """A command of the study failed, or its options cannot be; the message is all that a user sees."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compared, and how much of it. `steps` None leaves the config's."""

    runs: Path
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    num_samples: int
    steps: int | None
    jobs: int


@dataclasses.dataclass(frozen=True)
class Task:
    """A few commands in a row; each is skipped when `is_done` says that what it writes is there."""

    seed: int
    name: str
    commands: tuple[tuple[Callable[[], bool], Sequence[str]], ...]


class Seed:
    """The folder of one seed and the commands that fill it."""

    def __init__(self, settings: Settings, seed: int) -> None:
        self.settings = settings
        self.seed = seed
        self.folder = settings.runs / f"seed{seed}"
        self.data = self.folder / "data"

    def make_data(self) -> Task:
        """Into a folder that takes its name when it is whole."""
        partial = self.folder / "data.partial"
        command = (sys.executable, str(HERE / "task.py"), "make", str(partial), "--seed", str(self.seed))
        move = ("mv", str(partial), str(self.data))
        return Task(self.seed, "data", ((self.data.is_dir, command), (self.data.is_dir, move)))

    def train_model(self, name: str) -> Task:
        """The teacher or the weak student, by likelihood."""
        overrides = (
            f"student.hf={self.data / f'{name}_init'}",
            f"data.train={self.data / f'{name}_sft.jsonl'}",
        )
        return Task(self.seed, name, (self._train(f"{name}_sft", name, overrides),))

    @property
    def student(self) -> Path:
        """The model that every method starts from."""
        return self.folder / "student" / "hf"

    def method(self, name: str, changes: Sequence[str] = ()) -> Task:
        """Trains with `changes` to scope.yaml and samples what it made at every temperature; BASE is the
        student as it is.
        """
        commands = []
        if name != BASE:
            overrides = [
                f"student.hf={self.student}",
                f"teacher.hf={self.folder / 'teacher' / 'hf'}",
                f"data.train={self.data / 'train.jsonl'}",
                *changes,
            ]
            if self.settings.steps is not None:
                overrides.append(f"run.steps={self.settings.steps}")
            commands.append(self._train("scope", name, overrides))
        model = self.student if name == BASE else self.folder / name / "hf"
        commands += [self._evaluate(name, model, temperature) for temperature in TEMPERATURES]
        return Task(self.seed, name, tuple(commands))

    def is_trained(self, run: str) -> bool:
        return (self.folder / run / "hf" / "config.json").exists()

    def _train(self, config: str, run: str, overrides: Sequence[str]):
        output = self.folder / run
        command = ("megatron-scope", "train", str(HERE / f"{config}.yaml"), f"run.output_dir={output}")
        return lambda: self.is_trained(run), (*command, f"run.seed={self.seed}", *overrides)

    def _evaluate(self, name: str, model: Path, temperature: str):
        output = evaluation_file(self.folder, name, temperature)
        responses = responses_file(self.folder, name, temperature)
        samples = self.settings.num_samples
        command = (
            *("megatron-scope", "evaluate", str(HERE / "scope.yaml")),
            *(f"run.seed={self.seed}", f"evaluate.temperature={temperature}", "--model", str(model)),
            *("--benchmarks", str(self.data / "heldout.jsonl"), "--samples", str(samples)),
            *("--k", f"1,{K}"),
            *("--output", str(output), "--responses", str(responses)),
        )

        def is_done() -> bool:
            """Done with this model and as many samples; the responses are written last."""
            if not (output.exists() and responses.exists()):
                return False
            is_newer = output.stat().st_mtime >= (model / "config.json").stat().st_mtime
            return is_newer and json.loads(output.read_text(encoding="utf-8"))["num_samples"] == samples

        return is_done, command


def run_study(settings: Settings) -> None:
    """Does what is not there yet, two stages of models first; StudyError when a command fails."""
    started = time.monotonic()
    seeds = [Seed(settings, seed) for seed in settings.seeds]
    stages = (
        [seed.make_data() for seed in seeds],
        [seed.train_model(name) for seed in seeds for name in ("teacher", "student")],
        [seed.method(name, METHODS[name]) for seed in seeds for name in settings.methods],
    )
    for tasks in stages:
        executor = ThreadPoolExecutor(settings.jobs)
        try:
            for future in as_completed([executor.submit(run_task, settings, task) for task in tasks]):
                task, seconds = future.result()
                if seconds is not None:
                    elapsed = time.monotonic() - started
                    print(f"{elapsed:6.0f} s  seed {task.seed}: {task.name} ({seconds:.0f} s)", flush=True)
        finally:
            executor.shutdown(cancel_futures=True)


def run_task(settings: Settings, task: Task) -> tuple[Task, float | None]:
    """The task with its seconds, None where all was there."""
    started, did_something = time.monotonic(), False
    for number, (is_done, command) in enumerate(task.commands):
        if not is_done():
            did_something = True
            _run_command(settings.runs / f"seed{task.seed}" / "logs" / f"{task.name}.{number}.log", command)
    return task, time.monotonic() - started if did_something else None


def environment() -> dict[str, str]:
    """Of the commands: each keeps to a core, and none looks for a model on a hub."""
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {"OMP_NUM_THREADS": "1", **os.environ, **settings}


def _run_command(log: Path, command: Sequence[str]) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment()).returncode
    if code != 0:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1]
        raise StudyError(f"{command[0]} {command[1]} ended with code {code}; {log} ends: {last}")


def parse(arguments: Sequence[str] | None, **defaults: str) -> tuple[Settings, Path, str]:
    """(settings, folder of results, name of results); StudyError for what cannot be. `defaults` replace
    those of the options that they name.
    """
    parser = argparse.ArgumentParser(description="Compares training methods on the quickstart's task.")
    parser.add_argument("--seeds", default="1234,1235,1236", help="default %(default)s")
    parser.add_argument("--methods", default=",".join(METHODS), help="default all: %(default)s")
    parser.add_argument("--samples", type=int, default=32, metavar="N", help="for each problem (default 32)")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps (default: scope.yaml's)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="commands at a time (default 2)")
    parser.add_argument("--runs", type=Path, default=Path("runs/quickstart"), metavar="DIR")
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="DIR")
    parser.add_argument("--name", default="study", help="of the results' files (default %(default)s)")
    parser.set_defaults(**defaults)
    options = parser.parse_args(arguments)
    try:
        seeds = tuple(dict.fromkeys(int(seed) for seed in options.seeds.split(",")))
    except ValueError:
        raise StudyError(f"--seeds is {options.seeds!r}; expected numbers with commas, as in 1,2,3") from None
    methods = tuple(options.methods.split(","))
    for method in methods:
        if method not in METHODS:
            raise StudyError(f"--methods has {method!r}; known: {', '.join(METHODS)}")
    for name, count, least in (
        ("samples", options.samples, K),
        ("jobs", options.jobs, 1),
        ("steps", options.steps, 1),
    ):
        if count is not None and count < least:
            raise StudyError(f"--{name} is {count}; expected {least} or more")
    methods = tuple(dict.fromkeys((BASE, *methods)))
    settings = Settings(options.runs, seeds, methods, options.samples, options.steps, options.jobs)
    return settings, options.results, options.name


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        settings, results, name = parse(arguments)
        run_study(settings)
        compare(settings.runs, settings.seeds, settings.methods, results, name)
    except ScopeError as error:
        print(f"study: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
