"""Peak memory of one training step with an exact divergence, beside the same trainer on whole logits.

    python benchmarks/trainer_memory.py [--out benchmarks/results]

A two-layer student and teacher with a vocabulary of real size take one step of SCOPE with
`objective.divergence: reverse_kl` on replayed incorrect responses, all in one micro-batch, float32, one rank
on a CPU. The rival is the same trainer whose token loss makes the logits of both models for all rows and
leaves the rest to torch. Each run is a fresh process, in turns. Extra memory is the peak over what the
process held before the step. Loss and gradient of the two are compared. Needs Linux and, at the default
sizes, 18 GB of free memory.
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
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import process_memory  # noqa: E402  (needs the path)
from kernels import processor  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from megatron_scope.backend import setup, update  # noqa: E402
from megatron_scope.backend.token_loss import TokenLoss, TokenOutcome  # noqa: E402
from megatron_scope.config import parse_config  # noqa: E402
from megatron_scope.objective.losses import TokenTerms  # noqa: E402
from megatron_scope.records import MicroBatch  # noqa: E402
from megatron_scope.trainer import Trainer  # noqa: E402
from tests.helpers.models import CHARACTERS, save_llama, save_qwen2  # noqa: E402
from tests.helpers.rollouts import write_rows  # noqa: E402

OURS, RIVAL = "ours", "whole logits"
STAGES = ("score", "update")
HIDDEN = (256, 512)  # of student and teacher
NUM_RESPONSES, PROMPT_TOKENS = 8, 2


class WholeLogits(TokenLoss):
    """The same loss from logits [R, V] of both models by torch's own log_softmax and kl_div, differentiated
    by autograd. All rows must be distilled, on one rank.
    """

    def __call__(self, micro_batch: MicroBatch, hidden: Tensor, terms: TokenTerms) -> TokenOutcome:
        teacher = self.teacher
        assert teacher is not None and self.ranks.tensor_size == 1
        targets = torch.from_numpy(micro_batch.targets).unsqueeze(1)
        p = self._logprobs(hidden, self.student.output_weight())
        logprob = p.gather(1, targets).squeeze(1)
        # Only for the metrics; row by row, so that it adds nothing to the peak.
        entropy = torch.stack([-(row.exp() * row).sum() for row in p.detach()])
        with torch.no_grad():
            theirs = teacher.hidden.rows(list(dict.fromkeys(micro_batch.response.tolist()))) * teacher.scale
            q = self._logprobs(theirs, teacher.stage.output_weight())
        divergence = F.kl_div(q, p, reduction="none", log_target=True).sum(dim=1)
        loss = self.loss_of(terms._replace(logprob=logprob, divergence=divergence))
        return TokenOutcome(loss, loss.detach(), logprob.detach(), entropy, divergence.detach())

    def _logprobs(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return torch.log_softmax(hidden @ weight[: self.student.vocab_size].T / self.temperature, dim=-1)


class MeasuredTrainer(Trainer):
    """Notes the seconds and the extra memory of the step and of its two large stages."""

    def step(self, step: int) -> dict[str, Any]:
        self.before, self.highest = process_memory.begin(), 0
        self.stages: dict[str, dict[str, float]] = {}
        row = super().step(step)
        self._note_peak()
        return row

    def score(self, *arguments: Any) -> Any:
        return self._measured("score", super().score, arguments)

    def update(self, *arguments: Any) -> Any:
        return self._measured("update", super().update, arguments)

    def _note_peak(self) -> int:
        peak = process_memory.resident_bytes("VmHWM") - self.before
        self.highest = max(self.highest, peak)
        return peak

    def _measured(self, stage: str, run: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        self._note_peak()
        process_memory.begin()
        started = time.perf_counter()
        result = run(*arguments)
        seconds = time.perf_counter() - started
        self.stages[stage] = {"seconds": seconds, "extra_bytes": self._note_peak()}
        return result


def run_once(contestant: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The step in this process."""
    torch.set_num_threads(1)
    config = parse_config(settings, "benchmark")
    ranks = setup.initialize(config.parallel)
    token_loss = WholeLogits if contestant == RIVAL else TokenLoss
    with unittest.mock.patch.object(update, "TokenLoss", token_loss):
        trainer = MeasuredTrainer(config, ranks, resume=False)
        trainer.run()
    (row,) = trainer.folder.read_metrics()
    setup.shutdown()
    return {
        "extra_bytes": trainer.highest,
        "held_bytes": trainer.before,
        "stages": trainer.stages,
        "metrics": {key: row[key] for key in ("loss", "grad_norm", "divergence_incorrect", "entropy")},
    }


# ---- what the processes get


def make_models(folder: Path, vocab: int, num_tokens: int) -> dict[str, Path]:
    """Both models, of different families and widths, with a tokenizer whose tokens are the first ids."""
    sizes = {"rows": vocab, "max_position_embeddings": num_tokens}
    student, teacher = HIDDEN
    own = {"hidden_size": student, "intermediate_size": 2 * student, "num_hidden_layers": 2}
    other = {"hidden_size": teacher, "intermediate_size": 2 * teacher, "num_hidden_layers": 2}
    return {
        "student": save_qwen2(folder / "student", seed=1, **own, **sizes),
        "teacher": save_llama(folder / "teacher", seed=2, **other, **sizes),
    }


