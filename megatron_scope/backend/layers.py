"""The transformer layer for machines without Transformer Engine: the tested path, on CPU and GPU.

Sequences are packed end to end in one row [T, 1, h]. Rotary angles come from each token's own position and
attention runs per sequence, so no T x T mask exists. Megatron sees an ordinary [s, b, h] input; only the
three modules here know of packing.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F


@dataclasses.dataclass
class PackedSequences(PackedSeqParams):
    """Where each sequence lies in a packed row.

    `positions` int64 [T] is each token's place in its sequence. `runs` groups neighbours of equal length as
    (first token, number of sequences, length), so that they share one attention call. `qkv_format` stays
    None: Megatron then treats the row as [s, b, h] and leaves packing to the modules of this file.
    """

    positions: Tensor | None = None
    runs: tuple[tuple[int, int, int], ...] = ()


def packed_sequences(cu_seqlens: Tensor, positions: Tensor, lengths: list[int]) -> PackedSequences:
    """Describes a packed row: `cu_seqlens` int32 [S+1], `positions` int64 [T], both on the model's device."""
    runs, start = [], 0
    for length, group in itertools.groupby(lengths):
        count = len(list(group))
        runs.append((start, count, length))
        start += count * length
    return PackedSequences(
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        positions=positions,
        runs=tuple(runs),
    )


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension that takes part in sequence parallelism.

    The weight is marked so that Megatron sums its gradient over the tensor-parallel ranks when each of them
    holds a part of the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size] to the same shape and dtype; the mean square is taken in float32."""
        scaled = F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps)
        return scaled.to(x.dtype) * self.weight


class PackedAttention(torch.nn.Module):
    """Causal grouped-query attention within each sequence of a packed row, by scaled_dot_product_attention;
    with `config.window_size` (before, 0) a token sees itself and that many before it.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.scale = softmax_scale
        self.before = -1 if config.window_size is None else config.window_size[0]  # -1: all

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """query [T, 1, heads, d], key and value [T, 1, groups, d] to [T, 1, heads * d]."""
        del attention_mask, attn_mask_type, attention_bias
        if packed_seq_params is None:
            raise ValueError(
                "PackedAttention got no packed_seq_params; expected PackedSequences from packed_sequences()"
            )
        q, k, v = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
            out = self._varlen(q, k, v, packed_seq_params)
        else:
            out = self._per_run(q, k, v, packed_seq_params)
        return out.reshape(out.shape[0], 1, -1)

    def _varlen(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedSequences) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        longest = packed.max_seqlen_q
        assert longest is not None
        return varlen_attn(  # pyright: ignore[reportReturnType]
            q,
            k,
            v,
            packed.cu_seqlens_q,
            packed.cu_seqlens_kv,
            longest,
            longest,
            scale=self.scale,
            window_size=(self.before, 0),
            enable_gqa=k.shape[1] != q.shape[1],
        )

    def _per_run(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedSequences) -> Tensor:
        outputs = []
        for start, count, length in packed.runs:
            rows = slice(start, start + count * length)
            q_nhld, k_nhld, v_nhld = (
                x[rows].view(count, length, x.shape[1], x.shape[2]).transpose(1, 2) for x in (q, k, v)
            )
            mask_ll = self._window_mask(length, q.device)
            out = F.scaled_dot_product_attention(
                q_nhld,
                k_nhld,
                v_nhld,
                attn_mask=mask_ll,
                is_causal=mask_ll is None,
                scale=self.scale,
                enable_gqa=k.shape[1] != q.shape[1],
            )
            outputs.append(out.transpose(1, 2).reshape(count * length, q.shape[1], q.shape[2]))
        return torch.cat(outputs)

    def _window_mask(self, length: int, device: torch.device) -> Tensor | None:
        """Which tokens (columns) each token (row) sees, bool [length, length]; None for all before it."""
        if self.before < 0 or length <= self.before + 1:
            return None
        seen = torch.ones(length, length, dtype=torch.bool, device=device)
        return seen.tril().triu(-self.before)


class PackedRotary(torch.nn.Module):
    """Rotary angles of a packed row from its token positions, with any inverse frequencies.

    Stands in for Megatron's table of positions 0..s: the "length" that Megatron asks for and passes on is the
    positions themselves, so no per-sequence slicing and no device synchronisation is needed.
    """

    def __init__(self, inv_freq: Tensor) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> Tensor:
        packed = kwargs.get("packed_seq_params") or args[-1]
        return packed.positions

    def forward(self, positions: Tensor, **_: Any) -> Tensor:
        """positions int64 [T] to angles float32 [T, 1, 1, d]."""
        angles = torch.outer(positions.float(), self.inv_freq)  # pyright: ignore[reportArgumentType]
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]


def block_spec(config: TransformerConfig, num_layers: int) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage: Megatron's own linear layers with this file's norm and attention."""
    layer: ModuleSpec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, normalization="RMSNorm", qk_layernorm=config.qk_layernorm
    )
    parts: Any = layer.submodules
    parts.input_layernorm = RMSNorm
    parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm
    norm: Any = RMSNorm  # a class serves where the annotation asks for a module
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)
