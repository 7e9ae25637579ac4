"""Distillation losses from hidden states and vocabulary-sharded output tables, a chunk of tokens at a time.

Letters: T tokens, C of a chunk, L columns of this rank's shard, d hidden size. No [T, L] exists: a chunk's
logits of both models are made, joined over the ranks by one all-gather, and overwritten by the gradient in
the student's logits, which goes into the gradients of its hidden states and its table at once. So the
forward pass makes the gradient, and the backward pass only scales it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_scope.kernels import dispatch, gemm, sequence, tiles
from megatron_scope.kernels.tiles import Shard, TokenStatistics, Upstream
from megatron_scope.kernels.vocab_parallel import check_targets, check_teacher_weight, checked_shard

CPU_CHUNK_TOKENS = 128
GPU_CHUNK_TOKENS = 2048  # enough that the float32 sum of the table's gradient is not bound by memory


class Coefficients(NamedTuple):
    """The factor of each statistic in the loss, [T]; None is 0 throughout. That of `teacher_logprob` adds to
    the loss only.
    """

    logprob: Tensor | None = None
    teacher_logprob: Tensor | None = None
    reverse_kl: Tensor | None = None
    forward_kl: Tensor | None = None
    entropy: Tensor | None = None
    jsd: Tensor | None = None


class LossStats(NamedTuple):
    """Statistics of the tokens `tokens` of the call, [T], without gradient; those that need a teacher are
    None without one, `jsd` where no coefficient asks for it.
    """

    logprob: Tensor
    teacher_logprob: Tensor | None
    reverse_kl: Tensor | None
    forward_kl: Tensor | None
    entropy: Tensor
    jsd: Tensor | None
    tokens: slice


def distill_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    targets: Tensor,
    coefficients: Any,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    sequence_parallel: bool = False,
    chunk_tokens: int | None = None,
    jsd_weight: float = 0.5,
) -> tuple[Tensor, LossStats]:
    """The sum over tokens of coefficients.logprob * logprob + coefficients.reverse_kl * reverse_kl + ..., and
       the statistics.

    Shapes: hidden states after the final norm [T, d], weights [V_local, d] (d of student and teacher may
    differ), `targets` int64 [T] with global ids. `coefficients` are `Coefficients` (or another tuple or
    object with some of its fields) of constants [T], or a callable that gets the `LossStats` of a chunk and
    returns those of its tokens; `stats.tokens` says which they are. `jsd` is (1 - b) KL(p||m) + b KL(q||m)
    with m = (1 - b) p + b q and b = `jsd_weight`; a callable sees it as None. Loss and statistics are float32
    (float64 for float64 weights), in nats. `vocab_start`, `vocab_size` and `temperature` are as in
    `vocab_parallel.distill_stats`. Without a teacher (both None) there are log-prob and entropy only.

    Differentiable in `student_hidden` and `student_weight`; the inputs are never modified. The gradient of
    the hidden states is summed over `group`. With `sequence_parallel` each rank passes its own rows of
    `student_hidden` (any number of them; the teacher's rows may be whole or spread likewise), `targets` and
    coefficients are those of all rows in rank order, and each rank gets the gradient of its own rows. Where
    Megatron keeps a `main_grad` on the weight, the weight's gradient is added to it.

    Memory beyond inputs and gradients: 4 bytes a token of a chunk and column for each model, and small tiles.
    The weight's gradient is summed in float32. Every rank of `group` must call it with the same tokens: a
    chunk makes one all-gather, two with `jsd`.

    Raises ValueError on mismatched shapes, sizes of vocabularies, coefficients or groups, and on settings out
    of range.
    """
    if chunk_tokens is None:
        chunk_tokens = GPU_CHUNK_TOKENS if student_hidden.is_cuda else CPU_CHUNK_TOKENS
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; expected 1 or more")
    check_teacher_weight(jsd_weight)
    _check_model("student", student_hidden, student_weight)
    shards = {"student_weight": student_weight.shape[0]}
    if teacher_hidden is not None and teacher_weight is not None:
        _check_model("teacher", teacher_hidden, teacher_weight)
        shards["teacher_weight"] = teacher_weight.shape[0]
        teacher_hidden, teacher_weight = teacher_hidden.detach(), teacher_weight.detach()
    elif teacher_hidden is not None or teacher_weight is not None:
        missing, given = ("hidden", "weight") if teacher_hidden is None else ("weight", "hidden")
        raise ValueError(f"teacher_{missing} is None but teacher_{given} is given; pass both or neither")
    shard = checked_shard(
        widths=shards,
        group=group,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        temperature=temperature,
    )
    check_targets(targets, targets.numel(), vocab_size)
    if not callable(coefficients):
        coefficients = _checked(coefficients, targets.shape[0], teacher_weight is not None)
    spread = sequence_parallel and group is not None and dist.get_world_size(group) > 1
    job = _Job(
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        targets=targets,
        coefficients=coefficients,
        shard=shard,
        sequence_parallel=spread,
        chunk_tokens=chunk_tokens,
        jsd_weight=jsd_weight,
        wants_hidden=torch.is_grad_enabled() and student_hidden.requires_grad,
        wants_weight=torch.is_grad_enabled() and student_weight.requires_grad,
    )
    loss, *values = _DistillLoss.apply(student_hidden, student_weight, job)
    return loss, LossStats(*values, tokens=slice(0, targets.shape[0]))


# ---- checks


def _check_model(name: str, hidden: Tensor, weight: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name}_hidden has shape {tuple(hidden.shape)} but {name}_weight {tuple(weight.shape)}; "
            "expected [T, d] and [V_local, d]"
        )


def _check_rows(name: str, num_rows: int, num_targets: int) -> None:
    if num_rows != num_targets:
        raise ValueError(f"{name} has {num_rows} rows but targets {num_targets}; expected the same tokens")


def _checked(given: Any, num_tokens: int, with_teacher: bool) -> Coefficients:
    """What `given` says of each statistic, checked."""
    names = set(getattr(given, "_fields", Coefficients._fields))
    known = [name for name in Coefficients._fields if getattr(given, name, None) is not None]
    if not names <= set(Coefficients._fields) or not any(hasattr(given, name) for name in names):
        raise ValueError(
            f"coefficients are {type(given).__name__} with {', '.join(sorted(names))}; "
            f"expected some of {', '.join(Coefficients._fields)}"
        )
    for name in known:
        value = getattr(given, name)
        if tuple(value.shape) != (num_tokens,):
            raise ValueError(
                f"coefficients.{name} has shape {tuple(value.shape)} but there are {num_tokens} tokens; "
                f"expected [{num_tokens}]"
            )
        if not with_teacher and name not in ("logprob", "entropy"):
            raise ValueError(f"coefficients.{name} is given but teacher_hidden is None; pass the teacher too")
    return Coefficients(**{name: getattr(given, name).detach() for name in known})


# ---- one call


@dataclasses.dataclass(frozen=True)
class _Job:
    """The constants of a call."""

    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    targets: Tensor
    coefficients: Coefficients | Callable[[LossStats], Any]
    shard: Shard
    sequence_parallel: bool
    chunk_tokens: int
    jsd_weight: float
    wants_hidden: bool
    wants_weight: bool


class _Results:
    """Loss, statistics and gradients of all tokens, filled chunk by chunk."""

    def __init__(self, hidden: Tensor, weight: Tensor, job: _Job) -> None:
        self.dtype = tiles.compute_dtype(weight.dtype)
        self.loss = torch.zeros((), dtype=torch.float64, device=weight.device)
        self.stats: dict[str, Tensor] = {}
        self.hidden_grad = hidden.new_empty(hidden.shape) if job.wants_hidden else None
        self.weight_grad = (
            torch.zeros(weight.shape, dtype=self.dtype, device=weight.device) if job.wants_weight else None
        )
        self._num_tokens = hidden.shape[0]

    def keep(self, stats: LossStats) -> None:
        for name, value in stats._asdict().items():
            if isinstance(value, Tensor):
                whole = self.stats.setdefault(name, value.new_empty(self._num_tokens))
                whole[stats.tokens] = value

    def values(self, with_teacher: bool) -> list[Tensor | None]:
        """The statistics in the order of LossStats; of no tokens at all, empty ones."""
        names = LossStats._fields[:-1]
        if not self._num_tokens:
            never = {"jsd"} if with_teacher else set(names) - {"logprob", "entropy"}
            empty = self.loss.new_empty(0, dtype=self.dtype)
            return [None if name in never else empty.clone() for name in names]
        return [self.stats.get(name) for name in names]


def _run(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor | None, job: _Job) -> _Results:
    """All chunks; `hidden` and `teacher_hidden` hold all rows."""
    results = _Results(hidden, weight, job)
    num_tokens = hidden.shape[0]
    num_models = 1 if job.teacher_weight is None else 2
    shape = (num_models, min(job.chunk_tokens, num_tokens), job.shard.num_valid)
    space = torch.empty(shape, dtype=results.dtype, device=weight.device)
    for start in range(0, num_tokens, job.chunk_tokens):
        tokens = slice(start, min(start + job.chunk_tokens, num_tokens))
        student, *rest = space[:, : tokens.stop - start].unbind()
        gemm.logits(hidden[tokens], weight, student)
        teacher = rest[0] if rest else None
        if teacher is not None:
            assert teacher_hidden is not None and job.teacher_weight is not None
            gemm.logits(teacher_hidden[tokens], job.teacher_weight, teacher)
        token, upstream = _chunk_loss(student, teacher, tokens, job, results)
        if not (job.wants_hidden or job.wants_weight):
            continue
        dz = student.view(weight.dtype)[:, : student.shape[1]]  # over the logits, row on row
        dispatch.logits_gradient(
            student,
            teacher,
            job.targets[tokens],
            token,
            upstream,
            job.shard,
            teacher_weight=job.jsd_weight,
            out=dz,
        )
        if results.hidden_grad is not None:
            gemm.hidden_gradient(dz, weight, results.hidden_grad[tokens])
        if results.weight_grad is not None:
            gemm.add_weight_gradient(dz, hidden[tokens], results.weight_grad)
    return results


def _chunk_loss(
    student: Tensor, teacher: Tensor | None, tokens: slice, job: _Job, results: _Results
) -> tuple[TokenStatistics, Upstream]:
    """Adds a chunk's loss and statistics to the results; returns what its gradient needs."""
    token = dispatch.gathered_statistics(student, teacher, job.targets[tokens], job.shard)
    stats = LossStats(
        logprob=token.logprob,
        teacher_logprob=token.teacher_logprob,
        reverse_kl=token.reverse_kl,
        forward_kl=token.forward_kl,
        entropy=token.entropy,
        jsd=None,
        tokens=tokens,
    )
    if isinstance(job.coefficients, Coefficients):
        factors = Coefficients(*(None if value is None else value[tokens] for value in job.coefficients))
    else:
        factors = _checked(job.coefficients(stats), tokens.stop - tokens.start, teacher is not None)
    if factors.jsd is not None:
        assert teacher is not None
        token, jsd = dispatch.with_mixture(student, teacher, token, job.shard, job.jsd_weight)
        stats = stats._replace(jsd=jsd)
    results.keep(stats)
    for name, factor in factors._asdict().items():
        if factor is not None:
            results.loss += tiles.times(factor.double(), getattr(stats, name).double()).sum()
    wide = {
        name: factor.to(results.dtype)
        for name, factor in factors._asdict().items()
        if factor is not None and name in Upstream._fields
    }
    return token, Upstream(**wide)


class _DistillLoss(torch.autograd.Function):
    """Forward: the loss and its gradient. Backward: the gradient times the upstream one, no collective."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, job: _Job) -> tuple[Tensor | None, ...]:
        results = _evaluate(hidden, weight, job)
        ctx.job, ctx.gradients = job, (results.hidden_grad, results.weight_grad)
        ctx.save_for_backward(hidden, weight)
        stats = results.values(job.teacher_weight is not None)
        ctx.mark_non_differentiable(*(value for value in stats if value is not None))
        return results.loss.to(results.dtype), *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        hidden, weight = ctx.saved_tensors
        if ctx.gradients is None:  # a second pass through a graph that was retained: make them again
            results = _evaluate(hidden, weight, ctx.job)
            ctx.gradients = (results.hidden_grad, results.weight_grad)
        # Scaled where they lie, since a copy of the table's gradient would be the largest tensor of all.
        (hidden_grad, weight_grad), ctx.gradients = ctx.gradients, None
        if hidden_grad is not None:
            hidden_grad.mul_(grad_outputs[0])
        if weight_grad is not None:
            weight_grad = _hand_over(weight_grad.mul_(grad_outputs[0]), weight)
        return hidden_grad, weight_grad, None


def _evaluate(hidden: Tensor, weight: Tensor, job: _Job) -> _Results:
    """The results with the gradient of this rank's own hidden states, summed over the group."""
    whole, teacher_hidden, counts = _whole_rows(hidden, job)
    results = _run(whole, weight, teacher_hidden, job)
    group, grad = job.shard.group, results.hidden_grad
    if grad is not None and group is not None and dist.get_world_size(group) > 1:
        if job.sequence_parallel:
            results.hidden_grad = sequence.sum_to_owners(grad, counts, group)
        else:
            dist.all_reduce(grad, group=group)
    return results


def _whole_rows(hidden: Tensor, job: _Job) -> tuple[Tensor, Tensor | None, list[int]]:
    """All rows of the student's and the teacher's hidden states, and each rank's number of the former."""
    num_targets, teacher_hidden, group = job.targets.shape[0], job.teacher_hidden, job.shard.group
    counts = [hidden.shape[0]]
    if job.sequence_parallel:
        assert group is not None
        everyone = sequence.row_counts(group, hidden, teacher_hidden)
        counts, teacher_counts = [pair[0] for pair in everyone], [pair[1] for pair in everyone]
        _check_rows("student_hidden of all ranks", sum(counts), num_targets)
        hidden = sequence.gather_rows(hidden, counts, group)
        if teacher_hidden is not None and any(count != num_targets for count in teacher_counts):
            _check_rows("teacher_hidden of all ranks", sum(teacher_counts), num_targets)
            teacher_hidden = sequence.gather_rows(teacher_hidden, teacher_counts, group)
    else:
        _check_rows("student_hidden", hidden.shape[0], num_targets)
        if teacher_hidden is not None:
            _check_rows("teacher_hidden", teacher_hidden.shape[0], num_targets)
    return hidden, teacher_hidden, counts


def _hand_over(gradient: Tensor, weight: Tensor) -> Tensor | None:
    """Adds to Megatron's main_grad where the weight has one, as its own fused linear layer does; otherwise
    the gradient in the weight's dtype.
    """
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is None:
        return gemm.narrowed(gradient, weight.dtype)
    main_grad.add_(gradient)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    # Megatron's hook on the weight must run and find a gradient. It is zero, for what a tied embedding adds
    # to it still counts.
    weight.grad_added_to_main_grad = True  # pyright: ignore[reportAttributeAccessIssue]
    return torch.zeros_like(weight)
