"""Speed and memory of the full-vocabulary kernels beside the usual ways to the same numbers, on a CPU.

    python benchmarks/kernels.py [--rivals-python PYTHON] [--only PART] [--out benchmarks/results]

Logits level: reverse KL and the targets' log-prob with their gradient from sharded bfloat16 logits, at tensor
parallel 1 and 2. Fused linear layer: the same from hidden states and output tables, beside its bare GEMMs.
Every measurement is a fresh process (one thread a rank), contestants take turns, and the table has medians
of the wall clock and of the process's own CPU time, which other work on the machine disturbs less.
Each process first compares a few tokens with the float64 reference. Extra memory is the peak over what the
process held when it had its inputs; u is one bfloat16 shard of the logits. Needs Linux.

PYTHON is an interpreter with torch, trl and liger-kernel, whose functions are then measured too. With
`--only` one part is measured again; the others stay as they stand in the folder of results.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import kernels_contestants as contestants  # noqa: E402  (needs the path)
import kernels_linear as linear  # noqa: E402
from kernels_report import Case, Group, Measurement, draw, report  # noqa: E402

CHUNKS = (128, 512)  # of the GEMMs that are bare; memory allows ours no more than the first
RIVALS = {contestants.TRL: (), linear.TRL: (4096,), linear.LIGER: (128, 1024)}  # each with its chunk sizes
PARTS = ("logits, TP 1", "logits, TP 2", "fused linear layer, TP 1")


def run_ranks(case: Case, tensor_parallel: int, timeout_s: float, python: str) -> list[dict[str, float]]:
    """What each rank of one fresh run printed."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [json.dumps(dataclasses.asdict(case)), str(Path(folder) / "store")]
        child = [python, "-W", "ignore", str(HERE / "kernels_child.py"), *arguments]
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
            raise RuntimeError(f"{case.label} ended with {process.returncode}: {errors.strip()[-500:]}")
    return [json.loads(output.splitlines()[-1]) for output, _ in printed]


def measure(
    cases: Sequence[Case],
    tensor_parallel: int,
    repeats: int,
    *,
    rivals_python: str | None = None,
    rival_repeats: int | None = None,
    timeout_s: float = 900.0,
) -> Group:
    """Interleaved repeats of each case; rivals' at most `rival_repeats`."""
    before = os.getloadavg()[0]
    rounds: list[list[list[dict[str, float]]]] = [[] for _ in cases]
    for repeat in range(repeats):
        for case, runs in zip(cases, rounds, strict=True):
            python = sys.executable
            if case.contestant in RIVALS:
                if rival_repeats is not None and repeat >= rival_repeats:
                    continue
                python = rivals_python or python
            runs.append(run_ranks(case, tensor_parallel, timeout_s, python))
            slowest = max(rank["seconds"] for rank in runs[-1])
            progress = f"{case.kind}, TP {tensor_parallel}, {repeat + 1} of {repeats}: {case.label}"
            print(f"{progress} {slowest:.3f} s", file=sys.stderr)
    measurements = [
        Measurement(
            case=case,
            tensor_parallel=tensor_parallel,
            seconds=[max(rank["seconds"] for rank in run) for run in runs],
            cpu_seconds=[max(rank["cpu_seconds"] for rank in run) for run in runs],
            extra_bytes=[int(max(rank["extra_bytes"] for rank in run)) for run in runs],
            value_error=largest(runs, "value_error"),
            gradient_error=largest(runs, "gradient_error"),
        )
        for case, runs in zip(cases, rounds, strict=True)
    ]
    return Group((round(before, 1), round(os.getloadavg()[0], 1)), measurements)


def largest(runs: Sequence[Sequence[dict[str, float]]], key: str) -> float | None:
    values = [rank[key] for run in runs for rank in run if rank[key] is not None]
    return max(values, default=None)


def measure_part(part: str, options: argparse.Namespace) -> Group:
    rivals: dict[str, Any] = {"rivals_python": options.rivals_python, "rival_repeats": options.rival_repeats}
    if part == "fused linear layer, TP 1":
        own = Case("linear", linear.OURS, options.linear_tokens, options.vocab)
        sizes: dict[str, Sequence[int]] = {name: CHUNKS for name in linear.BARE}
        if options.rivals_python:
            sizes |= {name: RIVALS[name] for name in (linear.TRL, linear.LIGER)}
        others = [
            dataclasses.replace(own, contestant=name, chunk_tokens=size)
            for name, chunks in sizes.items()
            for size in chunks
        ]
        return measure([own, *others], 1, options.repeats, **rivals)
    tensor_parallel = int(part[-1])
    names = [name for name in contestants.LOGITS if name != contestants.TRL]
    if options.rivals_python and tensor_parallel == 1:
        names.append(contestants.TRL)
    cases = [Case("logits", name, options.tokens, options.vocab) for name in names]
    return measure(cases, tensor_parallel, options.repeats, rivals_python=options.rivals_python)


def machine(rivals_python: str | None) -> dict[str, Any]:
    """Cores, processor and the versions that took part."""
    found = {
        "cores": os.cpu_count(),
        "processor": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if rivals_python:
        code = "import importlib.metadata as m; print(*map(m.version, ('trl', 'liger-kernel')))"
        printed = subprocess.run([rivals_python, "-c", code], check=True, capture_output=True, text=True)
        found |= dict(zip(("trl", "liger-kernel"), printed.stdout.split(), strict=True))
    return found


def processor() -> str:
    """The processor's name where /proc tells it, and whether it multiplies bfloat16 matrices itself."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return (names[0] if names else platform.machine()) + (" with AMX" if " amx_bf16" in text else "")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Full-vocabulary kernels beside the usual ways.")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--tokens", type=int, default=256, help="at the logits level")
    parser.add_argument("--linear-tokens", type=int, default=2048, help="of the fused linear layer")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rivals-python", help="an interpreter with torch, trl and liger-kernel")
    parser.add_argument("--rival-repeats", type=int, default=3, help="of rivals at the fused linear layer")
    parser.add_argument("--only", choices=PARTS, help="the part to measure again")
    return parser.parse_args()


def main() -> None:
    options = parse()
    kept = options.out / "kernels.json"
    groups: dict[str, Group] = {}
    if options.only and kept.exists():
        standing = json.loads(kept.read_text(encoding="utf-8"))["groups"]
        groups = {title: Group.of(found) for title, found in standing.items()}
    for part in [options.only] if options.only else PARTS:
        groups[part] = measure_part(part, options)
    groups = {part: groups[part] for part in PARTS if part in groups}
    about = machine(options.rivals_python)
    text = report(groups, about)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    found = {
        "machine": about,
        "groups": {title: dataclasses.asdict(group) for title, group in groups.items()},
    }
    kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.out / "kernels.md").write_text(text, encoding="utf-8")
    draw(groups, options.out / "kernels.png")


if __name__ == "__main__":
    main()
