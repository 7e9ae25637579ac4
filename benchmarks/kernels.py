"""Speed and memory of the full-vocabulary kernels beside the usual ways to the same numbers, on a CPU.

    python benchmarks/kernels.py [--out benchmarks/results]

Logits level: reverse KL and the targets' log-prob with their gradient from sharded bfloat16 logits, at tensor
parallel 1 and 2. Fused linear layer: the same from hidden states and output tables, beside its bare GEMMs.
Every measurement is a fresh process (one thread a rank), contestants take turns, and the table has medians.
Each process first compares a few tokens with the float64 reference. Extra memory is the peak over what the
process held when it had its inputs; u is one bfloat16 shard of the logits. Needs Linux.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import kernels_contestants as contestants  # noqa: E402  (needs the path)
from kernels_child import Case  # noqa: E402

BARE = ("bare GEMMs in float32", "bare GEMMs in bfloat16")
BARE_CHUNKS = (128, 512)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One case's repeats; times and memory are those of the slowest and the largest rank."""

    case: Case
    tensor_parallel: int
    seconds: list[float]
    extra_bytes: list[int]
    value_error: float | None
    gradient_error: float | None

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def extra_shards(self) -> float:
        """Median extra memory in u."""
        return statistics.median(self.extra_bytes) / (2 * self.case.num_tokens * self.columns)

    @property
    def columns(self) -> int:
        return self.case.vocab // self.tensor_parallel


