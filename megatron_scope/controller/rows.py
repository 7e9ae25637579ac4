"""RUN/rollouts: one JSON row a response, for people to read and for `rollout.engine=replay` to train on again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_scope.data.jsonl import read_rows, write_rows_atomically
from megatron_scope.errors import DataError
from megatron_scope.records import JudgedRollout, Prompt, Rollout, Verdict


@dataclasses.dataclass(frozen=True)
class ResponseRecord:
    """What the ranks found out about one usable response; None where a model did not score it."""

    student_mean_logprob: float | None
    teacher_mean_logprob: float | None
    weight: float


def rollout_file(folder: Path, step: int) -> Path:
    """Where a step's rollouts lie."""
    return folder / f"step_{step:06d}.jsonl"


def write_step(
    folder: Path, step: int, judged: Iterable[JudgedRollout], records: dict[int, ResponseRecord]
) -> None:
    """Writes a step's rows; `records` are keyed by the rollout's place in `judged`, those left out were dropped."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = (_row(step, item, records.get(place)) for place, item in enumerate(judged))
    write_rows_atomically(rollout_file(folder, step), rows)


def _row(step: int, item: JudgedRollout, record: ResponseRecord | None) -> dict[str, Any]:
    rollout, verdict = item.rollout, item.verdict
    path = "correct" if verdict.correct else "incorrect"
    return {
        "step": step,
        "prompt_id": rollout.prompt.id,
        "sample": rollout.sample,
        "text": rollout.text,
        "correct": verdict.correct,
        "extracted": verdict.extracted,
        "path": None if record is None else path,
        "weight": None if record is None else record.weight,
        "student_mean_logprob": None if record is None else record.student_mean_logprob,
        "teacher_mean_logprob": None if record is None else record.teacher_mean_logprob,
        "finish_reason": rollout.finish_reason,
        "weight_version": rollout.weight_version,
        "error": verdict.error,
        "prompt_ids": list(rollout.prompt.token_ids),
        "output_ids": list(rollout.output_ids),
        "engine_logprobs": [value if math.isfinite(value) else None for value in rollout.engine_logprobs],
    }


def read_steps(path: str) -> list[list[JudgedRollout]]:
    """The recorded steps of a file or a folder of files, in order; DataError names the line of a row that is not one."""
    source = Path(path).expanduser()
    files = sorted(source.glob("*.jsonl")) if source.is_dir() else [source]
    steps: dict[int, list[JudgedRollout]] = {}
    for file in files:
        for step, item in _read_file(file):
            steps.setdefault(step, []).append(item)
    if not steps:
        raise DataError(f"{source} holds no rollouts; expected rows as RUN/rollouts has them")
    return [steps[step] for step in sorted(steps)]


def _read_file(file: Path) -> Iterator[tuple[int, JudgedRollout]]:
    for line, row in read_rows(file):
        try:
            yield int(row["step"]), _judged(row)
        except KeyError as missing:
            raise DataError(f"{file}:{line}: {missing} is missing; expected a row as RUN/rollouts has them") from None
        except (TypeError, ValueError) as error:
            raise DataError(f"{file}:{line}: {error}; expected a row as RUN/rollouts has them") from None


def _judged(row: dict[str, Any]) -> JudgedRollout:
    output_ids = tuple(int(token) for token in row["output_ids"])
    logprobs = row.get("engine_logprobs") or [None] * len(output_ids)
    if len(logprobs) != len(output_ids):
        raise ValueError(f"engine_logprobs has {len(logprobs)} entries for {len(output_ids)} output_ids")
    if not isinstance(row["correct"], bool):
        raise ValueError(f"correct is {row['correct']!r}, not true or false")
    prompt = Prompt(str(row["prompt_id"]), tuple(int(token) for token in row["prompt_ids"]), "", "")
    if not prompt.token_ids:
        raise ValueError("prompt_ids is empty")
    rollout = Rollout(
        prompt=prompt,
        sample=int(row["sample"]),
        output_ids=output_ids,
        text=row.get("text") or "",
        engine_logprobs=tuple(math.nan if value is None else float(value) for value in logprobs),
        finish_reason=row["finish_reason"],
        weight_version=int(row.get("weight_version") or 0),
    )
    return JudgedRollout(rollout, Verdict(row["correct"], row.get("extracted"), row.get("error")))