def incorrect_rows(vocab: int, num_tokens: int) -> list[dict[str, Any]]:
    """Wrong responses of random tokens, `num_tokens` with their prompts."""
    random = np.random.default_rng(0)
    length = num_tokens // NUM_RESPONSES - PROMPT_TOKENS
    return [
        {
            "step": 1,
            "prompt_id": f"p{number // 4}",
            "sample": number % 4,
            "prompt_ids": random.integers(0, len(CHARACTERS), PROMPT_TOKENS).tolist(),
            "output_ids": random.integers(0, vocab, length).tolist(),
            "text": "",
            "engine_logprobs": [-10.0] * length,
            "finish_reason": "length",
            "weight_version": 0,
            "correct": False,
            "extracted": None,
        }
        for number in range(NUM_RESPONSES)
    ]


def settings_of(models: dict[str, Path], rows: Path, out: Path, num_tokens: int) -> dict[str, Any]:
    return {
        "run": {"output_dir": str(out), "steps": 1, "dump_gradients": str(out) + ".safetensors"},
        "student": {"hf": str(models["student"])},
        "teacher": {"hf": str(models["teacher"])},
        "rollout": {"engine": "replay", "file": str(rows)},
        "objective": {"divergence": "reverse_kl"},
        "train": {"precision": "float32", "micro_batch_tokens": num_tokens},
        "checkpoint": {"every": 0},
    }


# ---- the comparison


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs of each contestant, and how far loss and gradient lie apart (relative, gradient in L2)."""

    runs: dict[str, list[dict[str, Any]]]
    loss_error: float
    gradient_error: float

    def median_bytes(self, contestant: str, stage: str | None = None) -> float:
        runs = self.runs[contestant]
        return statistics.median(
            run["extra_bytes"] if stage is None else run["stages"][stage]["extra_bytes"] for run in runs
        )

    def median_seconds(self, contestant: str, stage: str) -> float:
        return statistics.median(run["stages"][stage]["seconds"] for run in self.runs[contestant])


def compare(vocab: int, num_tokens: int, repeats: int) -> Comparison:
    runs: dict[str, list[dict[str, Any]]] = {OURS: [], RIVAL: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = make_models(folder, vocab, num_tokens)
        rows = write_rows(folder / "rows.jsonl", incorrect_rows(vocab, num_tokens))
        for repeat in range(repeats):
            for contestant, found in runs.items():
                out = folder / contestant.replace(" ", "_")
                settings = settings_of(models, rows, out, num_tokens)
                argv = [sys.executable, "-W", "ignore", __file__, "--child", contestant, json.dumps(settings)]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                process = subprocess.run(argv, stdout=subprocess.PIPE, text=True, env=environment)
                if process.returncode:
                    raise SystemExit(f"{contestant} ended with {process.returncode}; is memory short?")
                found.append(json.loads(process.stdout.splitlines()[-1]))
                extra = found[-1]["extra_bytes"] / 1e9
                print(f"{repeat + 1} of {repeats}: {contestant} {extra:.2f} GB", file=sys.stderr)
        gradients = [load_file(folder / f"{name.replace(' ', '_')}.safetensors") for name in runs]
    losses = [found[-1]["metrics"]["loss"] for found in runs.values()]
    return Comparison(runs, abs(losses[0] / losses[1] - 1), relative_l2(*gradients))


def relative_l2(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    apart = sum((ours[name].double() - value).square().sum().item() for name, value in theirs.items())
    return (apart / sum(value.double().square().sum().item() for value in theirs.values())) ** 0.5


def report(comparison: Comparison, about: dict[str, Any]) -> str:
    lines = [
        "| | extra GB of the step | of scoring | of the update | seconds of scoring | of the update | loss | "
        "gradient norm |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for contestant, runs in comparison.runs.items():
        memory = [f"{comparison.median_bytes(contestant, stage) / 1e9:.2f}" for stage in (None, *STAGES)]
        found = [run["extra_bytes"] / 1e9 for run in runs]
        memory[0] += f" ({min(found):.2f} to {max(found):.2f})"
        seconds = [comparison.median_seconds(contestant, stage) for stage in STAGES]
        metrics = runs[-1]["metrics"]
        lines.append(
            f"| {contestant} | {' | '.join(memory)} | "
            f"{' | '.join(f'{value:.1f}' for value in seconds)} | {metrics['loss']:.7f} | "
            f"{metrics['grad_norm']:.7f} |"
        )
    share = comparison.median_bytes(OURS) / comparison.median_bytes(RIVAL)
    return (
        f"One step with `objective.divergence: reverse_kl`; medians of {len(comparison.runs[OURS])} fresh "
        f"processes in turns; {', '.join(f'{name} {value}' for name, value in about.items())}.\n\n"
        + "\n".join(lines)
        + f"\n\nOurs needs {share:.3f} of the other's extra memory. Relative difference of the losses "
        f"{comparison.loss_error:.0e}, of the gradients (L2) {comparison.gradient_error:.0e}.\n"
        "Extra memory is the peak over what the process held before the step (models and the gradient's "
        "buffers); the optimizer's state, which\nthe first step makes, and the written gradient are in it.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of a step with an exact divergence.")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--tokens", type=int, default=4096, help="of the one micro-batch, prompts included")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=2, metavar=("CONTESTANT", "SETTINGS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run_once(options.child[0], json.loads(options.child[1]))))
        return
    comparison = compare(options.vocab, options.tokens, options.repeats)
    about = {
        "V": options.vocab,
        "tokens": options.tokens,
        "hidden sizes": f"{HIDDEN[0]} and {HIDDEN[1]}",
        "layers": 2,
        "dtype": "float32",
        "cores": os.cpu_count(),
        "processor": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    text = report(comparison, about)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    found = {"about": about, **dataclasses.asdict(comparison)}
    (options.out / "trainer_memory.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.out / "trainer_memory.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
