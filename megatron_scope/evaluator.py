"""The `evaluate` command: N responses to every problem of a file, judged, as avg@N and unbiased pass@k."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_scope.config import Config
from megatron_scope.controller.service import RolloutService
from megatron_scope.convert.hf_folder import HfFolder
from megatron_scope.data.jsonl import without_nan, write_rows_atomically
from megatron_scope.data.prompts import load_prompts
from megatron_scope.data.tokenizer import check_template, load_tokenizer, stop_token_ids
from megatron_scope.errors import ConfigError
from megatron_scope.evaluate.diversity import Diversity, diversity
from megatron_scope.evaluate.metrics import BenchmarkSummary, Estimate, benchmark_summary
from megatron_scope.records import JudgedRollout, Prompt, SamplingParams
from megatron_scope.rollout.client import RolloutRequest, sample_seed
from megatron_scope.verify.pool import KNOWN_TASKS

VERSION = 0
DEFAULT_KS = (1, 8, 32)


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """What to evaluate on: problem files, samples for each problem, the k of pass@k, and where results go."""

    benchmarks: tuple[str, ...]
    num_samples: int
    ks: tuple[int, ...]
    output: str | None = None
    responses: str | None = None


@dataclasses.dataclass(frozen=True)
class BenchmarkResult:
    """One benchmark's summary and what lies behind it; `correct_PS` bool [problems, samples]."""

    name: str
    prompts: tuple[Prompt, ...]
    correct_PS: np.ndarray
    summary: BenchmarkSummary
    diversity: Diversity
    judged: tuple[JudgedRollout, ...]


def parse_ks(text: str | None, num_samples: int) -> tuple[int, ...]:
    """The k of `1,8`, or of DEFAULT_KS those that the samples allow; ConfigError unless 1 <= k <= samples."""
    if num_samples < 1:
        raise ConfigError(f"--samples is {num_samples}; expected 1 or more")
    if text is None:
        return tuple(k for k in DEFAULT_KS if k <= num_samples)
    try:
        ks = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--k is {text!r}; expected numbers with commas, as in 1,8,32") from None
    for k in ks:
        if not 1 <= k <= num_samples:
            raise ConfigError(f"--k holds {k}; expected between 1 and --samples={num_samples}")
    return ks


def evaluate(config: Config, options: EvaluateOptions) -> list[BenchmarkResult]:
    """Runs the benchmarks, prints a table and writes the files that the options name."""
    model = str(config.student.hf)
    folder = HfFolder(model)
    tokenizer = load_tokenizer(model)
    check_template(config.data, tokenizer, model)
    problems = {name: load_prompts(config.data, tokenizer, KNOWN_TASKS, name) for name in options.benchmarks}
    _check_lengths(config, [prompt for prompts in problems.values() for prompt in prompts], folder)
    params = SamplingParams(
        config.evaluate.temperature,
        config.evaluate.top_p,
        config.evaluate.top_k,
        config.evaluate.max_new_tokens,
        stop_token_ids(config.data, model, tokenizer),
    )
    _make_room(options)
    results = asyncio.run(_run(config, options, problems, params, folder))
    _print(config, options, results)
    if options.output is not None:
        _write_json(Path(options.output), config, options, results)
    if options.responses is not None:
        write_rows_atomically(options.responses, _response_rows(results))
    return results


def _make_room(options: EvaluateOptions) -> None:
    """Makes the folders of the files to be written; what cannot be is found out now, not after the last
    response.
    """
    for option, path in (("--output", options.output), ("--responses", options.responses)):
        if path is None:
            continue
        if Path(path).is_dir():
            raise ConfigError(f"{option} is {path}, a folder; expected the name of a file to write")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    if options.output is not None and options.output == options.responses:
        raise ConfigError(f"--output and --responses are both {options.output}; give two files")


def _check_lengths(config: Config, prompts: Sequence[Prompt], folder: HfFolder) -> None:
    longest = max(len(prompt.token_ids) for prompt in prompts) + config.evaluate.max_new_tokens
    if longest > folder.shape.max_positions:
        raise ConfigError(
            f"the longest prompt and evaluate.max_new_tokens make {longest} tokens, but the model has "
            f"{folder.shape.max_positions} positions; lower evaluate.max_new_tokens"
        )


async def _run(
    config: Config,
    options: EvaluateOptions,
    problems: dict[str, list[Prompt]],
    params: SamplingParams,
    folder: HfFolder,
) -> list[BenchmarkResult]:
    with tempfile.TemporaryDirectory(prefix="megatron-scope-") as logs:
        service = RolloutService(config, folder.shape.vocab_rows, Path(logs) / "embedded_server.log")
        try:
            await service.publish(folder.path, VERSION)
            return [
                await _benchmark(config, options, name, problems[name], params, service) for name in problems
            ]
        finally:
            await service.close()


