"""Made-up recorded rollouts, to be replayed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


def random_rows(
    *, num_prompts: int, num_samples: int, vocab_size: int, seed: int = 0, step: int = 1
) -> list[dict[str, Any]]:
    """Rows as RUN/rollouts has them: mixed and one-sided groups, response lengths from 1 to 12."""
    rng = np.random.default_rng(seed)
    rows = []
    for prompt in range(num_prompts):
        prompt_ids = rng.integers(0, vocab_size, rng.integers(2, 8)).tolist()
        chance = (0.0, 0.5, 1.0)[prompt % 3]
        for sample in range(num_samples):
            output_ids = rng.integers(0, vocab_size, rng.integers(1, 13)).tolist()
            rows.append(
                {
                    "step": step,
                    "prompt_id": f"p{prompt}",
                    "sample": sample,
                    "prompt_ids": prompt_ids,
                    "output_ids": output_ids,
                    "text": "",
                    "engine_logprobs": rng.uniform(-3, 0, len(output_ids)).tolist(),
                    "finish_reason": "stop",
                    "weight_version": 0,
                    "correct": bool(rng.random() < chance),
                    "extracted": None,
                }
            )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
