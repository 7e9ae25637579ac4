"""Speed and memory of `megatron-scope convert` beside a plain copy and what others would do.

    python benchmarks/convert.py --work FOLDER [--sizes small,8b] [--repeats 5] [--out benchmarks/results]
                                 [--mbridge-python PYTHON] [--only ours,transformers] [--timeout 1800]

FOLDER takes the synthetic Llama-shaped folders and everything converted from them, three times the size of
one (50 GB for 8b); all of it is removed at the end, also after an error or Ctrl-C. PYTHON is an interpreter
that imports mbridge, einops and what megatron_scope needs; without it mbridge is left out. --only takes the
contestants whose names begin so; the copy always runs.

Every contestant runs in a fresh process, in turns. A time is that of the whole process, its start and imports
included, and of an fsync of every file and folder it left, made by this script for all alike. Before each run
the system is synced and what is read is dropped from the page cache (`cold`) or read once (`warm`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from convert_process import Run, imported_modules, run_process, set_cache
from convert_sizes import SIZES, TINY, Size

CHILD = Path(__file__).with_name("convert_child.py")
COPY = "cp -r"
TO_MEGATRON = "ours, to Megatron"
MBRIDGE_NOTE = (
    "mbridge was lent what it lacks on this machine: Megatron hosted on the CPU, Megatron's own layers where "
    "it asks for Transformer Engine's, and rope_theta where it looks for it; the model's random "
    "initialisation was switched off"
)


@dataclasses.dataclass(frozen=True)
class Folders:
    hf: Path
    megatron: Path
    out: Path


@dataclasses.dataclass(frozen=True)
class Contestant:
    """`argv` is its command; rivals run at most `Size.rival_repeats` times."""

    name: str
    argv: Callable[[Folders], list[str]]
    is_python: bool = True
    reads_megatron: bool = False
    is_rival: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """One contestant at one size and cache state; medians of its good runs, all above the bare process."""

    size: str
    cache: str
    contestant: str
    seconds: float
    bytes_per_second: float
    ratio_to_copy: float
    ratio_without_start: float | None  # None where the start took as long as the whole
    peak_above_bare_bytes: int
    anonymous_above_bare_bytes: int
    limit_bytes: int
    written_bytes: int
    runs: tuple[Run, ...]


def contestants(mbridge_python: str | None) -> list[Contestant]:
    def ours(*arguments: str) -> list[str]:
        return [sys.executable, "-m", "megatron_scope", "convert", *arguments]

    def child(python: str, task: str, folders: Folders) -> list[str]:
        return [python, "-W", "ignore", str(CHILD), task, str(folders.hf), str(folders.out)]

    found = [
        Contestant(COPY, lambda at: ["cp", "-r", str(at.hf), str(at.out)], is_python=False),
        Contestant(
            TO_MEGATRON,
            lambda at: ours("to-megatron", "--hf", str(at.hf), "--out", str(at.out), "--dtype", "bfloat16"),
        ),
        Contestant(
            "ours, to HF",
            lambda at: ours(
                *("to-hf", "--megatron", str(at.megatron), "--out", str(at.out), "--like", str(at.hf))
            ),
            reads_megatron=True,
        ),
        Contestant(
            "transformers, load + save",
            lambda at: child(sys.executable, "transformers", at),
            is_rival=True,
        ),
    ]
    if mbridge_python:
        name = "mbridge, load + dist_checkpointing.save"
        found.append(Contestant(name, lambda at: child(mbridge_python, "mbridge", at), is_rival=True))
    return found


def bare_process(contestant: Contestant, folders: Folders) -> Run:
    """The contestant's interpreter, importing what it imports to convert the tiny model, and no more.

    The faster of two runs: the first may find the modules' files uncached. Its failure is that of converting
    the tiny model.
    """
    argv = contestant.argv(folders)
    if not contestant.is_python:
        return run_process([argv[0], "--version"])[0]
    run, printed = run_process([argv[0], "-X", "importtime", *argv[1:]], out=folders.out)
    if run.failure:
        return run
    command = [argv[0], "-W", "ignore", str(CHILD), "bare"]
    modules = "\n".join(imported_modules(printed))
    return min((run_process(command, stdin=modules)[0] for _ in range(2)), key=lambda run: run.seconds)


def make_folder(folder: Path, size: Size) -> None:
    """In a process of its own, so that this one's memory stays small."""
    plan = {"config": size.config(), "tensors": size.tensors(), "max_shard_bytes": size.max_shard_bytes}
    argv = [sys.executable, str(CHILD), "make", str(folder)]
    run, _ = run_process(argv, stdin=json.dumps(plan), out=folder)
    if run.failure:
        raise SystemExit(f"the folder for the benchmark could not be made: {run.failure}")
    print(f"made {run.written_bytes / 1e9:.2f} GB in {run.seconds:.1f} s", flush=True)