async def _benchmark(
    config: Config,
    options: EvaluateOptions,
    name: str,
    prompts: list[Prompt],
    params: SamplingParams,
    service: RolloutService,
) -> BenchmarkResult:
    requests = [
        RolloutRequest(
            prompt, sample, sample_seed(config.run.seed, 0, prompt.id, sample), f"{name}/{prompt.id}/{sample}"
        )
        for prompt in prompts
        for sample in range(options.num_samples)
    ]
    judged = await service.sample(requests, params, VERSION)
    correct_PS = np.array([item.verdict.correct for item in judged], dtype=bool).reshape(len(prompts), -1)
    summary = benchmark_summary(
        correct_PS, options.ks, resamples=config.evaluate.bootstrap_resamples, seed=config.run.seed
    )
    texts_PS = np.array([item.rollout.text for item in judged], dtype=object).reshape(correct_PS.shape)
    differences = diversity(
        [texts[right].tolist() for texts, right in zip(texts_PS, correct_PS, strict=True)],
        num_responses=config.evaluate.diversity_responses,
        max_tokens=config.evaluate.diversity_tokens,
    )
    return BenchmarkResult(name, tuple(prompts), correct_PS, summary, differences, tuple(judged))


# ---- what is shown and written


def _columns(options: EvaluateOptions, summary: BenchmarkSummary) -> dict[str, Estimate]:
    passes = {f"pass@{k}": summary.pass_at_k[k] for k in options.ks}
    return {f"avg@{options.num_samples}": summary.average, **passes}


def _means(options: EvaluateOptions, results: Sequence[BenchmarkResult]) -> dict[str, float]:
    """Means over benchmarks, each counted once."""
    columns = [_columns(options, result.summary) for result in results]
    return {name: float(np.mean([column[name].value for column in columns])) for name in columns[0]}


def _print(config: Config, options: EvaluateOptions, results: Sequence[BenchmarkResult]) -> None:
    settings = config.evaluate
    sampling = f"temperature {settings.temperature:g}, top-p {settings.top_p:g}, top-k {settings.top_k}"
    table = Table(
        caption="percent, with 95 % bootstrap intervals over problems; distinct-2 and self-BLEU compare "
        f"{settings.diversity_responses} correct responses to a problem",
        caption_justify="left",
    )
    table.add_column("benchmark", overflow="fold")
    for name in ("problems", *_columns(options, results[0].summary), "distinct-2", "self-BLEU"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        # The interval on a line of its own: the default columns would not fit 120 characters otherwise.
        cells = [
            f"{100 * e.value:.1f}\n{100 * e.low:.1f} to {100 * e.high:.1f}"
            for e in _columns(options, result.summary).values()
        ]
        unlike = [
            "-" if np.isnan(value) else f"{value:.2f}"
            for value in (result.diversity.distinct_n[2], result.diversity.self_bleu)
        ]
        table.add_row(Path(result.name).stem, str(result.summary.num_problems), *cells, *unlike)
    if len(results) > 1:
        table.add_row("mean", "", *(f"{100 * value:.1f}" for value in _means(options, results).values()))
    # A file or pipe has no width of its own; 80 columns would break the cells.
    console = Console(width=None if sys.stdout.isatty() else 120)
    # Not the table's title, which would wrap at the table's width.
    print(f"{config.student.hf}, {options.num_samples} samples a problem at {sampling}")
    console.print(table)


def _write_json(
    path: Path, config: Config, options: EvaluateOptions, results: Sequence[BenchmarkResult]
) -> None:
    report: dict[str, Any] = {
        "model": config.student.hf,
        "num_samples": options.num_samples,
        "sampling": dataclasses.asdict(config.evaluate),
        "seed": config.run.seed,
        "benchmarks": {
            result.name: {
                "num_problems": result.summary.num_problems,
                "num_verify_errors": sum(item.verdict.error is not None for item in result.judged),
                "num_aborted": sum(item.rollout.finish_reason == "abort" for item in result.judged),
                "num_truncated": sum(item.rollout.finish_reason == "length" for item in result.judged),
                **{name: dataclasses.asdict(e) for name, e in _columns(options, result.summary).items()},
                "diversity": without_nan(dataclasses.asdict(result.diversity)),
                "num_correct": {
                    prompt.id: int(count)
                    for prompt, count in zip(result.prompts, result.correct_PS.sum(axis=1), strict=True)
                },
            }
            for result in results
        },
        "mean": _means(options, results),
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _response_rows(results: Sequence[BenchmarkResult]):
    for result in results:
        for item in result.judged:
            yield {
                "benchmark": result.name,
                "id": item.rollout.prompt.id,
                "sample": item.rollout.sample,
                "response": item.rollout.text,
                "correct": item.verdict.correct,
                "extracted": item.verdict.extracted,
                "error": item.verdict.error,
                "finish_reason": item.rollout.finish_reason,
                "prompt_ids": list(item.rollout.prompt.token_ids),
                "output_ids": list(item.rollout.output_ids),
            }
