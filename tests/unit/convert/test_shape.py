"""Sizes of models: padding, pipeline stages, rotary frequencies, and what a layout must divide."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scope.convert.shape import (
    ModelShape,
    RopeScaling,
    check_layout,
    padded_vocab_size,
    rope_settings,
    spread_layers,
)
from megatron_scope.errors import ConfigError

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=200)

SHAPE = ModelShape(
    num_layers=8,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=8,
    vocab_rows=130,
    max_positions=131072,
    norm_epsilon=1e-6,
    rope_theta=500000.0,
    rope_scaling=None,
    tied_embeddings=False,
    qkv_bias=False,
    qk_norm=False,
)


# ---- vocabulary


@pytest.mark.parametrize(
    ("rows", "tensor", "expected"),
    [
        (151_936, 1, 151_936),
        (151_936, 2, 152_064),
        (151_936, 4, 152_064),
        (151_936, 8, 152_576),
        (128, 1, 128),
        (129, 1, 256),
        (1, 8, 1024),
    ],
)
def test_vocabularies_are_padded_as_megatron_pads_them(rows, tensor, expected):
    assert padded_vocab_size(rows, tensor) == expected


@REPEATABLE
@given(st.integers(1, 300_000), st.integers(1, 64))
def test_the_padded_size_is_the_smallest_multiple_that_holds_all_rows(rows, tensor):
    padded = padded_vocab_size(rows, tensor)
    assert padded % (128 * tensor) == 0 and 0 <= padded - rows < 128 * tensor


# ---- pipeline stages


@pytest.mark.parametrize(
    ("layers", "stages", "expected"),
    [
        (8, 1, (8,)),
        (8, 2, (4, 4)),
        (9, 2, (5, 4)),
        (10, 4, (2, 3, 3, 2)),
        (10, 3, (3, 4, 3)),
        (126, 16, (7, *(8,) * 14, 7)),
        (2, 4, (0, 1, 1, 0)),
    ],
)
def test_middle_stages_take_the_layers_that_are_left_over(layers, stages, expected):
    assert spread_layers(layers, stages) == expected


@REPEATABLE
@given(st.integers(0, 200), st.integers(1, 32))
def test_layers_are_spread_as_evenly_as_can_be(layers, stages):
    sizes = spread_layers(layers, stages)
    assert len(sizes) == stages and sum(sizes) == layers and max(sizes) - min(sizes) <= 1
    # From either end to the middle, stages do not get smaller.
    for half in (sizes[: (stages + 1) // 2], sizes[::-1][: stages // 2]):
        assert list(half) == sorted(half)


# ---- layouts


def test_a_layout_that_fits_is_accepted():
    for tensor, stages in ((1, (8,)), (2, (4, 4)), (4, (1, 7)), (4, (0, 8, 0))):
        check_layout(SHAPE, tensor, stages, "model")


@pytest.mark.parametrize(
    ("changes", "tensor", "problem"),
    [
        ({"num_attention_heads": 6}, 4, "models/s has 6 attention heads, which 4 does not divide"),
        ({}, 8, "models/s has 4 query groups, which 8 does not divide"),
        ({"ffn_hidden_size": 97}, 2, "models/s has 97 MLP rows, which 2 does not divide"),
    ],
)
def test_a_tensor_size_that_does_not_divide_the_model_is_refused(changes, tensor, problem):
    with pytest.raises(ConfigError) as raised:
        check_layout(dataclasses.replace(SHAPE, **changes), tensor, (8,), "models/s")
    message = f"parallel.tensor is {tensor} but {problem}; use a smaller parallel.tensor"
    assert str(raised.value) == message


@pytest.mark.parametrize("stages", [(4, 3), (4, 5), (9, -1), (7,)])
def test_stages_that_do_not_add_up_are_refused(stages):
    with pytest.raises(ConfigError, match=r"pipeline_layers is \[.*; models/s has 8"):
        check_layout(SHAPE, 1, stages, "models/s")


# ---- rotary frequencies


def of_transformers(rope):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=SHAPE.hidden_size,
        num_attention_heads=SHAPE.num_attention_heads,
        head_dim=rope.pop("head_dim"),
        max_position_embeddings=131072,
        rope_parameters=rope,
    )
    return LlamaRotaryEmbedding(config).inv_freq


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1000000.0])
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_frequencies_have_the_bits_of_transformers(theta, head_dim):
    ours = dataclasses.replace(SHAPE, rope_theta=theta, head_dim=head_dim).inverse_frequencies()
    theirs = of_transformers({"rope_type": "default", "rope_theta": theta, "head_dim": head_dim})
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "scaling",
    [RopeScaling(8.0, 1.0, 4.0, 8192), RopeScaling(32.0, 1.0, 4.0, 8192), RopeScaling(4.0, 2.0, 8.0, 1024)],
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rescaled_frequencies_have_the_bits_of_transformers(scaling, head_dim):
    ours = dataclasses.replace(SHAPE, rope_scaling=scaling, head_dim=head_dim).inverse_frequencies()
    theirs = of_transformers(
        {
            "rope_type": "llama3",
            "rope_theta": SHAPE.rope_theta,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
            "head_dim": head_dim,
        }
    )
    plain = dataclasses.replace(SHAPE, head_dim=head_dim).inverse_frequencies()
    # Short waves are kept, long ones slowed by the factor, and some lie between: all three are compared.
    kept, slowed = ours == plain, torch.isclose(ours, plain / scaling.factor, rtol=1e-6)
    assert kept.any() and slowed.any() and (~kept & ~slowed).any()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_theta": 5.0}, {"rope_theta": 5.0}),
        ({"rope_theta": 5.0, "rope_scaling": None}, {"rope_theta": 5.0}),
        (
            {"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_theta": 5.0, "rope_type": "linear", "factor": 2},
        ),
        (
            {"rope_theta": 5.0, "rope_scaling": {"rope_type": "llama3", "type": "other"}},
            {"rope_theta": 5.0, "rope_type": "llama3"},
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "rope_theta": 5.0},
            {"rope_type": "default", "rope_theta": 7.0},
        ),
    ],
)
def test_rotary_settings_are_read_from_old_and_new_configs(config, expected):
    before = str(config)
    assert rope_settings(config, "config.json") == expected
    assert str(config) == before