def missing_space(size: Size, free_bytes: int) -> int:
    """The bytes that lack for a folder, its Megatron twin and one output; 0 or less where they fit."""
    return 3 * size.num_bytes + 2_000_000_000 - free_bytes


class Benchmark:
    """All contestants in one folder; those that failed are out, with a note."""

    def __init__(self, root: Path, field: Sequence[Contestant], repeats: int, timeout_s: float) -> None:
        self.root = root
        self.repeats = repeats
        self.timeout_s = timeout_s
        self.notes: list[str] = []
        self.bare: dict[str, Run] = {}
        tiny = self._folders("tiny")
        make_folder(tiny.hf, TINY)
        self.field = list(field)
        for contestant in field:
            shutil.rmtree(tiny.out, ignore_errors=True)
            bare = bare_process(contestant, tiny)
            if bare.failure:
                self._drop(contestant, "a tiny model", bare)
            self.bare[contestant.name] = bare
            if contestant.name == TO_MEGATRON and tiny.out.exists():
                tiny.out.rename(tiny.megatron)
        shutil.rmtree(tiny.hf.parent)

    def _folders(self, name: str) -> Folders:
        parent = self.root / name
        parent.mkdir(exist_ok=True)
        return Folders(parent / "hf", parent / "megatron", parent / "out")

    def _drop(self, contestant: Contestant, where: str, run: Run) -> None:
        self.field.remove(contestant)
        failure = (run.failure or "").replace(str(self.root), "FOLDER")
        self.notes.append(f"{contestant.name} did not convert {where}: {failure}")
        print(self.notes[-1], flush=True)

    def _measure(self, contestant: Contestant, folders: Folders, size: str, cache: str) -> Run | None:
        shutil.rmtree(folders.out, ignore_errors=True)
        set_cache(folders.megatron if contestant.reads_megatron else folders.hf, cache)
        run, _ = run_process(contestant.argv(folders), out=folders.out, timeout_s=self.timeout_s)
        if run.failure is None and run.written_bytes < SIZES[size].num_bytes:
            run = dataclasses.replace(run, failure=f"it wrote {run.written_bytes} bytes, too few")
        if run.failure:
            self._drop(contestant, f"{size} ({cache})", run)
            return None
        print(f"{size}, {cache}: {contestant.name} {run.seconds:.2f} s", flush=True)
        return run

    def at(self, name: str) -> list[Row]:
        """Every contestant at one size, in turns; the folders are removed at the end."""
        size, folders, rows = SIZES[name], self._folders(name), []
        make_folder(folders.hf, size)
        to_megatron = next((one for one in self.field if one.name == TO_MEGATRON), None)
        if to_megatron and self._measure(to_megatron, folders, name, "cold"):
            folders.out.rename(folders.megatron)
        for cache in size.caches:
            runs: dict[str, list[Run]] = {contestant.name: [] for contestant in self.field}
            for repeat in range(self.repeats):
                for contestant in tuple(self.field):
                    if contestant.is_rival and repeat >= size.rival_repeats:
                        continue
                    run = self._measure(contestant, folders, name, cache)
                    runs[contestant.name] += [run] if run else []
            rows += summarise(name, cache, {key: found for key, found in runs.items() if found}, self.bare)
        shutil.rmtree(folders.hf.parent)
        return rows


def summarise(name: str, cache: str, runs: dict[str, list[Run]], bare: dict[str, Run]) -> list[Row]:
    """Medians of each contestant's runs beside the copy's, and memory above the bare process."""
    size = SIZES[name]
    median = {key: statistics.median(run.seconds for run in found) for key, found in runs.items()}
    working = {key: seconds - bare[key].seconds for key, seconds in median.items()}
    return [
        Row(
            size=name,
            cache=cache,
            contestant=key,
            seconds=median[key],
            bytes_per_second=size.num_bytes / median[key],
            ratio_to_copy=median[COPY] / median[key],
            ratio_without_start=working[COPY] / working[key] if working[key] > 0 else None,
            peak_above_bare_bytes=max(run.peak_bytes for run in found) - bare[key].peak_bytes,
            anonymous_above_bare_bytes=max(run.anonymous_bytes for run in found) - bare[key].anonymous_bytes,
            limit_bytes=size.limit_bytes,
            written_bytes=found[-1].written_bytes,
            runs=tuple(found),
        )
        for key, found in runs.items()
    ]


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| size | cache | contestant | runs | seconds (min to max) | GB/s | of the copy | without start | "
        "peak MB above bare | anonymous | limit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        times = [run.seconds for run in row.runs]
        spread = f"{row.seconds:.2f} ({min(times):.2f} to {max(times):.2f})"
        without_start = "-" if row.ratio_without_start is None else f"{row.ratio_without_start:.2f}"
        ratios = f"{row.ratio_to_copy:.2f} | {without_start}"
        peaks = f"{row.peak_above_bare_bytes / 1e6:.0f} | {row.anonymous_above_bare_bytes / 1e6:.0f}"
        lines.append(
            f"| {row.size} | {row.cache} | {row.contestant} | {len(times)} | {spread} | "
            f"{row.bytes_per_second / 1e9:.3f} | {ratios} | {peaks} | {row.limit_bytes / 1e6:.0f} |"
        )
    return "\n".join(lines)


