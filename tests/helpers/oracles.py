"""The objectives once more, in float64 and plain loops, written from the papers alone: what the trainer must
equal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

Row = dict[str, Any]


def load(folder: Path) -> Any:
    """A model of transformers in float64."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def logprobs(model: Any, row: Row, vocab_size: int, temperature: float = 1.0) -> Tensor:
    """Log-probs of a row's response tokens over the first `vocab_size` ids, with gradient."""
    ids = torch.tensor([row["prompt_ids"] + row["output_ids"]])
    logits = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1, :vocab_size] / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(row["output_ids"])[:, None])[:, 0]


def distributions(model: Any, row: Row, vocab_size: int, temperature: float = 1.0) -> Tensor:
    """Log-probs [|y|, V] of every id at each response token, with gradient."""
    ids = torch.tensor([row["prompt_ids"] + row["output_ids"]])
    logits = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1, :vocab_size]
    return torch.log_softmax(logits / temperature, -1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probs [T, V], [T]."""
    return (p.exp() * (p - q)).sum(-1)


def _jsd(p: Tensor, q: Tensor) -> Tensor:
    mixture = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0, dtype=p.dtype))
    return (_kl(p, mixture) + _kl(q, mixture)) / 2


# Of the student's and the teacher's log-probs.
DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reverse_kl": _kl,
    "forward_kl": lambda student, teacher: _kl(teacher, student),
    "jsd": _jsd,
}


@dataclasses.dataclass(frozen=True)
class Batch:
    """One update's rows with their response log-probs; `student` carries the gradient, `old` is the student
    at the start of the step.
    """

    rows: Sequence[Row]
    student: Sequence[Tensor]
    old: Sequence[Tensor]
    teacher: Sequence[Tensor]
    reference: Sequence[Tensor]
    # Log-probs [|y|, V] of all ids, for divergences over the vocabulary.
    student_all: Sequence[Tensor] = ()
    teacher_all: Sequence[Tensor] = ()
    # Of a correction: `old` at rollout temperature, where it is not `old`, and the largest factor.
    old_at_rollout: Sequence[Tensor] = ()
    correction_cap: float | None = None

    def groups(self) -> list[list[int]]:
        """The places of each prompt's responses."""
        prompts = dict.fromkeys(row["prompt_id"] for row in self.rows)
        return [[i for i, row in enumerate(self.rows) if row["prompt_id"] == prompt] for prompt in prompts]

    def ratio(self, i: int) -> Tensor:
        return torch.exp(self.student[i] - self.old[i])

    def engine_ratio(self, i: int) -> Tensor:
        """pi_old / pi_engine of a row's tokens, as the engine drew them."""
        engine = torch.tensor(self.rows[i]["engine_logprobs"], dtype=torch.float64)
        return torch.exp((self.old_at_rollout or self.old)[i] - engine)

    def factor(self, i: int) -> Tensor:
        """What multiplies an expectation over the engine's draws."""
        if self.correction_cap is None:
            return torch.ones((), dtype=torch.float64)
        return torch.minimum(self.engine_ratio(i), torch.tensor(self.correction_cap, dtype=torch.float64))

    def tokens(self, correct_only: bool = False) -> int:
        return sum(len(row["output_ids"]) for row in self.rows if row["correct"] or not correct_only)


Loss = Callable[[Batch], Tensor]


def _sets(
    batch: Batch, student_power: float, teacher_power: float
) -> Iterator[tuple[int, bool, Tensor, int]]:
    """(place, correct, weight, set size); weights are PPL^power normalised over a prompt's set (Eq. 4, 5)."""
    for group in batch.groups():
        for correct in (True, False):
            members = [i for i in group if batch.rows[i]["correct"] == correct]
            scores, power = (batch.old, student_power) if correct else (batch.teacher, teacher_power)
            powers = [torch.exp(-scores[i].mean()) ** power for i in members]
            for i, value in zip(members, powers, strict=True):
                yield i, correct, (value / sum(powers)).detach(), len(members)


def scope(student_power: float = 1.0, teacher_power: float = -1.0, divergence: str = "sampled") -> Loss:
    """Eq. 6 of arXiv:2604.10688; a power is exponent / tau."""

    def loss(batch: Batch) -> Tensor:
        total, num_prompts = torch.zeros((), dtype=torch.float64), len(batch.groups())
        for i, correct, weight, _ in _sets(batch, student_power, teacher_power):
            if correct:
                total = total - weight * (batch.factor(i) * batch.ratio(i)).sum() / num_prompts
            elif divergence == "sampled":
                log_ratio = (batch.student[i] - batch.teacher[i]).detach()
                sampled = batch.factor(i) * batch.ratio(i) * log_ratio
                total = total + weight * sampled.sum() / num_prompts
            else:
                exact = DIVERGENCES[divergence](batch.student_all[i], batch.teacher_all[i])
                total = total + weight * exact.sum() / num_prompts
        return total

    return loss


def official(batch: Batch) -> Tensor:
    """The authors' code: reversed student weights, mean one, plain log-likelihood, two token means."""
    total = torch.zeros((), dtype=torch.float64)
    for i, correct, weight, size in _sets(batch, -1.0, -1.0):
        if correct:
            likelihood = (batch.factor(i) * batch.student[i]).sum()
            total = total - weight * size * likelihood / batch.tokens(correct_only=True)
        else:
            log_ratio = (batch.student[i] - batch.teacher[i]).detach()
            sampled = batch.factor(i) * batch.ratio(i) * log_ratio
            total = total + weight * size * sampled.sum() / batch.tokens()
    return total


def exact_opd(batch: Batch) -> Tensor:
    """The forward KL over the vocabulary on every response."""
    total = torch.zeros((), dtype=torch.float64)
    for group in batch.groups():
        for i in group:
            exact = DIVERGENCES["forward_kl"](batch.student_all[i], batch.teacher_all[i])
            total = total + exact.sum() / len(group) / len(batch.groups())
    return total


def opd(batch: Batch) -> Tensor:
    """Eq. 3 on every response, the mean over prompts of the mean over samples."""
    total = torch.zeros((), dtype=torch.float64)
    for group in batch.groups():
        for i in group:
            log_ratio = (batch.student[i] - batch.teacher[i]).detach()
            sampled = batch.factor(i) * batch.ratio(i) * log_ratio
            total = total + sampled.sum() / len(group) / len(batch.groups())
    return total


def grpo(clip: float, kl_coefficient: float) -> Loss:
    """arXiv:2402.03300 with one global token mean."""

    def loss(batch: Batch) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for group in batch.groups():
            rewards = torch.tensor([float(batch.rows[i]["correct"]) for i in group], dtype=torch.float64)
            std = rewards.std() if len(group) > 1 else 0.0
            for i, reward in zip(group, rewards, strict=True):
                advantage = (reward - rewards.mean()) / (std + 1e-6)
                ratio = batch.ratio(i)
                surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
                difference = batch.reference[i] - batch.student[i]
                k3 = difference.exp() - difference - 1
                total = total + (kl_coefficient * k3 - batch.factor(i) * surrogate).sum() / batch.tokens()
        return total

    return loss


def nll(batch: Batch) -> Tensor:
    """Mean negative log-likelihood of all response tokens."""
    return -torch.cat(list(batch.student)).mean()


def gradients(model: Any) -> dict[str, Tensor]:
    """The gradient by Hugging Face name; zero where none arrived."""
    return {
        name: torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in model.named_parameters()
    }


def norm(tensors: dict[str, Tensor]) -> float:
    """The L2 norm of all tensors together."""
    return float(sum(value.double().square().sum() for value in tensors.values()) ** 0.5)


def relative_l2(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """|got - expected| / |expected| over all tensors; the names must agree."""
    assert got.keys() == expected.keys()
    difference = {name: got[name].double() - expected[name].double() for name in expected}
    return norm(difference) / norm(expected)
