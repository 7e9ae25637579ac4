"""RUN/rollouts: one JSON row a response, for people to read and for `rollout.engine=replay` to train on
again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from megatron_scope.data.jsonl import read_rows, write_rows_atomically
from megatron_scope.errors import DataError
from megatron_scope.records import FinishReason, JudgedRollout, Prompt, Rollout, Verdict


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
    """Writes a step's rows; `records` are keyed by the rollout's place in `judged`, those left out were
    dropped.
    """
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
    """The recorded steps of a file or a folder of files, in order; DataError names the line of a row that is
    not one.
    """
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
            yield _whole_number(row, "step"), _judged(row)
        except KeyError as missing:
            raise DataError(
                f"{file}:{line}: {missing} is missing; expected a row as RUN/rollouts has them"
            ) from None
        except ValueError as error:
            raise DataError(f"{file}:{line}: {error}; expected a row as RUN/rollouts has them") from None


def _judged(row: dict[str, Any]) -> JudgedRollout:
    output_ids = _token_ids(row, "output_ids")
    if not isinstance(row["correct"], bool):
        raise ValueError(f"correct is {row['correct']!r}, not true or false")
    if row["finish_reason"] not in get_args(FinishReason):
        raise ValueError(
            f"finish_reason is {row['finish_reason']!r}, not one of {', '.join(get_args(FinishReason))}"
        )
    prompt = Prompt(str(row["prompt_id"]), _token_ids(row, "prompt_ids"), "", "")
    if not prompt.token_ids:
        raise ValueError("prompt_ids is empty")
    rollout = Rollout(
        prompt=prompt,
        sample=_whole_number(row, "sample"),
        output_ids=output_ids,
        text=row.get("text") or "",
        engine_logprobs=_logprobs(row.get("engine_logprobs"), len(output_ids)),
        finish_reason=row["finish_reason"],
        weight_version=_whole_number(row, "weight_version") if "weight_version" in row else 0,
    )
    return JudgedRollout(rollout, Verdict(row["correct"], row.get("extracted"), row.get("error")))


def _whole_number(row: dict[str, Any], key: str) -> int:
    if type(row[key]) is not int:
        raise ValueError(f"{key} is {row[key]!r}, not a whole number")
    return row[key]


def _token_ids(row: dict[str, Any], key: str) -> tuple[int, ...]:
    ids = row[key]
    if not isinstance(ids, list) or any(type(token) is not int for token in ids):
        raise ValueError(f"{key} is not a list of whole numbers")
    return tuple(ids)


def _logprobs(values: Any, num_tokens: int) -> tuple[float, ...]:
    """One a token, NaN where the row has null; all NaN when the row has none at all."""
    if values is None:
        return (math.nan,) * num_tokens
    if not isinstance(values, list) or any(type(value) not in (int, float, type(None)) for value in values):
        raise ValueError("engine_logprobs is not a list of numbers or null")
    if len(values) != num_tokens:
        raise ValueError(f"engine_logprobs has {len(values)} entries for {num_tokens} output_ids")
    return tuple(math.nan if value is None else float(value) for value in values)
