"""Compares training methods by their evaluations: one table and one picture.

python examples/quickstart/compare.py runs/quickstart    # every seed and method that is there
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from plot import draw
from scores import BASE, LABELS, TEMPERATURES, CompareError, evaluation_file, read
from tables import markdown

from megatron_scope.data.jsonl import without_nan
from megatron_scope.errors import ScopeError


def compare(runs: Path, seeds: Sequence[int], methods: Sequence[str], results: Path, name: str) -> None:
    """Prints the table and writes RESULTS/NAME.md, .json and .png; ScopeError as `read` raises it."""
    comparison = read(runs, seeds, methods)
    text = markdown(comparison)
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.md").write_text(f"{text}\n\n![the same as a picture]({name}.png)\n", encoding="utf-8")
    report = json.dumps(without_nan(dataclasses.asdict(comparison)), indent=1, allow_nan=False)
    (results / f"{name}.json").write_text(f"{report}\n", encoding="utf-8")
    draw(comparison, results / f"{name}.png")
    print(f"{text}\n\nThe same as a picture: {results / name}.png")


def found_seeds(runs: Path) -> list[int]:
    """The N of every RUNS/seedN that was evaluated; CompareError if none was."""
    names = [path.parent.name.removeprefix("seed") for path in runs.glob("seed*/eval")]
    seeds = sorted(int(name) for name in names if name.isdecimal())
    if not seeds:
        raise CompareError(f"{runs}: no seedN/eval in it; start study.py first")
    return seeds


def found_methods(runs: Path, seeds: Sequence[int]) -> list[str]:
    """BASE and the methods that have an evaluation in one of the seeds' folders."""
    folders = [runs / f"seed{seed}" for seed in seeds]
    return [
        method
        for method in LABELS
        if method == BASE
        or any(evaluation_file(folder, method, t).exists() for folder in folders for t in TEMPERATURES)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compares what study.py evaluated: a table and a picture.")
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs/quickstart"), metavar="RUNS")
    parser.add_argument("--results", type=Path, metavar="DIR", help="where the files go (default RUNS)")
    parser.add_argument("--name", default="comparison", help="of the files (default comparison)")
    options = parser.parse_args(arguments)
    try:
        seeds = found_seeds(options.runs)
        methods = found_methods(options.runs, seeds)
        compare(options.runs, seeds, methods, options.results or options.runs, options.name)
    except ScopeError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
