"""Megatron-core GPT models from stored weights, ending in final hidden states."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megatron_scope.backend.layers import PackedRotary, block_spec
from megatron_scope.backend.setup import Ranks
from megatron_scope.config.schema import Precision, Recompute, TrainConfig
from megatron_scope.convert.mapping import Entry, ModelSource, load_stage, stage_entries
from megatron_scope.convert.shape import Mixture, ModelShape, check_layout, check_trainable, spread_layers

DTYPES = {Precision.FLOAT32: torch.float32, Precision.BFLOAT16: torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class StageModel:
    """This rank's part of one model and what the rest of the backend needs to know of it.

    `entries` are those of its stage on each rank of the expert group, in order; one list for a dense model.
    """

    module: GPTModel
    config: TransformerConfig
    source: ModelSource
    entries: list[list[Entry]]
    vocab_start: int
    vocab_size: int

    @property
    def shape(self) -> ModelShape:
        return self.source.shape

    def output_weight(self) -> Tensor:
        """This rank's shard [V_local, h] of the output table; the embedding's where the two are tied."""
        if self.shape.tied_embeddings:
            return self.module.shared_embedding_or_output_weight()
        weight = self.module.output_layer.weight
        assert weight is not None  # only a tied layer has none of its own
        return weight


def build(
    source: ModelSource,
    ranks: Ranks,
    train: TrainConfig,
    *,
    padded_vocab: int,
    vocab_size: int,
    sequence_parallel: bool,
    pipeline_layers: tuple[int, ...] | None,
    trainable: bool,
) -> StageModel:
    """This rank's stage of the model in `source`, with its weights.

    `padded_vocab` is the table size that both models of a run share, `vocab_size` the columns that count.
    Raises ConfigError when the model cannot be split over the layout or trained at it, DataError when the
    source is not what its config.json says.
    """
    shape = source.shape
    stage_sizes = pipeline_layers or spread_layers(shape.num_layers, ranks.pipeline_size)
    # A dense model beside one with experts does without expert parallelism.
    expert_size = ranks.expert_size if shape.mixture else 1
    check_layout(shape, ranks.tensor_size, stage_sizes, str(source.path), expert_size)
    if trainable:
        check_trainable(shape, ranks.tensor_size, sequence_parallel, stage_sizes, str(source.path))
    config = _transformer_config(shape, ranks, train, sequence_parallel, stage_sizes, trainable)
    module = _module(shape, config, ranks, padded_vocab, stage_sizes)
    first_layer = sum(stage_sizes[: ranks.pipeline_rank])
    layers = range(first_layer, first_layer + stage_sizes[ranks.pipeline_rank])
    ends = {"first": ranks.is_first_stage, "last": ranks.is_last_stage}
    entries = [
        stage_entries(source.family, shape, padded_vocab, layers, **ends, experts=experts)
        for experts in _experts(shape, expert_size)
    ]
    parameters = dict(module.named_parameters())
    mine = entries[ranks.expert_rank % len(entries)]
    load_stage(parameters, mine, source, ranks.tensor_rank, ranks.tensor_size)
    for entry in mine:
        _mark(parameters[entry.parameter], entry)
    source.close()
    module.requires_grad_(trainable)
    module.train(trainable)
    return StageModel(
        module=module,
        config=config,
        source=source,
        entries=entries,
        vocab_start=ranks.tensor_rank * (padded_vocab // ranks.tensor_size),
        vocab_size=vocab_size,
    )


def _experts(shape: ModelShape, expert_size: int) -> list[range]:
    """The global numbers of the experts that each rank of the expert group holds; none in a dense model."""
    count = shape.mixture.num_experts // expert_size if shape.mixture else 0
    return [range(rank * count, (rank + 1) * count) for rank in range(expert_size)]


def _mark(parameter: torch.nn.Parameter, entry: Entry) -> None:
    """Says of which ranks a parameter's gradient is the sum, and on which it counts in the norm.

    Megatron marks tensor-parallel shards only when it initialises weights itself; the norm counts unmarked
    parameters on tensor rank 0 alone. Experts, which no tensor rank shares, count on every rank.
    """
    dim: Any = entry.layout.split_dim if entry.expert is None else -1
    if dim is not None and not getattr(parameter, "tensor_model_parallel", False):
        tensor_parallel.set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)
    if entry.expert is not None:
        # Reduces over all ranks that hold the expert, tensor ranks too; Megatron says so only where experts
        # are spread (tensor_parallel/layers.py).
        parameter.allreduce = False  # pyright: ignore[reportAttributeAccessIssue]


def _transformer_config(
    shape: ModelShape,
    ranks: Ranks,
    train: TrainConfig,
    sequence_parallel: bool,
    stage_sizes: tuple[int, ...],
    trainable: bool,
) -> TransformerConfig:
    dtype = DTYPES[train.precision]
    on_cpu = ranks.device.type == "cpu"
    layout = None
    if ranks.pipeline_size > 1:
        rows = [[LayerType.decoder] * size for size in stage_sizes]
        rows[0].insert(0, LayerType.embedding)
        rows[-1].append(LayerType.loss)
        layout = PipelineParallelLayerLayout(rows, ranks.pipeline_size)
    recompute = train.recompute if trainable else Recompute.NONE
    window = None if shape.sliding_window is None else (shape.sliding_window - 1, 0)
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        # Also makes Megatron sum the two norms' gradients over the tensor ranks: each has some heads only.
        qk_layernorm=shape.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=ranks.tensor_size,
        pipeline_model_parallel_size=ranks.pipeline_size,
        pipeline_model_parallel_layout=layout,
        sequence_parallel=sequence_parallel and ranks.tensor_size > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        variable_seq_lengths=True,
        window_size=window,
        **_mixture_settings(shape.mixture, ranks),
        moe_token_dispatcher_type="alltoall",  # what variable_seq_lengths asks for, even of a dense model
        calculate_per_token_loss=True,  # the hook's sums reach the gradient undivided
        use_cpu_initialization=on_cpu,
        perform_initialization=False,  # every parameter is read from the source
        # Fusions need CUDA extensions or a compiler; each is a later choice of the GPU path.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        recompute_granularity=None if recompute is Recompute.NONE else recompute.value,
        recompute_method="uniform" if recompute is Recompute.FULL else None,
        recompute_num_layers=1 if recompute is Recompute.FULL else None,
        recompute_modules=["core_attn"] if recompute is Recompute.SELECTIVE else None,
    )


def _mixture_settings(mixture: Mixture | None, ranks: Ranks) -> dict[str, Any]:
    if mixture is None:
        return {}
    return {
        "num_moe_experts": mixture.num_experts,
        "moe_ffn_hidden_size": mixture.ffn_hidden_size,
        "moe_router_topk": mixture.experts_per_token,
        # A softmax over the chosen experts alone is one over all of them, normalized.
        "moe_router_pre_softmax": not mixture.normalize_weights,
        "moe_router_dtype": "fp32",
        # No auxiliary loss: its sum over micro-batches would depend on how responses are packed.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": False,
        "expert_model_parallel_size": ranks.expert_size,
        "expert_tensor_parallel_size": 1,
    }


def _module(
    shape: ModelShape,
    config: TransformerConfig,
    ranks: Ranks,
    padded_vocab: int,
    stage_sizes: tuple[int, ...],
) -> GPTModel:
    module = GPTModel(
        config=config,
        transformer_layer_spec=block_spec(config, stage_sizes[ranks.pipeline_rank]),  # pyright: ignore[reportArgumentType]
        vocab_size=padded_vocab,
        max_sequence_length=shape.max_positions,
        pre_process=ranks.is_first_stage,
        post_process=ranks.is_last_stage,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=int(shape.rope_theta),
    )
    rotary: Any = PackedRotary(shape.inverse_frequencies().to(ranks.device))
    module.rotary_pos_emb = rotary
    if ranks.is_last_stage:
        _end_in_hidden_states(module, config)
    return module.to(ranks.device)


def _end_in_hidden_states(module: GPTModel, config: TransformerConfig) -> None:
    """The output layer keeps its weight but hands on its input, whole on every tensor rank.

    The loss hook applies the weight itself, so that logits exist only for the tokens that need them. It sums
    the gradient of the hidden states over the tensor ranks too.
    """

    def hand_on(hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None):
        del weight, runtime_gather_output
        if config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False
            )
        return hidden, None

    layer: Any = module.output_layer
    layer.forward = hand_on
