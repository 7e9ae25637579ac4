"""Throughput and agreement of the maths verifier beside bare math-verify.

    python benchmarks/verify.py --data FOLDER [--out benchmarks/results]

FOLDER holds problems as JSON lines {id, answer, task, ...}. Their answers make three sets of (ground truth,
response): answers that match as written, the same value in another notation, and another problem's answer.
Each is judged by ours (in this process by `verify_math`, and through a pool of one worker process, as in
training) and by math-verify: `verify(parse(ground truth), parse(response))` with its own default limits.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_scope.data.jsonl import read_rows
from megatron_scope.verify.math_answer import verify_math
from megatron_scope.verify.pool import VerifierPool

Pair = tuple[str, str]  # ground truth answer, response
Judge = Callable[[Sequence[Pair]], list[bool]]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Of one set: answers a second (median over repeats) by judge, ratios to math-verify, and agreement."""

    name: str
    num_pairs: int
    per_second: dict[str, float]
    ratio: dict[str, float]
    correct: dict[str, int]
    only_ours_correct: dict[str, int]  # by kind of the ground truth answer
    only_math_verify_correct: dict[str, int]


def boxed(answer: str) -> str:
    return rf"So we conclude that the result is $\boxed{{{answer}}}$."


def rewritten(answer: str) -> str | None:
    """The same value written otherwise, or None where no rewrite is at hand."""
    if re.fullmatch(r"-?\d+", answer):
        return rf"\frac{{{2 * int(answer)}}}{{2}}"
    if re.search(r"\\frac\{", answer):
        return answer.replace(r"\frac{", r"\dfrac {")
    if re.fullmatch(r"[^,=<>;:]*[a-z0-9}][^,=<>;:]*", answer) and not re.search(r"text|[A-Za-z]{3}", answer):
        return rf"0 + {answer}"
    return None


def kind(answer: str) -> str:
    """A coarse kind of answer, to tell where two verifiers differ."""
    if re.fullmatch(r"-?[\d.,]+", answer):
        return "number"
    if re.search(r"begin\{[a-z]*matrix|\\\{|^(?:\\left)?[\[(]|\\cup", answer):
        return "matrix, set, tuple or interval"
    if re.search(r"[=<>]|\\(?:le|ge|lt|gt|ne|leq|geq|neq)(?![a-z])", answer):
        return "relation"
    if "," in answer:
        return "list"
    if re.search(r"\\text|\\mathrm|^[A-Za-z ]{2,}$", answer):
        return "text or unit"
    return "fraction" if re.fullmatch(r"-?\\[dt]?frac\{-?\d+\}\{\d+\}", answer) else "formula"


def sets_of(answers: Sequence[str], count: int, rng: random.Random) -> dict[str, list[Pair]]:
    """Three sets of at most `count` pairs."""
    chosen = rng.sample(list(answers), min(count, len(answers)))
    others = chosen[1:] + chosen[:1]
    return {
        "match as written": [(answer, boxed(answer)) for answer in chosen],
        "another notation": [
            (answer, boxed(other)) for answer in chosen if (other := rewritten(answer)) is not None
        ],
        "another answer": [
            (answer, boxed(other)) for answer, other in zip(chosen, others, strict=True) if answer != other
        ],
    }


def by_ours(pairs: Sequence[Pair]) -> list[bool]:
    return [verify_math(response, answer).correct for answer, response in pairs]


def by_math_verify(pairs: Sequence[Pair]) -> list[bool]:
    from math_verify import parse, verify

    return [verify(parse(rf"${answer}$"), parse(response)) for answer, response in pairs]


def measure(name: str, pairs: Sequence[Pair], judges: dict[str, Judge], repeats: int) -> Measurement:
    """Interleaved repeats; the first round, which imports and fills caches, is left out."""
    times: dict[str, list[float]] = {judge: [] for judge in judges}
    verdicts: dict[str, list[bool]] = {}
    for repeat in range(repeats + 1):
        for judge, run in judges.items():
            started = time.perf_counter()
            verdicts[judge] = run(pairs)
            if repeat:
                times[judge].append(time.perf_counter() - started)
    median = {judge: statistics.median(seconds) for judge, seconds in times.items()}
    both = list(zip(pairs, verdicts["ours"], verdicts["math-verify"], strict=True))
    only_ours = Counter(kind(answer) for (answer, _), ours, theirs in both if ours and not theirs)
    only_theirs = Counter(kind(answer) for (answer, _), ours, theirs in both if theirs and not ours)
    return Measurement(
        name=name,
        num_pairs=len(pairs),
        per_second={judge: len(pairs) / seconds for judge, seconds in median.items()},
        ratio={judge: median["math-verify"] / seconds for judge, seconds in median.items()},
        correct={judge: sum(found) for judge, found in verdicts.items()},
        only_ours_correct=dict(only_ours),
        only_math_verify_correct=dict(only_theirs),
    )


def table(measurements: Sequence[Measurement]) -> str:
    lines = [
        "| set | pairs | ours, answers/s | ours, pool of 1 | math-verify | ratio | ratio, pool | "
        "correct: ours, math-verify | only ours | only math-verify |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for m in measurements:
        speeds = " | ".join(f"{m.per_second[judge]:.0f}" for judge in ("ours", "ours, pool", "math-verify"))
        ratios = " | ".join(f"{m.ratio[judge]:.1f}" for judge in ("ours", "ours, pool"))
        only = [
            ", ".join(f"{count} {name}" for name, count in counts.items()) or "0"
            for counts in (m.only_ours_correct, m.only_math_verify_correct)
        ]
        agreement = f"{m.correct['ours']}, {m.correct['math-verify']} | {only[0]} | {only[1]}"
        lines.append(f"| {m.name} | {m.num_pairs} | {speeds} | {ratios} | {agreement} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Verifier throughput beside bare math-verify.")
    parser.add_argument("--data", type=Path, required=True, help="folder of JSON-lines problem files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--pairs", type=int, default=600, help="of each set, at most")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    answers = dict.fromkeys(
        row["answer"]
        for path in sorted(options.data.glob("*.jsonl"))
        for _, row in read_rows(path)
        if row.get("task") == "math"
    )
    with VerifierPool(workers=1, timeout_s=10.0) as pool:

        def by_pool(pairs: Sequence[Pair]) -> list[bool]:
            futures = [pool.submit("math", answer, response) for answer, response in pairs]
            return [future.result().correct for future in futures]

        judges: dict[str, Judge] = {"ours": by_ours, "ours, pool": by_pool, "math-verify": by_math_verify}
        measurements = [
            measure(name, pairs, judges, options.repeats)
            for name, pairs in sets_of(list(answers), options.pairs, random.Random(0)).items()
        ]
    machine = {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("math-verify", "sympy")},
    }
    versions = ", ".join(f"{name} {version}" for name, version in machine.items())
    text = (
        f"Medians of {options.repeats} interleaved repeats; {versions}.\n"
        f"math-verify runs with its own limits of 5 s.\n\n{table(measurements)}\n"
    )
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine, "sets": [dataclasses.asdict(m) for m in measurements]}
    (options.out / "verify.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (options.out / "verify.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