def machine(work: Path, mbridge_python: str | None) -> dict[str, Any]:
    """Cores, memory, file system and the versions that took part."""
    place = work.stat().st_dev
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    kinds = [f"{kind} on {Path(device).name}" for device, at, kind, *_ in mounts if _device(at) == place]
    names = ["torch", "safetensors", "transformers", "megatron-core"]
    found = versions(sys.executable, names)
    if mbridge_python:
        found |= versions(mbridge_python, ["mbridge"])
    return {
        "cores": os.cpu_count(),
        "memory GB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "processor": platform.machine(),
        "file system": kinds[-1] if kinds else "unknown",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
        "python": platform.python_version(),
        **found,
    }


def _device(path: str) -> int | None:
    try:
        return os.stat(path).st_dev
    except OSError:  # a mount that this user may not enter holds no folder of theirs
        return None


def versions(python: str, names: Sequence[str]) -> dict[str, str]:
    """The installed versions that an interpreter sees."""
    code = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
    found = subprocess.run([python, "-c", code, *names], check=True, capture_output=True, text=True)
    return dict(zip(names, found.stdout.split(), strict=True))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Conversion beside a copy, transformers and mbridge.")
    parser.add_argument("--work", type=Path, required=True, help="folder on the disk to measure")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--sizes", default="small,8b", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--mbridge-python", help="an interpreter that imports mbridge")
    parser.add_argument(
        "--only", default="", help="contestants, by how their names begin; the copy always runs"
    )
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one conversion")
    options = parser.parse_args()
    options.sizes = options.sizes.split(",")
    if unknown := set(options.sizes) - set(SIZES):
        parser.error(f"--sizes names {', '.join(sorted(unknown))}; choose from {', '.join(SIZES)}")
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; expected 1 or more")
    if not options.work.is_dir():
        parser.error(f"--work {options.work} is not a folder; make it first")
    for name in options.sizes:
        if (lacking := missing_space(SIZES[name], shutil.disk_usage(options.work).free)) > 0:
            parser.error(
                f"--work {options.work} has {lacking / 1e9:.1f} GB too little free for {name}; free them, "
                "or leave that size out with --sizes"
            )
    return options


def report(rows: Sequence[Row], benchmark: Benchmark, about: dict[str, Any], repeats: int) -> str:
    notes = "".join(f"- {note}\n" for note in benchmark.notes)
    starts = "; ".join(
        f"{name} {run.seconds:.2f} s, {run.peak_bytes / 1e6:.0f} MB"
        for name, run in benchmark.bare.items()
        if not run.failure
    )
    return (
        f"Medians of {repeats} interleaved repeats (others' conversions fewer where the table says so); "
        f"{', '.join(f'{name} {version}' for name, version in about.items())}.\n\n"
        "Times are of whole processes and an fsync of all they left. GB/s count the Hugging Face folder's "
        "weights; cold: what is\nread was dropped from this machine's page cache before. A bare process "
        "imports the same modules and does nothing\n"
        f"({starts}); `without start` leaves its seconds out.\n"
        "Peaks are resident memory of the largest process, mapped files included; `anonymous` those without "
        "files. The limit is\ntwice the largest tensor and 500 MB.\n\n"
        f"{table(rows)}\n\n{notes}"
    )


def main() -> None:
    options = parse()
    # As after Ctrl-C, everything is removed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    root = Path(tempfile.mkdtemp(prefix="convert-benchmark-", dir=options.work)).resolve()
    try:
        chosen = (COPY, *options.only.split(","))
        field = [one for one in contestants(options.mbridge_python) if one.name.startswith(chosen)]
        benchmark = Benchmark(root, field, options.repeats, options.timeout)
        benchmark.notes.append(
            MBRIDGE_NOTE if options.mbridge_python else "mbridge was left out: no interpreter"
        )
        rows = [row for name in options.sizes for row in benchmark.at(name)]
    finally:
        shutil.rmtree(root)
    about = machine(options.work, options.mbridge_python)
    text = report(rows, benchmark, about, options.repeats)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    bare = {name: dataclasses.asdict(run) for name, run in benchmark.bare.items()}
    found = {"machine": about, "bare": bare, "notes": benchmark.notes}
    found["rows"] = [dataclasses.asdict(row) for row in rows]
    (options.out / "convert.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.out / "convert.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