def run_ranks(
    case: Case, tensor_parallel: int, timeout_s: float, python: str = sys.executable
) -> list[dict[str, float]]:
    """What each rank of one fresh run printed."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [json.dumps(dataclasses.asdict(case)), str(Path(folder) / "store")]
        child = [python, str(HERE / "kernels_child.py"), *arguments]
        processes = [
            subprocess.Popen(
                [*child, str(rank), str(tensor_parallel)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(tensor_parallel)
        ]
        try:
            printed = [process.communicate(timeout=timeout_s) for process in processes]
        finally:
            for process in processes:
                process.kill()
    for process, (_, errors) in zip(processes, printed, strict=True):
        if process.returncode:
            raise RuntimeError(f"{case.contestant} ended with {process.returncode}: {errors.strip()[-500:]}")
    return [json.loads(output.splitlines()[-1]) for output, _ in printed]


def measure(
    cases: Sequence[Case],
    tensor_parallel: int,
    repeats: int,
    *,
    trl_python: str | None = None,
    timeout_s: float = 600.0,
) -> list[Measurement]:
    """Interleaved repeats of each case."""
    rounds: list[list[list[dict[str, float]]]] = [[] for _ in cases]
    for repeat in range(repeats):
        for case, runs in zip(cases, rounds, strict=True):
            python = trl_python if case.contestant == contestants.TRL else sys.executable
            runs.append(run_ranks(case, tensor_parallel, timeout_s, python or sys.executable))
            slowest = max(rank["seconds"] for rank in runs[-1])
            print(
                f"TP {tensor_parallel}, {repeat + 1} of {repeats}: {case.contestant} {slowest:.3f} s",
                file=sys.stderr,
            )
    return [
        Measurement(
            case=case,
            tensor_parallel=tensor_parallel,
            seconds=[max(rank["seconds"] for rank in run) for run in runs],
            extra_bytes=[int(max(rank["extra_bytes"] for rank in run)) for run in runs],
            value_error=largest(runs, "value_error"),
            gradient_error=largest(runs, "gradient_error"),
        )
        for case, runs in zip(cases, rounds, strict=True)
    ]


def largest(runs: Sequence[Sequence[dict[str, float]]], key: str) -> float | None:
    values = [rank[key] for run in runs for rank in run if rank[key] is not None]
    return max(values, default=None)


# ---- report


def table(measurements: Sequence[Measurement], *, of_chunks: bool = False) -> str:
    """Times as ratios to ours, the first row; `of_chunks` adds their size, and the extra bytes for each token
    and column of one.
    """
    own = measurements[0]
    more = [" chunk | extra bytes / (chunk x columns) |", " --- | --- |"] if of_chunks else ["", ""]
    lines = [
        "| | seconds | times ours | extra memory, u | error of values | of gradients |" + more[0],
        "| --- | --- | --- | --- | --- | --- |" + more[1],
    ]
    for m in measurements:
        errors = ["" if error is None else f"{error:.0e}" for error in (m.value_error, m.gradient_error)]
        line = (
            f"| {m.case.contestant} | {m.median_s:.3f} ({min(m.seconds):.3f} to {max(m.seconds):.3f}) | "
            f"{m.median_s / own.median_s:.2f} | {m.extra_shards:.2f} | {errors[0]} | {errors[1]} |"
        )
        if of_chunks:
            cells = m.case.chunk_tokens * m.columns
            line += f" {m.case.chunk_tokens} | {statistics.median(m.extra_bytes) / cells:.1f} |"
        lines.append(line)
    return "\n".join(lines)


def draw(groups: dict[str, Sequence[Measurement]], path: Path) -> None:
    """Bars of time and of extra memory for every contestant, a row of panels for each group."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(10, 3.2 * len(groups)), layout="constrained")
        panels = figure.subplots(len(groups), 2, sharey="row", squeeze=False)
        for (title, found), row in zip(groups.items(), panels, strict=True):
            names = [m.case.contestant for m in found]
            colours = ["tab:orange" if name == "ours" else "tab:gray" for name in names]
            quantities = {
                "seconds, forward and backward": [m.median_s for m in found],
                "extra memory in u (one bfloat16 shard of the logits)": [m.extra_shards for m in found],
            }
            for axis, (label, values) in zip(row, quantities.items(), strict=True):
                bars = axis.barh(names, values, color=colours)
                axis.bar_label(bars, fmt="%.2f", padding=2)
                axis.margins(x=0.12)
                axis.set(title=title, xlabel=label)
                axis.spines[["top", "right"]].set_visible(False)
            row[0].invert_yaxis()
        figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Full-vocabulary kernels beside the usual ways.")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--tokens", type=int, default=256, help="at the logits level")
    parser.add_argument("--linear-tokens", type=int, default=2048, help="of the fused linear layer")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--trl-python", help="an interpreter with torch and trl, to measure TRL's function too"
    )
    options = parser.parse_args()

    groups = {}
    for size in (1, 2):
        names = [name for name in contestants.LOGITS if name != contestants.TRL]
        if options.trl_python and size == 1:
            names.append(contestants.TRL)
        cases = [Case("logits", name, options.tokens, options.vocab) for name in names]
        groups[f"TP {size}"] = measure(cases, size, options.repeats, trl_python=options.trl_python)
    fused = Case("linear", "ours", options.linear_tokens, options.vocab)
    bare = [
        dataclasses.replace(fused, contestant=name, chunk_tokens=size)
        for name in BARE
        for size in BARE_CHUNKS
    ]
    linear = measure([fused, *bare], 1, options.repeats)

    machine = {
        "cores": os.cpu_count(),
        "processor": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    versions = ", ".join(f"{name} {value}" for name, value in machine.items())
    parts = [
        f"Medians (with the range) of {options.repeats} interleaved fresh processes, forward and backward; "
        f"V = {options.vocab}, bfloat16, one thread a rank; {versions}.\n"
        "Errors are relative to float64 (L2 of a few tokens); u is one bfloat16 shard of the logits.",
        *(
            f"Logits level, {title}, T = {options.tokens}:\n\n{table(measurements)}"
            for title, measurements in groups.items()
        ),
        f"Fused linear layer, TP 1, T = {fused.num_tokens}, hidden sizes {fused.hidden[0]} and "
        f"{fused.hidden[1]}; memory beyond inputs and gradients (the table's in float32):\n\n"
        f"{table(linear, of_chunks=True)}",
    ]
    text = "\n\n".join(parts) + "\n"
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    everything = [m for found in (*groups.values(), linear) for m in found]
    report = {"machine": machine, "measurements": [dataclasses.asdict(m) for m in everything]}
    (options.out / "kernels.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (options.out / "kernels.md").write_text(text, encoding="utf-8")
    draw({f"logits, {title}": found for title, found in groups.items()}, options.out / "kernels.png")


def processor() -> str:
    """The processor's name where /proc tells it."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
