"""Each layout there and back, bit for bit, and the interleaving of QKV by hand."""

import dataclasses

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_scope.convert.layouts import QKV, Columns, GateUp, Replicated, Vocabulary
from megatron_scope.convert.shape import ModelShape, padded_vocab_size
from megatron_scope.errors import DataError

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=12,
    ffn_hidden_size=20,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=5,
    vocab_rows=130,
    max_positions=64,
    norm_epsilon=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    tied_embeddings=False,
    qkv_bias=True,
    qk_norm=False,
)
HIDDEN = SHAPE.hidden_size
QUERY, KEY = SHAPE.num_attention_heads * SHAPE.head_dim, SHAPE.num_query_groups * SHAPE.head_dim
PADDED = padded_vocab_size(SHAPE.vocab_rows, 4)

# Layout, the sizes of its Hugging Face tensors, the size of one rank's part at `size` ranks.
CASES = {
    "norm": (Replicated(), [(HIDDEN,)], lambda size: (HIDDEN,)),
    "columns": (Columns(), [(HIDDEN, QUERY)], lambda size: (HIDDEN, QUERY // size)),
    "gate_up": (GateUp(), [(20, HIDDEN)] * 2, lambda size: (40 // size, HIDDEN)),
    "qkv": (
        *(QKV(), [(QUERY, HIDDEN), (KEY, HIDDEN), (KEY, HIDDEN)]),
        lambda size: ((QUERY + 2 * KEY) // size, HIDDEN),
    ),
    "qkv_bias": (QKV(), [(QUERY,), (KEY,), (KEY,)], lambda size: ((QUERY + 2 * KEY) // size,)),
    "vocabulary": (Vocabulary(PADDED), [(130, HIDDEN)], lambda size: (PADDED // size, HIDDEN)),
}


def sources_of(sizes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_cut_joins_to_the_same_bits(case, size, dtype):
    layout, sizes, part_size = CASES[case]
    sources = sources_of(sizes, dtype)
    parts = [layout.shard(sources, SHAPE, rank, size) for rank in range(size)]
    assert [tuple(part.shape) for part in parts] == [part_size(size)] * size
    joined = layout.join(parts, SHAPE)
    assert len(joined) == len(sources)
    for back, source in zip(joined, sources, strict=True):
        assert back.dtype == dtype and torch.equal(back, source)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [2, 4])
def test_slices_of_a_safetensors_file_are_cut_like_tensors(case, size, tmp_path):
    layout, sizes, _ = CASES[case]
    sources = sources_of(sizes)
    names = [str(number) for number in range(len(sources))]
    save_file(dict(zip(names, sources, strict=True)), tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        for rank in range(size):
            part = layout.shard([file.get_slice(name) for name in names], SHAPE, rank, size)
            assert torch.equal(part, layout.shard(sources, SHAPE, rank, size))


@pytest.mark.parametrize("case", CASES)
def test_split_dim_is_the_dimension_that_ranks_cut(case):
    layout, sizes, _ = CASES[case]
    sources = sources_of(sizes)
    whole, half = layout.shard(sources, SHAPE, 0, 1), layout.shard(sources, SHAPE, 0, 2)
    cut = [d for d in range(whole.dim()) if whole.shape[d] != half.shape[d]]
    assert cut == ([] if layout.split_dim is None else [layout.split_dim])


def numbered(*labels):
    """A column of numbers, one a row, from labels like q0."""
    return torch.tensor([[float("qkv".index(label[0]) * 100 + int(label[1:]))] for label in labels])


QKV_SHAPE = dataclasses.replace(
    SHAPE, num_attention_heads=4, num_query_groups=2, head_dim=1, hidden_size=1, ffn_hidden_size=4
)


def test_qkv_is_interleaved_by_query_group():
    sources = [numbered("q0", "q1", "q2", "q3"), numbered("k0", "k1"), numbered("v0", "v1")]
    whole = numbered("q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1")
    assert torch.equal(QKV().shard(sources, QKV_SHAPE, 0, 1), whole)
    for rank in range(2):
        assert torch.equal(QKV().shard(sources, QKV_SHAPE, rank, 2), whole[4 * rank : 4 * rank + 4])
    for joined, source in zip(QKV().join([whole[:4], whole[4:]], QKV_SHAPE), sources, strict=True):
        assert torch.equal(joined, source)


def test_the_rows_of_a_head_stay_together():
    shape = dataclasses.replace(QKV_SHAPE, head_dim=2)
    sources = [
        numbered(*(f"q{n}" for n in range(8))),
        numbered(*(f"k{n}" for n in range(4))),
        numbered(*(f"v{n}" for n in range(4))),
    ]
    expected = numbered(
        "q0", "q1", "q2", "q3", "k0", "k1", "v0", "v1", "q4", "q5", "q6", "q7", "k2", "k3", "v2", "v3"
    )
    assert torch.equal(QKV().shard(sources, shape, 0, 1), expected)


def test_without_grouped_queries_each_head_has_its_own_key_and_value():
    shape = dataclasses.replace(QKV_SHAPE, num_attention_heads=2, num_query_groups=2)
    sources = [numbered("q0", "q1"), numbered("k0", "k1"), numbered("v0", "v1")]
    assert torch.equal(QKV().shard(sources, shape, 0, 1), numbered("q0", "k0", "v0", "q1", "k1", "v1"))


def test_every_rank_holds_its_gate_above_its_up():
    gate, up = numbered("q0", "q1", "q2", "q3"), numbered("k0", "k1", "k2", "k3")
    assert torch.equal(GateUp().shard([gate, up], QKV_SHAPE, 0, 2), numbered("q0", "q1", "k0", "k1"))
    assert torch.equal(GateUp().shard([gate, up], QKV_SHAPE, 1, 2), numbered("q2", "q3", "k2", "k3"))


def test_padding_rows_of_a_vocabulary_are_zero_and_last():
    (table,) = sources_of([(130, HIDDEN)])
    parts = [
        Vocabulary(512).shard([table], SHAPE, rank, 4) for rank in range(4)
    ]  # the last two are all padding
    whole = torch.cat(parts)
    assert torch.equal(whole[:130], table) and not whole[130:].any() and whole.shape == (512, HIDDEN)


def test_padding_that_training_filled_does_not_come_back():
    (table,) = sources_of([(130, HIDDEN)])
    parts = [Vocabulary(256).shard([table], SHAPE, rank, 2) for rank in range(2)]
    parts[1][2:] = 7.0
    (joined,) = Vocabulary(256).join(parts, SHAPE)
    assert torch.equal(joined, table)


@pytest.mark.parametrize("rows", [129, 131])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_table_that_is_not_as_long_as_the_config_says_is_refused(rows, rank):
    """Cut short or filled up with zeros it would pass for a whole one."""
    with pytest.raises(DataError, match=f"table has {rows} rows but config.json a vocab_size of 130"):
        Vocabulary(256).shard([torch.ones(rows, HIDDEN)], SHAPE, rank, 2)


def test_cutting_leaves_the_sources_alone():
    for layout, sizes, _ in CASES.values():
        sources = sources_of(sizes)
        for rank in range(2):
            layout.shard(sources, SHAPE, rank, 2)
        assert all(torch.equal(a, b) for a, b in zip(sources, sources_of(sizes), strict=True))
