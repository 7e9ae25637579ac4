"""Running packed micro-batches through Megatron's pipeline schedule, with a hook on the last stage's hidden
states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_scope.backend.layers import packed_sequences
from megatron_scope.backend.model import StageModel
from megatron_scope.backend.setup import Ranks
from megatron_scope.kernels.fused_linear import Coefficients, LossStats, distill_loss
from megatron_scope.records import MicroBatch

Hook = Callable[[MicroBatch, Tensor], Any]


def run(
    module: torch.nn.Module,
    micro_batches: Sequence[MicroBatch],
    ranks: Ranks,
    hook: Callable[[MicroBatch, Tensor], Any],
    *,
    backward: bool,
    reduce: bool = True,
    force_all_reduce: bool = False,
) -> list[Any]:
    """Runs every micro-batch through the pipeline and returns what `hook` returned for each, on the last
    stage (else []).

    `hook(micro_batch, hidden)` gets the final hidden states [R, h] of the response rows. With `backward` it
    must return (loss_sum, data): the gradient of the plain sum of losses is added to main_grad, and data is
    collected. The last run that adds to a gradient must `reduce` it over the replicas; `force_all_reduce`
    leaves the whole of it on each. Without `backward`, `hook` runs under no_grad and its result is collected.
    """

    def forward_step(
        batches: Iterator[MicroBatch], model: torch.nn.Module
    ) -> tuple[Tensor, Callable[..., Any]]:
        micro_batch = next(batches)
        hidden = model(**_model_inputs(micro_batch, ranks.device))
        return hidden, partial(_at_last_stage, micro_batch, hook)

    unreduced = _gradients_stay_here(module) if backward and not reduce else contextlib.nullcontext()
    with torch.set_grad_enabled(backward), unreduced:
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=[module],
            num_microbatches=len(micro_batches),
            seq_length=0,  # unused: variable_seq_lengths
            micro_batch_size=1,
            forward_only=not backward,
            collect_non_loss_data=not backward,
            force_all_reduce=force_all_reduce,
        )


@contextlib.contextmanager
def _gradients_stay_here(module: Any) -> Iterator[None]:
    """Holds back the reduction that Megatron's schedules end in."""
    config = module.config
    finalize, config.finalize_model_grads_func = config.finalize_model_grads_func, None
    try:
        yield
    finally:
        config.finalize_model_grads_func = finalize


def _at_last_stage(micro_batch: MicroBatch, hook: Hook, output: Tensor, non_loss_data: bool = False) -> Any:
    hidden = output.squeeze(0)[torch.from_numpy(micro_batch.rows).to(output.device)]
    result = hook(micro_batch, hidden)
    if non_loss_data:
        return result
    loss, data = result
    return loss, 0, data  # no token count: the loss is already a sum of final coefficients


def _model_inputs(micro_batch: MicroBatch, device: torch.device) -> dict[str, Any]:
    positions = torch.from_numpy(micro_batch.positions).to(device)
    packed = packed_sequences(
        torch.from_numpy(micro_batch.cu_seqlens).to(device),
        positions,
        np.diff(micro_batch.cu_seqlens).tolist(),
    )
    return {
        "input_ids": torch.from_numpy(micro_batch.tokens).to(device).unsqueeze(0),
        "position_ids": positions.unsqueeze(0),
        "attention_mask": None,
        "packed_seq_params": packed,
    }


def token_statistics(
    stage: StageModel, ranks: Ranks, hidden: Tensor, targets: np.ndarray, temperature: float
) -> LossStats:
    """Log-probs and entropy [R] of the targets under a model's output table, at a temperature; without
    gradient, a chunk of rows at a time.
    """
    with torch.no_grad():
        _, stats = distill_loss(
            hidden,
            stage.output_weight(),
            None,
            None,
            torch.from_numpy(targets).to(hidden.device),
            Coefficients(),
            group=ranks.tensor_group if ranks.tensor_size > 1 else None,
            vocab_start=stage.vocab_start,
            vocab_size=stage.vocab_size,
            temperature=temperature,
        )
    return stats
